"""The Airflow DAG `leadre_index_rebuild`: new and stopped ads get indexed without retraining.

(Airflow reads only files in which both its name and the word DAG occur.)
"""

from __future__ import annotations

from dags.raw_day import RawDayOperator
from dags.wiring import DS, daily_dag, job_task
from leadre_lib.settings import load_settings

DOC = """
### Index rebuild
Gives the day's new marketing objects a Semantic ID and takes its stopped ads out, as a child
release of the champion with the same model. Where the codebook has drifted from the catalogue it is
refreshed: at most `semantic_ids.max_moved` of the unchanged objects get another ID, and the model's
embeddings follow. Trigger it *between* daily runs, when the day's `raw_ads` have been
landed again: a run of `leadre_daily` under way would find that the champion has changed under it.
It waits for the champion's lock: never at the same time as a promotion.
"""

settings = load_settings()

TAGS = ("leadre", "index", "ads")

with daily_dag("leadre_index_rebuild", settings, DOC, TAGS, scheduled=False) as dag:
    wait_for_raw_ads = RawDayOperator(
        task_id="wait_for_raw_ads",
        lake=str(settings.lake),
        tables=("raw_ads",),
        ds=DS,
        hours=settings.chain.raw_deadline_hours,
        doc_md="Waits for the day's ads, up to `chain.raw_deadline_hours` after its end.",
    )
    index_rebuild = job_task(
        "index_rebuild", settings, "A child release of the champion with the indexes of the day."
    )
    wait_for_raw_ads >> index_rebuild
