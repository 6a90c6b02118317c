"""The beam search against exhaustive scoring and against Transformers' own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from leadre_lib.constraint_index import DENSE_LIMIT, ConstraintIndex
from leadre_lib.decoding import BeamDecoder, dtype_of
from leadre_lib.errors import LeadreError
from leadre_lib.model import build_model, build_tokenizer, sid_token_ids, sid_tokens
from leadre_lib.settings import DecodingSettings, ModelSettings
from leadre_lib.transformer import Context, Transformer

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


def wide(model: PreTrainedModel) -> PreTrainedModel:
    """The model with wide logits: a random start is too flat to tell beams apart."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def qwen2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = ModelSettings(hidden_size=32, intermediate_size=64, layers=2, max_tokens=128)
    return wide(build_model(sizes, tokenizer, seed=1))


@pytest.fixture(scope="module")
def llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    return wide(LlamaForCausalLM(config))


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


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
    max_tokens: int = 128,
    groups: np.ndarray | None = None,
    **settings: Any,
) -> BeamDecoder:
    chosen = DecodingSettings(**{"beam": beam, "top_k": beam, "batch_tokens": 8192} | settings)
    ids = sid_token_ids(tokenizer, SIZES)
    return BeamDecoder(model, tokenizer, index, ids, chosen, max_tokens, groups=groups)


@torch.inference_mode()
def exhaustive(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    codes: np.ndarray,
    prompt: str,
    normalise: str = "vocabulary",
) -> np.ndarray:
    """The score of every ad, each scored by a plain forward pass over prompt and Semantic ID."""
    levels = sid_token_ids(tokenizer, SIZES)
    tokens = np.stack([t[codes[:, i]] for i, t in enumerate(levels)], 1)
    start = tokenizer(prompt)["input_ids"]
    ids = torch.tensor(np.hstack([np.tile(start, (len(codes), 1)), tokens]))
    logits = model(ids).logits[:, len(start) - 1 : -1]
    if normalise == "level":
        for position, own in enumerate(levels):
            others = np.setdiff1d(np.arange(logits.shape[-1]), own)
            logits[:, position, others] = -torch.inf
    logp = logits.log_softmax(-1)
    return logp.gather(2, torch.tensor(tokens)[:, :, None])[:, :, 0].sum(1).numpy()


class SlowBeamSearch:
    """Beam search in plain Python, one forward pass a beam."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, codes: np.ndarray
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ads = {tuple(row): ad for ad, row in enumerate(codes.tolist())}
        self.tokens = [ids.tolist() for ids in sid_token_ids(tokenizer, SIZES)]
        self.known: dict[tuple[str, tuple[int, ...]], list[float]] = {}

    def __call__(self, prompt: str, widths: Sequence[int]) -> list[tuple[int, float]]:
        """Ads and scores, best first, with `widths` beams after each level."""
        beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        for level, width in enumerate(widths):
            grown = []
            for prefix, score in beams:
                logp = self._log_probabilities(prompt, prefix)
                for code in sorted({ad[level] for ad in self.ads if ad[:level] == prefix}):
                    grown.append(((*prefix, code), score + logp[self.tokens[level][code]]))
            beams = sorted(grown, key=lambda beam: -beam[1])[:width]
        return [(self.ads[prefix], score) for prefix, score in beams]

    @torch.inference_mode()
    def _log_probabilities(self, prompt: str, prefix: tuple[int, ...]) -> list[float]:
        if (prompt, prefix) not in self.known:
            ids = self.tokenizer(prompt)["input_ids"]
            ids = ids + [own[code] for own, code in zip(self.tokens, prefix, strict=False)]
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            self.known[prompt, prefix] = logits.log_softmax(-1).tolist()
        return self.known[prompt, prefix]


@pytest.fixture(scope="module")
def slow_beam_search(
    qwen2: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, codes: np.ndarray
) -> SlowBeamSearch:
    return SlowBeamSearch(qwen2, tokenizer, codes)


def same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """The same ads in the same order, and all but the same scores."""
    assert found[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(found[1], expected[1], atol=2e-4)


class Read(NamedTuple):
    """One call of `Transformer.read`."""

    users: int
    tokens: int  # of the longest prompt, without what comes before
    before: int


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Read]]:
    """From the call on, `Transformer.read` notes in the list how it was called."""

    def start() -> list[Read]:
        calls: list[Read] = []
        read = Transformer.read

        def noted(
            self: Transformer, ids: Tensor, lengths: Tensor, prefix: Context | None = None
        ) -> Context:
            calls.append(Read(*ids.shape, 0 if prefix is None else prefix.tokens))
            return read(self, ids, lengths, prefix)

        monkeypatch.setattr(Transformer, "read", noted)
        return calls

    return start


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From the call on, `Transformer.read` has memory for no more than so many users at once."""
    read = Transformer.read

    def start(most: int) -> None:
        def bounded(
            self: Transformer, ids: Tensor, lengths: Tensor, prefix: Context | None = None
        ) -> Context:
            if len(ids) > most:
                raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmore lines")
            return read(self, ids, lengths, prefix)

        monkeypatch.setattr(Transformer, "read", bounded)

    return start


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
    same(alone, together)
    same((backwards[0][::-1], backwards[1][::-1]), together)


