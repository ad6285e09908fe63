"""A solver step against the same step through neural-tangents, in the same run.

A step is: attack the batch (none for Neural Tangent Transfer), the dense network's logits and
kernel there, the sparse network's, the gradient of the objective, Adam. The peer does the same with
neural-tangents' kernels (the faster of its implementations), everything in one jitted function, and
must give the same gradients. The kernel is 32 × 32 × 10 × 10 in both.

Operations of a step of NTT, MLP 784-300-100-10: two kernels of 1024 pairs, Σ_l (I_l + 100·O_l)
multiply-adds each, and the gradient twice that of one: 0.17e9, a floor of 3 ms on two cores.
"""

import dataclasses
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ntk_awt import kernels, masks, tickets
from ntk_awt.app.config import MaskConfig, RunConfig, TicketConfig
from ntk_awt.app.run.methods import resolve
from ntk_awt.attacks import PGD
from ntk_awt.kernels import compat
from ntk_awt.network import Network
from ntk_awt.threats import Linf
from ntk_awt.types import Params

from .kernels import PEERS, images, network, neural_tangents
from .timing import compare, once

STEPS = 20
"""Steps in one timed call of ours."""


def _peer_kernel(net: Network, implementation: str) -> Any:
    """neural-tangents' kernel behind the arguments of `kernels.empirical`."""

    def kernel(
        apply: Any, params: Params, x1: jax.Array, x2: jax.Array | None = None, **masked: Any
    ) -> jax.Array:
        f, at = net.apply, params
        if masked and masked["jacobian"] == "masked":
            f = masks.masked(net.apply, masked["mask"], masked["gain"])
        elif masked:
            at = masked["at"]
        return neural_tangents(f, compat.NtkImplementation[implementation])(x1, x2, at)

    return kernel


def _row(what: str, config: TicketConfig, mask: MaskConfig, repeats: int) -> dict[str, Any]:
    net, n = network("mlp"), config.ticket_batch_size
    x, y = images(256), jnp.arange(256) % 10
    problem = tickets.Problem(net.params, x, y, Linf(0.1), jax.random.key(3))
    attack = PGD(steps=10)
    first = tickets.baseline(config.start, net.apply, problem, attack, mask)
    target = tickets.held_out_target(net.apply, attack, problem._replace(x=x[:n], y=y[:n]), config)

    def gradient(kernel: Any, params: Params, target: Any) -> Params:
        def loss(params: Params) -> jax.Array:
            ticket = first._replace(params=params)
            found = tickets.terms(net.apply, ticket, target, config, kernel=kernel)
            return tickets.objective(found, config)

        return jax.grad(loss)(params)

    optimizer = optax.adam(config.ticket_learning_rate)

    def theirs(implementation: str) -> Any:
        kernel = _peer_kernel(net, implementation)

        @jax.jit
        def step(params: Params, state: Any, x: jax.Array, y: jax.Array) -> Any:
            key = jax.random.key(0)
            point = tickets.target_of(
                net.apply, net.params, x, y,
                threat=problem.threat, attack=attack, key=key, config=config, ticket=first,
            )  # fmt: skip
            sides = (point.x,) if config.pairs == "all" else (point.x[: n // 2], point.x[n // 2 :])
            point = point._replace(kernel=kernel(net.apply, net.params, *sides))
            updates, state = optimizer.update(gradient(kernel, params, point), state)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(first.params)
        return lambda: step(first.params, state, x[:n], y[:n])

    mine = jax.jit(partial(gradient, kernels.empirical))(first.params, target)
    calls, times = {}, {}
    for name in PEERS:
        expected = jax.jit(partial(gradient, _peer_kernel(net, name)))(first.params, target)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
        pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True)
        error = max(float(jnp.abs(a - b).max()) for a, b in pairs) / largest
        if not error <= 1e-3:
            raise AssertionError(f"{what}: gradients differ by {error:.2e} of the largest entry")
        calls[name] = theirs(name)
        once(calls[name])
        times[name] = once(calls[name])
    best = min(times, key=times.__getitem__)

    search = dataclasses.replace(config, ticket_steps=STEPS, ticket_records=1, reselect_every=0)

    def run() -> Any:
        """`STEPS` steps of the search as users run it, between two records."""
        start = tickets.start(net.apply, search, net.params, first, jax.random.key(5), mask.gain)
        return tickets.search(
            net.apply, problem, start, target, attack=attack, config=search,
            on_record=lambda state, record: None, gain=mask.gain,
        ).params  # fmt: skip

    return compare(
        f"{what}, {STEPS} steps and two records",
        run,
        calls[best],
        f"neural-tangents {best}, {STEPS} steps",
        repeats=repeats,
        peer_calls=STEPS,
    )


def run(repeats: int = 3) -> list[dict[str, Any]]:
    """All rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neural-tangents' notes on its own settings
        ntt = resolve(RunConfig(mask=MaskConfig(density=0.03, allocation="uniform")), "ntt")
        ntt = dataclasses.replace(ntt, ticket=dataclasses.replace(ntt.ticket, ticket_batch_size=64))
        erk, attacked = MaskConfig(density=0.03), TicketConfig(inputs="dense")
        return [
            _row("NTT search, MLP 784-300-100-10, 3 %", ntt.ticket, ntt.mask, repeats),
            _row("awt search, MLP, ERK 3 %", TicketConfig(), erk, repeats),
            _row("awt search with PGD-10, MLP, ERK 3 %", attacked, erk, repeats),
        ]
