"""The checks of infinite width (D4) and of the kernel's drift (D5), and planted defects."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import masks
from ntk_awt.app.config import ModelConfig
from ntk_awt.kernels import analytic, empirical
from ntk_awt.masks import Ticket
from ntk_awt.models import build
from ntk_awt.theory.dynamics import infinite
from ntk_awt.threats import L2, Linf
from proofs_check import d4_infinite_width as d4
from proofs_check import d5_lazy as d5
from proofs_check.core import fit_slope
from proofs_check.instances import trainings
from tests.proofs import check, why

_drawn: dict[Any, np.ndarray] = {}


@pytest.fixture
def same_networks(monkeypatch: pytest.MonkeyPatch):
    """Trains the finite networks once: no defect of the library's limit reaches them."""
    finite = d4.finite

    def kept(setting: d4.Setting, p: d4.Problem, width: int, *rest: Any) -> np.ndarray:
        name = (width, id(rest[-1]) if isinstance(rest[-1], d4.Broken) else None)
        if name not in _drawn:
            _drawn[name] = finite(setting, p, width, *rest)
        return _drawn[name]

    monkeypatch.setattr(d4, "finite", kept)


def test_d4_holds(same_networks: None):
    result = check("D4")
    assert result.holds, why(result)


def without_mean(kernel: Any, outputs: Any, targets: Any, time: Any) -> Any:
    return _step(kernel, outputs, targets, time * len(kernel))


def clean_points(*arguments: Any, **options: Any) -> Any:
    options["threat"] = d4.scaled(options["threat"], 0.0)
    return _training(*arguments, **options)


def last_phase_only(kernel_fn: Any, initial: Any, z: Any, points: Any, steps: Any) -> Any:
    return _value(kernel_fn, initial, z, points[-1:], steps[-1:])


_step, _value, _training = infinite._step, infinite._value, infinite.adversarial_training


@pytest.mark.parametrize(
    ("name", "defect"),
    [
        ("_step", without_mean),
        ("adversarial_training", clean_points),
        ("_value", last_phase_only),
    ],
)
def test_d4_sees_a_defect(
    monkeypatch: pytest.MonkeyPatch, same_networks: None, name: str, defect: Any
):
    monkeypatch.setattr(infinite, name, defect)
    result = check("D4")
    assert not all(case.holds for case in result.outcome.cases)


def test_steps_of_the_finite_flow_are_small_enough(
    monkeypatch: pytest.MonkeyPatch, same_networks: None
):
    def outputs() -> np.ndarray:
        with jax.enable_x64(True):
            return d4.finite(
                d4.DENSE, d4.problem(0, 8), 128, np.random.default_rng([0, 0, 128]), 24
            )

    found = outputs()
    _drawn.clear()
    monkeypatch.setattr(d4, "RUNGE_KUTTA", 4 * d4.RUNGE_KUTTA)
    finer = outputs()
    _drawn.clear()
    assert not found[:, 0].any()
    assert 0 < np.linalg.norm(found - finer) < 1e-3 * np.linalg.norm(finer)


@pytest.mark.parametrize("setting", [d4.RANDOM, d4.MAGNITUDE])
def test_drawn_masks_have_their_density_and_energy(setting: d4.Setting):
    shapes = jax.eval_shape(
        lambda: build(setting.config(30), (8, 8, 1), 3, jax.random.key(0)).params
    )
    tickets = d4.draw(setting, shapes, np.random.default_rng(0), 3)
    for s in range(3):
        params, mask, gain = jax.tree.map(lambda a, s=s: np.asarray(a)[s], tickets)
        assert mask["dense1"]["kernel"].all()
        for name in ("dense2", "dense3"):
            w, m, g = (tree[name]["kernel"] for tree in (params, mask, gain))
            assert m.sum() == round(setting.density * w.size)
            assert np.isclose(np.linalg.norm(g * m * w), np.linalg.norm(w))
            if setting.kind == "magnitude":
                assert np.abs(w[m]).min() > np.abs(w[~m]).max()


@pytest.mark.parametrize("setting", [d4.DENSE, d4.MAGNITUDE])
def test_kernel_in_numpy_is_the_analytic_one(setting: d4.Setting):
    p = d4.problem(0, 4)
    config = setting.config(1)
    densities = (1.0, *[setting.density] * setting.depth)
    with jax.enable_x64(True):
        kernel_fn = analytic.network(config, (8, 8, 1), 3, density=densities, kind=setting.kind)
        wanted = np.asarray(kernel_fn.kernel_fn(jnp.asarray(p.z)).ntk)
    assert np.allclose(d4.ntk(setting, p.z), wanted, rtol=1e-10)


def test_signs_make_points_move_like_the_root_of_the_predictors_error():
    # Why L∞ has a slower rate in D4: of d signs a share proportional to the error δ turns.
    rng = np.random.default_rng(0)
    errors = np.array([0.08, 0.04, 0.02, 0.01])
    moves = {"linf": [], "l2": []}
    for _ in range(4):
        gradient, noise = rng.normal(size=(2, 1, 20_000))
        for name, threat in (("linf", Linf(0.1)), ("l2", L2(0.1))):
            steps = [threat.ascent(jnp.asarray(gradient + e * noise)) for e in (0.0, *errors)]
            moves[name].append([float(jnp.linalg.norm(step - steps[0])) for step in steps[1:]])
    assert abs(fit_slope(errors, moves["linf"]).slope - 0.5) < 0.05
    assert abs(fit_slope(errors, moves["l2"]).slope - 1) < 0.05


