"""Compare the day's models with the champion and with the baselines, on the cases of the day.

The validation cases decide which model challenges and whether it may be promoted, and what the
challenger's lists are fused with other signals by; the test cases are reported. Every method ranks
all active marketing objects. Writes `case_ranks`, `metrics` and the verdict.
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
from leadre_lib.evaluation import Ranked
from leadre_lib.fusion import Factors, Fusion, Written, learn_signals, nothing_written
from leadre_lib.generation import open_decoder, sid_sizes
from leadre_lib.lake import Lake
from leadre_lib.quality import publish
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Releases
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import Settings
from leadre_lib.signals import build_signals
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


def taken_before(
    settings: Settings, lake: Lake, ads: Catalogue, ds: dt.date
) -> comparison.Interactions:
    """What users clicked and converted on in the window before the day."""
    return comparison.interactions(_past(settings, lake, ds), ads)


def _on_ads(behaviours: pa.Table) -> pa.Table:
    """What of a day's behaviours is on ads: content, most of them, is not held."""
    return behaviours.filter(pc.equal(behaviours["domain"], "ad"))


def _past(settings: Settings, lake: Lake, ds: dt.date) -> pa.Table:
    first = ds - dt.timedelta(days=settings.interests.window_days)
    days = [day for day in lake.days("behaviours") if first <= day < ds]
    none = load_contract("behaviours").arrow_schema().empty_table().select(BEHAVIOUR_COLUMNS)
    read = [_on_ads(lake.read("behaviours", day, BEHAVIOUR_COLUMNS)) for day in days]
    past = pa.concat_tables(read or [none])
    return past.sort_by([(name, "ascending") for name in IN_ORDER])


def _write(
    settings: Settings, ads: Catalogue, model: Path, cases: comparison.Cases, index: ConstraintIndex
) -> Written:
    """What a model writes for the cases."""
    # As inference does it, but for the engine: vLLM would stay in memory for every model.
    decoding = settings.decoding.model_copy(update={"backend": "leadre"})
    own = settings.model_copy(update={"decoding": decoding})
    decoder = open_decoder(model, index, own, groups_of(ads, decoding.group_by))
    return comparison.write_lists(decoder, cases, settings.evaluation.exclude_seen)


def _fuse(
    settings: Settings,
    ads: Catalogue,
    past: comparison.Interactions,
    splits: dict[str, comparison.Cases],
    written: dict[str, Written],
) -> tuple[Factors, dict[str, dict[str, Ranked]]] | None:
    """What a model's lists are fused with other signals by, and how that did on each split, beside
    the signals without a model; None where there are too few validation cases to tell.
    """
    texts, exclude = ads.texts(), settings.evaluation.exclude_seen
    meaning = EmbeddingIndex.build(embed(texts, settings.embedding, settings.cache))
    taken, active = past.taken(), ads.active_objects
    signals = build_signals(texts, meaning, taken, settings.fusion)
    wanted = past.last_conversions(active, settings.examples.eval_targets == "happened")
    learnt = learn_signals(
        signals, active, taken, wanted, settings.fusion, settings.seed, repeat=not exclude
    )
    groups = groups_of(ads, settings.decoding.group_by)
    fusion = Fusion(signals, active, settings.fusion, groups, settings.decoding.max_per_group)

    def measure(lists: dict[str, Written]) -> tuple[Factors, dict[str, Ranked]] | None:
        found = comparison.fit_fusion(fusion, learnt, lists["valid"], splits["valid"], exclude)
        if found is None:
            return None
        factors, of_valid = found
        of_test = comparison.fused_lists(fusion, factors, lists["test"], splits["test"], exclude)
        fused = {"valid": of_valid, "test": of_test}
        ranked = {
            split: comparison.rank_lists(fused[split], cases, ads)
            for split, cases in splits.items()
        }
        return factors, ranked

    whole = measure(written)
    without = measure({split: nothing_written(len(cases)) for split, cases in splits.items()})
    if whole is None or without is None:
        return None
    return whole[0], {"leadre-fused": whole[1], "leadre-signals": without[1]}


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Validation first, verdict, then the test table."""
    ds, lake = args.ds, Lake(settings.lake)
    models = _models(settings, ds)
    # In an order of their own: sums of floats depend on it, and files come in any.
    examples = lake.read("eval_examples", ds).sort_by("case_id")
    ads = catalogue(lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds)
    sizes = sid_sizes(Codebook.load(settings.codebooks / ads.codebook).sizes, settings)
    index = ConstraintIndex.build(ads.codes, sizes, ads.active_objects, codebook=ads.codebook)
    asked = {s: examples.filter(pc.equal(examples["split"], s)) for s in ("valid", "test")}
    splits = {split: comparison.cases_of(rows, ads) for split, rows in asked.items()}
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

    def write(model: Path, split: str) -> Written:
        return _write(settings, ads, model, splits[split], index)

    def measure(written: Written, split: str) -> Ranked:
        return comparison.rank_lists(written.objects, splits[split], ads)

    all_models = dict(models) | ({"champion": champion.model} if champion else {})
    lists = {"valid": {stage: write(model, "valid") for stage, model in all_models.items()}}
    measured = {
        stage: measure(written, "valid").metrics(splits["valid"].ecpm)
        for stage, written in lists["valid"].items()
    }
    theirs = measured.pop("champion", None)
    verdict = comparison.verdict(
        measured, champion.id if champion else None, theirs, settings.evaluation
    )
    challenger = verdict["challenger"]
    lists["test"] = {stage: write(model, "test") for stage, model in all_models.items()}
    past = taken_before(settings, lake, ads, ds)
    fused = None
    if settings.fusion.enabled:
        chosen = {split: lists[split][challenger] for split in splits}
        fused = _fuse(settings, ads, past, splits, chosen)
    verdict["fusion"] = fused and fused[0].as_dict()
    verdict["fusion_settings"] = fused and settings.fusion.model_dump()
    titles = embed(ads.objects["title"].to_pylist(), settings.embedding, settings.cache)
    baselines = comparison.baseline_scorers(past, titles, settings.sasrec, settings.seed)
    rows, ranks = [], []
    for split, cases in splits.items():
        results = {} if fused is None else {name: of[split] for name, of in fused[1].items()}
        results |= {
            "leadre" if stage == challenger else f"leadre-{stage}": measure(written, split)
            for stage, written in lists[split].items()
        }
        for name, scorer in baselines.items():
            results[name] = comparison.rank_baseline(
                scorer, cases, ads, settings.evaluation.exclude_seen
            )
        for method, ranked in results.items():
            metrics = ranked.metrics(cases.ecpm)
            ranks.append(comparison.rank_table(method, split, ranked, asked[split]))
            rows += comparison.metric_rows(method, split, metrics, len(cases))
            if split == "test":
                print(f"{method:16} HR@10 {metrics['HR@10']:.4f} NDCG@10 {metrics['NDCG@10']:.4f}")
    table = pa.Table.from_pylist(rows, load_contract("metrics").arrow_schema())
    places = pa.concat_tables(ranks).cast(load_contract("case_ranks").arrow_schema())
    with session(settings) as spark:
        publish(spark, settings, lake, "case_ranks", ds, places)
        publish(spark, settings, lake, "metrics", ds, table)
    verdict |= {"codebook": ads.codebook, "template": template}
    facts.write_json(settings.work(ds) / "evaluation.json", verdict)
    print(
        f"challenger: {verdict['challenger']}; promote: {verdict['promote']}: {verdict['reason']}"
    )


if __name__ == "__main__":
    main(run, parser(__doc__), "evaluate")
