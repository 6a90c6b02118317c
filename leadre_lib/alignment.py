"""Training and evaluation examples (paper, section 3.3): the alignment tasks, and the cases on
which methods are compared.

Targets come from behaviours before the day, cases from the day itself; each one's prompt knows only
what is older than its cutoff. Draws depend on ids and the seed alone.

Knows nothing of models, and nothing of how the tables are published.
"""

from __future__ import annotations

import datetime as dt
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from leadre_lib.curation import start_of
from leadre_lib.interests import interests
from leadre_lib.prompts import fill, plain, prompts
from leadre_lib.settings import ExampleSettings, InterestSettings, PromptSettings
from leadre_lib.templates import load_template

DRAW_RANGE = 1 << 24
MAX_VALUE = 10.0  # one absurd eCPM must not outweigh all other targets, nor one of 0 be lost
TARGET_EVENTS = ("click", "conversion")


def draw(seed: int, *columns: str) -> Column:
    """A number in [0, 1) that depends on the seed and the columns alone, equal on both engines."""
    digest = F.sha2(F.concat_ws("|", F.lit(str(seed)), *columns), 256)
    return F.conv(F.substring(digest, 1, 6), 16, 10).cast("bigint") / F.lit(float(DRAW_RANGE))


def ad_targets(behaviours: DataFrame) -> DataFrame:
    """Clicks and conversions on ads; a click that led to a conversion of the same ad is left out.

    Columns of `behaviours`. The conversion says the same and more.
    """
    targets = behaviours.where((F.col("domain") == "ad") & F.col("event_type").isin(*TARGET_EVENTS))
    converted = targets.where("event_type = 'conversion'").select("user_id", "item_id").distinct()
    clicks = targets.where("event_type = 'click'").join(
        converted, ["user_id", "item_id"], "left_anti"
    )
    columns = behaviours.columns
    return (
        targets.where("event_type = 'conversion'")
        .select(*columns)
        .unionAll(clicks.select(*columns))
    )


def cutoff_of(time: Column, settings: ExampleSettings) -> Column:
    """The moment before which everything in a target's prompt has happened.

    With `day`, midnight before the target: what a nightly batch knows when the day begins. The
    click that led to a conversion would else give it away. With `event`, the target's own time.
    """
    return F.date_trunc("day", time) if settings.cutoff == "day" else time


def next_ad_requests(
    behaviours: DataFrame, settings: ExampleSettings, seed: int, scene_fraction: float
) -> DataFrame:
    """Which targets become examples: of each user's, from the latest back, every `targets_apart`th,
    `targets_per_user` of them; then a draw down to the cap.

    A scene, where one is known, is told with the probability `scene_fraction`: nightly prompts are
    for no scene. For the weight, see `value_weight`.

    Returns:
        request_id, user_id, cutoff, target_time, ad_id, weight, scene (null: not told).
    """
    told = (F.col("scene") != "") & (draw(seed + 6, "event_id") < F.lit(scene_fraction))
    latest = Window.partitionBy("user_id").orderBy(F.desc("event_time"), F.desc("event_id"))
    drawn = (
        value_weight(ad_targets(behaviours), settings)
        .where(F.col("weight") > 0)
        .withColumn("place", F.row_number().over(latest))
        .where((F.col("place") - 1) % settings.targets_apart == 0)
        .where(F.col("place") <= settings.targets_per_user * settings.targets_apart)
        .withColumn("draw", draw(seed, "event_id"))
        .orderBy("draw", "event_id")
        .limit(settings.max_next_ad_examples)
    )
    return drawn.select(
        F.col("event_id").alias("request_id"),
        "user_id",
        cutoff_of(F.col("event_time"), settings).alias("cutoff"),
        F.col("event_time").alias("target_time"),
        F.col("item_id").alias("ad_id"),
        "weight",
        F.when(told, F.col("scene")).alias("scene"),
    )


