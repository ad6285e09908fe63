"""The rules that judge statements, how they are run, the command and its page."""

import doctest
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ntk_awt.app.cli import commands as cli
from ntk_awt.errors import InputError, check_count
from proofs_check import core, page
from proofs_check import runner as verification
from proofs_check.core import Context, Line, Outcome, Panel, Statement

FILES = ["core", "runner", "page", *verification.MODULES.values()]

# ---------------------------------------------------------------- rules


def test_below_finds_one_violation_among_many():
    rng = np.random.default_rng(0)
    actual = rng.uniform(size=1000)
    bound = actual * rng.uniform(1, 3, size=1000)
    held = core.below("bound", actual, bound)
    assert held.holds
    assert held.tightness == pytest.approx(np.median(bound / actual))
    worst = actual.copy()
    worst[417] = bound[417] * (1 + 1e-6)
    broken = core.below("bound", worst, bound)
    assert not broken.holds
    assert broken.margin == pytest.approx(-1e-6, rel=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_holds(bad):
    values = np.array([1.0, bad])
    assert not core.below("left", values, 2.0).holds
    assert not core.below("right", 1.0, np.array([2.0, np.nan])).holds
    assert not core.close("one", values, [1.0, 2.0], tolerance=1e3).holds
    growing = np.array([[1.0, 2.0, 4.0]] * 2 + [[1.0, bad, 4.0]])
    assert not core.slope("one", [1, 2, 4], growing, low=-9, high=9).holds


def test_nothing_above_nothing():
    assert core.below("equal", 0.0, 0.0).holds
    assert not core.below("more", 1e-300, 0.0).holds


def test_close_is_relative_and_symmetric_in_sign():
    expected = np.array([3.0, -4.0])
    assert core.close("in", expected * (1 + 0.9e-6), expected, tolerance=1e-6).holds
    for factor in (1 + 1.1e-6, 1 - 1.1e-6, -1):
        assert not core.close("out", expected * factor, expected, tolerance=1e-6).holds
    with pytest.raises(ValueError, match="shapes"):
        core.close("broadcast", np.ones((2, 1)), np.ones((1, 2)), tolerance=1)


def test_slope_agrees_with_a_fit_and_uses_the_interval():
    rng = np.random.default_rng(1)
    sizes = 2.0 ** np.arange(6, 12)
    values = sizes**-0.5 * np.exp(0.05 * rng.standard_normal((6, 6)))
    found = core.fit_slope(sizes, values)
    slopes = [np.polyfit(np.log(sizes), np.log(row), 1)[0] for row in values]
    low, high = scipy.stats.t.interval(0.95, 5, np.mean(slopes), scipy.stats.sem(slopes))
    assert found == pytest.approx((np.mean(slopes), low, high))
    assert core.slope("root", sizes, values, low=-0.6, high=-0.4).holds
    # A mean inside does not do, if the interval is not.
    assert low < found.slope - 1e-3
    assert not core.slope("root", sizes, values, low=found.slope - 1e-3, high=0).holds
    with pytest.raises(ValueError, match="seeds"):
        core.fit_slope(sizes, values[:2])


def test_slope_covers_the_truth():
    rng = np.random.default_rng(2)
    sizes = np.array([1.0, 2.0, 4.0, 8.0])
    noise = np.exp(0.2 * rng.standard_normal((400, 5, 4)))
    fits = [core.fit_slope(sizes, sizes**-0.5 * rows) for rows in noise]
    share = np.mean([fit.low <= -0.5 <= fit.high for fit in fits])
    assert 0.91 <= share <= 0.985  # 95 % of 400 draws, ± 3.5 standard deviations


def test_controls():
    def rejected(broken: core.Case | Callable[[], Any]) -> bool:
        return core.control("wrong", broken, core.FORMULA).rejected

    assert rejected(core.below("b", 2.0, 1.0))
    assert not rejected(core.below("b", 1.0, 2.0))
    assert not rejected(core.below("b", np.nan, 1.0))  # no number, so nothing is shown
    assert rejected(lambda: check_count("n", 0, low=1))
    assert not rejected(lambda: check_count("n", 1, low=1))


# ---------------------------------------------------------------- running

GOOD = core.below("half", 1.0, 2.0)
BAD = core.below("twice", 2.0, 1.0)
REJECTED, ACCEPTED = (
    core.control(name, case, core.FORMULA) for name, case in (("wrong", BAD), ("right", GOOD))
)


def proof(outcome: Outcome, number: str = "D1", *hypotheses: str) -> verification.Proof:
    one = Statement(
        number, "A title", "a claim", "a ≤ b", dict.fromkeys(hypotheses, "is given"),
        "numbers", "a ≤ b.", "none.", "here",
    )  # fmt: skip
    return verification.Proof(one, lambda context: outcome)


PANEL = Panel(
    "both <sides>", "time [steps]", "gap [logits]",
    [Line("actual", [1, 2], [1, 2]), Line("bound", [1, 2], [2, 4], "bound")],
)  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """Replaces the statements' files by given outcomes."""

    def use(**outcomes: Outcome) -> None:
        found = {number: proof(outcome, number) for number, outcome in outcomes.items()}
        monkeypatch.setattr(verification, "load", found.__getitem__)
        monkeypatch.setattr(verification, "MODULES", dict.fromkeys(found, ""))

    return use


@pytest.mark.parametrize(
    ("cases", "controls", "holds"),
    [
        ([GOOD], [REJECTED], True),
        ([GOOD, BAD], [REJECTED], False),
        ([GOOD], [REJECTED, ACCEPTED], False),
        ([GOOD], [], False),
        ([], [REJECTED], False),
    ],
)
def test_a_statement_needs_cases_that_hold_and_controls_that_fail(fake, cases, controls, holds):
    fake(D1=Outcome(cases, controls))
    (result,) = verification.verify(["D1"])
    assert result.holds is holds
    assert result.record()["holds"] is holds
    assert (page.complaints(result) == []) is holds


def test_every_hypothesis_needs_a_control_that_breaks_it(monkeypatch):
    def judged(*breaks: str) -> verification.Result:
        controls = [core.control("wrong", BAD, name) for name in breaks]
        found = proof(Outcome([GOOD], controls), "D1", "convex", "bounded")
        monkeypatch.setattr(verification, "load", {"D1": found}.__getitem__)
        return verification.verify(["D1"])[0]

    assert judged("convex", "bounded", core.FORMULA).holds
    result = judged("bounded", core.FORMULA)
    assert not result.holds
    assert result.unbroken == ["convex"]
    assert page.complaints(result) == ["D1 fails: no control breaks: convex"]


def test_the_recorder_keeps_what_it_judged():
    check = core.Recorder(proof(Outcome([], []), "D1", "convex").statement)
    check.below("half", 1.0, 2.0)
    check.close("same", 1.0, 1.0, tolerance=1e-9)
    check.slope("line", [1, 2, 4], [[1, 2, 4]] * 3, low=0.9, high=1.1)
    check.case(BAD)
    check.control("wrong", BAD, breaks="convex")
    check.control("passes", GOOD, breaks=core.FORMULA)
    check.control("refused", lambda: check_count("n", 0, low=1), breaks=core.FORMULA)
    check.panel(PANEL)
    check.skip("no data")
    with pytest.raises(ValueError, match="D1 has no hypothesis 'concave'"):
        check.control("wrong", BAD, breaks="concave")
    found = check.outcome()
    assert [case.holds for case in found.cases] == [True, True, True, False]
    assert [(one.rejected, one.breaks) for one in found.controls] == [
        (True, "convex"),
        (False, core.FORMULA),
        (True, core.FORMULA),
    ]
    assert found.panels == (PANEL,)
    assert found.skipped == ("no data",)


def test_precision_is_scoped(fake, monkeypatch):
    seen = []

    def check(context: Context) -> Outcome:
        seen.append(jnp.ones(()).dtype)
        return Outcome([GOOD], [REJECTED])

    one = proof(Outcome([], []))._replace(check=check)
    two = one._replace(statement=replace(one.statement, precision="float32"))
    monkeypatch.setattr(verification, "load", {"D1": one, "D2": two}.__getitem__)
    before = jnp.ones(()).dtype
    verification.verify(["D1", "D2"])
    verification.verify(["D1"], precision="float32")
    assert seen == ["float64", "float32", "float32"]
    assert jnp.ones(()).dtype == before


def test_context_is_reproducible():
    a, b = Context(seed=3), Context(seed=3)
    assert a.rng(1, 2).random() == b.rng(1, 2).random() != a.rng(2, 1).random()
    assert [Context(size=size).pick(1, 2, 3) for size in core.SIZES] == [1, 2, 3]


def test_unknown_names_and_sizes():
    with pytest.raises(InputError, match="statement: expected one of D1, D2"):
        verification.verify(["D11"])
    with pytest.raises(InputError, match="size"):
        verification.verify(["D1"], size="huge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="seed"):
        verification.verify(["D1"], seed=-1)


# ---------------------------------------------------------------- the command


def test_verify_command(fake, tmp_path, capsys):
    endless = core.Case("endless", True, math.inf, None, "always")
    fake(
        D1=Outcome([GOOD, endless], [REJECTED], [PANEL], ["no data: set NTK_AWT_DATA"]),
        P3=Outcome([GOOD], [REJECTED]),
    )
    file, html = tmp_path / "out.json", tmp_path / "deep" / "proofs.html"
    assert cli.main(["verify", "--json", str(file), "--report", str(html)]) == 0
    shown = capsys.readouterr()
    assert "D1: left out: no data" in shown.err
    assert "[rejected]" in shown.err
    first, second = json.loads(file.read_text())
    assert set(first) >= {"name", "statement", "holds", "margin", "tightness", "controls"}
    assert first["controls"] == [REJECTED._asdict()]
    assert first["cases"][1]["margin"] is None
    assert (second["name"], second["holds"], second["tightness"]) == ("P3", True, 2.0)
    text = html.read_text()
    assert text.count("<img") == 1
    assert "data:image/svg+xml;base64," in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # needs no other file


def test_verify_command_fails_when_a_statement_does(fake, capsys):
    fake(D1=Outcome([GOOD], [ACCEPTED]), P3=Outcome([GOOD], [REJECTED]))
    assert cli.main(["verify"]) == 1
    assert "D1: control not rejected: right" in capsys.readouterr().err
    assert cli.main(["verify", "P3"]) == 0


def test_results_so_far_survive_an_interruption(fake, monkeypatch, tmp_path):
    def stop(context: Context) -> Outcome:
        raise KeyboardInterrupt

    stopping = proof(Outcome([], []), "P3")._replace(check=stop)
    found = {"D1": proof(Outcome([GOOD], [REJECTED])), "P3": stopping}
    monkeypatch.setattr(verification, "load", found.__getitem__)
    file = tmp_path / "out.json"
    assert cli.main(["verify", "D1", "P3", "--json", str(file)]) == 130
    assert [row["name"] for row in json.loads(file.read_text())] == ["D1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "P9"], "statement: expected one of D1, D2"),
        (["verify", "--report", "page.pdf"], "--report: expected a file that ends in .html"),
        (["verify", "--seed", "-1"], "seed: expected a whole number ≥ 0"),
    ],
)
def test_bad_input_of_verify(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- all statements


@pytest.mark.parametrize("number", verification.MODULES)
def test_every_statement_says_what_it_is(number):
    found = verification.load(number).statement
    assert found.number == number
    texts = [found.title, found.claim, found.formula, found.instances, found.rule, found.tolerance]
    assert all(texts)
    assert found.hypotheses
    assert core.FORMULA not in found.hypotheses
    assert found.source


@pytest.mark.parametrize("module", FILES)
def test_docstring_examples(module: str):
    assert doctest.testmod(importlib.import_module(f"proofs_check.{module}")).failed == 0


@pytest.mark.parametrize("number", verification.MODULES)
def test_no_statement_imports_another(number):
    module = importlib.import_module(f"proofs_check.{verification.MODULES[number]}")
    source = inspect.getsource(module)
    imported = re.findall(r"from proofs_check(?:\.([\w.]+))? import", source)
    assert {name.split(".")[0] for name in imported} <= {"core", "instances"}
