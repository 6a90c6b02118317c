"""The indexes of a release: Semantic ID ↔ marketing object ↔ ads, the constraint index of the
decoder, the nearest neighbours of objects by text, and the signals that a model's lists are fused
with; building them, checking that they fit each other, the model and the catalogue, and opening
them for a day.

Knows nothing of users or of training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leadre_lib.catalogue import Catalogue, Rows
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.embeddings import embed
from leadre_lib.errors import LeadreError
from leadre_lib.model import load_tokenizer, sid_token_ids
from leadre_lib.quantisers import Codebook
from leadre_lib.release import Release, ReleaseError
from leadre_lib.retrieval import MIN_RECALL, EmbeddingIndex
from leadre_lib.semantic_ids import code_lists, codes_of, format_sid
from leadre_lib.settings import Settings
from leadre_lib.signals import Signals, Taken, build_signals

log = logging.getLogger(__name__)

OBJECTS = "semantic_ids/objects.parquet"
ADS = "semantic_ids/ads.parquet"
CONSTRAINT = "indexes/constraint.safetensors"
NEIGHBOURS = "indexes/embeddings.faiss"
SIGNALS = "indexes/signals.safetensors"
MOVED = "semantic_ids/moved.parquet"


def build_indexes(
    catalogue: Catalogue,
    sizes: Sequence[int],
    taken: Taken,
    settings: Settings,
    folder: Path,
) -> dict[str, Path]:
    """Write the index files into `folder`.

    `objects.parquet` has a row an object, in the order of all other indexes; `ads.parquet` a row an
    ad with its object's row, whether it is active, and the eCPM by which an object's ads are
    ordered.

    Args:
        catalogue: all objects; those without an active ad keep their row, but cannot be decoded.
        sizes: codes of each level, the last token's among them.
        taken: by users; signals are counted on it.
        folder: scratch; its files are overwritten.

    Returns:
        name in the release → file. Without `fusion.enabled` there are no signals.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = (OBJECTS, ADS, CONSTRAINT, NEIGHBOURS, *([SIGNALS] if settings.fusion.enabled else []))
    parts = {name: folder / Path(name).name for name in names}
    pq.write_table(objects_table(catalogue), parts[OBJECTS])
    ads = catalogue.ads.select(["ad_id", "marketing_object_id", "ecpm", "bid"])
    ads = ads.append_column("object_row", pa.array(catalogue.owner))
    pq.write_table(ads.append_column("active", pa.array(catalogue.active)), parts[ADS])
    index = ConstraintIndex.build(
        catalogue.codes, sizes, catalogue.active_objects, codebook=catalogue.codebook
    )
    index.save(parts[CONSTRAINT])
    texts = catalogue.texts()
    neighbours = EmbeddingIndex.build(embed(texts, settings.embedding, settings.cache))
    neighbours.save(parts[NEIGHBOURS])
    if SIGNALS in parts:
        build_signals(texts, neighbours, taken, settings.fusion).save(parts[SIGNALS])
    return parts


def objects_table(catalogue: Catalogue) -> pa.Table:
    """The objects of a catalogue as a release keeps them, with the codebook they are written in."""
    return pa.table(
        {
            "marketing_object_id": catalogue.object_ids,
            "semantic_id": catalogue.objects["semantic_id"],
            "codes": code_lists(catalogue.codes),
            "text_hash": catalogue.objects["encoded_hash"],
            "codebook": pa.array([catalogue.codebook] * len(catalogue.codes), pa.string()),
        }
    )


def read_objects(release: Release) -> pa.Table:
    """The objects of a release, see `objects_table`.

    Raises:
        ReleaseError: the file cannot be read.
    """
    return _read(release.folder / OBJECTS)


