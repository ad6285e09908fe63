"""E1–E5 hold at the reduced size, and do not with a defect planted in the library."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import masks
from ntk_awt.app.config import ModelConfig
from ntk_awt.kernels import analytic, empirical
from ntk_awt.theory.dynamics import existence
from proofs_check import e1_concentration as e1
from proofs_check import e2_depth as e2
from proofs_check import e3_gain as e3
from proofs_check import e4_magnitude as e4
from proofs_check import e5_width as e5
from proofs_check.instances import masked, two_layer
from tests.proofs import check, why


@pytest.mark.parametrize("name", ["E1", "E2", "E3", "E4", "E5"])
def test_holds(name: str):
    result = check(name)
    assert result.holds, why(result)


def without_density(function: Any) -> Any:
    """The library's bound without 1/p."""

    def wrong(n: int, width: int, density: float, *rest: Any, **options: Any) -> Any:
        return function(n, width, 1.0, *rest, **options)

    return wrong


def failing(name: str) -> str:
    result = check(name)
    assert not result.holds
    return " ".join(why(result))


def test_e1_sees_a_bound_without_the_density(monkeypatch: pytest.MonkeyPatch):
    wrong = without_density(existence.concentration_bound)
    monkeypatch.setattr(e1, "concentration_bound", wrong)
    assert "library's bound" in failing("E1")


def test_e1_sees_a_kernel_in_which_pruned_units_move(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(e1, "empirical", partial(empirical, jacobian="full"))
    assert "kernel by gradients" in failing("E1")


def test_e2_sees_another_limit(monkeypatch: pytest.MonkeyPatch):
    other = partial(analytic.network, kind="magnitude")
    monkeypatch.setattr(e2.analytic, "network", other)
    assert "library's limit" in failing("E2")


def test_e2_sees_a_mixture_with_too_many_weights(monkeypatch: pytest.MonkeyPatch):
    right = analytic.mixture

    def wrong(config: ModelConfig, shape: Any, *, density: float, **options: Any) -> Any:
        return right(config, shape, density=1.5 * density, **options)

    monkeypatch.setattr(e2.analytic, "mixture", wrong)
    record = e2.Recorder(e2.STATEMENT)
    x = np.random.default_rng(0).normal(size=(5, 6))
    e2._mixtures(record, e2.Context("reduced"), x)
    assert not any(case.holds for case in record.outcome().cases)


def test_e3_sees_a_gain_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(e3.masks, "energy_gain", lambda params, mask: masks.unit_gain(params))
    assert "gain in the forward pass" in failing("E3")


def test_e4_sees_the_moment_of_a_random_mask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(analytic, "moment", lambda density, kind: density)
    found = failing("E4")
    assert "second moment" in found
    assert "library's limit" in found


def test_e4_sees_a_magnitude_mask_that_is_none(monkeypatch: pytest.MonkeyPatch):
    """Weights drawn with the random mask of the same density and its gain."""
    right = e4.drawn_kernels

    def wrong(shapes: Any, x: Any, drawn: masked.Masks, keys: Any) -> np.ndarray:
        density = np.where(drawn.cut > 0, 0.3, drawn.density)
        return right(shapes, x, masked.random_masks(density), keys)

    monkeypatch.setattr(e4, "drawn_kernels", wrong)
    assert "magnitude mask" in failing("E4")


def test_e5_sees_a_width_without_the_density(monkeypatch: pytest.MonkeyPatch):
    def wrong(tolerance: float, *settings: Any, **options: Any) -> int:
        horizon, delta, _, n = settings
        return existence.sufficient_width(tolerance, horizon, delta, 1.0, n, **options)

    monkeypatch.setattr(e5, "sufficient_width", wrong)
    assert "library's n*" in failing("E5")


def test_e5_sees_a_ticket_that_was_not_optimised(monkeypatch: pytest.MonkeyPatch):
    def idle(apply: Any, problem: Any, state: Any, held_out: Any, **options: Any) -> Any:
        return state.best

    monkeypatch.setattr(e5.tickets, "search", idle)
    assert "optimised tickets" in failing("E5")


# ---------------------------------------------------------------- the checks' own parts


def test_limits_of_e1_by_quadrature():
    """The closed forms of erf and sin against Gauss–Hermite."""
    x = two_layer.inputs(np.random.default_rng(0), 3, 5, 1.0)
    c = x @ x.T / 5
    a = np.diag(c)
    for name in ("erf", "sin"):
        act = two_layer.ACTIVATIONS[name]
        by_nodes = two_layer._quadrature(act.value, act.slope)(a[:, None], a[None, :], c)
        np.testing.assert_allclose(act.expectations(a[:, None], a[None, :], c), by_nodes, rtol=1e-9)


def test_sign_mixture_is_the_mean_over_masks():
    """Two binomial numbers against all 2^d masks."""
    d, p = 7, 0.3
    x = np.ones((2, d))
    x[1, :2] = -1
    expected = e2.mixture_limit(x, 2, p)
    found = [e2.sign_mixture(agree, d, p) for agree in (d, d - 2)]
    np.testing.assert_allclose(found, expected[0], rtol=1e-12)


def test_gaps_of_e5_by_small_steps():
    """Euler steps of both flows."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(2, 3, 3))
    kernels = factors @ np.swapaxes(factors, 1, 2)
    outputs, y = rng.normal(size=(2, 3)), rng.normal(size=3)
    pair = [e5.Drawn(k[None, None], f[None, None]) for k, f in zip(kernels, outputs, strict=True)]
    (found,) = e5.gaps(pair[0], pair[1], y, np.array([1.5]), centred=False)[0, 0]
    steps = 20_000
    f = outputs.copy()
    for _ in range(steps):
        f -= 1.5 / steps / 3 * np.einsum("kij,kj->ki", kernels, f - y)
    assert found == pytest.approx(np.sqrt(((f[0] - f[1]) ** 2).mean()), rel=1e-3)


def test_drawn_kernels_are_masked():
    """A mask that keeps nothing leaves the last bias alone: Θ = σ_b²."""
    network = masked.mlp(64, 2, 6, "erf")
    drawn = masked.Masks(np.array([1.0, 0.0]), np.array([-1.0, -1.0]), np.ones(2))
    with jax.enable_x64(True):  # as in the check, which has compiled it
        keys = jax.random.split(jax.random.key(0), 64)
        found = masked.drawn_kernels(network, np.ones((e2.POINTS, 6)), drawn, keys)
    assert found.shape == (64, masked.OUTPUTS, e2.POINTS, e2.POINTS)
    np.testing.assert_allclose(found, masked.BIAS_STD**2, rtol=1e-6)


def test_e5_network_is_that_of_e1():
    """The package's network with a mask of units gives the kernel of the formula."""
    x = two_layer.inputs(np.random.default_rng(0), 3, 4, 1.0)
    setting = e5.Setting("", x, np.ones(3), 0.1, 1.0)
    with jax.enable_x64(True):
        params, mask = e5._start(setting, np.random.default_rng(1), 40)
        gain = {"w": jnp.ones(()), "a": jnp.asarray(setting.density**-0.5)}
        frozen = e5._frozen(masks.Ticket(params, mask, gain), jnp.asarray(setting.x))
        found = np.asarray(frozen.kernel)[..., 0, 0]
    units = np.asarray(mask["a"])[:, 0] / np.sqrt(setting.density)
    drawn = two_layer.Setting("sin", "units", setting.density, setting.x)
    expected = two_layer.kernel_terms(drawn, np.asarray(params["w"]).T, units, None) / 40
    np.testing.assert_allclose(found, expected, rtol=1e-10)
