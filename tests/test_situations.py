"""Every situation in which a wrong answer would be silent, and the judge itself."""

import warnings

import numpy as np
import pytest

from ntk_awt.errors import InputError
from tests.situations import Situation, __main__, collect, near, refused, same, warned


@pytest.mark.parametrize("one", collect(), ids=lambda one: one.name)
def test_situation(one: Situation):
    found = one.outcome()
    assert found.agrees, f"came: {found.came}\nright: {found.right}"


def _refuse(text: str):
    raise InputError(text, expected="a", got="b")


def _warn(*texts: str):
    for text in texts:
        warnings.warn(text, stacklevel=1)


def test_the_judge_says_no():
    """Each maker of outcomes on what is right, and on what is wrong in each way."""
    assert near(1.0, 1.0).agrees
    assert near([1.0, 2.0], [1.1, 2.0], relative=0.06).agrees
    assert not near(np.nan, np.nan).agrees
    assert not near([1.0], [1.0, 1.0], absolute=1).agrees
    assert not near(1.1, 1.0, absolute=0.09).agrees
    assert same((1, 2), (1, 2)).agrees
    assert not same(1, 2).agrees
    assert refused(lambda: _refuse("mask"), "mask", "expected a").agrees
    assert not refused(lambda: _refuse("mask"), "gain").agrees
    assert not refused(lambda: _refuse("two\nlines"), "two").agrees
    assert not refused(lambda: 1).agrees
    assert not refused(lambda: {}["mask"], "mask").agrees
    assert warned(lambda: _warn("mask moved"), "mask").agrees
    assert not warned(lambda: _warn("mask moved"), "gain").agrees
    assert not warned(lambda: _warn("mask", "mask"), "mask").agrees
    assert not warned(lambda: None).agrees


def test_a_differing_situation_is_exit_code_1(monkeypatch, capsys):
    def crash():
        raise KeyError("labels")

    good, bad = Situation("good", lambda: same(1, 1)), Situation("bad", lambda: same(1, 2))
    monkeypatch.setattr(__main__, "collect", lambda: [good])
    assert __main__.main([]) == 0
    assert __main__.main(["nothing like it"]) == 1
    for wrong in (bad, Situation("crash", crash)):
        monkeypatch.setattr(__main__, "collect", lambda wrong=wrong: [good, wrong])
        assert __main__.main([]) == 1
        assert "1 of 2 agree" in capsys.readouterr().out
