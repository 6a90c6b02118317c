"""The whole retrieval: what a model wrote, fused with what else is known of marketing objects.

Of each case some objects compete: those that the model wrote, those near to its history in meaning,
those that people took after what it holds, those in it, and popular ones. Each has a score,

    score(b) = model * (log p(b) - log p(worst))  + written       where the model wrote b
             + meaning * cosines + words * cosines + taken * roots of shares
             + popularity * log(1 + takers(b)) + latest and seen  where the history holds b

in which what is said of objects of the history is summed, each step back counting `decay` as much
(see `signals`). The factors are a conditional logit (McFadden 1974) of what was taken: they say by
themselves how much a model or a text is worth in a data set. Those of signals are learnt from what
users wanted last (`learn_signals`), of whom there are many. A model has seen what users took, so
validation cases say what it is worth; they move the factors of signals, too, the further the more
cases there are. The paper's retrieval is the model alone; fusing it with such channels is this
project's own.

Knows nothing of prompts, of tables, or of how a model writes.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, astuple, dataclass, fields

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse
from threadpoolctl import threadpool_limits

from leadre_lib.evaluation import Histories, first_of_their_kind, within_groups
from leadre_lib.settings import FusionSettings
from leadre_lib.signals import Signals, Taken

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MIN_CASES = 30  # with fewer, eight factors would be guesses
RIDGE = 1e-3  # of the factors in standard deviations: keeps what hardly matters near 0
PRIOR = 30.0  # as RIDGE, but of the sum over cases: what they must outweigh to move learnt factors
OF_MODEL = ("model", "written")  # the first factors; all others are of signals
CHUNK_CASES = 256
POPULAR = 50
DRAWN = 200
LEARNT_CASES = 3000


@dataclass(frozen=True)
class Factors:
    """How much each signal counts; see above."""

    model: float = 0.0
    written: float = 0.0
    meaning: float = 0.0
    words: float = 0.0
    taken: float = 0.0
    popularity: float = 0.0
    latest: float = 0.0
    seen: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """By name, rounded, as a manifest holds them."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Written:
    """What a model wrote: `objects` int64 and `scores` (natural logarithms), both [cases, beam],
    best first; -1 and minus infinity where there are fewer.
    """

    objects: Rows
    scores: Floats


