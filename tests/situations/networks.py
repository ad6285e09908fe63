"""Where a network enters: what is a weight, which weights a mask prunes, which ones training moves.

Kernels are compared with Σ_w ∂f_a(x)/∂w ∂f_b(x')/∂w over the weights alone, made of Jacobians in
float64.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from ntk_awt import attacks, kernels, masks, tickets, training
from ntk_awt.app import names as methods
from ntk_awt.app.config import MaskConfig, TicketConfig, TrainConfig
from ntk_awt.kernels import probes
from ntk_awt.masks import Ticket
from ntk_awt.network import Network, density
from ntk_awt.robustness.certified import intervals
from ntk_awt.threats import Linf
from tests.situations import Outcome, near, refused, same, situation

N, D, CLASSES = 4, 6, 3


@functools.cache
def _images() -> jax.Array:
    return jax.random.uniform(jax.random.key(7), (N, D))


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _all(*outcomes: Outcome) -> Outcome:
    """The first that does not agree, or the last one."""
    return next((one for one in outcomes if not one.agrees), outcomes[-1])


# ---------------------------------------------------------------- validation

_ATTACK = attacks.PGD(steps=1)
_THREAT = Linf(0.1)
_SEARCH = TicketConfig(ticket_steps=1, ticket_batch_size=2, ticket_records=1)
_TRAIN = TrainConfig(epochs=1, batch_size=2)


def _entries(apply: Any, params: Any) -> dict[str, Callable[[], Any]]:
    """Every public way in that takes a function and its parameters."""
    x, y, key = _images(), jnp.zeros(N, int), jax.random.key(0)
    problem = tickets.Problem(params, x, y, _THREAT, key)
    return {
        "kernel": lambda: kernels.empirical(apply, params, x),
        "plan": lambda: kernels.plan(apply, params, x),
        "product": lambda: probes.kernel_product(apply, params, x),
        "attack": lambda: attacks.perturb(_ATTACK, Network(apply, params), x, y, _THREAT, key),
        "train": lambda: training.fit(
            apply, Ticket(params, None, None), x, y,
            config=_TRAIN, threat=_THREAT, attack=_ATTACK, key=key,
        ),
        "baseline": lambda: tickets.baseline("random", apply, problem, _ATTACK, MaskConfig()),
        "bounds": lambda: intervals.output_bounds(apply, params, x, _THREAT),
    }  # fmt: skip


def _refused_everywhere(apply: Any, params: Any, *words: str) -> Outcome:
    return _all(*(refused(call, *words) for call in _entries(apply, params).values()))


def _linear(weights: Any, x: Any) -> Any:
    return x @ weights["kernel"]


def _weights(**others: Any) -> Any:
    return {"kernel": _normal(0, D, CLASSES), **others}


@situation("networks: logits of shape [n]")
def _() -> Outcome:
    return _refused_everywhere(
        lambda w, x: _linear(w, x)[:, 0], _weights(), "logits", f"shape ({N},)"
    )


@situation("networks: logits of shape [n, 1, c]")
def _() -> Outcome:
    return _refused_everywhere(
        lambda w, x: _linear(w, x)[:, None], _weights(), "logits", f"shape ({N}, 1, {CLASSES})"
    )


@situation("networks: logits of other images")
def _() -> Outcome:
    return _refused_everywhere(
        lambda w, x: _linear(w, x)[:2], _weights(), "logits", f"shape (2, {CLASSES})"
    )


@situation("networks: (logits, state)")
def _() -> Outcome:
    return _refused_everywhere(
        lambda w, x: (_linear(w, x), x), _weights(), "logits", "a tuple", "return the logits alone"
    )


@situation("networks: a dict of outputs")
def _() -> Outcome:
    return _refused_everywhere(lambda w, x: {"logits": _linear(w, x)}, _weights(), "a dict")


@situation("networks: complex logits")
def _() -> Outcome:
    return _refused_everywhere(lambda w, x: _linear(w, x) * 1j, _weights(), "logits", "complex64")


@situation("networks: integer logits")
def _() -> Outcome:
    return _refused_everywhere(
        lambda w, x: _linear(w, x).astype(int), _weights(), "logits", "int32"
    )


@situation("networks: a leaf that is a Python float")
def _() -> Outcome:
    return _refused_everywhere(_linear, _weights(slope=0.5), "slope", "jnp.asarray(0.5)")


@situation("networks: an integer leaf")
def _() -> Outcome:
    return _refused_everywhere(_linear, _weights(step=jnp.zeros((), int)), "step", "int32")


@situation("networks: a boolean leaf")
def _() -> Outcome:
    return _refused_everywhere(_linear, _weights(on=jnp.ones(3, bool)), "on", "bool")


@situation("networks: a complex leaf")
def _() -> Outcome:
    return _refused_everywhere(_linear, _weights(phase=jnp.ones(3) * 1j), "phase", "complex64")


@situation("networks: a function among the leaves")
def _() -> Outcome:
    return _refused_everywhere(_linear, _weights(activation=jnp.tanh), "activation", "partition")


@situation("networks: a leaf with NaN")
def _() -> Outcome:
    bad = _weights(bias=jnp.array([0.0, jnp.nan, 1.0]))
    return _refused_everywhere(_linear, bad, "bias", "1 of 3 NaN or infinite")


@situation("networks: no weights")
def _() -> Outcome:
    found = _entries(lambda w, x: x, {})
    return _all(*(refused(found[name], "no leaves") for name in ("kernel", "product", "baseline")))


@situation("networks: no function")
def _() -> Outcome:
    return _refused_everywhere("mlp", _weights(), "expected a function", "got str")


@situation("networks: a function that raises")
def _() -> Outcome:
    return _refused_everywhere(
        lambda w, x: w["kernels"], _weights(), "KeyError: 'kernels' (networks.py, line"
    )


# ---------------------------------------------------------------- what is a weight


def _brute(apply: Callable[[Any, Any], Any], params: Any, x: Any) -> np.ndarray:
    """Θ [n, n, c, c] from Jacobians in float64; `apply` has to be free of float32 itself."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: jnp.asarray(np.asarray(w, np.float64)), params)
        jacobian = jax.jacrev(apply)(wide, jnp.asarray(np.asarray(x, np.float64)))
        rows = [j.reshape(*j.shape[:2], -1) for j in jax.tree.leaves(jacobian)]
        return np.asarray(sum(jnp.einsum("iap,jbp->ijab", j, j) for j in rows))


