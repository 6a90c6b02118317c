"""The quantisers on many objects: seconds and memory, at 100,000 and 1,000,000 by default.

The vectors are made up to resemble embeddings of texts, see `benchmarks.neighbours`. Each method
runs in a process of its own, on one core:

- `train s`, `encode s`: the codebook, and codes with their alternatives for all; `assign s`: IDs.
- `collision`: of the IDs before the last token; `raw collision`: as the codebook has it.
- `peak MB`: of the whole process, of which the vectors are `vectors MB`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.neighbours import text_like_vectors
from benchmarks.semantic_ids import alone, peak_mb, shown, timed
from leadre_lib.quantisers import train_codebook
from leadre_lib.semantic_ids import assign, code_usage
from leadre_lib.settings import METHODS, SemanticIdSettings


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    return parser


def measure(method: str, objects: int) -> dict[str, Any]:
    """One method on one number of objects."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    settings = SemanticIdSettings(method=method)
    vectors = text_like_vectors(objects)
    codebook, training = timed(lambda: train_codebook(vectors, settings, 1))
    (codes, near), encoding = timed(
        lambda: (codebook.encode(vectors), codebook.alternatives(vectors, settings.alternatives))
    )
    ids = np.arange(objects).astype(str).tolist()
    full, assigning = timed(lambda: assign(ids, codes, None, settings.collision_codes, near))
    given, raw = (code_usage(c, codebook.sizes) for c in (full, codes))
    return {
        "method": f"leadre {method}",
        "objects": objects,
        "codes": f"{len(codebook.sizes)} x {codebook.sizes[0]}",
        "collision": given["collision_rate"],
        "raw collision": raw["collision_rate"],
        "level-1 used": given["levels"][0]["used_share"],
        "train s": training,
        "encode s": encoding,
        "assign s": assigning,
        "vectors MB": vectors.nbytes / 1e6,
        "peak MB": peak_mb(),
    }


def main() -> None:
    """Measure, print the table."""
    args = arguments().parse_args()
    rows: list[dict[str, Any]] = []
    wide = {"method": 25, "codes": 7}
    for objects in args.sizes:
        for method in args.methods:
            row = alone(measure, method, objects)
            if not rows:
                print("  ".join(head.rjust(wide.get(head, 0)) for head in row))
            rows.append(row)
            cells = [shown(k, value).rjust(wide.get(k, len(k))) for k, value in row.items()]
            print("  ".join(cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