@pytest.mark.parametrize("widths", [(2, 9, 4), (5, 3, 2), (1, 1, 1), (6, 20, 11)])
def test_level_beams_equal_a_slow_search(qwen2, tokenizer, index, slow_beam_search, widths) -> None:
    search = decoder(qwen2, tokenizer, index, beam=9, level_beams=widths)
    for k in (1, 9):
        ads, scores = search.decode(PROMPTS, k)
        for row, prompt in enumerate(PROMPTS):
            truth = slow_beam_search(prompt, (*widths, k))
            missing = k - len(truth)
            assert ads[row].tolist() == [*(ad for ad, _ in truth), *[-1] * missing]
            expected = [*(score for _, score in truth), *[-np.inf] * missing]
            np.testing.assert_allclose(scores[row], expected, atol=2e-4)


@pytest.mark.parametrize("widths", [(3,), (3, 3), (3, 3, 3, 3)])
def test_refuses_level_beams_of_other_levels(qwen2, tokenizer, codes, widths) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    with pytest.raises(LeadreError, match=rf"decoding\.level_beams has {len(widths)} .* need 3"):
        decoder(qwen2, tokenizer, index, level_beams=widths)


def test_level_normalisation_equals_exhaustive_scoring(model, tokenizer, codes, index) -> None:
    search = decoder(model, tokenizer, index, normalise="level")
    active = np.arange(ADS) % 3 != 0
    for mask in (np.ones(ADS, bool), active):  # codes without an active ad count all the same
        search.set_active(mask)
        ads, scores = search.decode(PROMPTS, ADS)
        for row, prompt in enumerate(PROMPTS):
            truth = np.where(mask, exhaustive(model, tokenizer, codes, prompt, "level"), -np.inf)
            ranking = np.argsort(-truth)[: mask.sum()]
            assert ads[row, : mask.sum()].tolist() == ranking.tolist()
            np.testing.assert_allclose(scores[row], np.sort(truth)[::-1], atol=2e-4)


SHARING = {  # prompts, and whether they have a beginning to share
    "a-few-tokens": (True, [f"a user who reads {what}" for what in ("hiking", "x y", "games, z")]),
    "the-whole-shortest": (True, ["hiking <a_1>", "hiking <a_1><b_2>", "hiking <a_1><b_2> x y"]),
    "all-but-its-last-token": (True, ["hiking <a_1>", "hiking <a_2><b_2>", "hiking <a_3> x y"]),
    "nothing": (False, PROMPTS),
    "one-token-each": (False, ["x", "<a_2>", "y"]),
    "one-token-and-more": (False, ["x", "x y z", "x <a_1>"]),
    "equal": (True, ["a user who reads"] * 3),
    "equal-of-one-token": (False, ["x"] * 3),
    "one-prompt": (False, PROMPTS[:1]),
    "one-prompt-of-one-token": (False, ["x"]),
}


