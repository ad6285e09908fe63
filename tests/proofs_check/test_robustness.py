"""The check of P4 passes, and sees defects planted in the library and in its own input."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from ntk_awt.robustness.certified import intervals
from proofs_check import p4_robustness as p4
from proofs_check.core import Context
from tests.proofs import check, why


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Patches that also reach what is compiled: it is forgotten before and after."""
    compiled: Any = intervals._propagated
    compiled.clear_cache()
    yield monkeypatch
    monkeypatch.undo()
    compiled.clear_cache()


def broken(part: Callable[[p4.Recorder, Context], None]) -> list[str]:
    """The names of the cases of one part that do not hold."""
    with jax.enable_x64(True):
        record = p4.Recorder(p4.STATEMENT)
        part(record, Context("reduced"))
    return [case.name for case in record.outcome().cases if not case.holds]


def test_robustness_is_preserved():
    result = check("P4")
    assert result.holds, why(result)
    names = [case.name for case in result.outcome.cases]
    assert sum("rigorous" in name for name in names) == 3
    assert sum("estimate" in name for name in names) == 1
    assert len(result.outcome.controls) == 8
    assert result.outcome.skipped


def test_a_constant_that_is_too_small_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intervals, "LIPSCHITZ", {"cross_entropy": 1.0, "logistic": 0.5})
    result = check("P4")
    assert not result.holds
    assert [case.name for case in result.outcome.cases if not case.holds] == [
        "library bound of the risks' difference, logistic models, L2",
        "MLP, L∞: the library's bound is √2·mean sup ‖D‖",
    ]


def test_the_gap_at_the_centre_is_seen(monkeypatch: pytest.MonkeyPatch):
    def at_the_centre(apply: Any, first: Any, second: Any, x: Any, threat: Any) -> Any:
        return np.linalg.norm(apply(first, x) - apply(second, x), axis=1)

    monkeypatch.setattr(intervals, "sup_gap", at_the_centre)
    failing = why(check("P4"))
    assert any("‖D‖ at" in line for line in failing)


def _half(x: Any, threat: Any, original: Any = intervals._start) -> Any:
    box = original(x, threat)
    middle = (box.lower + box.upper) / 2
    ends = ((middle + end) / 2 for end in box[:2])
    return intervals._Box(*ends, ball=None if box.ball is None else (x, box.ball[1] / 2))


def _unchanged(times: Any, terms: int, x: Any, y: Any) -> Any:
    """D = D_in·W without the change of W."""
    first, second = (
        intervals._product(times, terms, a, b) for a, b in zip(x[:2], y[:2], strict=True)
    )
    return intervals._Pair(first, second, intervals._product(times, terms, x.difference(), y[0]))


def _signed(times: Any, terms: int, left: Any, right: Any) -> Any:
    """W·r in place of |W|·r."""
    (c1, r1), (c2, r2) = intervals._centred(left), intervals._centred(right)
    centre, radius = times(c1, c2), times(c1, r2) + times(r1, c2)
    return intervals._Box(centre - radius, centre + radius)


@pytest.mark.parametrize(
    ("attribute", "defect"),
    [("_start", _half), ("_bilinear", _unchanged), ("_product", _signed)],
)
def test_defects_of_affine_layers_are_seen(
    attribute: str, defect: Any, planted: pytest.MonkeyPatch
):
    planted.setattr(intervals, attribute, defect)
    assert "library bounds of D on linear models, L∞" in broken(p4._linear)


def test_defects_of_activations_are_seen(planted: pytest.MonkeyPatch):
    flat = {name: f._replace(bends=()) for name, f in intervals._UNARY.items()}
    planted.setattr(intervals, "_UNARY", flat)
    planted.setattr(intervals, "_GELU", intervals._GELU._replace(turns=()))
    failing = broken(p4._activations)
    assert [name.split(": ")[1] for name in failing] == [
        "D inside its bounds",
        "values inside theirs",
    ]


def test_a_wrong_left_side_is_seen(monkeypatch: pytest.MonkeyPatch):
    """An adversary of twice the radius: more than the bound allows."""
    original = p4._logistic_sides

    def farther(model: p4.Linear, ball: str, epsilon: float) -> Any:
        left, _ = original(model, ball, 4 * epsilon)
        return left, original(model, ball, epsilon)[1]

    monkeypatch.setattr(p4, "_logistic_sides", farther)
    assert "logistic models, L2: exact on both sides" in broken(p4._linear)
