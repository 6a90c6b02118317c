"""Our models and the baselines on the same evaluation cases, and the verdict on the challenger.

Knows nothing of where cases come from, or of how a release is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.catalogue import Catalogue
from leadre_lib.decoding import Decoder
from leadre_lib.evaluation import (
    WEIGHTED_HR,
    Histories,
    Ranked,
    Scorer,
    item_knn,
    nearest_titles,
    popularity,
    ranked_by_scores,
    ranked_in_lists,
)
from leadre_lib.fusion import Factors, Fusion, Written
from leadre_lib.generation import decode_distinct
from leadre_lib.sasrec import sasrec
from leadre_lib.settings import EvaluationSettings, SasrecSettings
from leadre_lib.signals import Taken

GATE = "HR@10"
TOP = 10
DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True)
class Cases:
    """Evaluation cases as rows of marketing objects. `ecpm` is NaN where a target has none."""

    prompts: list[str]
    histories: Histories
    target: np.ndarray
    ecpm: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


def cases_of(examples: pa.Table, catalogue: Catalogue) -> Cases:
    """Rows of `eval_examples` as cases; ads that the catalogue has forgotten leave a history.

    Whoever converted on an ad wanted what it sells: histories and targets are marketing objects.
    """
    lists = examples["history_ad_ids"].combine_chunks()
    rows = catalogue.object_rows(lists.flatten())
    lengths = pc.list_value_length(lists).to_numpy()
    histories = Histories(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), rows)
    ecpm = pc.fill_null(examples["target_ecpm"], float("nan")).to_numpy()
    return Cases(
        examples["prompt"].to_pylist(),
        histories.kept(rows >= 0),
        catalogue.object_rows(examples["target_ad_id"]),
        ecpm,
    )


@dataclass(frozen=True)
class Interactions:
    """Clicks and conversions that baselines and signals learn from, each user's in the order of
    time.

    Attributes:
        users: int64, a number a user.
        rows: int64, marketing objects.
        again: bool, whether the user had clicked on the same object just before. A click and the
            conversion that follows it are one step of a history; two conversions are two.
        converted: bool, conversion or click.
        times: int64, microseconds since the epoch.
    """

    users: np.ndarray
    rows: np.ndarray
    again: np.ndarray
    converted: np.ndarray
    times: np.ndarray

    def histories(self) -> Histories:
        """The steps of each user, oldest first."""
        steps = ~self.again
        counts = np.bincount(self.users[steps])
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Histories(offsets, self.rows[steps])

    def taken(self) -> Taken:
        """The steps of each user, and when they began."""
        times = self.times[~self.again]
        return Taken(self.histories(), (times.max(initial=0) - times) / DAY)

    def last_conversions(self, active: np.ndarray, by_day: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of each user the last conversion that asks for what a case of the evaluation asks for: an
        active object, with steps before the cutoff.

        Args:
            active: bool [objects].
            by_day: the cutoff is midnight before the conversion; else its own time.

        Returns:
            Places in the values of `histories`: of the conversions, and behind the last step that
            began before the cutoff, both int64 [users at most]. A click before midnight that led to
            a conversion after it is a step of the history and what is to be foretold.
        """
        steps = np.cumsum(~self.again)  # up to each row and with it
        moment = self.times - self.times % DAY if by_day else self.times
        opens = np.diff(self.users, prepend=-1) != 0
        begins = opens | (np.diff(moment, prepend=0) != 0)
        row = np.arange(len(steps))
        cutoff = np.maximum.accumulate(np.where(begins, row, 0))
        first = np.maximum.accumulate(np.where(opens, row, 0))
        ends = (steps - ~self.again)[cutoff]
        some = ends > (steps - ~self.again)[first]
        good = np.flatnonzero(self.converted & active[self.rows] & some)
        last = good[np.append(np.diff(self.users[good]) != 0, True)[: len(good)]]
        return steps[last] - 1, ends[last]


