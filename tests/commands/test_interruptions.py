"""Ctrl-C and SIGTERM only where they can do no harm."""

import gc
import importlib
import signal
import sys
import threading
import time

import pytest

from rfjax.commands.interruptions import Interruptions, Terminated, signals_raise

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
    with signals_raise(), Interruptions():
        during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert all(new != old for new, old in zip(during, before, strict=True))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_all_runs_without_handlers():
    steps = []

    def run():
        with signals_raise(), Interruptions() as interruptions:
            interruptions.check()
            steps.append("computed")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert steps == ["computed"]


@BOTH
def test_a_signal_becomes_an_exception_so_that_blocks_end(number, raised):
    def run():
        with signals_raise():
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert caught.type is raised


@BOTH
def test_a_signal_lets_a_module_be_imported_whole(number, raised, tmp_path, monkeypatch):
    (tmp_path / "struck.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def run():
        with signals_raise():
            modules.append(importlib.import_module("struck"))
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert caught.type is raised
    assert modules[0].whole
    del sys.modules["struck"]


@BOTH
def test_a_signal_is_not_lost_where_nothing_can_be_raised(number, raised, capfd):
    struck = []

    def callback(phase, info):
        if not struck:
            struck.append(phase)
            signal.raise_signal(number)

    def run():
        with signals_raise():
            gc.collect()
            time.sleep(10)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            run()
    finally:
        gc.callbacks.remove(callback)
    assert caught.type is raised
    assert struck
    assert capfd.readouterr().err == ""
