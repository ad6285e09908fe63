"""P3: bounds of the gap from the kernels and the dense network alone.

(a) frozen kernels, squared loss: random kernels and those of networks; flow and gradient descent.
The theory asks gradient descent for η ≤ N/λ_max of both kernels. What the proof needs is weaker:
D_{k+1} = (I − ηΘ^s/N)D_k − (η/N)ΔΘ r^d_k does not enlarge D if η ≤ 2N/λ_max(Θ^s), and the residuals
q^k‖r_0‖, q = max(|1 − ηλ_min/N|, |1 − ηλ_max/N|) of Θ^d, add up to min(kη, N/λ_min)‖r_0‖ if
q = 1 − ηλ_min/N, which is η ≤ 2N/(λ_min + λ_max)(Θ^d). For one image the latter is N/λ, and the
control with a larger step shows that it cannot be left out.

(b) fixed and (c) moving shared points, any smooth loss: exact for linearised networks, and with the
second-order remainders for any network. No limit on the step.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.special

from ntk_awt.theory.dynamics.preservation import (
    SMOOTHNESS,
    Frozen,
    Trajectory,
    gronwall_bound,
    pointwise_bound,
    prior_bound,
    prior_gap,
)
from proofs_check.core import (
    FORMULA,
    Case,
    Context,
    Line,
    Outcome,
    Panel,
    Recorder,
    Statement,
    below,
    close,
)
from proofs_check.instances import trainings
from proofs_check.instances.trainings import (
    MLP_CE,
    SAME_START,
    Pair,
    Trainings,
    gap_norms,
    matrix,
)

STATEMENT = Statement(
    number="P3",
    title="a-priori bounds of the gap",
    claim=(
        "At shared points the gap is bounded by the distances of targets and kernels at the start "
        "(frozen kernels, squared loss), and for smooth losses by the kernels and the dense "
        "network's gradients on the way."
    ),
    formula=(
        "(a) ‖D_t‖/√N ≤ β + min(t, N/λ_min(Θ^d))·α·r_0;   "
        "(b) b_{k+1} = (1 + ηL‖Θ^s_k‖/N)b_k + (η/N)‖ΔΘ_k g^d_k‖ + ‖ρ_k‖;   "
        "(c) δ_{k+1} = (1 + ηLκ)δ_k + max_z [(η/N) Σ_j ‖ΔΘ(z, x̃_j)‖‖g^d_j‖ + ‖ρ_k(z)‖]"
    ),
    hypotheses={
        "shared points": "both networks are trained on the same points: (a), (b) fixed and "
        "evaluated there, (c) moving, all of them in Z",
        "squared loss": "(a) squared loss, summed over the outputs",
        "frozen": "(a) frozen kernels",
        "semidefinite": "(a) symmetric positive semidefinite kernels",
        "step": "(a) gradient descent with η ≤ 2N/(λ_min + λ_max)(Θ^d) and η ≤ 2N/λ_max(Θ^s)",
        "smooth loss": "(b), (c) a loss with L-Lipschitz gradient: ½ for cross-entropy, 1 squared; "
        "ρ = 0 for linearised networks",
    },
    instances=(
        "(a) random kernels of five kinds of spectra and those of networks, flow and descent; "
        "(b), (c) linearised networks with random kernels and any step, and recorded trainings "
        "of MLPs on digits"
    ),
    rule="no violation; the exact gap of (a) within 1e-6 of a matrix exponential",
    tolerance=(
        "1e-9 for the rounding of eigenvalues and sums in float64; a matrix exponential in float64 "
        "errs by 1e-10 of a gap that is 1e-5 of the residual"
    ),
    source="theory P3, with a weaker condition on the step; after Shi et al. 2022",
)


def same(name: str, found: Any, wanted: Any) -> Case:
    """The library's bounds against those of this file, each relative to its own size.

    Two computations in float64 of eigenvalues of matrices up to 100 × 100 and of sums of 1e4 terms.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.asarray(found, np.float64) / wanted
    return close(f"{name}: library", ratios, np.ones_like(ratios), tolerance=1e-9)