def value_weight(targets: DataFrame, settings: ExampleSettings) -> DataFrame:
    """Targets with their `weight`: how deep the event is, and what it is worth.

    A conversion weighs 1, a click `click_weight`; that is multiplied by the eCPM over the mean of
    all targets to the power `value_power`, within a factor of `MAX_VALUE`; without eCPM by 1.
    Value-weighted fine-tuning is that of GPR (arXiv 2511.10138).
    """
    depth = F.when(F.col("event_type") == "conversion", F.lit(1.0)).otherwise(
        F.lit(settings.click_weight)
    )
    if not settings.value_power:
        return targets.withColumn("weight", depth)
    mean = targets.select(F.nullif(F.round(F.avg("ecpm"), 6), F.lit(0.0)).alias("mean_ecpm"))
    # A product, since Sail takes a quotient for one by zero when it moves a filter on the weight.
    power = settings.value_power
    value = F.pow("ecpm", F.lit(power)) * F.pow("mean_ecpm", F.lit(-power))
    # `least` passes over a null, so that what has no eCPM must be told apart first.
    bounded = F.greatest(F.least(value, F.lit(MAX_VALUE)), F.lit(1 / MAX_VALUE))
    factor = F.when(value.isNull(), F.lit(1.0)).otherwise(bounded)
    return (
        targets.crossJoin(mean).withColumn("weight", F.round(depth * factor, 6)).drop("mean_ecpm")
    )


def sft_examples(
    behaviours: DataFrame,
    users: DataFrame,
    ads: DataFrame,
    semantic_ids: DataFrame,
    settings: ExampleSettings,
    window: InterestSettings,
    seed: int,
    prompt: PromptSettings,
) -> DataFrame:
    """The <Prompt, Response> rows of the tasks on users and on ads; see `synthetic_examples`, too.

    Args:
        behaviours: of the days before the day; nothing else is learnt from.
        users, ads, semantic_ids: the latest snapshots (`semantic_ids` with its `codebook`).

    Returns:
        The columns of the contract `sft_examples`.
    """
    requests = next_ad_requests(behaviours, settings, seed, prompt.scene_fraction)
    known = interests(requests, behaviours, window, prompt.content)
    known = known.where(F.col("known_items") >= settings.min_behaviours)
    told = prompts(known, users, semantic_ids, prompt).join(semantic_ids, "ad_id")
    told = told.join(ads.select("ad_id", "category"), "ad_id", "left")
    moment = F.unix_micros("cutoff").cast("string")
    sid = F.col("semantic_id")

    def rows(chosen: DataFrame, task: str, prompt: str, response: Column) -> DataFrame:
        # Next ads and their categories are asked of one prompt, but for its last lines.
        words = "titles" if prompt == "title_prompt" else "ids"
        return chosen.select(
            F.concat(F.lit(f"{task}:"), F.col("request_id")).alias("example_id"),
            F.lit(task).alias("task"),
            F.concat_ws(":", F.lit(words), "user_id", moment).alias("request_id"),
            F.col(prompt).alias("prompt"),
            response.alias("response"),
            (F.col("weight") * F.lit(getattr(settings.task_weights, task))).alias("weight"),
            "user_id",
            "ad_id",
            "target_time",
            "codebook",
            "template",
        )

    by_titles = draw(seed + 1, "request_id") < F.lit(settings.titles_to_sid_fraction)
    category = plain(F.col("category"))
    made = [
        rows(told, "next_ad", "prompt", sid),
        rows(told.where(by_titles), "titles_to_sid", "title_prompt", sid),
        rows(told.where(category != ""), "next_category", "intent_prompt", category),
        text_tasks(ads, semantic_ids, settings, seed, prompt),
    ]
    return reduce(DataFrame.unionAll, made).where(F.col("weight") > 0)


