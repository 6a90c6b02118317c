"""Preference pairs among what a model lists itself: the origin `beam` (see `preferences`).

What a model finds likely is where a preference changes what it shows, and behaviours hold few pairs
of that. But a dear ad that is irrelevant must not be learnt. So where the list holds what the user
wanted in truth, that alone is chosen, and never rejected; elsewhere both sides are about as likely.

Knows nothing of how the model was trained, or where prompts come from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.catalogue import Catalogue
from leadre_lib.decoding import Decoder
from leadre_lib.generation import decode_distinct
from leadre_lib.settings import Settings

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def beam_pairs(
    decoder: Decoder, examples: pa.Table, ads: Catalogue, settings: Settings
) -> pa.Table:
    """Decode a sample of prompts, and pair what comes out.

    Args:
        decoder: of the model; its rows are the objects of `ads`.
        examples: rows of `sft_examples`.
        settings: `dpo.beam_prompts`, `beam_top`, `max_score_gap`; `examples.min_ecpm_ratio`,
            `pairs_per_user` (pairs a prompt), and the seed.

    Returns:
        `origin`, `prompt`, `chosen`, `rejected`, `chosen_ecpm` and `rejected_ecpm`.
    """
    told = examples.filter(pc.equal(examples["task"], "next_ad")).sort_by("example_id")
    encoded = told["prompt"].combine_chunks().dictionary_encode()
    count = min(settings.dpo.beam_prompts, len(encoded.dictionary))
    sample = np.random.default_rng(settings.seed).permutation(len(encoded.dictionary))[:count]
    prompts = encoded.dictionary.take(pa.array(sample))
    objects, scores = decode_distinct(decoder, prompts.to_pylist(), settings.dpo.beam_top, None)
    # What users wanted, as keys of prompt and object.
    wanted = encoded.indices.to_numpy() * len(ads.codes) + ads.object_rows(told["ad_id"])
    is_target = np.isin(sample[:, None] * len(ads.codes) + objects, wanted) & (objects >= 0)
    value = object_values(ads)
    prompt, chosen, rejected = pairs_of_lists(
        objects,
        scores,
        is_target,
        value,
        settings.examples.min_ecpm_ratio,
        settings.dpo.max_score_gap,
        settings.examples.pairs_per_user,
    )
    names = ads.objects["semantic_id"].combine_chunks()
    return pa.table(
        {
            "origin": pa.array(["beam"] * len(prompt), pa.string()),
            "prompt": prompts.take(pa.array(prompt)),
            "chosen": names.take(pa.array(chosen)),
            "rejected": names.take(pa.array(rejected)),
            "chosen_ecpm": value[chosen],
            "rejected_ecpm": value[rejected],
        }
    )


def object_values(ads: Catalogue) -> Floats:
    """eCPM of each object's best active ad, float64 [objects]; NaN where none is known."""
    value = np.full(len(ads.codes), np.nan)
    active = np.flatnonzero(ads.active_objects)
    ecpm = pc.fill_null(ads.ads["ecpm"], float("nan")).to_numpy()
    value[active] = ecpm[ads.best_ads(active)]
    return value


def pairs_of_lists(
    objects: Rows,
    scores: npt.NDArray[np.float32],
    is_target: npt.NDArray[np.bool_],
    value: Floats,
    min_ecpm_ratio: float,
    max_score_gap: float,
    limit: int,
) -> tuple[Rows, Rows, Rows]:
    """Pairs among what is listed for each prompt, the object of higher value chosen.

    Args:
        objects: [prompts, k] the best first, -1 where there are fewer; rows of `value`.
        scores: [prompts, k], natural logarithms.
        is_target: [prompts, k], what the user wanted in truth.
        value: eCPM of each object [all objects]; NaN: not known, so in no pair.
        min_ecpm_ratio: value of the chosen over that of the rejected, at least.
        max_score_gap: between two sides of which none is a target, at most.
        limit: pairs a prompt, those of the likeliest sides.

    Returns:
        The prompt's row, and the object rows of chosen and rejected; int64 [pairs] each.
    """
    worth = np.where(objects >= 0, value[objects], np.nan)
    dearer = worth[:, :, None] > worth[:, None, :] * min_ecpm_ratio
    with np.errstate(invalid="ignore"):  # of minus infinities, where there is no object
        near = np.abs(scores[:, :, None] - scores[:, None, :]) <= max_score_gap
    known = is_target.any(axis=1)
    near[known] = is_target[known, :, None] & ~is_target[known, None, :]
    prompt, chosen, rejected = np.nonzero(dearer & near)
    order = np.lexsort([chosen, np.maximum(chosen, rejected), prompt])
    prompt, chosen, rejected = prompt[order], chosen[order], rejected[order]
    kept = np.arange(len(prompt)) - np.searchsorted(prompt, prompt) < limit
    prompt, chosen, rejected = prompt[kept], chosen[kept], rejected[kept]
    return prompt, objects[prompt, chosen], objects[prompt, rejected]
