"""Show the prompt of one user at a moment, and the tokens that each of its parts takes.

Tokens are those of the champion of today; so is the limit over which the oldest behaviours are
dropped. The moment is in UTC unless it names a zone; without `--at` it is midnight after the latest
day, for which the nightly prompts are made.
"""

from __future__ import annotations

import argparse
import datetime as dt
from collections import Counter
from typing import TYPE_CHECKING

import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console
from rich.table import Column as TableColumn
from rich.table import Table

from jobs.command import main, parser
from leadre_lib import budget
from leadre_lib.errors import LeadreError
from leadre_lib.interests import INTEREST_EVENTS, interests
from leadre_lib.lake import Lake
from leadre_lib.prompts import prompts
from leadre_lib.release import Releases
from leadre_lib.settings import Settings
from leadre_lib.spark import read, session
from leadre_lib.templates import Prompt, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = "%Y-%m-%d %H:%M"
_NAMES = {"short_term": "short-term", "long_term": "long-term", "answer": "question"}


def moment(text: str) -> dt.datetime:
    """Parse an ISO 8601 date or moment; one without zone is in UTC."""
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no moment: write it as YYYY-MM-DD or YYYY-MM-DDTHH:MM"
        ) from None
    return at.replace(tzinfo=dt.UTC) if at.tzinfo is None else at.astimezone(dt.UTC)


def midnight(day: dt.date) -> dt.datetime:
    """The moment at which a day begins."""
    return dt.datetime.combine(day, dt.time(), dt.UTC)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Write the prompt as the jobs do, and print."""
    lake = Lake(settings.lake)
    days = lake.days("ad_semantic_ids")
    if not days:
        raise LeadreError(f"{settings.state}: nothing is published yet: run the daily chain first")
    at: dt.datetime = args.at or midnight(days[-1] + dt.timedelta(days=1))
    # What had arrived by then; the first day also holds the history of the days before it.
    days = [day for day in days if midnight(day) < at] or days[:1]
    _require_user(lake, days[-1], args.user_id)
    with session(settings, lake) as spark:
        text = write(spark, settings, lake, days, args.user_id, at, args.titles)
    prompt = parse(text)
    assert prompt is not None, f"not the form of a template: {text!r}"
    console = Console()
    console.print(f"[bold]Prompt[/] of {args.user_id} at {at:{FORM}} UTC\n", highlight=False)
    console.print(text, markup=False, highlight=False, soft_wrap=True)  # as it is, to be copied
    codes = lake.read("ad_semantic_ids", days[-1], ["codes"])["codes"]
    measure(console, prompt, text, settings.model.max_tokens - len(codes[0]), settings)


def write(
    spark: SparkSession,
    settings: Settings,
    lake: Lake,
    days: list[dt.date],
    user_id: str,
    at: dt.datetime,
    titles: bool,
) -> str:
    """The user's prompt at a moment, from what the given days tell.

    Raises:
        LeadreError: the user had done nothing by then.
    """
    first = at.date() - dt.timedelta(days=settings.interests.window_days)
    looked = [day for day in days if day >= first] or days[-1:]
    mine, cutoff = F.col("user_id") == user_id, F.lit(at).cast("timestamp")
    behaviours = read(spark, lake, "behaviours", looked).where(mine)
    _require_past(behaviours, user_id, at, cutoff)
    users = read(spark, lake, "users", days[-1:]).where(mine)
    request = users.select(F.col("user_id").alias("request_id"), "user_id", cutoff.alias("cutoff"))
    told = interests(request, behaviours, settings.interests, settings.prompt.content)
    semantic_ids = read(spark, lake, "ad_semantic_ids", days[-1:])
    (row,) = prompts(told, users, semantic_ids, settings.prompt).collect()
    return str(row["title_prompt" if titles else "prompt"])


def _require_user(lake: Lake, day: dt.date, user_id: str) -> None:
    known = lake.read("users", day, ["user_id"])["user_id"]
    if not pc.any(pc.equal(known, user_id)).as_py():
        some = ", ".join(sorted(known.to_pylist())[:3])
        raise LeadreError(
            f"user {user_id!r} is not among the users of {day}: try another, such as {some}"
        )


def _require_past(behaviours: DataFrame, user_id: str, at: dt.datetime, cutoff: Column) -> None:
    earliest = F.min("event_time")
    (row,) = (
        behaviours.where(F.col("event_type").isin(*INTEREST_EVENTS))
        .agg(
            (earliest < cutoff).alias("is_past"),
            F.date_format(earliest, "yyyy-MM-dd HH:mm").alias("first"),
        )
        .collect()
    )
    if not row["is_past"]:
        first = f"their first behaviour is of {row['first']}" if row["first"] else "none is known"
        raise LeadreError(
            f"user {user_id!r} had no behaviours at {at:{FORM}} UTC, {first}: ask for a later --at"
        )


def measure(console: Console, prompt: Prompt, text: str, limit: int, settings: Settings) -> None:
    """Print what each part takes, and what the budget drops."""
    release = Releases(settings.releases).champion()
    if release is None:
        console.print("\nThere is no champion yet whose tokens could be counted.")
        _print_sizes(console, "characters", Counter(_part_of(prompt)))
        console.print(f"The limit is {limit} tokens.")
        return
    from leadre_lib.model import load_tokenizer  # seconds of imports that an error does without

    tokenizer = load_tokenizer(release.model)
    console.print(f"\nTokens of release {release.id}", highlight=False)
    if release.template != prompt.template.version:
        console.print(
            f"Its model was trained with template {release.template}, this prompt is written with"
            f" {prompt.template.version}."
        )
    _print_sizes(console, "tokens", _tokens(text, prompt, tokenizer))
    fitted = budget.measure([text], tokenizer, limit)
    dropped = prompt.behaviours[: int(fitted.behaviours[0])]
    told = prompt.template.short_term.joiner.join(dropped) or "nothing"
    console.print(
        f"The limit is {limit} tokens; dropped over it: {told}", markup=False, soft_wrap=True
    )
    if fitted.tokens[0]:
        console.print(f"That is not enough: {fitted.tokens[0]} tokens are cut on the left.")


def _part_of(prompt: Prompt) -> list[str]:
    """The part of each character; a line break is of the part that it ends, the answer's cue of the
    question.
    """
    named = ((_NAMES.get(part, part), line) for part, line in prompt.parts)
    return [part for part, line in named for _ in f"{line}\n"][:-1]


def _tokens(text: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Counter[str]:
    """Tokens by part; each is of the part in which it begins, special ones in front of the role."""
    part_of = _part_of(prompt)
    spans = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)["offset_mapping"]
    return Counter(part_of[begin] for begin, _ in spans)


def _print_sizes(console: Console, unit: str, sizes: Counter[str]) -> None:
    table = Table("part", TableColumn(unit, justify="right"))
    for part, size in sizes.items():
        table.add_row(part, str(size))
    table.add_section()
    table.add_row("total", str(sizes.total()))
    console.print(table)


if __name__ == "__main__":
    arguments = parser(__doc__, ds=False)
    arguments.add_argument("user_id", metavar="USER", help="id of the user")
    arguments.add_argument(
        "--at", type=moment, metavar="YYYY-MM-DDTHH:MM", help="which behaviours are older than"
    )
    arguments.add_argument("--titles", action="store_true", help="ads by title, not by Semantic ID")
    main(run, arguments)
