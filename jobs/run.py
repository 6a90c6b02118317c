"""The main job: land the first raw days of a source and run the daily chain over them.

    python -m jobs.run --days 2 --json results.json

Starts Airflow for as long as it needs it, backfills `leadre_daily` one day after the other, shows
the tasks as they go, and ends with the table of results. Days that are done are passed over; after
an interruption or a failure the same command goes on where it stopped.

Knows nothing of what the jobs do: it sees them through Airflow's REST API.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from jobs.airflow_server import AirflowServer, interrupt_on_signals, memory_by_task
from jobs.command import main, parser
from leadre_lib.contracts import RAW_TABLES, tables
from leadre_lib.errors import LeadreError
from leadre_lib.facts import write_json
from leadre_lib.lake import Lake
from leadre_lib.release import Releases
from leadre_lib.settings import Settings

if TYPE_CHECKING:
    from leadre_lib.sources import Source

DAG = "leadre_daily"
BOOKKEEPING = frozenset({"training_done", "watcher"})  # tasks that run no job
STYLES = {"success": "green", "failed": "bold red", "up_for_retry": "yellow", "skipped": "dim"}
SHOWN = frozenset({"running", "deferred", "upstream_failed", *STYLES})
TIMED = frozenset({"success", "failed", "up_for_retry"})
FINISHED = frozenset({"success", "failed"})
POLL_SECONDS = 1.0
LOG_LINES = 20

# Wide where the output goes to a file: a table cut to 80 columns cannot be read.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def days_to_run(settings: Settings, days: int) -> list[dt.date]:
    """The day of the initial load and up to `days` days after it, as far as the source goes."""
    if settings.source == "lake":
        found = Lake(settings.lake).days(RAW_TABLES[0])
        if not found:
            raise LeadreError(
                f"source lake: no day of {RAW_TABLES[0]} in {settings.lake}: land the raw tables"
            )
        return sorted(found)[: days + 1]
    from leadre_lib.sources import claim_state, open_source

    source = open_source(settings)
    claim_state(source, settings)
    return days_of(source, days)


def days_of(source: Source, days: int) -> list[dt.date]:
    """The day of a source's initial load and up to `days` days after it, as far as it goes."""
    first, last = source.first_ds(), source.last_ds()
    count = days if last is None else min(days, (last - first).days)
    return [first + dt.timedelta(days=n) for n in range(count + 1)]


def land(settings: Settings, ds: dt.date, env: dict[str, str]) -> None:
    """Land the raw tables of one day unless they are there."""
    lake = Lake(settings.lake)
    if settings.source == "lake" or all(lake.has(table, ds) for table in RAW_TABLES):
        return
    start = time.monotonic()
    command = [sys.executable, "-m", "jobs.land", "--ds", ds.isoformat()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-LOG_LINES:])
        raise LeadreError(f"landing {ds} failed:\n{tail}")
    show(ds, "land", "success", time.monotonic() - start)


def show(ds: dt.date, task: str, state: str, seconds: float | None = None) -> None:
    """One line about one task."""
    duration = "" if seconds is None else f"{seconds:8.1f} s"
    line = f"{dt.datetime.now():%H:%M:%S}  {ds}  {task:<14}  {state:<15}{duration}".rstrip()
    console.print(line, style=STYLES.get(state), markup=False)


def stale_inputs(settings: Settings, ds: dt.date) -> list[str]:
    """What the day was made from and has changed since: partitions, and the champion."""
    lake, releases = Lake(settings.lake), Releases(settings.releases)
    changed = lake.stale_inputs(tables(), ds)
    for table, before in (("metrics", ds), ("candidates", ds + dt.timedelta(days=1))):
        used = lake.partition(table, ds).inputs.get("champion") if lake.has(table, ds) else None
        entry = releases.champion_entry(before=before)
        if used and (entry is None or entry.release != used):
            changed.append(f"the champion before {before}")
    return changed


def other_settings(settings: Settings, ds: dt.date) -> list[str]:
    """The sections of the settings that differ from those with which the day was last run."""
    path = settings.state / "settings" / f"{ds}.json"
    if not path.exists():
        return []
    before, now = json.loads(path.read_text("utf-8")), _what_counts(settings)
    return sorted(name for name in now if now[name] != before.get(name))


def _what_counts(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"home", "data", "chain"})


