"""Ctrl-C and SIGTERM only where they can do no harm."""

import signal
import threading

import pytest

from rfjax.commands.interruptions import Interruptions, Terminated, termination_raises

BOTH = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["SIGINT", "SIGTERM"]
)


@BOTH
def test_interruption_waits_for_the_next_check(number, raised):
    steps = []

    def run():
        with Interruptions() as interruptions:
            interruptions.check()
            signal.raise_signal(number)
            signal.raise_signal(number)  # out of impatience
            steps.append("file written")
            interruptions.check()
            steps.append("computed")

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert caught.type is raised
    assert steps == ["file written"]


def test_second_ctrl_c_does_not_disturb_cleaning_up():
    steps = []

    def run():
        with Interruptions() as interruptions:
            try:
                signal.raise_signal(signal.SIGINT)
                interruptions.check()
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
        with termination_raises(), Interruptions() as interruptions:
            interruptions.check()
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
