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
import pyarrow.dataset as pads
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
        try:
            tables[name] = pads.dataset(str(found[0]), format="parquet").to_table()
        except (pa.ArrowInvalid, OSError) as error:
            raise LeadreError(f"{found[0]}: cannot be read as parquet: {error}") from None
    return tables


def _from_source(settings: Settings, ds: dt.date) -> dict[str, pa.Table]:
    from leadre_lib.sources import open_source
    from leadre_lib.sources.simulator import Simulator

    source = open_source(settings)
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
