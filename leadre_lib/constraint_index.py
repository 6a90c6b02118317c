"""The trie of the Semantic IDs that may be written, as flat arrays.

A *node* of level `l` is a distinct prefix of `l` codes. The nodes of a level are numbered in the
order of their prefixes, so the children of a node are neighbours in the level below, ascending in
code: where they start and the code of each are all that has to be kept. The nodes of the last level
are the objects. This is the layout of STATIC (arXiv 2602.22647): tables for the first levels, whose
few nodes have many children, and compressed rows below.

The structure holds all objects; a mask says which of them may be written. A new mask costs a sum
over the nodes, no rebuild. The file is mapped into memory, so that processes share it; loading goes
through it once, for its checksum.

Knows nothing of tokens, models or what an object is: codes and rows are numbers.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from leadre_lib.errors import LeadreError

FORMAT = 2
# One key only: the library writes several in any order, and equal indexes must be equal files.
METADATA = "constraint_index"
DENSE_LIMIT = 1 << 22  # entries of a level's table: 16 MiB


class ConstraintIndexError(LeadreError):
    """The codes do not make an index, or its file is missing, damaged or of another kind."""


@dataclass(frozen=True, eq=False)
class ConstraintIndex:
    """All Semantic IDs of a catalogue, and which of them may be written.

    Attributes:
        sizes: number of codes of each level.
        dense: how many of the first levels are looked up in a table.
        codebook: version of the codebook that the codes are of.
        starts: one int32 array [nodes of level l, and one] a level: the children of node `p` are
            the nodes `starts[l][p]` to `starts[l][p + 1] - 1` of the level below.
        labels: one array [nodes of level l + 1] a level: the code that leads to each; uint8, int16
            or int32, as the level needs.
        rows: int32 [objects]: the row of each node of the last level.
        active: bool [objects], by row: whether it may be written.
        alive: one bool array [nodes of level l + 1] a level: whether an active object lies below.
    """

    sizes: tuple[int, ...]
    dense: int
    codebook: str
    starts: list[np.ndarray]
    labels: list[np.ndarray]
    rows: np.ndarray
    active: np.ndarray
    alive: list[np.ndarray]

    @classmethod
    def build(
        cls,
        codes: np.ndarray,
        sizes: Sequence[int],
        active: np.ndarray | None = None,
        *,
        codebook: str = "",
        dense_limit: int = DENSE_LIMIT,
    ) -> ConstraintIndex:
        """Index all `codes`, of which those that are `active` may be written.

        Args:
            codes: int [objects, levels], `codes[:, l] < sizes[l]`.
            sizes: number of codes of each level.
            active: bool [objects]; left out, all are.
            codebook: version of the codebook that the codes are of.
            dense_limit: most entries of a level's table; 0 for none.

        Raises:
            ConstraintIndexError: there is no object, a code lies outside its level, two objects
                have the same codes, or the mask does not fit.
        """
        codes = np.asarray(codes)
        _check_codes(codes, sizes)
        starts, labels, rows = _trie(codes, sizes)
        active = np.ones(len(rows), np.bool_) if active is None else _checked(active, len(rows))
        dense = _dense_levels(starts, sizes, dense_limit)
        alive = _alive(starts, active[rows])
        return cls(tuple(sizes), dense, codebook, starts, labels, rows, active, alive)

    @property
    def levels(self) -> int:
        """Number of tokens of a Semantic ID."""
        return len(self.sizes)

    @property
    def objects(self) -> int:
        """Number of objects in the whole catalogue: rows are smaller than this."""
        return len(self.rows)

    @property
    def codes(self) -> np.ndarray:
        """The codes of all objects, int32 [objects, levels], in the order of their rows."""
        codes = np.empty((self.objects, self.levels), np.int32)
        leaves = np.arange(self.objects + 1)  # where the objects below each node start
        for level in reversed(range(self.levels)):
            codes[self.rows, level] = np.repeat(self.labels[level], np.diff(leaves))
            leaves = leaves[self.starts[level]]
        return codes

    def with_active(self, mask: np.ndarray) -> ConstraintIndex:
        """The same structure, shared, with the objects where `mask`, bool [objects], holds.

        Raises:
            ConstraintIndexError: the mask is of another type or shape.
        """
        active = _checked(mask, self.objects)
        return replace(self, active=active, alive=_alive(self.starts, active[self.rows]))

    def lead(self, codes: np.ndarray) -> np.ndarray:
        """The row that each of `codes`, int [n, levels], leads to, int64 [n].

        It is -1 where there is no such Semantic ID or its object is not active.

        Raises:
            ConstraintIndexError: the codes are of another number of levels.
        """
        if codes.ndim != 2 or codes.shape[1] != self.levels:
            raise ConstraintIndexError(
                f"codes of shape {codes.shape} do not fit {self.levels} levels"
            )
        found = ((codes >= 0) & (codes < np.asarray(self.sizes))).all(1)
        node = np.zeros(len(codes), np.int64)
        for level, size in enumerate(self.sizes):
            keys = _keys(self, level)
            wanted = node * size + codes[:, level]
            node = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            found &= keys[node] == wanted
        return np.where(found & self.alive[-1][node], self.rows[node].astype(np.int64), -1)

    def save(self, path: Path) -> None:
        """Write structure and mask as one safetensors file, whole or not at all."""
        arrays = {"rows": self.rows, "active": self.active}
        arrays |= {f"starts.{level}": array for level, array in enumerate(self.starts)}
        arrays |= {f"labels.{level}": array for level, array in enumerate(self.labels)}
        about = {
            "format": FORMAT,
            "sizes": list(self.sizes),
            "dense": self.dense,
            "codebook": self.codebook,
        }
        about["sha256"] = _seal(about, arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            save_file(arrays, staged, metadata={METADATA: json.dumps(about, sort_keys=True)})
            staged.rename(path)
        finally:
            staged.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> ConstraintIndex:
        """Map what `save` wrote; structure and mask are pages of the file.

        Raises:
            ConstraintIndexError: the file is missing, or is not, to the bit, what `save` wrote.
        """
        try:
            about, arrays = _map(path)
        except FileNotFoundError:
            raise ConstraintIndexError(
                f"{path}: no constraint index there; rebuild the indexes"
            ) from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConstraintIndexError(
                f"{path}: damaged or no constraint index of format {FORMAT}, rebuild the indexes"
                f" ({type(error).__name__}: {error})"
            ) from None
        levels = range(len(about["sizes"]))
        starts, labels = ([arrays[f"{name}.{n}"] for n in levels] for name in ("starts", "labels"))
        rows, active = arrays["rows"], arrays["active"]
        return cls(
            tuple(about["sizes"]),
            about["dense"],
            about["codebook"],
            starts,
            labels,
            rows,
            active,
            _alive(starts, active[rows]),
        )


class Children(NamedTuple):
    """The ways on from some nodes: `width` candidates each, ascending in code.

    Attributes:
        codes: int64 [..., width]; None where the candidates are all codes of the level in order.
        nodes: int32 [..., width]: of the level below, or, at the last level, rows of objects. Any
            number where there is no way on.
        allowed: bool [..., width]: whether an active object lies there.
    """

    codes: torch.Tensor | None
    nodes: torch.Tensor
    allowed: torch.Tensor

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """The candidates' values [..., width] among those of all codes [..., codes]."""
        return values if self.codes is None else values.gather(-1, self.codes)

    def code(self, choice: torch.Tensor) -> torch.Tensor:
        """The codes of `choice`, int64 [users, n], places in each user's candidates laid flat."""
        if self.codes is None:
            return choice % self.nodes.shape[-1]
        return self.codes.flatten(1).gather(1, choice)


