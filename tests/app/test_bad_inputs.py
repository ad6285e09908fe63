"""Every command on every kind of bad input: exit code 2, one line, nothing overwritten or run.

A case is a command line, what lies in the current folder (`run` is a finished run), and words of
the line that has to come.
"""

import dataclasses
import errno
import io
import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from ntk_awt import files
from ntk_awt.app import plots
from ntk_awt.app.cli import commands as cli
from ntk_awt.app.cli import progress
from ntk_awt.app.plots import style
from ntk_awt.app.report import page as report
from tests.app.run.test_stages import CONFIG, run

Setup = Callable[[Path], Any]


class Case(NamedTuple):
    """One bad input.

    Attributes:
        command: the command line, without `ntk-awt`.
        words: all of them are in the line that comes.
        setup: called with the current folder.
        works: whether some work may be done, and kept, before the bad input is met.
    """

    command: str
    words: tuple[str, ...]
    setup: Setup
    works: bool


def case(command: str, *words: str, setup: Setup = lambda here: None, works: bool = False) -> Case:
    return Case(command, words, setup, works)


# ---------------------------------------------------------------- what lies there


def text(name: str, content: str) -> Setup:
    """A text file."""
    return lambda here: (here / name).write_text(content, encoding="utf-8")


def raw(name: str, content: bytes) -> Setup:
    """A file of bytes."""
    return lambda here: (here / name).write_bytes(content)


def cut(name: str, share: float = 0.5) -> Setup:
    """Only the first part of a file is left."""

    def shorten(here: Path) -> None:
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: int(share * len(content))])

    return shorten


def arrays(name: str, **values: Any) -> Setup:
    """An archive of arrays."""
    return lambda here: np.savez(here / name, **values)


def changed(name: str, **values: Any) -> Setup:
    """An archive with other arrays in the place of some; None leaves one out."""

    def change(here: Path) -> None:
        with np.load(here / name) as saved:
            found = dict(saved) | values
        np.savez(here / name, **{k: v for k, v in found.items() if v is not None})

    return change


def value(name: str, at: str, new: Any) -> Setup:
    """A JSON file with one entry changed, e.g. at networks.dense.density; ... removes it."""

    def change(here: Path) -> None:
        whole = json.loads((here / name).read_text())
        *outer, last = at.split(".")
        inner = whole
        for key in outer:
            inner = inner[key]
        if new is ...:
            del inner[last]
        else:
            inner[last] = new
        (here / name).write_text(json.dumps(whole))

    return change


def renamed(name: str, at: str, old: str, new: str) -> Setup:
    """A JSON file with another key of the table `at`."""

    def change(here: Path) -> None:
        whole = json.loads((here / name).read_text())
        whole[at][new] = whole[at].pop(old)
        (here / name).write_text(json.dumps(whole))

    return change


def row(number: int, line: str) -> Setup:
    """The run's records with another line."""

    def change(here: Path) -> None:
        lines = (here / "run/metrics.jsonl").read_text().splitlines()
        lines[number] = line
        (here / "run/metrics.jsonl").write_text("\n".join(lines) + "\n")

    return change


def weights(name: str, change: Callable[[dict[str, np.ndarray]], Any], **metadata: str) -> Setup:
    """The saved network `random` with other arrays, and perhaps other metadata."""

    def save(here: Path) -> None:
        source = here / "run/trained/random.safetensors"
        found = safetensors.numpy.load_file(source)
        with safetensors.safe_open(source, "numpy") as file:
            said = file.metadata()
        change(found)
        (here / name).parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file(found, here / name, metadata=said | metadata)

    return save


def as_type(dtype: Any, part: str) -> Callable[[dict[str, np.ndarray]], None]:
    """One part of a saved network in another type."""

    def change(found: dict[str, np.ndarray]) -> None:
        for name in found:
            if name.startswith(part):
                found[name] = found[name].astype(dtype)

    return change


def unchanged(found: dict[str, np.ndarray]) -> None:
    """The saved network as it is."""


def link(name: str, target: str) -> Setup:
    """A link, in the place of what is there."""

    def make(here: Path) -> None:
        path = here / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    return make


