"""Synthetic histories: they go on as the signals say, repeat from their seed, keep their rules."""

from __future__ import annotations

import numpy as np
import pytest

from leadre_lib.evaluation import Histories
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import ExampleSettings, FusionSettings
from leadre_lib.synthetic import (
    BY_MEANING,
    learn_factors,
    prefixes,
    synthetic_histories,
)

RNG = np.random.default_rng(0)
OBJECTS, FAMILIES = 60, 6
# Ten objects around each of six directions: what is near to an object is of its own family.
VECTORS = np.repeat(np.eye(FAMILIES, 16), 10, axis=0) + 0.05 * RNG.normal(size=(OBJECTS, 16))
VECTORS = (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float32)
TEXTS = [f"family {'abcdef'[n // 10] * 5} number {n}" for n in range(OBJECTS)]
ALL = np.ones(OBJECTS, bool)
NOBODY = Histories.of([])
FUSION = FusionSettings(words=4)
EXAMPLES = ExampleSettings(synthetic_per_ad=4, synthetic_steps=5, synthetic_neighbours=10)


@pytest.fixture(scope="module")
def meaning() -> EmbeddingIndex:
    return EmbeddingIndex.build(VECTORS)


def habit(users: int = 200) -> Histories:
    """Users who go on by seventeen, into another family, whatever it means."""
    starts = np.random.default_rng(1).integers(0, OBJECTS, users)
    return Histories.of([[(s + 17 * n) % OBJECTS for n in range(4)] for s in starts])


def made(
    meaning: EmbeddingIndex,
    taken: Histories,
    active: np.ndarray = ALL,
    examples: ExampleSettings = EXAMPLES,
    seed: int = 3,
    repeat: bool = True,
) -> Histories:
    return synthetic_histories(TEXTS, meaning, active, taken, examples, FUSION, seed, repeat)


def steps(histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Each step and the one after it."""
    later = ~histories.firsts()
    return histories.values[np.flatnonzero(later) - 1], histories.values[later]


def test_without_users_they_stay_among_what_means_alike(meaning: EmbeddingIndex) -> None:
    found = made(meaning, NOBODY)
    assert len(found) == OBJECTS * 4
    lengths = np.diff(found.offsets)
    assert set(lengths) == {2, 3, 4, 5, 6}
    before, after = steps(found)
    assert (before // 10 == after // 10).mean() > 0.9
    assert np.bincount(found.values[found.firsts()]).tolist() == [4] * OBJECTS


def test_they_learn_from_users_what_counts(meaning: EmbeddingIndex) -> None:
    factors = learn_factors(TEXTS, meaning, ALL, habit(), FUSION, np.random.default_rng(1))
    assert factors.taken > 3
    before, after = steps(made(meaning, habit()))
    assert ((before + 17) % OBJECTS == after).mean() > 0.5
    alone = learn_factors(TEXTS, meaning, ALL, NOBODY, FUSION, np.random.default_rng(1))
    assert alone == BY_MEANING


def test_the_same_seed_gives_the_same(meaning: EmbeddingIndex) -> None:
    one, two, other = (made(meaning, habit(), seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.values, two.values)
    assert np.array_equal(one.offsets, two.offsets)
    assert not np.array_equal(one.values, other.values)


def test_only_active_objects_occur_and_none_twice_where_none_may(meaning: EmbeddingIndex) -> None:
    some = np.arange(OBJECTS) % 3 > 0
    found = made(meaning, habit(), active=some, repeat=False)
    assert some[found.values].all()
    pairs = found.cases * OBJECTS + found.values
    drawn = pairs[~found.firsts()]
    assert len(np.unique(pairs)) == len(pairs)
    assert len(drawn) > len(found) / 2


def test_the_cap_holds_and_none_are_made_where_none_can_be(meaning: EmbeddingIndex) -> None:
    few = EXAMPLES.model_copy(update={"max_synthetic_examples": 31})
    assert len(made(meaning, habit(), examples=few)) == 31
    none = EXAMPLES.model_copy(update={"synthetic_per_ad": 0})
    assert len(made(meaning, habit(), examples=none)) == 0
    assert len(made(meaning, NOBODY, active=np.arange(OBJECTS) == 3)) == 0


def test_beginnings_are_real_steps_up_to_a_random_one() -> None:
    taken = Histories.of([[1, 2, 3, 4], [], [5]])
    found = prefixes(taken, ALL, 200, 2, np.random.default_rng(2))
    lists = {tuple(part.tolist()) for part in np.split(found.values, found.offsets[1:-1])}
    assert lists == {(1,), (1, 2), (2, 3), (3, 4), (5,)}
    kept = prefixes(taken, np.arange(OBJECTS) != 2, 200, 2, np.random.default_rng(2))
    assert 2 not in kept.values
    assert len(prefixes(NOBODY, ALL, 5, 2, np.random.default_rng(2))) == 0
