"""The indexes of a release: Semantic ID ↔ ad, the constraint index of the decoder, and the nearest
neighbours of ads by text; building them, and checking that they fit each other and the catalogue.

Knows nothing of users or of training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from leadre_lib.catalogue import Catalogue
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.embeddings import embed
from leadre_lib.facts import write_json
from leadre_lib.release import Release, ReleaseError
from leadre_lib.retrieval import EmbeddingIndex
from leadre_lib.settings import Settings

IDS = "semantic_ids/ids.json"
CONSTRAINT = "indexes/constraint.safetensors"
NEIGHBOURS = "indexes/embeddings.faiss"


def build_indexes(
    catalogue: Catalogue, sizes: Sequence[int], settings: Settings, folder: Path
) -> dict[str, Path]:
    """Write the index files into `folder`.

    Args:
        catalogue: all ads; those that are not active keep their row, but cannot be decoded.
        sizes: codes of each level, the last token's among them.
        folder: scratch; its files are overwritten.

    Returns:
        name in the release → file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / Path(name).name for name in (IDS, CONSTRAINT, NEIGHBOURS)}
    write_json(
        parts[IDS],
        {
            "codebook": catalogue.codebook,
            "ad_ids": catalogue.ids.to_pylist(),
            "semantic_ids": catalogue.ads["semantic_id"].to_pylist(),
        },
    )
    ConstraintIndex.build(catalogue.codes, sizes, catalogue.active_rows()).save(parts[CONSTRAINT])
    vectors = embed(catalogue.texts(), settings.embedding, settings.cache)
    EmbeddingIndex.build(vectors).save(parts[NEIGHBOURS])
    return parts


def check_indexes(release: Release, active: int) -> None:
    """Refuse a release whose indexes do not belong together or do not hold the whole catalogue.

    Args:
        active: number of ads that the constraint index must be able to write.

    Raises:
        ReleaseError: sizes differ, the codebook is another, or a path does not end at its ad.
    """
    ids = json.loads((release.folder / IDS).read_text("utf-8"))
    release.require_codebook(ids["codebook"], f"{release.folder / IDS}")
    index = ConstraintIndex.load(release.folder / CONSTRAINT)
    if index.ads != len(ids["ad_ids"]) or len(index.rows) != active:
        raise ReleaseError(
            f"{release.folder / CONSTRAINT}: {len(index.rows)} of {index.ads} ads, but the"
            f" catalogue has {active} active of {len(ids['ad_ids'])}"
        )
    node = np.zeros(len(index.rows), np.int64)
    for table, codes in zip(index.transitions, index.codes[index.rows].T, strict=True):
        node = table[node, codes].astype(np.int64)
    if not np.array_equal(node, index.rows):
        raise ReleaseError(f"{release.folder / CONSTRAINT}: a Semantic ID does not lead to its ad")
    config = json.loads((release.folder / "codebook" / "codebook.json").read_text("utf-8"))
    release.require_codebook(config["version"], f"{release.folder / 'codebook'}")
    EmbeddingIndex.load(release.folder / NEIGHBOURS, len(ids["ad_ids"]), config["dim"])
