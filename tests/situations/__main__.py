"""Print the situations, what came beside what is right; exit with 1 where one differs."""

import sys
import traceback

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.situations import Outcome, Situation, collect


def outcome(one: Situation) -> Outcome:
    """What came of a situation; an error that nobody expects is one that differs."""
    try:
        return one.outcome()
    except Exception as error:
        traceback.print_exc()
        return Outcome(f"{type(error).__name__}: {error}", "no error", False)


def main(words: list[str]) -> int:
    """Run the situations whose name has one of the words, all if there are none."""
    chosen = [one for one in collect() if not words or any(word in one.name for word in words)]
    console = Console(stderr=True)
    outcomes = [outcome(one) for one in track(chosen, "situations", console=console)]
    table = Table("situation", "came", "right", "agrees", show_lines=True)
    for one, found in zip(chosen, outcomes, strict=True):
        table.add_row(one.name, found.came, found.right, "yes" if found.agrees else "NO")
    width = None if sys.stdout.isatty() else 160
    Console(width=width, markup=False, highlight=False).print(table)
    differing = sum(not found.agrees for found in outcomes)
    print(f"{len(outcomes) - differing} of {len(outcomes)} agree")
    return 1 if differing or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
