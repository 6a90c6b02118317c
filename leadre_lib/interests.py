"""What is known of a user at a moment: long-term and short-term interest (paper, section 3.1).

A *request* is a user at a moment: (`request_id`, `user_id`, `cutoff`). Every behaviour that goes
into an answer is older than the cutoff, so no example can see its own future.

Knows nothing of prompts or Semantic IDs.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from leadre_lib.settings import InterestSettings

# Being shown an ad, or sending it away, is no interest in it.
INTEREST_EVENTS = ("click", "conversion", "play", "read", "like", "share", "search")
SHORT_TERM_FIELDS = ["event_time", "domain", "event_type", "item_id", "title", "category"]


def age_in_days(cutoff: Column, event_time: Column) -> Column:
    """Whole UTC days from the day of an event to the day of the cutoff."""
    return F.datediff(F.to_date(cutoff), F.to_date(event_time))


def before_cutoff(
    requests: DataFrame, behaviours: DataFrame, settings: InterestSettings
) -> DataFrame:
    """The behaviours that each request may know of: older than its cutoff, inside the window.

    Columns of `behaviours`, with `request_id` and `cutoff`; at most `max_behaviours` a request,
    the latest, in `recency` order (1 is the latest).
    """
    window = F.expr(f"INTERVAL {int(settings.window_days)} DAYS")
    known = (
        requests.select("request_id", "user_id", "cutoff")
        .join(behaviours.where(F.col("event_type").isin(*INTEREST_EVENTS)), "user_id")
        .where(F.col("event_time") < F.col("cutoff"))
        .where(F.col("event_time") >= F.col("cutoff") - window)
    )
    latest = Window.partitionBy("request_id").orderBy(F.desc("event_time"), F.desc("event_id"))
    return known.withColumn("recency", F.row_number().over(latest)).where(
        F.col("recency") <= settings.max_behaviours
    )


def interests(
    requests: DataFrame, behaviours: DataFrame, settings: InterestSettings, content: bool = True
) -> DataFrame:
    """Long-term and short-term interest of each request; without `content`, in ads alone.

    Returns:
        The columns of `requests` and
        `long_term`: array of (category, times, score), strongest first; the score counts each
        behaviour as a half after every `half_life_days`, rounded so that both engines agree;
        `short_term`: array of the latest behaviours, one an item, oldest first. Empty arrays
        where nothing is known.
        `known_items`: items that are known of, at most `short_term_behaviours`. Content counts with
        or without `content`, so that the same requests have enough of them.
    """
    every = before_cutoff(requests, behaviours, settings)
    known = every if content else every.where(F.col("domain") != "content")
    decay = F.pow(
        F.lit(0.5), age_in_days(F.col("cutoff"), F.col("event_time")) / settings.half_life_days
    )
    categories = (
        known.where("category <> ''")
        .groupBy("request_id", "category")
        .agg(F.count("*").cast("int").alias("times"), F.round(F.sum(decay), 4).alias("score"))
    )
    strongest = Window.partitionBy("request_id").orderBy(F.desc("score"), "category")
    long_term = _collect(
        categories.withColumn("place", F.row_number().over(strongest)).where(
            F.col("place") <= settings.long_term_categories
        ),
        "long_term",
        ["category", "times", "score"],
    )
    per_item = Window.partitionBy("request_id", "domain", "item_id").orderBy("recency")
    latest = Window.partitionBy("request_id").orderBy("recency")
    short_term = _collect(
        known.withColumn("again", F.row_number().over(per_item))
        .where("again = 1")
        .withColumn("nth", F.row_number().over(latest))
        .where(F.col("nth") <= settings.short_term_behaviours)
        .withColumn("place", -F.col("nth")),
        "short_term",
        SHORT_TERM_FIELDS,
    )
    joined = requests.join(long_term, "request_id", "left").join(short_term, "request_id", "left")
    for name, type_ in (
        ("long_term", long_term.schema["long_term"].dataType.simpleString()),
        ("short_term", short_term.schema["short_term"].dataType.simpleString()),
    ):
        joined = joined.withColumn(name, F.coalesce(name, F.array().cast(type_)))
    if content:
        return joined.withColumn("known_items", F.size("short_term"))
    items = every.groupBy("request_id").agg(F.countDistinct("domain", "item_id").alias("items"))
    known_items = F.least(F.coalesce("items", F.lit(0)), F.lit(settings.short_term_behaviours))
    counted = joined.join(items, "request_id", "left")
    return counted.withColumn("known_items", known_items.cast("int")).drop("items")


def _collect(rows: DataFrame, name: str, fields: list[str]) -> DataFrame:
    """One array of structs a request, in `place` order."""
    placed = F.sort_array(F.collect_list(F.struct("place", *fields)))
    return (
        rows.groupBy("request_id")
        .agg(placed.alias("placed"))
        .select(
            "request_id",
            F.transform("placed", lambda x: F.struct(*[x[f].alias(f) for f in fields])).alias(name),
        )
    )
