"""Step sizes while optimising: constant, or falling along a cosine."""

from collections.abc import Callable
from typing import Any

import optax

SCHEDULES: dict[str, Callable[[float, int], Any]] = {
    "constant": lambda peak, steps: peak,
    "cosine": optax.cosine_decay_schedule,
}
"""Schedules by name: `(peak step size, steps) -> step size or Optax schedule`."""
