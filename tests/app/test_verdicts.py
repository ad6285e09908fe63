"""Verdicts: what recorded flags come to, and that every rule says what to do."""

import pytest

from ntk_awt.app import verdicts
from ntk_awt.app.verdicts import NOT_JUDGED, REMEDIES, Verdict, count, of_run, verdict
from ntk_awt.robustness.hygiene import Flag, flag


def record(name: str, value: float, *, otherwise: str = "fail") -> dict:
    return flag(name, value, 0.5, "share of images", "what it is", otherwise=otherwise)._asdict()


GOOD = record("batch", 0.1)
WARNED = record("zero gradient, dlr", 0.75, otherwise="warn")
FAILED = record("black box", 0.8125)


@pytest.mark.parametrize(
    ("flags", "status", "raised"),
    [
        ([], "passed", []),
        ([GOOD], "passed", []),
        ([GOOD, WARNED], "warned", [WARNED]),
        ([FAILED, GOOD, WARNED], "failed", [FAILED, WARNED]),
    ],
)
def test_status(flags: list, status: str, raised: list):
    found = verdict("dense, seed 3", flags)
    assert (found.status, list(found.raised)) == (status, raised)
    line = str(found)
    assert line.startswith(f"dense, seed 3: {status}")
    assert "\n" not in line
    for one in raised:
        for part in (one["name"], f"{one['value']:.3g}", "limit 0.5", REMEDIES[one["name"]]):
            assert part in line
    assert (GOOD["name"] in line) == (GOOD in raised)


def test_a_rule_of_another_version_is_said_too():
    assert "size 0.8, limit 0.5" in str(verdict("dense", [record("size", 0.8)]))


def test_of_a_run():
    networks = {"dense": [GOOD], "random": [FAILED]}
    results = {
        "seed": 4,
        "networks": {name: {"hygiene": {"flags": flags}} for name, flags in networks.items()},
    }
    found = of_run(results, "density 0.1, ")
    assert [one.status for one in found.values()] == ["passed", "failed"]
    assert found["random"].name == "random, density 0.1, seed 4"
    assert count([*found.values()]) == "1 of 2 passed, 0 warned, 1 failed"
    some = [*found.values(), Verdict("other", NOT_JUDGED, ())]
    assert count(some) == "1 of 3 passed, 0 warned, 1 failed, 1 not judged"


def test_what_is_to_be_done_is_one_sentence():
    assert all(text and "\n" not in text and text[-1] != "." for text in REMEDIES.values())
    assert set(Flag._fields) >= {"name", "value", "limit", "unit", "status", "meaning"}
    assert verdicts.STRONGER in str(verdict("dense", [FAILED]))
