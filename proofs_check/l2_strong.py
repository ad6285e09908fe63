"""L2: strong adversarial examples, which may change the signal by δ at most.

r = max {wᵀv : ‖v‖ ≤ ε, ‖Uᵀv‖ ≤ δ}. Split v and w into parts inside and across the span of U, of
lengths α, β and a = c‖w‖, b = s‖w‖: wᵀv ≤ aα + bβ with α² + β² ≤ ε², α ≤ δ, attained by parts
parallel to those of w. On the circle aα + bβ is largest at α = εc; where εc > δ it grows in α up to
the corner (δ, √(ε² − δ²)). So r = ε‖w‖ or (δc + √(ε² − δ²)s)‖w‖.

The check's own certificate is the dual: wᵀv = (w − Uz)ᵀv + zᵀUᵀv ≤ ε‖w − Uz‖ + δ‖z‖ for every z, a
bound from above that needs no formula; a feasible v is one from below.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from ntk_awt.theory import linear
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
from proofs_check.instances.linear import (
    Array,
    Problem,
    counts,
    crossing_case,
    crossings,
    deviation_panel,
    draw_margins,
    draw_problem,
    formula_rates,
    mixed_margins,
    strong_reach,
    within,
)

STATEMENT = Statement(
    number="L2",
    title="strong adversarial examples",
    claim="A threat that may move a point by ε, and its signal by δ, lowers the margin of a linear "
    "classifier by r at most: ε where the classifier uses little signal, else r of the corner.",
    formula="r = ε if εc ≤ δ, else δc + √(ε² − δ²)s, times ‖w‖; c = ‖Uᵀw‖/‖w‖, s = √(1 − c²)",
    hypotheses={
        "Gaussian classes": "with any means, covariances and priors",
        "no pixel box": "every v of the set is allowed",
    },
    instances="18 random problems (50 with --full) in 2 to 300 dimensions with signals of 1 to 5 "
    "directions, 1e6 fresh points each (4e6); 600 random (w, U, ε, δ) with dual bounds, 36 with a "
    "convex solver; points constructed on both sides of M = r",
    rule="all simulated rates inside binomial intervals that are simultaneous at 99.9 %; reach, "
    "worst v, dual bound and solver agree; all constructed points as said",
    tolerance="intervals as in L1; 1e-6 is where SLSQP stops, 1e-9 where the search for the least "
    "dual value does (it has a kink where all of w is signal); float64 rounding elsewhere",
    source="theory L2; Shi and Ding 2019",
)

SMALL = (2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 30, 35, 40, 50)
LARGE = (100, 300)

KINDS = ("limits", "limits little", "does not limit", "is zero", "all signal", "no signal")
"""What δ does to w, or where w lies."""


class Set(NamedTuple):
    """{v: ‖v‖ ≤ ε, ‖Uᵀv‖ ≤ δ}; the library gets the columns of `mixed`, of the same span as U."""

    epsilon: float
    delta: float
    basis: Array
    mixed: Array

    def library(self) -> linear.Strong:
        return linear.Strong(self.epsilon, self.delta, self.mixed)


def _random_basis(w: Array, kind: str, rng: np.random.Generator) -> Array:
    """An orthonormal basis [d, k], k < d, at a random angle to w."""
    d = len(w)
    directions = rng.standard_normal((d, rng.integers(1, min(d, 6))))
    unit = w / np.linalg.norm(w)
    if kind == "no signal":
        directions -= np.outer(unit, unit @ directions)
    else:
        share = 1.0 if kind == "all signal" else rng.uniform(0.2, 0.95)
        across = directions[:, 0] - unit * (unit @ directions[:, 0])
        across /= max(float(np.linalg.norm(across)), 1e-300)
        directions[:, 0] = share * unit + np.sqrt(1 - share**2) * across
    return np.linalg.qr(directions)[0]


def _draw_set(w: Array, epsilon: float, kind: str, rng: np.random.Generator) -> Set:
    u = _random_basis(w, kind, rng)
    cosine = float(np.linalg.norm(u.T @ w) / np.linalg.norm(w))
    share = {
        "limits": rng.uniform(0.1, 0.6),
        "limits little": rng.uniform(0.8, 0.99),
        "does not limit": rng.uniform(1.01, 1.5),
        "is zero": 0.0,
    }.get(kind)
    delta = epsilon * (rng.uniform(0.2, 0.8) if share is None else share * cosine)
    mixing = rng.standard_normal((u.shape[1],) * 2) + 2 * np.eye(u.shape[1])
    return Set(epsilon, delta, u, u @ mixing)


def _parts(w: Array, u: Array) -> tuple[Array, Array]:
    inside = u @ (u.T @ w)
    across = w - inside
    tiny = 1e-13 * np.linalg.norm(w)
    return tuple(np.where(np.linalg.norm(v) > tiny, v, 0.0) for v in (inside, across))  # pyright: ignore[reportReturnType]


def _lengths(w: Array, u: Array) -> tuple[float, float]:
    """Of w's parts inside and across the span of U."""
    inside, across = _parts(w, u)
    return float(np.linalg.norm(inside)), float(np.linalg.norm(across))