def text_tasks(
    ads: DataFrame,
    semantic_ids: DataFrame,
    settings: ExampleSettings,
    seed: int,
    prompt: PromptSettings,
) -> DataFrame:
    """Name and type of an ad to the Semantic ID of its marketing object, and back to the name and
    type of the object's first ad (see `catalogue.marketing_objects`), of a part of the ads.
    """
    words = load_template(prompt.language)
    first = Window.partitionBy("marketing_object_id").orderBy("start_date", "ad_id")
    described = ads.withColumn("nth", F.row_number().over(first)).join(
        semantic_ids.select("ad_id", "semantic_id", "codebook"), "ad_id"
    )
    title, category = plain(F.col("title")), plain(F.col("category"))
    name = F.when(category == "", title).otherwise(
        fill(words.ad.named, title=title, category=category)
    )

    def rows(described: DataFrame, task: str, prompt: Column, response: Column) -> DataFrame:
        return described.select(
            F.concat(F.lit(f"{task}:"), F.col("ad_id")).alias("example_id"),
            F.lit(task).alias("task"),
            F.lit(None).cast("string").alias("request_id"),
            prompt.alias("prompt"),
            response.alias("response"),
            F.lit(getattr(settings.task_weights, task)).alias("weight"),
            F.lit(None).cast("string").alias("user_id"),
            "ad_id",
            F.lit(None).cast("timestamp").alias("target_time"),
            "codebook",
            F.lit(words.version).alias("template"),
        )

    sid = F.col("semantic_id")
    to_sid = fill(words.ad.text_to_sid, ad=name)
    to_text = fill(words.ad.sid_to_text, semantic_id=sid)
    drawn = described.where(draw(seed + 7, "ad_id") < F.lit(settings.text_fraction))
    return rows(drawn, "text_to_sid", to_sid, sid).unionAll(
        rows(drawn.where("nth = 1"), "sid_to_text", to_text, name)
    )


def synthetic_examples(
    histories: DataFrame,
    users: DataFrame,
    ads: DataFrame,
    semantic_ids: DataFrame,
    ds: dt.date,
    window: InterestSettings,
    prompt: PromptSettings,
    weight: float = 1.0,
) -> DataFrame:
    """Synthetic histories as <Prompt, Response> rows: of somebody unknown, who converted on an ad a
    day up to the day before `ds`. What comes next shares the prompt.

    Args:
        histories: rows of the table `synthetic_histories`.
        users, ads, semantic_ids: as `sft_examples` takes them.
        weight: of each history, parted among the draws of what comes next.

    Returns:
        The columns of the contract `sft_examples`.
    """
    steps = histories.where("draws = 0").withColumn(
        "before", F.max("step").over(Window.partitionBy("history_id")) - F.col("step") + 1
    )
    midnight = start_of(ds)
    behaviours = steps.join(ads.select("ad_id", "title", "category"), "ad_id").select(
        F.concat_ws("-", "history_id", F.col("step").cast("string")).alias("event_id"),
        F.col("history_id").alias("user_id"),
        F.lit("ad").alias("domain"),
        F.lit("conversion").alias("event_type"),
        F.col("ad_id").alias("item_id"),
        "title",
        "category",
        F.timestamp_seconds(F.unix_seconds(midnight) - F.col("before") * 86400).alias("event_time"),
    )
    requests = steps.where("step = 1").select(
        F.col("history_id").alias("request_id"),
        F.col("history_id").alias("user_id"),
        midnight.alias("cutoff"),
    )
    known = interests(requests, behaviours, window, prompt.content)
    told = prompts(known, users, semantic_ids, prompt).select("request_id", "prompt", "template")
    nexts = (
        histories.where("draws > 0")
        .withColumn("all_draws", F.sum("draws").over(Window.partitionBy("history_id")))
        .withColumnRenamed("history_id", "request_id")
    )
    return (
        nexts.join(told, "request_id")
        .join(semantic_ids, "ad_id")
        .select(
            F.concat_ws(
                ":", F.lit("synthetic_next_ad"), "request_id", F.col("step").cast("string")
            ).alias("example_id"),
            F.lit("synthetic_next_ad").alias("task"),
            "request_id",
            "prompt",
            F.col("semantic_id").alias("response"),
            (F.lit(weight) * F.col("draws") / F.col("all_draws")).alias("weight"),
            F.lit(None).cast("string").alias("user_id"),
            "ad_id",
            F.lit(None).cast("timestamp").alias("target_time"),
            "codebook",
            "template",
        )
    )


