"""A hand-made world of two days, small enough to reason about, for tests."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa

from leadre_lib.contracts import RAW_TABLES, load_contract
from leadre_lib.lake import Lake

DAY0 = dt.date(2026, 3, 2)
DAY1 = dt.date(2026, 3, 3)


def at(day: dt.date, hour: int, minute: int = 0) -> dt.datetime:
    """A moment of a day, UTC."""
    return dt.datetime.combine(day, dt.time(hour, minute), dt.UTC)


def rows(table: str, records: list[dict[str, Any]]) -> pa.Table:
    """Records as a table with the contract's schema; what a record leaves out is null."""
    schema = load_contract(table).arrow_schema()
    return pa.Table.from_pylist(
        [{name: record.get(name) for name in schema.names} for record in records], schema
    )


def user(name: str, **more: Any) -> dict[str, Any]:
    """A user without a profile, unless `more` gives one."""
    return {"user_id": name, **more}


def ad(name: str, title: str, category: str = "", **more: Any) -> dict[str, Any]:
    """An open-ended ad, its own marketing object."""
    return {
        "ad_id": name,
        "marketing_object_id": name,
        "advertiser_id": "shop",
        "title": title,
        "category": category,
        "start_date": DAY0,
        **more,
    }


def ad_event(
    name: str, who: str, what: str, kind: str, when: dt.datetime, **more: Any
) -> dict[str, Any]:
    """An event on an ad."""
    event = {"event_id": name, "user_id": who, "ad_id": what, "event_type": kind}
    return {**event, "event_time": when, **more}


def content_event(
    name: str, who: str, title: str, category: str, when: dt.datetime, kind: str = "play"
) -> dict[str, Any]:
    """An event on content."""
    return {
        "event_id": name,
        "user_id": who,
        "content_id": f"content-{name}",
        "event_type": kind,
        "event_time": when,
        "title": title,
        "category": category,
    }


USERS = [
    user("u1", age=34, gender="female", residence="Lyon", education="master", occupation="nurse"),
    user("u2", age=51),
    user("u3"),
]
ADS = [
    ad("a1", "Trail running shoes", "sports/running", description="Light and tough"),
    ad("a2", "Cast iron pan", "home/kitchen"),
    ad("a3", "Running socks", "sports/running"),
    ad("a4", "Bread knife", "home/kitchen", stop_date=DAY0),
]
DAY0_AD_EVENTS = [
    ad_event("e01", "u1", "a1", "impression", at(DAY0, 8), ecpm=4.0),
    ad_event("e02", "u1", "a1", "click", at(DAY0, 8, 1), ecpm=4.0),
    ad_event("e03", "u1", "a1", "conversion", at(DAY0, 9), ecpm=4.0, gmv=80.0, scene="feed"),
    ad_event("e04", "u1", "a3", "click", at(DAY0, 10), ecpm=1.0, scene="feed"),
    ad_event("e05", "u2", "a2", "click", at(DAY0, 11), ecpm=3.0),
    ad_event("e06", "u2", "a4", "conversion", at(DAY0, 12), ecpm=2.0),
    ad_event("e07", "u3", "a2", "dismiss", at(DAY0, 13), ecpm=3.0),
    ad_event("e05", "u2", "a2", "click", at(DAY0, 11), ecpm=3.0),  # the same event again
]
DAY0_CONTENT_EVENTS = [
    content_event("c01", "u1", "My first marathon", "sports/running", at(DAY0, 7)),
    content_event("c02", "u2", "Five loaves a week", "home/kitchen", at(DAY0, 9), "read"),
    content_event("c03", "u3", "Knife skills", "home/kitchen", at(DAY0, 9, 30)),
]
DAY1_AD_EVENTS = [
    ad_event("e11", "u1", "a3", "conversion", at(DAY1, 9), ecpm=1.5, gmv=9.0, scene="feed"),
    ad_event("e12", "u2", "a2", "conversion", at(DAY1, 10), ecpm=3.5, gmv=30.0),
    ad_event("e02", "u1", "a1", "click", at(DAY0, 8, 1), ecpm=4.0),  # of the day before, again
    ad_event("e13", "u2", "a3", "click", at(DAY0, 23), ecpm=1.0),  # late
]
DAY1_CONTENT_EVENTS = [
    content_event("c11", "u3", "Sourdough from scratch", "home/kitchen", at(DAY1, 8)),
]


def raw_day(ds: dt.date) -> dict[str, list[dict[str, Any]]]:
    """The records of one day, by raw table."""
    first = ds == DAY0
    return {
        "raw_users": list(USERS),
        "raw_ads": list(ADS),
        "raw_ad_events": list(DAY0_AD_EVENTS if first else DAY1_AD_EVENTS),
        "raw_content_events": list(DAY0_CONTENT_EVENTS if first else DAY1_CONTENT_EVENTS),
    }


def land(lake: Lake, ds: dt.date, **replaced: list[dict[str, Any]]) -> None:
    """Land a day, with some tables' records replaced."""
    day = raw_day(ds) | replaced
    for table in RAW_TABLES:
        with lake.begin(table, ds) as attempt:
            attempt.write(rows(table, day[table]))
            attempt.commit()


def assign_ids(lake: Lake, ds: dt.date) -> None:
    """Publish plain Semantic IDs, `<a_n><b_0>`, without a model."""
    text_hash = "0" * 64
    records = [
        {
            "ad_id": item["ad_id"],
            "marketing_object_id": item["marketing_object_id"],
            "semantic_id": f"<a_{n}><b_0>",
            "codes": [n, 0],
            "text_hash": text_hash,
            "codebook": "plain",
        }
        for n, item in enumerate(ADS)
    ]
    with lake.begin("ad_semantic_ids", ds) as attempt:
        attempt.write(rows("ad_semantic_ids", records))
        attempt.commit()


def land_histories(lake: Lake, ds: dt.date) -> None:
    """Publish one synthetic history: the ads a1 and a2, and a3 or a1 next."""
    records = [
        {"history_id": "synthetic-0", "step": step, "ad_id": ad_id, "draws": draws}
        for step, (ad_id, draws) in enumerate([("a1", 0), ("a2", 0), ("a3", 5), ("a1", 2)], 1)
    ]
    with lake.begin("synthetic_histories", ds) as attempt:
        attempt.write(rows("synthetic_histories", records))
        attempt.commit()
