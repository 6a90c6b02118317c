"""What the evaluation job reads of the past, and what it says of the fusion."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np

from jobs.evaluate import _fuse, _past
from leadre_lib.catalogue import catalogue
from leadre_lib.comparison import Cases, interactions
from leadre_lib.evaluation import Histories
from leadre_lib.fusion import MIN_CASES, Written
from leadre_lib.lake import Lake
from leadre_lib.settings import load_settings
from tests.worlds import DAY0, DAY1, ad, at, rows


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


def test_what_the_signals_say_alone_stands_beside_what_is_fused(tmp_path: Path) -> None:
    """The model writes what is wanted first, and nothing else tells it."""
    rng, objects, beam = np.random.default_rng(0), 40, 4
    names = [f"o{n:02}" for n in range(objects)]
    sids = [
        {"ad_id": name, "marketing_object_id": name, "semantic_id": f"<a_{n}>"}
        | {"codes": [n, 0], "text_hash": "", "codebook": "book"}
        for n, name in enumerate(names)
    ]
    sold = [{**ad(name, name, marketing_object_id=name), "text_hash": ""} for name in names]
    ads = catalogue(rows("ads", sold), rows("ad_semantic_ids", sids), DAY0)
    events = [("e", f"u{n}", at(DAY0, 1)) for n in range(5)]
    publish(Lake(tmp_path), DAY0, events)
    settings = load_settings(home=tmp_path)
    past = interactions(_past(settings, Lake(tmp_path), DAY1), ads)
    cases, written = {}, {}
    for split, count in (("valid", 4 * MIN_CASES), ("test", 50)):
        lists = np.argsort(rng.random((count, objects)), axis=1)[:, :beam]
        written[split] = Written(lists, np.tile(-np.arange(1.0, beam + 1), (count, 1)))
        before = Histories.of([[int(row)] for row in rng.integers(0, objects, count)])
        cases[split] = Cases(["p"] * count, before, lists[:, 0].copy(), np.full(count, np.nan))
    found = _fuse(settings, ads, past, cases, written)
    assert found is not None
    factors, ranked = found
    assert factors.model > 0
    hits = {
        (method, split): (of.rank == 1).mean()
        for method, splits in ranked.items()
        for split, of in splits.items()
    }
    assert hits["leadre-fused", "test"] > 0.9
    assert hits["leadre-fused", "valid"] > 0.9
    assert hits["leadre-signals", "test"] < 0.3
    assert hits["leadre-signals", "valid"] < 0.3
    few = {
        split: Cases(of.prompts[:9], of.histories.slice(0, 9), of.target[:9], of.ecpm[:9])
        for split, of in cases.items()
    }
    less = {split: Written(of.objects[:9], of.scores[:9]) for split, of in written.items()}
    assert _fuse(settings, ads, past, few, less) is None
