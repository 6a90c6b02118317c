"""What bulk inference costs: arithmetic, memory and traffic a user, and GPUs a night.

Nothing is measured here. The formulas count what the decoder has to do for one user; an H100 SXM is
taken at a stated fraction of its arithmetic peak. A multiply-add is two FLOPs, so a forward pass
takes two a weight and token, and attention (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
Weights and cached keys as the traffic of a step: Pope et al. 2022, arXiv 2211.05102, section 2.

Columns: `weights` in MB; `reading`, `steps`, `logits` in GFLOP a user; `cache`, `generate`,
`traffic` in MB a user, `generate` being a cache with the context once a beam; `at a time`: users
whose caches fit into memory; `peak`, `bandwidth`: users a second of one GPU if only the one or the
other bound it; `users/s`: at the stated fraction of the peak, or by bandwidth if that is less;
`GPU h`, `GPUs` of a night; `$/M`: a million users; `FLOPs`: each 1/20, # reading = steps . logits.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# NVIDIA H100 SXM, from its data sheet: bf16 without sparsity, HBM3.
PEAK_FLOPS, BANDWIDTH, MEMORY = 989e12, 3.35e12, 80e9
USABLE_MEMORY = 0.9  # of MEMORY, for weights and caches; the rest is for a batch's activations
BF16, FLOAT32 = 2, 4  # bytes
CODES, SID_TOKENS = 256, 4 * 256 + 64  # of a level; of all levels


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP. `vocabulary` counts the Semantic ID
    tokens too; `tied`: the output matrix is the embedding."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True

    @property
    def queries(self) -> int:
        """D: numbers in the queries of a token and layer."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """K: numbers in the keys of a token and layer; the values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """m = 2HD + 2HK + 3HI: query and output, key and value, MLP (H hidden, I intermediate)."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)

    @property
    def weights(self) -> int:
        """Lm + HV, and HV again if the embedding is apart (L layers, V vocabulary); no norms."""
        return self.layers * self.layer_weights + (2 - self.tied) * self.hidden * self.vocabulary

    @property
    def token_cache(self) -> int:
        """Bytes of a token's keys and values in all layers: 2LK, bf16."""
        return 2 * self.layers * self.keys * BF16

    @property
    def layer_traffic(self) -> int:
        """Bytes of activations a token and layer, 40H + 12(D + K + I): an estimate, one kernel an
        operation. At attention and MLP each, the float32 residual is read by the norm and read and
        written by the sum, 12H; bf16 outputs of norm and sublayer are written and read, 8H. So are
        queries, keys, values and what is inside the MLP, at every operation on them."""
        inside = 6 * BF16 * (self.queries + self.keys + self.intermediate)
        return 2 * (3 * FLOAT32 + 4 * BF16) * self.hidden + inside


