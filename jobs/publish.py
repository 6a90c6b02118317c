"""Gate the candidates of all shards, and publish them to the lake and the online store.

The gate checks the contract, that every ad is active, that the model or the signals found something
for enough users, and, as warnings, that the model wrote any of it and that its scores have not
drifted. Only the newest day reaches the online store.
"""

from __future__ import annotations

import argparse
import datetime as dt
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as pads

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.catalogue import catalogue
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.inference import (
    DECODING,
    decoding_settings,
    earlier_partition,
    is_finished,
    parts_folder,
    parts_of,
)
from leadre_lib.lake import Lake
from leadre_lib.online_store import OnlineStore
from leadre_lib.quality import audit, candidate_outcomes, gate
from leadre_lib.release import Releases
from leadre_lib.settings import Settings
from leadre_lib.spark import session


def _parts(settings: Settings, lake: Lake, ds: dt.date) -> tuple[list[Path], str]:
    """The parts of all shards, none missing, and the champion that wrote them."""
    champion = Releases(settings.releases).champion_entry(before=ds + dt.timedelta(days=1))
    if champion is None:
        raise NothingToDo("there is no champion yet, and so there are no candidates")
    earlier = earlier_partition(settings, lake, ds, champion.release)
    folder = parts_folder(settings, lake, ds, champion.release, earlier)
    prompts = lake.use("user_prompts", ds)
    parts = [part.path(folder) for part in parts_of(prompts, settings.inference.users_per_part)]
    if gone := [part for part in parts if not is_finished(part)]:
        raise LeadreError(
            f"{gone[0]}: {len(gone)} of {len(parts)} parts are missing or damaged: run infer for"
            " every shard"
        )
    return parts, champion.release


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Stage the parts as one attempt, audit it, commit, serve."""
    ds, lake = args.ds, Lake(settings.lake)
    active_users = lake.partition("user_prompts", ds).rows
    parts, release = _parts(settings, lake, ds)
    lake.reads |= {"champion": release, DECODING: decoding_settings(settings)}
    ads = catalogue(
        lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds + dt.timedelta(days=1)
    )
    before = [day for day in lake.days("candidates") if day < ds]
    columns = ["score", "source"]
    earlier = lake.read("candidates", before[-1], columns) if before else None
    with lake.begin("candidates", ds) as attempt, session(settings, lake) as spark:
        attempt.folder.mkdir(parents=True)
        for number, part in enumerate(parts):
            shutil.copy2(part, attempt.folder / f"part-{number:05d}.parquet")
        rows = pads.dataset(
            [str(path) for path in attempt.files], schema=attempt.contract.arrow_schema()
        ).to_table()
        gate(candidate_outcomes(rows, ads, active_users, earlier, settings.quality))
        audit(spark, settings, attempt)
        published = attempt.commit()
    store = OnlineStore(settings.online_store)
    served = store.served()
    newest = served is None or served <= ds
    if newest:
        store.replace(rows, ds)
    counted = pc.value_counts(rows["source"]).to_pylist()
    facts.record(
        settings,
        ds,
        "publish",
        rows=published.rows,
        active_users=active_users,
        served=newest,
        sources={count["values"]: count["counts"] for count in counted},
    )
    where = "the lake and the online store" if newest else f"the lake alone: {served} is served"
    print(f"{published.rows} candidates of {active_users} active users published to {where}")


if __name__ == "__main__":
    main(run, parser(__doc__), "publish")
