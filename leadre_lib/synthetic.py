"""Synthetic histories: what users might have taken, so that a small model hears often of what is
known of a catalogue's objects, also of those that nobody has taken yet.

A history begins with one object and goes on object by object, or is what a user really took; some
objects come next. Each is drawn by the probabilities that `fusion` gives, without a model, to what
competes: what is near in meaning or words, what people take after one another, what is popular. So
a model that is trained on them is taught by these signals (distillation, Hinton et al. 2015, by
drawn labels).

Data augmentation of this project's own; the paper aligns meaning by its semantic tasks alone.
Knows nothing of users' ids, of prompts, or of where the embeddings come from.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leadre_lib.evaluation import Histories
from leadre_lib.fusion import Factors, Fusion, learn_signals, nothing_written
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import ExampleSettings, FusionSettings
from leadre_lib.signals import Taken, build_signals

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

AMONG = 20  # objects that a step is drawn from
BY_MEANING = Factors(meaning=4.0, seen=-8.0)  # on to what is alike, not to the same again


@dataclass(frozen=True)
class Synthetic:
    """Made-up histories of object rows, and what might come next.

    Attributes:
        histories: one object or more each, oldest first.
        nexts: of each history the objects that were drawn to come next, each once.
        draws: int64, how often each of `nexts` was drawn.
    """

    histories: Histories
    nexts: Histories
    draws: Rows


def synthetic_histories(
    texts: list[str],
    meaning: EmbeddingIndex,
    active: Mask,
    taken: Taken,
    wanted: tuple[Rows, Rows],
    examples: ExampleSettings,
    fusion: FusionSettings,
    seed: int,
    repeat: bool = True,
) -> Synthetic:
    """Made-up histories, and what might come next.

    Half of them begin with an object, each active one as often as any other, and go on; half are
    some steps of a user. Without users all begin with an object. What signals are worth is learnt
    from `wanted`; where that is too little, meaning decides.

    Args:
        texts: of each object [objects].
        meaning: index of their embeddings, in the same order.
        active: bool [objects], what may occur.
        taken: by users.
        wanted: as `fusion.learn_signals` takes it: such as is to come next.
        examples: `synthetic_per_ad` histories an active object, at most `max_synthetic_histories`,
            of at most `synthetic_steps` steps, each drawn from among `synthetic_neighbours` of each
            signal; `synthetic_draws` of what comes next.
        fusion: how signals are counted.
        seed: of the random choices.
        repeat: whether a user may take an object again.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(active)
    count = min(len(rows) * examples.synthetic_per_ad, examples.max_synthetic_histories)
    none = Histories.of([])
    if not count or len(rows) < 2:
        return Synthetic(none, none, none.values)
    narrow = fusion.model_copy(update={"near": examples.synthetic_neighbours})
    signals = build_signals(texts, meaning, taken, narrow)
    learnt = learn_signals(signals, active, taken, wanted, narrow, seed, repeat)
    factors = learnt or BY_MEANING
    log.info("factors %s%s", factors.as_dict(), "" if learnt else ", as too few converted")
    teacher = Teacher(Fusion(signals, active, narrow), factors, repeat)
    real = prefixes(taken.histories, active, count // 2, examples.synthetic_steps, rng)
    starts = np.resize(rng.permutation(rows), count - len(real))
    single = Histories(np.arange(len(starts) + 1), starts)
    walked = teacher.walk(single, rng.integers(0, examples.synthetic_steps, len(starts)), rng)
    begun = Histories(
        np.concatenate([real.offsets, real.offsets[-1] + walked.offsets[1:]]),
        np.concatenate([real.values, walked.values]),
    )
    log.info("%d histories from an object, %d from a user's", len(walked), len(real))
    return teacher.nexts(begun, examples.synthetic_draws, rng)


def prefixes(
    taken: Histories, active: Mask, count: int, longest: int, rng: np.random.Generator
) -> Histories:
    """So many beginnings of histories, each the latest steps up to a random one, active alone."""
    known = taken.kept(active[taken.values])
    if not len(known.values):
        return Histories.of([])
    at = rng.integers(0, len(known.values), count)
    return known.before(at, longest, at + 1)


@dataclass(frozen=True)
class Teacher:
    """Says what comes next, by its factors; `repeat`: also what the history holds already."""

    fusion: Fusion
    factors: Factors
    repeat: bool

    def walk(self, begun: Histories, steps: Rows, rng: np.random.Generator) -> Histories:
        """Histories that go on by so many drawn objects each; one for which nothing competes ends
        there.

        Args:
            begun: one object or more each.
            steps: int64 [histories].
        """
        length, wanted = np.diff(begun.offsets), steps.copy()
        path = np.full((len(begun), int((length + wanted).max(initial=0))), -1, np.int64)
        path[begun.cases, begun.places] = begun.values
        for step in range(int(wanted.max(initial=0))):
            going = np.flatnonzero(wanted > step)
            found = self._drawn(_histories(path[going], length[going]), 1, rng)[:, 0]
            some = found >= 0
            path[going[some], length[going[some]]] = found[some]
            length[going[some]] += 1
            wanted[going[~some]] = 0
        return _histories(path, length)

    def nexts(self, histories: Histories, draws: int, rng: np.random.Generator) -> Synthetic:
        """What comes next, drawn so many times; histories for which nothing competes are left
        out.
        """
        found = np.sort(self._drawn(histories, draws, rng), axis=1)
        whole = found[:, 0] >= 0
        found = found[whole]
        fresh = np.ones(found.shape, np.bool_)
        fresh[:, 1:] = found[:, 1:] != found[:, :-1]
        first = np.flatnonzero(fresh)
        offsets = np.concatenate([[0], np.cumsum(fresh.sum(axis=1))]).astype(np.int64)
        return Synthetic(
            histories.chosen(whole),
            Histories(offsets, found.ravel()[first]),
            np.diff(first, append=found.size),
        )

    def _drawn(self, histories: Histories, draws: int, rng: np.random.Generator) -> Rows:
        """Objects drawn by their probabilities [histories, draws], -1 where nothing competes.

        Draws of a history are one random start and even steps (systematic sampling): each object is
        drawn as often as its probability says, but for less than one.
        """
        objects, log_p = self.fusion.rank(
            self.factors,
            nothing_written(len(histories)),
            histories,
            AMONG,
            None if self.repeat else histories,
        )
        until = np.exp(log_p).cumsum(axis=1)
        at = (rng.random((len(histories), 1)) + np.arange(draws)) / draws * until[:, -1:]
        place = (until[:, None, :] <= at[:, :, None]).sum(axis=2)
        return np.take_along_axis(objects, np.minimum(place, AMONG - 1), 1)


def _histories(path: Rows, length: Rows) -> Histories:
    """The first `length` of each row of `path` [cases, width]."""
    kept = np.arange(path.shape[1]) < length[:, None]
    return Histories(np.concatenate([[0], np.cumsum(length)]).astype(np.int64), path[kept])
