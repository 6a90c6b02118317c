"""Raw tables → curated tables: snapshots, one behaviour stream of both domains, quarantine.

Repeated events are dropped and counted, late events keep the day on which they arrived, events
that name unknown users or ads, or that lie in the future, are quarantined with the reason.

Knows nothing of prompts, of where the tables lie or of how they are published.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

ECPM_DAYS = 7  # over which an ad's worth is averaged, and its popularity counted
CONTENT = "content"
AD = "ad"
BEHAVIOUR_COLUMNS = [
    "event_id",
    "user_id",
    "domain",
    "event_type",
    "item_id",
    "title",
    "category",
    "event_time",
    "scene",
    "ecpm",
    "gmv",
]


@dataclass(frozen=True)
class Curated:
    """The events of one day, parted. `repeated` and `events` are counts of raw rows."""

    behaviours: DataFrame
    quarantine: DataFrame
    events: int
    repeated: int


def start_of(day: dt.date) -> Column:
    """Midnight UTC at which `day` begins."""
    return F.lit(dt.datetime.combine(day, dt.time(), dt.UTC)).cast("timestamp")


def curate_ads(raw_ads: DataFrame, behaviours: DataFrame | None) -> DataFrame:
    """Add `text_hash`, the SHA-256 of title and description (see `embeddings.ad_text`), and, among
    `behaviours`, `ecpm`, the mean over the ad's impressions, and `popularity`, its clicks and
    conversions; both are null where there are none.
    """
    ads = raw_ads.withColumn("text_hash", F.sha2(F.concat_ws("\n", "title", "description"), 256))
    if behaviours is None:
        ads = ads.withColumn("ecpm", F.lit(None).cast("double"))
        return ads.withColumn("popularity", F.lit(None).cast("bigint"))
    on_ads = behaviours.where(F.col("domain") == AD).withColumn("ad_id", F.col("item_id"))
    shown = on_ads.where(F.col("event_type") == "impression")
    worth = shown.groupBy("ad_id").agg(F.round(F.avg("ecpm"), 6).alias("ecpm"))
    wanted = on_ads.where(F.col("event_type").isin("click", "conversion"))
    popularity = wanted.groupBy("ad_id").agg(F.count("*").alias("popularity"))
    return ads.join(worth, "ad_id", "left").join(popularity, "ad_id", "left")


def one_stream(ad_events: DataFrame, content_events: DataFrame) -> DataFrame:
    """Both raw event tables as one, with `source_table`; titles of ads are not known yet."""
    ads = ad_events.select(
        F.lit("raw_ad_events").alias("source_table"),
        "event_id",
        "user_id",
        F.lit(AD).alias("domain"),
        "event_type",
        F.col("ad_id").alias("item_id"),
        F.lit(None).cast("string").alias("title"),
        F.lit(None).cast("string").alias("category"),
        "event_time",
        "scene",
        "ecpm",
        "gmv",
    )
    content = content_events.select(
        F.lit("raw_content_events").alias("source_table"),
        "event_id",
        "user_id",
        F.lit(CONTENT).alias("domain"),
        "event_type",
        F.col("content_id").alias("item_id"),
        "title",
        "category",
        "event_time",
        F.lit(None).cast("string").alias("scene"),
        F.lit(None).cast("double").alias("ecpm"),
        F.lit(None).cast("double").alias("gmv"),
    )
    return ads.unionAll(content)


def curate_events(
    ad_events: DataFrame,
    content_events: DataFrame,
    users: DataFrame,
    ads: DataFrame,
    earlier: DataFrame | None,
    ds: dt.date,
) -> Curated:
    """Part the day's raw events into behaviours and quarantine.

    `earlier` holds the `event_id`s of behaviours published on the days before, if there are any.
    """
    events = one_stream(ad_events, content_events)
    # Of rows with one id the first stays, in an order that does not depend on the engine.
    order = Window.partitionBy("event_id").orderBy(
        "event_time",
        "source_table",
        "user_id",
        "item_id",
        "event_type",
        "ecpm",
        "gmv",
        "scene",
        "title",
        "category",
    )
    once = events.withColumn("copy", F.row_number().over(order)).where("copy = 1").drop("copy")
    if earlier is not None:
        once = once.join(earlier.select("event_id"), "event_id", "left_anti")
    known_users = users.select("user_id", F.lit(True).alias("user_known"))
    known_ads = ads.select(
        F.col("ad_id").alias("item_id"),
        F.lit(AD).alias("domain"),
        F.col("title").alias("ad_title"),
        F.col("category").alias("ad_category"),
    )
    judged = (
        once.join(known_users, "user_id", "left")
        .join(known_ads, ["item_id", "domain"], "left")
        .withColumn(
            "reason",
            F.when(F.col("user_known").isNull(), "unknown_user")
            .when((F.col("domain") == AD) & F.col("ad_title").isNull(), "unknown_ad")
            .when(F.col("event_time") >= start_of(ds + dt.timedelta(days=1)), "future_event"),
        )
        .withColumn("title", F.coalesce("ad_title", "title"))
        .withColumn("category", F.coalesce("ad_category", "category"))
    )
    behaviours = judged.where(F.col("reason").isNull()).select(*BEHAVIOUR_COLUMNS)
    quarantine = judged.where(F.col("reason").isNotNull()).select(
        "source_table", "event_id", "reason", "user_id", "item_id"
    )
    total = events.count()
    return Curated(behaviours, quarantine, total, total - once.count())
