"""The decoder and its tokenizer: a small Qwen2 from scratch, or any causal language model.

One Semantic ID is written as one token a level, `<a_12><b_6><c_22><d_0>`: the letter is the level,
the number the code, the last level tells apart ads whose other codes collide. This module owns that
spelling, the vocabulary, the initial weights, and the folder that holds a model.

It does not know what a prompt says, how a model is trained or how it is decoded.
"""

from __future__ import annotations

import json
import re
import shutil
import string
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from threadpoolctl import threadpool_limits
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from leadre_lib.errors import LeadreError
from leadre_lib.settings import ModelSettings

EOS_TOKEN = "<|endoftext|>"  # noqa: S105
PAD_TOKEN = "<|pad|>"  # noqa: S105
disable_progress_bar()  # a bar for every file read or written drowns a job's log
SID_PATTERN = re.compile(r"<([a-z])_(\d+)>")


class ModelError(LeadreError):
    """A model folder is missing, damaged or of the wrong kind."""


@dataclass(frozen=True)
class Meanings:
    """What tokens of a new model stand for.

    Attributes:
        sid_vectors: float [SID tokens, width], in the order of `sid_tokens`, such as the centroids
            of codes; a row that is not finite says nothing.
        texts: such as tell what words stand for.
        semantic_ids: int [texts, levels], the rows of `sid_vectors` that make the Semantic ID of
            each text; it means their sum.
    """

    sid_vectors: np.ndarray
    texts: Sequence[str] = ()
    semantic_ids: np.ndarray = field(default_factory=lambda: np.empty((0, 1), np.int64))

    def __post_init__(self) -> None:
        """Raises LeadreError where texts and Semantic IDs are not as many."""
        if len(self.texts) != len(self.semantic_ids):
            raise LeadreError(f"{len(self.texts)} texts for {len(self.semantic_ids)} Semantic IDs")

    def of_tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """What each token stands for, float64 [tokens, width]; NaN where nothing is known.

        A token of words stands for the texts that it occurs in: the mean of what they mean, less
        the mean of all. Special tokens stand for nothing.
        """
        sids = _sid_tokens_of(tokenizer)
        if len(sids) != len(self.sid_vectors):
            raise LeadreError(f"{len(self.sid_vectors)} vectors for {len(sids)} Semantic ID tokens")
        vectors = np.full((len(tokenizer), self.sid_vectors.shape[1]), np.nan)
        if len(self.texts):
            occurs = _occurrences(self.texts, tokenizer)
            count = occurs.sum(axis=0)
            levels = np.arange(len(self.texts) + 1) * self.semantic_ids.shape[1]
            codes = sparse.csr_array(
                (np.ones(self.semantic_ids.size), self.semantic_ids.ravel(), levels),
                shape=(len(self.texts), len(sids)),
            )
            share = (occurs.T @ codes).toarray()[count > 0] / count[count > 0, None]
            share -= codes.mean(axis=0)
            vectors[count > 0] = share @ np.nan_to_num(self.sid_vectors.astype(np.float64))
        vectors[tokenizer.all_special_ids] = np.nan
        vectors[_token_ids(tokenizer, sids)] = self.sid_vectors
        return vectors


