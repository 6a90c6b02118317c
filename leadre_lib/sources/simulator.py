"""The simulator: the raw log that an ad platform would keep of the simulated world.

A platform shows ads by an id-based retrieval policy (what is popular in a coarse user segment, by
bid) and logs its propensities; users also come to ads on their own. Clicks, conversions and
dismissals follow from the truth in `world`, and the log has the dirt of real ones: repeated ids,
late rows, unknown users and ads. A day depends on the seed and its date alone.

The truth stays out of the raw tables; `affinity` and `truth` give it to evaluations. Knows nothing
of the lake.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from leadre_lib.contracts import load_contract
from leadre_lib.settings import Settings
from leadre_lib.sources import RawDay, check_range
from leadre_lib.sources.vocabulary import (
    BRANDS,
    CITIES,
    EDUCATIONS,
    GENDERS,
    LEAVES,
    OCCUPATIONS,
    PITCHES,
    SUBJECTS,
    TITLES,
    WORDINGS,
)
from leadre_lib.sources.world import (
    NEVER,
    PRODUCTS,
    SPAN,
    TOPICS,
    Ads,
    Floats,
    Ints,
    Market,
    Objects,
    World,
    choose,
    generator,
)

Bools = NDArray[np.bool_]

POLICY_PART = 5 / 6  # of all impressions; the others are of ads that users came to on their own
EXPLORATION = 0.1  # part of the policy's impressions that are drawn evenly
TEMPERATURE = 0.8
WISH_RATE = 0.6  # wishes an episode has on its strongest day, at 6 impressions a user-day
EPISODE_CONTENT = 0.8  # part of the content events that an episode at full strength brings about
REPEAT_PURCHASE = 0.1  # chance that a wish for an object that was already had is not given up
LATE, REPEATED, UNKNOWN = 0.01, 0.005, 0.002
LOOK_BACK = 2  # the longest way of a row from the day it was born to its partition, in days

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
EPOCH = dt.date(1970, 1, 1).toordinal()
EVENT_TYPES = ("impression", "click", "conversion", "dismiss")
SCENES = ("channels", "moments")
# [titles] how a content is consumed, and the rarer reactions to it
CONTENT_TYPES = ("play", "read", "search", "like", "share")


@dataclass(frozen=True)
class Visits:
    """Impressions and what came of them, one row each; a time that is NaN: it did not happen."""

    user: Ints
    position: Ints  # in the day's market
    propensity: Floats  # NaN: the user came on their own
    shown: Floats  # seconds since the day began
    clicked: Floats
    converted: Floats
    dismissed: Floats


class Simulator:
    """The simulated ad log as a source."""

    name = "simulator"
    has_ecpm = True

    def __init__(self, settings: Settings) -> None:
        """Make the world of the settings' seed; tables are made when they are asked for."""
        self.sizes = settings.simulator
        self.seed = settings.seed
        self.world = World(settings.seed, settings.simulator)
        self.made_from = {"seed": settings.seed, **settings.simulator.model_dump(mode="json")}
        self.notes = [
            "Everything is simulated: users, ads, content, prices and what users do; brands are "
            "invented.",
            f"The first day holds the {self.sizes.history_days} days before it as well.",
            "Impressions without a propensity are of ads that users came to on their own.",
        ]

    def first_ds(self) -> dt.date:
        """The day of the initial load."""
        return self.sizes.first_ds

    def last_ds(self) -> dt.date | None:
        """None: the world goes on."""
        return None

    def raw_day(self, ds: dt.date) -> RawDay:
        """The raw tables of one day.

        Raises:
            LeadreError: `ds` lies before the first day.
        """
        check_range(self, ds)
        return {
            "raw_users": self._raw_users(),
            "raw_ads": self._raw_ads(ds),
            "raw_ad_events": self._arrived("raw_ad_events", ds),
            "raw_content_events": self._arrived("raw_content_events", ds),
        }

    # ---- truth, for evaluations only

    def affinity(self, users: list[str], ads: list[str], ds: dt.date) -> Floats:
        """How much each user wants each ad on a day, [users, ads]; 0 for an ad that is not active.

        It is the expected number of wishes of the day that fall on the ad, up to the user's
        activity. Ids are those of the raw tables.
        """
        day = ds.toordinal()
        market, episodes = self.world.market(day), self.world.episodes(day)
        position = np.full(market.rows.max() + 2, -1)
        position[market.rows] = np.arange(len(market))
        wanted = position[np.minimum([int(ad[1:]) for ad in ads], len(position) - 1)]
        rows = np.array([int(user[1:]) for user in users])
        result = self.world.affinity(rows[:, None], np.maximum(wanted, 0), market, episodes, day)
        return np.where(wanted >= 0, result, 0.0)

    def truth(self, ds: dt.date, top: int = 20) -> pa.Table:
        """The ads that each user wants most on a day: user_id, ad_id, affinity (greater than 0)."""
        day = ds.toordinal()
        market, episodes = self.world.market(day), self.world.episodes(day)
        top = min(top, len(market))
        users, ads, values = [], [], []
        for first in range(0, self.sizes.users, 256):
            rows = np.arange(first, min(first + 256, self.sizes.users))
            affinity = self.world.affinity(
                rows[:, None], np.arange(len(market)), market, episodes, day
            )
            best = np.argsort(-affinity, axis=1, kind="stable")[:, :top]
            value = np.take_along_axis(affinity, best, axis=1)
            kept = value > 0
            users.append(np.repeat(rows, kept.sum(axis=1)))
            ads.append(market.rows[best[kept]])
            values.append(value[kept])
        return pa.table(
            {
                "user_id": _ids("u", np.concatenate(users)),
                "ad_id": _ids("a", np.concatenate(ads)),
                "affinity": np.concatenate(values),
            }
        )

    # ---- snapshots

    def _raw_users(self) -> pa.Table:
        people = self.world.population
        return _table(
            "raw_users",
            {
                "user_id": _ids("u", np.arange(self.sizes.users)),
                "age": people.age,
                "gender": _words(GENDERS, people.gender),
                "residence": _words(CITIES, people.residence),
                "education": _words(EDUCATIONS, people.education),
                "occupation": _words([name for name, _, _ in OCCUPATIONS], people.occupation),
            },
        )

    def _raw_ads(self, ds: dt.date) -> pa.Table:
        objects, ads = self.world.catalogue(ds.toordinal())
        sold = ads.object
        paths = _words([leaf.path for leaf in LEAVES], objects.leaf[sold])
        name = _object_names(objects).take(pa.array(sold))
        pitch = _words(PITCHES, ads.pitch)
        never = ads.stop == NEVER
        stop = pa.array(np.where(never, 0, ads.stop) - EPOCH, pa.int32(), mask=never)
        return _table(
            "raw_ads",
            {
                "ad_id": _ids("a", np.arange(len(sold))),
                "marketing_object_id": _ids("m", sold),
                "advertiser_id": _ids("v", objects.leaf[sold] * BRANDS + objects.brand[sold]),
                "title": _join(" ", name, _words(WORDINGS, ads.wording)),
                "description": _join(" ", _join("", name, "."), pitch),
                "category": paths,
                "bid": ads.bid,
                "start_date": pa.array(ads.start - EPOCH, pa.int32()).cast(pa.date32()),
                "stop_date": stop.cast(pa.date32()),
            },
        )

    # ---- events

    def _arrived(self, table: str, ds: dt.date) -> pa.Table:
        """The rows that arrived on a day; on the first day, also all that arrived before it."""
        day, begin = ds.toordinal(), self.world.start
        initial = ds == self.first_ds()
        born = range(begin if initial else max(begin, day - LOOK_BACK), day + 1)
        make = self._ad_events if table == "raw_ad_events" else self._content_events
        rows = pa.concat_tables([make(one) for one in born])
        arrival = rows["arrival"]
        kept = pc.less_equal(arrival, day) if initial else pc.equal(arrival, day)
        return rows.filter(kept).drop_columns("arrival").combine_chunks()

    def _ad_events(self, day: int) -> pa.Table:
        """All ad events that began on a day, with the day on which each arrives."""
        rng = generator(self.seed, "ad events", day)
        market = self.world.market(day)
        objects, ads = self.world.catalogue(day)
        popularity = self._popularity(market, ads, day)
        visits = [self._shown_by_policy(rng, market, popularity, ads, day)]
        visits.append(self._sought(rng, market, objects, ads, day))
        visits.append(self._complements(rng, market, ads, day, visits))
        visit = Visits(
            **{
                name: np.concatenate([getattr(v, name) for v in visits])
                for name in Visits.__dataclass_fields__
            }
        )
        times = np.stack([visit.shown, visit.clicked, visit.converted, visit.dismissed])
        kind, row = np.nonzero(~np.isnan(times))
        seconds = times[kind, row]
        order = np.lexsort((kind, visit.user[row], seconds))
        kind, row, seconds = kind[order], row[order], seconds[order]
        position = visit.position[row]
        sold = ads.object[market.rows[position]]
        gmv = objects.price[sold] * (1 + rng.poisson(0.1, len(row)))
        ecpm = self._ecpm(visit, market, popularity, ads)[row]
        return self._with_dirt(
            rng,
            "raw_ad_events",
            day,
            seconds,
            {
                "event_id": _event_ids("e", day, len(row)),
                "user_id": _ids("u", visit.user[row]),
                "ad_id": _ids("a", market.rows[position]),
                "event_type": _words(EVENT_TYPES, kind),
                "event_time": _times(day, seconds),
                "scene": _words(SCENES, (rng.random(len(visit.user)) < 0.4).astype(int)[row]),
                "ecpm": ecpm,
                "gmv": pa.array(np.round(gmv, 2), mask=kind != 2),
                "propensity": pa.array(visit.propensity[row], from_pandas=True),
            },
        )

    def _popularity(self, market: Market, ads: Ads, day: int) -> Floats:
        """What the policy takes for popular, [segments, ads of the market]; a row sums to 1.

        It learns from what segments did with an ad's id, so it underrates new ads.
        """
        people = self.world.population
        weights = np.zeros((12, len(LEAVES)))
        np.add.at(weights, people.segment, people.leaf_weights)
        weights += people.leaf_weights.mean(axis=0)
        appeal = market.appeal.mean(axis=0)
        of_leaf = np.bincount(market.leaf, appeal, len(LEAVES))
        known = 1.0 - np.exp(-(day - ads.start[market.rows] + 0.5) / 4.0)
        result = weights[:, market.leaf] * appeal / of_leaf[market.leaf] * known
        return result / result.sum(axis=1, keepdims=True)

    def _shown_by_policy(
        self, rng: np.random.Generator, market: Market, popularity: Floats, ads: Ads, day: int
    ) -> Visits:
        people = self.world.population
        rate = self.sizes.impressions_per_day * POLICY_PART * people.activity
        user = np.repeat(np.arange(self.sizes.users), rng.poisson(rate))
        # softmax of log(popularity * bid) / temperature, with even exploration
        scores = (popularity * ads.bid[market.rows]) ** (1.0 / TEMPERATURE)
        policy = (1 - EXPLORATION) * scores / scores.sum(axis=1, keepdims=True)
        policy += EXPLORATION / len(market)
        segment = people.segment[user]
        edges = np.cumsum(policy, axis=1)
        edges = edges / edges[:, -1:] + np.arange(12)[:, None]
        found = np.searchsorted(edges.ravel(), rng.random(len(user)) + segment, side="right")
        position = np.clip(found - segment * len(market), 0, len(market) - 1)
        episodes = self.world.episodes(day)
        affinity = self.world.affinity(user, position, market, episodes, day)
        lift = affinity * len(market)
        shown = _time_of_day(rng, len(user))
        click = rng.random(len(user)) < 0.04 + 0.6 * lift / (lift + 8.0)
        convert = click & (rng.random(len(user)) < 0.05 + 0.5 * lift / (lift + 8.0))
        dismiss = ~click & (rng.random(len(user)) < np.where(lift < 0.5, 0.05, 0.005))
        propensity = policy[segment, position]
        return _visits(rng, user, position, propensity, shown, click, convert, dismiss)

    def _sought(
        self, rng: np.random.Generator, market: Market, objects: Objects, ads: Ads, day: int
    ) -> Visits:
        """Ads that users came to on their own: at most one wish an episode and day."""
        people, episodes = self.world.population, self.world.episodes(day)
        age = day - episodes.start - episodes.lag
        rate = WISH_RATE * self.sizes.impressions_per_day / 6.0 * people.activity[:, None]
        ages = np.arange(SPAN)
        faded = np.exp(-ages / episodes.fade[..., None])
        wished = episodes.wants < rate[..., None] * faded
        now = np.clip(age, 0, SPAN - 1)[..., None]
        user, slot = np.nonzero(
            (age >= 0) & (age < SPAN) & np.take_along_axis(wished, now, axis=-1)[..., 0]
        )
        age, wished, picks = age[user, slot], wished[user, slot], episodes.picks[user, slot]
        taste, topic = people.taste[user], episodes.topic[user, slot]
        rows = np.arange(len(user))
        position = market.pick(taste, topic, picks[rows, age])
        # what the earlier wishes of this episode fell on, as the market is now
        earlier = market.pick(taste[:, None], topic[:, None], picks)
        sold = ads.object[market.rows]
        same = (sold[earlier] == sold[position][:, None]) & wished & (ages < age[:, None])
        kept = (position >= 0) & (~same.any(axis=1) | (rng.random(len(user)) < REPEAT_PURCHASE))
        user, position = user[kept], position[kept]
        shown = _time_of_day(rng, len(user))
        click = rng.random(len(user)) < 0.85
        convert = click & (rng.random(len(user)) < 0.55)
        no = np.zeros(len(user), dtype=bool)
        own = np.full(len(user), np.nan)
        return _visits(rng, user, position, own, shown, click, convert, no)

    def _complements(
        self, rng: np.random.Generator, market: Market, ads: Ads, day: int, visits: list[Visits]
    ) -> Visits:
        """After some purchases, another product of the leaf, 3 to 20 hours after the click."""
        bought = [~np.isnan(v.converted) for v in visits]
        user = np.concatenate([v.user[b] for v, b in zip(visits, bought, strict=True)])
        position = np.concatenate([v.position[b] for v, b in zip(visits, bought, strict=True)])
        clicked = np.concatenate([v.clicked[b] for v, b in zip(visits, bought, strict=True)])
        chosen = rng.random(len(user)) < 0.3
        user, position, clicked = user[chosen], position[chosen], clicked[chosen]
        topic = market.topic[position]
        following = topic // PRODUCTS * PRODUCTS + (topic + 1) % PRODUCTS
        taste = self.world.population.taste[user]
        found = market.pick(taste, following, rng.random(len(user)))
        shown = clicked + rng.uniform(3 * HOUR, 20 * HOUR, len(user))
        # it may be the next day by now
        active = ads.stop[market.rows[found]] > day + shown // DAY
        kept = (found != position) & active
        user, position, shown = user[kept], found[kept], shown[kept]
        yes, no = np.ones(len(user), dtype=bool), np.zeros(len(user), dtype=bool)
        convert = rng.random(len(user)) < 0.6
        own = np.full(len(user), np.nan)
        return _visits(rng, user, position, own, shown, yes, convert, no, longest=90 * MINUTE)

    def _ecpm(self, visit: Visits, market: Market, popularity: Floats, ads: Ads) -> Floats:
        """bid × estimated click rate × 1000; the estimate sees segments and noisy embeddings."""
        rng = generator(self.seed, "click model")
        users = rng.normal(0, 0.5, (self.sizes.users, 4))
        # an ad's embedding comes from its row alone, so that it stays when ads are added
        phases = rng.uniform(0, 2 * np.pi, 4)
        rows = market.rows[visit.position]
        embedding = np.sin(rows[:, None] * np.array([1.3, 2.7, 5.1, 7.9]) + phases)
        segment = self.world.population.segment[visit.user]
        relative = popularity[segment, visit.position] * len(market)
        rate = 0.05 * np.sqrt(relative) * np.exp((users[visit.user] * embedding).sum(axis=1))
        return np.round(ads.bid[rows] * np.clip(rate, 0.002, 0.5) * 1000.0, 4)

    def _content_events(self, day: int) -> pa.Table:
        """All content events of a day, with the day on which each arrives."""
        rng = generator(self.seed, "content events", day)
        people, episodes = self.world.population, self.world.episodes(day)
        rate = self.sizes.content_events_per_day * people.activity
        user = np.repeat(np.arange(self.sizes.users), rng.poisson(rate))
        # one more column for content that no episode is behind
        strength = episodes.content_strength(day)
        other = (1 - EPISODE_CONTENT) / EPISODE_CONTENT
        edges = np.cumsum(
            np.concatenate([strength, np.full((len(strength), 1), other)], axis=1), axis=1
        )
        slot = choose(edges[user], rng.random(len(user)))
        of_episode = slot < strength.shape[1]
        known = episodes.topic[user, np.minimum(slot, strength.shape[1] - 1)]
        topic = np.where(of_episode, known, rng.integers(TOPICS, size=len(user)))
        title = rng.integers(len(TITLES), size=len(user))
        content = (topic * SUBJECTS + rng.integers(SUBJECTS, size=len(user))) * len(TITLES) + title
        basic = np.array([CONTENT_TYPES.index(kind) for kind, _ in TITLES])[title]
        reaction = rng.choice([0, 3, 4], len(user), p=[0.85, 0.1, 0.05])
        kind = np.where((reaction > 0) & (basic != 2), reaction, basic)
        seconds = _time_of_day(rng, len(user))
        order = np.lexsort((user, seconds))
        user, content, kind = user[order], content[order], kind[order]
        seconds, leaf = seconds[order], topic[order] // PRODUCTS
        return self._with_dirt(
            rng,
            "raw_content_events",
            day,
            seconds,
            {
                "event_id": _event_ids("x", day, len(user)),
                "user_id": _ids("u", user),
                "content_id": _ids("c", content),
                "event_type": _words(CONTENT_TYPES, kind),
                "event_time": _times(day, seconds),
                "title": _words(_content_titles(), content),
                "category": _words([leaf.path for leaf in LEAVES], leaf),
            },
        )

    def _with_dirt(
        self,
        rng: np.random.Generator,
        table: str,
        day: int,
        seconds: Floats,
        columns: dict[str, pa.Array | NDArray],
    ) -> pa.Table:
        """The rows as they arrive: some late, some twice, some of unknown users or ads."""
        count = len(seconds)
        keys = ["user_id", "ad_id"] if table == "raw_ad_events" else ["user_id"]
        for key in keys:
            unknown = pa.array(rng.random(count) < UNKNOWN / len(keys))
            letter = pc.utf8_slice_codeunits(columns[key], 0, 1)
            number = pc.utf8_slice_codeunits(columns[key], 1)
            nobody = _join("9", letter, number)
            columns[key] = pc.if_else(unknown, nobody, columns[key])
        arrival = day + (seconds // DAY).astype(np.int64) + (rng.random(count) < LATE)
        # a repeated row comes at once, or once more a day after its event
        again = np.flatnonzero(rng.random(count) < REPEATED)
        next_day = np.maximum(arrival[again], day + (seconds[again] // DAY).astype(np.int64) + 1)
        second = np.where(rng.random(len(again)) < 0.5, arrival[again], next_day)
        row = np.concatenate([np.arange(count), again])
        arrival = np.concatenate([arrival, second])
        order = np.argsort(row, kind="stable")
        rows = _table(table, columns).take(pa.array(row[order]))
        return rows.append_column("arrival", pa.array(arrival[order]))


def _visits(
    rng: np.random.Generator,
    user: Ints,
    position: Ints,
    propensity: Floats,
    shown: Floats,
    click: Bools,
    convert: Bools,
    dismiss: Bools,
    longest: float = 22 * HOUR,
) -> Visits:
    """Give the times of what happened: a click in a minute, a purchase soon or hours later."""
    count = len(user)
    clicked = shown + rng.uniform(2.0, MINUTE, count)
    soon = rng.uniform(2 * MINUTE, 90 * MINUTE, count)
    later = rng.uniform(2 * HOUR, 22 * HOUR, count)
    delay = np.minimum(np.where(rng.random(count) < 0.7, soon, later), longest)
    return Visits(
        user=user,
        position=position,
        propensity=propensity,
        shown=shown,
        clicked=np.where(click, clicked, np.nan),
        converted=np.where(convert, clicked + delay, np.nan),
        dismissed=np.where(dismiss, shown + rng.uniform(1.0, 20.0, count), np.nan),
    )


def _time_of_day(rng: np.random.Generator, count: int) -> Floats:
    """Seconds since midnight; evenings are busiest."""
    return rng.triangular(0.0, 20.5 * HOUR, DAY - 1.0, count)


def _table(name: str, columns: dict[str, pa.Array | NDArray]) -> pa.Table:
    """The columns as the contract wants them."""
    schema = load_contract(name).arrow_schema()
    return pa.table([pa.array(columns[n]) for n in schema.names], schema.names).cast(schema)


def _ids(letter: str, numbers: Ints) -> pa.Array:
    return _join("", letter, pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 7, "0"))


def _event_ids(letter: str, day: int, count: int) -> pa.Array:
    """Ids that sort by day and time: there are fewer than 10⁹ events a day."""
    number = pc.utf8_lpad(pa.array(np.arange(count)).cast(pa.string()), 9, "0")
    return _join("-", f"{letter}{dt.date.fromordinal(day):%Y%m%d}", number)


def _times(day: int, seconds: Floats) -> pa.Array:
    micros = (day - EPOCH) * 86_400_000_000 + (seconds * 1000.0).astype(np.int64) * 1000
    return pa.array(micros).cast(pa.timestamp("us", "UTC"))


def _words(words: list[str] | tuple[str, ...], codes: Ints) -> pa.Array:
    """Words by code; null for -1."""
    return pa.array(list(words), pa.string()).take(pa.array(codes, mask=codes < 0))


def _join(separator: str, *parts: str | pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(*parts, separator)


def _object_names(objects: Objects) -> pa.Array:
    """Brand, quality and product; objects that would have one name are numbered in order."""
    names = [
        f"{brand} {quality} {product}"
        for leaf in LEAVES
        for product in leaf.products
        for brand in leaf.brands
        for quality in leaf.qualities
    ]
    topic = objects.leaf * PRODUCTS + objects.product
    code = (topic * BRANDS + objects.brand) * len(LEAVES[0].qualities) + objects.quality
    order = np.argsort(code, kind="stable")
    starts = np.searchsorted(code[order], code[order])
    nth = np.empty(len(code), dtype=np.int64)
    nth[order] = np.arange(len(code)) - starts
    plain = _words(names, code)
    numbered = _join(" ", plain, pa.array(nth + 1).cast(pa.string()))
    return pc.if_else(pa.array(nth > 0), numbered, plain)


def _content_titles() -> list[str]:
    """The titles of all contents, by content number."""
    return [
        title.format(product=product, subject=subject)
        for leaf in LEAVES
        for product in leaf.products
        for subject in leaf.subjects
        for _, title in TITLES
    ]
