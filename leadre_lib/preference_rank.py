"""The preference part of a rank: Direct Preference Optimization on TRL's trainer.

The loss is list-wise (S-DPO, https://arxiv.org/abs/2406.09215, equation 10). With one rejected
answer it is that of DPO (https://arxiv.org/abs/2305.18290, equation 7).

Differences from TRL as it comes: the prompt of a list is read once for all its answers, which stand
behind it as branches that do not see each other; lists have weights; log-probabilities under the
reference are computed once an example, before the first step, and kept for a resume, so no second
model is in memory while training. Knows nothing of where pairs come from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from leadre_lib import model as models
from leadre_lib.rank_model import unpartitioned
from leadre_lib.settings import DpoSettings

IGNORED = -100  # label of a token without loss
Batch = dict[str, torch.Tensor]


def preference_trainer(
    folder: Path,
    run: dict[str, Any],
    parts: dict[str, Any],
    arguments: Callable[[Path, DpoSettings, int, int], dict[str, Any]],
    score_labels_only: Callable[[PreTrainedModel], None],
) -> Trainer:
    """The trainer of a rank on what `training.prepare_dpo` wrote in `folder`.

    Args:
        run: what `run.json` says.
        parts: what every trainer gets: model, tokenizer, adapters and callbacks.
        arguments: gives what every trainer is told.
        score_labels_only: lets a model score the labelled positions alone.
    """
    section = DpoSettings.model_validate(run["section"])
    order = np.load(folder / "order.npy", allow_pickle=False)
    args = DPOConfig(
        **arguments(folder, section, run["seed"], len(order)),
        max_length=None,
        beta=section.beta,
        precompute_ref_log_probs=True,  # so that TRL keeps no model for it
        remove_unused_columns=False,
    )
    lists = _lists(folder / "train.parquet", folder / "cache")
    collator = ListCollator(parts["processing_class"].pad_token_id)

    def load_reference() -> Any:
        dtype = torch.bfloat16 if args.bf16 else torch.float32  # as DeepSpeed casts the policy
        with unpartitioned(args):
            reference: Any = models.load(Path(run["init"]), dtype)[0]
        score_labels_only(reference)
        return reference.to(args.device).eval()

    reference = reference_log_probs(folder / "reference.npy", load_reference, lists, collator, args)
    return PreferenceTrainer(
        args=args,
        **parts,
        train_dataset=lists.select(order, keep_in_memory=True),
        data_collator=collator,
        reference=reference,
        weight=torch.tensor(lists.data["weight"].to_numpy(), device=args.device),
        sft_weight=section.sft_weight,
    )


def _lists(path: Path, cache: Path) -> Dataset:
    """The lists, with their number as `row`."""
    lists = Dataset.from_parquet(str(path), cache_dir=str(cache), keep_in_memory=True)
    return lists.add_column("row", np.arange(len(lists)))


class ListCollator:
    """Makes a batch of lists: each one sequence of a prompt and the branches of its answers.

    Args:
        pad_token_id: what fills up short sequences, on the right.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, lists: list[dict[str, Any]]) -> Batch:
        """A batch.

        Args:
            lists: `input_ids`, `branches` (see `training`) and `row` of each.

        Returns:
            `input_ids`, `position_ids`, `branches` and `labels` (-100 but on answers), int64
            [lists, tokens]; `attention_mask`, bool [lists, 1, tokens, tokens]: a token sees what
            stands before it in the prompt and in its own branch; `row` and `tokens`, how many are
            not padding, int64 [lists].
        """
        ids = [torch.tensor(each["input_ids"]) for each in lists]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(ids, batch_first=True, padding_value=self.pad_token_id)
        # Padding counts as prompt: it stands behind everything, where no branch sees it.
        branches = pad([torch.tensor(each["branches"]) for each in lists], batch_first=True)
        before = torch.nn.functional.pad(branches[:, :-1], (1, 0))
        starts = (branches != before) & (branches > 0)
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        start = torch.where(starts, place, 0).cummax(1).values
        prompt = (branches > 0).int().argmax(1, keepdim=True)
        answer = (branches > 0) & ~starts
        seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        return {
            "input_ids": input_ids,
            "position_ids": torch.where(branches > 0, prompt + place - start, place),
            "branches": branches,
            "labels": torch.where(answer, input_ids, IGNORED),
            "attention_mask": (seen & (place[:, None, :] <= place[:, :, None]))[:, None],
            "row": torch.tensor([each["row"] for each in lists]),
            "tokens": torch.tensor([len(row) for row in ids]),
        }