def _reach(w: Array, s: Set) -> float:
    return float(strong_reach(s.epsilon, s.delta, *_lengths(w, s.basis)))


def _worst(w: Array, s: Set) -> Array:
    """The v that raises wᵀv most."""
    inside, across = _parts(w, s.basis)
    a, b, length = (np.linalg.norm(v) for v in (inside, across, w))
    if s.epsilon * a <= s.delta * length:
        return s.epsilon * w / length
    v = s.delta * inside / a
    return v + np.sqrt(s.epsilon**2 - s.delta**2) * across / b if b else v


class Instance(NamedTuple):
    """A problem under a strong threat, and counts of drawn points."""

    problem: Problem
    set: Set
    found: Array


def _instances(context: Context, n: int) -> list[Instance]:
    dimensions = context.pick((*SMALL[::2], 100), SMALL + LARGE, 3 * SMALL + LARGE)
    found, work = [], sum(dimensions)
    for index, d in enumerate(dimensions):
        rng = context.rng(1, index)
        problem = draw_problem(d, rng)
        w = problem.w
        reach = rng.uniform(0.2, 1.5) * problem.margin_law()[1].mean()
        chosen = _draw_set(w, reach / np.linalg.norm(w), KINDS[index % len(KINDS)], rng)
        before = sum(dimensions[:index])
        margins = draw_margins(
            problem,
            n,
            rng,
            lambda share, before=before, d=d: context.progress((before + share * d) / work),
        )
        found.append(Instance(problem, chosen, counts(margins, float(w @ _worst(w, chosen)))))
    return found


def _library_rates(instance: Instance) -> Array:
    classes, model = instance.problem.library()
    rates = linear.rates(model, classes, instance.set.library())
    return np.array([rates.clean, rates.adversarial, rates.robust])


def _wrong_reach(problem: Problem, s: Set, what: str) -> float:
    w, (a, b), (epsilon, delta) = problem.w, _lengths(problem.w, s.basis), (s.epsilon, s.delta)
    length, corner = np.hypot(a, b), np.sqrt(max(epsilon**2 - delta**2, 0))
    reach, mixed = epsilon * length, min(float(np.linalg.norm(s.mixed.T @ w)), length)
    return {
        "sine": lambda: reach if epsilon * a <= delta * length else delta * a + corner * length,
        "swapped": lambda: strong_reach(delta, epsilon, a, b),
        "corner": lambda: delta * a + corner * b,
        "length": lambda: strong_reach(epsilon, delta, a, b) / length,
        "basis": lambda: strong_reach(epsilon, delta, *_lengths(w, np.roll(s.basis, 1, axis=0))),
        "mixed": lambda: strong_reach(epsilon, delta, mixed, np.sqrt(length**2 - mixed**2)),
    }[what]()


WRONG = {
    "sine": "sin θ left out",
    "swapped": "δ and ε swapped",
    "corner": "always the corner, also where εc ≤ δ",
    "length": "w not normalised: its length is left out of r",
    "basis": "another basis",
    "mixed": "a basis that is not orthonormal, used as if it were",
}


# ---------------------------------------------------------------- the reach alone


def _dual_value(w: Array, s: Set, z: Array) -> Array:
    """ε‖w − Uz‖ + δ‖z‖ for each row of z, a bound of r from above."""
    rest = np.linalg.norm(w - z @ s.basis.T, axis=-1)
    return s.epsilon * rest + s.delta * np.linalg.norm(z, axis=-1)


def _least_dual(w: Array, s: Set) -> float:
    """The least of these bounds; by symmetry at z = t·Uᵀw, 0 ≤ t ≤ 1."""
    along = s.basis.T @ w

    def value(t: float) -> float:
        return float(_dual_value(w, s, t * along[None])[0])

    inner: Any = scipy.optimize.minimize_scalar(
        value, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-12}
    )
    return min(value(0.0), value(1.0), float(inner.fun))


