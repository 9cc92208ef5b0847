"""Work that is done beside other work."""

import threading

import pytest

from rfjax.io.meanwhile import Aside


def test_what_is_done_is_told_once_and_in_order():
    aside, order, go = Aside[str](), [], threading.Event()
    aside.begin("a", lambda: order.append("a"))
    aside.begin("b", lambda: order.append("b") if go.wait(30) else None)
    aside.begin("c", lambda: order.append("c"))
    assert next(aside.ended(wait=True)) == "a"
    assert list(aside.ended()) == []
    assert len(aside) == 2
    go.set()
    assert list(aside.ended(wait=True)) == order[1:] == ["b", "c"]
    assert len(aside) == 0
    aside.close()


def test_what_fails_is_told_in_its_turn():
    aside = Aside[int]()

    def fail():
        raise ValueError("the disk is full")

    for item, work in enumerate((lambda: None, fail, lambda: None)):
        aside.begin(item, work)
    told = aside.ended(wait=True)
    assert next(told) == 0
    with pytest.raises(ValueError, match="the disk is full"):
        next(told)
    assert list(aside.ended(wait=True)) == [2]
    aside.close()


def test_closing_waits_for_one_and_begins_no_other():
    aside, made, begun, go = Aside[int](), [], threading.Event(), threading.Event()

    def first():
        begun.set()
        go.wait(30)
        made.append(0)

    aside.begin(0, first)
    aside.begin(1, lambda: made.append(1))
    begun.wait(30)
    threading.Timer(0.2, go.set).start()
    aside.close()
    assert made == [0]
