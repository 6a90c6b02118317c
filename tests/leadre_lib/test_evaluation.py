"""Metrics and baselines on cases small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import (
    Histories,
    Scorer,
    drop_seen,
    item_knn,
    nearest_titles,
    popularity,
    ranked_by_scores,
    ranked_in_lists,
    recommend,
)

ALL = np.ones(4, bool)
NOBODY = Histories.of([[]])


def fixed(scores: list[list[float]]) -> Scorer:
    table = np.array(scores)
    return lambda histories: table


def test_metrics_by_hand() -> None:
    ranked = np.array([[7, 3, 5], [1, 2, -1], [4, 5, 6], [7, 0, 2]])
    target = np.array([7, 2, 9, 2])  # ranks 1, 2, none, 3
    found = ranked_in_lists(ranked, target, catalogue=10)
    assert found.rank.tolist() == [1, 2, math.inf, 3]
    metrics = found.metrics(np.array([1.0, 4.0, 5.0, np.nan]))
    assert metrics["HR@1"] == 0.25
    assert metrics["HR@3"] == metrics["HR@10"] == 0.75
    assert metrics["NDCG@3"] == pytest.approx((1 + 1 / math.log2(3) + 1 / 2) / 4)
    assert metrics["eCPM-weighted HR@10"] == pytest.approx(5 / 10)
    assert metrics["coverage"] == pytest.approx(8 / 10)


def test_a_target_outside_the_catalogue_never_matches_padding() -> None:
    metrics = ranked_in_lists(np.array([[0, -1]]), np.array([-1]), catalogue=1).metrics()
    assert metrics["HR@10"] == 0
    assert "eCPM-weighted HR@10" not in metrics


def test_metrics_refuses_nan_twins_and_nothing() -> None:
    one, target = np.array([[0, -1]]), np.array([0])
    with pytest.raises(LeadreError, match="not finite"):
        ranked_in_lists(one, target, 1, scores=np.array([[np.nan, 0.0]]))
    ranked_in_lists(one, target, 1, scores=np.array([[0.5, -np.inf]]))  # padding has no score
    with pytest.raises(LeadreError, match="twice"):
        ranked_in_lists(np.array([[2, 1, 2]]), target, 3)
    with pytest.raises(LeadreError, match="no cases"):
        ranked_in_lists(np.empty((0, 3), int), np.empty(0, int), 3).metrics()


def test_ties_count_half() -> None:
    # One item above, three tie with the target: its rank is 2 + 2 / 2 = 3.
    metrics = ranked_by_scores(fixed([[9.0, 1.0, 1.0, 1.0]]), NOBODY, np.array([1]), ALL).metrics()
    assert metrics["HR@1"] == 0
    assert metrics["HR@3"] == 1
    assert metrics["NDCG@3"] == pytest.approx(1 / 2)


def test_scores_that_are_not_finite_are_refused() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(LeadreError, match="1 of 4 scores are not finite"):
            ranked_by_scores(fixed([[0.0, bad, 0.0, 0.0]]), NOBODY, np.array([0]), ALL)


def test_only_active_items_are_ranked_and_seen_ones_on_request() -> None:
    scorer, target = fixed([[4.0, 3.0, 2.0, 1.0]]), np.array([2])
    seen = Histories.of([[1]])
    active = np.array([False, True, True, True])
    assert ranked_by_scores(scorer, seen, target, ALL).metrics()["HR@1"] == 0
    assert ranked_by_scores(scorer, seen, target, active).metrics()["NDCG@3"] == pytest.approx(
        1 / math.log2(3)
    )
    assert ranked_by_scores(scorer, seen, target, active, exclude_seen=True).metrics()["HR@1"] == 1
    stopped = ranked_by_scores(scorer, seen, np.array([0]), active).metrics()
    assert stopped["HR@10"] == 0
    unknown = ranked_by_scores(scorer, seen, np.array([-1]), active).metrics()
    assert unknown["HR@10"] == 0
    assert unknown["coverage"] == 1
    assert recommend(scorer, seen, active, 3, exclude_seen=True).tolist() == [[2, 3, -1]]


def test_lists_and_scores_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((50, 8)).astype(np.float32)
    histories = Histories.of([rng.integers(0, 50, size) for size in rng.integers(1, 6, 40)])
    target, active = rng.integers(0, 50, 40), rng.random(50) < 0.8
    monkeypatch.setattr("leadre_lib.evaluation.CHUNK_SCORES", 50 * 7)  # 7 cases at a time
    scorer = nearest_titles(vectors)
    by_score = ranked_by_scores(scorer, histories, target, active, exclude_seen=True).metrics()
    ranked = drop_seen(recommend(scorer, histories, active, 20), histories)
    assert by_score == pytest.approx(ranked_in_lists(ranked, target, int(active.sum())).metrics())
    assert by_score["HR@10"] > 0


def test_drop_seen_moves_later_items_up() -> None:
    ranked = np.array([[3, 1, 2], [1, 3, -1]])
    assert drop_seen(ranked, Histories.of([[3], [2, 3]])).tolist() == [[1, 2, -1], [1, -1, -1]]


def test_popularity_counts_interactions() -> None:
    scores = popularity(np.array([0, 2, 2]), 4)(Histories.of([[1], []]))
    assert scores.tolist() == [[1, 0, 2, 0], [1, 0, 2, 0]]


def test_item_knn_is_the_cosine_of_the_items_users() -> None:
    # Users 0: items 0, 1 (twice); 1: items 0, 2; 2: item 0.
    users, rows = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 0, 2, 0])
    scores = item_knn(users, rows, 4)(Histories.of([[0], [1, 2, 1], [3]]))
    cosine = 1 / math.sqrt(3)
    expected = np.array([[0, cosine, cosine, 0], [3 * cosine, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores[2].argmax() == 0  # nothing in common: the most popular first


def test_nearest_titles_decays_the_history() -> None:
    scores = nearest_titles(np.eye(4, dtype=np.float32))(Histories.of([[2, 0, 1], [3, 3]]))
    np.testing.assert_allclose(scores, [[0.7, 1, 0.49, 0], [0, 0, 0, 1.7]])
