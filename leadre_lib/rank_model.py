"""Between what a rank trains and a plain model: low-rank adapters, partitions, float32 weights.

With `lora_rank` a rank trains adapters on all linear layers of the decoder (LoRA,
https://arxiv.org/abs/2106.09685, section 4.1) and, of the embeddings, the rows of Semantic ID
tokens, which no pretraining has seen; everything else stays as it is. ZeRO may part weights among
the ranks. Whoever decodes or saves wants neither: `plain_model` gives an ordinary model.

Knows nothing of losses, of examples, or of when a model is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from peft import LoraConfig, get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from leadre_lib import model as models
from leadre_lib.errors import LeadreError
from leadre_lib.settings import TrainingSettings


def adapter_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: TrainingSettings
) -> LoraConfig | None:
    """The adapters that the settings ask for; None: all weights are trained."""
    if not section.lora_rank:
        return None
    tied = model.config.get_text_config().tie_word_embeddings
    layers = [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()])
    rows = sorted(models.sid_ids(tokenizer))
    names = [name for name, layer in model.named_modules() if any(layer is e for e in layers)]
    return LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        target_modules="all-linear",
        trainable_token_indices=dict.fromkeys(names, rows),
        task_type="CAUSAL_LM",
    )


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's weights by name, whole, float32 copies on the CPU; every rank has to ask.

    Under ZeRO they are those that it updates, not the bf16 ones that the model computes with.
    Frozen weights are left out: they are those of the model that training started from.
    """
    weights = {}
    for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if weight.requires_grad:
            full = safe_get_full_fp32_param(weight)
            weights[name] = (
                (weight if full is None else full).detach().to("cpu", torch.float32, copy=True)
            )
    return weights


def plain_model(
    init: Path,
    weights: dict[str, torch.Tensor],
    section: TrainingSettings,
    args: TrainingArguments,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model of its own with the trained weights, adapters merged into it, on the CPU.

    Args:
        init: folder of the model that training started from.
        weights: as `trained_weights` gives them.
        section: of the settings, for its adapters.
        args: of the trainer.

    Raises:
        LeadreError: the weights are not those of this model.
    """
    with unpartitioned(args):
        model, tokenizer = models.load(init)
        config = adapter_config(model, tokenizer, section)
        wrapped: Any = model if config is None else get_peft_model(model, config)
    unknown = wrapped.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise LeadreError(f"{init}: has no weight {unknown[0]}, which was trained")
    return (model if config is None else wrapped.merge_and_unload()), tokenizer


@contextmanager
def unpartitioned(args: TrainingArguments) -> Iterator[None]:
    """Load models whole within, also where ZeRO-3 parts the weights of every new model."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)
