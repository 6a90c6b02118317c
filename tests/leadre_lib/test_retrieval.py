"""The exact embedding index: search, and what loading refuses."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from leadre_lib.errors import LeadreError
from leadre_lib.retrieval import EmbeddingIndex

VECTORS = np.array([[1, 0], [0, 1], [0.8, 0.6], [0, 1]], np.float32)


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


def test_load_refuses_a_missing_file_and_another_kind(tmp_path: Path) -> None:
    with pytest.raises(LeadreError, match="no embedding index"):
        EmbeddingIndex.load(tmp_path / "none.faiss", 4, 2)
    other = faiss.IndexFlatL2(2)
    other.add(VECTORS)
    faiss.write_index(other, str(tmp_path / "other.faiss"))
    with pytest.raises(LeadreError, match="IndexFlatL2"):
        EmbeddingIndex.load(tmp_path / "other.faiss", 4, 2)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(LeadreError, match="not finite"):
        EmbeddingIndex.build(np.array([[np.nan, 0]], np.float32))
    with pytest.raises(LeadreError, match="not finite"):
        EmbeddingIndex.build(VECTORS).search(np.array([[np.inf, 0]], np.float32), 1)
    with pytest.raises(LeadreError, match="dimensions"):
        EmbeddingIndex.build(VECTORS).search(np.ones((1, 3), np.float32), 1)
