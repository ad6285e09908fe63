"""Statements P1–P3 hold, and planted defects of the package are caught."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from ntk_awt.theory.dynamics import flow, preservation
from ntk_awt.theory.dynamics.preservation import Trajectory
from proofs_check import p1_identity, p2_posterior, p3_prior
from proofs_check.instances import trainings
from tests.proofs import check, why

SLOW = ("test_single_precision_is_caught",)

PLANTED = ("_attacked", "_trajectory", "_terms", "_defect")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces a function, and forgets what was trained and compiled with another one."""

    def forget() -> None:
        trainings._trainings.cache_clear()
        for name in PLANTED:
            getattr(preservation, name).clear_cache()

    def patch(module: Any, name: str, function: Any) -> None:
        monkeypatch.setattr(module, name, function)
        forget()

    yield patch
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("name", ["P1", "P2", "P3"])
def test_it_holds(name: str):
    result = check(name)
    assert result.holds, why(result)
    assert result.outcome.panels
    assert not result.outcome.skipped


def failing(name: str, **options: Any) -> list[str]:
    """The complaints about a statement that must not hold."""
    result = check(name, **options)
    assert not result.holds
    return why(result)


def unmasked(apply: Any, params: Any, x1: Any, x2: Any, **options: Any) -> Any:
    """Kernels whose Jacobian sees pruned weights."""
    return EMPIRICAL(apply, params, x1, x2, **options | {"jacobian": "full"})


EMPIRICAL: Any = preservation.empirical


@pytest.mark.parametrize("name", ["P1", "P2", "P3"])
def test_an_unmasked_kernel_is_caught(name: str, plant: Callable[..., None]):
    plant(preservation, "empirical", unmasked)
    assert any("random" in line for line in failing(name))


def summed(kernel: Any, gradients: Any) -> Any:
    """The change of outputs without 1/N."""
    return len(gradients) * flow.output_change(kernel, gradients)


@pytest.mark.parametrize("name", ["P1", "P2"])
def test_a_missing_mean_is_caught(name: str, plant: Callable[..., None]):
    plant(preservation, "_changes", jax.vmap(summed))
    assert any("library" in line for line in failing(name))


def test_a_missing_mean_in_the_prior_bound_is_caught(plant: Callable[..., None]):
    plant(preservation, "_distance", lambda a, b: preservation.jnp.linalg.norm(a - b))
    assert any("(a)" in line and "library" in line for line in failing("P3"))


def test_a_missing_attack_is_caught(plant: Callable[..., None]):
    """The points of the sparse network are left clean."""
    found = preservation.attacked_path

    def forgetful(apply: Any, path: Any, x: Any, y: Any, **options: Any) -> Any:
        points = found(apply, path, x, y, **options)
        dense = all(leaf.all() for leaf in jax.tree.leaves(path.mask))
        return points if dense else 0 * points + x

    plant(preservation, "attacked_path", forgetful)
    assert any("random, own attack: D_k" in line for line in failing("P1"))


def test_single_precision_is_caught(monkeypatch: pytest.MonkeyPatch):
    right = np.array([1.0, 0.5, 0.25]), np.array([[4.0, 2.0, 1.0]] * 3), np.ones((3, 3))
    monkeypatch.setattr(p1_identity, "remainders", lambda *arguments: right)  # not the order
    assert any("D_k" in line for line in failing("P1", precision="float32"))


def test_a_bound_without_its_remainder_is_caught(monkeypatch: pytest.MonkeyPatch):
    found = preservation._terms

    def shortened(dense: Trajectory, sparse: Trajectory) -> Any:
        terms = found(dense, sparse)
        return terms._replace(rest=0 * terms.rest)

    monkeypatch.setattr(preservation, "_terms", shortened)
    for name in ("P2", "P3"):
        assert any("library" in line for line in failing(name))


@pytest.mark.parametrize("part", [p2_posterior, p3_prior])
def test_a_bound_that_is_never_violated_is_caught(part: Any, monkeypatch: pytest.MonkeyPatch):
    """A rule that always says yes leaves the controls unrejected."""
    yes = part.below("yes", 1.0, 1.0)
    monkeypatch.setattr(part, "below", lambda *arguments: yes)
    name = part.STATEMENT.number
    assert any(line.startswith("control") for line in failing(name))


def test_missing_images_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    monkeypatch.setenv("NTK_AWT_DATA", str(tmp_path))
    t = trainings.Trainings("default", 0, 8, 6)
    pairs = (
        trainings.Pair(trainings.MLP_CE, "random"),
        trainings.Pair(trainings.MNIST_CE, "random"),
    )
    found, skipped = t.available(pairs)
    assert found == [pairs[0]]
    (reason,) = skipped
    assert reason.startswith(pairs[1].label)
    assert "no such file" in reason
