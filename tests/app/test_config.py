"""Settings: ranges, TOML and back, the digest that names the run folder."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_awt.app import config as configs
from ntk_awt.app.config import (
    DataConfig,
    MaskConfig,
    ModelConfig,
    RunConfig,
    ThreatConfig,
    VariantConfig,
    digest,
    from_dict,
    identity,
    load,
    run_name,
    save,
    to_dict,
)
from ntk_awt.errors import InputError

CHOICES = {
    "pooling": ["max", "average"],
    "parametrization": ["standard", "ntk"],
    "fan": ["in", "average"],
    "distribution": ["normal", "truncated"],
    "gain": ["energy", "none"],
    "ticket_schedule": ["cosine", "constant"],
    "distance": ["relative", "absolute"],
    "jacobian": ["masked", "full"],
    "matching": ["distances", "kl"],
    "pairs": ["all", "halves"],
    "estimator": ["exact", "probes"],
    "inputs": ["dense", "sparse", "both", "natural"],
    "attack_labels": ["random", "true"],
    "reselect": ["regrow", "regrow-units", "magnitude"],
}
"""Settings with a fixed list of values."""

RANGES = {"seed": (0, 2**32 - 1), "ticket_batch_size": (2, 2**31 - 1)}
"""Integer settings that may not be every number from 1 on."""

NOT_HASHED = {"networks", "variants", "data.data_dir"}

VARIANT = VariantConfig("awt", mask={"density": 0.5}, ticket={"solver": "concrete"})


def settings_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and type of every setting below the dataclass `cls`."""
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from settings_of(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name, kind


SETTINGS = dict(settings_of(RunConfig))


def replace(config: Any, name: str, value: Any) -> Any:
    """`config` with the setting `name` (e.g. `train.epochs`) changed."""
    first, _, rest = name.partition(".")
    inner = replace(getattr(config, first), rest, value) if rest else value
    return dataclasses.replace(config, **{first: inner})


def get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def values_of(name: str, kind: Any) -> st.SearchStrategy:
    """Values that the setting `name` may have."""
    last = name.rpartition(".")[2]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    if last == "networks":
        return st.lists(text, unique=True).map(lambda names: ("dense", *set(names) - {"dense"}))
    if last in CHOICES:
        return st.sampled_from(CHOICES[last])
    if isinstance(kind, types.UnionType):
        return st.none() | values_of(name, typing.get_args(kind)[0])
    if last == "attacks":
        return st.lists(text, min_size=1, unique=True).map(tuple)
    if kind == tuple[int, ...]:
        return st.lists(st.integers(1, 4096), max_size=4).map(tuple)
    if last == "variants":
        return st.dictionaries(text, st.builds(lambda name: VariantConfig(name), text), max_size=2)
    low, high = RANGES.get(last, (1, 2**31 - 1))
    return {
        bool: st.booleans(),
        int: st.integers(low, high),
        float: st.floats(1e-12, 0.9, exclude_min=True),
        str: text,
        Path: text.map(Path),
    }[kind]


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    values = {name: draw(values_of(name, kind)) for name, kind in SETTINGS.items()}
    values["ticket.balance"] &= values["ticket.matching"] == "distances"  # nothing else to balance

    def make(cls: type, prefix: str) -> Any:
        return cls(
            **{
                name: make(typing.cast(type, kind), f"{prefix}{name}.")
                if dataclasses.is_dataclass(kind)
                else values[prefix + name]
                for name, kind in typing.get_type_hints(cls).items()
            }
        )

    return make(RunConfig, "")


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        ("seed", -1, "[0, "),
        ("seed", 2**32, "[0, "),
        ("networks", ("ticket",), "dense among them, got ticket; every other network"),
        ("networks", (), "dense among them, got nothing"),
        ("networks", ("dense", "ticket", "ticket"), "each once, got dense, ticket, ticket"),
        ("data.train_size", 0, "[1, ∞)"),
        ("data.test_size", -5, "[1, ∞)"),
        ("data.validation_fraction", 0.0, "(0, 0.9]"),
        ("data.validation_fraction", 0.95, "(0, 0.9]"),
        ("model.widths", (10, 0), "[1, ∞)"),
        ("model.weight_std", 0.0, "(0, ∞)"),
        ("model.bias_std", -0.1, "[0, ∞)"),
        ("model.pooling", "avg", "one of average, max, got 'avg'"),
        ("model.parametrization", "ntx", "one of ntk, standard, got 'ntx'; did you mean 'ntk'?"),
        ("mask.density", 0.0, "(0, 1]"),
        ("mask.density", 1.01, "(0, 1]"),
        ("mask.gain", "enrgy", "one of energy, none, got 'enrgy'; did you mean 'energy'?"),
        ("threat.epsilon", -0.1, "[0, ∞)"),
        ("threat.epsilon", float("nan"), "[0, ∞)"),
        ("threat.epsilon", float("inf"), "[0, ∞)"),
        ("attack.attack_steps", -1, "[0, ∞)"),
        ("attack.attack_step_ratio", 0.0, "(0, ∞)"),
        ("ticket.ticket_steps", 0, "[1, ∞)"),
        ("ticket.ticket_learning_rate", 0.0, "(0, ∞)"),
        ("ticket.ticket_batch_size", 0, "[1, ∞)"),
        ("ticket.kernel_weight", -1.0, "[0, ∞)"),
        ("ticket.reselect_every", -1, "[0, ∞)"),
        ("ticket.reselect_fraction", 0.0, "(0, 1]"),
        ("ticket.ticket_records", 0, "[1, ∞)"),
        ("ticket.score_learning_rate", 0.0, "(0, ∞)"),
        ("ticket.target_weight", -1.0, "[0, ∞)"),
        ("ticket.temperature", 0.0, "(0, ∞)"),
        ("ticket.rounds", 0, "[1, ∞)"),
        ("ticket.patience", -1, "[0, ∞)"),
        ("ticket.matching", "KL", "one of distances, kl"),
        ("ticket.pairs", "half", "one of all, halves"),
        ("ticket.estimator", "probe", "one of exact, probes"),
        ("ticket.inputs", "clean", "one of both, dense, natural, sparse"),
        ("ticket.reselect", "magnitud", "one of magnitude, regrow, regrow-units"),
        ("ticket.distance", "abs", "one of absolute, relative"),
        ("ticket.jacobian", "dense", "one of full, masked"),
        ("train.epochs", 0, "[1, ∞)"),
        ("train.epochs", 2.5, "a whole number in [1, 2³¹), got 2.5"),
        ("train.epochs", 2**31, "a whole number in [1, 2³¹)"),
        ("train.learning_rate", 1e31, "a number in (0, 1e+30], got 1e+31"),
        ("train.batch_size", 0, "[1, ∞)"),
        ("train.learning_rate", 0.0, "(0, ∞)"),
        ("train.weight_decay", -1e-4, "[0, ∞)"),
        ("train.trades_beta", -1.0, "[0, ∞)"),
        ("record.probe_size", 0, "[1, ∞)"),
        ("record.records_per_epoch", 0, "[1, ∞)"),
        ("evaluation.attacks", (), "one or more, each once"),
        ("evaluation.attacks", ("pgd", "pgd"), "one or more, each once"),
        ("evaluation.evaluation_steps", -1, "[0, ∞)"),
        ("evaluation.evaluation_restarts", 0, "[1, ∞)"),
    ],
)
def test_value_out_of_range(name: str, bad: Any, expected: str):
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        replace(RunConfig(), name, bad)
    assert name.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kernel_weight": 0.0, "target_weight": 0.0}, "target_weight: expected one above 0"),
        ({"pairs": "halves", "ticket_batch_size": 1}, "ticket_batch_size: expected at least 2"),
        ({"solver": "saliency", "matching": "kl"}, "solver saliency: expected matching distances"),
        ({"solver": "saliency", "estimator": "probes"}, "got distances, probes, balance False"),
        ({"solver": "saliency", "rounds": 10, "ticket_steps": 6}, r"rounds: expected .*\[1, 6\]"),
        ({"balance": True, "matching": "kl"}, "balance: expected two distances"),
        ({"balance": True, "kernel_weight": 0.0}, r"weights 1 \(target\) and 0 \(kernel\)"),
    ],
)
def test_settings_of_a_search_must_agree(values: dict[str, Any], expected: str):
    with pytest.raises(InputError, match=expected):
        from_dict({"ticket": values})