def _solved(w: Array, s: Set) -> float:
    """max wᵀv by SciPy's SLSQP, in units of ε‖w‖, of points that are feasible up to 1e-8."""
    u, limit, length = s.basis, s.delta / s.epsilon, float(np.linalg.norm(w))
    limits: list[Any] = [
        {"type": "ineq", "fun": lambda v: 1 - v @ v, "jac": lambda v: -2 * v},
        {
            "type": "ineq",
            "fun": lambda v: limit**2 - np.sum((u.T @ v) ** 2),
            "jac": lambda v: -2 * u @ (u.T @ v),
        },
    ]
    best = -np.inf
    for start in np.stack([w, np.roll(w, 1), -np.roll(w, -1)]) * 0.01 / length:
        v = scipy.optimize.minimize(
            lambda v: -w @ v / length,
            start,
            jac=lambda v: -w / length,
            constraints=limits,
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        ).x
        if v @ v <= 1 + 1e-8 and np.sum((u.T @ v) ** 2) <= limit**2 + 1e-8:
            best = max(best, s.epsilon * float(w @ v))
    return best


def _cut(w: Array, s: Set) -> Array:
    """The ordinary worst v whose signal part is cut to δ: feasible, but not the worst."""
    v = s.epsilon * w / np.linalg.norm(w)
    inside, across = _parts(v, s.basis)
    return across + inside * min(1.0, s.delta / max(float(np.linalg.norm(inside)), 1e-300))


class Reaches(NamedTuple):
    """Library values and the check's own, an entry a random instance."""

    library: list[float]
    formula: list[float]
    attained: list[float]
    cut: list[float]
    dual: list[float]
    any_dual: list[float]
    sizes: list[list[float]]  # ‖v‖ and ‖Uᵀv‖ of the worst v, and their limits, in units of ε
    limits: list[list[float]]


def _reaches(context: Context) -> Reaches:
    found = Reaches(*([] for _ in Reaches._fields))
    for index in range(context.pick(60, 600, 6000)):
        rng = context.rng(2, index)
        d = int(rng.integers(2, 30)) if index % 10 else 500
        w = rng.standard_normal(d) * rng.uniform(0.1, 10)
        s = _draw_set(w, float(rng.uniform(0.1, 2)), KINDS[index % len(KINDS)], rng)
        threat, model = s.library(), linear.LinearClassifier(w)
        v = linear.worst_perturbation(model, -1, threat)
        values = _dual_value(w, s, rng.uniform(-1, 2, (20, 1)) * (s.basis.T @ w))
        found.library.append(float(linear.reach(w, threat)))
        found.formula.append(_reach(w, s))
        found.attained.append(float(w @ v))
        found.cut.append(float(w @ _cut(w, s)))
        found.dual.append(_least_dual(w, s))
        found.any_dual.append(float(values.min()))
        lengths = np.linalg.norm(v), np.linalg.norm(s.basis.T @ v)
        found.sizes.append([float(length) / s.epsilon for length in lengths])
        found.limits.append([1.0, s.delta / s.epsilon])
    return found


def _solver_case(context: Context) -> Case:
    found, expected = [], []
    for index in range(context.pick(8, 36, 200)):
        rng = context.rng(3, index)
        w = rng.standard_normal(int(rng.integers(2, 9)))
        kind = KINDS[index % len(KINDS)]
        s = _draw_set(w, float(rng.uniform(0.2, 1.5)), "limits" if kind == "is zero" else kind, rng)
        found.append(float(linear.reach(w, s.library())))
        expected.append(_solved(w, s))
    return close("library's reach against SciPy's SLSQP", found, expected, tolerance=1e-6)


def _crossing_case(context: Context) -> Case:
    turned = []
    for index, d in enumerate(context.pick((3, 20), (2, 3, 5, 10, 50, 500), SMALL)):
        for number, kind in enumerate(KINDS):
            rng = context.rng(4, index, number)
            problem = draw_problem(d, rng)
            s = _draw_set(problem.w, float(rng.uniform(0.1, 1)), kind, rng)
            model = linear.LinearClassifier(problem.w, problem.b)
            reach = _reach(problem.w, s)
            if reach > 0:  # none where all of w is signal and δ = 0
                worst = linear.worst_perturbation(model, 1, s.library())
                turned.append(crossings(problem, worst, reach, rng))
    return crossing_case("strong adversarial example if and only if 0 < M ≤ r", turned)


