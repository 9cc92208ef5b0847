import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden
from golden_weights import golden_params

from rfjax import memory
from rfjax.config import ModelConfig, TransformerConfig, VAEConfig
from rfjax.errors import UserError
from rfjax.models import vae
from rfjax.models.functional import abstract_params, bind, init_params
from rfjax.models.transformer import WanTransformer
from rfjax.training.losses import distribution_matching_loss, match_distributions
from rfjax.training.stage import Stage
from rfjax.training.stages.self_forcing import SelfForcingStage, last_image

NETWORK = TransformerConfig(
    text_len=4, in_dim=2, dim=16, ffn_dim=24, freq_dim=8, text_dim=6, out_dim=2, num_heads=2, num_layers=2
)
VAE = VAEConfig(
    dim=4,
    z_dim=2,
    dim_mult=(1, 1),
    num_res_blocks=1,
    temporal_downsample=(True,),
    latent_mean=(0.1, 0.2),
    latent_std=(0.5, 2.0),
)
CONFIG = ModelConfig(transformer=NETWORK, vae=VAE, chunk_frames=2, denoising_steps=(1000, 500))


def make(**settings) -> SelfForcingStage:
    policy = memory.create("self_forcing", window_frames=4)
    return SelfForcingStage(
        **{"config": CONFIG, "policy": policy, "latent_frames": 6, "latent_size": (4, 4)} | settings
    )


@pytest.fixture(scope="module")
def game():
    """Parameters of both players, what is frozen, and a batch."""
    generator, critic, teacher = (init_params(WanTransformer, NETWORK, jax.random.key(i)) for i in range(3))
    embeds = jax.random.normal(jax.random.key(3), (3, 4, 6))
    params = {"generator": {"transformer": generator}, "critic": {"transformer": critic}}
    return params, {"teacher": teacher, "negative_embeds": embeds[:1]}, {"prompt_embeds": embeds[1:]}


def nonzero(tree) -> list[bool]:
    return [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree)]


def test_is_a_stage_whose_generator_learns_first_at_every_fifth_step():
    stage = make()
    assert isinstance(stage, Stage)
    turns = [stage.turn(step) for step in range(7)]
    both, critic = ("generator", "critic"), ("critic",)
    assert turns == [both, critic, critic, critic, critic, both, critic]


def test_losses_of_pytorch(golden_config):
    data = {name: jnp.asarray(value) for name, value in golden("dmd").items()}
    expected = abstract_params(WanTransformer, golden_config.transformer)
    critic = golden_params("fake_score_tiny.pth", "transformer", expected)
    teacher = golden_params("wan_bidirectional_tiny.pth", "transformer", expected)
    frozen = {"teacher": teacher, "negative_embeds": data["negative_context"]}
    stage = make(config=golden_config, policy=memory.create("relax_forcing"), latent_size=(6, 8))
    given = data["context"], data["noise"], data["timestep"]

    @jax.jit
    def losses(x):
        loss = jax.value_and_grad(lambda x: stage.generator_loss(critic, frozen, x, *given), has_aux=True)
        return loss(x), stage.critic_loss(critic, x, *given)

    ((loss, metrics), by_x), critic_loss = losses(data["x"])
    assert float(loss) == pytest.approx(float(data["loss"]), abs=5e-5)
    assert float(metrics["score_gradient"]) == pytest.approx(float(jnp.abs(data["gradient"]).mean()), abs=5e-5)
    assert float(critic_loss) == pytest.approx(float(data["critic_loss"]), abs=5e-5)
    np.testing.assert_allclose(by_x * by_x.size, data["dloss_dx"] * by_x.size, atol=5e-5)


def test_a_weak_teacher_that_is_the_teacher_changes_nothing(game):
    params, frozen, batch = game
    critic, x = params["critic"]["transformer"], jax.random.normal(jax.random.key(7), (2, 6, 4, 4, 2))
    given = x, batch["prompt_embeds"], jnp.ones_like(x), jnp.full((2, 6), 500.0)

    def learned(stage, **weak):
        return jax.grad(lambda x: stage.generator_loss(critic, {**frozen, **weak}, x, *given[1:])[0])(x)

    alone, led = learned(make()), learned(make(weak_guidance=0.5), weak_teacher=frozen["teacher"])
    np.testing.assert_allclose(led, alone, rtol=1e-4, atol=1e-6)
    other = learned(make(weak_guidance=0.5), weak_teacher=critic)
    assert float(jnp.abs(other - alone).max()) > 0.01 * float(jnp.abs(alone).max())


