"""Statements D1–D3 at the size of the suite, and defects that they have to find."""

import jax.numpy as jnp
import pytest

from proofs_check import d1_flow, d2_energy, d3_frozen
from tests.proofs import check, why

SLOW = (
    "test_d1_needs_float64",
    "test_d3_needs_float64",
)


@pytest.mark.parametrize("name", ["D1", "D2", "D3"])
def test_statement_holds(name):
    result = check(name)
    assert result.holds, why(result)


def test_d1_needs_float64():
    assert not check("D1", precision="float32").holds


@pytest.fixture
def retraced():
    """D1's compiled function has the library's functions in it: drop it before and after."""
    clear = d1_flow._measure.clear_cache  # type: ignore[attr-defined]
    clear()
    yield
    clear()


@pytest.mark.usefixtures("retraced")
def test_d1_finds_the_kernel_of_the_unmasked_jacobian(monkeypatch):
    right = d1_flow.empirical

    def full(*args, **options):
        return right(*args, **{**options, "jacobian": "full"})

    monkeypatch.setattr(d1_flow, "empirical", full)
    result = check("D1")
    assert any("slope" in line for line in why(result))
    assert any("derivative" in line for line in why(result))


@pytest.mark.usefixtures("retraced")
def test_d1_finds_a_point_left_out(monkeypatch):
    right = d1_flow.output_change

    def wrong(kernel, g):
        return right(kernel, g * (jnp.arange(len(g)) > 0)[:, None])

    monkeypatch.setattr(d1_flow, "output_change", wrong)
    result = check("D1")
    assert any("library" in line for line in why(result))


def test_d2_finds_a_wrong_maximum(monkeypatch):
    reach = d2_energy._reach
    monkeypatch.setattr(d2_energy, "_reach", lambda w, threat: reach(w, threat) / 2)
    assert not check("D2").holds


@pytest.mark.parametrize("defect", ["time", "start"])
def test_d3_finds_a_wrong_closed_form(monkeypatch, defect):
    right = d3_frozen.frozen

    def wrong(kernel, f_x, y, times, **options):
        if defect == "time" and "step" not in options:
            return right(kernel, f_x, y, 1.001 * times, **options)
        if defect == "start":
            return right(kernel, 1.001 * f_x, y, times, **options)
        return right(kernel, f_x, y, times, **options)

    monkeypatch.setattr(d3_frozen, "frozen", wrong)
    assert not check("D3").holds


def test_d3_needs_float64():
    assert not check("D3", precision="float32").holds
