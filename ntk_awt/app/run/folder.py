"""A run folder as its readers see it; nothing here writes, locks or computes.

A run folder holds everything that a report or a later stage reads:

    config.toml                    settings
    metrics.jsonl                  one JSON object a line: stage, network, step, values
    results.json                   the numbers of the run
    tickets/NAME.safetensors       each network at initialisation: weights, mask, gain
    trained/NAME.safetensors       the same after training
    dynamics/NAME/epoch-0001.npz   outputs and kernels on the probe set
    evaluation/NAME.npz            each test image: right when clean, right under attack; examples
    evaluation/NAME/ID/            the outcome of each attack, by an identity of its settings
    checkpoints/                   Orbax states, to resume from
    figures/, report.html          pictures of the above
    writer.lock                    while a process writes the run: which one (`writer`)

One process writes it (`writer.Writer`); any number read it meanwhile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntk_awt import files
from ntk_awt.app import config as configs
from ntk_awt.app.config import RunConfig
from ntk_awt.app.report import page as report
from ntk_awt.app.run import records
from ntk_awt.app.run.records import Evaluated, Record
from ntk_awt.app.verdicts import NOT_JUDGED, Verdict, verdict
from ntk_awt.errors import InputError

__all__ = ["Paths", "RunFolder", "is_complete", "is_file", "network_label", "ordered"]


# ---------------------------------------------------------------- names of files


def is_file(name: str) -> bool:
    """Whether the name of a network is that of a saved one."""
    return name.endswith(".safetensors")


def network_label(name: str) -> str:
    """Short name of a network: that of a ticket file is the file's stem.

    Example:
        >>> network_label("other/mine.safetensors"), network_label("random")
        ('mine', 'random')
    """
    return Path(name).stem if is_file(name) else name


def ordered(networks: Sequence[str]) -> list[str]:
    """Short names with the dense network first: the others are compared with it while training.

    Example:
        >>> ordered(("random", "dense"))
        ['dense', 'random']
    """
    labels = [network_label(name) for name in networks]
    return ["dense", *(label for label in labels if label != "dense")]


@dataclass(frozen=True)
class Paths:
    """Where everything of a run lies; a name or a link that leads out of it is an `InputError`."""

    root: Path

    config = property(lambda self: files.inside(self.root, "config.toml"))
    lock = property(lambda self: files.inside(self.root, "writer.lock"))
    metrics = property(lambda self: files.inside(self.root, "metrics.jsonl"))
    results = property(lambda self: files.inside(self.root, "results.json"))
    figures = property(lambda self: files.inside(self.root, "figures"))
    report = property(lambda self: files.inside(self.root, "report.html"))

    def ticket(self, name: str) -> Path:
        """The network at initialisation."""
        return files.inside(self.root, "tickets", f"{name}.safetensors")

    def trained(self, name: str) -> Path:
        """The network after training."""
        return files.inside(self.root, "trained", f"{name}.safetensors")

    def checkpoints(self, stage: str, name: str) -> Path:
        """Orbax's folder of a stage's state."""
        return files.inside(self.root, "checkpoints", f"{stage}-{name}")

    def dynamics(self, name: str, epoch: int) -> Path:
        """Observations of one epoch on the probe set."""
        return files.inside(self.root, "dynamics", name, f"epoch-{epoch:04d}.npz")

    def evaluation(self, name: str) -> Path:
        """Outcome on each test image."""
        return files.inside(self.root, "evaluation", f"{name}.npz")

    def attacks(self, name: str, identity: str) -> Path:
        """Folder of each attack's outcome."""
        return files.inside(self.root, "evaluation", name, identity)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class RunFolder:
    """An existing run folder, read as it is now; what a live run adds is there at the next look.

    Attributes:
        root: the folder.
        config: its settings.
    """

    root: Path
    config: RunConfig

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """The run in an existing folder; needs no permission to write.

        Raises:
            InputError: no run there, bad settings, or links that lead outside.
        """
        paths = Paths(root)
        if not paths.config.exists():
            raise InputError(f"run folder {root}", expected="a folder with config.toml", got="none")
        config = configs.load(paths.config)
        files.check_tree(root)
        return cls(root, config)

    @property
    def paths(self) -> Paths:
        """Where everything lies."""
        return Paths(self.root)

    @property
    def networks(self) -> list[str]:
        """Short names of the networks, the dense one first."""
        return ordered(self.config.networks)

    @property
    def records(self) -> list[Record]:
        """The rows of `metrics.jsonl`; without a last line that a kill or a writer cut off."""
        return records.read(self.paths.metrics)

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`.

        Raises:
            InputError: the run is not finished.
        """
        return report.read_results(self.root)

    def observed(
        self, name: str, epoch: int, classes: int, count: int | None = None
    ) -> dict[str, np.ndarray]:
        """The saved observations: step [n], outputs [n, 2p, c], kernel [n, 2p, p, c, c].

        Args:
            name: of the network.
            epoch: from 1.
            classes: c.
            count: n; any number if not given.

        Raises:
            InputError: no such file, or one of another shape.
        """
        p, c = self.config.record.probe_size, classes
        wanted = {
            "step": ("iu", (count,)),
            "outputs": ("f", (count, 2 * p, c)),
            "kernel": ("f", (count, 2 * p, p, c, c)),
        }
        fix = f"take it from a copy, or run again without {self.paths.trained(name)} and the "
        fix += f"folder {self.paths.checkpoints('train', name)}: the network is trained anew"
        return files.load_arrays(self.paths.dynamics(name, epoch), wanted, fix=fix)

    def verdicts(self) -> list[Verdict]:
        """What the hygiene rules said of every trained network, as far as it is evaluated."""
        rows = self.records
        flags = {row.network: row.hygiene["flags"] for row in rows if isinstance(row, Evaluated)}
        found = []
        for name in self.networks:
            label = f"{name}, seed {self.config.seed}"
            if name in flags:
                found.append(verdict(label, flags[name]))
            elif self.paths.trained(name).exists():
                found.append(Verdict(label, NOT_JUDGED, ()))
        return found


def is_complete(root: Path, config: RunConfig) -> bool:
    """Whether a run of these settings is finished in a folder, by its files alone.

    Neither data nor networks are loaded, nothing is computed. Files that are missing or cannot be
    read are not complete: the run makes them anew, or says what is wrong.

    Args:
        root: the run folder; need not be there.
        config: of the run.

    Example:
        >>> is_complete(Path("nowhere"), RunConfig())
        False
    """
    try:
        folder = RunFolder.open(root)
        if configs.identity(folder.config) != configs.identity(config):
            return False
        names, paths = ordered(config.networks), folder.paths
        needed = [paths.report, paths.metrics]
        for name in names:
            needed += [paths.ticket(name), paths.trained(name), paths.evaluation(name)]
        if not all(path.is_file() for path in needed):
            return False
        networks = folder.results["networks"]
        rows = {r.network: r.to_row() for r in folder.records if isinstance(r, Evaluated)}
        return list(networks) == names and all(
            name in rows and _agrees(networks[name], rows[name]) for name in names
        )
    except InputError:
        return False


def _agrees(values: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether numbers in `results.json` are those of a row."""
    return all(values[key] == row[key] for key in row.keys() & values.keys())