def test_teachers_of_other_sizes_are_scores_as_any(game):
    """The gradient in the latents is that of the losses with the teachers' own networks."""
    params, frozen, batch = game
    critic, x = params["critic"]["transformer"], jax.random.normal(jax.random.key(7), (2, 6, 4, 4, 2))
    embeds, noise, timestep = batch["prompt_embeds"], jnp.ones_like(x), jnp.full((2, 6), 500.0)
    large = dataclasses.replace(NETWORK, dim=3 * NETWORK.dim, num_heads=3 * NETWORK.num_heads, num_layers=2)
    small = dataclasses.replace(NETWORK, ffn_dim=NETWORK.ffn_dim // 2)
    teachers = {
        name: init_params(WanTransformer, sizes, jax.random.key(8))
        for name, sizes in (("teacher", large), ("weak_teacher", small))
    }

    def score(sizes, params, embeds):
        network = bind(WanTransformer, sizes, params)
        text = network.embed_text(embeds)
        return lambda noisy, timestep: network(noisy, timestep, text)[0]

    def by_stage(x):
        stage = make(teacher=large, weak_teacher=small, weak_guidance=0.5)
        return stage.generator_loss(critic, {**frozen, **teachers}, x, embeds, noise, timestep)[0]

    def by_hand(x):
        negative = jnp.repeat(frozen["negative_embeds"], 2, axis=0)
        cond, uncond = (score(large, teachers["teacher"], given) for given in (embeds, negative))
        weak = score(small, teachers["weak_teacher"], embeds)
        fake = score(NETWORK, critic, embeds)
        shift = CONFIG.timestep_shift
        matching = match_distributions(fake, cond, uncond, x, noise, timestep, shift, 3.0, weak, 0.5)
        return distribution_matching_loss(x, matching.gradient)

    np.testing.assert_allclose(jax.grad(by_stage)(x), jax.grad(by_hand)(x), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_each_player_learns_alone_and_the_key_decides_everything(game):
    params, frozen, batch = game
    stage = make()

    for player, other in (("generator", "critic"), ("critic", "generator")):

        def loss(everyone, key, player=player):
            networks, teacher = everyone
            return stage.loss(player, networks, {**frozen, "teacher": teacher}, batch, key)[0]

        learn = jax.jit(jax.value_and_grad(loss))
        everyone = (params, frozen["teacher"])
        value, (gradients, of_teacher) = learn(everyone, jax.random.key(0))
        assert all(nonzero(gradients[player]))
        assert not any(nonzero((gradients[other], of_teacher)))
        again = learn(everyone, jax.random.key(0))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, (value, (gradients, of_teacher)))))
        assert float(learn(everyone, jax.random.key(1))[0]) != float(value)


def test_the_critic_learns_what_the_generator_makes(game):
    params, frozen, batch = game
    stage, optimizer = make(latent_frames=4), optax.adam(3e-3)

    def loss(critic, key):
        return stage.loss("critic", {**params, "critic": critic}, frozen, batch, key)[0]

    @jax.jit
    def train(critic):
        def step(carry, key):
            critic, state = carry
            value, gradients = jax.value_and_grad(loss)(critic, key)
            changes, state = optimizer.update(gradients, state)
            return (optax.apply_updates(critic, changes), state), value

        keys = jax.random.split(jax.random.key(4), 30)
        return jax.lax.scan(step, (critic, optimizer.init(critic)), keys)[1]

    losses = np.asarray(train(params["critic"]))
    assert losses[-8:].mean() < 0.8 * losses[:8].mean()


@pytest.fixture(scope="module")
def vae_params():
    return init_params(vae.WanVAE, VAE, jax.random.key(5))


@pytest.mark.slow
def test_a_longer_rollout_ends_in_a_window_that_begins_with_an_image(vae_params):
    stage = make(window_frames=4)
    latents = jax.random.normal(jax.random.key(6), (2, 6, 4, 4, 2))
    image = vae.decode(VAE, vae_params, latents[:, :3])[:, -1:]
    np.testing.assert_allclose(last_image(VAE, vae_params, latents[:, :3]), image, atol=1e-5)
    seen = stage.window(latents, vae_params)
    np.testing.assert_allclose(seen[:, :1], vae.encode(VAE, vae_params, image), atol=1e-5)
    np.testing.assert_array_equal(seen[:, 1:], latents[:, 3:])
    assert make().window(latents, None) is latents
    with pytest.raises(UserError, match="needs the frozen network 'vae'"):
        stage.window(latents, None)


def test_the_chunk_of_the_image_teaches_nothing(game):
    params, frozen, batch = game
    stage = make(window_frames=4)

    def by_latents(x):
        given = batch["prompt_embeds"], jnp.ones_like(x), jnp.full((2, 4), 500.0)
        return stage.generator_loss(params["critic"]["transformer"], frozen, x, *given)[0]

    gradient = jax.jit(jax.grad(by_latents))(jax.random.normal(jax.random.key(6), (2, 4, 4, 4, 2)))
    assert not gradient[:, :2].any()
    assert gradient[:, 2:].all()


@pytest.mark.slow
def test_the_generator_learns_from_longer_rollouts(game, vae_params):
    params, frozen, batch = game
    stage = make(window_frames=4)

    def loss(networks):
        return stage.loss("generator", networks, {**frozen, "vae": vae_params}, batch, jax.random.key(0))[0]

    assert all(nonzero(jax.jit(jax.grad(loss))(params)["generator"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_frames": 5}, "latent_frames is 5; a multiple of the chunk's 2 is needed"),
        ({"window_frames": 3}, "window_frames is 3; a multiple of the chunk's 2 is needed"),
        ({"window_frames": 2}, "window_frames is 2; a longer rollout needs more than one chunk in it"),
        ({"latent_size": (4, 5)}, r"latent_size is \[4, 5\]; multiples of the patch's 2 are needed"),
        ({"config": ModelConfig(transformer=NETWORK, chunk_frames=2), "window_frames": 4}, "needs an autoencoder"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
