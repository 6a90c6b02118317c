"""The lake: Delta tables of parquet, one partition a day, each published in one atomic commit.

An attempt writes parquet files into the table's folder, where no reader sees them; after the audit
one commit to the Delta log replaces the partition (write, audit, publish). Readers take the list of
files from the log, so a crash at any point leaves the last published version whole.

    <root>/<table>/_delta_log/…                      the log (protocol: https://delta.io, delta-rs)
    <root>/<table>/ds=2026-03-02/<attempt>/*.parquet  data files, without the column `ds`

Knows nothing of Spark, of what is in the tables beyond their contracts, or of what checks them.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import logging
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from leadre_lib.contracts import PARTITION, Contract, load_contract
from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY

log = logging.getLogger(__name__)

METADATA_KEY = "leadre"
COMMIT_TRIES = 20


class LakeError(LeadreError):
    """A table, partition or file is missing, damaged or not what its contract says."""


class ConflictError(LakeError):
    """Somebody else published the same partition while this attempt was under way."""


@dataclass(frozen=True)
class Partition:
    """One published partition: its data files and what was recorded when it was published."""

    table: str
    ds: dt.date
    attempt: str
    files: tuple[Path, ...]
    rows: int
    digest: str
    inputs: Mapping[str, str]

    @property
    def name(self) -> str:
        """`table@ds`, as it stands in the inputs of what was made from it."""
        return f"{self.table}@{self.ds}"

    def check(self, contract: Contract) -> None:
        """Raise `LakeError` if a file is missing, damaged or of another schema."""
        for path in self.files:
            _check_footer(path, contract)


def _read_footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except FileNotFoundError:
        raise LakeError(
            f"{path}: the file is gone; restore the partition or publish it again"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise LakeError(
            f"{path}: corrupt parquet file ({error}); restore the partition or publish it again"
        ) from None


def _check_footer(path: Path, contract: Contract) -> int:
    """Check a data file against the contract; its number of rows."""
    metadata = _read_footer(path)
    found, wanted = metadata.schema.to_arrow_schema(), contract.arrow_schema()
    for name in wanted.names:
        if name not in found.names:
            raise LakeError(f"{path}: table {contract.table}: column {name!r} is missing")
        have, want = _plain(found.field(name).type), _plain(wanted.field(name).type)
        if have != want:
            raise LakeError(
                f"{path}: table {contract.table}: column {name!r} is {have},"
                f" but the contract says {want}"
            )
    if unknown := [name for name in found.names if name not in wanted.names]:
        raise LakeError(
            f"{path}: table {contract.table}: unknown column {unknown[0]!r};"
            f" drop it or add it to the contract"
        )
    return int(metadata.num_rows)


def _plain(type_: pa.DataType) -> str:
    """A type as text without the names of list items, which writers choose differently."""
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return f"list<{_plain(type_.value_type)}>"
    if pa.types.is_struct(type_):
        return "struct<" + ", ".join(f"{f.name}: {_plain(f.type)}" for f in type_) + ">"
    if pa.types.is_large_string(type_):
        return "string"
    return str(type_)


def _converted(column: pa.ChunkedArray, field: pa.Field, table: str) -> pa.ChunkedArray:
    """A column as the contract's type, where that loses and guesses nothing.

    Other widths, units and encodings of the same kind convert. A number is no text, a text no
    number, and a time without a zone is no moment.
    """
    have, want = column.type, field.type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    kinds = (text, (pa.types.is_integer,), (pa.types.is_floating,))
    zoned = pa.types.is_timestamp(have) and have.tz is not None and pa.types.is_timestamp(want)
    value = have.value_type if pa.types.is_dictionary(have) else have
    alike = any(
        any(of_kind(value) for of_kind in kind) and any(of_kind(want) for of_kind in kind)
        for kind in kinds
    )
    same = _plain(have) == _plain(want) or pa.types.is_nested(want)
    reason = ""
    if alike or zoned or same or pa.types.is_null(have):
        try:
            return column.cast(want)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = f" ({error})"
    zone = "; say in which zone these times are" if pa.types.is_timestamp(have) else ""
    raise LakeError(
        f"table {table}: column {field.name!r} is {have}, but the contract says {want}"
        f"{reason}{zone}"
    )


def rows_digest(table: pa.Table, contract: Contract) -> str:
    """SHA-256 of the rows whatever their order, the engine and the split into files.

    The rows are sorted and written as one parquet stream, whose bytes then depend on the values
    alone. Needs the partition in memory.
    """
    table = table.select(contract.columns).cast(contract.arrow_schema())
    sortable = [f.name for f in table.schema if not pa.types.is_nested(f.type)]
    order = contract.key or sortable
    table = table.sort_by([(name, "ascending") for name in order]).combine_chunks()
    table = table.replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def code_version() -> str:
    """The commit of the working tree, or `unknown` outside a checkout."""
    result = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"


@dataclass
class Attempt:
    """One try at writing a partition; as a context manager, its files go unless committed."""

    lake: Lake
    contract: Contract
    ds: dt.date
    base: str | None
    id: str
    committed: bool = False

    @property
    def folder(self) -> Path:
        """Where the attempt's parquet files go; Spark makes it, so it does not exist at first."""
        return self.lake.folder(self.contract.table) / f"{PARTITION}={self.ds}" / self.id

    @property
    def files(self) -> list[Path]:
        """The parquet files written so far, sorted."""
        return sorted(self.folder.glob("*.parquet"))

    def write(self, table: pa.Table) -> None:
        """Write an Arrow table as one more data file.

        Raises:
            LakeError: a column is missing, unknown or does not convert to the contract's type.
        """
        schema = self.contract.arrow_schema()
        if sorted(table.column_names) != sorted(schema.names):
            raise LakeError(
                f"table {self.contract.table}: columns {table.column_names} are not the"
                f" contract's {schema.names}"
            )
        columns = [_converted(table[f.name], f, self.contract.table) for f in schema]
        table = pa.table(columns, schema=schema)
        self.folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self.folder / f"part-{len(self.files):05d}.parquet")

    def commit(self) -> Partition:
        """Replace the partition by this attempt's files, in one commit.

        Raises:
            LakeError: a file is missing or is not what the contract says.
            ConflictError: another attempt published this partition since this one began.
        """
        if not self.files:
            # A partition without rows still needs a file, to tell "empty" from "never made".
            self.write(self.contract.arrow_schema().empty_table())
        rows = sum(_check_footer(path, self.contract) for path in self.files)
        stored = _read_files(self.files, self.contract)
        own = f"{self.contract.table}@{self.ds}"
        metadata = {
            "attempt": self.id,
            "ds": self.ds.isoformat(),
            "rows": rows,
            "digest": rows_digest(stored, self.contract),
            "code": code_version(),
            # What a partition held before is no input of its own successor.
            "inputs": {k: v for k, v in sorted(self.lake.reads.items()) if k != own},
        }
        self.lake.replace(self.contract, self.ds, self.files, self.base, metadata)
        self.committed = True
        log.info("published %s@%s: %d rows", self.contract.table, self.ds, rows)
        return self.lake.partition(self.contract.table, self.ds)

    def discard(self) -> None:
        """Remove the attempt's files, unless they are published."""
        if not self.committed:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.discard()


