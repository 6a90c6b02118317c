"""The truth of the simulated ad world: who users are, what they want and when, what ads there are.

Users hold interest episodes. An episode is about one topic (a product of a leaf category); it
starts on some day, shows in the content that the user consumes at once, in the ads that they
respond to one or two days later, and fades. Which ad of a topic a user takes depends on a taste
that they share with others, on what the ad sells, and on how fresh it is.

Everything is a pure function of the seed and of a day, so that any day can be had without the days
before it. Days are ordinals (`datetime.date.toordinal`); users, ads and marketing objects are row
numbers. Knows nothing of ids, logs or tables.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from leadre_lib.settings import SimulatorSettings
from leadre_lib.sources.vocabulary import (
    BRANDS,
    CITIES,
    EDUCATIONS,
    LEAVES,
    OCCUPATIONS,
    PITCHES,
    PRODUCTS,
    QUALITIES,
    WORDINGS,
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Rows = TypeVar("Rows", "Objects", "Ads", "Episodes")

TOPICS = len(LEAVES) * PRODUCTS
TASTES = 6
HOMES = 3  # topics that a user's episodes come back to
ADS_PER_OBJECT = 2.5
NEVER = np.iinfo(np.int64).max  # stop day of an open-ended ad

# Every WINDOW days a user begins SLOTS episodes, each heard of for WINDOWS such windows
WINDOW, SLOTS, WINDOWS = 5, 2, 3
SPAN = WINDOW * WINDOWS
FADE_DAYS = 4.0
FOCUS = 0.75  # part of an episode's wishes that are for its topic; the others are for its leaf


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Random numbers that depend on the seed, what they are for, and nothing else but `keys`."""
    return np.random.default_rng([seed % 2**63, zlib.crc32(purpose.encode()), *keys])


def choose(cumulative: Floats, draws: Floats) -> Ints:
    """For each row, the first column whose cumulative weight exceeds the draw (a fraction).

    Args:
        cumulative: [rows, columns], not normalised; a row without weight gives its last column.
        draws: [rows], in [0, 1).
    """
    reached = cumulative <= (draws * cumulative[:, -1])[:, None]
    return np.minimum(reached.sum(axis=1), cumulative.shape[1] - 1)


@dataclass(frozen=True)
class Population:
    """All users: profile codes (-1: not stated) and what they are like, one row a user."""

    age: Ints
    gender: Ints
    residence: Ints
    education: Ints
    occupation: Ints
    segment: Ints  # what an id-based policy knows of a user: age band and gender
    taste: Ints
    activity: Floats  # 1.0 on average
    leaf_weights: Floats  # [users, leaves]; each row sums to 1
    homes: Ints  # [users, HOMES] topics


@dataclass(frozen=True)
class Objects:
    """Marketing objects, one row each."""

    leaf: Ints
    product: Ints
    brand: Ints
    quality: Ints
    worth: Floats
    price: Floats


@dataclass(frozen=True)
class Ads:
    """Ads, one row each; `object` is a row of `Objects`, `stop` the first day without it."""

    object: Ints
    start: Ints
    stop: Ints
    bid: Floats
    wording: Ints
    pitch: Ints
    charm: Floats


@dataclass(frozen=True)
class Episodes:
    """The interest episodes that a day can hear of: [users, episodes], draws [..., SPAN]."""

    topic: Ints
    start: Ints
    lag: Ints  # days that ads lag behind content
    fade: Floats
    wants: Floats  # per day of age: whether an ad is wanted, as a uniform draw
    picks: Floats  # per day of age: which one, as a uniform draw

    def content_strength(self, day: int) -> Floats:
        """How strongly each episode shows in content on a day, 0 to 1."""
        return self._strength(day - self.start)

    def ad_strength(self, day: int) -> Floats:
        """How strongly each episode shows in the response to ads on a day, 0 to 1."""
        return self._strength(day - self.start - self.lag)

    def _strength(self, age: Ints) -> Floats:
        return np.where(age >= 0, np.exp(-np.maximum(age, 0) / self.fade), 0.0)


