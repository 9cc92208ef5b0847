"""Ctrl-C and SIGTERM only where they can do no harm."""

import contextlib
import signal
import threading

import pytest

from rfjax.commands.interruptions import Interruptions, Terminated, termination_raises

BOTH = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["SIGINT", "SIGTERM"]
)


@BOTH
def test_interruption_is_let_through_where_it_is_allowed(number, raised):
    def wait_for_the_device():
        with Interruptions() as interruptions, interruptions.allowed():
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as caught:
        wait_for_the_device()
    assert caught.type is raised


@BOTH
def test_interruption_waits_elsewhere(number, raised):
    steps = []

    def run():
        with Interruptions() as interruptions:
            signal.raise_signal(number)
            steps.append("file written")
            with interruptions.allowed():
                steps.append("computed")

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert caught.type is raised
    assert steps == ["file written"]


def test_interruption_that_python_swallows_is_raised_at_the_next_place():
    steps = []

    def run():
        with Interruptions() as interruptions:
            with interruptions.allowed(), contextlib.suppress(KeyboardInterrupt):  # as in an object's finaliser
                signal.raise_signal(signal.SIGTERM)
            steps.append("file written")
            with interruptions.allowed():
                steps.append("computed")

    with pytest.raises(Terminated):
        run()
    assert steps == ["file written"]


def test_second_ctrl_c_does_not_disturb_cleaning_up():
    steps = []

    def run():
        with Interruptions() as interruptions:
            try:
                with interruptions.allowed():
                    signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                steps.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert steps == ["cleaned up"]


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with termination_raises(), Interruptions():
        during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert all(new != old for new, old in zip(during, before, strict=True))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_all_runs_without_handlers():
    steps = []

    def run():
        with termination_raises(), Interruptions() as interruptions, interruptions.allowed():
            steps.append("computed")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert steps == ["computed"]


def test_termination_becomes_an_exception_so_that_blocks_end():
    def run():
        with termination_raises():
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        run()
