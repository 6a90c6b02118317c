"""The DAGs parse, are light, complete and wired as agreed; a run knows its day."""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization

from benchmarks import chain
from dags import wiring
from dags.pools import POOLS
from dags.raw_day import RawDayOperator, RawDayTrigger, missing_tables
from jobs import land
from jobs.airflow_server import spark_connection
from leadre_lib.contracts import RAW_TABLES
from leadre_lib.settings import REPOSITORY, Settings, load_settings

GRAPHS = {
    "leadre_daily": {
        "wait_for_raw": {"gate_raw"},
        "gate_raw": {"curate"},
        "curate": {"semantic_ids"},
        "semantic_ids": {"interests", "synthetic_histories"},
        "interests": {"examples", "infer"},
        "synthetic_histories": {"examples"},
        "examples": {"sft"},
        "sft": {"dpo"},
        "dpo": {"evaluate"},
        "evaluate": {"release"},
        "release": {"promote"},
        "promote": {"training_done"},
        "training_done": {"infer"},
        "infer": {"publish"},
        "publish": {"report"},
        "report": set(),
        "watcher": set(),
    },
    "leadre_index_rebuild": {"wait_for_raw_ads": {"index_rebuild"}, "index_rebuild": set()},
}
TRIGGER_RULES = {
    "evaluate": "none_failed",
    "training_done": "all_done",
    "report": "all_done",
    "watcher": "one_failed",
}
NO_JOB = {"wait_for_raw", "wait_for_raw_ads", "training_done", "watcher"}


def fresh_dags() -> dict[str, DAG]:
    bag = DagBag(dag_folder=str(REPOSITORY / "dags"))
    assert bag.import_errors == {}
    return dict(bag.dags)


@pytest.fixture(scope="module")
def dags() -> dict[str, DAG]:
    return fresh_dags()


def test_every_dag_and_task_says_who_and_what_it_is(dags: dict[str, DAG]) -> None:
    assert set(dags) == set(GRAPHS)
    for dag in dags.values():
        assert dag.doc_md
        assert {"leadre", "ads"} <= dag.tags
        assert dag.max_active_runs == 1
        assert not dag.catchup
        for task in dag.tasks:
            assert task.doc_md, task.task_id
            assert task.owner == "ads-retrieval", task.task_id
            assert task.retries == (0 if task.task_id == "watcher" else 2), task.task_id
            assert task.execution_timeout == dt.timedelta(minutes=120), task.task_id
            assert not task.depends_on_past
            assert task.pool in {"default_pool", *POOLS}


@pytest.mark.parametrize("dag_id", sorted(GRAPHS))
def test_graph_is_the_agreed_one(dags: dict[str, DAG], dag_id: str) -> None:
    watched = {"watcher"} if dag_id == "leadre_daily" else set()
    found = {task.task_id: set(task.downstream_task_ids) - watched for task in dags[dag_id].tasks}
    assert found == GRAPHS[dag_id]
    if watched:
        upstream = dags[dag_id].get_task("watcher").upstream_task_ids
        assert set(upstream) == set(GRAPHS[dag_id]) - watched
    for task in dags[dag_id].tasks:
        assert task.trigger_rule == TRIGGER_RULES.get(task.task_id, "all_success"), task.task_id


def test_the_accelerator_has_one_user_at_a_time(dags: dict[str, DAG]) -> None:
    pools = {task.task_id: task.pool for task in dags["leadre_daily"].tasks}
    assert pools["sft"] == pools["dpo"] == "accelerator"
    assert pools["infer"] == "inference"
    assert POOLS == {"accelerator": 1, "inference": 2}


def test_every_task_has_its_job(dags: dict[str, DAG]) -> None:
    names = {task.task_id for dag in dags.values() for task in dag.tasks} - NO_JOB
    missing = [name for name in sorted(names) if not importlib.util.find_spec(f"jobs.{name}")]
    assert missing == []
    assert names >= wiring.SPARK_JOBS
    assert tuple(RAW_TABLES) == wiring.RAW_TABLES


def test_benchmarks_run_the_jobs_up_to_evaluate_in_their_order(dags: dict[str, DAG]) -> None:
    dag = dags["leadre_daily"]
    wanted = dag.get_task("evaluate").get_flat_relative_ids(upstream=True) | {"evaluate"}
    names = [job.name for job in chain.JOBS]
    assert set(names) - {"land"} == wanted - NO_JOB - chain.LEFT_OUT
    place = {name: number for number, name in enumerate(names)}
    for name in place:
        after = dag.get_task(name).downstream_task_ids if dag.has_task(name) else set()
        assert all(place[name] < place[later] for later in after if later in place), name


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from airflow.dag_processing.dagbag import DagBag;"
        "bag = DagBag(dag_folder='dags'); assert len(bag.dags) == 2, bag.import_errors;"
        "heavy = {'pyspark', 'torch', 'great_expectations', 'deltalake', 'pandas', 'pyarrow'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "context",
    [
        {"partition_key": "2026-03-03", "params": {"ds": None}},
        {"partition_key": None, "params": {"ds": "2026-03-03"}},
        {"partition_key": "2026-03-03", "params": {"ds": "2026-03-09"}},
    ],
)
def test_partition_date_is_the_key_else_the_param(context: dict[str, Any]) -> None:
    assert wiring.partition_date(context) == dt.date(2026, 3, 3)


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({"partition_key": None, "params": {"ds": None}}, "no partition"),
        ({"data_interval_start": dt.datetime(2026, 3, 3)}, "no partition"),
        ({"partition_key": None, "params": {"ds": "2026-3-3"}}, "'2026-3-3' is no date"),
        ({"partition_key": "2026-03-03T00:00:00", "params": {}}, "is no date"),
        ({"partition_key": None, "params": {"ds": "$(id)"}}, "is no date"),
        ({"partition_key": "2999-01-01", "params": {}}, "in the future"),
    ],
)
def test_partition_date_refuses_what_is_no_day(context: dict[str, Any], says: str) -> None:
    with pytest.raises(AirflowFailException) as error:
        wiring.partition_date(context)
    assert says in str(error.value)


