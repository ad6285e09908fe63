"""The ticket objective against independent sums, every solver through one contract, the search."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_awt import masks, models, tickets
from ntk_awt.attacks import PGD
from ntk_awt.config import MaskConfig, ModelConfig, TicketConfig
from ntk_awt.errors import InputError
from ntk_awt.threats import L2, Linf
from ntk_awt.tickets.awt import reselect
from tests.test_kernels import reference

SLOW = ("test_search_works_under_l2",)

distances = jax.jit(tickets.distances, static_argnames=("apply", "jacobian"))

CONFIG = TicketConfig(
    ticket_steps=8, ticket_batch_size=4, ticket_records=4, ticket_learning_rate=5e-3
)
ATTACK = PGD(steps=3)


@pytest.fixture(scope="module")
def net():
    """A small dense network on 8×8 images."""
    config = ModelConfig(widths=(12,), activation="gelu")
    return models.build(config, (8, 8, 1), 3, jax.random.key(0))


@pytest.fixture(scope="module")
def problem(net):
    """Random images; labels don't matter for the distances."""
    x = jax.random.uniform(jax.random.key(1), (30, 8, 8, 1))
    y = jax.random.randint(jax.random.key(2), (30,), 0, 3)
    return tickets.Problem(net.params, x, y, Linf(0.1), jax.random.key(3))


@pytest.fixture(scope="module")
def first(net):
    """A random ERK ticket at 30 %."""
    return tickets.baseline("random", net.params, MaskConfig(density=0.3), jax.random.key(4))


@pytest.fixture(scope="module")
def held_out(net, problem):
    """A target on five images of its own."""
    return tickets.held_out_target(
        net.apply, ATTACK, problem._replace(x=problem.x[:5], y=problem.y[:5])
    )


def kept(mask):
    return [int(m.sum()) for m in jax.tree.leaves(mask)]


# ---------------------------------------------------------------- objective


def independent_objective(net, ticket, x, config):
    """J in float64 from per-gradient loop kernels and plain sums."""
    mask, gain = ticket.mask, ticket.gain
    own = net._replace(params=ticket.params)
    dense = reference(net, x, x)
    sparse = reference(own, x, x, mask, gain, config.jacobian)
    with jax.enable_x64(True):

        def to64(tree):
            return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)

        f_dense = np.asarray(net.apply(to64(net.params), to64(x)))
        weights = masks.effective(to64(ticket.params), mask, to64(gain))
        f_sparse = np.asarray(net.apply(weights, to64(x)))
    beta2 = ((f_dense - f_sparse) ** 2).sum() / len(x)
    alpha2 = ((dense - sparse) ** 2).sum() / len(x) ** 2
    if config.distance == "absolute":
        return beta2 + config.kernel_weight * alpha2
    return (
        beta2 * len(x) / (f_dense**2).sum()
        + config.kernel_weight * alpha2 * len(x) ** 2 / (dense**2).sum()
    )


@pytest.mark.parametrize("distance", ["relative", "absolute"])
@pytest.mark.parametrize("jacobian", ["masked", "full"])
def test_objective_against_independent_sums(net, first, held_out, distance, jacobian):
    config = dataclasses.replace(CONFIG, distance=distance, jacobian=jacobian, kernel_weight=0.3)
    values = distances(net.apply, first, held_out, jacobian)
    value = float(tickets.objective(values, config))
    expected = independent_objective(net, first, held_out.x, config)
    assert value == pytest.approx(expected, rel=1e-4)
    wrong = dataclasses.replace(config, jacobian={"masked": "full", "full": "masked"}[jacobian])
    # The two conventions differ by 0.6 % here, sixty times the tolerance above.
    assert value != pytest.approx(independent_objective(net, first, held_out.x, wrong), rel=1e-3)


def test_epsilon_zero_and_full_jacobian_is_neural_tangent_transfer(net, first, problem):
    """NTT's loss: natural inputs, the Jacobian of all weights, absolute distances."""
    config = dataclasses.replace(CONFIG, distance="absolute", jacobian="full", kernel_weight=1e-3)
    few = problem._replace(x=problem.x[:5], y=problem.y[:5], threat=Linf(0.0))
    target = tickets.held_out_target(net.apply, ATTACK, few)
    np.testing.assert_array_equal(target.x, few.x)
    values = distances(net.apply, first, target, config.jacobian)
    expected = independent_objective(net, first, few.x, config)
    assert float(tickets.objective(values, config)) == pytest.approx(expected, rel=1e-4)


def test_target_is_adversarial_for_the_dense_network(net, problem, held_out):
    x = np.asarray(problem.x[:5])
    assert np.abs(np.asarray(held_out.x, float) - x).max() <= 0.1
    assert np.abs(np.asarray(held_out.x) - x).max() > 0.05
    np.testing.assert_allclose(held_out.logits, net.apply(net.params, held_out.x), rtol=1e-5)


