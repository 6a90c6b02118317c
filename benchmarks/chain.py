"""The jobs of the daily chain that a results table needs, as subprocesses without Airflow.

A run is a variant of the settings and a seed. Its table is that of the newest day alone: the days
before it are landed, curated and given Semantic IDs, as the chain does it, but nothing is trained
on them. So the model starts from scratch on all that is older than that day, there is no champion
to go on from, and a seed costs one training. On MovieLens and Amazon, which have one day after the
initial load, that is just what `make run` does. On the simulator `make run` trains on two days, the
second time from the champion of the first; its table has a `leadre-champion`, and a model that has
seen more steps.

A seed is that of Semantic IDs, synthetic histories, the draws of examples and cases, and training.
The raw days keep the seed of the settings: the simulator's world is one data set, and seeds tell
how far results differ on it.

What runs have in common is made once. A run goes through four homes, each a `LEADRE_HOME` that
begins as a copy of the one before it: `data`, `ids`, `sft` and `result`. A home is named by a
digest of the code, the data and of all settings but those that none of its jobs reads, so variants
that differ in DPO alone share one SFT. Finished runs leave their table in `results/`; an
interrupted one goes on at the job where it stopped.

    <home>/benchmarks/chain/<source>/homes/<name>-<digest>/   state, and done.json
    <home>/benchmarks/chain/<source>/results/<digest>.json    table, seed, seconds of the jobs
    <home>/benchmarks/chain/<source>/results/<digest>.parquet ranks of the test cases
    <home>/benchmarks/chain/<source>/logs/<name>-<digest>/    what each job said

Knows nothing of what the jobs do, or of what the tables are compared for.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from jobs.airflow_server import interrupt_on_signals
from jobs.command import EXIT_NOTHING_TO_DO
from jobs.run import days_of
from leadre_lib.errors import LeadreError
from leadre_lib.facts import remove, write_json
from leadre_lib.lake import Lake
from leadre_lib.settings import ENV_PREFIX, REPOSITORY, Settings, load_settings
from leadre_lib.sources import open_source

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A job, the home that it works in, and whether it runs for every day or the newest alone."""

    name: str
    home: str
    every_day: bool = False


# In the order of the DAG `leadre_daily`, which a test compares them with; homes in theirs.
JOBS = (
    Job("land", "data", every_day=True),
    Job("gate_raw", "data", every_day=True),
    Job("curate", "data", every_day=True),
    Job("semantic_ids", "ids", every_day=True),
    Job("synthetic_histories", "ids"),
    Job("examples", "sft"),
    Job("sft", "sft"),
    Job("dpo", "result"),
    Job("evaluate", "result"),
)
LEFT_OUT = frozenset({"interests"})  # makes the prompts of the night, which no table needs

# Settings that no job of a home, or of one before it, reads. What is forgotten here costs time;
# what stands here though it is read would mix up variants.
_UNREAD_AT_ALL = ("home", "data", "chain", "inference")
_UNREAD_BY_SFT = (*_UNREAD_AT_ALL, "dpo", "sasrec")
_UNREAD_BY_IDS = (
    *_UNREAD_BY_SFT,
    "prompt",
    "model",
    "sft",
    "decoding",
    "examples.task_weights",
    "examples.value_power",
    "examples.click_weight",
)
UNREAD = {
    "data": (*_UNREAD_BY_IDS, "evaluation", "examples", "fusion", "embedding", "semantic_ids"),
    "ids": _UNREAD_BY_IDS,
    "sft": _UNREAD_BY_SFT,
    "result": _UNREAD_AT_ALL,
}
UNSEEDED = frozenset({"data"})
PASSING = frozenset({"sft", "result"})  # removed when no run needs them any more
CODE = ("leadre_lib", "jobs", "schemas", "conf")
LOG_LINES = 20
STOP_SECONDS = 20.0  # that a job has to end its ranks

# Wide where the output goes to a file: a table cut to 80 columns cannot be read.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


# --- settings -----------------------------------------------------------------------------------


