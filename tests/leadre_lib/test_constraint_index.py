"""The flat trie: every ad can be reached, nothing else can, and a damaged file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from leadre_lib.constraint_index import ConstraintIndex, ConstraintIndexError

SIZES = (7, 5, 3)


@pytest.fixture
def codes() -> np.ndarray:
    flat = np.random.default_rng(0).choice(np.prod(SIZES), 30, replace=False)
    return np.stack(np.unravel_index(flat, SIZES), axis=1)


def leaves(index: ConstraintIndex) -> dict[tuple[int, ...], int]:
    """Every complete way through the index and the row it ends in, walked code by code."""
    ways = {(): 0}
    for table in index.transitions:
        ways = {
            (*way, code): int(table[node, code])
            for way, node in ways.items()
            for code in range(table.shape[1])
            if table[node, code] >= 0
        }
    return ways


def test_leads_to_every_ad_and_nowhere_else(codes: np.ndarray) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    assert leaves(index) == {tuple(row): ad for ad, row in enumerate(codes.tolist())}
    assert index.sizes == SIZES
    assert [len(table) for table in index.transitions] == [
        1,
        len(np.unique(codes[:, 0])),
        len(np.unique(codes[:, :2], axis=0)),
    ]


def test_active_part_keeps_rows(codes: np.ndarray) -> None:
    mask = np.arange(30) % 3 == 0
    index = ConstraintIndex.build(codes, SIZES).active(mask)
    assert leaves(index) == {tuple(codes[ad].tolist()): ad for ad in range(0, 30, 3)}
    assert leaves(index.active(~mask)) == {
        tuple(codes[ad].tolist()): ad for ad in range(30) if ad % 3
    }
    assert leaves(index.active(np.zeros(30, bool))) == {}


def test_refuses_codes_that_make_no_index(codes: np.ndarray) -> None:
    twins = codes.copy()
    twins[20] = twins[4]
    with pytest.raises(ConstraintIndexError, match="rows 4 and 20"):
        ConstraintIndex.build(twins, SIZES)
    outside = codes.copy()
    outside[9, 2] = 3
    with pytest.raises(ConstraintIndexError, match="row 9: code 3 at level 2"):
        ConstraintIndex.build(outside, SIZES)
    with pytest.raises(ConstraintIndexError, match="do not fit"):
        ConstraintIndex.build(codes, SIZES[:2])
    with pytest.raises(ConstraintIndexError, match="mask"):
        ConstraintIndex.build(codes, SIZES).active(np.ones(29, bool))


@pytest.mark.parametrize("active", [range(30), [3, 4], []])
def test_file_round_trip(codes: np.ndarray, tmp_path: Path, active: list[int]) -> None:
    mask = np.isin(np.arange(30), list(active))
    index = ConstraintIndex.build(codes, SIZES).active(mask)
    index.save(tmp_path / "index.safetensors")
    again = ConstraintIndex.load(tmp_path / "index.safetensors")
    assert leaves(again) == leaves(index)
    assert again.sizes == SIZES
    assert [path.name for path in tmp_path.iterdir()] == ["index.safetensors"]


def test_refuses_a_damaged_file(codes: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    with pytest.raises(ConstraintIndexError, match=path.name):
        ConstraintIndex.load(path)
    ConstraintIndex.build(codes, SIZES).save(path)
    whole, tensors = path.read_bytes(), load_file(path)
    for content in (whole[: len(whole) // 2], b"", b"no index at all"):
        path.write_bytes(content)
        with pytest.raises(ConstraintIndexError, match=path.name):
            ConstraintIndex.load(path)

    def broken(**changes: np.ndarray) -> None:
        save_file({**tensors, **changes}, path, metadata={"sizes": str(list(SIZES))})
        with pytest.raises(ConstraintIndexError, match=path.name):
            ConstraintIndex.load(path)

    last = tensors["transitions.2"]
    broken(**{"transitions.1": tensors["transitions.1"][:-1].copy()})
    broken(**{"transitions.2": np.where(last == 0, 30, last)})
    broken(**{"transitions.2": np.where(last == 0, 1, last)})
    broken(codes=tensors["codes"][:-1].copy())
    broken(rows=tensors["rows"].astype(np.int64))
