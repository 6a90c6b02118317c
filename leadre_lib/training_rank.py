"""One rank of a training: TRL's trainers under DeepSpeed, on what `training` prepared.

What of it is preference optimization is in `preference_rank`.

Differences from TRL as it comes: examples arrive as token ids in the order in which steps take
them; on a CPU only the positions that the loss needs are projected onto the vocabulary; a
checkpoint is sealed with the checksums of its files once every rank has written; the final weights
are the optimizer's float32 ones. Knows nothing of how ranks are started or resumed.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset, disable_progress_bars
from deepspeed.utils import safe_get_full_fp32_param
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from leadre_lib import model as models
from leadre_lib.facts import write_json
from leadre_lib.preference_rank import preference_trainer
from leadre_lib.settings import TrainingSettings
from leadre_lib.training import deepspeed_config, is_alive, read_json, seal_checkpoint

log = logging.getLogger(__name__)

PROGRESS_LINES = 20
disable_progress_bars()


def train(folder: Path) -> None:
    """Train as one of the ranks that DeepSpeed started; rank 0 writes `loss.json` and `model/`."""
    run = read_json(folder / "run.json")
    trainer = _trainer(folder, run)
    trainer.train(resume_from_checkpoint=run["resume"])
    weights = _float32_weights(trainer)  # every rank takes part
    if trainer.is_world_process_zero():
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        curve = [{"step": entry["step"], "loss": entry["loss"]} for entry in losses]
        write_json(folder / "loss.json", curve)
        # Into a fresh copy, for the trainers have patched theirs.
        model, tokenizer = models.load(Path(run["init"]))
        model.load_state_dict(weights, strict=False)
        models.save(model, tokenizer, folder / "model")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _trainer(folder: Path, run: dict[str, Any]) -> Trainer:
    model, tokenizer = models.load(Path(run["init"]))
    parts: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "callbacks": [_Progress(run["stage"]), _Seal(), _Orphan(run["launcher"])],
    }
    if run["stage"] == "sft":
        trainer: Trainer = _sft_trainer(folder, run, parts)
    else:
        trainer = preference_trainer(folder, run, parts, _arguments, _score_labels_only)
    trainer.remove_callback(PrinterCallback)
    if trainer.args.use_cpu:
        _score_labels_only(model)
    return trainer


def _sft_trainer(folder: Path, run: dict[str, Any], parts: dict[str, Any]) -> Trainer:
    section = TrainingSettings.model_validate(run["section"])
    args = SFTConfig(**_arguments(folder, section, run["seed"]), max_length=None)
    return SFTTrainer(args=args, train_dataset=_examples(folder), **parts)


def _examples(folder: Path) -> Dataset:
    """The examples in the order of the steps; each step's batches lie one after the other."""
    dataset = Dataset.from_parquet(
        str(folder / "train.parquet"), cache_dir=str(folder / "cache"), keep_in_memory=True
    )
    return dataset.select(np.load(folder / "order.npy", allow_pickle=False), keep_in_memory=True)


def _arguments(folder: Path, section: TrainingSettings, seed: int) -> dict[str, Any]:
    """What both trainers are told."""
    config = deepspeed_config(section)
    bf16 = json.loads(config.read_bytes()).get("bf16", {}).get("enabled") is True
    examples = len(np.load(folder / "order.npy", allow_pickle=False))
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
        "warmup_steps": round(section.warmup_ratio * steps),
        "weight_decay": section.weight_decay,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "save_steps": section.checkpoint_steps,
        "save_total_limit": 2,
        "logging_steps": 1,  # means over steps would differ after a resume
        "disable_tqdm": True,
        "report_to": [],
        "seed": seed,
        "data_seed": seed,
    }


def _score_labels_only(model: PreTrainedModel) -> None:
    """Project only the positions whose next token has a label onto the vocabulary.

    TRL's fused head does so by a Triton kernel, and on a CPU projects every position: at a small
    model's size that is most of the work, for a response of five tokens after a long prompt. The
    contract is that of `trl.trainer.utils.add_fused_lm_head`.
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
        log_probs = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            is_top1 = logits.argmax(-1) == target
            mean_logits = logits.mean(-1)

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(
            log_probs=spread(log_probs.gather(1, target[:, None])[:, 0]),
            entropy=spread(entropy),
            is_top1=spread(is_top1),
            mean_logits=spread(mean_logits),
            label_mask=mask,
        )

    model.forward = forward


def _float32_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's float32 weights by name, whole on every rank, on the CPU."""
    weights = {}
    for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        full = safe_get_full_fp32_param(weight)
        weights[name] = (weight if full is None else full).detach().float().cpu()
    return weights


class _Progress(TrainerCallback):
    """A line every few per cent: step, loss, tokens a second, time left."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.start: tuple[float, int, float] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called after every step, for every step is logged."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now, step, tokens = time.monotonic(), state.global_step, logs.get("num_tokens", 0)
        if self.start is None:  # the first step pays for warming up
            self.start = (now, step, tokens)
            rate = left = 0.0
        else:
            since, first, before = self.start
            rate = (tokens - before) / (now - since)
            left = (state.max_steps - step) * (now - since) / (step - first)
        if step % max(1, state.max_steps // PROGRESS_LINES) == 0 or step == state.max_steps:
            log.info(
                "%s step %d of %d, loss %.4f, %.0f tokens/s, %.0f s left",
                self.stage,
                step,
                state.max_steps,
                logs["loss"],
                rate,
                left,
            )


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