def _read_files(
    files: Sequence[Path], contract: Contract, columns: list[str] | None = None
) -> pa.Table:
    schema = contract.arrow_schema()
    try:
        dataset = pads.dataset([str(path) for path in files], schema=schema, format="parquet")
        return dataset.to_table(columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        for path in files:
            _check_footer(path, contract)  # names the file, where the file is at fault
        raise LakeError(f"table {contract.table}: {error}") from None


@dataclass
class Lake:
    """All tables under one root folder. `reads` collects the partitions read so far."""

    root: Path
    reads: dict[str, str] = field(default_factory=dict)

    def folder(self, table: str) -> Path:
        """The table's folder."""
        return self.root / table

    def _open(self, table: str, version: int | None = None) -> DeltaTable | None:
        load_contract(table)  # a table without a contract is refused
        try:
            return DeltaTable(str(self.folder(table)), version=version)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            if version is not None:
                raise LakeError(f"table {table}: no version {version}: {error}") from None
            raise LakeError(f"table {table}: cannot read its log: {error}") from None

    def _files(self, table: str, version: int | None = None) -> dict[dt.date, list[Path]]:
        """Published data files by day."""
        return self._listed(table, self._open(table, version))

    def _listed(self, table: str, opened: DeltaTable | None) -> dict[dt.date, list[Path]]:
        found: dict[dt.date, list[Path]] = {}
        if opened is None:
            return found
        actions = pa.table(opened.get_add_actions(flatten=True))
        days = actions.column(f"partition.{PARTITION}").cast(pa.string()).to_pylist()
        for day, name in zip(days, actions.column("path").to_pylist(), strict=True):
            found.setdefault(dt.date.fromisoformat(day), []).append(self.folder(table) / name)
        return found

    def days(self, table: str, version: int | None = None) -> list[dt.date]:
        """The published days of a table, oldest first."""
        return sorted(self._files(table, version))

    def has(self, table: str, ds: dt.date) -> bool:
        """Whether the partition is published (it may be empty)."""
        return ds in self._files(table)

    def history(self, table: str) -> list[dict[str, Any]]:
        """The commits of a table, newest first, with what was recorded of each partition."""
        opened = self._open(table)
        return [] if opened is None else opened.history()

    def _metadata(self, table: str) -> dict[str, dict[str, Any]]:
        """What was recorded of each attempt when it was published, by attempt."""
        records = (json.loads(h[METADATA_KEY]) for h in self.history(table) if METADATA_KEY in h)
        return {record["attempt"]: record for record in records}

    def partition(self, table: str, ds: dt.date, version: int | None = None) -> Partition:
        """A published partition, at the current or a named version of the table.

        Raises:
            LakeError: it is not published; the message names the table and the day.
        """
        files = self._files(table, version).get(ds)
        if not files:
            at = "" if version is None else f" at version {version}"
            raise LakeError(
                f"table {table} has no partition ds={ds}{at}: run the job that makes it"
            )
        attempt = _attempt_of(files)
        record = self._metadata(table).get(attempt, {})
        if not record:  # another writer's: what it recorded, if anything, is not known here
            record = {"rows": sum(_read_footer(path).num_rows for path in files)}
        return Partition(
            table,
            ds,
            attempt,
            tuple(sorted(files)),
            int(record["rows"]),
            str(record.get("digest", attempt)),
            record.get("inputs", {}),
        )

    def use(self, table: str, ds: dt.date, version: int | None = None) -> Partition:
        """The partition for reading: its files are checked, and it counts as an input from now."""
        partition = self.partition(table, ds, version)
        partition.check(load_contract(table))
        self.reads[partition.name] = partition.digest
        return partition

    def read(
        self,
        table: str,
        ds: dt.date,
        columns: list[str] | None = None,
        version: int | None = None,
    ) -> pa.Table:
        """The rows of one partition as an Arrow table. Raises `LakeError` as `partition` does."""
        return _read_files(self.use(table, ds, version).files, load_contract(table), columns)

    def values(self, table: str, ds: dt.date, column: str) -> list[Any]:
        """The distinct values of a column of one partition, read as a stream; null among them."""
        files = self.use(table, ds).files
        contract = load_contract(table)
        try:
            opened = pads.dataset(
                [str(path) for path in files], schema=contract.arrow_schema(), format="parquet"
            )
            batches = opened.scanner(columns=[column]).to_batches()
            found = {value for batch in batches for value in batch[0].unique().to_pylist()}
        except (pa.ArrowException, OSError) as error:
            raise LakeError(
                f"table {table} of ds={ds}: {error}: restore the partition or publish it again"
            ) from None
        return sorted(found, key=repr)

    def begin(self, table: str, ds: dt.date) -> Attempt:
        """Start an attempt at a partition. Use it as a context manager."""
        files = self._files(table).get(ds)
        base = _attempt_of(files) if files else None
        now = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S")
        return Attempt(self, load_contract(table), ds, base, f"{now}-{uuid.uuid4().hex[:12]}")

    def _ensure_table(self, contract: Contract) -> DeltaSchema:
        """Make the table unless it is there; its schema.

        Of several who make it at once one does, and the others' errors say no more than that.
        """
        schema = DeltaSchema.from_arrow(contract.arrow_schema(partition=True))
        folder = str(self.folder(contract.table))
        try:
            DeltaTable.create(
                folder,
                schema,
                mode="ignore",
                partition_by=[PARTITION],
                configuration={"delta.logRetentionDuration": "interval 3650 days"},
            )
        except DeltaError as error:
            if not DeltaTable.is_deltatable(folder):
                raise LakeError(
                    f"table {contract.table}: cannot be made in {folder}: {error}"
                ) from None
        return schema

    def replace(
        self,
        contract: Contract,
        ds: dt.date,
        files: Sequence[Path],
        base: str | None,
        metadata: dict[str, Any],
    ) -> None:
        """Commit `files` as the partition, if its attempt is still `base`.

        delta-rs with its default retries lets two first writes of one day both land, and lets
        writes of two days fail; so nothing is retried there, and the reason is looked at here.
        """
        table = contract.table
        schema = self._ensure_table(contract)
        actions: list[AddAction | RemoveAction] = [
            _add_action(self.folder(table), path, ds) for path in files
        ]
        for attempt in range(COMMIT_TRIES):
            # The state that is looked at must be the very one that the commit builds upon.
            opened = DeltaTable(str(self.folder(table)))
            current = self._listed(table, opened).get(ds)
            now = _attempt_of(current) if current else None
            if now == metadata["attempt"] != base:
                return  # the commit before landed, and only what follows a commit failed
            if now != base:
                raise ConflictError(
                    f"table {table}: ds={ds} was published by someone else meanwhile;"
                    f" nothing was changed: run the job again"
                )
            try:
                opened.create_write_transaction(
                    actions,
                    mode="overwrite",
                    schema=schema,
                    partition_by=[PARTITION],
                    partition_filters=[(PARTITION, "=", ds.isoformat())],
                    commit_properties=CommitProperties(
                        custom_metadata={METADATA_KEY: json.dumps(metadata)}, max_commit_retries=0
                    ),
                )
                return
            except (CommitFailedError, DeltaError) as error:
                log.info("commit of %s@%s lost a race (%s); looking again", table, ds, error)
                time.sleep(0.05 * (attempt + 1))
        raise ConflictError(
            f"table {table}: ds={ds}: no commit after {COMMIT_TRIES} tries; try later"
        )

    def restore(self, table: str, ds: dt.date, version: int) -> Partition:
        """Publish a partition again as it was at an earlier version of the table.

        Raises:
            LakeError: there was no such partition or version, or its files are gone.
        """
        old = self.partition(table, ds, version)
        contract = load_contract(table)
        old.check(contract)
        current = self._files(table).get(ds)
        base = _attempt_of(current) if current else None
        record = self._metadata(table).get(old.attempt, {"attempt": old.attempt})
        record = {**record, "restored_from_version": version}
        if old.attempt != base:
            self.replace(contract, ds, old.files, base, record)
        return self.partition(table, ds)

    def check_reads(self) -> None:
        """Read what has been read so far once more, whole, to find out which file is at fault.

        Raises:
            LakeError: a file is damaged; the message names it.
        """
        for name in self.reads:
            table, at, day = name.partition("@")
            for path in self.partition(table, dt.date.fromisoformat(day)).files if at else ():
                _read_footer(path)
                try:
                    pq.read_table(path)
                except (pa.ArrowException, OSError) as error:
                    raise LakeError(
                        f"{path}: corrupt parquet file ({error}); restore the partition or"
                        f" publish it again"
                    ) from None

    def changed_inputs(self, partition: Partition) -> list[str]:
        """The recorded inputs of a partition that are no longer what they were, such as
        `behaviours@2026-03-02`. Not empty: the partition is stale and wants redoing.
        """
        changed = []
        for name, digest in partition.inputs.items():
            table, at, day = name.partition("@")
            if not at:
                continue  # not a partition, such as the champion that a model was measured against
            try:
                now = self.partition(table, dt.date.fromisoformat(day)).digest
            except LakeError:
                now = "gone"
            if now != digest:
                changed.append(name)
        return changed

    def stale_inputs(self, tables: Iterable[str], ds: dt.date) -> list[str]:
        """Every input of the day's partitions that has changed since; see `changed_inputs`."""
        found = [self.partition(name, ds) for name in tables if self.has(name, ds)]
        return sorted({name for partition in found for name in self.changed_inputs(partition)})

    def remove_orphans(self, table: str, older_than: dt.timedelta) -> list[Path]:
        """Delete the files of attempts that were never published and are older than `older_than`,
        which must be longer than the longest attempt. The folders that were deleted.
        """
        known = set(self._metadata(table)) | set(map(_attempt_of, self._files(table).values()))
        limit = time.time() - older_than.total_seconds()
        orphans = [
            folder
            for folder in self.folder(table).glob(f"{PARTITION}=*/*")
            if folder.is_dir() and folder.name not in known and _newest_change(folder) < limit
        ]
        for folder in orphans:
            shutil.rmtree(folder)
        return orphans

    def digests(self, tables: Iterable[str], ds: dt.date) -> dict[str, str]:
        """The digest of each table's rows on one day, for those that have the day."""
        return {name: self.partition(name, ds).digest for name in tables if self.has(name, ds)}


def _attempt_of(files: Sequence[Path]) -> str:
    """The attempt that wrote a partition. Other writers' files lie right in the partition's
    folder; their names, which Delta never uses twice, stand for the attempt.
    """
    parent = files[0].parent.name
    if not parent.startswith(f"{PARTITION}="):
        return parent
    return hashlib.sha256("|".join(sorted(path.name for path in files)).encode()).hexdigest()


def _newest_change(folder: Path) -> float:
    return max((path.stat().st_mtime for path in (folder, *folder.iterdir())), default=0.0)


def _add_action(root: Path, path: Path, ds: dt.date) -> AddAction:
    status = os.stat(path)
    rows = pq.read_metadata(path).num_rows
    return AddAction(
        path=path.relative_to(root).as_posix(),
        size=status.st_size,
        partition_values={PARTITION: ds.isoformat()},
        modification_time=int(status.st_mtime * 1000),
        data_change=True,
        stats=json.dumps({"numRecords": rows}),
    )
