"""Gate the raw tables of a day: every check of their contracts, and their volume against the
trailing days. A critical failure stops the day here; nothing is made from it.
"""

from __future__ import annotations

import argparse

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.contracts import RAW_TABLES, load_contract
from leadre_lib.lake import Lake
from leadre_lib.quality import gate, run_checks, volume
from leadre_lib.settings import Settings
from leadre_lib.spark import read, session


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Check all raw tables before giving a verdict, so that one look shows everything."""
    facts.forget_day(settings, args.ds)  # the report tells of this run of the day alone
    lake = Lake(settings.lake)
    rows = {table: lake.use(table, args.ds).rows for table in RAW_TABLES}
    outcomes = []
    with session(settings, lake) as spark:
        for table in RAW_TABLES:
            checks = load_contract(table).checks()
            frame = read(spark, lake, table, [args.ds])
            outcomes += run_checks(frame, table, checks, settings, args.ds)
            outcomes.append(volume(lake, table, args.ds, settings.quality))
    facts.record(
        settings,
        args.ds,
        "gate_raw",
        rows=rows,
        checks=len(outcomes),
        failed=[f"{o.table}: {o.check.name}: {o.failed}" for o in outcomes if o.failed],
    )
    gate(outcomes)


if __name__ == "__main__":
    main(run, parser(__doc__), "gate_raw")
