"""The interests of every active user at the end of a day, and the prompt made of them.

A user is active with at least one behaviour (being shown an ad is none) within
`inference.active_days`. Writes `user_interests` and `user_prompts`.
"""

from __future__ import annotations

import argparse
import datetime as dt

from pyspark.sql import functions as F

from jobs.command import main, parser
from leadre_lib.alignment import ad_history
from leadre_lib.curation import start_of
from leadre_lib.interests import INTEREST_EVENTS, interests
from leadre_lib.lake import Lake
from leadre_lib.prompts import prompts
from leadre_lib.quality import publish
from leadre_lib.settings import Settings
from leadre_lib.spark import read, session


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Ask for every active user at midnight after the day."""
    ds, lake = args.ds, Lake(settings.lake)
    first = ds - dt.timedelta(days=settings.interests.window_days)
    days = [day for day in lake.days("behaviours") if first <= day <= ds]
    with session(settings, lake) as spark:
        behaviours = read(spark, lake, "behaviours", days)
        users = read(spark, lake, "users", [ds])
        cutoff = start_of(ds + dt.timedelta(days=1))
        since = start_of(ds - dt.timedelta(days=settings.inference.active_days))
        active = (
            behaviours.where(F.col("event_type").isin(*INTEREST_EVENTS))
            .where((F.col("event_time") >= since) & (F.col("event_time") < cutoff))
            .select("user_id")
            .distinct()
            .join(users.select("user_id"), "user_id", "left_semi")
        )
        requests = active.select(
            F.col("user_id").alias("request_id"), "user_id", cutoff.alias("cutoff")
        )
        known = interests(requests, behaviours, settings.interests, settings.prompt.content)
        columns = ["user_id", "long_term", "short_term"]
        publish(spark, settings, lake, "user_interests", ds, known.select(*columns))
        # The prompts are made of what was published, so that both tables tell the same story.
        stored = read(spark, lake, "user_interests", [ds]).withColumn("cutoff", cutoff)
        stored = stored.withColumn("request_id", F.col("user_id"))
        semantic_ids = read(spark, lake, "ad_semantic_ids", [ds])
        codebook = semantic_ids.select("codebook").distinct()
        none = F.array().cast("array<string>")
        told = (
            prompts(stored, users, semantic_ids, settings.prompt)
            .join(ad_history(requests, behaviours), "request_id", "left")
            .crossJoin(codebook)
            .withColumn("history_ad_ids", F.coalesce("history_ad_ids", none))
            .select("user_id", "prompt", "prompt_hash", "history_ad_ids", "codebook", "template")
            .orderBy("user_id")  # so that inference finds a user's earlier candidates in few pages
        )
        publish(spark, settings, lake, "user_prompts", ds, told)


if __name__ == "__main__":
    main(run, parser(__doc__), "interests")
