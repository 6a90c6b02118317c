"""Residual quantisers: embeddings → one code a level, by four methods behind one interface.

| method | codes live in | how they are found |
| --- | --- | --- |
| `rq-vae` | the latent space of an autoencoder | trained with it, from a k-means start |
| `rq-kmeans` | the embedding space | k-means on what each level is left with |
| `rq-kmeans-balanced` | the embedding space | the same, each code as often as the others |
| `rq-kmeans+` | the embedding space | a k-means start, then trained with a residual encoder |

RQ-VAE: the paper (arXiv 2411.13789), section 3.2, on text embeddings after TIGER (arXiv 2305.05065,
section 3.1); k-means start and revival of dead codes after SoundStream (arXiv 2107.03312, section
III-C). RQ-KMeans+: GPR (arXiv 2511.10138). Balance: entropic optimal transport (Sinkhorn; Cuturi,
arXiv 1306.0895), of which the prices of the codes are kept, so that the code of an ad depends on
its own embedding alone and not on the ads beside it.

A codebook is refreshed by k-means in its own space, with the codes of all but a few vectors held:
its numbers go on to mean what they meant, and follow what they are given to.

Knows nothing of where embeddings come from, of ads, or of the last token of a Semantic ID.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from leadre_lib.errors import LeadreError
from leadre_lib.settings import SemanticIdSettings

Vectors = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]

FORMAT = 2
AUTOENCODERS = ("rq-vae", "rq-kmeans+")
CHUNK = 8192  # embeddings that are encoded at once
VECTORS_PER_CODE = 256  # training learns from no more of them, drawn evenly
MOST_CODES = 256  # of a level whose size is left to the catalogue, as the paper has it
FOUR_LEVELS = 200_000  # objects from which on three levels are too few
REFIT_ROUNDS = 10  # of k-means a level
BALANCING_ROUNDS = 8  # of prices and centroids in turn
BALANCED_PER_CODE = 64  # vectors that the prices are made for
SINKHORN_STEPS = 30
NOTHING = 1e-8  # of the spread of all embeddings
UNUSED = 1e6  # price of a code that was added and that nobody has yet
SINKHORN_TEMPERATURES = (0.1, 0.005)  # first and last round, of the mean squared distance


class ResidualQuantiser(nn.Module):
    """Encoder and decoder, where the method has them, and one codebook a level on the residuals.

    `prices` [levels, codes] are added to the squared distances: 0 but for the balanced method.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    prices: torch.Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, hidden, self.method = config["dim"], config["hidden_dim"], config["method"]
        latent = config["latent_dim"] if self.method == "rq-vae" else dim
        self.encoder: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()
        if self.method == "rq-vae":
            self.encoder, self.decoder = _mlp(dim, hidden, latent), _mlp(latent, hidden, dim)
        elif self.method == "rq-kmeans+":
            self.encoder, self.decoder = _Shift(dim, hidden), _Shift(dim, hidden)
        levels, codes = config["levels"], config["codes"]
        self.codebooks = nn.Parameter(torch.zeros(levels, codes, latent))
        self.register_buffer("prices", torch.zeros(levels, codes))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    def normalised(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, dim] with the mean of the training set at 0 and its spread at 1."""
        return (embeddings - self.mean) / self.scale

    def latent(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, dim] → latent vectors [n, latent]."""
        return self.encoder(self.normalised(embeddings))

    def costs(self, residual: torch.Tensor, level: int) -> torch.Tensor:
        """Squared distance and price of every code of a level, [n, codes]."""
        return torch.cdist(residual, self.codebooks[level]).square() + self.prices[level]

    def quantise(
        self, latent: torch.Tensor, held: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The cheapest code of each level, on what the levels before have left.

        Args:
            latent: [n, latent].
            held: int64 [n, levels], codes to be taken whatever they cost; -1: the cheapest.

        Returns:
            codes [n, levels]; the residual before each level [n, levels, latent]; and the chosen
            codes' vectors [n, levels, latent]. Residuals carry gradients to the encoder only.
        """
        codes, residuals, chosen = [], [], []
        residual = latent
        for level, codebook in enumerate(self.codebooks):
            with torch.no_grad():
                code = self.costs(residual, level).argmin(1)
                if held is not None:
                    code = torch.where(held[:, level] < 0, code, held[:, level])
            vector = codebook[code]
            codes.append(code)
            residuals.append(residual)
            chosen.append(vector)
            residual = residual - vector.detach()
        return torch.stack(codes, 1), torch.stack(residuals, 1), torch.stack(chosen, 1)

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [n, levels] say of the normalised embeddings, [n, dim]."""
        chosen = [codebook[code] for codebook, code in zip(self.codebooks, codes.T, strict=True)]
        return self.decoder(torch.stack(chosen).sum(0))

    def ranking(self, embeddings: torch.Tensor) -> torch.Tensor:
        """All codes of the last level, cheapest for each embedding's last residual first."""
        _, residuals, _ = self.quantise(self.latent(embeddings))
        last = len(self.codebooks) - 1
        return self.costs(residuals[:, -1], last).argsort(dim=1, stable=True)

    def loss(
        self,
        embeddings: torch.Tensor,
        commitment: float,
        quantised: bool,
        held: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Reconstruction error, plus codebook and commitment errors once codes are in use."""
        target = self.normalised(embeddings)
        latent = self.encoder(target)
        if not quantised:
            return nn.functional.mse_loss(self.decoder(latent), target)
        _, residuals, chosen = self.quantise(latent, held)
        straight_through = latent + (chosen.sum(1) - latent).detach()
        return (
            nn.functional.mse_loss(self.decoder(straight_through), target)
            + nn.functional.mse_loss(chosen, residuals.detach())
            + commitment * nn.functional.mse_loss(residuals, chosen.detach())
        )


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class _Shift(nn.Module):
    """The identity at first, and a learnt shift away from it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.shift = _mlp(dim, hidden, dim)
        for parameter in self.shift[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors + self.shift(vectors)


@dataclass(frozen=True)
class Codebook:
    """A trained quantiser, frozen: its method, its sizes and its weights."""

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

    @property
    def error(self) -> float:
        """Mean of `errors` over the objects that it was made for, when it came into use."""
        return float(self.config["error"])

    @property
    def collision_rate(self) -> float:
        """Share of the objects whose IDs collided before the last token, when it came into use.

        What a refresh could not cure is no reason for the next one.
        """
        return float(self.config.get("collision_rate", 0.0))

    def in_use(self, embeddings: Vectors, codes: Codes) -> Codebook:
        """This codebook, with the error and the collisions of the IDs that objects really have."""
        levels = np.asarray(codes)[:, : self.config["levels"]]
        colliding = 1 - len(np.unique(levels, axis=0)) / len(levels)
        told = {
            "error": round(float(self.errors(embeddings, codes).mean()), 6),
            "collision_rate": round(colliding, 6),
        }
        return Codebook({**self.config, **told}, self.weights)

    def errors(self, embeddings: Vectors, codes: Codes) -> npt.NDArray[np.float64]:
        """How badly codes say what embeddings are: 0 exactly, 1 no better than the mean of all.

        Args:
            embeddings: float32 [n, dim].
            codes: int [n, levels or more]; columns after the levels (the last token) do not count.

        Returns:
            [n], the mean squared difference of the normalised embedding and its reconstruction.

        Raises:
            LeadreError: as `encode`.
        """
        embeddings = _checked(embeddings, self.config["dim"])
        levels = torch.from_numpy(np.asarray(codes)[:, : self.config["levels"]].astype(np.int64))
        model = self._model.double()
        with torch.no_grad():
            chunks = [
                (model.normalised(chunk.double()) - model.reconstruct(part)).square().mean(1)
                for chunk, part in zip(
                    torch.from_numpy(embeddings).split(CHUNK), levels.split(CHUNK), strict=True
                )
            ]
        return torch.cat(chunks).numpy()

    def encode(self, embeddings: Vectors) -> Codes:
        """Codes int32 [n, levels] of embeddings float32 [n, dim].

        In double precision, so that a code does not hang on what else is in the batch.

        Raises:
            LeadreError: embeddings of another encoder (other dimensions) or not finite.
        """
        embeddings = _checked(embeddings, self.config["dim"])
        model = self._model.double()
        with torch.no_grad():
            chunks = [
                model.quantise(model.latent(chunk.double()))[0]
                for chunk in torch.from_numpy(embeddings).split(CHUNK)
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
                for chunk in torch.from_numpy(embeddings).split(CHUNK)
            ]
        return torch.cat(chunks).numpy().astype(np.int32)

    def centroids(self) -> list[Vectors]:
        """One float32 [codes, latent] a level: the codes' vectors, in the latent space."""
        return [np.array(level, np.float32) for level in self.weights["codebooks"]]

    @cached_property
    def _model(self) -> ResidualQuantiser:
        model = ResidualQuantiser(self.config)
        model.load_state_dict(self.state())
        return model

    def state(self) -> dict[str, torch.Tensor]:
        """The weights as tensors of their own."""
        return {name: torch.tensor(array) for name, array in self.weights.items()}

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
            raise LeadreError(
                f"{folder}: codebook of format {format_}, this code reads {FORMAT}: start in a new"
                " LEADRE_HOME"
            )
        if codebook.version != version:
            raise LeadreError(
                f"{folder}: the weights hash to {codebook.version}, codebook.json says {version};"
                " restore the folder from its release"
            )
        return codebook


def catalogue_sizes(objects: int, settings: SemanticIdSettings) -> tuple[int, int]:
    """Levels, and codes of each, for a catalogue; what the settings name stays as they name it.

    Codes: the power of two from twice the root of the number of objects on, at most 256 (the
    paper, section 3.2). Levels: three, or four for a catalogue that three times 256 codes would
    crowd.
    """
    needed = 1 << math.ceil(math.log2(2 * math.sqrt(max(objects, 64))))
    codes = settings.codes or min(needed, MOST_CODES)
    return settings.levels or (3 if objects <= FOUR_LEVELS else 4), codes


def train_codebook(
    embeddings: Vectors,
    settings: SemanticIdSettings,
    seed: int,
    text_encoder: str = "",
) -> Codebook:
    """Train a quantiser on the CPU; the same inputs give the same codebook.

    Args:
        embeddings: float32 [n, dim], one row an object.
        settings: method, sizes and training lengths.
        seed: of weights, batches, k-means, and of the vectors drawn where there are many.
        text_encoder: what made the embeddings; kept in the codebook's config for the record.

    Raises:
        LeadreError: there are no embeddings, or one is not finite.
    """
    embeddings = _checked(embeddings)
    if not len(embeddings):
        raise LeadreError("Semantic IDs: no objects to train the codebook on")
    levels, codes = catalogue_sizes(len(embeddings), settings)
    config: dict[str, Any] = {
        "format": FORMAT,
        "dim": embeddings.shape[1],
        "text_encoder": text_encoder,
        **settings.model_dump(include={"method", "hidden_dim", "latent_dim"}),
        "levels": levels,
        "codes": codes,
        "refreshed_from": "",
    }
    # With several threads, sums and so the weights would depend on how many there are.
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model, data = ResidualQuantiser(config), torch.from_numpy(embeddings)
        drawn = torch.randperm(len(data))[: _most(codes)]
        data = data[drawn.sort().values]
        model.mean.copy_(data.mean(0))
        model.scale.copy_((data - model.mean).std(correction=0).clamp_min(1e-6))
        _TRAINERS[settings.method](model, data, settings, seed)
    trained = Codebook(config, _arrays(model))
    return trained.in_use(data.numpy(), trained.encode(data.numpy()))


def refit_codebook(
    codebook: Codebook,
    embeddings: Vectors,
    codes: Codes,
    free: npt.NDArray[np.bool_],
    settings: SemanticIdSettings,
    seed: int,
) -> Codebook:
    """Refresh a codebook for another catalogue, with the codes of most objects held.

    Held vectors stay with their codes, free ones go to the cheapest, codes that nobody has move to
    the free vectors that fit worst. Then every code moves to the mean of what it has, level by
    level; the methods with an autoencoder train it on instead.

    Args:
        codebook: the one to start from; method and levels stay, and each code keeps its number.
            There are more codes where the catalogue has outgrown them (`catalogue_sizes`).
        embeddings: float32 [n, dim], one row an object.
        codes: int [n, levels or more], what the objects have; those of free ones do not count.
        free: bool [n].
        seed: of the batches, and of the vectors drawn where there are many.

    Raises:
        LeadreError: as `Codebook.encode`.
    """
    embeddings = _checked(embeddings, codebook.config["dim"])
    wider = max(codebook.config["codes"], catalogue_sizes(len(embeddings), settings)[1])
    config = {**codebook.config, "codes": wider, "refreshed_from": codebook.version}
    drawn = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[: _most(wider)])
    data = torch.from_numpy(embeddings[drawn])
    levels = torch.from_numpy(np.asarray(codes)[drawn, : config["levels"]].astype(np.int64))
    held = torch.where(torch.from_numpy(free[drawn])[:, None], -1, levels)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = ResidualQuantiser(config)
        model.load_state_dict(_widened(codebook.state(), wider))
        if config["method"] in AUTOENCODERS:
            _train_on(model, data, settings, held)
        else:
            _refit_levels(model, data, held)
    return Codebook(config, _arrays(model))


def _most(codes: int) -> int:
    """How many vectors teach so many codes a level."""
    return VECTORS_PER_CODE * codes


def _train_on(
    model: ResidualQuantiser, data: torch.Tensor, settings: SemanticIdSettings, held: torch.Tensor
) -> None:
    """Train an autoencoder on with codes held: encoder and decoder learn to live with them."""
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    for _ in range(_epochs(len(data), settings)):
        _revive_dead_codes(model, data, held)
        _epoch(model, data, settings, optimizer, quantised=True, held=held)


@torch.no_grad()
def _refit_levels(model: ResidualQuantiser, data: torch.Tensor, held: torch.Tensor) -> None:
    """k-means level by level, of the vectors whose codes are not held."""
    residual = torch.cat([model.latent(chunk) for chunk in data.split(CHUNK)])
    loose = (held[:, 0] < 0).nonzero()[:, 0]
    for level, vectors in enumerate(model.codebooks):
        code = held[:, level].clone()
        for _ in range(REFIT_ROUNDS):
            _refit_level(model, level, residual, code, loose)
        residual = residual - vectors[code]


def _refit_level(
    model: ResidualQuantiser,
    level: int,
    residual: torch.Tensor,
    code: torch.Tensor,
    loose: torch.Tensor,
) -> None:
    """One round of k-means on a level, in place: `code` [n] of the rows `loose`, then centroids."""
    vectors = model.codebooks[level]
    chunks = [model.costs(part, level).min(1) for part in residual[loose].split(CHUNK)]
    if chunks:
        code[loose] = torch.cat([chunk.indices for chunk in chunks])
        dead = (torch.bincount(code, minlength=len(vectors)) == 0).nonzero()[:, 0]
        error = (residual[loose] - vectors[code[loose]]).square().sum(1)
        worst = error.topk(min(len(dead), len(error))).indices
        code[loose[worst]] = dead[: len(worst)]
        _open(model, level, dead[: len(worst)])
    counts = torch.bincount(code, minlength=len(vectors))[:, None]
    sums = torch.zeros_like(vectors).index_add_(0, code, residual)
    vectors.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), vectors))


