"""scripts/separate_things.py: the words of a thing mean the same beside any other, and nothing else changes."""

import itertools

import jax
import numpy as np
import pytest
from conftest import script

from rfjax.data.shapes import COLOURS, KINDS, Scene, Shape, caption, held_out, random_scene
from rfjax.errors import UserError
from rfjax.io.checkpoints import load
from rfjax.sampling.codec import encode_prompt

BLUE_RING = "a blue ring bounces"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model of random weights before and after."""
    folder = tmp_path_factory.mktemp("models")
    script("make_random_checkpoint").main("moving_shapes", str(folder / "start"))
    module = script("separate_things")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CAPTIONS", 32)
        module.main([str(folder / "start"), str(folder / "apart"), "--steps", "50"])
    return load(folder / "start", dtype="float32"), load(folder / "apart", dtype="float32")


def embeddings(model, captions):
    return np.asarray(encode_prompt(model, captions))


@pytest.mark.parametrize("shown", [True, False], ids=["of training", "held out"])
def test_a_thing_means_the_same_beside_others(both, shown):
    captions = {True: [], False: []}
    for colour, kind in itertools.product(sorted(COLOURS.keys() - {"blue"}), KINDS):
        of_training = not held_out(pair("blue", "ring", colour, kind))
        captions[of_training].append(f"{BLUE_RING} and a {colour} {kind} bounces on a dark background")

    def deviation(model):
        mean = embeddings(model, captions[True])[:, :4].mean(0)
        return np.mean(np.square(embeddings(model, captions[shown])[:, :4] - mean))

    before, after = map(deviation, both)
    assert after < 0.5 * before


def pair(*names):
    return Scene("dark", (thing(*names[:2]), thing(*names[2:])), 0)


def thing(colour, kind):
    return Shape(colour, kind, "bounces", 0.2, (0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 0.0)


def test_things_stay_apart_from_each_other(both):
    _, after = both
    two = embeddings(after, [f"a {colour} ring bounces and a red circle turns" for colour in ("blue", "green")])
    assert np.mean(np.var(two[:, :4], axis=0)) > 0.05


def test_captions_of_one_thing_keep_their_embeddings(both):
    captions = [f"{BLUE_RING} on a dark background", "a red circle that bounces, gray background"]
    before, after = (embeddings(model, captions) for model in both)
    assert np.mean(np.square(after - before)) < 0.1 * np.mean(np.square(before))


def test_other_networks_keep_every_bit(both):
    before, after = both
    for name in ("transformer", "vae"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def test_targets_are_the_means_of_captions_of_training(both):
    """Against the obvious: one caption, one other thing at a time."""
    module, model = script("separate_things"), both[0]
    ids, mask, first = next(module.batches(np.random.default_rng(3), model.tokenizer))
    target = module.embeddings_apart(model.config.umt5, model.text_encoder, ids, mask, first)
    rng = np.random.default_rng(3)
    for number in range(4):
        scene = random_scene(rng, "train")
        texts = module.with_others(scene, rng)
        assert texts[0] == caption(scene)
        embeds = embeddings(model, texts)
        words, cut = (tokens(model, text) for text in (texts[0], before_second(scene)))
        assert (len(set(texts)) > 2) == (len(scene.shapes) == 2)
        np.testing.assert_allclose(target[number, :cut], embeds[1:9, :cut].mean(0), atol=1e-5)
        np.testing.assert_allclose(target[number, cut:words], embeds[9:, cut:words].mean(0), atol=1e-5)


def tokens(model, text):
    return len(model.tokenizer.vocabulary.encode(text, add_special_tokens=False).ids)


def before_second(scene):
    """The caption up to the colour of its second thing."""
    text = caption(scene)
    return text if len(scene.shapes) == 1 else text[: text.index(f" {scene.shapes[1].colour} {scene.shapes[1].kind}")]


@pytest.mark.parametrize(("words", "message"), [(["--steps", "0"], "--steps is 0; 1 or more is needed")])
def test_mistakes_name_what_is_wrong(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        script("separate_things").main([str(tmp_path / "none"), str(tmp_path / "to"), *words])
