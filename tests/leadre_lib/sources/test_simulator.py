"""The simulated log: contracts, repeatability, dirt, the funnel, propensities, and known truth."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import pytest

from leadre_lib.contracts import RAW_TABLES, load_contract
from leadre_lib.errors import LeadreError
from leadre_lib.settings import load_settings
from leadre_lib.sources import open_source
from leadre_lib.sources.simulator import Simulator
from leadre_lib.sources.vocabulary import LEAVES, PRODUCTS
from leadre_lib.sources.world import TASTES, TOPICS, Market

DAY0 = dt.date(2026, 3, 2)
DAY1 = DAY0 + dt.timedelta(days=1)
SIZES = {"users": 600, "ads": 400, "new_ads_per_day": 10, "first_ds": DAY0, "history_days": 4}


def make(seed: int = 7, **sizes: object) -> Simulator:
    return Simulator(load_settings(seed=seed, simulator={**SIZES, **sizes}))


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return make()


@pytest.fixture(scope="module")
def days(simulator: Simulator) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    first, second = (
        {name: table.to_pandas() for name, table in simulator.raw_day(ds).items()}
        for ds in (DAY0, DAY1)
    )
    return first, second


def known(events: pd.DataFrame) -> pd.DataFrame:
    """Each event of known users and ads once; the id of an unknown one is longer."""
    whole = events["user_id"].str.len().eq(8) & events["ad_id"].str.len().eq(8)
    return events[whole].drop_duplicates("event_id")


def test_tables_are_the_contracts(simulator: Simulator) -> None:
    day = simulator.raw_day(DAY1)
    assert list(day) == list(RAW_TABLES)
    for name, table in day.items():
        assert table.schema.equals(load_contract(name).arrow_schema())
        assert table.num_rows > 0
        for column in load_contract(name).properties:
            if column.get("required") and column["name"] != "ds":
                assert table[column["name"]].null_count == 0, column["name"]


def test_a_day_depends_on_seed_and_date_alone(simulator: Simulator) -> None:
    later = DAY0 + dt.timedelta(days=9)
    alone = make().raw_day(later)
    for ds in (DAY0, DAY1):
        simulator.raw_day(ds)
    after_others = simulator.raw_day(later)
    other = make(seed=8).raw_day(later)
    for name in RAW_TABLES:
        assert alone[name].equals(after_others[name])
        assert not alone[name].equals(other[name])


def test_days_before_the_first_are_refused(simulator: Simulator) -> None:
    assert simulator.first_ds() == DAY0
    assert simulator.last_ds() is None
    with pytest.raises(LeadreError, match="2026-03-01"):
        simulator.raw_day(DAY0 - dt.timedelta(days=1))


def test_lake_is_no_generator() -> None:
    with pytest.raises(LeadreError, match="own systems"):
        open_source(load_settings(source="lake"))


def test_ads_are_a_snapshot_that_grows(days: tuple[dict, dict]) -> None:
    first, second = (day["raw_ads"] for day in days)
    assert len(first) == 400 + 10 * (4 + 1)
    assert len(second) == len(first) + 10
    pd.testing.assert_frame_equal(first, second.head(len(first)))
    assert second["start_date"].max() == DAY1 + dt.timedelta(days=1)
    assert (second["stop_date"].dropna() > second["start_date"][second["stop_date"].notna()]).all()
    assert second["stop_date"].dropna().le(DAY1).any()
    assert second["title"].str.split().str.len().between(4, 10).all()
    assert set(second["category"]) <= {leaf.path for leaf in LEAVES}
    per_object = second.groupby("marketing_object_id")
    assert 2 < per_object.size().mean() < 3
    assert (per_object["category"].nunique() == 1).all()


def test_first_day_holds_the_history_and_later_days_only_late_rows(
    days: tuple[dict, dict],
) -> None:
    for name in ("raw_ad_events", "raw_content_events"):
        first, second = (day[name] for day in days)
        begin = pd.Timestamp(DAY0, tz="UTC") - pd.Timedelta(days=4)
        assert first["event_time"].dt.floor("D").min() == begin
        assert first["event_time"].dt.floor("D").max() == pd.Timestamp(DAY0, tz="UTC")
        on_time = second["event_time"].dt.floor("D") == pd.Timestamp(DAY1, tz="UTC")
        late = second["event_time"].dt.floor("D") == pd.Timestamp(DAY0, tz="UTC")
        assert (on_time | late).all()
        assert 0.002 < late.mean() < 0.03
        assert first["event_id"].is_monotonic_increasing


def test_ids_repeat_rarely_and_only_with_their_row(days: tuple[dict, dict]) -> None:
    for name in ("raw_ad_events", "raw_content_events"):
        both = pd.concat([day[name] for day in days])
        repeated = both["event_id"].duplicated()
        assert 0.002 < repeated.mean() < 0.01
        assert not both.drop_duplicates()["event_id"].duplicated().any()
        shared = set(days[0][name]["event_id"]) & set(days[1][name]["event_id"])
        assert shared, "some repeats arrive a day later"


def test_few_events_are_of_unknown_users_or_ads(days: tuple[dict, dict]) -> None:
    day = days[0]
    events = day["raw_ad_events"]
    strangers = ~events["user_id"].isin(day["raw_users"]["user_id"])
    unknown_ads = ~events["ad_id"].isin(day["raw_ads"]["ad_id"])
    assert 0 < strangers.mean() < 0.005
    assert 0 < unknown_ads.mean() < 0.005


def test_every_click_and_conversion_follows_its_impression(days: tuple[dict, dict]) -> None:
    events = known(pd.concat([day["raw_ad_events"] for day in days])).sort_values("event_time")
    begun = events[events["event_type"].isin(["impression"])]
    earliest = begun.groupby(["user_id", "ad_id"])["event_time"].min().rename("shown")
    rest = events[events["event_type"] != "impression"].join(earliest, ["user_id", "ad_id"])
    # an impression itself may be late or of an unknown user, so a few have none
    assert (rest["event_time"] > rest["shown"]).mean() > 0.98
    bought = events[events["event_type"] == "conversion"]
    clicks = events[events["event_type"] == "click"]
    clicked = clicks.groupby(["user_id", "ad_id"])["event_time"].min().rename("clicked")
    bought = bought.join(clicked, ["user_id", "ad_id"])
    assert (bought["event_time"] > bought["clicked"]).mean() > 0.98
    assert bought["gmv"].notna().all()
    assert events.loc[events["event_type"] != "conversion", "gmv"].isna().all()
    assert events["ecpm"].gt(0).all()
    assert events.groupby("ad_id")["ecpm"].nunique().gt(1).mean() > 0.9


def test_only_active_ads_are_shown(days: tuple[dict, dict]) -> None:
    ads = days[1]["raw_ads"].set_index("ad_id")
    events = known(pd.concat([day["raw_ad_events"] for day in days]))
    shown = events[events["event_type"] == "impression"]
    day = shown["event_time"].dt.date
    start = shown["ad_id"].map(ads["start_date"])
    stop = shown["ad_id"].map(ads["stop_date"])
    assert (start <= day).all()
    assert (stop.isna() | (stop.fillna(dt.date.max) > day)).all()


def test_rates_are_those_of_the_settings(days: tuple[dict, dict]) -> None:
    rates = days[1]["raw_ad_events"]["event_type"].value_counts() / SIZES["users"]
    assert 4.5 < rates["impression"] < 7.5
    assert 0.7 < rates["click"] < 1.7
    assert 0.3 < rates["conversion"] < 0.8
    assert 0 < rates["dismiss"] < 0.5
    content = make(content_events_per_day=0.0).raw_day(DAY1)["raw_content_events"]
    assert content.num_rows == 0
    assert len(days[1]["raw_content_events"]) / SIZES["users"] == pytest.approx(3.0, rel=0.2)


def test_propensities_are_the_policy_probabilities(
    simulator: Simulator, days: tuple[dict, dict]
) -> None:
    events = known(days[1]["raw_ad_events"])
    shown = events[(events["event_type"] == "impression") & events["propensity"].notna()]
    # the mean of 1 / propensity over a policy's own draws is the number of its choices
    active = len(simulator.world.market(DAY1.toordinal()))
    assert (1 / shown["propensity"]).mean() == pytest.approx(active, rel=0.15)


def test_truth_predicts_conversions_and_popularity_hardly(
    simulator: Simulator, days: tuple[dict, dict]
) -> None:
    history, day = known(days[0]["raw_ad_events"]), known(days[1]["raw_ad_events"])
    cases = day[day["event_type"] == "conversion"]
    best = simulator.truth(DAY1, top=10).to_pandas()
    hits = cases.merge(best, on=["user_id", "ad_id"])
    bought = history[history["event_type"] == "conversion"]
    popular = bought["ad_id"].value_counts().index[:10]
    by_popularity = cases["ad_id"].isin(popular).mean()
    assert len(hits) / len(cases) > 0.3
    assert len(hits) / len(cases) > 2.5 * by_popularity


def test_affinity_agrees_with_truth_and_knows_stopped_ads(
    simulator: Simulator, days: tuple[dict, dict]
) -> None:
    best = simulator.truth(DAY1, top=3).to_pandas()
    one = best[best["user_id"] == best["user_id"].iloc[0]]
    given = simulator.affinity([one["user_id"].iloc[0]], one["ad_id"].tolist(), DAY1)
    np.testing.assert_allclose(given[0], one["affinity"])
    assert one["affinity"].is_monotonic_decreasing
    ads = days[1]["raw_ads"]
    stopped = ads[ads["stop_date"].notna() & (ads["stop_date"].fillna(dt.date.max) <= DAY1)]
    users = days[1]["raw_users"]["user_id"].tolist()
    assert simulator.affinity(users, stopped["ad_id"].tolist(), DAY1).max() == 0.0


def test_content_reveals_interests_before_ads(days: tuple[dict, dict]) -> None:
    bought = known(days[1]["raw_ad_events"])
    bought = bought[bought["event_type"] == "conversion"]
    leaf = bought["ad_id"].map(days[1]["raw_ads"].set_index("ad_id")["category"])
    seen = days[0]["raw_content_events"].groupby("user_id")["category"].agg(set)
    own = bought["user_id"].map(seen).fillna("").map(set)
    others = own.sample(frac=1, random_state=0)
    chance = [c in s for c, s in zip(leaf, others, strict=True)]
    own = [c in s for c, s in zip(leaf, own, strict=True)]
    assert np.mean(own) > 2 * np.mean(chance)


def test_interests_drift(simulator: Simulator) -> None:
    near = simulator.truth(DAY1, top=1).to_pandas().set_index("user_id")["ad_id"]
    far = simulator.truth(DAY1 + dt.timedelta(days=40), top=1).to_pandas()
    far = far.set_index("user_id")["ad_id"]
    users = near.index.intersection(far.index)
    assert (near[users] == far[users]).mean() < 0.5


def test_market_picks_ads_as_often_as_their_share() -> None:
    rng = np.random.default_rng(0)
    topic = np.array([0, 0, 0, 1, PRODUCTS, PRODUCTS + 1])
    market = Market(np.arange(6), topic, rng.uniform(0.5, 2.0, (TASTES, 6)))
    draws = rng.random(40000)
    for wish in (0, 1, 2, PRODUCTS):  # topic 2 has no ads of its own
        shares = market.share(np.array(3), np.array(wish), np.arange(6))
        assert shares.sum() == pytest.approx(1.0)
        picked = market.pick(np.full(40000, 3), np.full(40000, wish), draws)
        np.testing.assert_allclose(np.bincount(picked, minlength=6) / 40000, shares, atol=0.01)
    nowhere = market.pick(np.array([0]), np.array([TOPICS - 1]), np.array([0.5]))
    assert nowhere[0] == -1
