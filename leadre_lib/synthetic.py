"""Synthetic histories: walks from ad to similar ad by text, so that a model learns from a catalogue
what its ads have in common, also of ads that nobody has clicked on yet.

Data augmentation of this project's own; the paper aligns meaning by its semantic tasks alone.
Knows nothing of users, of prompts, or of where the embeddings come from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.contracts import load_contract
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import ExampleSettings

Rows = npt.NDArray[np.int64]
NO_STEP = -1
SPARE = 16
CHUNK = 4096


def walks(
    vectors: npt.NDArray[np.float32], starts: Rows, steps: int, neighbours: int, seed: int
) -> Rows:
    """Walk from each start to text neighbours.

    Each step leaves one of the texts so far, the latest with probability 1/2, the one before with
    1/4 and so on, for one of its nearest neighbours, near ones more often than far ones (the rank
    is the square of an even draw). A walk has 1 to `steps` steps, as many as not.

    Args:
        vectors: float32 [texts, dim], rows of length 1, no two of them equal.
        starts: rows at which walks begin [walks].
        steps: most steps of a walk.
        neighbours: among how many neighbours a step chooses.
        seed: of the random choices.

    Returns:
        int64 [walks, steps + 1], the start first; -1 before a shorter walk's start, so that the
        last column is every walk's last text.
    """
    rng = np.random.default_rng(seed)
    count, among = len(starts), min(neighbours, len(vectors) - 1)
    if among < 1:
        return starts[:, None]
    index, walk = EmbeddingIndex.build(vectors, "flat"), np.arange(count)
    path = np.empty((count, steps + 1), np.int64)
    path[:, 0] = starts
    for step in range(1, steps + 1):
        back = np.minimum(rng.geometric(0.5, count), step)
        rank = (rng.random(count) ** 2 * among).astype(np.int64)
        # Only what is visited is searched: the work grows with the walks, not with texts squared.
        here, which = np.unique(path[walk, step - back], return_inverse=True)
        path[:, step] = _neighbours(index, vectors, here, among)[which, rank]
    missing = rng.integers(0, steps, count)  # steps that a walk is short of the longest
    column = np.arange(steps + 1) - missing[:, None]
    return np.where(column >= 0, path[walk[:, None], np.maximum(column, 0)], NO_STEP)


def _neighbours(
    index: EmbeddingIndex, vectors: npt.NDArray[np.float32], here: Rows, among: int
) -> Rows:
    """The nearest others of some rows, [len(here), among], nearest first.

    How FAISS sums depends on its threads and on what else is asked. So it is asked for a few more,
    and these are put in order by sums that depend on nothing but the two vectors.
    """
    _, found = index.search(vectors[here], min(among + 1 + SPARE, len(vectors)))
    nearness = np.empty(found.shape)
    for part in (slice(n, n + CHUNK) for n in range(0, len(here), CHUNK)):
        query = vectors[here[part]].astype(np.float64)
        nearness[part] = np.einsum("qd,qkd->qk", query, vectors[found[part]])
    nearness[found == here[:, None]] = -np.inf
    order = np.lexsort((found, -nearness))[:, :among]
    return np.take_along_axis(found, order, 1)


def synthetic_histories(
    vectors: npt.NDArray[np.float32], ad_ids: pa.Array, settings: ExampleSettings, seed: int
) -> pa.Table:
    """Histories of the ads, so many from each, down to the cap.

    A walk goes from text to text; where several ads have a text, each step draws one of them.

    Args:
        vectors: float32 [ads, dim], rows of length 1; equal texts have equal rows.
        ad_ids: their ids [ads].

    Returns:
        The columns of the contract `synthetic_histories`. A target does not stand in its own
        history, and a walk of which nothing else is left is dropped.
    """
    rng = np.random.default_rng(seed)
    starts = np.repeat(np.arange(len(vectors)), settings.synthetic_per_ad)
    if len(starts) > settings.max_synthetic_examples:
        starts = rng.choice(starts, settings.max_synthetic_examples, replace=False)
    texts, text_of = np.unique(vectors, axis=0, return_inverse=True)
    text_of = text_of.reshape(-1)
    by_text, copies = np.argsort(text_of, kind="stable"), np.bincount(text_of)
    path = walks(
        texts, text_of[starts], settings.synthetic_steps, settings.synthetic_neighbours, seed + 1
    )
    drawn = (rng.random(path.shape) * copies[path]).astype(np.int64)
    ads = by_text[(np.cumsum(copies) - copies)[path] + drawn]
    kept = (path != NO_STEP) & (ads != ads[:, -1:])
    kept[:, -1] = kept.any(axis=1)
    walk, place = np.nonzero(kept)
    step = np.cumsum(kept, axis=1)[walk, place]
    number = pc.utf8_lpad(pa.array(walk).cast(pa.string()), 9, "0")
    table = {
        "history_id": pc.binary_join_element_wise("synthetic", number, "-"),
        "step": pa.array(step, pa.int32()),
        "ad_id": ad_ids.take(pa.array(ads[walk, place])),
    }
    return pa.table(table).cast(load_contract("synthetic_histories").arrow_schema())
