"""Small facts that a job wants to tell people, kept as JSON beside the day's report.

Knows nothing of what the facts mean or of how they are shown.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

from leadre_lib.settings import Settings

_PROCESSES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", "utf-8")
    partial.replace(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def record(settings: Settings, ds: dt.date, job: str, **facts: Any) -> None:
    """Keep the facts of one job and day, in place of those of an earlier run."""
    write_json(settings.reports(ds) / "facts" / f"{job}.json", facts)


def forget(settings: Settings, ds: dt.date, job: str) -> None:
    """Drop what an earlier run of the job and day had recorded."""
    remove(settings.reports(ds) / "facts" / f"{job}.json")


def forget_day(settings: Settings, ds: dt.date) -> None:
    """Drop what all jobs of the day had recorded: the day begins anew."""
    for folder in ("facts", "runs"):
        remove(settings.reports(ds) / folder)


def record_run(settings: Settings, ds: dt.date, job: str, seconds: float) -> None:
    """Keep how long this process took and the most memory that it or a child of it held."""
    usage = (resource.getrusage(who).ru_maxrss for who in _PROCESSES)
    write_json(
        settings.reports(ds) / "runs" / f"{job}.json",
        {"seconds": round(seconds, 1), "peak_mib": round(max(usage) / 1024)},
    )


def runs(settings: Settings, ds: dt.date) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of the day's jobs, by job."""
    return _by_name(settings.reports(ds) / "runs")


def recorded(settings: Settings, ds: dt.date) -> dict[str, dict[str, Any]]:
    """All facts of a day, by job."""
    return _by_name(settings.reports(ds) / "facts")


def _by_name(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }
