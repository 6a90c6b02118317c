"""What Semantic IDs are worth to a model that writes them: hits of one small model, trained alike.

The model is a decoder of two layers. It knows no words: it reads the Semantic IDs of the objects
that a user took, oldest first, and learns every next token. Cases are then decoded by constrained
beam search over all objects.

Knows nothing of where histories come from or of how Semantic IDs were made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.evaluation import Histories, Rows, ranked_in_lists
from leadre_lib.model import (
    EOS_TOKEN,
    Meanings,
    build_model,
    build_tokenizer,
    sid_token_ids,
    sid_tokens,
)
from leadre_lib.quantisers import Codebook, Codes
from leadre_lib.semantic_ids import format_sid
from leadre_lib.settings import DecodingSettings, ModelSettings

LAST = 10  # objects of a history that the model reads
BEAM, TOP = 20, 10
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 3e-3, 0.1
WARM_UP = 0.1  # part of the steps in which the learning rate rises; then it falls to 0
BYTES = 258  # the smallest vocabulary of words that a tokenizer can have
MODEL = ModelSettings(
    hidden_size=96,
    intermediate_size=256,
    layers=2,
    heads=4,
    kv_heads=2,
    vocabulary=BYTES,
    max_tokens=512,
)
NO_OBJECT, NO_LABEL = -1, -100


@dataclass(frozen=True)
class Cases:
    """What users took before, and the row of the object that each took next, [cases]."""

    histories: Histories
    target: Rows


def hit_rate(
    train: Histories,
    cases: Cases,
    codes: Codes,
    sizes: list[int],
    codebook: Codebook,
    seed: int,
    steps: int,
) -> float:
    """HR@10 of a model that was trained on the histories of `train`.

    Args:
        train: histories of object rows.
        cases: what is evaluated; any object may be ranked.
        codes: int32 [objects, levels + 1], the Semantic IDs.
        sizes: codes of each level and last tokens.
        codebook: gives the token embeddings their start.
        seed: of the model's weights and of the batches.
        steps: optimizer steps.
    """
    tokenizer = build_tokenizer(["."], sid_tokens(sizes), BYTES)
    ids = sid_token_ids(tokenizer, sizes)
    tokens = torch.from_numpy(np.stack([t[c] for t, c in zip(ids, codes.T, strict=True)], axis=1))
    model = build_model(MODEL, tokenizer, seed, Meanings(_vectors(codebook, sum(sizes))))
    _train(model, tokenizer, tokens, torch.from_numpy(_last_objects(train)), seed, steps)
    decoder = BeamDecoder(
        model,
        tokenizer,
        ConstraintIndex.build(codes, sizes),
        ids,
        DecodingSettings(beam=BEAM, top_k=BEAM),
        MODEL.max_tokens,
    )
    found, _ = decoder.decode(_prompts(cases.histories, codes), TOP)
    return ranked_in_lists(found, cases.target, len(codes)).metrics()["HR@10"]


def _vectors(codebook: Codebook, tokens: int) -> np.ndarray:
    """The codes' own vectors [tokens, latent]; none for the last tokens, which mean nothing."""
    centroids = np.concatenate(codebook.centroids())
    vectors = np.full((tokens, centroids.shape[1]), np.nan, np.float32)
    vectors[: len(centroids)] = centroids
    return vectors


def _last_objects(histories: Histories) -> Rows:
    """The last objects of each history, oldest first, [histories, LAST], padded at the end."""
    lengths = np.diff(histories.offsets)
    place = np.arange(len(histories.values)) - histories.offsets[:-1][histories.cases]
    place -= np.maximum(lengths - LAST, 0)[histories.cases]
    rows = np.full((len(histories), LAST), NO_OBJECT, np.int64)
    kept = place >= 0
    rows[histories.cases[kept], place[kept]] = histories.values[kept]
    return rows


def _prompts(histories: Histories, codes: Codes) -> list[str]:
    """As in training: a mark of the beginning, then the Semantic IDs of the last objects."""
    sids = np.array([*format_sid(codes), ""])  # NO_OBJECT is the last, empty one
    return [EOS_TOKEN + "".join(row) for row in sids[_last_objects(histories)]]


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    seed: int,
    steps: int,
) -> None:
    """Learn every token of the histories `rows` [users, LAST]; `tokens` [objects, levels + 1]."""
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP, anneal_strategy="linear"
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        objects = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        none = (objects == NO_OBJECT)[:, :, None]
        labels = tokens[objects].masked_fill(none, NO_LABEL).flatten(1)
        labels = torch.nn.functional.pad(labels, (1, 0), value=NO_LABEL)
        read = labels.masked_fill(labels == NO_LABEL, tokenizer.pad_token_id)
        read[:, 0] = tokenizer.eos_token_id
        # Padding comes last, where no token that counts can see it: no mask is needed.
        optimizer.zero_grad()
        model(input_ids=read, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
