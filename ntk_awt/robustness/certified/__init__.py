"""Bounds that hold for every allowed perturbation."""
