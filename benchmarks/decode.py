"""Constrained beam search: ours, Transformers' `generate`, and the plain forward pass.

Prints three tables on one random model, from one run; prompts are random, and begin alike for
`--shared` tokens, as instructions do:

1. the methods at the shape that `--prompt`, `--beam` and `--ads` give (`--quick`: only this table):
   - `generate`: Transformers' own, with `prefix_allowed_tokens_fn`, on a few users.
   - `forward`: one forward pass over the prompts, last logits only: what reading alone costs. It
     runs at the batch size that was the fastest of a few.
   - `leadre`: `leadre_lib.decoding.BeamDecoder`, tokenizing included.
2. `leadre` with one optimisation off at a time, or with another setting.
3. `leadre` beside the two at other prompts, beams and catalogues.

Columns: `batch`: users at a time. `x generate`, `x forward`: how many times as many users a second
as these have. `of leadre`: the same of the first row, or of the sorted batches for those that are
not. `same top-10`: fraction of users whose ten best ads are, as a set, those of the float32 decoder
with everything off; a random model's scores lie close together, so that bfloat16 changes more than
with a trained one. `recall@10`: of the ten best ads of a beam of 512, the fraction that is found.
`peak MB`: what tensors take at most beyond model and catalogue, counted by torch's allocator.
`of peak`: of `--peak-tflops`, with the FLOPs that `benchmarks.cost` counts.

All is float32 where no `bfloat16` is said, and `forward` and `generate` in `x` columns are those of
float32, on CUDA of bfloat16, where only checks are float32. `normalise level` and `level_beams`
score or keep other ads. The run fails if in float32 `leadre` finds other ads than `generate`, or
others with an optimisation off; ads whose scores differ by rounding alone may change places.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cost import BENCH, QWEN3, QWEN25, Shape, Work, flops
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.model import build_tokenizer, sid_token_ids, sid_tokens
from leadre_lib.settings import DecodingSettings
from leadre_lib.transformer import Context, Transformer

LEVELS, CODES = 3, 256  # of Semantic IDs; the codes of a level that the tokenizer has
# Architecture, sizes, and codes a level of a small catalogue.
MODELS: dict[str, tuple[str, Shape, int]] = {
    "bench-5.7m": ("qwen2", BENCH, 64),
    "qwen2.5-0.5b": ("qwen2", QWEN25, CODES),
    "qwen3-1.7b": ("qwen3", QWEN3, CODES),
}
PROMPTS, BEAMS, ADS = (128, 256, 512), (8, 32, 128), (10_000, 1_000_000)  # of the third table
BATCH_TOKENS = (1_280, 16_384)  # of the second
WIDE = 512  # beam of the search that recall is measured against
FORWARD_BATCHES = {"cpu": (1, 2, 4, 8, 16), "cuda": (8, 32, 128, 512)}
CHECKED_BEAM = 32  # a float32 cache of `generate` for more may not fit beside a large model
TIE = 1e-4  # scores that are closer than this may change places in another order of summation
Found = tuple[np.ndarray, np.ndarray | None]  # objects and scores, [users, k]
Row = dict[str, Any]


class Point(NamedTuple):
    """What is measured: tokens a prompt, beams a user, ads in the catalogue."""

    prompt: int
    beam: int
    ads: int


@dataclass(frozen=True)
class Method:
    """What to run, for how many users and how many at a time; what it should find, and whether
    to fail where it finds anything else."""

    run: Callable[[], Any]
    users: int
    batch: int
    exact: Found | None = None
    equal: bool = False


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--quick", action="store_true", help="the first table only")
    parser.add_argument("--model", choices=MODELS, default="bench-5.7m", help="random weights")
    parser.add_argument("--peak-tflops", type=float, help="of the device: adds `of peak`")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value, text in (
        ("users", 72, "whom leadre and forward serve"),
        ("generate-users", 2, "whom generate serves; 0: leave it out, and what it checks"),
        ("prompt", 256, "tokens a prompt"),
        ("shared", 32, "first tokens that all prompts have in common"),
        ("beam", 32, "beams a user"),
        ("ads", 10_000, "ads in the catalogue"),
        (
            "batch-tokens",
            DecodingSettings().batch_tokens,
            "of prompts and beams that leadre reads at a time",
        ),
        ("repeats", 3, "rounds in which the methods take turns; the median is reported"),
        ("threads", 2, "of torch"),
        ("device", device, "cpu or cuda"),
    ):
        text = f"{text} (default {value})"
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    return parser


class Longer(list[Any]):
    """A list that says it has one more, so that none of its layers is the last."""

    def __len__(self) -> int:
        return super().__len__() + 1


class FullLastLayer(Transformer):
    """Computes the prompt's last layer in full, as a plain forward pass does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layers = Longer(self._layers)


