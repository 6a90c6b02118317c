"""Bulk inference: candidates of all users, part by part, in shards, resumable.

The users, in the order of their ids, are cut into parts of fixed size; a shard takes every n-th
part, and each finished part is a parquet file. A rerun with the same inputs skips the parts that
are there, and because a part's users depend on nothing else, the rows are the same with or without
a kill and whatever the number of shards.

Knows nothing of DAGs, gates or the online store.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leadre_lib.catalogue import Catalogue
from leadre_lib.contracts import load_contract
from leadre_lib.decoding import BeamDecoder
from leadre_lib.lake import Lake
from leadre_lib.settings import Settings

log = logging.getLogger(__name__)

INPUTS = ("ads", "ad_semantic_ids", "user_prompts")


@dataclass(frozen=True)
class Shard:
    """One of `count` workers; `number` counts from 0."""

    number: int
    count: int


def parts_folder(settings: Settings, lake: Lake, ds: dt.date, release: str) -> Path:
    """Where the parts of these very inputs lie; other inputs, another folder."""
    inputs = [lake.partition(name, ds).digest for name in INPUTS]
    what = [
        release,
        inputs,
        settings.decoding.model_dump(),
        settings.inference.users_per_part,
        settings.evaluation.exclude_seen,
    ]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return settings.work(ds) / "infer" / key


def part_paths(folder: Path, users: int, users_per_part: int) -> list[Path]:
    """The parts of all users, in their order."""
    return [folder / f"part-{number:06d}.parquet" for number in range(-(-users // users_per_part))]


def infer_shard(
    prompts: pa.Table,
    shard: Shard,
    decoder: BeamDecoder,
    catalogue: Catalogue,
    release: str,
    folder: Path,
    settings: Settings,
) -> None:
    """Write the parts of a shard into `folder`.

    Args:
        prompts: columns `user_id`, `prompt`, `seen_ad_ids` of all users, sorted by user.
        release: name of the release that decodes, for the rows.
        folder: see `parts_folder`.
    """
    size = settings.inference.users_per_part
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(enumerate(part_paths(folder, prompts.num_rows, size)))
    parts = parts[shard.number :: shard.count]
    open_parts = [(number, path) for number, path in parts if not path.exists()]
    if finished := len(parts) - len(open_parts):
        log.info("%d of %d parts are finished already", finished, len(parts))
    began, done = time.monotonic(), 0
    for position, (number, path) in enumerate(open_parts):
        users = prompts.slice(number * size, size)
        seen = list(_seen_rows(users, catalogue)) if settings.evaluation.exclude_seen else None
        objects, scores = decoder.decode(users["prompt"].to_pylist(), settings.decoding.top_k, seen)
        _write(candidate_rows(users["user_id"], objects, scores, catalogue, release), path)
        done += users.num_rows
        rate = done / (time.monotonic() - began)
        log.info(
            "shard %d/%d: %d of %d parts, %.0f users/s, about %.0f s left",
            shard.number + 1,
            shard.count,
            finished + position + 1,
            len(parts),
            rate,
            (len(open_parts) - position - 1) * size / rate,
        )


def _seen_rows(users: pa.Table, catalogue: Catalogue) -> Iterator[np.ndarray]:
    lists = users["seen_ad_ids"].combine_chunks()
    rows = catalogue.object_rows(lists.flatten())
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    for seen in np.split(rows, np.cumsum(lengths)[:-1]):
        yield seen[seen >= 0]


def candidate_rows(
    user_ids: pa.ChunkedArray,
    objects: np.ndarray,
    scores: np.ndarray,
    catalogue: Catalogue,
    release: str,
) -> pa.Table:
    """Decoder output, [users, k] each, as rows of the contract `candidates`.

    An object stands as its active ads, by eCPM, which share its score; an object without any, as
    when its last ad was stopped since, is left out.
    """
    user, place = np.nonzero(objects >= 0)
    ads, found = catalogue.expand(objects[user, place])
    user, place = user[found], place[found]
    first = np.flatnonzero(np.diff(user, prepend=-1))
    rank = np.arange(len(user)) - np.repeat(first, np.diff(first, append=len(user))) + 1
    sids = catalogue.objects["semantic_id"].combine_chunks()
    table = pa.table(
        {
            "user_id": user_ids.combine_chunks().take(pa.array(user)),
            "rank": pa.array(rank, pa.int32()),
            "ad_id": catalogue.ad_ids.take(pa.array(ads)),
            "semantic_id": sids.take(pa.array(catalogue.owner[ads])),
            "score": pa.array(scores[user, place].astype(np.float64)),
            "release": pa.array(np.full(len(user), release)),
        }
    )
    return table.cast(load_contract("candidates").arrow_schema())


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial)
    partial.replace(path)
