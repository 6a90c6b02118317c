"""Rebuild the indexes of the champion for the ads of a day, without training.

New ads get Semantic IDs from the frozen codebook, ads that stopped leave the constraint index. The
result is a child release with the same model; if its validation fails, the old one goes on serving.
"""

from __future__ import annotations

import argparse
import datetime as dt

from jobs import semantic_ids
from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.catalogue import catalogue
from leadre_lib.curation import curate_ads
from leadre_lib.errors import NothingToDo
from leadre_lib.generation import sid_sizes
from leadre_lib.indexes import build_indexes, check_indexes
from leadre_lib.lake import Lake, code_version
from leadre_lib.quality import publish
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Releases
from leadre_lib.settings import Settings
from leadre_lib.spark import read, session


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Refresh the day's ads and IDs where the snapshot has changed, then build and promote."""
    ds, lake, releases = args.ds, Lake(settings.lake), Releases(settings.releases)
    next_day = ds + dt.timedelta(days=1)
    if releases.champion_entry(before=next_day) is None:
        raise NothingToDo("there is no champion yet whose indexes could be rebuilt")
    _refresh(args, settings, lake)
    ads = catalogue(lake.read("ads", ds), lake.read("ad_semantic_ids", ds), next_day)
    active = int(ads.active.sum())
    with releases.lock():
        parent = releases.champion(before=next_day)
        assert parent is not None
        parent.require_codebook(ads.codebook, f"`ad_semantic_ids` of ds={ds}")
        codebook = Codebook.load(parent.folder / "codebook")
        work = settings.work(ds) / "index_rebuild"
        parts = build_indexes(ads, sid_sizes(codebook.sizes, settings), settings, work)
        child = releases.build(
            ds,
            {"codebook": parent.folder / "codebook", "model": parent.model, **parts},
            {
                "kind": "index_rebuild",
                "parents": {"release": parent.id},
                "versions": {**parent.manifest["versions"], "code": code_version()},
                "metrics": parent.manifest["metrics"],
                "inputs": dict(sorted(lake.reads.items())),
            },
        )
        check_indexes(child, active)
        if child.id != parent.id:
            releases.promote(ds, child.id, f"indexes of {ds} rebuilt", rebuild=True)
    facts.record(settings, ds, "index_rebuild", release=child.id, parent=parent.id, active=active)
    print(f"release {child.id} (child of {parent.id}): {len(ads.codes)} ads, {active} active")


def _refresh(args: argparse.Namespace, settings: Settings, lake: Lake) -> None:
    """Publish `ads` and `ad_semantic_ids` again, if they were made of another raw snapshot."""
    ds = args.ds
    made = ("ads", "ad_semantic_ids")
    if all(lake.has(table, ds) for table in made) and not lake.stale_inputs(made, ds):
        return
    with session(settings) as spark:
        raw = read(spark, lake, "raw_ads", [ds])
        publish(spark, settings, lake, "ads", ds, curate_ads(raw))
    args.keep = True
    semantic_ids.run(args, settings)


if __name__ == "__main__":
    main(run, parser(__doc__), "index_rebuild")
