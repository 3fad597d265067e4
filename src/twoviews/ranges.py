"""Numbers with limits, declared once in a signature: `temperature: Annotated[float, Range(above=0)]`.

The entry points compare every configuration value with the annotation of the parameter it goes to, so a paper's
hyper-parameter has one name, one place and one stated range.
"""

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Annotated, Literal


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
            (isinstance(value, int) or math.isfinite(value))  # of a large whole number it would fail
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        return self.words()

    def words(self, value: float = 0) -> str:
        """What `value` must be, such as "at least 1"; a technical limit is named only to a value above it."""
        names = {"above": "above", "at_least": "at least", "below": "below", "at_most": "at most"}
        limits = [
            f"{word} {_number(limit)}"
            for key, word in names.items()
            if (limit := getattr(self, key)) is not None and (limit not in TECHNICAL or value > limit)
        ]
        return (" and ".join(limits) or "finite") + (f" (usual: {self.usual})" if self.usual else "")


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


@dataclass(frozen=True)
class Length:
    """How many elements a list may have; without it, any number but none."""

    at_least: int = 0
    at_most: int | None = None

    def __contains__(self, value: Sized) -> bool:
        return self.at_least <= len(value) and (self.at_most is None or len(value) <= self.at_most)

    def __str__(self) -> str:
        if self.at_least == self.at_most:
            return f"exactly {self.at_least}"
        return f"at least {self.at_least}" + ("" if self.at_most is None else f" and at most {self.at_most}")


MANY = 10**9  # of anything that is done again and again
LARGEST = 1e30  # parameters are in float32, which has nothing above 3.4e38, and rates are multiplied by the batch size
TECHNICAL = (MANY, LARGEST)  # upper limits far above what anybody wants
# What memory is needed for: only the data and the machine can say how many are too many (twoviews.memory).
Size = Annotated[int, Range(at_least=1)]
Repeats = Annotated[int, Range(at_least=1, at_most=200)]  # of what is made one after the other: layers, views, draws
Count = Annotated[int, Range(at_least=1, at_most=MANY)]
NonNegativeInt = Annotated[int, Range(at_least=0, at_most=MANY)]  # counts that may be 0
Trials = Annotated[int, Range(at_least=1, at_most=100_000)]
Seed = Annotated[int, Range(at_least=0)]
Total = Annotated[int, Range(at_least=0)]  # of what adds up: bytes, steps
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
Temperature = Annotated[float, Range(above=0, usual="0.05 to 0.5")]
EmaMomentum = Annotated[float, Range(at_least=0, below=1, usual="0.99 to 0.999")]
Rate = Annotated[float, Range(above=0, at_most=LARGEST)]
Decay = Annotated[float, Range(at_least=0, at_most=LARGEST)]
LrScaling = Literal["none", "linear", "sqrt"]
Severity = Annotated[int, Range(at_least=1, at_most=5)]
Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
