"""Tangent kernels against neural-tangents, in the same run, after the values are found equal.

The peer is the faster of neural-tangents' two implementations that run on current JAX, chosen by
measuring both. Every pair of kernels is compared before it is timed: the largest difference must be
below 1e-5 of the largest entry.

Operations of the dense kernel of an MLP, N images, C logits, symmetric: N²/2·Σ_l (I_l + C²·O_l)
multiply-adds, 0.34e9 for 784-300-100-10 and N = 128, where one large matrix product runs at about
80e9 of them a second on two cores: a floor of 4 ms.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ntk_awt import kernels, masks, models
from ntk_awt.app.config import ModelConfig
from ntk_awt.kernels import probes
from ntk_awt.masks import Ticket
from ntk_awt.network import Network

from .resnet import ResNet18
from .timing import compare, medians, once, row

DENSITIES = (0.01, 0.03, 0.1, 0.3, 0.9)
PEERS = ("NTK_VECTOR_PRODUCTS", "JACOBIAN_CONTRACTION")

Call = Callable[[], jax.Array]


def network(name: str, **settings: Any) -> Network:
    """A model of ours for 28×28 images and ten classes."""
    config = ModelConfig(name=name, **settings)
    return models.build(config, (28, 28, 1), 10, jax.random.key(0))


def images(n: int, shape: tuple[int, ...] = (28, 28, 1)) -> jax.Array:
    """Random images."""
    return jax.random.uniform(jax.random.key(1), (n, *shape))


def sparse(net: Network, density: float) -> Ticket:
    """A random mask of that density in every layer, with energy-preserving gains."""
    scores = masks.random_scores(jax.random.key(2), net.params)
    mask = masks.make(scores, density, "uniform")
    return Ticket(net.params, mask, masks.energy_gain(net.params, mask))


def ours(net: Network, x: jax.Array, ticket: Ticket | None = None, **options: Any) -> Call:
    """Our kernel, jitted, as a function without arguments."""
    mask, gain = (ticket.mask, ticket.gain) if ticket else (None, None)
    run = jax.jit(
        lambda params, x: kernels.empirical(net.apply, params, x, mask=mask, gain=gain, **options)
    )
    return lambda: run(net.params, x)


def peers(net: Network, x: jax.Array, ticket: Ticket | None = None) -> dict[str, Call]:
    """neural-tangents' kernels with all pairs of outputs, jitted."""
    from ntk_awt.kernels import compat

    apply = masks.masked(net.apply, ticket.mask, ticket.gain) if ticket else net.apply

    def call(name: str) -> Call:
        run = jax.jit(neural_tangents(apply, compat.NtkImplementation[name]))
        return lambda: run(x, None, net.params)

    return {name: call(name) for name in PEERS}


def neural_tangents(apply: Any, implementation: Any) -> Any:
    """The peer's kernel of a network with all pairs of outputs, not jitted."""
    from ntk_awt.kernels import compat

    return compat.empirical_ntk_fn(apply, trace_axes=(), vmap_axes=0, implementation=implementation)


def check_equal(what: str, found: jax.Array, expected: jax.Array, limit: float = 1e-5) -> None:
    """Stop the benchmark unless two kernels are equal to `limit` of the largest entry."""
    error = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
    if not error <= limit:
        raise AssertionError(f"{what}: kernels differ by {error:.2e} of the largest entry")


def against_neural_tangents(
    what: str, net: Network, x: jax.Array, ticket: Ticket | None, repeats: int
) -> dict[str, Any]:
    """Ours against the faster of the peer's implementations."""
    mine, calls = ours(net, x, ticket), peers(net, x, ticket)
    first = once(mine)
    reference = mine()
    times = {}
    for name, call in calls.items():
        check_equal(f"{what}, {name}", reference, call())
        times[name] = once(call)
    best = min(times, key=times.__getitem__)
    peer = f"neural-tangents {best}"
    return compare(what, mine, calls[best], peer, repeats=repeats, compile_seconds=first)


def alternatives(net: Network, x: jax.Array, density: float, repeats: int) -> dict[str, Any]:
    """The masked kernel as planned against the best single choice for all layers, by measuring."""
    ticket = sparse(net, density)
    mask = ticket.mask
    names = [layer.name.split(" ")[0] for layer in kernels.plan(net.apply, net.params, x).layers]
    calls = {"contraction": ours(net, x, ticket, engine="contraction")}
    for form in ("packed", "soft"):
        forced = dict.fromkeys(names, form)
        plan = kernels.plan(net.apply, net.params, x, mask=mask, engine="layerwise", forms=forced)
        calls[form] = ours(net, x, ticket, plan=plan)
    mine = ours(net, x, ticket)
    first = once(mine)
    for name, call in calls.items():
        check_equal(f"density {density:g}, {name}", mine(), call())
    times = medians({"ours": mine, **calls}, repeats=repeats)
    best = min(calls, key=times.__getitem__)
    what = f"masked kernel, MLP, N = {len(x)}, density {density:g}, against other choices"
    return row(
        what, 1e3 * times["ours"], 1e3 * times[best], f"ours: {best} everywhere", first, "ms"
    )


