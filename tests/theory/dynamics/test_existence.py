"""The width that suffices for a random mask, against exact tails and the bound it is made from."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ntk_awt.errors import InputError
from ntk_awt.theory.dynamics.existence import (
    MASKED,
    PAIRINGS,
    concentration_bound,
    distance_bound,
    entry_bound,
    gap_bound,
    sufficient_width,
    tail_probability,
)
from ntk_awt.theory.dynamics.preservation import Frozen, prior_bound

# ---------------------------------------------------------------- E1


@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize(("density", "square"), [(0.25, 1.0), (0.5, 3.0)])
def test_entry_bound_is_the_largest_term(masked: str, density: float, square: float):
    """Over all masks of one unit with d = 3 inputs, and |φ|, |φ'| as large as they may be."""
    x = np.full(3, math.sqrt(square))
    largest = 0.0
    for unit, *weights in itertools.product((0, 1), repeat=4):
        m = np.array(weights) / density if masked != "units" else np.ones(3)
        outer = unit / density if masked != "weights" else 1.0
        largest = max(largest, outer * (1 + (m * x * x).sum() / 3))
    assert entry_bound(density, square, masked=masked) == pytest.approx(largest)


def exact_tail(distance: float, width: int, density: float) -> float:
    """P(|mean(m)/p − 1| ≥ t): an entry of φ = 1 (R² = 0) at one point, exactly."""
    kept = np.arange(width + 1)
    off = np.abs(kept / (width * density) - 1) >= distance
    return min(1.0, float(scipy.stats.binom.pmf(kept, width, density)[off].sum()))


CASES = [(50, 0.5), (400, 0.5), (400, 0.2), (3000, 0.05)]


@pytest.mark.parametrize(("width", "density"), CASES)
def test_tail_against_the_binomial_distribution(width: int, density: float):
    for distance in np.linspace(0, 1, 21):
        found = tail_probability(float(distance), 1, width, density, 0.0)
        assert exact_tail(distance, width, density) <= found <= 1


@pytest.mark.parametrize(("width", "density"), CASES)
@pytest.mark.parametrize("delta", [0.5, 0.1, 0.001])
def test_distances_against_the_binomial_distribution(width: int, density: float, delta: float):
    """The dense kernel is exactly 1 here, so that both pairings and the limit are the same."""
    bounds = [concentration_bound(1, width, density, 0.0, delta)]
    bounds += [distance_bound(1, width, density, 0.0, delta, pairing=p) for p in PAIRINGS]
    assert all(exact_tail(bound, width, density) <= delta for bound in bounds)


def test_a_smaller_shared_distance_would_be_wrong():
    width, density, delta = 3000, 0.5, 0.001
    bound = distance_bound(1, width, density, 0.0, delta)
    assert exact_tail(0.8 * bound, width, density) > delta


def test_concentration_inverts_the_tail():
    for n, width, p, square, delta in [(1, 10, 1.0, 0.0, 1.0), (7, 10_000, 0.03, 2.5, 1e-6)]:
        for masked in MASKED:
            t = concentration_bound(n, width, p, square, delta, masked=masked)
            found = tail_probability(t, n, width, p, square, masked=masked)
            assert found == pytest.approx(delta, rel=1e-9)


def test_shared_is_half_of_the_distance_from_the_limit():
    shared = distance_bound(6, 500, 0.1, 1.0, 0.1)
    assert shared == pytest.approx(concentration_bound(6, 500, 0.1, 1.0, 0.1) / 2)


def test_independent_is_the_sum_of_both_distances():
    found = distance_bound(6, 500, 0.1, 1.0, 0.1, pairing="independent")
    parts = [concentration_bound(6, 500, p, 1.0, 0.05) for p in (1.0, 0.1)]
    assert found == pytest.approx(sum(parts))


# ---------------------------------------------------------------- E5

N, RESIDUAL = 4, 0.7


def setting_with(**changes: Any) -> dict[str, Any]:
    setting = {"horizon": 2.0, "delta": 0.1, "density": 0.2, "n_points": N, "radius2": 1.5}
    return setting | {"residual": RESIDUAL} | changes


def settings() -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = [
        {},
        {"initial_gap": 0.05},
        {"horizon": math.inf, "smallest_eigenvalue": 0.3},
        {"horizon": 500.0, "smallest_eigenvalue": 0.3},
        {"horizon": 0.01, "smallest_eigenvalue": 0.3},
        {"density": 0.9, "delta": 0.9},
    ]
    return [setting_with(**c, pairing=p) for c in changes for p in PAIRINGS]


