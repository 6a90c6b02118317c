"""Signals of made-up objects: what their words say, and people who go from one to the next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import Histories
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import FusionSettings
from leadre_lib.signals import Signals, Taken, build_signals, word_vectors

SETTINGS = FusionSettings(words=4, decay=0.5, steps=2)
TEXTS = [
    "Makita drill 18 V",
    "Makita saw 18 V",
    "Bosch drill 12 V",
    "cotton shirt, blue",
    "cotton shirt, red",
]


def taken(histories: list[list[int]], ages: list[float] | None = None) -> Taken:
    whole = Taken.at_once(Histories.of(histories))
    return whole if ages is None else Taken(whole.histories, np.array(ages))


@pytest.fixture(scope="module")
def meaning() -> EmbeddingIndex:
    return EmbeddingIndex.build(np.eye(5, 8, dtype=np.float32))


def test_shares_count_near_steps_and_what_follows_more(meaning: EmbeddingIndex) -> None:
    found = build_signals(TEXTS, meaning, taken([[0, 1, 3], [0, 1, 0]]), SETTINGS)
    assert found.takers.tolist() == [2, 2, 0, 1, 0]  # the second user took 0 twice
    # 0 → 1 twice next, and before it once; 0 → 3 two steps on. 0 → 0 does not count.
    to_one, to_three = 2 + 0.5, 0.5
    total = to_one + to_three + 3
    expected = np.zeros(5)
    expected[[1, 3]] = np.sqrt([to_one / total, to_three / total])
    assert found.after.toarray()[0] == pytest.approx(expected)
    # 3 came last: what was before it counts half as much.
    assert found.after.toarray()[3, [0, 1]] ** 2 == pytest.approx([0.25 / 3.75, 0.5 / 3.75])


def test_whoever_took_it_long_ago_is_less_of_a_taker(meaning: EmbeddingIndex) -> None:
    half = SETTINGS.half_life_days
    # The first user came back to 0 after it was two half-lives old.
    found = build_signals(
        TEXTS, meaning, taken([[0, 1, 0], [1]], [2 * half, half, 0, half]), SETTINGS
    )
    assert found.takers.tolist() == [1, 1, 0, 0, 0]
    assert found.recounted(taken([[1], []], [half]), SETTINGS).takers.tolist() == [0, 0.5, 0, 0, 0]


def test_words_tell_brands_and_kinds() -> None:
    words = word_vectors(TEXTS, 4)
    assert words.shape == (5, 4)
    assert np.linalg.norm(words, axis=1) == pytest.approx(np.ones(5), abs=1e-3)
    near = words @ words.T
    assert near[0, 1] > near[0, 3] + 0.3
    assert near[0, 2] > near[0, 3] + 0.3
    assert near[3, 4] > 0.8
    assert word_vectors(["a b", "c d", "e f"], 4).shape == (3, 0)  # no word in common
    assert word_vectors(TEXTS, 0).shape == (5, 0)


def test_what_was_saved_is_read_and_damage_is_named(
    meaning: EmbeddingIndex, tmp_path: Path
) -> None:
    made = build_signals(TEXTS, meaning, taken([[0, 1, 3]]), SETTINGS)
    path = tmp_path / "signals.safetensors"
    made.save(path)
    read = Signals.load(path, meaning)
    assert read.after.toarray() == pytest.approx(made.after.toarray())
    assert np.array_equal(read.words, made.words)
    assert np.array_equal(read.takers, made.takers)
    with pytest.raises(LeadreError, match="5 objects, but the embeddings are of 3"):
        Signals.load(path, EmbeddingIndex.build(np.eye(3, dtype=np.float32)))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LeadreError, match=r"signals.safetensors: cannot be read"):
        Signals.load(path, meaning)


def test_another_catalogue_reads_them_in_its_own_rows(meaning: EmbeddingIndex) -> None:
    made = build_signals(TEXTS, meaning, taken([[0, 1, 3]]), SETTINGS)
    # Object 2 is gone, two new ones stand first, and the others have moved up behind them.
    rows = np.array([2, 3, -1, 4, 5])
    other = made.of(rows, 6)
    assert other.takers.tolist() == [0, 0, 1, 1, 1, 0]
    assert other.after.toarray()[2, 3] == made.after.toarray()[0, 1]
    assert not other.after.toarray()[:2].any()
    assert np.array_equal(other.words[rows[rows >= 0]], made.words[rows >= 0])
    assert not other.words[:2].any()
    assert other.vector_object.tolist() == rows.tolist()
    assert made.of(np.arange(5), 5) is made


def test_words_do_not_depend_on_the_threads() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["drill", "saw", "shirt", "red", "blue"], 4)) for _ in range(300)]
    made = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            made.append(word_vectors(texts, 16))
    assert np.array_equal(*made)


def test_of_what_follows_the_strongest_are_kept(meaning: EmbeddingIndex) -> None:
    walked = taken([[0, 1], [0, 1], [0, 2], [0, 3], [0, 3], [0, 3]])
    few = build_signals(TEXTS, meaning, walked, FusionSettings(words=0, near=2))
    assert np.flatnonzero(few.after.toarray()[0]).tolist() == [1, 3]