def check_indexes(
    release: Release, catalogue: Catalogue, sizes: Sequence[int]
) -> dict[str, int | float | str]:
    """Refuse a release whose indexes do not belong together or do not hold the whole catalogue.

    Args:
        catalogue: what the release is to serve: its objects, and the ads that are active.
        sizes: codes of each level, the last token's among them.

    Returns:
        Number of `objects` and `active` ones; kind of the index of `neighbours` and its `recall`.

    Raises:
        ReleaseError: sizes differ, the codebook is another, an object has another's Semantic ID,
            one does not lead to its object, the model cannot write it, or too few of the nearest
            neighbours are found. The message names the file.
    """
    folder = release.folder
    _check_ids(release, catalogue)
    index = ConstraintIndex.load(folder / CONSTRAINT)
    release.require_codebook(index.codebook, f"{folder / CONSTRAINT}")
    if index.sizes != tuple(sizes) or not np.array_equal(index.active, catalogue.active_objects):
        raise ReleaseError(
            f"{folder / CONSTRAINT}: {int(index.active.sum())} of {index.objects} objects active in"
            f" levels of {index.sizes}, but the catalogue has {int(catalogue.active_objects.sum())}"
            f" of {len(catalogue.codes)} in {tuple(sizes)}"
        )
    own = np.where(catalogue.active_objects, np.arange(len(catalogue.codes)), -1)
    if not np.array_equal(index.lead(catalogue.codes), own):
        raise ReleaseError(f"{folder / CONSTRAINT}: a Semantic ID does not lead to its object")
    codebook = Codebook.load(folder / "codebook")
    release.require_codebook(codebook.version, f"{folder / 'codebook'}")
    dim = codebook.config["dim"]
    neighbours = EmbeddingIndex.load(folder / NEIGHBOURS, len(catalogue.codes), dim)
    if neighbours.recall < MIN_RECALL:
        raise ReleaseError(
            f"{folder / NEIGHBOURS}: finds {neighbours.recall:.3f} of the nearest, less than"
            f" {MIN_RECALL}"
        )
    if (folder / SIGNALS).exists():
        Signals.load(folder / SIGNALS, neighbours)
    try:
        sid_token_ids(load_tokenizer(release.model), sizes)
    except LeadreError as error:
        raise ReleaseError(f"{release.model}: cannot write every Semantic ID: {error}") from None
    return {
        "objects": len(catalogue.codes),
        "active": int(index.active.sum()),
        "neighbours": neighbours.kind,
        "recall": round(neighbours.recall, 4),
    }


def _check_ids(release: Release, catalogue: Catalogue) -> None:
    path, objects = release.folder / OBJECTS, read_objects(release)
    for version in pc.unique(objects["codebook"]).to_pylist():
        release.require_codebook(version, f"{path}")
    if not objects.equals(objects_table(catalogue)):
        raise ReleaseError(f"{path}: not the marketing objects of the catalogue")
    written = objects["semantic_id"].to_pylist()
    if len(set(written)) != len(written):
        raise ReleaseError(f"{path}: two marketing objects have one Semantic ID")
    if written != format_sid(codes_of(objects)):
        raise ReleaseError(f"{path}: a Semantic ID is not written as its codes")
    ads = _read(release.folder / ADS)
    if not ads["ad_id"].equals(catalogue.ads["ad_id"]) or not np.array_equal(
        ads["active"].to_numpy(), catalogue.active
    ):
        raise ReleaseError(f"{release.folder / ADS}: not the ads of the catalogue")


def open_constraint(
    release: Release, catalogue: Catalogue, sizes: Sequence[int]
) -> ConstraintIndex:
    """The constraint index for the objects that are active in a catalogue.

    That of the release, mapped into memory, with the catalogue's mask: a stopped ad takes effect
    without a rebuild. Where the catalogue has other objects than the release, one is built.
    """
    if read_objects(release).equals(objects_table(catalogue)):
        index = ConstraintIndex.load(release.folder / CONSTRAINT)
        release.require_codebook(index.codebook, f"{release.folder / CONSTRAINT}")
        return index.with_active(catalogue.active_objects)
    log.info("release %s has other marketing objects: building the day's own index", release.id)
    return ConstraintIndex.build(
        catalogue.codes, sizes, catalogue.active_objects, codebook=catalogue.codebook
    )


def open_neighbours(release: Release, catalogue: Catalogue) -> tuple[EmbeddingIndex, Rows]:
    """The nearest-neighbour index of a release, mapped, and what it holds of a catalogue.

    Returns:
        the index, and the catalogue's object row of each of its vectors, int64; -1 where the
        catalogue has no such object.
    """
    ids = read_objects(release)["marketing_object_id"]
    dim = Codebook.load(release.folder / "codebook").config["dim"]
    index = EmbeddingIndex.load(release.folder / NEIGHBOURS, len(ids), dim)
    rows = pc.fill_null(pc.index_in(ids.combine_chunks(), catalogue.object_ids), -1)
    return index, rows.to_numpy(zero_copy_only=False).astype(np.int64)


def open_signals(
    release: Release, catalogue: Catalogue, neighbours: EmbeddingIndex, rows: Rows
) -> Signals | None:
    """The signals of a release in the words of a catalogue; None: it has none.

    Args:
        neighbours, rows: what `open_neighbours` gave.
    """
    path = release.folder / SIGNALS
    if not path.exists():
        return None
    return Signals.load(path, neighbours).of(rows, len(catalogue.codes))


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ReleaseError(f"{path}: cannot be read: {error}; rebuild the indexes") from None
