"""Predictions of adversarial-training dynamics, and bounds on how far two networks drift apart.

`flow`: gradient flow and frozen kernels (theory D1–D3). `infinite`: adversarial training of an
infinitely wide network (D4). `preservation`: the gap between a dense and a sparse network (P1–P3).
`intervals`: rigorous bounds over a threat set (P4). `existence`: how wide a network must be for a
random mask to do (E1, E5).
"""
