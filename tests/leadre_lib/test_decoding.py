"""The beam search against exhaustive scoring and against Transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from leadre_lib.constraint_index import DENSE_LIMIT, ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.errors import LeadreError
from leadre_lib.model import build_model, build_tokenizer, sid_token_ids, sid_tokens
from leadre_lib.settings import DecodingSettings, ModelSettings

SIZES = (6, 5, 4, 3)
ADS = 40
PROMPTS = [
    "a user who reads about hiking",
    "someone likes cooking, 3 days ago <a_2><b_1><c_0><d_0>",
    "x",
    "age 30; long-term interest: travel*4, games*2; what next?",
    "hiking",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(PROMPTS * 3, sid_tokens(SIZES), 300)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    if request.param == "qwen2":
        sizes = ModelSettings(hidden_size=32, intermediate_size=64, layers=2, max_tokens=128)
        model = build_model(sizes, tokenizer, seed=1)
    else:
        torch.manual_seed(2)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():  # wide logits: a random start is too flat to tell beams apart
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    flat = np.random.default_rng(3).choice(np.prod(SIZES), ADS, replace=False)
    return np.stack(np.unravel_index(flat, SIZES), axis=1).astype(np.int32)


@pytest.fixture(scope="module", params=[DENSE_LIMIT, 0], ids=["tables", "compressed"])
def index(request: pytest.FixtureRequest, codes: np.ndarray) -> ConstraintIndex:
    index = ConstraintIndex.build(codes, SIZES, dense_limit=request.param)
    assert index.dense == (len(SIZES) if request.param else 0)
    return index


def decoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    index: ConstraintIndex,
    beam: int = 64,
    batch_tokens: int = 8192,
    max_tokens: int = 128,
) -> BeamDecoder:
    settings = DecodingSettings(beam=beam, top_k=beam, batch_tokens=batch_tokens)
    ids = sid_token_ids(tokenizer, SIZES)
    return BeamDecoder(model, tokenizer, index, ids, settings, max_tokens)


@torch.inference_mode()
def exhaustive(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, codes: np.ndarray, prompt: str
) -> np.ndarray:
    """The score of every ad, each scored by a plain forward pass over prompt and Semantic ID."""
    tokens = np.stack([t[codes[:, i]] for i, t in enumerate(sid_token_ids(tokenizer, SIZES))], 1)
    start = tokenizer(prompt)["input_ids"]
    ids = torch.tensor(np.hstack([np.tile(start, (len(codes), 1)), tokens]))
    logp = model(ids).logits[:, len(start) - 1 : -1].log_softmax(-1)
    return logp.gather(2, torch.tensor(tokens)[:, :, None])[:, :, 0].sum(1).numpy()


def test_equals_exhaustive_scoring(model, tokenizer, codes, index) -> None:
    ads, scores = decoder(model, tokenizer, index).decode(PROMPTS, 64)
    for row, prompt in enumerate(PROMPTS):
        truth = exhaustive(model, tokenizer, codes, prompt)
        assert ads[row, :ADS].tolist() == np.argsort(-truth).tolist()
        np.testing.assert_allclose(scores[row, :ADS], np.sort(truth)[::-1], atol=2e-4)
    assert (ads[:, ADS:] == -1).all()
    assert np.isneginf(scores[:, ADS:]).all()


@pytest.mark.parametrize("beam", [3, 8])
def test_equals_generate(model, tokenizer, codes, index, beam) -> None:
    tokens = np.stack([t[codes[:, i]] for i, t in enumerate(sid_token_ids(tokenizer, SIZES))], 1)
    nexts: dict[tuple[int, ...], set[int]] = {}
    for row in tokens.tolist():
        for level in range(len(SIZES)):
            nexts.setdefault(tuple(row[:level]), set()).add(row[level])
    ads, scores = decoder(model, tokenizer, index, beam).decode(PROMPTS, beam)
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beam,
            num_return_sequences=beam,
            max_new_tokens=len(SIZES),
            do_sample=False,
            length_penalty=0.0,
            prefix_allowed_tokens_fn=lambda _, seq, n=length: sorted(
                nexts[tuple(seq[n:].tolist())]
            ),
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert tokens[ads[row]].tolist() == out.sequences[:, length:].tolist()
        np.testing.assert_allclose(scores[row], out.sequences_scores.numpy(), atol=2e-4)


def test_batching_and_order_change_nothing(model, tokenizer, codes) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    together = decoder(model, tokenizer, index, beam=5).decode(PROMPTS, 5)
    alone = decoder(model, tokenizer, index, beam=5, batch_tokens=1).decode(PROMPTS, 5)
    backwards = decoder(model, tokenizer, index, beam=5).decode(PROMPTS[::-1], 5)
    for other in (alone, (backwards[0][::-1], backwards[1][::-1])):
        assert other[0].tolist() == together[0].tolist()
        np.testing.assert_allclose(other[1], together[1], atol=2e-4)


def test_excluded_ads_give_their_place_to_the_next(model, tokenizer, index) -> None:
    search = decoder(model, tokenizer, index)
    ads, scores = search.decode(PROMPTS, 10)
    exclude = [row[[4, 0]] for row in ads]
    exclude[2] = np.array([], np.int64)
    kept, kept_scores = search.decode(PROMPTS, 8, exclude)
    for row in (0, 1, 3, 4):
        assert kept[row].tolist() == np.delete(ads[row], [0, 4]).tolist()
        assert kept_scores[row].tolist() == np.delete(scores[row], [0, 4]).tolist()
    assert kept[2].tolist() == ads[2, :8].tolist()
    with pytest.raises(LeadreError, match="outside"):
        search.decode(PROMPTS, 8, [np.array([ADS])] * len(PROMPTS))


def test_writes_active_ads_only(model, tokenizer, index) -> None:
    active = np.zeros(ADS, bool)
    active[[3, 17, 30]] = True
    for beam in (2, 8):
        ads, scores = decoder(model, tokenizer, index.with_active(active), beam).decode(
            PROMPTS, beam
        )
        assert set(np.unique(ads)) <= {-1, 3, 17, 30}
        assert ((ads >= 0) == np.isfinite(scores)).all()
    assert sorted(ads[0, :3].tolist()) == [3, 17, 30]
    nothing = decoder(model, tokenizer, index.with_active(np.zeros(ADS, bool))).decode(PROMPTS, 2)
    assert (nothing[0] == -1).all()


def test_a_new_mask_acts_like_a_new_decoder(model, tokenizer, index) -> None:
    search = decoder(model, tokenizer, index, beam=8)
    before = search.decode(PROMPTS, 8)
    active = np.ones(ADS, bool)
    active[before[0][:, :3].ravel()] = False
    search.set_active(active)
    stopped = search.decode(PROMPTS, 8)
    afresh = decoder(model, tokenizer, index.with_active(active), beam=8).decode(PROMPTS, 8)
    search.set_active(np.ones(ADS, bool))
    for found, expected in ((stopped, afresh), (search.decode(PROMPTS, 8), before)):
        assert found[0].tolist() == expected[0].tolist()
        assert found[1].tolist() == expected[1].tolist()
    assert active[stopped[0][stopped[0] >= 0]].all()
    with pytest.raises(LeadreError, match="mask"):
        search.set_active(active[1:])


def test_equal_scores_go_by_code(model, tokenizer, codes, index) -> None:
    flat = build_model(ModelSettings(hidden_size=32, layers=1), tokenizer, seed=1)
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    ads, _ = decoder(flat, tokenizer, index).decode(PROMPTS, ADS)
    assert ads[0].tolist() == np.lexsort(codes.T[::-1]).tolist()


def test_long_prompts_lose_their_beginning(model, tokenizer, codes, caplog) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    short = decoder(model, tokenizer, index, beam=5, max_tokens=12)
    ads, scores = short.decode(["once upon a time, long ago " * 9 + "x y z"], 5)
    assert "1 of 1 prompts" in caplog.text
    ids = tokenizer("once upon a time, long ago " * 9 + "x y z")["input_ids"][-8:]
    expected, expected_scores = short.decode([tokenizer.decode(ids)], 5)
    assert ads.tolist() == expected.tolist()
    np.testing.assert_allclose(scores, expected_scores, atol=2e-4)


def test_refuses_scores_that_are_not_finite(model, tokenizer, codes) -> None:
    broken = build_model(ModelSettings(hidden_size=32, layers=1), tokenizer, seed=1)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(LeadreError, match="not finite"):
        decoder(broken, tokenizer, ConstraintIndex.build(codes, SIZES)).decode(PROMPTS, 3)


def test_refuses_what_does_not_fit(model, tokenizer, codes) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    with pytest.raises(LeadreError, match="do not fit"):
        BeamDecoder(
            model, tokenizer, index, sid_token_ids(tokenizer, SIZES[:3]), DecodingSettings(), 99
        )
    with pytest.raises(LeadreError, match="beam"):
        decoder(model, tokenizer, index, beam=4).decode(PROMPTS, 5)
    with pytest.raises(LeadreError, match="empty"):
        decoder(model, tokenizer, index).decode([""], 5)
    assert decoder(model, tokenizer, index).decode([], 5)[0].shape == (0, 5)
