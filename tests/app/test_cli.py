"""The command line: help, settings from file and flags, each command on a saved run, errors."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from ntk_awt import __version__, masks
from ntk_awt.app import config as configs
from ntk_awt.app import sources as inspection
from ntk_awt.app import sweep, verdicts
from ntk_awt.app.cli import commands as cli
from ntk_awt.app.cli import progress, settings, tables
from ntk_awt.app.config import RunConfig
from ntk_awt.app.run import stages as experiment
from ntk_awt.errors import InputError
from tests.app.run.test_stages import CONFIG

SLOW = ("test_kernel_is_saved_and_drawn adversarial",)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of the dense and the random network, through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    config = dataclasses.replace(CONFIG, networks=("dense", "random"))
    configs.save(config, folder / "config.toml")
    arguments = ["run", "--config", str(folder / "config.toml"), "--run-dir", str(folder / "run")]
    assert cli.main(arguments) == 0
    return folder / "run"


def test_overview_lists_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"ntk-awt {command}" in capsys.readouterr().out


def shown(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def flag_of(setting):
    section, _, field = setting.rpartition(".")
    return f"--{(section if field == 'name' else field).replace('_', '-')}"


@pytest.mark.parametrize("command", ["run", "ticket"])
def test_help_is_short_and_help_all_has_every_setting(command, capsys):
    whole = shown([command, "--help-all"], capsys)
    brief = shown([command, "--help"], capsys)
    everything = ["networks", *configs.identity(RunConfig()), "data.data_dir"]
    for name in everything:
        if name != "variants":
            assert re.search(rf"{flag_of(name)}[ ,]", whole), name
            assert bool(re.search(rf"{flag_of(name)}[ ,]", brief)) == (name in settings.COMMON)
    for flag in ("--config FILE", "--preset {digits,mnist,cifar10}", "--run-dir"):
        assert flag in brief
        assert flag in whole
    assert f"ntk-awt {command} --help-all" in " ".join(brief.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_does_not_speak_tyro(command, capsys):
    """An optional value needs no {None}, which nobody would type."""
    assert "None}" not in shown([command, "--help-all"], capsys)


def test_choices_are_in_braces(capsys):
    whole = " ".join(shown(["run", "--help-all"], capsys).split())
    for name, values in settings.CHOICES.items():
        assert f"{flag_of(name)} {settings.braces(values)}" in whole.replace("[{", "{"), name
    for arguments in (["evaluate", "--help"], ["kernel", "--help"]):
        text = shown(arguments, capsys)
        assert "{linf,l2,strong-l2}" in text or "{full,diagonal,trace,NUMBER}" in text


@pytest.mark.parametrize("name", settings.CHOICES)
def test_choices_are_those_that_there_are(name):
    """Each value that help shows is taken, and no other one."""
    section, _, field = name.partition(".")
    part = getattr(RunConfig(), section)

    def check(value):
        value = (value,) if name == "evaluation.attacks" else value
        changed = dataclasses.replace(part, **{field: value})
        experiment.check_names(dataclasses.replace(RunConfig(), **{section: changed}))

    for value in settings.CHOICES[name]:
        check(value)
    with pytest.raises(InputError) as caught:
        check("nonsense")
    listed = str(caught.value).partition("one of ")[2].partition(", got")[0].split(", ")
    assert set(listed) == set(settings.CHOICES[name])


def test_version_loads_nothing():
    code = (
        "import sys; sys.argv[1:] = ['--version']\n"
        "from ntk_awt.__main__ import main\n"
        "assert main() == 0\n"
        "print([m for m in ('jax', 'numpy', 'tyro', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"ntk-awt {__version__}", "[]"]


def test_help_loads_no_jax():
    code = (
        "import sys; sys.argv[1:] = ['run', '--help']\n"
        "from ntk_awt.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.fixture
def asked(monkeypatch):
    """The configs that `run` was asked for; nothing is run."""
    seen = []

    def stop(config, *rest):
        seen.append(config)
        raise InputError("stop", expected="here", got="here")

    monkeypatch.setattr(experiment, "Run", stop)
    return seen


@pytest.mark.parametrize("name", configs.PRESETS)
def test_preset_parses_and_flags_override_it(name, asked):
    assert cli.main(["run", "--preset", name]) == 2
    assert cli.main(["run", "--epochs", "2", f"--preset={name}", "--target-weight", "0.5"]) == 2
    plain, changed = asked
    assert plain == configs.PRESETS[name]
    assert (changed.train.epochs, changed.ticket.target_weight) == (2, 0.5)
    assert changed.data == plain.data
    assert dataclasses.replace(changed, train=plain.train, ticket=plain.ticket) == plain
    experiment.check_names(plain)
    assert configs.from_dict(configs.to_dict(plain)) == plain


def test_presets_are_the_settings_that_were_measured():
    assert configs.PRESETS["digits"] == RunConfig()
    root = Path(cli.__file__).parents[3] / "experiments"
    for name, file, density in (
        ("mnist", "mnist_standardised", 0.1),
        ("cifar10", "cifar10_conv4", 0.05),
    ):
        preset = configs.PRESETS[name]
        assert preset.ticket.target_weight == 0
        assert preset.ticket.reselect == "regrow-units"
        assert preset.model.input_mean > 0
        assert preset.mask.density == density
        wanted = sweep.load(root / f"{file}.toml").base
        for section in ("data", "threat", "attack", "train", "record"):
            assert getattr(preset, section) == getattr(wanted, section)
    assert preset.model == dataclasses.replace(wanted.model, input_mean=0.4734, input_std=0.2516)
    assert preset.ticket == dataclasses.replace(
        wanted.ticket, target_weight=0.0, reselect="regrow-units"
    )


def test_flags_override_the_file(tmp_path, asked):
    file = tmp_path / "settings.toml"
    file.write_text("seed = 3\n[mask]\ndensity = 0.25\n[train]\nepochs = 7\n")
    assert cli.main(["run", "--config", str(file), "--epochs", "2", "--data", "mnist"]) == 2
    (config,) = asked
    assert (config.seed, config.mask.density, config.train.epochs) == (3, 0.25, 2)
    assert config.data.name == "mnist"


def test_default_folder_is_named_by_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(config, root, *rest):
        seen.append(root)
        raise InputError("stop", expected="here", got="here")

    monkeypatch.setattr(experiment, "Run", stop)
    cli.main(["run", "--seed", "1"])
    cli.main(["run", "--seed", "2"])
    assert seen[0] != seen[1]
    assert str(seen[0]).startswith("runs/digits-mlp-0.05-linf-0.1-")


STATUS = {0: "pass", 1: "fail"}


@pytest.mark.parametrize("failing", [0, 1])
def test_run_and_train_end_with_verdicts(run_dir, tmp_path, failing, capsys):
    """A record that says a check failed: marked in the table, and with --strict exit code 1."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for flag in row.get("hygiene", {}).get("flags", ()):
            wrong = failing and (row["network"], flag["name"]) == ("random", "black box")
            flag |= {"value": 0.0125 if wrong else 0.0, "status": STATUS[int(wrong)]}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = ["dense, seed 0: passed", f"random, seed 0: {'failed' if failing else 'passed'}"]
    again = ["run", "--config", str(copy / "config.toml"), "--run-dir", str(copy)]
    for command in ([*again, "--strict"], ["train", str(copy), "--strict"], ["train", str(copy)]):
        assert cli.main(command) == (1 if "--strict" in command and failing else 0)
        shown = capsys.readouterr().err
        lines = [x for x in shown.splitlines() if x.startswith("verdict of ")]
        assert [line.partition("; ")[0] for line in lines] == [f"verdict of {x}" for x in wanted]
        assert ("black box 0.0125, limit" in lines[1]) == bool(failing)
        assert (verdicts.REMEDIES["black box"] in lines[1]) == bool(failing)
        assert shown.rstrip().endswith(f"{2 - failing} of 2 passed, 0 warned, {failing} failed")
        assert ("random ✗" in shown) == (bool(failing) and command[0] == "run")
    page = (copy / "report.html").read_text()
    assert ('<li class="failed">random, seed 0: failed' in page) == bool(failing)


