"""Constrained beam search on vLLM, an engine that is installed apart.

The search is that of `decoding`, over the same index. Each level is one call of vLLM's offline
`LLM.generate`, with one request for each beam and at most 128 of its candidates: the prompt and the
codes so far go in, the log-probabilities of just these candidates come out. The token that vLLM
itself writes is not looked at. Its prefix cache keeps a prompt for all beams and levels: each reads
again no more than what comes after the last full block, of 16 tokens as a rule.

Every candidate is scored, none is lost to a top-n, and over the full vocabulary, before any mask or
temperature. Not exact are the last digits: they depend on what vLLM happens to compute together, so
objects of all but equal score may change places from run to run, above all with bfloat16.

Knows nothing of prompts' contents, or of what an object is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from leadre_lib.constraint_index import Children, ConstraintIndex
from leadre_lib.decoding import NO_OBJECT, Decoder, best, dtype_of
from leadre_lib.errors import LeadreError
from leadre_lib.settings import DecodingSettings

TOKENS_A_REQUEST = 128  # vLLM's MAX_LOGPROB_TOKEN_IDS
OTHERWISE = "or choose decoding.backend: leadre"


class VllmDecoder(Decoder):
    """Writes the Semantic IDs of the `k` most likely objects for each prompt: `decoding` on vLLM.

    Not for several threads at a time. vLLM reports its use to its makers unless the environment
    says `VLLM_NO_USAGE_STATS=1` (https://docs.vllm.ai/en/stable/usage/usage_stats/).

    Args:
        model: folder of a model that vLLM can load.
        tokenizer: of the model.
        index: the objects that may be written.
        sid_token_ids: the token id of each code, one int array [codes of the level] a level.
        settings: beam widths, precision, and how many tokens of prompts and beams are searched at a
            time; vLLM makes its own batches of these, so that a high `batch_tokens` pays.
        max_tokens: longest sequence, prompt and Semantic ID together. A longer prompt loses its
            oldest behaviours (see `budget`), and how many prompts did is logged.

    Raises:
        LeadreError: vLLM is missing, too old or cannot load the model; or index, tokens and
            settings do not fit each other.
    """

    def __init__(
        self,
        model: Path,
        tokenizer: PreTrainedTokenizerBase,
        index: ConstraintIndex,
        sid_token_ids: Sequence[np.ndarray],
        settings: DecodingSettings,
        max_tokens: int,
    ) -> None:
        if settings.normalise != "vocabulary" or settings.group_by:
            raise LeadreError(
                "decoding.backend: vllm knows neither decoding.normalise: level nor"
                f" decoding.group_by: leave both out, {OTHERWISE}"
            )
        super().__init__(tokenizer, index, sid_token_ids, settings, max_tokens)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = _Engine(model, dtype_of(settings, device), max_tokens)

    def _search(
        self, token_ids: Sequence[np.ndarray], k: int, unwanted: torch.Tensor | None, shared: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        users = len(token_ids)
        node = torch.zeros((users, 1), dtype=torch.int64)
        score = torch.zeros((users, 1))
        written = torch.zeros((users, 1, 0), dtype=torch.int64)  # tokens of each beam
        for level, width in enumerate([*self.widths, k]):
            last = level == len(self.widths)
            ways = self.lookup.children(level, node)  # [users, beams, candidates]
            allowed = ways.allowed & torch.isfinite(score)[:, :, None]
            if last and unwanted is not None:
                key = torch.arange(users)[:, None, None] * self.objects + ways.nodes
                allowed &= ~torch.isin(key, unwanted)
            total = score[:, :, None] + self._scores(level, token_ids, written, ways, allowed)
            score, choice = best(total.flatten(1), width)
            node = ways.nodes.flatten(1).gather(1, choice)
            node = node.masked_fill(torch.isneginf(score), NO_OBJECT if last else 0)
            parent = choice // ways.nodes.shape[2]
            before = written.gather(1, parent[:, :, None].expand(-1, -1, level))
            written = torch.cat([before, self.tokens[level][ways.code(choice)][:, :, None]], 2)
        return node, score

    def _scores(
        self,
        level: int,
        token_ids: Sequence[np.ndarray],
        written: torch.Tensor,
        ways: Children,
        allowed: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probabilities of the candidates, float32 like `allowed`; elsewhere minus infinity."""
        scores = torch.full(allowed.shape, -torch.inf)
        user, beam, place = allowed.nonzero().numpy().T
        if not len(user):
            return scores
        code = torch.from_numpy(place) if ways.codes is None else ways.codes[allowed]
        tokens = self.tokens[level][code].numpy()
        # The candidates of a beam are neighbours: number them, and begin a request at each 128th.
        run = user * allowed.shape[1] + beam
        number = np.arange(len(run)) - np.searchsorted(run, run)
        starts = np.flatnonzero(number % TOKENS_A_REQUEST == 0)
        prefixes = [
            np.append(token_ids[of], written[of, at])
            for of, at in zip(user[starts], beam[starts], strict=True)
        ]
        told = torch.from_numpy(self.engine.score(prefixes, np.split(tokens, starts[1:])))
        if not torch.isfinite(told).all():
            raise LeadreError("the model gives scores that are not finite: it is damaged")
        scores[allowed] = told
        return scores


class _Engine:
    """A model in vLLM, and the one question that is asked of it.

    Written against the sources of vLLM 0.22.0 and 0.33.0, of which it needs what is public only:
    https://docs.vllm.ai/en/stable/api/vllm/sampling_params/ (`logprob_token_ids`),
    https://docs.vllm.ai/en/stable/api/vllm/logprobs/ (`FlatLogprobs`) and
    https://docs.vllm.ai/en/stable/configuration/engine_args/ (`logprobs_mode`).
    """

    def __init__(self, model: Path, dtype: torch.dtype, max_tokens: int) -> None:
        try:
            import vllm
        except ImportError as error:
            raise LeadreError(
                f"decoding.backend: vllm needs vLLM ({error}): `pip install vllm` in an environment"
                f" of its own, {OTHERWISE}"
            ) from None
        if not hasattr(vllm.SamplingParams, "num_logprobs"):
            raise LeadreError(
                f"vLLM {vllm.__version__} cannot score chosen tokens: `pip install 'vllm>=0.22'`,"
                f" {OTHERWISE}"
            )
        self._vllm: Any = vllm
        try:
            self._llm: Any = vllm.LLM(
                model=str(model),
                # Prompts come as tokens; and for some models vLLM would load another tokenizer.
                skip_tokenizer_init=True,
                trust_remote_code=False,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_tokens,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
            )
        except Exception as error:  # vLLM raises a dozen kinds, for the model and the machine
            reason = str(error).partition("\n")[0]
            raise LeadreError(
                f"{model}: vLLM cannot run this model ({reason}); mend it, {OTHERWISE}"
            ) from error

    def score(self, prefixes: Sequence[np.ndarray], tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Log-probabilities of `tokens`, all int64 [any], to follow each of as many prefixes.

        No `allowed_token_ids`: what vLLM writes does not matter, and a mask would only cost.

        Returns:
            float32 [all tokens]: of the first prefix's tokens, then of the second's, and so on.

        Raises:
            LeadreError: vLLM answers with other tokens.
        """
        wanted = [row.tolist() for row in tokens]
        outputs = self._llm.generate(
            [self._vllm.TokensPrompt(prompt_token_ids=row.tolist()) for row in prefixes],
            [
                self._vllm.SamplingParams(
                    max_tokens=1,
                    temperature=0.0,
                    logprob_token_ids=row,
                    flat_logprobs=True,
                    detokenize=False,
                )
                for row in wanted
            ],
            use_tqdm=False,
        )
        # Each answer begins with the token that vLLM has written.
        told = [output.outputs[0].logprobs for output in outputs]
        if [answer.token_ids[1:] for answer in told] != wanted:
            raise LeadreError(
                f"vLLM {self._vllm.__version__} scores other tokens than it is asked for:"
                f" take another version, {OTHERWISE}"
            )
        return np.concatenate([answer.logprobs[1:] for answer in told]).astype(np.float32)
