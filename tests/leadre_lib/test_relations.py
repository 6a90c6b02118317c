"""Relations of made-up objects: texts of a few families, and people who go from one to the next."""

from __future__ import annotations

import numpy as np
import pytest

from leadre_lib.evaluation import Histories
from leadre_lib.relations import EVERYBODY, Factors, Ways, fit, relations
from leadre_lib.settings import RelationSettings

OBJECTS, FAMILIES = 60, 12
SETTINGS = RelationSettings(per_object=8)
ALL = np.ones(OBJECTS, bool)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Objects of a family, every twelfth, say nearly the same."""
    rng = np.random.default_rng(1)
    families = rng.normal(size=(FAMILIES, 16))
    rows = families[np.arange(OBJECTS) % FAMILIES] + 0.2 * rng.normal(size=(OBJECTS, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def world(chance: float, steps: tuple[int, ...], users: int = 400) -> tuple[Histories, np.ndarray]:
    """Users who go on by one of `steps` with some chance, else anywhere; and their folds."""
    rng = np.random.default_rng(2)
    path = rng.integers(0, OBJECTS, (users, 6))
    for n in range(1, 6):
        goes = rng.random(users) < chance
        path[goes, n] = (path[goes, n - 1] + rng.choice(steps, goes.sum())) % OBJECTS
    return Histories.of(path.tolist()), np.arange(users) % SETTINGS.folds


def factors(histories: Histories, fold: np.ndarray, vectors: np.ndarray) -> Factors:
    ways = Ways(histories, fold, OBJECTS, SETTINGS)
    return fit(ways, histories, fold, vectors, SETTINGS, 1)


def test_the_data_say_what_counts(vectors: np.ndarray) -> None:
    # A few users who go on to any other of the same family; who go on to what says something else.
    by_text = factors(*world(0.8, (12, 24, 36, 48), users=40), vectors)
    by_habit = factors(*world(0.8, (7,)), vectors)
    by_chance = factors(*world(0.0, (7,)), vectors)
    assert by_text.text > 5 * max(by_habit.text, by_chance.text)
    assert by_habit.taken > 5 * by_chance.taken
    assert factors(Histories.of([[1], [2]]), np.array([0, 1]), vectors) == Factors(1.0, 0, 0, 0)


def test_what_people_go_on_to_is_the_strongest_relation(vectors: np.ndarray) -> None:
    histories, fold = world(0.8, (7,))
    ways = Ways(histories, fold, OBJECTS, SETTINGS)
    made = relations(ways, EVERYBODY, Factors(0.1, 5.0, -9.0, 0.0), vectors, ALL, SETTINGS)
    assert np.bincount(made.source, minlength=OBJECTS).max() == SETTINGS.per_object
    first = np.searchsorted(made.source, np.arange(OBJECTS))
    assert (made.target[first] == (np.arange(OBJECTS) + 7) % OBJECTS).mean() > 0.95
    assert not (made.source == made.target).any()  # the weakest of all, by `again`
    some = np.arange(OBJECTS) % 2 == 0
    fewer = relations(ways, EVERYBODY, Factors(1.0, 5.0, 0.0, 0.0), vectors, some, SETTINGS)
    assert some[fewer.target].all()


def test_a_folds_relations_do_not_count_its_users(vectors: np.ndarray) -> None:
    histories = Histories.of([[3, 8], [3, 9]])
    ways = Ways(histories, np.array([0, 1]), OBJECTS, SETTINGS)
    only_taken = Factors(0.0, 1.0, 0.0, 1.0)
    everybody, without = (
        relations(ways, fold, only_taken, vectors, ALL, SETTINGS) for fold in (EVERYBODY, 0)
    )

    def weights(made: object, source: int) -> dict[int, float]:
        own = made.source == source  # type: ignore[attr-defined]
        pairs = zip(made.target[own], made.weight[own], strict=True)  # type: ignore[attr-defined]
        return {int(target): float(weight) for target, weight in pairs if weight}

    # One of two takers beside three who are made up; backwards half as much.
    assert weights(everybody, 3) == pytest.approx({8: (1 / 5) ** 0.5, 9: (1 / 5) ** 0.5}, abs=1e-6)
    assert weights(everybody, 8) == pytest.approx({3: (0.5 / 4) ** 0.5}, abs=1e-6)
    assert weights(without, 3) == pytest.approx({9: (1 / 4) ** 0.5}, abs=1e-6)
    assert not weights(without, 8)
