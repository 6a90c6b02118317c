"""Which marketing objects lead to which: by what they say, by what people take after one another,
and by how many take them.

Each object is related to some others with a weight. What a history leads to is the sum of what its
objects are related to, each step back counting `decay` as much:

    score(b | history) = sum over steps s of decay^s * weight(history[-1 - s] -> b) + prior(b)
    weight(a -> b)     = text * cosine(a, b) + taken * sqrt(after(a, b))    where a is not b
    weight(a -> a)     = again for the latest step, 0 for others
    prior(b)           = popularity * log(1 + users of b)

where `after(a, b)` is the share of those who took `a` that took `b` within some steps, nearer steps
counting more, and before it half as much. The four factors are a conditional logit (McFadden 1974)
of what people took next, fitted on users whom `after` does not count: they say by themselves what
matters in a data set. Item-to-item retrieval of this kind is Linden et al. 2003; the combination is
this project's own.

A user's own history must not tell what it leads to, or a model would learn to believe it too much.
So users are parted into folds, and each fold has its relations, counted without its users.

Knows nothing of tables, of prompts, or of where vectors come from.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from leadre_lib.evaluation import Histories
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import RelationSettings

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

EVERYBODY = -1  # the fold that leaves nobody out
BACKWARDS = 0.5
UNSURE = 3.0  # takers that an object has beside those seen: few say little
NEAR = 100  # text neighbours among which the related ones are looked for
NEGATIVES = 500  # of a fitted case, drawn evenly
CHUNK = 1 << 16


@dataclass(frozen=True)
class Factors:
    """How much each ground counts; see above."""

    text: float
    taken: float
    again: float
    popularity: float


@dataclass(frozen=True)
class Relations:
    """Pairs `source` → `target` of object rows, sorted by source and falling strength, float64
    weights and priors, all [pairs].
    """

    source: Rows
    target: Rows
    weight: Floats
    prior: Floats


class Ways:
    """What people took after what: the counts behind `after`, for everybody and for each fold.

    Args:
        histories: what each user took, oldest first, as object rows.
        fold: of each user, int [users], from 0.
        objects: how many there are.
        settings: `decay` and `steps`.
    """

    def __init__(
        self, histories: Histories, fold: Rows, objects: int, settings: RelationSettings
    ) -> None:
        self.objects = objects
        users = histories.cases
        parts = []
        for gap in range(1, settings.steps + 1):
            near = users[gap:] == users[:-gap]
            before, after = histories.values[:-gap][near], histories.values[gap:][near]
            weight = np.full(len(before), settings.decay ** (gap - 1))
            parts.append((before, after, weight, fold[users[gap:][near]]))
            parts.append((after, before, BACKWARDS * weight, fold[users[gap:][near]]))
        source, target, weight, owner = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        kept = source != target
        self._pairs = source[kept], target[kept], weight[kept], owner[kept]
        # A user who takes an object twice is one who took it.
        once = np.unique(users * objects + histories.values)
        self._takers = once % objects, fold[once // objects]

    def takers(self, fold: int) -> Floats:
        """Users of each object, without those of a fold [objects]."""
        rows, owner = self._takers
        return np.bincount(rows[owner != fold], minlength=self.objects).astype(np.float64)

    def after(self, fold: int) -> sparse.csr_array:
        """sqrt(after(a, b)) without the users of a fold, float64 [objects, objects]."""
        source, target, weight, owner = self._pairs
        kept = owner != fold
        shape = (self.objects, self.objects)
        counts = sparse.csr_array((weight[kept], (source[kept], target[kept])), shape=shape)
        counts.sum_duplicates()
        shares = sparse.diags_array(1 / (self.takers(fold) + UNSURE)) @ counts
        return sparse.csr_array(shares).sqrt()


def fit(
    ways: Ways,
    histories: Histories,
    fold: Rows,
    vectors: Vectors,
    settings: RelationSettings,
    seed: int,
) -> Factors:
    """The factors that make what people took next most likely.

    Each case is one of a sample of steps in the histories; what leads to it is counted without its
    user's fold. It competes with what its history is near to and with objects drawn evenly, which
    stand for all (sampled softmax with the correction of Bengio & Senécal 2008).

    Args:
        ways: of the same histories and folds.
        vectors: float32 [objects, dim], rows of length 1.
        seed: of the draws.

    Returns:
        Zeros but for 1 in `text`, where nobody took two objects: nothing can be learnt.
    """
    rng = np.random.default_rng(seed)
    first = np.zeros(len(histories.values), bool)
    first[histories.offsets[:-1][np.diff(histories.offsets) > 0]] = True
    steps = np.flatnonzero(~first)
    if not len(steps):
        return Factors(1.0, 0.0, 0.0, 0.0)
    chosen = np.sort(rng.choice(steps, min(len(steps), settings.fitted_steps), replace=False))
    parts = []
    for number in np.unique(fold):
        at = chosen[fold[histories.cases[chosen]] == number]
        if len(at):
            parts.append(_cases(ways, histories, at, int(number), vectors, settings, rng))
    features = np.concatenate([part[0] for part in parts])
    own = np.concatenate([part[1] for part in parts])
    return Factors(*_conditional_logit(features, own))


def _cases(
    ways: Ways,
    histories: Histories,
    at: Rows,
    fold: int,
    vectors: Vectors,
    settings: RelationSettings,
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """Features [cases, competitors, 4] and offsets [cases, competitors]; competitor 0 is what was
    taken. An offset of minus infinity marks one that stands there already.
    """
    begin = np.maximum(histories.offsets[:-1][histories.cases[at]], at - settings.steps)
    lengths = at - begin
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    past = Histories(offsets, histories.values[np.repeat(begin, lengths) + within])
    history = past.matrix(ways.objects, settings.decay)
    after = ways.after(fold)
    latest = histories.values[at - 1]
    drawn = rng.integers(0, ways.objects, (len(at), NEGATIVES))
    near = _strongest(after, latest, NEAR)
    rivals = np.concatenate([histories.values[at][:, None], near, drawn], axis=1)
    query = history @ vectors.astype(np.float64)
    case = np.repeat(np.arange(len(at)), rivals.shape[1])
    flat = rivals.ravel()
    text = np.empty(len(flat))
    for part in (slice(n, n + CHUNK) for n in range(0, len(flat), CHUNK)):
        text[part] = np.einsum("nd,nd->n", query[case[part]], vectors[flat[part]])
    taken = np.asarray(sparse.csr_array(history @ after)[case, flat]).ravel()
    itself = np.asarray(history[case, flat]).ravel()
    popular = np.log1p(ways.takers(fold))[flat]
    features = np.stack([text - itself, taken, flat == latest[case], popular], -1)
    # Who stands for all others weighs as many as he stands for.
    offset = np.zeros(rivals.shape)
    offset[:, 1 + near.shape[1] :] = np.log(max(ways.objects / NEGATIVES, 1.0))
    order = np.argsort(rivals, axis=1, kind="stable")
    ordered = np.take_along_axis(rivals, order, 1)
    double = np.zeros_like(rivals, bool)
    np.put_along_axis(double, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    offset[double | (rivals < 0)] = -np.inf
    return features.reshape(*rivals.shape, 4), offset


def _strongest(matrix: sparse.csr_array, rows: Rows, most: int) -> Rows:
    """The columns of the largest entries of some rows [rows, most], -1 where there are fewer."""
    taken = sparse.csr_array(matrix[rows])
    row = np.repeat(np.arange(len(rows)), np.diff(taken.indptr))
    order = np.lexsort([taken.indices, -taken.data, row])
    place = np.arange(len(order)) - taken.indptr[:-1][row[order]]
    kept = place < most
    found = np.full((len(rows), most), -1, np.int64)
    found[row[order][kept], place[kept]] = taken.indices[order][kept]
    return found


def _conditional_logit(features: Floats, offset: Floats) -> Floats:
    """Factors [4] of the largest likelihood that competitor 0 is taken; only `again` may be
    negative. A little ridge keeps what hardly matters near 0.
    """
    scale = np.maximum(features.std(axis=(0, 1)), 1e-9)
    scaled = features / scale

    def loss(factors: Floats) -> tuple[float, Floats]:
        score = scaled @ factors + offset
        score -= score.max(axis=1, keepdims=True)
        share = np.exp(score)
        share /= share.sum(axis=1, keepdims=True)
        gradient = np.einsum("nk,nkf->f", share, scaled) - scaled[:, 0].sum(0)
        value = -np.log(share[:, 0]).sum()
        cases = len(scaled)
        return value / cases + 1e-3 * factors @ factors, gradient / cases + 2e-3 * factors

    bounds = [(0, None), (0, None), (None, None), (0, None)]
    found = optimize.minimize(loss, np.zeros(4), jac=True, bounds=bounds, method="L-BFGS-B")
    return found.x / scale


def relations(
    ways: Ways,
    fold: int,
    factors: Factors,
    vectors: Vectors,
    active: Mask,
    settings: RelationSettings,
) -> Relations:
    """The strongest relations of each object, to active ones.

    Args:
        fold: whose users are left out; `EVERYBODY` leaves out nobody.
        active: bool [objects].
        settings: `per_object`.
    """
    text, taken, again, popularity = astuple(factors)
    after = ways.after(fold)
    source = np.repeat(np.arange(ways.objects), np.diff(after.indptr))
    rows = np.flatnonzero(active)
    near = rows[_text_neighbours(vectors, rows)] if text > 0 else np.empty((ways.objects, 0), int)
    own = np.arange(ways.objects)
    pairs = np.concatenate(
        [
            source * ways.objects + after.indices,
            (own[:, None] * ways.objects + near).ravel(),
            own * ways.objects + own,
        ]
    )
    pairs = np.unique(pairs)
    source, target = pairs // ways.objects, pairs % ways.objects
    source, target = source[active[target]], target[active[target]]
    cosine = np.empty(len(source))
    for part in (slice(n, n + CHUNK) for n in range(0, len(source), CHUNK)):
        cosine[part] = np.einsum("nd,nd->n", vectors[source[part]], vectors[target[part]])
    same = source == target
    weight = text * np.where(same, 0.0, cosine) + again * same
    weight += taken * np.asarray(after[source, target]).ravel()
    prior = popularity * np.log1p(ways.takers(fold))[target]
    weight, prior = weight.round(6), prior.round(6)
    order = np.lexsort([target, -weight, source])
    place = np.arange(len(order)) - np.searchsorted(source[order], source[order])
    kept = order[place < settings.per_object]
    return Relations(source[kept], target[kept], weight[kept], prior[kept])


def _text_neighbours(vectors: Vectors, rows: Rows) -> Rows:
    """For each object the places in `rows` of its nearest texts [objects, at most NEAR]."""
    _, found = EmbeddingIndex.build(vectors[rows]).search(vectors, min(NEAR, len(rows)))
    return found
