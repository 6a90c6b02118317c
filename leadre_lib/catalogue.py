"""The ads of a day as flat arrays: ids, Semantic IDs, text, and which of them may be shown.

Knows nothing of users, of models or of indexes.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.embeddings import ad_text
from leadre_lib.errors import LeadreError


@dataclass(frozen=True)
class Catalogue:
    """Ads in the order of their ids; a *row* is a position in these arrays.

    `ads` has the columns of the contract `ads` and `semantic_id`; `codes` is int32
    [ads, levels + 1]; `active` is bool [ads].
    """

    ads: pa.Table
    codes: npt.NDArray[np.int32]
    active: npt.NDArray[np.bool_]
    codebook: str

    @property
    def ids(self) -> pa.Array:
        """Ad ids, sorted."""
        return self.ads["ad_id"].combine_chunks()

    def texts(self) -> list[str]:
        """The text of each ad, as it is embedded."""
        titles, descriptions = self.ads["title"].to_pylist(), self.ads["description"].to_pylist()
        return [ad_text(t, d) for t, d in zip(titles, descriptions, strict=True)]

    def rows(self, ad_ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """The row of each ad id; -1 where the catalogue does not have it."""
        found = pc.fill_null(pc.index_in(ad_ids, self.ids), -1)
        if isinstance(found, pa.ChunkedArray):
            found = found.combine_chunks()
        return found.to_numpy(zero_copy_only=False).astype(np.int64)

    def active_rows(self) -> npt.NDArray[np.int64]:
        """Rows of the ads that may be shown."""
        return np.flatnonzero(self.active)


def marketing_objects(ads: pa.Table) -> pa.Table:
    """The marketing objects that ads sell, each as its first ad tells it.

    The first ad, by start and then by id, is there before the others and stays in the snapshot, so
    that an object's text does not change as its ads come and go.

    Args:
        ads: rows of the table `ads` or `raw_ads`.

    Returns:
        The columns of `ads`, one row an object, sorted by `marketing_object_id`.
    """
    keys = ("marketing_object_id", "start_date", "ad_id")
    ordered = ads.sort_by([(key, "ascending") for key in keys])
    owner = ordered["marketing_object_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return ordered.take(pa.array(np.flatnonzero(np.diff(owner, prepend=-1))))


def catalogue(ads: pa.Table, semantic_ids: pa.Table, day: dt.date) -> Catalogue:
    """Join ads with their Semantic IDs; active are those that may be shown on `day`.

    Args:
        ads: rows of the table `ads`.
        semantic_ids: rows of the table `ad_semantic_ids`; may know more ads.

    Raises:
        LeadreError: an ad has no Semantic ID, IDs of two codebooks are mixed, or none is active.
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
    width = len(ids["codes"][0])
    codes = ids["codes"].combine_chunks().flatten().to_numpy().astype(np.int32)
    started = pc.less_equal(ads["start_date"], pa.scalar(day))
    open_ended = pc.is_null(ads["stop_date"])
    running = pc.fill_null(pc.greater(ads["stop_date"], pa.scalar(day)), False)
    active = pc.and_(started, pc.or_(open_ended, running))
    result = Catalogue(
        ads.append_column("semantic_id", ids["semantic_id"]),
        codes.reshape(-1, width),
        active.combine_chunks().to_numpy(zero_copy_only=False),
        codebooks[0],
    )
    if not result.active.any():
        raise LeadreError(f"no ad is active on {day}: check start_date and stop_date in `raw_ads`")
    return result
