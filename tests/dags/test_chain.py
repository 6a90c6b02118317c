"""The daily chain over a tiny simulated world through Airflow's `dag.test()`: the initial load and
one day, with real Spark, embeddings, DeepSpeed ranks and Delta tables; then what a day leaves.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from leadre_lib import facts
from leadre_lib.catalogue import catalogue
from leadre_lib.lake import Lake
from leadre_lib.online_store import OnlineStore
from leadre_lib.release import Releases
from leadre_lib.report import results_table
from leadre_lib.settings import REPOSITORY, Settings, load_settings
from tests.worlds import rows

TINY = {
    "SIMULATOR__USERS": "60",
    "SIMULATOR__ADS": "60",
    "SIMULATOR__NEW_ADS_PER_DAY": "3",
    "SIMULATOR__HISTORY_DAYS": "3",
    "QUALITY__MAX_UNKNOWN_REFERENCE_RATE": "0.1",
    "QUALITY__MAX_COLLISION_RATE": "1",
    "SEMANTIC_IDS__CODES": "8",
    "SEMANTIC_IDS__LEVELS": "2",
    "SEMANTIC_IDS__EPOCHS": "8",
    "EMBEDDING__MAX_TOKENS": "16",
    "MODEL__HIDDEN_SIZE": "32",
    "MODEL__LAYERS": "1",
    "MODEL__INTERMEDIATE_SIZE": "32",
    "MODEL__VOCABULARY": "400",
    "SFT__MAX_STEPS": "6",
    "SFT__BATCH_SIZE": "4",
    "SFT__CHECKPOINT_STEPS": "2",
    "DPO__MAX_STEPS": "2",
    "DPO__BATCH_SIZE": "4",
    "DECODING__BEAM": "12",
    "DECODING__TOP_K": "10",
    "INFERENCE__USERS_PER_PART": "16",
    "CHAIN__RETRIES": "0",
}


def job(name: str, ds: dt.date, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a job as a user would."""
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", "--ds", str(ds), *more],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def airflow_day(ds: dt.date) -> dict[str, str]:
    """One day through `dag.test()` with a fresh DagBag; the state of each task."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(REPOSITORY / "dags"))
    assert not bag.import_errors
    run = bag.dags["leadre_daily"].test(run_conf={"ds": ds.isoformat()})
    states = {ti.task_id: str(ti.state) for ti in run.get_task_instances()}
    assert str(run.state) == "success", states
    return states


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A home in which the initial load and the day after it have run."""
    home = tmp_path_factory.mktemp("chain")
    patch = pytest.MonkeyPatch()
    patch.setenv("LEADRE_HOME", str(home))
    patch.setenv("PYTHONPATH", str(REPOSITORY))
    for name, value in TINY.items():
        patch.setenv(f"LEADRE_{name}", value)
    settings = load_settings()
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, cwd=home)
    first = settings.simulator.first_ds
    for ds in (first, first + dt.timedelta(days=1)):
        assert job("land", ds).returncode == 0
        states = airflow_day(ds)
        (home / f"states-{ds}.json").write_text(json.dumps(states))
    yield settings
    patch.undo()


@pytest.fixture
def day(world: Settings) -> dt.date:
    """The day after the initial load."""
    return world.simulator.first_ds + dt.timedelta(days=1)


def test_the_initial_load_trains_nothing_and_the_next_day_everything(
    world: Settings, day: dt.date
) -> None:
    first, second = (
        json.loads((world.home / f"states-{ds}.json").read_text())
        for ds in (day - dt.timedelta(days=1), day)
    )
    trained = {"sft", "dpo", "evaluate", "release", "promote", "infer", "publish"}
    assert {name for name, state in first.items() if state == "skipped"} >= trained
    assert {name for name, state in second.items() if state != "success"} <= {"watcher"}


def test_candidates_are_active_ads_of_every_active_user(world: Settings, day: dt.date) -> None:
    lake = Lake(world.lake)
    found = lake.read("candidates", day)
    ads = catalogue(
        lake.read("ads", day), lake.read("ad_semantic_ids", day), day + dt.timedelta(days=1)
    )
    assert ads.active[ads.ad_rows(found["ad_id"])].all()
    assert set(found["user_id"].to_pylist()) == set(
        lake.read("user_prompts", day)["user_id"].to_pylist()
    )
    assert ads.active_objects[ads.object_rows(found["ad_id"])].all()
    champion = Releases(world.releases).champion()
    assert champion is not None
    assert pc.unique(found["release"]).to_pylist() == [champion.id]
    store = OnlineStore(world.online_store)
    assert store.served() == day
    user = found["user_id"][0].as_py()
    mine = found.filter(pc.equal(found["user_id"], user)).sort_by("rank")
    assert [c["ad_id"] for c in store.candidates(user)] == mine["ad_id"].to_pylist()
    # Ten objects, each with all of its active ads.
    sids = mine["semantic_id"].to_pylist()
    assert len(set(sids)) == 10
    sold = ads.active & np.isin(ads.owner, ads.object_rows(mine["ad_id"]))
    assert len(mine) == int(sold.sum())


