"""The forward pass for many beams against the models' own, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    HunYuanDenseV1ForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from leadre_lib import transformer as module
from leadre_lib.errors import LeadreError
from leadre_lib.transformer import Context, Transformer

VOCABULARY, TOKENS = 97, 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.15,  # wide: a part that is wrong shows in the result
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
FAMILIES: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, {}),
    "llama-biases": (LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": (LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama-yarn-rope": (LlamaForCausalLM, {"rope_parameters": YARN}),
    "llama-tied": (LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-one-layer": (LlamaForCausalLM, {"num_hidden_layers": 1}),
    "llama-group-of-1": (LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-group-of-4": (LlamaForCausalLM, {"num_key_value_heads": 1, "head_dim": 16}),
    "llama-3-heads": (
        LlamaForCausalLM,
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "llama-5-heads": (
        LlamaForCausalLM,
        {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "qwen2": (Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3-odd-groups": (
        Qwen3ForCausalLM,
        {"head_dim": 6, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "mistral": (MistralForCausalLM, {"sliding_window": None}),
    "hunyuan": (HunYuanDenseV1ForCausalLM, {"head_dim": 8}),
    "hunyuan-alpha-rope": (
        HunYuanDenseV1ForCausalLM,
        {"head_dim": 16, "attention_bias": True, "rope_parameters": ALPHA},
    ),
}
SHARED = 7  # tokens that all prompts begin with
LENGTHS = (8, 21, 9, 15)  # of the prompts; the shortest has but its last token for itself
WIDTHS = (1, 6, 4, 5)  # beams in each step


def build(kind: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """A random model. No norm is all ones and no bias all zeros: leaving one out shows."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        model = kind(kind.config_class(**(SIZES | changes))).eval()
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def prompts(lengths: tuple[int, ...] = LENGTHS, shared: int = SHARED) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    start = torch.randint(VOCABULARY, (shared,), generator=generator)
    rests = [torch.randint(VOCABULARY, (n - shared,), generator=generator) for n in lengths]
    return [torch.cat([start, rest]) for rest in rests]


def read(transformer: Transformer, rows: list[Tensor], shared: int = 0) -> Context:
    """Read all but the last token of each prompt, the first `shared` of them once for all."""
    prefix = None
    if shared:
        prefix = transformer.read(rows[0][None, :shared], torch.tensor([shared]))
    rests = [row[shared:-1] for row in rows]
    lengths = torch.tensor([len(rest) for rest in rests])
    # Any token fills the rest of a row: here one that would be seen.
    ids = torch.full((len(rows), int(lengths.max())), 11)
    for row, rest in zip(ids, rests, strict=True):
        row[: len(rest)] = rest
    return transformer.read(ids, lengths, prefix)


@torch.inference_mode()
def check_against(
    model: PreTrainedModel, transformer: Transformer, rows: list[Tensor], shared: int, off: float
) -> None:
    """Every beam of every step against the model's forward pass over all its tokens."""
    generator = torch.Generator().manual_seed(6)
    chosen = torch.randperm(VOCABULARY, generator=generator)[:40]
    outputs = transformer.logits_of(model, chosen)
    context = read(transformer, rows, shared)
    beams = [[row[:-1]] for row in rows]  # of each user, with all tokens so far
    for step, width in enumerate(WIDTHS):
        ids, parents = torch.stack([row[-1:] for row in rows]), None
        if step:
            shape = (len(rows), width)
            ids = torch.randint(VOCABULARY, shape, generator=generator)
            parents = torch.randint(WIDTHS[step - 1], shape, generator=generator)
        hidden = transformer.step(context, ids, parents)
        scores = outputs(hidden).float() - transformer.log_normaliser(hidden)[..., None]
        lineage = torch.zeros_like(ids) if parents is None else parents
        beams = [
            [torch.cat([before[n], token[None]]) for n, token in zip(chain, tokens, strict=True)]
            for before, chain, tokens in zip(beams, lineage, ids, strict=True)
        ]
        their_hidden, logits = own_forward_pass(model, [beam for user in beams for beam in user])
        their_scores = logits.log_softmax(-1)[:, chosen]
        assert hidden.shape == (*ids.shape, their_hidden.shape[-1])
        torch.testing.assert_close(hidden.flatten(0, 1).float(), their_hidden, atol=off, rtol=0)
        torch.testing.assert_close(scores.flatten(0, 1), their_scores, atol=off, rtol=0)


def own_forward_pass(model: PreTrainedModel, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of the last tokens; what fills a row comes after these."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    made = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    last = torch.tensor([len(row) - 1 for row in rows])
    return tuple(t[torch.arange(len(rows)), last] for t in (made.hidden_states[-1], made.logits))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    kind, changes = FAMILIES[request.param]
    return build(kind, **changes)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build(LlamaForCausalLM)


@pytest.mark.parametrize(
    ("packed", "shared"),
    [(True, SHARED), (False, 0)],
    ids=["packed-after-a-prefix", "plain"],
)
def test_equals_the_models_own_forward_pass(model, packed, shared) -> None:
    transformer = Transformer(model, TOKENS, packed=packed)
    check_against(model, transformer, prompts(), shared, off=1e-4)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "hunyuan"])
def test_bfloat16_comes_close(name) -> None:
    kind, changes = FAMILIES[name]
    model = build(kind, **changes)
    transformer = Transformer(model, TOKENS, dtype=torch.bfloat16)
    check_against(model, transformer, prompts(), SHARED, off=0.2)