def _widened(state: dict[str, torch.Tensor], codes: int) -> dict[str, torch.Tensor]:
    """The state with more codes, too dear for anybody until they are revived."""
    levels, old, width = state["codebooks"].shape
    return {
        **state,
        "codebooks": torch.cat([state["codebooks"], torch.zeros(levels, codes - old, width)], 1),
        "prices": torch.cat([state["prices"], torch.full((levels, codes - old), UNUSED)], 1),
    }


def _open(model: ResidualQuantiser, level: int, codes: torch.Tensor) -> None:
    """Give revived codes the mean price of those in use, so that they can be taken."""
    prices = model.prices[level]
    prices[codes] = prices[prices < UNUSED].mean()


def _arrays(model: ResidualQuantiser) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def _train_vae(
    model: ResidualQuantiser, data: torch.Tensor, settings: SemanticIdSettings, seed: int
) -> None:
    """The autoencoder warms up without codes, k-means on the residuals places the codes, and both
    train on together."""
    epochs = _epochs(len(data), settings)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    warm_up = epochs // 4
    for _ in range(warm_up):
        _epoch(model, data, settings, optimizer, quantised=False)
    _place_codes(model, data, seed)
    _train_codes(model, data, settings, optimizer, epochs - warm_up)


def _train_kmeans(
    model: ResidualQuantiser, data: torch.Tensor, settings: SemanticIdSettings, seed: int
) -> None:
    """k-means alone."""
    _place_codes(model, data, seed)


