"""Semantic IDs: a residual-quantised VAE over ad embeddings, and the bookkeeping of IDs.

Paper (arXiv 2411.13789), section 3.2; residual quantisation with k-means start and revival of dead
codes after SoundStream (arXiv 2107.03312, section III-C), on text embeddings after TIGER
(arXiv 2305.05065, section 3.1). A Semantic ID is one code a level and a last token, which tells
apart the ads that the levels do not; it is written `<a_12><b_6><c_22><d_0>`.

Knows nothing of where embeddings come from, nor of the model that reads and writes the IDs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import string
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from leadre_lib.errors import LeadreError
from leadre_lib.settings import SemanticIdSettings

Vectors = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]

FORMAT = 1
_TOKEN = re.compile(r"<([a-z])_(0|[1-9]\d*)>")


class RqVae(nn.Module):
    """Encoder and decoder of one hidden layer, and one codebook a level on the residuals."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, dim: int, hidden: int, latent: int, levels: int, codes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.codebooks = nn.Parameter(torch.zeros(levels, codes, latent))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    def latent(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, dim] → latent vectors [n, latent]."""
        return self.encoder((embeddings - self.mean) / self.scale)

    def quantise(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nearest code of each level, on what the levels before have left.

        Returns:
            codes [n, levels]; the residual before each level [n, levels, latent]; and the chosen
            codes' vectors [n, levels, latent]. Residuals carry gradients to the encoder only.
        """
        codes, residuals, chosen = [], [], []
        residual = latent
        for codebook in self.codebooks:
            code = torch.cdist(residual.detach(), codebook.detach()).argmin(1)
            vector = codebook[code]
            codes.append(code)
            residuals.append(residual)
            chosen.append(vector)
            residual = residual - vector.detach()
        return torch.stack(codes, 1), torch.stack(residuals, 1), torch.stack(chosen, 1)

    def ranking(self, embeddings: torch.Tensor) -> torch.Tensor:
        """All codes of the last level, nearest to each embedding's last residual first."""
        _, residuals, _ = self.quantise(self.latent(embeddings))
        return torch.cdist(residuals[:, -1], self.codebooks[-1]).argsort(dim=1, stable=True)

    def loss(self, embeddings: torch.Tensor, commitment: float, quantised: bool) -> torch.Tensor:
        """Reconstruction error, plus codebook and commitment errors once codes are in use."""
        target = (embeddings - self.mean) / self.scale
        latent = self.encoder(target)
        if not quantised:
            return nn.functional.mse_loss(self.decoder(latent), target)
        _, residuals, chosen = self.quantise(latent)
        straight_through = latent + (chosen.sum(1) - latent).detach()
        return (
            nn.functional.mse_loss(self.decoder(straight_through), target)
            + nn.functional.mse_loss(chosen, residuals.detach())
            + commitment * nn.functional.mse_loss(residuals, chosen.detach())
        )


@dataclass(frozen=True)
class Codebook:
    """A trained RQ-VAE, frozen: its sizes and its weights."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]

    @property
    def sizes(self) -> list[int]:
        """Codes of each level, the last token not counted."""
        return [self.config["codes"]] * self.config["levels"]

    @cached_property
    def version(self) -> str:
        """Hash of sizes and weights: equal versions give equal codes."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, array in sorted(self.weights.items()):
            digest.update(f"{name}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def encode(self, embeddings: Vectors) -> Codes:
        """Codes int32 [n, levels] of embeddings float32 [n, dim].

        In double precision, so that an ad's code does not hang on which ads share its batch.

        Raises:
            LeadreError: embeddings of another encoder (other dimensions) or not finite.
        """
        embeddings = _checked(embeddings, self.config["dim"])
        model = self._model.double()
        with torch.no_grad():
            chunks = [
                model.quantise(model.latent(chunk.double()))[0]
                for chunk in torch.from_numpy(embeddings).split(65536)
            ]
        return torch.cat(chunks).numpy().astype(np.int32)

    def alternatives(self, embeddings: Vectors, count: int) -> Codes:
        """The `count` codes of the last level nearest to each embedding, nearest first.

        Returns:
            int32 [n, min(count, codes)]; the first column is the last column of `encode`.

        Raises:
            LeadreError: as `encode`.
        """
        embeddings = _checked(embeddings, self.config["dim"])
        model = self._model.double()
        with torch.no_grad():
            chunks = [
                model.ranking(chunk.double())[:, :count]
                for chunk in torch.from_numpy(embeddings).split(65536)
            ]
        return torch.cat(chunks).numpy().astype(np.int32)

    def centroids(self) -> list[Vectors]:
        """One float32 [codes, latent_dim] a level: the codes' vectors in the latent space."""
        return [np.array(level, np.float32) for level in self.weights["codebooks"]]

    @cached_property
    def _model(self) -> RqVae:
        names = ("dim", "hidden_dim", "latent_dim", "levels", "codes")
        model = RqVae(*(self.config[name] for name in names))
        model.load_state_dict({name: torch.tensor(a) for name, a in self.weights.items()})
        return model

    def save(self, folder: Path) -> None:
        """Write `codebook.safetensors` and `codebook.json` into a new folder, all or nothing.

        A folder that already holds this version is left as it is.

        Raises:
            LeadreError: the folder holds something else.
        """
        if folder.exists():
            if Codebook.load(folder).version != self.version:
                raise LeadreError(f"{folder}: holds another codebook; a codebook is never replaced")
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(self.weights, staged / "codebook.safetensors")
            manifest = {**self.config, "version": self.version}
            text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            (staged / "codebook.json").write_text(text, encoding="utf-8")
            staged.chmod(0o755)
            staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> Codebook:
        """Read a codebook that `save` wrote.

        Raises:
            LeadreError: a file is missing or damaged, or the weights are not those of the version.
        """
        try:
            config = json.loads((folder / "codebook.json").read_text(encoding="utf-8"))
            version = config.pop("version")
            codebook = cls(config, load_file(folder / "codebook.safetensors"))
            format_ = config["format"]
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise LeadreError(f"{folder}: no readable codebook: {error!r}") from error
        if format_ != FORMAT:
            raise LeadreError(f"{folder}: codebook of format {format_}, this code reads {FORMAT}")
        if codebook.version != version:
            raise LeadreError(
                f"{folder}: the weights hash to {codebook.version}, codebook.json says {version};"
                " restore the folder from its release"
            )
        return codebook


def train_codebook(
    embeddings: Vectors, settings: SemanticIdSettings, seed: int, text_encoder: str = ""
) -> Codebook:
    """Train an RQ-VAE on the CPU; the same inputs give the same codebook.

    The autoencoder warms up without codes, k-means on the residuals places the codes, and both
    train on together; codes that no ad uses move to where the error is largest.

    Args:
        embeddings: float32 [ads, dim], one row an ad.
        settings: sizes and training lengths.
        seed: of weights, batches and k-means.
        text_encoder: what made the embeddings; kept in the codebook's config for the record.

    Raises:
        LeadreError: there are no ads, or an embedding is not finite.
    """
    embeddings = _checked(embeddings)
    if not len(embeddings):
        raise LeadreError("Semantic IDs: no ads to train the codebook on")
    config = {
        "format": FORMAT,
        "dim": embeddings.shape[1],
        "text_encoder": text_encoder,
        **settings.model_dump(include={"hidden_dim", "latent_dim", "levels", "codes"}),
    }
    # With several threads, sums and so the weights would depend on how many there are.
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        names = ("dim", "hidden_dim", "latent_dim", "levels", "codes")
        model = RqVae(*(config[name] for name in names))
        data = torch.from_numpy(embeddings)
        model.mean.copy_(data.mean(0))
        model.scale.copy_((data - model.mean).std(correction=0).clamp_min(1e-6))
        _train(model, data, settings, seed)
    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    return Codebook(config, weights)


def _train(model: RqVae, data: torch.Tensor, settings: SemanticIdSettings, seed: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    warm_up = settings.epochs // 4
    for epoch in range(settings.epochs):
        if epoch == warm_up:
            _start_codes(model, data, seed)
        for batch in torch.randperm(len(data)).split(settings.batch_size):
            optimizer.zero_grad()
            model.loss(data[batch], settings.commitment, epoch >= warm_up).backward()
            optimizer.step()
        if warm_up <= epoch < settings.epochs - 1:
            _revive_dead_codes(model, data)


@torch.no_grad()
def _start_codes(model: RqVae, data: torch.Tensor, seed: int) -> None:
    """k-means on what each level is left with; spare codes (fewer ads than codes) repeat ads."""
    residual = model.latent(data).numpy()
    for level, codebook in enumerate(model.codebooks):
        points = np.resize(residual, (max(len(residual), len(codebook)), residual.shape[1]))
        kmeans = faiss.Kmeans(
            points.shape[1], len(codebook), niter=25, seed=seed + level, min_points_per_centroid=1
        )
        kmeans.train(np.ascontiguousarray(points, np.float32))
        centroids = np.array(kmeans.centroids, np.float32)
        codebook.copy_(torch.from_numpy(centroids))
        residual = residual - centroids[kmeans.index.search(residual, 1)[1][:, 0]]


@torch.no_grad()
def _revive_dead_codes(model: RqVae, data: torch.Tensor) -> None:
    """Move codes that no ad uses onto the residuals that their level fits worst."""
    codes, residuals, chosen = model.quantise(model.latent(data))
    for level, codebook in enumerate(model.codebooks):
        dead = (torch.bincount(codes[:, level], minlength=len(codebook)) == 0).nonzero()[:, 0]
        error = (residuals[:, level] - chosen[:, level]).square().sum(1)
        worst = error.topk(min(len(dead), len(error))).indices
        codebook[dead[: len(worst)]] = residuals[worst, level]


def assign(
    ad_ids: Sequence[str],
    codes: Codes,
    previous: pa.Table | None,
    collision_codes: int = 64,
    alternatives: Codes | None = None,
) -> Codes:
    """Full Semantic IDs: the codes and a last token that tells colliding ads apart.

    An ad in `previous` keeps its ID whatever its text is now. The others, in the order of ad ids,
    first take the nearest free code of the last level, where `alternatives` are given (as LC-Rec,
    arXiv 2311.09049, section 3.2, spreads collisions over the last level); then the smallest last
    token that no ad, past or present, has with the same codes.

    Args:
        ad_ids: distinct ids [n].
        codes: int32 [n, levels], what the codebook says of each ad.
        previous: columns `ad_id` (string) and `codes` (list of levels + 1 ints): all IDs so far.
        collision_codes: how many last tokens there are.
        alternatives: int32 [n, count], codes of the last level by preference.

    Returns:
        int32 [n, levels + 1], no two rows equal.

    Raises:
        LeadreError: an ad id occurs twice, `previous` is of another number of levels, or more ads
            collide than there are last tokens.
    """
    ids = pa.array(ad_ids, pa.string())
    if pc.count_distinct(ids).as_py() != len(ids):
        raise LeadreError("Semantic IDs: an ad id occurs twice in the catalogue")
    old_ids, old_codes = _previous(previous, codes.shape[1] + 1)
    row = pc.fill_null(pc.index_in(ids, old_ids), -1).to_numpy().astype(np.int64)
    order = pc.sort_indices(ids).to_numpy()
    new = order[row[order] < 0]
    fresh = codes[new]
    if alternatives is not None:
        fresh = _spread(fresh, alternatives[new], old_codes[:, :-1])

    base = _row_numbers(np.concatenate([old_codes[:, :-1], fresh]))
    tokens = _free_tokens(base[: len(old_codes)], old_codes[:, -1], base[len(old_codes) :])
    if len(tokens) and tokens.max() >= collision_codes:
        crowded = format_sid(fresh[tokens.argmax()][None])[0]
        raise LeadreError(
            f"Semantic IDs: more than {collision_codes} ads share the codes {crowded}: raise"
            " semantic_ids.collision_codes, or train a codebook with more codes or levels"
        )
    result = np.empty((len(ids), codes.shape[1] + 1), np.int32)
    result[row >= 0] = old_codes[row[row >= 0]]
    result[new] = np.column_stack([fresh, tokens])
    return result


def _previous(previous: pa.Table | None, width: int) -> tuple[pa.Array, Codes]:
    if previous is None or not previous.num_rows:
        return pa.array([], pa.string()), np.empty((0, width), np.int32)
    lists = previous["codes"].combine_chunks()
    if pc.any(pc.not_equal(pc.list_value_length(lists), width)).as_py():
        raise LeadreError(
            f"Semantic IDs: earlier IDs do not have {width} tokens; semantic_ids.levels has changed"
            " since the codebook was trained: set it back or start a new home"
        )
    values = lists.flatten().to_numpy().astype(np.int32).reshape(-1, width)
    return previous["ad_id"].combine_chunks().cast(pa.string()), values


def _row_numbers(rows: Codes) -> npt.NDArray[np.int64]:
    """One number a row [n], equal for equal rows."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _spread(codes: Codes, alternatives: Codes, taken: Codes) -> Codes:
    """Give each ad the nearest last-level code that no ad before it has, by deferred acceptance.

    Every round all ads ask for their current choice, the first ad keeps it, the others go on to
    their next one. An ad that finds all its alternatives taken stays with its nearest code.
    """
    prefix = _row_numbers(np.concatenate([taken[:, :-1], codes[:, :-1]]))
    width = max(taken.max(initial=0), codes.max(initial=0), alternatives.max(initial=0)) + 1
    held = prefix[: len(taken)] * width + taken[:, -1]
    prefix, rows = prefix[len(taken) :], np.arange(len(codes))
    choice = np.zeros(len(codes), np.int64)
    asking = np.ones(len(codes), bool)
    while True:
        slot = prefix * width + alternatives[rows, choice]
        winners = rows[asking][np.unique(slot[asking], return_index=True)[1]]
        lost = asking & ~(np.isin(rows, winners) & ~np.isin(slot, held))
        if not lost.any():
            return np.column_stack([codes[:, :-1], alternatives[rows, choice]]).astype(np.int32)
        choice[lost] += 1
        asking &= choice < alternatives.shape[1]
        choice[~asking] = 0


def _free_tokens(
    used_base: npt.NDArray[np.int64], used_token: Codes, new_base: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """For each new ad, in order, the smallest token not in use with its base.

    A base with m new and u used ads has its m free tokens among 0 … m + u - 1.
    """
    groups, wanted = np.unique(new_base, return_counts=True)
    used = np.bincount(used_base, minlength=new_base.max(initial=-1) + 1)[groups]
    group = np.repeat(groups, wanted + used)
    token = _cumcount(group)
    width = max(token.max(initial=0), used_token.max(initial=0)) + 1
    free = ~np.isin(group * width + token, used_base * width + used_token.astype(np.int64))
    group, token = group[free], token[free]
    taken = _cumcount(group) < np.repeat(wanted, np.bincount(group)[groups])
    result = np.empty(len(new_base), np.int64)
    result[np.argsort(new_base, kind="stable")] = token[taken]
    return result


def _cumcount(group: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Position of each element in its run of equal, adjacent elements."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def format_sid(codes: Codes) -> list[str]:
    """Codes int [n, tokens] → `<a_12><b_6>…`, one string a row."""
    columns = [
        pc.binary_join_element_wise(f"<{letter}_", pa.array(column).cast(pa.string()), ">", "")
        for letter, column in zip(string.ascii_lowercase, np.asarray(codes).T, strict=False)
    ]
    return pc.binary_join_element_wise(*columns, "").to_pylist()


def parse_sid(text: str) -> tuple[int, ...]:
    """The codes of one written Semantic ID.

    Raises:
        LeadreError: the text is none, or its letters are not a, b, c, … in order.
    """
    tokens = _TOKEN.findall(text)
    letters = "".join(letter for letter, _ in tokens)
    whole = "".join(f"<{letter}_{code}>" for letter, code in tokens) == text
    if not tokens or not whole or letters != string.ascii_lowercase[: len(tokens)]:
        raise LeadreError(f"{text!r} is no Semantic ID: expected such as <a_12><b_6><c_22><d_0>")
    return tuple(int(code) for _, code in tokens)


def code_usage(codes: Codes, sizes: Sequence[int]) -> dict[str, Any]:
    """How well a catalogue uses the codes.

    Args:
        codes: int [ads, levels or more]; columns after the levels (the last token) do not count.
        sizes: codes of each level.

    Returns:
        `ads`; `collision_rate`: 1 - distinct IDs / ads, before the last token;
        `largest_collision`: ads of the most crowded ID; `levels`: for each, `level` (its letter),
        `size`, `used` (codes), `used_share` and `entropy` (bits, at most log2 of `size`).
    """
    bases = np.asarray(codes)[:, : len(sizes)]
    if not len(bases):
        return {"ads": 0, "collision_rate": 0.0, "largest_collision": 0, "levels": []}
    crowd = np.unique(bases, axis=0, return_counts=True)[1]
    levels = []
    for letter, column, size in zip(string.ascii_lowercase, bases.T, sizes, strict=False):
        share = np.unique(column, return_counts=True)[1] / len(column)
        levels.append(
            {
                "level": letter,
                "size": int(size),
                "used": len(share),
                "used_share": len(share) / size,
                "entropy": float(-(share * np.log2(share)).sum()),
            }
        )
    return {
        "ads": len(bases),
        "collision_rate": 1 - len(crowd) / len(bases),
        "largest_collision": int(crowd.max()),
        "levels": levels,
    }


def _checked(embeddings: Vectors, dim: int | None = None) -> Vectors:
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    if embeddings.ndim != 2 or (dim is not None and embeddings.shape[1] != dim):
        expected = "[ads, dim]" if dim is None else f"[ads, {dim}]"
        raise LeadreError(
            f"Semantic IDs: expected embeddings {expected}, got {list(embeddings.shape)}; the"
            " codebook and the embeddings must come from the same embedding.model"
        )
    if not np.isfinite(embeddings).all():
        raise LeadreError("Semantic IDs: an embedding holds a value that is not finite")
    return embeddings


@contextmanager
def _one_thread() -> Iterator[None]:
    torch_threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        faiss.omp_set_num_threads(faiss_threads)
