"""The index rebuild: new and stopped ads without training, a refresh of the codebook, and that
whatever goes wrong, the release that served before goes on serving; and in which words the champion
is asked.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs import curate, index_rebuild, infer, promote, release, semantic_ids, sft
from jobs.evaluate import taken_before
from leadre_lib.catalogue import Catalogue, catalogue
from leadre_lib.constraint_index import ConstraintIndex, ConstraintIndexError
from leadre_lib.decoding import BeamDecoder
from leadre_lib.errors import LeadreError
from leadre_lib.facts import write_json
from leadre_lib.generation import open_decoder, sid_sizes
from leadre_lib.indexes import (
    CONSTRAINT,
    MOVED,
    NEIGHBOURS,
    OBJECTS,
    build_indexes,
    check_indexes,
    open_constraint,
    open_neighbours,
    open_signals,
)
from leadre_lib.lake import Lake
from leadre_lib.model import build_model, build_tokenizer, load, save, sid_tokens
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Release, ReleaseError, Releases
from leadre_lib.settings import REPOSITORY, FusionSettings, Settings, load_settings
from tests.worlds import DAY0, ad, at, land, rows

THINGS = ("shoes", "socks", "racket", "helmet", "tent", "pan", "knife", "kettle", "lamp", "rug")
COLOURS = ("red", "blue", "green", "black", "white")
NEXT = DAY0 + dt.timedelta(days=1)
OPTIONS = {
    "semantic_ids": {"codes": 8, "levels": 2, "method": "rq-kmeans-balanced"},
    "embedding": {"max_tokens": 16},
    "model": {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "vocabulary": 400},
    "decoding": {"beam": 16, "top_k": 10},
}
ENVIRONMENT = {
    "LEADRE_SEMANTIC_IDS__CODES": "8",
    "LEADRE_SEMANTIC_IDS__LEVELS": "2",
    "LEADRE_SEMANTIC_IDS__METHOD": "rq-kmeans-balanced",
    "LEADRE_EMBEDDING__MAX_TOKENS": "16",
    "LEADRE_DECODING__BEAM": "16",
    "LEADRE_DECODING__TOP_K": "10",
}


def shop() -> list[dict[str, Any]]:
    """Two ads of each of fifty products."""
    return [
        ad(
            f"{thing}-{colour}-{nth}",
            f"{colour} {thing}{more}",
            marketing_object_id=f"{colour} {thing}",
        )
        for thing in THINGS
        for colour in COLOURS
        for nth, more in enumerate(("", ", today only"))
    ]


def args(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"ds": DAY0, "keep": False, "refresh": False, **more})


def settings_of(home: Path) -> Settings:
    return load_settings(home=home, **OPTIONS)


def now_of(settings: Settings) -> Catalogue:
    lake = Lake(settings.lake)
    return catalogue(lake.read("ads", DAY0), lake.read("ad_semantic_ids", DAY0), NEXT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a day's tables and a champion whose model knows nothing yet."""
    home = tmp_path_factory.mktemp("rebuild") / "home"
    settings = settings_of(home)
    land(Lake(settings.lake), DAY0, raw_ads=shop(), raw_ad_events=[])
    curate.run(args(), settings)
    semantic_ids.run(args(), settings)
    now = now_of(settings)
    sizes = sid_sizes(Codebook.load(settings.codebooks / now.codebook).sizes, settings)
    tokenizer = build_tokenizer(now.texts(), sid_tokens(sizes), settings.model.vocabulary)
    model = build_model(settings.model, tokenizer, 1)
    save(model, tokenizer, settings.work(DAY0) / "model")
    taken = taken_before(settings, Lake(settings.lake), now, DAY0).taken()
    parts = build_indexes(now, sizes, taken, settings, settings.work(DAY0) / "indexes")
    parts |= {"codebook": settings.codebooks / now.codebook, "model": settings.work(DAY0) / "model"}
    told = {"versions": {"codebook": now.codebook, "template": "en-1"}, "metrics": {}}
    told["fusion"] = {"model": 1.0}
    told["fusion_settings"] = FusionSettings(half_life_days=0.5).model_dump()
    releases = Releases(settings.releases)
    releases.promote(DAY0, releases.build(DAY0, parts, told).id, "made by hand")
    return home


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    """The world above, to be changed at will."""
    shutil.copytree(base, tmp_path / "home")
    return settings_of(tmp_path / "home")