@pytest.mark.parametrize("setting", settings())
@pytest.mark.parametrize("tolerance", [0.06, 0.5])
def test_sufficient_width_is_the_least(setting: dict[str, Any], tolerance: float):
    n = sufficient_width(tolerance, **setting)
    assert gap_bound(n, **setting) <= tolerance * (1 + 1e-12)
    assert n == 1 or gap_bound(n - 1, **setting) > tolerance


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gap_bound_is_the_prior_bound_at_the_distance(pairing: str):
    """P3 (a) of a kernel and one at exactly the distance that E1 gives."""
    width = 10_000
    alpha = distance_bound(N, width, 0.2, 1.5, 0.1, pairing=pairing)
    y = np.full((N, 1), RESIDUAL)
    with jax.enable_x64(True):
        start = jnp.zeros((N, 1))
        dense = Frozen(jnp.eye(N) * 1e-9, start)
        sparse = Frozen(jnp.eye(N) * (1e-9 + alpha * math.sqrt(N)), start)
        (expected,) = prior_bound(dense, sparse, jnp.asarray(y), [2.0])
    found = gap_bound(width, **setting_with(pairing=pairing))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_the_eigenvalue_is_used_where_it_helps():
    width = 10**6

    def at(horizon: float, **known: Any) -> float:
        return gap_bound(width, **setting_with(horizon=horizon, **known))

    found = [at(t, smallest_eigenvalue=0.5) for t in (1.0, 10.0, 1e4, math.inf)]
    assert found[0] == at(1.0)
    assert found[0] < found[1] <= found[2] == found[3]
    # Weyl: the dense kernel's eigenvalue is below the limit's by at most N·α_d.
    alpha = distance_bound(N, width, 0.2, 1.5, 0.05)
    near = concentration_bound(N, width, 1.0, 1.5, 0.05)
    assert found[3] == pytest.approx(N / (0.5 - N * near) * alpha * RESIDUAL)


def test_small_widths_say_nothing_about_an_infinite_horizon():
    known = setting_with(horizon=math.inf, smallest_eigenvalue=0.1)
    assert gap_bound(100, **known) == math.inf


def test_nothing_to_learn_needs_one_unit():
    still = setting_with(residual=0.0, initial_gap=0.1)
    assert sufficient_width(0.2, **still) == 1
    assert gap_bound(1, **still) == 0.1


def test_a_wider_tolerance_or_density_needs_less():
    def width(tolerance: float, density: float) -> int:
        return sufficient_width(tolerance, **setting_with(density=density))

    assert width(0.1, 0.1) > width(0.2, 0.1) > width(0.2, 0.3)
    assert width(0.1, 0.1) == pytest.approx(4 * width(0.2, 0.1), rel=1e-3)


def test_no_width_undoes_an_initial_gap():
    """Signs are independent: β² is 2(1 − √p) at φ = 1 for every width."""
    p, draws = 0.2, 4000
    rng = np.random.default_rng(0)
    for width in (16, 256):
        signs = rng.choice([-1.0, 1.0], (draws, width))
        factors = 1 - (rng.random((draws, width)) < p) / math.sqrt(p)
        gap = (signs * factors).sum(1) / math.sqrt(width)
        assert (gap**2).mean() == pytest.approx(2 * (1 - math.sqrt(p)), rel=0.1)
    with pytest.raises(InputError, match=r"centre both networks"):
        sufficient_width(0.1, **setting_with(initial_gap=1.0))


BAD: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (entry_bound, {"density": 0.0, "radius2": 1.0}, "density"),
    (entry_bound, {"density": 0.1, "radius2": -1.0}, "radius2"),
    (entry_bound, {"density": 0.1, "radius2": 1.0, "masked": "rows"}, "masked"),
    (tail_probability, {"distance": -1.0}, "distance"),
    (tail_probability, {"distance": 0.1, "width": 0}, "width"),
    (concentration_bound, {"delta": 0.0}, "delta"),
    (concentration_bound, {"delta": 1.5}, "delta"),
    (concentration_bound, {"delta": 0.1, "n_points": 0}, "n_points"),
    (distance_bound, {"delta": 0.1, "pairing": "same"}, "pairing"),
]
ARGUMENTS = {"n_points": 4, "width": 64, "density": 0.1, "radius2": 1.0}


@pytest.mark.parametrize(("function", "change", "what"), BAD)
def test_bad_input(function: Callable[..., Any], change: dict[str, Any], what: str):
    arguments = change if function is entry_bound else ARGUMENTS | change
    with pytest.raises(InputError, match=what):
        function(**arguments)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"horizon": -1.0}, "horizon"),
        ({"horizon": math.inf}, "give the smallest eigenvalue"),
        ({"horizon": math.nan}, "horizon"),
        ({"residual": -0.1}, "residual"),
        ({"initial_gap": -0.1}, "initial_gap"),
        ({"smallest_eigenvalue": -0.1}, "smallest_eigenvalue"),
        ({"delta": 0.0}, "delta"),
        ({"density": 1.1}, "density"),
        ({"pairing": "same"}, "pairing"),
    ],
)
def test_bad_settings(change: dict[str, Any], what: str):
    for call in (partial(sufficient_width, 0.1), partial(gap_bound, 64)):
        with pytest.raises(InputError, match=what):
            call(**setting_with(**change))


def test_a_tolerance_that_is_not_positive():
    with pytest.raises(InputError, match="tolerance"):
        sufficient_width(0.0, **setting_with())
