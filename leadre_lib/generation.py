"""From a model folder and a day's catalogue to ads: opening the decoder, and decoding prompts.

Each distinct prompt is decoded once. Knows nothing of where prompts come from or results go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from leadre_lib.catalogue import Catalogue
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.model import load, sid_token_ids
from leadre_lib.settings import Settings


def sid_sizes(codebook_sizes: Sequence[int], settings: Settings) -> list[int]:
    """Codes of each token of a Semantic ID, the last, which tells colliding ads apart, included."""
    return [*codebook_sizes, settings.semantic_ids.collision_codes]


def open_decoder(
    model: Path, catalogue: Catalogue, sizes: Sequence[int], settings: Settings
) -> BeamDecoder:
    """A decoder that writes the active ads of a catalogue; its rows are the catalogue's.

    Args:
        model: folder of a model and its tokenizer.
        sizes: as `sid_sizes` gives them.

    Raises:
        LeadreError: the model cannot be loaded or does not know these Semantic IDs.
    """
    loaded, tokenizer = load(model)
    index = ConstraintIndex.build(catalogue.codes, sizes, catalogue.active_rows())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return BeamDecoder(
        loaded,
        tokenizer,
        index,
        sid_token_ids(tokenizer, sizes),
        settings.decoding,
        settings.model.max_tokens,
        device,
    )


def decode_distinct(
    decoder: BeamDecoder, prompts: Sequence[str], k: int, exclude: Sequence[np.ndarray] | None
) -> np.ndarray:
    """Ads int64 [prompts, k] of each prompt; equal prompts with equal exclusions share the work."""
    keys = [
        (prompt, b"" if exclude is None else exclude[row].tobytes())
        for row, prompt in enumerate(prompts)
    ]
    first: dict[tuple[str, bytes], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    chosen = list(first.values())
    place = {key: at for at, key in enumerate(first)}
    ads, _ = decoder.decode(
        [prompts[row] for row in chosen],
        k,
        None if exclude is None else [exclude[row] for row in chosen],
    )
    return ads[[place[key] for key in keys]]
