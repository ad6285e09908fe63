"""Solvers of the search for tickets."""