def test_metrics_are_the_means_of_the_ranks_of_cases(world: Settings, day: dt.date) -> None:
    lake = Lake(world.lake)
    ranks, cases = lake.read("case_ranks", day), lake.read("eval_examples", day)
    asked = dict(zip(cases["case_id"].to_pylist(), cases["user_id"].to_pylist(), strict=True))
    rows = lake.read("metrics", day).filter(pc.equal(lake.read("metrics", day)["metric"], "HR@10"))
    for row in rows.to_pylist():
        mine = ranks.filter(
            pc.and_(
                pc.equal(ranks["method"], row["method"]), pc.equal(ranks["split"], row["split"])
            )
        )
        assert len(mine) == row["cases"]
        hits = pc.less_equal(pc.fill_null(mine["rank"], np.inf), 10)
        assert pc.mean(hits.cast("float64")).as_py() == pytest.approx(row["value"])
    found = zip(ranks["case_id"].to_pylist(), ranks["user_id"].to_pylist(), strict=True)
    assert set(found) == set(asked.items())


def test_objects_keep_their_ids_and_no_two_share_one(world: Settings, day: dt.date) -> None:
    lake = Lake(world.lake)
    before = lake.read("ad_semantic_ids", day - dt.timedelta(days=1)).to_pylist()
    after = {r["ad_id"]: r for r in lake.read("ad_semantic_ids", day).to_pylist()}
    assert len(after) > len(before)
    assert all(after[row["ad_id"]]["semantic_id"] == row["semantic_id"] for row in before)
    pairs = {(r["marketing_object_id"], r["semantic_id"]) for r in after.values()}
    assert len(pairs) == len({owner for owner, _ in pairs}) == len({sid for _, sid in pairs})
    assert len(pairs) < len(after)  # some objects have several ads


def test_the_report_tells_the_day(world: Settings, day: dt.date) -> None:
    page = (world.reports(day) / "index.html").read_text()
    for told in ("item-knn", "was promoted", "<svg", "user_prompts", "data_docs", "simulat"):
        assert told in page
    assert (world.data_docs / "index.html").exists()
    methods = [row["method"] for row in results_table(world, day)]
    assert methods[0] == "leadre"
    assert {"popularity", "item-knn", "nearest-titles", "sasrec"} <= set(methods)
    # The one that does not challenge stands there under its stage.
    assert len({"leadre-sft", "leadre-dpo"} & set(methods)) == 1
    row = results_table(world, day)[0]
    assert 0 <= row["HR@1"] <= row["HR@10"] <= 1
    assert row["cases"] > 0
    assert facts.runs(world, day)["curate"]["seconds"] > 0


def test_a_user_can_be_looked_up(world: Settings, day: dt.date) -> None:
    user = Lake(world.lake).read("candidates", day)["user_id"][0].as_py()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.user", user],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert "You are an ad recommendation system." in done.stdout
    assert "<a_" in done.stdout
    missing = subprocess.run(
        [sys.executable, "-m", "jobs.user", "nobody"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert "error: user 'nobody' was not active" in missing.stderr


def test_a_lost_part_is_inferred_again_with_the_same_rows(world: Settings, day: dt.date) -> None:
    lake = Lake(world.lake)
    before = lake.partition("candidates", day)
    (folder,) = (world.work(day) / "infer").iterdir()
    parts = sorted(folder.glob("part-*.parquet"))
    kept = parts[0].stat().st_mtime_ns
    parts[1].unlink()
    done = job("publish", day)
    assert done.returncode == 1
    assert parts[1].name in done.stderr
    assert job("infer", day, "--shard", "0", "--shards", "1").returncode == 0
    assert parts[0].stat().st_mtime_ns == kept
    assert job("publish", day).returncode == 0
    assert lake.partition("candidates", day).digest == before.digest


def test_a_stopped_ad_leaves_the_indexes_without_training(world: Settings, day: dt.date) -> None:
    lake, releases = Lake(world.lake), Releases(world.releases)
    parent = releases.champion()
    assert parent is not None
    records = lake.read("raw_ads", day).to_pylist()
    active = next(r for r in records if r["stop_date"] is None and r["start_date"] <= day)
    active["stop_date"] = day
    records.append({**active, "ad_id": "brand-new", "stop_date": None})
    with lake.begin("raw_ads", day) as attempt:
        attempt.write(rows("raw_ads", records))
        attempt.commit()
    done = job("index_rebuild", day)
    assert done.returncode == 0, done.stderr
    child = releases.champion()
    assert child is not None
    assert child.manifest["parents"]["release"] == parent.id
    listed = {n: f["sha256"] for n, f in child.manifest["files"].items() if "model/" in n}
    assert listed == {n: f["sha256"] for n, f in parent.manifest["files"].items() if "model/" in n}
    ads = catalogue(
        lake.read("ads", day), lake.read("ad_semantic_ids", day), day + dt.timedelta(days=1)
    )
    rows_of = ads.ad_rows(pa.array([active["ad_id"], "brand-new"]))
    assert ads.active[rows_of].tolist() == [False, True]
    assert len(set(ads.owner[rows_of].tolist())) == 1


def test_a_mixed_release_is_refused(world: Settings, day: dt.date, tmp_path: Path) -> None:
    """A codebook of one release with the Semantic IDs of another would be read wrong in silence."""
    champion = Releases(world.releases).champion()
    assert champion is not None
    copy = tmp_path / "releases"
    shutil.copytree(world.releases, copy)
    book = copy / champion.id / "codebook" / "codebook.json"
    book.write_text(book.read_text().replace(champion.codebook, "0" * 16))
    with pytest.raises(Exception, match=r"codebook\.json: differs"):
        Releases(copy).champion()