def shared_tokens(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> int:
    """Tokens that all prompts begin with and that are no prompt's last; none of one prompt."""
    rows = tokenizer(list(prompts))["input_ids"]
    count = 0
    while len(rows) > 1 and all(
        len(row) > count + 1 and row[count] == rows[0][count] for row in rows
    ):
        count += 1
    return count


@pytest.mark.parametrize("name", SHARING)
def test_a_shared_prefix_changes_nothing(qwen2, tokenizer, codes, watch, name) -> None:
    shares, prompts = SHARING[name]
    index = ConstraintIndex.build(codes, SIZES)
    plain, sharing = (
        decoder(qwen2, tokenizer, index, share_prefix=share) for share in (False, True)
    )
    calls = watch()
    apart = plain.decode(prompts, ADS)
    longest = max(len(row) for row in tokenizer(prompts)["input_ids"]) - 1
    assert calls == [Read(len(prompts), longest, 0)]
    calls.clear()
    same(sharing.decode(prompts, ADS), apart)
    shared = shared_tokens(tokenizer, prompts)
    assert (shared > 0) == shares
    once = [Read(1, shared, 0)] if shares else []
    assert calls == [*once, Read(len(prompts), longest - shared, shared)]
    for row, prompt in enumerate(prompts):
        truth = exhaustive(qwen2, tokenizer, codes, prompt)
        assert apart[0][row].tolist() == np.argsort(-truth).tolist()
        np.testing.assert_allclose(apart[1][row], np.sort(truth)[::-1], atol=2e-4)


def test_a_shared_prefix_is_read_once_for_all_batches(qwen2, tokenizer, codes, watch) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    plain, sharing = (
        decoder(qwen2, tokenizer, index, beam=5, batch_tokens=1, share_prefix=share)
        for share in (False, True)
    )
    some, others = ([f"{start} {what}" for what in PROMPTS] for start in ("a user who", "x y z"))
    calls = watch()
    # The second call begins like the first, the fourth has nothing to share.
    for prompts, reads in (
        (some, 1),
        (some[1:], 0),
        (others, 1),
        (some[:1], 0),
        (others, 0),
        (some, 1),
    ):
        expected = plain.decode(prompts, 5)
        calls.clear()
        same(sharing.decode(prompts, 5), expected)
        shared = shared_tokens(tokenizer, prompts)
        assert calls[:reads] == [Read(1, shared, 0)] * reads
        assert [(c.users, c.before) for c in calls[reads:]] == [(1, shared)] * len(prompts)


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


@pytest.mark.parametrize("most", [1, 3])
def test_no_group_gets_more_than_its_cap(qwen2, tokenizer, codes, index, most) -> None:
    rng = np.random.default_rng(7)
    groups = rng.integers(0, 6, ADS)
    search = decoder(qwen2, tokenizer, index, groups=groups, max_per_group=most)
    active = rng.random(ADS) < 0.7
    truths = [exhaustive(qwen2, tokenizer, codes, prompt) for prompt in PROMPTS]
    best = [np.argsort(-truth) for truth in truths]
    unwanted = [row[:7][rng.random(7) < 0.6] for row in best]
    nothing = [np.array([], np.int64)] * len(PROMPTS)
    for mask, exclude in (
        (np.ones(ADS, bool), nothing),
        (np.ones(ADS, bool), unwanted),
        (active, nothing),
        (active, unwanted),
    ):
        search.set_active(mask)
        expected = [
            [ad for ad in row if mask[ad] and ad not in out]
            for row, out in zip(best, exclude, strict=True)
        ]
        expected = [capped(row, groups, most) for row in expected]
        for k in (4, ADS):
            ads, scores = search.decode(PROMPTS, k, exclude)
            for row, kept in enumerate(expected):
                kept = kept[:k]
                assert ads[row].tolist() == [*kept, *[-1] * (k - len(kept))]
                np.testing.assert_allclose(scores[row, : len(kept)], truths[row][kept], atol=2e-4)
                assert np.isneginf(scores[row, len(kept) :]).all()


def capped(ranking: Sequence[int], groups: np.ndarray, most: int) -> list[int]:
    """The ranking without those that come after `most` of their group."""
    kept: list[int] = []
    for ad in ranking:
        if sum(groups[other] == groups[ad] for other in kept) < most:
            kept.append(int(ad))
    return kept


def test_a_cap_that_no_group_reaches_changes_nothing(qwen2, tokenizer, codes) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    expected = decoder(qwen2, tokenizer, index, beam=8).decode(PROMPTS, 8)
    for groups, most in ((np.arange(ADS), 1), (np.zeros(ADS, np.int64), 8)):
        search = decoder(qwen2, tokenizer, index, beam=8, groups=groups, max_per_group=most)
        same(search.decode(PROMPTS, 8), expected)


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


def test_equal_scores_go_by_code(tokenizer, codes, index) -> None:
    flat = build_model(ModelSettings(hidden_size=32, layers=1), tokenizer, seed=1)
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    ads, _ = decoder(flat, tokenizer, index).decode(PROMPTS, ADS)
    in_order = np.lexsort(codes.T[::-1])
    assert ads[0].tolist() == in_order.tolist()
    groups = np.arange(ADS) % 5
    ads, _ = decoder(flat, tokenizer, index, groups=groups, max_per_group=3).decode(PROMPTS, 15)
    assert ads[0].tolist() == capped(in_order, groups, 3)


def test_long_prompts_lose_their_beginning(model, tokenizer, codes, caplog) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    short = decoder(model, tokenizer, index, beam=5, max_tokens=12)
    ads, scores = short.decode(["once upon a time, long ago " * 9 + "x y z"], 5)
    assert "1 of 1 prompts" in caplog.text
    ids = tokenizer("once upon a time, long ago " * 9 + "x y z")["input_ids"][-8:]
    same((ads, scores), short.decode([tokenizer.decode(ids)], 5))


def test_what_is_cut_is_not_shared(qwen2, tokenizer, codes) -> None:
    prompts = ["once upon a time " * 9 + end for end in ("x y", "x", "x y z hiking")]
    index = ConstraintIndex.build(codes, SIZES)
    plain, sharing = (
        decoder(qwen2, tokenizer, index, beam=5, max_tokens=16, share_prefix=share)
        for share in (False, True)
    )
    same(sharing.decode(prompts, 5), plain.decode(prompts, 5))


EIGHT = [f"a user who likes <a_{n % 6}><b_{n % 5}>" for n in range(8)]  # of equal length


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    ("most", "first", "later"),
    [(8, [8], [8]), (4, [8, 4, 4], [4, 4]), (3, [8, 4, 2, 2, 2, 2], [2] * 4)],
)
def test_halves_batches_that_do_not_fit(
    qwen2, tokenizer, codes, scarce, watch, caplog, share_prefix, most, first, later
) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    expected = decoder(qwen2, tokenizer, index, beam=5).decode(EIGHT, 5)
    exclude = [row[[1]] for row in expected[0]]
    kept = decoder(qwen2, tokenizer, index, beam=5).decode(EIGHT, 4, exclude)
    search = decoder(qwen2, tokenizer, index, beam=5, share_prefix=share_prefix)
    scarce(most)
    calls = watch()
    same(search.decode(EIGHT, 5), expected)
    beginning = [1] if share_prefix else []
    assert [call.users for call in calls] == [*beginning, *first]
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == len(first) - 8 // first[-1]
    for record, users in zip(warnings, first, strict=False):
        assert f"out of memory with {users} users" in record.getMessage()
        assert "tried to allocate 3 GiB" in record.getMessage()
        assert "more lines" not in record.getMessage()
    calls.clear()
    same(search.decode(EIGHT, 4, exclude), kept)
    assert [call.users for call in calls] == later


