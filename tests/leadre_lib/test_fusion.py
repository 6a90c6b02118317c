"""Fusion in a made-up world in which what was taken next is known to follow from one signal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from leadre_lib.evaluation import Histories
from leadre_lib.fusion import (
    MIN_CASES,
    Factors,
    Fusion,
    Written,
    learn_signals,
    look_up,
    strongest_columns,
)
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import FusionSettings
from leadre_lib.signals import Signals, Taken, build_signals

OBJECTS, FAMILIES, CASES = 120, 12, 400
SETTINGS = FusionSettings(near=20, words=8)
ALL = np.ones(OBJECTS, bool)


@pytest.fixture(scope="module")
def signals() -> Signals:
    """Objects of a family, every twelfth, mean nearly the same; people go on by seven."""
    rng = np.random.default_rng(1)
    families = rng.normal(size=(FAMILIES, 16))
    rows = families[np.arange(OBJECTS) % FAMILIES] + 0.2 * rng.normal(size=(OBJECTS, 16))
    vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    texts = [f"family {'abcdefghijkl'[n % FAMILIES] * 5}" for n in range(OBJECTS)]
    starts = rng.integers(0, OBJECTS, 600)
    walked = Histories.of([[s, (s + 7) % OBJECTS, (s + 14) % OBJECTS] for s in starts])
    return build_signals(texts, EmbeddingIndex.build(vectors), Taken.at_once(walked), SETTINGS)


def nothing(cases: int = CASES) -> Written:
    return Written(np.empty((cases, 0), np.int64), np.empty((cases, 0)))


def histories(rng: np.random.Generator) -> Histories:
    return Histories.of(rng.integers(0, OBJECTS, (CASES, 3)).tolist())


def hits(found: np.ndarray, target: np.ndarray) -> float:
    return float((found == target[:, None]).any(axis=1).mean())


def test_cases_say_which_signal_counts(signals: Signals) -> None:
    rng = np.random.default_rng(2)
    past = histories(rng)
    latest = past.values[2::3]
    written = Written(rng.integers(0, OBJECTS, (CASES, 1)), np.zeros((CASES, 1)))
    written.objects[:, 0] = (latest + 50) % OBJECTS
    targets = {
        "taken": (latest + 7) % OBJECTS,
        "meaning": (latest + FAMILIES * rng.integers(1, 9, CASES)) % OBJECTS,
        "written": written.objects[:, 0],
        "latest": latest,
    }
    fusion = Fusion(signals, ALL, SETTINGS)
    for name, target in targets.items():
        factors = fusion.fit(written, past, target)
        assert factors is not None
        found, scores = fusion.rank(factors, written, past, 10)
        assert hits(found, target) > 0.9, name
        assert (np.diff(scores, axis=1) <= 0).all()
        assert (np.exp(scores).sum(axis=1) <= 1 + 1e-6).all()
    by_model = fusion.fit(written, past, targets["written"])
    by_habit = fusion.fit(written, past, targets["taken"])
    assert by_model is not None
    assert by_habit is not None
    assert by_model.written > 3 > by_habit.written
    assert by_habit.taken > by_model.taken + 3


def test_a_model_counts_by_how_sure_it_is(signals: Signals) -> None:
    rng = np.random.default_rng(3)
    beam = np.argsort(rng.random((CASES, OBJECTS)), axis=1)[:, :8]
    log_p = np.sort(rng.normal(-3, 2, (CASES, 8)), axis=1)[:, ::-1]
    share = np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))
    place = (share.cumsum(axis=1) < rng.random((CASES, 1))).sum(axis=1).clip(0, 7)
    target = beam[np.arange(CASES), place]
    fusion = Fusion(signals, ALL, SETTINGS)
    factors = fusion.fit(Written(beam, log_p), histories(rng), target)
    assert factors is not None
    assert factors.model == pytest.approx(1.0, abs=0.2)  # the draws follow its probabilities


def test_only_what_is_active_and_wanted_is_ranked(signals: Signals) -> None:
    past = Histories.of([[5, 17], []])
    some = np.arange(OBJECTS) % 2 == 1
    near = Factors(meaning=5.0, popularity=1.0, seen=3.0)
    found, scores = Fusion(signals, some, SETTINGS).rank(near, nothing(2), past, 15)
    assert some[found[found >= 0]].all()
    assert set(found[0, :2]) == {5, 17}
    assert (found[1] >= 0).all()  # whoever has no history gets what is popular
    assert np.isfinite(scores[found >= 0]).all()
    without, _ = Fusion(signals, some, SETTINGS).rank(near, nothing(2), past, 15, unwanted=past)
    assert not {5, 17} & set(without[0])


def test_groups_have_room_for_so_many(signals: Signals) -> None:
    groups = np.arange(OBJECTS) % FAMILIES
    near = Factors(meaning=5.0)
    past = Histories.of([[5]])
    whole, _ = Fusion(signals, ALL, SETTINGS).rank(near, nothing(1), past, 8)
    found, scores = Fusion(signals, ALL, SETTINGS, groups, 2).rank(near, nothing(1), past, 8)
    assert (groups[whole] == 5).sum() > 2
    assert np.bincount(groups[found[0]]).max() == 2
    assert found[0, 0] == whole[0, 0]
    assert (np.diff(scores) <= 0).all()


def test_too_few_cases_fit_nothing(signals: Signals) -> None:
    few = np.full(CASES, -1)
    few[: MIN_CASES - 1] = 3
    rng = np.random.default_rng(4)
    assert Fusion(signals, ALL, SETTINGS).fit(nothing(), histories(rng), few) is None


def test_the_same_cases_are_ranked_alike_in_any_company(signals: Signals) -> None:
    rng = np.random.default_rng(5)
    past, fusion = histories(rng), Fusion(signals, ALL, SETTINGS)
    factors = Factors(meaning=2.0, words=1.0, taken=3.0)
    all_of_them, scores = fusion.rank(factors, nothing(), past, 10)
    alone, alone_scores = fusion.rank(factors, nothing(7), past.slice(300, 307), 10)
    assert np.array_equal(alone, all_of_them[300:307])
    assert alone_scores == pytest.approx(scores[300:307], abs=1e-6)


def test_entries_are_looked_up_and_the_strongest_found() -> None:
    matrix = sparse.csr_array(np.array([[0.0, 2, 1, 3], [0, 0, 0, 0], [5, 0, 5, 0]]))
    rows = np.array([[0, 0, 1], [2, 2, 0]])
    columns = np.array([[3, 0, 2], [2, -1, 1]])
    assert look_up(matrix, rows, columns).tolist() == [[3, 0, 0], [5, 0, 2]]
    assert look_up(sparse.csr_array((3, 4)), rows, columns).tolist() == [[0] * 3] * 2
    assert strongest_columns(matrix, 2).tolist() == [[3, 1], [-1, -1], [0, 2]]
    assert strongest_columns(sparse.csr_array((2, 4)), 2).shape == (2, 0)


def test_signals_are_learnt_from_what_users_wanted_last(signals: Signals) -> None:
    rng = np.random.default_rng(7)
    # They go on by seven, then take anything, and want what means the same as the second.
    walks = [
        [s, s + 7, rng.integers(0, OBJECTS), s + 7 + FAMILIES * rng.integers(1, 9)]
        for s in rng.integers(0, OBJECTS, 300)
    ]
    taken = Histories.of([np.array(walk) % OBJECTS for walk in walks])
    place = np.arange(len(taken.values))
    wanted = np.flatnonzero(place % 4 == 3), np.flatnonzero(place % 4 == 2)
    learnt = learn_signals(signals, ALL, Taken.at_once(taken), wanted, SETTINGS, 1)
    assert learnt is not None
    assert (learnt.model, learnt.written) == (0.0, 0.0)
    assert learnt.meaning + learnt.words > 10 > 3 > learnt.taken
    assert learn_signals(signals, ALL, Taken.at_once(taken), wanted, SETTINGS, 1) == learnt
    # What stands between the end of their history and what they wanted says nothing.
    changed = replace(taken, values=np.where(place % 4 == 2, 5, taken.values))
    assert learn_signals(signals, ALL, Taken.at_once(changed), wanted, SETTINGS, 1) == learnt
    # Cases say what a model is worth beside them.
    past = histories(rng)
    written = Written((past.values[2::3, None] + 50) % OBJECTS, np.zeros((CASES, 1)))
    fusion = Fusion(signals, ALL, SETTINGS)
    both = fusion.fit(written, past, written.objects[:, 0], None, learnt)
    assert both is not None
    assert both.written > 3
    # They move the others, too, the further the more there are.
    by_habit = (past.values[2::3] + 7) % OBJECTS
    found = [learnt.taken]
    for cases in (MIN_CASES, CASES):
        target = np.where(np.arange(CASES) < cases, by_habit, -1)
        fitted = fusion.fit(nothing(), past, target, None, learnt)
        assert fitted is not None
        found.append(fitted.taken)
    assert found[0] + 1 < found[1] < found[2] - 1
    few = wanted[0][: MIN_CASES - 1], wanted[1][: MIN_CASES - 1]
    assert learn_signals(signals, ALL, Taken.at_once(taken), few, SETTINGS, 1) is None


def test_what_is_the_same_for_all_counts_nothing(signals: Signals) -> None:
    rng = np.random.default_rng(6)
    past = histories(rng)
    same = replace(signals, takers=np.ones(OBJECTS))
    factors = Fusion(same, ALL, SETTINGS).fit(nothing(), past, past.values[2::3])
    assert factors is not None
    assert factors.popularity == factors.model == 0.0
    assert factors.latest > 1


def test_a_history_that_means_nothing_has_nothing_near_to_it(signals: Signals) -> None:
    without = replace(
        signals,
        vector_object=np.where(np.arange(OBJECTS) == 100, -1, np.arange(OBJECTS)),
        takers=np.arange(OBJECTS, 0.0, -1.0),
    )
    some = np.arange(OBJECTS) >= 60  # none of the popular ones
    one = FusionSettings(near=5, words=0)
    found, _ = Fusion(without, np.ones(OBJECTS, bool), one).rank(
        Factors(meaning=1.0), nothing(1), Histories.of([[100]]), OBJECTS
    )
    assert some[found[0][found[0] >= 0]].sum() <= 6  # itself, and what was taken after it


def test_of_many_users_some_are_asked(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    starts = rng.integers(0, OBJECTS, 300)
    walks = [[s, (s + 7) % OBJECTS, (s + 14) % OBJECTS] for s in starts]
    taken = Taken.at_once(Histories.of(walks))
    last = taken.histories.offsets[1:] - 1
    whole = learn_signals(signals, ALL, taken, (last, last), SETTINGS, 1)
    monkeypatch.setattr("leadre_lib.fusion.LEARNT_CASES", 60)
    first, again, other = (
        learn_signals(signals, ALL, taken, (last, last), SETTINGS, seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first is not None
    assert first != whole
    assert first.taken > 3


def test_who_takes_nothing_twice_learns_nothing_from_who_does(signals: Signals) -> None:
    starts = np.random.default_rng(9).integers(0, OBJECTS, 100)
    taken = Taken.at_once(Histories.of([[s, (s + 7) % OBJECTS, s] for s in starts]))
    last = taken.histories.offsets[1:] - 1
    again = learn_signals(signals, ALL, taken, (last, last), SETTINGS, 1)
    assert again is not None
    assert again.seen > 1
    assert learn_signals(signals, ALL, taken, (last, last), SETTINGS, 1, repeat=False) is None
