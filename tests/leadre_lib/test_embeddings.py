"""The text encoder and its cache, with the bundled model."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from leadre_lib import embeddings
from leadre_lib.embeddings import ad_text, embed, encoder_id, text_hash
from leadre_lib.errors import LeadreError
from leadre_lib.settings import EmbeddingSettings

SETTINGS = EmbeddingSettings()
TEXTS = ["running shoes for men", "espresso machine", "trail running sneakers", "espresso machine"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the bundled model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    embed(TEXTS, SETTINGS, folder)
    return folder


def test_text_and_hash_follow_concat_ws() -> None:
    assert ad_text("Red shoes", "Light and fast") == "Red shoes\nLight and fast"
    assert ad_text("Red shoes", None) == "Red shoes"
    assert ad_text("Red shoes", "") == "Red shoes\n"
    # printf 'Red shoes\nLight and fast' | sha256sum
    expected = "625e47848fbaa704a29e793481409f365889a5747888cab9c30074ffe0501cea"
    assert text_hash("Red shoes", "Light and fast") == expected


def test_vectors_have_length_one_and_follow_the_meaning(cache: Path) -> None:
    vectors = embed(TEXTS, SETTINGS, cache)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.2
    np.testing.assert_array_equal(vectors[1], vectors[3])


def test_known_texts_are_never_embedded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = embed(TEXTS, SETTINGS, cache)

    def refuse(_: EmbeddingSettings) -> None:
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(embeddings, "load_encoder", refuse)
    np.testing.assert_array_equal(embed(TEXTS[::-1], SETTINGS, cache), before[::-1])
    with pytest.raises(AssertionError, match="was loaded"):
        embed(["a text that is new"], SETTINGS, cache)


def test_an_interrupted_run_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "PART_TEXTS", 1)
    write = embeddings._write_part
    written: list[pa.Table] = []

    def fail_at_second(table: pa.Table, folder: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(table)
        write(table, folder)

    monkeypatch.setattr(embeddings, "_write_part", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        embed(TEXTS, SETTINGS, tmp_path)
    monkeypatch.setattr(embeddings, "_write_part", write)
    embed(TEXTS, SETTINGS, tmp_path)
    assert len(list(tmp_path.rglob("*.parquet"))) == 3


def test_a_damaged_cache_file_is_made_again(tmp_path: Path) -> None:
    before = embed(TEXTS, SETTINGS, tmp_path)
    (part,) = tmp_path.rglob("*.parquet")
    part.write_bytes(part.read_bytes()[:100])
    np.testing.assert_array_equal(embed(TEXTS, SETTINGS, tmp_path), before)


def test_no_texts_give_no_rows(tmp_path: Path) -> None:
    assert embed([], SETTINGS, tmp_path).shape == (0, 384)


def test_encoders_do_not_share_a_cache() -> None:
    shorter = EmbeddingSettings(max_tokens=8)
    assert encoder_id(SETTINGS) == encoder_id(EmbeddingSettings(batch_size=8))
    assert encoder_id(shorter) != encoder_id(SETTINGS)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    missing = EmbeddingSettings(model=str(tmp_path / "nowhere"))
    with pytest.raises(LeadreError, match="nowhere"):
        embed(["text"], missing, tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LeadreError, match="empty"):
        embed(["text"], EmbeddingSettings(model=str(tmp_path / "empty")), tmp_path)
