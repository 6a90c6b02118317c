"""The trie of the Semantic IDs that may be written, as flat arrays.

A node of level `l` is a distinct prefix of `l` codes; `transitions[l][node, code]` is the node that
the code leads to, or -1. At the last level it is the row of the ad. Lookup is one gather a step.

Knows nothing of tokens, models or what an ad is: codes and rows are numbers.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from leadre_lib.errors import LeadreError


class ConstraintIndexError(LeadreError):
    """The codes do not make an index, or its file is missing, damaged or does not fit itself."""


@dataclass(frozen=True)
class ConstraintIndex:
    """All Semantic IDs of a catalogue, or of the active part of it.

    Attributes:
        codes: int32 [ads, levels], of the whole catalogue.
        rows: int32 [active ads], ascending: the rows of `codes` that can be reached.
        transitions: one int32 array [nodes of the level, codes of the level] a level; -1 is no way
            on; the entries of the last level are rows of `codes`.
    """

    codes: np.ndarray
    rows: np.ndarray
    transitions: list[np.ndarray]

    @classmethod
    def build(
        cls, codes: np.ndarray, sizes: Sequence[int], rows: np.ndarray | None = None
    ) -> ConstraintIndex:
        """Index `codes`, int [ads, levels] with `codes[:, l] < sizes[l]`, or only its `rows`.

        Raises:
            ConstraintIndexError: a code lies outside its level, or two ads share all codes.
        """
        codes = np.ascontiguousarray(codes, np.int32)
        if codes.ndim != 2 or codes.shape[1] != len(sizes) or not sizes:
            raise ConstraintIndexError(
                f"codes of shape {codes.shape} do not fit {len(sizes)} levels"
            )
        outside = (codes < 0) | (codes >= np.asarray(sizes))
        if outside.any():
            ad, level = np.argwhere(outside)[0]
            raise ConstraintIndexError(
                f"ad in row {ad}: code {codes[ad, level]} at level {level} of {sizes[level]} codes"
            )
        rows = np.arange(len(codes), dtype=np.int32) if rows is None else rows.astype(np.int32)
        return cls(codes, rows, _transitions(codes[rows], sizes, rows))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""
        return tuple(table.shape[1] for table in self.transitions)

    @property
    def levels(self) -> int:
        """Number of tokens of a Semantic ID."""
        return len(self.transitions)

    @property
    def ads(self) -> int:
        """Number of ads in the whole catalogue: rows are smaller than this."""
        return len(self.codes)

    def active(self, mask: np.ndarray) -> ConstraintIndex:
        """The index of the ads where `mask`, bool [ads], holds; rows keep their numbers."""
        if mask.shape != (self.ads,) or mask.dtype != np.bool_:
            raise ConstraintIndexError(
                f"a mask of {mask.dtype} {mask.shape} does not fit {self.ads} ads"
            )
        return self.build(self.codes, self.sizes, np.flatnonzero(mask))

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {"codes": self.codes, "rows": self.rows}
        tensors |= {f"transitions.{level}": t for level, t in enumerate(self.transitions)}
        metadata = {"sizes": json.dumps(self.sizes)}
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            save_file(tensors, staged, metadata=metadata)
            staged.rename(path)
        finally:
            staged.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> ConstraintIndex:
        """Read what `save` wrote.

        Raises:
            ConstraintIndexError: the file is missing, truncated, or its arrays do not fit.
        """
        try:
            with safe_open(path, "np") as file:
                sizes = json.loads(file.metadata()["sizes"])
                names = ("codes", "rows", *(f"transitions.{level}" for level in range(len(sizes))))
                codes, rows, *transitions = (file.get_tensor(name) for name in names)
        except FileNotFoundError:
            raise ConstraintIndexError(f"{path}: no constraint index there") from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ConstraintIndexError(f"{path}: damaged constraint index ({error})") from None
        index = cls(codes, rows, transitions)
        if not _fits(index, sizes):
            raise ConstraintIndexError(f"{path}: damaged constraint index (its arrays do not fit)")
        return index


def _transitions(codes: np.ndarray, sizes: Sequence[int], rows: np.ndarray) -> list[np.ndarray]:
    tables: list[np.ndarray] = []
    node = np.zeros(len(codes), np.int64)
    nodes = 1
    for level, size in enumerate(sizes):
        key = node * size + codes[:, level]
        prefixes, node = np.unique(key, return_inverse=True)
        table = np.full((nodes, size), -1, np.int32)
        table.reshape(-1)[prefixes] = np.arange(len(prefixes), dtype=np.int32)
        tables.append(table)
        nodes = max(1, len(prefixes))
    if len(prefixes) != len(codes):
        twin = rows[np.sort(np.flatnonzero(np.bincount(node)[node] > 1))[:2]]
        raise ConstraintIndexError(f"ads in rows {twin[0]} and {twin[1]} have the same Semantic ID")
    tables[-1].reshape(-1)[key] = rows
    return tables


def _fits(index: ConstraintIndex, sizes: Sequence[int]) -> bool:
    """Whether every entry leads to a node or row that exists."""
    arrays = [index.codes, index.rows, *index.transitions]
    if any(array.dtype != np.int32 for array in arrays) or not sizes:
        return False
    shapes = [table.shape for table in index.transitions]
    nodes = [1, *(max(1, int((table >= 0).sum())) for table in index.transitions[:-1])]
    if index.codes.shape != (index.ads, len(sizes)) or index.rows.ndim != 1:
        return False
    if shapes != list(zip(nodes, sizes, strict=True)):
        return False
    limits = [*nodes[1:], index.ads]
    in_range = all(
        t.min(initial=-1) >= -1 and t.max(initial=-1) < limit
        for t, limit in zip(index.transitions, limits, strict=True)
    )
    leaves = index.transitions[-1]
    return in_range and np.array_equal(np.sort(leaves[leaves >= 0]), index.rows)
