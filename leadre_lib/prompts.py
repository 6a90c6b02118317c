"""The intent-aware prompt (paper, section 3.1 and figure 2): five parts in one text.

Role, profile, short-term interest, long-term interest, question. The paper has long-term interest
before short-term; here it comes after, because it counts the very behaviours that the short-term
sentence lists, and training has these as targets too: no target may follow what counts it.
Native Spark columns only; a float never becomes text, because engines write floats differently.

Knows nothing of tokens, tasks or models.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from leadre_lib.interests import age_in_days

ROLE = "You are an ad recommendation system."
QUESTION = "What ad will the user be interested in next?\nAnswer: "


def plain(text: Column) -> Column:
    """Text from outside, made unable to pass for a Semantic ID or a special token."""
    return F.translate(text, "<>", "()")


def profile_sentence() -> Column:
    """The profile as one sentence; what is not known leaves no hole, nothing known no sentence."""

    def part(column: str, before: str, after: str = "") -> Column:
        return F.concat(F.lit(before), plain(F.col(column).cast("string")), F.lit(after))

    parts = F.concat_ws(
        ", ",
        part("age", "", " years old"),
        part("gender", ""),
        part("residence", "lives in "),
        part("education", "education "),
        part("occupation", "works as "),
    )
    return F.when(parts != "", F.concat(F.lit("The user: "), parts, F.lit(".")))


def long_term_sentence() -> Column:
    """`category*times` of the strongest categories; null where there is none."""
    items = F.transform(
        "long_term",
        lambda x: F.concat(plain(x["category"]), F.lit("*"), x["times"].cast("string")),
    )
    text = F.concat(F.lit("Long-term interests: "), F.array_join(items, ", "), F.lit("."))
    return F.when(F.size("long_term") > 0, text)


def short_term_sentences(requests: DataFrame, semantic_ids: DataFrame) -> DataFrame:
    """`request_id` with `with_ids` and `with_titles`: `days ago*behaviour*what`, oldest first.

    `what` is the Semantic ID of an ad (its title in `with_titles`) and the title of content. In
    `with_dates`, which is like `with_ids`, the date stands in place of `days ago`.
    Requests without behaviours are left out.
    """
    ids = semantic_ids.select(
        F.col("ad_id").alias("item_id"), F.lit("ad").alias("domain"), "semantic_id"
    )
    steps = (
        requests.select("request_id", "cutoff", F.posexplode("short_term").alias("place", "step"))
        .select("request_id", "cutoff", "place", "step.*")
        .join(ids, ["item_id", "domain"], "left")
    )
    days = age_in_days(F.col("cutoff"), F.col("event_time")).cast("string")
    date = F.to_date("event_time").cast("string")
    kind = F.concat(F.lit("*"), F.col("event_type"), F.lit("*"))
    title = plain(F.col("title"))
    what = F.coalesce(F.col("semantic_id"), title)
    steps = steps.select(
        "request_id",
        F.struct(
            "place",
            F.concat(days, kind, what).alias("with_ids"),
            F.concat(days, kind, title).alias("with_titles"),
            F.concat(date, kind, what).alias("with_dates"),
        ).alias("step"),
    )
    collected = steps.groupBy("request_id").agg(F.sort_array(F.collect_list("step")).alias("steps"))

    def sentence(field: str) -> Column:
        texts = F.transform("steps", lambda x: x[field])
        return F.concat(F.lit("Recent behaviours: "), F.array_join(texts, "; "), F.lit("."))

    return collected.select(
        "request_id",
        sentence("with_ids").alias("with_ids"),
        sentence("with_titles").alias("with_titles"),
        sentence("with_dates").alias("with_dates"),
    )


def prompts(requests: DataFrame, users: DataFrame, semantic_ids: DataFrame) -> DataFrame:
    """The prompt of each request.

    Args:
        requests: as `interests` gives them.
        users: the curated snapshot; a user who is not in it has no profile sentence.
        semantic_ids: `ad_id` and `semantic_id` of every ad known.

    Returns:
        The columns of `requests` with `prompt`, in which ads stand as Semantic IDs, `title_prompt`,
        in which they stand by their titles, and `prompt_hash`, the SHA-256 of a prompt with dates
        in place of days ago: equal as long as there is nothing new to say.
    """
    profiles = users.select("user_id", profile_sentence().alias("profile"))
    joined = requests.join(profiles, "user_id", "left").join(
        short_term_sentences(requests, semantic_ids), "request_id", "left"
    )

    def text(short_term: str) -> Column:
        parts = [F.lit(ROLE), F.col("profile"), F.col(short_term), long_term_sentence()]
        return F.concat_ws("\n", *parts, F.lit(QUESTION))

    return (
        joined.withColumn("prompt", text("with_ids"))
        .withColumn("title_prompt", text("with_titles"))
        .withColumn("prompt_hash", F.sha2(text("with_dates"), 256))
        .drop("profile", "with_ids", "with_titles", "with_dates")
    )
