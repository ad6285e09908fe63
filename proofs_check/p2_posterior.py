"""P2: the gap is at most what kernels, responses and remainders have added up to on the way."""

import jax.numpy as jnp
import numpy as np

from ntk_awt.theory.dynamics.preservation import Trajectory, posterior_bound
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
)
from proofs_check.instances import trainings
from proofs_check.instances.trainings import SAME_START, Run, Trainings, gap_norms, matrix

STATEMENT = Statement(
    number="P2",
    title="a-posteriori bound of the gap",
    claim=(
        "Along any two trainings by gradient descent the gap stays below its start plus what the "
        "difference of the kernels, the response of the sparse one and the remainders add up to."
    ),
    formula=(
        "‖D_T‖ ≤ ‖D_0‖ + Σ_k (η/N)[‖(K^d_k − K^s_k) g^d_k‖ + ‖K^s_k(g^d_k − g^s_k)‖] + Σ_k‖ρ_k‖"
    ),
    hypotheses={
        "gradient descent": "on the mean loss at each network's points X̃_k, constant step η",
        "masked Jacobian": "K is the kernel of the masked network, gain included",
        "remainders": "the remainders are counted",
    },
    instances=(
        "full-batch adversarial trainings by training.fit: MLPs on digits and MNIST and a small "
        "CNN; dense against ticket, random and magnitude masks; cross-entropy and squared loss; "
        "L∞ and L2; own and shared attack"
    ),
    rule="no violation at any step of any training",
    tolerance="1e-9 for the rounding of sums of about 1e3 products in float64; the bound has none",
    source="theory P2; after Shi et al. 2022",
)


def bound(dense: Trajectory, sparse: Trajectory, rate: float, rest: float = 1.0) -> np.ndarray:
    """‖D_0‖ + Σ { rate·[‖(K^d − K^s) g^d‖ + ‖K^s(g^d − g^s)‖] + rest·‖ρ‖ }, [T + 1]."""
    total = gap_norms(dense, sparse)[0]
    bounds = [total]
    for k in range(len(dense.gradients)):
        wide, narrow = (matrix(np.asarray(t.kernels, np.float64)[k]) for t in (dense, sparse))
        g, h = (np.ravel(np.asarray(t.gradients, np.float64)[k]) for t in (dense, sparse))
        second = np.subtract(*(np.asarray(t.remainders, np.float64)[k] for t in (dense, sparse)))
        driven, response = (wide - narrow) @ g, narrow @ (g - h)
        total += rate * (np.linalg.norm(driven) + np.linalg.norm(response))
        total += rest * np.linalg.norm(second)
        bounds.append(total)
    return np.array(bounds)


def holds(name: str, actual: np.ndarray, wanted: np.ndarray) -> Case:
    """The rule; at k = 0 both sides are the same by definition."""
    return below(name, actual[1:], wanted[1:])


def curved() -> tuple[Trajectory, Trajectory]:
    """One step of w + w² and of w from w = 0 to 1, target 1: only the remainder differs."""

    def network(last: float, rest: float) -> Trajectory:
        one = jnp.ones((1, 1, 1))
        outputs = jnp.array([0.0, last]).reshape(2, 1, 1)
        return Trajectory(one[0], one, outputs, -one, one[..., None, None], rest * one)

    return network(2.0, 1.0), network(1.0, 0.0)


def broken(check: Recorder, t: Trainings) -> None:
    """The bound with a wrong kernel, factor or optimiser, or without the remainder."""
    pair, z = SAME_START, t.points(SAME_START.setting)
    setting, (dense, sparse) = pair.setting, t.runs(pair)
    rate = setting.step / t.n
    left = t.follow(setting, dense, z)

    def control(name: str, run: Run, rate: float, breaks: str) -> None:
        right = t.follow(setting, run, z)
        case = holds("‖D_k‖", gap_norms(left, right), bound(left, right, rate))
        check.control(name, case, breaks=breaks)

    unmasked = Run(trainings.unmasked(sparse.path), sparse.x)
    momentum = t.run_on(setting, pair.sparse, sparse.x, momentum=0.9)
    control("kernel of the unmasked Jacobian", unmasked, rate, "masked Jacobian")
    control("momentum in place of gradient descent", momentum, rate, "gradient descent")
    control("1/(2N) in place of 1/N", sparse, rate / 2, FORMULA)
    pieces = curved()
    case = holds("‖D_k‖", gap_norms(*pieces), bound(*pieces, 1.0, rest=0.0))
    check.control("remainder left out", case, breaks="remainders")


def check(context: Context) -> Outcome:
    """The bound along recorded trainings."""
    t = trainings.of(context)
    pairs, skipped = t.available(context.pick(trainings.REDUCED, trainings.ALL, trainings.ALL))
    check = Recorder(STATEMENT)
    check.skip(*skipped)
    for i, pair in enumerate(pairs):
        dense, sparse = t.trajectories(pair)
        actual = gap_norms(dense, sparse)
        wanted = bound(dense, sparse, pair.setting.step / t.n)
        found = posterior_bound(dense, sparse, pair.setting.step)
        check.case(holds(f"{pair.label}: ‖D_k‖", actual, wanted))
        check.close(f"{pair.label}: library", found, wanted, tolerance=1e-9)
        if pair in (pairs[0], SAME_START):
            times = pair.setting.step * np.arange(t.steps + 1)
            lines = [Line("‖D_k‖", times, actual), Line("bound", times, wanted, "bound")]
            labels = ("time kη", "gap over Z, logits")
            check.panel(Panel(pair.label, *labels, lines, yscale="linear"))
        context.progress((i + 1) / len(pairs))
    broken(check, t)
    return check.outcome()
