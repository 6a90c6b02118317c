"""SASRec: the next item by self-attention over those before it, a baseline that knows ids alone.

Kang & McAuley 2018, "Self-Attentive Sequential Recommendation", section III
(https://arxiv.org/abs/1808.09781): learned positions, blocks of causal self-attention and of a
point-wise feed-forward network, each as `x + dropout(f(norm(x)))`, and items scored with the
embeddings by which they are read. Three things differ:

- The loss is cross-entropy over the whole catalogue in place of one sampled negative: Klenitskiy &
  Vasilev 2023, "Turning Dross Into Gold Loss" (https://arxiv.org/abs/2309.07602).
- Every history begins with a start token, so that an empty one has a next item too.
- What is older than the window is learned from as well, in windows of its own.

Knows nothing of tables, of ads, or of what an item says.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import Floats, Histories, Rows, Scorer, ranked_by_scores
from leadre_lib.settings import SasrecSettings

LOGITS = 1 << 25  # of a training batch at most (128 MiB): a large catalogue has smaller batches
CASES = 1024  # that are scored at a time
CHOSEN_BY = "NDCG@10"


class Sasrec(nn.Module):
    """The network. Histories lie in rows [n, steps], oldest first, with anything behind their end:
    causal attention never looks there, so padding needs no mask.
    """

    def __init__(self, catalogue: int, settings: SasrecSettings) -> None:
        super().__init__()
        self.start, self.window = catalogue, settings.window
        self.items = nn.Embedding(catalogue + 1, settings.dim)
        self.positions = nn.Embedding(settings.window + 1, settings.dim)
        self.dropout = nn.Dropout(settings.dropout)
        block = nn.TransformerEncoderLayer(
            settings.dim,
            settings.heads,
            dim_feedforward=settings.dim,
            dropout=settings.dropout,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            block, settings.blocks, nn.LayerNorm(settings.dim), enable_nested_tensor=False
        )
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.xavier_normal_(weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Items int64 [n, steps], the start token before them → states [n, steps, dim]."""
        steps = rows.shape[1]
        read = self.items(rows) * self.items.embedding_dim**0.5 + self.positions.weight[:steps]
        causal = nn.Transformer.generate_square_subsequent_mask(steps)
        states: Tensor = self.blocks(self.dropout(read), mask=causal, is_causal=True)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """What each item scores as the next one; [n, dim] → [n, catalogue]."""
        return states @ self.items.weight[: self.start].T


def sasrec(
    train_users: Rows, train_rows: Rows, catalogue: int, settings: SasrecSettings, seed: int
) -> Scorer:
    """Train SASRec; equal inputs give equal scores, whatever the number of threads.

    The last interactions of some users are held out, and the epoch that ranks those best is kept.
    Time grows with interactions x catalogue, the memory of training with the catalogue, and that
    of what the scorer returns with cases x catalogue.

    Args:
        train_users: user number of each training interaction.
        train_rows: catalogue row of each training interaction; one user's in the order of time.
        seed: of the weights, the batches, and who is held out.

    Raises:
        LeadreError: the arrays differ in length, a row is outside the catalogue, or `sasrec.dim`
            is no multiple of `sasrec.heads`.
    """
    _check(train_users, train_rows, catalogue, settings)
    rng = np.random.default_rng(seed)
    known, held, target = _hold_out(_by_user(train_users, train_rows), settings.held_out, rng)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = Sasrec(catalogue, settings)
        _train(model, known, held, target, settings, rng)
    return scorer(model)


def scorer(model: Sasrec) -> Scorer:
    """A network as a scorer; of each history it reads the latest `window` items."""

    def scores(histories: Histories) -> Floats:
        found = np.empty((len(histories), model.start))
        lengths = np.minimum(np.diff(histories.offsets), model.window)
        starts = histories.offsets[1:] - lengths
        model.eval()
        with torch.inference_mode(), _one_thread():
            for begin in range(0, len(histories), CASES):
                part = slice(begin, begin + CASES)
                rows = _padded(histories.values, starts[part], lengths[part], model.start)
                states = model(torch.from_numpy(rows))
                last = states[torch.arange(len(rows)), torch.from_numpy(lengths[part])]
                found[part] = model.logits(last).numpy()
        return found

    return scores


# --- parts --------------------------------------------------------------------------------------