def champion(settings: Settings) -> Release:
    found = Releases(settings.releases).champion()
    assert found is not None
    return found


def relaunch(settings: Settings, change: list[dict[str, Any]]) -> None:
    """Land the day's ads again."""
    with Lake(settings.lake).begin("raw_ads", DAY0) as attempt:
        attempt.write(rows("raw_ads", change))
        attempt.commit()


def changed_shop() -> list[dict[str, Any]]:
    """One product without ads from tomorrow on, one with one ad less, and a new one."""
    ads = shop()
    for item in ads[:3]:
        item["stop_date"] = NEXT
    return [*ads, ad("new-0", "folding chair", marketing_object_id="chair", bid=3.0)]


def test_new_and_stopped_ads_get_in_without_training(settings: Settings) -> None:
    before, parent = now_of(settings), champion(settings)
    relaunch(settings, changed_shop())
    index_rebuild.run(args(), settings)
    child, now = champion(settings), now_of(settings)
    assert child.id != parent.id
    assert child.manifest["parents"]["release"] == parent.id
    assert child.codebook == parent.codebook
    assert child.template == parent.template == "en-1"
    weights = "model/model.safetensors"
    assert child.manifest["files"][weights] == parent.manifest["files"][weights]
    assert len(now.codes) == len(before.codes) + 1
    assert int(now.active_objects.sum()) == 50  # one gone, one new
    same = now.object_rows(before.ads["ad_id"])
    np.testing.assert_array_equal(now.codes[same], before.codes[before.owner])
    sizes = sid_sizes(Codebook.load(child.folder / "codebook").sizes, settings)
    # A release that does not know the new object yet does not keep it from being written.
    assert open_constraint(parent, now, sizes).lead(now.codes).max() == 50
    index_rebuild.run(args(), settings)
    assert champion(settings).id == child.id  # nothing to do, nothing done


def decoded(decoder: BeamDecoder, now: Catalogue) -> set[str]:
    found, _ = decoder.decode([f"prompt {n}" for n in range(40)], 10)
    return set(now.object_ids.take(pa.array(np.unique(found[found >= 0]))).to_pylist())


def test_a_stopped_ad_takes_effect_on_a_release_that_is_not_rebuilt(settings: Settings) -> None:
    serving, now = champion(settings), now_of(settings)
    sizes = sid_sizes(Codebook.load(serving.folder / "codebook").sizes, settings)
    index = open_constraint(serving, now, sizes)
    decoder = open_decoder(serving.model, index, settings)
    first = sorted(decoded(decoder, now))[0]
    ads = now.ads.to_pylist()
    for item in ads:
        if item["marketing_object_id"] == first:
            item["stop_date"] = NEXT
    table = pa.Table.from_pylist(ads, now.ads.schema)
    later = catalogue(table, Lake(settings.lake).read("ad_semantic_ids", DAY0), NEXT)
    decoder.set_active(later.active_objects)
    assert first not in decoded(decoder, later)
    again = open_constraint(serving, later, sizes)
    assert np.array_equal(again.active, later.active_objects)
    other = index.with_active(later.active_objects)
    assert all(np.shares_memory(a, b) for a, b in zip(index.labels, other.labels, strict=True))


