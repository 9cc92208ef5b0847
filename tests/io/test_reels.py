"""The finished chunks of an unfinished video."""

import numpy as np
import pytest

from rfjax.io.reels import DamagedReelError, Reel


def test_chunks_come_back_as_they_were_and_one_may_be_replaced(tmp_path):
    reel = Reel(tmp_path / "below" / "reel")
    for index in (0, 1, 1):
        reel.add(index, {"frames": np.full((2, 4), index, np.uint8), "seconds": np.asarray(0.5)})
    first, second = reel.chunks(2)
    assert second["frames"].dtype == np.uint8
    assert (first["frames"].sum(), second["frames"].sum(), float(second["seconds"])) == (0, 8, 0.5)
    reel.remove()
    assert not (tmp_path / "below" / "reel").exists()


@pytest.mark.parametrize("size", [None, 0, 60])
def test_a_chunk_that_is_missing_or_cut_is_said_to_be(tmp_path, size):
    reel = Reel(tmp_path)
    reel.add(0, {"frames": np.zeros(9)})
    if size is None:
        (tmp_path / "000000.npz").unlink()
    else:
        with open(tmp_path / "000000.npz", "r+b") as file:
            file.truncate(size)
    with pytest.raises(DamagedReelError, match=r"000000\.npz cannot be read"):
        list(reel.chunks(1))
