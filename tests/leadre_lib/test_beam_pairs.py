"""Pairs among what a model lists: by hand, and from a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leadre_lib import model as models
from leadre_lib.beam_pairs import beam_pairs, object_values, pairs_of_lists
from leadre_lib.catalogue import Catalogue, catalogue
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.generation import decode_distinct, open_decoder
from leadre_lib.settings import DecodingSettings, DpoSettings, ExampleSettings, ModelSettings
from leadre_lib.settings import Settings as AllSettings
from tests.worlds import DAY0, DAY1, ad, at, rows

SIZES = (4, 4, 2)
VALUE = np.array([1.0, 2.0, 4.0, np.nan, 8.0])


def pairs(
    objects: list[int], scores: list[float], targets: set[int] = frozenset(), **options: Any
) -> list[tuple[int, int]]:
    """The pairs of one list; by default objects of any score may be paired."""
    listed = np.array([objects])
    settings = {"min_ecpm_ratio": 1.1, "max_score_gap": 100.0, "limit": 99} | options
    prompt, chosen, rejected = pairs_of_lists(
        listed, np.array([scores], np.float32), np.isin(listed, list(targets)), VALUE, **settings
    )
    assert set(prompt.tolist()) <= {0}
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def test_of_two_likely_objects_the_dearer_is_chosen() -> None:
    assert pairs([0, 1, 2], [-1, -1, -1]) == [(1, 0), (2, 0), (2, 1)]
    assert pairs([0, 1, 2], [-1, -1, -1], min_ecpm_ratio=3) == [(2, 0)]
    assert pairs([0, 1], [-1, -1], min_ecpm_ratio=2) == []  # not more than twice
    assert pairs([0, 3], [-1, -1]) == []  # what it is worth is not known
    assert pairs([0, -1], [-1, -np.inf]) == []
    assert pairs([-1, -1], [-np.inf, -np.inf]) == []


def test_both_sides_are_about_as_likely() -> None:
    scores = [-1.0, -1.5, -4.0]
    assert pairs([0, 1, 2], scores, max_score_gap=1) == [(1, 0)]
    assert pairs([0, 1, 2], scores, max_score_gap=2.5) == [(1, 0), (2, 1)]


def test_where_the_truth_is_listed_it_alone_is_chosen_and_never_rejected() -> None:
    # 1 is what the user wanted: better than 0, and 4, though dearer, is not preferred to it.
    assert pairs([4, 0, 1, 2], [-1, -1, -9, -1], {1}, max_score_gap=1) == [(1, 0)]
    assert pairs([4, 0, 1, 2], [-1, -1, -9, -1], {1, 2}) == [(1, 0), (2, 0)]
    assert pairs([4, 2, 0], [-1, -1, -1], {0}) == []


def test_a_prompt_has_the_pairs_of_its_likeliest_objects() -> None:
    assert pairs([2, 1, 0], [-1, -2, -3], limit=2) == [(2, 1), (2, 0)]
    assert pairs([0, 1, 2], [-1, -2, -3], limit=1) == [(1, 0)]
    several = pairs_of_lists(
        np.array([[0, 1], [0, 3], [4, 2]]),
        np.zeros((3, 2), np.float32),
        np.zeros((3, 2), bool),
        VALUE,
        1.1,
        1.0,
        1,
    )
    assert [part.tolist() for part in several] == [[0, 2], [1, 4], [0, 2]]


@pytest.fixture
def ads() -> Catalogue:
    """Ten objects of one ad, worth 1 to 10, and another ad of the first, which is worth 30."""
    records = [
        {**ad(f"ad{n}", f"Thing {n}"), "text_hash": "", "ecpm": float(n + 1)} for n in range(10)
    ]
    records += [{**records[0], "ad_id": "more", "start_date": DAY1, "ecpm": 30.0}]
    ids = [
        {
            "ad_id": each["ad_id"],
            "marketing_object_id": each["marketing_object_id"],
            "semantic_id": f"<a_{int(n) % 4}><b_{int(n) // 4}><c_0>",
            "codes": [int(n) % 4, int(n) // 4, 0],
            "text_hash": "",
            "codebook": "book",
        }
        for each in records
        for n in [each["marketing_object_id"].removeprefix("ad")]
    ]
    return catalogue(rows("ads", records), rows("ad_semantic_ids", ids), DAY1)


def test_an_object_is_worth_its_best_active_ad(ads: Catalogue) -> None:
    assert object_values(ads).tolist() == [30.0, *range(2, 11)]


def test_pairs_of_a_real_model_are_among_what_it_lists(ads: Catalogue, tmp_path: Path) -> None:
    settings = AllSettings(
        model=ModelSettings(hidden_size=32, intermediate_size=64, layers=1, vocabulary=300),
        decoding=DecodingSettings(beam=8),
        dpo=DpoSettings(beam_prompts=5, beam_top=4, max_score_gap=0.5),
        examples=ExampleSettings(pairs_per_user=2),
    )
    prompts = [f"user {n} likes\nAnswer: " for n in range(8)]
    tokenizer = models.build_tokenizer(prompts, models.sid_tokens(SIZES), 300)
    models.save(models.build_model(settings.model, tokenizer, 1), tokenizer, tmp_path / "model")
    index = ConstraintIndex.build(ads.codes, SIZES, ads.active_objects, codebook="book")
    decoder = open_decoder(tmp_path / "model", index, settings)
    listed, scores = decode_distinct(decoder, prompts, 4, None)
    example = {"weight": 1.0, "user_id": "u", "target_time": at(DAY0, 9), "codebook": "book"}
    wanted = {prompt: int(listed[n, n % 4]) for n, prompt in enumerate(prompts)}
    examples = [
        {
            **example,
            "example_id": f"{task}:{n}",
            "task": task,
            "prompt": prompt if task == "next_ad" else f"{prompt}by titles",
            "response": "<a_0>",
            "ad_id": f"ad{wanted[prompt]}",
        }
        for n, prompt in enumerate(prompts)
        for task in ("next_ad", "titles_to_sid")
    ]
    made = beam_pairs(decoder, rows("sft_examples", examples), ads, settings)
    assert made.num_rows
    assert made.equals(beam_pairs(decoder, rows("sft_examples", examples), ads, settings))
    names = ads.objects["semantic_id"].to_pylist()
    told = {prompt: [names[row] for row in listed[n]] for n, prompt in enumerate(prompts)}
    counts: dict[str, int] = {}
    for row in made.to_pylist():
        counts[row["prompt"]] = counts.get(row["prompt"], 0) + 1
        assert {row["chosen"], row["rejected"]} <= set(told[row["prompt"]])
        assert row["chosen_ecpm"] > 1.1 * row["rejected_ecpm"]
        assert row["chosen"] == names[wanted[row["prompt"]]]  # the truth is in every list
        assert row["origin"] == "beam"
    assert len(counts) <= 5
    assert max(counts.values()) <= 2
    assert np.isfinite(scores).all()