def test_a_refresh_moves_the_model_along_and_lists_who_moved(settings: Settings) -> None:
    before, parent = now_of(settings), champion(settings)
    ads = shop()
    for item in ads:  # some products are something else now
        if item["marketing_object_id"].endswith("rug"):
            item["title"] = f"espresso machine, {item['ad_id']}"
    relaunch(settings, ads)
    index_rebuild.run(args(refresh=True), settings)
    child, now = champion(settings), now_of(settings)
    assert child.codebook != parent.codebook
    assert child.codebook == now.codebook
    assert Codebook.load(child.folder / "codebook").config["refreshed_from"] == parent.codebook
    moved = pq.read_table(child.folder / MOVED)
    names = now.object_ids.to_pylist()
    assert names == before.object_ids.to_pylist()
    other = (now.codes != before.codes).any(axis=1)
    assert sorted(moved["marketing_object_id"].to_pylist()) == [
        name for name, is_other in zip(names, other, strict=True) if is_other
    ]
    kept = child.manifest["refresh"]
    assert kept["unchanged"] == 45
    assert kept["kept"] >= 0.95
    unchanged_moved = moved.filter(pc.invert(moved["text_changed"]))
    assert kept["kept"] == 1 - len(unchanged_moved) / 45
    old, new = load(parent.model)[0], load(child.model)[0]
    old_vectors, new_vectors = (m.get_input_embeddings().weight.detach() for m in (old, new))
    assert not old_vectors.equal(new_vectors)  # the codes of what changed follow their objects
    text_tokens = slice(0, 300)
    assert old_vectors[text_tokens].equal(new_vectors[text_tokens])
    index_rebuild.run(args(), settings)
    assert champion(settings).id == child.id  # with the list of who moved


def test_a_day_that_is_run_again_takes_its_refresh_back(settings: Settings) -> None:
    parent = champion(settings)
    index_rebuild.run(args(refresh=True), settings)
    child = champion(settings)
    assert child.codebook != parent.codebook
    with pytest.raises(LeadreError, match=rf"but `ad_semantic_ids` .* {child.codebook}: restore"):
        promote.run(argparse.Namespace(ds=DAY0, release=parent.id), settings)
    # The first day has none before it, so its IDs are made anew, in the words of the parent.
    semantic_ids.run(args(), settings)
    assert now_of(settings).codebook == parent.codebook
    assert champion(settings).id == parent.id
    promote.run(argparse.Namespace(ds=DAY0, release=parent.id), settings)


def test_signals_are_counted_anew_and_as_the_factors_know_them(settings: Settings) -> None:
    clicks = [("lamp", 1, 12), ("lamp", 0, 0), ("rug", 0, 12)]
    lake = Lake(settings.lake)
    for back in (1, 0):
        day = DAY0 - dt.timedelta(days=back)
        records = [
            {
                "event_id": f"e{back}{hour}",
                "user_id": f"u{back}{hour}",
                "event_time": at(day, hour),
                "domain": "ad",
                "event_type": "click",
                "item_id": f"{thing}-red-0",
            }
            for thing, ago, hour in clicks
            if ago == back
        ]
        with lake.begin("behaviours", day) as attempt:
            attempt.write(rows("behaviours", records))
            attempt.commit()
    index_rebuild.run(args(), settings)
    child = champion(settings)
    assert child.manifest["fusion_settings"]["half_life_days"] == 0.5
    now = now_of(settings)
    signals = open_signals(child, now, *open_neighbours(child, now))
    assert signals is not None
    takers = dict(zip(now.object_ids.to_pylist(), signals.takers.tolist(), strict=True))
    # Two users: one a day and one half a day before the newest click.
    assert takers["red lamp"] == pytest.approx(0.25 + 0.5)
    assert takers["red rug"] == 1.0
    assert sum(takers.values()) == pytest.approx(1.75)
    # Without a word on them in the manifest, today's hold.
    assert settings.with_fusion_of(None) == settings


def test_a_model_from_before_a_refresh_makes_no_release(settings: Settings) -> None:
    work, parent = settings.work(DAY0), champion(settings)
    verdict = {"challenger": "sft", "champion": None, "valid": {}, "codebook": parent.codebook}
    verdict |= {"template": "zh-1", "fusion": {"model": 2.0}}
    write_json(work / "evaluation.json", verdict)
    shutil.copytree(parent.model, work / "sft" / "model")
    release.run(args(), settings)
    made = json.loads((work / "release.json").read_text())["release"]
    assert Releases(settings.releases).open(made).template == "zh-1"
    assert Releases(settings.releases).open(made).manifest["fusion"] == {"model": 2.0}
    index_rebuild.run(args(refresh=True), settings)
    with pytest.raises(LeadreError, match="it was refreshed since"):
        release.run(args(), settings)