@functools.cache
def _statistics() -> tuple[jax.Array, jax.Array]:
    """Mean and variance of five units."""
    return _normal(1, 5), 0.5 + jnp.square(_normal(2, 5))


def _normal_units(weights: Any, hidden: Any) -> Any:
    mean, var = (np.asarray(a, np.float64) for a in _statistics())
    return (hidden - mean) / jnp.sqrt(var + 1e-5) * weights["scale"] + weights["bias"]


class _Normalised(nnx.Module):
    """Batch normalisation, dropout, a fixed array and a counter between two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(D, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(5, CLASSES, rngs=rngs)
        self.fixed = nnx.Variable(jnp.arange(1.0, 6.0))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.norm.mean[...], self.norm.var[...] = _statistics()

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        hidden = jnp.tanh(self.norm(self.first(x)))
        return self.last(self.dropout(hidden) * self.fixed[...])


def _by_hand(weights: Any, x: Any) -> Any:
    """The function of `_Normalised` in evaluation mode, of its weights alone."""
    first, last = weights["first"], weights["last"]
    hidden = _normal_units(weights["norm"], x @ first["kernel"] + first["bias"])
    return (jnp.tanh(hidden) * np.arange(1.0, 6.0)) @ last["kernel"] + last["bias"]


@functools.cache
def _module() -> _Normalised:
    module = _Normalised(nnx.Rngs(0))
    module.eval()
    return module


@situation("networks: the kernel of an NNX module with batch statistics, dropout, counters")
def _() -> Outcome:
    network = Network.from_nnx(_module())
    came = kernels.empirical(network, network.params, _images())
    return near(came, _brute(_by_hand, network.params, _images()), relative=1e-5)


@situation("networks: what an NNX module's mask counts")
def _() -> Outcome:
    params = Network.from_nnx(_module()).params
    mask = masks.make(masks.magnitude_scores(params), 0.5, "global")
    names = [row.name for row in masks.statistics(mask, masks.unit_gain(params))]
    return same((names, density(mask)), (["first/kernel", "last/kernel"], 22 / 45))


@situation("networks: an NNX module in training mode")
def _() -> Outcome:
    return refused(
        lambda: Network.from_nnx(_Normalised(nnx.Rngs(0))).params["first"]["kernel"],
        "evaluation mode",
        "module.eval()",
    )


class _Linen(linen.Module):
    """Batch normalisation between two layers."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.Dense(5)(x)
        return linen.Dense(CLASSES)(linen.BatchNorm(use_running_average=not train)(x))


@functools.cache
def _variables() -> Any:
    found = _Linen().init(jax.random.key(0), _images(), train=False)
    mean, var = _statistics()
    return {**found, "batch_stats": {"BatchNorm_0": {"mean": mean, "var": var}}}


