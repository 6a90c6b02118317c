"""The Semantic IDs of a day's marketing objects: keeping those they have, giving new ones, seeing
that the codebook drifts from the catalogue, and moving to a refreshed codebook.

An object keeps its ID as long as its codebook serves, whatever its text says by now. A refresh fits
the codebook to the catalogue of the day, but holds it to the codes that objects have: it moves
those whose text has changed and, of the others, the few to which that does most good.

Knows nothing of models, of releases or of where tables lie.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.catalogue import Catalogue, catalogue, marketing_objects, object_texts
from leadre_lib.embeddings import embed
from leadre_lib.quantisers import Codebook, refit_codebook, train_codebook
from leadre_lib.semantic_ids import (
    Codes,
    alignment,
    assign,
    code_lists,
    code_usage,
    codes_of,
    format_sid,
)
from leadre_lib.settings import Settings

LEAST_ERROR = 0.01  # a codebook that said everything drifts no sooner than one that errs so much
DRIFT_SAMPLE = 65_536  # active objects whose reconstruction error is looked at
WORTH_MOVING = 0.1  # of the codebook's error: what an object's own must lose by a move


@dataclass(frozen=True)
class Drift:
    """How far a codebook has drifted from its catalogue; `reasons` is empty where it has not.

    `error` is the mean reconstruction error of the active objects' IDs, as a multiple of what it
    was when the codebook came into use; `usage` is what `code_usage` says of the active objects.
    """

    error: float
    usage: dict[str, object]
    reasons: list[str]


@dataclass(frozen=True)
class Moves:
    """What a refresh did to the objects that had an ID before.

    `moved` has one row an object whose ID is another now: `marketing_object_id`, `before`, `after`
    (Semantic IDs) and `text_changed`. `unchanged` counts the objects whose text is as it was when
    they got their ID; `kept` is the share of them that kept it. `shares`: see `alignment`.
    """

    moved: pa.Table
    unchanged: int
    kept: float
    shares: list[npt.NDArray[np.float64]]


def first_codebook(ads: pa.Table, settings: Settings, text_encoder: str) -> Codebook:
    """Train a codebook on the marketing objects of `ads`, none of which has an ID yet.

    Args:
        ads: rows of the table `ads`.
        text_encoder: see `embeddings.encoder_id`.
    """
    objects = marketing_objects(ads)
    vectors = embed(object_texts(objects), settings.embedding, settings.cache)
    trained = train_codebook(vectors, settings.semantic_ids, settings.seed, text_encoder)
    ids = objects["marketing_object_id"]
    return trained.in_use(vectors, _assign(ids, vectors, None, trained, settings))


def assign_day(
    ads: pa.Table, previous: pa.Table | None, codebook: Codebook, settings: Settings
) -> pa.Table:
    """The rows of `ad_semantic_ids` of a day, without `ds`, in the order of the ad ids.

    Args:
        ads: rows of the table `ads` of the day.
        previous: the rows of the day before; what they know stays known, ads that have left too.
        codebook: frozen; encodes the objects that `previous` does not know.

    Raises:
        LeadreError: see `assign` and `Codebook.encode`.
    """
    objects = marketing_objects(ads)
    known = None if previous is None else by_object(previous)
    if known is not None:
        seen = known["marketing_object_id"].combine_chunks()
        objects = objects.filter(pc.invert(pc.is_in(objects["marketing_object_id"], seen)))
    if known is not None and not len(objects):
        return _by_ad(ads, previous, known)
    vectors = embed(object_texts(objects), settings.embedding, settings.cache)
    codes = _assign(objects["marketing_object_id"], vectors, known, codebook, settings)
    ids = _rows(objects["marketing_object_id"], codes, objects["text_hash"], codebook)
    return _by_ad(ads, previous, ids if known is None else pa.concat_tables([known, ids]))


def drift(ads: Catalogue, codebook: Codebook, settings: Settings) -> Drift:
    """Look at the active objects: how badly their IDs say what they are, and how many collide."""
    active = np.flatnonzero(ads.active_objects)
    drawn = active
    if len(active) > DRIFT_SAMPLE:
        chosen = np.random.default_rng(settings.seed).choice(active, DRIFT_SAMPLE, replace=False)
        drawn = np.sort(chosen)
    texts = object_texts(ads.objects.take(pa.array(drawn)))
    vectors = embed(texts, settings.embedding, settings.cache)
    error = codebook.errors(vectors, ads.codes[drawn]).mean() / max(codebook.error, LEAST_ERROR)
    usage = code_usage(ads.codes[active], codebook.sizes)
    limits, reasons = settings.semantic_ids, []
    if error > limits.refresh_error:
        reasons.append(
            f"reconstruction error {error:.2f} times that when it came into use, more than"
            f" semantic_ids.refresh_error = {limits.refresh_error}"
        )
    # What the last refresh could not cure is no reason for the next.
    most = max(limits.refresh_collision_rate, limits.refresh_error * codebook.collision_rate)
    if usage["collision_rate"] > most:
        reasons.append(
            f"{usage['collision_rate']:.2%} of the active objects collide before the last token,"
            f" more than {most:.2%} (semantic_ids.refresh_collision_rate)"
        )
    return Drift(float(error), usage, reasons)


def refresh(
    ads: pa.Table,
    previous: pa.Table,
    settled: pa.ChunkedArray,
    codebook: Codebook,
    settings: Settings,
    day: dt.date,
) -> tuple[Codebook, pa.Table]:
    """Refresh a codebook for the active objects; all that `previous` knows get IDs in its words.

    Objects whose text has changed since they got their ID take the codes of what it says now, and
    so do those that are not settled. Of the others at most `semantic_ids.max_moved` do, those whose
    error falls most. An ID that is given up is not given to another object here.

    Args:
        ads: rows of the table `ads`.
        previous: rows of `ad_semantic_ids`, which must know all of them.
        settled: ids of the objects that a model knows by their IDs: those of the release.
        codebook: of `previous`.
        day: the codebook is fitted to the objects active then.

    Returns:
        The refreshed codebook, and the rows of `ad_semantic_ids`, without `ds`.
    """
    now = catalogue(ads, previous, day)
    vectors = embed(now.texts(), settings.embedding, settings.cache)
    active = now.active_objects
    known = by_object(previous)
    place = pc.index_in(now.object_ids, known["marketing_object_id"].combine_chunks()).to_numpy()
    same = pc.and_(
        pc.equal(known["text_hash"].take(pa.array(place)), now.objects["text_hash"]),
        pc.is_in(now.object_ids, settled.combine_chunks()),
    ).to_numpy()
    options, fitted = settings.semantic_ids, (vectors[active], now.codes[active])
    # The worst are let go to see what they would gain; those with too little to gain stay.
    most = int(options.max_moved * same.sum())
    free = ~same | _highest(codebook.errors(vectors, now.codes), same, most)
    trial = refit_codebook(codebook, *fitted, free[active], options, settings.seed)
    moves = _moves(trial, vectors, now.codes, same, most)
    trained = refit_codebook(codebook, *fitted, moves[active], options, settings.seed)
    # An ID that is given up stays known as taken: only its owner is struck out.
    owners = known["marketing_object_id"].to_numpy(zero_copy_only=False).copy()
    owners[place[moves]] = None
    held = known.set_column(0, "marketing_object_id", pa.array(owners, pa.string()))
    codes, hashes = codes_of(known), known["text_hash"].to_numpy(zero_copy_only=False).copy()
    codes[place[moves]] = _assign(
        now.object_ids.filter(pa.array(moves)), vectors[moves], held, trained, settings
    )
    hashes[place] = now.objects["text_hash"].to_numpy(zero_copy_only=False)
    trained = trained.in_use(vectors[active], codes[place[active]])
    ids = _rows(known["marketing_object_id"], codes, pa.array(hashes, pa.string()), trained)
    return trained, _by_ad(ads, previous, ids)


def compare(before: pa.Table, after: pa.Table, sizes: Sequence[int], wider: Sequence[int]) -> Moves:
    """What a refresh did; tables with the columns of `ad_semantic_ids`, once an object.

    Args:
        before: the objects of the release before the refresh.
        after: those after it; objects that are in one of them alone do not count.
        sizes, wider: codes of each level before and after, without the last token.
    """
    place = pc.index_in(before["marketing_object_id"], after["marketing_object_id"])
    before = before.filter(pc.is_valid(place))
    after = after.take(pc.drop_null(place))
    other = pc.not_equal(before["semantic_id"], after["semantic_id"])
    changed = pc.not_equal(before["text_hash"], after["text_hash"])
    moved = pa.table(
        {
            "marketing_object_id": before["marketing_object_id"],
            "before": before["semantic_id"],
            "after": after["semantic_id"],
            "text_changed": changed,
        }
    ).filter(other)
    unchanged = len(before) - (pc.sum(changed).as_py() or 0)
    lost = len(moved) - (pc.sum(moved["text_changed"]).as_py() or 0)
    shares = alignment(codes_of(before), codes_of(after), sizes, wider)
    return Moves(moved, unchanged, 1 - lost / max(unchanged, 1), shares)


def _moves(
    codebook: Codebook,
    vectors: npt.NDArray[np.float32],
    codes: Codes,
    same: npt.NDArray[np.bool_],
    most: int,
) -> npt.NDArray[np.bool_]:
    """Which objects take the codes that a new codebook gives them, bool [objects]."""
    natural = codebook.encode(vectors)
    other = (natural != codes[:, :-1]).any(axis=1)
    gain = codebook.errors(vectors, codes) - codebook.errors(vectors, natural)
    eager = other & same & (gain > WORTH_MOVING * codebook.error)
    return (other & ~same) | _highest(gain, eager, most)


def _highest(
    value: npt.NDArray[np.float64], among: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.bool_]:
    """So many of those `among` [n] as there are, of the greatest values, bool [n]."""
    rows = np.flatnonzero(among)
    chosen = np.zeros(len(among), bool)
    chosen[rows[np.argsort(-value[rows], kind="stable")[:count]]] = True
    return chosen


def by_object(ids: pa.Table) -> pa.Table:
    """The rows of `ad_semantic_ids` once an object, in the order of their ids, without the ads."""
    ids = ids.sort_by("marketing_object_id")
    owner = ids["marketing_object_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    first = ids.take(pa.array(np.flatnonzero(np.diff(owner, prepend=-1))))
    return first.select(["marketing_object_id", "semantic_id", "codes", "text_hash", "codebook"])


def _assign(
    ids: pa.Array | pa.ChunkedArray,
    vectors: npt.NDArray[np.float32],
    known: pa.Table | None,
    codebook: Codebook,
    settings: Settings,
) -> Codes:
    options = settings.semantic_ids
    near = codebook.alternatives(vectors, options.alternatives)
    return assign(ids.to_pylist(), codebook.encode(vectors), known, options.collision_codes, near)


def _rows(objects: pa.Array, codes: Codes, hashes: pa.Array, codebook: Codebook) -> pa.Table:
    return pa.table(
        {
            "marketing_object_id": objects,
            "semantic_id": pa.array(format_sid(codes), pa.string()),
            "codes": code_lists(codes),
            "text_hash": hashes,
            "codebook": pa.array([codebook.version] * len(codes), pa.string()),
        }
    )


def _by_ad(ads: pa.Table, previous: pa.Table | None, ids: pa.Table) -> pa.Table:
    """The rows of `ids` once an ad: those of the day, and those that only `previous` knows."""
    sells = ads.select(["ad_id", "marketing_object_id"])
    if previous is not None:
        gone = pc.invert(pc.is_in(previous["ad_id"], ads["ad_id"].combine_chunks()))
        earlier = previous.filter(gone).select(sells.column_names)
        sells = pa.concat_tables([sells, earlier.cast(sells.schema)])
    sells = sells.sort_by("ad_id")
    place = pc.index_in(sells["marketing_object_id"], ids["marketing_object_id"].combine_chunks())
    owned = ids.take(place).drop_columns("marketing_object_id")
    table = sells
    for name in owned.column_names:
        table = table.append_column(name, owned[name])
    return table