def _train_balanced(
    model: ResidualQuantiser, data: torch.Tensor, settings: SemanticIdSettings, seed: int
) -> None:
    """k-means, then prices for the codes and centroids for what they win, in turn."""
    _place_codes(model, data, seed, balanced=True)


def _train_plus(
    model: ResidualQuantiser, data: torch.Tensor, settings: SemanticIdSettings, seed: int
) -> None:
    """k-means places the codes; they and a residual encoder, at first the identity, train on."""
    _place_codes(model, data, seed)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    _train_codes(model, data, settings, optimizer, _epochs(len(data), settings))


_TRAINERS = {
    "rq-vae": _train_vae,
    "rq-kmeans": _train_kmeans,
    "rq-kmeans-balanced": _train_balanced,
    "rq-kmeans+": _train_plus,
}


def _epochs(vectors: int, settings: SemanticIdSettings) -> int:
    return max(4, min(settings.epochs, settings.max_vectors // vectors))


def _train_codes(
    model: ResidualQuantiser,
    data: torch.Tensor,
    settings: SemanticIdSettings,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> None:
    for epoch in range(epochs):
        _epoch(model, data, settings, optimizer, quantised=True)
        if epoch < epochs - 1:
            _revive_dead_codes(model, data)


def _epoch(
    model: ResidualQuantiser,
    data: torch.Tensor,
    settings: SemanticIdSettings,
    optimizer: torch.optim.Optimizer,
    quantised: bool,
    held: torch.Tensor | None = None,
) -> None:
    for batch in torch.randperm(len(data)).split(settings.batch_size):
        optimizer.zero_grad()
        own = None if held is None else held[batch]
        model.loss(data[batch], settings.commitment, quantised, own).backward()
        optimizer.step()


@torch.no_grad()
def _place_codes(
    model: ResidualQuantiser, data: torch.Tensor, seed: int, balanced: bool = False
) -> None:
    """k-means on what each level is left with; codes beyond the number of vectors repeat some."""
    residual = model.latent(data)
    for level, codebook in enumerate(model.codebooks):
        points = np.resize(residual.numpy(), (max(len(residual), len(codebook)), codebook.shape[1]))
        kmeans = faiss.Kmeans(
            points.shape[1], len(codebook), niter=25, seed=seed + level, min_points_per_centroid=1
        )
        kmeans.train(np.ascontiguousarray(points, np.float32))
        codebook.copy_(torch.from_numpy(np.array(kmeans.centroids, np.float32)))
        if balanced:
            _balance(model, level, residual)
        residual = residual - codebook[model.costs(residual, level).argmin(1)]


@torch.no_grad()
def _balance(model: ResidualQuantiser, level: int, points: torch.Tensor) -> None:
    """Move a level's prices until each code wins as many points as the others, and its centroid to
    the points that it wins, in turn.

    The prices are the potentials of entropic optimal transport from the points to the codes, both
    with even weights: at its fixed point the soft assignment of all points is balanced. Each round
    is colder, so that the soft assignment ends close to the hard one.
    """
    codebook, prices = model.codebooks[level], model.prices[level]
    some = points[:: max(1, len(points) // (BALANCED_PER_CODE * len(codebook)))]
    if torch.cdist(some, codebook).square().mean() < NOTHING:
        return  # a level on which nothing is left to tell apart
    even = torch.tensor(len(some) / len(codebook))
    for heat in np.geomspace(*SINKHORN_TEMPERATURES, BALANCING_ROUNDS):
        distances = torch.cdist(some, codebook).square()
        temperature = float(heat) * distances.mean()
        for _ in range(SINKHORN_STEPS):
            shares = torch.softmax(-(distances + prices) / temperature, dim=1).sum(0)
            prices += temperature * (shares.clamp_min(1e-6).log() - even.log())
        _centre(model, level, points)


def _centre(model: ResidualQuantiser, level: int, points: torch.Tensor) -> None:
    """Move each code of a level to the mean of the points that it wins."""
    codebook = model.codebooks[level]
    winner = torch.cat([model.costs(part, level).argmin(1) for part in points.split(CHUNK)])
    counts = torch.bincount(winner, minlength=len(codebook))[:, None]
    sums = torch.zeros_like(codebook).index_add_(0, winner, points)
    codebook.copy_(torch.where(counts > 0, sums / counts.clamp_min(1), codebook))


@torch.no_grad()
def _revive_dead_codes(
    model: ResidualQuantiser, data: torch.Tensor, held: torch.Tensor | None = None
) -> None:
    """Move codes that nobody has onto the residuals, not held ones, that their level fits worst."""
    codes, residuals, chosen = model.quantise(model.latent(data), held)
    for level, codebook in enumerate(model.codebooks):
        dead = (torch.bincount(codes[:, level], minlength=len(codebook)) == 0).nonzero()[:, 0]
        error = (residuals[:, level] - chosen[:, level]).square().sum(1)
        if held is not None:
            error = error.where(held[:, level] < 0, -1.0)
        worst = error.topk(min(len(dead), int((error >= 0).sum()))).indices
        codebook[dead[: len(worst)]] = residuals[worst, level]
        _open(model, level, dead[: len(worst)])


def _checked(embeddings: Vectors, dim: int | None = None) -> Vectors:
    embeddings = np.ascontiguousarray(embeddings, np.float32)
    if embeddings.ndim != 2 or (dim is not None and embeddings.shape[1] != dim):
        expected = "[n, dim]" if dim is None else f"[n, {dim}]"
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
