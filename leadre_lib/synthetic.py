"""Synthetic histories: what users might have taken, so that a small model hears often of what is
known of a catalogue's objects, also of those that nobody has taken yet.

A history begins with one object, or with what a user really took, and goes on object by object.
Each is drawn by the probabilities that `fusion` gives, without a model, to what competes: what is
near in meaning or words, what people take after one another, what is popular. So a model that is
trained on them is taught by these signals (distillation, Hinton et al. 2015, by drawn labels).

Data augmentation of this project's own; the paper aligns meaning by its semantic tasks alone.
Knows nothing of users' ids, of prompts, or of where the embeddings come from.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from leadre_lib.evaluation import Histories
from leadre_lib.fusion import Factors, Fusion, Written
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import ExampleSettings, FusionSettings
from leadre_lib.signals import build_signals

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

AMONG = 20  # objects that a step is drawn from
FITTED_STEPS = 2000
BY_MEANING = Factors(meaning=4.0, seen=-8.0)  # on to what is alike, not to the same again


def synthetic_histories(
    texts: list[str],
    meaning: EmbeddingIndex,
    active: Mask,
    taken: Histories,
    examples: ExampleSettings,
    fusion: FusionSettings,
    seed: int,
    repeat: bool = True,
) -> Histories:
    """Made-up histories of object rows, the last one of each being what comes next.

    Half of them begin with an object, each active one as often as any other; half begin with some
    steps of a user and go on by one. Without users all begin with an object.

    Args:
        texts: of each object [objects].
        meaning: index of their embeddings, in the same order.
        active: bool [objects], what may occur.
        taken: of each user the object rows that they took, oldest first.
        examples: `synthetic_per_ad` histories an active object, down to `max_synthetic_examples`,
            of at most `synthetic_steps` steps, each drawn from among `synthetic_neighbours` of each
            signal.
        fusion: how signals are counted.
        seed: of the random choices.
        repeat: whether a user may take an object again.

    Returns:
        Histories of two objects or more.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(active)
    count = min(len(rows) * examples.synthetic_per_ad, examples.max_synthetic_examples)
    if not count or len(rows) < 2:
        return Histories.of([])
    narrow = fusion.model_copy(update={"near": examples.synthetic_neighbours})
    factors = learn_factors(texts, meaning, active, taken, narrow, rng, repeat)
    teacher = Fusion(build_signals(texts, meaning, taken, narrow), active, narrow)
    real = prefixes(taken, active, count // 2, examples.synthetic_steps, rng)
    starts = np.resize(rng.permutation(rows), count - len(real))
    single = Histories(np.arange(len(starts) + 1), starts)
    walked = go_on(teacher, factors, single, examples, rng, repeat)
    labelled = go_on(teacher, factors, real, examples, rng, repeat, steps=1)
    log.info("%d histories from an object, %d from a user's", len(walked), len(labelled))
    return Histories(
        np.concatenate([walked.offsets, walked.offsets[-1] + labelled.offsets[1:]]),
        np.concatenate([walked.values, labelled.values]),
    )


def learn_factors(
    texts: list[str],
    meaning: EmbeddingIndex,
    active: Mask,
    taken: Histories,
    settings: FusionSettings,
    rng: np.random.Generator,
    repeat: bool = True,
) -> Factors:
    """What each signal is worth, by what users took next.

    Signals are counted on one half of the users and judged by the other half: who was counted
    himself would make `taken` look surer than it is. Where nothing can be learnt, meaning decides.
    """
    half = rng.random(len(taken)) < 0.5
    counted = Fusion(build_signals(texts, meaning, taken.chosen(half), settings), active, settings)
    judged = taken.chosen(~half)
    steps = np.flatnonzero(~judged.firsts())
    at = np.sort(rng.permutation(steps)[:FITTED_STEPS])
    before = judged.before(at, settings.steps)
    unwanted = None if repeat else before
    found = counted.fit(_nothing(len(at)), before, judged.values[at], unwanted)
    return found or BY_MEANING


def prefixes(
    taken: Histories, active: Mask, count: int, longest: int, rng: np.random.Generator
) -> Histories:
    """So many beginnings of histories, each the latest steps up to a random one, active alone."""
    kept = active[taken.values]
    counts = np.bincount(taken.cases[kept], minlength=len(taken))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    known = Histories(offsets, taken.values[kept])
    if not len(known.values):
        return Histories.of([])
    at = rng.integers(0, len(known.values), count)
    return known.before(at, longest, including=True)


def go_on(
    teacher: Fusion,
    factors: Factors,
    begun: Histories,
    examples: ExampleSettings,
    rng: np.random.Generator,
    repeat: bool = True,
    steps: int = 0,
) -> Histories:
    """Histories that go on by `steps` drawn objects each; 0: by a random number of them, up to
    `synthetic_steps`. One for which nothing competes ends there, and those of one object are left
    out.
    """
    wanted = (
        np.full(len(begun), steps)
        if steps
        else rng.integers(1, examples.synthetic_steps + 1, len(begun))
    )
    length = np.diff(begun.offsets)
    width = int(length.max(initial=0) + wanted.max(initial=0))
    path = np.full((len(begun), width), -1, np.int64)
    path[begun.cases, np.arange(len(begun.values)) - begun.offsets[:-1][begun.cases]] = begun.values
    for step in range(int(wanted.max(initial=0))):
        going = np.flatnonzero((wanted > step) & (length > 0))
        so_far = _histories(path[going], length[going])
        objects, log_p = teacher.rank(
            factors, _nothing(len(going)), so_far, AMONG, None if repeat else so_far
        )
        share = np.exp(log_p)
        total = share.sum(axis=1)
        draw = rng.random(len(going)) * total
        place = np.minimum((share.cumsum(axis=1) <= draw[:, None]).sum(axis=1), AMONG - 1)
        found = objects[np.arange(len(going)), place]
        some = (total > 0) & (found >= 0)
        path[going[some], length[going[some]]] = found[some]
        length[going[some]] += 1
        wanted[going[~some]] = 0
    whole = length > 1
    return _histories(path[whole], length[whole])


def _histories(path: Rows, length: Rows) -> Histories:
    """The first `length` of each row of `path` [cases, width]."""
    kept = np.arange(path.shape[1]) < length[:, None]
    return Histories(np.concatenate([[0], np.cumsum(length)]).astype(np.int64), path[kept])


def _nothing(cases: int) -> Written:
    """What a model wrote that was not asked."""
    return Written(np.empty((cases, 0), np.int64), np.empty((cases, 0)))
