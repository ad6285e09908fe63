"""Robust accuracy: one attack, several, whether to trust it, bounds."""
