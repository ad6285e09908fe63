"""A test double that several test files share."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Counting:
    """An attack that counts how often it is traced."""

    attack: Any
    traces: list[int] = field(default_factory=list, compare=False)

    def run(self, *arguments: Any) -> Any:
        self.traces.append(1)
        return self.attack.run(*arguments)
