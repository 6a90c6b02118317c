"""Results tables of several seeds as one: means, deviations, intervals.

Two errors are told apart. Seeds say how far training by chance differs; their interval is that of
Student's t over the seeds' means. The cases are a sample of users, too: a rate over them has
Wilson's interval. That holds for hit rates; for NDCG, whose cases have values between 0 and 1, it
is the most that the error can be. Coverage and what is weighted by eCPM have none. Two methods that
were asked the same cases differ by less than that: their difference case by case has an interval of
its own.

Knows nothing of how the tables were made or are shown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import gains_of_cases
from leadre_lib.report import METRIC_ORDER

Row = dict[str, Any]

OURS = "leadre"
SFT, DPO = "leadre-sft", "leadre-dpo"
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


@dataclass(frozen=True)
class Paired:
    """How far two methods differ on the same cases: the mean, and half its 95 % interval."""

    mean: float
    half: float


def paired(own: Sequence[pa.Table], other: Sequence[pa.Table]) -> dict[str, Paired]:
    """Own less other of each metric that is a mean over cases.

    A user's cases, those of other seeds among them, are one draw: the error is that of sums by user
    (cluster-robust; Cameron and Miller 2015, A Practitioner's Guide to Cluster-Robust Inference,
    section II). What training by chance adds is not in it.

    Args:
        own, other: rows of `case_ranks` of one method, a table a seed, of the same cases.

    Raises:
        LeadreError: they are of other cases.
    """
    parts = [_gaps(*tables) for tables in zip(own, other, strict=True)]
    users = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)[1]
    found = {}
    for name in set.intersection(*(set(part[1]) for part in parts)):
        gap, weight = (np.concatenate([part[1][name][n] for part in parts]) for n in (0, 1))
        mean = float(np.average(gap, weights=weight))
        by_user = np.bincount(users, weights=weight * (gap - mean))
        error = math.sqrt((by_user**2).sum()) / float(weight.sum())
        found[name] = Paired(mean, NORMAL * error)
    return found


def _gaps(
    own: pa.Table, other: pa.Table
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Users [cases], and by metric the gain of own less that of other, and the weight [cases]."""
    own, other = own.sort_by("case_id"), other.sort_by("case_id")
    if own["case_id"] != other["case_id"]:
        raise LeadreError("variants were asked other cases: nothing to compare case by case")
    ecpm = pc.fill_null(own["target_ecpm"], math.nan).to_numpy()
    gains, less = (
        gains_of_cases(pc.fill_null(table["rank"], math.inf).to_numpy(), ecpm)
        for table in (own, other)
    )
    gaps = {
        name: (gain - less[name][0], np.ones(len(gain)) if weight is None else weight)
        for name, (gain, weight) in gains.items()
    }
    return own["user_id"].to_numpy(zero_copy_only=False), gaps


def written_as(stage: str, methods: Collection[str]) -> str | None:
    """What `evaluate` calls a stage: `leadre`, if that is the one that challenges, and only the
    other one `leadre-sft` or `leadre-dpo`. None where it was not trained.

    Args:
        stage: `leadre-sft`, `leadre-dpo`, or any other method, which is called what it is.
        methods: all that were evaluated.
    """
    challenges = {SFT: SFT not in methods, DPO: SFT in methods}
    if stage not in methods and challenges.get(stage, False):
        stage = OURS
    return stage if stage in methods else None


def with_stages(table: Sequence[Row]) -> dict[str, Row]:
    """One seed's rows by method, with the stages that were trained under their own names."""
    rows = {row["method"]: row for row in table}
    stages = {stage: written_as(stage, rows) for stage in (SFT, DPO)}
    return rows | {
        stage: {**rows[name], "method": stage} for stage, name in stages.items() if name is not None
    }


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
        is_stage = name in (SFT, DPO)
        if is_stage and [{**row, "method": OURS} for row in rows] == ours:
            continue
        found.append(over_seeds(name, rows))
    return sorted(found, key=lambda method: not method.name.startswith(OURS))


def metric_names(rows: Sequence[Method]) -> list[str]:
    """The metrics that occur, in the order of the results table."""
    return in_order({name for row in rows for name in row.metrics})


def in_order(found: Set[str]) -> list[str]:
    """Metrics in the order of the results table."""
    return [name for name in METRIC_ORDER if name in found] + sorted(found - set(METRIC_ORDER))


def binomial_interval(metric: str, value: float, cases: int) -> tuple[float, float] | None:
    """The 95 % interval of a rate over `cases` (Wilson 1927, which holds near 0 and 1 too); None
    where the metric is no mean over them.
    """
    if not metric.startswith(("HR@", "NDCG@")):
        return None
    square = NORMAL**2 / cases
    middle = (value + square / 2) / (1 + square)
    half = NORMAL / (1 + square) * math.sqrt((value * (1 - value) + square / 4) / cases)
    return max(middle - half, 0.0), min(middle + half, 1.0)


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