def _check(users: Rows, rows: Rows, catalogue: int, settings: SasrecSettings) -> None:
    if len(users) != len(rows):
        raise LeadreError(f"sasrec: {len(users)} users for {len(rows)} rows of interactions")
    if len(rows) and not 0 <= rows.min() <= rows.max() < catalogue:
        raise LeadreError(
            f"sasrec: interactions have rows from {rows.min()} to {rows.max()},"
            f" but the catalogue has {catalogue} items"
        )
    if settings.dim % settings.heads:
        raise LeadreError(
            f"sasrec.dim {settings.dim} is no multiple of sasrec.heads {settings.heads}: change one"
        )


def _by_user(users: Rows, rows: Rows) -> Histories:
    """One history a user, in the order in which the interactions came."""
    lengths = np.unique(users, return_counts=True)[1]
    return Histories(_offsets(lengths), rows[np.argsort(users, kind="stable")])


def _offsets(lengths: Rows) -> Rows:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _hold_out(
    histories: Histories, most: int, rng: np.random.Generator
) -> tuple[Histories, Histories, Rows]:
    """All histories, some of them without their last item; those alone; and the items that went.

    Of the users with two items or more, `most` are drawn, and no more than half.
    """
    lengths = np.diff(histories.offsets)
    able = np.flatnonzero(lengths > 1)
    chosen = np.zeros(len(lengths), bool)
    chosen[rng.permutation(able)[: min(most, len(able) // 2)]] = True
    last = np.zeros(len(histories.values), bool)
    last[histories.offsets[1:][chosen] - 1] = True
    known = Histories(_offsets(lengths - chosen), histories.values[~last])
    held = Histories(_offsets(lengths[chosen] - 1), known.values[chosen[known.cases]])
    return known, held, histories.values[last]


@dataclass(frozen=True)
class _Windows:
    """Stretches of `values` to learn from: of each its first place, its length, and how many of
    its last items are targets. Every item is a target once, mostly with half a window before it.
    """

    values: Rows
    starts: Rows
    lengths: Rows
    targets: Rows

    @classmethod
    def of(cls, histories: Histories, window: int) -> _Windows:
        longest = window + 1  # the first item has the start token before it
        stride = (longest + 1) // 2
        items = np.diff(histories.offsets)
        counts = 1 + np.maximum(0, -((longest - items) // stride))
        history = np.repeat(np.arange(len(histories)), counts)
        number = np.arange(len(history)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.minimum(longest + number * stride, items[history])
        before = np.where(number > 0, longest + (number - 1) * stride, 0)
        begins = np.maximum(0, ends - longest)
        starts = histories.offsets[:-1][history] + begins
        return cls(histories.values, starts, ends - begins, ends - before)

    def batches(
        self, size: int, catalogue: int, rng: np.random.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order: items that are read [n, steps], behind the start token, and
        what follows each of them, -1 where that is no target.
        """
        most = LOGITS // max(1, self.lengths.max(initial=0) * catalogue)
        size = max(1, min(size, most))
        order = rng.permutation(len(self.starts))
        for begin in range(0, len(order), size):
            chosen = order[begin : begin + size]
            lengths = self.lengths[chosen, None]
            rows = _padded(self.values, self.starts[chosen], self.lengths[chosen], catalogue)
            step = np.arange(rows.shape[1] - 1)
            learned = (step < lengths) & (step >= lengths - self.targets[chosen, None])
            follows = np.where(learned, rows[:, 1:], -1)
            yield torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(follows)


def _padded(values: Rows, starts: Rows, lengths: Rows, start: int) -> Rows:
    """Stretches of `values` in rows, behind the start token; [n, 1 + longest]."""
    step = np.arange(lengths.max(initial=0))
    places = np.where(step < lengths[:, None], starts[:, None] + step, len(values))
    rows = np.append(values, start)[places]
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=start)


def _train(
    model: Sasrec,
    known: Histories,
    held: Histories,
    target: Rows,
    settings: SasrecSettings,
    rng: np.random.Generator,
) -> None:
    """Leaves the model with the weights of its best epoch; without held-out items, of its last."""
    windows = _Windows.of(known, settings.window)
    everything = np.ones(model.start, bool)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
    )
    best, best_epoch, weights = -1.0, 0, model.state_dict()
    for epoch in range(settings.epochs):
        model.train()
        for rows, follows in windows.batches(settings.batch_size, model.start, rng):
            learned = follows >= 0
            loss = F.cross_entropy(model.logits(model(rows)[learned]), follows[learned])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not len(held):
            continue
        found = ranked_by_scores(scorer(model), held, target, everything).metrics()[CHOSEN_BY]
        if found > best:
            best, best_epoch, weights = found, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(weights)


@contextmanager
def _one_thread() -> Iterator[None]:
    """With several threads, sums and so the weights would depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
