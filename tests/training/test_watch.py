import jax.numpy as jnp
import pytest

from rfjax.training.watch import DIVERGED, WINDOW, DivergedError, Watch


def test_means_of_what_came_since_the_last_look():
    watch = Watch()
    watch.add(1, {"model/loss": jnp.array(1.0)})
    watch.add(2, {"model/loss": jnp.array(3.0), "critic/loss": jnp.array(5.0)})
    assert watch.look() == {"model/loss": 2.0, "critic/loss": 5.0}
    assert watch.look() == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_named_with_its_step(value):
    watch = Watch()
    watch.add(6, {"model/gradient_norm": jnp.array(1.0)})
    watch.add(7, {"model/gradient_norm": jnp.array(value)})
    with pytest.raises(DivergedError, match="model/gradient_norm of step 7"):
        watch.look()


def test_a_loss_that_has_grown_beyond_measure_has_diverged():
    watch = Watch()
    for loss in (1.0, 0.5, 0.5 * DIVERGED):
        for step in range(WINDOW):
            watch.add(step, {"model/loss": jnp.array(loss), "model/gradient_norm": jnp.array(loss**4)})
            watch.look()
    watch.add(4, {"model/loss": jnp.array(0.6 * DIVERGED)})
    with pytest.raises(DivergedError, match=r"model/loss has grown to 25.25 from 0.5, as means of 20 updates"):
        watch.look()


def test_few_steps_tell_nothing_of_growth():
    """The first generator's loss in distribution matching, where critic and teacher are the same."""
    watch = Watch()
    for step in range(WINDOW - 1):
        watch.add(step, {"generator/loss": jnp.array(1e-6 if step == 0 else 1.0)})
    assert watch.look()
