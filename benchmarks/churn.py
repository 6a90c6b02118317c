"""A month of a changing catalogue: what the nightly index rebuild keeps, and how long it takes.

Every day 2 % of the marketing objects are new, 2 % stop, and 1 % say something else than before.
The new ones come from categories that the codebook has not seen, so that it drifts. Each day's
`raw_ads` go through the job `index_rebuild` as in production: contracts and gates, embeddings of
what is new, indexes, validation, a child release; once it has drifted, a refresh of the codebook.

A row a day: objects known and active, `kept` (of the objects with the text that they got their
Semantic ID for, the share that has it still), `collisions` after the last token and before it,
`error` (reconstruction error, against that when the codebook came into use), and `rebuild s`. The
run fails if an unchanged object loses its ID on a day without refresh, if a refresh moves more of
them than `semantic_ids.max_moved`, or if two objects share an ID.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from jobs import index_rebuild, semantic_ids
from jobs.curate import publish_ads
from leadre_lib import facts
from leadre_lib.catalogue import Catalogue, catalogue, marketing_objects
from leadre_lib.evaluation import Histories
from leadre_lib.generation import sid_sizes
from leadre_lib.indexes import build_indexes
from leadre_lib.lake import Lake
from leadre_lib.model import build_model, build_tokenizer, save, sid_tokens
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Releases
from leadre_lib.settings import Settings, load_settings
from leadre_lib.signals import Taken
from leadre_lib.sources.simulator import Simulator
from leadre_lib.spark import session

NEW, STOPPED, CHANGED = 0.02, 0.02, 0.01  # of the objects at the start, a day
UNSEEN = 0.3  # of the simulator's categories: where new objects come from
ADS_PER_OBJECT = 2.5  # of the simulator
START = dt.date(2026, 3, 2)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--objects", type=int, default=5000, help="at the start")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--refresh-day", type=int, default=0, help="0: when it has drifted")
    return parser


def snapshots(objects: int, days: int, seed: int) -> Iterator[pa.Table]:
    """`raw_ads` of each day, the first with `objects` marketing objects."""
    rng = np.random.default_rng(seed)
    most = int(objects * (1 + days * NEW) / (1 - UNSEEN) * 1.4)
    sizes = {"ads": int(most * ADS_PER_OBJECT), "users": 8, "history_days": 1}
    ads = Simulator(load_settings(simulator=sizes)).raw_day(START)["raw_ads"]
    sold = marketing_objects(ads)
    categories = np.array(sorted(set(sold["category"].to_pylist())))
    unseen = rng.choice(categories, int(UNSEEN * len(categories)), replace=False)
    is_new = pc.is_in(sold["category"], pa.array(unseen)).to_numpy(zero_copy_only=False)
    names = sold["marketing_object_id"].to_numpy(zero_copy_only=False)
    shelf = list(rng.permutation(names[~is_new])[:objects])
    pool = list(rng.permutation(names[is_new]))
    stops: dict[str, dt.date] = {}
    wordings: dict[str, int] = {}
    for day in range(days + 1):
        if day:
            selling = [name for name in shelf if name not in stops]
            shelf += [pool.pop() for _ in range(int(objects * NEW))]
            for name in rng.choice(selling, int(objects * STOPPED), replace=False):
                stops[name] = START + dt.timedelta(days=day)
            for name in rng.choice(selling, int(objects * CHANGED), replace=False):
                wordings[name] = wordings.get(name, 0) + 1
        yield _told(
            ads.filter(pc.is_in(ads["marketing_object_id"], pa.array(shelf))), stops, wordings
        )


def _told(ads: pa.Table, stops: dict[str, dt.date], wordings: dict[str, int]) -> pa.Table:
    """The ads with what has become of their objects."""
    names = ads["marketing_object_id"].to_pylist()
    titles = [
        f"{title}, edition {wordings[name]}" if name in wordings else title
        for name, title in zip(names, ads["title"].to_pylist(), strict=True)
    ]
    columns = {
        "title": pa.array(titles),
        "start_date": pa.array([START] * len(ads), pa.date32()),
        "stop_date": pa.array([stops.get(name) for name in names], pa.date32()),
    }
    for name, column in columns.items():
        ads = ads.set_column(ads.column_names.index(name), name, column)
    return ads


def land(lake: Lake, ds: dt.date, ads: pa.Table) -> None:
    """Publish a day's `raw_ads`."""
    with lake.begin("raw_ads", ds) as attempt:
        attempt.write(ads)
        attempt.commit()


