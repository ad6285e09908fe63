"""`ntk-awt bench [NAME…] [--json FILE]`: run, print a table, write the rows."""

from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.table import Column, Table
from tyro.conf import Positional, arg

from ntk_awt import files
from ntk_awt.errors import choose

from . import attacks, kernels, tickets

BENCHMARKS = {"attacks": attacks.run, "kernels": kernels.run, "tickets": tickets.run}


def main(
    names: Positional[tuple[str, ...]] = (),
    json_file: Annotated[Path | None, arg(name="json")] = None,
) -> None:
    """Time ours and a peer in the same run.

    Args:
        names: which benchmarks; all if not given.
        json_file: write the rows there as well.
    """
    for name in names:
        choose("benchmark", name, BENCHMARKS)
    files.check_output("--json", json_file, ".json")
    with jax.default_matmul_precision("highest"):  # or a GPU's peers would compute in TF32
        rows = [row for name in names or BENCHMARKS for row in BENCHMARKS[name]()]
    headers = ("what", "ours", "peer", "unit", "peer / ours", "first call \\[s]", "peer is")
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for row in rows:
        ours, peer, ratio, first = (
            f"{row[key]:.3g}" for key in ("ours", "peer", "ratio", "compile_seconds")
        )
        table.add_row(row["name"], ours, peer, row["unit"], ratio, first, row["peer_name"])
    Console().print(table)
    if json_file is not None:
        files.write_json(json_file, rows)


if __name__ == "__main__":
    tyro.cli(main)
