"""What `run`, `ticket` and `sweep` take, and how flags, files and presets become settings.

Tyro parses the config dataclasses as they are. For `--help` it gets classes of the same settings
with their choices in braces: a short list of those that people change, all with `--help-all`.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import textwrap
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import DisallowNone, OmitArgPrefixes, arg

from ntk_awt.app import config as configs
from ntk_awt.app.config import PRESETS, RunConfig
from ntk_awt.errors import InputError, choose

__all__ = [
    "ATTACKS",
    "CHOICES",
    "COMMON",
    "THREATS",
    "RunSettings",
    "Settings",
    "SweepSettings",
    "braces",
    "parsed",
    "run_settings",
]


@dataclass(frozen=True)
class Settings:
    """What `ticket` takes: every setting, and where to keep the run."""

    config: OmitArgPrefixes[RunConfig]
    run_dir: Path | None = None
    """Folder of the run; runs/NAME, a name made from the settings, if not given."""

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return self.run_dir or Path("runs") / configs.run_name(self.config)


@dataclass(frozen=True)
class RunSettings(Settings):
    """What `run` takes."""

    strict: bool = False
    """Exit with 1 if a hygiene check of a network fails."""


@dataclass(frozen=True)
class SweepSettings:
    """What `sweep` takes."""

    file: tyro.conf.Positional[Path]
    """TOML: settings of the runs, and a table [sweep] with densities and seeds."""
    quick: bool = False
    """Apply the file's table [sweep.quick]: fewer seeds, a shorter training."""
    seeds: tuple[int, ...] | None = None
    """Only these seeds, in place of the file's: several calls can share the work."""
    densities: tuple[float, ...] | None = None
    """Only these densities, in place of the file's."""
    data_dir: Path | None = None
    """Folder of the data files; else the environment variable NTK_AWT_DATA (or its sub-folder)."""
    run_dir: Path | None = None
    """Folder of the sweep; runs/NAME (NAME-quick) of the config file, if not given."""
    strict: bool = False
    """Exit with 1 if a hygiene check of a network fails."""


# ---------------------------------------------------------------- help

ATTACKS = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "auto")
THREATS = ("linf", "l2", "strong-l2")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.name": ("mlp", "lenet5", "conv4"),
    "model.activation": ("relu", "gelu", "erf", "tanh"),
    "model.pooling": ("max", "average"),
    "model.parametrization": ("standard", "ntk"),
    "model.fan": ("in", "average"),
    "model.distribution": ("normal", "truncated"),
    "mask.allocation": ("uniform", "erk", "global"),
    "mask.gain": ("energy", "none"),
    "threat.name": THREATS,
    "ticket.solver": ("awt", "awt-scores", "awt-joint", "concrete", "saliency"),
    "ticket.ticket_schedule": ("cosine", "constant"),
    "ticket.matching": ("distances", "kl"),
    "ticket.distance": ("relative", "absolute"),
    "ticket.jacobian": ("masked", "full"),
    "ticket.pairs": ("all", "halves"),
    "ticket.estimator": ("exact", "probes"),
    "ticket.inputs": ("natural", "dense", "sparse", "both"),
    "ticket.attack_labels": ("random", "true"),
    "ticket.reselect": ("regrow", "regrow-units", "magnitude"),
    "train.loss": ("adversarial", "natural", "trades"),
    "train.criterion": ("cross-entropy", "squared"),
    "train.optimizer": ("sgd", "momentum", "adam", "adamw"),
    "train.schedule": ("constant", "cosine"),
    "evaluation.attacks": ATTACKS,
}
"""The values of each setting that takes one of a few; shown in braces."""

COMMON = (
    "networks",
    "seed",
    "data.name",
    "data.data_dir",
    "model.name",
    "mask.density",
    "threat.name",
    "threat.epsilon",
    "ticket.solver",
    "ticket.ticket_steps",
    "train.loss",
    "train.epochs",
    "train.learning_rate",
    "evaluation.full_evaluation",
)
"""The settings that `--help` shows; `--help-all` shows all."""


PRESET_HELP = (
    "Settings to start from; digits: the demo's; mnist: what measured best there (standardised "
    "inputs, kernel distance alone, each unit keeps its number of weights); cifar10: the same "
    "search for Conv-4."
)


def braces(values: Sequence[str]) -> str:
    """The values as help shows them.

    Example:
        >>> braces(("max", "average"))
        '{max,average}'
    """
    return "{" + ",".join(values) + "}"


