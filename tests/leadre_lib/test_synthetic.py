"""Synthetic histories: walks stay among neighbours, repeat from their seed, keep their rules."""

from __future__ import annotations

import faiss
import numpy as np
import pyarrow as pa

from leadre_lib.contracts import load_contract
from leadre_lib.settings import ExampleSettings
from leadre_lib.synthetic import NO_STEP, synthetic_histories, walks

RNG = np.random.default_rng(0)
# Ten ads around each of five directions: neighbours of an ad are those of its own group.
VECTORS = np.repeat(np.eye(5, 16), 10, axis=0) + 0.05 * RNG.normal(size=(50, 16))
VECTORS = (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float32)
IDS = pa.array([f"a{n:02d}" for n in range(50)])


def test_walks_stay_among_neighbours_and_end_at_the_right() -> None:
    starts = np.repeat(np.arange(50), 4)
    path = walks(VECTORS, starts, steps=6, neighbours=9, seed=1)
    assert path.shape == (200, 7)
    assert (path[:, -2:] != NO_STEP).all()
    first = (path == NO_STEP).sum(axis=1)
    assert (path[np.arange(200), first] == starts).all()
    assert set(first.tolist()) == set(range(6))
    group = np.where(path == NO_STEP, starts[:, None] // 10, path // 10)
    assert (group == starts[:, None] // 10).all()


def test_each_step_is_a_neighbour_of_an_earlier_ad_and_not_that_ad() -> None:
    path = walks(VECTORS, np.arange(50), steps=1, neighbours=3, seed=2)
    order = np.argsort(-(VECTORS @ VECTORS.T), axis=1)[:, :4]
    assert (path[:, 0] != path[:, 1]).all()
    assert (order[path[:, 0]] == path[:, 1:]).any(axis=1).all()


def test_histories_follow_the_contract_and_hold_no_target() -> None:
    settings = ExampleSettings(synthetic_per_ad=3, max_synthetic_examples=100)
    made = synthetic_histories(VECTORS, IDS, settings, seed=3)
    assert made.schema == load_contract("synthetic_histories").arrow_schema()
    assert made.equals(synthetic_histories(VECTORS, IDS, settings, seed=3))
    assert not made.equals(synthetic_histories(VECTORS, IDS, settings, seed=4))
    by_history: dict[str, list[str]] = {}
    for row in made.to_pylist():
        ads = by_history.setdefault(row["history_id"], [])
        ads.append(row["ad_id"])
        assert row["step"] == len(ads)
    assert 0 < len(by_history) <= 100
    assert all(len(ads) > 1 and ads[-1] not in ads[:-1] for ads in by_history.values())


def test_none_where_none_are_asked_for_or_an_ad_has_no_other() -> None:
    none = ExampleSettings(synthetic_per_ad=0)
    assert synthetic_histories(VECTORS, IDS, none, seed=0).num_rows == 0
    alone = synthetic_histories(VECTORS[:1], IDS[:1], ExampleSettings(), seed=0)
    assert alone.num_rows == 0


def test_histories_do_not_depend_on_threads_also_where_ads_share_a_text() -> None:
    vectors = np.repeat(VECTORS, 7, axis=0)
    ids = pa.array([f"a{n:03d}" for n in range(len(vectors))])
    threads = faiss.omp_get_max_threads()
    made = []
    for count in (1, 2):
        faiss.omp_set_num_threads(count)
        made.append(synthetic_histories(vectors, ids, ExampleSettings(), seed=5))
    faiss.omp_set_num_threads(threads)
    assert made[0].equals(made[1])
    assert len(set(made[0]["ad_id"].to_pylist())) > 300
