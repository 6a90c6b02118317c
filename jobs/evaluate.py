"""Compare the day's models with the champion and with the baselines, on the cases of the day.

The validation cases decide which model challenges and whether it may be promoted; the test cases
are reported. Every method ranks all active marketing objects. Writes `metrics` and the verdict.
"""

from __future__ import annotations

import argparse
import datetime as dt
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jobs.command import main, parser
from leadre_lib import comparison, facts
from leadre_lib.candidates import groups_of
from leadre_lib.catalogue import Catalogue, catalogue
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.contracts import load_contract
from leadre_lib.embeddings import embed
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.generation import open_decoder, sid_sizes
from leadre_lib.lake import Lake
from leadre_lib.quality import publish
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Releases
from leadre_lib.settings import Settings
from leadre_lib.spark import session

log = logging.getLogger(__name__)

STAGES = ("sft", "dpo")
IN_ORDER = ["user_id", "event_time", "event_id"]
BEHAVIOUR_COLUMNS = [*IN_ORDER, "domain", "event_type", "item_id"]


def _models(settings: Settings, ds: dt.date) -> dict[str, Path]:
    """The models that were trained for the day, by stage."""
    folders = {stage: settings.work(ds) / stage / "model" for stage in STAGES}
    found = {stage: folder for stage, folder in folders.items() if folder.exists()}
    if "sft" not in found:
        raise NothingToDo(f"no model was trained for ds={ds}")
    return found


def _past(settings: Settings, lake: Lake, ds: dt.date) -> pa.Table:
    first = ds - dt.timedelta(days=settings.interests.window_days)
    days = [day for day in lake.days("behaviours") if first <= day < ds]
    past = pa.concat_tables([lake.read("behaviours", day, BEHAVIOUR_COLUMNS) for day in days])
    return past.sort_by([(name, "ascending") for name in IN_ORDER])


def _measure(
    settings: Settings, ads: Catalogue, model: Path, cases: comparison.Cases, index: ConstraintIndex
) -> dict[str, float]:
    # As inference does it, but for the engine: vLLM would stay in memory for every model.
    decoding = settings.decoding.model_copy(update={"backend": "leadre"})
    own = settings.model_copy(update={"decoding": decoding})
    decoder = open_decoder(model, index, own, groups_of(ads, decoding.group_by))
    return comparison.model_metrics(decoder, cases, ads, settings.evaluation.exclude_seen)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Validation first, verdict, then the test table."""
    ds, lake = args.ds, Lake(settings.lake)
    models = _models(settings, ds)
    # In an order of their own: sums of floats depend on it, and files come in any.
    examples = lake.read("eval_examples", ds).sort_by("case_id")
    ads = catalogue(lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds)
    sizes = sid_sizes(Codebook.load(settings.codebooks / ads.codebook).sizes, settings)
    index = ConstraintIndex.build(ads.codes, sizes, ads.active_objects, codebook=ads.codebook)
    splits = {
        split: comparison.cases_of(examples.filter(pc.equal(examples["split"], split)), ads)
        for split in ("valid", "test")
    }
    for split, cases in splits.items():
        if not len(cases):
            raise LeadreError(
                f"ds={ds} has no {split} cases: no user with a history converted on that day;"
                f" check `behaviours` and examples.valid_fraction"
            )
    champion = Releases(settings.releases).champion(before=ds)
    template = examples["template"][0].as_py()
    if champion is not None:
        champion.require_codebook(ads.codebook, f"`ad_semantic_ids` of ds={ds}")
        lake.reads["champion"] = champion.id
        if champion.template != template:
            log.warning(
                "champion %s was trained with template %s, but is measured on prompts of %s",
                *(champion.id, champion.template, template),
            )

    def measure(model: Path, split: str) -> dict[str, float]:
        return _measure(settings, ads, model, splits[split], index)

    stages = {stage: measure(model, "valid") for stage, model in models.items()}
    theirs = measure(champion.model, "valid") if champion else None
    verdict = comparison.verdict(
        stages, champion.id if champion else None, theirs, settings.evaluation
    )
    past = comparison.interactions(_past(settings, lake, ds), ads)
    titles = embed(ads.objects["title"].to_pylist(), settings.embedding, settings.cache)
    baselines = comparison.baseline_scorers(past, titles, settings.sasrec, settings.seed)
    rows = []
    for split, cases in splits.items():
        results = {
            "leadre" if stage == verdict["challenger"] else f"leadre-{stage}": (
                stages[stage] if split == "valid" else measure(model, split)
            )
            for stage, model in models.items()
        }
        if champion is not None and theirs is not None:
            results["leadre-champion"] = (
                theirs if split == "valid" else measure(champion.model, split)
            )
        for name, scorer in baselines.items():
            results[name] = comparison.baseline_metrics(
                scorer, cases, ads, settings.evaluation.exclude_seen
            )
        for method, metrics in results.items():
            rows += comparison.metric_rows(method, split, metrics, len(cases))
            if split == "test":
                print(f"{method:16} HR@10 {metrics['HR@10']:.4f} NDCG@10 {metrics['NDCG@10']:.4f}")
    table = pa.Table.from_pylist(rows, load_contract("metrics").arrow_schema())
    with session(settings) as spark:
        publish(spark, settings, lake, "metrics", ds, table)
    verdict |= {"codebook": ads.codebook, "template": template}
    facts.write_json(settings.work(ds) / "evaluation.json", verdict)
    print(
        f"challenger: {verdict['challenger']}; promote: {verdict['promote']}: {verdict['reason']}"
    )


if __name__ == "__main__":
    main(run, parser(__doc__), "evaluate")