def test_dense_ticket_has_distance_zero(net, held_out):
    dense = masks.Ticket(net.params, masks.ones(net.params), masks.unit_gain(net.params))
    values = distances(net.apply, dense, held_out, "masked")
    assert all(float(v) < 1e-5 for v in (values.relative_kernel, values.relative_target))


# ---------------------------------------------------------------- solver contract


def steps(net, config, state, target, n):
    solver = tickets.SOLVERS[config.solver](net.apply, config)
    update, values = jax.jit(solver.update), []
    for _ in range(n):
        state, (value, _) = update(state, target)
        values.append(float(value))
    return state, values


@pytest.mark.parametrize("reselect_every", [0, 2])
@pytest.mark.parametrize("solver", tickets.SOLVERS)
def test_solver_contract(net, first, held_out, solver, reselect_every):
    config = dataclasses.replace(
        CONFIG, solver=solver, reselect_every=reselect_every, reselect_fraction=0.3
    )
    start = tickets.start(net.apply, config, first)
    state, values = steps(net, config, start, held_out, 5)  # the last one does not re-select
    assert int(state.step) == 5
    assert kept(state.ticket.mask) == kept(first.mask)
    pruned = jax.tree.map(
        lambda w, m: np.abs(np.asarray(w)[~np.asarray(m)]).sum(), *state.ticket[:2]
    )
    assert sum(jax.tree.leaves(pruned)) == 0
    jax.tree.map(np.testing.assert_array_equal, state.ticket.gain, first.gain)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.ticket.mask, first.mask)
    assert any(jax.tree.leaves(moved)) == (reselect_every > 0)
    again, same = steps(net, config, tickets.start(net.apply, config, first), held_out, 5)
    assert values == same
    jax.tree.map(np.testing.assert_array_equal, state, again)
    values_now = distances(net.apply, first, held_out, config.jacobian)
    assert values[0] == pytest.approx(float(tickets.objective(values_now, config)), rel=1e-5)


def test_objective_falls_on_a_fixed_target(net, first, held_out):
    config = dataclasses.replace(CONFIG, ticket_steps=60)
    _, values = steps(net, config, tickets.start(net.apply, config, first), held_out, 60)
    assert values[-1] < 0.5 * values[0]


def test_first_step_is_adam_on_the_independent_objective(net, first, held_out):
    """Adam's first step is −lr·sign(gradient): compare signs with central differences of J."""
    config = dataclasses.replace(CONFIG, ticket_learning_rate=1e-3)
    state, _ = steps(net, config, tickets.start(net.apply, config, first), held_out, 1)
    rows, columns = np.nonzero(np.asarray(first.mask["dense2"]["kernel"]))
    for i, j in list(zip(rows, columns, strict=True))[:6]:
        moved = float(
            state.ticket.params["dense2"]["kernel"][i, j] - first.params["dense2"]["kernel"][i, j]
        )
        ends = []
        for sign in (1, -1):
            kernel = first.params["dense2"]["kernel"].at[i, j].add(sign * 1e-3)
            params = {**first.params, "dense2": {**first.params["dense2"], "kernel": kernel}}
            ends.append(
                independent_objective(net, first._replace(params=params), held_out.x, config)
            )
        assert moved == pytest.approx(-1e-3 * np.sign(ends[0] - ends[1]), rel=1e-2)


def test_reselect_against_brute_force():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 7)).astype(np.float32)
    mask = rng.random((6, 7)) < 0.4
    gradient = rng.normal(size=(6, 7)).astype(np.float32)
    params, new = reselect(
        {"k": w * mask, "b": w[0]},
        {"k": mask, "b": mask[0] | True},
        {"k": gradient, "b": w[0]},
        jnp.float32(0.5),
    )
    swap = int(mask.sum() * 0.5)
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    dropped = sorted(inside.tolist(), key=lambda at: abs(w[tuple(at)]))[:swap]
    grown = sorted(outside.tolist(), key=lambda at: -abs(gradient[tuple(at)]))[:swap]
    expected = mask.copy()
    for at in dropped:
        expected[tuple(at)] = False
    for at in grown:
        expected[tuple(at)] = True
    np.testing.assert_array_equal(new["k"], expected)
    np.testing.assert_array_equal(params["k"], np.where(expected & mask, w, 0))
    np.testing.assert_array_equal(params["b"], w[0])
    _, unchanged = reselect({"k": w * mask}, {"k": mask}, {"k": gradient}, jnp.float32(0.0))
    np.testing.assert_array_equal(unchanged["k"], mask)


# ---------------------------------------------------------------- baselines and search


@pytest.mark.parametrize("allocation", masks.ALLOCATIONS)
@pytest.mark.parametrize("name", tickets.BASELINES)
def test_baselines_have_the_exact_density(net, name, allocation):
    config = MaskConfig(density=0.2, allocation=allocation)
    ticket = tickets.baseline(name, net.params, config, jax.random.key(0))
    prunable = [m for m in jax.tree.leaves(ticket.mask) if m.ndim == 2]
    assert sum(int(m.sum()) for m in prunable) == round(0.2 * sum(m.size for m in prunable))
    pruned = jax.tree.map(lambda w, m: np.abs(np.asarray(w)[~np.asarray(m)]).sum(), *ticket[:2])
    assert sum(jax.tree.leaves(pruned)) == 0