def test_warnings_are_one_line_each_and_once(run_dir, tmp_path, monkeypatch, capsys):
    def noisy(*arguments):
        warnings.simplefilter("always")
        for text in ("first of\n two lines", "second [bold]", "second [bold]"):
            warnings.warn(text, stacklevel=1)
        raise InputError("stop", expected="here", got="here")

    monkeypatch.setattr(experiment, "Run", noisy)
    assert cli.main(["run", "--run-dir", str(tmp_path)]) == 2
    error = "error: stop: expected here, got here"
    assert capsys.readouterr().err.splitlines() == [
        "warning: first of two lines",
        "warning: second [bold]",
        error,
    ]


def test_train_adds_a_network(run_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    assert cli.main(["train", str(copy), "--networks", "magnitude", "--strict"]) in (0, 1)
    printed = capsys.readouterr()
    assert "verdict of magnitude, seed 0: not judged" in printed.err
    assert f"ntk-awt evaluate {copy}" in printed.out
    assert (copy / "trained" / "magnitude.safetensors").exists()
    assert configs.load(copy / "config.toml").networks == ("dense", "random", "magnitude")


@pytest.fixture(scope="module")
def ticket_dir(tmp_path_factory):
    """The folder of `ntk-awt ticket`, search included, and what it printed."""
    folder = tmp_path_factory.mktemp("ticket")
    configs.save(CONFIG, folder / "config.toml")
    arguments = ["--config", str(folder / "config.toml"), "--run-dir", str(folder / "run")]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert cli.main(["ticket", *arguments]) == 0
    return folder / "run", printed.getvalue()


def test_ticket_makes_tickets_and_prints_the_layers(ticket_dir):
    root, printed = ticket_dir
    assert sorted(p.stem for p in (root / "tickets").iterdir()) == ["dense", "random", "ticket"]
    assert not (root / "trained").exists()
    assert "dense1/kernel" in printed


def test_evaluate_prints_and_writes_numbers(run_dir, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    arguments = ["evaluate", str(run_dir), "--steps", "2", "--epsilon", "0.05"]
    code = cli.main([*arguments, "--attacks", "pgd", "apgd-ce", "--json", str(out)])
    first = capsys.readouterr()
    written = json.loads(out.read_text())
    judged = [verdicts.verdict(row["network"], row["hygiene"]["flags"]) for row in written]
    assert code == any(one.status == "failed" for one in judged)
    last = first.err.splitlines()[-3:]
    assert last[-1] == f"verdicts: {verdicts.count(judged)}"
    for line, one in zip(last, judged, strict=False):
        assert line.startswith(f"verdict of {one.name}, seed 0: {one.status}")
    assert "checks pass" in first.err
    assert (run_dir / "figures" / "evaluate.svg").exists()
    assert [row["network"] for row in written] == ["dense", "random"]
    for row in written:
        assert row["epsilon"] == 0.05
        assert row["robust"]["n"] == 60
        assert [turn["attack"] for turn in row["attacks"]] == ["pgd", "apgd-ce"]
        assert row["robust"]["value"] <= min(turn["robust_accuracy"] for turn in row["attacks"])
    cli.main([*arguments, "--networks", "random"])
    assert "{" not in capsys.readouterr().out
    cli.main([*arguments, "--networks", "random", "--json", "-"])
    (alone,) = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert alone["robust"]["value"] == alone["attacks"][-1]["robust_accuracy"]
    assert [turn["attack"] for turn in alone["attacks"]] == ["apgd-ce", "apgd-t"]  # the run's


SOURCE = """
import jax.numpy as jnp
def network():
    return lambda w, x: x.reshape(len(x), -1) @ w, 30 * jnp.eye(4)[:, :3]
"""


def test_evaluate_takes_code_and_saved_networks(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_to_attack.py").write_text(SOURCE)
    x = np.random.default_rng(0).uniform(0.2, 0.8, (40, 2, 2, 1)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x=x, y=x.reshape(40, 4)[:, :3].argmax(1))
    arguments = ["evaluate", "mine_to_attack:network", "--images", "images.npz"]
    options = ["--threat", "l2", "--epsilon", "0.1", "--attacks", "pgd", "--steps", "20"]
    assert cli.main([*arguments, *options, "--json", "numbers.json"]) == 0
    (row,) = json.loads((tmp_path / "numbers.json").read_text())
    assert row["natural"]["value"] == 1
    # The margin between two logits falls by √2·ε at most.
    top = np.sort(x.reshape(40, 4)[:, :3], 1)[:, -2:]
    left = np.mean(np.diff(top)[:, 0] > 0.1 * 2**0.5)
    assert left <= row["robust"]["value"] <= left + 1 / 40  # PGD may miss one on the boundary
    assert (tmp_path / "evaluation" / "evaluate.svg").exists()

    file = run_dir / "trained" / "random.safetensors"
    cli.main(["evaluate", str(file), "--steps", "2", "--json", "saved.json"])
    (row,) = json.loads((tmp_path / "saved.json").read_text())
    assert row["network"] == "random"
    assert row["robust"]["n"] == 60
    assert "mask" in [flag["name"] for flag in row["hygiene"]["flags"]]


@pytest.mark.parametrize("inputs", ["clean", "adversarial", "mixed"])
def test_kernel_is_saved_and_drawn(run_dir, tmp_path, inputs):
    out = tmp_path / "kernel.npz"
    arguments = ["kernel", str(run_dir), "--network", "random", "--inputs", inputs]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    with np.load(out) as saved, np.load(run_dir / "dynamics/random/epoch-0001.npz") as records:
        kernel, recorded = saved["kernel"], records["kernel"][0]
        names = [str(saved[name]) for name in ("network", "state", "inputs", "outputs")]
        assert saved["x1"].shape == (4, 8, 8, 1)
        assert ("x2" in saved) == (inputs == "mixed")
        assert saved["labels"].shape == (4,)
    assert names == ["random", "initial", inputs, "full"]
    assert kernel.shape == (4, 4, 10, 10)
    expected = {"mixed": recorded[:4], "adversarial": recorded[4:]}.get(inputs)
    if expected is not None:
        np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert out.with_suffix(".svg").exists()
    assert out.with_suffix(".png").exists()


# ---------------------------------------------------------------- kernels of any source

MINE = """
import numpy as np
import jax

rng = np.random.default_rng(0)
PARAMS = {"a": rng.normal(size=(12, 7)) / 4, "b": rng.normal(size=(7, 3)) / 3}
PARAMS = {name: w.astype("float32") for name, w in PARAMS.items()}


def apply(params, x):
    return jax.nn.relu(x.reshape(len(x), -1) @ params["a"]) @ params["b"]


def build():
    return apply, PARAMS


def alone():
    return apply


def whole():
    return apply, {"a": PARAMS["a"], "b": 3}


def broken():
    return apply, PARAMS["c"]


def flat():
    return lambda params, x: x.sum(), PARAMS


not_callable = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module of the user's own and with images; it is the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_network", raising=False)
    (tmp_path / "my_network.py").write_text(MINE)
    (tmp_path / "my_broken_network.py").write_text("import no_such_module\n")
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(5, 2, 2, 3))
    np.savez(tmp_path / "images.npz", x=x, y=np.array([0, 1, 2, 1, 0]))
    np.save(tmp_path / "more.npy", rng.uniform(size=(4, 2, 2, 3)).astype("float32"))
    np.save(tmp_path / "bytes.npy", np.zeros((4, 2, 2, 3), "uint8"))
    np.save(tmp_path / "wide.npy", np.zeros((4, 3, 2, 3), "float32"))
    np.savez(tmp_path / "nameless.npz", z=x)
    np.savez(tmp_path / "labels.npz", x=x, y=np.array([0, 1, 2, 1, 3]))
    (tmp_path / "torn.npy").write_bytes((tmp_path / "more.npy").read_bytes()[:150])
    return tmp_path


def formula(x1, x2, relu=True):
    """The kernel of `my_network` from its derivatives by hand, in float64.

    ∂f_c/∂b[j, c] = h_j and ∂f_c/∂a[i, j] = x_i·1[u_j > 0]·b[j, c] with u = x·a, h = relu(u).
    """
    found = {}
    exec(MINE, found)
    a, b = (w.astype(float) for w in found["PARAMS"].values())
    x1, x2 = (x.astype(np.float32).astype(float).reshape(len(x), -1) for x in (x1, x2))
    u1, u2 = x1 @ a, x2 @ a
    open1, open2 = (1.0 * ((u > 0) | (not relu)) for u in (u1, u2))
    paths = np.einsum("nj,mj,ja,jb->nmab", open1, open2, b, b)
    hidden = (u1 * open1) @ (u2 * open2).T
    return (x1 @ x2.T)[:, :, None, None] * paths + hidden[:, :, None, None] * np.eye(3)


def reduced(kernel, outputs):
    """One of the forms of a full kernel."""
    diagonal = np.einsum("nmaa->nma", kernel)
    forms = {"full": kernel, "diagonal": diagonal, "trace": diagonal.mean(-1)}
    return forms[outputs] if outputs in forms else diagonal[:, :, outputs]


def close(found, expected):
    """Equal up to float32 rounding."""
    return np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def numbers(kernel, outputs, labels):
    """Every metric from its definition, in float64."""
    kernel = kernel.mean(-1) if outputs == "diagonal" else kernel
    y = np.eye(3)[labels] if isinstance(outputs, str) else np.eye(3)[labels][:, [outputs]]
    if outputs == "full":
        matrix = kernel.transpose(0, 2, 1, 3).reshape(15, 15)
        wanted = np.outer(y.ravel(), y.ravel())
    else:
        matrix, wanted = kernel, y @ y.T
    sizes = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[::-1]
    shares = sizes / sizes.sum()
    some = shares[shares > 0]
    mean = outputs in ("diagonal", "trace")  # stands for itself ⊗ I
    whole = np.kron(matrix, np.eye(3)) if mean else matrix
    return {
        "trace": np.trace(whole),
        f"norm ‖Θ{'̄ ⊗ I‖_F, Θ̄ the mean over outputs' if mean else '‖_F'}": np.linalg.norm(whole),
        "effective rank": np.exp(-(some * np.log(some)).sum()),
        "condition number": sizes[0] / sizes[-1],
        "spectrum mass, top 1": shares[0],
        f"spectrum mass, top {min(10, len(sizes))}": shares[:10].sum(),
        "label alignment": (matrix * wanted).sum() / np.sqrt((matrix**2).sum() * (wanted**2).sum()),
    }


def metrics(file):
    """Values by name from a --json file; every one has a unit."""
    rows = json.loads(file.read_text())["metrics"]
    assert all(row["unit"] for row in rows)
    return {row["name"]: row["value"] for row in rows}


def check_numbers(written, kernel, outputs, labels):
    wanted = numbers(kernel, outputs, labels)
    other = numbers(kernel, outputs, np.array([0, 0, 2, 1, 2]))
    # A kernel that is singular, or nearly so, has a condition number of rounding.
    condition = written.pop("condition number")
    assert condition > 1e4 or condition == pytest.approx(wanted["condition number"], rel=0.1)
    del wanted["condition number"], other["condition number"]
    assert written == pytest.approx(wanted, rel=1e-4)
    assert written != pytest.approx(other, rel=1e-4)


def test_kernel_of_ones_own_code(mine, capsys):
    arguments = ["kernel", "my_network:build", "--images", "images.npz"]
    assert cli.main([*arguments, "--json", "numbers.json"]) == 0
    shown = capsys.readouterr()
    stem = "kernel-my_network-build-images"
    with np.load("images.npz") as given, np.load(f"{stem}.npz") as file:
        x, labels, found = given["x"], given["y"], file["kernel"]
        np.testing.assert_array_equal(file["labels"], labels)
        assert close(file["x1"], x)
    assert close(found, formula(x, x))
    assert not close(found, formula(x, x, relu=False))
    record = json.loads((mine / "numbers.json").read_text())
    assert (record["network"], record["inputs"]) == ("my_network:build", "images")
    check_numbers(metrics(mine / "numbers.json"), formula(x, x), "full", labels)
    pictures = [f"{stem}{kind}" for kind in ("", "-spectrum", "-eigenvectors", "-specialisation")]
    for picture in pictures:
        assert f"picture: {picture}.svg" in shown.out
        assert (mine / f"{picture}.png").stat().st_size > 1000
    assert len(list(mine.glob("*.svg"))) == len(pictures)
    # The plan comes first, then the table, with units.
    assert shown.err.index("engine layerwise") < shown.err.index("logits² / parameter²")


@pytest.mark.parametrize("outputs", ["diagonal", "trace", 2])
def test_other_outputs_of_a_kernel(mine, outputs):
    source = inspection.open_source("my_network:build")
    images = inspection.choose_inputs(source, images=mine / "images.npz")
    plan = inspection.plan(source, images, outputs)
    result = inspection.compute(source, images, plan)
    expected = reduced(formula(images.x1, images.x1), outputs)
    assert close(result.kernel, expected)
    assert not close(result.kernel, expected[::-1])
    written = {metric.name: metric.value for metric in inspection.measure(result)}
    check_numbers(written, expected, outputs, images.labels)
    drawn = {"kernel", "spectrum", "eigenvectors"} | (
        {"specialisation"} if outputs == "diagonal" else set()
    )
    assert set(inspection.figures(result)) == drawn
    ending = f"kernel-my_network-build-images-{outputs}.npz"
    assert str(inspection.default_file(source, images, plan)) == ending


def test_mixed_kernel_of_two_files(mine):
    arguments = ["kernel", "my_network:build", "--images", "images.npz", "--images2", "more.npy"]
    out = ["--out", "found/mixed.npz", "--json", "numbers.json", "--engine", "products"]
    assert cli.main([*arguments, *out, "--batch", "3"]) == 0
    with np.load("images.npz") as file:
        expected = formula(file["x"], np.load("more.npy"))
    with np.load("found/mixed.npz") as file:
        assert close(file["kernel"], expected)
        assert not close(file["kernel"], expected[:, ::-1])
        np.testing.assert_array_equal(file["x2"], np.load("more.npy"))
        assert "labels" not in file
    record = json.loads((mine / "numbers.json").read_text())
    assert (record["engine"], record["shape"]) == ("products", [5, 4, 3, 3])
    values = np.linalg.svd(expected.transpose(0, 2, 1, 3).reshape(15, 12), compute_uv=False)
    written = metrics(mine / "numbers.json")
    assert not {"trace", "label alignment"} & set(written)
    assert written["spectrum mass, top 1"] == pytest.approx(values[0] / values.sum(), rel=1e-4)
    assert sorted(p.name for p in (mine / "found").glob("*.svg")) == [
        "mixed-spectrum.svg",
        "mixed.svg",
    ]


def test_a_number_that_is_not_finite_is_null(mine):
    """Two equal images, none of class 2: a singular kernel, without alignment to that class."""
    np.savez("twice.npz", x=np.ones((2, 2, 2, 3)), y=np.array([0, 1]))
    source = inspection.open_source("my_network:build")
    images = inspection.choose_inputs(source, images=mine / "twice.npz")
    result = inspection.compute(source, images, inspection.plan(source, images, 2))
    rows = inspection.record(result, inspection.measure(result))["metrics"]
    written = {row["name"]: row["value"] for row in rows}
    assert written["condition number"] is None
    assert written["label alignment"] is None
    assert written["effective rank"] == pytest.approx(1, abs=1e-4)


def same(one, two):
    """Whether two pytrees have equal leaves."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def ticket_of(source):
    return (source.network.params, source.mask, source.gain)


def test_saved_ticket_alone_and_in_its_run(run_dir, tmp_path):
    """A file gives what its run gives, also without the run."""
    run = experiment.open_run(run_dir)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.uniform(size=(3, 8, 8, 1)))
    for state, load in (("initial", run.load_ticket), ("trained", run.load_trained)):
        inside = run.paths.ticket("random") if state == "initial" else run.paths.trained("random")
        alone = tmp_path / f"{state}.safetensors"
        shutil.copyfile(inside, alone)
        sources = [
            inspection.open_source(str(run_dir), "random", state),
            inspection.open_source(str(inside)),
            inspection.open_source(str(alone)),
        ]
        kernels = []
        for source in sources:
            assert same(ticket_of(source), load("random"))
            images = inspection.choose_inputs(source, images=tmp_path / "images.npy")
            plan = inspection.plan(source, images, "trace")
            kernels.append(inspection.compute(source, images, plan).kernel)
        np.testing.assert_array_equal(kernels[0], kernels[1])
        np.testing.assert_allclose(kernels[0], kernels[2], rtol=1e-5)
        assert [source.run is None for source in sources] == [False, False, True]
        assert sources[1].state == state
    assert not same(run.load_ticket("random"), run.load_trained("random"))


def test_dense_network_is_taken_without_a_mask(run_dir):
    """All of a mask's entries kept, and gains of 1, are no mask, and cost less so."""
    assert inspection.open_source(str(run_dir)).mask is None
    assert inspection.open_source(str(run_dir), "random").mask is not None


def test_checkpoint_of_a_training(run_dir):
    run = experiment.open_run(run_dir)
    folder = run_dir / "checkpoints" / "train-random"
    for place in (folder, folder / "3"):
        source = inspection.open_source(str(place))
        assert same(ticket_of(source), run.load_trained("random"))
        assert not same(source.network.params, run.load_ticket("random").params)
        assert (source.name, source.state) == ("random", "train step 18")
    images = inspection.choose_inputs(source, "clean")
    np.testing.assert_array_equal(images.x1, run.probe[0])
    file = inspection.default_file(source, images, inspection.plan(source, images))
    assert file == run.paths.figures / "kernel-random-train-step-18-clean.npz"


def test_checkpoint_of_a_search(ticket_dir):
    root, _ = ticket_dir
    run = experiment.open_run(root)
    source = inspection.open_source(str(root / "checkpoints" / "search-ticket"))
    assert same(ticket_of(source), run.load_ticket("ticket"))
    assert not same(source.network.params, run.load_ticket("random").params)
    assert source.state == "search step 6"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_netwrk:build"], "module my_netwrk: expected a module in"),
        (["my_network.part:build"], "module my_network.part: expected a module in"),
        (["my_network:biuld"], "got 'biuld'; did you mean 'build'?"),
        (["my_network:not_callable"], "function of my_network: expected one of"),
        (["my_network:alone"], "result of my_network:alone: expected a tuple (apply, params)"),
        (["my_network:whole"], "params of my_network:whole: b: expected an array of floats"),
        (["my_network:broken"], "got KeyError: 'c' (my_network.py, line 27)"),
        (["my_broken_network:build"], "got ModuleNotFoundError: No module named 'no_such_module'"),
        (["my_network:build"], "--images: expected FILE.npy or FILE.npz, since this source"),
        (["my_network:flat", "--images", "more.npy"], "logits of my_network:flat: expected shape"),
        (["my_network:build", "--images", "none.npy"], "images none.npy: expected a .npy or .npz"),
        (["my_network:build", "--images", "torn.npy"], "images torn.npy: expected a .npy or .npz"),
        (["my_network:build", "--images", "nameless.npz"], "expected an array x in it, got z"),
        (["my_network:build", "--images", "bytes.npy"], "convert first"),
        (
            ["my_network:build", "--images", "wide.npy"],
            "expected code that JAX can trace on these images, got",
        ),
        (["my_network:build", "--images", "labels.npz"], "labels: expected labels in 0…2"),
        (["my_network:build", "--images2", "more.npy"], "--images2: expected --images with it"),
        (["my_network:build", "--network", "dense"], "--network: expected none"),
        (["my_network:build", "--state", "trained"], "--state: expected none"),
        (
            ["my_network:build", "--images", "more.npy", "--inputs", "clean"],
            "--inputs: expected none with --images",
        ),
        (
            ["my_network:build", "--images", "more.npy", "--outputs", "3"],
            "number of a logit, 0…2, got 3",
        ),
        (
            ["my_network:build", "--images", "more.npy", "--outputs", "all"],
            "outputs: expected one of diagonal, full, trace",
        ),
        (["my_network:build", "--images", "more.npy", "--out", "k.svg"], "ends in .npz"),
        (["none.safetensors"], "ticket none.safetensors: expected a safetensors file"),
        (["more.npy"], "run folder more.npy: expected a folder with config.toml"),
        (["checkpoints/train-dense"], "run folder"),
    ],
)
def test_bad_sources_are_one_line_and_leave_nothing(mine, arguments, message, capsys):
    before = sorted(mine.iterdir())
    assert cli.main(["kernel", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    shutil.rmtree(mine / "__pycache__", ignore_errors=True)
    assert sorted(mine.iterdir()) == before
    assert str(mine) not in sys.path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "expected the model that it belongs to, got no model; put it back"),
        ({"model": "{}", "input_shape": "[8, 8, 1]"}, "got no num_classes"),
        ({"model": "{", "input_shape": "[8]", "num_classes": "3"}, "expected JSON"),
        ({"model": "{}", "input_shape": "8", "num_classes": "3"}, "input_shape: expected a list"),
        (
            {"model": '{"nam": "mlp"}', "input_shape": "[8]", "num_classes": "3"},
            "did you mean 'name'",
        ),
        (
            {"model": "{}", "input_shape": "[8]", "num_classes": "3"},
            "params dense1/bias: expected a leaf of shape",
        ),
    ],
)
def test_ticket_file_that_does_not_say_its_model(tmp_path, metadata, message, capsys):
    weights = {"a": np.ones((2, 2), np.float32)}
    ticket = masks.dense(weights)
    masks.save_ticket(ticket, tmp_path / "mine.safetensors", metadata)
    assert cli.main(["kernel", str(tmp_path / "mine.safetensors")]) == 2
    assert message in capsys.readouterr().err


