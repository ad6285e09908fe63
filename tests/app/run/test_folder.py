"""Readers of a run folder: beside a live run, without permission to write, without loading data."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ntk_awt.app import config as configs
from ntk_awt.app import evaluations, sources
from ntk_awt.app.run import stages
from ntk_awt.app.run.folder import Paths, RunFolder, is_complete
from ntk_awt.app.run.records import Dynamics, Evaluated, Made, Searched, TrainedEpoch, from_row
from ntk_awt.app.run.writer import Silent, Writer
from ntk_awt.errors import InputError
from tests.app.run.test_stages import CONFIG, numbers, run, same_arrays

SMALL = dataclasses.replace(
    CONFIG, networks=("dense", "ticket"), train=dataclasses.replace(CONFIG.train, epochs=2)
)


def lines(root: Path) -> str:
    """`metrics.jsonl` as it is, without the times."""
    return re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', (root / "metrics.jsonl").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an undisturbed run; tests leave it as it is."""
    root = tmp_path_factory.mktemp("whole") / "run"
    run(SMALL, root)
    return root


def test_readers_beside_a_live_run_change_nothing(whole, tmp_path):
    """Four readers in a loop: records, a kernel's network, a checkpoint, an evaluation."""
    root = tmp_path / "run"
    paths, stop = Paths(root), threading.Event()
    seen: Counter[str] = Counter()
    failures: list[Exception] = []

    def look() -> bool:
        if not paths.config.exists():
            return False
        folder = RunFolder.open(root)
        assert all(row.network in ("dense", "ticket") for row in folder.records)
        folder.verdicts()
        is_complete(root, SMALL)
        return True

    def kernel() -> bool:
        return paths.ticket("dense").exists() and bool(sources.open_source(str(root)))

    def checkpoint() -> bool:
        folder = paths.checkpoints("train", "dense")
        saved = folder.is_dir() and any(p.name.isdecimal() for p in folder.iterdir())
        return saved and bool(sources.open_source(str(folder)))

    def evaluate() -> bool:
        if not paths.trained("dense").exists():
            return False
        request = evaluations.Request(("pgd",), steps=1, epsilon=0.05 + 1e-4 * seen["evaluate"])
        return bool(evaluations.evaluate_run(root, request, ("dense",), Silent()))

    def repeat(read: Callable[[], bool]) -> None:
        while not stop.is_set() and not failures:
            try:
                seen[read.__name__] += read()
            except Exception as error:
                failures.append(error)
            stop.wait(0.02)

    readers = [
        threading.Thread(target=repeat, args=(read,))
        for read in (look, kernel, checkpoint, evaluate)
    ]
    for thread in readers:
        thread.start()
    try:
        run(SMALL, root)
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    assert not failures
    assert all(seen[read] for read in ("look", "kernel", "checkpoint", "evaluate")), seen
    assert lines(root) == lines(whole)
    assert numbers(root) == numbers(whole)
    same_arrays(whole, root)
    assert not list(root.rglob("*.partial*"))
    assert not paths.lock.exists()


def test_a_folder_that_may_not_be_written_can_be_read(whole, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    places = [root, *root.rglob("*")]

    def state() -> dict:
        return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in places}

    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = state()
    try:
        folder = RunFolder.open(root)
        assert len(folder.records) == len((whole / "metrics.jsonl").read_text().splitlines())
        assert folder.results == RunFolder.open(whole).results
        assert [one.status for one in folder.verdicts()]
        assert is_complete(root, SMALL)
        assert sources.open_source(str(root), "ticket", "trained").mask is not None
        for name in ("train-dense", "search-ticket"):
            assert sources.open_source(str(root / "checkpoints" / name)).state
    finally:
        after = [root, *root.rglob("*")]
        for path in places:
            path.chmod(0o755)
    assert after == places
    assert state() == before


def test_opening_a_folder_makes_none(tmp_path):
    with pytest.raises(InputError, match=r"a folder with config\.toml, got none"):
        RunFolder.open(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_rows_and_records_are_the_same(whole):
    """Every row of a run has a record, with the same values in the same order."""
    text = (whole / "metrics.jsonl").read_text()
    records = RunFolder.open(whole).records
    assert {type(record) for record in records} == {Searched, TrainedEpoch, Dynamics, Evaluated}
    assert "".join(json.dumps(record.to_row()) + "\n" for record in records) == text
    row = {"stage": "ticket", "network": "random", "step": 0, "seconds": 1.5}
    assert from_row(row) == Made("random", 0, 1.5)
    with pytest.raises(InputError, match="row of stage train: expected a value epoch, got none"):
        from_row(row | {"stage": "train"})


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_line_that_is_being_written_is_left_out(whole, tmp_path, cut):
    configs.save(SMALL, tmp_path / "config.toml")
    text = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(text[:4]) + text[4][:cut])
    found = RunFolder.open(tmp_path).records
    assert len(found) == (5 if cut == -1 else 4)  # without its line break it is whole


COMPLETE = """
import json, sys, time
from pathlib import Path
from ntk_awt.app import config
from ntk_awt.app.run.folder import is_complete
root = Path(sys.argv[1])
found = is_complete(root, config.load(root / "config.toml"))
heavy = ["flax", "optax", "orbax.checkpoint", "sklearn", "ntk_awt.data", "ntk_awt.training"]
loaded = [name for name in heavy if name in sys.modules]
print(json.dumps([found, loaded, time.process_time()]))
"""


def test_what_is_complete_is_told_by_the_files_alone(whole, tmp_path):
    command = [sys.executable, "-c", COMPLETE, str(whole)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, loaded, seconds = json.loads(said)
    assert found
    assert loaded == []
    assert seconds < 5  # 2 where nothing else runs


def test_what_is_missing_or_bad_is_not_complete(whole, tmp_path):
    assert is_complete(whole, SMALL)
    assert is_complete(whole, dataclasses.replace(SMALL, networks=("ticket", "dense")))
    assert not is_complete(whole, dataclasses.replace(SMALL, seed=1))
    assert not is_complete(whole, dataclasses.replace(SMALL, networks=("dense",)))
    assert not is_complete(whole, dataclasses.replace(SMALL, networks=("dense", "ticket", "snip")))
    for name in ("report.html", "trained/ticket.safetensors", "evaluation/dense.npz"):
        root = tmp_path / Path(name).name
        shutil.copytree(whole, root)
        (root / name).unlink()
        assert not is_complete(root, SMALL)
    for name in ("results.json", "metrics.jsonl", "config.toml"):
        root = tmp_path / name
        shutil.copytree(whole, root)
        (root / name).write_text("{")
        assert not is_complete(root, SMALL)
    root = tmp_path / "other rows"
    shutil.copytree(whole, root)
    text = (root / "metrics.jsonl").read_text()
    (root / "metrics.jsonl").write_text(text.replace('"status": "pass"', '"status": "fail"'))
    assert not is_complete(root, SMALL)


def test_evaluations_beside_a_writer_need_no_lock(whole, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    with Writer(SMALL, root), pytest.raises(InputError, match="no other writer"):
        stages.opened(SMALL, root).__enter__()
    with Writer(SMALL, root):
        request = evaluations.Request(("pgd",), steps=1)
        (found,) = evaluations.evaluate_run(root, request, ("ticket",), Silent())
    assert found.network == "ticket"
