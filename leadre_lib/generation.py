"""From a model folder and a constraint index to the marketing objects that prompts ask for.

Each distinct prompt is decoded once. Knows nothing of where prompts come from or results go.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder, Decoder
from leadre_lib.model import load, load_tokenizer, sid_token_ids
from leadre_lib.settings import Settings
from leadre_lib.vllm_decoder import VllmDecoder


def sid_sizes(codebook_sizes: Sequence[int], settings: Settings) -> list[int]:
    """Codes of each token of a Semantic ID, the last, which tells objects apart, included."""
    return [*codebook_sizes, settings.semantic_ids.collision_codes]


def open_decoder(
    model: Path,
    index: ConstraintIndex,
    settings: Settings,
    groups: np.ndarray | None = None,
    device: str = "",
) -> Decoder:
    """A decoder that writes the active marketing objects of an index; its rows are the index's.

    Args:
        model: folder of a model and its tokenizer.
        groups: int [objects], see `BeamDecoder`.
        device: such as `cuda:1`; empty: the first accelerator, or the CPU without any.

    Raises:
        LeadreError: the model cannot be loaded or does not know these Semantic IDs, or the engine
            that `decoding.backend` names is not installed.
    """
    if settings.decoding.backend == "vllm":
        _show_only(device)
        tokenizer = load_tokenizer(model)
        ids = sid_token_ids(tokenizer, index.sizes)
        return VllmDecoder(
            model, tokenizer, index, ids, settings.decoding, settings.model.max_tokens
        )
    loaded, tokenizer = load(model)
    return BeamDecoder(
        loaded,
        tokenizer,
        index,
        sid_token_ids(tokenizer, index.sizes),
        settings.decoding,
        settings.model.max_tokens,
        device or ("cuda" if torch.cuda.is_available() else "cpu"),
        groups,
    )


def _show_only(device: str) -> None:
    """Let this process see one accelerator: vLLM takes the first that it sees."""
    _, named, number = device.partition("cuda:")
    if named:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(number)] if seen != [""] else number


def decode_distinct(
    decoder: Decoder, prompts: Sequence[str], k: int, exclude: Sequence[np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """What `Decoder.decode` gives, objects and scores, both [prompts, k].

    Equal prompts with equal exclusions share the work.
    """
    keys = [
        (prompt, b"" if exclude is None else exclude[row].tobytes())
        for row, prompt in enumerate(prompts)
    ]
    first: dict[tuple[str, bytes], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    chosen = list(first.values())
    place = {key: at for at, key in enumerate(first)}
    objects, scores = decoder.decode(
        [prompts[row] for row in chosen],
        k,
        None if exclude is None else [exclude[row] for row in chosen],
    )
    of_each = [place[key] for key in keys]
    return objects[of_each], scores[of_each]
