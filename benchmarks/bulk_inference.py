"""Bulk inference of many simulated users through the jobs, as a night does it.

Makes a simulated world with `--users` users (kept in `--home`, and used again from there), trains a
small model for a few minutes at most, and then runs the job `infer`, all shards side by side:

- `full`: everybody; users a second, and the memory of the shards over time.
- `killed`: everybody once more; every shard is killed (SIGKILL) halfway and started again. Its
  published rows must be those of `full`, to the digest.
- `next day, full` and `next day, incremental`: the day after, everybody, and only those whose
  prompt has news. Both have the champion of the day before.

Memory is the resident set of each shard's process, sampled every second.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from leadre_lib.lake import Lake
from leadre_lib.release import Releases
from leadre_lib.settings import REPOSITORY, Settings, load_settings

DATA_JOBS = ("land", "gate_raw", "curate", "semantic_ids", "interests")
TRAINING_JOBS = ("synthetic_histories", "examples", "sft", "evaluate", "release", "promote")
SPARKS = "▁▂▃▄▅▆▇█"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--ads", type=int, default=5_000)
    parser.add_argument(
        "--activity",
        type=float,
        default=1.0,
        help="events a user and day, against the simulator's usual 9; fewer users then have news",
    )
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".leadre" / "benchmarks" / "bulk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    return parser


class World:
    """The simulated world on disk, and the jobs that run over it."""

    def __init__(self, home: Path, users: int, ads: int, activity: float) -> None:
        self.environment = {
            **os.environ,
            "LEADRE_HOME": str(home),
            "LEADRE_SIMULATOR__USERS": str(users),
            "LEADRE_SIMULATOR__ADS": str(ads),
            "LEADRE_SIMULATOR__CONTENT_EVENTS_PER_DAY": str(3 * activity),
            "LEADRE_SIMULATOR__IMPRESSIONS_PER_DAY": str(6 * activity),
            "LEADRE_SIMULATOR__HISTORY_DAYS": "3",
            "LEADRE_EXAMPLES__MAX_VALID_CASES": "100",
            "LEADRE_EXAMPLES__MAX_TEST_CASES": "300",
            "LEADRE_SFT__EPOCHS": "0.5",
        }

    def settings(self) -> Settings:
        """As the jobs see them."""
        os.environ.update(self.environment)
        return load_settings()

    def command(self, job: str, ds: dt.date, *options: str) -> list[str]:
        """The command line of a job."""
        return [sys.executable, "-m", f"jobs.{job}", "--ds", str(ds), *options]

    def run(self, job: str, ds: dt.date, **more: str) -> None:
        """Run a job to its end; what it says is shown if it fails."""
        print(f"  {job} {ds}", flush=True)
        done = subprocess.run(
            self.command(job, ds),
            env=self.environment | more,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{job} of {ds} failed:\n{done.stdout}{done.stderr}")

    def prepare(self, days: list[dt.date]) -> None:
        """Data of all days, and a champion as of the second; what is there stays."""
        settings = self.settings()
        lake = Lake(settings.lake)
        made_with = {k: v for k, v in self.environment.items() if k.startswith("LEADRE_")}
        told = settings.home / "made_with.json"
        if told.exists() and json.loads(told.read_text()) != made_with:
            raise SystemExit(f"{told}: made with other options: choose another --home")
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(made_with))
        for ds in days:
            for job in DATA_JOBS if not lake.has("user_prompts", ds) else ():
                self.run(job, ds)
            if ds == days[1] and not Releases(settings.releases).champion():
                for job in TRAINING_JOBS:
                    self.run(job, ds)


def infer(
    world: World, ds: dt.date, settings: Settings, kill_when: Callable[[], bool], **more: str
) -> tuple[float, list[list[int]]]:
    """Run all shards side by side; seconds, and resident bytes of each shard at every second.

    As soon as `kill_when` holds, all shards are killed.
    """
    count = settings.inference.shards
    print(f"  infer {ds}, {count} shards", flush=True)
    log = settings.work(ds) / "bench-infer.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as out:
        shards = [
            psutil.Popen(
                world.command("infer", ds, "--shard", str(n), "--shards", str(count)),
                env=world.environment | more,
                cwd=REPOSITORY,
                stdout=out,
                stderr=out,
            )
            for n in range(count)
        ]
        memory: list[list[int]] = [[] for _ in shards]
        killed = False
        while any(shard.poll() is None for shard in shards):
            time.sleep(1)
            for shard, curve in zip(shards, memory, strict=True):
                if shard.poll() is None:
                    curve.append(shard.memory_info().rss)
            if not killed and kill_when():
                killed = True
                for shard in shards:
                    shard.send_signal(signal.SIGKILL)
    if not killed and any(shard.returncode for shard in shards):
        raise SystemExit(log.read_text())
    return time.monotonic() - began, memory


def curve(values: list[int], points: int = 40) -> str:
    """Values from zero to their peak, as a line of blocks."""
    step = max(1, -(-len(values) // points))
    tops = [max(values[start : start + step]) for start in range(0, len(values), step)]
    return "".join(SPARKS[round(top / max(tops) * (len(SPARKS) - 1))] for top in tops)


def row(name: str, users: int, seconds: float, memory: list[list[int]]) -> dict[str, Any]:
    """One line of the table; memory is that of the largest shard, in its halves."""
    largest = max(memory, key=lambda curve: max(curve, default=0))
    middle = len(largest) // 2
    if not middle:
        raise SystemExit(f"{name}: over within two seconds, too soon to tell its memory")
    print(f"  memory of a shard, {name}: {curve(largest)}", flush=True)
    return {
        "method": f"leadre {name}",
        "users": users,
        "s": round(seconds, 1),
        "users/s": round(users / seconds, 1),
        "peak MB, first half": round(max(largest[:middle]) / 1e6),
        "peak MB, second half": round(max(largest[middle:]) / 1e6),
    }


def measure(world: World, days: list[dt.date]) -> list[dict[str, Any]]:
    """The four runs, as rows of the table."""
    settings = world.settings()
    lake, (_, today, tomorrow) = Lake(settings.lake), days
    found = []

    def fresh(ds: dt.date) -> None:
        shutil.rmtree(settings.work(ds) / "infer", ignore_errors=True)

    def never() -> bool:
        return False

    def decoded(ds: dt.date) -> str:
        rows = lake.read("candidates", ds, ["user_id", "decoded_on"]).to_pandas()
        days_of = rows.drop_duplicates("user_id")["decoded_on"]
        return f"{(days_of == ds).mean():.3f}"

    def halfway() -> bool:
        parts = list((settings.work(today) / "infer").glob("*/part-*.parquet"))
        return len(parts) * settings.inference.users_per_part >= users / 2

    users = lake.partition("user_prompts", today).rows
    fresh(today)
    found.append(row("full", users, *infer(world, today, settings, never)))
    world.run("publish", today)
    digest = lake.partition("candidates", today).digest
    fresh(today)
    first, _ = infer(world, today, settings, halfway)
    second, memory = infer(world, today, settings, never)
    found.append(row("killed halfway and resumed", users, first + second, memory))
    world.run("publish", today)
    if lake.partition("candidates", today).digest != digest:
        raise SystemExit("the rows after a kill are not those without one")
    print("  the rows after a kill are those without one", flush=True)
    users = lake.partition("user_prompts", tomorrow).rows
    for name, incremental in (("next day, full", "false"), ("next day, incremental", "true")):
        more = {"LEADRE_INFERENCE__INCREMENTAL": incremental}
        fresh(tomorrow)
        found.append(row(name, users, *infer(world, tomorrow, settings, never, **more)))
        world.run("publish", tomorrow, **more)
        found[-1]["decoded"] = decoded(tomorrow)
    return found


def main() -> None:
    """Prepare, measure, print the table."""
    args = arguments().parse_args()
    world = World(args.home.resolve(), args.users, args.ads, args.activity)
    first = world.settings().simulator.first_ds
    days = [first + dt.timedelta(days=n) for n in range(3)]
    world.prepare(days)
    rows = measure(world, days)
    heads = list(dict.fromkeys(head for found in rows for head in found))
    widths = [max(len(head), *(len(str(found.get(head, ""))) for found in rows)) for head in heads]
    for line in [dict(zip(heads, heads, strict=True)), *rows]:
        cells = zip(heads, widths, strict=True)
        print("  ".join(f"{line.get(head, '')!s:>{width}}" for head, width in cells))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
