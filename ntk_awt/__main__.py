"""The command line's start: Ctrl-C is handled before the imports, which take seconds."""

import sys

from ntk_awt import __version__
from ntk_awt.app import interrupts


def main() -> int:
    """Run the command of `sys.argv`; returns its exit code."""
    if sys.argv[1:] == ["--version"]:
        print(f"ntk-awt {__version__}")
        return 0
    interrupts.install()
    from ntk_awt.app.cli import commands

    return commands.main()


if __name__ == "__main__":
    sys.exit(main())
