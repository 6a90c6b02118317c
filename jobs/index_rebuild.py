"""Rebuild the indexes of the champion for the ads of a day, without training.

New objects get Semantic IDs from the frozen codebook, ads that stopped leave the constraint index.
The result is a child release with the same model; if its validation fails, the old one goes on
serving.

Where the codebook has drifted from the catalogue beyond `semantic_ids.refresh_error` or
`semantic_ids.refresh_collision_rate`, it is refreshed: fitted to the objects of the day, with at
most `semantic_ids.max_moved` of the unchanged ones moved. The model's embeddings of Semantic ID
tokens follow, and the release lists who has moved.
"""

from __future__ import annotations

import argparse
import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import semantic_ids
from jobs.command import main, parser
from jobs.curate import publish_ads
from jobs.evaluate import taken_before
from leadre_lib import facts
from leadre_lib.assignment import Moves, by_object, compare, drift, refresh
from leadre_lib.catalogue import catalogue
from leadre_lib.errors import NothingToDo
from leadre_lib.generation import sid_sizes
from leadre_lib.indexes import MOVED, build_indexes, check_indexes, read_objects
from leadre_lib.lake import Lake, code_version
from leadre_lib.model import follow_alignment, load, save
from leadre_lib.quality import publish
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Release, ReleaseError, Releases
from leadre_lib.settings import Settings
from leadre_lib.spark import session


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Refresh what needs it, build, validate, and only then publish and promote."""
    ds, lake, releases = args.ds, Lake(settings.lake), Releases(settings.releases)
    next_day = ds + dt.timedelta(days=1)
    if releases.champion_entry(before=next_day) is None:
        raise NothingToDo("there is no champion yet whose indexes could be rebuilt")
    _read_snapshot(args, settings, lake)
    with releases.lock():
        parent = releases.champion(before=next_day)
        assert parent is not None
        ads, published = lake.read("ads", ds), lake.read("ad_semantic_ids", ds)
        codebook, rows = _in_words_of(settings, parent, ads, published, ds, args.refresh)
        if rows is not published:  # they are replaced, and not what the release is made of
            del lake.reads[lake.partition("ad_semantic_ids", ds).name]
        now = catalogue(ads, rows, next_day)
        work, sizes = settings.work(ds) / "index_rebuild", sid_sizes(codebook.sizes, settings)
        taken = taken_before(settings, lake, now, next_day).taken()
        as_fitted = settings.with_fusion_of(parent.manifest.get("fusion_settings"))
        parts = build_indexes(now, sizes, taken, as_fitted, work)
        told: dict[str, object] = {}
        if (parent.folder / MOVED).exists() and parent.manifest["ds"] == str(ds):
            # The day's own refresh stays on record, and a rerun gives the same release.
            parts[MOVED], told = parent.folder / MOVED, parent.manifest["refresh"]
        if codebook.version != parent.codebook:
            moves = _compare(parent, rows, codebook)
            parts |= _follow(parent, moves, sizes, work, settings)
            told = {"unchanged": moves.unchanged, "kept": moves.kept, "moved": len(moves.moved)}
        child = releases.build(
            ds,
            {"codebook": settings.codebooks / codebook.version, "model": parent.model, **parts},
            {
                "kind": "index_rebuild",
                "parents": {"release": parent.id, "codebook": parent.codebook},
                "versions": {
                    **parent.manifest["versions"],
                    "code": code_version(),
                    "codebook": codebook.version,
                },
                "metrics": parent.manifest["metrics"],
                "fusion": parent.manifest.get("fusion"),
                "fusion_settings": parent.manifest.get("fusion_settings"),
                "refresh": told,
                "inputs": dict(sorted(lake.reads.items())),
            },
        )
        found = check_indexes(child, now, sizes)
        if rows is not published:
            with session(settings) as spark:
                publish(spark, settings, lake, "ad_semantic_ids", ds, rows)
        if child.id != parent.id:
            releases.promote(ds, child.id, f"indexes of {ds} rebuilt", rebuild=True)
    facts.record(settings, ds, "index_rebuild", release=child.id, parent=parent.id, **found, **told)
    print(
        f"release {child.id} (child of {parent.id}): {found['objects']} marketing objects,"
        f" {found['active']} active"
    )


def _read_snapshot(args: argparse.Namespace, settings: Settings, lake: Lake) -> None:
    """Publish `ads` and `ad_semantic_ids` again, if they were made of another raw snapshot."""
    made = ("ads", "ad_semantic_ids")
    if all(lake.has(table, args.ds) for table in made) and not lake.stale_inputs(made, args.ds):
        return
    with session(settings, lake) as spark:
        publish_ads(spark, settings, lake, args.ds)
    args.keep = True
    semantic_ids.run(args, settings)


def _in_words_of(
    settings: Settings,
    parent: Release,
    ads: pa.Table,
    published: pa.Table,
    ds: dt.date,
    wanted: bool,
) -> tuple[Codebook, pa.Table]:
    """The codebook of the child and the rows of `ad_semantic_ids` in its words.

    That is the parent's with the rows as published, or, after drift or where it is wanted, a
    refreshed one. A refresh whose rows were published before it was killed is gone on with.
    """
    codebook = Codebook.load(settings.codebooks / published["codebook"][0].as_py())
    if codebook.version != parent.codebook:
        if codebook.config["refreshed_from"] != parent.codebook:
            parent.require_codebook(codebook.version, f"`ad_semantic_ids` of ds={ds}")
        print(f"going on with the refresh to codebook {codebook.version}")
        return codebook, published
    day = ds + dt.timedelta(days=1)
    seen = drift(catalogue(ads, published, day), codebook, settings)
    reasons = seen.reasons or (["it was asked for"] if wanted else [])
    if not reasons:
        return codebook, published
    print(f"refreshing codebook {codebook.version}: {'; '.join(reasons)}")
    settled = read_objects(parent)["marketing_object_id"]
    fresh, rows = refresh(ads, published, settled, codebook, settings, day)
    fresh.save(settings.codebooks / fresh.version)
    return fresh, rows


def _compare(parent: Release, rows: pa.Table, codebook: Codebook) -> Moves:
    before = Codebook.load(parent.folder / "codebook")
    return compare(read_objects(parent), by_object(rows), before.sizes, codebook.sizes)


def _follow(
    parent: Release, moves: Moves, sizes: list[int], work: Path, settings: Settings
) -> dict[str, Path]:
    """The model with its SID embeddings moved along, and the list of who has moved."""
    least = 1 - settings.semantic_ids.max_moved
    if moves.kept < least:
        raise ReleaseError(
            f"the refresh kept the Semantic IDs of {moves.kept:.2%} of {moves.unchanged} unchanged"
            f" objects, less than {least:.2%} (semantic_ids.max_moved); {parent.id} goes on serving"
        )
    print(f"{moves.kept:.2%} of {moves.unchanged} unchanged objects keep their Semantic IDs")
    model, tokenizer = load(parent.model)
    follow_alignment(model, tokenizer, sizes, moves.shares, settings.seed)
    save(model, tokenizer, work / "model")
    pq.write_table(moves.moved, work / Path(MOVED).name)
    return {"model": work / "model", MOVED: work / Path(MOVED).name}


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument(
        "--refresh", action="store_true", help="refresh the codebook, whether it has drifted or not"
    )
    main(run, arguments, "index_rebuild")