def _occurrences(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> sparse.csr_array:
    """1 where a text has a token, however often, [texts, tokens]."""
    from sklearn.feature_extraction.text import CountVectorizer  # a second that ranks do without

    counter = CountVectorizer(
        analyzer=tokenizer.tokenize, vocabulary=tokenizer.get_vocab(), binary=True
    )
    return sparse.csr_array(counter.transform(texts))


def sid_tokens(sizes: Sequence[int]) -> list[str]:
    """Spell every Semantic ID token, level by level: `sizes[l]` codes at level `l`.

    The last level is the disambiguation token. The order is that of all per-token arrays.
    """
    if len(sizes) > len(string.ascii_lowercase):
        raise LeadreError(f"{len(sizes)} levels: a Semantic ID can have 26 at most")
    return [
        f"<{letter}_{code}>"
        for letter, size in zip(string.ascii_lowercase, sizes, strict=False)
        for code in range(size)
    ]


def sid_token_ids(tokenizer: PreTrainedTokenizerBase, sizes: Sequence[int]) -> list[np.ndarray]:
    """The token id of each code, one int64 array [sizes[l]] a level.

    Raises:
        ModelError: the tokenizer lacks one of the tokens; the message names it.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = sid_tokens(sizes)
    missing = next((token for token in tokens if token not in vocabulary), None)
    if missing is not None:
        raise ModelError(f"the tokenizer has no token {missing}: it is of another codebook")
    ids = np.array(_token_ids(tokenizer, tokens), np.int64)
    return np.split(ids, np.cumsum(sizes)[:-1])


def sid_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all Semantic ID tokens that the tokenizer has."""
    return set(_token_ids(tokenizer, _sid_tokens_of(tokenizer)))


def build_tokenizer(
    texts: Iterable[str],
    sid_vocab: Sequence[str],
    vocabulary: int,
    phrases: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocabulary` tokens on `texts`, and add one token a SID code.

    Byte level: every string is encoded without an unknown token, and decodes back exactly where no
    phrase is in it that mixes ASCII with other Latin letters. The same texts in the same order give
    the same tokenizer.

    Args:
        phrases: texts that get a token of their own, such as the fixed words of prompts.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Semantic IDs are tokens of their own; merges inside them would waste the vocabulary.
    fixed = re.compile("|".join([SID_PATTERN.pattern, *map(re.escape, phrases)]))
    bpe.train_from_iterator((fixed.sub(" ", text) for text in texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        truncation_side="left",
        clean_up_tokenization_spaces=False,
    )
    _add_tokens(tokenizer, [*phrases, *sid_vocab])
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add the tokens that are not there yet; return the ids of the new ones."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in new])
    return _token_ids(tokenizer, new)


def _token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def build_model(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    meanings: Meanings | None = None,
) -> PreTrainedModel:
    """Build a Qwen2 with grouped-query attention and tied embeddings, in float32, untrained.

    Args:
        settings: sizes.
        tokenizer: gives the vocabulary.
        seed: of the initial weights.
        meanings: what tokens stand for. Their embeddings start as the principal components of
            that, those of which nothing is known at random.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_tokens,
        tie_word_embeddings=True,
        initializer_range=settings.initializer_range,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    if meanings is not None:
        with threadpool_limits(1):  # the same sums on any number of cores
            vectors = meanings.of_tokens(tokenizer)
            start = _project(vectors, _levels(tokenizer), settings.hidden_size)
        _set_rows(model, start * config.initializer_range)
    return model


def _sid_tokens_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's SID tokens in the order of `sid_tokens`."""
    found = [m for m in map(SID_PATTERN.fullmatch, tokenizer.get_vocab()) if m]
    return [m[0] for m in sorted(found, key=lambda m: (m[1], int(m[2])))]


def _levels(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The letter of each token's level; of words none."""
    levels = np.full(len(tokenizer), "")
    tokens = _sid_tokens_of(tokenizer)
    levels[_token_ids(tokenizer, tokens)] = [token[1] for token in tokens]
    return levels


def _project(vectors: np.ndarray, levels: np.ndarray, width: int) -> np.ndarray:
    """Principal components [rows, width] with standard deviation 1 in each level, words being one;
    0 where there are no more of them, NaN where a vector is not finite.

    Residual codebooks shrink from level to level; scaling each by itself lets all be heard.
    """
    finite = np.isfinite(vectors).all(axis=1)
    projected = np.full((len(vectors), width), np.nan)
    if not finite.any():
        return projected
    kept = vectors[finite] - vectors[finite].mean(axis=0)
    _, _, components = np.linalg.svd(kept, full_matrices=False)
    components *= np.sign(components[:, np.abs(components).argmax(axis=1)].diagonal())[:, None]
    components = components[:width]
    projected[finite] = 0.0
    projected[np.ix_(finite, np.arange(len(components)))] = kept @ components.T
    for level in np.unique(levels):
        rows = finite & (levels == level)
        if rows.any() and (spread := projected[rows].std()) > 0:
            projected[rows] /= spread
    return projected


def _set_rows(model: PreTrainedModel, rows: np.ndarray) -> None:
    """Write the finite rows of [tokens, hidden] into the (tied) input embeddings."""
    finite = np.isfinite(rows).all(axis=1)
    weight = _weight(model.get_input_embeddings())
    with torch.no_grad():
        weight[torch.as_tensor(finite)] = torch.as_tensor(rows[finite], dtype=weight.dtype)


def _weight(layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def load_base(path_or_hub_id: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model and its fast tokenizer, in float32, without remote code.

    Raises:
        ModelError: neither a folder with such a model nor a hub id that can be fetched.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_hub_id, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(
            path_or_hub_id, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.base {path_or_hub_id!r}: neither a folder with a causal language model nor a"
            f" hub id that can be fetched ({reason})"
        ) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ModelError(f"model.base {path_or_hub_id!r}: needs a fast tokenizer with an EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"
    return model, tokenizer


def add_sid_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sid_vocab: Sequence[str],
    seed: int,
    spread: float = 0.1,
) -> int:
    """Add the SID tokens that are missing and give them embeddings; return how many were new.

    A new row, of the input and of an untied output embedding, is the mean of the old rows plus
    noise of `spread` times their standard deviation: a mean alone would make all codes alike.
    """
    new = _add_tokens(tokenizer, sid_vocab)
    if not new:
        return 0
    old_size = _weight(model.get_input_embeddings()).shape[0]
    used = min(new[0], old_size)
    if len(tokenizer) > old_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    weights = [_weight(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    with torch.no_grad():
        for weight in {id(w): w for w in weights}.values():
            old = weight[:used].float()
            noise = torch.randn(len(new), weight.shape[1], generator=generator)
            weight[torch.tensor(new)] = (old.mean(0) + spread * old.std(0) * noise).to(weight.dtype)
    return len(new)


def follow_alignment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sequence[int],
    shares: Sequence[np.ndarray],
    seed: int,
) -> None:
    """Let the embeddings of SID tokens follow their codes to a refreshed codebook.

    The embedding of a code becomes the mean of those that its objects had before. A code that is
    what it was keeps its embedding exactly; tokens that the model lacks are added first.

    Args:
        sizes: codes of each level after the refresh, the last token's among them.
        shares: what `semantic_ids.alignment` gives, one array [codes, codes before] a level; levels
            without one, such as the last token's, stay as they are.
        seed: of the start of added tokens.
    """
    add_sid_tokens(model, tokenizer, sid_tokens(sizes), seed)
    weights = [_weight(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    for ids, share in zip(sid_token_ids(tokenizer, sizes), shares, strict=False):
        told = torch.as_tensor(ids[share.any(axis=1)])
        mix = torch.as_tensor(share[share.any(axis=1)])
        with torch.no_grad():
            for weight in {id(w): w for w in weights}.values():
                before = weight[torch.as_tensor(ids[: share.shape[1]])]
                weight[told] = (mix.to(weight.device) @ before.double()).to(weight.dtype)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, configuration and tokenizer into `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    staged = folder.with_name(f".{folder.name}.{mark}.new")
    old = folder.with_name(f".{folder.name}.{mark}.old")
    try:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load what `save` wrote; nothing is fetched or unpickled.

    Raises:
        ModelError: the folder or a file in it is missing or damaged; the message names it.
    """
    tokenizer = load_tokenizer(folder)
    _check_json(folder / "config.json")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # the loaders raise a dozen kinds for one cause: a damaged folder
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: not a model that can be loaded ({reason})") from error
    model, details = loaded
    _check_complete(folder, details)
    return model, tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model that `save` wrote.

    Raises:
        ModelError: a file of it is missing or damaged; the message names it.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _check_json(folder / name)
    try:
        # Not AutoTokenizer: for known architectures it puts its own pre-tokenizer in.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as in `load`
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: not a tokenizer that can be loaded ({reason})") from error


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: no model there ({path.name} is missing)") from None
    except ValueError:
        raise ModelError(f"{path}: damaged, not valid JSON") from None


def _check_complete(folder: Path, details: dict[str, Any]) -> None:
    """Missing weights would be filled with random numbers, with no more than a warning."""
    wrong = sorted(map(str, (*details["missing_keys"], *details["mismatched_keys"])))
    if wrong:
        raise ModelError(f"{folder}: weights are missing or of another shape: {wrong[0]}, …")
