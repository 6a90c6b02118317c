"""What the DAGs share: the partition of a run, the timetable, and a task for a job.

A job is `python -m jobs.NAME --ds DS`. On the `sail` engine every job is a plain process. On the
`spark` engine the Spark jobs go through spark-submit, to the master of the connection
`spark_default`. A job that exits with 99 has nothing to do, and its task is skipped.

Knows nothing of what a job does. Must stay light: it is imported at every parse of a DAG file.
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    BaseOperator,
    Context,
)
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, CronPartitionTimetable, Param
from jinja2 import pass_context
from jinja2.runtime import Context as JinjaContext

from jobs.command import EXIT_NOTHING_TO_DO
from jobs.command import partition_date as parse_date
from leadre_lib.settings import REPOSITORY, Settings

SPARK_JOBS = frozenset({"gate_raw", "curate", "interests", "examples", "publish"})
RAW_TABLES = ("raw_users", "raw_ads", "raw_ad_events", "raw_content_events")
SPARK_CONNECTION = "spark_default"

DS = "{{ run_ds() }}"
# Values reach the shell as quoted environment variables only, never as text of the command.
COMMAND = 'exec "$JOB_PYTHON" -m "$JOB_MODULE" --ds "$JOB_DS"'
SHARD_OPTIONS = ' --shard "$JOB_SHARD" --shards "$JOB_SHARDS"'


def partition_date(context: Mapping[str, Any]) -> dt.date:
    """The day that a run is for: its partition key, else the param `ds`.

    A partitioned run has no logical date, and the data interval of a manual run is now: neither
    is ever used.

    Raises:
        AirflowFailException: there is neither, or it is no date, or the day has not begun (UTC).
    """
    params = context.get("params") or {}
    text = context.get("partition_key") or params.get("ds")
    if not text:
        raise AirflowFailException(
            "this run has no partition: backfill the day, or pass the param ds as YYYY-MM-DD"
        )
    try:
        return parse_date(str(text))
    except argparse.ArgumentTypeError as error:
        raise AirflowFailException(f"the partition of this run: {error}") from None


@pass_context
def _run_ds(context: JinjaContext) -> str:
    return partition_date(context.get_all()).isoformat()


class SparkJobOperator(SparkSubmitOperator):
    """spark-submit that knows the exit code of a job with nothing to do."""

    def execute(self, context: Context) -> None:
        """Submit the job and wait for it; skip the task when it exits with 99."""
        try:
            super().execute(context)
        except AirflowException:
            process = getattr(self._hook, "_submit_sp", None)
            if getattr(process, "returncode", None) == EXIT_NOTHING_TO_DO:
                raise AirflowSkipException("the job has nothing to do") from None
            raise


def daily_dag(
    dag_id: str, settings: Settings, doc: str, tags: Sequence[str], scheduled: bool = True
) -> DAG:
    """A DAG with one run a day, just after the day has ended (UTC), keyed by that day; or, not
    `scheduled`, one that runs for the days for which it is triggered or backfilled.

    Midnight and no other hour: the bound of `airflow backfill create --to-date` is an instant, so
    that a later hour would leave out the last day.
    """
    chain = settings.chain
    # Without a schedule the DAG ends before it began. That stops the scheduler, not backfills,
    # which a DAG without a timetable would refuse.
    ended = dt.datetime(2000, 1, 2, tzinfo=dt.UTC)
    return DAG(
        dag_id=dag_id,
        schedule=CronPartitionTimetable(
            "0 0 * * *", timezone="UTC", run_offset=-1, key_format="%Y-%m-%d"
        ),
        start_date=dt.datetime(2000, 1, 1, tzinfo=dt.UTC),
        end_date=None if chain.schedule and scheduled else ended,
        catchup=False,
        max_active_runs=1,
        params={
            "ds": Param(
                None,
                type=["null", "string"],
                description="Day to run for (YYYY-MM-DD), if the run has no partition key.",
            )
        },
        default_args={
            "owner": "ads-retrieval",
            "retries": chain.retries,
            "retry_delay": dt.timedelta(seconds=chain.retry_delay_seconds),
            "execution_timeout": dt.timedelta(minutes=chain.task_timeout_minutes),
        },
        user_defined_macros={"run_ds": _run_ds},
        tags=list(tags),
        doc_md=doc,
    )


def job_task(name: str, settings: Settings, doc: str, **options: Any) -> BaseOperator:
    """The task `name`, which runs `jobs.NAME` for the day of the run.

    Must be called inside a `with DAG(...)`. `options` go to the operator (pool, trigger_rule, …).
    """
    if settings.engine == "spark" and name in SPARK_JOBS:
        return SparkJobOperator(
            task_id=name,
            application=str(REPOSITORY / "jobs" / f"{name}.py"),
            application_args=["--ds", DS],
            conn_id=SPARK_CONNECTION,
            driver_memory=settings.spark.driver_memory,
            env_vars={"PYTHONPATH": str(REPOSITORY), "PYSPARK_PYTHON": sys.executable},
            doc_md=doc,
            **options,
        )
    return BashOperator(
        task_id=name, bash_command=COMMAND, env=_job_env(name), doc_md=doc, **_PROCESS, **options
    )


def sharded_job_task(name: str, shards: int, doc: str, **options: Any) -> Any:
    """A mapped task: `jobs.NAME --shard I --shards N` for every I."""
    return BashOperator.partial(
        task_id=name, bash_command=COMMAND + SHARD_OPTIONS, doc_md=doc, **_PROCESS, **options
    ).expand(
        env=[
            {**_job_env(name), "JOB_SHARD": str(shard), "JOB_SHARDS": str(shards)}
            for shard in range(shards)
        ]
    )


_PROCESS: dict[str, Any] = {
    "append_env": True,
    "cwd": str(REPOSITORY),
    "skip_on_exit_code": EXIT_NOTHING_TO_DO,
}


def _job_env(name: str) -> dict[str, str]:
    return {"JOB_PYTHON": sys.executable, "JOB_MODULE": f"jobs.{name}", "JOB_DS": DS}
