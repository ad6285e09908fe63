"""Strength of APGD against the public PyTorch AutoAttack, on networks and flags in the fixtures.

`python -m benchmarks.parity` attacks the same test images of each network that
`tests/fixtures/make_parity.py` gave to the reference, with 100 steps and 9 targets, and writes
`benchmarks/results/attacks-parity.json`. The two draw other random starts. Needs the data sets
(NTK_AWT_DATA) and, unlike the reference, no PyTorch.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntk_awt import data, files, models
from ntk_awt.app.config import DataConfig, ModelConfig
from ntk_awt.attacks import ATTACKS
from ntk_awt.files import versions
from ntk_awt.robustness.accuracy import measure
from ntk_awt.threats import L2, Linf
from ntk_awt.types import Split
from tests.fixtures.make_parity import CASES, FIXTURES, POINTS

RESULTS = Path(__file__).parent / "results" / "attacks-parity.json"


def rows_of(name: str) -> list[dict[str, Any]]:
    """One row for each norm and attack on one network; accuracies in per cent of the points."""
    case, fixture = CASES[name], np.load(FIXTURES / f"{name}.npz")
    dataset = data.load(DataConfig(case.data), 0)
    config = ModelConfig(name=case.model, widths=case.widths)
    network = models.build(config, dataset.image_shape, 10, jax.random.key(0))
    params = {
        layer: {leaf: jnp.asarray(fixture[f"{layer}/{leaf}"], jnp.float32) for leaf in leaves}
        for layer, leaves in network.params.items()
    }
    x, y = dataset.x_test[:POINTS], dataset.y_test[:POINTS]
    rows = []
    for norm, threat in (("linf", Linf(case.linf)), ("l2", L2(case.l2))):
        for attack in ("apgd-ce", "apgd-t"):
            found = measure(
                network.replace(params=params),
                Split(x, y),
                threat,
                ATTACKS[attack](steps=100),
                key=jax.random.key(0),
                batch_size=250,
            )
            if not np.array_equal(found.natural_correct, fixture["natural"]):
                raise AssertionError(f"{name}: other predictions on clean images")
            theirs = fixture[f"robust/{norm}/{attack}"]
            rows.append(
                {
                    "network": name,
                    "threat": norm,
                    "epsilon": getattr(case, norm),
                    "attack": attack,
                    "points": len(y),
                    "natural": 100 * found.natural.value,
                    "ours": 100 * found.robust.value,
                    "reference": 100 * float(theirs.mean()),
                    "only_ours_breaks": int(np.sum(theirs & ~found.robust_correct)),
                    "only_reference_breaks": int(np.sum(~theirs & found.robust_correct)),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Compare all networks that have a fixture and write the table."""
    names = [name for name in CASES if (FIXTURES / f"{name}.npz").is_file()]
    rows = [row for name in names for row in rows_of(name)]
    differences = [row["ours"] - row["reference"] for row in rows]
    summary = {
        "mean_difference": float(np.mean(differences)),
        "largest_difference": float(np.max(np.abs(differences))),
        "reference": "pyautoattack 0.2.0, torch 2.5.1, CPU",
        "versions": versions(),
        "rows": rows,
    }
    files.write_json(RESULTS, summary)


if __name__ == "__main__":
    main()
