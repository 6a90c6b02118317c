"""One rank of a training: TRL's trainers under DeepSpeed, on what `training` prepared.

What of it is preference optimization is in `preference_rank`.

Differences from TRL as it comes: examples arrive as token ids in the order in which steps take
them, those of SFT packed, with a weight each; only the positions that the loss needs are projected
onto the vocabulary; validation is constrained decoding, which chooses the weights that are the
result; a checkpoint is sealed with the checksums of its files once every rank has written; the
final weights are the optimizer's float32 ones, adapters merged into them. Knows nothing of how
ranks are started or resumed.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from leadre_lib import model as models
from leadre_lib.decoding import BeamDecoder
from leadre_lib.facts import write_json
from leadre_lib.generation import decode_distinct
from leadre_lib.packing import COLUMNS, NO_LABEL, PADDING, SHARED, Ragged, attention_mask
from leadre_lib.preference_rank import preference_trainer
from leadre_lib.rank_model import adapter_config, plain_model, trained_weights, unpartitioned
from leadre_lib.settings import DecodingSettings, DpoSettings, SftSettings, TrainingSettings
from leadre_lib.training import (
    Validation,
    deepspeed_config,
    is_alive,
    read_json,
    seal_checkpoint,
)

log = logging.getLogger(__name__)

PROGRESS_LINES = 20
SECTIONS: dict[str, type[TrainingSettings]] = {"sft": SftSettings, "dpo": DpoSettings}
TOP = 10  # of the lists that are validated
disable_progress_bars()


def train(folder: Path) -> None:
    """Train as one of the ranks that DeepSpeed started; rank 0 writes `loss.json` and `model/`."""
    run = read_json(folder / "run.json")
    trainer = open_trainer(folder, run)
    trainer.train(resume_from_checkpoint=run["resume"])
    weights = trained_weights(trainer)  # every rank takes part
    if trainer.is_world_process_zero():
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        kept = ("step", "loss", "tokens", "targets")
        curve = [{name: entry[name] for name in kept if name in entry} for entry in losses]
        write_json(folder / "loss.json", curve)
        best, section = folder / "best", SECTIONS[run["stage"]].model_validate(run["section"])
        if best.exists():
            with unpartitioned(trainer.args):
                model, tokenizer = models.load(best)
        else:
            model, tokenizer = plain_model(Path(run["init"]), weights, section, trainer.args)
        models.save(model, tokenizer, folder / "model")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def open_trainer(folder: Path, run: dict[str, Any]) -> Trainer:
    """The trainer of what `training` prepared in `folder`; `run` is what `run.json` says."""
    model, tokenizer = models.load(Path(run["init"]))
    section = SECTIONS[run["stage"]].model_validate(run["section"])
    parts: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": adapter_config(model, tokenizer, section),
        "callbacks": [_Progress(run["stage"]), _Seal(), _Orphan(run["launcher"])],
    }
    if run["stage"] == "sft":
        trainer: Trainer = _sft_trainer(folder, run, parts)
    else:
        trainer = preference_trainer(folder, run, parts, _arguments, _score_labels_only)
    trainer.remove_callback(PrinterCallback)
    _score_labels_only(model)
    return trainer


def _sft_trainer(folder: Path, run: dict[str, Any], parts: dict[str, Any]) -> Trainer:
    section = SftSettings.model_validate(run["section"])
    rows = Rows.open(folder)
    args = SFTConfig(
        **_arguments(folder, section, run["seed"], len(rows)),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    # TRL takes tables only: this one has the rows' numbers, and the collator puts rows together.
    numbers = Dataset.from_dict({"row": np.arange(len(rows))})
    padding = parts["model"].config.pad_token_id or 0
    trainer = PackedTrainer(
        args=args,
        train_dataset=numbers,
        data_collator=lambda batch: collate([rows[item["row"]] for item in batch], padding),
        **parts,
    )
    if (folder / "validation").exists():
        trainer.add_callback(_Validator(trainer, folder, run))
    return trainer


def _arguments(folder: Path, section: TrainingSettings, seed: int, examples: int) -> dict[str, Any]:
    """What both trainers are told."""
    config = deepspeed_config(section)
    bf16 = json.loads(config.read_bytes()).get("bf16", {}).get("enabled") is True
    steps = examples // (section.batch_size * section.ranks)
    return {
        "output_dir": str(folder / "checkpoints"),
        "deepspeed": str(config),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bf16,
        "gradient_checkpointing": section.gradient_checkpointing,
        "max_steps": steps,
        "per_device_train_batch_size": section.batch_size,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup_steps(section, steps),
        "weight_decay": section.weight_decay,
        "adam_beta2": section.adam_beta2,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "save_steps": section.checkpoint_steps,
        "save_total_limit": 2,
        "logging_steps": 1,  # means over steps would differ after a resume
        "disable_tqdm": True,
        "report_to": [],
        "seed": seed,
        "data_seed": seed,
    }


def warmup_steps(section: TrainingSettings, steps: int) -> int:
    """Optimizer steps in which the learning rate rises."""
    return round(section.warmup_ratio * steps)


@dataclass(frozen=True)
class Rows:
    """Packed rows in the order of the steps, put together when they are asked for.

    `parts` are those of `packing.sequences`, `rows` the sequences of each row; weights are divided
    by `mean_weight`.
    """

    parts: pa.Table
    rows: Ragged
    mean_weight: float

    @classmethod
    def open(cls, folder: Path) -> Rows:
        """What `prepare_sft` wrote; the file is mapped, not read."""
        with np.load(folder / "rows.npz", allow_pickle=False) as arrays:
            rows = Ragged(arrays["sequences"], arrays["offsets"])
            mean_weight = float(arrays["mean_weight"])
        parts = pq.read_table(folder / "train.parquet", memory_map=True).combine_chunks()
        return cls(parts, rows, mean_weight)

    def __len__(self) -> int:
        return len(self.rows.lengths)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Tokens, positions, branches, labels, weights, `documents`, each [tokens of the row]."""
        chosen = self.rows.values[self.rows.offsets[row] : self.rows.offsets[row + 1]]
        taken = self.parts.take(pa.array(chosen))
        found = {name: taken[name].combine_chunks().flatten().to_numpy() for name in COLUMNS}
        lengths = pc.list_value_length(taken["tokens"]).to_numpy()
        found["weights"] = found["weights"] / np.float32(self.mean_weight)
        return {**found, "documents": np.repeat(np.arange(len(chosen)), lengths)}