def test_a_backfill_has_every_day_of_its_range(dags: dict[str, DAG]) -> None:
    dag = DagSerialization.from_dict(DagSerialization.to_dict(dags["leadre_daily"]))
    first, last = (dt.datetime(2026, 3, day, tzinfo=dt.UTC) for day in (2, 4))
    keys = [info.partition_key for info in dag.iter_dagrun_infos_between(first, last)]
    assert keys == ["2026-03-02", "2026-03-03", "2026-03-04"]


def test_schedule_gives_yesterday_and_can_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for schedule in (True, False):
        monkeypatch.setenv("LEADRE_CHAIN__SCHEDULE", str(schedule))
        dag = DagSerialization.from_dict(DagSerialization.to_dict(fresh_dags()["leadre_daily"]))
        before = dt.datetime.now(dt.UTC).date()
        info = dag.next_dagrun_info(last_automated_run_info=None)
        after = dt.datetime.now(dt.UTC).date()
        if not schedule:
            assert info is None
            continue
        assert info is not None
        yesterdays = {(day - dt.timedelta(days=1)).isoformat() for day in (before, after)}
        assert info.partition_key in yesterdays
        assert info.run_after.date() in {before, after}


@pytest.mark.parametrize("master", ["local[2]", "spark://host:7077", "yarn"])
def test_spark_jobs_go_to_the_master_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, master: str
) -> None:
    monkeypatch.setenv("LEADRE_ENGINE", "spark")
    monkeypatch.setenv("AIRFLOW_CONN_SPARK_DEFAULT", spark_connection(master))
    tasks = {task.task_id: task for task in fresh_dags()["leadre_daily"].tasks}
    submitted = {name for name, task in tasks.items() if task.task_type == "SparkJobOperator"}
    assert submitted == wiring.SPARK_JOBS
    curate = tasks["curate"]
    assert isinstance(curate, wiring.SparkJobOperator)
    hook = curate._get_hook()
    assert hook._connection["master"] == master
    command = hook._build_spark_submit_command(curate.application)
    assert command[command.index("--master") + 1] == master
    assert command[-3:] == [str(REPOSITORY / "jobs" / "curate.py"), "--ds", wiring.DS]


@pytest.mark.parametrize(("code", "error"), [(99, AirflowSkipException), (3, Exception)])
def test_spark_job_with_nothing_to_do_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, error: type[Exception]
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SPARK_DEFAULT", spark_connection("local[1]"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    job = tmp_path / "job.py"
    job.write_text(f"raise SystemExit({code})")
    task = wiring.SparkJobOperator(task_id="job", application=str(job), conn_id="spark_default")
    with pytest.raises(error) as raised:
        task.execute({})
    assert isinstance(raised.value, AirflowSkipException) == (code == 99)


def tiny_settings(tmp_path: Path) -> Settings:
    sizes = {"users": 20, "ads": 20, "history_days": 1}
    return load_settings(home=tmp_path, simulator=sizes)


def test_raw_day_is_waited_for_and_missed_by_name(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    ds = settings.simulator.first_ds
    args = (str(settings.lake), list(RAW_TABLES), ds.isoformat())
    task = RawDayOperator(task_id="wait", lake=args[0], tables=RAW_TABLES, ds=args[2], hours=1.0)
    with pytest.raises(AirflowFailException) as error:
        task.execute({})
    assert str(ds) in str(error.value)
    assert all(table in str(error.value) for table in RAW_TABLES)

    async def first_event(until: dt.datetime) -> Any:
        path, arguments = RawDayTrigger(*args, until.isoformat(), poll_seconds=0.05).serialize()
        assert path == "dags.raw_day.RawDayTrigger"
        return (await anext(RawDayTrigger(**arguments).run())).payload

    now = dt.datetime.now(dt.UTC)
    assert asyncio.run(first_event(now)) == list(RAW_TABLES)

    async def land_while_waiting() -> Any:
        waiting = asyncio.create_task(first_event(now + dt.timedelta(hours=1)))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        namespace = land.argparse.Namespace(ds=ds, force=False, folder=None)
        await asyncio.to_thread(land.run, namespace, settings)
        return await waiting

    assert asyncio.run(land_while_waiting()) == []
    assert missing_tables(*args) == []
    task.execute({})
