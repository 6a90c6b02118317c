"""The driver against a real Airflow: scheduler, database, backfills, failures and a clean end."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest

from jobs.airflow_server import AirflowServer, marked_processes
from jobs.run import DAG, Chain
from leadre_lib.errors import LeadreError
from leadre_lib.settings import load_settings

# A chain of two real tasks under the name of the daily DAG: land the day, then wait for it.
DAG_FILE = """
from dags.raw_day import RawDayOperator
from dags.wiring import DS, RAW_TABLES, daily_dag, job_task
from leadre_lib.settings import load_settings

settings = load_settings()
with daily_dag("leadre_daily", settings, "A small airflow dag.", ("test",)) as dag:
    job_task("land", settings, "Lands.") >> RawDayOperator(
        task_id="wait", lake=str(settings.lake), tables=RAW_TABLES, ds=DS, hours=1.0
    )
"""


def test_backfill_through_a_booted_airflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEADRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LEADRE_SIMULATOR__USERS", "20")
    monkeypatch.setenv("LEADRE_SIMULATOR__ADS", "20")
    monkeypatch.setenv("LEADRE_CHAIN__RETRIES", "0")
    folder = tmp_path / "dags"
    folder.mkdir()
    (folder / "small.py").write_text(DAG_FILE)
    settings = load_settings()
    first = settings.simulator.first_ds

    with AirflowServer(settings, dags_folder=folder) as server:
        with pytest.raises(LeadreError, match="another `make run`"):
            AirflowServer(settings, dags_folder=folder).__enter__()
        server.wait_until_ready([DAG])
        chain = Chain(server, settings)

        assert chain.run_day(first, force=False)
        shown = capsys.readouterr().out
        assert shown.index("land            success") < shown.index("wait            success")

        assert chain.run_day(first, force=False)
        assert "already done" in capsys.readouterr().out

        work = settings.work(first)
        work.mkdir(parents=True)
        assert chain.run_day(first, force=True)
        assert not work.exists()

        before = first - dt.timedelta(days=1)
        assert not chain.run_day(before, force=False)
        shown = capsys.readouterr().out
        assert "land            failed" in shown
        assert f"its first day is {first}" in shown  # the job's own error
        assert "attempt=1.log" in shown

        runs = server.call("GET", f"/dags/{DAG}/dagRuns", params={"order_by": "id"})["dag_runs"]
        found = [(run["run_type"], run["partition_key"], run["state"]) for run in runs]
        day = first.isoformat()
        assert found == [
            ("backfill", day, "success"),
            ("backfill", day, "success"),
            ("backfill", before.isoformat(), "failed"),
        ]

    assert set(json.loads((settings.state / "durations.json").read_text())[day]) == {"land", "wait"}
    assert marked_processes(settings.state / "airflow") == []
