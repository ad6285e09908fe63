"""The rows of `metrics.jsonl`: one frozen dataclass per kind, read and written here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from ntk_awt.app.report.page import read_rows
from ntk_awt.errors import InputError

__all__ = [
    "Dynamics",
    "Evaluated",
    "Made",
    "Record",
    "Searched",
    "TrainedEpoch",
    "from_row",
    "read",
]


@dataclass(frozen=True)
class Record:
    """What every row has.

    Attributes:
        stage: that wrote it.
        network: short name.
        step: updates done; 0 where a stage makes none.
    """

    stage: ClassVar[str]

    network: str
    step: int

    def to_row(self) -> dict[str, Any]:
        """As plain values, in the order of the fields; without those that are None.

        Example:
            >>> Made("random", 0, 0.5).to_row()
            {'stage': 'ticket', 'network': 'random', 'step': 0, 'seconds': 0.5}
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"stage": self.stage} | {k: v for k, v in values.items() if v is not None}

    def replaces(self, other: "Record") -> bool:
        """Whether a stage that goes on with this record has not done the other one yet."""
        same = (self.stage, self.network) == (other.stage, other.network)
        return same and other.step >= self.step


@dataclass(frozen=True)
class Made(Record):
    """A network at initialisation that was drawn or scored.

    Attributes:
        seconds: that it took, without the training of the dense network.
    """

    stage: ClassVar[str] = "ticket"

    seconds: float


@dataclass(frozen=True)
class Searched(Record):
    """The state of a search (`tickets.SearchRecord`).

    Attributes:
        kernel_distance, relative_kernel_distance, target_distance, relative_target_distance: to
            the dense network, on the held-out batch.
        held_out_objective: on that batch.
        objective: mean over the steps since the last record; None in the first one.
        seconds: since the last record.
    """

    stage: ClassVar[str] = "ticket"

    kernel_distance: float
    relative_kernel_distance: float
    target_distance: float
    relative_target_distance: float
    held_out_objective: float
    objective: float | None
    seconds: float


@dataclass(frozen=True)
class TrainedEpoch(Record):
    """One epoch of a training.

    Attributes:
        epoch: from 1.
        loss, accuracy: means over the epoch's batches.
        validation_natural, validation_robust: accuracies after it.
        seconds: since the epoch before.
    """

    stage: ClassVar[str] = "train"

    epoch: int
    loss: float
    accuracy: float
    validation_natural: float
    validation_robust: float
    seconds: float


@dataclass(frozen=True)
class Dynamics(Record):
    """One observation on the probe set while training.

    Attributes:
        dynamics_gap, relative_gap: distance of the outputs to the dense network's.
        kernel_distance, relative_kernel_distance: of the kernel to the dense network's.
        kernel_drift: relative distance to the own kernel at initialisation.
    """

    stage: ClassVar[str] = "dynamics"

    dynamics_gap: float
    relative_gap: float
    kernel_distance: float
    relative_kernel_distance: float
    kernel_drift: float


@dataclass(frozen=True)
class Evaluated(Record):
    """A trained network on the test images.

    Attributes:
        seconds: that it took.
        natural_accuracy, robust_accuracy: shares, each with its 95 % interval.
        attacks: one row per attack (`Assessment.table`).
        hygiene: flags and curves (`Hygiene.record`).
    """

    stage: ClassVar[str] = "evaluate"

    seconds: float
    natural_accuracy: float
    natural_interval: Sequence[float]
    robust_accuracy: float
    robust_interval: Sequence[float]
    attacks: Sequence[Mapping[str, Any]]
    hygiene: Mapping[str, Any]


KINDS: dict[str, tuple[type[Record], ...]] = {
    "ticket": (Searched, Made),
    "train": (TrainedEpoch,),
    "dynamics": (Dynamics,),
    "evaluate": (Evaluated,),
}
"""By stage; of several kinds the first one that a row has all values of is meant."""

_OPTIONAL = {"objective"}


def from_row(row: Mapping[str, Any]) -> Record:
    """The record of a row.

    Raises:
        InputError: a value is missing.

    Example:
        >>> from_row({"stage": "ticket", "network": "random", "step": 0, "seconds": 0.5})
        Made(network='random', step=0, seconds=0.5)
    """
    missing = ""
    for kind in KINDS[row["stage"]]:
        values: dict[str, Any] = {f.name: row.get(f.name) for f in fields(kind)}
        missing = next((n for n in values if n not in row and n not in _OPTIONAL), "")
        if not missing:
            return kind(**values)
    raise InputError(f"row of stage {row['stage']}", expected=f"a value {missing}", got="none")


def read(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; none where there is no such file.

    A last line without an end was cut by a kill, or is being written: it is left out.

    Raises:
        InputError: a line that is no row.
    """
    return [from_row(row) for row in read_rows(path)] if path.exists() else []