class Fusion:
    """Ranks the active objects of a catalogue.

    Args:
        signals: of its objects.
        active: bool [objects], what may be ranked.
        settings: `decay`, `steps` and `near`.
        groups: int64 [objects], of which a case gets at most `most` objects; None: any number.
    """

    def __init__(
        self,
        signals: Signals,
        active: Mask,
        settings: FusionSettings,
        groups: Rows | None = None,
        most: int = 0,
    ) -> None:
        self._signals, self._active, self._settings = signals, active, settings
        self._groups, self._most = groups, most
        order = np.argsort(-signals.takers, kind="stable")
        self._popular = order[active[order]][:POPULAR]
        self._vector = np.full(signals.objects, -1)
        known = np.flatnonzero(signals.vector_object >= 0)
        self._vector[signals.vector_object[known]] = known

    def fit(
        self,
        written: Written,
        histories: Histories,
        target: Rows,
        unwanted: Histories | None = None,
        learnt: Factors | None = None,
    ) -> Factors | None:
        """The factors that make what was taken most likely among all active objects.

        Those that do not compete are drawn evenly, and stand for all of them (sampled softmax with
        the correction of Bengio and Senecal 2008): to leave them out would hide what made the
        others compete.

        Args:
            written: by the model, for each case.
            histories: object rows of each case, oldest first.
            target: the object that was taken [cases]; a case of -1 says nothing.
            unwanted: what each case must not get.
            learnt: factors of signals that are likely before the cases are seen, up to one factor
                that all of them share; None: nothing is.

        Returns:
            None where there are fewer than `MIN_CASES` cases.
        """
        rng = np.random.default_rng(0)
        rows = np.flatnonzero(self._active)
        parts = []
        for chosen in _chunks(len(target)):
            own = target[chosen, None]
            drawn = rows[rng.integers(0, len(rows), (len(own), DRAWN))]
            extra = np.concatenate([own, drawn], axis=1)
            objects, features = self._compete(written, histories, chosen, unwanted, extra)
            offset = np.where(objects >= 0, 0.0, -np.inf)
            some = objects[:, -DRAWN:] >= 0
            rest = len(rows) - (objects[:, :-DRAWN] >= 0).sum(axis=1)
            stands = np.maximum(rest / np.maximum(some.sum(axis=1), 1), 1.0)
            offset[:, -DRAWN:] += np.log(stands)[:, None]
            taken = (objects == own) & (own >= 0)
            found = taken.any(axis=1)
            parts.append((features[found], offset[found], taken[found].argmax(axis=1)))
        cases = sum(len(taken) for _, _, taken in parts)
        if cases < MIN_CASES:
            log.warning("%d of %d cases are too few to fit the fusion on", cases, len(target))
            return None
        width = max(part.shape[1] for part, _, _ in parts)
        features = np.concatenate([_padded(part, width, 0.0) for part, _, _ in parts])
        offset = np.concatenate([_padded(part, width, -np.inf) for _, part, _ in parts])
        own = np.concatenate([own for _, _, own in parts])
        del parts  # some 40 kB a case
        likely = None
        if learnt is not None:
            free = np.eye(len(fields(Factors)))[: len(OF_MODEL)]
            ways = np.stack([*free, np.array(astuple(learnt))])
            likely = _conditional_logit(features @ ways.T, offset, own) @ ways
        return Factors(*map(float, _conditional_logit(features, offset, own, likely)))

    def rank(
        self,
        factors: Factors,
        written: Written,
        histories: Histories,
        k: int,
        unwanted: Histories | None = None,
    ) -> tuple[Rows, Floats]:
        """The k best objects of each case, best first, ties by row.

        Returns:
            objects int64 [cases, k], -1 where fewer compete, and scores float64 [cases, k]: each
            one's log-probability among all that compete, minus infinity for none.
        """
        found = np.full((len(histories), k), -1, np.int64)
        scores = np.full((len(histories), k), -np.inf)
        weights = np.array(astuple(factors))
        for chosen in _chunks(len(histories)):
            objects, features = self._compete(written, histories, chosen, unwanted)
            score = np.where(objects >= 0, features @ weights, -np.inf).round(9)
            total = np.logaddexp.reduce(score, axis=1, keepdims=True, initial=-np.inf)
            order = np.lexsort((objects, -score))
            ordered = np.take_along_axis(objects, order, 1)
            good = ordered >= 0
            if self._groups is not None:
                good = within_groups(good, self._groups[ordered], self._most)
            front = np.argsort(~good, axis=1, kind="stable")[:, :k]
            kept, best = np.take_along_axis(good, front, 1), np.take_along_axis(order, front, 1)
            width = slice(best.shape[1])
            found[chosen, width] = np.where(kept, np.take_along_axis(objects, best, 1), -1)
            told = np.take_along_axis(score, best, 1) - np.where(np.isfinite(total), total, 0.0)
            scores[chosen, width] = np.where(kept, told, -np.inf)
        return found, scores

    def _compete(
        self,
        written: Written,
        histories: Histories,
        chosen: slice,
        unwanted: Histories | None,
        extra: Rows | None = None,
    ) -> tuple[Rows, Floats]:
        """What competes in some cases, `extra` last, objects [cases, width], -1 for none, and its
        features [cases, width, factors].
        """
        settings, signals = self._settings, self._signals
        past = histories.slice(chosen.start, chosen.stop).latest(settings.steps)
        beam = written.objects[chosen]
        history = past.matrix(signals.objects, settings.decay)
        taken = sparse.csr_array(history @ signals.after)
        query = self._query(history)
        nearest = self._nearest(query)
        popular = np.broadcast_to(self._popular, (len(past), len(self._popular)))
        strongest = strongest_columns(taken, settings.near)
        parts = [beam, past.padded(), nearest, strongest, popular]
        objects = np.concatenate(parts if extra is None else [*parts, extra], axis=1)
        gone = (objects < 0) | ~self._active[objects] | ~first_of_their_kind(objects)
        if unwanted is not None:
            gone |= unwanted.slice(chosen.start, chosen.stop).holds(objects)
        objects = np.where(gone, -1, objects)
        case = np.broadcast_to(np.arange(len(past))[:, None], objects.shape)
        latest = past.padded()[:, -1:] if len(past.values) else np.full((len(past), 1), -1)
        held = past.holds(objects)
        features = [
            *_written_features(written.scores[chosen], beam, objects.shape[1]),
            self._cosines(query, objects),
            _inner(history @ signals.words, signals.words, objects),
            look_up(taken, case, objects),
            np.log1p(signals.takers)[objects],
            (objects == latest) & held,
            held,
        ]
        return objects, np.stack([np.asarray(f, np.float64) for f in features], axis=-1)

    def _query(self, history: sparse.csr_array) -> Floats:
        """The embeddings of histories, summed [cases, dimensions]."""
        known = np.unique(history.indices)
        known = known[self._vector[known] >= 0]
        if not len(known):
            return np.zeros((history.shape[0], self._signals.meaning.dim))
        return history[:, known] @ self._signals.meaning.vectors(self._vector[known])

    def _nearest(self, query: Floats) -> Rows:
        near = min(self._settings.near, self._signals.meaning.rows)
        _, found = self._signals.meaning.search(query.astype(np.float32), near)
        found[~query.any(axis=1)] = -1  # to nothing everything is as near
        return np.where(found >= 0, self._signals.vector_object[found], -1)

    def _cosines(self, query: Floats, objects: Rows) -> Floats:
        known = (objects >= 0) & (self._vector[objects] >= 0)
        rows, place = np.unique(self._vector[objects[known]], return_inverse=True)
        at = np.full(objects.shape, -1)
        at[known] = place
        if not len(rows):
            return np.zeros(objects.shape)
        return _inner(query, self._signals.meaning.vectors(rows), at)