def without(*names: str) -> Setup:
    """Files and folders removed."""

    def remove(here: Path) -> None:
        for name in names:
            path = here / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def both(*setups: Setup) -> Setup:
    """One after the other."""

    def do(here: Path) -> None:
        for setup in setups:
            setup(here)

    return do


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def pickled(name: str) -> Setup:
    """A file that makes the folder `pwned` when it is unpickled."""

    def save(here: Path) -> None:
        if name.endswith(".npz"):
            np.savez(here / name, x=np.array([_Evil()]), x_train=np.array([_Evil()]))
        else:
            (here / name).write_bytes(pickle.dumps(_Evil()))

    return save


def code(body: str) -> Setup:
    """A module of the user's, `mine_bad`, and images for it."""

    def save(here: Path) -> None:
        sys.modules.pop("mine_bad", None)
        (here / "mine_bad.py").write_text(f"import jax.numpy as jnp\n{body}")
        rng = np.random.default_rng(0)
        x = rng.uniform(size=(4, 2, 2, 1)).astype(np.float32)
        np.savez(here / "x.npz", x=x, y=np.array([0, 1, 0, 1]))

    return save


def data(**changes: Any) -> Setup:
    """A data set d.npz with some arrays changed."""
    x = np.random.default_rng(0).uniform(size=(60, 4)).astype(np.float32)
    y = np.arange(60) % 2
    good = {"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20]}
    return arrays("d.npz", **(good | changes))


X, Y = np.full((60, 4), 0.5, np.float32), np.zeros(60, int)
GOOD = "lambda w, x: x.reshape(len(x), -1) @ w, jnp.ones((4, 2))"
EVIL = '[variants."../../evil"]\nmethod = "random"\n'
MODULE = "mine_bad:network --images x.npz"

CASES = {
    "arguments": [
        case("rnu", "command", "did you mean 'run'"),
        case("run --epochz 3", "--epochs INT", "Unrecognized options"),
        case("run --epochs three", "--epochs INT", "'three'"),
        case("run --epochs", "--epochs"),
        case("run surplus", "Unrecognized", "surplus"),
        case("evaluate", "Missing"),
        case("linear", "rates, phase, svm, knowledge"),
        case("report", "run folders", "one or more"),
    ],
    "settings": [
        case("run --epochs 2147483648", "epochs", "2³¹"),
        case("run --epsilon nan", "epsilon", "got nan"),
        case("run --epsilon -0.1", "epsilon", "got -0.1"),
        case("run --epsilon 1e39", "epsilon", "1e+30"),
        case("run --density 0", "density", "(0, 1]"),
        case("run --learning-rate inf", "learning_rate"),
        case("run --widths 0", "widths"),
        case("run --train-size 100000", "train_size", "1257"),
        case("run --batch-size 5000", "batch_size"),
        case("run --attacks pgd pgd", "each once"),
        case("run --model mpl", "model", "mlp"),
        case("run --data mnits", "did you mean 'mnist'"),
        case("run --optimizer lion", "optimizer"),
        case("run --networks ticket", "dense among them"),
        case("run --networks dense a/dense.safetensors", "rename it"),
        case("run --networks dense 'x;rm.safetensors'", "name of letters"),
        case(f"run --networks dense {'n' * 200}.safetensors", "of 200 characters"),
        case("run --networks dense none.safetensors", "No such file", works=True),
    ],
    "config files": [
        case("run --config none.toml", "config file none.toml", "No such file"),
        case("run --config .", "config file .", "directory"),
        case("run --config c.toml", "valid TOML", setup=text("c.toml", "seed = = 3")),
        case("run --config c.toml", "valid TOML", setup=raw("c.toml", b"\xff\xfe\x00")),
        case("run --config c.toml", "valid TOML", setup=text("c.toml", "a = " + 3000 * "[")),
        case("run --config c.toml", "valid TOML", setup=text("c.toml", "seed = " + 5000 * "9")),
        case("run --config c.toml", "seed", "int", setup=text("c.toml", "seed = '0'")),
        case("run --config c.toml", "a table", setup=text("c.toml", "model = 3")),
        case("run --config c.toml", "did you mean", setup=text("c.toml", "[trian]\nepochs = 3")),
        case("run --config c.toml", "widths", "list", setup=text("c.toml", "[model]\nwidths = 3")),
        case("run --config c.toml", "variant", "../../evil", setup=text("c.toml", EVIL)),
        case(
            "ticket --config c.toml",
            "variant",
            "../../evil",
            setup=text("c.toml", 'networks = ["dense", "../../evil"]\n' + EVIL),
        ),
        case(
            "ticket --config c.toml",
            "variant",
            setup=text("c.toml", '[variants."<script>"]\nmethod = "random"\n'),
        ),
        case(
            "run --config c.toml",
            "variant",
            setup=text("c.toml", '[variants.".hidden"]\nmethod = "random"\n'),
        ),
        case(
            "run --config c.toml",
            "basis file",
            setup=text("c.toml", '[threat]\nname = "strong-l2"\nbasis = "a\\u0000.npy"\n'),
        ),
        case(
            "run --config c.toml",
            "basis file b.npy",
            setup=both(
                text("c.toml", '[threat]\nname = "strong-l2"\nbasis = "b.npy"\n'),
                pickled("b.npy"),
            ),
        ),
    ],
    "sweeps": [
        case("sweep s.toml", "a value of type dict", setup=text("s.toml", "sweep = 3")),
        case("sweep s.toml", "densities", "list", setup=text("s.toml", "[sweep]\nseeds=[0]")),
        *(
            case("sweep s.toml", *words, setup=text("s.toml", f"[sweep]\n{table}"))
            for table, *words in (
                ("densities = []\nseeds = [0]", "one or more"),
                ("densities = [0.1]\nseeds = []", "one or more"),
                ("densities = [0.1, 0.1]\nseeds = [0]", "each once"),
                ("densities = [0.1]\nseeds = ['../../evil']", "seeds", "int"),
                ("densities = ['x']\nseeds = [0]", "densities", "float"),
                ("densities = [2.0]\nseeds = [0]", "densities", "(0, 1]"),
                ("densities = [nan]\nseeds = [0]", "densities", "nan"),
                ("densities = [0.1]\nseeds = [-1]", "seeds"),
                ("densities = [0.1]\nseeds = [0]\nmore = 3", "setting in s.toml"),
                ("densities = [0.10000001, 0.1]\nseeds = [0]", "six digits"),
            )
        ),
        case(
            "sweep s.toml --quick",
            "a table [sweep.quick]",
            setup=text("s.toml", "[sweep]\ndensities = [0.1]\nseeds = [0]"),
        ),
        case(
            "sweep s.toml --quick",
            "sweep.quick",
            "dict",
            setup=text("s.toml", "[sweep]\ndensities = [0.1]\nseeds = [0]\nquick = 3"),
        ),
        case(
            "sweep s.toml --run-dir s",
            "links that lead outside",
            setup=both(
                text("s.toml", "[sweep]\ndensities = [0.1]\nseeds = [0]"),
                link("s/density-0.1", "../run"),
            ),
        ),
    ],
    "data": [
        *(
            case("run --data d.npz", "d.npz", *words, setup=setup)
            for setup, *words in (
                (raw("d.npz", b""), "savez"),
                (both(data(), cut("d.npz")), "savez"),
                (pickled("d.npz"), "arrays"),
                (arrays("d.npz", x_train=X, y_train=Y), "x_test"),
                (data(y_train=Y.astype(float)), "integer labels"),
                (data(y_train=Y[:50]), "shape (60,)"),
                (data(y_train=Y - 1), "labels"),
                (data(x_train=X * np.nan), "finite"),
                (data(x_train=X * 300), "[0, 1]"),
                (data(x_train=X.astype(complex)), "floating-point"),
                (data(x_train=X.astype(str)), "floating-point"),
                (data(x_test=X[:20, :3]), "shape"),
                (data(y_train=Y, y_test=Y[:20]), "two classes"),
                (data(y_train=2 * (np.arange(60) % 2)), "none of class 1"),
                (data(x_train=X[:0], y_train=Y[:0]), "at least one"),
            )
        ),
        case("run --data none.npz", "no such file"),
        case("run --data mnist --data-dir .", "train-images-idx3-ubyte"),
        case(
            "run --data mnist --data-dir .",
            "IDX",
            setup=both(
                *(
                    raw(f"{part}-{kind}-ubyte", b"nonsense")
                    for part in ("train", "t10k")
                    for kind in ("images-idx3", "labels-idx1")
                )
            ),
        ),
    ],
    "places": [
        case("run --run-dir file/run", "run folder file/run", setup=text("file", "")),
        case("run --run-dir file", "something else", setup=text("file", "")),
        case("run --run-dir /proc/here", "can be written"),
        case("run --run-dir .", "something else"),
        case("ticket --run-dir run", "run folder run, setting"),
        case("evaluate run --json run", "--json", "ends in .json"),
        case(
            "evaluate run --json made.json",
            "--json",
            "a file",
            setup=lambda h: (h / "made.json").mkdir(),
        ),
        case("evaluate run --json file/x.json", "--json", setup=text("file", "")),
        case("evaluate run --json x.safetensors", "--json", "ends in .json"),
        case("evaluate run --out x", "--out"),
        case(
            f"evaluate {MODULE} --out file",
            "--out",
            setup=both(code(f"network = lambda: ({GOOD})\n"), text("file", "")),
        ),
        case("kernel run --out x.svg", "ends in .npz"),
        case("kernel run --out file/x.npz", "--out", setup=text("file", "")),
        case("verify P1 --json /proc/x.json", "--json"),
        case("verify P1 --report x.json", "ends in .html"),
        case("verify P1 --report file/x.html", "--report", setup=text("file", "")),
        case("verify P1 P99", "statement"),
        case("verify P1 --seed -1", "seed"),
        case("linear rates --out file/x", "--out", setup=text("file", "")),
        case("linear rates --json x.npz", "ends in .json"),
        case("linear rates --d 0", "dimension"),
        case("linear svm --mean-norm nan", "mean norm"),
        case("linear knowledge --data none.npz", "no such file"),
        case("report run run --out x.svg", "ends in .html"),
        case("bench nothing", "benchmark"),
        case("bench kernels --json /proc/x.json", "--json"),
    ],
    "code": [
        *(
            case(f"{command} {MODULE}", *words, setup=code(body))
            for command in ("kernel", "evaluate")
            for body, *words in (
                ("import sys; sys.exit(0)", "SystemExit"),
                ("def network():\n    raise SystemExit(7)", "SystemExit", "mine_bad.py, line 3"),
                ("def network():\n    1 / 0", "ZeroDivisionError", "line 3"),
                ("syntax error", "SyntaxError"),
                ("network = 3", "function of mine_bad"),
                ("network = lambda: 3", "a tuple (apply, params)"),
                ("network = lambda: (len, {'w': 3})", "array of floats"),
                ("network = lambda: (len, jnp.ones(3) / 0)", "finite"),
                (
                    "def apply(w, x):\n    raise ValueError('no\\nway')\n"
                    "network = lambda: (apply, jnp.ones(2))",
                    "ValueError: no",
                    "line 3",
                ),
                (
                    "import sys\nnetwork = lambda: (lambda w, x: sys.exit(0), jnp.ones(2))",
                    "SystemExit",
                ),
                (
                    "import numpy as np\nnetwork = lambda: (lambda w, x: np.asarray(x) @ w, "
                    "jnp.ones((4, 2)))",
                    "TracerArrayConversionError",
                ),
                ("network = lambda: (lambda w, x: x @ w, jnp.ones((3, 2)))", "mine_bad.py"),
            )
        ),
        case(
            f"evaluate {MODULE}",
            "labels",
            setup=both(
                code(f"network = lambda: ({GOOD})\n"),
                arrays("x.npz", x=np.zeros((4, 2, 2, 1), np.float32), y=np.array([0, 1, 2, 3])),
            ),
        ),
        case(
            f"evaluate {MODULE}",
            "labels",
            setup=both(
                code(f"network = lambda: ({GOOD})\n"),
                arrays("x.npz", x=np.zeros((4, 2, 2, 1), np.float32), y=np.zeros(4)),
            ),
        ),
        case(
            f"kernel {MODULE}",
            "finite",
            setup=both(
                code(f"network = lambda: ({GOOD})\n"),
                arrays("x.npz", x=np.full((4, 2, 2, 1), np.nan, np.float32)),
            ),
        ),
        case(
            "kernel mine_bad:network --images x.npz",
            "images x.npz",
            setup=both(
                code(f"network = lambda: ({GOOD})\n"),
                pickled("x.npz"),
            ),
        ),
    ],
    "records": [
        case("report none", "run folder none"),
        case("report run", "results.json", setup=without("run/results.json")),
        case("report run", "results.json", "JSON", setup=cut("run/results.json")),
        case("report run", "a table", setup=text("run/results.json", "[]")),
        case("report run", "JSON", setup=text("run/results.json", 9000 * "[")),
        case("report run", "one network or more", setup=value("run/results.json", "networks", {})),
        case(
            "report run", "density", setup=value("run/results.json", "networks.dense.density", "x")
        ),
        case(
            "report run", "hygiene", setup=value("run/results.json", "networks.dense.hygiene", ...)
        ),
        case("report run", "layers", setup=value("run/results.json", "networks.dense.layers", 3)),
        case(
            "report run",
            "robust_interval",
            setup=value("run/results.json", "networks.dense.robust_interval", [0]),
        ),
        case(
            "report run",
            "[0, 1]",
            setup=value("run/results.json", "networks.dense.robust_accuracy", 3),
        ),
        case("report run", "versions", setup=value("run/results.json", "versions", ...)),
        case(
            "report run",
            "name of letters",
            setup=renamed("run/results.json", "networks", "random", "../../evil"),
        ),
        case(
            "report run",
            "name of letters",
            setup=renamed("run/results.json", "networks", "random", "<img onerror=x>"),
        ),
        case("report run", "metrics.jsonl, line 2", setup=row(1, "not JSON")),
        case("report run", "metrics.jsonl, line 1", "a table", setup=row(0, "[1, 2]")),
        case("report run", "line 1", "stage", setup=row(0, '{"step": 3}')),
        case(
            "report run",
            "stage",
            "tickt",
            setup=row(0, '{"stage": "tickt", "network": "a", "step": 0}'),
        ),
        case(
            "report run",
            "line 1",
            "seconds",
            setup=row(0, '{"stage": "ticket", "network": "a", "step": 0, "seconds": "3"}'),
        ),
        case("report run", "metrics.jsonl", setup=without("run/metrics.jsonl")),
        case("report run", "dense.npz", "delete it", setup=cut("run/evaluation/dense.npz")),
        case("report run", "dense.npz", setup=without("run/evaluation/dense.npz")),
        case(
            "report run",
            "natural_correct",
            setup=changed("run/evaluation/dense.npz", natural_correct=None),
        ),
        case(
            "report run",
            "examples",
            setup=changed("run/evaluation/dense.npz", examples=np.zeros((2, 3), np.float32)),
        ),
        case(
            "report run",
            "dense.npz",
            setup=changed("run/evaluation/dense.npz", labels=np.array([_Evil()])),
        ),
        case("report run ./run", "different names"),
        case("report run none", "run folder none"),
        case("evaluate run", "metrics.jsonl, line 2", setup=row(1, "not JSON")),
        case("train run", "config", setup=text("run/config.toml", "networks = 3")),
        case("evaluate none", "run folder none"),
        case("evaluate run --networks tickt", "one of dense, random"),
        case("evaluate run --networks random --attacks pdg", "attack"),
        case("evaluate run --steps -1", "evaluation_steps"),
        case("evaluate run --epsilon nan", "epsilon"),
        case("train run --networks tickt", "did you mean 'ticket'"),
        case("train none", "run folder none"),
        case(
            "run --config run/config.toml --run-dir run",
            "rows of stage dynamics",
            "made anew",
            setup=text("run/metrics.jsonl", ""),
        ),
        case(
            "run --config run/config.toml --run-dir run",
            "apgd-ce.npz",
            "delete it",
            setup=both(
                without("run/evaluation/random.npz"),
                lambda here: cut(str(next((here / "run/evaluation/random").glob("*/*.npz"))))(here),
            ),
        ),
        case(
            "run --config run/config.toml --run-dir run",
            "dense.npz",
            setup=both(without("run/evaluation/random.npz"), cut("run/evaluation/dense.npz")),
        ),
        case(
            "train run",
            "epoch-0001.npz",
            "kernel",
            "trained anew",
            setup=both(
                without("run/trained/random.safetensors", "run/checkpoints/train-random"),
                changed("run/dynamics/dense/epoch-0001.npz", kernel=np.zeros((3, 2), np.float32)),
            ),
            works=True,
        ),
    ],
    "networks": [
        *(
            case("kernel t.safetensors", "t.safetensors", *words, setup=setup)
            for setup, *words in (
                (raw("t.safetensors", b""), "a safetensors file"),
                (raw("t.safetensors", b"\xff" * 100), "a safetensors file"),
                (pickled("t.safetensors"), "a safetensors file"),
                (
                    both(weights("t.safetensors", unchanged), cut("t.safetensors")),
                    "a safetensors file",
                ),
                (weights("t.safetensors", as_type(np.int32, "params")), "floats"),
                (weights("t.safetensors", as_type(np.int32, "gain")), "floats"),
                (weights("t.safetensors", as_type(np.float32, "mask")), "booleans"),
                (
                    weights(
                        "t.safetensors",
                        lambda f: f.update({"params/dense1/bias": np.full(16, np.nan, np.float32)}),
                    ),
                    "finite",
                ),
                (
                    weights(
                        "t.safetensors",
                        lambda f: f.update({"params/dense1/bias": np.zeros(3, np.float32)}),
                    ),
                    "shape",
                ),
                (weights("t.safetensors", lambda f: f.pop("mask/dense1/kernel")), "no leaf"),
                (weights("t.safetensors", lambda f: f.update({"more": np.zeros(3)})), "one more"),
                (weights("t.safetensors", unchanged, model="{"), "JSON"),
                (weights("t.safetensors", unchanged, model=9000 * "["), "JSON"),
                (weights("t.safetensors", unchanged, model="[]"), "a table"),
                (weights("t.safetensors", unchanged, input_shape="[-8]"), "input_shape"),
                (weights("t.safetensors", unchanged, num_classes='"x"'), "num_classes"),
                (weights("t.safetensors", unchanged, network="../../evil"), "name of letters"),
                (weights("t.safetensors", unchanged, network="[/red]"), "name of letters"),
            )
        ),
        case("kernel run --network tickt", "one of dense, random"),
        case("kernel run --state final", "initial, trained"),
        case("kernel run --network random --images none.npy", "none.npy"),
        case("kernel run --outputs 10", "number of a logit"),
        case("kernel run --outputs 99999999999999999999", "number of a logit"),
        case("kernel run --engine fast", "engine"),
        case("kernel run --batch 0", "batch"),
        case(
            "kernel run --state trained",
            "dense.safetensors",
            setup=cut("run/trained/dense.safetensors"),
        ),
        case(
            "evaluate run",
            "random.safetensors",
            setup=without("run/trained/random.safetensors"),
            works=True,
        ),
        case(
            "kernel run/checkpoints/train-random",
            "delete that folder",
            setup=lambda here: [
                p.write_bytes(b"nonsense")
                for p in (here / "run/checkpoints/train-random").rglob("*")
                if p.is_file()
            ],
        ),
        case(
            "kernel run/checkpoints/train-random",
            "saved state",
            setup=lambda here: [
                shutil.rmtree(here / "run/checkpoints/train-random"),
                (here / "run/checkpoints/train-random").mkdir(),
            ],
        ),
        case("kernel run/checkpoints/train-random/7", "the newest"),
        case("kernel run/checkpoints/search-random", "searched for"),
        case("kernel run/checkpoints/train-none", "one of dense, random"),
    ],
    "links": [
        *(
            case(command, "links that lead outside", setup=both(setup, raw("secret", b"kept")))
            for command, setup in (
                ("evaluate run", link("run/results.json", "../secret")),
                ("evaluate run", link("run/figures", "..")),
                (
                    "kernel run",
                    link("run/figures/kernel-dense-initial-adversarial.npz", "../../secret"),
                ),
                ("report run", link("run/report.html", "../secret")),
                ("report run", link("run/figures/dynamics.svg", "../../secret")),
                ("report run", link("run/figures", "..")),
                ("train run", link("run/metrics.jsonl", "../secret")),
                ("train run", link("run/checkpoints", "..")),
                (
                    "run --config c.toml --run-dir run",
                    both(
                        lambda here: shutil.copy(here / "run/config.toml", here / "c.toml"),
                        link("run/trained", ".."),
                    ),
                ),
                ("train run", link("run/none", "/dev/zero")),
            )
        ),
        case(
            "report run",
            "metrics.jsonl",
            setup=lambda here: [
                (here / "run/metrics.jsonl").unlink(),
                os.mkfifo(here / "run/metrics.jsonl"),
            ],
        ),
    ],
}
"""By what is bad."""

ALL = [
    (f"{kind}: {one.command} #{i}", one)
    for kind, cases in CASES.items()
    for i, one in enumerate(cases)
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the dense and the random network; tests copy it."""
    config = dataclasses.replace(
        CONFIG,
        networks=("dense", "random"),
        train=dataclasses.replace(CONFIG.train, epochs=1),
    )
    root = tmp_path_factory.mktemp("bad") / "run"
    run(config, root)
    return root


def content(folder: Path) -> dict[str, Any]:
    """Bytes, or the target of a link, by path."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def test_there_are_enough_cases_and_each_is_named_once():
    assert len(ALL) >= 80
    assert len({name for name, _ in ALL}) == len(ALL)


@pytest.mark.parametrize("bad", [one for _, one in ALL], ids=[name for name, _ in ALL])
def test_bad_input(bad, finished, tmp_path, monkeypatch, capsys):
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    shutil.copytree(finished, here / "run")
    monkeypatch.chdir(here)
    for module in (cli, progress):
        monkeypatch.setattr(module, "console", Console(file=io.StringIO()))
    bad.setup(here)
    before = content(tmp_path)
    code = cli.main(shlex.split(bad.command))
    error, after = capsys.readouterr().err, content(tmp_path)
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "expected" in error
    assert "got" in error
    for word in bad.words:
        assert word in error
    if bad.works:
        log = "a/b/run/metrics.jsonl"
        assert {k: v for k, v in after.items() if k in before and k != log} == {
            k: v for k, v in before.items() if k != log
        }
    else:
        assert after == before


# ---------------------------------------------------------------- what is written


def test_a_full_disk_at_five_moments_changes_no_number(finished, tmp_path, monkeypatch, capsys):
    """The third, sixth, … file is cut off by a full disk; the run goes on with equal numbers."""
    root, honest = tmp_path / "run", files.replace
    shutil.copy(finished / "config.toml", tmp_path / "c.toml")
    arguments = ["run", "--config", str(tmp_path / "c.toml"), "--run-dir", str(root)]
    for room in (0, 2, 3, 4, 6):
        left = [room]

        def full(path: Path, write: Callable[[Path], Any], left: list[int] = left) -> None:
            def limited(partial: Path) -> None:
                write(partial)
                left[0] -= 1
                if left[0] < 0:
                    partial.write_bytes(partial.read_bytes()[:100])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

            honest(path, limited)

        with monkeypatch.context() as patched:
            patched.setattr(files, "replace", full)
            patched.setattr(style, "replace", full)
            for module in (cli, progress):
                patched.setattr(module, "console", Console(file=io.StringIO()))
            assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "No space left on device" in error
        assert "run again" in error
        assert not list(root.rglob("*.partial*"))
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tr')  # where the disk was full for an appended line
    assert cli.main(arguments) == 0
    wanted, found = (report.read_results(path) for path in (finished, root))
    assert found | {"seconds": 0} == wanted | {"seconds": 0}


def test_a_link_and_a_pipe_are_written_through(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    files.write_text(Path("/dev/null"), "lost")
    assert Path("/dev/null").is_char_device()
    files.check_output("--json", Path("/dev/null"), ".json")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError

    with pytest.raises(OSError):
        files.replace(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_names_with_markup_are_text_in_pages_and_pictures(finished, tmp_path):
    name = "<script>alert(1)<b> $x_{"
    for folder in ("a", name):
        shutil.copytree(finished, tmp_path / folder)
    both = report.compare([tmp_path / "a", tmp_path / name], tmp_path / "both.html")
    for page in (report.write(tmp_path / name), both):
        assert "<script" not in page.read_text()
        assert "&lt;script&gt;" in page.read_text()
    plots.save(plots.kernel(np.eye(2), name), tmp_path, "kernel")
    assert "&lt;script&gt;" in (tmp_path / "kernel.svg").read_text()


PRINTS = """
print("here")
def apply(w, x):
    print("there")
    return x.reshape(len(x), -1) @ w
network = lambda: (apply, jnp.eye(4)[:, :2])
"""


def test_what_the_user_s_code_prints_is_not_among_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code(PRINTS)(tmp_path)
    assert cli.main(shlex.split(f"kernel {MODULE} --outputs trace --out 'k[/red] $x_{{.npz'")) == 0
    shown = capsys.readouterr()
    assert "here" not in shown.out
    assert "here\n" in shown.err
    assert "there\n" in shown.err
