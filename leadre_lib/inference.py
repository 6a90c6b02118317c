"""Bulk inference: candidates of all users, part by part, in shards, resumable.

The rows of `user_prompts` are cut into parts of bounded size, in the order of the published files.
A shard is a run of neighbouring parts, and each finished part is a parquet file. A rerun with the
same inputs skips the parts that are there, and because a part's users depend on nothing else, the
rows are the same with or without a kill and whatever the number of shards. Prompts are read as a
stream: memory does not grow with the number of users.

Knows nothing of DAGs, gates, the online store or how candidates are made.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from leadre_lib.candidates import USER_COLUMNS, Retriever
from leadre_lib.lake import Lake, LakeError, Partition
from leadre_lib.settings import Settings

log = logging.getLogger(__name__)

INPUTS = ("ads", "ad_semantic_ids")
DECODING = "decoding"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One of `count` workers; `number` counts from 0."""

    number: int
    count: int

    def of(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Its run of the parts, as long as any other's but for one."""
        bounds = [len(parts) * n // self.count for n in (self.number, self.number + 1)]
        return parts[bounds[0] : bounds[1]]


@dataclass(frozen=True)
class Part:
    """Some rows of `user_prompts`: slice `nth` of a row group of a file.

    `number` counts over all files.
    """

    number: int
    file: Path
    row_group: int
    nth: int

    def path(self, folder: Path) -> Path:
        """Where its candidates are written."""
        return folder / f"part-{self.number:06d}.parquet"


def parts_of(prompts: Partition, users_per_part: int) -> list[Part]:
    """The parts of a partition of `user_prompts`, told by the files' footers.

    Raises:
        LakeError: a file cannot be read; the message names it.
    """
    parts: list[Part] = []
    for file in prompts.files:
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise LakeError(
                f"{file}: cannot be read ({error}); publish the partition again"
            ) from None
        for group in range(footer.num_row_groups):
            slices = -(-footer.row_group(group).num_rows // users_per_part)
            parts += [Part(len(parts) + nth, file, group, nth) for nth in range(slices)]
    return parts


def decoding_settings(settings: Settings) -> str:
    """Digest of the settings that candidates depend on, the prompts' apart."""
    what = [
        settings.decoding.model_dump(),
        settings.fusion.model_dump(),
        settings.inference.fill,
        settings.evaluation.exclude_seen,
        settings.model.max_tokens,
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def earlier_partition(
    settings: Settings, lake: Lake, ds: dt.date, release: str
) -> Partition | None:
    """The candidates that may be carried over: of the newest day before, if they were published by
    the same release with the same settings. None also where `inference.incremental` is off.
    """
    days = [day for day in lake.days("candidates") if day < ds]
    if not settings.inference.incremental or not days:
        return None
    earlier = lake.use("candidates", days[-1])
    wanted = {"champion": release, DECODING: decoding_settings(settings)}
    told = {name: earlier.inputs.get(name) for name in wanted}
    if told != wanted:
        log.info("%s is of another release or other settings: decoding everybody", earlier.name)
        return None
    return earlier


def parts_folder(
    settings: Settings, lake: Lake, ds: dt.date, release: str, earlier: Partition | None
) -> Path:
    """Where the parts of these very inputs lie; other inputs, another folder."""
    what = [
        release,
        [lake.partition(name, ds).digest for name in INPUTS],
        lake.partition("user_prompts", ds).attempt,  # the same rows in other files: other parts
        earlier and [earlier.digest, settings.inference.max_age_days],
        decoding_settings(settings),
        settings.inference.users_per_part,
    ]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return settings.work(ds) / "infer" / key


def infer_shard(parts: Sequence[Part], retriever: Retriever, folder: Path, size: int) -> None:
    """Write the candidates of a shard's parts into `folder`, those that are not there yet.

    Args:
        parts: of the shard.
        folder: see `parts_folder`.
        size: users a part, as `parts_of` was told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [part for part in parts if not is_finished(part.path(folder))]
    if len(todo) < len(parts):
        log.info("%d of %d parts are finished already", len(parts) - len(todo), len(parts))
    began, users, decoded = time.monotonic(), 0, 0
    for done, (part, table) in enumerate(_read(todo, size), start=1):
        rows, new = retriever.candidates(table)
        _write(rows, part.path(folder))
        users, decoded = users + table.num_rows, decoded + new
        rate = users / (time.monotonic() - began)
        log.info(
            "%d of %d parts: %.0f users/s, %.0f %% of them decoded, about %.0f s left",
            *(len(parts) - len(todo) + done, len(parts), rate, 100 * decoded / users),
            (len(todo) - done) * size / rate,
        )


def _read(parts: Sequence[Part], size: int) -> Iterator[tuple[Part, pa.Table]]:
    """The users of each part; of a row group no more than one part is held."""
    for (file, group), wanted in groupby(parts, lambda part: (part.file, part.row_group)):
        by_nth = {part.nth: part for part in wanted}
        # Without these two a whole row group would be held, compressed.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES) as opened:
            batches = opened.iter_batches(size, row_groups=[group], columns=USER_COLUMNS)
            for nth, batch in enumerate(_readable(batches, file)):
                if nth in by_nth:
                    yield by_nth.pop(nth), pa.Table.from_batches([batch])
        if by_nth:
            raise LakeError(f"{file}: shorter than its footer says; publish the partition again")


def _readable(batches: Iterator[pa.RecordBatch], file: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise LakeError(f"{file}: damaged ({error}); publish the partition again") from None


def is_finished(path: Path) -> bool:
    """Whether a part is there and whole; of one that was cut short only the name is left."""
    try:
        pq.read_metadata(path)
    except FileNotFoundError:
        return False
    except (pa.ArrowException, OSError) as error:
        log.warning("%s is damaged and counts as missing: %s", path, error)
        return False
    return True


def _write(table: pa.Table, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    pq.write_table(table, partial)
    partial.replace(path)