def learn_signals(
    signals: Signals,
    active: Mask,
    taken: Taken,
    wanted: tuple[Rows, Rows],
    settings: FusionSettings,
    seed: int,
    repeat: bool = True,
) -> Factors | None:
    """What each signal is worth, by what users wanted last.

    Of each user it is to be foretold from what came before it, and of what the user took that alone
    is counted: as a day's cases follow what is counted, which holds their own users' past. What
    others took later is counted, too.

    Args:
        signals: of the catalogue; whatever they were counted on.
        active: bool [objects], what may be ranked.
        taken: by users.
        wanted: places in the values of its histories, int64 [cases] both: what is to be foretold,
            at most one a user, and before which place the history ends that foretells it, which may
            hold the same object, too.
        seed: of the choice of cases, where there are many.
        repeat: whether a user may take an object again.

    Returns:
        Factors, 0 of the model; None where there are fewer than `MIN_CASES` cases.
    """
    at, ends = wanted
    if len(at) < MIN_CASES:
        return None
    histories = taken.histories
    until = histories.offsets[1:].copy()
    until[histories.cases[at]] = ends
    earlier = taken.kept(np.arange(len(histories.values)) < until[histories.cases])
    counted = signals.recounted(earlier, settings)
    some = np.sort(np.random.default_rng(seed).permutation(len(at))[:LEARNT_CASES])
    before = histories.before(at[some], settings.steps, ends[some])
    unwanted = None if repeat else before
    own = histories.values[at[some]]
    return Fusion(counted, active, settings).fit(nothing_written(len(own)), before, own, unwanted)


def nothing_written(cases: int) -> Written:
    """What a model wrote that was not asked."""
    return Written(np.empty((cases, 0), np.int64), np.empty((cases, 0)))


