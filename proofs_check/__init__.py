"""Numerical verification of the theory: one file a statement, float64, with controls.

`python -m proofs_check` or `ntk-awt verify` runs it; `core` says what a check is, `verification`
lists the statements. It imports the package, never the reverse; bounds are stated here once more,
in NumPy, independently of the library's.
"""
