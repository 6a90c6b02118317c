"""The Airflow DAG `leadre_daily`: one day of raw data to published candidates and a report."""

from __future__ import annotations

from airflow.providers.common.compat.sdk import AirflowFailException
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import task

from dags.pools import ACCELERATOR_POOL, INFERENCE_POOL
from dags.raw_day import RawDayOperator
from dags.wiring import DS, RAW_TABLES, daily_dag, job_task, sharded_job_task
from leadre_lib.settings import load_settings

DOC = """
### The daily chain
One run is one day (`ds`, UTC), which is its partition key: raw tables → behaviours and interests →
training → evaluation → release → candidates for all active users → report.

* **Backfill**: `airflow backfill create --dag-id leadre_daily --from-date 2026-03-02 --to-date
  2026-03-05 --max-active-runs 1 --reprocess-behavior completed`.
* **By hand**: trigger it with a partition key, or with the param `ds`.
* A job that has nothing to do (exit code 99) is shown as skipped: on the first day there is nothing
  to train on.
* If training fails or the new model is worse, inference goes on with the champion. A run in which
  anything failed ends as failed (task `watcher`), even if candidates were published.
* Output is keyed by `ds`: running a day again replaces that day.
"""

settings = load_settings()

with daily_dag("leadre_daily", settings, DOC, ("leadre", "daily", "ads", "training")) as dag:
    wait_for_raw = RawDayOperator(
        task_id="wait_for_raw",
        lake=str(settings.lake),
        tables=RAW_TABLES,
        ds=DS,
        hours=settings.chain.raw_deadline_hours,
        doc_md="Waits for the day's raw tables, up to `chain.raw_deadline_hours` after its end.",
    )
    gate_raw = job_task(
        "gate_raw", settings, "Checks the raw tables against their contracts; critical stops here."
    )
    curate = job_task(
        "curate", settings, "Users, ads, and one behaviour stream of the ad and content domains."
    )
    semantic_ids = job_task(
        "semantic_ids",
        settings,
        "A Semantic ID for every marketing object; those that have one keep it.",
    )
    interests = job_task(
        "interests", settings, "Long-term and short-term interests, and the prompt of every user."
    )
    synthetic_histories = job_task(
        "synthetic_histories",
        settings,
        "Made-up histories, as texts, habits and popularity go on.",
    )
    examples = job_task(
        "examples", settings, "SFT examples, preference pairs and the cases to evaluate on."
    )
    sft = job_task(
        "sft",
        settings,
        "Supervised fine-tuning under DeepSpeed. Nothing to do before the second day.",
        pool=ACCELERATOR_POOL,
    )
    dpo = job_task(
        "dpo",
        settings,
        "Direct Preference Optimization by eCPM. Nothing to do where no ad has an eCPM.",
        pool=ACCELERATOR_POOL,
    )
    evaluate = job_task(
        "evaluate",
        settings,
        "Challenger, champion and baselines on the same cases of the day. Also without DPO.",
        trigger_rule="none_failed",
    )
    release = job_task(
        "release", settings, "Builds the indexes and one immutable release with its manifest."
    )
    promote = job_task(
        "promote", settings, "Makes the release the champion unless it is worse than tolerated."
    )
    training_done = EmptyOperator(
        task_id="training_done",
        trigger_rule="all_done",
        doc_md="Training is over, whatever became of it: inference may go on with the champion.",
    )
    infer = sharded_job_task(
        "infer",
        settings.inference.shards,
        "Candidates for all active users, a shard a task. Nothing to do before a first champion.",
        pool=INFERENCE_POOL,
    )
    publish = job_task(
        "publish", settings, "Gates the candidates; publishes to the lake and the online store."
    )
    report = job_task(
        "report",
        settings,
        "The HTML report of the day, whatever happened.",
        trigger_rule="all_done",
    )

    @task(
        trigger_rule="one_failed",
        retries=0,
        doc_md="Fails the run if any task failed: the report alone would let it end as a success.",
    )
    def watcher() -> None:
        raise AirflowFailException("a task of this run failed; its own log says why")

    wait_for_raw >> gate_raw >> curate >> semantic_ids >> [interests, synthetic_histories]
    [interests, synthetic_histories] >> examples >> sft >> dpo
    dpo >> evaluate >> release >> promote >> training_done
    [interests, training_done] >> infer >> publish >> report
    list(dag.tasks) >> watcher()
