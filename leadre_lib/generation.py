"""From a model folder and a constraint index to the marketing objects that prompts ask for.

Each distinct prompt is decoded once. Knows nothing of where prompts come from or results go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.model import load, sid_token_ids
from leadre_lib.settings import Settings


def sid_sizes(codebook_sizes: Sequence[int], settings: Settings) -> list[int]:
    """Codes of each token of a Semantic ID, the last, which tells objects apart, included."""
    return [*codebook_sizes, settings.semantic_ids.collision_codes]


def open_decoder(model: Path, index: ConstraintIndex, settings: Settings) -> BeamDecoder:
    """A decoder that writes the active marketing objects of an index; its rows are the index's.

    Args:
        model: folder of a model and its tokenizer.

    Raises:
        LeadreError: the model cannot be loaded or does not know these Semantic IDs.
    """
    loaded, tokenizer = load(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return BeamDecoder(
        loaded,
        tokenizer,
        index,
        sid_token_ids(tokenizer, index.sizes),
        settings.decoding,
        settings.model.max_tokens,
        device,
    )


def decode_distinct(
    decoder: BeamDecoder, prompts: Sequence[str], k: int, exclude: Sequence[np.ndarray] | None
) -> np.ndarray:
    """Object rows int64 [prompts, k] of each prompt.

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
    objects, _ = decoder.decode(
        [prompts[row] for row in chosen],
        k,
        None if exclude is None else [exclude[row] for row in chosen],
    )
    return objects[[place[key] for key in keys]]
