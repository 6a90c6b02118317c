"""From users and their prompts to rows of the contract `candidates`.

What the model wrote is fused with what else is known (see `fusion`), or stands alone. The objects
of a user whose prompt has not changed may be carried over from an earlier day. Whoever is left
short gets objects near to what they dealt with, by the embedding of their texts, and then what is
popular. Every row says where it comes from.

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
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from leadre_lib.catalogue import Catalogue
from leadre_lib.contracts import load_contract
from leadre_lib.decoding import NO_OBJECT, Decoder
from leadre_lib.evaluation import Histories, first_of_their_kind, within_groups
from leadre_lib.fusion import Factors, Fusion, Written
from leadre_lib.generation import decode_distinct
from leadre_lib.lake import LakeError
from leadre_lib.retrieval import EmbeddingIndex

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Days = npt.NDArray[np.datetime64]

SOURCES = ("model", "signals", "neighbours", "popularity")
MODEL, SIGNALS = 0, 1
MADE = (MODEL, SIGNALS)  # what a night makes, and the next may carry over
FILLED = (2, 3)
USER_COLUMNS = ["user_id", "prompt", "prompt_hash", "history_ad_ids"]
EARLIER_COLUMNS = [
    "user_id",
    "rank",
    "ad_id",
    "semantic_id",
    "score",
    "source",
    "prompt_hash",
    "decoded_on",
]
FILL_BLOCK = 1 << 20  # objects weighed at once, of all users together


class Lists(NamedTuple):
    """Objects of some users, best first.

    Attributes:
        objects: int64 [users, k], object rows of the catalogue; -1 where there are fewer.
        scores: float64 [users, k]: log-probabilities of the model's objects, or among all that were
            fused; the inner product of neighbours, the clicks and conversions of what is popular.
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
        groups: int64 [objects], of which a user gets at most `most` objects; None: any number.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        neighbours: EmbeddingIndex | None = None,
        rows: Rows | None = None,
        groups: Rows | None = None,
        most: int = 0,
    ) -> None:
        self._groups, self._most = groups, most
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
        filled = Lists(lists.objects.copy(), lists.scores.copy(), lists.sources.copy())
        k = lists.objects.shape[1]
        longest = int(np.diff(seen.offsets).max(initial=0)) if excluded else 0
        block = max(1, FILL_BLOCK // (4 * k + longest))
        for start in range(0, len(short), block):
            users = short[start : start + block]
            some = self._fill(lists, users, _rows_of(seen, users), excluded)
            filled.objects[users] = some.objects
            filled.scores[users] = some.scores
            filled.sources[users] = some.sources
        return filled

    def _fill(self, lists: Lists, users: Rows, seen: Histories, excluded: bool) -> Lists:
        """The lists of some users, filled; `seen` is theirs alone."""
        k = lists.objects.shape[1]
        near, closeness = self._near(seen, 2 * k)
        most = int(np.diff(seen.offsets).max()) if excluded else 0
        # With groups the popular may all be of one: then more of them are needed.
        wanted = k + most if self._groups is None else len(self._popular)
        popular = np.tile(self._popular[:wanted], (len(users), 1))
        objects = np.hstack([lists.objects[users], near, popular])
        scores = np.hstack([lists.scores[users], closeness, self._popularity[popular]])
        widths = [k, near.shape[1], popular.shape[1]]
        of_each = np.repeat(np.array([MODEL, *FILLED], np.int8), widths)
        of_each = np.tile(of_each, (len(users), 1))
        of_each[:, :k] = lists.sources[users]
        good = (objects >= 0) & self._active[objects] & first_of_their_kind(objects)
        if excluded:
            good &= ~seen.holds(objects)
        if self._groups is not None:
            good = within_groups(good, self._groups[objects], self._most)
        order = np.argsort(~good, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(good, order, 1)
        return Lists(
            np.where(chosen, np.take_along_axis(objects, order, 1), NO_OBJECT),
            np.where(chosen, np.take_along_axis(scores, order, 1), -np.inf),
            np.take_along_axis(of_each, order, 1),
        )

    def _near(self, seen: Histories, count: int) -> tuple[Rows, Floats]:
        """Objects nearest to the mean of what each user has taken, as often as they took it, less
        these themselves, and their inner products.
        """
        known = np.unique(seen.values[self._vector[seen.values] >= 0])
        if self._neighbours is None or not len(known):
            return np.empty((len(seen), 0), np.int64), np.empty((len(seen), 0))
        vectors = self._neighbours.vectors(self._vector[known])
        means = seen.matrix(len(self._active))[:, known] @ vectors
        length = np.linalg.norm(means, axis=1, keepdims=True)
        scores, rows = self._neighbours.search(means / np.maximum(length, 1e-12), count)
        objects = np.where(rows >= 0, self._object[rows], NO_OBJECT)
        # Of a user without anything known every object is as near as any other.
        found = (length > 0) & ~seen.holds(objects)
        return np.where(found, objects, NO_OBJECT), scores.astype(np.float64)


class Earlier:
    """The candidates of an earlier day, made by the same release with the same settings.

    Args:
        files: of that partition.
        ds: the day for which users are asked about.
        max_age_days: after which a user is decoded again. So that not all of them are due on one
            night, each has a night of its own in every so many.

    Raises:
        LakeError: a file cannot be read; the message names it.
    """

    def __init__(self, files: Sequence[Path], ds: dt.date, max_age_days: int) -> None:
        self._files = list(files)
        self._bounds = [_user_bounds(path) for path in files]
        self._ds = ds
        self._max_age = max_age_days

    def of(
        self, users: pa.Table, catalogue: Catalogue, seen: Histories, excluded: bool, k: int
    ) -> tuple[Lists, Days]:
        """What can be carried over of users whose prompt says what it said then.

        Objects that stopped, or that a user must not get any more, are left out.

        Returns:
            lists [users, k], and the day on which each user was decoded, datetime64 [users].
        """
        rows, user = self._read(users)
        objects = catalogue.object_rows(rows["ad_id"])
        keep = (objects >= 0) & ~self._due(users)[user]
        keep[keep] &= catalogue.active_objects[objects[keep]]
        # The ad may sell another object today, or the object have another Semantic ID.
        ids = catalogue.objects["semantic_id"].combine_chunks().take(pa.array(objects.clip(0)))
        told = users["prompt_hash"].combine_chunks().take(pa.array(user))
        for column, now in (("semantic_id", ids), ("prompt_hash", told)):
            keep &= pc.equal(rows[column].combine_chunks(), now).to_numpy(zero_copy_only=False)
        if excluded:
            mine = seen.cases * len(catalogue.codes) + seen.values
            keep &= ~np.isin(user * len(catalogue.codes) + objects, mine)
        # Of an object's ads the first one stands for it; what is left moves up.
        kept = np.flatnonzero(keep)
        key = user[kept] * len(catalogue.codes) + objects[kept]
        kept = kept[np.sort(np.unique(key, return_index=True)[1])]
        nth = np.arange(len(kept)) - np.searchsorted(user[kept], user[kept])
        kept, nth = kept[nth < k], nth[nth < k]
        lists, days = _nothing(users.num_rows, k)
        lists.objects[user[kept], nth] = objects[kept]
        lists.scores[user[kept], nth] = rows["score"].to_numpy()[kept]
        sources = pc.index_in(rows["source"], pa.array(SOURCES)).to_numpy()
        lists.sources[user[kept], nth] = sources[kept]
        days[user[kept]] = rows["decoded_on"].to_numpy()[kept]
        return lists, days

    def _read(self, users: pa.Table) -> tuple[pa.Table, Rows]:
        """The rows that a night made for some users, and each row's user; by user and rank."""
        ids, field = users["user_id"].combine_chunks(), pads.field
        bounds = pc.min_max(ids).as_py()
        files = [
            str(path)
            for path, (low, high) in zip(self._files, self._bounds, strict=True)
            if low <= bounds["max"] and high >= bounds["min"]
        ]
        since = self._ds - dt.timedelta(days=self._max_age)
        made = [SOURCES[source] for source in MADE]
        wanted = field("user_id").isin(ids) & field("source").isin(made)
        wanted &= field("decoded_on") >= pa.scalar(since)
        schema = load_contract("candidates").arrow_schema()
        try:
            opened = pads.dataset(files, schema=schema, format="parquet")
            rows = opened.to_table(columns=EARLIER_COLUMNS, filter=wanted).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise LakeError(
                f"{', '.join(files)}: cannot be read ({error}): restore that day's candidates, or"
                " switch inference.incremental off"
            ) from None
        place = pc.index_in(rows["user_id"].combine_chunks(), ids).to_numpy(zero_copy_only=False)
        order = np.lexsort((rows["rank"].to_numpy(), place))
        return rows.take(pa.array(order)), place[order].astype(np.int64)

    def _due(self, users: pa.Table) -> npt.NDArray[np.bool_]:
        """Whose night it is, by a hash of the user's id that is the same everywhere."""
        ids = users["user_id"].to_numpy().astype(object)
        night = pd.util.hash_array(ids, categorize=False) % np.uint64(self._max_age)
        return night == np.uint64(self._ds.toordinal() % self._max_age)


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
        fusion: with its factors, what the model's lists are fused by; None: they stand alone.
        filler: fills lists that are shorter; None: they stay short.
        earlier: what may be carried over; None: everybody is decoded.
    """

    decoder: Decoder
    catalogue: Catalogue
    release: str
    ds: dt.date
    k: int
    exclude_seen: bool = False
    fusion: tuple[Fusion, Factors] | None = None
    filler: Filler | None = None
    earlier: Earlier | None = None

    def candidates(self, users: pa.Table) -> tuple[pa.Table, int]:
        """Rows of the contract `candidates`, and of how many users they were decoded today.

        Args:
            users: `USER_COLUMNS` of the contract `user_prompts`.
        """
        histories = _histories(users, self.catalogue)
        lists, days = _nothing(users.num_rows, self.k)
        if self.earlier is not None and users.num_rows:
            lists, days = self.earlier.of(
                users, self.catalogue, histories, self.exclude_seen, self.k
            )
            if self.filler is None:  # who has lost an object would stay without
                days[(lists.objects < 0).any(axis=1)] = np.datetime64("NaT")
        new = np.flatnonzero(np.isnat(days))
        if len(new):
            prompts = users["prompt"].take(pa.array(new)).to_pylist()
            made = self._make(prompts, _rows_of(histories, new))
            lists.objects[new], lists.scores[new], lists.sources[new] = made
            days[new] = np.datetime64(self.ds)
        if self.filler is not None:
            lists = self.filler.fill(lists, histories, self.exclude_seen)
        return self._rows(users, lists, days), len(new)

    def _make(self, prompts: list[str], histories: Histories) -> Lists:
        """The lists of some users, [users, k]."""
        exclude = np.split(histories.values, histories.offsets[1:-1]) if self.exclude_seen else None
        if self.fusion is None:
            objects, scores = decode_distinct(self.decoder, prompts, self.k, exclude)
            return Lists(objects, scores, np.full(objects.shape, MODEL, np.int8))
        fusion, factors = self.fusion
        written = Written(
            *decode_distinct(self.decoder, prompts, self.decoder.settings.beam, exclude)
        )
        unwanted = histories if self.exclude_seen else None
        objects, scores = fusion.rank(factors, written, histories, self.k, unwanted)
        by_model = (objects[:, :, None] == written.objects[:, None, :]).any(axis=2)
        return Lists(objects, scores, np.where(by_model, MODEL, SIGNALS).astype(np.int8))

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


def _histories(users: pa.Table, catalogue: Catalogue) -> Histories:
    """Object rows that each user clicked or converted on, oldest first."""
    lists = users["history_ad_ids"].combine_chunks()
    rows = catalogue.object_rows(lists.flatten())
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    user, known = np.repeat(np.arange(len(lists)), lengths), rows >= 0
    counts = np.bincount(user[known], minlength=len(lists))
    return Histories(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), rows[known])


def _nothing(users: int, k: int) -> tuple[Lists, Days]:
    """Lists and days of users who have nothing yet."""
    lists = Lists(
        np.full((users, k), NO_OBJECT, np.int64),
        np.full((users, k), -np.inf),
        np.full((users, k), MODEL, np.int8),
    )
    return lists, np.full(users, np.datetime64("NaT"), "datetime64[D]")


def _user_bounds(path: Path) -> tuple[str, str]:
    """Smallest and largest user id of a file of candidates, told by its footer."""
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise LakeError(
            f"{path}: cannot be read ({error}): restore that day's candidates"
        ) from None
    column = footer.schema.to_arrow_schema().get_field_index("user_id")
    groups = [footer.row_group(n).column(column).statistics for n in range(footer.num_row_groups)]
    told = [s for s in groups if s is not None and s.has_min_max]
    if len(told) < len(groups):
        return "", chr(0x10FFFF)
    return min((s.min for s in told), default=""), max((s.max for s in told), default="")


def _rows_of(histories: Histories, cases: Rows) -> Histories:
    """The histories of some cases, which ascend."""
    kept = np.isin(histories.cases, cases)
    counts = np.diff(histories.offsets)[cases]
    return Histories(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), histories.values[kept]
    )