def _written_features(scores: Floats, beam: Rows, width: int) -> tuple[Floats, Floats]:
    """Log-probability above that of the worst that was written, and whether it was; the beam comes
    first in a case's objects.
    """
    there = beam >= 0
    worst = np.where(there, scores, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    above = np.where(there, scores - np.where(np.isfinite(worst), worst, 0.0), 0.0)
    pad = ((0, 0), (0, width - beam.shape[1]))
    return np.pad(above, pad), np.pad(there.astype(np.float64), pad)


def _inner(queries: Floats, vectors: npt.NDArray[np.float32], rows: Rows) -> Floats:
    """Inner products of each query with its rows of `vectors`, [cases, width]; 0 for row -1."""
    found = np.matmul(vectors[rows], np.asarray(queries, np.float32)[:, :, None])[:, :, 0]
    # Equal vectors have equal products; without rounding their last bits would break the tie.
    return np.where(rows >= 0, found, 0.0).astype(np.float64).round(5)


def look_up(matrix: sparse.csr_array, rows: Rows, columns: Rows) -> Floats:
    """The entries at some places, of the shape of `rows`; 0 where there is none or column is -1."""
    matrix.sum_duplicates()
    width = matrix.shape[1]
    entries = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)) * width
    keys = entries + matrix.indices
    wanted = rows * width + columns
    at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    if not len(keys):
        return np.zeros(rows.shape)
    return np.where((keys[at] == wanted) & (columns >= 0), matrix.data[at], 0.0)


def strongest_columns(matrix: sparse.csr_array, most: int) -> Rows:
    """The columns of each row's largest entries [rows, at most `most`], padded with -1."""
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort([matrix.indices, -matrix.data, row])
    place = np.arange(len(order)) - matrix.indptr[:-1][row[order]]
    kept = place < most
    width = int(place[kept].max(initial=-1)) + 1
    found = np.full((matrix.shape[0], width), -1, np.int64)
    found[row[order][kept], place[kept]] = matrix.indices[order][kept]
    return found


def _chunks(count: int) -> list[slice]:
    starts = range(0, count, CHUNK_CASES)
    return [slice(start, min(start + CHUNK_CASES, count)) for start in starts]


def _padded(part: Floats, width: int, value: float) -> Floats:
    pad = [(0, 0), (0, width - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
    return np.pad(part, pad, constant_values=value)


def _conditional_logit(
    features: Floats, offset: Floats, own: Rows, likely: Floats | None = None
) -> Floats:
    """Factors of the largest likelihood that `own` of each case is taken.

    Args:
        features: [cases, width, factors]; scaled in place.
        offset: [cases, width], of the scores; minus infinity for what is not there.
        own: place of what was taken [cases].
        likely: factors to stay near to where the cases do not say otherwise (a normal prior on
            those of signals, hardly any on those of a model); None: near to 0, and hardly.
    """
    scale = features[np.isfinite(offset)].std(axis=0)
    scale[scale < 1e-6] = np.inf  # what is the same for all says nothing: its factor is 0
    features /= scale
    scaled, cases = features, len(own)
    taken = scaled[np.arange(cases), own].sum(axis=0)
    start, ridge = np.zeros(len(scale)), np.full(len(scale), RIDGE)
    if likely is not None:
        start = likely * np.where(np.isfinite(scale), scale, 0.0)
        ridge[len(OF_MODEL) :] += PRIOR / cases

    def loss(factors: Floats) -> tuple[float, Floats]:
        score = scaled @ factors + offset
        score -= score.max(axis=1, keepdims=True)
        share = np.exp(score)
        share /= share.sum(axis=1, keepdims=True)
        gradient = np.tensordot(share, scaled, 2) - taken
        value = -np.log(share[np.arange(cases), own]).sum()
        pull = ridge * (factors - start)
        return value / cases + pull @ (factors - start), gradient / cases + 2 * pull

    with threadpool_limits(1):  # how sums are rounded depends on the threads
        return optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x / scale
