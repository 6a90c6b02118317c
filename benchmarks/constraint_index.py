"""The constraint index against a trie of Python dictionaries, on catalogues of several sizes.

Prints, on the same random codes, clustered as Semantic IDs are:

- `build s`: from codes to something that can be looked up. `MB`, `B/object`: what lookups hold in
  memory; of the dictionaries without the numbers in them.
- `file MB`, `load ms`, `swap ms` (a new mask of active objects): dictionaries have no such thing;
  they are built anew.
- `step ms (n)`: from `n` nodes and logits [n, codes of the level] to masked scores and child nodes,
  the mean over the levels. The nodes are those above random objects.
- `widths`: candidates a node at each level; `tables`: how many of the levels are tables.

The scores and children of both are compared; the run fails if they differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leadre_lib.constraint_index import ConstraintIndex, DeviceIndex

SIZES = (256, 256, 256, 256, 64)
STEPS = (512, 4096)
ZIPF = 1.3  # how much more often the first codes of a level are used than its last


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--objects", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=7, help="the median is reported")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; a step is too short to share"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def clustered_codes(objects: int) -> np.ndarray:
    """Distinct codes int [objects, levels]: a few popular branches; the last code counts twins."""
    rng = np.random.default_rng(0)
    share = np.cumsum(1 / (np.arange(SIZES[0]) + 8) ** ZIPF)
    drawn = 2 * objects  # some have more twins than there are last codes, and are left out
    prefix = np.zeros(drawn, np.int64)
    columns = []
    for size in SIZES[:-1]:
        popularity = np.searchsorted(share, rng.random(drawn) * share[-1])
        columns.append((popularity + prefix * 7919) % size)  # other codes below each prefix
        prefix = prefix * size + columns[-1]
    order = np.argsort(prefix, kind="stable")
    starts = np.flatnonzero(np.diff(prefix[order], prepend=-1))
    last = np.empty(drawn, np.int64)
    last[order] = np.arange(drawn) - np.repeat(starts, np.diff(starts, append=drawn))
    codes = np.stack([*columns, last], axis=1)
    return codes[last < SIZES[-1]][:objects]


class DictTrie:
    """One dictionary a node, code → number of the child; at the last level, → row of the object."""

    def __init__(self, codes: np.ndarray) -> None:
        self.nodes: list[list[dict[int, int]]] = [[{}], *([] for _ in SIZES[1:])]
        order = np.lexsort(codes.T[::-1])
        for row, written in zip(order.tolist(), codes[order].tolist(), strict=True):
            node = 0
            for level, code in enumerate(written[:-1]):
                ways = self.nodes[level][node]
                if code not in ways:
                    ways[code] = len(self.nodes[level + 1])
                    self.nodes[level + 1].append({})
                node = ways[code]
            self.nodes[-1][node][written[-1]] = row

    @property
    def bytes(self) -> int:
        """Memory of dictionaries and lists."""
        return sum(sys.getsizeof(nodes) + sum(map(sys.getsizeof, nodes)) for nodes in self.nodes)

    def step(
        self, level: int, nodes: Sequence[int], logits: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """Masked scores [nodes, codes] and the children, node by node, ascending in code."""
        counts: list[int] = []
        codes: list[int] = []
        children: list[int] = []
        for node in nodes:
            ways = self.nodes[level][node]
            counts.append(len(ways))
            codes += ways
            children += ways.values()
        rows = np.repeat(np.arange(len(nodes)), counts)
        at = tuple(torch.from_numpy(a).to(logits.device) for a in (rows, np.array(codes)))
        scores = torch.full_like(logits, -torch.inf)
        scores[at] = logits[at]
        return scores, children


def step(
    lookup: DeviceIndex, level: int, nodes: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """Masked scores [nodes, candidates], and the candidates."""
    ways = lookup.children(level, nodes)
    return torch.where(ways.allowed, ways.pick(logits), -torch.inf), ways


def differ(ours: tuple[torch.Tensor, Any], theirs: tuple[torch.Tensor, list[int]]) -> bool:
    """Whether two steps have other scores or other children."""
    scores, ways = ours
    row, slot = ways.allowed.nonzero(as_tuple=True)
    full = torch.full_like(theirs[0], -torch.inf)
    full[row, slot if ways.codes is None else ways.codes[row, slot]] = scores[row, slot]
    return not torch.equal(full, theirs[0]) or ways.nodes[row, slot].tolist() != theirs[1]


def nodes_above(index: ConstraintIndex, level: int, objects: np.ndarray) -> np.ndarray:
    """The node of a level above each of `objects`, places among the nodes of the last level."""
    first = np.arange(index.objects + 1)
    for starts in reversed(index.starts[level:]):
        first = first[starts]
    return np.searchsorted(first, objects, "right") - 1


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `repeats` runs after one that is not counted."""
    return 1e3 * statistics.median([seconds(work) for _ in range(repeats + 1)][1:])


