"""The intent-aware prompt (paper, section 3.1 and figure 2): five parts in one text.

Role, profile, short-term interest, long-term interest, question; their words are those of a
template. The paper has long-term interest before short-term; here it comes after, because it counts
the very behaviours that the short-term sentence lists, and training has these as targets too: no
target may follow what counts it. A scene, where one is asked about, stands right before the
question, so that all that is asked of a user at a moment begins alike.
Native Spark columns only; a float never becomes text, because engines write floats differently.

Knows nothing of tokens, tasks or models.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from leadre_lib.interests import age_in_days
from leadre_lib.settings import PromptSettings
from leadre_lib.templates import (
    INSIDE,
    OUTSIDE,
    PLACEHOLDER,
    LongTermTemplate,
    ProfileTemplate,
    ShortTermTemplate,
    load_template,
)


def plain(text: Column) -> Column:
    """Text from outside, made unable to pass for a Semantic ID, a special token, or a part of the
    prompt's structure (see `templates`).
    """
    return F.translate(text, OUTSIDE, INSIDE)


def fill(pattern: str, **columns: Column) -> Column:
    """The pattern with a column for each placeholder; null where one of them is."""
    pieces = enumerate(PLACEHOLDER.split(pattern))
    return F.concat(*[columns[piece] if at % 2 else F.lit(piece) for at, piece in pieces if piece])


def profile_sentence(words: ProfileTemplate) -> Column:
    """The profile as one sentence; what is not known leaves no hole, nothing known no sentence."""
    told = []
    for name, pattern in words.parts.items():
        value = F.trim(plain(F.col(name).cast("string")))
        told.append(F.when(value != "", fill(pattern, value=value)))
    parts = F.concat_ws(words.joiner, *told)
    return F.when(parts != "", fill(words.sentence, parts=parts))


def long_term_sentence(words: LongTermTemplate) -> Column:
    """How often each of the strongest categories occurred; null where there is none."""
    items = F.transform(
        "long_term",
        lambda x: fill(
            words.category, category=plain(x["category"]), times=x["times"].cast("string")
        ),
    )
    text = fill(words.sentence, categories=F.array_join(items, words.joiner))
    return F.when(F.size("long_term") > 0, text)


def event_name(words: ShortTermTemplate) -> Column:
    """What the template calls an `event_type`."""
    name = F.col("event_type")
    other = [F.when(name == e, F.lit(word)) for e, word in words.events.items() if e != word]
    return F.coalesce(*other, name)


def short_term_sentences(
    requests: DataFrame, semantic_ids: DataFrame, words: ShortTermTemplate
) -> DataFrame:
    """`request_id` with `with_ids` and `with_titles`: when, behaviour and what, oldest first.

    `what` is the Semantic ID of an ad (its title in `with_titles`) and the title of content, `when`
    counts days. In `with_dates`, which is like `with_ids`, the date stands in its place.
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
    title = plain(F.col("title"))
    what = F.coalesce(F.col("semantic_id"), title)

    def behaviour(when: Column, what: Column) -> Column:
        return fill(words.behaviour, when=when, event=event_name(words), what=what)

    steps = steps.select(
        "request_id",
        F.struct(
            "place",
            behaviour(days, what).alias("with_ids"),
            behaviour(days, title).alias("with_titles"),
            behaviour(date, what).alias("with_dates"),
        ).alias("step"),
    )
    collected = steps.groupBy("request_id").agg(F.sort_array(F.collect_list("step")).alias("steps"))

    def sentence(field: str) -> Column:
        texts = F.transform("steps", lambda x: x[field])
        return fill(words.sentence, behaviours=F.array_join(texts, words.joiner))

    return collected.select(
        "request_id",
        sentence("with_ids").alias("with_ids"),
        sentence("with_titles").alias("with_titles"),
        sentence("with_dates").alias("with_dates"),
    )


def prompts(
    requests: DataFrame, users: DataFrame, semantic_ids: DataFrame, settings: PromptSettings
) -> DataFrame:
    """The prompt of each request.

    Args:
        requests: as `interests` gives them; of those with a column `scene`, where it is not null
            the question is about this scene.
        users: the curated snapshot; a user who is not in it has no profile sentence.
        semantic_ids: `ad_id` and `semantic_id` of every ad known.
        settings: the language, and the parts that prompts have.

    Returns:
        The columns of `requests` with `prompt`, in which ads stand as Semantic IDs, `title_prompt`,
        in which they stand by their titles, `intent_prompt`, which asks for the category of the
        next ad, `prompt_hash`, the SHA-256 of a prompt with dates
        in place of days ago: equal as long as there is nothing new to say, and `template`, the
        version of the words.

    Raises:
        TemplateError: there is no template of the language, or it is malformed.
    """
    words = load_template(settings.language)
    known = requests
    before, after = [F.lit(words.role)], []
    if settings.profile:
        profiles = users.select("user_id", profile_sentence(words.profile).alias("profile"))
        known = known.join(profiles, "user_id", "left")
        before.append(F.col("profile"))
    if settings.short_term:
        sentences = short_term_sentences(requests, semantic_ids, words.short_term)
        known = known.join(sentences, "request_id", "left")
    if settings.long_term:
        after.append(long_term_sentence(words.long_term))
    if "scene" in requests.columns:
        after.append(fill(words.scene, scene=plain(F.col("scene"))))

    def text(short_term: str, question: str, answer: str) -> Column:
        told = [F.col(short_term)] if settings.short_term else []
        return F.concat_ws("\n", *before, *told, *after, F.lit(f"{question}\n{answer}"))

    asked = words.question, words.answer

    return (
        known.withColumn("prompt", text("with_ids", *asked))
        .withColumn("title_prompt", text("with_titles", *asked))
        .withColumn("intent_prompt", text("with_ids", words.intent_question, words.intent_answer))
        .withColumn("prompt_hash", F.sha2(text("with_dates", *asked), 256))
        .withColumn("template", F.lit(words.version))
        .drop("profile", "with_ids", "with_titles", "with_dates")
    )
