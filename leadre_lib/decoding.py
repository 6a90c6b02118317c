"""Constrained beam search: the Semantic IDs of the most likely objects for each prompt.

Prompts are sorted by length into batches of bounded tokens. What all of them begin with, the
instruction, is read once. Then each step scores the codes that may follow each beam, keeps the best
beams of each user and feeds their tokens: all on the device, over flat arrays, without a loop over
users or beams (see `transformer` and `constraint_index`).

Scores are sums of log-probabilities over the *full* vocabulary: the scores of
`generate(prefix_allowed_tokens_fn=…, length_penalty=0)`. With `decoding.normalise: level` each is
renormalised over the codes of its level, active or not, which leaves out the product with the whole
vocabulary; a trained model gives other tokens next to nothing there, so that little changes.

Knows nothing of prompts' contents, or of what an object is.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leadre_lib.budget import fit
from leadre_lib.constraint_index import ConstraintIndex, DeviceIndex
from leadre_lib.errors import LeadreError
from leadre_lib.settings import DecodingSettings
from leadre_lib.transformer import Context, Transformer

log = logging.getLogger(__name__)

NO_OBJECT = -1


class Decoder(ABC):
    """Writes the Semantic IDs of the `k` most likely objects for each prompt.

    What engines share: what may be written, tokens, batches. How one is searched, they say.

    Args:
        tokenizer: of the model.
        index: the objects that may be written.
        sid_token_ids: the token id of each code, one int array [codes of the level] a level.
        settings: beam widths, batch size in tokens, precision.
        max_tokens: longest sequence, prompt and Semantic ID together. A longer prompt loses its
            oldest behaviours (see `budget`), and how many prompts did is logged.
        device: where beams are chosen, such as `cpu` or `cuda`.

    Raises:
        LeadreError: index, tokens and settings do not fit each other.
    """

    def __init__(
        self,
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
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = torch.device(device)
        self.objects = index.objects
        self.widths = level_widths(settings, index.levels)
        self.max_prompt = max_tokens - index.levels
        self.lookup = DeviceIndex(index, device)
        self.tokens = [torch.from_numpy(np.asarray(t, np.int64)).to(device) for t in sid_token_ids]
        self._batch_tokens = settings.batch_tokens

    @abstractmethod
    def _search(
        self, token_ids: Sequence[np.ndarray], k: int, unwanted: torch.Tensor | None, shared: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Beam search over one batch; objects and scores, both [users, at most k].

        `unwanted` are sorted keys `user * objects + object` of what users must not get, `shared`
        what `_read_shared` gave.
        """

    def _read_shared(self, token_ids: Sequence[np.ndarray]) -> Any:
        """What is done once for all prompts of a call."""
        return None

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

        Where the accelerator runs out of memory, the batch is halved, and so are those after it.

        Args:
            prompts: what the model reads.
            k: objects a prompt, at most the beam width.
            exclude: for each prompt the rows of objects that it must not get, in any order.

        Returns:
            objects: int64 [prompts, k], rows of the index's codes; -1 where there are fewer.
            scores: float32 [prompts, k], natural logarithms; minus infinity for no object.

        Raises:
            LeadreError: `k` exceeds the beam, a prompt is empty, one prompt alone needs more memory
                than there is, or the model gives scores that are not finite.
        """
        if not 1 <= k <= self.settings.beam:
            raise LeadreError(f"top {k}: must be from 1 to the beam width {self.settings.beam}")
        objects = np.full((len(prompts), k), NO_OBJECT, np.int64)
        scores = np.full((len(prompts), k), -np.inf, np.float32)
        if not len(prompts):
            return objects, scores
        for rows, found, found_scores in self._search_all(self._tokenize(prompts), k, exclude):
            objects[rows, : found.shape[1]] = found
            scores[rows, : found.shape[1]] = found_scores
        return objects, scores

    def _tokenize(self, prompts: Sequence[str]) -> list[np.ndarray]:
        ids = [np.array(row, np.int64) for row in fit(prompts, self.tokenizer, self.max_prompt)]
        if not all(map(len, ids)):
            raise LeadreError("a prompt is empty: the model needs at least one token to read")
        return ids

    def _search_all(
        self, token_ids: Sequence[np.ndarray], k: int, exclude: Sequence[np.ndarray] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, objects and scores, batch by batch: rows of like lengths, longest first.

        A batch's padded tokens are bounded. Where they are too many for the accelerator, the first
        batch shows it.
        """
        shared = self._read_shared(token_ids)
        lengths = np.array([len(ids) for ids in token_ids])
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            tokens = int(lengths[order[start]]) + sum(self.widths)
            rows = order[start : start + max(1, self._batch_tokens // tokens)]
            unwanted = None if exclude is None else self._pairs([exclude[row] for row in rows])
            failure = ""
            try:
                batch = [token_ids[row] for row in rows]
                found, scores = self._search(batch, k, unwanted, shared)
            except torch.OutOfMemoryError as error:
                failure = str(error).partition("\n")[0] or "out of memory"
            # Not while the error is handled: it holds what the search had in memory.
            if failure:
                self._halve(len(rows), tokens, failure)
                continue
            yield rows, found.cpu().numpy(), scores.cpu().numpy()
            start += len(rows)

    def _halve(self, users: int, tokens: int, reason: str) -> None:
        if users == 1:
            raise LeadreError(
                f"one prompt with its beams, {tokens} tokens, does not fit into memory: lower"
                f" decoding.beam ({reason})"
            )
        self._batch_tokens = users // 2 * tokens
        log.warning(
            "out of memory with %d users at once: going on with %d, or %d tokens (%s)",
            *(users, users // 2, self._batch_tokens, reason),
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pairs(self, exclude: Sequence[np.ndarray]) -> torch.Tensor:
        """Sorted keys `user * objects + object`, int64 [unwanted pairs]."""
        users = np.repeat(np.arange(len(exclude)), [len(rows) for rows in exclude])
        flat = np.concatenate([np.asarray(rows, np.int64).ravel() for rows in exclude])
        if flat.size and not 0 <= flat.min() <= flat.max() < self.objects:
            raise LeadreError(
                f"an excluded object lies outside the {self.objects} rows of the index"
            )
        return torch.from_numpy(np.sort(users * self.objects + flat)).to(self.device)


class BeamDecoder(Decoder):
    """The project's own engine: see `transformer`.

    Args:
        model: a causal language model of the Llama family; not needed afterwards, nor changed.
        groups: int [objects], such as the category of each, of which a user gets at most
            `decoding.max_per_group` objects; None: any number.
        packed: see `Transformer`.
        others: as `Decoder` takes them; the device is that of the model's weights, too.

    Raises:
        LeadreError: index, tokens, settings and model do not fit each other.
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
        groups: np.ndarray | None = None,
        packed: bool = True,
    ) -> None:
        super().__init__(tokenizer, index, sid_token_ids, settings, max_tokens, device)
        dtype = dtype_of(settings, self.device)
        self.transformer = Transformer(model, max_tokens, device, dtype, packed)
        self._code_logits = [self.transformer.logits_of(model, ids) for ids in self.tokens]
        if groups is not None and groups.shape != (index.objects,):
            raise LeadreError(f"groups of shape {groups.shape} do not fit {index.objects} objects")
        self._groups = None if groups is None else torch.from_numpy(groups).to(device)
        self._instruction: tuple[bytes, Context] | None = None

    def _read_shared(self, token_ids: Sequence[np.ndarray]) -> Context | None:
        """What all prompts begin with, read once; it is kept for calls that begin alike."""
        if not self.settings.share_prefix or len(token_ids) == 1:
            return None
        common = _common_start(token_ids)
        if not len(common):
            return None
        key = common.tobytes()
        known = self._instruction
        if known is None or known[0] != key:
            ids = torch.from_numpy(common)[None].to(self.device)
            lengths = torch.tensor([len(common)], device=self.device)
            self._instruction = known = key, self.transformer.read(ids, lengths)
        return known[1]

    def _search(
        self,
        token_ids: Sequence[np.ndarray],
        k: int,
        unwanted: torch.Tensor | None,
        shared: Context | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context, token = self._read(token_ids, shared)
        parent: torch.Tensor | None = None
        node = torch.zeros((len(token_ids), 1), dtype=torch.int64, device=self.device)
        score = torch.zeros((len(token_ids), 1), device=self.device)
        sound = torch.ones((), dtype=torch.bool, device=self.device)
        for level in range(len(self.tokens)):
            hidden = self.transformer.step(context, token, parent)
            logits, normaliser = self._logits(hidden, level)
            sound &= torch.isfinite(normaliser).all()
            ways = self.lookup.children(level, node)  # [users, beams, candidates]
            total = (score - normaliser)[:, :, None] + ways.pick(logits)
            total = total.masked_fill(~ways.allowed, -torch.inf)
            last = level == len(self.tokens) - 1
            if last:
                total = self._without(total, ways.nodes, unwanted)
            score, choice = best(total.flatten(1), k if last else self.widths[level])
            node = ways.nodes.flatten(1).gather(1, choice)
            node = node.masked_fill(torch.isneginf(score), NO_OBJECT if last else 0)
            parent = choice // ways.nodes.shape[2]
            token = self.tokens[level][ways.code(choice)]
        if not sound:
            raise LeadreError("the model gives scores that are not finite: it is damaged")
        return node, score

    def _read(
        self, token_ids: Sequence[np.ndarray], shared: Context | None
    ) -> tuple[Context, torch.Tensor]:
        """The prompts but for their last tokens as a context, and those, int64 [users, 1]."""
        lengths = np.array([len(row) for row in token_ids]) - 1
        last = np.array([[row[-1]] for row in token_ids])
        begun = 0 if shared is None else shared.tokens
        real = np.arange(lengths.max() - begun) < (lengths - begun)[:, None]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = np.concatenate([row[begun:-1] for row in token_ids])
        moved = [torch.from_numpy(array).to(self.device) for array in (ids, lengths - begun, last)]
        return self.transformer.read(moved[0], moved[1], shared), moved[2]

    def _logits(self, hidden: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [users, beams, codes] of a level, and their normaliser [users, beams]."""
        logits = self._code_logits[level](hidden).float()
        if self.settings.normalise == "level":
            return logits, logits.logsumexp(-1)
        return logits, self.transformer.log_normaliser(hidden)

    def _without(
        self, total: torch.Tensor, objects: torch.Tensor, unwanted: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores without the objects [users, beams, candidates] that the user must not get."""
        if unwanted is not None and len(unwanted):
            user = torch.arange(len(objects), device=self.device)[:, None, None]
            key = user * self.objects + objects
            place = torch.searchsorted(unwanted, key).clamp_max(len(unwanted) - 1)
            total = total.masked_fill(unwanted[place] == key, -torch.inf)
        if self._groups is not None:
            total = _capped(total, self._groups[objects], self.settings.max_per_group)
        return total


def level_widths(settings: DecodingSettings, levels: int) -> list[int]:
    """Beams kept after each level but the last, which keeps as many as are asked for.

    Raises:
        LeadreError: `decoding.level_beams` is for another number of levels.
    """
    if settings.level_beams and len(settings.level_beams) != levels - 1:
        raise LeadreError(
            f"decoding.level_beams has {len(settings.level_beams)} widths, but Semantic IDs of"
            f" {levels} tokens need {levels - 1}: one for each token but the last"
        )
    return list(settings.level_beams) or [settings.beam] * (levels - 1)


def dtype_of(settings: DecodingSettings, device: torch.device) -> torch.dtype:
    """The precision that settings ask for; `auto` is bfloat16 on accelerators, float32 on CPUs."""
    wanted = settings.dtype
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _common_start(token_ids: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens that all rows begin with, but never a whole row: its last token is a beam's."""
    shortest = min(map(len, token_ids)) - 1
    starts = np.stack([row[:shortest] for row in token_ids])
    differs = np.append((starts != starts[0]).any(axis=0), True)
    return np.ascontiguousarray(starts[0, : int(differs.argmax())])


def best(total: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` highest of each row [users, candidates]; among equals, the earliest candidate."""
    score, choice = total.sort(dim=1, descending=True, stable=True)
    return score[:, :k], choice[:, :k]


def _capped(total: torch.Tensor, groups: torch.Tensor, most: int) -> torch.Tensor:
    """Scores [users, beams, candidates] of the best `most` of each group; the rest at -inf."""
    flat, group = total.flatten(1), groups.flatten(1)
    ranked = flat.argsort(dim=1, descending=True, stable=True)
    # By group, and within a group still by score: a candidate's place in its run is its rank.
    order = ranked.gather(1, group.gather(1, ranked).argsort(dim=1, stable=True))
    run = group.gather(1, order)
    place = torch.arange(run.shape[1], device=run.device).expand_as(run)
    starts = torch.ones_like(run, dtype=torch.bool)
    starts[:, 1:] = run[:, 1:] != run[:, :-1]
    rank = place - torch.where(starts, place, 0).cummax(1).values
    beyond = torch.zeros_like(starts).scatter(1, order, rank >= most)
    return flat.masked_fill(beyond, -torch.inf).view_as(total)
