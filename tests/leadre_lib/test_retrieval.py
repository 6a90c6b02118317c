"""The embedding index: its kinds, their recall, search, and what loading refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import faiss
import numpy as np
import pytest

from leadre_lib import retrieval
from leadre_lib.errors import LeadreError
from leadre_lib.retrieval import EmbeddingIndex, Kind, exact, user_like_queries

VECTORS = np.array([[1, 0], [0, 1], [0.8, 0.6], [0, 1]], np.float32)
KINDS: tuple[Kind, ...] = get_args(Kind)


def clustered(rows: int = 3000, dim: int = 32) -> np.ndarray:
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((100, dim))[rng.integers(0, 100, rows)]
    vectors += 0.5 * rng.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    return clustered()


@pytest.fixture(scope="module")
def indexes(many: np.ndarray) -> dict[Kind, EmbeddingIndex]:
    return {kind: EmbeddingIndex.build(many, kind) for kind in KINDS}


def test_search_ranks_by_inner_product_and_pads() -> None:
    scores, rows = EmbeddingIndex.build(VECTORS).search(np.array([[1, 0.1]], np.float32), 5)
    assert rows.tolist() == [[0, 2, 1, 3, -1]]
    np.testing.assert_allclose(scores[0], [1, 0.86, 0.1, 0.1, -np.inf], rtol=1e-6)


def test_search_equals_brute_force() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((300, 16)).astype(np.float32)
    queries = rng.standard_normal((20, 16)).astype(np.float32)
    _, rows = EmbeddingIndex.build(vectors).search(queries, 7)
    np.testing.assert_array_equal(rows, np.argsort(-(queries @ vectors.T), axis=1)[:, :7])


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    EmbeddingIndex.build(VECTORS).save(path)
    loaded = EmbeddingIndex.load(path, 4, 2)
    assert (loaded.rows, loaded.dim) == (4, 2)
    assert loaded.search(VECTORS[:1], 1)[1].tolist() == [[0]]
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]


def test_load_refuses_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    EmbeddingIndex.build(VECTORS).save(path)
    with pytest.raises(LeadreError, match="4 vectors of 2 dimensions, expected 5"):
        EmbeddingIndex.load(path, 5, 2)


@pytest.mark.parametrize("content", [b"", b"no index at all", None])
def test_load_refuses_a_damaged_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "index.faiss"
    EmbeddingIndex.build(VECTORS).save(path)
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(LeadreError, match="damaged"):
        EmbeddingIndex.load(path, 4, 2)


def test_load_refuses_a_missing_file_and_a_foreign_one(tmp_path: Path) -> None:
    with pytest.raises(LeadreError, match="no embedding index"):
        EmbeddingIndex.load(tmp_path / "none.faiss", 4, 2)
    other = faiss.IndexFlatIP(2)
    other.add(VECTORS)
    faiss.write_index(other, str(tmp_path / "other.faiss"))
    with pytest.raises(LeadreError, match=r"other\.faiss.* not an index of this project; rebuild"):
        EmbeddingIndex.load(tmp_path / "other.faiss", 4, 2)


@pytest.mark.parametrize("last", [b"[1]", b"null", b'{"bytes": "1"}', b'{"kind": "flat"}', b"\xff"])
def test_load_refuses_a_last_line_that_is_no_seal(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "index.faiss"
    path.write_bytes(b"something\n" + last + b"\n")
    with pytest.raises(LeadreError, match="damaged"):
        EmbeddingIndex.load(path, 4, 2)


def test_faiss_alone_reads_the_file(tmp_path: Path, indexes: dict[Kind, EmbeddingIndex]) -> None:
    indexes["hnsw"].save(tmp_path / "index.faiss")
    assert faiss.read_index(str(tmp_path / "index.faiss")).ntotal == indexes["hnsw"].rows


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(LeadreError, match="not finite"):
        EmbeddingIndex.build(np.array([[np.nan, 0]], np.float32))
    with pytest.raises(LeadreError, match="not finite"):
        EmbeddingIndex.build(VECTORS).search(np.array([[np.inf, 0]], np.float32), 1)
    with pytest.raises(LeadreError, match="dimensions"):
        EmbeddingIndex.build(VECTORS).search(np.ones((1, 3), np.float32), 1)


def test_size_chooses_the_kind(monkeypatch: pytest.MonkeyPatch, many: np.ndarray) -> None:
    assert EmbeddingIndex.build(many).kind == "flat"
    monkeypatch.setattr(retrieval, "FLAT_UP_TO", 400)
    monkeypatch.setattr(retrieval, "HNSW_UP_TO", 1000)
    sizes = (400, 401, 1000, 1001)
    kinds = [EmbeddingIndex.build(many[:rows]).kind for rows in sizes]
    assert kinds == ["flat", "hnsw", "hnsw", "ivf-pq"]


@pytest.mark.parametrize("kind", KINDS)
def test_recall_holds_for_other_queries(
    kind: Kind, many: np.ndarray, indexes: dict[Kind, EmbeddingIndex]
) -> None:
    index = indexes[kind]
    queries = user_like_queries(many, 400, seed=7)
    best, _ = exact(queries, many, 10)
    assert index.kind == kind
    assert index.recall >= retrieval.MIN_RECALL
    assert index.recall_on(queries, many, best) == pytest.approx(index.recall, abs=0.02)


def test_recall_counts_what_is_missed(many: np.ndarray) -> None:
    queries = user_like_queries(many, 50, seed=7)
    best, _ = exact(queries, many, 10)
    half = many.copy()
    half[::2] = 0
    recall = EmbeddingIndex.build(half).recall_on(queries, many, best)
    assert 0.3 < recall < 0.7


def test_queries_are_means_of_length_one(many: np.ndarray) -> None:
    queries = user_like_queries(many, 101, seed=3)
    assert queries.shape == (101, 32)
    assert queries.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, rtol=1e-5)
    assert exact(queries, many, 1)[0].max() < 0.9999


def test_a_bound_out_of_reach_falls_back_to_exact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, many: np.ndarray
) -> None:
    monkeypatch.setattr(retrieval, "MIN_RECALL", 1.1)
    with caplog.at_level(logging.WARNING):
        index = EmbeddingIndex.build(many[:500], "ivf-pq")
    assert (index.kind, index.recall) == ("flat", 1.0)
    assert [record.args[0] for record in caplog.records] == ["ivf-pq", "hnsw"]  # type: ignore[index]


def test_lists_that_find_too_little_make_way_for_a_graph(
    monkeypatch: pytest.MonkeyPatch, many: np.ndarray
) -> None:
    monkeypatch.setattr(retrieval, "NPROBE", (1,))
    index = EmbeddingIndex.build(many, "ivf-pq")
    assert index.kind == "hnsw"
    assert index.recall >= retrieval.MIN_RECALL


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_file_on_any_number_of_threads(
    kind: Kind, tmp_path: Path, many: np.ndarray
) -> None:
    before, files = faiss.omp_get_max_threads(), []
    try:
        for threads in (1, 2, 4):
            faiss.omp_set_num_threads(threads)
            EmbeddingIndex.build(many, kind).save(tmp_path / "index.faiss")
            files.append((tmp_path / "index.faiss").read_bytes())
            assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_index_searches_the_same(
    kind: Kind, tmp_path: Path, many: np.ndarray, indexes: dict[Kind, EmbeddingIndex]
) -> None:
    path, queries = tmp_path / "index.faiss", user_like_queries(many, 100, seed=7)
    indexes[kind].save(path)
    loaded = EmbeddingIndex.load(path, *many.shape)
    assert (loaded.kind, loaded.recall) == (kind, indexes[kind].recall)
    np.testing.assert_array_equal(indexes[kind].search(queries, 10), loaded.search(queries, 10))
    before = path.read_bytes()
    loaded.save(path)  # over the file that it is mapped from
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_load_names_a_truncated_file_and_one_of_another_size(
    kind: Kind, tmp_path: Path, indexes: dict[Kind, EmbeddingIndex]
) -> None:
    path = tmp_path / "index.faiss"
    indexes[kind].save(path)
    for rows, dim in ((2999, 32), (3000, 31)):
        with pytest.raises(LeadreError, match=rf"index\.faiss: holds .* expected {rows} of {dim}"):
            EmbeddingIndex.load(path, rows, dim)
    whole = path.read_bytes()
    for kept in (1, 28, 110, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(LeadreError, match=r"index\.faiss: damaged .* rebuild"):
            EmbeddingIndex.load(path, 3000, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_vectors_come_by_row_number(kind: Kind) -> None:
    copies = np.tile(clustered(300), (4, 1))
    index = EmbeddingIndex.build(copies, kind)
    scores, rows = index.search(np.repeat(copies[:50], 2, axis=0), 6)
    assert (np.diff(scores) <= 0).all()
    tied = np.diff(scores) == 0
    assert (np.diff(rows)[tied] > 0).all()
    np.testing.assert_array_equal(rows[::2], rows[1::2])
    np.testing.assert_array_equal(rows[::2, 0] % 300, np.arange(50))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_found_are_padding(kind: Kind, many: np.ndarray) -> None:
    scores, rows = EmbeddingIndex.build(many[:400], kind).search(many[:3], 401)
    assert scores.shape == rows.shape == (3, 401)
    np.testing.assert_array_equal(rows < 0, scores == -np.inf)
    for found in rows:
        kept = found[found >= 0]
        assert len(set(kept.tolist())) == len(kept) > 10
        assert (found[len(kept) :] == -1).all()


def test_a_kind_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(LeadreError, match="4 vectors are too few to train ivf-pq"):
        EmbeddingIndex.build(VECTORS, "ivf-pq")
    with pytest.raises(LeadreError, match="no kind 'lsh': flat, hnsw, ivf-pq"):
        EmbeddingIndex.build(VECTORS, "lsh")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
def test_vectors_are_those_that_were_indexed(
    indexes: dict[Kind, EmbeddingIndex], many: np.ndarray, kind: Kind, loaded: bool, tmp_path: Path
) -> None:
    index, rows = indexes[kind], np.array([2999, 0, 17, 0])
    if loaded:
        index.save(tmp_path / "index.faiss")
        index = EmbeddingIndex.load(tmp_path / "index.faiss", *many.shape)
    # The refinement of lists keeps a byte a number.
    np.testing.assert_allclose(
        index.vectors(rows), many[rows], atol=5e-3 if index.kind == "ivf-pq" else 0
    )
    assert index.vectors(np.empty(0, np.int64)).shape == (0, many.shape[1])
    with pytest.raises(LeadreError, match="outside"):
        index.vectors(np.array([3000]))
