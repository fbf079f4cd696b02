"""A line through measurements that outliers do not bend: the median of the slopes of all pairs (Theil and Sen)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median


@dataclass(frozen=True, slots=True)
class Line:
    a: float
    b: float

    def at(self, x: float) -> float:
        return self.a + self.b * x


def robust_line(points: Sequence[tuple[float, float]]) -> Line:
    """y = a + b * x."""
    slopes = [
        (y - other_y) / (x - other_x)
        for (other_x, other_y), (x, y) in combinations(points, 2)
        if x != other_x
    ]
    b = median(slopes) if slopes else 0.0
    return Line(median(y - b * x for x, y in points), b)
