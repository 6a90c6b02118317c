"""Sources: where the raw tables of a day come from.

A source gives the four raw tables of one partition day, with exactly the columns of their
contracts (`ds` left out) and in a fixed order, so that a day is the same from run to run. Knows
nothing of the lake that the tables are landed in.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import Any, Protocol

import pyarrow as pa

from leadre_lib.errors import LeadreError
from leadre_lib.facts import write_json
from leadre_lib.settings import Settings

RawDay = dict[str, pa.Table]


class Source(Protocol):
    """One origin of raw tables. The first partition is an initial load with its own history.

    Attributes:
        name: the source's name, as in `settings.source`.
        has_ecpm: False where no ad event has an eCPM, so that there is nothing to prefer by value.
        notes: sentences for the report: what is made up, how days are assigned.
        made_from: all that the rows depend on, such as the seed, sizes and checksums of files.
    """

    name: str
    has_ecpm: bool
    notes: list[str]
    made_from: dict[str, Any]

    def first_ds(self) -> dt.date:
        """The day of the initial load."""

    def last_ds(self) -> dt.date | None:
        """The last day that has data; None where there is always another."""

    def raw_day(self, ds: dt.date) -> RawDay:
        """The raw tables `raw_users`, `raw_ads`, `raw_ad_events`, `raw_content_events` of one day.

        Raises:
            LeadreError: the source has no such day.
        """


def check_range(source: Source, ds: dt.date) -> None:
    """Refuse a day that the source does not have.

    Raises:
        LeadreError: `ds` lies before the source's first day or after its last one.
    """
    first, last = source.first_ds(), source.last_ds()
    if ds < first or (last is not None and ds > last):
        span = f"its days are {first} to {last}" if last else f"its first day is {first}"
        raise LeadreError(f"source {source.name} has no data for {ds}: {span}")


def claim_state(source: Source, settings: Settings) -> None:
    """Hold the state folder for rows of this source; days of two worlds never mix in one lake.

    Raises:
        LeadreError: the folder holds days that were made from something else.
    """
    path = settings.state / "made_from.json"
    if not path.exists():
        write_json(path, source.made_from)
        return
    before = json.loads(path.read_text("utf-8"))
    changed = [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in source.made_from.items()
        if before.get(name) != value
    ]
    if changed:
        raise LeadreError(
            f"{settings.state} holds days made from other data or settings ({'; '.join(changed)}):"
            " give another HOME_DIR, or set them back"
        )


def open_source(settings: Settings) -> Source:
    """The source that the settings name.

    Raises:
        LeadreError: the source lands its own tables (`lake`), or its data are missing or malformed.
    """
    # each source is imported when it is asked for: none needs the others' packages and words
    if settings.source == "simulator":
        from leadre_lib.sources.simulator import Simulator

        return Simulator(settings)
    if settings.source == "movielens":
        from leadre_lib.sources.movielens import MovieLens

        return MovieLens(settings)
    if settings.source == "amazon":
        from leadre_lib.sources.amazon import Amazon

        return Amazon(settings)
    raise LeadreError(
        "source lake has no generator: its raw tables are landed by your own systems. "
        "Choose simulator, movielens or amazon to have raw tables made."
    )
