"""From users and their prompts to rows of the contract `candidates`.

The model's objects come first. Those of a user whose prompt has not changed may be carried over
from an earlier day. Whoever the model leaves short gets objects near to what they dealt with, by
the embedding of their texts, and then what is popular. Every row says where it comes from.

Knows nothing of parts, shards, files of prompts, gates or the online store.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from leadre_lib.catalogue import Catalogue
from leadre_lib.contracts import load_contract
from leadre_lib.decoding import NO_OBJECT, Decoder
from leadre_lib.evaluation import Histories
from leadre_lib.generation import decode_distinct
from leadre_lib.retrieval import EmbeddingIndex

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Days = npt.NDArray[np.datetime64]

SOURCES = ("model", "neighbours", "popularity")
MODEL, NEIGHBOURS, POPULARITY = range(len(SOURCES))
USER_COLUMNS = ["user_id", "prompt", "prompt_hash", "seen_ad_ids"]
EARLIER_COLUMNS = ["user_id", "rank", "ad_id", "score", "prompt_hash", "decoded_on"]


class Lists(NamedTuple):
    """Objects of some users, best first.

    Attributes:
        objects: int64 [users, k], object rows of the catalogue; -1 where there are fewer.
        scores: float32 [users, k]: log-probabilities of the model's objects, the inner product of
            neighbours, the clicks and conversions of what is popular.
        sources: int8 [users, k], places in `SOURCES`.
    """

    objects: Rows
    scores: Floats
    sources: npt.NDArray[np.int8]


class Filler:
    """Objects for users whom the model leaves short of candidates.

    Args:
        catalogue: of the day.
        neighbours: nearest objects by embedding; None: fill from popularity alone.
        rows: int64 [vectors of `neighbours`], the catalogue's object row of each; -1 for none.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        neighbours: EmbeddingIndex | None = None,
        rows: Rows | None = None,
    ) -> None:
        self._active = catalogue.active_objects
        counts = pc.fill_null(catalogue.ads["popularity"], 0).to_numpy()
        self._popularity = np.bincount(catalogue.owner, counts, len(self._active))
        order = np.argsort(-self._popularity, kind="stable")
        self._popular = order[self._active[order]]
        self._neighbours = neighbours
        self._object = np.empty(0, np.int64) if rows is None else rows
        self._vector = np.full(len(self._active), -1)
        known = np.flatnonzero(self._object >= 0)
        self._vector[self._object[known]] = known

    def fill(self, lists: Lists, seen: Histories, excluded: bool) -> Lists:
        """Lists in which nobody has fewer than k, as far as there are active objects.

        Args:
            lists: of the model.
            seen: object rows that each user has dealt with.
            excluded: whether a user must not get what they have seen.
        """
        short = np.flatnonzero((lists.objects < 0).any(axis=1))
        if not len(short):
            return lists
        k = lists.objects.shape[1]
        dealt = _rows_of(seen, short)
        near, closeness = self._near(dealt, 2 * k)
        most = int(np.diff(dealt.offsets).max()) if excluded else 0
        popular = np.tile(self._popular[: k + most], (len(short), 1))
        objects = np.hstack([lists.objects[short], near, popular])
        scores = np.hstack([lists.scores[short], closeness, self._popularity[popular]])
        widths = [k, near.shape[1], popular.shape[1]]
        sources = np.tile(np.repeat(np.arange(3, dtype=np.int8), widths), (len(short), 1))
        good = (objects >= 0) & self._active[objects] & _first_of_their_kind(objects)
        if excluded:
            key = np.arange(len(short))[:, None] * len(self._active) + objects
            good &= ~np.isin(key, dealt.cases * len(self._active) + dealt.values)
        order = np.argsort(~good, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(good, order, 1)
        pick = [np.take_along_axis(array, order, 1) for array in (objects, scores, sources)]
        filled = Lists(lists.objects.copy(), lists.scores.copy(), lists.sources.copy())
        filled.objects[short] = np.where(chosen, pick[0], NO_OBJECT)
        filled.scores[short] = np.where(chosen, pick[1], -np.inf)
        filled.sources[short] = pick[2]
        return filled

    def _near(self, dealt: Histories, count: int) -> tuple[Rows, Floats]:
        """Objects nearest to the mean of what each user dealt with, and their inner products."""
        known = np.unique(dealt.values[self._vector[dealt.values] >= 0])
        if self._neighbours is None or not len(known):
            return np.empty((len(dealt), 0), np.int64), np.empty((len(dealt), 0), np.float32)
        vectors = self._neighbours.vectors(self._vector[known])
        means = dealt.matrix(len(self._active))[:, known] @ vectors
        length = np.linalg.norm(means, axis=1, keepdims=True)
        scores, rows = self._neighbours.search(means / np.maximum(length, 1e-12), count)
        # Of a user without anything known every object is as near as any other.
        found = (rows >= 0) & (length > 0)
        return np.where(found, self._object[rows], NO_OBJECT), scores


class Earlier:
    """The candidates of an earlier day, made by the same release with the same settings.

    Args:
        files: of that partition. Where they are sorted by user, a part reads few of their pages.
        since: what was decoded before this day is too old to be carried over.
    """

    def __init__(self, files: Sequence[Path], since: dt.date) -> None:
        schema = load_contract("candidates").arrow_schema()
        self._rows = pads.dataset([str(path) for path in files], schema=schema, format="parquet")
        self._since = since

    def of(
        self, users: pa.Table, catalogue: Catalogue, seen: Histories, excluded: bool, k: int
    ) -> tuple[Rows, Floats, Days]:
        """What can be carried over of users whose prompt says what it said then.

        Objects that stopped, or that a user must not get any more, are left out.

        Returns:
            objects int64 and scores float32, both [users, k], -1 and -inf where there are none, and
            the day on which each user was decoded, datetime64 [users].
        """
        rows, user = self._read(users)
        told = users["prompt_hash"].combine_chunks().take(pa.array(user))
        same = pc.equal(rows["prompt_hash"].combine_chunks(), told)
        objects = catalogue.object_rows(rows["ad_id"])
        keep = same.to_numpy(zero_copy_only=False) & (objects >= 0)
        keep[keep] &= catalogue.active_objects[objects[keep]]
        if excluded:
            keep &= ~np.isin(user * len(catalogue.codes) + objects, _keys(seen, catalogue))
        # Of an object's ads the first one stands for it; what is left moves up.
        kept = np.flatnonzero(keep)
        key = user[kept] * len(catalogue.codes) + objects[kept]
        kept = kept[np.sort(np.unique(key, return_index=True)[1])]
        nth = np.arange(len(kept)) - np.searchsorted(user[kept], user[kept])
        kept, nth = kept[nth < k], nth[nth < k]
        found = np.full((users.num_rows, k), NO_OBJECT, np.int64)
        scores = np.full((users.num_rows, k), -np.inf, np.float32)
        days = np.full(users.num_rows, np.datetime64("NaT"), "datetime64[D]")
        found[user[kept], nth] = objects[kept]
        scores[user[kept], nth] = rows["score"].to_numpy()[kept]
        days[user[kept]] = rows["decoded_on"].to_numpy()[kept]
        return found, scores, days

    def _read(self, users: pa.Table) -> tuple[pa.Table, Rows]:
        """The model's rows for some users, and each row's user; sorted by user and rank."""
        ids, field = users["user_id"].combine_chunks(), pads.field
        bounds = pc.min_max(ids).as_py()
        wanted = (field("user_id") >= bounds["min"]) & (field("user_id") <= bounds["max"])
        wanted &= field("user_id").isin(ids) & (field("source") == SOURCES[MODEL])
        wanted &= field("decoded_on") >= pa.scalar(self._since)
        rows = self._rows.to_table(columns=EARLIER_COLUMNS, filter=wanted).combine_chunks()
        place = pc.index_in(rows["user_id"].combine_chunks(), ids).to_numpy(zero_copy_only=False)
        order = np.lexsort((rows["rank"].to_numpy(), place))
        return rows.take(pa.array(order)), place[order].astype(np.int64)


@dataclass(frozen=True)
class Retriever:
    """What makes candidates of users.

    Attributes:
        decoder: whose rows are the objects of `catalogue`.
        catalogue: of the day.
        release: name of the release that decodes.
        ds: the day.
        k: objects a user, each with all its active ads.
        exclude_seen: whether a user does not get what they clicked or converted on.
        filler: fills lists that are shorter; None: they stay short.
        earlier: what may be carried over; None: everybody is decoded.
    """

    decoder: Decoder
    catalogue: Catalogue
    release: str
    ds: dt.date
    k: int
    exclude_seen: bool = False
    filler: Filler | None = None
    earlier: Earlier | None = None

    def candidates(self, users: pa.Table) -> tuple[pa.Table, int]:
        """Rows of the contract `candidates`, and of how many users they were decoded today.

        Args:
            users: `USER_COLUMNS` of the contract `user_prompts`.
        """
        seen = _seen(users, self.catalogue)
        objects = np.full((users.num_rows, self.k), NO_OBJECT, np.int64)
        scores = np.full((users.num_rows, self.k), -np.inf, np.float32)
        days = np.full(users.num_rows, np.datetime64("NaT"), "datetime64[D]")
        if self.earlier is not None:
            objects, scores, days = self.earlier.of(
                users, self.catalogue, seen, self.exclude_seen, self.k
            )
        new = np.flatnonzero(np.isnat(days))
        if len(new):
            prompts = users["prompt"].take(pa.array(new)).to_pylist()
            lists = np.split(seen.values, seen.offsets[1:-1])
            exclude = [lists[user] for user in new] if self.exclude_seen else None
            objects[new], scores[new] = decode_distinct(self.decoder, prompts, self.k, exclude)
            days[new] = np.datetime64(self.ds)
        made = Lists(objects, scores, np.zeros(objects.shape, np.int8))
        if self.filler is not None:
            made = self.filler.fill(made, seen, self.exclude_seen)
        return self._rows(users, made, days), len(new)

    def _rows(self, users: pa.Table, lists: Lists, days: Days) -> pa.Table:
        """An object stands as its active ads, by eCPM, which share its score."""
        user, place = np.nonzero(lists.objects >= 0)
        ads, found = self.catalogue.expand(lists.objects[user, place])
        user, place = user[found], place[found]
        first = np.flatnonzero(np.diff(user, prepend=-1))
        rank = np.arange(len(user)) - np.repeat(first, np.diff(first, append=len(user))) + 1
        sids = self.catalogue.objects["semantic_id"].combine_chunks()
        sources = pa.array(SOURCES).take(pa.array(lists.sources[user, place]))
        of_user = users.select(["user_id", "prompt_hash"]).take(pa.array(user))
        table = pa.table(
            {
                "user_id": of_user["user_id"],
                "rank": pa.array(rank, pa.int32()),
                "ad_id": self.catalogue.ad_ids.take(pa.array(ads)),
                "semantic_id": sids.take(pa.array(self.catalogue.owner[ads])),
                "score": pa.array(lists.scores[user, place].astype(np.float64)),
                "source": sources,
                "release": pa.array(np.full(len(user), self.release)),
                "prompt_hash": of_user["prompt_hash"],
                "decoded_on": pa.array(days[user]),
            }
        )
        return table.cast(load_contract("candidates").arrow_schema())


def groups_of(catalogue: Catalogue, column: str) -> Rows | None:
    """A number for each value of a column of the objects' first ads, int64 [objects]; "": None."""
    if not column:
        return None
    values = catalogue.objects[column].combine_chunks().dictionary_encode()
    return values.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _seen(users: pa.Table, catalogue: Catalogue) -> Histories:
    """Object rows that each user clicked or converted on, without repetition."""
    lists = users["seen_ad_ids"].combine_chunks()
    rows = catalogue.object_rows(lists.flatten())
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    user = np.repeat(np.arange(len(lists)), lengths)
    key = np.unique(user[rows >= 0] * len(catalogue.codes) + rows[rows >= 0])
    user, rows = np.divmod(key, len(catalogue.codes))
    counts = np.bincount(user, minlength=len(lists))
    return Histories(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), rows)


def _keys(histories: Histories, catalogue: Catalogue) -> Rows:
    """`case * objects + object` of each entry, int64."""
    return histories.cases * len(catalogue.codes) + histories.values


def _rows_of(histories: Histories, cases: Rows) -> Histories:
    """The histories of some cases, which ascend."""
    kept = np.isin(histories.cases, cases)
    counts = np.diff(histories.offsets)[cases]
    return Histories(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), histories.values[kept]
    )


def _first_of_their_kind(objects: Rows) -> npt.NDArray[np.bool_]:
    """Whether no place to the left in its row [rows, places] has the same object."""
    order = np.argsort(objects, axis=1, kind="stable")
    ordered = np.take_along_axis(objects, order, 1)
    again = np.zeros(objects.shape, np.bool_)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    return ~again
