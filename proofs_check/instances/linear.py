"""Random problems of linear classification, their formulas and their points, in NumPy alone.

For L1 and L2: everything is stated again here, without the library, which the checks compare.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ntk_awt.theory import linear
from proofs_check.core import Case, Line, Panel, below, close

Array = NDArray[np.float64]

SIGNS = np.array([-1.0, 1.0])


def norm(w: Array, q: float) -> float:
    """‖w‖_q."""
    size = np.abs(w)
    return float(size.max() if np.isinf(q) else np.sum(size**q) ** (1 / q))


def dual(p: float) -> float:
    """q with 1/p + 1/q = 1."""
    return {1.0: np.inf, np.inf: 1.0}.get(p) or p / (p - 1)


def strong_reach(epsilon: Any, delta: Any, inside: Any, across: Any) -> Array:
    """r = ‖w‖·(ε, or δc + √(ε² − δ²)s): L2's formula, of the lengths c‖w‖ and s‖w‖ of w's parts."""
    length = np.hypot(inside, across)
    corner = np.sqrt(np.maximum(np.square(epsilon) - np.square(delta), 0))
    reach = delta * np.asarray(inside) + corner * np.asarray(across)
    return np.where(epsilon * np.asarray(inside) <= delta * length, epsilon * length, reach)


LEVEL = 0.999
"""Of a plain binomial interval, and of all intervals of a statement together."""


class Problem(NamedTuple):
    """Two Gaussian classes and a classifier sign(wᵀx + b).

    Attributes:
        means: μ_y [2, d], class −1 first.
        scale, loadings: [2, d] and [2, d, k]; Σ_y = diag(scale²) + loadings·loadingsᵀ.
        priors: [2].
        w, b: of the classifier, [d] and a number.
    """

    means: Array
    scale: Array
    loadings: Array
    priors: Array
    w: Array
    b: float

    def covariances(self) -> Array:
        """Σ_y, [2, d, d]."""
        diagonal = np.stack([np.diag(s**2) for s in self.scale])
        return diagonal + self.loadings @ self.loadings.transpose(0, 2, 1)

    def margin_law(self) -> tuple[Array, Array]:
        """m_y = y(wᵀμ_y + b) and σ_y = √(wᵀΣ_y w), [2] each."""
        inner = np.sum((self.scale * self.w) ** 2, 1) + np.sum((self.w @ self.loadings) ** 2, 1)
        return SIGNS * (self.means @ self.w + self.b), np.sqrt(inner)

    def library(self) -> tuple[linear.Gaussians, linear.LinearClassifier]:
        """The same for the library."""
        classes = linear.Gaussians(self.means, self.covariances(), self.priors)
        return classes, linear.LinearClassifier(self.w, self.b)


def draw_problem(d: int, rng: np.random.Generator) -> Problem:
    """Any covariances up to d = 50, else a random diagonal and three directions; half are equal.

    Margins are of the order of their spread, so that no rate is near 0 or 1.
    """
    rank = d if d <= 50 else 3
    scale, loadings = rng.uniform(0.3, 1.0, (2, d)), rng.standard_normal((2, d, rank))
    loadings /= np.sqrt(rank)
    if rng.random() < 0.5:
        scale[1], loadings[1] = scale[0], loadings[0]
    w = rng.standard_normal(d)
    w *= rng.uniform(0.2, 5.0) / np.linalg.norm(w)
    prior = rng.uniform(0.2, 0.8)
    start = Problem(np.zeros((2, d)), scale, loadings, np.array([1 - prior, prior]), w, 0.0)
    spread = start.margin_law()[1].mean()
    half, centre = rng.standard_normal(d) / np.sqrt(d), rng.standard_normal(d)
    half += w * (rng.uniform(0.3, 1.8) * spread - w @ half) / (w @ w)
    bias = float(0.3 * spread * rng.standard_normal() - w @ centre)
    return start._replace(means=centre + SIGNS[:, None] * half, b=bias)


@threadpool_limits.wrap(limits=1)  # the products are small: more threads only wait
def draw_margins(
    problem: Problem, n: int, rng: np.random.Generator, on_share: Callable[[float], None]
) -> Array:
    """Margins y(wᵀx + b) of n fresh points x, each drawn with all its coordinates."""
    positive = rng.binomial(n, problem.priors[1])
    d, rank = problem.loadings.shape[1:]
    block, margins, done = max(1, 2**16 // d), np.empty(n), 0
    # In place, and in blocks that stay in the cache: the normals are what takes the time.
    whole, moves, drawn = np.empty((block, d)), np.empty((block, d)), np.empty((block, rank))
    for index, total in enumerate((n - positive, positive)):
        end = done + total
        while done < end:
            size = min(end - done, block)
            x, along, factors = whole[:size], moves[:size], drawn[:size]
            rng.standard_normal(out=x)
            rng.standard_normal(out=factors)
            np.matmul(factors, problem.loadings[index].T, out=along)
            x *= problem.scale[index]
            x += along
            x += problem.means[index]
            margins[done : done + size] = SIGNS[index] * (x @ problem.w + problem.b)
            done += size
            on_share(done / n)
    return margins


def formula_rates(problem: Problem, reach: float) -> Array:
    """Clean error, rate of adversarial examples and robust error, [3]: the statement itself."""
    mean, spread = problem.margin_law()
    clean, robust = (scipy.special.ndtr((r - mean) / spread) for r in (0.0, reach))
    return np.stack([clean, robust - clean, robust]) @ problem.priors


def counts(margins: Array, loss: float) -> Array:
    """How many points are wrong, are turned around by that loss of margin, or either, [3]."""
    wrong, lost = int(np.sum(margins <= 0)), int(np.sum(margins <= loss))
    return np.array([wrong, lost - wrong, lost], float)


def plain_hits(found: Array, rates: Array, n: int) -> int:
    """How many counts are inside the plain 99.9 % binomial interval."""
    low, high = scipy.stats.binom.interval(LEVEL, n, rates)
    return int(np.sum((low <= found) & (found <= high)))


def within(name: str, found: Any, rates: Any, n: int) -> Case:
    """All counts of n points inside their binomial intervals, which are simultaneous at 99.9 %.

    Of m correct rates one or more are outside with probability 1 − LEVEL at most, whatever the
    dependence between them: each interval has level 1 − (1 − LEVEL)/m (Bonferroni).
    """
    found, rates = np.ravel(found), np.ravel(rates)
    low, high = scipy.stats.binom.interval(1 - (1 - LEVEL) / rates.size, n, rates)
    deviation, above = np.abs(found - n * rates), found >= n * rates
    case = below(name, deviation / n, np.where(above, high - n * rates, n * rates - low) / n)
    measured = (
        f"|share − rate|: {case.measured}; {plain_hits(found, rates, n)} of {rates.size} inside "
        f"the plain {LEVEL:.1%} interval"
    )
    return case._replace(tightness=None, measured=measured)


def deviation_panel(found: Any, rates: Any, n: int) -> Panel:
    """Deviations of all shares from their rates, and the plain 99.9 % interval."""
    found, rates = np.ravel(found), np.ravel(rates)
    order = np.argsort(rates)
    low, high = scipy.stats.binom.interval(LEVEL, n, rates)
    return Panel(
        f"{rates.size} rates, {n:,} points each",
        "rate by formula [probability]",
        "|simulated − formula| [probability]",
        [
            Line("simulated", rates[order], np.abs(found / n - rates)[order]),
            Line("half of the 99.9 % interval", rates[order], (high - low)[order] / 2 / n, "bound"),
        ],
    )


PARTS_OF_REACH = np.array([-0.1, 1e-6, 0.5, 1 - 1e-9, 1 + 1e-9, 1.5])
"""Margins, in parts of the reach r, at which it is tried whether a point can be turned around."""


def crossings(problem: Problem, worst: Array, reach: float, rng: np.random.Generator) -> Array:
    """Which points of margin PARTS_OF_REACH·r are right, and wrong after adding y·worst, [2, …]."""
    model = linear.LinearClassifier(problem.w, problem.b)
    turned = []
    for y in SIGNS:
        x = rng.standard_normal((len(PARTS_OF_REACH), len(problem.w)))
        lack = PARTS_OF_REACH * reach - model.margins(x, y)
        x += y * lack[:, None] * problem.w / (problem.w @ problem.w)
        turned.append((model.margins(x, y) > 0) & (model.margins(x + y * worst, y) <= 0))
    return np.array(turned, float)


def crossing_case(name: str, found: Sequence[Array]) -> Case:
    """A point can be turned around if and only if 0 < M ≤ r."""
    expected = (PARTS_OF_REACH > 0) & (PARTS_OF_REACH <= 1)
    stacked = np.array(found)
    case = close(name, stacked, np.broadcast_to(expected, stacked.shape), tolerance=1e-9)
    return case._replace(measured=f"{stacked.size} points at M/r = {PARTS_OF_REACH.tolist()}")


Rows = list[dict[str, Any]]
"""Of a table, as the library returns it: one dictionary each."""


def exact_errors(rows: Rows, reach: Callable[..., Any]) -> Array:
    """Clean, adversarial and robust rate [rows, 3] from a row's angle and bias, ‖w‖ = σ = 1.

    `reach` has the arguments ε, δ, |cos θ|, sin θ.
    """
    mean, c, b, epsilon, delta = (
        np.array([row[key] for row in rows])
        for key in ("mean_norm", "cosine", "bias", "epsilon", "delta")
    )
    r = reach(epsilon, delta, np.abs(c), np.sqrt(np.maximum(1 - c**2, 0)))
    margins = [mean * c + y * b for y in (-1, 1)]
    clean, robust = (
        np.mean([scipy.special.ndtr(loss - m) for m in margins], axis=0) for loss in (0.0, r)
    )
    return np.stack([clean, robust - clean, robust], axis=-1)


def no_sine(epsilon: Array, delta: Array, c: Array, s: Array) -> Any:
    """L2's reach without its sin θ, a wrong formula."""
    return np.where(epsilon * c <= delta, epsilon, delta * c + np.sqrt(epsilon**2 - delta**2))


def mixed_margins(problem: Problem, n: int, rng: np.random.Generator) -> Array:
    """Margins of n points that are no Gaussians: x − μ_y is doubled or not, at random."""
    margins = draw_margins(problem, n, rng, lambda share: None)
    mean, spread = problem.margin_law()
    nearest = np.abs(margins[:, None] - mean) / spread
    centre = mean[nearest.argmin(1)]
    return centre + rng.choice([1.0, 2.0], n) * (margins - centre)
