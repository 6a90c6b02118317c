"""The vLLM decoder against the project's own, on a stand-in for vLLM with a real model inside."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from leadre_lib.constraint_index import DENSE_LIMIT, ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.errors import LeadreError
from leadre_lib.model import build_model, build_tokenizer, load, save, sid_token_ids, sid_tokens
from leadre_lib.settings import DecodingSettings, ModelSettings
from leadre_lib.vllm_decoder import TOKENS_A_REQUEST, VllmDecoder

SIZES = (150, 5, 3)  # more codes than a request may ask for, then fewer
ADS = 300
PROMPTS = [
    "a user who reads about hiking",
    "someone likes cooking, 3 days ago <a_2><b_1><c_0>",
    "x",
    "age 30; long-term interest: travel*4, games*2; what next?",
]


@dataclass
class SamplingParams:
    """vLLM's, as far as it matters here, with its checks."""

    temperature: float = 1.0
    max_tokens: int | None = 16
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    allowed_token_ids: list[int] | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.logprobs is not None:
            return self.logprobs
        return len(self.logprob_token_ids) if self.logprob_token_ids else None

    def verify(self, vocabulary: int, max_logprobs: int) -> None:
        most = vocabulary if max_logprobs == -1 else max_logprobs
        if (vocabulary if self.logprobs == -1 else self.logprobs or 0) > most:
            raise ValueError("logprobs greater than max allowed")
        for ids in (self.logprob_token_ids, self.allowed_token_ids):
            if ids is not None and not all(type(i) is int and 0 <= i < vocabulary for i in ids):
                raise ValueError("out-of-vocab token ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty")
        if self.logprob_token_ids is not None:
            if len(self.logprob_token_ids) > 128:
                raise ValueError("logprob_token_ids greater than max allowed")
            if self.logprobs not in (None, len(self.logprob_token_ids)):
                raise ValueError("logprobs must equal len(logprob_token_ids)")


