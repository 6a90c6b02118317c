"""The online store serves one day whole."""

from __future__ import annotations

import datetime as dt
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from leadre_lib.errors import LeadreError
from leadre_lib.online_store import OnlineStore
from tests.worlds import rows

DAY = dt.date(2026, 3, 3)


def candidates(user: str, *ads: str) -> list[dict[str, object]]:
    return [
        {
            "user_id": user,
            "rank": n,
            "ad_id": ad,
            "semantic_id": "<a_0>",
            "score": -n,
            "source": "model",
            "release": "r",
        }
        for n, ad in enumerate(ads, 1)
    ]


def test_a_new_day_replaces_the_old_one(tmp_path: Path) -> None:
    store = OnlineStore(tmp_path / "online.sqlite")
    assert store.served() is None
    with pytest.raises(LeadreError, match="no online store yet"):
        store.candidates("u1")
    both = candidates("u1", "a1", "a2") + candidates("u2", "a3")
    store.replace(rows("candidates", both), DAY)
    assert [c["ad_id"] for c in store.candidates("u1")] == ["a1", "a2"]
    store.replace(rows("candidates", candidates("u1", "a9")), DAY + dt.timedelta(days=1))
    assert [c["ad_id"] for c in store.candidates("u1")] == ["a9"]
    assert store.candidates("u2") == []
    assert store.served() == DAY + dt.timedelta(days=1)


def test_a_failed_replacement_leaves_the_old_day(tmp_path: Path) -> None:
    store = OnlineStore(tmp_path / "online.sqlite")
    store.replace(rows("candidates", candidates("u1", "a1")), DAY)
    twice = candidates("u1", "a2") * 2  # the same key twice
    with pytest.raises(Exception, match="UNIQUE"):
        store.replace(rows("candidates", twice), DAY + dt.timedelta(days=1))
    assert [c["ad_id"] for c in store.candidates("u1")] == ["a1"]
    assert store.served() == DAY


def test_a_first_publish_that_was_killed_is_no_store_yet(tmp_path: Path) -> None:
    store = OnlineStore(tmp_path / "online.sqlite")
    store.path.touch()
    assert store.served() is None
    with pytest.raises(LeadreError, match="no online store yet"):
        store.candidates("u1")
    store.replace(rows("candidates", candidates("u1", "a1")), DAY)
    assert store.served() == DAY


def test_a_store_of_an_earlier_version_is_told_and_then_replaced(tmp_path: Path) -> None:
    store = OnlineStore(tmp_path / "online.sqlite")
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("CREATE TABLE served (ds TEXT)")
        db.execute("INSERT INTO served VALUES ('2026-03-02')")
        db.execute("CREATE TABLE candidates (user_id TEXT, rank INTEGER)")
    with pytest.raises(LeadreError, match="publish the day again"):
        store.candidates("u1")
    store.replace(rows("candidates", candidates("u1", "a1")), DAY)
    assert [(c["ad_id"], c["source"]) for c in store.candidates("u1")] == [("a1", "model")]
