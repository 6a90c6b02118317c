"""Ranking metrics and the baselines that they are compared with.

All numbers are catalogue rows: an item is a row of one catalogue, whatever its ids are, and every
method ranks the active rows of that catalogue for the same cases. A baseline gives scores for all
rows, so ties count half; a generator gives a ranked list. A score that is not finite is an error,
since every comparison with NaN is false and the ranking would count it as a hit.

Knows nothing of tables, prompts, models or Semantic IDs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from leadre_lib.errors import LeadreError

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

KS_HR = (1, 3, 5, 10)
KS_NDCG = (3, 5, 10)
WEIGHTED_HR = "eCPM-weighted HR@10"
COVERAGE_K = 10
CHUNK_SCORES = 1 << 23
DECAY = 0.7

Scorer = Callable[["Histories"], Floats]
"""Histories of some cases → finite scores float64 [cases, catalogue], higher is better."""


@dataclass(frozen=True)
class Histories:
    """Ragged catalogue rows: case i has `values[offsets[i]:offsets[i + 1]]`, oldest first."""

    offsets: Rows
    values: Rows

    @classmethod
    def of(cls, lists: Iterable[Sequence[int] | Rows]) -> Histories:
        """From one list a case."""
        arrays = [np.asarray(rows, np.int64) for rows in lists]
        offsets = np.cumsum([0, *(len(rows) for rows in arrays)])
        return cls(offsets.astype(np.int64), np.concatenate([*arrays, np.empty(0, np.int64)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def cases(self) -> Rows:
        """The case of each value [values]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def slice(self, start: int, stop: int) -> Histories:
        """The cases start … stop - 1."""
        offsets = self.offsets[start : stop + 1]
        return Histories(offsets - offsets[0], self.values[offsets[0] : offsets[-1]])

    @property
    def places(self) -> Rows:
        """Of each value in its case, from 0 [values]."""
        return np.arange(len(self.values)) - self.offsets[:-1][self.cases]

    def kept(self, values: Mask) -> Histories:
        """All cases, with those of their values that a mask chooses [values]."""
        lengths = np.bincount(self.cases[values], minlength=len(self))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Histories(offsets, self.values[values])

    def chosen(self, cases: Mask) -> Histories:
        """Those of the cases that a mask chooses [cases]."""
        lengths = np.diff(self.offsets)[cases]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Histories(offsets, self.values[cases[self.cases]])

    def before(self, at: Rows, most: int, ends: Rows | None = None) -> Histories:
        """For each of some values, by place, up to `most` that stand before it in its case.

        Args:
            at: places in `values` [n], any order, also repeated.
            ends: another place of the same case, or the one behind it, that they stand before [n].
        """
        end = at if ends is None else ends
        begin = np.maximum(self.offsets[:-1][self.cases[at]], end - most)
        lengths = end - begin
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Histories(offsets, self.values[np.repeat(begin, lengths) + within])

    def latest(self, most: int) -> Histories:
        """Of each case the `most` newest values."""
        return self.kept(self.places >= np.diff(self.offsets)[self.cases] - most)

    def padded(self) -> Rows:
        """Int64 [cases, longest], the newest last, -1 before a shorter one."""
        longest = int(np.diff(self.offsets).max(initial=0))
        table = np.full((len(self), longest), -1, np.int64)
        back = self.offsets[1:][self.cases] - np.arange(len(self.values))
        table[self.cases, longest - back] = self.values
        return table

    def holds(self, rows: Rows) -> Mask:
        """Whether each of `rows` [cases, any width] is a value of its case."""
        width = int(max(rows.max(initial=0), self.values.max(initial=0))) + 1
        key = np.arange(len(rows))[:, None] * width + rows
        return np.isin(key, self.cases * width + self.values) & (rows >= 0)

    def matrix(self, catalogue: int, decay: float = 1.0) -> sparse.csr_array:
        """Float64 [cases, catalogue]: for each row the sum of decay ** steps before the last."""
        steps = self.offsets[1:][self.cases] - 1 - np.arange(len(self.values))
        entries = (decay**steps, (self.cases, self.values))
        return sparse.csr_array(entries, shape=(len(self), catalogue))


