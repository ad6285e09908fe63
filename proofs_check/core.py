"""What a numerical check of a statement is, and the few rules that judge all of them. NumPy only.

A statement's check measures both sides on real instances and hands them to a rule: `below` (a bound
is not violated), `close` (two computations agree) or `slope` (a quantity scales with a power). The
same rule, on an instance that breaks a hypothesis or with a wrong formula, must say no: those are
the *controls*. A `Recorder` keeps what was judged. A statement fails if a case does not hold, if a
control is not rejected, or if no control breaks one of its hypotheses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import scipy.stats

from ntk_awt.errors import InputError

Size = Literal["reduced", "default", "full"]
SIZES: tuple[Size, ...] = ("reduced", "default", "full")
"""How much is computed: for the test suite, for `ntk-awt verify`, for `ntk-awt verify --full`."""

FORMULA = "formula"
"""What a control breaks that breaks no hypothesis: the formula, or a constant in it."""

T = TypeVar("T")


class Case(NamedTuple):
    """One instance, judged.

    Attributes:
        name: which instance, and which part of the statement.
        holds: whether the rule is satisfied.
        margin: distance from violation in parts of what is allowed, ≥ 0 if and only if it holds;
            −∞ where a number is not finite.
        tightness: median of bound/actual, 1 if the bound is attained; None where nothing bounds.
        measured: both sides, in words and numbers.
    """

    name: str
    holds: bool
    margin: float
    tightness: float | None
    measured: str


class Control(NamedTuple):
    """An instance that breaks a hypothesis, or a wrong formula.

    Attributes:
        name: what is wrong with it.
        rejected: whether the statement's own rule said no, or the library refused the input.
        measured: how it was rejected, or what was found in its place.
        breaks: the hypothesis by its name, or `FORMULA`.
    """

    name: str
    rejected: bool
    measured: str
    breaks: str


class Line(NamedTuple):
    """One curve of a figure: `kind` is "measured" (points and line), "bound" or "reference"."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    kind: str = "measured"


class Panel(NamedTuple):
    """One plot of a statement's figure; the axes' labels carry the units."""

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    xscale: str = "linear"
    yscale: str = "log"


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        cases: one an instance, at least one.
        controls: at least one.
        panels: of the figure.
        skipped: instances that could not be run here, each with its reason.
    """

    cases: Sequence[Case]
    controls: Sequence[Control]
    panels: Sequence[Panel] = ()
    skipped: Sequence[str] = ()


@dataclass(frozen=True)
class Context:
    """What a check is told: how much to compute, from which seed, and whom to tell how far it is.

    Attributes:
        size: in `SIZES`.
        seed: of all randomness of the check.
        progress: to be called with the share that is done, from 0 to 1.
    """

    size: Size = "default"
    seed: int = 0
    progress: Callable[[float], None] = field(default=lambda share: None)

    def pick(self, reduced: T, default: T, full: T) -> T:
        """The value for this size."""
        return {"reduced": reduced, "default": default, "full": full}[self.size]

    def rng(self, *labels: int) -> np.random.Generator:
        """NumPy's generator for this seed and these labels."""
        return np.random.default_rng([self.seed, *labels])


@dataclass(frozen=True)
class Statement:
    """A statement of the theory, and how it is checked.

    Attributes:
        number: as in the theory, e.g. "P3".
        title: a few words.
        claim: the statement in plain text.
        formula: the same in symbols.
        hypotheses: what it takes for granted, by name; a control breaks each of them.
        instances: what it is checked on.
        rule: when it passes.
        tolerance: where the rule's tolerance comes from.
        source: papers.
        precision: "float64", or "float32" where float64 would make the widths of the statement too
            slow and its tolerance is far above the rounding.
    """

    number: str
    title: str
    claim: str
    formula: str
    hypotheses: Mapping[str, str]
    instances: str
    rule: str
    tolerance: str
    source: str
    precision: Literal["float64", "float32"] = "float64"


# ---------------------------------------------------------------- rules