@dataclass
class FlatLogprobs:
    """Of one position: the token written, then those asked for."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LLM:
    """vLLM's, with a forward pass of Transformers a prompt."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        max_model_len: int | None = None,
        enable_prefix_caching: bool | None = None,
        logprobs_mode: str = "raw_logprobs",
        max_logprobs: int = 20,
    ) -> None:
        assert isinstance(model, str)
        self.options = (skip_tokenizer_init, trust_remote_code, dtype, enable_prefix_caching)
        self.model, _ = load(Path(model), getattr(torch, dtype))
        self.max_model_len = max_model_len or self.model.config.max_position_embeddings
        self.processed = {"raw_logprobs": False, "processed_logprobs": True}[logprobs_mode]
        self.max_logprobs = max_logprobs
        self.calls: list[Sequence[SamplingParams]] = []

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[SimpleNamespace]:
        self.calls.append(sampling_params)
        return [
            SimpleNamespace(outputs=[self._complete(prompt["prompt_token_ids"], params)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    @torch.inference_mode()
    def _complete(self, prompt: list[int], params: SamplingParams) -> SimpleNamespace:
        params.verify(self.model.config.vocab_size, self.max_logprobs)
        assert params.max_tokens == 1, "the stand-in writes one token"
        if not 0 < len(prompt) < self.max_model_len:
            raise ValueError("the prompt is empty or leaves no room for a token")
        logits = self.model(torch.tensor([prompt])).logits[0, -1].float()
        processed = logits.clone()
        if params.allowed_token_ids is not None:
            processed[:] = -torch.inf
            processed[params.allowed_token_ids] = logits[params.allowed_token_ids]
        if params.temperature:
            processed /= params.temperature
            written = int(processed.softmax(-1).multinomial(1))
        else:
            written = int(processed.argmax())
        if params.num_logprobs is None:
            return SimpleNamespace(token_ids=[written], logprobs=None)
        known = (processed if self.processed else logits).log_softmax(-1)
        most = len(known) if params.num_logprobs == -1 else params.num_logprobs
        ids = params.logprob_token_ids or known.topk(most).indices
        told = [written, *map(int, ids)]
        if params.flat_logprobs:
            return SimpleNamespace(
                token_ids=[written], logprobs=FlatLogprobs(told, known[told].tolist())
            )
        pairs = zip(told, known[told].tolist(), strict=True)
        answer = {token: SimpleNamespace(logprob=value) for token, value in pairs}
        return SimpleNamespace(token_ids=[written], logprobs=[answer])


def tokens_prompt(*, prompt_token_ids: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": prompt_token_ids}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    names = {"LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": tokens_prompt}
    vars(module).update(names, __version__="0.33.0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(PROMPTS * 3, sid_tokens(SIZES), 300)


@pytest.fixture(scope="module")
def folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[PreTrainedModel], object]], Path]:
    """Writes a small model, changed by `change`, and gives its folder."""

    def write(name: str, change: Callable[[PreTrainedModel], object]) -> Path:
        sizes = ModelSettings(hidden_size=32, intermediate_size=64, layers=2, max_tokens=128)
        model = build_model(sizes, tokenizer, seed=1)
        with torch.no_grad():
            change(model)
        path = tmp_path_factory.getbasetemp() / "vllm" / name
        save(model, tokenizer, path)
        return path

    return write


@pytest.fixture(scope="module")
def model(folder) -> Path:
    # Wide logits: a random start is too flat to tell beams apart.
    return folder("wide", lambda model: model.get_output_embeddings().weight.mul_(20))


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    flat = np.random.default_rng(3).choice(np.prod(SIZES), ADS, replace=False)
    return np.stack(np.unravel_index(flat, SIZES), axis=1).astype(np.int32)


@pytest.fixture(scope="module", params=[DENSE_LIMIT, 0], ids=["tables", "compressed"])
def index(request: pytest.FixtureRequest, codes: np.ndarray) -> ConstraintIndex:
    return ConstraintIndex.build(codes, SIZES, dense_limit=request.param)


def decoders(
    model: Path,
    tokenizer: PreTrainedTokenizerFast,
    index: ConstraintIndex,
    beam: int = 6,
    level_beams: tuple[int, ...] = (),
    max_tokens: int = 128,
) -> tuple[VllmDecoder, BeamDecoder]:
    settings = DecodingSettings(beam=beam, level_beams=level_beams, dtype="float32")
    rest = (tokenizer, index, sid_token_ids(tokenizer, SIZES), settings, max_tokens)
    return VllmDecoder(model, *rest), BeamDecoder(load(model)[0], *rest)


def same(
    found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    assert found[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(found[1], expected[1], atol=2e-4)
    assert (found[0].dtype, found[1].dtype) == (np.int64, np.float32)
    return found


@pytest.mark.parametrize("level_beams", [(), (4, 7)])
def test_equals_the_other_decoder(vllm, model, tokenizer, index, level_beams) -> None:
    search, other = decoders(model, tokenizer, index, level_beams=level_beams)
    ads, _ = same(search.decode(PROMPTS, 6), other.decode(PROMPTS, 6))
    exclude = [row[[4, 0]] for row in ads]
    exclude[2] = np.array([], np.int64)
    kept, _ = same(search.decode(PROMPTS, 5, exclude), other.decode(PROMPTS, 5, exclude))
    assert not np.isin(kept[0], exclude[0]).any()
    active = np.arange(ADS) % 3 == 0
    search.set_active(active)
    other.set_active(active)
    ads, _ = same(search.decode(PROMPTS, 6), other.decode(PROMPTS, 6))
    assert active[ads[ads >= 0]].all()


def test_says_where_there_are_fewer_objects(vllm, model, tokenizer, index) -> None:
    search, other = decoders(model, tokenizer, index)
    active = np.zeros(ADS, bool)
    for few in ([3, 17], []):
        active[:] = False
        active[few] = True
        search.set_active(active)
        other.set_active(active)
        ads, scores = same(search.decode(PROMPTS, 6), other.decode(PROMPTS, 6))
        assert (ads >= 0).sum(1).tolist() == [len(few)] * len(PROMPTS)
        assert ((ads >= 0) == np.isfinite(scores)).all()
    assert search.decode([], 2)[0].shape == (0, 2)


def test_equal_scores_go_by_code(vllm, folder, tokenizer, codes, index) -> None:
    flat = folder("flat", lambda model: model.get_output_embeddings().weight.zero_())
    ads, _ = decoders(flat, tokenizer, index, beam=40)[0].decode(PROMPTS[:1], 40)
    assert ads[0].tolist() == np.lexsort(codes.T[::-1])[:40].tolist()


def test_long_prompts_lose_their_beginning(vllm, model, tokenizer, index, caplog) -> None:
    search, other = decoders(model, tokenizer, index, max_tokens=12)
    prompts = ["once upon a time, long ago " * 9 + "x y z", "x"]
    same(search.decode(prompts, 5), other.decode(prompts, 5))
    assert "1 of 2 prompts" in caplog.text


def test_asks_vllm_for_few_tokens_and_no_remote_code(vllm, model, tokenizer, index) -> None:
    search, _ = decoders(model, tokenizer, index)
    search.decode(PROMPTS[:1], 3)
    llm = search.engine._llm
    assert llm.options == (True, False, "float32", True)
    asked = [[len(params.logprob_token_ids) for params in call] for call in llm.calls]
    assert len(asked) == len(SIZES)
    first = len(index.labels[0])
    assert asked[0] == [TOKENS_A_REQUEST, first - TOKENS_A_REQUEST]
    assert len(asked[1]) == len(asked[2]) == 6  # a request for each beam


def test_import_leaves_vllm_alone(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it would fail
    monkeypatch.delitem(sys.modules, "leadre_lib.vllm_decoder")
    importlib.import_module("leadre_lib.vllm_decoder")


def test_names_the_mend_without_vllm(monkeypatch, model, tokenizer, index) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(LeadreError, match=r"pip install vllm.*decoding\.backend: leadre"):
        decoders(model, tokenizer, index)


def test_refuses_an_old_vllm_and_a_model_it_cannot_load(
    vllm, monkeypatch, model, tokenizer, index, tmp_path
) -> None:
    with pytest.raises(LeadreError, match="cannot run this model"):
        decoders(tmp_path, tokenizer, index)
    monkeypatch.setattr(vllm, "SamplingParams", SimpleNamespace)
    with pytest.raises(LeadreError, match=r"vllm>=0\.22"):
        decoders(model, tokenizer, index)


def test_refuses_wrong_answers(vllm, monkeypatch, folder, model, tokenizer, index) -> None:
    def damage(model: PreTrainedModel) -> None:
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")

    with pytest.raises(LeadreError, match="not finite"):
        decoders(folder("damaged", damage), tokenizer, index)[0].decode(PROMPTS, 3)
    search, _ = decoders(model, tokenizer, index)
    answer = SimpleNamespace(logprobs=FlatLogprobs([7, 8], [-1.0, -2.0]))
    monkeypatch.setattr(LLM, "_complete", lambda *_: answer)
    with pytest.raises(LeadreError, match="other tokens"):
        search.decode(PROMPTS, 3)


def test_refuses_what_does_not_fit(vllm, model, tokenizer, index) -> None:
    def build(sizes: tuple[int, ...], max_tokens: int, **settings: object) -> VllmDecoder:
        ids = sid_token_ids(tokenizer, sizes)
        return VllmDecoder(model, tokenizer, index, ids, DecodingSettings(**settings), max_tokens)

    with pytest.raises(LeadreError, match="do not fit"):
        build(SIZES[:2], 99)
    with pytest.raises(LeadreError, match="no room"):
        build(SIZES, len(SIZES))
    with pytest.raises(LeadreError, match="level_beams"):
        build(SIZES, 99, level_beams=(3,))
    for setting in ({"normalise": "level"}, {"group_by": "category"}):
        with pytest.raises(LeadreError, match="knows neither"):
            build(SIZES, 99, **setting)
    search, _ = decoders(model, tokenizer, index)
    for k in (0, 7):
        with pytest.raises(LeadreError, match="beam width 6"):
            search.decode(PROMPTS, k)
    with pytest.raises(LeadreError, match="empty"):
        search.decode([""], 5)
    with pytest.raises(LeadreError, match="outside"):
        search.decode(PROMPTS[:1], 5, [np.array([ADS])])
    with pytest.raises(LeadreError, match="mask"):
        search.set_active(np.ones(ADS - 1, bool))
