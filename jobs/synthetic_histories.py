"""Make up histories that walk from ad to similar ad, by the text of the marketing objects active
on the day, each of them with its best active ad.

They become examples of the task `synthetic_next_ad`. There are none with
`examples.synthetic_per_ad = 0`, and on the first day, which trains nothing.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow.compute as pc

from jobs.command import main, parser
from leadre_lib.catalogue import catalogue
from leadre_lib.contracts import load_contract
from leadre_lib.embeddings import embed
from leadre_lib.lake import Lake
from leadre_lib.quality import publish
from leadre_lib.settings import Settings
from leadre_lib.spark import session
from leadre_lib.synthetic import synthetic_histories


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Embed (the vectors are in the cache), walk, publish."""
    ds, lake = args.ds, Lake(settings.lake)
    made = load_contract("synthetic_histories").arrow_schema().empty_table()
    if settings.examples.synthetic_per_ad and any(day < ds for day in lake.days("behaviours")):
        ads = catalogue(lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds)
        active = np.flatnonzero(ads.active_objects)
        best = ads.best_ads(active)
        vectors = embed(ads.texts(), settings.embedding, settings.cache)[active]
        seed = settings.seed + ds.toordinal()
        made = synthetic_histories(vectors, ads.ad_ids.take(best), settings.examples, seed)
    with session(settings) as spark:
        publish(spark, settings, lake, "synthetic_histories", ds, made)
    print(f"{pc.count_distinct(made['history_id']).as_py()} synthetic histories")


if __name__ == "__main__":
    main(run, parser(__doc__), "synthetic_histories")