def interactions(behaviours: pa.Table, catalogue: Catalogue) -> Interactions:
    """The clicks and conversions on ads of the catalogue.

    Args:
        behaviours: `user_id`, `domain`, `event_type`, `item_id` and `event_time`, ordered by user
            and time.
    """
    chosen = pc.and_(
        pc.equal(behaviours["domain"], "ad"),
        pc.is_in(behaviours["event_type"], pa.array(["click", "conversion"])),
    )
    taken = behaviours.filter(chosen)
    rows = catalogue.object_rows(taken["item_id"])
    known = rows >= 0
    users = taken["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    users, rows = users[known].astype(np.int64), rows[known]
    converted = pc.equal(taken["event_type"], "conversion").to_numpy()[known]
    again = np.zeros(len(rows), bool)
    again[1:] = (users[1:] == users[:-1]) & (rows[1:] == rows[:-1]) & ~converted[:-1]
    times = taken["event_time"].cast(pa.int64()).to_numpy()[known]
    return Interactions(users, rows, again, converted, times)


def baseline_scorers(
    past: Interactions, embeddings: np.ndarray, settings: SasrecSettings, seed: int
) -> dict[str, Scorer]:
    """The baselines by name, SASRec only if it has epochs; `embeddings` float32 [objects, dim]."""
    objects = len(embeddings)
    scorers = {
        "popularity": popularity(past.rows, objects),
        "item-knn": item_knn(past.users, past.rows, objects),
        "nearest-titles": nearest_titles(embeddings),
    }
    if settings.epochs:
        steps = past.histories()
        scorers["sasrec"] = sasrec(steps.cases, steps.values, objects, settings, seed)
    return scorers


def rank_baseline(scorer: Scorer, cases: Cases, catalogue: Catalogue, exclude_seen: bool) -> Ranked:
    """How a method did that scores the whole catalogue."""
    return ranked_by_scores(
        scorer, cases.histories, cases.target, catalogue.active_objects, exclude_seen
    )


def write_lists(decoder: Decoder, cases: Cases, exclude_seen: bool) -> Written:
    """What a model writes for the cases: the whole beam of a constrained search."""
    exclude = None
    if exclude_seen:
        exclude = np.split(cases.histories.values, cases.histories.offsets[1:-1])
    return Written(*decode_distinct(decoder, cases.prompts, decoder.settings.beam, exclude))


def rank_lists(lists: np.ndarray, cases: Cases, catalogue: Catalogue) -> Ranked:
    """How lists of objects [cases, k] did, best first, of which the first `TOP` count."""
    active = int(catalogue.active_objects.sum())
    return ranked_in_lists(lists[:, :TOP], cases.target, active)


def fused_lists(
    fusion: Fusion, factors: Factors, written: Written, cases: Cases, exclude_seen: bool
) -> np.ndarray:
    """What fusion makes of what a model wrote, [cases, TOP]."""
    unwanted = cases.histories if exclude_seen else None
    return fusion.rank(factors, written, cases.histories, TOP, unwanted)[0]


def fit_fusion(
    fusion: Fusion, learnt: Factors | None, written: Written, cases: Cases, exclude_seen: bool
) -> tuple[Factors, np.ndarray] | None:
    """The factors that fit the cases, and the lists that they give when fitted on others.

    Each half of the cases is ranked with the factors of the other half, so that what is measured
    on the cases owes nothing to them. None where a half has too few.
    """
    unwanted = cases.histories if exclude_seen else None
    half = np.arange(len(cases)) < len(cases) // 2
    ranked = np.full((len(cases), TOP), -1, np.int64)
    for chosen in (half, ~half):
        others = np.where(chosen, -1, cases.target)
        factors = fusion.fit(written, cases.histories, others, unwanted, learnt)
        if factors is None:
            return None
        ranked[chosen] = fused_lists(fusion, factors, written, cases, exclude_seen)[chosen]
    whole = fusion.fit(written, cases.histories, cases.target, unwanted, learnt)
    return None if whole is None else (whole, ranked)


def verdict(
    stages: dict[str, dict[str, float]],
    champion: str | None,
    champion_metrics: dict[str, float] | None,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Which stage challenges, and whether it is promoted.

    DPO is there for business value. It challenges in place of SFT if it gains `min_value_gain` of
    eCPM-weighted HR@10 and loses no more than `max_hit_loss` of HR@10, both as parts of SFT's.

    Args:
        stages: validation metrics of `sft` and, where it was trained, `dpo`.
        champion: the release to beat, with its metrics on the same cases; None: there is none.
        settings: `tolerance` is the HR@10 that the challenger may lose to the champion.

    Returns:
        `challenger`, `promote`, `reason`, `champion` and `valid` (the challenger's metrics).
    """
    challenger, note = "sft", ""
    if "dpo" in stages:
        pays, figures = _dpo_pays(stages["sft"], stages["dpo"], settings)
        challenger = "dpo" if pays else "sft"
        note = f"; DPO was {'taken' if pays else 'left out'}, {figures}"
    own = stages[challenger][GATE]
    if champion_metrics is None:
        promote, reason = True, f"the first model, validation {GATE} {own:.4f}"
    else:
        theirs = champion_metrics[GATE]
        promote = own >= theirs - settings.tolerance
        word = "within" if promote else "beyond"
        reason = (
            f"validation {GATE} {own:.4f} against {theirs:.4f} of {champion},"
            f" {word} the tolerance of {settings.tolerance}"
        )
    return {
        "challenger": challenger,
        "promote": promote,
        "reason": reason + note,
        "champion": champion,
        "valid": stages[challenger],
    }


def _dpo_pays(
    sft: dict[str, float], dpo: dict[str, float], settings: EvaluationSettings
) -> tuple[bool, str]:
    """Whether DPO is better than SFT in the sense of `verdict`, and the figures that say so."""
    if WEIGHTED_HR not in sft or WEIGHTED_HR not in dpo:
        return False, "the validation cases have no eCPM to judge it by"
    gained = dpo[WEIGHTED_HR] > 0 and dpo[WEIGHTED_HR] >= sft[WEIGHTED_HR] * (
        1 + settings.min_value_gain
    )
    kept = dpo[GATE] >= sft[GATE] * (1 - settings.max_hit_loss)
    figures = ", ".join(
        f"{name} {dpo[name]:.4f} against {sft[name]:.4f} of SFT" for name in (WEIGHTED_HR, GATE)
    )
    asked = f"at least +{settings.min_value_gain:.1%} and -{settings.max_hit_loss:.1%} were asked"
    return gained and kept, f"validation {figures}; {asked}"


def metric_rows(
    method: str, split: str, metrics: dict[str, float], cases: int
) -> list[dict[str, Any]]:
    """Metrics as rows of the contract `metrics`."""
    return [
        {"method": method, "split": split, "metric": name, "value": round(value, 9), "cases": cases}
        for name, value in sorted(metrics.items())
    ]


def rank_table(method: str, split: str, ranked: Ranked, examples: pa.Table) -> pa.Table:
    """Ranks as rows of the contract `case_ranks`, without the day.

    Args:
        method: its name.
        split: of the cases.
        ranked: how the method did on them.
        examples: rows of `eval_examples`, in the same order.
    """
    missed = ~np.isfinite(ranked.rank)
    return pa.table(
        {
            "method": pa.repeat(method, len(examples)),
            "case_id": examples["case_id"],
            "split": pa.repeat(split, len(examples)),
            "user_id": examples["user_id"],
            "rank": pa.array(ranked.rank, pa.float64(), mask=missed),
            "target_ecpm": examples["target_ecpm"],
        }
    )