class ContextPerBeam(Transformer):
    """Copies the context for every beam, which is then a user of its own, as `generate` does."""

    def step(self, context: Context, ids: Any, parents: Any = None) -> Any:
        if parents is None:
            return super().step(context, ids)
        users = len(ids)
        before = len(context.lengths) // users  # contexts a user: 1, then one a beam
        rows = (before * torch.arange(users, device=ids.device)[:, None] + parents).flatten()
        context.own = [(keys[rows], values[rows]) for keys, values in context.own]
        for layers in (context.keys, context.values):
            for number, layer in enumerate(layers):  # one by one: only one is there twice
                layers[number] = layer[rows]
        context.lengths = context.lengths[rows]
        context.padding = None if context.padding is None else context.padding[rows]
        hidden = super().step(context, ids.view(-1, 1), torch.zeros_like(ids).view(-1, 1))
        return hidden.view(*ids.shape, -1)


def build_model(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, whose logits are spread alike at every width."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        initializer_range=0.64 / shape.hidden**0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@functools.cache
def catalogue(ads: int, codes: int) -> ConstraintIndex:
    """Random Semantic IDs, of at least `codes` codes a level."""
    while codes**LEVELS < 2 * ads:
        codes *= 2
    flat = np.random.default_rng(1).choice(codes**LEVELS, ads, replace=False)
    sizes = (codes,) * LEVELS
    return ConstraintIndex.build(np.stack(np.unravel_index(flat, sizes), axis=1), sizes)


class Bench:
    """A random model, and the methods on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        kind, self.shape, self.codes = MODELS[args.model]
        self.dtype = "bfloat16" if args.device == "cuda" else "float32"
        self.dtypes = ["bfloat16"] if args.device == "cuda" else ["float32", "bfloat16"]
        self.tokenizer = build_tokenizer(["a prompt"], sid_tokens((CODES,) * LEVELS), 300)
        self.models = {
            dtype: build_model(kind, self.shape, getattr(torch, dtype), args.device)
            for dtype in ("float32", "bfloat16")
        }
        self.models["bfloat16"].load_state_dict(self.models["float32"].state_dict())
        self._forward_batches: dict[tuple[str, int], int] = {}

    def prompts(self, length: int, shared: int, least: int = 0) -> list[str]:
        """Prompts of `length` tokens, or from `least` to that many: random Semantic ID tokens."""
        rng = np.random.default_rng(0)
        drawn = rng.choice(np.array(sid_tokens((self.codes,) * LEVELS)), (self.args.users, length))
        drawn[:, :shared] = drawn[0, :shared]
        lengths = rng.integers(least or length, length + 1, self.args.users)
        return ["".join(row[:n]) for row, n in zip(drawn, lengths, strict=True)]

    def decoder(
        self, at: Point, packed: bool = True, kind: type[Transformer] = Transformer, **settings: Any
    ) -> BeamDecoder:
        """Ours; `settings` over those of the command line."""
        wanted = {"beam": at.beam, "batch_tokens": self.args.batch_tokens, "dtype": self.dtype}
        made, index = DecodingSettings(**wanted | settings), catalogue(at.ads, self.codes)
        ids = sid_token_ids(self.tokenizer, index.sizes)
        model, length, device = self.models["float32"], at.prompt + LEVELS, self.args.device
        decoder = BeamDecoder(model, self.tokenizer, index, ids, made, length, device, None, packed)
        if kind is not Transformer:
            decoder.transformer = kind(model, length, device, decoder.transformer.dtype, packed)
        return decoder

    def exact(self, prompts: list[str], at: Point) -> Found:
        """What is found in float32 with everything off, user by user."""
        off: dict[str, Any] = {"share_prefix": False, "batch_tokens": 1, "dtype": "float32"}
        return self.decoder(at, packed=False, **off).decode(prompts, at.beam)

    def leadre(
        self, prompts: list[str], at: Point, exact: Found | None, equal: bool = True, **options: Any
    ) -> Method:
        """Ours; `options` as `decoder` takes them. `equal`: as long as it is float32."""
        decoder, users = self.decoder(at, **options), len(prompts)
        batch = decoder.settings.batch_tokens // (at.prompt + sum(decoder.widths))
        equal = equal and decoder.settings.dtype == "float32"
        run = functools.partial(decoder.decode, prompts, at.beam)
        return Method(run, users, min(max(1, batch), users), exact, equal)

    def forward(self, prompts: list[str], dtype: str) -> Method:
        """The forward pass, at the best of a few batch sizes."""
        model, device = self.models[dtype], torch.device(self.args.device)
        read = torch.tensor(self.tokenizer(prompts)["input_ids"], device=device)

        @torch.inference_mode()
        def run(users: int, size: int) -> None:
            for batch in read[:users].split(size):
                model(batch, logits_to_keep=1, use_cache=False)

        sizes = FORWARD_BATCHES[device.type]
        tried, key = min(len(read), sizes[-1]), (dtype, read.shape[1])
        if key not in self._forward_batches:
            runs = {n: Method(functools.partial(run, tried, n), tried, n) for n in sizes}
            rates = median_rates(runs, 2)
            self._forward_batches[key] = min(max(rates, key=rates.__getitem__), tried)
        size = self._forward_batches[key]
        return Method(functools.partial(run, len(read), size), len(read), size)

    def generate(
        self, prompts: list[str], at: Point, exact: Found, dtype: str | None = None
    ) -> Method:
        """Transformers' constrained beam search."""
        index, dtype = catalogue(at.ads, self.codes), dtype or self.dtype
        inputs = self.tokenizer(prompts, return_tensors="pt").to(self.args.device)
        levels = sid_token_ids(self.tokenizer, index.sizes)
        code = np.zeros(self.shape.vocabulary, np.int64)
        for ids in levels:
            code[ids] = np.arange(len(ids))
        tokens = [ids[column] for ids, column in zip(levels, index.codes.T, strict=True)]
        allowed = followers(np.stack(tokens, axis=1))

        @torch.inference_mode()
        def run() -> Found:
            out = self.models[dtype].generate(
                **inputs,
                num_beams=at.beam,
                num_return_sequences=at.beam,
                max_new_tokens=LEVELS,
                do_sample=False,
                length_penalty=0.0,
                pad_token_id=self.tokenizer.pad_token_id,
                prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[at.prompt :].tolist())],
            )
            codes = code[out[:, at.prompt :].cpu().numpy()]
            return index.lead(codes).reshape(len(prompts), at.beam), None

        return Method(run, len(prompts), len(prompts), exact, dtype == "float32")