def _texts(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, those that it inherits as well."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = typing.cast(ast.ClassDef, tree).body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = typing.cast(ast.Name, field.target).id
                found[name] = " ".join(ast.literal_eval(text.value).split())
    return found


def _fields(value: Any, prefix: str, keep: Callable[[str], bool]) -> list[tuple[str, Any, Any]]:
    """Fields for `make_dataclass`: the flags of a dataclass, with its values as defaults.

    Args:
        value: a dataclass; what is nested in it is left out.
        prefix: of full names, e.g. `train.`.
        keep: by full name, whether help shows it.
    """
    hints, texts = typing.get_type_hints(type(value), include_extras=True), _texts(type(value))
    found = []
    for field in dataclasses.fields(value):
        name, current = prefix + field.name, getattr(value, field.name)
        if dataclasses.is_dataclass(current) or isinstance(current, dict) or not keep(name):
            continue
        values = braces(CHOICES[name]) if name in CHOICES else None
        if values and isinstance(current, tuple):
            values = f"[{values} ...]"
        about = arg(help=texts[field.name], metavar=values)
        flag = Annotated[hints[field.name], about]
        if not any(getattr(one, "name", None) for one in getattr(flag, "__metadata__", ())):
            flag = Annotated[flag, arg(name=field.name)]
        found.append((name.replace(".", "_"), flag, current))
    return found


def _help_class(default: Settings, *, everything: bool) -> type:
    """What help shows of `run` or `ticket`: a dataclass with the same flags, for Tyro."""
    presets = Annotated[str | None, arg(metavar=braces(tuple(PRESETS)), help=PRESET_HELP)]
    fields: list[tuple[str, Any, Any]] = [
        ("preset", presets, None),
        (
            "config",
            Annotated[Path | None, arg(metavar="FILE", help="TOML file with settings.")],
            None,
        ),
        *_fields(default, "", lambda name: True),
    ]
    kept = (lambda name: True) if everything else COMMON.__contains__
    fields += _fields(default.config, "", kept)
    for section in dataclasses.fields(default.config):
        value = getattr(default.config, section.name)
        if not dataclasses.is_dataclass(value):
            continue
        inner = _fields(value, f"{section.name}.", kept)
        if everything:
            about = {"__doc__": type(value).__doc__}
            table: Any = dataclasses.make_dataclass(type(value).__name__, inner, namespace=about)
            inner = [
                (section.name, OmitArgPrefixes[table], dataclasses.field(default_factory=table))
            ]
        fields += inner
    return dataclasses.make_dataclass(type(default).__name__, fields)


# ---------------------------------------------------------------- parsing


MARKERS = (DisallowNone,)
"""An optional setting is left out, not set to None."""


def _taken(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag VALUE` or `flag=VALUE`, if given, and the other arguments."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            following = [value] if equals else arguments[at + 1 : at + 2]
            if not following or not following[0]:
                what = "a TOML file" if flag == "--config" else f"one of {', '.join(PRESETS)}"
                raise InputError(flag, expected=f"{what} after it", got="nothing")
            return following[0], arguments[:at] + arguments[at + 1 + (not equals) :]
    return None, arguments


def _start(file: str | None, preset: str | None) -> RunConfig:
    """The settings that flags override: of a file, of a preset, or all at their defaults."""
    if file is not None and preset is not None:
        raise InputError("--config and --preset", expected="one of them", got="both")
    if preset is not None:
        choose("--preset", preset, PRESETS)
        return PRESETS[preset]
    if file is None:
        return RunConfig()
    values = configs.read(Path(file))
    if "sweep" in values:
        raise InputError(
            f"config file {file}",
            expected="the settings of one run",
            got="a table [sweep]",
            fix=f"use: ntk-awt sweep {file}",
        )
    return configs.from_dict(values, where=Path(file).name)


def run_settings(kind: type[Any], program: str, about: str, arguments: list[str]) -> Any:
    """The settings that the arguments of `run` or `ticket` ask for.

    Args:
        kind: Settings or RunSettings.
        program: e.g. `ntk-awt run`.
        about: what the command does.
        arguments: with `--config FILE` or `--preset NAME` anywhere among them.

    Raises:
        InputError: arguments that say nothing.
        SystemExit: help was asked for and shown.
    """
    file, arguments = _taken(arguments, "--config")
    preset, arguments = _taken(arguments, "--preset")
    default = kind(_start(file, preset))
    everything = "--help-all" in arguments
    if everything or {"-h", "--help"} & set(arguments):
        about = f"{about} Flags override --preset or --config."
        more = "" if everything else f" All settings: {program} --help-all."
        shown = _help_class(default, everything=everything)
        tyro.cli(shown, prog=program, args=["--help"], description=about + more, config=MARKERS)
    return parsed(kind, program, arguments, default=default)


def parsed(kind: Any, program: str, arguments: list[str], **settings: Any) -> Any:
    """What the arguments say, or Tyro's complaint as one line; `--help` is shown as it is.

    Raises:
        InputError: arguments that say nothing.
        SystemExit: help was asked for and shown.
    """
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, config=MARKERS, **settings)
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # A box: what is wrong, a rule, then the options that may have been meant, each with its help.
    boxed = [row.strip("╭╮╰╯│─ ") for row in said.getvalue().splitlines()]
    rules = [at for at, row in enumerate(said.getvalue().splitlines()) if "│ ──" in row]
    first = rules[0] if rules else len(boxed)
    options = dict.fromkeys(row for row in boxed[first:] if row.startswith("--"))
    options.pop(f"{program} --help", None)
    raise InputError(
        "arguments",
        expected=" or ".join(options) or f"those of {program} --help",
        got=" ".join(filter(None, boxed[1:first])),
        fix=f"see {program} --help",
    )
