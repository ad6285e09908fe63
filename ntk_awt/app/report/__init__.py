"""Self-contained pages of runs and sweeps."""
