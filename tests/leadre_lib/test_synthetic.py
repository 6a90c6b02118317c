"""Synthetic histories: they go on as the signals say, repeat from their seed, keep their rules."""

from __future__ import annotations

import numpy as np
import pytest

from leadre_lib.evaluation import Histories
from leadre_lib.fusion import Factors, Fusion, learn_signals, nothing_written
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import ExampleSettings, FusionSettings
from leadre_lib.signals import Taken, build_signals
from leadre_lib.synthetic import AMONG, Synthetic, Teacher, prefixes, synthetic_histories

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


def last_steps(taken: Histories) -> tuple[np.ndarray, np.ndarray]:
    """What each user took last, foretold from all before it."""
    return taken.offsets[1:] - 1, taken.offsets[1:] - 1


def made(
    meaning: EmbeddingIndex,
    taken: Histories,
    active: np.ndarray = ALL,
    examples: ExampleSettings = EXAMPLES,
    seed: int = 3,
    repeat: bool = True,
) -> Synthetic:
    wanted = last_steps(taken)
    return synthetic_histories(
        TEXTS, meaning, active, Taken.at_once(taken), wanted, examples, FUSION, seed, repeat
    )


def steps(made: Synthetic) -> tuple[np.ndarray, np.ndarray]:
    """The latest step of each history, and what comes next, as often as it was drawn."""
    latest = made.histories.values[made.histories.offsets[1:] - 1]
    return np.repeat(latest[made.nexts.cases], made.draws), np.repeat(made.nexts.values, made.draws)


def test_without_users_they_stay_among_what_means_alike(meaning: EmbeddingIndex) -> None:
    found = made(meaning, NOBODY)
    assert len(found.histories) == len(found.nexts) == OBJECTS * 4
    assert set(np.diff(found.histories.offsets)) == {1, 2, 3, 4, 5}
    before, after = steps(found)
    assert (before // 10 == after // 10).mean() > 0.9
    firsts = found.histories.values[found.histories.offsets[:-1]]
    assert np.bincount(firsts).tolist() == [4] * OBJECTS


def test_they_learn_from_users_what_counts(meaning: EmbeddingIndex) -> None:
    signals = build_signals(TEXTS, meaning, Taken.at_once(habit()), FUSION)
    factors = learn_signals(signals, ALL, Taken.at_once(habit()), last_steps(habit()), FUSION, 1)
    assert factors is not None
    assert factors.taken > 3
    before, after = steps(made(meaning, habit()))
    assert ((before + 17) % OBJECTS == after).mean() > 0.5
    assert learn_signals(signals, ALL, Taken.at_once(NOBODY), last_steps(NOBODY), FUSION, 1) is None


def test_what_comes_next_is_drawn_as_often_as_its_probability_says(
    meaning: EmbeddingIndex,
) -> None:
    signals = build_signals(TEXTS, meaning, Taken.at_once(habit()), FUSION)
    fusion, factors = Fusion(signals, ALL, FUSION), Factors(meaning=8.0, taken=12.0)
    begun = Histories.of([[n, (n + 5) % OBJECTS] for n in range(OBJECTS)])
    found = Teacher(fusion, factors, True).nexts(begun, 8, np.random.default_rng(1))
    objects, log_p = fusion.rank(factors, nothing_written(OBJECTS), begun, AMONG)
    share = np.exp(log_p)
    expected = np.zeros((OBJECTS, OBJECTS))
    np.put_along_axis(expected, objects, 8 * share / share.sum(axis=1, keepdims=True), 1)
    drawn = np.zeros((OBJECTS, OBJECTS))
    drawn[found.nexts.cases, found.nexts.values] = found.draws
    assert np.abs(drawn - expected).max() < 1
    assert (drawn.sum(axis=1) == 8).all()
    assert (found.draws > 1).any()


def test_half_of_them_are_what_users_took(meaning: EmbeddingIndex) -> None:
    # Users go on by what no signal says: nobody could draw it.
    steps = Histories.of([[n, (n + 23) % OBJECTS, (n + 31) % OBJECTS] for n in range(0, 60, 3)])
    found = made(meaning, steps).histories
    lists = {tuple(part.tolist()) for part in np.split(steps.values, steps.offsets[1:-1])}
    own = [tuple(part.tolist()) for part in np.split(found.values, found.offsets[1:-1])]
    begun = {rows[:n] for rows in lists for n in (1, 2, 3)}
    assert all(rows in begun for rows in own[: len(own) // 2])
    assert len(lists & set(own)) > len(lists) / 2


def test_the_same_seed_gives_the_same(meaning: EmbeddingIndex) -> None:
    one, two, other = (made(meaning, habit(), seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.histories.values, two.histories.values)
    assert np.array_equal(one.histories.offsets, two.histories.offsets)
    assert np.array_equal(one.nexts.values, two.nexts.values)
    assert np.array_equal(one.draws, two.draws)
    assert not np.array_equal(one.histories.values, other.histories.values)


def test_only_active_objects_occur_and_none_twice_where_none_may(meaning: EmbeddingIndex) -> None:
    some = np.arange(OBJECTS) % 3 > 0
    found = made(meaning, habit(), active=some, repeat=False)
    before, after = found.histories, found.nexts
    assert some[before.values].all()
    assert some[after.values].all()
    pairs = np.concatenate(
        [before.cases * OBJECTS + before.values, after.cases * OBJECTS + after.values]
    )
    assert len(np.unique(pairs)) == len(pairs)
    assert len(after.values) > len(after)


def test_the_cap_holds_and_none_are_made_where_none_can_be(meaning: EmbeddingIndex) -> None:
    few = EXAMPLES.model_copy(update={"max_synthetic_histories": 31})
    assert len(made(meaning, habit(), examples=few).histories) == 31
    none = EXAMPLES.model_copy(update={"synthetic_per_ad": 0})
    assert len(made(meaning, habit(), examples=none).histories) == 0
    assert len(made(meaning, NOBODY, active=np.arange(OBJECTS) == 3).histories) == 0


def test_beginnings_are_real_steps_up_to_a_random_one() -> None:
    taken = Histories.of([[1, 2, 3, 4], [], [5]])
    found = prefixes(taken, ALL, 200, 2, np.random.default_rng(2))
    lists = {tuple(part.tolist()) for part in np.split(found.values, found.offsets[1:-1])}
    assert lists == {(1,), (1, 2), (2, 3), (3, 4), (5,)}
    kept = prefixes(taken, np.arange(OBJECTS) != 2, 200, 2, np.random.default_rng(2))
    assert 2 not in kept.values
    assert len(prefixes(NOBODY, ALL, 5, 2, np.random.default_rng(2))) == 0
