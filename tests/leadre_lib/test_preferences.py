"""Preference pairs on a hand-made world, on Sail, and the lists that training reads.

`tests/jobs/test_engines.py` holds both engines to equal rows.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from leadre_lib.contracts import load_contract
from leadre_lib.preferences import preference_lists, preference_pairs
from leadre_lib.settings import DpoSettings, ExampleSettings, InterestSettings, PromptSettings
from tests.worlds import ADS, DAY0, DAY1, USERS, at, rows

WINDOW = InterestSettings()
EXAMPLES = ExampleSettings(min_behaviours=0)
IDS = {"a1": "<a_1><b_0>", "a2": "<a_2><b_0>", "a3": "<a_3><b_0>", "a4": "<a_4><b_0>"}
TITLES = {ad["ad_id"]: ad["title"] for ad in ADS}


def event(
    who: str, what: str, kind: str, when: dt.datetime, ecpm: float | None = 1.0
) -> dict[str, Any]:
    """A behaviour on an ad, named by what it says."""
    return {
        "event_id": f"{who}-{what}-{kind}-{when:%d%H%M}",
        "user_id": who,
        "domain": "ad",
        "event_type": kind,
        "item_id": what,
        "title": TITLES[what],
        "category": "",
        "event_time": when,
        "ecpm": ecpm,
    }


def pairs_of(
    spark: SparkSession,
    events: list[dict[str, Any]],
    ids: dict[str, str] = IDS,
    partitions: int = 0,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """The pairs of a stream of behaviours, by id."""

    def frame(table: str, records: list[dict[str, Any]]) -> DataFrame:
        data = [tuple(record.values()) for record in rows(table, records).to_pylist()]
        made = spark.createDataFrame(data, load_contract(table).spark_schema())
        return made.repartition(partitions) if partitions else made

    named = [(ad_id, sid, "book") for ad_id, sid in ids.items()]
    semantic_ids = spark.createDataFrame(named, "ad_id string, semantic_id string, codebook string")
    made = preference_pairs(
        frame("behaviours", events),
        frame("users", USERS),
        semantic_ids,
        EXAMPLES.model_copy(update=settings),
        WINDOW,
        1,
        PromptSettings(),
    )
    assert made.columns == load_contract("preference_pairs").columns
    return {row["pair_id"]: row.asDict() for row in made.collect()}


def sides(found: dict[str, dict[str, Any]], origin: str = "value") -> list[tuple[str, str]]:
    """Chosen and rejected ads of an origin."""
    ads = {sid: ad_id for ad_id, sid in IDS.items()}
    return sorted(
        (ads[row["chosen"]], ads[row["rejected"]])
        for row in found.values()
        if row["origin"] == origin
    )


def test_of_two_ads_of_a_day_the_one_of_higher_ecpm_is_chosen(spark: SparkSession) -> None:
    found = pairs_of(
        spark,
        [
            event("u1", "a1", "click", at(DAY0, 8), 4.0),
            event("u1", "a2", "conversion", at(DAY0, 9), 1.0),
            event("u1", "a3", "click", at(DAY1, 9), 9.0),  # of another day
            event("u2", "a1", "click", at(DAY0, 8), 4.0),
            event("u2", "a2", "click", at(DAY0, 9), 3.9),  # worth nearly the same
            event("u3", "a1", "click", at(DAY0, 8), 4.0),
            event("u3", "a2", "click", at(DAY0, 9), None),
        ],
    )
    (row,) = found.values()
    assert sides(found) == [("a1", "a2")]
    assert (row["user_id"], row["chosen_ecpm"], row["rejected_ecpm"]) == ("u1", 4.0, 1.0)
    assert row["target_time"] == at(DAY0, 8).replace(tzinfo=None)


def test_both_sides_are_marketing_objects_of_their_own(spark: SparkSession) -> None:
    events = [
        event("u1", "a1", "conversion", at(DAY0, 8), 4.0),
        event("u1", "a2", "click", at(DAY0, 9), 1.0),
        event("u1", "a3", "dismiss", at(DAY0, 10), 1.0),
    ]
    apart = pairs_of(spark, events)
    assert sides(apart) == [("a1", "a2")]
    assert sides(apart, "dismissal") == [("a1", "a3")]
    one = {**IDS, "a2": IDS["a1"], "a3": IDS["a1"]}
    assert pairs_of(spark, events, one) == {}


def test_what_was_merely_shown_makes_pairs_only_if_asked_and_after_the_rest(
    spark: SparkSession,
) -> None:
    events = [
        event("u1", "a1", "click", at(DAY0, 8), 4.0),
        event("u1", "a2", "click", at(DAY0, 9), 1.0),
        event("u1", "a3", "impression", at(DAY0, 10), 9.0),
        event("u1", "a4", "impression", at(DAY0, 11), 20.0),
    ]
    assert sides(pairs_of(spark, events)) == [("a1", "a2")]
    shown = {"pairs_from": "impressions", "pairs_per_user": 10}
    assert sides(pairs_of(spark, events, **shown)) == [
        ("a1", "a2"),
        ("a3", "a1"),
        ("a3", "a2"),
        ("a4", "a1"),
        ("a4", "a2"),
        ("a4", "a3"),
    ]
    for limit in ({"pairs_per_user": 1}, {"max_preference_pairs": 1}):
        assert sides(pairs_of(spark, events, **shown | limit)) == [("a1", "a2")]


def test_what_was_converted_on_is_chosen_against_what_was_dismissed(spark: SparkSession) -> None:
    found = pairs_of(
        spark,
        [
            event("u1", "a1", "conversion", at(DAY1, 9), 1.0),
            event("u1", "a2", "dismiss", at(DAY0, 9), 5.0),  # on another day, and dearer
            event("u1", "a3", "dismiss", at(DAY0, 10), 5.0),
            event("u1", "a3", "click", at(DAY1, 10), None),  # liked after all
            event("u2", "a2", "conversion", at(DAY1, 9), 5.0),  # dismissed by others
            event("u3", "a1", "click", at(DAY0, 9), 5.0),  # no conversion
            event("u3", "a4", "dismiss", at(DAY0, 9), 1.0),
        ],
    )
    (row,) = found.values()
    assert sides(found, "dismissal") == [("a1", "a2")]
    assert (row["user_id"], row["chosen_ecpm"], row["rejected_ecpm"]) == ("u1", 1.0, 5.0)
    assert row["target_time"] == at(DAY1, 9).replace(tzinfo=None)


def test_a_dismissed_ad_is_no_side_of_a_value_pair(spark: SparkSession) -> None:
    clicks = [
        event("u1", "a1", "click", at(DAY0, 8), 4.0),
        event("u1", "a2", "click", at(DAY0, 9), 1.0),
    ]
    assert sides(pairs_of(spark, clicks)) == [("a1", "a2")]
    assert pairs_of(spark, [*clicks, event("u1", "a1", "dismiss", at(DAY1, 8))]) == {}


def crowd() -> list[dict[str, Any]]:
    """Three users with three value pairs and three dismissal pairs each."""
    worth = {"a1": 1.0, "a2": 2.0, "a3": 4.0}
    return [
        *(
            event(who, what, "conversion", at(DAY0, hour), worth[what])
            for who in ("u1", "u2", "u3")
            for hour, what in enumerate(worth, 1)
        ),
        *(event(who, "a4", "dismiss", at(DAY1, 8)) for who in ("u1", "u2", "u3")),
    ]


def test_a_user_and_all_users_have_no_more_than_their_share(spark: SparkSession) -> None:
    everything = pairs_of(spark, crowd())
    assert len(everything) == 18
    some = pairs_of(spark, crowd(), pairs_per_user=2)
    owners = sorted((row["origin"], row["user_id"]) for row in some.values())
    each = [(o, u) for o in ("dismissal", "value") for u in ("u1", "u2", "u3") for _ in range(2)]
    assert owners == each
    assert some.items() <= everything.items()
    few = pairs_of(spark, crowd(), pairs_per_user=2, max_preference_pairs=4)
    assert [len(sides(few, origin)) for origin in ("value", "dismissal")] == [4, 4]
    assert few.items() <= some.items()
    # The draw depends on the rows alone, not on how they are parted.
    assert pairs_of(spark, crowd(), partitions=5, pairs_per_user=2) == some


@pytest.mark.parametrize("cutoff", ["day", "event"])
def test_no_prompt_knows_what_came_at_or_after_its_cutoff(spark: SparkSession, cutoff: str) -> None:
    events = [
        event("u1", "a4", "click", at(DAY0, 7)),
        event("u1", "a3", "click", at(DAY1, 8), 2.0),
        event("u1", "a1", "conversion", at(DAY1, 9), 8.0),
        event("u1", "a2", "dismiss", at(DAY0, 6), 1.0),
    ]
    found = pairs_of(spark, events, cutoff=cutoff)
    (value,) = [row for row in found.values() if row["origin"] == "value"]
    (dismissal,) = [row for row in found.values() if row["origin"] == "dismissal"]
    assert (value["chosen"], value["rejected"]) == (IDS["a1"], IDS["a3"])
    assert (dismissal["chosen"], dismissal["rejected"]) == (IDS["a1"], IDS["a2"])
    for row in (value, dismissal):
        assert "1*click*" + IDS["a4"] in row["prompt"]
        assert IDS["a1"] not in row["prompt"]
        assert IDS["a2"] not in row["prompt"]
    # a3, clicked an hour before the conversion of the dismissal pair
    assert (IDS["a3"] in dismissal["prompt"]) == (cutoff == "event")
    assert IDS["a3"] not in value["prompt"]


def test_who_did_nothing_before_gives_no_pair_if_behaviours_are_asked_for(
    spark: SparkSession,
) -> None:
    events = [
        event("u1", "a1", "click", at(DAY0, 8), 4.0),
        event("u1", "a2", "click", at(DAY0, 9), 1.0),
    ]
    assert pairs_of(spark, events, min_behaviours=1) == {}


# --- lists --------------------------------------------------------------------------------------


def pair_table(*pairs: tuple[str, str, str, float, float, str]) -> pa.Table:
    names = ["prompt", "chosen", "rejected", "chosen_ecpm", "rejected_ecpm", "origin"]
    return pa.Table.from_pylist([dict(zip(names, pair, strict=True)) for pair in pairs])


PAIRS = pair_table(
    ("q", "x", "a", 4.0, 2.0, "value"),
    ("p", "x", "a", 8.0, 1.0, "value"),
    ("q", "x", "b", 4.0, 1.0, "value"),
    ("q", "y", "a", 2.0, 1.0, "beam"),
    ("q", "x", "a", 4.0, 2.0, "beam"),  # again
    ("q", "x", "c", 4.0, 9.0, "dismissal"),
)


def test_pairwise_every_pair_is_a_list_once() -> None:
    lists = preference_lists(PAIRS, DpoSettings(loss="pairwise"))
    rows_ = [(r["prompt"], r["chosen"], *r["rejected"]) for r in lists.to_pylist()]
    assert sorted(rows_) == [
        ("p", "x", "a"),
        ("q", "x", "a"),
        ("q", "x", "b"),
        ("q", "x", "c"),
        ("q", "y", "a"),
    ]
    assert lists["weight"].to_pylist() == [1.0] * 5


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (4, [("q", "x", "a", "b", "c"), ("p", "x", "a"), ("q", "y", "a")]),
        (2, [("q", "x", "a", "b"), ("q", "x", "c"), ("p", "x", "a"), ("q", "y", "a")]),
    ],
)
def test_listwise_a_list_holds_all_that_was_rejected_for_one(
    longest: int, expected: list[tuple[str, ...]]
) -> None:
    lists = preference_lists(PAIRS, DpoSettings(loss="listwise", max_rejected=longest))
    assert [(r["prompt"], r["chosen"], *r["rejected"]) for r in lists.to_pylist()] == expected


def test_weights_follow_the_gap_of_ecpm_and_have_mean_one() -> None:
    settings = DpoSettings(loss="pairwise", weight_by_gap=True)
    weights = {
        (r["prompt"], r["chosen"], *r["rejected"]): r["weight"]
        for r in preference_lists(PAIRS, settings).to_pylist()
    }
    assert np.mean(list(weights.values())) == pytest.approx(1)
    double = weights["q", "y", "a"]  # log 2
    assert weights["q", "x", "a"] == pytest.approx(double)
    assert weights["q", "x", "b"] == pytest.approx(2 * double)
    assert weights["p", "x", "a"] == pytest.approx(3 * double)
    mean = (1 + 1 + 2 + 3) / 4
    assert weights["q", "x", "c"] == pytest.approx(mean * double)  # eCPM plays no part
    both = preference_lists(PAIRS, settings.model_copy(update={"loss": "listwise"})).to_pylist()
    assert both[1]["weight"] / both[2]["weight"] == pytest.approx(3)
    assert both[0]["weight"] / both[2]["weight"] == pytest.approx((1 + 2 + mean) / 3)
    free = pair_table(("p", "x", "a", 4.0, 0.0, "value"), ("p", "x", "b", 4.0, 2.0, "value"))
    assert np.isfinite(preference_lists(free, settings)["weight"].to_numpy()).all()
    only = PAIRS.slice(5)
    assert preference_lists(only, settings)["weight"].to_pylist() == [1.0]