def variable(name: str) -> str:
    """The environment variable of a setting: `sft.epochs` is `LEADRE_SFT__EPOCHS`."""
    return ENV_PREFIX + name.upper().replace(".", "__")


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Run:
    """A variant of the settings with a seed.

    Attributes:
        name: of the variant, for people.
        settings: the caller's, with the variant's changes and the seed.
        variables: the environment that makes those settings of the caller's.
    """

    name: str
    seed: int
    settings: Settings
    variables: Mapping[str, str]

    @classmethod
    def of(cls, name: str, changes: Mapping[str, str], seed: int) -> Run:
        """The run of changes, dotted names with values, over the environment's settings.

        Raises:
            SettingsError: there is no such setting, or it can't have that value.
        """
        variables = {variable(key): value for key, value in {**changes, "seed": str(seed)}.items()}
        with environment(variables):
            return cls(name, seed, load_settings(), variables)


@cache
def code_digest() -> str:
    """A digest of all that decides what the jobs do: code, contracts and configuration."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in {".py", ".yaml", ".json"}:
                digest.update(f"{path.relative_to(REPOSITORY)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def what_counts(settings: Settings, unread: Sequence[str]) -> dict[str, Any]:
    """All settings but those named, as JSON."""
    values = settings.model_dump(mode="json")
    for name in unread:
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place.get(section, {})
        place.pop(last, None)
    return values


# --- homes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """One of the homes that a run goes through."""

    name: str
    path: Path
    steps: tuple[tuple[dt.date, str], ...]

    def done(self) -> dict[str, float]:
        """Seconds of the steps that are done."""
        path = self.path / "done.json"
        return json.loads(path.read_text("utf-8"))["seconds"] if path.exists() else {}

    def missing(self) -> list[tuple[dt.date, str]]:
        """The steps that are not done."""
        done = self.done()
        return [(ds, job) for ds, job in self.steps if f"{ds} {job}" not in done]


@dataclass
class Chain:
    """Runs over one source, all under `<home>/benchmarks/chain/<source>`.

    Attributes:
        base: the caller's settings; the raw days have their seed.
        days: after the initial load.
        seconds: how long each job took, as far as is known.
    """

    base: Settings
    days: int = 2
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base.source == "lake":
            raise LeadreError(
                "the benchmarks land their own days: choose SOURCE simulator, movielens or amazon"
            )
        source = open_source(self.base)
        self.made_from = source.made_from
        self.dates = days_of(source, self.days)
        self.root = self.base.home / "benchmarks" / "chain" / self.base.source

    @property
    def ds(self) -> dt.date:
        """The day that is evaluated."""
        return self.dates[-1]

    def digest(self, run: Run, home: str) -> str:
        """What a run's home is named by."""
        settings = run.settings
        if home in UNSEEDED:
            settings = settings.model_copy(update={"seed": self.base.seed})
        counts = what_counts(settings, UNREAD[home])
        known = [code_digest(), self.made_from, self.dates, [vars(job) for job in JOBS], counts]
        text = json.dumps(known, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def homes(self, run: Run) -> list[Home]:
        """The homes of a run, in their order."""
        return [
            Home(
                name,
                self.root / "homes" / f"{name}-{self.digest(run, name)}",
                tuple(
                    (ds, job.name)
                    for ds in self.dates
                    for job in JOBS
                    if job.home == name and (job.every_day or ds == self.ds)
                ),
            )
            for name in UNREAD
        ]

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a finished run left: `rows` (see `results_table`), `seed`, `ds`, `seconds`."""
        path = self._result_path(run)
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def _result_path(self, run: Run) -> Path:
        return self.root / "results" / f"{self.digest(run, 'result')}.json"

    # --- running --------------------------------------------------------------------------------

    def complete(self, runs: Sequence[Run], force: bool = False) -> list[list[Row]]:
        """The table of each run, made now where there is none yet.

        Args:
            runs: those that come to the same settings are one.
            force: make all of them anew.

        Raises:
            LeadreError: a job failed, or somebody else runs benchmarks in this home.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.root / "lock", timeout=0)
        try:
            with lock:
                self._complete(runs, force)
        except filelock.Timeout:
            raise LeadreError(
                f"{self.root}: another benchmark is at work there: wait, or give HOME_DIR"
            ) from None
        return [found["rows"] for found in map(self.result, runs) if found is not None]

    def ranks(self, run: Run) -> pa.Table:
        """The test cases' rows of `case_ranks` of a run that is done."""
        return pq.read_table(self._result_path(run).with_suffix(".parquet"))

    def _complete(self, runs: Sequence[Run], force: bool) -> None:
        self._remove_others_homes()
        different = list({self._result_path(run): run for run in reversed(runs)}.values())[::-1]
        for run in different if force else ():
            remove(self._result_path(run))
            for home in self.homes(run):
                remove(home.path)
        self._remember_seconds()
        waiting = [run for run in different if self.result(run) is None]
        said = (
            f"{len(different)} different runs, {len(different) - len(waiting)} of them done before"
        )
        console.print(f"{said}; evaluated on {self.ds}; state in {self.root}", markup=False)
        for number, run in enumerate(waiting):
            self._say_left(waiting[number:], len(different))
            self._make(run, self.homes(run))
            self._keep_result(run)
            self._remove_passing(run, waiting[number + 1 :])
        self._say_left([], len(different))

    def _make(self, run: Run, homes: Sequence[Home]) -> None:
        """The last of the homes with all its steps, and those before it where it needs them."""
        *before, home = homes
        if not home.path.exists():
            if before:
                self._make(run, before)
            self._begin(home, before[-1] if before else None)
        for ds, job in home.missing():
            self._step(run, home, ds, job)

    def _begin(self, home: Home, parent: Home | None) -> None:
        """A new home: a copy, since a job may change a file in place."""
        partial = home.path.with_suffix(".partial")
        remove(partial)
        if parent is not None:
            shutil.copytree(parent.path, partial, symlinks=True)
        else:
            partial.mkdir(parents=True)
            self.base.cache.mkdir(parents=True, exist_ok=True)
            (partial / "cache").symlink_to(self.base.cache)
        write_json(partial / "done.json", {"code": code_digest(), "seconds": {}})
        partial.rename(home.path)

    def _step(self, run: Run, home: Home, ds: dt.date, job: str) -> None:
        log = self.root / "logs" / home.path.name / f"{ds}-{job}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        seed = self.base.seed if home.name in UNSEEDED else run.seed
        own = {variable("home"): str(home.path), variable("seed"): str(seed)}
        began = time.monotonic()
        code = call_job(job, ds, {**os.environ, **run.variables, **own}, log)
        seconds = round(time.monotonic() - began, 1)
        state = {0: "", EXIT_NOTHING_TO_DO: "  nothing to do"}.get(code, f"  exit code {code}")
        line = f"{dt.datetime.now():%H:%M:%S}  {run.name}, seed {run.seed}  {ds}  {job:<20}"
        bad = code not in (0, EXIT_NOTHING_TO_DO)
        console.print(
            f"{line}{seconds:8.1f} s{state}", style="bold red" if bad else "green", markup=False
        )
        if bad:
            for said in log.read_text(errors="replace").splitlines()[-LOG_LINES:]:
                console.print(f"    {said}", markup=False)
            raise LeadreError(
                f"{job} of {run.name}, seed {run.seed}, {ds} failed, see above; full log: {log};"
                " mend the cause, and the same command goes on from here"
            )
        self.seconds.setdefault(job, []).append(seconds)
        done = {**home.done(), f"{ds} {job}": seconds}
        write_json(home.path / "done.json", {"code": code_digest(), "seconds": done})

    def _keep_result(self, run: Run) -> None:
        from leadre_lib.report import results_table

        homes = self.homes(run)
        last = homes[-1]
        settings = run.settings.model_copy(update={"home": last.path})
        rows = results_table(settings, self.ds)
        if not rows:
            raise LeadreError(
                f"{run.name}, seed {run.seed}: nothing was evaluated on {self.ds}; the logs are in"
                f" {self.root / 'logs' / last.path.name}"
            )
        ranks = Lake(settings.lake).read("case_ranks", self.ds)
        path = self._result_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(ranks.filter(pc.equal(ranks["split"], "test")), path.with_suffix(".parquet"))
        write_json(
            path,
            {
                "variant": run.name,
                "seed": run.seed,
                "ds": self.ds,
                "rows": rows,
                "seconds": {key: value for home in homes for key, value in home.done().items()},
            },
        )

    # --- what is left ---------------------------------------------------------------------------

    def seconds_left(self, runs: Sequence[Run]) -> float | None:
        """About how long the steps of these runs take; None where no job's time is known."""
        if not self.seconds:
            return None
        means = {job: sum(took) / len(took) for job, took in self.seconds.items()}
        other = sum(means.values()) / len(means)
        missing: dict[Path, list[tuple[dt.date, str]]] = {}
        for run in runs:
            for home in reversed(self.homes(run)):
                missing[home.path] = home.missing()
                if home.path.exists():
                    break
        return sum(means.get(job, other) for steps in missing.values() for _, job in steps)

    def _say_left(self, waiting: Sequence[Run], of: int) -> None:
        left = self.seconds_left(waiting) if waiting else None
        about = "" if left is None else f", about {max(left / 60, 1):.0f} min left"
        console.print(
            f"{of - len(waiting)} of {of} different runs done{about}", style="bold", markup=False
        )

    def _remember_seconds(self) -> None:
        for path in (self.root / "results").glob("*.json"):
            for key, value in json.loads(path.read_text("utf-8"))["seconds"].items():
                self.seconds.setdefault(key.split()[-1], []).append(value)

    def _remove_passing(self, run: Run, waiting: Sequence[Run]) -> None:
        """Models and checkpoints that no run needs any more."""
        needed = {home.path for other in waiting for home in self.homes(other)}
        for home in self.homes(run):
            if home.name in PASSING and home.path not in needed:
                remove(home.path)

    def _remove_others_homes(self) -> None:
        """Homes that other code made, or that were never finished."""
        for path in (self.root / "homes").glob("*"):
            told = path / "done.json"
            code = json.loads(told.read_text("utf-8"))["code"] if told.exists() else ""
            if code != code_digest() or path.suffix == ".partial":
                remove(path)