def collate(rows: list[dict[str, np.ndarray]], padding: int) -> dict[str, torch.Tensor]:
    """A batch of rows [rows, tokens of the longest], padded at the end by the token `padding`."""
    fill = {"tokens": padding, "labels": NO_LABEL, "documents": PADDING}
    longest = max(len(row["tokens"]) for row in rows)
    batch = {}
    for name, first in rows[0].items():
        kind = first.dtype if name == "weights" else np.int64
        padded = np.full((len(rows), longest), fill.get(name, 0), kind)
        for place, row in enumerate(rows):
            padded[place, : len(row[name])] = row[name]
        batch[name] = torch.from_numpy(padded)
    return batch


def tokens_and_targets(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """How many tokens of a batch [rows, tokens] are no padding, and how many answers they hold."""
    opens = torch.ones_like(branches, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    opens[:, 1:] |= branches[:, 1:] != branches[:, :-1]
    real = documents != PADDING
    return torch.stack([real.sum(), (opens & real & (branches != SHARED)).sum()])


class PackedTrainer(SFTTrainer):
    """SFT on packed rows: the loss is the mean over the step's labels, each with its weight."""

    counts = (0, 0)  # tokens and targets of the latest step, all ranks together

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """See `Trainer.compute_loss`; `num_items_in_batch` counts the labels of all ranks."""
        documents, branches = inputs["documents"], inputs["branches"]
        outputs = model(
            input_ids=inputs["tokens"],
            position_ids=inputs["positions"],
            attention_mask=attention_mask(documents, branches),
            labels=inputs["labels"],
            fused_lm_head=True,
            use_cache=False,
        )
        weighted = outputs.log_probs * inputs["weights"][:, 1:]
        labels = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        # Ranks' gradients are averaged, and each has only its part of the sum.
        loss = -weighted.sum() / torch.as_tensor(labels).clamp(min=1)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        counts = tokens_and_targets(documents, branches)
        tokens, targets = self.accelerator.gather(counts[None]).sum(0).tolist()
        self.counts = tokens, targets
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds how many tokens and targets the step had."""
        tokens, targets = self.counts
        Trainer.log(self, {**logs, "tokens": tokens, "targets": targets}, *args, **kwargs)


def _score_labels_only(model: PreTrainedModel) -> None:
    """Project only the positions whose next token has a label onto the vocabulary.

    Takes the place of `trl.trainer.utils.add_fused_lm_head`, which without a GPU projects every
    position: at a small model's size most of the work, for a response of five tokens after a long
    prompt. Gives `log_probs` and `label_mask` alone, which is all that our losses read.
    """
    plain = model.forward

    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            return plain(*args, labels=labels, **kwargs)
        hidden = model.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        targets = labels[:, 1:]
        mask = targets != -100
        target = targets[mask]
        logits = model.get_output_embeddings()(hidden[:, :-1][mask]).float()
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        log_probs = loss.new_zeros(mask.shape).masked_scatter(mask, -loss)
        return FusedCausalLMOutput(log_probs=log_probs, label_mask=mask)

    model.forward = forward


class _Progress(TrainerCallback):
    """A line every few per cent: step, loss, how fast it goes, time left."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.start: tuple[float, int] | None = None
        self.counts = dict.fromkeys(("tokens", "targets"), 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called after every step, for every step is logged."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, step = time.monotonic(), state.global_step
        if self.start is None:  # the first step pays for warming up
            self.start = (now, step)
            return
        since, first = self.start
        self.counts = {name: count + logs.get(name, 0) for name, count in self.counts.items()}
        if step % max(1, state.max_steps // PROGRESS_LINES) and step != state.max_steps:
            return
        # Validation in between is part of the time, as it is of the wait.
        rates = [f"{n / (now - since):.0f} {name}/s" for name, n in self.counts.items() if n]
        log.info(
            "%s step %d of %d, loss %.4f, %s%.0f s left",
            self.stage,
            step,
            state.max_steps,
            logs["loss"],
            "".join(f"{rate}, " for rate in rates),
            (state.max_steps - step) * (now - since) / (step - first),
        )


class _Validator(TrainerCallback):
    """Decodes the validation cases some times, keeps the best weights, stops when none follow.

    Each rank decodes a share of the cases with a copy of the weights. Those that `kept` chooses lie
    in `best/`, the curve in `validation.json`; both are reproduced by a resumed training.
    """

    def __init__(self, trainer: Trainer, folder: Path, run: dict[str, Any]) -> None:
        self.trainer, self.folder, self.init = trainer, folder, Path(run["init"])
        self.section = SftSettings.model_validate(run["section"])
        self.decoding = DecodingSettings.model_validate(run["decoding"])
        self.max_tokens = int(run["max_tokens"])
        self.cases = Validation.load(folder / "validation")
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes up the curve of an earlier attempt as far as the checkpoint goes."""
        known = read_json(self.folder / "validation.json") or []
        self.curve = [entry for entry in known if entry["step"] <= state.global_step]
        torch.distributed.barrier()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called on every rank after every optimizer step."""
        every = max(1, state.max_steps // self.section.validations)
        if state.global_step % every and state.global_step != state.max_steps:
            return
        weights = trained_weights(self.trainer)
        model, tokenizer = plain_model(self.init, weights, self.section, self.trainer.args)
        entry = {"step": state.global_step, **self._measure(model, tokenizer)}
        self.curve.append(entry)
        best = kept([entry["HR@10"] for entry in self.curve], len(self.cases.prompts))
        if state.is_world_process_zero:
            log.info("validation at step %d: HR@10 %.4f", state.global_step, entry["HR@10"])
            if entry is self.curve[best]:
                models.save(model, tokenizer, self.folder / "best")
            marked = [{**entry, "kept": n == best} for n, entry in enumerate(self.curve)]
            write_json(self.folder / "validation.json", marked)
        if len(self.curve) - 1 - best >= self.section.patience:
            control.should_training_stop = True

    def _measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """HR@10 and NDCG@10 over the cases of all ranks."""
        rank, ranks = self.trainer.args.process_index, self.trainer.args.world_size
        own = range(rank, len(self.cases.prompts), ranks)
        decoder = BeamDecoder(
            model,
            tokenizer,
            self.cases.index,
            models.sid_token_ids(tokenizer, self.cases.index.sizes),
            self.decoding,
            self.max_tokens,
            self.trainer.args.device,
        )
        unwanted = self.cases.unwanted
        found, _ = decode_distinct(
            decoder,
            [self.cases.prompts[n] for n in own],
            TOP,
            None if unwanted is None else [unwanted[n] for n in own],
        )
        hit = found == self.cases.target[rank::ranks, None]
        gain = (hit / np.log2(np.arange(TOP) + 2)).sum()
        sums = torch.tensor([hit.sum(), gain], dtype=torch.float64, device=self.trainer.args.device)
        torch.distributed.all_reduce(sums)
        hits, gains = (sums / len(self.cases.prompts)).tolist()
        return {"HR@10": hits, "NDCG@10": gains}


def kept(hit_rates: list[float], cases: int) -> int:
    """Which of the validated weights are the result: the latest of those that are as good as the
    best but for chance.

    The largest of several hit rates is so by luck, too, while later weights have seen more, at
    lower learning rates. Chance is one standard error of the best rate over so many cases (the rule
    of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3).
    """
    best = max(hit_rates)
    floor = best - float(np.sqrt(best * (1 - best) / cases))
    return max(n for n, rate in enumerate(hit_rates) if rate >= floor)


class _Seal(TrainerCallback):
    """Vouches for a checkpoint when all ranks have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called on every rank after it has written."""
        torch.distributed.barrier()
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Orphan(TrainerCallback):
    """Ends the rank when the job that started it was killed: nobody waits for the result."""

    def __init__(self, launcher: dict[str, float] | None) -> None:
        self.launcher = launcher

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every optimizer step."""
        if self.launcher and not is_alive(self.launcher):
            log.error("the job that started this rank is gone: stopping")
            psutil.Process().kill()
