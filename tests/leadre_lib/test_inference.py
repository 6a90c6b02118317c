"""Bulk inference: parts are finished once, rows depend neither on kills nor on shards, and every
user gets what is promised."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leadre_lib.candidates import USER_COLUMNS, Earlier, Filler, Retriever, groups_of
from leadre_lib.catalogue import Catalogue, catalogue
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.evaluation import Histories
from leadre_lib.fusion import Factors, Fusion
from leadre_lib.inference import (
    DECODING,
    Part,
    Shard,
    decoding_settings,
    earlier_partition,
    infer_shard,
    parts_folder,
    parts_of,
)
from leadre_lib.lake import Lake, LakeError, Partition
from leadre_lib.model import build_model, build_tokenizer, sid_token_ids, sid_tokens
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import (
    DecodingSettings,
    FusionSettings,
    ModelSettings,
    Settings,
    load_settings,
)
from leadre_lib.signals import Taken, build_signals
from tests.worlds import DAY0, DAY1, ad, rows

SIZES = [4, 4]
USERS = 23
PART = 4
# Objects shoes, pan, socks and knife; two ads sell the shoes, and the knife was stopped.
ADS = [
    ad("a1", "Trail shoes", "sports/running", popularity=5, ecpm=1.0),
    ad("a2", "Iron pan", "home/kitchen", popularity=9),
    ad("a3", "Socks", "sports/running", popularity=1),
    ad("a4", "Knife", "home/kitchen", stop_date=DAY0, popularity=99),
    ad("a5", "Trail shoes, red", "sports/running", popularity=6, ecpm=2.0)
    | {"marketing_object_id": "a1"},
    ad("a6", "Tent", "outdoor"),
]
CODES = {"a1": (0, 0), "a2": (1, 0), "a3": (0, 1), "a4": (1, 1), "a6": (2, 0)}
VECTORS = np.eye(5, dtype=np.float32)
VECTORS[2] = [0.8, 0, 0.6, 0, 0]  # socks are near to shoes


@pytest.fixture(scope="module")
def ads() -> Catalogue:
    return catalogue(rows("ads", [{**a, "text_hash": ""} for a in ADS]), sids(), DAY1)


def sids() -> pa.Table:
    ids = []
    for told in ADS:
        codes = CODES[told["marketing_object_id"]]
        ids.append(
            {
                "ad_id": told["ad_id"],
                "marketing_object_id": told["marketing_object_id"],
                "semantic_id": f"<a_{codes[0]}><b_{codes[1]}>",
                "codes": list(codes),
                "text_hash": "",
                "codebook": "book",
            }
        )
    return rows("ad_semantic_ids", ids)


@pytest.fixture(scope="module")
def decoder(ads: Catalogue) -> BeamDecoder:
    prompts = [f"user {n} likes running" for n in range(USERS)]
    tokenizer = build_tokenizer(prompts, sid_tokens(SIZES), 300)
    sizes = ModelSettings(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    model = build_model(sizes, tokenizer, 1)
    index = ConstraintIndex.build(ads.codes, SIZES, ads.active_objects)
    settings = DecodingSettings(beam=4, top_k=4)
    return BeamDecoder(model, tokenizer, index, sid_token_ids(tokenizer, SIZES), settings, 64)


def users(
    numbers: range = range(USERS), seen: Callable[[int], list[str]] | None = None
) -> pa.Table:
    """Users, every other of whom has bought the shoes."""
    told = seen or (lambda n: ["a1"] if n % 2 else [])
    return pa.table(
        {
            "user_id": [f"u{n:02}" for n in numbers],
            "prompt": [f"user {n} likes running" for n in numbers],
            "prompt_hash": [f"hash {n}" for n in numbers],
            "history_ad_ids": pa.array([told(n) for n in numbers], pa.list_(pa.string())),
        }
    )


def prompts_of(told: pa.Table) -> pa.Table:
    """Rows of the contract `user_prompts`."""
    told = told.append_column("codebook", pa.array(["book"] * told.num_rows))
    return told.append_column("template", pa.array(["en-1"] * told.num_rows))


@pytest.fixture
def retriever(decoder: BeamDecoder, ads: Catalogue) -> Retriever:
    return Retriever(decoder, ads, "r", DAY1, k=2)


@pytest.fixture
def prompts(lake: Lake) -> Partition:
    """Published in two files, the first of them with two row groups."""
    table = prompts_of(users())
    with lake.begin("user_prompts", DAY1) as attempt:
        attempt.write(table.slice(0, 13))
        attempt.write(table.slice(13))
        pq.write_table(pq.read_table(attempt.files[0]), attempt.files[0], row_group_size=10)
        return attempt.commit()


def infer(
    prompts: Partition, retriever: Retriever, folder: Path, shards: int, size: int = PART
) -> pd.DataFrame:
    parts = parts_of(prompts, size)
    for number in range(shards):
        infer_shard(Shard(number, shards).of(parts), retriever, folder, size)
    return pa.concat_tables([pq.read_table(p.path(folder)) for p in parts]).to_pandas()


def test_parts_hold_every_user_once(prompts: Partition) -> None:
    parts = parts_of(prompts, PART)
    assert [part.number for part in parts] == list(range(7))  # 10, 3 and 10 users by fours
    shards = [Shard(n, 3).of(parts) for n in range(3)]
    assert sorted((p for s in shards for p in s), key=lambda p: p.number) == parts
    assert {len(shard) for shard in shards} <= {2, 3}
    assert Shard(5, 9).of(parts[:1]) == []


def test_rows_depend_neither_on_shards_nor_on_a_kill(
    prompts: Partition, retriever: Retriever, tmp_path: Path
) -> None:
    whole = infer(prompts, retriever, tmp_path / "one", 1)
    assert sorted(set(whole["user_id"])) == users()["user_id"].to_pylist()
    assert infer(prompts, retriever, tmp_path / "three", 3).equals(whole)
    other = infer(prompts, retriever, tmp_path / "other", 1, size=9)
    pd.testing.assert_frame_equal(other, whole, check_exact=False, atol=1e-4)
    folder = tmp_path / "one"
    paths = [part.path(folder) for part in parts_of(prompts, PART)]
    for path in paths[3:]:  # as if killed in the fourth part, which was half written
        path.unlink()
    (folder / f".{paths[3].name}.1").write_bytes(b"half")
    kept = [path.stat().st_mtime_ns for path in paths[:3]]
    assert infer(prompts, retriever, folder, 2).equals(whole)
    assert [path.stat().st_mtime_ns for path in paths[:3]] == kept


def test_only_what_is_missing_is_decoded(
    prompts: Partition, retriever: Retriever, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    infer(prompts, retriever, tmp_path, 1)
    parts_of(prompts, PART)[5].path(tmp_path).unlink()
    caplog.set_level(logging.INFO)
    infer(prompts, retriever, tmp_path, 1)
    assert "6 of 7 parts are finished already" in caplog.text
    assert "7 of 7 parts" in caplog.text
    assert "users/s" in caplog.text


def test_a_damaged_file_of_prompts_is_named(
    prompts: Partition, retriever: Retriever, tmp_path: Path
) -> None:
    data = prompts.files[1].read_bytes()
    prompts.files[1].write_bytes(data[:40])
    with pytest.raises(LakeError, match=prompts.files[1].name):
        parts_of(prompts, PART)
    with pytest.raises(LakeError, match="shorter"):
        infer_shard([Part(0, prompts.files[0], 0, 9)], retriever, tmp_path, PART)


def test_an_object_stands_as_its_active_ads_by_ecpm(retriever: Retriever) -> None:
    found = retriever.candidates(users())[0].to_pandas()
    assert "a4" not in set(found["ad_id"])  # stopped
    assert set(found["source"]) == {"model"}
    for _, mine in found.groupby("user_id"):
        assert mine["rank"].tolist() == list(range(1, len(mine) + 1))
        assert mine["semantic_id"].nunique() == 2
        shoes = mine[mine["ad_id"].isin(["a1", "a5"])]
        assert shoes["ad_id"].tolist() in ([], ["a5", "a1"])  # the higher eCPM first
        assert shoes["score"].nunique() <= 1
        assert (mine["score"].diff().fillna(-1.0) <= 0).all()
    assert (found["decoded_on"] == DAY1).all()


def test_the_model_is_filled_up_by_neighbours_and_then_by_popularity(
    retriever: Retriever, ads: Catalogue
) -> None:
    index = EmbeddingIndex.build(VECTORS)
    filler = Filler(ads, index, np.arange(5))
    asked = replace(retriever, k=4, exclude_seen=True, filler=filler)
    asked.decoder.set_active(np.array([False, False, False, False, True]))  # it knows the tent only
    try:
        found = asked.candidates(users(range(2)))[0].to_pandas()
    finally:
        asked.decoder.set_active(ads.active_objects)
    objects = found.drop_duplicates(["user_id", "semantic_id"])
    told = {
        user: list(zip(mine["ad_id"], mine["source"], strict=True))
        for user, mine in objects.groupby("user_id")
    }
    # Nothing seen: by popularity, of which both ads of the shoes make the most; knives are stopped.
    assert told["u00"] == [
        ("a6", "model"),
        ("a5", "popularity"),
        ("a2", "popularity"),
        ("a3", "popularity"),
    ]
    # Shoes are bought already; socks are nearest to them, and then it does not matter.
    assert told["u01"][:2] == [("a6", "model"), ("a3", "neighbours")]
    assert {ad_id for ad_id, _ in told["u01"]} == {"a6", "a3", "a2"}
    again = replace(asked, exclude_seen=False).candidates(users(range(1, 2)))[0].to_pandas()
    assert "neighbours" not in set(
        again[again["ad_id"] == "a1"]["source"]
    )  # nobody's own neighbour
    scores = found.set_index(["user_id", "ad_id"])["score"]
    assert scores["u00", "a2"] == 9.0
    assert scores["u00", "a5"] == scores["u00", "a1"] == 11.0
    assert scores["u01", "a3"] == pytest.approx(0.8)


def test_what_is_fused_says_whether_the_model_wrote_it(
    retriever: Retriever, ads: Catalogue, tmp_path: Path
) -> None:
    # Whoever bought the shoes, object a1, goes on to the tent, which sells as a6.
    walked = Histories.of([ads.object_rows(pa.array(["a1", "a6"])).tolist()] * 5)
    meaning = EmbeddingIndex.build(VECTORS)
    signals = build_signals(ads.texts(), meaning, Taken.at_once(walked), FusionSettings())
    fusion = Fusion(signals, ads.active_objects, FusionSettings())
    asked = replace(retriever, fusion=(fusion, Factors(taken=9.0)))
    asked.decoder.set_active(ads.object_ids.to_numpy(False) == ads.object_ids[0].as_py())
    try:
        made = asked.candidates(users())[0]
    finally:
        asked.decoder.set_active(ads.active_objects)
    found = made.to_pandas()
    first = found[found["rank"] == 1].set_index("user_id")
    bought = [f"u{n:02}" for n in range(1, USERS, 2)]
    assert set(first.loc[bought, "ad_id"]) == {"a6"}
    assert set(first.loc[bought, "source"]) == {"signals"}
    assert set(found["source"]) == {"model", "signals"}
    assert found[found["source"] == "model"]["semantic_id"].nunique() == 1
    assert "a4" not in set(found["ad_id"])  # stopped
    assert (found.groupby("user_id")["semantic_id"].nunique() == 2).all()
    # The next night takes over what was fused, and says where it came from.
    pq.write_table(made, tmp_path / "earlier.parquet")
    earlier = Earlier([tmp_path / "earlier.parquet"], DAY1, 10**5)
    after, decoded = replace(asked, earlier=earlier).candidates(users())
    assert decoded == 0
    assert after.equals(made)


def test_everybody_has_k_as_far_as_there_are_objects(retriever: Retriever, ads: Catalogue) -> None:
    def bought(n: int) -> list[str]:
        return [["a1", "a2"], ["a1", "gone"], ["a2", "a3", "a6", "a1"], []][n % 4]

    asked = replace(retriever, k=3, exclude_seen=True, filler=Filler(ads))
    found = asked.candidates(users(seen=bought))[0].to_pandas()
    counts = found.groupby("user_id")["semantic_id"].nunique()
    for n in range(USERS):
        left = 4 - len({"a1", "a2", "a3", "a6"} & set(bought(n)))
        assert counts.get(f"u{n:02}", 0) == min(3, left)
        mine = set(found[found["user_id"] == f"u{n:02}"]["ad_id"])
        assert not mine & set(bought(n))


def test_unchanged_users_are_carried_over(
    retriever: Retriever, ads: Catalogue, tmp_path: Path
) -> None:
    before, decoded = retriever.candidates(users())
    assert decoded == USERS
    pq.write_table(before, tmp_path / "earlier.parquet")
    changed = users().set_column(
        USER_COLUMNS.index("prompt_hash"),
        "prompt_hash",
        pa.array([f"hash {n}{' anew' if n % 5 == 0 else ''}" for n in range(USERS)]),
    )
    day = DAY1 + dt.timedelta(days=1)
    earlier = Earlier([tmp_path / "earlier.parquet"], day, 10**5)
    after, decoded = replace(retriever, ds=day, earlier=earlier).candidates(changed)
    assert decoded == 5
    told = after.to_pandas()
    assert (told["decoded_on"] == day).equals(
        told["user_id"].isin([f"u{n:02}" for n in range(0, USERS, 5)])
    )
    same = ["user_id", "rank", "ad_id", "semantic_id", "score"]
    pd.testing.assert_frame_equal(
        told[same], before.to_pandas()[same], check_exact=False, atol=1e-4
    )
    # Too old, or of nobody: everybody is decoded.
    old = Earlier([tmp_path / "earlier.parquet"], day + dt.timedelta(days=9), 8)
    assert replace(retriever, ds=day, earlier=old).candidates(users())[1] == USERS
    strangers = users(range(50, 53))
    assert replace(retriever, ds=day, earlier=earlier).candidates(strangers)[1] == 3


def test_what_is_carried_over_is_what_may_be_shown_today(
    retriever: Retriever, ads: Catalogue, tmp_path: Path
) -> None:
    before, _ = retriever.candidates(users())
    pq.write_table(before, tmp_path / "earlier.parquet")
    stopped = [{**a, "text_hash": ""} for a in ADS]
    stopped[0]["stop_date"] = stopped[4]["stop_date"] = DAY1  # both ads of the shoes
    stopped[1] |= {"ecpm": 3.0}
    today = catalogue(rows("ads", stopped), sids(), DAY1 + dt.timedelta(days=1))
    earlier = Earlier([tmp_path / "earlier.parquet"], DAY1, 10**5)
    asked = replace(
        retriever, catalogue=today, earlier=earlier, filler=Filler(today), exclude_seen=True
    )
    found, decoded = asked.candidates(users(seen=lambda n: ["a3"]))
    told = found.to_pandas()
    assert not {"a1", "a3", "a4", "a5"} & set(told["ad_id"])
    was = before.to_pandas()
    left = was[was["ad_id"].isin(["a2", "a6"])].groupby("user_id")["ad_id"].apply(list)
    assert decoded == USERS - len(left)
    for user, kept in left.items():
        mine = told[told["user_id"] == user]
        assert mine["ad_id"].tolist()[: len(kept)] == kept
        assert mine["rank"].tolist() == list(range(1, len(mine) + 1))
        assert set(mine["ad_id"]) == {"a2", "a6"}


def test_only_the_same_release_and_settings_are_carried_over(
    retriever: Retriever, prompts: Partition, lake: Lake, settings: Settings
) -> None:
    day = DAY1 + dt.timedelta(days=1)
    for table, made in (("ads", rows("ads", [])), ("ad_semantic_ids", sids())):
        with lake.begin(table, day) as attempt:
            attempt.write(made)
            attempt.commit()
    with lake.begin("user_prompts", day) as attempt:
        attempt.write(prompts_of(users(range(3))))
        attempt.commit()
    on = load_settings(home=settings.home, inference={"incremental": True})
    lake.reads |= {"champion": "r", DECODING: decoding_settings(on)}
    with lake.begin("candidates", DAY1) as attempt:
        attempt.write(retriever.candidates(users())[0])
        published = attempt.commit()
    assert earlier_partition(on, lake, day, "r") == published
    assert earlier_partition(settings, lake, day, "r") is None  # not asked for
    assert earlier_partition(on, lake, day, "another") is None
    assert earlier_partition(on, lake, DAY1, "r") is None  # of the day itself, not of one before
    other = load_settings(
        home=settings.home, inference={"incremental": True}, decoding={"beam": 64}
    )
    assert earlier_partition(other, lake, day, "r") is None
    alone = load_settings(
        home=settings.home, inference={"incremental": True}, fusion={"enabled": False}
    )
    assert earlier_partition(alone, lake, day, "r") is None
    # Parts of the one never stand for parts of the other.
    folders = {
        parts_folder(told, lake, day, release, earlier)
        for told, release, earlier in (
            (on, "r", published),
            (settings, "r", None),
            (on, "another", None),
            (other, "r", None),
        )
    }
    assert len(folders) == 4


def test_everybody_is_decoded_once_in_so_many_nights(retriever: Retriever, tmp_path: Path) -> None:
    pq.write_table(retriever.candidates(users())[0], tmp_path / "earlier.parquet")
    decoded = []
    for night in range(1, 6):
        day = DAY1 + dt.timedelta(days=night)
        earlier = Earlier([tmp_path / "earlier.parquet"], day, 5)
        found, _ = replace(retriever, ds=day, earlier=earlier).candidates(users())
        told = found.to_pandas()
        decoded.append(set(told[told["decoded_on"] == day]["user_id"]))
    assert set.union(*decoded) == set(users()["user_id"].to_pylist())
    assert sum(map(len, decoded)) == USERS
    assert max(map(len, decoded)) < USERS


def test_an_object_with_another_id_is_not_carried_over(
    retriever: Retriever, ads: Catalogue, tmp_path: Path
) -> None:
    pq.write_table(retriever.candidates(users())[0], tmp_path / "earlier.parquet")
    ids = ads.objects["semantic_id"].to_pylist()
    column = ads.objects.column_names.index("semantic_id")
    other = ads.objects.set_column(column, "semantic_id", pa.array([f"{sid}x" for sid in ids]))
    earlier = Earlier([tmp_path / "earlier.parquet"], DAY1, 10**5)
    asked = replace(retriever, catalogue=replace(ads, objects=other), earlier=earlier)
    assert asked.candidates(users())[1] == USERS
    assert asked.candidates(users(range(0)))[0].num_rows == 0


def test_a_part_reads_only_the_earlier_files_that_hold_its_users(
    retriever: Retriever, tmp_path: Path
) -> None:
    files = []
    for start in range(0, 20, 5):
        files.append(tmp_path / f"{start}.parquet")
        pq.write_table(retriever.candidates(users(range(start, start + 5)))[0], files[-1])
    earlier = Earlier(files, DAY1, 10**5)
    files[0].unlink()
    asked = replace(retriever, earlier=earlier)
    assert asked.candidates(users(range(7, 13)))[1] == 0
    with pytest.raises(LakeError, match=r"0\.parquet.*restore"):
        asked.candidates(users(range(3)))


def test_filling_keeps_to_the_cap_of_a_group(retriever: Retriever, ads: Catalogue) -> None:
    groups = groups_of(ads, "category")
    filler = Filler(ads, EmbeddingIndex.build(VECTORS), np.arange(5), groups, 1)
    asked = replace(retriever, k=4, filler=filler)
    asked.decoder.set_active(np.array([True, False, False, False, False]))  # it knows the shoes
    try:
        found = asked.candidates(users())[0].to_pandas()
    finally:
        asked.decoder.set_active(ads.active_objects)
    category = {told["ad_id"]: told["category"] for told in ADS}
    objects = found.drop_duplicates(["user_id", "semantic_id"])
    counts = objects.groupby(["user_id", objects["ad_id"].map(category)]).size()
    assert counts.max() == 1
    assert (counts.groupby("user_id").size() == 3).all()  # sports, home, outdoor


def test_a_damaged_part_is_made_again(
    prompts: Partition, retriever: Retriever, tmp_path: Path
) -> None:
    whole = infer(prompts, retriever, tmp_path, 1)
    path = parts_of(prompts, PART)[2].path(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    assert infer(prompts, retriever, tmp_path, 1).equals(whole)


def test_damaged_pages_of_prompts_are_named(
    prompts: Partition, retriever: Retriever, tmp_path: Path
) -> None:
    data = bytearray(prompts.files[0].read_bytes())
    data[4:200] = bytes(196)
    prompts.files[0].write_bytes(data)
    with pytest.raises(LakeError, match=prompts.files[0].name):
        infer(prompts, retriever, tmp_path, 1)
