"""Adapters and the plain models that come of them; how they train is in `test_training`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers.integrations.deepspeed import (
    HfTrainerDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from leadre_lib import model as models
from leadre_lib.errors import LeadreError
from leadre_lib.rank_model import adapter_config, plain_model
from leadre_lib.settings import ModelSettings, TrainingSettings


@pytest.fixture
def args() -> Iterator[Any]:
    """What a trainer is told under ZeRO-3, where Transformers parts every model that it loads."""
    yield SimpleNamespace(
        hf_deepspeed_config=HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    )
    unset_hf_deepspeed_config()


def start(folder: Path, tied: bool) -> Path:
    """A saved model that knows eight Semantic ID tokens; its output layer is its own or not."""
    tokenizer = models.build_tokenizer(["some text"], models.sid_tokens((4, 4)), 270)
    sizes = ModelSettings(hidden_size=16, intermediate_size=32, layers=2)
    model = models.build_model(sizes, tokenizer, seed=0)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    models.save(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_says_what_the_adapted_one_says(
    tied: bool, args: Any, tmp_path: Path
) -> None:
    init, section = start(tmp_path / "init", tied), TrainingSettings(lora_rank=3)
    unset_hf_deepspeed_config()
    model, tokenizer = models.load(init)
    adapted = get_peft_model(model, adapter_config(model, tokenizer, section)).eval()
    torch.manual_seed(1)
    weights = {}
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
            weights[name] = weight.detach().clone()
    plain, _ = plain_model(init, weights, section, args)
    assert is_deepspeed_zero3_enabled()  # as it was for the trainer
    ids = torch.arange(len(tokenizer))[None, -40:]
    said = plain.eval()(ids).logits
    torch.testing.assert_close(said, adapted(ids).logits, atol=1e-5, rtol=1e-4)
    unset_hf_deepspeed_config()
    before, _ = models.load(init)
    assert not torch.allclose(said, before.eval()(ids).logits, atol=1e-2)
    assert plain.state_dict().keys() == before.state_dict().keys()
    semantic = torch.isin(torch.arange(len(tokenizer)), torch.tensor([*models.sid_ids(tokenizer)]))
    for ours, theirs in zip(embeddings(plain), embeddings(before), strict=True):
        assert ((ours != theirs).any(1) == semantic).all()
    models.save(plain, tokenizer, tmp_path / "end")
    again, _ = models.load(tmp_path / "end")
    assert again.config.tie_word_embeddings is tied
    torch.testing.assert_close(again.eval()(ids).logits, said)


def embeddings(model: Any) -> list[torch.Tensor]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer.weight.detach() for layer in layers]


def test_weights_of_another_model_are_refused(args: Any, tmp_path: Path) -> None:
    init = start(tmp_path / "init", True)
    with pytest.raises(LeadreError, match="no weight of_another"):
        plain_model(init, {"of_another": torch.zeros(1)}, TrainingSettings(), args)