def step_times(
    index: ConstraintIndex, lookup: DeviceIndex, trie: DictTrie, width: int, repeats: int
) -> tuple[float, float]:
    """Milliseconds of a step of `width` nodes, ours and the dictionaries', mean over the levels.

    The two take turns, so that whatever else the machine does meets them alike; a first round
    warms up, is compared, and is not counted.
    """
    rng = np.random.default_rng(1)
    device = lookup.device
    means = np.zeros(2)
    for level, size in enumerate(index.sizes):
        drawn = nodes_above(index, level, rng.integers(index.objects, size=width))
        nodes, numbers = torch.from_numpy(drawn).to(device), drawn.tolist()
        logits = torch.randn(width, size, device=device)
        if differ(step(lookup, level, nodes, logits), trie.step(level, numbers, logits)):
            raise SystemExit(f"leadre and the dictionaries disagree at level {level}")
        turns = [
            (
                seconds(lambda: step(lookup, level, nodes, logits)),  # noqa: B023
                seconds(lambda: trie.step(level, numbers, logits)),  # noqa: B023
            )
            for _ in range(repeats)
        ]
        means += 1e3 * np.median(turns, axis=0) / index.levels
    return float(means[0]), float(means[1])


def measure(objects: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """The two rows of one catalogue."""
    codes = clustered_codes(objects)
    mask = np.random.default_rng(2).random(objects) < 0.9
    index = ConstraintIndex.build(codes, SIZES)
    lookup = DeviceIndex(index, device)
    build = median_ms(lambda: DeviceIndex(ConstraintIndex.build(codes, SIZES), device), repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.safetensors"
        index.save(path)
        file, load = path.stat().st_size, median_ms(lambda: ConstraintIndex.load(path), repeats)
    swap = median_ms(lambda: lookup.set_active(mask), repeats)
    lookup.set_active(np.ones(objects, np.bool_))
    tries: list[DictTrie] = []
    trie_build = seconds(lambda: tries.append(DictTrie(codes)))
    steps = [step_times(index, lookup, tries[0], width, repeats) for width in STEPS]
    ours = {
        "file MB": round(file / 1e6, 2),
        "load ms": round(load, 1),
        "swap ms": round(swap, 1),
        "tables": index.dense,
        "widths": " ".join(str(int(np.diff(starts).max())) for starts in index.starts),
    }
    return [
        {
            "method": method,
            "objects": objects,
            "build s": round(built, 3),
            "MB": round(size / 1e6, 2),
            "B/object": round(size / objects, 1),
            **{f"step ms ({n})": round(t[place], 3) for n, t in zip(STEPS, steps, strict=True)},
            **others,
        }
        for place, (method, built, size, others) in enumerate(
            [
                ("leadre", build / 1e3, lookup.bytes, ours),
                ("dict trie", trie_build, tries[0].bytes, dict.fromkeys(ours)),
            ]
        )
    ]


def main() -> None:
    """Measure, compare, print the table."""
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for n in args.objects for row in measure(n, args.device, args.repeats)]
    print(f"levels of {SIZES} codes, {args.device}, {args.threads} threads")
    cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