def _worst(margins: np.ndarray) -> float:
    """The least margin; −∞ if any is not a number."""
    return float(margins.min()) if np.isfinite(margins).all() else -np.inf


def below(name: str, actual: Any, bound: Any, *, slack: float = 1e-9) -> Case:
    """actual ≤ bound·(1 + slack), entry by entry: no violation.

    Args:
        name: of the case.
        actual, bound: numbers or arrays ≥ 0 of one shape, or one that fits the other's last axes;
            at least one entry, all finite.
        slack: for the rounding errors of both sides alone.

    Example:
        >>> below("twice", [1.0, 2.0], [2.0, 4.0]).holds, below("less", 1.0, 0.9).holds
        (True, False)
    """
    actual, bound = np.asarray(actual, float), np.asarray(bound, float)
    shape = np.broadcast_shapes(actual.shape, bound.shape)
    if shape not in (actual.shape, bound.shape) or 0 in shape:
        raise ValueError(f"{name}: shapes {actual.shape} and {bound.shape}")
    actual, bound = np.broadcast_arrays(actual, bound)
    scale = np.maximum(np.abs(bound), np.finfo(float).tiny)
    margins = (bound * (1 + slack) - actual) / scale
    positive = actual > 0
    ratios = bound[positive] / actual[positive]
    tightness = float(np.median(ratios)) if ratios.size else None
    worst = int(np.argmin(np.where(np.isfinite(margins), margins, -np.inf)))
    measured = f"{np.ravel(actual)[worst]:.4g} ≤ {np.ravel(bound)[worst]:.4g}"
    if actual.size > 1:
        measured += f" at the tightest of {actual.size} points"
    margin = _worst(margins)
    return Case(name, margin >= 0, margin, tightness, measured)


def close(name: str, found: Any, expected: Any, *, tolerance: float) -> Case:
    """‖found − expected‖ ≤ tolerance·‖expected‖ (Frobenius norms, all entries finite).

    Args:
        name: of the case.
        found, expected: numbers or arrays of one shape; at least one entry.
        tolerance: relative, positive and finite.

    Example:
        >>> close("same", [1.0, 2.0], [1.0, 2.0], tolerance=1e-12).margin
        1.0
    """
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    if found.shape != expected.shape or not found.size:
        raise ValueError(f"{name}: shapes {found.shape} and {expected.shape}")
    if not 0 < tolerance < np.inf:
        raise ValueError(f"{name}: a tolerance of {tolerance}")
    scale = max(float(np.linalg.norm(expected)), np.finfo(float).tiny)
    error = float(np.linalg.norm(found - expected)) / scale
    margin = 1 - error / tolerance if np.isfinite(error) else -np.inf
    measured = f"relative error {error:.2e}, allowed {tolerance:.0e}"
    return Case(name, margin >= 0, margin, None, measured)


class Fit(NamedTuple):
    """A power law: the mean of the log-log slopes of all seeds, and its confidence interval."""

    slope: float
    low: float
    high: float


def fit_slope(sizes: Any, values: Any, level: float = 0.95) -> Fit:
    """Log-log slope of values against sizes, with Student's interval over seeds.

    Args:
        sizes: [k], positive, k ≥ 2.
        values: [seeds, k], positive, at least 3 seeds.
        level: of the interval.

    Example:
        >>> found = fit_slope([1, 2, 4], [[1, 4, 16], [2, 8, 32], [1, 4, 16]])
        >>> round(found.slope, 6), round(found.low, 6), round(found.high, 6)
        (2.0, 2.0, 2.0)
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    if y.ndim != 2 or len(y) < 3 or y.shape[1] != len(x):
        raise ValueError(f"values: expected [seeds ≥ 3, {len(x)}], got {y.shape}")
    centred = x - x.mean()
    slopes = y @ centred / (centred @ centred)
    reach = scipy.stats.t.ppf((1 + level) / 2, len(slopes) - 1) * scipy.stats.sem(slopes)
    return Fit(float(slopes.mean()), float(slopes.mean() - reach), float(slopes.mean() + reach))


def slope(name: str, sizes: Any, values: Any, *, low: float, high: float) -> Case:
    """The 95 % confidence interval of the log-log slope lies inside [low, high].

    Args:
        name: of the case.
        sizes, values: as in `fit_slope`.
        low, high: what the statement allows.

    Example:
        >>> slope("square", [1, 2, 4], [[1, 4, 16]] * 3, low=1.9, high=2.1).holds
        True
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = fit_slope(sizes, values)
    margin = _worst(np.array([found.low - low, high - found.high]) / ((high - low) / 2))
    measured = (
        f"slope {found.slope:.3f} [{found.low:.3f}, {found.high:.3f}] over {len(values)} seeds, "
        f"allowed [{low:g}, {high:g}]"
    )
    return Case(name, margin >= 0, margin, None, measured)


