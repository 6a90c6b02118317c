"""Build the indexes and the release of a day's challenger.

The release is the codebook, the Semantic IDs, the model that `evaluate` chose, and the indexes over
the objects that have an active ad on the day after, when its candidates are served.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json

from jobs.command import main, parser
from jobs.evaluate import taken_before
from leadre_lib import facts
from leadre_lib.catalogue import catalogue
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.generation import sid_sizes
from leadre_lib.indexes import build_indexes, check_indexes
from leadre_lib.lake import Lake, code_version
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Releases, environment_versions
from leadre_lib.settings import Settings


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Collect the parts, build, validate."""
    ds, lake, work = args.ds, Lake(settings.lake), settings.work(args.ds)
    verdict_path = work / "evaluation.json"
    if not verdict_path.exists():
        raise NothingToDo(f"no model of ds={ds} was evaluated")
    verdict = json.loads(verdict_path.read_text("utf-8"))
    serving = ds + dt.timedelta(days=1)
    ads = catalogue(lake.read("ads", ds), lake.read("ad_semantic_ids", ds), serving)
    if ads.codebook != verdict["codebook"]:
        raise LeadreError(
            f"the model of ds={ds} speaks codebook {verdict['codebook']}, but `ad_semantic_ids`"
            f" {ads.codebook}: it was refreshed since; run the day again from `interests` on"
        )
    codebook_folder = settings.codebooks / ads.codebook
    codebook = Codebook.load(codebook_folder)
    sizes = sid_sizes(codebook.sizes, settings)
    taken = taken_before(settings, lake, ads, serving).taken()
    as_fitted = settings.with_fusion_of(verdict.get("fusion_settings"))
    parts = build_indexes(ads, sizes, taken, as_fitted, work / "indexes")
    releases = Releases(settings.releases)
    release = releases.build(
        ds,
        {"codebook": codebook_folder, "model": work / verdict["challenger"] / "model", **parts},
        {
            "kind": "daily",
            "parents": {"champion": verdict["champion"], "stage": verdict["challenger"]},
            "versions": {
                "codebook": ads.codebook,
                "template": verdict["template"],
                "code": code_version(),
                **environment_versions(),
            },
            "metrics": verdict["valid"],
            "fusion": verdict.get("fusion"),
            "fusion_settings": verdict.get("fusion_settings"),
            "inputs": dict(sorted(lake.reads.items())),
        },
    )
    found = check_indexes(release, ads, sizes)
    facts.write_json(work / "release.json", {"release": release.id})
    facts.record(settings, ds, "release", release=release.id, **found)
    print(f"release {release.id}: {found['objects']} marketing objects, {found['active']} active")


if __name__ == "__main__":
    main(run, parser(__doc__), "release")
