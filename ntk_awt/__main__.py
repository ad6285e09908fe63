"""The command line's start: Ctrl-C is handled before the imports, which take seconds."""

import sys

from ntk_awt.app import interrupts


def main() -> int:
    """Run the command of `sys.argv`; returns its exit code."""
    interrupts.install()
    from ntk_awt.app.cli import commands as cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
