"""The verdict on a challenger, and cases as catalogue rows."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from leadre_lib.catalogue import Catalogue, catalogue
from leadre_lib.comparison import (
    Cases,
    baseline_scorers,
    cases_of,
    fit_fusion,
    fused_lists,
    interactions,
    verdict,
)
from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import WEIGHTED_HR, Histories
from leadre_lib.fusion import Fusion, Written
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import EvaluationSettings, FusionSettings, SasrecSettings
from leadre_lib.signals import Taken, build_signals
from tests.worlds import ADS, DAY0, DAY1, at, rows

RULES = EvaluationSettings(tolerance=0.02, min_value_gain=0.05, max_hit_loss=0.01)


def of(hits: float, value: float = 0.4) -> dict[str, float]:
    return {"HR@10": hits, WEIGHTED_HR: value}


def test_the_first_model_is_promoted() -> None:
    told = verdict({"sft": of(0.1)}, None, None, RULES)
    assert told["promote"]
    assert told["challenger"] == "sft"
    assert "DPO" not in told["reason"]


@pytest.mark.parametrize(("own", "promoted"), [(0.30, True), (0.29, True), (0.27, False)])
def test_a_challenger_may_lose_no_more_than_the_tolerance(own: float, promoted: bool) -> None:
    told = verdict({"sft": of(own)}, "old", of(0.30), RULES)
    assert told["promote"] is promoted
    assert "old" in told["reason"]


@pytest.mark.parametrize(
    ("hits", "value", "taken"),
    [
        (0.300, 0.421, True),
        (0.298, 0.421, True),
        (0.310, 0.421, True),
        (0.296, 0.421, False),  # more than a hundredth of the hits is lost
        (0.300, 0.419, False),  # less than a twentieth of the value is gained
        (0.400, 0.400, False),
        (0.200, 0.300, False),
    ],
)
def test_dpo_challenges_if_it_gains_value_and_keeps_the_hits(
    hits: float, value: float, taken: bool
) -> None:
    told = verdict({"sft": of(0.3), "dpo": of(hits, value)}, "old", of(0.3), RULES)
    assert told["challenger"] == ("dpo" if taken else "sft")
    assert told["valid"] == (of(hits, value) if taken else of(0.3))
    assert ("DPO was taken" in told["reason"]) is taken
    for figure in (f"{value:.4f} against 0.4000", f"{hits:.4f} against 0.3000", "+5.0%", "-1.0%"):
        assert figure in told["reason"]


def test_dpo_that_cannot_be_judged_by_value_is_left_out() -> None:
    told = verdict({"sft": {"HR@10": 0.3}, "dpo": {"HR@10": 0.4}}, None, None, RULES)
    assert told["challenger"] == "sft"
    assert "no eCPM" in told["reason"]


def test_dpo_is_not_taken_for_hitting_nothing_of_value() -> None:
    told = verdict({"sft": of(0.3, 0.0), "dpo": of(0.3, 0.0)}, None, None, RULES)
    assert told["challenger"] == "sft"


def semantic_ids(names: list[str], codebook: str = "book") -> list[dict[str, object]]:
    return [
        {
            "ad_id": name,
            "marketing_object_id": name,
            "semantic_id": f"<a_{n}>",
            "codes": [n, 0],
            "text_hash": "",
            "codebook": codebook,
        }
        for n, name in enumerate(names)
    ]


def small(day: dt.date = DAY0) -> Catalogue:
    ads = rows("ads", [{**ad, "text_hash": ""} for ad in ADS])
    return catalogue(ads, rows("ad_semantic_ids", semantic_ids(["a1", "a2", "a3", "a4"])), day)


def test_active_means_started_and_not_stopped() -> None:
    assert small(DAY1).active.tolist() == [True, True, True, False]
    assert small(DAY0).active.tolist() == [True, True, True, False]  # stop_date is exclusive
    with pytest.raises(LeadreError, match="no ad is active on 2026-03-01"):
        small(DAY0 - dt.timedelta(days=1))


def test_ids_that_are_missing_or_of_two_codebooks_are_refused() -> None:
    ads = rows("ads", [{**ad, "text_hash": ""} for ad in ADS])
    with pytest.raises(LeadreError, match="'a3' has no Semantic ID"):
        catalogue(ads, rows("ad_semantic_ids", semantic_ids(["a1", "a2", "a4"])), DAY0)
    mixed = semantic_ids(["a1", "a2"]) + semantic_ids(["a3", "a4"], "other")
    with pytest.raises(LeadreError, match="mixed"):
        catalogue(ads, rows("ad_semantic_ids", mixed), DAY0)


def test_cases_become_rows_and_forgotten_ads_leave_histories() -> None:
    case = {
        "split": "test",
        "user_id": "u",
        "prompt": "p",
        "cutoff": at(DAY1, 0),
        "codebook": "book",
        "template": "en-1",
    }
    examples = [
        {**case, "case_id": "1", "history_ad_ids": ["a2", "gone", "a1"], "target_ad_id": "a3"},
        {**case, "case_id": "2", "history_ad_ids": [], "target_ad_id": "gone", "target_ecpm": 2.0},
    ]
    cases = cases_of(rows("eval_examples", examples), small())
    assert cases.target.tolist() == [2, -1]
    assert cases.histories.offsets.tolist() == [0, 2, 2]
    assert cases.histories.values.tolist() == [1, 0]
    assert np.isnan(cases.ecpm).tolist() == [True, False]


def past(events: list[tuple[str, str, str]], hours: list[int] | None = None) -> pa.Table:
    """User, event type and ad of behaviours, in the order given, and the hour of each."""
    users, kinds, ads = zip(*events, strict=True)
    domain = ["content" if kind == "play" else "ad" for kind in kinds]
    moments = np.array(hours or [0] * len(events)) * 3_600_000_000
    return pa.table(
        {
            "user_id": users,
            "domain": domain,
            "event_type": kinds,
            "item_id": ads,
            "event_time": pa.array(moments, pa.timestamp("us", "UTC")),
        }
    )


def test_interactions_keep_the_order_and_know_a_click_that_was_converted_on() -> None:
    events = [
        ("u1", "click", "a2"),
        ("u1", "impression", "a2"),
        ("u1", "conversion", "a2"),  # again: nothing but an impression since the click
        ("u1", "conversion", "a2"),  # a second one is another step
        ("u1", "click", "a1"),
        ("u1", "play", "a1"),
        ("u1", "click", "gone"),
        ("u1", "click", "a3"),
        ("u2", "conversion", "a3"),  # somebody else's
    ]
    found = interactions(past(events), small())
    assert found.users.tolist() == [0, 0, 0, 0, 0, 1]
    assert found.rows.tolist() == [1, 1, 1, 0, 2, 2]
    assert found.again.tolist() == [False, True, False, False, False, False]


def test_baselines_are_all_there_and_sasrec_learns_a_visit_as_one_step() -> None:
    visits = [(f"u{n}", kind, "a2") for n in range(6) for kind in ("click", "conversion")]
    once = [(f"u{n}", "conversion", "a2") for n in range(6)]
    titles, cases = np.eye(4, dtype=np.float32), Histories.of([[1], []])
    settings = SasrecSettings(epochs=2, dim=4, dropout=0)
    found, plain = (
        baseline_scorers(interactions(past(events), small()), titles, settings, 3)
        for events in (visits, once)
    )
    assert list(found) == ["popularity", "item-knn", "nearest-titles", "sasrec"]
    assert all(scorer(cases).shape == (2, 4) for scorer in found.values())
    assert (found["sasrec"](cases) == plain["sasrec"](cases)).all()
    none = settings.model_copy(update={"epochs": 0})
    left = baseline_scorers(interactions(past(once), small()), titles, none, 3)
    assert list(left) == ["popularity", "item-knn", "nearest-titles"]


def test_the_steps_of_histories_pass_over_a_click_that_was_converted_on() -> None:
    events = [
        ("u1", "click", "a2"),
        ("u1", "conversion", "a2"),
        ("u1", "click", "a1"),
        ("u2", "conversion", "a3"),
    ]
    taken = interactions(past(events, [0, 1, 24, 48]), small()).taken()
    assert taken.histories.offsets.tolist() == [0, 2, 3]
    assert taken.histories.values.tolist() == [1, 0, 2]
    assert taken.ages.tolist() == [2, 1, 0]


def last(
    events: list[tuple[str, str, str]], hours: list[int], by_day: bool, active: str = "a1 a2 a3"
) -> list[tuple[int, int]]:
    ads = small()
    rows = ads.object_rows(pa.array(active.split()))
    may = np.isin(np.arange(len(ads.object_ids)), rows)
    found = interactions(past(events, hours), ads).last_conversions(may, by_day)
    return list(zip(*(part.tolist() for part in found), strict=True))


def test_last_conversions_end_their_history_at_the_cutoff() -> None:
    events = [
        ("u1", "click", "a1"),
        ("u1", "click", "a2"),
        ("u1", "conversion", "a2"),  # the same step as the click
        ("u1", "click", "a3"),
        ("u2", "click", "a1"),  # nothing came before its day
        ("u2", "conversion", "a3"),
        ("u3", "click", "a3"),  # never converted
        ("u3", "click", "a1"),
        ("u4", "conversion", "a1"),  # nothing before it at all
    ]
    hours = [20, 30, 31, 60, 30, 31, 30, 60, 30]
    assert last(events, hours, by_day=True) == [(1, 1)]
    assert last(events, hours, by_day=False) == [(1, 2), (4, 4)]  # the click is known by then
    assert last(events, hours, by_day=False, active="a1 a3") == [(4, 4)]
    # A click before midnight, and the conversion that it led to after it.
    assert last(events[:3], [20, 23, 25], by_day=True) == [(1, 2)]
    # What happened at the very moment is not known.
    assert last([("u1", "click", "a3"), *events[:3]], [1, 5, 6, 6], by_day=False) == [(2, 2)]
    assert last([("u1", "play", "a1")], [1], by_day=True) == []


def test_what_is_measured_of_fusion_owes_nothing_to_the_case_itself() -> None:
    # In one half of the cases the model is right, in the other one always wrong: the factors of
    # each half are right for the other half alone.
    cases, objects = 200, 40
    rng = np.random.default_rng(1)
    written = Written(
        np.argsort(rng.random((cases, objects)), axis=1)[:, :4],
        np.tile([-1.0, -2.0, -3.0, -4.0], (cases, 1)),
    )
    target = written.objects[:, 0].copy()
    target[cases // 2 :] = (written.objects[cases // 2 :].max(axis=1) + 1) % objects
    told = Cases(
        ["p"] * cases,
        Histories.of([[int(row)] for row in rng.integers(0, objects, cases)]),
        target,
        np.full(cases, np.nan),
    )
    meaning = EmbeddingIndex.build(np.eye(objects, dtype=np.float32))
    settings = FusionSettings(near=objects)
    signals = build_signals(
        [f"text {n}" for n in range(objects)],
        meaning,
        Taken.at_once(Histories.of([[0, 1]])),
        settings,
    )
    fusion = Fusion(signals, np.ones(objects, bool), settings)
    found = fit_fusion(fusion, None, written, told, False)
    assert found is not None
    whole, ranked = found
    own = fusion.fit(written, told.histories, np.where(np.arange(cases) < 100, target, -1))
    assert own is not None
    with_own = fused_lists(fusion, own, written, told, False)
    first = (ranked[:100, 0] == target[:100]).mean()
    assert (with_own[:100, 0] == target[:100]).all()
    assert first < 0.5
    assert whole.as_dict() != own.as_dict()
