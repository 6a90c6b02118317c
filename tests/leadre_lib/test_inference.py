"""Bulk inference: parts are finished once, and rows depend neither on kills nor on shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leadre_lib.catalogue import Catalogue, catalogue
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.inference import Shard, infer_shard, part_paths
from leadre_lib.model import build_model, build_tokenizer, sid_token_ids, sid_tokens
from leadre_lib.settings import DecodingSettings, ModelSettings, Settings, load_settings
from tests.worlds import ADS, DAY1, rows

SIZES = [4, 2]
USERS = 23


@pytest.fixture(scope="module")
def ads() -> Catalogue:
    ids = [
        {
            "ad_id": ad["ad_id"],
            "marketing_object_id": ad["marketing_object_id"],
            "semantic_id": f"<a_{n}><b_0>",
            "codes": [n, 0],
            "text_hash": "",
            "codebook": "book",
        }
        for n, ad in enumerate(ADS)
    ]
    table = rows("ads", [{**ad, "text_hash": ""} for ad in ADS])
    return catalogue(table, rows("ad_semantic_ids", ids), DAY1)


@pytest.fixture(scope="module")
def decoder(ads: Catalogue) -> BeamDecoder:
    prompts = [f"user {n} likes running" for n in range(USERS)]
    tokenizer = build_tokenizer(prompts, sid_tokens(SIZES), 300)
    sizes = ModelSettings(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    model = build_model(sizes, tokenizer, 1)
    index = ConstraintIndex.build(ads.codes, SIZES, ads.active_objects)
    settings = DecodingSettings(beam=3, top_k=3)
    return BeamDecoder(model, tokenizer, index, sid_token_ids(tokenizer, SIZES), settings, 64)


@pytest.fixture
def small(tmp_path: Path) -> Settings:
    return load_settings(
        home=tmp_path,
        decoding={"beam": 3, "top_k": 3},
        inference={"users_per_part": 4},
        evaluation={"exclude_seen": True},
    )


PROMPTS = pa.table(
    {
        "user_id": [f"u{n:02}" for n in range(USERS)],
        "prompt": [f"user {n} likes running" for n in range(USERS)],
        "seen_ad_ids": pa.array([["a1"] if n % 2 else [] for n in range(USERS)]),
    }
)


def infer(
    decoder: BeamDecoder, ads: Catalogue, settings: Settings, folder: Path, shards: int
) -> pa.Table:
    for number in range(shards):
        infer_shard(PROMPTS, Shard(number, shards), decoder, ads, "r", folder, settings)
    return pa.concat_tables([pq.read_table(p) for p in part_paths(folder, USERS, 4)])


def test_rows_depend_neither_on_shards_nor_on_a_kill(
    decoder: BeamDecoder, ads: Catalogue, small: Settings, tmp_path: Path
) -> None:
    whole = infer(decoder, ads, small, tmp_path / "one", 1)
    assert infer(decoder, ads, small, tmp_path / "three", 3).equals(whole)
    folder = tmp_path / "one"
    parts = part_paths(folder, USERS, 4)
    assert len(parts) == 6
    for part in parts[3:]:  # as if killed in the fourth part, which was half written
        part.unlink()
    (folder / f".{parts[3].name}.1").write_bytes(b"half")
    kept = [part.stat().st_mtime_ns for part in parts[:3]]
    assert infer(decoder, ads, small, folder, 2).equals(whole)
    assert [part.stat().st_mtime_ns for part in parts[:3]] == kept


def test_everyone_gets_active_ads_that_they_have_not_seen(
    decoder: BeamDecoder, ads: Catalogue, small: Settings, tmp_path: Path
) -> None:
    found = infer(decoder, ads, small, tmp_path, 1).to_pandas()
    assert set(found["user_id"]) == set(PROMPTS["user_id"].to_pylist())
    assert "a4" not in set(found["ad_id"])  # stopped
    odd = found[found["user_id"].str[1:].astype(int) % 2 == 1]
    assert set(odd["ad_id"]) == {"a2", "a3"}
    assert (found.groupby("user_id")["rank"].min() == 1).all()
    falls = found.sort_values(["user_id", "rank"]).groupby("user_id")["score"].diff()
    assert (falls.fillna(-1.0) <= 0).all()
    assert np.isfinite(found["score"]).all()
