"""`python -m proofs_check [NAME…]`: the same as `ntk-awt verify`."""

import sys

from ntk_awt.app.cli.commands import main

if __name__ == "__main__":
    sys.argv.insert(1, "verify")
    sys.exit(main())
