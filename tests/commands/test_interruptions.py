"""Ctrl-C only where it can do no harm."""

import signal

import pytest

from rfjax.commands.interruptions import Interruptions


def test_ctrl_c_is_let_through_where_it_is_allowed():
    def wait_for_the_device():
        with Interruptions() as interruptions, interruptions.allowed():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        wait_for_the_device()


def test_ctrl_c_waits_elsewhere():
    steps = []

    def run():
        with Interruptions() as interruptions:
            signal.raise_signal(signal.SIGINT)
            steps.append("file written")
            with interruptions.allowed():
                steps.append("computed")

    with pytest.raises(KeyboardInterrupt):
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


def test_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with Interruptions():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