def _concatenate(parts: list[Rows], axis: int = 0) -> Rows:
    kind = type(parts[0])
    return kind(
        **{f.name: np.concatenate([getattr(p, f.name) for p in parts], axis) for f in fields(kind)}
    )


class Market:
    """The ads that are active on one day, in topic order, and how much each taste likes them.

    Positions in a market are not rows of `Ads`; `rows` maps them.
    """

    def __init__(self, rows: Ints, topic: Ints, appeal: Floats) -> None:
        """Take active rows [ads], their topics [ads] and appeal [TASTES, ads]."""
        order = np.argsort(topic, kind="stable")
        self.rows = rows[order]
        self.topic = topic[order]
        self.leaf = self.topic // PRODUCTS
        self.appeal = appeal[:, order]
        total = np.cumsum(self.appeal, axis=1)
        # one ascending array for all tastes: taste t runs from t to t + 1
        self._edges = np.concatenate([np.zeros((TASTES, 1)), total / total[:, -1:]], axis=1)
        self._edges += np.arange(TASTES)[:, None]
        self._bounds = np.searchsorted(self.topic, np.arange(TOPICS + 1))

    def __len__(self) -> int:
        return len(self.rows)

    def _segment(self, topic: Ints, focused: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        leaf = topic // PRODUCTS * PRODUCTS
        return (
            self._bounds[np.where(focused, topic, leaf)],
            self._bounds[np.where(focused, topic + 1, leaf + PRODUCTS)],
        )

    def _has_topic(self, topic: Ints) -> NDArray[np.bool_]:
        return self._bounds[topic] < self._bounds[topic + 1]

    def pick(self, taste: Ints, topic: Ints, draws: Floats) -> Ints:
        """The position of the ad that a wish for a topic falls on; -1 where its leaf has none.

        The probability of an ad is what `share` says. All arguments are [wishes].
        """
        focused = (draws < FOCUS) & self._has_topic(topic)
        split = np.where(self._has_topic(topic), FOCUS, 0.0)
        rest = np.where(focused, draws / FOCUS, (draws - split) / (1.0 - split))
        first, last = self._segment(topic, focused)
        low, high = self._edges[taste, first], self._edges[taste, last]
        found = np.searchsorted(self._edges[:, 1:].ravel(), low + rest * (high - low), side="right")
        position = np.clip(found - taste * len(self), first, np.maximum(last - 1, first))
        return np.where(first < last, position, -1)

    def share(self, taste: Ints, topic: Ints, position: Ints) -> Floats:
        """The probability that a taste's wish for a topic falls on an ad; arguments broadcast."""
        leaf = topic // PRODUCTS * PRODUCTS
        in_topic = self._mass(taste, topic, topic + 1)
        in_leaf = self._mass(taste, leaf, leaf + PRODUCTS)
        own = self._edges[taste, position + 1] - self._edges[taste, position]
        focus = np.where(self._has_topic(topic), FOCUS, 0.0)
        of_topic = (self.topic[position] == topic) * focus / np.where(in_topic > 0, in_topic, 1.0)
        of_leaf = (self.leaf[position] == topic // PRODUCTS) * (1.0 - focus)
        return own * (of_topic + of_leaf / np.where(in_leaf > 0, in_leaf, 1.0))

    def _mass(self, taste: Ints, first: Ints, last: Ints) -> Floats:
        return self._edges[taste, self._bounds[last]] - self._edges[taste, self._bounds[first]]


class World:
    """The ad world of one seed. `start` is the day on which its log begins."""

    def __init__(self, seed: int, sizes: SimulatorSettings) -> None:
        """Derive nothing yet: each part is made when it is asked for."""
        self.seed = seed
        self.sizes = sizes
        self.start = sizes.first_ds.toordinal() - sizes.history_days

    @cached_property
    def population(self) -> Population:
        """All users."""
        rng = generator(self.seed, "users")
        count = self.sizes.users
        age = np.clip(rng.gamma(6.0, 4.2, count) + 14, 16, 85).astype(np.int64)
        gender = rng.choice([-1, 0, 1], count, p=[0.06, 0.47, 0.47])
        education = rng.binomial(len(EDUCATIONS) - 1, np.clip((age - 14) / 36, 0.05, 0.5))
        youngest, oldest = np.array([o[1:] for o in OCCUPATIONS]).T
        fits = (age[:, None] >= youngest) & (age[:, None] <= oldest)
        occupation = choose(np.cumsum(fits, axis=1), rng.random(count))
        leaf_weights = self._leaf_weights(age, gender)
        homes = choose(
            np.repeat(np.cumsum(leaf_weights, axis=1), HOMES, axis=0), rng.random(count * HOMES)
        )
        activity = rng.lognormal(-0.18, 0.6, count)
        return Population(
            age=age,
            gender=gender,
            residence=rng.integers(len(CITIES), size=count),
            education=np.where(rng.random(count) < 0.12, -1, education),
            occupation=np.where(rng.random(count) < 0.15, -1, occupation),
            segment=np.searchsorted([25, 35, 50], age, side="right") * 3 + gender + 1,
            taste=rng.integers(TASTES, size=count),
            activity=activity,
            leaf_weights=leaf_weights,
            homes=homes.reshape(count, HOMES) * PRODUCTS + _products(rng, (count, HOMES)),
        )

    def _leaf_weights(self, age: Ints, gender: Ints) -> Floats:
        rng = generator(self.seed, "leaves")
        popularity = rng.lognormal(0.0, 0.6, len(LEAVES))
        centre = np.array([leaf.age for leaf in LEAVES]) + rng.normal(0, 5, len(LEAVES))
        lean = np.array([leaf.lean for leaf in LEAVES])
        side = np.array([0.0, 1.0, -1.0])[gender + 1]  # not stated, female, male
        nearness = np.exp(-0.5 * ((age[:, None] - centre) / 14.0) ** 2)
        weights = popularity * (nearness + 0.02) * np.exp(1.2 * side[:, None] * lean)
        return weights / weights.sum(axis=1, keepdims=True)

    def catalogue(self, day: int) -> tuple[Objects, Ads]:
        """All objects and ads that are known on a day: those that start by the next day."""
        batches = [self._batch(number) for number in range(max(0, day + 1 - self.start) + 1)]
        return (
            _concatenate([objects for objects, _ in batches]),
            _concatenate([ads for _, ads in batches]),
        )

    def _batch(self, number: int) -> tuple[Objects, Ads]:
        """The ads that start on one day of the log; number 0 are those that were there before."""
        rng = generator(self.seed, "ads", number)
        old_objects = max(1, round(self.sizes.ads / ADS_PER_OBJECT))
        daily_objects = round(self.sizes.new_ads_per_day / ADS_PER_OBJECT)
        if number == 0:
            count, fresh, first = self.sizes.ads, old_objects, 0
            start = self.start - rng.integers(0, 30, count)
            of_old = np.zeros(count, dtype=bool)
        else:
            count, fresh = self.sizes.new_ads_per_day, daily_objects
            first = old_objects + (number - 1) * daily_objects
            start = np.full(count, self.start + number)
            of_old = rng.random(count) < (0.5 if fresh else 1.1)
        # deal the new objects out in turn, so that each has an ad
        own = first + np.arange(count) % max(fresh, 1)
        open_ended = rng.random(count) < 0.4
        stop = np.maximum(start, self.start) + 2 + rng.exponential(30.0, count).astype(np.int64)
        ads = Ads(
            object=np.where(of_old, rng.integers(old_objects, size=count), own),
            start=start,
            stop=np.where(open_ended, NEVER, stop),
            bid=np.round(rng.lognormal(-0.2, 0.5, count) + 0.05, 2),
            wording=rng.integers(len(WORDINGS), size=count),
            pitch=rng.integers(len(PITCHES), size=count),
            charm=rng.lognormal(0.0, 0.4, count),
        )
        return self._objects(rng, fresh), ads

    def _objects(self, rng: np.random.Generator, count: int) -> Objects:
        supply = self.population.leaf_weights.mean(axis=0) ** 0.5
        price = np.exp(generator(self.seed, "prices").normal(3.5, 1.0, TOPICS))
        leaf = rng.choice(len(LEAVES), count, p=supply / supply.sum())
        product = _products(rng, (count,))
        return Objects(
            leaf=leaf,
            product=product,
            brand=rng.integers(BRANDS, size=count),
            quality=rng.integers(QUALITIES, size=count),
            worth=rng.lognormal(0.0, 0.5, count),
            price=np.round(price[leaf * PRODUCTS + product] * rng.lognormal(0, 0.3, count), 2),
        )

    def market(self, day: int) -> Market:
        """The ads that are active on a day."""
        objects, ads = self.catalogue(day)
        rows = np.flatnonzero((ads.start <= day) & (ads.stop > day))
        sold = ads.object[rows]
        leaf, brand, quality = objects.leaf[sold], objects.brand[sold], objects.quality[sold]
        rng = generator(self.seed, "tastes")
        liking = rng.normal(0, 1.0, (TASTES, len(LEAVES), BRANDS))[:, leaf, brand]
        liking = liking + rng.normal(0, 0.7, (TASTES, len(LEAVES), QUALITIES))[:, leaf, quality]
        freshness = 0.6 + np.exp(-(day - ads.start[rows]) / 10.0)
        appeal = np.exp(liking) * objects.worth[sold] * ads.charm[rows] * freshness
        return Market(rows, leaf * PRODUCTS + objects.product[sold], appeal)

    def episodes(self, day: int) -> Episodes:
        """The episodes that a day can hear of: those that began in the last windows."""
        newest = day // WINDOW
        return _concatenate([self._window(newest - back) for back in range(WINDOWS)], axis=1)

    def _window(self, number: int) -> Episodes:
        """The episodes that begin in one window, [users, SLOTS]."""
        rng = generator(self.seed, "episodes", number)
        people = self.population
        shape = (self.sizes.users, SLOTS)
        leaf_edges = np.repeat(np.cumsum(people.leaf_weights, axis=1), SLOTS, axis=0)
        elsewhere = choose(leaf_edges, rng.random(shape).ravel()).reshape(shape) * PRODUCTS
        elsewhere = elsewhere + _products(rng, shape)
        home = np.take_along_axis(
            people.homes, rng.choice(HOMES, shape, p=[0.5, 0.3, 0.2]).astype(np.int64), axis=1
        )
        return Episodes(
            topic=np.where(rng.random(shape) < 0.65, home, elsewhere),
            start=number * WINDOW + rng.integers(0, WINDOW, shape),
            lag=rng.integers(1, 3, shape),
            fade=FADE_DAYS * rng.lognormal(0, 0.3, shape),
            wants=rng.random((*shape, SPAN)),
            picks=rng.random((*shape, SPAN)),
        )

    def affinity(
        self, users: Ints, positions: Ints, market: Market, episodes: Episodes, day: int
    ) -> Floats:
        """How much users want ads on a day: the sum over their episodes of strength × share.

        `users` (rows) and `positions` (in the market) broadcast against each other.
        """
        strength = episodes.ad_strength(day)[users]
        taste = self.population.taste[users][..., None]
        share = market.share(taste, episodes.topic[users], positions[..., None])
        return (strength * share).sum(axis=-1)


def _products(rng: np.random.Generator, shape: tuple[int, ...]) -> Ints:
    """Products of a leaf, the first ones drawn more often."""
    weights = 1.0 / np.arange(1, PRODUCTS + 1) ** 0.5
    return rng.choice(PRODUCTS, shape, p=weights / weights.sum())