# ---------------------------------------------------------------- controls


def control(name: str, broken: Case | Callable[[], Any], breaks: str) -> Control:
    """A control of that name: what is broken must be rejected.

    Args:
        name: what is wrong.
        broken: a case, judged by the statement's own rule: it must say no, by finite numbers (where
            one is missing nothing has been shown). Or a call, which the library must refuse with an
            `InputError`.
        breaks: the hypothesis by its name, or `FORMULA`.
    """
    if isinstance(broken, Case):
        rejected = not broken.holds and np.isfinite(broken.margin)
        return Control(name, bool(rejected), f"{broken.name}: {broken.measured}", breaks)
    try:
        broken()
    except InputError as error:
        return Control(name, True, f"refused: {error}", breaks)
    return Control(name, False, "was not refused", breaks)


# ---------------------------------------------------------------- the record of a check


class Recorder:
    """Keeps what the check of a statement finds, in its order.

    Args:
        statement: its hypotheses are the names that controls may break.

    Example:
        >>> square = Statement(
        ...     "X1", "squares", "x² grows like x²", "x² = x·x", {"real": "x is a real number"},
        ...     "x = 3", "equal", "none", "here",
        ... )
        >>> check = Recorder(square)
        >>> check.close("x = 3", 3.0**2, 9.0, tolerance=1e-15)
        >>> check.control("x = 3i", close("x²", (3j**2).real, 9.0, tolerance=1e-15), breaks="real")
        >>> check.outcome().controls[0].rejected
        True
    """

    def __init__(self, statement: Statement):
        self.statement = statement
        self._cases: list[Case] = []
        self._controls: list[Control] = []
        self._panels: list[Panel] = []
        self._skipped: list[str] = []

    def outcome(self) -> Outcome:
        """All that was recorded."""
        return Outcome(
            tuple(self._cases), tuple(self._controls), tuple(self._panels), tuple(self._skipped)
        )

    def case(self, *cases: Case) -> None:
        """Record what was judged by a rule of the statement's own."""
        self._cases += cases

    def below(self, name: str, actual: Any, bound: Any, *, slack: float = 1e-9) -> None:
        """Judge by `below`, and record."""
        self.case(below(name, actual, bound, slack=slack))

    def close(self, name: str, found: Any, expected: Any, *, tolerance: float) -> None:
        """Judge by `close`, and record."""
        self.case(close(name, found, expected, tolerance=tolerance))

    def slope(self, name: str, sizes: Any, values: Any, *, low: float, high: float) -> None:
        """Judge by `slope`, and record."""
        self.case(slope(name, sizes, values, low=low, high=high))

    def control(self, name: str, broken: Case | Callable[[], Any], *, breaks: str) -> None:
        """Judge by `control`, and record; the statement must have that hypothesis."""
        if breaks != FORMULA and breaks not in self.statement.hypotheses:
            raise ValueError(f"{name}: {self.statement.number} has no hypothesis {breaks!r}")
        self._controls.append(control(name, broken, breaks))

    def panel(self, *panels: Panel) -> None:
        """Record plots of the statement's figure."""
        self._panels += panels

    def skip(self, *reasons: str) -> None:
        """Record instances that could not be run here, each with its reason."""
        self._skipped += reasons
