"""Make up histories of the marketing objects active on the day, each with its best active ad: from
one object on, or what a user took before the day, and what is near, habitual or popular comes next.

They become examples of the task `synthetic_next_ad`. There are none with
`examples.synthetic_per_ad = 0`, and on the first day, which trains nothing.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.command import main, parser
from jobs.evaluate import taken_before
from leadre_lib.catalogue import Catalogue, catalogue
from leadre_lib.contracts import load_contract
from leadre_lib.embeddings import embed
from leadre_lib.lake import Lake
from leadre_lib.quality import publish
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import Settings
from leadre_lib.spark import session
from leadre_lib.synthetic import Synthetic, synthetic_histories


def synthetic_rows(made: Synthetic, ads: Catalogue) -> pa.Table:
    """Rows of the contract `synthetic_histories`."""
    before, after = made.histories, made.nexts
    case = np.concatenate([before.cases, after.cases])
    steps = np.diff(before.offsets)[after.cases]
    step = np.concatenate([before.places, after.places + steps])
    number = pc.utf8_lpad(pa.array(case).cast(pa.string()), 9, "0")
    objects = np.concatenate([before.values, after.values])
    table = {
        "history_id": pc.binary_join_element_wise("synthetic", number, "-"),
        "step": pa.array(step + 1, pa.int32()),
        "ad_id": ads.ad_ids.take(pa.array(ads.best_ads(objects))),
        "draws": pa.array(np.concatenate([np.zeros(len(before.values), np.int64), made.draws])),
    }
    return pa.table(table).cast(load_contract("synthetic_histories").arrow_schema())


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Embed (the vectors are in the cache), draw, publish."""
    ds, lake = args.ds, Lake(settings.lake)
    rows = load_contract("synthetic_histories").arrow_schema().empty_table()
    if settings.examples.synthetic_per_ad and any(day < ds for day in lake.days("behaviours")):
        ads = catalogue(lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds)
        texts = ads.texts()
        past = taken_before(settings, lake, ads, ds)
        made = synthetic_histories(
            texts,
            EmbeddingIndex.build(embed(texts, settings.embedding, settings.cache)),
            ads.active_objects,
            past.taken(),
            past.last_conversions(ads.active_objects, settings.examples.eval_targets == "happened"),
            settings.examples,
            settings.fusion,
            settings.seed + ds.toordinal(),
            repeat=not settings.evaluation.exclude_seen,
        )
        rows = synthetic_rows(made, ads)
    with session(settings) as spark:
        publish(spark, settings, lake, "synthetic_histories", ds, rows)
    print(f"{pc.count_distinct(rows['history_id']).as_py()} synthetic histories")


if __name__ == "__main__":
    main(run, parser(__doc__), "synthetic_histories")
