"""Show one user: the prompt, and the candidates with titles, scores and release.

Without `--ds`, the candidates are those that the online store serves now.
"""

from __future__ import annotations

import argparse
import datetime as dt

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from jobs.command import main, parser, partition_date
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Lake
from leadre_lib.online_store import OnlineStore
from leadre_lib.settings import Settings


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Look the user up and print."""
    lake, store = Lake(settings.lake), OnlineStore(settings.online_store)
    ds: dt.date | None = args.ds or store.served()
    if ds is None:
        raise LeadreError(f"{settings.state}: nothing is published yet: run the daily chain first")
    prompts = lake.read("user_prompts", ds)
    prompts = prompts.filter(pc.equal(prompts["user_id"], args.user_id))
    if not prompts.num_rows:
        known = lake.read("user_prompts", ds, ["user_id"])["user_id"].slice(0, 3).to_pylist()
        raise LeadreError(
            f"user {args.user_id!r} was not active on {ds}: try another, such as {', '.join(known)}"
        )
    if args.ds is None:
        rows = store.candidates(args.user_id)
    else:
        candidates = lake.read("candidates", ds)
        mine = candidates.filter(pc.equal(candidates["user_id"], args.user_id))
        rows = mine.sort_by("rank").to_pylist()
    ads = lake.read("ads", ds, ["ad_id", "title", "category"])
    named = {row["ad_id"]: row for row in ads.to_pylist()}
    console = Console()
    console.print(f"[bold]Prompt[/] of {args.user_id} at the end of {ds}\n", highlight=False)
    console.print(prompts["prompt"][0].as_py(), markup=False, highlight=False)
    table = Table("rank", "source", "score", "ad", "Semantic ID", "title", "category")
    for row in rows:
        ad = named.get(row["ad_id"], {"title": "(no longer among the ads)", "category": ""})
        cells = [str(row["rank"]), row["source"], f"{row['score']:.3f}", row["ad_id"]]
        table.add_row(*cells, row["semantic_id"], ad["title"], ad["category"])
    release = rows[0]["release"] if rows else "none"
    console.print(f"\n[bold]Candidates[/] of release {release}", highlight=False)
    console.print(table)


if __name__ == "__main__":
    arguments = parser(__doc__, ds=False)
    arguments.add_argument("user_id", help="id of the user")
    arguments.add_argument("--ds", type=partition_date, metavar="YYYY-MM-DD", help="of this day")
    main(run, arguments)
