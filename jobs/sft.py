"""Supervised fine-tuning of the day's model on the alignment tasks, by ranks under DeepSpeed.

Training goes on from the champion as it was before the day; where there is none, from the base
model of the settings, or from scratch. Writes `sft/model` and `sft/loss.json` in the day's work
folder. Resumes from the newest whole checkpoint of an earlier attempt; done already, it only says
so.
"""

from __future__ import annotations

import argparse
import datetime as dt
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.command import main, parser
from leadre_lib import facts
from leadre_lib.errors import LeadreError, NothingToDo
from leadre_lib.facts import remove
from leadre_lib.lake import Lake
from leadre_lib.release import Releases
from leadre_lib.settings import Settings

if TYPE_CHECKING:
    from leadre_lib.catalogue import Catalogue
    from leadre_lib.model import Meanings
    from leadre_lib.quantisers import Codebook
    from leadre_lib.training import Validation

log = logging.getLogger(__name__)


def _meanings(codebook: Codebook, sizes: Sequence[int], ads: Catalogue) -> Meanings:
    """What the tokens of a new model stand for: Semantic IDs the codebook's own vectors, but for
    the last level's, which mean nothing by themselves; words what the objects mean that they tell.
    """
    from leadre_lib.model import Meanings

    centroids = np.concatenate(codebook.centroids())
    vectors = np.full((sum(sizes), centroids.shape[1]), np.nan, np.float32)
    vectors[: len(centroids)] = centroids
    return Meanings(vectors, ads.texts(), ads.codes + np.cumsum([0, *sizes[:-1]]))


def _validation(settings: Settings, lake: Lake, ds: dt.date, ads: Catalogue) -> Validation | None:
    """A sample of the day's validation cases, on which the best weights are chosen; None without
    any.
    """
    if not settings.sft.validation_cases or not lake.has("eval_examples", ds):
        return None
    from leadre_lib.comparison import cases_of
    from leadre_lib.constraint_index import ConstraintIndex
    from leadre_lib.generation import sid_sizes
    from leadre_lib.quantisers import Codebook
    from leadre_lib.training import Validation

    examples = lake.read("eval_examples", ds).sort_by("case_id")
    examples = examples.filter(pc.equal(examples["split"], "valid"))
    if not len(examples):
        return None
    rng = np.random.default_rng(settings.seed)
    count = min(len(examples), settings.sft.validation_cases)
    drawn = np.sort(rng.choice(len(examples), count, replace=False))
    cases = cases_of(examples.take(pa.array(drawn)), ads)
    sizes = sid_sizes(Codebook.load(settings.codebooks / ads.codebook).sizes, settings)
    index = ConstraintIndex.build(ads.codes, sizes, ads.active_objects, codebook=ads.codebook)
    seen = None
    if settings.evaluation.exclude_seen:
        seen = np.split(cases.histories.values, cases.histories.offsets[1:-1])
    return Validation(cases.prompts, cases.target, seen, index)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Prepare what the ranks read, then run them."""
    ds, lake = args.ds, Lake(settings.lake)
    examples = lake.read("sft_examples", ds).sort_by("example_id")
    # What an earlier run of the day left must not be taken for this one's.
    for stale in ("dpo/model", "evaluation.json", "release.json"):
        remove(settings.work(ds) / stale)
    if not examples.num_rows:
        remove(settings.work(ds) / "sft")
        raise NothingToDo(f"no behaviours before {ds}: nothing to learn from")
    # Ten seconds of imports that a day with nothing to learn from does without.
    from leadre_lib.catalogue import catalogue
    from leadre_lib.generation import sid_sizes
    from leadre_lib.model import sid_tokens
    from leadre_lib.quantisers import Codebook
    from leadre_lib.training import prepare_sft, run_ranks

    version = examples["codebook"][0].as_py()
    codebook = Codebook.load(settings.codebooks / version)
    champion = Releases(settings.releases).champion(before=ds)
    if champion is not None:
        champion.require_codebook(version, f"`sft_examples` of ds={ds}")
        template = examples["template"][0].as_py()
        if champion.template != template:
            log.warning(
                "training goes on from %s, whose model and tokens were trained with template %s, on"
                " prompts of %s",
                *(champion.id, champion.template, template),
            )
    ads = catalogue(lake.read("ads", ds), lake.read("ad_semantic_ids", ds), ds)
    if ads.codebook != version:
        raise LeadreError(
            f"`sft_examples` of ds={ds} are of codebook {version}, but `ad_semantic_ids` of"
            f" {ads.codebook}: it was refreshed since; run the day again from `interests` on"
        )
    sizes = sid_sizes(codebook.sizes, settings)
    scratch = champion is None and not settings.model.base
    prepare_sft(
        examples,
        settings.work(ds),
        champion.folder if champion else None,
        settings,
        sid_tokens(sizes),
        _meanings(codebook, sizes, ads) if scratch else None,
        _validation(settings, lake, ds, ads),
    )
    run_ranks("sft", settings.work(ds), settings)
    facts.record(
        settings,
        ds,
        "sft",
        examples=examples.num_rows,
        started_from=champion.id if champion else settings.model.base or "scratch",
    )


if __name__ == "__main__":
    main(run, parser(__doc__), "sft")