def test_halves_batches_of_many_lengths(qwen2, tokenizer, codes, scarce) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    prompts = [f"{prompt} {'hiking ' * (n % 4)}" for n, prompt in enumerate(PROMPTS * 2)]
    expected = decoder(qwen2, tokenizer, index, beam=5).decode(prompts, 5)
    for most in (1, 3):
        search = decoder(qwen2, tokenizer, index, beam=5)
        scarce(most)
        same(search.decode(prompts, 5), expected)
        scarce(len(prompts))


def test_one_prompt_that_does_not_fit_says_what_to_do(qwen2, tokenizer, codes, scarce) -> None:
    search = decoder(qwen2, tokenizer, ConstraintIndex.build(codes, SIZES), share_prefix=False)
    expected = search.decode(EIGHT, 5)
    scarce(0)
    for prompts in (EIGHT, EIGHT[:1]):
        with pytest.raises(LeadreError, match=r"one prompt .*lower decoding\.beam .*3 GiB\)$"):
            search.decode(prompts, 5)
    scarce(8)
    same(search.decode(EIGHT, 5), expected)


def test_bfloat16_comes_close(qwen2, tokenizer, codes) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    prompts = [f"{start} {prompt}" for start in ("a user:", "<a_1>", "x y") for prompt in PROMPTS]
    exact, close = (
        decoder(qwen2, tokenizer, index, dtype=dtype).decode(prompts, ADS)
        for dtype in ("float32", "bfloat16")
    )
    assert np.mean(exact[0][:, 0] == close[0][:, 0]) >= 0.8
    by_ad = [np.take_along_axis(s, ads.argsort(1), 1) for ads, s in (exact, close)]
    np.testing.assert_allclose(by_ad[1], by_ad[0], atol=0.6)
    assert np.abs(by_ad[1] - by_ad[0]).max() > 1e-3  # it is another precision


def test_precision_follows_the_settings(qwen2, tokenizer, codes) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    for name, dtype in (
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    ):
        assert decoder(qwen2, tokenizer, index, dtype=name).transformer.dtype == dtype
    assert dtype_of(DecodingSettings(), torch.device("cuda")) == torch.bfloat16
    assert dtype_of(DecodingSettings(dtype="float32"), torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("normalise", ["vocabulary", "level"])
def test_refuses_scores_that_are_not_finite(tokenizer, codes, normalise) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    broken = build_model(ModelSettings(hidden_size=32, layers=1), tokenizer, seed=1)
    with torch.no_grad():  # as an input, a token that opening does not try
        broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.clone())
        broken.get_input_embeddings().weight[tokenizer("x")["input_ids"][0]] = float("nan")
    search = decoder(broken, tokenizer, index, normalise=normalise)
    with pytest.raises(LeadreError, match="not finite"):
        search.decode(PROMPTS, 3)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(LeadreError, match="not finite"):
        decoder(broken, tokenizer, index, normalise=normalise)


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
