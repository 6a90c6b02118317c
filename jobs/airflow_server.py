"""Airflow on this machine: web interface and scheduler on loopback, with the schedules on.

    python -m jobs.airflow_server --port 8080

SQLite, LocalExecutor, and a home of its own under the state of the source. All configuration is in
`environment`; `make run` and the tests start the same server through `AirflowServer`. Every process
that the server starts carries a marker in its environment, and so do the jobs' own processes: that
is how all of them are found and ended, also after a crash of the program that started them.

Knows nothing of the DAGs but their folder and pools.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime as dt
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import filelock
import httpx
import psutil

from dags.pools import POOLS
from jobs.command import main, parser
from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY, Settings

MARKER = "_AIRFLOW_SERVER_OF"  # not LEADRE_…: those names are settings
COMPONENTS: Mapping[str, Sequence[str]] = {
    "api-server": (),
    "dag-processor": (),
    "scheduler": ("--skip-serve-logs",),
    "triggerer": ("--skip-serve-logs",),
}
START_SECONDS = 240.0
STOP_SECONDS = 8.0
LOOPBACK = "127.0.0.1"


def environment(
    settings: Settings, home: Path, dags_folder: Path, port: int, schedule: bool
) -> dict[str, str]:
    """The environment of every Airflow process: the whole configuration, and the marker.

    A user's own `AIRFLOW__…` variables are left out, so that a run does not depend on them; their
    connections (`AIRFLOW_CONN_…`) stay.
    """
    url = f"http://{LOOPBACK}:{port}"
    options: dict[str, dict[str, object]] = {
        "core": {
            "dags_folder": dags_folder,
            "executor": "LocalExecutor",
            "load_examples": False,
            "parallelism": 4,
            "dags_are_paused_at_creation": not schedule,
            "execution_api_server_url": f"{url}/execution/",
            # No password: the server listens on loopback only.
            "simple_auth_manager_all_admins": True,
            "fernet_key": _secret(home, "fernet_key"),
        },
        "api": {
            "host": LOOPBACK,
            "port": port,
            "base_url": url,
            "workers": 1,
            "secret_key": _secret(home, "secret_key"),
        },
        "api_auth": {"jwt_secret": _secret(home, "jwt_secret")},
        "database": {"sql_alchemy_conn": f"sqlite:///{home / 'airflow.db'}"},
        "logging": {"base_log_folder": home / "logs"},
        "dag_processor": {
            "parsing_processes": 1,
            # The files do not change under `make run`: parsing them once is enough.
            "min_file_process_interval": 30 if schedule else 3600,
        },
        "scheduler": {
            "scheduler_idle_sleep_time": 0.25,
            # Tasks of a scheduler that was killed are taken up within a quarter of a minute.
            "scheduler_health_check_threshold": 15,
            "orphaned_tasks_check_interval": 10,
            "task_instance_heartbeat_timeout": 60,
        },
        "workers": {
            # Training takes all cores: a slow answer of the server is no reason to end a task.
            "execution_api_timeout": 30,
            "max_failed_heartbeats": 10,
        },
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW__", "AIRFLOW_HOME"))}
    paths = [str(REPOSITORY), *filter(None, [kept.get("PYTHONPATH")])]
    programs = [str(Path(sys.executable).parent), *filter(None, [kept.get("PATH")])]
    return {
        "AIRFLOW_CONN_SPARK_DEFAULT": spark_connection(settings.spark.master),
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        **kept,
        **{
            f"AIRFLOW__{section}__{name}".upper(): str(value)
            for section, values in options.items()
            for name, value in values.items()
        },
        "AIRFLOW_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join(programs),  # finds this environment's spark-submit
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONUNBUFFERED": "1",
        "SPT_NOENV": "1",  # process titles are not written over the environment, and the marker
        **dict.fromkeys(("NO_PROXY", "no_proxy"), _no_proxy(kept)),
        "LEADRE_CHAIN__SCHEDULE": str(schedule).lower(),
        MARKER: str(home),
    }


def _no_proxy(env: Mapping[str, str]) -> str:
    given = env.get("NO_PROXY") or env.get("no_proxy")
    return ",".join(filter(None, [given, LOOPBACK]))


def spark_connection(master: str) -> str:
    """The URI-free form of a Spark connection: a master such as `local[2]` is no host name.

    Without this connection SparkSubmitOperator would fall back to `yarn` in silence.
    """
    return json.dumps({"conn_type": "spark", "host": master})


def _secret(home: Path, name: str) -> str:
    """32 random bytes, made once a home and readable by its owner only."""
    path = home / "secrets" / name
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.urlsafe_b64encode(secrets.token_bytes(32)))
    return path.read_text()


def marked_processes(home: Path) -> list[psutil.Process]:
    """All processes of the server of this home, the jobs' included, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARKER) == str(home):
                found.append(process)
    return found


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Ask the processes to end, then make them."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        deadline = time.monotonic() + STOP_SECONDS
        while any(map(_is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.1)
        processes = [process for process in processes if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    # An ended orphan stays a zombie for as long as its new parent does not ask for it.
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def memory_by_task(home: Path) -> dict[str, int]:
    """Bytes that each running task's job uses, and those of Airflow itself under `airflow`.

    On Linux a page that several processes share counts once (PSS).
    """
    sizes: dict[str, int] = {}
    for process in marked_processes(home):
        with contextlib.suppress(psutil.Error):
            # Airflow tells its jobs which task they are; its own processes have no such variable.
            task = process.environ().get("AIRFLOW_CTX_TASK_ID", "airflow")
            info = process.memory_full_info()
            sizes[task] = sizes.get(task, 0) + getattr(info, "pss", info.rss)
    return sizes


class AirflowServer:
    """Airflow with all its components, for as long as the `with` block lasts.

    Args:
        home: AIRFLOW_HOME; `state/airflow` by default.
        dags_folder: where the DAG files are.
        port: of the web interface and REST API on loopback; a free one by default.
        schedule: whether the DAGs' timetables start runs.

    Raises:
        LeadreError: another server uses this home, the port is in use, or a component ended.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        home: Path | None = None,
        dags_folder: Path = REPOSITORY / "dags",
        port: int | None = None,
        schedule: bool = False,
    ) -> None:
        self.home = (home or settings.state / "airflow").resolve()
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.port = _free_port(port)
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.env = environment(settings, self.home, dags_folder, self.port, schedule)
        self.lock = filelock.FileLock(self.home / "server.lock", timeout=0)
        self.started = dt.datetime.now(dt.UTC)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.client = httpx.Client(base_url=f"{self.url}/api/v2", timeout=60.0, trust_env=False)

    def __enter__(self) -> Self:
        """Start all components; does not wait for them (`wait_until_ready` does)."""
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise LeadreError(
                f"another `make run` or `make airflow` is using {self.home}: wait for it or stop it"
            ) from None
        try:
            end_processes(marked_processes(self.home))  # what a killed predecessor left behind
            self._migrate()
            self.started = dt.datetime.now(dt.UTC)
            for name, options in COMPONENTS.items():
                self.processes[name] = self._start(name, options)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every process of the server and every job that is still running."""
        self._stop()

    def _stop(self) -> None:
        self.client.close()
        end_processes(marked_processes(self.home))
        for process in self.processes.values():
            process.wait()
        self.lock.release()

    def _migrate(self) -> None:
        version = importlib.metadata.version("apache-airflow-core")
        stamp = self.home / "migrated"
        if stamp.exists() and stamp.read_text() == version:
            return
        process = self._start("db", ("migrate",))
        if process.wait():
            raise LeadreError(f"airflow db migrate failed:\n{self._tail('db')}")
        stamp.write_text(version)

    def _start(self, name: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "airflow", name, *options],
                env=self.env,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the driver alone, which stops the rest
            )

    def _log(self, component: str) -> Path:
        return self.home / "logs" / f"{component}.log"

    def _tail(self, component: str, lines: int = 15) -> str:
        return "\n".join(self._log(component).read_text(errors="replace").splitlines()[-lines:])

    def check(self) -> None:
        """Raise `LeadreError` if a component has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise LeadreError(
                    f"airflow {name} ended with code {process.returncode}"
                    f" ({self._log(name)}):\n{self._tail(name)}"
                )

    def wait_until_ready(self, dag_ids: Sequence[str]) -> None:
        """Wait for the REST API and for these DAGs to be parsed anew; create pools; unpause."""
        deadline = time.monotonic() + START_SECONDS
        waiting = list(dag_ids)
        authorised = False
        while waiting:
            self.check()
            if time.monotonic() > deadline:
                raise LeadreError(
                    f"airflow was not up within {START_SECONDS:.0f} s: see {self.home / 'logs'}"
                )
            authorised = authorised or self._authorise()
            if authorised:
                waiting = [dag_id for dag_id in waiting if not self._is_parsed(dag_id)]
            time.sleep(0.25)
        for name, slots in POOLS.items():
            self._ensure_pool(name, slots)
        for dag_id in dag_ids:
            self.call("PATCH", f"/dags/{dag_id}", json={"is_paused": False})

    def _authorise(self) -> bool:
        try:
            answer = self.client.get(f"{self.url}/auth/token")
        except httpx.TransportError:
            return False
        if answer.status_code != httpx.codes.CREATED:
            return False
        self.client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        return True

    def _is_parsed(self, dag_id: str) -> bool:
        errors = self.call("GET", "/importErrors")["import_errors"]
        for error in errors:
            if dt.datetime.fromisoformat(error["timestamp"]) >= self.started:
                raise LeadreError(f"{error['filename']}:\n{error['stack_trace'].strip()}")
        answer = self.client.get(f"/dags/{dag_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return False
        # A DAG in the database may be that of an earlier start, with other settings.
        parsed = answer.raise_for_status().json()["last_parsed_time"]
        return parsed is not None and dt.datetime.fromisoformat(parsed) >= self.started

    def _ensure_pool(self, name: str, slots: int) -> None:
        body = {"name": name, "slots": slots, "include_deferred": False}
        if self.client.get(f"/pools/{name}").status_code == httpx.codes.NOT_FOUND:
            self.call("POST", "/pools", json=body)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Call the REST API (v2); its JSON answer.

        SQLite has one writer at a time: an answer that it is locked is asked for again.
        """
        for _ in range(20):
            answer = self.client.request(method, path, **options)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
        if answer.is_error:
            raise LeadreError(f"airflow: {method} {path}: {answer.status_code} {answer.text}")
        return answer.json() if answer.content else None


def _free_port(wanted: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted or 0))
        except (OSError, OverflowError) as error:
            raise LeadreError(
                f"port {wanted} on {LOOPBACK} is in use or cannot be had ({error}):"
                " give another, as PORT=8090"
            ) from None
        return int(probe.getsockname()[1])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, so that `with` blocks clean up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Serve until interrupted."""
    interrupt_on_signals()
    with (
        contextlib.suppress(KeyboardInterrupt),
        AirflowServer(settings, port=args.port, schedule=True) as server,
    ):
        print("starting Airflow …", flush=True)
        server.wait_until_ready(["leadre_daily", "leadre_index_rebuild"])
        print(f"Airflow is up: {server.url} (stop it with Ctrl-C; logs in {server.home / 'logs'})")
        while True:
            server.check()
            time.sleep(1.0)


if __name__ == "__main__":
    arguments = parser(__doc__, ds=False)
    arguments.add_argument("--port", type=int, default=8080, help="of the web interface")
    main(run, arguments)