def terminal(width):
    """A terminal of that width, and what is printed there."""
    printed = io.StringIO()
    return Console(file=printed, width=width, force_terminal=True, color_system=None), printed


HEADERS = ("density", "network", *(f"{name} distance [rel.²]" for name in "abcdefghij"))
CELLS = ["0.03", "snip-robust", *(f"{i}8.76 ± 0.12" for i in range(10))]


@pytest.mark.parametrize(("width", "columns"), [(20, 0), (80, 3), (200, 10)])
def test_a_narrow_terminal_shows_fewer_columns_and_cuts_no_number(width, columns):
    console, printed = terminal(width)
    tables.show_plain(console, HEADERS, [CELLS])
    assert sum(f"{i}8.76 ± 0.12" in printed.getvalue() for i in range(10)) == columns
    assert "…" not in printed.getvalue()
    assert "0.03" in printed.getvalue()
    assert max(map(len, printed.getvalue().splitlines())) <= width
    said = " ".join(printed.getvalue().split())
    assert ("too narrow a terminal for: " in said) == (columns < 10)
    for name in "abcdefghij"[columns:]:
        assert f"{name} distance [rel.²]" in said


def test_a_pipe_has_no_width():
    printed = io.StringIO()
    tables.show_plain(Console(file=printed, width=20), HEADERS, [CELLS], "a title " * 30)
    assert all(cell in printed.getvalue() for cell in CELLS)
    assert all(header in printed.getvalue() for header in HEADERS)
    assert "narrow" not in printed.getvalue()


