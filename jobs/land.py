"""Land one day of raw tables in the lake.

The built-in sources (simulator, movielens, amazon) make the day themselves. With
`LEADRE_SOURCE=lake` name a folder that holds `raw_users`, `raw_ads`, `raw_ad_events` and
`raw_content_events`, each as `<table>.parquet` or as a folder of parquet files, with the columns of
their contracts in `schemas/`. A day that is landed already is left as it is, unless `--force` is
given.
"""

from __future__ import annotations

import argparse
import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.command import main, parser
from leadre_lib.contracts import RAW_TABLES
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Lake
from leadre_lib.settings import Settings


def _from_folder(folder: Path) -> dict[str, pa.Table]:
    tables = {}
    for name in RAW_TABLES:
        found = [path for path in (folder / f"{name}.parquet", folder / name) if path.exists()]
        if not found:
            raise LeadreError(f"{folder}: neither {name}.parquet nor a folder {name} is there")
        tables[name] = pa.concat_tables(_read(path) for path in _parquet_files(found[0]))
    return tables


def _parquet_files(path: Path) -> list[Path]:
    """The file, or those of the folder, all of one schema."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise LeadreError(f"{path}: no parquet files are in this folder")
    schemas = [_read(file, schema_only=True).schema for file in files]
    for file, schema in zip(files, schemas, strict=True):
        if not schema.equals(schemas[0]):
            raise LeadreError(f"{file}: other columns or types than {files[0]}: make them the same")
    return files


def _read(path: Path, schema_only: bool = False) -> pa.Table:
    try:
        if schema_only:
            return pq.read_schema(path).remove_metadata().empty_table()
        # Not as a data set: folders such as ds=2026-03-02 are no columns.
        return pq.ParquetFile(path).read().replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise LeadreError(f"{path}: cannot be read as parquet: {error}") from None


def _from_source(settings: Settings, ds: dt.date) -> dict[str, pa.Table]:
    from leadre_lib.sources import claim_state, open_source
    from leadre_lib.sources.simulator import Simulator

    source = open_source(settings)
    claim_state(source, settings)
    day = source.raw_day(ds)
    if isinstance(source, Simulator):
        truth = settings.state / "truth" / f"{ds}.parquet"
        truth.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(source.truth(ds), truth)
    return dict(day)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Land the day: all four tables are checked before the first is published."""
    lake = Lake(settings.lake)
    if not args.force and all(lake.has(table, args.ds) for table in RAW_TABLES):
        print(f"{args.ds}: already landed")
        return
    tables = _from_folder(args.folder) if args.folder else _from_source(settings, args.ds)
    attempts = [lake.begin(name, args.ds) for name in RAW_TABLES]
    try:
        for attempt in attempts:
            attempt.write(tables[attempt.contract.table])
        for attempt in attempts:
            print(f"{args.ds}: landed {attempt.contract.table}: {attempt.commit().rows} rows")
    finally:
        for attempt in attempts:
            attempt.discard()


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument(
        "--folder", type=Path, help="folder of parquet files to land, instead of a built-in source"
    )
    arguments.add_argument("--force", action="store_true", help="land the day again")
    main(run, arguments)
