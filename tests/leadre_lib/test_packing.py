"""Packed examples against the same examples one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from leadre_lib.packing import (
    NO_LABEL,
    Ragged,
    attention_mask,
    fill_rows,
    sequences,
)
from leadre_lib.training_rank import Rows, collate

WORDS, ANSWERS = (10, 40), (40, 60)  # token ids of prompts and of answers
HISTORY = 50  # a token of a prompt that has a loss
LEARNT = (HISTORY, HISTORY + 1)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config).double()


@pytest.fixture(scope="module")
def examples() -> tuple[list[list[int]], list[list[int]], np.ndarray, np.ndarray]:
    """Prompts, answers, groups and weights: users with one, three and four targets, whose prompts
    are alike but for some last tokens, and one prompt that is a single token.
    """
    rng = np.random.default_rng(4)
    prompts, groups = [], []
    for group, (targets, own) in enumerate([(3, 0), (1, 0), (4, 3), (1, 0)]):
        start = [*rng.integers(*WORDS, 9).tolist(), *LEARNT, 9]
        for _ in range(targets):
            prompts.append([*start, *rng.integers(*WORDS, own).tolist()] if group < 3 else [9])
            groups.append(group)
    answers = [rng.integers(*ANSWERS, rng.integers(2, 4)).tolist() for _ in prompts]
    weights = rng.random(len(prompts)) + 0.5
    return prompts, answers, np.array(groups), weights.astype(np.float32)


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum of the losses of a batch of packed rows."""
    logits = model(
        input_ids=batch["tokens"],
        position_ids=batch["positions"],
        attention_mask=attention_mask(batch["documents"], batch["branches"]),
    ).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=NO_LABEL,
        reduction="none",
    )
    return (losses * batch["weights"][:, 1:].flatten()).sum()


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("on_prompts", [False, True])
@pytest.mark.parametrize("limit", [128, 24])
def test_losses_and_gradients_are_those_of_the_examples_one_by_one(
    model: PreTrainedModel,
    examples: tuple[list[list[int]], list[list[int]], np.ndarray, np.ndarray],
    limit: int,
    on_prompts: bool,
) -> None:
    prompts, answers, groups, weights = examples
    ragged = Ragged.of(prompts)
    learnt = np.isin(ragged.values, LEARNT if on_prompts else ())
    packed = sequences(ragged, learnt, Ragged.of(answers), weights, groups, limit)
    lengths = np.array([len(row) for row in packed["tokens"].to_pylist()])
    assert lengths.max() <= limit
    assert lengths.sum() < sum(map(len, prompts)) + sum(map(len, answers))
    rows = Rows(packed, Ragged.of(fill_rows(lengths, 64)), 1.0)
    batch = collate([rows[n] for n in range(len(rows))], 0)
    loss = loss_of(model, batch)
    alone = torch.zeros((), dtype=torch.float64)
    for prompt, answer, weight in zip(prompts, answers, weights, strict=True):
        ids = torch.tensor([prompt + answer])
        own = [token if on_prompts and token in LEARNT else NO_LABEL for token in prompt]
        labels = torch.tensor([own + answer])
        logits = model(input_ids=ids).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        alone = alone + float(weight) * nll
    torch.testing.assert_close(loss, alone)
    for ours, theirs in zip(gradients(model, loss), gradients(model, alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # Qwen2 norms in float32


def test_no_target_sees_another_or_another_sequence(model: PreTrainedModel) -> None:
    prompts = [[11, 12, 9], [11, 12, 9], [21, 22, 23, 9]]
    weights = np.ones(3, np.float32)

    def logits(answers: list[list[int]]) -> torch.Tensor:
        learnt = np.zeros(10, bool)
        packed = sequences(
            Ragged.of(prompts), learnt, Ragged.of(answers), weights, np.array([0, 0, 1]), 99
        )
        batch = collate([Rows(packed, Ragged.of([[0, 1]]), 1.0)[0]], 0)
        mask = attention_mask(batch["documents"], batch["branches"])
        found = model(
            input_ids=batch["tokens"], position_ids=batch["positions"], attention_mask=mask
        )
        return found.logits[0].detach()

    before, after = logits([[41, 42], [43, 44], [45, 46]]), logits([[51, 52], [43, 44], [45, 46]])
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 4]  # two shared tokens, the first branch's opening, its answer


def test_the_prompts_own_targets_stand_once_and_weigh_what_all_do() -> None:
    prompts = Ragged.of([[11, HISTORY, 12, 9], [11, HISTORY, 12, 9]])
    learnt = prompts.values == HISTORY
    answers, weights = Ragged.of([[41], [42]]), np.array([1.0, 2.0], np.float32)
    row = sequences(prompts, learnt, answers, weights, np.array([0, 0]), 99).to_pylist()[0]
    assert row == {
        "tokens": [11, HISTORY, 12, 9, 41, 9, 42],
        "positions": [0, 1, 2, 3, 4, 3, 4],
        "branches": [0, 0, 0, 1, 1, 2, 2],
        "labels": [NO_LABEL, HISTORY, NO_LABEL, NO_LABEL, 41, NO_LABEL, 42],
        "weights": [3.0, 3.0, 3.0, 1.0, 1.0, 2.0, 2.0],
    }


def test_rows_are_filled_and_hold_every_sequence_once() -> None:
    lengths = np.random.default_rng(1).integers(5, 60, 300)
    rows = fill_rows(lengths, 100)
    assert sorted(n for row in rows for n in row) == list(range(300))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert len(rows) <= 1.05 * lengths.sum() / 100
    assert fill_rows(np.array([150, 100, 1]), 100) == [[0], [1], [2]]