# ---------------------------------------------------------------- D5


def test_d5_holds():
    result = check("D5")
    assert result.holds, why(result)


def test_a_narrow_network_inside_a_wide_one_is_that_network():
    problem = d5.Problem(d5.SPARSE, [6, 16], 0)
    drawn = d5.draw(problem.shapes, problem.widths, 2, d5.SPARSE, np.random.default_rng(0))
    wide = jax.tree.map(lambda a: a[1], drawn.tickets)
    cuts = {"dense1": (64, 6), "dense2": (6, 6), "dense3": (6, 10)}

    def narrow(tree: Any) -> Any:
        return {
            name: {
                "kernel": tree[name]["kernel"][:rows, :columns],
                "bias": tree[name]["bias"][:columns],
            }
            for name, (rows, columns) in cuts.items()
        }

    kept: list[Any] = []

    def make() -> Any:
        config = ModelConfig(widths=(6, 6), activation="gelu", parametrization="ntk")
        kept.append(build(config, (8, 8, 1), 10, jax.random.key(0)))
        return kept[0].params

    assert jax.tree.map(np.shape, jax.eval_shape(make)) == jax.tree.map(np.shape, narrow(wide.mask))
    gain = {
        name: {"kernel": np.float32(1 if name == "dense1" else 0.4**-0.5), "bias": np.float32(1)}
        for name in cuts
    }
    small = Ticket(narrow(wide.params), narrow(wide.mask), gain)
    assert 0 < np.mean(small.mask["dense2"]["kernel"]) < 1
    x = jnp.asarray(problem.x[:3])

    @partial(jax.jit, static_argnames="apply")
    def both(apply: Any, ticket: Ticket) -> tuple[jax.Array, jax.Array]:
        outputs = masks.masked(apply, ticket.mask, ticket.gain)(ticket.params, x)
        gain = jax.tree.map(jnp.asarray, ticket.gain)
        return outputs, empirical(apply, ticket.params, x, mask=ticket.mask, gain=gain)

    for found, wanted in zip(both(problem.apply, wide), both(kept[0].apply, small), strict=True):
        assert np.allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_drift_is_that_of_a_slow_loop():
    # The sizes of the check: the program is compiled once for both.
    problem = d5.Problem(d5.DENSE, [64, 1024], 0)
    found = problem.drifts(np.random.default_rng(0))[0, 0]
    drawn = d5.draw(problem.shapes, [64, 1024], d5.ROUND, d5.DENSE, np.random.default_rng(0))
    ticket, step = jax.tree.map(lambda a: jnp.asarray(a[0]), drawn)
    threat = trainings.make_threat(d5.DENSE.threat)
    x, y, apply = problem.x, problem.y, problem.apply
    f = masks.masked(apply, ticket.mask, ticket.gain)

    @jax.jit
    def jacobian(params: Any) -> jax.Array:
        leaves = jax.tree.leaves(jax.jacrev(f)(params, x))
        return jnp.concatenate([a.reshape(*a.shape[:2], -1) for a in leaves], -1)

    def kernel(params: Any) -> np.ndarray:
        rows = np.asarray(jacobian(params), np.float64).reshape(len(x) * 10, -1)
        return rows @ rows.T

    onehot = np.eye(10)[y]
    keys = jax.random.split(jax.random.key(0), len(x))

    @jax.jit
    def update(params: Any) -> Any:
        def losses(params: Any, z: jax.Array) -> jax.Array:
            return -jnp.sum(onehot * jax.nn.log_softmax(f(params, z)), -1)

        points = trainings.ATTACK.run(lambda z: losses(params, z), jnp.asarray(x), threat, keys)[0]
        gradient = jax.grad(lambda p: losses(p, points).mean())(params)
        return jax.tree.map(lambda w, g: w - step * g, params, gradient)

    params, start = ticket.params, kernel(ticket.params)
    for record in range(d5.RECORDS):
        for _ in range(d5.STEPS):
            params = update(params)
        drift = np.linalg.norm(kernel(params) - start) / np.linalg.norm(start)
        assert np.isclose(found[record], drift, rtol=1e-2)


def steps_grow(drawn: d5.Networks, widths: np.ndarray) -> d5.Networks:
    return drawn._replace(steps=drawn.steps * np.sqrt(widths / widths.min()))


def gain_forgotten(drawn: d5.Networks, widths: np.ndarray) -> d5.Networks:
    """The narrow networks keep the scale of the wide one."""
    gain = jax.tree.map(np.ones_like, drawn.tickets.gain)
    return drawn._replace(tickets=drawn.tickets._replace(gain=gain))


@pytest.mark.parametrize("defect", [steps_grow, gain_forgotten])
def test_d5_sees_a_defect(monkeypatch: pytest.MonkeyPatch, defect: Any):
    draw = d5.draw

    def wrong(shapes: Any, widths: list[int], seeds: int, *rest: Any, **options: Any) -> Any:
        return defect(draw(shapes, widths, seeds, *rest, **options), np.repeat(widths, seeds))

    monkeypatch.setattr(d5, "draw", wrong)
    result = check("D5")
    assert not all(case.holds for case in result.outcome.cases)
