"""The tokenizer, the initial weights, and the folder that holds a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import LlamaConfig, LlamaForCausalLM

from leadre_lib.errors import LeadreError
from leadre_lib.model import (
    Meanings,
    add_sid_tokens,
    build_model,
    build_tokenizer,
    follow_alignment,
    load,
    load_base,
    save,
    sid_ids,
    sid_token_ids,
    sid_tokens,
)
from leadre_lib.settings import ModelSettings

SIZES = (5, 4, 3)
SMALL = ModelSettings(hidden_size=32, intermediate_size=64, layers=2, max_tokens=64)
TEXTS = [
    "You are an ad recommendation system.\n A user, 3 days ago*click*<a_1><b_3><c_0>",
    "  two  spaces, a tab\t, naïve café — 微信 🙂 <a_4>",
]


def test_spells_levels_by_letter() -> None:
    assert sid_tokens([2, 1, 2]) == ["<a_0>", "<a_1>", "<b_0>", "<c_0>", "<c_1>"]


def test_tokenizer_decodes_back_exactly_and_keeps_codes_whole() -> None:
    tokenizer = build_tokenizer(TEXTS, sid_tokens(SIZES), 300)
    for text in [*TEXTS, "nothing like the training texts: Ω <a_9> <b_0>x"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("<a_1><b_3><c_0>")["input_ids"]
    pairs = sid_token_ids(tokenizer, SIZES), (1, 3, 0)
    assert ids == [level[code] for level, code in zip(*pairs, strict=True)]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    with pytest.raises(LeadreError, match="<a_5>"):
        sid_token_ids(tokenizer, (6, 4, 3))


def test_tokenizer_and_model_repeat_from_their_inputs() -> None:
    first, second = (build_tokenizer(TEXTS * 9, sid_tokens(SIZES), 400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    torch.manual_seed(123)  # must not matter, nor be disturbed
    before = torch.get_rng_state()
    one, two, other = (build_model(SMALL, first, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight


def test_vectors_shape_the_first_embeddings() -> None:
    tokenizer = build_tokenizer(TEXTS, sid_tokens(SIZES), 300)
    vectors = np.random.default_rng(0).normal(size=(sum(SIZES), 48))
    vectors[1] = vectors[0] + 1e-3
    vectors[5:9] *= 1e-3  # a later codebook is smaller, yet as loud
    vectors[9:] = np.nan  # the disambiguation level stands for nothing
    model = build_model(SMALL, tokenizer, 1, Meanings(vectors))
    plain = build_model(SMALL, tokenizer, 1)
    weight = model.get_input_embeddings().weight.detach()
    a, b, c = (weight[torch.tensor(ids)] for ids in sid_token_ids(tokenizer, SIZES))
    assert torch.cosine_similarity(a[0], a[1], dim=0) > 0.99
    assert torch.cosine_similarity(a[0], a[2], dim=0) < 0.9
    for level in (a, b):
        assert level.std(correction=0).item() == pytest.approx(model.config.initializer_range)
    text = slice(0, int(sid_token_ids(tokenizer, SIZES)[0][0]))
    assert torch.equal(weight[text], plain.get_input_embeddings().weight[text])
    rest = torch.tensor(sid_token_ids(tokenizer, SIZES)[2])
    assert torch.equal(c, plain.get_input_embeddings().weight[rest])


def test_words_start_as_what_the_texts_mean_that_they_occur_in() -> None:
    texts = ["mug mug coffee", "mug coffee", "garden hose", "garden chair<|endoftext|>"]
    tokenizer = build_tokenizer([*texts, "unheard mug coffee"] * 9, sid_tokens((2, 2, 1)), 300)
    drinks, plants, hot, cold = np.eye(4)[:, :3]
    sids = np.stack([drinks, plants, hot, cold, np.full(3, np.nan)])
    meanings = Meanings(sids, texts, np.array([[0, 2, 4], [0, 3, 4], [1, 3, 4], [1, 3, 4]]))

    vectors = meanings.of_tokens(tokenizer)
    token = {text: tokenizer(text)["input_ids"] for text in ("mug", " mug", "garden", "unheard")}
    assert all(len(ids) == 1 for ids in token.values())
    mean = (2 * drinks + 2 * plants + hot + 3 * cold) / 4
    both = drinks + (hot + cold) / 2 - mean
    np.testing.assert_allclose(vectors[token["mug"][0]], both)
    np.testing.assert_allclose(vectors[token[" mug"][0]], drinks + hot - mean)
    np.testing.assert_allclose(vectors[token["garden"][0]], plants + cold - mean)
    assert np.isnan(vectors[token["unheard"][0]]).all()
    assert np.isnan(vectors[tokenizer.eos_token_id]).all()
    np.testing.assert_array_equal(vectors[sorted(sid_ids(tokenizer))], sids)

    start = build_model(SMALL, tokenizer, 1, meanings).get_input_embeddings().weight.detach()
    plain = build_model(SMALL, tokenizer, 1).get_input_embeddings().weight.detach()
    mug, hot_mug, garden, unheard = (start[ids[0]] for ids in token.values())
    assert torch.cosine_similarity(mug, hot_mug, dim=0) > 0.5
    assert torch.cosine_similarity(mug, garden, dim=0) < 0
    assert torch.equal(unheard, plain[token["unheard"][0]])
    told = np.isfinite(vectors).all(axis=1) & ~np.isin(np.arange(len(vectors)), sid_ids(tokenizer))
    words = start[torch.as_tensor(told)]
    assert words.std(correction=0).item() == pytest.approx(SMALL.initializer_range, rel=0.2)


def test_the_start_does_not_depend_on_the_threads() -> None:
    rng = np.random.default_rng(0)
    tokenizer = build_tokenizer([], sid_tokens((2000,)), 258)
    meanings = Meanings(rng.normal(size=(2000, 384)))
    starts = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            model = build_model(SMALL, tokenizer, 1, meanings)
        starts.append(model.get_input_embeddings().weight)
    assert torch.equal(*starts)


def test_texts_without_semantic_ids_are_refused() -> None:
    with pytest.raises(LeadreError, match="1 texts for 0 Semantic IDs"):
        Meanings(np.zeros((2, 3)), ["a mug"])


def test_saves_and_loads(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TEXTS, sid_tokens(SIZES), 300)
    model = build_model(SMALL, tokenizer, 1).eval()
    for _ in range(2):  # the second time over the first
        save(model, tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list((tmp_path / "model").glob("*.bin"))
    again, tokens = load(tmp_path / "model")
    ids = tokens(TEXTS[0], return_tensors="pt")["input_ids"]
    assert ids.tolist() == [tokenizer(TEXTS[0])["input_ids"]]
    assert tokens.padding_side == "left"
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_refuses_a_damaged_folder(tmp_path: Path, name: str, damage: str) -> None:
    tokenizer = build_tokenizer(TEXTS, sid_tokens(SIZES), 300)
    save(build_model(SMALL, tokenizer, 1), tokenizer, tmp_path / "model")
    path = tmp_path / "model" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(LeadreError, match=str(tmp_path)):
        load(tmp_path / "model")


def test_any_causal_model_gets_the_tokens(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TEXTS, [], 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    save(LlamaForCausalLM(config), tokenizer, tmp_path / "base")
    model, tokens = load_base(str(tmp_path / "base"))
    old = model.get_input_embeddings().weight.detach().clone()
    assert add_sid_tokens(model, tokens, sid_tokens(SIZES), seed=0) == sum(SIZES)
    assert add_sid_tokens(model, tokens, sid_tokens(SIZES), seed=0) == 0
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] == len(tokens)
        new = layer.weight[-sum(SIZES) :]
        assert len(torch.unique(new, dim=0)) == sum(SIZES)
    assert torch.equal(model.get_input_embeddings().weight[: len(old)], old)
    new = model.get_input_embeddings().weight[len(old) :]
    assert torch.allclose(new.mean(0), old.mean(0), atol=0.2 * float(old.std()))
    save(model, tokens, tmp_path / "with_codes")
    again, tokens = load(tmp_path / "with_codes")
    assert again.config.vocab_size == len(tokens)
    assert sid_token_ids(tokens, SIZES)[0][0] == len(old)


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(LeadreError, match="no/such"):
        load_base(str(tmp_path / "no/such"))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_follow_their_codes_to_a_refreshed_codebook(tied: bool) -> None:
    tokenizer = build_tokenizer(TEXTS, sid_tokens((3, 2, 2)), 300)
    model = build_model(SMALL, tokenizer, 1)
    if not tied:
        model.config.tie_word_embeddings = False
        output = model.get_output_embeddings()
        output.weight = torch.nn.Parameter(torch.randn_like(output.weight))
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    before = [layer.weight.detach().clone() for layer in layers]
    first, second, last = sid_token_ids(tokenizer, (3, 2, 2))
    # Of level a, code 0 stays, 1 has what 1 and 2 had, 2 is nobody's; 3 is new and has some of 0.
    shares = [np.array([[1, 0, 0], [0, 0.5, 0.5], [0, 0, 1], [1, 0, 0]], float), np.eye(2)]
    follow_alignment(model, tokenizer, (4, 2, 2), shares, seed=3)
    new = sid_token_ids(tokenizer, (4, 2, 2))[0][3]
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for layer, old in zip(layers, before, strict=True):
        weight = layer.weight.detach()
        assert torch.equal(weight[first[0]], old[first[0]])
        assert torch.equal(weight[first[2]], old[first[2]])
        torch.testing.assert_close(weight[first[1]], old[[first[1], first[2]]].mean(0))
        assert torch.equal(weight[new], old[first[0]])
        for ids in (second, last):
            assert torch.equal(weight[torch.tensor(ids)], old[torch.tensor(ids)])
        assert torch.equal(weight[: first[0]], old[: first[0]])
