"""The flat trie: every object can be reached, nothing else can, and a damaged file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from leadre_lib.constraint_index import (
    DENSE_LIMIT,
    METADATA,
    ConstraintIndex,
    ConstraintIndexError,
    DeviceIndex,
)

SIZES = (7, 5, 3)
ADS = 30
LIMITS = pytest.mark.parametrize("dense_limit", [DENSE_LIMIT, 12, 0])


def draw(sizes: tuple[int, ...], objects: int, seed: int = 0) -> np.ndarray:
    flat = np.random.default_rng(seed).choice(np.prod(sizes), objects, replace=False)
    return np.stack(np.unravel_index(flat, sizes), axis=1)


@pytest.fixture
def codes() -> np.ndarray:
    return draw(SIZES, ADS)


def ads_by_codes(codes: np.ndarray, active: np.ndarray | None = None) -> dict[tuple[int, ...], int]:
    chosen = range(len(codes)) if active is None else np.flatnonzero(active).tolist()
    return {tuple(codes[object].tolist()): object for object in chosen}


def leaves(index: ConstraintIndex) -> dict[tuple[int, ...], int]:
    """Every complete way through the index and the row it ends in, found by lookups alone."""
    lookup = DeviceIndex(index)
    ways = {(): 0}
    for level in range(index.levels):
        found = lookup.children(level, torch.tensor(list(ways.values()), dtype=torch.int32))
        longer = {}
        for prefix, allowed, nodes, codes in zip(
            ways, found.allowed, found.nodes, written(found.codes, found.nodes), strict=True
        ):
            longer |= {
                (*prefix, int(code)): int(node)
                for code, node in zip(codes[allowed], nodes[allowed], strict=True)
            }
        ways = longer
    return ways


def written(codes: torch.Tensor | None, nodes: torch.Tensor) -> torch.Tensor:
    return torch.arange(nodes.shape[-1]).expand(nodes.shape) if codes is None else codes


@LIMITS
def test_leads_to_every_ad_and_nowhere_else(codes: np.ndarray, dense_limit: int) -> None:
    index = ConstraintIndex.build(codes, SIZES, dense_limit=dense_limit)
    assert index.dense == {DENSE_LIMIT: 3, 12: 1, 0: 0}[dense_limit]
    assert leaves(index) == ads_by_codes(codes)
    assert index.codes.tolist() == codes.tolist()
    assert (index.sizes, index.levels, index.objects) == (SIZES, 3, ADS)
    prefixes = [len(np.unique(codes[:, :level], axis=0)) for level in (1, 2, 3)]
    assert [len(starts) - 1 for starts in index.starts] == [1, *prefixes[:2]]
    assert [len(labels) for labels in index.labels] == prefixes


@LIMITS
@pytest.mark.parametrize("sizes", [(40, 4, 3, 2), (2, 300, 9), (1, 1, 17), (25,)])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
def test_lookups_agree_with_a_dictionary(
    sizes: tuple[int, ...], share: float, dense_limit: int
) -> None:
    codes = draw(sizes, max(1, int(np.prod(sizes)) * 2 // 3), seed=len(sizes))
    active = np.random.default_rng(1).random(len(codes)) < share
    trie: dict[tuple[int, ...], set[int]] = {}
    for row in codes[active].tolist():
        for level in range(len(sizes)):
            trie.setdefault(tuple(row[:level]), set()).add(row[level])
    index = ConstraintIndex.build(codes, sizes, active, dense_limit=dense_limit)
    lookup = DeviceIndex(index)
    ways = {(): 0}
    for level, size in enumerate(sizes):
        # Each node twice, in two dimensions, as the beams of two users would be.
        nodes = torch.tensor([list(ways.values())] * 2)
        values = torch.randn(*nodes.shape, size)
        found = lookup.children(level, nodes)
        picked = found.pick(values)
        code = written(found.codes, found.nodes)
        assert picked.shape == found.nodes.shape == found.allowed.shape == code.shape
        assert torch.equal(picked, values.gather(2, code))
        flat = torch.arange(nodes.shape[1] * code.shape[2]).expand(2, -1)
        assert torch.equal(found.code(flat), code.flatten(1))
        longer = {}
        for user in range(2):
            for place, prefix in enumerate(ways):
                allowed = found.allowed[user, place]
                ascending = code[user, place][allowed].tolist()
                assert ascending == sorted(trie.get(prefix, set()))
                children = found.nodes[user, place][allowed].tolist()
                longer |= {(*prefix, c): n for c, n in zip(ascending, children, strict=True)}
        ways = longer or {(0,) * (level + 1): 0}
    assert (ways == ads_by_codes(codes, active)) is bool(active.any())


@LIMITS
def test_a_new_mask_shares_the_structure(codes: np.ndarray, dense_limit: int) -> None:
    mask = np.arange(ADS) % 3 == 0
    index = ConstraintIndex.build(codes, SIZES, dense_limit=dense_limit)
    part = index.with_active(mask)
    assert part.rows is index.rows
    assert part.starts is index.starts
    assert part.labels is index.labels
    assert leaves(part) == ads_by_codes(codes, mask)
    assert leaves(ConstraintIndex.build(codes, SIZES, mask)) == leaves(part)
    assert leaves(part.with_active(~mask)) == ads_by_codes(codes, ~mask)
    assert leaves(index.with_active(np.zeros(ADS, bool))) == {}
    assert leaves(index) == ads_by_codes(codes)
    mask[:] = False
    assert part.active.sum() == 10


@LIMITS
def test_a_device_takes_a_new_mask(codes: np.ndarray, dense_limit: int) -> None:
    index = ConstraintIndex.build(codes, SIZES, dense_limit=dense_limit)
    lookup = DeviceIndex(index)
    for mask in (np.arange(ADS) % 2 == 0, np.zeros(ADS, bool), np.ones(ADS, bool)):
        lookup.set_active(mask)
        fresh = DeviceIndex(index.with_active(mask))
        nodes = torch.arange(len(index.starts[2]) - 1)
        for found, expected in zip(
            lookup.children(2, nodes), fresh.children(2, nodes), strict=True
        ):
            assert (found is None and expected is None) or torch.equal(found, expected)
        assert np.array_equal(lookup.index.active, mask)


def test_codes_lead_to_rows(codes: np.ndarray) -> None:
    mask = np.arange(ADS) % 3 == 0
    index = ConstraintIndex.build(codes, SIZES, mask)
    assert index.lead(codes).tolist() == np.where(mask, np.arange(ADS), -1).tolist()
    every = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), axis=1)
    truth = ads_by_codes(codes, mask)
    assert index.lead(every).tolist() == [truth.get(tuple(row), -1) for row in every.tolist()]
    # Past the end of a level, such codes would be those of a neighbour.
    shifted = codes + np.array([-1, 0, SIZES[2]])
    assert index.lead(np.vstack([shifted, codes - 100, codes + 100])).tolist() == [-1] * 90
    assert index.lead(codes[:0]).tolist() == []
    with pytest.raises(ConstraintIndexError, match="do not fit"):
        index.lead(codes[:, :2])


def test_the_order_of_ads_does_not_matter(codes: np.ndarray) -> None:
    index = ConstraintIndex.build(codes, SIZES)
    order = np.random.default_rng(4).permutation(ADS)
    other = ConstraintIndex.build(codes[order], SIZES)
    for ours, theirs in zip(index.starts + index.labels, other.starts + other.labels, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert order[other.rows].tolist() == index.rows.tolist()
    assert order[other.lead(codes)].tolist() == index.lead(codes).tolist()


def test_only_levels_that_gain_by_it_are_tables() -> None:
    codes = np.stack([np.arange(64) // 8, np.arange(64) % 8, np.zeros(64, np.int64)], axis=1)
    sizes = (8, 8, 8)  # the last level has one code of eight in use
    assert ConstraintIndex.build(codes, sizes).dense == 2
    assert ConstraintIndex.build(codes, sizes, dense_limit=63).dense == 1


def test_refuses_codes_that_make_no_index(codes: np.ndarray) -> None:
    twins = codes.copy()
    twins[20] = twins[4]
    with pytest.raises(ConstraintIndexError, match="rows 4 and 20"):
        ConstraintIndex.build(twins, SIZES)
    outside = codes.copy()
    outside[9, 2] = 3
    with pytest.raises(ConstraintIndexError, match="row 9: code 3 at level 2"):
        ConstraintIndex.build(outside, SIZES)
    outside[9, 2] = 256  # would be 0 in one byte
    with pytest.raises(ConstraintIndexError, match="row 9: code 256 at level 2"):
        ConstraintIndex.build(outside, SIZES)
    for wrong, sizes in ((codes, SIZES[:2]), (codes[:, :0], ()), (codes / 2, SIZES)):
        with pytest.raises(ConstraintIndexError, match="do not fit"):
            ConstraintIndex.build(wrong, sizes)
    with pytest.raises(ConstraintIndexError, match="no object"):
        ConstraintIndex.build(codes[:0], SIZES)
    for mask in (np.ones(ADS - 1, bool), np.arange(ADS)):
        with pytest.raises(ConstraintIndexError, match="mask"):
            ConstraintIndex.build(codes, SIZES, mask)
        with pytest.raises(ConstraintIndexError, match="mask"):
            ConstraintIndex.build(codes, SIZES).with_active(mask)


@pytest.mark.parametrize("active", [range(30), [3, 4], []])
def test_file_round_trip(codes: np.ndarray, tmp_path: Path, active: list[int]) -> None:
    mask = np.isin(np.arange(ADS), list(active))
    index = ConstraintIndex.build(codes, SIZES, mask, codebook="book", dense_limit=12)
    path = tmp_path / "index.safetensors"
    index.save(path)
    again = ConstraintIndex.load(path)
    assert leaves(again) == leaves(index) == ads_by_codes(codes, mask)
    assert leaves(again.with_active(~mask)) == ads_by_codes(codes, ~mask)
    assert (again.sizes, again.dense, again.codebook) == (SIZES, 1, "book")
    assert again.codes.tolist() == codes.tolist()
    assert again.active.tolist() == mask.tolist()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    content = path.read_bytes()
    again.save(path)  # over the very file that is mapped
    assert path.read_bytes() == content
    assert leaves(again) == leaves(index)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_the_file_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    ConstraintIndex.build(draw((64, 64, 64), 50_000), (64, 64, 64)).save(path)
    index = ConstraintIndex.load(path)
    address = index.rows.__array_interface__["data"][0]
    areas = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in areas]
    assert any(low <= address < high for low, high in spans)


def test_refuses_a_damaged_file(codes: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    with pytest.raises(ConstraintIndexError, match=f"{path.name}.*rebuild"):
        ConstraintIndex.load(path)
    with pytest.raises(ConstraintIndexError, match=f"{tmp_path.name}.*rebuild"):
        ConstraintIndex.load(tmp_path)
    ConstraintIndex.build(codes, SIZES).save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for content in (whole[: len(whole) // 2], whole[:-1], b"", b"no index at all", flipped):
        path.write_bytes(content)
        with pytest.raises(ConstraintIndexError, match=f"{path.name}.*rebuild"):
            ConstraintIndex.load(path)


def test_refuses_arrays_and_metadata_of_others(codes: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    # One child a node: the arrays of all levels are of one shape and would fit when swapped.
    chain = np.stack([np.arange(7), np.arange(7)[::-1], np.arange(7)], axis=1)
    ConstraintIndex.build(chain, (7, 7, 7), codebook="book").save(path)
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    about = json.loads(metadata[METADATA])

    def refused(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None) -> str:
        save_file(arrays, path, metadata=metadata)
        with pytest.raises(ConstraintIndexError, match=f"{path.name}.*rebuild") as error:
            ConstraintIndex.load(path)
        return str(error.value)

    swapped = {"labels.0": arrays["labels.1"], "labels.1": arrays["labels.0"]}
    for change in (
        swapped,
        {"rows": arrays["rows"][::-1].copy()},
        {"rows": arrays["rows"].astype(np.int64)},
        {"starts.1": arrays["starts.1"][:-1].copy()},
        {"active": ~arrays["active"]},
        {"more": arrays["rows"]},
    ):
        assert "not those that were written" in refused({**arrays, **change}, metadata)
    refused({name: array for name, array in arrays.items() if name != "rows"}, metadata)
    for key, value in (("sizes", [7, 7]), ("dense", 0), ("codebook", "other"), ("sha256", "")):
        refused(arrays, {METADATA: json.dumps({**about, key: value})})
    assert "format 1" in refused(arrays, {METADATA: json.dumps({**about, "format": 1})})
    for text in ("{}", "[]", "7", "null", "{"):
        refused(arrays, {METADATA: text})
    refused(arrays, {"sizes": "[7, 7, 7]"})
    refused(arrays, None)
