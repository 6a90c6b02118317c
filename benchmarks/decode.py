"""Constrained beam search: ours, Transformers' `generate`, and the plain forward pass.

Prints users a second of the three on the same random model, prompts and catalogue, in float32:

- `leadre`: `leadre_lib.decoding.BeamDecoder`.
- `generate`: Transformers' own, with `prefix_allowed_tokens_fn` and the same beam, on a few users.
- `forward`: one forward pass over the prompts, last logits only: what reading alone costs.

The top ads of `leadre` and `generate` are compared; the run fails if they differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.model import build_model, build_tokenizer, sid_token_ids, sid_tokens
from leadre_lib.settings import DecodingSettings, ModelSettings

SIZES = (64, 64, 64)
# 5.7 million parameters with a vocabulary of 4,608 tokens.
MODEL = ModelSettings(
    hidden_size=256, intermediate_size=768, layers=6, heads=8, kv_heads=2, vocabulary=4416
)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--users", type=int, default=128)
    parser.add_argument("--generate-users", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256, help="tokens a prompt")
    parser.add_argument("--beam", type=int, default=32)
    parser.add_argument("--ads", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def median_rates(
    methods: dict[str, tuple[Callable[[], object], int]], repeats: int
) -> dict[str, float]:
    """Users a second of each method (what to run, users it serves), the median of `repeats`.

    The methods take turns, so that whatever else the machine does meets them alike; a first round
    warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats + 1):
        for method, (work, _) in methods.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[method].append(time.perf_counter() - start)
    return {m: users / statistics.median(seconds[m][1:]) for m, (_, users) in methods.items()}


def fixed_prompts(tokenizer: PreTrainedTokenizerBase, users: int, length: int) -> list[str]:
    """Prompts of exactly `length` tokens: random Semantic ID tokens, one token each."""
    tokens = np.array(sid_tokens(SIZES))
    drawn = np.random.default_rng(0).choice(tokens, (users, length))
    return ["".join(row) for row in drawn]


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    tokens: np.ndarray,
    beam: int,
) -> list[list[list[int]]]:
    """Transformers' constrained beam search; token ids [users, beam, levels]."""
    nexts: dict[tuple[int, ...], set[int]] = {}
    for row in tokens.tolist():
        for level in range(len(SIZES)):
            nexts.setdefault(tuple(row[:level]), set()).add(row[level])
    allowed = {prefix: sorted(ids) for prefix, ids in nexts.items()}
    inputs = tokenizer(prompts, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=len(SIZES),
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[length:].tolist())],
    )
    return out[:, length:].reshape(len(prompts), beam, len(SIZES)).tolist()


def main() -> None:
    """Measure, compare, print the table."""
    args = arguments().parse_args()
    tokenizer = build_tokenizer(["a prompt"], sid_tokens(SIZES), MODEL.vocabulary)
    padding = [f"<|unused_{i}|>" for i in range(MODEL.vocabulary + sum(SIZES) - len(tokenizer))]
    tokenizer.add_tokens(padding)
    model = build_model(MODEL, tokenizer, seed=0).eval()
    flat = np.random.default_rng(1).choice(np.prod(SIZES), args.ads, replace=False)
    codes = np.stack(np.unravel_index(flat, SIZES), axis=1)
    ids = sid_token_ids(tokenizer, SIZES)
    prompts = fixed_prompts(tokenizer, args.users, args.prompt)
    decoder = BeamDecoder(
        model,
        tokenizer,
        ConstraintIndex.build(codes, SIZES),
        ids,
        DecodingSettings(beam=args.beam, top_k=args.beam),
        args.prompt + len(SIZES),
        args.device,
    )
    few = prompts[: args.generate_users]
    tokens = np.stack([level[codes[:, i]] for i, level in enumerate(ids)], axis=1)
    found, _ = decoder.decode(few, args.beam)
    if tokens[found].tolist() != generate(model, tokenizer, few, tokens, args.beam):
        raise SystemExit("leadre and generate disagree")

    read = torch.from_numpy(np.array(tokenizer(prompts)["input_ids"])).to(args.device)

    @torch.inference_mode()
    def forward() -> None:
        for batch in read.split(max(1, decoder.settings.batch_tokens // args.prompt)):
            model(batch, logits_to_keep=1, use_cache=False)

    rates = median_rates(
        {
            "leadre": (lambda: decoder.decode(prompts, 20), args.users),
            "generate": (
                lambda: generate(model, tokenizer, few, tokens, args.beam),
                len(few),
            ),
            "forward": (forward, args.users),
        },
        args.repeats,
    )
    shape = {"prompt": args.prompt, "beam": args.beam, "ads": args.ads}
    rows = [{"method": m, **shape, "users/s": round(rate, 2)} for m, rate in rates.items()]
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {len(SIZES)} tokens, {args.device}")
    print("  ".join(f"{head:>8}" for head in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>8}" for value in row.values()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