def _linen_by_hand(weights: Any, x: Any) -> Any:
    first, norm, last = (weights[name] for name in ("Dense_0", "BatchNorm_0", "Dense_1"))
    hidden = _normal_units(norm, x @ first["kernel"] + first["bias"])
    return hidden @ last["kernel"] + last["bias"]


@situation("networks: the kernel of a Linen module with batch statistics")
def _() -> Outcome:
    network = Network.from_linen(_Linen(), _variables(), train=False)
    came = kernels.empirical(network, network.params, _images())
    return near(came, _brute(_linen_by_hand, network.params, _images()), relative=1e-5)


@situation("networks: variables of a Linen module taken for weights")
def _() -> Outcome:
    def apply(variables: Any, x: Any) -> Any:
        return _Linen().apply(variables, x, train=False)

    words = ("batch_stats", "Network.from_linen")
    return _all(
        _refused_everywhere(apply, _variables(), *words),
        refused(lambda: masks.allocate(_variables(), 0.5, "erk")["params"], *words),
        refused(lambda: masks.energy_gain(_variables(), masks.ones(_variables())), *words),
        refused(lambda: density(masks.ones(_variables())), *words),
    )


@situation("networks: a Linen module in training mode")
def _() -> Outcome:
    def call() -> Any:
        network = Network.from_linen(_Linen(), _variables(), train=True)
        return kernels.empirical(network, network.params, _images())

    return refused(call, "ModifyScopeVariableError")


def _mixed(weights: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ weights["a"]) * weights["slope"]
    return hidden @ weights["b"].astype(hidden.dtype)


@situation("networks: weights of float32 and bfloat16, an empty leaf and a scalar")
def _() -> Outcome:
    params = {
        "a": _normal(0, D, 5),
        "b": _normal(1, 5, CLASSES).astype(jnp.bfloat16),
        "slope": jnp.float32(0.7),
        "nothing": jnp.zeros((0, 4)),
    }
    mask = masks.make(masks.magnitude_scores(params), 0.4, "erk")
    gain = masks.energy_gain(params, mask)
    used = jax.tree.map(lambda m, g: np.asarray(m, np.float64) * float(g), mask, gain)
    at = jax.tree.map(lambda w, f: np.asarray(w, np.float64) * f, params, used)

    def scaled(w: Any, x: Any) -> Any:  # the Jacobian with respect to θ has the factor γ⊙m
        return _mixed(jax.tree.map(lambda a, b, f: a + f * (b - a), at, w, used), x)

    return _all(
        near(
            kernels.empirical(_mixed, params, _images()),
            _brute(_mixed, params, _images()),
            relative=2e-2,
        ),
        near(
            kernels.empirical(_mixed, params, _images(), mask=mask, gain=gain),
            _brute(scaled, at, _images()),
            relative=2e-2,
        ),
    )


# ---------------------------------------------------------------- what a mask prunes