def test_the_least_important_columns_go_first_and_prose_wraps_between_words():
    columns = (
        tables.Column("network", 0),
        tables.Column("unimportant", 2),
        tables.Column("measured", 1, prose=True),
        tables.Column("important", 0),
    )
    row = ("random", "1234567", "some words that go on", "7654321")
    console, printed = terminal(44)
    tables.show(console, columns, [row])
    text = printed.getvalue()
    assert "7654321" in text
    assert "1234567" not in text
    assert {"some", "words", "that", "go", "on", "random"} <= set(text.replace("│", " ").split())
    assert "too narrow a terminal for: unimportant" in text
    console, printed = terminal(30)
    tables.show(console, columns, [row])
    assert "some" not in printed.getvalue()
    assert "too narrow a terminal for: unimportant, measured" in " ".join(
        printed.getvalue().split()
    )


def test_a_finished_bar_has_no_rate(monkeypatch):
    console, printed = terminal(120)
    monkeypatch.setattr(progress, "console", console)
    with progress.Bars().bar("[1/2 density 0.1 seed 0] dense: train", 2, "epochs") as show:
        show(1)
        show(2)
    last = [line for line in printed.getvalue().splitlines() if "2/2" in line][-1]
    assert "[1/2 density 0.1 seed 0] dense: train" in last
    assert "2/2 epochs" in last
    assert "/s" not in last
    assert "left" not in last


