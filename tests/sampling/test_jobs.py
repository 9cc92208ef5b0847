"""Work lists and batches."""

from hypothesis import given
from hypothesis import strategies as st

from rfjax.sampling.jobs import Job, batches, expand


def test_prompts_by_samples_in_order_and_repeats_once():
    assert expand(["a", "b", "a"], 2) == [Job("a", 0), Job("a", 1), Job("b", 0), Job("b", 1)]
    assert [job.video for job in expand(["a cat"], 2)] == ["a cat-0.mp4", "a cat-1.mp4"]


@given(st.integers(0, 60), st.integers(1, 20))
def test_batches_are_equal_few_and_complete(count, batch_size):
    jobs = expand(["x"], count)
    result = batches(jobs, batch_size)
    assert len({len(batch) for batch in result}) <= 1
    assert all(len(batch) <= batch_size for batch in result)
    assert len(result) == -(-count // batch_size)
    assert list(dict.fromkeys(job for batch in result for job in batch)) == jobs
    assert sum(map(len, result)) - count < max(len(result), 1)


def test_five_videos_in_fours_are_two_batches_of_three():
    result = batches(expand(["x"], 5), 4)
    assert [[job.sample for job in batch] for batch in result] == [[0, 1, 2], [3, 4, 4]]


def test_batches_divide_among_devices():
    assert batches(list("abc"), 1, 2) == [["a", "b"], ["c", "c"]]
    assert batches(list("abcde"), 2, 2) == [["a", "b", "c", "d"], ["e"] * 4]
    assert [len(batch) for batch in batches(list(range(9)), 4, 3)] == [9]
    assert batches([], 4, 3) == []
