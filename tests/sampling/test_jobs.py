"""Work lists and batches."""

from hypothesis import given
from hypothesis import strategies as st

from rfjax.sampling.jobs import Job, batches, expand, longest_first, places_for, steps_needed


def test_prompts_by_samples_in_order():
    jobs = expand({"a": 3, "b": 6}, 2)
    assert jobs == [Job("a", 0, 3), Job("a", 1, 3), Job("b", 0, 6), Job("b", 1, 6)]
    assert [job.video for job in jobs[:2]] == ["a-0.mp4", "a-1.mp4"]
    assert longest_first(jobs) == [jobs[2], jobs[3], jobs[0], jobs[1]]


@given(st.integers(0, 60), st.integers(1, 20))
def test_batches_are_equal_few_and_complete(count, batch_size):
    jobs = expand({"x": 3}, count)
    result = batches(jobs, batch_size)
    assert len({len(batch) for batch in result}) <= 1
    assert all(len(batch) <= batch_size for batch in result)
    assert len(result) == -(-count // batch_size)
    assert list(dict.fromkeys(job for batch in result for job in batch)) == jobs
    assert sum(map(len, result)) - count < max(len(result), 1)


def test_five_videos_in_fours_are_two_batches_of_three():
    result = batches(expand({"x": 3}, 5), 4)
    assert [[job.sample for job in batch] for batch in result] == [[0, 1, 2], [3, 4, 4]]


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 8))
def test_places_are_equal_on_devices_and_no_more_than_the_rounds_need(count, batch_size, devices):
    places = places_for(count, batch_size, devices)
    rounds = max(1, -(-count // (batch_size * devices)))
    assert places % devices == 0
    assert devices <= places <= batch_size * devices
    assert rounds * places >= count
    assert places == devices or rounds * (places - devices) < count


@given(st.lists(st.integers(1, 30), max_size=4), st.lists(st.integers(1, 30), max_size=12), st.integers(4, 6))
def test_steps_are_those_of_a_batch_whose_places_take_the_next(seated, queued, places):
    ends, waiting, steps = [*seated], [*queued], 0
    while ends or waiting:
        while waiting and len(ends) < places:
            ends.append(waiting.pop(0))
        ends = [left - 1 for left in ends if left > 1]
        steps += 1
    assert steps_needed(seated, queued, places) == steps


@given(st.lists(st.integers(1, 80), min_size=20, max_size=60), st.integers(1, 4))
def test_longest_first_leaves_at_most_a_short_video_of_places_empty(lengths, places):
    queued = [job.latent_frames for job in longest_first(Job("x", i, n) for i, n in enumerate(lengths))]
    assert steps_needed([], queued, places) <= max(max(lengths), sum(lengths) / places + max(lengths))
