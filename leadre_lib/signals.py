"""What is known of marketing objects apart from a model: what they mean, in which words they say
it, what people take after them, and how many take them.

- meaning: the embeddings of their texts, in an index of nearest neighbours;
- words: TF-IDF of the character n-grams of their texts, reduced to some dimensions (latent semantic
  analysis, Deerwester et al. 1990). They tell a brand or a size that an encoder passes over;
- after: of what was taken within some steps of an object, the share of another one; nearer steps
  count more, and those before it half as much (item-to-item retrieval, Linden et al. 2003);
- takers: how many users took an object, each the less the longer ago.

Knows nothing of prompts, of models, or of what each of them is worth (see `fusion`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse

from leadre_lib.errors import LeadreError
from leadre_lib.evaluation import Histories
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import FusionSettings

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Vectors = npt.NDArray[np.float32]

BACKWARDS = 0.5
UNSURE = 3.0  # steps that an object has beside those seen: few say little
NGRAMS = (3, 5)
MAX_TERMS = 1 << 18  # the most frequent n-grams; a larger catalogue has no more


@dataclass(frozen=True)
class Taken:
    """What users took.

    Attributes:
        histories: of each user the object rows, oldest first.
        ages: float64 [values of the histories], days before the newest of all.
    """

    histories: Histories
    ages: Floats

    @classmethod
    def at_once(cls, histories: Histories) -> Taken:
        """All on one day."""
        return cls(histories, np.zeros(len(histories.values)))

    def kept(self, values: Mask) -> Taken:
        """All users, with those of their values that a mask chooses [values]."""
        ages = self.ages[values]
        return Taken(self.histories.kept(values), ages - ages.min() if len(ages) else ages)


@dataclass(frozen=True)
class Signals:
    """The signals of a catalogue's objects; a row is an object row.

    Attributes:
        meaning: index of the vectors of `vector_object`, each of length 1.
        vector_object: int64 [vectors], the object row of each vector; -1: of none.
        words: float32 [objects, dimensions], rows of length 1, or of 0 where nothing is known.
        after: float64 [objects, objects], from which object to which: the root of the share, of
            the `near` largest.
        takers: float64 [objects]; a user who took it a half-life ago is half of one.
    """

    meaning: EmbeddingIndex
    vector_object: Rows
    words: Vectors
    after: sparse.csr_array
    takers: Floats

    @property
    def objects(self) -> int:
        """How many there are."""
        return len(self.takers)

    def recounted(self, taken: Taken, settings: FusionSettings) -> Signals:
        """These signals, as if users had taken other objects."""
        after, takers = _counted(taken, self.objects, settings)
        return replace(self, after=after, takers=takers)

    def save(self, path: Path) -> None:
        """Write all but `meaning`, which is an index of its own, as safetensors."""
        parts = {
            "words": self.words,
            "after.indptr": self.after.indptr.astype(np.int64),
            "after.indices": self.after.indices.astype(np.int32),
            "after.data": self.after.data.astype(np.float32),
            "takers": self.takers.astype(np.float32),
        }
        save_file({name: np.ascontiguousarray(part) for name, part in parts.items()}, path)

    @classmethod
    def load(cls, path: Path, meaning: EmbeddingIndex) -> Signals:
        """Read what `save` wrote.

        Raises:
            LeadreError: the file is missing or damaged, or of other objects than the index.
        """
        try:
            parts = load_file(path)
            takers = parts["takers"].astype(np.float64)
            entries = parts["after.data"], parts["after.indices"], parts["after.indptr"]
            shape = (len(takers), len(takers))
            after = sparse.csr_array(entries, shape=shape, dtype=np.float64)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LeadreError(f"{path}: cannot be read: {error}; rebuild the indexes") from None
        if not len(parts["words"]) == len(takers) == meaning.rows:
            raise LeadreError(
                f"{path}: of {len(takers)} objects, but the embeddings are of {meaning.rows}:"
                " rebuild the indexes from the same release"
            )
        return cls(meaning, np.arange(len(takers)), parts["words"], after, takers)

    def of(self, rows: Rows, objects: int) -> Signals:
        """These signals in the words of another catalogue.

        Args:
            rows: int64 [objects of this one], each one's row there; -1 where it has none.
            objects: how many objects the other has. Of new ones nothing is known.
        """
        if objects == self.objects and np.array_equal(rows, np.arange(objects)):
            return self
        known = np.flatnonzero(rows >= 0)
        words = np.zeros((objects, self.words.shape[1]), np.float32)
        words[rows[known]] = self.words[known]
        takers = np.zeros(objects)
        takers[rows[known]] = self.takers[known]
        pairs = self.after.tocoo()
        source, target = (rows[axis] for axis in pairs.coords)
        kept = (source >= 0) & (target >= 0)
        entries = (pairs.data[kept], (source[kept], target[kept]))
        after = sparse.csr_array(entries, shape=(objects, objects))
        mine = self.vector_object
        return Signals(self.meaning, np.where(mine >= 0, rows[mine], -1), words, after, takers)


def build_signals(
    texts: Sequence[str], meaning: EmbeddingIndex, taken: Taken, settings: FusionSettings
) -> Signals:
    """The signals of objects.

    Args:
        texts: of each object [objects].
        meaning: index of their embeddings, in the same order.
        taken: by users, whatever they may be asked about.
        settings: `words`, `decay`, `steps`, `near` and `half_life_days`.
    """
    objects = len(texts)
    after, takers = _counted(taken, objects, settings)
    words = word_vectors(texts, settings.words)
    return Signals(meaning, np.arange(objects), words, after, takers)


def word_vectors(texts: Sequence[str], dimensions: int) -> Vectors:
    """Vectors of the words of texts, float32 [texts, at most `dimensions`], rows of length 1 or 0.

    None, [texts, 0], where the texts have no n-gram in common or no dimensions are wanted.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    none = np.zeros((len(texts), 0), np.float32)
    if not dimensions or len(texts) < 3:
        return none
    vectorizer = TfidfVectorizer(
        analyzer="char_wb",
        ngram_range=NGRAMS,
        sublinear_tf=True,
        min_df=2,
        max_features=MAX_TERMS,
        dtype=np.float32,
    )
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError:  # no n-gram is in two texts
        return none
    wanted = min(dimensions, counts.shape[0] - 1, counts.shape[1] - 1)
    if wanted < 1:
        return none
    with threadpool_limits(1):  # how sums are rounded depends on the threads
        reduced = TruncatedSVD(wanted, random_state=0).fit_transform(counts)
    length = np.linalg.norm(reduced, axis=1, keepdims=True)
    unit = np.divide(reduced, length, where=length > 1e-6, out=np.zeros_like(reduced))
    return unit.astype(np.float32)


