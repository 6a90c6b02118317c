"""The RQ-VAE on clustered vectors, and the bookkeeping of IDs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from leadre_lib.errors import LeadreError
from leadre_lib.semantic_ids import (
    Codebook,
    assign,
    code_usage,
    format_sid,
    parse_sid,
    train_codebook,
)
from leadre_lib.settings import SemanticIdSettings

SETTINGS = SemanticIdSettings(codes=16, hidden_dim=64, latent_dim=16, epochs=80, batch_size=64)


def clustered(rows: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 12 centres, cluster by cluster."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, 32)).repeat(rows // 12, axis=0)
    vectors = centres + 0.35 * rng.standard_normal(centres.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(480)


@pytest.fixture(scope="module")
def codebook(vectors: np.ndarray) -> Codebook:
    return train_codebook(vectors, SETTINGS, seed=5, text_encoder="test")


def table(ids: dict[str, list[int]]) -> pa.Table:
    return pa.table({"ad_id": list(ids), "codes": pa.array(ids.values(), pa.list_(pa.int32()))})


def test_codes_follow_the_clusters_and_are_well_used(
    codebook: Codebook, vectors: np.ndarray
) -> None:
    codes = codebook.encode(vectors)
    assert codes.shape == (480, 3)
    assert codes.dtype == np.int32
    usage = code_usage(codes, codebook.sizes)
    assert all(level["used_share"] >= 0.9 for level in usage["levels"])
    assert usage["collision_rate"] < 0.35
    first = codes[:, 0].reshape(12, 40)
    same = (first[:, :, None] == first[:, None, :]).mean()
    assert same > 4 * (codes[:, 0, None] == codes[:, 0]).mean()


def test_training_is_deterministic(codebook: Codebook, vectors: np.ndarray) -> None:
    again = train_codebook(vectors, SETTINGS, seed=5, text_encoder="test")
    assert again.version == codebook.version
    assert train_codebook(vectors, SETTINGS, seed=6, text_encoder="test").version != again.version


def test_a_code_does_not_hang_on_the_batch(codebook: Codebook, vectors: np.ndarray) -> None:
    whole = codebook.encode(vectors)
    alone = np.concatenate([codebook.encode(vectors[i : i + 1]) for i in range(0, 480, 40)])
    np.testing.assert_array_equal(alone, whole[::40])


def test_fewer_ads_than_codes(vectors: np.ndarray) -> None:
    few = train_codebook(vectors[:5], SETTINGS, seed=1)
    assert len(few.encode(vectors[:5])) == 5
    assert few.encode(vectors[:0]).shape == (0, 3)


def test_centroids_are_the_vectors_of_the_codes(codebook: Codebook) -> None:
    assert [level.shape for level in codebook.centroids()] == [(16, 16)] * 3
    assert codebook.sizes == [16, 16, 16]


def test_save_and_load(codebook: Codebook, vectors: np.ndarray, tmp_path: Path) -> None:
    codebook.save(tmp_path / "book")
    codebook.save(tmp_path / "book")
    loaded = Codebook.load(tmp_path / "book")
    assert loaded.version == codebook.version
    np.testing.assert_array_equal(loaded.encode(vectors), codebook.encode(vectors))
    assert [file.name for file in tmp_path.iterdir()] == ["book"]


def test_load_refuses_a_mismatch(codebook: Codebook, tmp_path: Path) -> None:
    folder = tmp_path / "book"
    codebook.save(folder)
    weights = load_file(folder / "codebook.safetensors")
    weights["codebooks"][0, 0, 0] += 1
    save_file(weights, folder / "codebook.safetensors")
    with pytest.raises(LeadreError, match="restore the folder"):
        Codebook.load(folder)
    (folder / "codebook.safetensors").write_bytes(b"torn")
    with pytest.raises(LeadreError, match="no readable codebook"):
        Codebook.load(folder)
    with pytest.raises(LeadreError, match="no readable codebook"):
        Codebook.load(tmp_path / "nowhere")


def test_load_refuses_another_format(codebook: Codebook, tmp_path: Path) -> None:
    codebook.save(tmp_path / "book")
    path = tmp_path / "book" / "codebook.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(LeadreError, match="format 99"):
        Codebook.load(tmp_path / "book")


def test_save_never_replaces_another_codebook(
    codebook: Codebook, vectors: np.ndarray, tmp_path: Path
) -> None:
    train_codebook(vectors[:20], SETTINGS, seed=1).save(tmp_path / "book")
    with pytest.raises(LeadreError, match="never replaced"):
        codebook.save(tmp_path / "book")


def test_embeddings_of_another_encoder_are_refused(codebook: Codebook) -> None:
    with pytest.raises(LeadreError, match=r"embedding\.model"):
        codebook.encode(np.ones((2, 7), np.float32))
    with pytest.raises(LeadreError, match="not finite"):
        codebook.encode(np.full((2, 32), np.nan, np.float32))


def test_colliding_ads_take_the_smallest_free_token_in_the_order_of_ids() -> None:
    codes = np.array([[1, 2], [1, 2], [3, 4], [1, 2]], np.int32)
    full = assign(["d", "b", "c", "a"], codes, None)
    assert full.tolist() == [[1, 2, 2], [1, 2, 1], [3, 4, 0], [1, 2, 0]]


def test_an_ad_keeps_its_id_and_tokens_of_gone_ads_stay_taken() -> None:
    previous = table({"gone": [1, 2, 0], "kept": [1, 2, 3], "moved": [9, 9, 1]})
    codes = np.array([[1, 2]] * 6, np.int32)  # the text of "moved" now says 1, 2
    full = assign(["n4", "n3", "moved", "n1", "n2", "kept"], codes, previous)
    assert full.tolist() == [[1, 2, 5], [1, 2, 4], [9, 9, 1], [1, 2, 1], [1, 2, 2], [1, 2, 3]]


def test_assigning_again_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    ids = [f"ad{i}" for i in rng.permutation(500)]
    codes = rng.integers(0, 4, (500, 3)).astype(np.int32)
    first = assign(ids[:300], codes[:300], None)
    previous = table(dict(zip(ids[:300], first.tolist(), strict=True)))
    both = assign(ids, codes, previous)
    np.testing.assert_array_equal(both[:300], first)
    assert len(np.unique(both, axis=0)) == 500
    np.testing.assert_array_equal(both[:, :3], codes)
    shuffled = rng.permutation(500)
    again = assign([ids[i] for i in shuffled], codes[shuffled], previous)
    np.testing.assert_array_equal(again, both[shuffled])


def test_alternatives_spread_collisions_over_the_last_level() -> None:
    codes = np.array([[1, 5], [1, 5], [1, 5], [1, 6], [2, 5]], np.int32)
    near = np.array([[5, 6, 7], [5, 6, 8], [5, 6, 7], [6, 5, 9], [5, 6, 7]], np.int32)
    full = assign(["a", "b", "c", "d", "e"], codes, None, alternatives=near)
    # b takes 6 before d, which asks for it later in the order of ids.
    assert full.tolist() == [[1, 5, 0], [1, 6, 0], [1, 7, 0], [1, 9, 0], [2, 5, 0]]
    previous = table({"old": [1, 5, 0]})
    full = assign(["a", "b"], codes[:2], previous, alternatives=near[:2, :2])
    assert full.tolist() == [[1, 6, 0], [1, 5, 1]]  # b finds both taken, so it shares its nearest


def test_alternatives_start_with_the_code_itself(codebook: Codebook, vectors: np.ndarray) -> None:
    codes, near = codebook.encode(vectors), codebook.alternatives(vectors, 4)
    np.testing.assert_array_equal(near[:, 0], codes[:, -1])
    full = assign([f"{i:03d}" for i in range(480)], codes, None, alternatives=near)
    before = code_usage(codes, codebook.sizes)["collision_rate"]
    after = code_usage(full, codebook.sizes)["collision_rate"]
    assert after < before / 2


def test_a_crowded_code_is_named() -> None:
    with pytest.raises(LeadreError, match=r"more than 2 ads share the codes <a_1><b_2>"):
        assign(["a", "b", "c"], np.array([[1, 2]] * 3, np.int32), None, collision_codes=2)


def test_what_assign_refuses() -> None:
    with pytest.raises(LeadreError, match="twice"):
        assign(["a", "a"], np.zeros((2, 2), np.int32), None)
    with pytest.raises(LeadreError, match="levels"):
        assign(["a"], np.zeros((1, 2), np.int32), table({"b": [1, 2]}))


def test_no_new_ads() -> None:
    previous = table({"a": [1, 2, 7]})
    assert assign(["a"], np.array([[3, 3]], np.int32), previous).tolist() == [[1, 2, 7]]
    assert assign([], np.empty((0, 2), np.int32), previous).shape == (0, 3)
    assert format_sid(np.empty((0, 3), np.int32)) == []


def test_written_ids() -> None:
    codes = np.array([[12, 6, 22, 0], [0, 1, 2, 3]], np.int32)
    written = format_sid(codes)
    assert written == ["<a_12><b_6><c_22><d_0>", "<a_0><b_1><c_2><d_3>"]
    assert [parse_sid(sid) for sid in written] == [(12, 6, 22, 0), (0, 1, 2, 3)]


@pytest.mark.parametrize("text", ["", "<a_1", "<b_1>", "<a_1><c_2>", "<a_1> <b_2>", "<a_01>", "x"])
def test_what_is_no_semantic_id(text: str) -> None:
    with pytest.raises(LeadreError, match="no Semantic ID"):
        parse_sid(text)


def test_code_usage_by_hand() -> None:
    codes = np.array([[0, 1, 0], [0, 1, 1], [0, 2, 0], [3, 2, 0]])
    usage = code_usage(codes, [4, 4])
    assert usage["ads"] == 4
    assert usage["collision_rate"] == 0.25
    assert usage["largest_collision"] == 2
    assert usage["levels"][1] == {
        "level": "b",
        "size": 4,
        "used": 2,
        "used_share": 0.5,
        "entropy": 1.0,
    }