def first_champion(settings: Settings) -> None:
    """The first day's tables, and a release with a model that knows nothing but the words."""
    lake, work = Lake(settings.lake), settings.work(START)
    with session(settings, lake) as spark:
        publish_ads(spark, settings, lake, START)
    semantic_ids.run(argparse.Namespace(ds=START, keep=False), settings)
    now = day_of(settings, START)
    book = settings.codebooks / now.codebook
    sizes = sid_sizes(Codebook.load(book).sizes, settings)
    tokenizer = build_tokenizer(now.texts()[:1000], sid_tokens(sizes), settings.model.vocabulary)
    save(build_model(settings.model, tokenizer, settings.seed), tokenizer, work / "model")
    parts = {"codebook": book, "model": work / "model"}
    nobody = Taken.at_once(Histories.of([]))
    parts |= build_indexes(now, sizes, nobody, settings, work / "indexes")
    told = {"versions": {"codebook": now.codebook}, "metrics": {}}
    releases = Releases(settings.releases)
    releases.promote(START, releases.build(START, parts, told).id, "the first")


def day_of(settings: Settings, ds: dt.date) -> Catalogue:
    """The catalogue as it stands after a day."""
    lake = Lake(settings.lake)
    ads, ids = lake.read("ads", ds), lake.read("ad_semantic_ids", ds)
    return catalogue(ads, ids, ds + dt.timedelta(days=1))


def kept(before: Catalogue, now: Catalogue) -> float:
    """Of the objects that say what they said when they got their ID, the share that keeps it."""
    place = pc.index_in(before.object_ids, now.object_ids).to_numpy()
    same = pc.equal(before.objects["encoded_hash"], now.objects["text_hash"].take(pa.array(place)))
    still = (before.codes == now.codes[place]).all(axis=1)[same.to_numpy()]
    return float(still.mean())


def rebuild(settings: Settings, ds: dt.date, refresh: bool, before: Catalogue) -> dict[str, Any]:
    """Run a day's rebuild; its row of the table."""
    began = time.perf_counter()
    index_rebuild.run(argparse.Namespace(ds=ds, keep=False, refresh=refresh), settings)
    seconds = time.perf_counter() - began
    now = day_of(settings, ds)
    told = facts.recorded(settings, ds)
    return {
        "method": "leadre",
        "day": (ds - START).days,
        "objects": len(now.codes),
        "active": int(now.active_objects.sum()),
        "kept": kept(before, now),
        "refresh": now.codebook != before.codebook,
        "collisions": 1 - len(np.unique(now.codes, axis=0)) / len(now.codes),
        "before last token": told["semantic_ids"]["collision_rate"],
        "error": told["semantic_ids"]["error"],
        "rebuild s": round(seconds, 1),
    }


def check(row: dict[str, Any], settings: Settings) -> None:
    """Fail where a day broke the promise."""
    least = 1 - settings.semantic_ids.max_moved if row["refresh"] else 1.0
    if row["kept"] < least or row["collisions"]:
        raise SystemExit(f"error: kept {row['kept']:.4f}, collisions {row['collisions']}: {row}")


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table on the terminal."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *[
                f"{value:.4f}" if isinstance(value, float) and name != "rebuild s" else str(value)
                for name, value in row.items()
            ]
        )
    Console(width=140).print(table)


def main() -> None:
    """Live through the month in a home of its own; embeddings are kept in the user's cache."""
    args = arguments().parse_args()
    base = load_settings(model={"hidden_size": 32, "layers": 1})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        settings = base.model_copy(update={"home": Path(home), "source": "lake"})
        base.cache.mkdir(parents=True, exist_ok=True)
        settings.cache.symlink_to(base.cache)
        for day, ads in enumerate(snapshots(args.objects, args.days, settings.seed)):
            ds = START + dt.timedelta(days=day)
            land(Lake(settings.lake), ds, ads)
            if day == 0:
                first_champion(settings)
                before = day_of(settings, ds)
                continue
            rows.append(rebuild(settings, ds, day == args.refresh_day, before))
            check(rows[-1], settings)
            before = day_of(settings, ds)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
