"""Training and evaluation examples of a day.

`sft_examples` (with the day's synthetic histories) and `preference_pairs` come from behaviours in
the partitions before the day,
`eval_examples` from the conversions of the day itself. On the first day there is nothing before it,
and the training tables stay empty.
"""

from __future__ import annotations

import argparse
import datetime as dt

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.alignment import (
    eval_examples,
    sft_examples,
    synthetic_examples,
)
from leadre_lib.contracts import load_contract
from leadre_lib.lake import Lake
from leadre_lib.preferences import preference_pairs
from leadre_lib.quality import publish
from leadre_lib.settings import Settings
from leadre_lib.spark import read, session


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Publish the three tables and count their rows for the report."""
    ds, lake = args.ds, Lake(settings.lake)
    first = ds - dt.timedelta(days=settings.interests.window_days)
    before = [day for day in lake.days("behaviours") if first <= day < ds]
    with session(settings, lake) as spark:
        arrived = read(spark, lake, "behaviours", [ds])
        users = read(spark, lake, "users", [ds])
        ads = read(spark, lake, "ads", [ds])
        ids = read(spark, lake, "ad_semantic_ids", [ds]).select("ad_id", "semantic_id", "codebook")
        options = settings.examples, settings.interests, settings.seed, settings.prompt
        rows = {}
        if before:
            past = read(spark, lake, "behaviours", before)
            # A profile is looked up in the newest snapshot, which is what the model will be asked
            # with; it holds no behaviour and so no future.
            histories = read(spark, lake, "synthetic_histories", [ds])
            examples = sft_examples(past, users, ads, ids, *options).unionAll(
                synthetic_examples(
                    histories,
                    users,
                    ads,
                    ids,
                    ds,
                    settings.interests,
                    settings.prompt,
                    settings.examples.task_weights.synthetic_next_ad,
                ).where("weight > 0")
            )
            pairs = preference_pairs(past, users, ids, *options)
            known = past.unionAll(arrived)
            cases = eval_examples(known, arrived, users, ids, ds, *options)
            made = {"sft_examples": examples, "preference_pairs": pairs, "eval_examples": cases}
        else:
            made = {
                table: load_contract(table).arrow_schema().empty_table()
                for table in ("sft_examples", "preference_pairs", "eval_examples")
            }
        for table, frame in made.items():
            rows[table] = publish(spark, settings, lake, table, ds, frame).rows
    facts.record(settings, ds, "examples", rows=rows)
    print(", ".join(f"{table}: {count} rows" for table, count in rows.items()))


if __name__ == "__main__":
    main(run, parser(__doc__), "examples")
