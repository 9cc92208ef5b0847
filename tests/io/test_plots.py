"""The picture of what a rollout remembered."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from rfjax.errors import UserError
from rfjax.io.plots import memory_timeline
from rfjax.memory import Trace

SINK, HISTORY, TAIL, OWN, CANDIDATE, PAST = (
    (int(color[:2], 16), int(color[2:4], 16), int(color[4:], 16))
    for color in ("0072B2", "D55E00", "009E73", "F0B400", "B5B5B5", "F0F0F0")
)


def trace_of(frames: np.ndarray, roles: np.ndarray, candidates: np.ndarray) -> Trace:
    attended, kinds = (jnp.asarray(entries)[:, :, None, :, None] for entries in (frames, roles))
    scored = jnp.asarray(candidates)[:, :, None]
    return Trace(attended, attended, kinds, scored[..., :0], scored, jnp.zeros(scored.shape))


def relax_trace(chunks: int, samples: int = 1) -> Trace:
    """Two sink frames, one history frame at half the past, one tail frame; sample 1 has no history."""
    frames = np.full((chunks, samples, 4), -1)
    roles = np.zeros((chunks, samples, 4), int)
    candidates = np.full((chunks, samples, 2), -1)
    for chunk in range(2, chunks):
        start = 3 * chunk
        frames[chunk] = [0, 1, start // 2, start - 1]
        roles[chunk] = [1, 1, 2, 3]
        candidates[chunk] = [start // 2, 3 * start // 4]
    frames[:, 1:, 2], roles[:, 1:, 2] = -1, 0
    return trace_of(frames, roles, candidates)


def pixels_of(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of exactly this colour, right of the legend's box."""
    rgb = np.round(image[..., :3] * 255).astype(int)
    rows, columns = np.nonzero((rgb == color).all(axis=-1))
    inside = columns > 0.4 * image.shape[1]
    return np.stack([rows[inside], columns[inside]], axis=1)


def draw(tmp_path, trace, **settings) -> np.ndarray:
    memory_timeline(trace, 3, tmp_path / "t.png", "relax_forcing", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]
    return imread(tmp_path / "t.png")


@pytest.mark.parametrize("chunks", [7, 80, 400])
def test_every_role_is_visible_where_it_belongs(tmp_path, chunks):
    image = draw(tmp_path, relax_trace(chunks))
    heights = {}
    for name, color in {"sink": SINK, "history": HISTORY, "tail": TAIL, "own": OWN, "candidate": CANDIDATE}.items():
        pixels = pixels_of(image, color)
        assert len(pixels) > 300, f"{name} cannot be seen"
        last_columns = pixels[pixels[:, 1] > pixels[:, 1].max() - 6]
        heights[name] = -last_columns[:, 0].mean()  # image rows count downwards
    assert heights["sink"] < heights["history"] < heights["candidate"] < heights["tail"] < heights["own"]


def test_sample_chooses_whose_memory_is_drawn(tmp_path):
    trace = relax_trace(7, samples=2)
    assert len(pixels_of(draw(tmp_path, trace, sample=0), HISTORY)) > 300
    assert len(pixels_of(draw(tmp_path, trace, sample=1), HISTORY)) == 0


def test_a_policy_without_candidates_and_a_single_chunk_can_be_drawn(tmp_path):
    none = np.full((1, 1, 0), -1)
    image = draw(tmp_path, trace_of(none, none, none))
    assert len(pixels_of(image, SINK)) == 0


def test_title_may_hold_anything(tmp_path):
    memory_timeline(relax_trace(3), 3, tmp_path / "t.png", "$x_{ 猫 🦊 \\frac")
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        memory_timeline(relax_trace(3), 3, tmp_path / "nowhere" / "t.png", "x")