# --- metrics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """How a method did on some cases, of one relevant item each.

    Attributes:
        rank: float64 [cases], the place of the relevant item from 1, k.5 for a tie, inf for a miss.
        coverage: share of the active items that some top 10 holds.
    """

    rank: Floats
    coverage: float

    def metrics(self, ecpm: Floats | None = None) -> dict[str, float]:
        """`HR@k`, `NDCG@k`, `coverage` and, where there is eCPM, `eCPM-weighted HR@10`.

        Args:
            ecpm: [cases], NaN where there is none.

        Raises:
            LeadreError: there are no cases.
        """
        if not len(self.rank):
            raise LeadreError("evaluation: there are no cases to evaluate on")
        gains = gains_of_cases(self.rank, ecpm).items()
        means = {name: float(np.average(gain, weights=weight)) for name, (gain, weight) in gains}
        return {**means, "coverage": self.coverage}


def gains_of_cases(
    rank: Floats, ecpm: Floats | None = None
) -> dict[str, tuple[Floats, Floats | None]]:
    """Metrics before their mean over the cases is taken: the gain of each case, and its weight.

    Args:
        rank: float64 [cases], as in `Ranked`.
        ecpm: [cases], NaN where there is none.

    Returns:
        `HR@k`, `NDCG@k`, whose cases weigh the same (None), and `eCPM-weighted HR@10`, where some
        case has an eCPM above 0: the others weigh nothing.
    """
    hits = {k: (rank <= k).astype(np.float64) for k in KS_HR}
    gain = 1 / np.log2(rank + 1)
    found: dict[str, tuple[Floats, Floats | None]] = {f"HR@{k}": (hits[k], None) for k in KS_HR}
    found |= {f"NDCG@{k}": (np.where(rank <= k, gain, 0.0), None) for k in KS_NDCG}
    weight = np.zeros(len(rank)) if ecpm is None else np.nan_to_num(ecpm)
    if weight.sum() > 0:
        found[WEIGHTED_HR] = (hits[10], weight)
    return found


def ranked_in_lists(
    ranked: Rows, target: Rows, catalogue: int, scores: Floats | None = None
) -> Ranked:
    """How ranked lists did.

    Args:
        ranked: catalogue rows [cases, k], best first, -1 where a list is shorter. A k below the
            largest cut-off means that nothing follows.
        target: the relevant row [cases]; one that is never ranked (such as -1) is a miss.
        catalogue: how many items are active: what coverage is a share of.
        scores: [cases, k], only checked.

    Raises:
        LeadreError: a score is not finite, or a list holds an item twice.
    """
    if scores is not None:
        _require_finite(np.where(ranked >= 0, scores, 0.0))
    ordered = np.sort(ranked, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise LeadreError("evaluation: a ranked list holds an item twice")
    hit = (ranked == target[:, None]) & (ranked >= 0)
    rank = np.where(hit.any(1), hit.argmax(1) + 1.0, np.inf)
    return Ranked(rank, _coverage(ranked, catalogue))


def ranked_by_scores(
    scorer: Scorer,
    histories: Histories,
    target: Rows,
    active: Mask,
    exclude_seen: bool = False,
) -> Ranked:
    """How a method did that scores the whole catalogue; the target's ties count half.

    The target's rank is 1 + how many active items score higher + half of the others that score
    the same. Coverage takes ties in the order of the rows.

    Args:
        scorer: gives the scores, some cases at a time.
        histories, target: the cases; see `ranked_in_lists`.
        active: bool [catalogue]: what may be ranked. A target that may not is a miss.
        exclude_seen: also leave out what is in the case's own history.

    Raises:
        LeadreError: a score is not finite.
    """
    step = max(1, CHUNK_SCORES // max(len(active), 1))
    ranks, tops = [np.empty(0)], [np.empty((0, COVERAGE_K), np.int64)]
    for start in range(0, len(target), step):
        part = histories.slice(start, min(start + step, len(target)))
        scores = _masked_scores(scorer, part, active, exclude_seen)
        ranks.append(_ranks(scores, target[start : start + step]))
        tops.append(_top_k(scores, COVERAGE_K))
    return Ranked(np.concatenate(ranks), _coverage(np.concatenate(tops), int(active.sum())))


def recommend(
    scorer: Scorer, histories: Histories, active: Mask, k: int, exclude_seen: bool = False
) -> Rows:
    """The k best active rows of each case, best first, ties by row; [cases, k], padded with -1."""
    step = max(1, CHUNK_SCORES // max(len(active), 1))
    tops = [
        _top_k(
            _masked_scores(
                scorer,
                histories.slice(start, min(start + step, len(histories))),
                active,
                exclude_seen,
            ),
            k,
        )
        for start in range(0, len(histories), step)
    ]
    return np.concatenate([np.empty((0, k), np.int64), *tops])


def drop_seen(ranked: Rows, histories: Histories) -> Rows:
    """Leave what a case's own history holds out of its ranked list; later items move up.

    The same rule as `exclude_seen` has for scores. Same shape, padded with -1 at the end.
    """
    gone = (ranked < 0) | histories.holds(ranked)
    order = np.argsort(gone, axis=1, kind="stable")
    return np.take_along_axis(np.where(gone, -1, ranked), order, 1)


def first_of_their_kind(objects: Rows) -> Mask:
    """Whether no place to the left in its row [rows, places] has the same object."""
    order = np.argsort(objects, axis=1, kind="stable")
    ordered = np.take_along_axis(objects, order, 1)
    again = np.zeros(objects.shape, np.bool_)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    return ~again


def within_groups(good: Mask, groups: Rows, most: int) -> Mask:
    """The first `most` good places of each group in a row; both [rows, places]."""
    row, place = np.nonzero(good)
    key = row * (int(groups.max(initial=0)) + 1) + groups[row, place]
    order = np.argsort(key, kind="stable")
    rank = np.arange(len(key)) - np.searchsorted(key[order], key[order])
    kept = np.zeros_like(good)
    kept[row[order], place[order]] = rank < most
    return kept


# --- baselines ----------------------------------------------------------------------------------


def popularity(train_rows: Rows, catalogue: int) -> Scorer:
    """How often an item occurs in the training interactions, whoever asks."""
    counts = np.bincount(train_rows, minlength=catalogue).astype(np.float64)
    return lambda histories: np.broadcast_to(counts, (len(histories), catalogue))


def item_knn(train_users: Rows, train_rows: Rows, catalogue: int) -> Scorer:
    """Item-kNN (Sarwar et al. 2001): cosine of two items' users, summed over the whole history.

    An item is no neighbour of itself. Popularity orders the items that score the same, most of
    which share no user with the history.

    Args:
        train_users: user number of each training interaction.
        train_rows: catalogue row of each training interaction.
    """
    shape = (int(train_users.max(initial=-1)) + 1, catalogue)
    seen = sparse.csr_array((np.ones(len(train_rows)), (train_users, train_rows)), shape=shape)
    seen.sum_duplicates()
    seen.data[:] = 1.0
    length = np.sqrt(np.asarray(seen.sum(axis=0)).ravel())
    unit = seen @ sparse.diags_array(np.divide(1.0, length, where=length > 0, out=length.copy()))
    similarity = sparse.csr_array(unit.T @ unit)
    similarity.setdiag(0.0)
    similarity.eliminate_zeros()
    counts = np.bincount(train_rows, minlength=catalogue)
    # Far below any step between two sums of cosines, so that it only orders what ties.
    tie_break = 1e-6 * counts / max(counts.max(initial=0), 1)
    return lambda histories: (histories.matrix(catalogue) @ similarity).toarray() + tie_break


def nearest_titles(embeddings: npt.NDArray[np.float32], decay: float = DECAY) -> Scorer:
    """Inner product with the history's embeddings, each step back weighing `decay` as much.

    Args:
        embeddings: float32 [catalogue, dim], rows of length 1.
    """

    def scores(histories: Histories) -> Floats:
        query = histories.matrix(len(embeddings), decay) @ embeddings.astype(np.float64)
        # Equal texts have equal scores; without rounding their last bits would break the tie.
        return (query @ embeddings.T.astype(np.float64)).round(9)

    return scores


# --- parts --------------------------------------------------------------------------------------


def _masked_scores(
    scorer: Scorer, histories: Histories, active: Mask, exclude_seen: bool
) -> Floats:
    """Finite scores [cases, catalogue], with -inf for what may not be ranked."""
    scores = np.array(scorer(histories), np.float64)
    _require_finite(scores)
    scores[:, ~active] = -np.inf
    if exclude_seen:
        scores[histories.cases, histories.values] = -np.inf
    return scores


def _require_finite(scores: Floats) -> None:
    bad = np.count_nonzero(~np.isfinite(scores))
    if bad:
        raise LeadreError(
            f"evaluation: {bad} of {scores.size} scores are not finite (NaN or infinite);"
            " the method that gave them is broken, so nothing is reported"
        )


def _ranks(scores: Floats, target: Rows) -> Floats:
    own = np.where(target >= 0, scores[np.arange(len(target)), target], -np.inf)
    higher = (scores > own[:, None]).sum(1)
    ties = (scores == own[:, None]).sum(1) - 1
    return np.where(np.isfinite(own), 1 + higher + ties / 2, np.inf)


def _top_k(scores: Floats, k: int) -> Rows:
    """Rows of the k best finite scores, ties by row, padded with -1."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)
    best[~np.isfinite(np.take_along_axis(scores, best, 1))] = -1
    return np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-1)


def _coverage(ranked: Rows, catalogue: int) -> float:
    top = np.unique(ranked[:, :COVERAGE_K])
    return float((top >= 0).sum() / catalogue) if catalogue else 0.0
