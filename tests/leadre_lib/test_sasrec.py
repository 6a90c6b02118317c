"""SASRec on orders that are known, and what its scores may not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from leadre_lib import sasrec as module
from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import Histories, Ranked, Rows, popularity, ranked_by_scores
from leadre_lib.sasrec import Sasrec, sasrec, scorer
from leadre_lib.settings import SasrecSettings

ITEMS = 12
QUICK: dict[str, Any] = {"dim": 16, "batch_size": 16, "learning_rate": 0.01, "dropout": 0.1}


def settings(**more: Any) -> SasrecSettings:
    return SasrecSettings(**{**QUICK, "epochs": 2, **more})


def walks(users: int, length: int, seed: int = 0) -> np.ndarray:
    """A circle of items, [users, length]: each user begins anywhere and goes round, one way or
    the other, so that the last item alone does not tell the next.
    """
    rng = np.random.default_rng(seed)
    ways = rng.choice([-1, 1], (users, 1))
    return (rng.integers(ITEMS, size=(users, 1)) + ways * np.arange(length)) % ITEMS


def flat(paths: np.ndarray) -> tuple[Rows, Rows]:
    """User numbers and rows of [users, length], one step of all users after the other."""
    return np.tile(np.arange(len(paths)), paths.shape[1]), paths.T.ravel()


def untrained(**more: Any) -> Sasrec:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Sasrec(ITEMS, settings(**more)).eval()


def test_it_learns_an_order_that_popularity_cannot() -> None:
    users, rows = flat(walks(150, 8))
    paths = walks(60, 6, seed=1)
    cases, target, all_items = Histories.of(paths[:, :-1]), paths[:, -1], np.ones(ITEMS, bool)
    learnt = sasrec(users, rows, ITEMS, settings(epochs=40), 3)
    assert ranked_by_scores(learnt, cases, target, all_items).metrics()["HR@1"] > 0.9
    counted = popularity(rows, ITEMS)
    assert ranked_by_scores(counted, cases, target, all_items).metrics()["HR@1"] < 0.3


def test_the_order_within_a_long_history_is_learned_window_by_window() -> None:
    users, rows = flat(walks(60, 16))
    paths = walks(60, 4, seed=1)
    learnt = sasrec(users, rows, ITEMS, settings(epochs=20, window=6), 3)
    assert (learnt(Histories.of(paths[:, :-1])).argmax(1) == paths[:, -1]).mean() > 0.9


def test_a_seed_gives_equal_scores_on_any_number_of_threads() -> None:
    users, rows = flat(walks(40, 6))
    cases = Histories.of(walks(5, 4))
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    found = []
    try:
        for threads, seed in ((1, 3), (2, 3), (1, 4)):
            torch.set_num_threads(threads)
            found.append(sasrec(users, rows, ITEMS, settings(), seed)(cases))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()
    assert torch.equal(state, torch.random.get_rng_state())


def test_users_may_come_in_any_order_but_time_may_not() -> None:
    paths = walks(40, 6)
    cases = Histories.of(walks(5, 4))
    by_step, by_user = flat(paths), (np.repeat(np.arange(40), 6), paths.ravel())
    backwards = flat(paths[:, ::-1])
    first, second, third = (
        sasrec(users, rows, ITEMS, settings(), 3)(cases)
        for users, rows in (by_step, by_user, backwards)
    )
    assert (first == second).all()
    assert (first != third).any()


def test_a_later_item_changes_nothing_before_it() -> None:
    model = untrained()
    rows = torch.tensor([[ITEMS, 1, 2, 3, 4], [ITEMS, 1, 2, 9, 9]])
    with torch.no_grad():
        states = model(rows)
    assert torch.allclose(states[0, :3], states[1, :3], atol=1e-6)
    assert not torch.allclose(states[0, 3], states[1, 3], atol=1e-3)


def test_longer_histories_beside_it_do_not_change_a_score() -> None:
    scores = scorer(untrained())
    alone = scores(Histories.of([[3, 4]]))
    beside = scores(Histories.of([[1] * 9, [3, 4], []]))
    np.testing.assert_allclose(alone[0], beside[1], atol=1e-5)
    np.testing.assert_allclose(scores(Histories.of([[]]))[0], beside[2], atol=1e-5)
    assert np.abs(beside[0] - beside[1]).max() > 1e-3


def test_a_history_beyond_the_window_counts_by_its_latest_items() -> None:
    scores = scorer(untrained(window=4))
    long = scores(Histories.of([[9, 8, 7, 1, 2, 3, 4]]))
    assert (long == scores(Histories.of([[1, 2, 3, 4]]))).all()
    assert (long != scores(Histories.of([[5, 2, 3, 4]]))).any()


def test_chunks_of_cases_are_scored_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, cases = scorer(untrained()), Histories.of([*walks(7, 5), [], [2]])
    together = scores(cases)
    monkeypatch.setattr(module, "CASES", 2)
    np.testing.assert_allclose(scores(cases), together, atol=1e-5)


@pytest.mark.parametrize(
    ("users", "rows"), [([], []), ([0], [1]), ([0, 1, 2], [4, 4, 5]), ([7, 7], [0, 1])]
)
def test_little_or_nothing_to_learn_from_gives_finite_scores(
    users: list[int], rows: list[int]
) -> None:
    learnt = sasrec(np.array(users, np.int64), np.array(rows, np.int64), ITEMS, settings(), 3)
    scores = learnt(Histories.of([[], [1], [2, 3]]))
    assert scores.shape == (3, ITEMS)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert learnt(Histories.of([])).shape == (0, ITEMS)


@pytest.mark.parametrize(("most", "drawn"), [(0, 0), (1, 1), (9, 2)])
def test_held_out_items_are_last_ones_and_no_longer_known(most: int, drawn: int) -> None:
    lists = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12]]
    known, held, target = module._hold_out(Histories.of(lists), most, np.random.default_rng(0))
    assert len(held) == len(target) == drawn  # of the four who have two items, two at most
    whole = {items[-1]: items for items in lists}
    for number, item in enumerate(target):
        assert [*held.slice(number, number + 1).values, item] == whole[item]
    assert sorted([*known.values, *target]) == list(range(1, 13))
    assert len(known) == len(lists)
    assert (np.diff(known.offsets) > 0).all()


def test_the_best_epoch_is_kept_and_patience_ends_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = iter([0.1, 0.5, 0.2, 0.5, 0.9])
    users, rows = flat(walks(30, 5))
    cases = Histories.of(walks(5, 4))
    best = sasrec(users, rows, ITEMS, settings(epochs=2), 3)(cases)
    monkeypatch.setattr(Ranked, "metrics", lambda _: {"NDCG@10": next(judged)})
    kept = sasrec(users, rows, ITEMS, settings(epochs=50, patience=2), 3)(cases)
    assert (kept == best).all()
    assert list(judged) == [0.9]  # the fifth epoch was never reached


@pytest.mark.parametrize("window", [1, 2, 3, 6, 50])
def test_every_item_is_a_target_once(window: int) -> None:
    """With whatever comes before it in the window, and in batches as small as it takes."""
    lists = [list(range(n)) for n in (1, 2, 3, 7, 20)]
    learn = module._Windows.of(Histories.of(lists), window)
    batches = list(learn.batches(2, 99, np.random.default_rng(0)))
    targets: list[int] = []
    for read, follows in batches:
        assert read.shape[1] <= window + 1
        assert (read[:, 0] == 99).all()
        at, step = torch.nonzero(follows >= 0, as_tuple=True)
        targets += follows[at, step].tolist()
        inner = step > 0  # after an item comes the next one
        assert (read[at[inner], step[inner]] == follows[at[inner], step[inner]] - 1).all()
    assert sorted(targets) == sorted(item for items in lists for item in items)


def test_a_large_catalogue_has_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = module._Windows.of(Histories.of(walks(9, 4)), 50)
    monkeypatch.setattr(module, "LOGITS", 3 * 4 * ITEMS)
    sizes = [len(read) for read, _ in learn.batches(128, ITEMS, np.random.default_rng(0))]
    assert sizes == [3, 3, 3]


def test_wrong_input_is_named() -> None:
    one, two = np.array([0]), np.array([0, 1])
    with pytest.raises(LeadreError, match="1 users for 2 rows"):
        sasrec(one, two, ITEMS, settings(), 0)
    with pytest.raises(LeadreError, match="from 0 to 12, but the catalogue has 12"):
        sasrec(two, np.array([0, ITEMS]), ITEMS, settings(), 0)
    with pytest.raises(LeadreError, match="from -1 to 3"):
        sasrec(two, np.array([-1, 3]), ITEMS, settings(), 0)
    with pytest.raises(LeadreError, match=r"sasrec\.dim 16 is no multiple of sasrec\.heads 3"):
        sasrec(two, two, ITEMS, settings(heads=3), 0)