def eval_targets(arrived: DataFrame, ds: dt.date, settings: ExampleSettings) -> DataFrame:
    """The conversions of the day that are to be predicted, one a user and ad.

    `arrived` are the day's behaviours. A case's cutoff is the start of the day or, where the
    user's first target is older (it came late), that target's time.
    """
    targets = arrived.where("domain = 'ad' AND event_type = 'conversion'")
    if settings.eval_targets == "happened":
        targets = targets.where(F.col("event_time") >= start_of(ds))
    first = Window.partitionBy("user_id")
    return (
        targets.groupBy("user_id", F.col("item_id").alias("ad_id"))
        .agg(F.min("event_time").alias("time"), F.max("ecpm").alias("target_ecpm"))
        .withColumn("cutoff", F.least(start_of(ds), F.min("time").over(first)))
        .withColumn("case_id", F.concat_ws(":", "user_id", "ad_id"))
    )


def eval_examples(
    behaviours: DataFrame,
    arrived: DataFrame,
    users: DataFrame,
    semantic_ids: DataFrame,
    ds: dt.date,
    settings: ExampleSettings,
    window: InterestSettings,
    seed: int,
    prompt: PromptSettings,
) -> DataFrame:
    """The evaluation cases of the day.

    Args:
        behaviours: of the day and the days before it.
        arrived: of the day alone, where the targets are.

    Returns:
        The columns of the contract `eval_examples`.
    """
    if settings.split_by == "prefix":
        split = F.when(F.col("user_id").startswith("valid-"), "valid").otherwise("test")
    else:
        is_valid = draw(seed + 3, "user_id") < F.lit(settings.valid_fraction)
        split = F.when(is_valid, "valid").otherwise("test")
    order = Window.partitionBy("split").orderBy(draw(seed + 4, "case_id"), "case_id")
    cap = F.when(F.col("split") == "valid", settings.max_valid_cases).otherwise(
        settings.max_test_cases
    )
    cases = (
        eval_targets(arrived, ds, settings)
        .withColumn("split", split)
        .withColumn("place", F.row_number().over(order))
        .where(F.col("place") <= cap)
        .select("case_id", "split", "user_id", "ad_id", "target_ecpm", "cutoff")
    )
    # Cases of one user share one request: the prompt is built, and later decoded, once.
    requests = cases.select(F.col("user_id").alias("request_id"), "user_id", "cutoff").distinct()
    known = interests(requests, behaviours, window, prompt.content).where(
        F.col("known_items") >= settings.min_behaviours
    )
    histories = ad_history(requests, behaviours)
    told = prompts(known, users, semantic_ids, prompt).join(histories, "request_id", "left")
    codebook = semantic_ids.select(F.col("ad_id"), "codebook")
    return (
        cases.join(told.select("user_id", "prompt", "history_ad_ids", "template"), "user_id")
        .join(codebook, "ad_id")
        .select(
            "case_id",
            "split",
            "user_id",
            "prompt",
            F.coalesce("history_ad_ids", F.array().cast("array<string>")).alias("history_ad_ids"),
            F.col("ad_id").alias("target_ad_id"),
            "target_ecpm",
            "cutoff",
            "codebook",
            "template",
        )
    )


def ad_history(requests: DataFrame, behaviours: DataFrame) -> DataFrame:
    """`request_id` with `history_ad_ids`: the ads clicked or converted on before the cutoff,
    oldest first; an ad twice in a row, such as clicked and then converted on, stands once.
    """
    steps = (
        requests.select("request_id", "user_id", "cutoff")
        .join(
            behaviours.where((F.col("domain") == "ad") & F.col("event_type").isin(*TARGET_EVENTS)),
            "user_id",
        )
        .where(F.col("event_time") < F.col("cutoff"))
    )
    order = Window.partitionBy("request_id").orderBy("event_time", "event_id")
    before = F.lag("item_id").over(order)
    steps = steps.withColumn("again", F.coalesce(before == F.col("item_id"), F.lit(False)))
    placed = F.sort_array(F.collect_list(F.struct("event_time", "event_id", "item_id")))
    return (
        steps.where(~F.col("again"))
        .groupBy("request_id")
        .agg(placed.alias("placed"))
        .select("request_id", F.transform("placed", lambda x: x["item_id"]).alias("history_ad_ids"))
    )