@pytest.mark.parametrize("name", [n for n, kind in SETTINGS.items() if kind in (int, float)])
@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf")])
def test_every_number_is_checked(name: str, bad: float):
    with pytest.raises(InputError, match=name.rpartition(".")[2]):
        replace(RunConfig(), name, bad)


@pytest.mark.parametrize(
    ("name", "edge"),
    [
        ("seed", 2**32 - 1),
        ("data.train_size", 1),
        ("data.validation_fraction", 0.9),
        ("model.widths", ()),
        ("model.bias_std", 0.0),
        ("mask.density", 1.0),
        ("threat.epsilon", 0.0),
        ("attack.attack_steps", 0),
        ("ticket.reselect_every", 0),
    ],
)
def test_edge_of_the_range_is_allowed(name: str, edge: Any):
    assert get(replace(RunConfig(), name, edge), name) == edge


# ---------------------------------------------------------------- TOML and back


@settings(max_examples=50, deadline=None)
@given(run_configs())
def test_toml_round_trip(config: RunConfig):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        save(config, path)
        loaded = load(path)
    assert loaded == config
    assert digest(loaded) == digest(config)
    assert from_dict(to_dict(config)) == config


def test_defaults_and_whole_numbers():
    assert from_dict({}) == RunConfig()
    epsilon = from_dict({"threat": {"epsilon": 1}}).threat.epsilon
    assert type(epsilon) is float
    assert epsilon == 1
    assert "train_size" not in to_dict(RunConfig())["data"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"trian": {}},
            r"setting in config: expected one of .*train.*, got 'trian'; did you mean 'train'\?",
        ),
        (
            {"train": {"epoch": 3}},
            r"setting in config.train: expected one of batch_size, .*epochs.*got 'epoch'; "
            r"did you mean 'epochs'\?",
        ),
        ({"seed": "0"}, r"config.seed: expected a value of type int, got '0'"),
        ({"seed": True}, r"config.seed: expected a value of type int, got True"),
        ({"seed": 1.0}, r"config.seed: expected a value of type int, got 1.0"),
        ({"mask": {"density": "0.1"}}, r"config.mask.density: .* float, got '0.1'"),
        ({"mask": {"density": True}}, r"config.mask.density: .* float, got True"),
        ({"data": {"name": 3}}, r"config.data.name: .* str, got 3"),
        ({"data": {"data_dir": 3}}, r"config.data.data_dir: .* Path, got 3"),
        ({"data": {"train_size": 10.0}}, r"config.data.train_size: .* int, got 10.0"),
        ({"data": {"train_size": True}}, r"config.data.train_size: .* int, got True"),
        ({"model": {"widths": [10, "20"]}}, r"config.model.widths: .* int, got '20'"),
        ({"model": {"widths": [10, 20.0]}}, r"config.model.widths: .* int, got 20.0"),
        ({"model": {"widths": 10}}, r"config.model.widths: .* list, got 10"),
        ({"networks": "dense"}, r"config.networks: .* list, got 'dense'"),
        ({"networks": ["dense", 1]}, r"config.networks: .* str, got 1"),
        ({"model": 3}, r"config.model: expected a table of settings, got 3"),
        ({"variants": {"a": {}}}, r"config.variants.a: expected the setting method, got none"),
        ({"variants": {"a": {"methd": "awt"}}}, r"setting in config.variants.a: .* 'method'\?"),
        ({"variants": {"a": {"method": "awt", "mask": 3}}}, r"config.variants.a.mask: .* dict"),
        ({"model": [{"name": "mlp"}]}, r"config.model: expected a table of settings"),
        ({"mask": {"density": 2.0}}, r"density: expected a number in \(0, 1\], got 2.0"),
    ],
)
def test_bad_setting_is_named(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        from_dict(values)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_checks_its_type(name: str):
    """A value of no type that TOML can stand for is rejected wherever it is put."""
    values: Any = object()
    for part in reversed(name.split(".")):
        values = {part: values}
    with pytest.raises(InputError, match=rf"config\.{name}: expected a value of type"):
        from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = \n", r"config file .*run\.toml: expected valid TOML, got .*line 1"),
        (b"seed = 1\nseed = 2", r"config file .*run\.toml: expected valid TOML"),
        (b"\xff\xfe", r"config file .*run\.toml: expected valid TOML, got .*decode"),
        (b"sed = 1", r"setting in run\.toml: expected one of .*did you mean 'seed'\?"),
        (b"seed = 1979-05-27", r"run\.toml\.seed: expected a value of type int"),
        (None, r"config file .*run\.toml: expected a TOML file, got .*No such file"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(path)


def test_folder_is_no_config(tmp_path: Path):
    with pytest.raises(InputError, match="expected a TOML file, got"):
        load(tmp_path)


# ---------------------------------------------------------------- digest


def another(name: str, value: Any, kind: Any) -> Any:
    """A valid value of the setting `name` that differs from `value`."""
    last = name.rpartition(".")[2]
    if last in CHOICES:
        return next(choice for choice in CHOICES[last] if choice != value)
    if kind == Path | None:
        return Path("elsewhere")
    if kind == int | None:
        return 7
    if typing.get_origin(kind) is tuple:
        return (*value, typing.get_args(kind)[0](17))
    if last == "variants":
        return {"mine": VARIANT}
    changes = {
        bool: lambda: not value,
        int: lambda: value - 1 if value > 1 else value + 1,
        float: lambda: 0.5 * value if value else 0.25,
        str: lambda: value + "x",
    }
    return changes[kind]()


@pytest.mark.parametrize("name", SETTINGS)
def test_digest_depends_on_what_decides_the_numbers(name: str):
    config = RunConfig()
    changed = replace(config, name, another(name, get(config, name), SETTINGS[name]))
    assert changed != config
    assert (digest(changed) == digest(config)) == (name in NOT_HASHED)
    assert (name in identity(config)) == (name not in NOT_HASHED)


def test_a_later_setting_at_its_default_keeps_the_digest():
    """Runs of before it was there are found again, and are runs with the default."""
    config = RunConfig(seed=3)
    later = {
        f"{stage.name}.{f.name}"
        for stage in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(getattr(config, stage.name))
        for f in dataclasses.fields(getattr(config, stage.name))
        if f.metadata.get("hash") == "unless default"
    }
    assert {"train.criterion", "ticket.matching"} < later
    earlier = {k: v for k, v in identity(config).items() if k not in later}
    text = json.dumps(earlier, sort_keys=True)
    assert digest(config) == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert identity(from_dict({"seed": 3, "train": {"loss": "adversarial"}})) == identity(config)


def test_digests_of_single_changes_all_differ():
    """So the digest covers each setting under its own name, not only its value."""
    config = RunConfig()
    found = {
        digest(replace(config, name, another(name, get(config, name), kind)))
        for name, kind in SETTINGS.items()
        if name not in NOT_HASHED
    }
    assert len(found) == len(SETTINGS) - len(NOT_HASHED)
    assert all(re.fullmatch("[0-9a-f]{8}", text) for text in found)


def test_digest_is_the_same_in_another_process():
    code = "from ntk_awt.app.config import *; print(digest(RunConfig(seed=5)))"
    root = Path(configs.__file__).parents[1]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == digest(RunConfig(seed=5))


def test_equal_configs_have_equal_digests():
    one, other = (RunConfig(threat=ThreatConfig(epsilon=value)) for value in (1, 1.0))
    assert one == other
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (RunConfig(), "digits-mlp-0.05-linf-0.1-"),
        (
            RunConfig(
                data=DataConfig(name="../my/images.npz"),
                model=ModelConfig(name="conv4"),
                mask=MaskConfig(density=0.5),
                threat=ThreatConfig(name="l2", epsilon=1.0),
            ),
            "images.npz-conv4-0.5-l2-1-",
        ),
        (RunConfig(data=DataConfig(name="hub:mnist")), "hub-mnist-mlp-"),
    ],
)
def test_run_name(config: RunConfig, start: str):
    name = run_name(config)
    assert name.startswith(start)
    assert name.endswith(f"-{digest(config)}")
    assert Path(name).name == name
