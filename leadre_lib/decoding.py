"""Constrained beam search with one shared context a user.

The prompts of a batch are read once. Then every step feeds the beams of a user as further query
positions of the same row: a four-dimensional attention mask lets a beam's token see the prompt and
its own ancestors only (tree attention, as in SpecInfer, arXiv 2305.09781). So the cache holds each
prompt once, grows by one column a beam and step, and is never reordered.

Works with any causal language model of Transformers that takes such a mask (attention `sdpa` or
`eager`, no sliding window). Knows nothing of prompts' contents, or of what an object is.

Scores are sums of log-probabilities over the *full* vocabulary, not renormalised over the allowed
tokens: the scores of `generate(prefix_allowed_tokens_fn=…, length_penalty=0)`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from leadre_lib.constraint_index import ConstraintIndex, DeviceIndex
from leadre_lib.errors import LeadreError
from leadre_lib.settings import DecodingSettings

log = logging.getLogger(__name__)

NO_OBJECT = -1
LOGITS_CHUNK = 1 << 24  # numbers of logits held at once: 64 MiB in float32


class BeamDecoder:
    """Writes the Semantic IDs of the `k` most likely objects for each prompt.

    Args:
        model: any causal language model; it is set to evaluation mode and moved to `device`.
        tokenizer: of the model.
        index: the objects that may be written.
        sid_token_ids: the token id of each code, one int array [codes of the level] a level.
        settings: beam width and batch size in tokens.
        max_tokens: longest sequence, prompt and Semantic ID together. A longer prompt loses tokens
            on its left, and how many prompts did is logged.
        device: where to compute, such as `cpu` or `cuda`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        index: ConstraintIndex,
        sid_token_ids: Sequence[np.ndarray],
        settings: DecodingSettings,
        max_tokens: int,
        device: str | torch.device = "cpu",
    ) -> None:
        sizes = tuple(len(ids) for ids in sid_token_ids)
        if sizes != index.sizes:
            raise LeadreError(
                f"tokens of {sizes} codes a level do not fit an index of {index.sizes}"
            )
        if max_tokens <= index.levels:
            raise LeadreError(
                f"max_tokens {max_tokens}: no room for a prompt and {len(sizes)} tokens"
            )
        self.model = model.to(device).eval()  # type: ignore[arg-type]
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = torch.device(device)
        self.objects = index.objects
        self.levels = index.levels
        self.max_prompt = max_tokens - index.levels
        self.lookup = DeviceIndex(index, device)
        self.tokens = [torch.from_numpy(np.asarray(t, np.int64)).to(device) for t in sid_token_ids]

    def set_active(self, active: np.ndarray) -> None:
        """From now on write the objects where `active`, bool [objects of the index], holds.

        A search that another thread has under way may find fewer objects than there are.

        Raises:
            LeadreError: the mask is of another type or shape.
        """
        self.lookup.set_active(active)

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[str], k: int, exclude: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the `k` best objects of each prompt, best first.

        Args:
            prompts: what the model reads.
            k: objects a prompt, at most the beam width.
            exclude: for each prompt the rows of objects that it must not get, in any order.

        Returns:
            objects: int64 [prompts, k], rows of the index's codes; -1 where there are fewer.
            scores: float32 [prompts, k], natural logarithms; minus infinity for no object.

        Raises:
            LeadreError: `k` exceeds the beam, or the model gives scores that are not finite.
        """
        if not 1 <= k <= self.settings.beam:
            raise LeadreError(f"top {k}: must be from 1 to the beam width {self.settings.beam}")
        objects = np.full((len(prompts), k), NO_OBJECT, np.int64)
        scores = np.full((len(prompts), k), -np.inf, np.float32)
        if not len(prompts):
            return objects, scores
        token_ids = self._tokenize(prompts)
        for rows in self._batches(np.array([len(ids) for ids in token_ids])):
            unwanted = None if exclude is None else self._pairs([exclude[row] for row in rows])
            found, found_scores = self._decode_batch([token_ids[row] for row in rows], k, unwanted)
            objects[rows, : found.shape[1]] = found.cpu().numpy()
            scores[rows, : found.shape[1]] = found_scores.cpu().numpy()
        return objects, scores

    def _tokenize(self, prompts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.tokenizer(list(prompts), add_special_tokens=True)["input_ids"]
        ids = [np.array(row, np.int64) for row in encoded]
        if not all(map(len, ids)):
            raise LeadreError("a prompt is empty: the model needs at least one token to read")
        cut = sum(len(row) > self.max_prompt for row in ids)
        if cut:
            log.warning(
                "%d of %d prompts are longer than %d tokens and lost their first ones",
                cut,
                len(ids),
                self.max_prompt,
            )
        return [row[-self.max_prompt :] for row in ids]

    def _batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of like lengths, longest first, bounded by the settings' padded tokens."""
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            padded = int(lengths[order[start]]) + self.settings.beam * (self.levels - 1)
            stop = start + max(1, self.settings.batch_tokens // padded)
            yield order[start:stop]
            start = stop

    def _pairs(self, exclude: Sequence[np.ndarray]) -> torch.Tensor:
        """Sorted keys `user * objects + object`, int64 [unwanted pairs]."""
        users = np.repeat(np.arange(len(exclude)), [len(rows) for rows in exclude])
        flat = np.concatenate([np.asarray(rows, np.int64).ravel() for rows in exclude])
        if flat.size and not 0 <= flat.min() <= flat.max() < self.objects:
            raise LeadreError(
                f"an excluded object lies outside the {self.objects} rows of the index"
            )
        return torch.from_numpy(np.sort(users * self.objects + flat)).to(self.device)

    def _decode_batch(
        self, token_ids: Sequence[np.ndarray], k: int, unwanted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Beam search over one batch; objects and scores, both [users, at most k]."""
        search = _Search(self.model, token_ids, self.tokenizer.pad_token_id, self.device)
        users = len(token_ids)
        node = torch.zeros((users, 1), dtype=torch.int64, device=self.device)
        score = torch.zeros((users, 1), device=self.device)
        hidden = search.hidden
        for level, tokens in enumerate(self.tokens):
            last = level == self.levels - 1
            ways = self.lookup.children(level, node)  # [users, beams, candidates]
            total = score[:, :, None] + ways.pick(self._log_probabilities(hidden, tokens))
            allowed = ways.allowed & torch.isfinite(score)[:, :, None]
            if not torch.isfinite(total[allowed]).all():
                raise LeadreError("the model gives scores that are not finite: it is damaged")
            if last and unwanted is not None and len(unwanted):
                allowed &= ~self._is_unwanted(ways.nodes, unwanted)
            total = total.masked_fill(~allowed, -torch.inf).flatten(1)
            score, choice = _top(total, k if last else self.settings.beam)
            node = ways.nodes.flatten(1).gather(1, choice)
            node = node.masked_fill(torch.isneginf(score), NO_OBJECT if last else 0)
            if not last:
                parent = choice // ways.nodes.shape[2]
                hidden = search.step(tokens[ways.code(choice)], parent)
        return node, score

    def _log_probabilities(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [users, beams, codes] of a level's tokens, over the full vocabulary."""
        head = self.model.get_output_embeddings()
        flat = hidden.flatten(0, 1)
        chunk = max(1, LOGITS_CHUNK // self.model.config.get_text_config().vocab_size)
        parts = []
        for rows in flat.split(chunk):
            logits = head(rows).float()
            parts.append(logits[:, tokens] - logits.logsumexp(-1, keepdim=True))
        return torch.cat(parts).unflatten(0, hidden.shape[:2])

    def _is_unwanted(self, objects: torch.Tensor, unwanted: torch.Tensor) -> torch.Tensor:
        """Whether each of `objects` [users, beams, candidates] is unwanted by the user."""
        user = torch.arange(len(objects), device=self.device)[:, None, None]
        key = user * self.objects + objects
        place = torch.searchsorted(unwanted, key).clamp_max(len(unwanted) - 1)
        return unwanted[place] == key


class _Search:
    """The model's side of a search: prompts in the cache, beams as query positions over them."""

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[np.ndarray],
        pad: int,
        device: torch.device,
    ) -> None:
        longest = max(map(len, token_ids))
        ids = np.full((len(token_ids), longest), pad, np.int64)
        lengths = np.array([len(row) for row in token_ids])
        real = np.arange(longest) >= longest - lengths[:, None]
        ids[real] = np.concatenate(token_ids)
        self._base = model.base_model
        self._cache = DynamicCache(config=model.config)
        self._real = torch.from_numpy(real).to(device)
        self._next = torch.from_numpy(lengths).to(device)[:, None]
        self._ancestors: list[torch.Tensor] = []  # of each step fed, the slot that a beam grew from
        self._widths: list[int] = []  # of each step fed, its slots
        # Without padding the mask is left out, which lets attention take its faster causal kernel.
        self.hidden = self._forward(
            torch.from_numpy(ids).to(device),
            (self._real.cumsum(1) - 1).clamp_min(0),
            None if real.all() else self._real.long(),
        )[:, -1:]

    def step(self, token: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
        """Feed one token a beam; the beams' hidden states [users, beams, hidden].

        Args:
            token: int64 [users, beams].
            parent: int64 [users, beams], each beam's slot among those of the step before.
        """
        users, beams = token.shape
        own = torch.arange(beams, device=token.device).expand(users, beams)
        self._widths.append(beams)
        self._ancestors = [slots.gather(1, parent) for slots in self._ancestors] + [own]
        mask = torch.cat(
            [self._real[:, None, :].expand(-1, beams, -1)]
            + [
                slots[:, :, None] == torch.arange(width, device=token.device)
                for slots, width in zip(self._ancestors, self._widths, strict=True)
            ],
            dim=2,
        )
        hidden = self._forward(token, self._next.expand(-1, beams), mask[:, None])
        self._next = self._next + 1
        return hidden

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self._base(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state


def _top(total: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` highest of each row [users, candidates]; among equals, the earliest candidate."""
    score, choice = total.sort(dim=1, descending=True, stable=True)
    return score[:, :k], choice[:, :k]
