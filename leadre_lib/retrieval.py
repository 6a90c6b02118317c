"""Nearest ads by embedding: a FAISS flat inner-product index, exact, over rows of a catalogue.

Knows nothing of ads, users or how the vectors were made; a row number is all that it returns.
"""

from __future__ import annotations

import os
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from leadre_lib.errors import LeadreError

Vectors = npt.NDArray[np.float32]


class EmbeddingIndex:
    """Exact maximum-inner-product search; cosine when the vectors have length 1."""

    def __init__(self, index: faiss.IndexFlatIP) -> None:
        self._index = index

    @classmethod
    def build(cls, vectors: Vectors) -> EmbeddingIndex:
        """Index float32 [rows, dim]; the row number is the id.

        Raises:
            LeadreError: there are no rows, or a value is not finite.
        """
        vectors = _checked(vectors)
        if not len(vectors):
            raise LeadreError("embedding index: no ad to index")
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return cls(index)

    @property
    def rows(self) -> int:
        """How many vectors the index holds."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self._index.d)

    def save(self, path: Path) -> None:
        """Write the index to a file, atomically."""
        staged = path.with_name(f".{path.name}.tmp")
        faiss.write_index(self._index, str(staged))
        os.replace(staged, path)

    @classmethod
    def load(cls, path: Path, rows: int, dim: int) -> EmbeddingIndex:
        """Read an index that must hold `rows` vectors of `dim` dimensions.

        Raises:
            LeadreError: the file is missing, damaged, of another kind or of another size.
        """
        if not path.is_file():
            raise LeadreError(f"{path}: no embedding index there; rebuild the indexes")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LeadreError(
                f"{path}: damaged embedding index, rebuild the indexes: {reason}"
            ) from None
        if not isinstance(index, faiss.IndexFlatIP):
            kind = type(index).__name__
            raise LeadreError(f"{path}: holds a {kind}, not an IndexFlatIP; rebuild the indexes")
        if (index.ntotal, index.d) != (rows, dim):
            raise LeadreError(
                f"{path}: holds {index.ntotal} vectors of {index.d} dimensions, expected {rows} of"
                f" {dim}; rebuild the indexes from the same release"
            )
        return cls(index)

    def search(self, vectors: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """The k rows of largest inner product, best first; ties by row number.

        Args:
            vectors: float32 [queries, dim].
            k: rows a query; where the index holds fewer, scores are -inf and rows -1.

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
        order = np.lexsort((rows, -scores))
        pad = ((0, 0), (0, max(k - self.rows, 0)))
        return (
            np.pad(np.take_along_axis(scores, order, 1), pad, constant_values=-np.inf),
            np.pad(np.take_along_axis(rows, order, 1), pad, constant_values=-1),
        )


def _checked(vectors: Vectors) -> Vectors:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2:
        raise LeadreError(f"embedding index: expected vectors [n, dim], got {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise LeadreError("embedding index: a vector holds a value that is not finite")
    return vectors
