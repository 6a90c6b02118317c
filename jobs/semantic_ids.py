"""Give every marketing object a Semantic ID, and so every ad that sells it.

An object that had an ID keeps it. New objects are embedded and encoded with the frozen codebook;
the first day, which has none, trains it. Writes `ad_semantic_ids`, which carries all ads known so
far. Says so where the codebook has drifted from the catalogue: the index rebuild refreshes it.
"""

from __future__ import annotations

import argparse
import datetime as dt

import pyarrow as pa

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.assignment import assign_day, by_object, drift, first_codebook
from leadre_lib.catalogue import catalogue
from leadre_lib.embeddings import encoder_id
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Lake
from leadre_lib.quality import QualityError, publish
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Releases
from leadre_lib.semantic_ids import code_usage, codes_of
from leadre_lib.settings import Settings
from leadre_lib.spark import session


def _codebook(settings: Settings, previous: pa.Table | None, ads: pa.Table) -> Codebook:
    """The codebook that the earlier IDs speak or, where there are none, a new one."""
    encoder = encoder_id(settings.embedding)
    if previous is not None:
        codebook = Codebook.load(settings.codebooks / previous["codebook"][0].as_py())
        if codebook.config["text_encoder"] != encoder:
            raise LeadreError(
                f"codebook {codebook.version} was trained on {codebook.config['text_encoder']}, but"
                f" embedding.model is now {encoder}: set it back, or start in a new LEADRE_HOME"
            )
        return codebook
    trained = first_codebook(ads, settings, encoder)
    trained.save(settings.codebooks / trained.version)
    return trained


def _check_collisions(ds: dt.date, rate: float, limit: float) -> None:
    if rate > limit:
        raise QualityError(
            f"Semantic IDs of ds={ds}: {rate:.2%} of the objects collide before the last token,"
            f" more than quality.max_collision_rate = {limit:.2%}: on a first day, raise"
            f" semantic_ids.codes; later, raise the limit for the day and then refresh the codebook"
            f" (index_rebuild --refresh); nothing was published"
        )


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Assign, check the collision rate, look for drift, publish."""
    ds, lake = args.ds, Lake(settings.lake)
    ads = lake.read("ads", ds).sort_by("ad_id")
    days = [day for day in lake.days("ad_semantic_ids") if day < ds or (args.keep and day == ds)]
    previous = lake.read("ad_semantic_ids", days[-1]) if days else None
    codebook = _codebook(settings, previous, ads)
    rows = assign_day(ads, previous, codebook, settings)
    objects = by_object(rows)
    usage = code_usage(codes_of(objects), codebook.sizes)
    before = 0 if previous is None else len(by_object(previous))
    print(
        f"{rows.num_rows} ads of {len(objects)} marketing objects, {len(objects) - before} new,"
        f" codebook {codebook.version}, collisions before the last token"
        f" {usage['collision_rate']:.2%}"
    )
    # An index rebuild, which keeps the day's IDs, cures what this gate is there for.
    if not args.keep:
        _check_collisions(ds, usage["collision_rate"], settings.quality.max_collision_rate)
    seen = drift(catalogue(ads, rows, ds + dt.timedelta(days=1)), codebook, settings)
    for reason in seen.reasons:
        print(f"the codebook has drifted, index_rebuild will refresh it: {reason}")
    facts.record(
        settings,
        ds,
        "semantic_ids",
        codebook=codebook.version,
        new_objects=len(objects) - before,
        error=round(seen.error, 4),
        drift=seen.reasons,
        **usage,
    )
    with session(settings) as spark:
        publish(spark, settings, lake, "ad_semantic_ids", ds, rows)
    if not args.keep:  # a day that is run again takes its refresh back
        releases = Releases(settings.releases)
        with releases.lock():
            releases.keep_codebook(ds, codebook.version)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument(
        "--keep", action="store_true", help="keep also the IDs that an earlier run of the day gave"
    )
    main(run, arguments, "semantic_ids")