def _radius_case(context: Context) -> Case:
    """The certified radius with δ fixed, and with δ in parts of ε, is the ε at which r = M."""
    found, expected = [], []
    for index in range(context.pick(20, 100, 500)):
        rng = context.rng(5, index)
        problem = draw_problem(int(rng.integers(2, 20)), rng)
        s = _draw_set(problem.w, float(rng.uniform(0.1, 1)), KINDS[index % 3], rng)
        model = linear.LinearClassifier(problem.w, problem.b)
        x = problem.w * (_reach(problem.w, s) - problem.b) / (problem.w @ problem.w)
        for limit in ({"delta": s.delta}, {"ratio": s.delta / s.epsilon}):
            radius = linear.certified_radius(model, x[None], [1], basis=s.mixed, **limit)
            found.append(radius[0])
            expected.append(s.epsilon)
    # Where δ limits little r(ε) is flat in its corner term, so an error of M is multiplied.
    return close("certified radius where M = r", found, expected, tolerance=1e-9)


def _curve() -> Panel:
    """r against the angle between w and the signal."""
    angles = np.linspace(0, np.pi / 2, 61)
    epsilon, lines = 1.0, []
    for delta in (0.0, 0.3, 0.7, 1.0):
        w = np.stack([np.cos(angles), np.sin(angles)], 1)
        s = [Set(epsilon, delta, np.eye(2)[:, :1], np.eye(2)[:, :1]) for _ in angles]
        found = [_least_dual(row, one) for row, one in zip(w, s, strict=True)]
        formula = [float(linear.reach(row, one.library())) for row, one in zip(w, s, strict=True)]
        lines.append(Line(f"δ = {delta:g} ε, least dual", np.degrees(angles[::4]), found[::4]))
        lines.append(Line(f"δ = {delta:g} ε, formula", np.degrees(angles), formula, "reference"))
    return Panel("reach of the strong threat", "θ [degrees]", "r / (ε‖w‖)", lines, yscale="linear")


def check(context: Context) -> Outcome:
    n = context.pick(50_000, 1_000_000, 4_000_000)
    instances = _instances(context, n)
    found = np.array([instance.found for instance in instances])
    rates = np.array([_library_rates(instance) for instance in instances])
    restated = [formula_rates(i.problem, _reach(i.problem.w, i.set)) for i in instances]
    r = _reaches(context)
    name = f"simulated rates, {len(instances)} problems of {n:,} points"
    check = Recorder(STATEMENT)
    check.case(within(name, found, rates, n))
    check.close("library's rates", rates, restated, tolerance=1e-12)
    both = ([r.library, r.attained], [r.formula, r.formula])
    check.close("library's reach, and that of its worst v", *both, tolerance=1e-12)
    check.below("the worst v lies in the set", r.sizes, np.array(r.limits) + 1e-13)
    check.below("no dual value is below the reach", r.library, r.any_dual)
    check.close("the least dual value is the reach", r.dual, r.library, tolerance=1e-9)
    check.case(_solver_case(context), _crossing_case(context), _radius_case(context))
    for what, name in WRONG.items():
        values = [formula_rates(i.problem, _wrong_reach(i.problem, i.set, what)) for i in instances]
        check.control(name, within("simulated rates", found, values, n), breaks=FORMULA)
    case = close("reach of the worst v", r.cut, r.library, tolerance=1e-12)
    check.control("the ordinary worst v with its signal cut to δ", case, breaks=FORMULA)
    limits = np.array(r.limits)
    case = below("signal of v", limits[:, 0], limits[:, 1])
    check.control("the L2 ball's worst v", case, breaks=FORMULA)
    some, counted = instances[:3], []
    for index, i in enumerate(some):
        margins = mixed_margins(i.problem, n, context.rng(6, index))
        counted.append(counts(margins, float(i.problem.w @ _worst(i.problem.w, i.set))))
    case = within("simulated rates", counted, [_library_rates(i) for i in some], n)
    check.control("points drawn with one of two spreads", case, breaks="Gaussian classes")
    case = _boxed(instances[0], context.rng(7))
    check.control("a pixel box that halves every step", case, breaks="no pixel box")
    check.panel(deviation_panel(found, rates, n), _curve())
    return check.outcome()


def _boxed(instance: Instance, rng: np.random.Generator) -> Case:
    """Points that lie at half of the worst step from the ends of their box."""
    problem, s, _ = instance
    worst = -_worst(problem.w, s)
    half = np.abs(worst) / 2
    turned = [crossings(problem, np.clip(worst, -half, half), _reach(problem.w, s), rng)]
    return crossing_case("strong adversarial example if and only if 0 < M ≤ r", turned)