# That of `benchmarks.decode`, and published configurations with the tokens of their tokenizers.
BENCH = Shape("bench 5.7 M", 6, 256, 768, 8, 2, 32, 4_608)
QWEN25 = Shape("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 64, 151_665 + SID_TOKENS)
LLAMA32 = Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128_256 + SID_TOKENS)
QWEN3 = Shape("Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, 151_669 + SID_TOKENS)


@dataclass(frozen=True)
class Work:
    """What is decoded: P tokens of prompt, the first S of them `shared` and computed once for all;
    W beams; n tokens of a Semantic ID; `batch` users that one pass over the weights serves."""

    prompt: int
    beam: int
    tokens: int
    batch: int = 256
    shared: int = 0
    level_only: bool = False

    @property
    def widths(self) -> list[int]:
        """w_s: tokens that step s = 1 … n-1 feeds, one a beam; no more than there are prefixes."""
        return [min(self.beam, CODES**step) for step in range(1, self.tokens)]

    def logits(self, shape: Shape) -> int:
        """C(1 + Σ w_s): C is V, or if `level_only` (`normalise: level`) the codes of a level."""
        return (1 + sum(self.widths)) * (CODES if self.level_only else shape.vocabulary)


FIXED = ("model", "weights", "prompt", "beam", "tokens")
AIMS = (  # users a second that one GPU is to reach
    (QWEN25, Work(512, 32, 3), 775),
    (QWEN25, Work(512, 128, 3), 530),
    (QWEN3, Work(1000, 256, 3, batch=8), 60),
)


def flops(shape: Shape, work: Work) -> tuple[int, int, int]:
    """FLOPs a user. A token that sees t keys and values takes 4Dt for attention in a layer.

    Reading: (L-1)(2m(P-S) + 4D Σt), t from S+1 to P; and of the last layer 4HK(P-S-1), keys and
        values, but 2m + 4DP for the last token.
    Steps: Σ w_s L(2m + 4D(P + s)); a beam's token sees the context and s tokens of its own.
    Logits: 2H each.
    """
    new, linear, attention = work.prompt - work.shared, 2 * shape.layer_weights, 4 * shape.queries
    pairs = (work.prompt * (work.prompt + 1) - work.shared * (work.shared + 1)) // 2
    reading = (shape.layers - 1) * (linear * new + attention * pairs)
    reading += 4 * shape.hidden * shape.keys * (new - 1) + linear + attention * work.prompt
    steps = sum(w * (linear + attention * (work.prompt + s)) for s, w in enumerate(work.widths, 1))
    return reading, shape.layers * steps, 2 * shape.hidden * work.logits(shape)


def cache_bytes(shape: Shape, work: Work) -> tuple[int, int, int]:
    """Caches of a user: of the context, P - S tokens; of what the beams wrote, Σ w_s; and for
    comparison that of `generate`, where every beam has its own context, W(P + n - 1)."""
    one, each = shape.token_cache, work.beam * (work.prompt + work.tokens - 1)
    return one * (work.prompt - work.shared), one * sum(work.widths), one * each


def step_traffic(shape: Shape, work: Work) -> int:
    """Bytes of keys and values that the steps read: P tokens once a step, s a beam."""
    return shape.token_cache * sum(work.prompt + s * w for s, w in enumerate(work.widths, 1))


def traffic(shape: Shape, work: Work) -> float:
    """All bytes a user between memory and cores. Layers and output matrix are read n times a batch;
    caches are written, and read by the steps; activations move as `layer_traffic` says; a logit is
    written in bf16, made float32 and read: 12 bytes."""
    matrices = BF16 * (shape.layers * shape.layer_weights + shape.hidden * shape.vocabulary)
    moved = work.prompt - work.shared + sum(work.widths)
    activations = shape.layer_traffic * shape.layers * moved + 12 * work.logits(shape)
    caches = sum(cache_bytes(shape, work)[:2]) + step_traffic(shape, work)
    return matrices * work.tokens / work.batch + caches + activations


def bar(parts: tuple[int, ...], width: int = 20) -> str:
    """`width` characters, shared out among the parts."""
    ends = [round(width * sum(parts[:count]) / sum(parts)) for count in range(len(parts) + 1)]
    return "".join(mark * (ends[i + 1] - ends[i]) for i, mark in enumerate("#=."))


def row(shape: Shape, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """A line of the tables: what a user takes, then what a night takes."""
    parts = flops(shape, work)
    context, own, each = cache_bytes(shape, work)
    fit = (USABLE_MEMORY * MEMORY - BF16 * shape.weights) // (context + own)
    peak, bandwidth = PEAK_FLOPS / sum(parts), BANDWIDTH / traffic(shape, work)
    rate = min(args.mfu * peak, bandwidth)
    hours = args.users * args.again / rate / 3600
    fixed = (shape.name, round(BF16 * shape.weights / 1e6), work.prompt, work.beam, work.tokens)
    return {
        **dict(zip(FIXED, fixed, strict=True)),
        **{name: round(parts[i] / 1e9, 2) for i, name in enumerate(("reading", "steps", "logits"))},
        "cache": round((context + own) / 1e6, 2),
        "generate": round(each / 1e6, 1),
        "traffic": round(traffic(shape, work) / 1e6),
        "at a time": max(0, int(fit)),
        "peak": round(peak),
        "bandwidth": round(bandwidth),
        "users/s": round(rate),
        "GPU h": round(hours, 1),
        "GPUs": int(-(-hours // args.hours)),
        "$/M": round(args.price_per_hour * 1e6 / rate / 3600, 2),
        "FLOPs": bar(parts),
    }


def tables(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """By title: over the model; over prompt, beam and tokens, of the 0.5 B; the aims."""
    work = Work(args.prompt, args.beam, args.tokens, args.batch, args.shared, args.level_only)
    sweeps = {"prompt": (128, 256, 512, 1000), "beam": (8, 32, 128, 256), "tokens": (3, 4, 5)}
    out = {"by model": [row(shape, work, args) for shape in (BENCH, QWEN25, LLAMA32, QWEN3)]}
    for name, values in sweeps.items():
        works = [replace(work, **{name: value}) for value in values]  # type: ignore[arg-type]
        out[f"by {name}"] = [row(QWEN25, each, args) for each in works if each.prompt > args.shared]
    out["aims"] = []
    for shape, each, aim in AIMS:
        line = row(shape, each, args)
        of = {f"of {bound}": round(aim / line[bound], 3) for bound in ("peak", "bandwidth")}
        out["aims"].append({**{key: line[key] for key in FIXED}, "aim": aim, **of})
    return out


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--level-only", action="store_true", help="`decoding.normalise: level`")
    for name, value, text in (
        ("prompt", 512, "tokens a prompt"),
        ("beam", 32, "beams a user"),
        ("tokens", 3, "tokens a Semantic ID"),
        ("batch", 256, "users that one pass over the weights serves"),
        ("shared", 0, "first tokens of the prompt that all users have in common"),
        ("users", 1_000_000_000, "users a night"),
        ("again", 1.0, "fraction of the users that is decoded again"),
        ("hours", 6.0, "hours a night"),
        ("mfu", 0.35, "fraction of the arithmetic peak that is reached: an assumption"),
        ("price-per-hour", 3.0, "dollars an hour of GPU: an assumption"),
    ):
        text = f"{text} (default {value:,})"
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    return parser


def main() -> None:
    """Print the tables."""
    args = (parser := arguments()).parse_args()
    least = min(args.prompt - args.shared, args.beam, args.tokens, args.batch, args.users)
    if least < 1 or args.shared < 0 or not 0 < args.mfu <= 1 or min(args.hours, args.again) <= 0:
        parser.error("counts are at least 1, shared < prompt, mfu is a fraction, hours positive")
    rows = tables(args)
    print(f"estimates for H100s at {args.mfu} of the peak; {args.users:,} users in {args.hours} h")
    for title, lines in rows.items():
        same = [key for key in FIXED if len({line[key] for line in lines}) == 1]
        heads = [key for key in lines[0] if key not in same]
        cells = [heads, *([str(line[key]) for key in heads] for line in lines)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print("\n" + ", ".join([title, *(f"{key} {lines[0][key]}" for key in same)]))
        print(*("  ".join(map(str.rjust, line, widths)) for line in cells), sep="\n")
    if args.json:
        flat = [{"table": title, **line} for title, lines in rows.items() for line in lines]
        args.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
