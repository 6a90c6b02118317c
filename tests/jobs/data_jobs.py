"""Runs the data jobs over the hand-made world in one process, and prints the digests as JSON.

A program of its own, because one process can hold only one of the two Spark engines.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jobs import curate, examples, gate_raw, interests
from leadre_lib.contracts import RAW_TABLES, tables
from leadre_lib.lake import Lake
from leadre_lib.settings import load_settings
from tests.worlds import DAY0, DAY1, assign_ids, land, land_histories

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("engine")
    arguments.add_argument("home", type=Path)
    args = arguments.parse_args()
    settings = load_settings(
        engine=args.engine, home=args.home, quality={"max_duplicate_event_rate": 0.5}
    )
    lake = Lake(settings.lake)
    for ds in (DAY0, DAY1):
        land(lake, ds)
        assign_ids(lake, ds)
        gate_raw.run(argparse.Namespace(ds=ds), settings)
        curate.run(argparse.Namespace(ds=ds), settings)
    land_histories(lake, DAY1)
    for job in (interests, examples):
        job.run(argparse.Namespace(ds=DAY1), settings)
    made = [name for name in tables() if name not in RAW_TABLES]
    print(json.dumps(lake.digests(made, DAY1)))