class DeviceIndex:
    """An index as tensors on a device, for looking up many nodes at once.

    The structure is moved there once; a new mask moves tables and codes only. A lookup copies one
    row of a table or one run of codes a node: its cost is that of the widest node of the level,
    whatever the number of objects.
    """

    def __init__(self, index: ConstraintIndex, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._widths = [_width(starts) for starts in index.starts]
        self._starts = [self._move(starts) for starts in index.starts[index.dense :]]
        self._slots = torch.arange(max(self._widths), dtype=torch.int32, device=device)
        # Padded, so that the run of the last node can be as wide as any.
        self._rows = self._move(np.pad(index.rows, (0, self._widths[-1])))
        self._fill(index)

    @property
    def bytes(self) -> int:
        """Memory that the tensors take."""
        tensors = [*self._starts, self._slots, self._rows, *self._tables, *self._codes]
        return sum(tensor.nbytes for tensor in tensors)

    def set_active(self, mask: np.ndarray) -> None:
        """From now on find the objects where `mask`, bool [objects], holds.

        Raises:
            ConstraintIndexError: the mask is of another type or shape.
        """
        self._fill(self.index.with_active(mask))

    def children(self, level: int, nodes: torch.Tensor) -> Children:
        """The ways on from `nodes`, int32 or int64 [...], of a level."""
        look = self._look_up if level < self.index.dense else self._gather
        codes, children, allowed = look(level, nodes.flatten())
        shape = (*nodes.shape, children.shape[-1])
        return Children(
            None if codes is None else codes.view(shape), children.view(shape), allowed.view(shape)
        )

    def _look_up(self, level: int, nodes: torch.Tensor) -> Children:
        children = self._tables[level].index_select(0, nodes)
        return Children(None, children, children >= 0)

    def _gather(self, level: int, nodes: torch.Tensor) -> Children:
        at = level - self.index.dense
        width = self._widths[level]
        first = self._starts[at].index_select(0, nodes)
        count = self._starts[at].index_select(0, nodes + 1) - first
        slots = self._slots[:width]
        # Overlapping views: one run is copied a node, not one element a candidate.
        codes = self._codes[at].unfold(0, width, 1).index_select(0, first)
        if level == self.index.levels - 1:
            children = self._rows.unfold(0, width, 1).index_select(0, first)
        else:
            children = first[:, None] + slots
        allowed = (codes >= 0) & (slots < count[:, None])
        return Children(codes.clamp_min(0).long(), children, allowed)

    def _fill(self, index: ConstraintIndex) -> None:
        dense = range(index.dense)
        compressed = range(index.dense, index.levels)
        self._tables = [self._move(_table(index, level)) for level in dense]
        self._codes = [
            self._move(_codes(index, level, self._widths[level])) for level in compressed
        ]
        self.index = index

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _check_codes(codes: np.ndarray, sizes: Sequence[int]) -> None:
    fits = codes.ndim == 2 and codes.shape[1] == len(sizes) and codes.dtype.kind in "iu"
    if not fits or not sizes:
        raise ConstraintIndexError(
            f"codes of {codes.dtype} {codes.shape} do not fit {len(sizes)} levels"
        )
    if not len(codes):
        raise ConstraintIndexError("no object to index")
    outside = (codes < 0) | (codes >= np.asarray(sizes))
    if outside.any():
        row, level = np.argwhere(outside)[0]
        raise ConstraintIndexError(
            f"object in row {row}: code {codes[row, level]} at level {level}, which has"
            f" {sizes[level]} codes"
        )


def _checked(mask: np.ndarray, objects: int) -> np.ndarray:
    """A copy of the mask: its owner may go on to change it in place."""
    if mask.shape != (objects,) or mask.dtype != np.bool_:
        raise ConstraintIndexError(
            f"a mask of {mask.dtype} {mask.shape} does not fit {objects} objects"
        )
    return mask.copy()


def _trie(
    codes: np.ndarray, sizes: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Starts, labels and rows, as `ConstraintIndex` has them."""
    # Narrow columns: numpy sorts those of one or two bytes by counting.
    columns = [column.astype(_code_type(size)) for column, size in zip(codes.T, sizes, strict=True)]
    rows = np.lexsort(columns[::-1]).astype(np.int32)
    starts, labels = [], []
    new = np.zeros(len(rows), np.bool_)  # whether another node of the level begins at this object
    new[0] = True
    first = np.zeros(1, np.int64)
    for column in columns:
        column = column[rows]
        new[1:] |= column[1:] != column[:-1]
        number = np.cumsum(new, dtype=np.int32)
        starts.append(np.append(number[first] - 1, number[-1]))
        first = np.flatnonzero(new)
        labels.append(column[first])
    if not new.all():
        twin = np.argmin(new)
        raise ConstraintIndexError(
            f"objects in rows {rows[twin - 1]} and {rows[twin]} have the same Semantic ID"
        )
    return starts, labels, rows


def _code_type(size: int) -> type[np.integer[Any]]:
    return np.uint8 if size <= 1 << 8 else np.int16 if size <= 1 << 15 else np.int32


def _width(starts: np.ndarray) -> int:
    """Largest number of children of a node."""
    return int(np.diff(starts).max())


def _dense_levels(starts: Sequence[np.ndarray], sizes: Sequence[int], limit: int) -> int:
    """How many of the first levels have a small table that compressed rows would not beat.

    A table makes a candidate of every code, so it is the slower of the two where no node has
    children for half of them.
    """
    worth = [
        (len(array) - 1) * size <= limit and 2 * _width(array) >= size
        for array, size in zip(starts, sizes, strict=True)
    ]
    return [*worth, False].index(False)


def _alive(starts: Sequence[np.ndarray], leaves: np.ndarray) -> list[np.ndarray]:
    """Whether one of `leaves`, bool [objects], holds below each node, level by level."""
    alive = [leaves]
    for bounds in reversed(starts[1:]):
        total = np.zeros(len(alive[-1]) + 1, np.int32)
        np.cumsum(alive[-1], dtype=np.int32, out=total[1:])
        total = total[bounds]
        alive.append(total[1:] > total[:-1])
    return alive[::-1]


def _keys(index: ConstraintIndex, level: int) -> np.ndarray:
    """`parent * codes + code` of each node of the level below, int64, ascending."""
    children = np.diff(index.starts[level])
    return np.repeat(np.arange(len(children)) * index.sizes[level], children) + index.labels[level]


def _table(index: ConstraintIndex, level: int) -> np.ndarray:
    """Child of each node by code, int32 [nodes, codes], -1 for none; at the last level, rows."""
    table = np.full((len(index.starts[level]) - 1, index.sizes[level]), -1, np.int32)
    alive = index.alive[level]
    last = level == index.levels - 1
    children = index.rows[alive] if last else np.flatnonzero(alive)
    table.reshape(-1)[_keys(index, level)[alive]] = children
    return table


def _codes(index: ConstraintIndex, level: int, padding: int) -> np.ndarray:
    """Labels of the nodes of the level below, -1 where not alive, and `padding` times -1."""
    labels = index.labels[level]
    signed = np.promote_types(labels.dtype, np.int8)
    codes = np.full(len(labels) + padding, -1, signed)
    # Bits of 0 leave a code as it is, those of -1 make it -1: faster than to choose.
    np.bitwise_or(labels, index.alive[level].astype(signed) - 1, out=codes[: len(labels)])
    return codes


def _map(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the file says of itself and its arrays; with torch, because that maps the file."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[METADATA])
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    if about["format"] != FORMAT:
        raise ValueError(f"it is of format {about['format']}")
    if about.pop("sha256") != _seal(about, arrays):
        raise ValueError("its arrays are not those that were written")
    return about, arrays


def _seal(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Digest of everything in a file.

    Arrays that were swapped or mended by hand may well fit each other, and would lead to the wrong
    object in silence; and no check of them is as fast.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
