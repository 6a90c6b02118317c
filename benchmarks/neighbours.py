"""Nearest ads by embedding: the kind that a catalogue of a size gets, beside exact search.

For each size, `flat` and what `EmbeddingIndex.build` chooses are built, saved, loaded and searched,
all on one thread:

- `build s`: building, with what measuring the recall and choosing the search takes.
- `MB`: the file.
- `recall@10`: on other queries than those by which `build` chose how hard to search.
- `queries/s`: in batches of 64; the median of rounds in which the two take turns.

The vectors are made up to resemble embeddings of texts: some thousands of Gaussian clusters in a
space of few dimensions, turned into 384 with a little noise, of length 1. They are no text; recall
and speed on a real catalogue differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from leadre_lib.retrieval import (
    RECALL_AT,
    EmbeddingIndex,
    Kind,
    Vectors,
    exact,
    user_like_queries,
)

DIM = 384
CLUSTERS = 4000
LATENT = 48
SPREAD = 0.6  # of a cluster, where the centres lie 1 apart from the origin in each dimension
NOISE = 0.02
CHUNK = 65_536
BATCH = 64


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    return parser


def text_like_vectors(count: int, seed: int = 0) -> Vectors:
    """Clustered vectors of few intrinsic dimensions, float32 [count, DIM] of length 1."""
    rng = np.random.default_rng(seed)
    turn = rng.standard_normal((LATENT, DIM), np.float32) / np.float32(np.sqrt(LATENT))
    centres = rng.standard_normal((CLUSTERS, LATENT), np.float32)
    vectors = np.empty((count, DIM), np.float32)
    for start in range(0, count, CHUNK):
        part = vectors[start : start + CHUNK]
        inner = SPREAD * rng.standard_normal((len(part), LATENT), np.float32)
        inner += centres[rng.integers(0, CLUSTERS, len(part))]
        np.matmul(inner, turn, out=part)
        part += NOISE * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def built(
    vectors: Vectors, kind: Kind | None, path: Path
) -> tuple[EmbeddingIndex, dict[str, float]]:
    """An index as a reader gets it, from its file; what building it took and the file holds."""
    start = time.perf_counter()
    index = EmbeddingIndex.build(vectors, kind)
    seconds = time.perf_counter() - start
    index.save(path)
    loaded = EmbeddingIndex.load(path, *vectors.shape)
    return loaded, {"build s": round(seconds, 1), "MB": round(path.stat().st_size / 1e6, 1)}


def median_rates(indexes: list[EmbeddingIndex], queries: Vectors, repeats: int) -> list[float]:
    """Queries a second of each index; a first round warms up and is not counted."""
    seconds: list[list[float]] = [[] for _ in indexes]
    for _ in range(repeats + 1):
        for index, taken in zip(indexes, seconds, strict=True):
            start = time.perf_counter()
            for batch in range(0, len(queries), BATCH):
                index.search(queries[batch : batch + BATCH], RECALL_AT)
            taken.append(time.perf_counter() - start)
    return [len(queries) / statistics.median(taken[1:]) for taken in seconds]


def measured(size: int, queries: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one size: exact search, then what `build` chooses, if that is another."""
    vectors = text_like_vectors(size)
    asked = user_like_queries(vectors, queries, seed=1)
    best, _ = exact(asked, vectors, RECALL_AT)
    with tempfile.TemporaryDirectory() as folder:
        flat, flat_took = built(vectors, "flat", Path(folder) / "flat.faiss")
        chosen, chosen_took = built(vectors, None, Path(folder) / "chosen.faiss")
        both = [(flat, flat_took), (chosen, chosen_took)]
        if chosen.kind == "flat":
            both = both[:1]
        rates = median_rates([index for index, _ in both], asked, repeats)
        return [
            {
                "vectors": size,
                "kind": index.kind,
                **took,
                f"recall@{RECALL_AT}": round(index.recall_on(asked, vectors, best), 4),
                "queries/s": round(rate),
            }
            for (index, took), rate in zip(both, rates, strict=True)
        ]


def main() -> None:
    """Measure, print the table."""
    args = arguments().parse_args()
    faiss.omp_set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        new = measured(size, args.queries, args.repeats)
        if not rows:
            print(f"{DIM} dimensions, batches of {BATCH}, one thread")
            print("  ".join(f"{head:>9}" for head in new[0]))
        for row in new:
            print("  ".join(f"{value!s:>9}" for value in row.values()), flush=True)
        rows += new
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
