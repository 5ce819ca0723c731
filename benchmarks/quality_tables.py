"""What quality.py prints and draws: tables of rows, which are figures by the heading of their column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np

from pyda8w4._svg import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Series, chart

Row = Mapping[str, Any]  # a pair is a mean and its standard error

_STYLES = [
    (colour, mark, line)
    for line in ("solid", "dashed")
    for colour, mark in (
        (GREY, "hexagon"),
        (BLUE, "up"),
        (ORANGE, "down"),
        (BLACK, "circle"),
        (PURPLE, "plus"),
        (RED, "diamond"),
        (GREEN, "square"),
        (SKY, "star"),
    )
]


@dataclass(frozen=True)
class Table:
    """Rows of one model, with the format of each column. `loss` is the column that a plot shows, if there is one."""

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    loss: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns)]
        lines += [[self._cell(row, column) for column in self.columns] for row in self.rows]
        return "\n".join([self.title, "", *(f"| {' | '.join(cells)} |" for cells in lines)])

    def _cell(self, row: Row, column: str) -> str:
        value = row.get(column, "")
        parts = value if isinstance(value, tuple) else (value,)
        return " ± ".join(part if isinstance(part, str) else format(part, self.columns[column]) for part in parts)

    def plot(self, title: str) -> str:
        """The loss over the size, with a line for each quantizer, whose points are sizes of groups."""
        found: dict[str, list[tuple[float, float]]] = {}
        first: dict[str, str] = {}  # the activations of each quantizer that its line is not named after
        for row in self.rows:
            if row.get("groups of"):
                name, act = row["weights"], row["activations"]
                loss = row[self.loss][0] if isinstance(row[self.loss], tuple) else row[self.loss]
                line = name if first.setdefault(name, act) == act else f"{name}, {act}"
                found.setdefault(line, []).append((row["bits"], loss))
        series = [
            Series(name, points, colour, line, mark)
            for (name, points), (colour, mark, line) in zip(found.items(), _STYLES)
        ]
        bits = [x for points in found.values() for x, _ in points]
        ticks = [tick / 4 for tick in range(floor(4 * min(bits)), ceil(4 * max(bits)) + 1)]
        return chart(title, "bits per weight", self.loss, series, x_ticks=ticks)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error, which a single value does not have."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)