def gradients(repeats: int) -> Iterator[dict[str, Any]]:
    """The gradient of the kernel distance of a 3 % MLP, 32 images, and of the kernels alone."""
    net, x = network("mlp"), images(32)
    ticket = sparse(net, 0.03)
    _, mask, gain = ticket
    apply = masks.masked(net.apply, mask, gain)

    def distance(kernel: Callable[[Any, Any], Callable[..., jax.Array]]) -> Call:
        dense, masked = kernel(net.apply, None), kernel(apply, mask)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            return kernels.relative_kernel_distance(dense(net.params, x), masked(params, x))

        run = jax.jit(jax.grad(loss))
        return lambda: run(net.params, x)

    def mine(apply: Any, mask: Any) -> Any:
        options = {} if mask is None else {"mask": mask, "gain": gain}
        return lambda params, x: kernels.empirical(net.apply, params, x, **options)

    def theirs(implementation: Any) -> Any:
        return lambda apply, mask: (
            lambda params, x: neural_tangents(apply, implementation)(x, None, params)
        )

    from ntk_awt.kernels import compat

    found = distance(mine)
    first = once(found)
    times, calls = {}, {}
    for name in PEERS:
        calls[name] = distance(theirs(compat.NtkImplementation[name]))
        pairs = zip(jax.tree.leaves(found()), jax.tree.leaves(calls[name]()), strict=True)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(calls[name]()))
        error = max(float(jnp.abs(a - b).max()) for a, b in pairs) / largest
        if not error <= 1e-4:
            raise AssertionError(f"gradients differ by {error:.2e} of the largest entry")
        times[name] = once(calls[name])
    best = min(times, key=times.__getitem__)
    what = "gradient of the kernel distance, MLP, N = 32, 3 %"
    peer = f"neural-tangents {best}"
    yield compare(what, found, calls[best], peer, repeats=repeats, compile_seconds=first)
    both = jax.jit(lambda p, x: (mine(net.apply, None)(p, x), mine(apply, mask)(p, x)))
    peer, alone = "ours: the two kernels alone", lambda: both(net.params, x)
    yield compare(what, found, alone, peer, repeats=repeats, compile_seconds=first)


def probe_rows(repeats: int) -> Iterator[dict[str, Any]]:
    """Stochastic estimate of the distance of two kernels: time against the number of images."""
    net = network("mlp")
    _, mask, gain = sparse(net, 0.03)

    @jax.jit
    def run(params: Any, x: jax.Array, key: jax.Array) -> Any:
        dense = probes.kernel_product(net.apply, params, x)
        masked = probes.kernel_product(net.apply, params, x, mask=mask, gain=gain)
        return probes.squared_distance(dense, masked, key).value

    key = jax.random.key(3)
    many, few = images(1024), images(128)
    yield compare(
        "probes of ‖Θ^d − Θ^s‖², MLP, 3 %, N = 1024",
        lambda: run(net.params, many, key),
        lambda: run(net.params, few, key),
        "ours: N = 128",
        repeats=repeats,
    )


def resnet(repeats: int) -> Iterator[dict[str, Any]]:
    """A ResNet-18 on 32×32×3 images: bytes, and time against the passes of vector products."""
    net = Network.from_nnx(ResNet18(rngs=nnx.Rngs(0)))
    x = images(16, (32, 32, 3))
    what = "ResNet-18 (GroupNorm), N = 16, mean over outputs"

    @jax.jit
    def run(params: Any, x: jax.Array) -> jax.Array:
        return kernels.empirical(net.apply, params, x, outputs="trace")

    compiled = run.lower(net.params, x).compile()
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise RuntimeError("this device does not say how much memory a program takes")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(net.params))
    used = sizes.temp_size_in_bytes + sizes.output_size_in_bytes + weights + x.nbytes
    yield row(f"{what}: memory", used / 2**30, 4.0, "the limit set for it", 0.0, "GiB")
    passes = jax.jit(net.apply)
    yield compare(
        what,
        lambda: compiled(net.params, x),
        lambda: passes(net.params, x),
        "forward passes, as many as there are logits times images squared",
        repeats=repeats,
        peer_calls=10 * len(x),
    )


def run(repeats: int = 5) -> list[dict[str, Any]]:
    """All rows; the peers take most of the time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neural-tangents' notes on its own settings
        mlp, lenet = network("mlp"), network("lenet5")
        rows = []
        for what, net, x in (
            ("MLP 784-300-100-10, N = 128, full", mlp, images(128)),
            ("LeNet-5, N = 64, full", lenet, images(64)),
        ):
            rows.append(against_neural_tangents(f"dense {what}", net, x, None, repeats))
            ticket = sparse(net, 0.03)
            rows.append(against_neural_tangents(f"masked 3 % {what}", net, x, ticket, repeats))
        rows += [alternatives(mlp, images(128), density, repeats) for density in DENSITIES]
        rows += gradients(repeats)
        rows += probe_rows(repeats)
        rows += resnet(1)
    return rows
