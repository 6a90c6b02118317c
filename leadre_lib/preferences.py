"""Preference pairs: two answers to one prompt, of which one is preferred (paper, section 3.3).

Pairs come from three places, and say from which in `origin`:

    value       two ads that one user was near to on one day; the higher eCPM is preferred
    dismissal   an ad that the user converted on, against one that the user dismissed
    beam        two objects that the model itself finds likely; the higher eCPM is preferred

Pairs of the first two are made here, by Spark, from behaviours; those of the third in `beam_pairs`.
Both sides are always something near to the user, so that the model learns to prefer one relevant
answer to another; against ads drawn at random it would learn what it knows. `preference_lists`
turns pairs of any origin into what training reads.

Knows nothing of models, and nothing of how the tables are published.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from leadre_lib.alignment import ad_targets, cutoff_of, draw
from leadre_lib.curation import AD
from leadre_lib.interests import interests
from leadre_lib.prompts import prompts
from leadre_lib.settings import DpoSettings, ExampleSettings, InterestSettings, PromptSettings

PAIR_SIDE = ("ad_id", "time", "ecpm", "semantic_id", "codebook")
SIDES = ("chosen", "rejected")
MAX_SIDES = 16  # ads of a user, or of a user's day, among which pairs are looked for
MAX_GAP = float(np.log(20.0))  # one absurd eCPM must not outweigh all other pairs

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


# --- pairs from behaviours ----------------------------------------------------------------------


def preference_pairs(
    behaviours: DataFrame,
    users: DataFrame,
    semantic_ids: DataFrame,
    settings: ExampleSettings,
    window: InterestSettings,
    seed: int,
    prompt: PromptSettings,
) -> DataFrame:
    """The pairs of both origins that behaviours give, each with its prompt.

    Of each origin a user has at most `pairs_per_user`, and all users `max_preference_pairs`. The
    prompt knows what came before `target_time` (see `alignment.cutoff_of`). Both sides have an
    eCPM, and are two marketing objects: two ads of one have one Semantic ID.

    Args:
        behaviours: of the days before the day, within the window of `interests`.
        users, semantic_ids: the latest snapshots (`semantic_ids` with its `codebook`).

    Returns:
        The columns of the contract `preference_pairs`.
    """
    value = value_pairs(behaviours, semantic_ids, settings, seed + 6)
    drawn = [
        _draw_pairs(pairs, settings, seed + 2)
        for pairs in (value, dismissal_pairs(behaviours, semantic_ids))
    ]
    requests = drawn[0].unionAll(drawn[1])
    requests = requests.withColumn("cutoff", cutoff_of(F.col("target_time"), settings))
    known = interests(requests, behaviours, window, prompt.content)
    known = known.where(F.col("known_items") >= settings.min_behaviours)
    return prompts(known, users, semantic_ids, prompt).select(
        F.col("request_id").alias("pair_id"),
        "origin",
        "user_id",
        "prompt",
        F.col("chosen_semantic_id").alias("chosen"),
        F.col("rejected_semantic_id").alias("rejected"),
        "chosen_ecpm",
        "rejected_ecpm",
        "target_time",
        F.col("chosen_codebook").alias("codebook"),
        "template",
    )


def value_pairs(
    behaviours: DataFrame, semantic_ids: DataFrame, settings: ExampleSettings, seed: int
) -> DataFrame:
    """Two ads that one user clicked or converted on within one day, the higher eCPM chosen.

    With `pairs_from: impressions` also two of which one was merely shown; these are drawn when
    there is nothing better (`preferred`). An ad that the user dismissed is no side of a pair.
    """
    near = ad_targets(behaviours)
    if settings.pairs_from == "impressions":
        shown = "domain = 'ad' AND event_type IN ('impression', 'click', 'conversion')"
        near = behaviours.where(shown)
    valued = (
        near.where(F.col("ecpm").isNotNull())
        .join(_dismissed(behaviours).select("user_id", "item_id"), ["user_id", "item_id"], "anti")
        .groupBy("user_id", F.to_date("event_time").alias("day"), F.col("item_id").alias("ad_id"))
        .agg(
            F.min("event_time").alias("time"),
            F.max("ecpm").alias("ecpm"),
            F.max((F.col("event_type") != "impression").cast("int")).alias("wanted"),
        )
        .withColumn("draw", draw(seed, "user_id", "ad_id"))
    )
    some = Window.partitionBy("user_id", "day").orderBy(F.desc("wanted"), "draw", "ad_id")
    valued = valued.withColumn("nth", F.row_number().over(some)).where(F.col("nth") <= MAX_SIDES)
    valued = valued.join(semantic_ids.select("ad_id", "semantic_id", "codebook"), "ad_id")
    chosen, rejected = (_side(valued, side, "day", "wanted") for side in SIDES)
    rejected = rejected.withColumnRenamed("wanted", "rejected_wanted")
    pairs = chosen.join(rejected, ["user_id", "day"]).where(
        F.col("chosen_ecpm") > F.col("rejected_ecpm") * F.lit(settings.min_ecpm_ratio)
    )
    return _pairs(
        pairs,
        "value",
        F.least("chosen_time", "rejected_time"),
        F.col("wanted") + F.col("rejected_wanted"),
    )


def dismissal_pairs(behaviours: DataFrame, semantic_ids: DataFrame) -> DataFrame:
    """An ad that the user converted on, chosen, against one that the same user dismissed.

    The prompt is that of the conversion; the dismissal is of any day of `behaviours`, for it says
    what the user does not like, and no prompt tells of it. Objects that the user also clicked or
    converted on are not rejected. eCPM plays no part in it.
    """
    ids = semantic_ids.select("ad_id", "semantic_id", "codebook")
    chosen = _latest(behaviours.where("event_type = 'conversion'"), ids)
    liked = ad_targets(behaviours).select(F.col("item_id").alias("ad_id"), "user_id")
    liked = liked.join(ids, "ad_id").select("user_id", "semantic_id")
    rejected = _latest(_dismissed(behaviours), ids).join(liked, ["user_id", "semantic_id"], "anti")
    pairs = _side(chosen, "chosen").join(_side(rejected, "rejected"), "user_id")
    return _pairs(pairs, "dismissal", F.col("chosen_time"), F.lit(0))


def _dismissed(behaviours: DataFrame) -> DataFrame:
    return behaviours.where((F.col("domain") == AD) & (F.col("event_type") == "dismiss"))


def _latest(events: DataFrame, ids: DataFrame) -> DataFrame:
    """The latest ads of each user among events on ads, with their last time and highest eCPM."""
    latest = Window.partitionBy("user_id").orderBy(F.desc("time"), "ad_id")
    return (
        events.where((F.col("domain") == AD) & F.col("ecpm").isNotNull())
        .groupBy("user_id", F.col("item_id").alias("ad_id"))
        .agg(F.max("event_time").alias("time"), F.max("ecpm").alias("ecpm"))
        .withColumn("nth", F.row_number().over(latest))
        .where(F.col("nth") <= MAX_SIDES)
        .join(ids, "ad_id")
    )


def _side(rows: DataFrame, side: str, *more: str) -> DataFrame:
    return rows.select("user_id", *more, *[F.col(n).alias(f"{side}_{n}") for n in PAIR_SIDE])


def _pairs(pairs: DataFrame, origin: str, target_time: Column, preferred: Column) -> DataFrame:
    """Pairs of two objects in the columns that both origins share."""
    names = [f"{side}_{name}" for side in SIDES for name in PAIR_SIDE]
    target_time = target_time.alias("target_time")
    day = F.to_date(target_time).cast("string")
    return pairs.where(F.col("chosen_semantic_id") != F.col("rejected_semantic_id")).select(
        F.concat_ws(":", F.lit(origin), "user_id", day, "chosen_ad_id", "rejected_ad_id").alias(
            "request_id"
        ),
        F.lit(origin).alias("origin"),
        "user_id",
        target_time,
        preferred.alias("preferred"),
        *names,
    )


def _draw_pairs(pairs: DataFrame, settings: ExampleSettings, seed: int) -> DataFrame:
    """As many as a user, and as all users, may have; the most preferred, else by a draw."""
    order = [F.desc("preferred"), F.col("draw"), F.col("request_id")]
    return (
        pairs.withColumn("draw", draw(seed, "request_id"))
        .withColumn("place", F.row_number().over(Window.partitionBy("user_id").orderBy(*order)))
        .where(F.col("place") <= settings.pairs_per_user)
        .orderBy(*order)
        .limit(settings.max_preference_pairs)
    )


# --- what training reads ------------------------------------------------------------------------


def preference_lists(pairs: pa.Table, settings: DpoSettings) -> pa.Table:
    """Pairs as the lists that `training.prepare_dpo` takes: one chosen, and one or more rejected.

    With `loss: listwise` pairs of equal prompt and chosen make one list of at most `max_rejected`,
    a longer one several; else every pair is a list of its own. A pair that stands there twice, such
    as two ads of one object, counts once. With `weight_by_gap` a list weighs the mean of its pairs'
    log(eCPM of the chosen / eCPM of the rejected), scaled to mean 1 over all lists; a pair in which
    eCPM plays no part (`dismissal`) weighs as much as the mean of the others.

    Args:
        pairs: columns `origin`, `prompt`, `chosen`, `rejected` and both eCPMs; their order counts.

    Returns:
        `prompt`, `chosen`, `rejected` (list of string) and `weight` (float64), one row a list.
    """
    answers = ("prompt", "chosen", "rejected")
    pairs = pairs.take(pa.array(np.sort(np.unique(_codes(pairs, answers), return_index=True)[1])))
    list_of = _list_numbers(
        _codes(pairs, ("prompt", "chosen")),
        settings.max_rejected if settings.loss == "listwise" else 1,
    )
    order = np.argsort(list_of, kind="stable")
    count = np.bincount(list_of)
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    weight = np.ones(len(count))
    if settings.weight_by_gap and len(count):
        weight = np.bincount(list_of, _gaps(pairs)) / count
        weight /= weight.mean()
    pairs = pairs.take(pa.array(order))
    firsts = pairs.select(["prompt", "chosen"]).take(pa.array(offsets[:-1]))
    rejected = pa.ListArray.from_arrays(
        pa.array(offsets), pairs["rejected"].combine_chunks().cast(pa.string())
    )
    return firsts.append_column("rejected", rejected).append_column("weight", pa.array(weight))


def _codes(table: pa.Table, names: tuple[str, ...]) -> Rows:
    """A number for each row, int64 [rows]: equal where the columns are, in order of appearance."""
    code = np.zeros(table.num_rows, np.int64)
    for name in names:
        own = table[name].combine_chunks().dictionary_encode()
        _, first, code = np.unique(
            code * len(own.dictionary) + own.indices.to_numpy(),
            return_index=True,
            return_inverse=True,
        )
        code = np.argsort(np.argsort(first))[code]
    return code


def _list_numbers(codes: Rows, longest: int) -> Rows:
    """Which list each row is in, int64 [rows]: of equal codes, and of at most `longest` rows."""
    order = np.argsort(codes, kind="stable")
    own = codes[order]
    part = (np.arange(len(own)) - np.searchsorted(own, own)) // longest
    starts = (np.diff(own, prepend=-1) != 0) | (np.diff(part, prepend=-1) != 0)
    numbers = np.empty(len(own), np.int64)
    numbers[order] = np.cumsum(starts) - 1
    return numbers


def _gaps(pairs: pa.Table) -> Floats:
    """The weight of each pair, float64 [pairs]; those that eCPM decided have mean 1."""
    chosen, rejected = (
        pairs[f"{side}_ecpm"].to_numpy(zero_copy_only=False).astype(np.float64) for side in SIDES
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = np.minimum(np.log(chosen / rejected), MAX_GAP)
    decided = pc.not_equal(pairs["origin"], "dismissal").to_numpy(zero_copy_only=False)
    if decided.any():
        gaps /= gaps[decided].mean()
    return np.where(decided, gaps, 1.0)