def _kept_whole(params: Any, *names: str) -> Outcome:
    """All leaves of these names are whole, whatever makes the mask, and have gain 1."""
    found = []
    for method in masks.ALLOCATIONS:
        mask = masks.make(masks.random_scores(jax.random.key(0), params), 0.37, method)
        gain = masks.energy_gain(params, mask)
        rows = {row.name for row in masks.statistics(mask, gain)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name in names:
                found.append((name, float(np.mean(leaf)), name in rows))
    return same(sorted(set(found)), [(name, 1.0, False) for name in sorted(names)])


@situation("networks: biases of attention")
def _() -> Outcome:
    attention = nnx.MultiHeadAttention(2, 8, 8, deterministic=True, decode=False, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(attention, nnx.Param))
    return _kept_whole(params, "query/bias", "key/bias", "value/bias", "out/bias")


@situation("networks: biases and normalisation of stacked layers")
def _() -> Outcome:
    zeros = jnp.zeros((4, 5))
    params = {
        "kernel": _normal(0, 4, 5, 5),
        "bias": zeros,
        "scale": zeros,
        "layer_norm": {"weight": zeros},
        "layers": {"w": _normal(1, 4, 5, 5), "b": zeros},
        "pair": [(_normal(2, 4, 5, 5), zeros)],
    }
    return _kept_whole(params, "bias", "scale", "layer_norm/weight", "layers/b", "pair/0/1")


@situation("networks: weights with names as of biases")
def _() -> Outcome:
    params = {"a": jnp.ones((9, 5)), "b": jnp.ones((5, 4)), "blocks": [jnp.ones((4, 4))] * 2}
    return same(masks.prunable_leaves(params), {"a": True, "b": True, "blocks": [True, True]})


@situation("networks: prunable= says which")
def _() -> Outcome:
    def chosen(name: str, leaf: Any) -> bool:
        return name == "last"

    params = {"embedding": _normal(0, D, 5), "last": _normal(1, 5, CLASSES)}
    problem = tickets.Problem(params, _images(), jnp.zeros(N, int), _THREAT, jax.random.key(0))

    def apply(w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w["embedding"]) @ w["last"]

    found = []
    for name in ("random", "snip"):
        config = MaskConfig(density=0.4)
        first = tickets.baseline(name, apply, problem, _ATTACK, config, prunable=chosen)
        found.append(jax.tree.map(lambda m: int(m.sum()), first.mask))
    target = tickets.target_of(
        apply, params, _images(), problem.y,
        threat=_THREAT, attack=_ATTACK, key=problem.key, config=TicketConfig(),
    )  # fmt: skip
    for solver in tickets.SOLVERS:
        config = TicketConfig(
            solver=solver,
            ticket_steps=2,
            rounds=2,
            learn_allocation=solver != "awt",
            kernel_weight=0.0,
        )
        ticket = tickets.solve(apply, params, first, target, problem.key, config, prunable=chosen)
        found.append(jax.tree.map(lambda m: int(m.sum()), ticket.mask))
    return _all(*(same(counts, {"embedding": 5 * D, "last": 6}) for counts in found))


@situation("networks: the energy gain of a layer that starts at zero")
def _() -> Outcome:
    params = {"first": _normal(0, D, 5), "last": jnp.zeros((5, CLASSES))}
    mask = masks.make(masks.random_scores(jax.random.key(0), params), 0.5, "uniform")
    return refused(
        lambda: masks.energy_gain(params, mask)["last"], "last", "got zeros alone", "gain 'none'"
    )


# ---------------------------------------------------------------- what training moves


@functools.cache
def _unclean() -> Ticket:
    """A ticket whose pruned entries are not zero."""
    params = {"kernel": _normal(0, D, CLASSES), "bias": _normal(1, CLASSES)}
    mask = masks.make(masks.random_scores(jax.random.key(3), params), 0.5, "uniform")
    return Ticket(params, mask, masks.energy_gain(params, mask))


def _affine(weights: Any, x: Any) -> Any:
    return x @ weights["kernel"] + weights["bias"]


def _trained(optimizer: str, decay: float) -> Ticket:
    config = TrainConfig(
        epochs=3, batch_size=2, optimizer=optimizer, weight_decay=decay, loss="natural",
        learning_rate=0.1,
    )  # fmt: skip
    x, y = np.asarray(_images()), np.arange(N) % CLASSES
    return training.fit(
        _affine, _unclean(), x, y,
        config=config, threat=_THREAT, attack=_ATTACK, key=jax.random.key(0),
    )  # fmt: skip


def _does_not_move(optimizer: str) -> Outcome:
    before, mask = (np.asarray(tree["kernel"]) for tree in _unclean()[:2])
    after, free = (np.asarray(_trained(optimizer, d).params["kernel"]) for d in (0.5, 0.0))
    kept_moves = bool((after != free)[mask].all())
    moved = int((after != before)[~mask].sum())
    return same((f"{moved} pruned entries moved", kept_moves), ("0 pruned entries moved", True))


for _optimizer in ("sgd", "momentum", "adam", "adamw"):
    situation(f"networks: weight decay on a ticket, {_optimizer}")(
        functools.partial(_does_not_move, _optimizer)
    )


@situation("networks: a search's own weight decay")
def _() -> Outcome:
    ticket, key = _unclean(), jax.random.key(0)
    problem_y = jnp.arange(N) % CLASSES
    config = TicketConfig(ticket_steps=3, l2=1.0)
    target = tickets.target_of(
        _affine, ticket.params, _images(), problem_y,
        threat=_THREAT, attack=_ATTACK, key=key, config=config,
    )  # fmt: skip
    zeroed = ticket._replace(params=jax.tree.map(jnp.multiply, ticket.params, ticket.mask))
    one, other = (
        tickets.solve(_affine, ticket.params, start, target, key, config)
        for start in (ticket, zeroed)
    )
    return near(one.params["kernel"], other.params["kernel"])


@situation("networks: HYDRA with a layer of zeros")
def _() -> Outcome:
    params = {"kernel": _normal(0, D, CLASSES), "bias": jnp.zeros(CLASSES)}
    start = methods.Trained(
        _affine, params, params, np.asarray(_images()), np.arange(N) % CLASSES, _THREAT, _ATTACK,
        jax.random.key(0), MaskConfig(density=0.5), _TRAIN,
    )  # fmt: skip
    return same(int(methods.hydra(start).mask["kernel"].sum()), 9)
