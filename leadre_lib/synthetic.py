"""Synthetic histories: walks from ad to similar ad by text, so that a model learns from a catalogue
what its ads have in common, also of ads that nobody has clicked on yet.

Data augmentation of this project's own; the paper aligns meaning by its semantic tasks alone.
Knows nothing of users, of prompts, or of where the embeddings come from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from leadre_lib.contracts import load_contract
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import ExampleSettings

Rows = npt.NDArray[np.int64]
NO_STEP = -1


def walks(
    vectors: npt.NDArray[np.float32], starts: Rows, steps: int, neighbours: int, seed: int
) -> Rows:
    """Walk from each start to text neighbours.

    Each step leaves one of the ads so far, the latest with probability 1/2, the one before with
    1/4 and so on, for one of its nearest neighbours, near ones more often than far ones (the rank
    is the square of an even draw). A walk has 1 to `steps` steps, as many as not.

    Args:
        vectors: float32 [ads, dim], rows of length 1.
        starts: rows of the ads at which walks begin [walks].
        steps: most steps of a walk.
        neighbours: among how many neighbours a step chooses.
        seed: of the random choices.

    Returns:
        int64 [walks, steps + 1], the start first; -1 before a shorter walk's start, so that the
        last column is every walk's last ad.
    """
    rng = np.random.default_rng(seed)
    count, among = len(starts), min(neighbours, len(vectors) - 1)
    if among < 1:
        return starts[:, None]
    index, walk = EmbeddingIndex.build(vectors), np.arange(count)
    path = np.empty((count, steps + 1), np.int64)
    path[:, 0] = starts
    for step in range(1, steps + 1):
        back = np.minimum(rng.geometric(0.5, count), step)
        rank = (rng.random(count) ** 2 * among).astype(np.int64)
        here, which = np.unique(path[walk, step - back], return_inverse=True)
        # Only what is visited is searched: the work grows with the walks, not with ads squared.
        _, found = index.search(vectors[here], among + 1)
        itself_last = np.argsort(found == here[:, None], axis=1, kind="stable")
        found = np.take_along_axis(found, itself_last, 1)[:, :among]
        path[:, step] = found[which, rank]
    missing = rng.integers(0, steps, count)  # steps that a walk is short of the longest
    column = np.arange(steps + 1) - missing[:, None]
    return np.where(column >= 0, path[walk[:, None], np.maximum(column, 0)], NO_STEP)


def synthetic_histories(
    vectors: npt.NDArray[np.float32], ad_ids: pa.Array, settings: ExampleSettings, seed: int
) -> pa.Table:
    """Histories of the ads, so many from each, down to the cap.

    Args:
        vectors: float32 [ads, dim], rows of length 1.
        ad_ids: their ids [ads].

    Returns:
        The columns of the contract `synthetic_histories`. A target does not stand in its own
        history, and a walk of which nothing else is left is dropped.
    """
    rng = np.random.default_rng(seed)
    starts = np.repeat(np.arange(len(vectors)), settings.synthetic_per_ad)
    if len(starts) > settings.max_synthetic_examples:
        starts = rng.choice(starts, settings.max_synthetic_examples, replace=False)
    path = walks(vectors, starts, settings.synthetic_steps, settings.synthetic_neighbours, seed + 1)
    kept = (path >= 0) & (path != path[:, -1:])
    kept[:, -1] = kept.any(axis=1)
    walk, place = np.nonzero(kept)
    step = np.cumsum(kept, axis=1)[walk, place]
    table = {
        "history_id": pa.array([f"synthetic-{n:09d}" for n in walk.tolist()], pa.string()),
        "step": pa.array(step, pa.int32()),
        "ad_id": ad_ids.take(pa.array(path[walk, place])),
    }
    return pa.table(table).cast(load_contract("synthetic_histories").arrow_schema())
