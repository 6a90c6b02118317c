"""The driver's own parts: which days, which environment, what it prints, how it refuses."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobs import run as driver
from jobs.airflow_server import (
    MARKER,
    AirflowServer,
    end_processes,
    environment,
    marked_processes,
    memory_by_task,
)
from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY, Settings, load_settings


def run_driver(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.run", *options],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_days_are_the_first_and_those_after_it(settings: Settings) -> None:
    first = settings.simulator.first_ds
    assert driver.days_to_run(settings, 2) == [first + dt.timedelta(days=n) for n in range(3)]


def test_a_lake_without_raw_days_is_named(tmp_path: Path) -> None:
    with pytest.raises(LeadreError, match=r"no day of raw_users in .*/lake/lake"):
        driver.days_to_run(load_settings(home=tmp_path, source="lake"), 2)


def test_environment_is_ours_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "CeleryExecutor")
    monkeypatch.setenv("AIRFLOW_HOME", "/elsewhere")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("AIRFLOW_CONN_SPARK_DEFAULT", raising=False)
    env = environment(settings, tmp_path, REPOSITORY / "dags", 4711, schedule=False)
    assert env["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert env["AIRFLOW_HOME"] == env[MARKER] == str(tmp_path)
    assert env["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert env["NO_PROXY"] == "example.org,127.0.0.1"
    assert env["LEADRE_CHAIN__SCHEDULE"] == "false"
    assert '"host": "local[2]"' in env["AIRFLOW_CONN_SPARK_DEFAULT"]
    monkeypatch.setenv("AIRFLOW_CONN_SPARK_DEFAULT", "spark://cluster:7077")
    again = environment(settings, tmp_path, REPOSITORY / "dags", 4711, schedule=True)
    assert again["AIRFLOW_CONN_SPARK_DEFAULT"] == "spark://cluster:7077"
    for name in ("AIRFLOW__CORE__FERNET_KEY", "AIRFLOW__API_AUTH__JWT_SECRET"):
        assert again[name] == env[name]
    for path in (tmp_path / "secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_port_in_use_is_named(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LeadreError, match=f"port {port} .* is in use"):
            AirflowServer(settings, port=port)


def test_orphans_of_a_home_are_found_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.airflow_server.STOP_SECONDS", 0.5)
    # A process whose parent is gone and that does not end when asked to: what a kill -9 leaves.
    sleeper = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('up', flush=True); time.sleep(600)"
    )
    starter = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}])"
    env = {**os.environ, MARKER: str(tmp_path), "AIRFLOW_CTX_TASK_ID": "sft"}
    with subprocess.Popen(
        [sys.executable, "-c", starter], env=env, stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        parent.wait()
        orphans = marked_processes(tmp_path)
        assert len(orphans) == 1
        assert memory_by_task(tmp_path).keys() == {"sft"}
        assert marked_processes(tmp_path / "other") == []
        end_processes(orphans)
        assert marked_processes(tmp_path) == []
        with contextlib.suppress(psutil.NoSuchProcess):  # else nobody has asked for it yet
            assert orphans[0].status() == psutil.STATUS_ZOMBIE


def test_log_shows_the_output_of_the_job(tmp_path: Path) -> None:
    log = tmp_path / "attempt=1.log"
    log.write_text(
        '{"event": "::group::Log"}\n{"event": "Running command"}\n{"event": "Output:"}\n'
        '{"event": "error: no such column"}\n'
        '{"event": "Task failed", "error_detail": [{"exc_type": "E", "exc_value": "code 1"}]}\n'
        "not JSON\n"
    )
    expected = ["error: no such column", "Task failed: E: code 1", "not JSON"]
    assert driver.log_events(log) == expected


@pytest.mark.parametrize(
    ("options", "env", "code", "says"),
    [
        (["--days", "0"], {}, 2, "at least one day"),
        (["--json", "no/such/folder/x.json"], {}, 1, "no folder"),
        ([], {"LEADRE_ENGINE": "spark", "JAVA_HOME": "/nowhere"}, 1, "Java 17 or 21"),
        ([], {"LEADRE_SORCE": "amazon"}, 1, "LEADRE_SORCE"),
        ([], {"LEADRE_SOURCE": "amazon", "LEADRE_DATA": "/nowhere"}, 1, "/nowhere"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    tmp_path: Path, options: list[str], env: dict[str, str], code: int, says: str
) -> None:
    done = run_driver(*options, LEADRE_HOME=str(tmp_path), **env)
    assert done.returncode == code
    assert says in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
