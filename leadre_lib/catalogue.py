"""The ads of a day and the marketing objects that they sell, as flat arrays: ids, Semantic IDs,
text, and which of them may be shown.

A Semantic ID belongs to a marketing object. An ad sells one object; several ads may sell the same.

Knows nothing of users, of models or of indexes.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.embeddings import ad_text
from leadre_lib.errors import LeadreError

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Catalogue:
    """Ads and objects, each in the order of their ids; a *row* is a position in these arrays.

    `ads` has the columns of the contract `ads`; `active` is bool [ads]; `owner` is the object row
    of each ad [ads]. `objects` has the same columns, of each object's first ad (see
    `marketing_objects`), with `semantic_id` and `encoded_hash`, the hash of the text that it says;
    `codes` is int32 [objects, levels + 1].
    """

    ads: pa.Table
    active: Mask
    owner: Rows
    objects: pa.Table
    codes: npt.NDArray[np.int32]
    codebook: str

    @property
    def ad_ids(self) -> pa.Array:
        """Ad ids, sorted."""
        return self.ads["ad_id"].combine_chunks()

    @property
    def object_ids(self) -> pa.Array:
        """Ids of the marketing objects, sorted."""
        return self.objects["marketing_object_id"].combine_chunks()

    @cached_property
    def active_objects(self) -> Mask:
        """Which objects have an active ad, bool [objects]."""
        return np.bincount(self.owner[self.active], minlength=len(self.codes)) > 0

    def texts(self) -> list[str]:
        """The text of each object, as it is embedded."""
        return object_texts(self.objects)

    def ad_rows(self, ad_ids: pa.Array | pa.ChunkedArray) -> Rows:
        """The row of each ad id; -1 where the catalogue does not have it."""
        found = pc.fill_null(pc.index_in(ad_ids, self.ad_ids), -1)
        if isinstance(found, pa.ChunkedArray):
            found = found.combine_chunks()
        return found.to_numpy(zero_copy_only=False).astype(np.int64)

    def object_rows(self, ad_ids: pa.Array | pa.ChunkedArray) -> Rows:
        """The row of the object that each ad sells; -1 where the catalogue has no such ad."""
        rows = self.ad_rows(ad_ids)
        return np.where(rows >= 0, self.owner[rows], -1)

    @cached_property
    def _shelves(self) -> tuple[Rows, Rows, Rows]:
        """Active ads by object, the best eCPM first; each object's first place, and its number.

        Where ads have no eCPM yet, those come after the others, by bid and then by id.
        """
        worth = [
            pc.fill_null(self.ads[column], -1.0).to_numpy().astype(np.float64)
            for column in ("bid", "ecpm")
        ]
        ads = np.flatnonzero(self.active)
        order = ads[np.lexsort([ads, *(-column[ads] for column in worth), self.owner[ads]])]
        count = np.bincount(self.owner[order], minlength=len(self.codes))
        return order, np.cumsum(count) - count, count

    def best_ads(self, objects: Rows) -> Rows:
        """The active ad of the best eCPM of each object row [n], every one with an active ad."""
        order, first, _ = self._shelves
        return order[first[objects]]

    def expand(self, objects: Rows) -> tuple[Rows, Rows]:
        """The active ads of objects, by eCPM within each.

        Args:
            objects: object rows [n].

        Returns:
            ads, rows [m], those of the first object first; and the place in `objects` of each, [m].
        """
        order, first, counts = self._shelves
        count = counts[objects]
        place = np.repeat(np.arange(len(objects)), count)
        nth = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
        return order[first[objects[place]] + nth], place


def object_texts(objects: pa.Table) -> list[str]:
    """The text of each row's title and description, as it is embedded."""
    titles, descriptions = objects["title"].to_pylist(), objects["description"].to_pylist()
    return [ad_text(t, d) for t, d in zip(titles, descriptions, strict=True)]


def marketing_objects(ads: pa.Table) -> pa.Table:
    """The marketing objects that ads sell, each as its first ad tells it.

    The first ad, by start and then by id, is there before the others, so that an object's text does
    not change as its later ads come and go.

    Args:
        ads: rows of the table `ads` or `raw_ads`.

    Returns:
        The columns of `ads`, one row an object, sorted by `marketing_object_id`.
    """
    keys = ("marketing_object_id", "start_date", "ad_id")
    ordered = ads.sort_by([(key, "ascending") for key in keys])
    owner = ordered["marketing_object_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return ordered.take(pa.array(np.flatnonzero(np.diff(owner, prepend=-1))))


def active_on(ads: pa.Table, day: dt.date) -> Mask:
    """Which ads may be shown on a day, bool [ads]: started, and not stopped yet."""
    started = pc.less_equal(ads["start_date"], pa.scalar(day))
    running = pc.or_(
        pc.is_null(ads["stop_date"]),
        pc.fill_null(pc.greater(ads["stop_date"], pa.scalar(day)), False),
    )
    return pc.and_(started, running).combine_chunks().to_numpy(zero_copy_only=False)


def catalogue(ads: pa.Table, semantic_ids: pa.Table, day: dt.date) -> Catalogue:
    """Join ads with the Semantic IDs of their objects; active are those to be shown on `day`.

    Args:
        ads: rows of the table `ads`.
        semantic_ids: rows of the table `ad_semantic_ids`; may know more ads.

    Raises:
        LeadreError: an ad has no Semantic ID, its ID is another object's, IDs of two codebooks are
            mixed, or no ad is active.
    """
    ads = ads.sort_by("ad_id")
    place = pc.index_in(ads["ad_id"], semantic_ids["ad_id"].combine_chunks())
    if place.null_count:
        missing = ads["ad_id"].filter(pc.is_null(place))[0].as_py()
        raise LeadreError(f"ad {missing!r} has no Semantic ID: run the job semantic_ids first")
    ids = semantic_ids.take(place)
    codebooks = pc.unique(ids["codebook"]).to_pylist()
    if len(codebooks) != 1:
        raise LeadreError(f"Semantic IDs of codebooks {codebooks} are mixed in one day")
    strangers = pc.not_equal(ads["marketing_object_id"], ids["marketing_object_id"])
    if pc.any(strangers).as_py():
        stranger = ads["ad_id"].filter(strangers)[0].as_py()
        raise LeadreError(
            f"ad {stranger!r} has the Semantic ID of another marketing object: run the job"
            " semantic_ids again"
        )
    objects = marketing_objects(ads)
    owner = pc.index_in(ads["marketing_object_id"], objects["marketing_object_id"].combine_chunks())
    ids = ids.take(pc.index_in(objects["ad_id"], ads["ad_id"].combine_chunks()))
    width = len(ids["codes"][0])
    codes = ids["codes"].combine_chunks().flatten().to_numpy().astype(np.int32)
    result = Catalogue(
        ads,
        active_on(ads, day),
        owner.combine_chunks().to_numpy().astype(np.int64),
        objects.append_column("semantic_id", ids["semantic_id"]).append_column(
            "encoded_hash", ids["text_hash"]
        ),
        codes.reshape(-1, width),
        codebooks[0],
    )
    if not result.active.any():
        raise LeadreError(f"no ad is active on {day}: check start_date and stop_date in `raw_ads`")
    return result
