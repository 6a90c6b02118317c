"""The four quantisers on clustered vectors: codes that follow the clusters, that are well used, and
that depend on nothing but the vector; and codebooks on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from leadre_lib.errors import LeadreError
from leadre_lib.quantisers import Codebook, catalogue_sizes, refit_codebook, train_codebook
from leadre_lib.semantic_ids import assign, code_usage
from leadre_lib.settings import METHODS, SemanticIdSettings

SETTINGS = SemanticIdSettings(
    levels=3, codes=16, hidden_dim=64, latent_dim=16, epochs=40, batch_size=64
)


def clustered(rows: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 12 centres, cluster by cluster."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, 32)).repeat(rows // 12, axis=0)
    vectors = centres + 0.35 * rng.standard_normal(centres.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(480)


def by(method: str) -> SemanticIdSettings:
    return SETTINGS.model_copy(update={"method": method})


@pytest.fixture(scope="module", params=METHODS)
def codebook(vectors: np.ndarray, request: pytest.FixtureRequest) -> Codebook:
    return train_codebook(vectors, by(request.param), seed=5, text_encoder="test")


def test_codes_follow_the_clusters_and_are_well_used(
    codebook: Codebook, vectors: np.ndarray
) -> None:
    codes = codebook.encode(vectors)
    assert codes.shape == (480, 3)
    assert codes.dtype == np.int32
    usage = code_usage(codes, codebook.sizes)
    assert all(level["used_share"] >= 0.9 for level in usage["levels"])
    assert usage["collision_rate"] < 0.5
    first = codes[:, 0].reshape(12, 40)
    same = (first[:, :, None] == first[:, None, :]).mean()
    assert same > 4 * (codes[:, 0, None] == codes[:, 0]).mean()


def test_training_is_deterministic(codebook: Codebook, vectors: np.ndarray) -> None:
    settings = by(codebook.config["method"])
    again = train_codebook(vectors, settings, seed=5, text_encoder="test")
    assert again.version == codebook.version
    assert train_codebook(vectors, settings, seed=6, text_encoder="test").version != again.version


def test_a_code_does_not_hang_on_the_batch(codebook: Codebook, vectors: np.ndarray) -> None:
    whole = codebook.encode(vectors)
    alone = np.concatenate([codebook.encode(vectors[i : i + 1]) for i in range(0, 480, 40)])
    np.testing.assert_array_equal(alone, whole[::40])


@pytest.mark.parametrize("method", METHODS)
def test_fewer_objects_than_codes(vectors: np.ndarray, method: str) -> None:
    for count in (1, 5, 16):
        few = train_codebook(vectors[:count], by(method), seed=1)
        assert all(np.isfinite(array).all() for array in few.weights.values())
        assert len(few.encode(vectors[:count])) == count
        assert few.encode(vectors[:0]).shape == (0, 3)
    assert len(np.unique(few.encode(vectors), axis=0)) > 10  # and what is new is told apart


@pytest.mark.parametrize("method", METHODS)
def test_equal_texts_make_a_codebook_too(vectors: np.ndarray, method: str) -> None:
    same = train_codebook(np.repeat(vectors[:1], 30, axis=0), by(method), seed=1)
    assert all(np.isfinite(array).all() for array in same.weights.values())


def test_centroids_are_the_vectors_of_the_codes(codebook: Codebook) -> None:
    width = 16 if codebook.config["method"] == "rq-vae" else 32
    assert [level.shape for level in codebook.centroids()] == [(16, width)] * 3
    assert codebook.sizes == [16, 16, 16]


def test_the_error_says_how_badly_codes_fit(codebook: Codebook, vectors: np.ndarray) -> None:
    codes = codebook.encode(vectors)
    own = codebook.errors(vectors, codes)
    assert own.mean() == pytest.approx(codebook.error, abs=1e-5)
    assert 0 < codebook.error < 0.6  # of the spread of all
    others = codebook.errors(vectors, np.roll(codes, 240, axis=0))
    assert others.mean() > 2 * codebook.error
    with_last_token = np.column_stack([codes, np.arange(480)])
    np.testing.assert_array_equal(codebook.errors(vectors, with_last_token), own)


def test_balance_uses_the_codes_alike(vectors: np.ndarray) -> None:
    entropy = {}
    for method in ("rq-kmeans", "rq-kmeans-balanced"):
        trained = train_codebook(vectors, by(method), seed=5)
        usage = code_usage(trained.encode(vectors), trained.sizes)
        entropy[method] = [level["entropy"] for level in usage["levels"]]
    assert min(entropy["rq-kmeans-balanced"]) > 3.8  # of 4 bits
    assert sum(entropy["rq-kmeans-balanced"]) > sum(entropy["rq-kmeans"])


def test_a_refresh_holds_codes_and_fits_the_rest(codebook: Codebook) -> None:
    vectors = clustered(480)
    known = vectors[: 12 * 30]  # nine of the twelve clusters
    old = train_codebook(known, by(codebook.config["method"]), seed=5)
    codes, free = old.encode(vectors), np.arange(480) >= 12 * 30
    new = refit_codebook(old, vectors, codes, free, SETTINGS, 1)
    assert refit_codebook(old, vectors, codes, free, SETTINGS, 1).version == new.version
    assert new.config["refreshed_from"] == old.version
    assert new.sizes == old.sizes
    before = old.errors(vectors[free], codes[free]).mean()
    assert new.errors(vectors[free], new.encode(vectors[free])).mean() < 0.9 * before
    held = new.errors(known, codes[~free]).mean() / old.errors(known, codes[~free]).mean()
    assert held < 3  # three clusters of twelve are new, and crowd into codes that others have
    nothing = refit_codebook(old, known, codes[~free], np.zeros(len(known), bool), SETTINGS, 1)
    assert nothing.errors(known, codes[~free]).mean() < 1.05 * old.error


def test_a_refresh_adds_codes_to_a_catalogue_that_grew(vectors: np.ndarray) -> None:
    free = SETTINGS.model_copy(update={"codes": 0, "method": "rq-kmeans-balanced"})
    old = train_codebook(vectors[:60], free, seed=5)
    assert old.sizes == [16] * 3
    codes, loose = old.encode(vectors), np.arange(480) >= 60
    new = refit_codebook(old, vectors, codes, loose, free, 1)
    assert new.sizes == [64] * 3
    natural = new.encode(vectors[60:])
    assert (natural >= 16).mean() > 0.1
    # Codes that nobody has yet are nobody's.
    few = refit_codebook(old, vectors, codes, np.arange(480) >= 470, free, 1)
    taken = few.encode(vectors)
    assert few.sizes == [64] * 3
    assert all((taken[:, level] >= 16).sum() <= 10 * 8 for level in range(3))
    dead = few.weights["prices"] > 1e5
    assert dead.any()
    assert not any(dead[level, taken[:, level]].any() for level in range(3))
    errors = [book.errors(vectors[60:], book.encode(vectors[60:])).mean() for book in (old, new)]
    assert errors[1] < 0.7 * errors[0]


def test_sizes_follow_the_catalogue_unless_they_are_named() -> None:
    free = SemanticIdSettings()
    sizes = [catalogue_sizes(n, free) for n in (1, 1000, 3686, 20_000, 200_000, 1_000_000)]
    assert sizes == [(3, 16), (3, 64), (3, 128), (3, 256), (3, 256), (4, 256)]
    assert catalogue_sizes(1_000_000, SETTINGS) == (3, 16)


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
    train_codebook(vectors[:20], by("rq-kmeans"), seed=1).save(tmp_path / "book")
    with pytest.raises(LeadreError, match="never replaced"):
        codebook.save(tmp_path / "book")


def test_embeddings_of_another_encoder_are_refused(codebook: Codebook) -> None:
    with pytest.raises(LeadreError, match=r"embedding\.model"):
        codebook.encode(np.ones((2, 7), np.float32))
    with pytest.raises(LeadreError, match="not finite"):
        codebook.encode(np.full((2, 32), np.nan, np.float32))


def test_alternatives_start_with_the_code_itself(codebook: Codebook, vectors: np.ndarray) -> None:
    codes, near = codebook.encode(vectors), codebook.alternatives(vectors, 4)
    np.testing.assert_array_equal(near[:, 0], codes[:, -1])
    full = assign([f"{i:03d}" for i in range(480)], codes, None, alternatives=near)
    before = code_usage(codes, codebook.sizes)["collision_rate"]
    after = code_usage(full, codebook.sizes)["collision_rate"]
    assert after < before / 2
