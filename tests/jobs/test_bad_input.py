"""Bad input through the command lines that a user has: one clear error that names it, an exit code
that is not 0, and nothing published.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import curate, gate_raw, land, semantic_ids
from leadre_lib.contracts import RAW_TABLES
from leadre_lib.errors import LeadreError
from leadre_lib.lake import Lake
from leadre_lib.settings import REPOSITORY, Settings, load_settings
from tests.worlds import ADS, DAY0, DAY0_AD_EVENTS, DAY1, USERS, ad_event, at, raw_day, rows
from tests.worlds import land as land_world


def command(job: str, home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "LEADRE_HOME": str(home), **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("ds", ["yesterday", "2026-3-2", "2026-02-30", "2999-01-01", ""])
def test_a_ds_that_is_no_day_or_lies_in_the_future(tmp_path: Path, ds: str) -> None:
    done = command("curate", tmp_path, "--ds", ds)
    assert done.returncode == 2
    assert "--ds" in done.stderr
    assert repr(ds) in done.stderr or "lies in the future" in done.stderr


def test_a_missing_partition_and_a_bad_setting_are_one_line(tmp_path: Path) -> None:
    done = command("gate_raw", tmp_path, "--ds", "2026-03-02")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: table raw_users has no partition ds=2026-03-02")
    )
    done = command("gate_raw", tmp_path, "--ds", "2026-03-02", LEADRE_ENGNE="spark")
    assert done.returncode == 1
    assert "LEADRE_ENGNE" in done.stderr


def test_the_missing_java_of_the_spark_engine(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "simulator" / "lake")
    land_world(lake, DAY0)
    env = {"LEADRE_ENGINE": "spark", "JAVA_HOME": str(tmp_path / "nowhere")}
    done = command("gate_raw", tmp_path, "--ds", str(DAY0), **env)
    assert done.returncode == 1
    assert "needs Java 17 or 21" in done.stderr


def strange_events(count: int) -> list[dict[str, Any]]:
    return [ad_event(f"s{n}", "nobody", "a1", "click", at(DAY0, 5)) for n in range(count)]


@pytest.mark.parametrize(
    ("replaced", "told"),
    [
        ({"raw_users": []}, "raw_users: expect_table_row_count"),
        ({"raw_users": [*USERS, USERS[0]]}, "raw_users: expect_column_values_to_be_unique"),
        ({"raw_ads": [*ADS, ADS[1]]}, "raw_ads: expect_column_values_to_be_unique"),
        ({"raw_ad_events": [{**DAY0_AD_EVENTS[0], "event_type": "gaze"}]}, "gaze"),
    ],
)
def test_the_raw_gate_names_table_check_and_rows(
    settings: Settings, lake: Lake, replaced: dict[str, list[dict[str, Any]]], told: str
) -> None:
    land_world(lake, DAY0, **replaced)
    with pytest.raises(LeadreError, match="gate") as error:
        gate_raw.run(argparse.Namespace(ds=DAY0), settings)
    assert told in str(error.value)


def test_too_many_events_of_unknown_users_stop_the_day(settings: Settings, lake: Lake) -> None:
    land_world(lake, DAY0, raw_ad_events=DAY0_AD_EVENTS[:7] + strange_events(3))
    with pytest.raises(LeadreError, match="max_unknown_reference_rate") as error:
        curate.run(argparse.Namespace(ds=DAY0), settings)
    assert "unknown_user" in str(error.value)
    assert not lake.has("users", DAY0)
    assert not lake.has("behaviours", DAY0)


def test_a_duplicate_key_stops_curation_and_the_last_good_day_stays(
    settings: Settings, lake: Lake
) -> None:
    lenient = settings.model_copy(
        update={"quality": settings.quality.model_copy(update={"max_duplicate_event_rate": 1.0})}
    )
    land_world(lake, DAY0)
    curate.run(argparse.Namespace(ds=DAY0), lenient)
    good = lake.partition("users", DAY0).digest
    land_world(lake, DAY1, raw_users=[*USERS, USERS[0]])
    with pytest.raises(LeadreError, match="users: expect_column_values_to_be_unique"):
        curate.run(argparse.Namespace(ds=DAY1), lenient)
    assert not lake.has("users", DAY1)
    assert lake.partition("users", DAY0).digest == good


def test_a_corrupt_raw_file_is_named(settings: Settings, lake: Lake) -> None:
    land_world(lake, DAY0)
    path = lake.partition("raw_ads", DAY0).files[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LeadreError, match="corrupt parquet file") as error:
        gate_raw.run(argparse.Namespace(ds=DAY0), settings)
    assert str(path) in str(error.value)


def folder_of(tmp_path: Path, ds: dt.date) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for table, records in raw_day(ds).items():
        pq.write_table(rows(table, records), folder / f"{table}.parquet")
    return folder


def test_ones_own_files_land_all_or_none(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home", source="lake")
    lake, folder = Lake(settings.lake), folder_of(tmp_path, DAY0)
    ads = folder / "raw_ads.parquet"
    whole = pq.read_table(ads)
    args = argparse.Namespace(ds=DAY0, folder=folder, force=False)
    pq.write_table(whole.append_column("colour", whole["title"]), ads)
    with pytest.raises(LeadreError, match="colour"):
        land.run(args, settings)
    pq.write_table(whole.set_column(6, "bid", whole["title"]), ads)
    with pytest.raises(LeadreError, match="raw_ads"):
        land.run(args, settings)
    assert not any(lake.has(table, DAY0) for table in RAW_TABLES)
    pq.write_table(whole, ads)
    land.run(args, settings)
    assert all(lake.has(table, DAY0) for table in RAW_TABLES)
    ads.unlink()
    args.force = True
    with pytest.raises(LeadreError, match=r"neither raw_ads\.parquet nor a folder raw_ads"):
        land.run(args, settings)


def test_types_that_only_look_alike_are_refused(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home", source="lake")
    folder = folder_of(tmp_path, DAY0)
    args = argparse.Namespace(ds=DAY0, folder=folder, force=False)
    path = folder / "raw_ad_events.parquet"
    whole = pq.read_table(path)

    def swap(name: str, column: Any) -> None:
        pq.write_table(whole.set_column(whole.column_names.index(name), name, column), path)
        with pytest.raises(LeadreError, match=f"raw_ad_events: column '{name}' is "):
            land.run(args, settings)

    swap("event_time", whole["event_time"].cast(pa.timestamp("us")))  # no zone
    swap("ad_id", pa.array([1.0] * len(whole)))
    swap("ecpm", whole["ad_id"])
    # Other widths and encodings of the same kind are welcome.
    columns = {name: whole[name] for name in whole.column_names}
    columns["event_type"] = whole["event_type"].dictionary_encode()
    columns["event_time"] = whole["event_time"].cast(pa.timestamp("ms", "Europe/Paris"))
    pq.write_table(pa.table(columns), path)
    land.run(args, settings)
    landed = Lake(settings.lake).read("raw_ad_events", DAY0)
    assert landed["event_time"].equals(whole["event_time"])


def test_files_of_one_folder_must_be_alike(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home", source="lake")
    folder = folder_of(tmp_path, DAY0)
    parts = folder / "raw_users"
    parts.mkdir()
    whole = pq.read_table(folder / "raw_users.parquet")
    (folder / "raw_users.parquet").unlink()
    pq.write_table(whole, parts / "1.parquet")
    pq.write_table(whole.append_column("colour", whole["user_id"]), parts / "2.parquet")
    with pytest.raises(LeadreError, match=r"2\.parquet: other columns"):
        land.run(argparse.Namespace(ds=DAY0, folder=folder, force=False), settings)


def test_a_damaged_page_behind_a_sound_footer_is_named(settings: Settings, lake: Lake) -> None:
    land_world(lake, DAY0)
    path = lake.partition("raw_ad_events", DAY0).files[0]
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(LeadreError, match="corrupt parquet file") as error:
        curate.run(argparse.Namespace(ds=DAY0), settings)
    assert str(path) in str(error.value)


def test_a_home_is_of_one_world(tmp_path: Path) -> None:
    sizes = {"LEADRE_SIMULATOR__USERS": "20", "LEADRE_SIMULATOR__ADS": "20"}
    assert command("land", tmp_path, "--ds", str(DAY0), **sizes).returncode == 0
    sizes["LEADRE_SIMULATOR__USERS"] = "30"
    done = command("land", tmp_path, "--ds", str(DAY1), **sizes)
    assert done.returncode == 1
    assert "users was 20, now 30" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LEADRE_SFT", "abc", "sft"),
        ("LEADRE_HOME", "~nosuchuser/x", "home"),
        ("LEADRE_SEED", "-1", "seed"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, name: str, value: str, told: str) -> None:
    done = command("gate_raw", tmp_path, "--ds", "2026-03-02", **{name: value})
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_embedding_model_is_named(tmp_path: Path) -> None:
    settings = load_settings(
        home=tmp_path,
        embedding={"model": "/no/such/model"},
        quality={"max_duplicate_event_rate": 1.0},
    )
    lake = Lake(settings.lake)
    land_world(lake, DAY0)
    curate.run(argparse.Namespace(ds=DAY0), settings)
    with pytest.raises(LeadreError, match="/no/such/model"):
        semantic_ids.run(argparse.Namespace(ds=DAY0, keep=False), settings)