class Killed(BaseException):
    """What stands for a kill at a known moment."""


def test_a_refresh_killed_before_its_promotion_is_gone_on_with(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = champion(settings)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Releases, "promote", kill)
        with pytest.raises(Killed):
            index_rebuild.run(args(refresh=True), settings)
    assert champion(settings).id == parent.id
    assert now_of(settings).codebook != parent.codebook  # published, and nobody serves it yet
    relaunch(settings, changed_shop())
    index_rebuild.run(args(), settings)
    assert "going on with the refresh" in capsys.readouterr().out
    child = champion(settings)
    assert child.codebook == now_of(settings).codebook
    assert child.manifest["parents"] == {"release": parent.id, "codebook": parent.codebook}


def test_a_killed_rebuild_leaves_the_old_release_and_the_next_run_finishes(
    settings: Settings,
) -> None:
    parent = champion(settings)
    relaunch(settings, changed_shop())
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.index_rebuild", "--ds", str(DAY0)],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT, "LEADRE_HOME": str(settings.home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    written = settings.work(DAY0) / "index_rebuild" / Path(OBJECTS).name
    while not written.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert champion(settings).id == parent.id
    index_rebuild.run(args(), settings)
    child = champion(settings)
    assert child.manifest["parents"]["release"] == parent.id
    assert int(ConstraintIndex.load(child.folder / CONSTRAINT).active.sum()) == 50


@pytest.mark.parametrize("name", [OBJECTS, CONSTRAINT, NEIGHBOURS, "codebook/codebook.safetensors"])
def test_a_truncated_file_is_named_and_nothing_is_promoted(settings: Settings, name: str) -> None:
    path = champion(settings).folder / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ReleaseError, match=f"{Path(name).name}: differs from the manifest"):
        index_rebuild.run(args(), settings)