def test_status_is_shown_on_a_terminal_only(monkeypatch):
    for terminal in (True, False):
        written = io.StringIO()
        monkeypatch.setattr(progress, "console", Console(file=written, force_terminal=terminal))
        with progress.Bars().status("kernel"):
            pass
        assert ("kernel" in written.getvalue()) == terminal


def test_report_redraws_one_and_compares_two(run_dir, tmp_path):
    assert cli.main(["report", str(run_dir)]) == 0
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    page = tmp_path / "pages" / "both.html"
    assert cli.main(["report", str(run_dir), str(other), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("<td>random</td>") == 2
    assert "data:image/svg+xml" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "--density", "0"], "density: expected a number in (0, 1]"),
        (["run", "--epsilon", "-1"], "epsilon: expected a number in [0, ∞)"),
        (["run", "--config", "no.toml"], "config file no.toml"),
        (["run", "--config"], "a TOML file after it"),
        (["run", "--config="], "a TOML file after it"),
        (["run", "--preset"], "one of digits, mnist, cifar10 after it"),
        (["run", "--preset", "mnits"], "did you mean 'mnist'"),
        (["run", "--preset", "mnist", "--config", "no.toml"], "expected one of them, got both"),
        (["sweep", "no.toml"], "config file no.toml"),
        (["sweep"], "required"),
        (["evaluate", "nowhere"], "run folder nowhere"),
        (["kernel", "nowhere"], "run folder nowhere"),
        (["train", "nowhere"], "run folder nowhere"),
        (["report", "nowhere"], "run folder nowhere"),
        (["report"], "run folders: expected one or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--networks", "tickt"], "expected one of dense, random"),
        (["evaluate", "--steps", "-1"], "evaluation_steps: expected"),
        (["evaluate", "--attacks", "pdg"], "attack: expected one of apgd-ce"),
        (["evaluate", "--threat", "l1"], "threat model: expected one of"),
        (["evaluate", "--images", "images.npz"], "--images: expected none"),
        (["evaluate", "--out", "folder"], "--out: expected none"),
        (["kernel", "--state", "final"], "expected one of initial, trained"),
        (["kernel", "--inputs", "dirty"], "expected one of adversarial, clean, mixed"),
        (["train", "--networks", "tickt"], "did you mean 'ticket'"),
    ],
)
def test_bad_choice_on_a_saved_run(run_dir, arguments, message, capsys):
    assert cli.main([arguments[0], str(run_dir), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