class Chain:
    """Runs of the daily DAG, a day at a time, through the REST API of a running server."""

    def __init__(self, server: AirflowServer, settings: Settings) -> None:
        self.server = server
        self.settings = settings
        self.durations_path = settings.state / "durations.json"
        self.durations: dict[str, dict[str, float]] = {}
        if self.durations_path.exists():
            self.durations = json.loads(self.durations_path.read_text())
        self.peak_bytes = 0
        self.task_peaks: dict[str, int] = {}

    def end_old_backfills(self) -> None:
        """Close what an interrupted driver left: Airflow allows one open backfill a DAG.

        Runs that wait are failed by this, and so redone; the one that is under way goes on.
        """
        answer = self.server.call("GET", "/backfills", params={"dag_id": DAG, "order_by": "-id"})
        for backfill in answer["backfills"]:
            if backfill["completed_at"] is None:
                self.server.call("PUT", f"/backfills/{backfill['id']}/cancel")

    def newest_run(self, ds: dt.date) -> dict[str, Any] | None:
        """The latest run of the day; reprocessing a day makes another."""
        day = ds.isoformat()
        params = {"partition_date_gte": day, "partition_date_lte": day, "order_by": "-id"}
        runs = self.server.call("GET", f"/dags/{DAG}/dagRuns", params={**params, "limit": 1})
        return runs["dag_runs"][0] if runs["dag_runs"] else None

    def run_day(self, ds: dt.date, force: bool) -> bool:
        """Run the chain of one day, or go on with it; whether the day is done now.

        A day that is done, but used what has changed since, is redone.
        """
        run = self.newest_run(ds)
        if run and run["state"] == "success" and not force:
            changed = stale_inputs(self.settings, ds)
            if changed:
                console.print(f"{ds}  is stale and redone: {', '.join(changed)} changed since")
                force = True
        if run and run["state"] not in FINISHED:
            if not force:
                console.print(f"{ds}  going on with the run that was interrupted")
                return self.follow(ds, run["dag_run_id"])
            path = f"/dags/{DAG}/dagRuns/{run['dag_run_id']}"
            self.server.call("PATCH", path, json={"state": "failed"})
        elif run and run["state"] == "success" and not force:
            other = other_settings(self.settings, ds)
            hint = f"with other settings ({', '.join(other)}) " if other else ""
            console.print(f"{ds}  already done {hint}(FORCE=1 redoes it)", markup=False)
            return True
        if force:
            shutil.rmtree(self.settings.work(ds), ignore_errors=True)
        write_json(self.settings.state / "settings" / f"{ds}.json", _what_counts(self.settings))
        day = f"{ds}T00:00:00Z"
        body = {
            "dag_id": DAG,
            "from_date": day,
            "to_date": day,
            "max_active_runs": 1,
            "reprocess_behavior": "completed" if force else "failed",
            "run_on_latest_version": True,
        }
        self.server.call("POST", "/backfills", json=body)
        run = self.newest_run(ds)
        if run is None:
            raise LeadreError(f"airflow made no run of {DAG} for {ds}")
        try:
            return self.follow(ds, run["dag_run_id"])
        finally:
            # The scheduler closes it too, but only every 30 s.
            self.end_old_backfills()

    def follow(self, ds: dt.date, run_id: str) -> bool:
        """Show the tasks of a run as they change until it ends; whether it succeeded."""
        path = f"/dags/{DAG}/dagRuns/{run_id}"
        seen: dict[str, tuple[str, int]] = {}
        for poll in itertools.count():
            self.server.check()
            # The state of the run first: once it has ended, so have all tasks in the second answer.
            state = self.server.call("GET", path)["state"]
            tasks = self.server.call("GET", f"{path}/taskInstances", params={"limit": 100})
            for task in sorted(tasks["task_instances"], key=_last_change):
                self._show_change(ds, run_id, task, seen)
            if state in FINISHED:
                return bool(state == "success")
            if poll % 2 == 0:
                self._sample_memory()
            time.sleep(POLL_SECONDS)
        raise AssertionError("unreachable")

    def _show_change(
        self,
        ds: dt.date,
        run_id: str,
        task: dict[str, Any],
        seen: dict[str, tuple[str, int]],
    ) -> None:
        index = task["map_index"]
        name = task["task_id"] if index < 0 else f"{task['task_id']}[{index}]"
        state = task["state"]
        now = (state, task["try_number"])
        if name in BOOKKEEPING or state not in SHOWN or seen.get(name) == now:
            return
        seen[name] = now
        show(ds, name, state, task["duration"] if state in TIMED else None)
        if state in {"failed", "up_for_retry"}:
            # An error is shown whole once, when it is final.
            self._show_log(run_id, task, LOG_LINES if state == "failed" else 4)
        if state == "success":
            self.durations.setdefault(ds.isoformat(), {})[name] = round(task["duration"], 1)
            # Written at once, so that an interrupted run keeps what it has.
            partial = self.durations_path.with_suffix(".tmp")
            partial.write_text(json.dumps(self.durations, indent=1))
            os.replace(partial, self.durations_path)

    def _show_log(self, run_id: str, task: dict[str, Any], lines: int) -> None:
        index = [f"map_index={task['map_index']}"] if task["map_index"] >= 0 else []
        folder = Path(
            self.server.home,
            "logs",
            f"dag_id={DAG}",
            f"run_id={run_id}",
            f"task_id={task['task_id']}",
            *index,
        )
        path = folder / f"attempt={task['try_number']}.log"
        if not path.exists():
            return
        for line in log_events(path)[-lines:]:
            console.print(f"    {line}", markup=False)
        console.print(f"    full log: {path}", markup=False)

    def _sample_memory(self) -> None:
        by_task = memory_by_task(self.server.home)
        self.peak_bytes = max(self.peak_bytes, sum(by_task.values()))
        for task, size in by_task.items():
            self.task_peaks[task] = max(self.task_peaks.get(task, 0), size)


