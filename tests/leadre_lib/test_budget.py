"""The token budget: oldest behaviours go first, nothing is over the limit, training and decoding
read the same ids.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from leadre_lib import training
from leadre_lib.budget import fit, measure
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.errors import LeadreError
from leadre_lib.model import build_model, build_tokenizer, sid_token_ids, sid_tokens
from leadre_lib.settings import DecodingSettings, ModelSettings
from leadre_lib.templates import load_template, parse

SIZES = (4, 4)
LANGUAGES = ("en", "zh")
TITLES = {"en": "My first marathon, part {}", "zh": "我的第一次马拉松，第{}部分"}


def prompt(language: str, behaviours: int, profile: int = 1) -> str:
    """A prompt of that many behaviours, every third of an ad, in the words of a template."""
    words = load_template(language)
    events = list(words.short_term.events.values())
    told = [
        words.short_term.behaviour.format(
            when=behaviours - n,
            event=events[n % len(events)],
            what=f"<a_{n % 4}><b_0>" if n % 3 == 0 else TITLES[language].format(n),
        )
        for n in range(behaviours)
    ]
    lines = [
        words.role,
        words.profile.sentence.format(parts=words.profile.joiner.join(["34 years old"] * profile)),
        words.short_term.sentence.format(behaviours=words.short_term.joiner.join(told)),
        words.long_term.sentence.format(categories="sports/running*4"),
        words.scene.format(scene="feed"),
        words.question,
        words.answer,
    ]
    return "\n".join(line for line in lines if told or line != lines[2])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [prompt(language, 9) for language in LANGUAGES]
    return build_tokenizer(texts, sid_tokens(SIZES), 400)


def lengths(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts))["input_ids"]]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_oldest_go_first_and_no_more_than_must(
    tokenizer: PreTrainedTokenizerFast, language: str
) -> None:
    """At every limit, against trying one behaviour less after the other."""
    text = prompt(language, 9)
    told = parse(text)
    assert told is not None
    shorter = [told.without(n) for n in range(10)]
    sizes = lengths(shorter, tokenizer)
    assert sizes == sorted(sizes, reverse=True)
    limits = np.arange(sizes[-1], sizes[0] + 2)
    fitted = measure([text] * len(limits), tokenizer, limits)
    for limit, ids, dropped in zip(limits, fitted.ids, fitted.behaviours, strict=True):
        wanted = next(n for n, size in enumerate(sizes) if size <= limit)
        assert dropped == wanted
        assert tokenizer.decode(ids) == shorter[wanted]
    assert not fitted.tokens.any()
    assert set(fitted.behaviours) == set(range(10))


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_ever_over_the_limit(tokenizer: PreTrainedTokenizerFast, language: str) -> None:
    texts = [prompt(language, n, profile) for n in (0, 1, 4) for profile in (1, 60)]
    texts += ["Ad: " + "shoes " * 50 + "\nSemantic ID: ", "x", "<a_1><b_2>" * 40]
    rng = np.random.default_rng(0)
    for limits in (1, 7, 60, rng.integers(1, 200, len(texts)), [10**6] * len(texts)):
        most = np.broadcast_to(limits, len(texts))
        fitted = measure(texts, tokenizer, limits)
        whole = tokenizer(texts)["input_ids"]
        for row, ids in enumerate(fitted.ids):
            assert 1 <= len(ids) <= most[row]
            if len(whole[row]) <= most[row]:
                assert ids == whole[row]
                assert fitted.behaviours[row] == fitted.tokens[row] == 0
        assert fit(texts, tokenizer, limits) == fitted.ids


def test_what_is_too_long_without_behaviours_is_cut_on_the_left(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = prompt("en", 3, profile=60)
    bare = tokenizer(parse(text).without(3))["input_ids"]
    fitted = measure([text], tokenizer, 40)
    assert fitted.ids[0] == bare[-40:]
    assert fitted.behaviours[0] == 3
    assert fitted.tokens[0] == len(bare) - 40
    other = "Recent behaviours: 2*play*x; 1*click*y. " * 9
    assert fit([other], tokenizer, 40) == [tokenizer(other)["input_ids"][-40:]]


def test_special_tokens_in_front_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    """As a tokenizer of a language model from elsewhere puts them there."""
    own = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        ),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", own.bos_token_id)]
    )
    text = prompt("en", 9)
    size = lengths([text], own)[0]
    assert size == lengths([text], tokenizer)[0] + 1
    for limit in (1, 2, 30, size - 20, size):
        (ids,) = fit([text], own, limit)
        assert len(ids) <= limit
        assert (ids[0] == own.bos_token_id) == (limit > 1)
    other = "word " * 99
    assert fit([other], own, 9)[0][1:] == own(other)["input_ids"][-8:]


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_and_decoding_read_the_same(
    tokenizer: PreTrainedTokenizerFast, language: str
) -> None:
    texts = [prompt(language, n, profile) for n in (0, 3, 9) for profile in (1, 60)] + ["x" * 400]
    model = build_model(ModelSettings(hidden_size=16, layers=1, heads=2, kv_heads=1), tokenizer, 1)
    codes = np.array([[0, 0], [1, 2], [3, 1]], np.int32)
    decoder = BeamDecoder(
        model,
        tokenizer,
        ConstraintIndex.build(codes, SIZES),
        sid_token_ids(tokenizer, SIZES),
        DecodingSettings(beam=3, top_k=3),
        max_tokens=110 + len(SIZES),
    )
    asked = [ids.tolist() for ids in decoder._tokenize(texts)]
    answers = training._answers(tokenizer, ["<a_1><b_2>"] * len(texts))
    trained = training._prompts(tokenizer, texts, answers, 110 + len(answers[0]))
    assert trained == asked
    assert max(map(len, asked)) <= 110 < max(lengths(texts, tokenizer))
    role = load_template(language).role
    kept = [tokenizer.decode(ids).startswith(role) for ids in asked]
    assert kept == [True, False] * 3 + [False]  # only the huge profiles are cut on the left
    decoder.decode(texts, 3)


def test_says_how_many_were_shortened_and_how(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    texts = [prompt("en", 2), prompt("en", 9), prompt("zh", 9), "word " * 200]
    fit(texts, tokenizer, lengths(texts[:1], tokenizer)[0])
    assert "3 of 4 prompts are longer" in caplog.text
    assert "2 lost their oldest behaviours, 1 their first tokens" in caplog.text
    caplog.clear()
    assert fit([], tokenizer, 5) == []
    assert fit(texts[:1], tokenizer, 10**6) == tokenizer(texts[:1])["input_ids"]
    assert not caplog.text
    with pytest.raises(LeadreError, match=r"model\.max_tokens"):
        fit(texts, tokenizer, 0)
