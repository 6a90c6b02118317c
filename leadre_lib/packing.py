"""Many targets of one prompt in one sequence, and many sequences in one row of a training batch.

Most tokens of an example are prompt. Examples of one group share what their prompts begin with: it
is read once, and each example is a *branch* that goes on from there with the rest of its prompt and
its answer. A branch sees what is shared and itself, and its positions go on where the shared part
ends, so that losses and gradients are those of the examples one by one. A row holds several
sequences, which do not see each other.

    tokens     role profile behaviours question | A: <a_1> <b_2> end | A: <a_7> <b_0> end
    branches   0    0       0          0        | 1  1     1     1   | 2  2     2     2
    positions  0    1       2          3        | 4  5     6     7   | 4  5     6     7

The last token of a prompt stands in every branch, because it foretells the first token of the
answer. The mask is that of tree attention (Medusa, arXiv 2401.10774).

Knows nothing of what tokens say, of models, or of ranks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

NO_LABEL = -100
SHARED = 0
PADDING = -1
COLUMNS = {
    "tokens": pa.int32(),
    "positions": pa.int32(),
    "branches": pa.int32(),
    "labels": pa.int32(),
    "weights": pa.float32(),
}


@dataclass(frozen=True)
class Ragged:
    """Lists of numbers, one after the other: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Ints
    offsets: Ints

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """From one list a row."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        values = [np.asarray(row, np.int64) for row in lists]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return cls(np.concatenate([*values, np.empty(0, np.int64)]), offsets)

    @property
    def lengths(self) -> Ints:
        """Of each list."""
        return np.diff(self.offsets)


def sequences(
    prompts: Ragged, learnt: Mask, answers: Ragged, weights: Floats, groups: Ints, limit: int
) -> pa.Table:
    """One sequence a group of examples, or several where one would be longer than the limit.

    Args:
        prompts: token ids; an example's prompt and answer together fit the limit.
        learnt: which tokens of prompts have a loss, bool [values of `prompts`].
        answers: token ids, all of which have a loss.
        weights: of each example's loss [examples]; what is shared has their sum, as if each example
            had said it.
        groups: number of each example's group [examples], in ascending order.
        limit: tokens of a sequence at most.

    Returns:
        Lists `tokens`, `positions`, `branches` (0: shared), `labels` (-100: no loss; what is to be
        foretold at the place itself, as Transformers has it) and `weights`, one row a sequence.
        The first token of a sequence or a branch has no label: another one stands before it.
    """
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    shared = _shared(prompts, first, group)
    rest = prompts.lengths - shared[group]
    branch = rest + answers.lengths
    # As many branches as surely fit.
    longest = np.maximum.reduceat(branch, first)
    most = np.maximum((limit - shared) // longest, 1)
    rank = np.arange(len(group)) - first[group]
    starts = rank % most[group] == 0
    sequence = np.cumsum(starts) - 1
    number = rank % most[group] + 1
    total = np.bincount(sequence, weights)
    head = np.flatnonzero(starts)
    # Pieces of the pool of all prompts and answers: what is shared, then each branch's two parts.
    pool = np.concatenate([prompts.values, answers.values])
    labels = np.where(np.append(learnt, np.ones(len(answers.values), bool)), pool, NO_LABEL)
    begin = prompts.offsets[:-1]
    pieces = _Pieces(
        np.concatenate([begin[head], begin + shared[group], answers.offsets[:-1] + len(learnt)]),
        np.concatenate([shared[group[head]], rest, answers.lengths]),
        np.concatenate([np.zeros(len(head), np.int64), shared[group], prompts.lengths]),
        np.concatenate([np.full(len(head), SHARED), number, number]),
        np.concatenate([total, weights, weights]).astype(np.float32),
    )
    part = np.repeat([0, 1, 2], [len(head), len(number), len(number)])
    order = np.lexsort([part, pieces.branch, np.concatenate([sequence[head], sequence, sequence])])
    tokens, positions, branches, told, weight = pieces.taken(order, pool, labels)
    lengths = shared[group[head]] + np.bincount(sequence, branch).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    told[1:][branches[1:] != branches[:-1]] = NO_LABEL
    told[offsets[:-1]] = NO_LABEL
    arrays = (tokens, positions, branches, told, weight)
    return pa.table(
        {
            name: pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(array).cast(type_)
            )
            for (name, type_), array in zip(COLUMNS.items(), arrays, strict=True)
        }
    )


@dataclass(frozen=True)
class _Pieces:
    """Runs of tokens: where each begins in the pool, its length, first position, branch, weight."""

    start: Ints
    length: Ints
    position: Ints
    branch: Ints
    weight: Floats

    def taken(self, order: Ints, pool: Ints, labels: Ints) -> tuple[npt.NDArray[np.generic], ...]:
        """Tokens, positions, branches, labels and weights of the pieces in an order."""
        length = self.length[order]
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        source = np.repeat(self.start[order], length) + within
        return (
            pool[source],
            np.repeat(self.position[order], length) + within,
            np.repeat(self.branch[order], length),
            labels[source],
            np.repeat(self.weight[order], length),
        )


def _shared(prompts: Ragged, first: Ints, group: Ints) -> Ints:
    """Tokens that the prompts of each group begin with alike, but never a whole prompt [groups]."""
    lengths, begin = prompts.lengths, prompts.offsets[:-1]
    leader = first[group]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(prompts.values)) - begin[owner]
    inside = place < lengths[leader[owner]]
    other = np.where(inside, begin[leader[owner]] + place, 0)
    alike = inside & (prompts.values == prompts.values[other])
    until = np.minimum.reduceat(np.where(alike, lengths[owner], place), begin)
    return np.minimum.reduceat(np.minimum(until, lengths - 1), first)


def fill_rows(lengths: Ints, capacity: int) -> list[list[int]]:
    """Which sequences share a row: best fit, in descending order of length.

    Args:
        lengths: tokens of each sequence; a longer one than the capacity has a row to itself.
        capacity: tokens of a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of rows that are not full, ascending
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(number)
        else:
            left, row = capacity, len(rows)
            rows.append([number])
        if left > length:
            insort(room, (left - length, row))
    return rows


def attention_mask(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool [batch, 1, tokens, tokens]: query, key.

    A token sees itself and, of its own sequence, what stands before it and is shared or of its own
    branch. Padding sees itself alone.

    Args:
        documents: number of each token's sequence in its row, -1 for padding [batch, tokens].
        branches: as `sequences` gives them [batch, tokens].
    """
    tokens = documents.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=documents.device).tril()
    same = documents[:, :, None] == documents[:, None, :]
    seen = (branches[:, None, :] == SHARED) | (branches[:, :, None] == branches[:, None, :])
    real = (documents != PADDING)[:, :, None]
    own = torch.eye(tokens, dtype=torch.bool, device=documents.device)
    return ((before & same & seen & real) | own)[:, None]
