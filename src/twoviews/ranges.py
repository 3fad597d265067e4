"""Numbers with limits, declared once in a signature: `temperature: Annotated[float, Range(above=0)]`.

The entry points compare every configuration value with the annotation of the parameter it goes to, so a paper's
hyper-parameter has one name, one place and one stated range.
"""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """An interval of numbers and what is usual in it; `usual` ends up in the error message."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    usual: str = ""

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        names = {"above": "above", "at_least": "at least", "below": "below", "at_most": "at most"}
        limits = [f"{word} {getattr(self, key):g}" for key, word in names.items() if getattr(self, key) is not None]
        return (" and ".join(limits) or "finite") + (f" (usual: {self.usual})" if self.usual else "")


Count = Annotated[int, Range(at_least=1)]
Index = Annotated[int, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
Temperature = Annotated[float, Range(above=0, usual="0.05 to 0.5")]
EmaMomentum = Annotated[float, Range(at_least=0, below=1, usual="0.99 to 0.999")]
Severity = Annotated[int, Range(at_least=1, at_most=5)]