def test_a_failed_validation_leaves_the_old_release_serving(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = champion(settings)
    relaunch(settings, changed_shop())
    real = ConstraintIndex.build

    def short(codes: np.ndarray, sizes: list[int], active: np.ndarray, **more: Any) -> Any:
        return real(codes, sizes, active & (np.arange(len(active)) != 7), **more)

    with monkeypatch.context() as patch:
        patch.setattr(ConstraintIndex, "build", short)
        with pytest.raises(ReleaseError, match="49 of 51 objects active"):
            index_rebuild.run(args(), settings)
    assert champion(settings).id == parent.id


def rebuilt_with(settings: Settings, name: str, file: Path) -> None:
    """Check a release that is the champion but for one file."""
    parent, now = champion(settings), now_of(settings)
    names = (OBJECTS, "semantic_ids/ads.parquet", CONSTRAINT, NEIGHBOURS, "codebook", "model")
    parts = {part: parent.folder / part for part in names} | {name: file}
    told = {"versions": {"codebook": parent.codebook}, "metrics": {}}
    mixed = Releases(settings.releases).build(DAY0, parts, told)
    sizes = sid_sizes(Codebook.load(parent.folder / "codebook").sizes, settings)
    check_indexes(mixed, now, sizes)


def test_parts_of_another_codebook_are_refused(settings: Settings, tmp_path: Path) -> None:
    now = now_of(settings)
    sizes = [8, 8, settings.semantic_ids.collision_codes]
    rebuilt_with(settings, CONSTRAINT, champion(settings).folder / CONSTRAINT)
    foreign = tmp_path / "constraint.safetensors"
    index = ConstraintIndex.build(now.codes, sizes, now.active_objects, codebook="another")
    index.save(foreign)
    with pytest.raises(
        ReleaseError, match=r"constraint\.safetensors was made with codebook another"
    ):
        rebuilt_with(settings, CONSTRAINT, foreign)
    objects = pq.read_table(champion(settings).folder / OBJECTS)
    other = pa.array(["another"] * len(objects))
    column = objects.column_names.index("codebook")
    pq.write_table(objects.set_column(column, "codebook", other), tmp_path / "objects.parquet")
    with pytest.raises(ReleaseError, match=r"objects\.parquet was made with codebook another"):
        rebuilt_with(settings, OBJECTS, tmp_path / "objects.parquet")
    swapped = ConstraintIndex.build(
        now.codes[::-1], sizes, now.active_objects[::-1], codebook=now.codebook
    )
    swapped.save(tmp_path / "swapped.safetensors")
    with pytest.raises(ReleaseError, match="does not lead to its object"):
        rebuilt_with(settings, CONSTRAINT, tmp_path / "swapped.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(foreign.read_bytes()[:-9])
    with pytest.raises(ConstraintIndexError, match=r"constraint\.safetensors"):
        rebuilt_with(settings, CONSTRAINT, tmp_path / "torn.safetensors")


def test_a_model_without_the_tokens_is_refused(settings: Settings, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["words"], sid_tokens([8, 8]), 300)
    save(build_model(settings.model, tokenizer, 1), tokenizer, tmp_path / "model")
    with pytest.raises(ReleaseError, match=r"cannot write every Semantic ID.*<c_0>"):
        rebuilt_with(settings, "model", tmp_path / "model")


def test_ids_of_a_foreign_codebook_are_no_refresh(settings: Settings) -> None:
    lake = Lake(settings.lake)
    table = lake.read("ad_semantic_ids", DAY0)
    book = Codebook.load(settings.codebooks / table["codebook"][0].as_py())
    foreign = Codebook({**book.config, "refreshed_from": "nowhere"}, book.weights)
    foreign.save(settings.codebooks / foreign.version)
    column = table.column_names.index("codebook")
    with lake.begin("ad_semantic_ids", DAY0) as attempt:
        versions = pa.array([foreign.version] * len(table))
        attempt.write(table.set_column(column, "codebook", versions))
        attempt.commit()
    with pytest.raises(LeadreError, match=f"but release .* speaks {book.version}"):
        index_rebuild.run(args(), settings)


def publish(settings: Settings, table: str, ds: dt.date, record: dict[str, Any]) -> None:
    with Lake(settings.lake).begin(table, ds) as attempt:
        attempt.write(rows(table, [record]))
        attempt.commit()


def prompt_of(settings: Settings, template: str) -> dict[str, Any]:
    """A row of `user_prompts`."""
    words = {"prompt": "What next?", "prompt_hash": "0" * 64, "template": template}
    book = champion(settings).codebook
    return {"user_id": "u1", "history_ad_ids": [], "codebook": book, **words}


def test_the_champion_is_asked_in_no_other_words(settings: Settings) -> None:
    asked = argparse.Namespace(ds=DAY0, shard=0, shards=1)
    publish(settings, "user_prompts", DAY0, prompt_of(settings, "zh-1"))
    told = rf"`user_prompts` of ds={DAY0} was written with template zh-1, .* with en-1: set prompt"
    with pytest.raises(ReleaseError, match=told):
        infer.run(asked, settings)
    publish(settings, "user_prompts", DAY0, prompt_of(settings, "en-1"))
    infer.run(asked, settings)
    assert list((settings.work(DAY0) / "infer").glob("*/part-*.parquet"))


def test_training_goes_on_in_other_words_with_a_warning(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    unready = settings.model_copy(
        update={"sft": settings.sft.model_copy(update={"deepspeed": "none.json"})}
    )
    example = {
        "example_id": "e",
        "task": "next_ad",
        "prompt": "What next?",
        "response": "<a_0><b_0><c_0>",
        "weight": 1.0,
        "ad_id": "rug-red-0",
        "codebook": champion(settings).codebook,
    }
    land(Lake(settings.lake), NEXT, raw_ads=shop(), raw_ad_events=[])
    curate.run(args(ds=NEXT), settings)
    semantic_ids.run(args(ds=NEXT), settings)
    caplog.set_level(logging.WARNING)
    for template, warned in (("en-1", False), ("zh-1", True)):
        publish(settings, "sft_examples", NEXT, {**example, "template": template})
        with pytest.raises(LeadreError, match=r"none\.json"):  # all is prepared, nothing started
            sft.run(args(ds=NEXT), unready)
        assert ("were trained with template en-1, on prompts of zh-1" in caplog.text) == warned
