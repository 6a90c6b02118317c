"""Results tables of several seeds as one: means, deviations, intervals.

Two errors are told apart. Seeds say how far training by chance differs; their interval is that of
Student's t over the seeds' means. The cases are a sample of users, too: a rate p over n of them has
the binomial standard error sqrt(p (1 - p) / n), and Wilson's interval. That holds for hit rates;
for NDCG, whose cases have values between 0 and 1, it is the most that the error can be. Coverage
and what is weighted by eCPM are no means over cases and have none.

Knows nothing of how the tables were made or are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leadre_lib.report import METRIC_ORDER

Row = dict[str, Any]

OURS = "leadre"
NO_METRIC = frozenset({"method", "cases"})
LEVEL = 0.95
NORMAL = 1.959964  # of 95 %, two-sided


@dataclass(frozen=True)
class Over:
    """Values of one measure over seeds, in the order of the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        """Their standard deviation as a sample (n - 1); None for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def half(self) -> float | None:
        """Half the 95 % interval of the mean, by Student's t; None for one seed."""
        from scipy import stats

        count = len(self.values)
        if self.sd is None:
            return None
        return float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * self.sd / math.sqrt(count)

    def minus(self, other: Over) -> Over:
        """The differences, seed by seed."""
        return Over(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Method:
    """One row of the table over seeds. `cases`: the mean number of them."""

    name: str
    metrics: dict[str, Over]
    cases: int

    @property
    def seeds(self) -> int:
        """In how many seeds it is."""
        return max((len(over.values) for over in self.metrics.values()), default=0)


def with_stages(table: Sequence[Row]) -> dict[str, Row]:
    """One seed's rows by method, with both stages under their own names.

    `evaluate` writes `leadre` for the stage that challenges, and only the other one as
    `leadre-sft` or `leadre-dpo`. Here `leadre-sft` is always there, and `leadre-dpo` where there
    was DPO.
    """
    rows = {row["method"]: row for row in table}
    sft, dpo = f"{OURS}-sft", f"{OURS}-dpo"
    if OURS in rows:
        if sft in rows:
            rows.setdefault(dpo, {**rows[OURS], "method": dpo})
        else:
            rows[sft] = {**rows[OURS], "method": sft}
    return rows


def over_seeds(name: str, rows: Sequence[Row]) -> Method:
    """One method's rows of several seeds; metrics that not every seed has are left out."""
    shared = [
        key
        for key in rows[0]
        if key not in NO_METRIC and all(row.get(key) is not None for row in rows)
    ]
    metrics = {key: Over(tuple(float(row[key]) for row in rows)) for key in shared}
    return Method(name, metrics, round(float(np.mean([row["cases"] for row in rows]))))


def methods(tables: Sequence[Sequence[Row]]) -> list[Method]:
    """Every method over the seeds, our own first; a stage that is `leadre` in every seed is not
    said twice. Methods that some seed lacks are left out.
    """
    named = [with_stages(table) for table in tables]
    found = []
    for name in dict.fromkeys(name for rows in named for name in rows):
        if not all(name in rows for rows in named):
            continue
        rows = [rows[name] for rows in named]
        ours = [rows.get(OURS) for rows in named]
        is_stage = name in (f"{OURS}-sft", f"{OURS}-dpo")
        if is_stage and [{**row, "method": OURS} for row in rows] == ours:
            continue
        found.append(over_seeds(name, rows))
    return sorted(found, key=lambda method: not method.name.startswith(OURS))


def metric_names(rows: Sequence[Method]) -> list[str]:
    """The metrics that occur, in the order of the results table."""
    found = {name for row in rows for name in row.metrics}
    return [name for name in METRIC_ORDER if name in found] + sorted(found - set(METRIC_ORDER))


def binomial_error(metric: str, value: float, cases: int) -> float | None:
    """The standard error of a rate over `cases`; None where the metric is no mean over them."""
    return math.sqrt(value * (1 - value) / cases) if _is_mean(metric) else None


def binomial_interval(metric: str, value: float, cases: int) -> tuple[float, float] | None:
    """The 95 % interval of a rate over `cases` (Wilson 1927, which holds near 0 and 1 too); None
    where the metric is no mean over them.
    """
    if not _is_mean(metric):
        return None
    square = NORMAL**2 / cases
    middle = (value + square / 2) / (1 + square)
    half = NORMAL / (1 + square) * math.sqrt((value * (1 - value) + square / 4) / cases)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _is_mean(metric: str) -> bool:
    return metric.startswith(("HR@", "NDCG@"))


def as_json(row: Method) -> Row:
    """A row of the JSON: means, and deviations beside them where there are several seeds."""
    made: Row = {"method": row.name}
    for name, over in row.metrics.items():
        made[name] = round(over.mean, 9)
        if over.sd is not None:
            made[f"{name} sd"] = round(over.sd, 9)
    return {**made, "seeds": row.seeds, "cases": row.cases}


def plus_minus(value: float, error: float | None, sign: bool = False) -> str:
    """`0.1302 ± 0.0021`, without the error where it is not known."""
    text = f"{value:+.4f}" if sign else f"{value:.4f}"
    return text if error is None else f"{text} ± {error:.4f}"