def _counted(
    taken: Taken, objects: int, settings: FusionSettings
) -> tuple[sparse.csr_array, Floats]:
    """What users say by what they took: `after` and `takers`."""
    histories = taken.histories
    # A user who takes an object twice is one who took it, the second time.
    backwards = (histories.cases * objects + histories.values)[::-1]
    once, at = np.unique(backwards, return_index=True)
    counts = 0.5 ** (taken.ages[::-1][at] / settings.half_life_days)
    takers = np.bincount(once % objects, weights=counts, minlength=objects)
    return _after(histories, objects, settings), takers.astype(np.float64)


def _after(histories: Histories, objects: int, settings: FusionSettings) -> sparse.csr_array:
    users = histories.cases
    counts = sparse.csr_array((objects, objects))
    for gap in range(1, settings.steps + 1):
        near = users[gap:] == users[:-gap]
        source, target = histories.values[:-gap][near], histories.values[gap:][near]
        other = source != target
        source, target = source[other], target[other]
        weight = np.full(len(source), settings.decay ** (gap - 1))
        onward = sparse.csr_array((weight, (source, target)), shape=counts.shape)
        counts = counts + onward + BACKWARDS * onward.T
    shares = sparse.diags_array(1 / (counts.sum(axis=1) + UNSURE)) @ counts
    return _strongest(sparse.csr_array(shares).sqrt(), settings.near)


def _strongest(matrix: sparse.csr_array, most: int) -> sparse.csr_array:
    """The largest entries of each row, at most so many: a popular object leads to nearly all."""
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort([matrix.indices, -matrix.data, row])
    place = np.arange(len(order)) - matrix.indptr[:-1][row[order]]
    kept = order[place < most]
    entries = matrix.data[kept], (row[kept], matrix.indices[kept])
    return sparse.csr_array(entries, shape=matrix.shape)
