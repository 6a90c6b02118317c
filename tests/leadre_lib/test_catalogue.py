"""Ads and the marketing objects that they sell: whose text, whose ID, which ads in what order."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from leadre_lib.catalogue import Catalogue, catalogue, marketing_objects
from leadre_lib.errors import LeadreError
from tests.worlds import DAY0, DAY1, ad, rows

SHOP = [
    # two creatives of the shoes, the younger one worth more; a third that nobody has been shown
    {**ad("a3", "Shoes, again"), "marketing_object_id": "shoes", "ecpm": 5.0, "start_date": DAY1},
    {**ad("a1", "Shoes"), "marketing_object_id": "shoes", "ecpm": 2.0},
    {**ad("a2", "Shoes, new", bid=9.0), "marketing_object_id": "shoes", "start_date": DAY1},
    {**ad("a5", "Shoes, cheap", bid=1.0), "marketing_object_id": "shoes", "start_date": DAY1},
    {**ad("a4", "Pan"), "marketing_object_id": "pan", "stop_date": DAY1},
    {**ad("a0", "Hat"), "marketing_object_id": "hat"},
]
OBJECTS = ["hat", "pan", "shoes"]


def semantic_ids(shop: list[dict[str, object]], **replaced: str) -> pa.Table:
    records = []
    for item in shop:
        owner = replaced.get(str(item["ad_id"]), str(item["marketing_object_id"]))
        code = OBJECTS.index(owner)
        records.append(
            {
                "ad_id": item["ad_id"],
                "marketing_object_id": owner,
                "semantic_id": f"<a_{code}><b_0>",
                "codes": [code, 0],
                "text_hash": owner,
                "codebook": "book",
            }
        )
    return rows("ad_semantic_ids", records)


def shop(day: dt.date = DAY1) -> Catalogue:
    ads = rows("ads", [{**item, "text_hash": ""} for item in SHOP])
    return catalogue(ads, semantic_ids(SHOP), day)


def test_an_object_is_told_by_its_first_ad_however_ads_come_and_go() -> None:
    objects = marketing_objects(rows("ads", [{**item, "text_hash": ""} for item in SHOP]))
    assert objects["marketing_object_id"].to_pylist() == OBJECTS
    assert objects["title"].to_pylist() == ["Hat", "Pan", "Shoes"]
    fewer = [{**item, "text_hash": ""} for item in SHOP if item["ad_id"] != "a3"]
    assert marketing_objects(rows("ads", fewer)).equals(objects)


def test_ads_share_the_id_of_their_object() -> None:
    now = shop()
    assert now.object_ids.to_pylist() == OBJECTS
    assert now.codes.tolist() == [[0, 0], [1, 0], [2, 0]]
    assert now.ad_ids.to_pylist() == ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert now.owner.tolist() == [0, 2, 2, 2, 1, 2]
    assert now.objects["encoded_hash"].to_pylist() == OBJECTS
    assert now.object_rows(pa.array(["a3", "nobody", "a4"])).tolist() == [2, -1, 1]


def test_an_object_is_active_with_one_of_its_ads() -> None:
    assert shop().active_objects.tolist() == [True, False, True]
    assert shop(DAY0).active_objects.tolist() == [True, True, True]


def test_an_object_expands_to_its_active_ads_by_ecpm_then_bid() -> None:
    ads, place = shop().expand(np.array([2, 1, 0, 2]))
    names = shop().ad_ids.take(pa.array(ads)).to_pylist()
    assert names == ["a3", "a1", "a2", "a5", "a0", "a3", "a1", "a2", "a5"]
    assert place.tolist() == [0, 0, 0, 0, 2, 3, 3, 3, 3]
    assert shop().best_ads(np.array([2, 0])).tolist() == [3, 0]
    early, _ = shop(DAY0).expand(np.array([2]))
    assert shop().ad_ids.take(pa.array(early)).to_pylist() == ["a1"]
    nothing, where = shop().expand(np.empty(0, np.int64))
    assert len(nothing) == len(where) == 0


def test_an_id_of_another_object_is_refused() -> None:
    ads = rows("ads", [{**item, "text_hash": ""} for item in SHOP])
    with pytest.raises(LeadreError, match="'a3' has the Semantic ID of another marketing object"):
        catalogue(ads, semantic_ids(SHOP, a3="pan"), DAY1)
