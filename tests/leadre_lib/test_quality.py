"""Quality gates: every kind of check has a case in which it fails, and severities count."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from leadre_lib.catalogue import catalogue
from leadre_lib.contracts import Check, load_contract
from leadre_lib.lake import Lake
from leadre_lib.quality import (
    QualityError,
    candidate_outcomes,
    gate,
    publish,
    run_checks,
    volume,
)
from leadre_lib.settings import Settings
from leadre_lib.spark import read
from tests.worlds import ADS, DAY0, DAY0_AD_EVENTS, DAY1, USERS, assign_ids, rows

CANDIDATE = {
    "user_id": "u1",
    "semantic_id": "<a_0>",
    "score": -1.0,
    "source": "model",
    "release": "r",
    "prompt_hash": "h",
    "decoded_on": DAY0,
}


def candidate(rank: int, ad_id: str, **more: Any) -> dict[str, Any]:
    return {**CANDIDATE, "rank": rank, "ad_id": ad_id, **more}


GOOD: dict[str, list[dict[str, Any]]] = {
    "candidates": [candidate(1, "a1"), candidate(2, "a2")],
    "raw_users": USERS,
    "raw_ads": ADS,
    "raw_ad_events": DAY0_AD_EVENTS,
}
BAD: list[tuple[str, list[dict[str, Any]], str]] = [
    ("candidates", [], "row_count"),
    ("candidates", [candidate(1, "a1"), candidate(1, "a2")], "compound_columns_to_be_unique"),
    ("candidates", [candidate(1, "a1"), candidate(2, "a1")], "compound_columns_to_be_unique"),
    ("candidates", [candidate(0, "a1")], "between"),
    ("candidates", [candidate(1, "a1", source="guess")], "in_set"),
    ("candidates", [candidate(1, "a1", release=None)], "not_be_null"),
    ("raw_users", [*USERS, USERS[0]], "values_to_be_unique"),
    ("raw_users", [{"user_id": "u9", "age": 200}], "between"),
    ("raw_ads", [{**ADS[0], "title": ""}], "lengths_to_be_between"),
    ("raw_ad_events", [{**DAY0_AD_EVENTS[0], "event_type": "stare"}], "in_set"),
]


def outcomes(
    spark: SparkSession, settings: Settings, lake: Lake, table: str, records: list[dict[str, Any]]
) -> list[str]:
    with lake.begin(table, DAY0) as attempt:
        attempt.write(rows(table, records))
        attempt.commit()
    frame = read(spark, lake, table, [DAY0])
    found = run_checks(frame, table, load_contract(table).checks(), settings, DAY0)
    return [o.check.type for o in found if o.failed]


@pytest.mark.parametrize("table", GOOD)
def test_good_rows_pass(spark: SparkSession, settings: Settings, lake: Lake, table: str) -> None:
    assert outcomes(spark, settings, lake, table, GOOD[table]) == []


@pytest.mark.parametrize(("table", "records", "check"), BAD)
def test_each_check_can_fail(
    spark: SparkSession,
    settings: Settings,
    lake: Lake,
    table: str,
    records: list[dict[str, Any]],
    check: str,
) -> None:
    failed = outcomes(spark, settings, lake, table, records)
    assert [name for name in failed if check in name]


def test_the_ecpm_order_of_a_pair_is_checked(
    spark: SparkSession, settings: Settings, lake: Lake
) -> None:
    pair = {
        "pair_id": "p",
        "origin": "value",
        "user_id": "u",
        "prompt": "p",
        "chosen": "<a_0>",
        "rejected": "<a_1>",
        "chosen_ecpm": 1.0,
        "rejected_ecpm": 2.0,
        "target_time": DAY0_AD_EVENTS[0]["event_time"],
        "codebook": "c",
        "template": "en-1",
    }
    failed = outcomes(spark, settings, lake, "preference_pairs", [pair])
    assert failed == ["expect_column_pair_values_a_to_be_greater_than_b"]
    # A conversion is preferred to a dismissal whatever they are worth.
    other = {**pair, "origin": "dismissal"}
    assert outcomes(spark, settings, lake, "preference_pairs", [other]) == []


def test_a_critical_failure_publishes_nothing_and_says_why(
    spark: SparkSession, settings: Settings, lake: Lake
) -> None:
    publish(spark, settings, lake, "candidates", DAY0, rows("candidates", GOOD["candidates"]))
    bad = rows("candidates", [candidate(1, "a1"), candidate(1, "a2")])
    with pytest.raises(QualityError, match=r"user_id.*rank"):
        publish(spark, settings, lake, "candidates", DAY0, bad)
    assert lake.read("candidates", DAY0)["rank"].to_pylist() == [1, 2]


def test_a_check_that_cannot_run_is_critical_and_a_warning_is_not(
    spark: SparkSession, settings: Settings, lake: Lake
) -> None:
    publish(spark, settings, lake, "candidates", DAY0, rows("candidates", GOOD["candidates"]))
    frame = read(spark, lake, "candidates", [DAY0])
    missing = Check("expect_column_values_to_not_be_null", {"column": "no_such"}, "critical")
    (outcome,) = run_checks(frame, "candidates", [missing], settings, DAY0)
    assert outcome.critical
    assert "could not be run" in outcome.failed
    warning = Check("expect_table_row_count_to_be_between", {"min_value": 99}, "warning")
    (outcome,) = run_checks(frame, "candidates", [warning], settings, DAY0)
    assert outcome.failed
    gate([outcome])


def test_volume_is_compared_with_the_days_after_the_initial_load(
    settings: Settings, lake: Lake
) -> None:
    import datetime as dt

    def land(day: dt.date, count: int) -> None:
        with lake.begin("raw_users", day) as attempt:
            attempt.write(rows("raw_users", [{"user_id": f"u{n}"} for n in range(count)]))
            attempt.commit()

    days = [DAY0 + dt.timedelta(days=n) for n in range(4)]
    for day, count in zip(days, (500, 10, 12, 2), strict=True):
        land(day, count)
    checked = [volume(lake, "raw_users", day, settings.quality).failed for day in days]
    assert [bool(text) for text in checked] == [False, False, False, True]
    assert DAY1 in lake.days("raw_users")


def test_score_drift_is_that_of_the_model_alone(settings: Settings, lake: Lake) -> None:
    assign_ids(lake, DAY0)
    ids = lake.read("ad_semantic_ids", DAY0)
    ads = catalogue(rows("ads", [{**a, "text_hash": ""} for a in ADS]), ids, DAY1)

    def drift(now: list[dict[str, Any]], before: pa.Table | None) -> list[str]:
        found = candidate_outcomes(rows("candidates", now), ads, 1, before, settings.quality)
        return [outcome.failed for outcome in found if outcome.check.type == "score_drift"]

    before = rows("candidates", GOOD["candidates"])
    filled = candidate(3, "a3", score=5000.0, source="popularity")
    assert drift([*GOOD["candidates"], filled], before) == [""]
    assert "moved by -8.00" in drift([candidate(1, "a1", score=-9.0)], before)[0]
    assert drift([filled], before) == drift(GOOD["candidates"], None) == []


def test_a_night_without_a_word_of_the_model_is_warned_of(settings: Settings, lake: Lake) -> None:
    assign_ids(lake, DAY0)
    ids = lake.read("ad_semantic_ids", DAY0)
    ads = catalogue(rows("ads", [{**a, "text_hash": ""} for a in ADS]), ids, DAY1)
    for source, told in (("model", False), ("signals", True)):
        now = rows("candidates", [candidate(1, "a1", source=source)])
        outcomes = candidate_outcomes(now, ads, 1, None, settings.quality)
        failed = [outcome.check.type for outcome in outcomes if outcome.failed]
        assert failed == (["the_model_is_heard"] if told else [])
        gate(outcomes)
