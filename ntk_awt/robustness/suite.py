"""A network under several attacks, judged by the hygiene rules; every attack's outcome is kept."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ntk_awt import files
from ntk_awt.app.config import EvaluationConfig
from ntk_awt.attacks import Attack, suite
from ntk_awt.network import Network
from ntk_awt.robustness import hygiene
from ntk_awt.robustness.accuracy import Evaluation, combine, measure, proportion
from ntk_awt.robustness.hygiene import Hygiene
from ntk_awt.threats import Threat
from ntk_awt.types import Key, Split

Bar: TypeAlias = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""`(label, total, unit) -> progress bar`, as `experiment.Reporter.bar`."""


Suite: TypeAlias = Mapping[str, Attack]
"""Attacks by name, to be run in turn, each on what is left (`attacks.suite`)."""


class Turn(NamedTuple):
    """What one attack of a suite left of the images.

    Attributes:
        attack: its name.
        attacked: images that it was tried on.
        outcome: accuracies after this attack and all before it, those of other suites as well.
    """

    attack: str
    attacked: int
    outcome: Evaluation

    @property
    def survived(self) -> int:
        """Images that are still right."""
        return int(self.outcome.robust_correct.sum())


class Assessment(NamedTuple):
    """What several attacks and the hygiene rules say of one network.

    Attributes:
        turns: by the name under which the attacks were asked for, in their order; one each, or
            those of `auto`.
        outcome: the worst case of all attacks, image by image.
        hygiene: flags, and accuracy against radius and steps.
    """

    turns: Mapping[str, tuple[Turn, ...]]
    outcome: Evaluation
    hygiene: Hygiene

    def table(self) -> list[dict[str, Any]]:
        """One row an attack, as plain values: what it was tried on and what it left."""
        return [
            {
                "suite": asked,
                "attack": turn.attack,
                "attacked": turn.attacked,
                "survived": turn.survived,
                "robust_accuracy": turn.outcome.robust.value,
                "robust_interval": [turn.outcome.robust.low, turn.outcome.robust.high],
            }
            for asked, turns in self.turns.items()
            for turn in turns
        ]


def _save(path: Path, turn: Turn) -> None:
    arrays = {
        "attacked": turn.attacked,
        "natural": turn.outcome.natural_correct,
        "robust": turn.outcome.robust_correct,
        "images": turn.outcome.images[: hygiene.IMAGES],  # all that is looked at again
    }
    files.save_arrays(path, arrays)


def _load(path: Path, attack: str, x: np.ndarray) -> Turn:
    """A saved turn; images that were not saved come back clean."""
    images, n = np.array(x), len(x)
    wanted = {
        "attacked": ("iu", ()),
        "natural": ("b", (n,)),
        "robust": ("b", (n,)),
        "images": ("f", (min(n, hygiene.IMAGES), *x.shape[1:])),
    }
    saved = files.load_arrays(path, wanted, fix="delete it: the attack is made again")
    natural, robust = saved["natural"], saved["robust"]
    images[: len(saved["images"])] = saved["images"]
    outcome = Evaluation(proportion(natural), proportion(robust), natural, robust, images)
    return Turn(attack, int(saved["attacked"]), outcome)


def identity(*settings: Any) -> str:
    """Eight hexadecimal digits of settings with a stable repr, to name a folder of outcomes."""
    return hashlib.sha256(json.dumps([repr(s) for s in settings]).encode()).hexdigest()[:8]


def make_suites(settings: EvaluationConfig, epsilon: float, step_ratio: float) -> dict[str, Suite]:
    """The attacks of an evaluation, by the name under which they were asked for.

    Args:
        settings: which, and how strong.
        epsilon: radius of the threat model; where it is 0 the set is one point, and no steps help.
        step_ratio: of PGD.

    Raises:
        InputError: an unknown name.
    """
    names = ("auto",) if settings.full_evaluation else settings.attacks
    steps = settings.evaluation_steps if epsilon > 0 else 0
    return {name: suite(name, steps, settings.evaluation_restarts, step_ratio) for name in names}


def assess(
    network: Network,
    split: Split,
    *,
    threat: Threat,
    suites: Mapping[str, Suite],
    key: Key,
    bar: Bar,
    label: str,
    folder: Path,
    transferred: np.ndarray | None = None,
    ticket: Network | None = None,
    chosen_on: np.ndarray | None = None,
) -> Assessment:
    """Attack a network in every asked way, each on the images that are still right, then judge it.

    Args:
        network, split, threat, key: see `accuracy.measure`.
        suites: by the name under which they were asked for.
        bar: shows progress.
        label: of the network, in the progress bars.
        folder: where each attack's outcome is kept; what lies there is not made again, so its name
            should tell the settings (`identity`).
        transferred, ticket, chosen_on: see `hygiene.check`.

    Returns:
        `Assessment`.

    Raises:
        InputError: see `accuracy.measure`.
    """
    turns: dict[str, tuple[Turn, ...]] = {}
    before: Evaluation | None = None
    for asked, attacks in suites.items():
        done: list[Turn] = []
        for name, attack in attacks.items():
            path = folder / f"{asked}-{name}.npz"
            if path.exists():
                done.append(_load(path, name, np.asarray(split.x)))
                before = done[-1].outcome
                continue
            total = len(split.x) if before is None else int(before.robust_correct.sum())
            with bar(f"{label}: {name}", total, "images") as show:
                found = measure(
                    network, split, threat, attack, key=key, before=before, on_batch=show
                )
            done.append(Turn(name, total, found))
            _save(path, done[-1])
            before = found
        turns[asked] = tuple(done)
    outcome = combine([turn.outcome for done in turns.values() for turn in done])
    first = next(iter(next(iter(suites.values())).values()))
    alone = next(iter(turns.values()))[0]  # the first attack meets every image
    with bar(f"{label}: hygiene", 100, "%") as show:
        judged = hygiene.check(
            network,
            split,
            threat,
            first,
            key=key,
            attacked=outcome.images,
            verdicts=alone.outcome.robust_correct,
            transferred=transferred,
            ticket=ticket,
            chosen_on=chosen_on,
            on_share=lambda share: show(round(100 * share)),
        )
    return Assessment(turns, outcome, judged)