# ---------------------------------------------------------------- (a) frozen kernels


class Instances(NamedTuple):
    """Pairs of frozen kernels, flat: one matrix for all n images and outputs.

    Attributes:
        dense, sparse: Θ^d, Θ^s, [count, M, M].
        r, d: r^d_0 and D_0, [count, M].
        n: N.
    """

    dense: np.ndarray
    sparse: np.ndarray
    r: np.ndarray
    d: np.ndarray
    n: int


def spectra(family: str, rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Eigenvalues, [count, size]."""
    order = np.arange(size)
    draw = partial(rng.uniform, size=(count, 1))
    return {
        "power law": lambda: (1.0 + order) ** -draw(0.5, 3.0),
        "ill-conditioned": lambda: 10.0 ** (-draw(4, 12) * order / (size - 1)),
        "low rank": lambda: np.where(order < size // 3, rng.uniform(0.1, 1, (count, size)), 0),
    }[family]()


FAMILIES = ("Wishart", "power law", "ill-conditioned", "low rank", "close")


def drawn(family: str, rng: np.random.Generator, count: int, n: int, c: int) -> Instances:
    """Random kernels of one kind of spectrum, and random residuals; a quarter has D_0 = 0."""
    size = n * c

    def wishart(a: np.ndarray) -> np.ndarray:
        return a @ a.transpose(0, 2, 1) / a.shape[2]

    if family in ("Wishart", "close"):
        a, b = rng.normal(size=(2, count, size, 2 * size))
        mixing = 1.0 if family == "Wishart" else 10.0 ** rng.uniform(-6, -1, (count, 1, 1))
        kernels = [wishart(a), wishart((1 - mixing) * a + mixing * b)]
    else:
        kernels = []
        for _ in range(2):
            q, _ = np.linalg.qr(rng.normal(size=(count, size, size)))
            values = spectra(family, rng, count, size)[:, None, :]
            kernels.append((q * values) @ q.transpose(0, 2, 1))
    scale = 10.0 ** rng.uniform(-2, 2, (count, 1, 1))
    r = rng.normal(size=(count, size))
    gap = 10.0 ** rng.uniform(-3, 1, (count, 1)) * rng.normal(size=(count, size))
    gap[::4] = 0
    return Instances(scale * kernels[0], scale * kernels[1], r, gap, n)


def limits(found: Instances) -> np.ndarray:
    """The largest η of gradient descent for which the bound is proved, [count]."""
    dense, sparse = (np.linalg.eigvalsh(kernel) for kernel in (found.dense, found.sparse))
    return 2 * found.n / np.maximum(dense[:, 0] + dense[:, -1], sparse[:, -1])


def evolved(found: Instances, times: np.ndarray, step: np.ndarray | None = None) -> np.ndarray:
    """‖D_t‖/√N of flow, or of gradient descent after `times` steps, [count, times]."""
    residuals = []
    for kernel, start in ((found.dense, found.r), (found.sparse, found.r - found.d)):
        values, vectors = np.linalg.eigh(kernel)
        values = values[:, None] / found.n
        if step is None:
            left = np.exp(-times[..., None] * values)
        else:
            left = (1 - step[:, None, None] * values) ** times[..., None]
        coordinates = np.einsum("kij,ki->kj", vectors, start)[:, None]
        residuals.append(np.einsum("kij,ktj->kti", vectors, left * coordinates))
    return np.linalg.norm(residuals[0] - residuals[1], axis=2) / np.sqrt(found.n)


def prior(found: Instances, times: np.ndarray, *, share: float = 1.0, mode: int = 0) -> np.ndarray:
    """β + min(t, N/λ_min(Θ^d))·α·r_0, instance by instance, [count, times].

    `share` of α and the `mode` whose eigenvalue is taken for λ_min are changed by controls alone.
    """
    bounds = []
    for dense, sparse, r, d, t in zip(
        found.dense, found.sparse, found.r, found.d, times, strict=True
    ):
        slowest = np.linalg.eigvalsh(dense)[mode]
        cap = found.n / slowest if slowest > 0 else np.inf
        alpha = share * np.sqrt(np.sum((dense - sparse) ** 2)) / found.n
        beta, residual = (np.sqrt(np.sum(v**2) / found.n) for v in (d, r))
        bounds.append(beta + np.minimum(t, cap) * alpha * residual)
    return np.array(bounds)


def arrays(found: Instances, i: int) -> tuple[Frozen, Frozen, Any]:
    """The library's arguments for one instance, with y = 0."""
    n, c = found.n, found.r.shape[1] // found.n
    kernels = (
        jnp.asarray(kernel[i].reshape(n, c, n, c).transpose(0, 2, 1, 3))
        for kernel in (found.dense, found.sparse)
    )
    outputs = (jnp.asarray(v.reshape(n, c)) for v in (found.r[i], found.r[i] - found.d[i]))
    dense, sparse = map(Frozen, kernels, outputs)
    return dense, sparse, jnp.zeros((n, c))


def moments(found: Instances, rng: np.random.Generator) -> Iterator[tuple[str, Any, Any]]:
    """Times of flow from the fastest mode's to the slowest's, and steps of descent to the limit."""
    values = np.linalg.eigvalsh(found.dense)
    largest, smallest = values[:, -1:], np.maximum(values[:, :1], 1e-7 * values[:, -1:])
    yield (
        "flow",
        found.n / largest * 1e-3 * (3e3 * largest / smallest) ** np.linspace(0, 1, 12),
        None,
    )
    share = np.where(rng.uniform(size=len(values)) < 0.5, 1.0, rng.uniform(0.01, 1, len(values)))
    counts = np.array([1, 2, 3, 5, 10, 30, 100, 300])
    yield "descent", np.tile(counts, (len(values), 1)), share * limits(found)


def check_frozen(
    check: Recorder, name: str, found: Instances, rng: np.random.Generator, compared: int
) -> Line:
    """The bound for all instances, and the library for the first ones; tightness under flow."""
    lines = []
    for kind, times, step in moments(found, rng):
        actual = evolved(found, times, step)
        bound = prior(found, times if step is None else times * step[:, None])
        label = f"(a) {name}, {kind}, {len(times)} instances"
        rows = [
            prior_bound(*arrays(found, i), times[i], step=None if step is None else float(step[i]))
            for i in range(compared)
        ]
        check.below(label, actual, bound)
        check.case(same(label, rows, bound[:compared]))
        if kind == "flow":
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.median(bound / actual, axis=0)
            lines.append(Line(name, np.linspace(0, 1, times.shape[1]), ratios))
    return lines[0]


def check_exact(name: str, found: Instances, count: int) -> Case:
    """`prior_gap` against the matrix exponential of the joint system of r^d and D."""
    gaps, wanted = [], []
    for i in range(count):
        dense, sparse = found.dense[i], found.sparse[i]
        times = found.n / np.linalg.eigvalsh(dense)[-1] * np.array([0.1, 1.0, 10.0])
        joint = -np.block([[dense, 0 * dense], [dense - sparse, sparse]]) / found.n
        start = np.concatenate([found.r[i], found.d[i]])
        wanted += [(scipy.linalg.expm(t * joint) @ start)[len(dense) :] for t in times]
        gaps += list(np.asarray(prior_gap(*arrays(found, i), times)).reshape(len(times), -1))
    scale = np.linalg.norm(wanted, axis=1)[:, None]  # so that every instance and time counts
    return close(f"(a) {name}: D_t", gaps / scale, wanted / scale, tolerance=1e-6)


def aligned(size: int) -> Instances:
    """Kernels that differ in one common eigenvector u of the least eigenvalue, with r_0 = u."""
    u = np.eye(size)[:1]
    values = np.linspace(1, 10, size)
    dense = np.diag(values)[None]
    return Instances(dense, dense - 0.5 * u[:, :, None] * u[:, None, :], u, 0 * u, size)


def one_image(dense: float, sparse: float) -> Instances:
    """N = 1, one output, r_0 = 1, D_0 = 0."""
    one = np.ones((1, 1))
    return Instances(dense * one[None], sparse * one[None], one, 0 * one, 1)


def quartic(start: float, kernels: tuple[float, float], times: np.ndarray) -> np.ndarray:
    """‖D_t‖ of one image under the loss f⁴/4 from the same start, in closed form."""
    dense, sparse = (start / np.sqrt(1 + 2 * kernel * times * start**2) for kernel in kernels)
    return np.abs(dense - sparse)


def broken_frozen(check: Recorder) -> None:
    """(a) with wrong constants, and where a hypothesis fails."""
    right, times = aligned(4), np.logspace(-2, 2, 9)[None]
    steps = np.arange(1, 31)[None]
    near, far = one_image(1.0, 0.99), one_image(1.0, 2.1)
    steep = one_image(1.0, 1.5)._replace(r=np.full((1, 1), 10.0))
    large, one = np.array([1.9]), np.array([1.0])
    indefinite = right._replace(sparse=right.sparse - 1.5 * (right.dense - right.sparse) / 0.5)
    moved = right._replace(sparse=right.sparse / 10)
    mixed = right._replace(dense=right.dense + np.eye(4, k=1))

    def rule(name: str, actual: np.ndarray, bound: np.ndarray, breaks: str = FORMULA) -> None:
        check.control(name, below("(a)", actual, bound), breaks=breaks)

    actual = evolved(right, times)
    rule("α of half the difference", actual, prior(right, times, share=0.5))
    rule("N/λ_max as the cap", actual, prior(right, times, mode=-1))
    summed = evolved(right, times * right.n)
    rule("summed loss in place of the mean", summed, prior(right, times))
    name = "step above 2N/(λ_min + λ_max) of Θ^d"
    rule(name, evolved(near, steps, large), prior(near, steps * large), "step")
    name = "step above 2N/λ_max of Θ^s"
    rule(name, evolved(far, steps, one), prior(far, steps * one), "step")
    rule("Θ^s not PSD", evolved(indefinite, times), prior(indefinite, times), "semidefinite")
    rule("a sparse kernel that has shrunk", evolved(moved, times), prior(right, times), "frozen")
    early = times / 100
    rule("the loss f⁴/4", quartic(10.0, (1.0, 1.5), early), prior(steep, early), "squared loss")
    refused = {
        "library, step above 2N/(λ_min + λ_max) of Θ^d": (
            "step", lambda: prior_bound(*arrays(near, 0), [1], step=1.9)
        ),
        "library, step above 2N/λ_max of Θ^s": (
            "step", lambda: prior_bound(*arrays(far, 0), [1], step=1.0)
        ),
        "library, Θ^s not PSD": (
            "semidefinite", lambda: prior_bound(*arrays(indefinite, 0), [1.0])
        ),
        "library, mixed kernel": ("semidefinite", lambda: prior_gap(*arrays(mixed, 0), [1.0])),
    }  # fmt: skip
    for name, (breaks, call) in refused.items():
        check.control(name, call, breaks=breaks)


# ---------------------------------------------------------------- (b), (c) smooth losses


def gronwall(dense: Trajectory, sparse: Trajectory, step: float, smooth: float) -> np.ndarray:
    """b_{k+1} = (1 + ηL‖Θ^s_k‖/N)b_k + (η/N)‖ΔΘ_k g^d_k‖ + ‖ρ_k‖, [T + 1]."""
    bounds = [gap_norms(dense, sparse)[0]]
    for k in range(len(dense.gradients)):
        wide, narrow = (matrix(np.asarray(t.kernels, np.float64)[k]) for t in (dense, sparse))
        g = np.ravel(np.asarray(dense.gradients, np.float64)[k])
        rest = np.subtract(*(np.asarray(t.remainders, np.float64)[k] for t in (dense, sparse)))
        rate = step / dense.gradients.shape[1]
        growth = 1 + rate * smooth * np.linalg.svd(narrow, compute_uv=False)[0]
        driven = rate * np.linalg.norm((wide - narrow) @ g)
        bounds.append(growth * bounds[-1] + driven + np.linalg.norm(rest))
    return np.array(bounds)


def largest_gaps(dense: Trajectory, sparse: Trajectory) -> np.ndarray:
    """max_z ‖D_k(z)‖, [T + 1]."""
    outputs = (np.asarray(network.outputs, np.float64) for network in (dense, sparse))
    return np.sqrt(np.sum(np.subtract(*outputs) ** 2, axis=2)).max(axis=1)


def operator_norms(blocks: np.ndarray) -> np.ndarray:
    """The largest singular value of each, from the eigenvalues of AᵀA."""
    values = np.linalg.eigvalsh(blocks.transpose(0, 2, 1) @ blocks)[:, -1]
    return np.sqrt(np.maximum(values, 0))


def pointwise(dense: Trajectory, sparse: Trajectory, step: float, smooth: float) -> np.ndarray:
    """δ_{k+1} = (1 + ηLκ)δ_k + max_z [(η/N) Σ_j ‖ΔΘ(z, x̃_j)‖‖g^d_j‖ + ‖ρ_k(z)‖], [T + 1]."""
    bounds = [largest_gaps(dense, sparse)[0]]
    for k in range(len(dense.gradients)):
        wide, narrow = (np.asarray(t.kernels, np.float64)[k] for t in (dense, sparse))
        lengths = np.linalg.norm(np.asarray(dense.gradients, np.float64)[k], axis=1)
        rest = np.subtract(*(np.asarray(t.remainders, np.float64)[k] for t in (dense, sparse)))
        added, response = [], []
        for apart, block, rho in zip(wide - narrow, narrow, rest, strict=True):  # of each z
            added.append(step / len(lengths) * operator_norms(apart) @ lengths)
            added[-1] += np.linalg.norm(rho)
            response.append(operator_norms(block).mean())
        bounds.append((1 + step * smooth * max(response)) * bounds[-1] + max(added))
    return np.array(bounds)


class Linear(NamedTuple):
    """Two linearised networks at n points, [n, n, c, c] and [n, c] each."""

    dense: np.ndarray
    sparse: np.ndarray
    f: np.ndarray
    h: np.ndarray
    targets: np.ndarray


def simulated(
    networks: Linear, step: float, steps: int, loss: str
) -> tuple[Trajectory, Trajectory]:
    """Gradient descent in function space; without remainders."""

    def network(kernel: np.ndarray, start: np.ndarray) -> Trajectory:
        f, outputs, gradients = start, [start], []
        for _ in range(steps):
            prediction = scipy.special.softmax(f, axis=1) if loss == "cross-entropy" else f
            gradients.append(prediction - networks.targets)
            f = f - step / len(f) * (matrix(kernel) @ gradients[-1].ravel()).reshape(f.shape)
            outputs.append(f)
        z = jnp.arange(len(f), dtype=jnp.result_type(float))[:, None]
        x = jnp.broadcast_to(z, (steps, *z.shape))
        kernels = jnp.broadcast_to(jnp.asarray(kernel), (steps, *kernel.shape))
        path, slopes = jnp.asarray(np.array(outputs)), jnp.asarray(np.array(gradients))
        return Trajectory(z, x, path, slopes, kernels, jnp.zeros((steps, *f.shape)))

    return network(networks.dense, networks.f), network(networks.sparse, networks.h)


def linear_pair(found: Instances, i: int, rng: np.random.Generator) -> Linear:
    """An instance of (a) with random one-hot targets."""
    dense, sparse, _ = arrays(found, i)
    n, c = dense.outputs.shape
    targets = np.eye(c)[rng.integers(0, c, n)]
    wide, narrow, f, h = map(
        np.asarray, (dense.kernel, sparse.kernel, dense.outputs, sparse.outputs)
    )
    return Linear(wide, narrow, f, h, targets)


PARTS = {
    "b": (gap_norms, gronwall, gronwall_bound),
    "c": (largest_gaps, pointwise, pointwise_bound),
}
"""Gap, bound and the library's bound of the parts for smooth losses."""


def check_linear(check: Recorder, found: Instances, rng: np.random.Generator) -> None:
    """(b) and (c) for linearised networks; also at steps where gradient descent diverges."""
    for loss, smooth in SMOOTHNESS.items():
        runs: list[tuple[tuple[Trajectory, Trajectory], float]] = []
        for i, limit in enumerate(limits(found)):
            step = float(rng.uniform(0.1, 4) * limit)
            runs.append((simulated(linear_pair(found, i, rng), step, 10, loss), step))
        for part, (gap, bound, library) in PARTS.items():
            name = f"({part}) linearised, {loss}, {len(runs)} instances"
            bounds = np.array([bound(*paths, step, smooth)[1:] for paths, step in runs])
            ours = [library(*paths, step, smooth)[1:] for paths, step in runs]
            check.below(name, [gap(*paths)[1:] for paths, _ in runs], bounds)
            check.case(same(name, ours, bounds))


def asked_elsewhere() -> tuple[Trajectory, Trajectory]:
    """One step of w·x, squared loss, target 0, on x = (1, 0); Z = {x, (2, 2)}, D_0(2, 2) = 0.

    The dense network starts at w = (1, −1), the sparse one at 0, so D_1(2, 2) = −2.
    """
    z = np.array([[1.0, 0.0], [2.0, 2.0]])
    kernel = jnp.asarray(z @ z[:1].T)[None, :, :, None, None]

    def network(w: np.ndarray) -> Trajectory:
        outputs = jnp.asarray(np.array([z @ w, z @ (w - w[0] * z[0])])[..., None])
        gradient, rest = jnp.full((1, 1, 1), w[0]), jnp.zeros((1, 2, 1))
        return Trajectory(jnp.asarray(z), jnp.asarray(z[None, :1]), outputs, gradient, kernel, rest)

    return network(np.array([1.0, -1.0])), network(np.zeros(2))


def broken_smooth(check: Recorder) -> None:
    """(b) and (c) with an L that is too small, another mean, or other points."""

    def rule(part: str, paths: tuple[Trajectory, Trajectory], step: float, smooth: float) -> Case:
        gap, bound, _ = PARTS[part]
        return below(f"({part})", gap(*paths)[1:], bound(*paths, step, smooth)[1:])

    def one(kernel: float) -> Linear:
        """N = 1, two outputs, D_0 along the direction in which cross-entropy is most curved."""
        theta, target = kernel * np.eye(2).reshape(1, 1, 2, 2), np.array([[1.0, 0.0]])
        return Linear(theta, theta, 0 * target, 1e-3 * np.array([[1.0, -1.0]]), target)

    found = aligned(4)
    pair = linear_pair(found, 0, np.random.default_rng(0))
    summed = simulated(pair._replace(targets=0 * pair.targets), 0.05 * found.n, 4, "squared")
    paths = dense, sparse = asked_elsewhere()
    left, right = (t._replace(z=t.z[1:], outputs=t.outputs[:, 1:]) for t in paths)
    case = rule("b", simulated(one(20), 1.0, 1, "cross-entropy"), 1.0, 0.25)
    check.control("L = ¼ for cross-entropy", case, breaks="smooth loss")
    case = rule("b", simulated(one(6), 1.0, 4, "squared"), 1.0, 0.5)
    check.control("L = ½ for the squared loss", case, breaks="smooth loss")
    check.control("summed loss in place of the mean", rule("b", summed, 0.05, 1.0), breaks=FORMULA)
    case = rule("c", paths, 1.0, 0.0)
    check.control("L = 0 at points that are not trained on", case, breaks="smooth loss")
    refused = {
        "library, different points": lambda: pointwise_bound(
            dense, sparse._replace(x=sparse.x + 1), 1.0, 1.0
        ),
        "library, training points missing in Z": lambda: pointwise_bound(left, right, 1.0, 1.0),
        "library, (b) at other points": lambda: gronwall_bound(dense, sparse, 1.0, 1.0),
    }
    for name, call in refused.items():
        check.control(name, call, breaks="shared points")


# ---------------------------------------------------------------- networks


def frozen_networks(dense: Trajectory, sparse: Trajectory, targets: np.ndarray) -> Instances:
    """The first kernels and outputs of both networks at shared points."""
    wide, narrow = (matrix(np.asarray(t.kernels, np.float64)[0])[None] for t in (dense, sparse))
    f, h = (np.asarray(t.outputs, np.float64)[0].reshape(1, -1) for t in (dense, sparse))
    return Instances(wide, narrow, f - targets.reshape(1, -1), f - h, len(targets))


def at_first(path: Trajectory, count: int) -> Trajectory:
    """The same training, followed at the first points of Z alone."""
    outputs, kernels, rest = (
        np.asarray(a)[:, :count] for a in (path.outputs, path.kernels, path.remainders)
    )
    return path._replace(
        z=np.asarray(path.z)[:count], outputs=outputs, kernels=kernels, remainders=rest
    )


def check_network(
    check: Recorder, t: Trainings, pair: Pair, rng: np.random.Generator
) -> list[Panel]:
    """All parts for two real networks: frozen at the start, at fixed and at moving points."""
    panels: list[Panel] = []
    setting, trained = pair.setting, t.run(pair.setting, pair.dense)
    smooth, step = SMOOTHNESS[setting.criterion], setting.step
    moving, fixed = trained.x, jnp.broadcast_to(trained.x[:1], trained.x.shape)
    visited = moving.reshape(-1, *moving.shape[2:])  # the first ones are those of step 0
    for part, run in (("b", t.run_on(setting, pair.dense, fixed)), ("c", trained)):
        dense = t.follow(setting, run, visited)
        sparse = t.follow(setting, t.run_on(setting, pair.sparse, run.x), visited)
        if part == "b":
            dense, sparse = (at_first(path, t.n) for path in (dense, sparse))
        gap, bound, library = PARTS[part]
        actual, wanted = gap(dense, sparse), bound(dense, sparse, step, smooth)
        name = f"({part}) {setting.label}, {pair.dense} and {pair.sparse}"
        check.below(name, actual[1:], wanted[1:])
        check.case(same(name, library(dense, sparse, step, smooth)[1:], wanted[1:]))
        times = step * np.arange(t.steps + 1)
        lines = [Line("gap", times, actual), Line("bound", times, wanted, "bound")]
        panels.append(Panel(name, "time kη", "gap, logits", lines))
        if part == "b":
            targets = np.eye(dense.outputs.shape[2])[t.problem(setting.network).y]
            found = frozen_networks(dense, sparse, targets)
            check_frozen(check, f"{name[4:]}, frozen", found, rng, 1)
    return panels


def check(context: Context) -> Outcome:
    """Random kernels, linearised networks, networks; and all controls."""
    count, compared, linear = context.pick((40, 3, 3), (170, 6, 20), (1000, 50, 100))
    check = Recorder(STATEMENT)
    lines: list[Line] = []
    for i, family in enumerate(FAMILIES):
        rng = context.rng(0, i)
        found = drawn(family, rng, count, 6, 2)
        lines.append(check_frozen(check, family, found, rng, compared))
        check.case(check_exact(family, found, compared))
    rng = context.rng(1)
    check_linear(check, drawn("Wishart", rng, linear, 5, 3), rng)
    context.progress(0.3)
    t = trainings.of(context, *context.pick((6, 4), (10, 16), (10, 16)))
    wanted = [SAME_START, *(Pair(MLP_CE, kind) for kind in ("random", "magnitude", "ticket"))]
    label = "from the fastest mode's 1e-3 (0) to the slowest's 3 (1), log scale"
    check.panel(Panel("(a) Tightness under flow", f"time {label}", "median of bound/gap", lines))
    for pair in context.pick(wanted[:1], wanted, wanted):
        figures = check_network(check, t, pair, rng)
        if pair.sparse != "magnitude":
            check.panel(*figures)
    broken_frozen(check)
    broken_smooth(check)
    return check.outcome()
