"""What the evaluation job reads of the past."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from jobs.evaluate import _past
from leadre_lib.lake import Lake
from leadre_lib.settings import load_settings
from tests.worlds import DAY0, DAY1, at, rows


def publish(lake: Lake, ds: dt.date, events: list[tuple[str, str, dt.datetime]]) -> None:
    """Conversions of a day: event, user and time."""
    records = [
        {"event_id": name, "user_id": who, "domain": "ad", "event_type": "conversion"}
        | {"item_id": name, "title": "", "category": "", "event_time": when}
        for name, who, when in events
    ]
    with lake.begin("behaviours", ds) as attempt:
        attempt.write(rows("behaviours", records))
        attempt.commit()


def test_baselines_learn_each_users_past_in_the_order_of_time(tmp_path: Path) -> None:
    lake, today = Lake(tmp_path), DAY1 + dt.timedelta(days=1)
    first = [("e4", "u2", at(DAY0, 9)), ("e3", "u1", at(DAY0, 8)), ("e9", "u1", at(DAY0, 7))]
    late = [("e1", "u1", at(DAY0, 7, 30)), ("e2", "u2", at(DAY0, 9)), ("e5", "u1", at(DAY1, 1))]
    publish(lake, DAY0, first)
    publish(lake, DAY1, late)
    publish(lake, today, [("e0", "u1", at(today, 1))])
    past = _past(load_settings(home=tmp_path), lake, today)
    assert past["event_id"].to_pylist() == ["e9", "e1", "e3", "e5", "e2", "e4"]