def call_job(job: str, ds: dt.date, env: Mapping[str, str], log: Path) -> int:
    """Run a job with its output in `log`; its exit code. What interrupts this ends the job too."""
    command = [sys.executable, "-m", f"jobs.{job}", "--ds", ds.isoformat()]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # politely: training ends its ranks
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


# --- command lines ------------------------------------------------------------------------------


def base_settings(source: str | None, data: Path | None) -> Settings:
    """The environment's settings, with the source and data of the command line in it from now on.
    A folder of data without a source is one of Amazon reviews.

    Raises:
        SettingsError: a setting is wrong.
    """
    # The environment goes over arguments, and the jobs inherit it.
    if data is not None:
        os.environ[variable("data")] = str(data.resolve())
    if source is not None:
        os.environ[variable("source")] = source
    elif variable("data") in os.environ:
        os.environ.setdefault(variable("source"), "amazon")
    return load_settings()


def about(bench: Chain, seeds: int) -> str:
    """What the tables are of, for their titles."""
    cells = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"{bench.base.source}, {bench.ds}, {cells}"


def check_output(path: Path | None) -> None:
    """Refuse a file that could not be written after hours of work."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise LeadreError(f"--json {path}: is a folder, or lies in none: name a file")


def say_errors(work: Any, *args: Any) -> None:
    """Call `work`; an error of ours, or an interruption, is said in a line and ends the program."""
    interrupt_on_signals()
    try:
        work(*args)
    except LeadreError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "error: interrupted; the same command goes on from here (without --force, FORCE=1)"
        ) from None
