"""Nearest marketing objects by embedding: a FAISS inner-product index over rows of a catalogue.

Three kinds, by the number of vectors:

- `flat`: exact. Compares a query with every vector.
- `hnsw`: a graph of near vectors (Malkov and Yashunin, arXiv:1603.09320). Scores are exact; a row
  can be missed. The whole vectors are kept.
- `ivf-pq`: lists of near vectors, scanned by product-quantised codes (Jégou et al., "Product
  quantization for nearest neighbor search", 2011); the best are ranked again by 8-bit codes. A
  third of the memory of the others; scores are off by about a thousandth.

What is not exact is measured while it is built: it searches as hard as recall@10 >= `MIN_RECALL`
needs, and makes way for a more exact kind where that cannot be reached.

Knows nothing of objects, users or how the vectors were made; a row number is all that it returns.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import faiss
import numpy as np
import numpy.typing as npt

from leadre_lib.errors import LeadreError

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Kind = Literal["flat", "hnsw", "ivf-pq"]  # the most exact first

# Measured with vectors of 384 dimensions: `make bench-neighbours`.
FLAT_UP_TO = 20_000
HNSW_UP_TO = 400_000

# What a search must find of the best ten, and how it is measured.
MIN_RECALL = 0.95
RECALL_AT = 10
RECALL_QUERIES = 500
NEAR = 50

HNSW_LINKS = 16
EF_SEARCH = (32, 64, 128, 256, 512)

NPROBE = (8, 16, 32, 64, 128, 256)
SAMPLE_PER_LIST = 32
# 256 codes; 64 vectors teach one of them. FAISS' own 256 take four times as long.
CODE_BITS = 8
SAMPLE_PER_CODE = 64
TRAINING_ROUNDS = 10

SEAL_BYTES = 256  # more than the last line of a file takes


class EmbeddingIndex:
    """Maximum-inner-product search; cosine when the vectors have length 1.

    Attributes:
        kind: which of the three kinds it is.
        recall: recall@10 that `build` measured; exactly 1.0 for `flat`.
    """

    def __init__(self, index: faiss.Index, kind: Kind, recall: float) -> None:
        self._index = index
        self.kind = kind
        self.recall = recall

    @classmethod
    def build(cls, vectors: Vectors, kind: Kind | None = None) -> EmbeddingIndex:
        """Index float32 [rows, dim]; the row number is the id.

        Runs on one thread, so that the same vectors make the same file however many the machine
        has. Beyond the vectors it holds the index and samples of bounded size.

        Args:
            kind: `flat`, `hnsw` or `ivf-pq`; None chooses by the number of rows. If recall@10 stays
                below `MIN_RECALL`, the index is of the next more exact kind: see `kind` of it.

        Raises:
            LeadreError: there are no rows, too few to train `ivf-pq`, no such kind, or a value is
                not finite.
        """
        vectors = _checked(vectors)
        if not len(vectors):
            raise LeadreError("embedding index: nothing to index")
        kind = kind or _kind_for(len(vectors))
        kinds = get_args(Kind)
        if kind not in kinds:
            raise LeadreError(f"embedding index: no kind {kind!r}: {', '.join(kinds)}")
        with _one_thread():
            for approximate in reversed(kinds[1 : kinds.index(kind) + 1]):
                make = _hnsw if approximate == "hnsw" else _ivf_pq
                index = _searched_enough(make(vectors), approximate, vectors)
                if index is not None:
                    return index
            return cls(_flat(vectors), "flat", 1.0)

    @property
    def rows(self) -> int:
        """How many vectors the index holds."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self._index.d)

    def save(self, path: Path) -> None:
        """Write one file, atomically: what FAISS writes, sealed by a last line of JSON.

        FAISS' part holds how hard to search as well. The seal holds its length, the kind and the
        recall; `faiss.read_index` reads the file too and passes over it.
        """
        staged = path.with_name(f".{path.name}.tmp")
        faiss.write_index(self._index, str(staged))
        seal = {"bytes": staged.stat().st_size, "kind": self.kind, "recall": self.recall}
        with staged.open("ab") as file:
            file.write(b"\n" + json.dumps(seal).encode() + b"\n")
        os.replace(staged, path)

    @classmethod
    def load(cls, path: Path, rows: int, dim: int) -> EmbeddingIndex:
        """Read an index that must hold `rows` vectors of `dim` dimensions.

        Its largest arrays stay in the file, which is mapped: processes share them. So replace the
        file, as `save` does; never write into it.

        Raises:
            LeadreError: the file is missing, truncated, not from `save`, or of another size.
        """
        if not path.is_file():
            raise LeadreError(f"{path}: no embedding index there; rebuild the indexes")
        # First: from a file cut short, FAISS reads on beyond the end of what is mapped.
        kind, recall = _unsealed(path)
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            raise LeadreError(
                f"{path}: damaged embedding index, rebuild the indexes: {reason}"
            ) from None
        if (index.ntotal, index.d) != (rows, dim):
            raise LeadreError(
                f"{path}: holds {index.ntotal} vectors of {index.d} dimensions, expected {rows} of"
                f" {dim}; rebuild the indexes from the same release"
            )
        return cls(index, kind, recall)

    def search(self, vectors: Vectors, k: int) -> tuple[Vectors, Rows]:
        """The k rows of largest inner product, best first; ties by row number.

        A kind that is not exact can miss rows, more of them where k is far above 10.

        Args:
            vectors: float32 [queries, dim].
            k: rows a query; where fewer are found, scores are -inf and rows -1.

        Returns:
            scores float32 [queries, k] and rows int64 [queries, k].

        Raises:
            LeadreError: other dimensions, or a value is not finite.
        """
        vectors = _checked(vectors)
        if vectors.shape[1] != self.dim:
            raise LeadreError(
                f"embedding index: vectors of {vectors.shape[1]} dimensions, index of {self.dim}"
            )
        scores, rows = self._index.search(vectors, min(k, self.rows))
        scores[rows < 0] = -np.inf
        order = np.lexsort((rows, -scores))
        pad = ((0, 0), (0, max(k - self.rows, 0)))
        return (
            np.pad(np.take_along_axis(scores, order, 1), pad, constant_values=-np.inf),
            np.pad(np.take_along_axis(rows, order, 1), pad, constant_values=-1),
        )

    def vectors(self, rows: Rows) -> Vectors:
        """The vectors of some rows, float32 [n, dim], rounded as the index keeps them.

        Raises:
            LeadreError: a row is none of the index.
        """
        rows = np.ascontiguousarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise LeadreError(f"embedding index: a row lies outside its {self.rows} rows")
        index: Any = self._index
        if isinstance(index, faiss.IndexRefine):  # its codes by lists know no rows; these do
            index = faiss.downcast_index(index.refine_index)
        found: Vectors = index.reconstruct_batch(rows)
        return found

    def recall_on(self, queries: Vectors, vectors: Vectors, best: Vectors) -> float:
        """Share of the best rows that `search` finds.

        A row counts by its inner product, not by its number: of equal vectors any is right.

        Args:
            queries: float32 [queries, dim].
            vectors: those that were indexed [rows, dim].
            best: the k largest inner products of each query [queries, k], from `exact`.
        """
        _, rows = self.search(queries, best.shape[1])
        scores = np.einsum("qd,qkd->qk", queries, vectors[rows])
        # Sums in another order differ in the last digits.
        worst = best[:, -1:] - 1e-6 * np.maximum(np.abs(best[:, -1:]), 1)
        return float(np.mean((rows >= 0) & (scores >= worst)))