def answer_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Log-probability of each answer, float [lists, answers]; minus infinity where there is none.

    `model` has a fused head: it takes labels and gives log-probabilities.
    """
    outputs = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        fused_lm_head=True,
        use_cache=False,
    )
    branches = batch["branches"]
    count = branches.amax(1)
    sums = outputs.log_probs.new_zeros(len(branches), int(count.max()) + 1, dtype=torch.float32)
    sums = sums.scatter_add(1, branches[:, 1:], outputs.log_probs.float())[:, 1:]
    missing = torch.arange(sums.shape[1], device=sums.device) >= count[:, None]
    return sums.masked_fill(missing, -torch.inf)


def list_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """S-DPO, -log sigmoid(-log sum_j exp(beta (rejected_j - chosen))), float [lists].

    With one rejected a list it is DPO, -log sigmoid(beta (chosen - rejected)).

    Args:
        chosen: log ratios of policy and reference, float [lists].
        rejected: the same, float [lists, most rejected]; minus infinity where there are fewer.
        beta: how little the policy may depart from the reference.
    """
    return -logsigmoid(-torch.logsumexp(beta * (rejected - chosen[:, None]), 1))


def reference_log_probs(
    path: Path,
    load_reference: Callable[[], Any],
    lists: Dataset,
    collator: ListCollator,
    args: TrainingArguments,
) -> torch.Tensor:
    """`answer_log_probs` of all lists under the model that training starts from.

    The ranks share the work, and rank 0 keeps the result in `path`; where it is, it is read.

    Returns:
        float32 [lists, most answers of a list], on the rank's device; 0 where there is no answer.
    """
    if path.is_file():
        return torch.from_numpy(np.load(path, allow_pickle=False)).to(args.device)
    model = load_reference()
    most = pc.max(pc.list_flatten(lists.data["branches"])).as_py()
    found = torch.zeros(len(lists), most, device=args.device)
    lengths = pc.list_value_length(lists.data["input_ids"]).to_numpy()
    own = np.argsort(lengths, kind="stable")[args.process_index :: args.world_size]
    for start in range(0, len(own), args.per_device_train_batch_size):
        rows = own[start : start + args.per_device_train_batch_size]
        made = collator([lists[int(row)] for row in rows])
        batch = {name: values.to(args.device) for name, values in made.items()}
        with torch.no_grad():
            sums = answer_log_probs(model, batch)
        found[batch["row"], : sums.shape[1]] = sums.masked_fill(sums.isinf(), 0.0)
    if args.world_size > 1:
        torch.distributed.all_reduce(found)
    if args.process_index == 0:
        partial = path.with_suffix(".partial.npy")
        np.save(partial, found.cpu().numpy())
        partial.replace(path)
    return found


class PreferenceTrainer(DPOTrainer):
    """DPO over lists, with weights and with the SFT loss of the chosen answers mixed in.

    Args:
        reference: float32 [all lists, answers], see `reference_log_probs`.
        weight: float32 [all lists].
        sft_weight: of the SFT loss, the mean over the tokens of chosen answers.
        kwargs: as TRL's trainer takes them.
    """

    # By row, not in the batch: DeepSpeed's trainer would cast them to bfloat16 there.
    def __init__(
        self, *, reference: torch.Tensor, weight: torch.Tensor, sft_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.reference = reference
        self.weight = weight
        self.sft_weight = sft_weight

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # token ids already

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # in `reference` already

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> torch.Tensor:
        policy = answer_log_probs(model, inputs)
        row = inputs["row"]
        ratios = policy - self.reference[row, : policy.shape[1]]
        weight = self.weight[row]
        preference = weight * list_losses(ratios[:, 0], ratios[:, 1:], self.beta)
        tokens = ((inputs["labels"] != IGNORED) & (inputs["branches"] == 1)).sum()
        sft = -policy[:, 0].sum() / tokens
        self._total_train_tokens += int(self.accelerator.gather(inputs["tokens"]).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return preference.mean() + self.sft_weight * sft