def followers(tokens: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """What may follow each beginning of `tokens`, [ads, levels]."""
    nexts: dict[tuple[int, ...], set[int]] = {}
    for row in tokens.tolist():
        for level, token in enumerate(row):
            nexts.setdefault(tuple(row[:level]), set()).add(token)
    return {beginning: sorted(found) for beginning, found in nexts.items()}


def in_order(decoder: BeamDecoder, prompts: list[str], lengths: np.ndarray, k: int) -> Found:
    """Decode consecutive prompts that fill a batch, however their lengths differ."""
    found, start = [], 0
    while start < len(prompts):
        longest = np.maximum.accumulate(lengths[start:]) + sum(decoder.widths)
        padded = longest * np.arange(1, len(longest) + 1)
        end = start + max(1, int((padded <= decoder.settings.batch_tokens).sum()))
        found.append(decoder.decode(prompts[start:end], k))
        start = end
    objects, scores = zip(*found, strict=True)
    return np.concatenate(objects), np.concatenate(scores)


def same(objects: np.ndarray, exact: Found) -> bool:
    """Whether all objects are as they should be, but for those of equal scores."""
    assert exact[1] is not None
    gaps = np.diff(np.nan_to_num(exact[1]), prepend=np.inf, append=-np.inf)
    gaps[:, -1] = 0  # what comes after the last is not known
    apart = (np.abs(gaps[:, :-1]) > TIE) & (np.abs(gaps[:, 1:]) > TIE)
    return objects.shape == exact[0].shape and bool((objects == exact[0])[apart].all())


def overlap(objects: np.ndarray, exact: Found) -> np.ndarray:
    """Of each user's ten best, the fraction that was found among the ten best, [users]."""
    pairs = zip(objects[:, :10].tolist(), exact[0][:, :10].tolist(), strict=True)
    return np.array([len({*ours} & {*theirs}) / len(theirs) for ours, theirs in pairs])


def median_rates(
    methods: dict[Any, Method], repeats: int, warm_up: bool = True
) -> dict[Any, float]:
    """Users a second of each method, the median of `repeats`.

    The methods take turns, so that whatever else the machine does meets them alike; a first round
    warms up and is not counted.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in methods}
    for _ in range(repeats + warm_up):
        for name, method in methods.items():
            start = time.perf_counter()
            method.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {n: m.users / statistics.median(seconds[n][warm_up:]) for n, m in methods.items()}


def peak_mb(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """MB of tensors at most while `run` runs, beyond those that were there; and its result."""
    gc.collect()  # what others left must not be freed meanwhile
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6, found
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        found = run()
    events: Any = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((c.nbytes() for c in changes), initial=0)) / 1e6, found


def check(name: str, method: Method, found: Found) -> None:
    """Fail where the method must find what is exact, and does not."""
    if method.equal and method.exact and not same(found[0], method.exact):
        raise SystemExit(f"{name}: leadre, generate and leadre with everything off disagree")


def measure(
    methods: dict[str, Method], at: Point, args: argparse.Namespace, wide: Found | None = None
) -> dict[str, Row]:
    """A row of each method; the run that peaks are counted in warms up."""
    rows: dict[str, Row] = {}
    for name, method in methods.items():
        peak, found = peak_mb(method.run, args.device)
        check(name, method, found)
        row = {"method": name, **at._asdict(), "batch": method.batch, "peak MB": round(peak, 1)}
        row["same top-10"] = row["recall@10"] = None
        if method.exact:
            row["same top-10"] = round(float((overlap(found[0], method.exact) == 1).mean()), 4)
        if wide and method.exact:
            row["recall@10"] = round(float(overlap(found[0], wide).mean()), 4)
        rows[name] = row
    for name, rate in median_rates(methods, args.repeats, warm_up=False).items():
        rows[name]["users/s"] = round(rate, 2)
    return rows


def ratio(row: Row, base: Row | None) -> float | None:
    """How many times as many users a second as `base`."""
    return round(row["users/s"] / base["users/s"], 3) if base else None


def named(method: str, dtype: str) -> str:
    """The method with its precision, where that is not float32."""
    return method if dtype == "float32" else f"{method} {dtype}"


def first(found: Found, users: int) -> Found:
    """What was found for the first `users`."""
    return found[0][:users], None if found[1] is None else found[1][:users]


def methods_table(bench: Bench, at: Point, args: argparse.Namespace) -> list[Row]:
    """All methods at one shape."""
    alike, unlike = bench.prompts(at.prompt, args.shared), bench.prompts(at.prompt, 0)
    exact, few = bench.exact(alike, at), args.generate_users
    methods: dict[str, Method] = {}
    if few and bench.dtype != "float32":
        small = at._replace(beam=min(at.beam, CHECKED_BEAM))
        checked = bench.generate(alike[:few], small, bench.exact(alike[:few], small), "float32")
        check("generate", checked, checked.run())
    generate, forward = named("generate", bench.dtype), named("forward", bench.dtype)
    if few:
        methods[generate] = bench.generate(alike[:few], at, first(exact, few))
    for dtype in bench.dtypes:
        methods[named("forward", dtype)] = bench.forward(alike, dtype)
        methods[named("leadre", dtype)] = bench.leadre(alike, at, exact, dtype=dtype)
    apart = f"{named('leadre', bench.dtype)}, nothing shared"
    methods[apart] = bench.leadre(unlike, at, bench.exact(unlike, at))
    rows = measure(methods, at, args)
    for name, row in rows.items():
        row["x generate"] = ratio(row, rows.get(generate))
        row["x forward"] = ratio(row, rows[forward])
        if args.peak_tflops and name.startswith("leadre") and at.beam <= bench.codes:
            work = Work(*at[:2], LEVELS, shared=0 if name == apart else args.shared)
            done = row["users/s"] * sum(flops(bench.shape, work))
            row["of peak"] = round(done / (args.peak_tflops * 1e12), 4)
    heads = ["method", *at._fields, "batch", "users/s", "x generate", "x forward", "same top-10"]
    heads += ["peak MB", "of peak"] if args.peak_tflops else ["peak MB"]
    return [{head: row.get(head) for head in heads} for row in rows.values()]


def options_table(bench: Bench, at: Point, args: argparse.Namespace) -> list[Row]:
    """Ours with one thing changed at a time."""
    alike = bench.prompts(at.prompt, args.shared)
    mixed = bench.prompts(at.prompt, args.shared, max(at.prompt // 4, args.shared + 1))
    exact, exact_mixed = bench.exact(alike, at), bench.exact(mixed, at)
    narrow = max(1, at.beam // 4)
    changes: dict[str, dict[str, Any]] = {
        "beginning not shared": {"share_prefix": False},
        **({} if args.device == "cuda" else {"weights not packed": {"packed": False}}),
        "last layer in full": {"kind": FullLastLayer},
        "a context a beam": {"kind": ContextPerBeam},
        **{f"batch_tokens {n:,}": {"batch_tokens": n} for n in BATCH_TOKENS},
        "normalise level": {"normalise": "level", "equal": False},
        f"level_beams {narrow} {at.beam}": {"level_beams": (narrow, at.beam), "equal": False},
        f"level_beams {at.beam} {narrow}": {"level_beams": (at.beam, narrow), "equal": False},
    }
    ours = named("leadre", bench.dtype)
    methods = {ours: bench.leadre(alike, at, exact)}
    for name, options in changes.items():
        methods[f"{ours}, {name}"] = bench.leadre(alike, at, exact, **options)
    sorted_ = bench.leadre(mixed, at, exact_mixed)
    lengths = np.array([len(ids) for ids in bench.tokenizer(mixed)["input_ids"]])
    decoder = bench.decoder(at)
    arrived = replace(sorted_, run=lambda: in_order(decoder, mixed, lengths, at.beam))
    wider = bench.decoder(at, beam=max(WIDE, 4 * at.beam), dtype="float32")
    wide = wider.decode(alike, 10)
    rows = measure(methods, at, args, wide)
    both = f"{ours}, mixed lengths", f"{ours}, mixed lengths in the order of arrival"
    rows |= measure(dict(zip(both, (sorted_, arrived), strict=True)), at, args)
    heads = ["method", *at._fields, "batch", "users/s", "of leadre", "same top-10", "recall@10"]
    for name, row in rows.items():
        row["of leadre"] = ratio(row, rows[both[0] if name in both else ours])
        row["batch"] = None if name in both else row["batch"]
    return [{head: row[head] for head in (*heads, "peak MB")} for row in rows.values()]


def shapes_table(bench: Bench, base: Point, args: argparse.Namespace) -> list[Row]:
    """Ours beside the two at other shapes; `generate` for one user."""
    points = [base._replace(beam=beam) for beam in BEAMS]
    points += [base._replace(prompt=prompt) for prompt in PROMPTS if prompt > args.shared]
    points += [base._replace(ads=ads) for ads in ADS]
    ours, out = named("leadre", bench.dtype), []
    for at in dict.fromkeys(points):
        prompts = bench.prompts(at.prompt, args.shared)
        methods = {ours: bench.leadre(prompts, at, None)}
        methods["forward"] = bench.forward(prompts, bench.dtype)
        if args.generate_users:
            found = first(methods[ours].run(), 1)
            methods["generate"] = bench.generate(prompts[:1], at, found)
        rows = measure(methods, at, args)
        row = {head: rows[ours][head] for head in ("method", *at._fields, "users/s")}
        for name in ("forward", "generate"):
            row[f"{name} users/s"] = rows[name]["users/s"] if name in rows else None
            row[f"x {name}"] = ratio(row, rows.get(name))
        out.append({**row, "peak MB": rows[ours]["peak MB"]})
    return out


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table."""
    cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]))


def main() -> None:
    """Measure, compare, print the tables."""
    args = (parser := arguments()).parse_args()
    if not 0 <= args.shared < args.prompt or not 0 <= args.generate_users <= args.users:
        parser.error("shared is less than prompt, generate-users at most users")
    if min(args.users, args.beam, args.ads, args.repeats, args.threads) < 1:
        parser.error("counts are at least 1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler reports that it starts
    torch.set_num_threads(args.threads)
    bench, at = Bench(args), Point(args.prompt, args.beam, args.ads)
    parameters = sum(weight.numel() for weight in bench.models["float32"].parameters())
    where = f"{args.device}, {args.threads} threads"
    print(f"{parameters / 1e6:.1f} M parameters, {LEVELS} tokens a Semantic ID, {where}")
    tables = {"methods": methods_table, "options of leadre": options_table, "shapes": shapes_table}
    flat: list[Row] = []
    for title, table in list(tables.items())[: 1 if args.quick else None]:
        rows = table(bench, at, args)
        show(title, rows)
        flat += [{"table": title, **row} for row in rows]
    if args.json:
        args.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
