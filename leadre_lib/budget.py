"""The token budget of a prompt: what is too long loses its oldest behaviours first.

Training and decoding both read a prompt through `fit`, so that a model sees in training what it is
asked with. Role, profile, long-term interest and question stay; only what is still too long without
any behaviour, or has none, is cut on the left.

Knows nothing of words or of how a prompt is built (see `templates`), or of models.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from leadre_lib.errors import LeadreError
from leadre_lib.templates import Prompt, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


class Fitted(NamedTuple):
    """Token ids of some texts, and what each lost: oldest behaviours, and then first tokens."""

    ids: list[list[int]]
    behaviours: Ints
    tokens: Ints


def fit(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | Sequence[int] | Ints
) -> list[list[int]]:
    """Token ids of each text, none longer than its limit; a warning counts what was shortened.

    A prompt over its limit loses as few of its oldest behaviours as it can. A prompt that is too
    long without them, or any other text, loses tokens on its left, but not the special tokens that
    the tokenizer puts in front.

    Args:
        texts: prompts of any template, or any texts.
        tokenizer: of the model that reads them.
        limit: most tokens, special ones included, of every text or of each.

    Raises:
        LeadreError: a limit is below 1.
    """
    fitted = measure(texts, tokenizer, limit)
    forgot, cut = fitted.behaviours > 0, fitted.tokens > 0
    if (forgot | cut).any():
        log.warning(
            "%d of %d prompts are longer than %d tokens: %d lost their oldest behaviours, %d their"
            " first tokens",
            *((forgot | cut).sum(), len(texts), np.max(limit), forgot.sum(), cut.sum()),
        )
    return fitted.ids


def measure(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | Sequence[int] | Ints
) -> Fitted:
    """What `fit` gives, and what each text lost for it. Raises as `fit` does."""
    limits = np.broadcast_to(np.asarray(limit, np.int64), (len(texts),))
    if len(limits) and limits.min() < 1:
        raise LeadreError(f"a prompt of at most {limits.min()} tokens: raise model.max_tokens")
    ids = _tokenize(texts, tokenizer)
    behaviours, tokens = np.zeros((2, len(texts)), np.int64)
    over = [row for row, own in enumerate(ids) if len(own) > limits[row]]
    told = {row: found for row in over if (found := parse(texts[row])) and found.behaviours}
    rows = list(told)
    dropped, fewer = _drop(list(told.values()), limits[rows], tokenizer)
    behaviours[rows] = dropped
    for row, own in zip(rows, fewer, strict=True):
        ids[row] = own
    special = set(tokenizer.all_special_ids)
    for row in over:
        whole = ids[row]
        ids[row] = _cut(whole, int(limits[row]), special)
        tokens[row] = len(whole) - len(ids[row])
    return Fitted(ids, behaviours, tokens)


def _drop(
    prompts: list[Prompt], limits: Ints, tokenizer: PreTrainedTokenizerBase
) -> tuple[Ints, list[list[int]]]:
    """How many of its oldest behaviours each prompt must lose, and its token ids without them.

    A bisection of all prompts at once. The ids are of the shortened text, not cut out of those of
    the whole: a prompt that was written with fewer behaviours has the same.
    """
    dropped = np.array([len(prompt.behaviours) for prompt in prompts], np.int64)
    texts = [prompt.without(n) for prompt, n in zip(prompts, dropped, strict=True)]
    ids = _tokenize(texts, tokenizer)
    fits = np.array([len(own) for own in ids], np.int64) <= limits
    fewest = np.where(fits, 1, dropped)
    while len(rows := np.flatnonzero(fewest < dropped)):
        middle = (fewest + dropped) // 2
        tried = _tokenize([prompts[row].without(middle[row]) for row in rows], tokenizer)
        for row, own in zip(rows, tried, strict=True):
            if len(own) <= limits[row]:
                dropped[row], ids[row] = middle[row], own
            else:
                fewest[row] = middle[row] + 1
    return dropped, ids


def _cut(ids: list[int], limit: int, special: set[int]) -> list[int]:
    """The last tokens, and before them the special ones in front."""
    if len(ids) <= limit:
        return ids
    front = next((n for n, token in enumerate(ids) if token not in special), len(ids))
    front = front if front < limit else 0
    return ids[:front] + ids[len(ids) - limit + front :]


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not len(texts):
        return []
    return list(tokenizer(list(texts), add_special_tokens=True)["input_ids"])