def _last_change(task: dict[str, Any]) -> str:
    return task["end_date"] or task["start_date"] or ""


def log_events(path: Path) -> list[str]:
    """What a task said: the output of its job, else all messages (a JSON object a line)."""
    events = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            event = str(record["event"])
            for error in record.get("error_detail", ()):
                event += f": {error['exc_type']}: {error['exc_value']}"
        except (ValueError, KeyError, TypeError):
            event = line
        if not event.startswith("::"):  # marks of foldable groups
            events.append(event)
    return events[events.index("Output:") + 1 :] if "Output:" in events else events


def durations_table(chain: Chain, days: Sequence[dt.date]) -> Table:
    """Seconds of every task and day, with the peak memory of its processes."""
    table = Table("task", title="duration (s) and peak memory (MB) of the tasks")
    columns = [chain.durations.get(ds.isoformat(), {}) for ds in days]
    for ds in days:
        table.add_column(str(ds), justify="right")
    table.add_column("MB", justify="right")
    # The fullest day first: it has the tasks in their order.
    by_size = sorted(columns, key=len, reverse=True)
    for name in dict.fromkeys(itertools.chain.from_iterable(by_size)):
        seconds = [f"{column[name]:.1f}" if name in column else "-" for column in columns]
        peak = chain.task_peaks.get(name.partition("[")[0])
        table.add_row(name, *seconds, "-" if peak is None else f"{peak / 1e6:.0f}")
    return table


def print_results(settings: Settings, ds: dt.date, json_path: Path | None) -> None:
    """The results of the newest day, also as JSON, and where the reports are."""
    from leadre_lib.report import results_table

    rows = results_table(settings, ds)
    heads = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    table = Table(title=f"results of {ds}")
    for head in heads:
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        table.add_row(*(format_cell(row.get(head)) for head in heads))
    if rows:
        console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")
        console.print(f"results as JSON:  {json_path}", markup=False)
    console.print(f"report:     {settings.reports(ds) / 'index.html'}", markup=False)
    console.print(f"Data Docs:  {settings.state / 'data_docs' / 'index.html'}", markup=False)


def format_cell(value: object) -> str:
    """Fractions with four places, everything else as it is."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def run_days(settings: Settings, days: Sequence[dt.date], force: bool) -> Chain:
    """Land the days and run their chains in order, stopping at the first that fails.

    Later days build on earlier ones, so they are not run over a gap.
    """
    start = time.monotonic()
    with AirflowServer(settings) as server:
        console.print(f"starting Airflow; logs: {server.home / 'logs'}", markup=False)
        for ds in days:  # Airflow starts meanwhile
            land(settings, ds, server.env)
        server.wait_until_ready([DAG])
        console.print(f"Airflow is up after {time.monotonic() - start:.0f} s: {server.url}")
        chain = Chain(server, settings)
        chain.end_old_backfills()
        for number, ds in enumerate(days):
            if not chain.run_day(ds, force):
                rest = ", ".join(map(str, days[number + 1 :]))
                raise LeadreError(
                    f"the chain of {ds} failed, see above; mend the cause and run this again"
                    + (f" (not run: {rest})" if rest else "")
                )
    return chain


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Run the days, then print what came out."""
    start = time.monotonic()
    if settings.engine == "spark":
        from leadre_lib.spark import check_java

        check_java()
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise LeadreError(f"--json {args.json}: no folder {args.json.resolve().parent}")
    if args.json is not None and args.json.is_dir():
        raise LeadreError(f"--json {args.json}: is a folder, not a file")
    interrupt_on_signals()
    days = days_to_run(settings, args.days)
    console.print(
        f"source {settings.source}, engine {settings.engine}, days {days[0]} to {days[-1]},"
        f" state in {settings.state}",
        markup=False,
    )
    try:
        chain = run_days(settings, days, args.force)
    except KeyboardInterrupt:
        raise LeadreError("interrupted; the same command goes on from here") from None
    if chain.durations:
        console.print(durations_table(chain, days))
    print_results(settings, days[-1], args.json)
    peak = f", peak memory {chain.peak_bytes / 1e9:.1f} GB" if chain.peak_bytes else ""
    console.print(f"done in {time.monotonic() - start:.0f} s{peak}")


def _days(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least one day")
    return number


if __name__ == "__main__":
    arguments = parser(__doc__, ds=False)
    arguments.add_argument(
        "--days", type=_days, default=2, help="days after the initial load (default: 2)"
    )
    arguments.add_argument("--force", action="store_true", help="redo days that are done")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    main(run, arguments)