@pytest.mark.parametrize(
    ("lengths", "shared"),
    [((1, 1), 0), ((1, 12, 1, 5), 0), ((9, 9), 0), ((9, 9, 9), 8), ((20,), 0), ((20,), 13)],
)
def test_prompts_of_any_lengths(llama, lengths, shared) -> None:
    transformer = Transformer(llama, TOKENS)
    check_against(llama, transformer, prompts(lengths, shared), shared, off=1e-4)


def test_logits_in_parts_are_those_in_one(llama, monkeypatch) -> None:
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    monkeypatch.setitem(module.LOGITS_CHUNK, "cpu", 3 * VOCABULARY + 1)
    check_against(llama, Transformer(llama, TOKENS), prompts(), 0, off=1e-4)
    monkeypatch.setitem(module.LOGITS_CHUNK, "cpu", 1)
    check_against(llama, Transformer(llama, TOKENS), prompts(), 0, off=1e-4)


def test_positions_reach_to_the_last_token(llama) -> None:
    rows = prompts((TOKENS - len(WIDTHS) + 1, 10))
    check_against(llama, Transformer(llama, TOKENS), rows, 0, off=1e-4)


@torch.inference_mode()
def test_a_prefix_serves_many_reads(llama) -> None:
    transformer = Transformer(llama, TOKENS)
    rows = prompts()
    prefix = transformer.read(rows[0][None, :SHARED], torch.tensor([SHARED]))
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values)]
    rest, lengths = torch.stack([row[SHARED:8] for row in rows]), torch.ones(4, dtype=torch.long)
    first = transformer.read(rest, lengths, prefix)
    transformer.step(first, rest)
    again = transformer.read(rest, lengths, prefix)
    assert (prefix.lengths.tolist(), prefix.tokens, prefix.own) == ([SHARED], SHARED, [])
    for one, other in zip(before, (*prefix.keys, *prefix.values), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first.keys, again.keys, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [0, SHARED])
@torch.inference_mode()
def test_beams_take_no_memory_of_the_context(llama, shared) -> None:
    transformer = Transformer(llama, TOKENS)
    users, heads, head, longest = len(LENGTHS), 2, 8, max(LENGTHS) - 1
    memory = 2 * 2 * users * heads * longest * head * 4  # keys and values of 2 layers, float32
    for beams in (1, 5, 64):
        context = read(transformer, prompts(), shared)
        assert context.bytes == memory
        assert context.lengths.tolist() == [length - 1 for length in LENGTHS]
        transformer.step(context, torch.zeros((users, 1), dtype=torch.long))
        for steps in (2, 3):
            ids = torch.zeros((users, beams), dtype=torch.long)
            transformer.step(context, ids, ids)
            assert context.bytes == memory
            assert len(context.own) == len(context.keys) == 2
            shapes = {tuple(tensor.shape) for pair in context.own for tensor in pair}
            assert shapes == {(users, heads, beams, steps, head)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_given_model_stays_as_it_was(llama, dtype) -> None:
    tensors = {**dict(llama.named_parameters()), **dict(llama.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    transformer = Transformer(llama, TOKENS, dtype=dtype)
    check_against(llama, transformer, prompts(), SHARED, off=0.25)
    after = {**dict(llama.named_parameters()), **dict(llama.named_buffers())}
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    assert all(weight.requires_grad for weight in llama.parameters())


class Scaled(LlamaForCausalLM):
    """Says that it is a Llama, and is not."""

    def forward(self, *args: Any, **more: Any) -> Any:
        out = super().forward(*args, **more)
        out.logits = out.logits / 1.5
        return out


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY))


REFUSED = {
    "gpt2": (gpt2, "GPT2LMHeadModel cannot be decoded: it is of type gpt2"),
    "experts": (
        lambda: build(MixtralForCausalLM, sliding_window=None, num_local_experts=2),
        "MixtralForCausalLM cannot be decoded: it is of type mixtral",
    ),
    "no-logits": (lambda: build(LlamaModel), "LlamaModel cannot be decoded: "),
    "gelu": (
        lambda: build(LlamaForCausalLM, hidden_act="gelu"),
        "LlamaForCausalLM cannot be decoded: its MLP has gelu",
    ),
    "gemma": (
        lambda: build(GemmaForCausalLM, head_dim=8),
        "GemmaForCausalLM cannot be decoded: it is of type gemma",
    ),
    "scaled": (lambda: build(Scaled), "Scaled cannot be decoded: its logits differ by 5"),
    "window": (
        lambda: build(MistralForCausalLM, sliding_window=8),
        "MistralForCausalLM cannot be decoded: .*sliding window",
    ),
    # A window that the few tokens of the check would not reach.
    "wide-window": (
        lambda: build(MistralForCausalLM, sliding_window=40),
        "MistralForCausalLM cannot be decoded: .*sliding window",
    ),
    "window-in-one-layer": (
        lambda: build(
            Qwen2ForCausalLM, use_sliding_window=True, sliding_window=40, max_window_layers=1
        ),
        "Qwen2ForCausalLM cannot be decoded: .*sliding window",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_other_architectures(name, dtype) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(LeadreError, match=f"{reason}.*Llama family"):
        Transformer(make(), TOKENS, dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "norm.weight"]
)
def test_refuses_a_damaged_model(name, value) -> None:
    broken = build(LlamaForCausalLM)
    with torch.no_grad():
        broken.model.get_parameter(name).view(-1)[0] = value
    with pytest.raises(LeadreError, match=r"not finite.*damaged"):
        Transformer(broken, TOKENS)
