"""Wait for the raw tables of one day without holding a worker, up to a deadline.

The operator looks once; if tables are missing it hands over to the triggerer, which looks again
every half minute. The repository's root must be on PYTHONPATH, also for the triggerer.

Knows nothing of who lands the tables, nor of what is in them.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from airflow.providers.common.compat.sdk import AirflowFailException, BaseOperator, Context
from airflow.triggers.base import BaseTrigger, TriggerEvent

POLL_SECONDS = 30.0


def missing_tables(lake: str, tables: Sequence[str], ds: str) -> list[str]:
    """Those of `tables` that the lake in the folder `lake` does not have for the day `ds`."""
    from leadre_lib.lake import Lake

    day = dt.date.fromisoformat(ds)
    return [table for table in tables if not Lake(Path(lake)).has(table, day)]


def deadline(ds: str, hours: float) -> dt.datetime:
    """`hours` after the end of the day `ds` (UTC), however late the task begins to wait."""
    midnight = dt.datetime.combine(dt.date.fromisoformat(ds), dt.time(), dt.UTC)
    return midnight + dt.timedelta(days=1, hours=hours)


class RawDayTrigger(BaseTrigger):
    """Fires with the list of missing tables: empty as soon as none is, else at the deadline."""

    def __init__(
        self, lake: str, tables: list[str], ds: str, until: str, poll_seconds: float = POLL_SECONDS
    ) -> None:
        super().__init__()
        self.lake, self.tables, self.ds, self.until = lake, tables, ds, until
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Import path and arguments, from which the triggerer builds this trigger again."""
        names = ("lake", "tables", "ds", "until", "poll_seconds")
        return "dags.raw_day.RawDayTrigger", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look every `poll_seconds`; the log of a table is read in a thread."""
        until = dt.datetime.fromisoformat(self.until)
        while missing := await asyncio.to_thread(missing_tables, self.lake, self.tables, self.ds):
            left = (until - dt.datetime.now(dt.UTC)).total_seconds()
            if left <= 0:
                break
            await asyncio.sleep(min(self.poll_seconds, left))
        yield TriggerEvent(missing)


class RawDayOperator(BaseOperator):
    """Succeeds when all `tables` have the day `ds`; fails at the deadline, naming what is missing.

    Args:
        lake: root folder of the Delta tables.
        tables: names of the raw tables.
        ds: the day, `YYYY-MM-DD`; a template.
        hours: how long after the end of the day to wait. For a day long past: not at all.
    """

    template_fields = ("ds",)

    def __init__(
        self, *, lake: str, tables: Sequence[str], ds: str, hours: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.lake, self.tables, self.ds, self.hours = lake, list(tables), ds, hours

    def execute(self, context: Context) -> None:
        """Look once, then wait in the triggerer."""
        missing = missing_tables(self.lake, self.tables, self.ds)
        if not missing:
            return
        until = deadline(self.ds, self.hours)
        if until <= dt.datetime.now(dt.UTC):
            self._fail(missing, until)
        self.log.info("no %s for %s yet: waiting until %s", ", ".join(missing), self.ds, until)
        trigger = RawDayTrigger(self.lake, self.tables, self.ds, until.isoformat())
        self.defer(trigger=trigger, method_name="resume")

    def resume(self, context: Context, event: list[str]) -> None:
        """Called with what the trigger found."""
        if event:
            self._fail(event, deadline(self.ds, self.hours))

    def _fail(self, missing: Sequence[str], until: dt.datetime) -> None:
        # No retry: the next look would find the deadline passed as well.
        raise AirflowFailException(
            f"raw data of {self.ds}: no {', '.join(missing)} in {self.lake}"
            f" by {until:%Y-%m-%d %H:%M} UTC; land it, then clear this task"
        )
