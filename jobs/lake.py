"""Look at the lake, and mend it.

tables                              every table with its published days
history TABLE                       the commits of a table, newest first
digests --ds DAY                    rows and digest of every table of a day, to compare two runs
stale --ds DAY                      partitions of a day whose inputs have changed since
restore TABLE --ds DAY --version N  publish a partition again as it was at a version of the table
orphans [--older-than-hours H]      delete the files of attempts that were never published
"""

from __future__ import annotations

import argparse
import datetime as dt
import json

from rich.console import Console
from rich.table import Table

from jobs.command import main, parser, partition_date
from leadre_lib.contracts import tables
from leadre_lib.lake import METADATA_KEY, Lake
from leadre_lib.settings import Settings

console = Console()


def _tables(lake: Lake) -> None:
    view = Table("table", "days", "first", "last")
    for name in tables():
        if days := lake.days(name):
            view.add_row(name, str(len(days)), str(days[0]), str(days[-1]))
    console.print(view)


def _history(lake: Lake, name: str) -> None:
    view = Table("version", "committed (UTC)", "ds", "rows", "attempt", "code")
    for commit in lake.history(name):
        record = json.loads(commit.get(METADATA_KEY, "{}"))
        when = dt.datetime.fromtimestamp(commit["timestamp"] / 1000, dt.UTC)
        facts = [str(record.get(key, "")) for key in ("ds", "rows", "attempt", "code")]
        view.add_row(str(commit["version"]), f"{when:%Y-%m-%d %H:%M:%S}", *facts)
    console.print(view)


def _digests(lake: Lake, ds: dt.date) -> None:
    for name in tables():
        if lake.has(name, ds):
            partition = lake.partition(name, ds)
            print(f"{name:20} {partition.rows:>9} rows  {partition.digest}")


def _stale(lake: Lake, ds: dt.date) -> None:
    for name in tables():
        if lake.has(name, ds) and (changed := lake.changed_inputs(lake.partition(name, ds))):
            print(f"{name}@{ds} is stale: {', '.join(changed)} changed since")


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Do what the subcommand says."""
    lake = Lake(settings.lake)
    if args.command == "tables":
        _tables(lake)
    elif args.command == "history":
        _history(lake, args.table)
    elif args.command == "digests":
        _digests(lake, args.ds)
    elif args.command == "stale":
        _stale(lake, args.ds)
    elif args.command == "restore":
        partition = lake.restore(args.table, args.ds, args.version)
        print(f"{partition.name} is attempt {partition.attempt} again, {partition.rows} rows")
    else:
        age = dt.timedelta(hours=args.older_than_hours)
        for name in tables():
            for folder in lake.remove_orphans(name, age):
                print(f"deleted {folder}")


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(__doc__, ds=False)
    commands = arguments.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("tables")
    history = commands.add_parser("history")
    restore = commands.add_parser("restore")
    for command in (history, restore):
        command.add_argument("table", choices=tables(), metavar="TABLE")
    for command in (restore, commands.add_parser("digests"), commands.add_parser("stale")):
        command.add_argument("--ds", type=partition_date, required=True, metavar="YYYY-MM-DD")
    restore.add_argument("--version", type=int, required=True, help="a version of the table")
    orphans = commands.add_parser("orphans")
    orphans.add_argument(
        "--older-than-hours",
        type=float,
        default=24.0,
        help="spare younger files: longer than the longest attempt (default: 24)",
    )
    return arguments


if __name__ == "__main__":
    main(run, _arguments())