def test_random_baseline_depends_on_the_key_and_magnitude_does_not(net):
    config = MaskConfig(density=0.2)
    pairs = {
        name: [tickets.baseline(name, net.params, config, jax.random.key(s)).mask for s in (0, 1)]
        for name in ("random", "magnitude")
    }
    same = {
        n: all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *p)))
        for n, p in pairs.items()
    }
    assert same == {"random": False, "magnitude": True}
    kernel = np.abs(np.asarray(net.params["dense1"]["kernel"]))
    mask = np.asarray(pairs["magnitude"][0]["dense1"]["kernel"])
    assert kernel[mask].min() >= kernel[~mask].max()


def run_search(net, problem, held_out, state, config=CONFIG, stop_at=None):
    records = []

    def on_record(state, record):
        records.append((record, jax.tree.map(np.array, state)))
        if record.step == stop_at:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        state = tickets.search(
            net.apply, problem, state, held_out, attack=ATTACK, config=config, on_record=on_record
        )
    return state, records


def test_search_records_and_resumes_bit_for_bit(net, first, problem, held_out):
    full, records = run_search(net, problem, held_out, tickets.start(net.apply, CONFIG, first))
    assert [r.step for r, _ in records] == tickets.record_steps(CONFIG) == [0, 2, 4, 6, 8]
    assert [len(r.objective) for r, _ in records] == [0, 2, 2, 2, 2]
    start = tickets.start(net.apply, CONFIG, first)
    _, before = run_search(net, problem, held_out, start, stop_at=4)
    saved = jax.tree.map(jnp.asarray, before[-1][1])
    resumed, after = run_search(net, problem, held_out, saved)
    jax.tree.map(np.testing.assert_array_equal, full, resumed)
    assert [r.step for r, _ in before + after] == [0, 2, 4, 6, 8]
    # The starting ticket belongs to the caller, though the search donates its state.
    assert np.isfinite(np.asarray(first.params["dense1"]["kernel"])).all()


def test_a_short_search_records_every_step():
    config = dataclasses.replace(CONFIG, ticket_steps=3, ticket_records=10)
    assert tickets.record_steps(config) == [0, 1, 2, 3]


def test_another_key_gives_another_ticket(net, first, problem, held_out):
    one, _ = run_search(net, problem, held_out, tickets.start(net.apply, CONFIG, first))
    other = problem._replace(key=jax.random.key(99))
    two, _ = run_search(net, other, held_out, tickets.start(net.apply, CONFIG, first))
    assert not np.array_equal(*(s.ticket.params["dense1"]["kernel"] for s in (one, two)))


def test_chunks_share_one_compilation(net, first, problem, held_out):
    traces = 0

    def counted(params, x):
        nonlocal traces
        traces += 1
        return net.apply(params, x)

    few = dataclasses.replace(CONFIG, ticket_steps=2, ticket_records=1)
    counted_net = net._replace(apply=counted)
    run_search(counted_net, problem, held_out, tickets.start(counted, few, first), few)
    once = traces
    many = dataclasses.replace(CONFIG, ticket_steps=12, ticket_records=6)
    run_search(counted_net, problem, held_out, tickets.start(counted, many, first), many)
    # Another configuration compiles once more, however many chunks it runs; the record's function
    # is compiled already.
    assert traces - once <= once
    once = traces
    weaker = problem._replace(threat=Linf(0.05), key=jax.random.key(5))
    run_search(counted_net, weaker, held_out, tickets.start(counted, many, first), many)
    assert traces == once


def test_search_works_under_l2(net, first, problem, held_out):
    _, records = run_search(
        net, problem._replace(threat=L2(0.5)), held_out, tickets.start(net.apply, CONFIG, first)
    )
    assert np.isfinite(records[-1][0].objective).all()


def test_bad_input(net, first, problem, held_out):
    start = tickets.start(net.apply, CONFIG, first)
    with pytest.raises(InputError, match="at most the number of images, 3"):
        run_search(net, problem._replace(x=problem.x[:3], y=problem.y[:3]), held_out, start)
    with pytest.raises(InputError, match="expected one of awt"):
        tickets.start(net.apply, dataclasses.replace(CONFIG, solver="awd"), first)
    with pytest.raises(InputError, match="expected one of magnitude, random"):
        tickets.baseline("randon", net.params, MaskConfig(), jax.random.key(0))
    diverging = dataclasses.replace(CONFIG, ticket_learning_rate=1e30)
    with pytest.raises(InputError, match="objective of the search"):
        run_search(net, problem, held_out, tickets.start(net.apply, diverging, first), diverging)
