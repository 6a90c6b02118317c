"""What every job's command line shares: `--ds`, logging, clear errors and exit codes.

Exit codes: 0 done, 1 an error that the message explains, 2 bad arguments, 99 nothing to do
(Airflow shows such a task as skipped). Knows nothing of what a job does.
"""

from __future__ import annotations

import argparse
import datetime as dt
import logging
import os
import sys
import time
from collections.abc import Callable

from leadre_lib import facts
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.settings import Settings, load_settings

EXIT_NOTHING_TO_DO = 99


def partition_date(text: str) -> dt.date:
    """Parse `YYYY-MM-DD`, refusing anything else and days that have not come yet (UTC)."""
    try:
        ds = dt.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date: write it as YYYY-MM-DD") from None
    if ds.isoformat() != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no date: write it as YYYY-MM-DD")
    if ds > dt.datetime.now(dt.UTC).date():
        raise argparse.ArgumentTypeError(f"{text} lies in the future: choose a day that has begun")
    return ds


def parser(description: str | None, ds: bool = True) -> argparse.ArgumentParser:
    """An argument parser with the job's docstring as help and, unless told otherwise, `--ds`."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if ds:
        result.add_argument(
            "--ds", type=partition_date, required=True, metavar="YYYY-MM-DD", help="partition date"
        )
    return result


def main(
    run: Callable[[argparse.Namespace, Settings], None],
    arguments: argparse.ArgumentParser,
    job: str = "",
) -> None:
    """Parse the command line, load the settings, run the job, and exit with its code.

    With a name, `job`, the time and memory that the job took are kept for the day's report; the
    name may hold arguments, such as `infer-{shard}`.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for chatty in ("py4j", "pyspark", "great_expectations", "httpx", "filelock", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # No library tells its makers how it is used, unless the user says so. TRL would, in each rank.
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    args = arguments.parse_args()
    job = job.format(**vars(args))
    began = time.monotonic()
    try:
        settings = load_settings()
    except LeadreError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if job:
        facts.forget(settings, args.ds, job)
    try:
        run(args, settings)
    except NothingToDo as reason:
        print(f"nothing to do: {reason}", file=sys.stderr)
        if job:
            facts.record(settings, args.ds, job, skipped=str(reason))
        sys.exit(EXIT_NOTHING_TO_DO)
    except LeadreError as error:
        print(f"error: {error}", file=sys.stderr)
        if job:
            facts.record(settings, args.ds, job, failure=str(error))
        sys.exit(1)
    if job:
        facts.record_run(settings, args.ds, job, time.monotonic() - began)
