"""Runs one statement at the size of the test suite."""

from typing import Any

from proofs_check.runner import Result, verify


def check(name: str, **options: Any) -> Result:
    """The statement's result at the reduced size; `options` go to `verification.verify`."""
    (result,) = verify([name], **{"size": "reduced", **options})
    return result


def why(result: Result) -> list[str]:
    """What does not hold, for the message of a failing assertion."""
    failing = [f"{c.name}: {c.measured}" for c in result.outcome.cases if not c.holds]
    passed = [f"control {c.name}: {c.measured}" for c in result.outcome.controls if not c.rejected]
    return failing + passed + [f"no control breaks: {name}" for name in result.unbroken]