def set_threads(count: int) -> None:
    """How many threads FAISS searches with; it does not ask torch."""
    faiss.omp_set_num_threads(count)


def exact(queries: Vectors, vectors: Vectors, k: int) -> tuple[Vectors, Rows]:
    """The k largest inner products of float32 [queries, dim] with [rows, dim], and their rows.

    Compares block by block without a copy of the vectors. Both [queries, min(k, rows)].
    """
    return faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)


def user_like_queries(vectors: Vectors, count: int, seed: int) -> Vectors:
    """Queries as a user's taste makes them, float32 [count, dim] of length 1: averaged vectors.

    Half are the mean of a row and two of its 50 nearest: one interest. Half are the mean of two
    rows drawn at random: two interests. These fall between the vectors and are the harder ones; a
    vector that is indexed would be a query too easy to judge by.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(vectors), count)
    one = rows[: count // 2]
    _, near = exact(vectors[one], vectors, NEAR)
    two_near = np.take_along_axis(near, rng.integers(0, near.shape[1], (len(one), 2)), 1)
    other = vectors[rng.integers(0, len(vectors), count - len(one))]
    means = np.concatenate(
        [vectors[one] + vectors[two_near].sum(axis=1), vectors[rows[len(one) :]] + other]
    )
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _kind_for(rows: int) -> Kind:
    if rows <= FLAT_UP_TO:
        return "flat"
    return "hnsw" if rows <= HNSW_UP_TO else "ivf-pq"


def _flat(vectors: Vectors) -> faiss.Index:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def _hnsw(vectors: Vectors) -> faiss.Index:
    index = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    return index


def _ivf_pq(vectors: Vectors) -> faiss.Index:
    """Twice the root of the rows lists, rounded to a power of two; a byte for four dimensions."""
    rows, dim = vectors.shape
    if rows < 1 << CODE_BITS:
        raise LeadreError(
            f"embedding index: {rows} vectors are too few to train ivf-pq, which needs"
            f" {1 << CODE_BITS}: ask for flat"
        )
    lists = 1 << round(np.log2(2 * np.sqrt(rows)))
    codes = dim // next(width for width in (4, 2, 1) if dim % width == 0)
    index: Any = faiss.index_factory(
        dim, f"IVF{lists},PQ{codes}x{CODE_BITS},Refine(SQ8)", faiss.METRIC_INNER_PRODUCT
    )
    ivf: Any = faiss.downcast_index(index.base_index)
    # Orders the codes for a filter by Hamming distance that is not used here; takes minutes.
    ivf.do_polysemous_training = False
    ivf.cp.niter = ivf.pq.cp.niter = TRAINING_ROUNDS
    ivf.pq.cp.max_points_per_centroid = SAMPLE_PER_CODE
    # The sample is as large as it can be: no warning of FAISS that it is small.
    ivf.cp.min_points_per_centroid = ivf.pq.cp.min_points_per_centroid = 1
    wanted = max(SAMPLE_PER_LIST * lists, SAMPLE_PER_CODE << CODE_BITS)
    index.train(vectors[np.unique(np.linspace(0, rows - 1, min(rows, wanted), dtype=np.int64))])
    index.add(vectors)
    return index


def _searched_enough(index: faiss.Index, kind: Kind, vectors: Vectors) -> EmbeddingIndex | None:
    """Search harder, step by step, until enough is found; None where the last step is too weak."""
    queries = user_like_queries(vectors, RECALL_QUERIES, seed=0)
    best, _ = exact(queries, vectors, RECALL_AT)
    result = EmbeddingIndex(index, kind, 0.0)
    for step in EF_SEARCH if kind == "hnsw" else NPROBE:
        _search_harder(index, step)
        result.recall = result.recall_on(queries, vectors, best)
        if result.recall >= MIN_RECALL:
            log.info("%s: recall@%d %.3f at %d", kind, RECALL_AT, result.recall, step)
            return result
    log.warning(
        "%s finds %.3f of the best %d of %d vectors, less than %.2f: taking a more exact kind",
        *(kind, result.recall, RECALL_AT, len(vectors), MIN_RECALL),
    )
    return None


def _search_harder(index: Any, step: int) -> None:
    """Set how hard to search: efSearch of a graph; nprobe and the share to rank again of lists."""
    if isinstance(index, faiss.IndexHNSWFlat):
        index.hnsw.efSearch = step
    else:
        ivf: Any = faiss.downcast_index(index.base_index)
        ivf.nprobe = step
        # Of more vectors scanned, more lie so close that their codes alone do not tell them apart.
        index.k_factor = max(4, step // 8)


def _unsealed(path: Path) -> tuple[Kind, float]:
    """Kind and recall as the last line of a file says, if it fits the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - SEAL_BYTES, 0))
        last = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    try:
        seal = json.loads(last)
        if seal["bytes"] + len(last) + 2 == size:
            return seal["kind"], seal["recall"]
    except (ValueError, TypeError, KeyError):
        pass
    raise LeadreError(
        f"{path}: damaged embedding index, or not an index of this project; rebuild the indexes"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS on one thread: neither sums nor links then depend on which thread was faster."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _checked(vectors: Vectors) -> Vectors:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2:
        raise LeadreError(f"embedding index: expected vectors [n, dim], got {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise LeadreError("embedding index: a vector holds a value that is not finite")
    return vectors
