"""Supervised fine-tuning: ours, one target a sequence, and a bare PyTorch loop.

Prints one table from one run. Users, prompts and targets are made up: `--targets` ads that a user
wants at one moment, with prompts that are alike up to the last lines, of which some name a scene.
All methods start from the same random weights and take the same steps' worth of rows:

- `leadre`: packed rows, a prompt read once for all its targets (`leadre_lib.packing`), by one
  DeepSpeed rank with everything that a training of the chain does between steps.
- `leadre, 2 ranks`: the same rows by two ranks, which share the threads.
- `leadre, a target a sequence`: the same trainer and targets, the prompt anew for every target.
- `bare loop`: PyTorch alone on the very batches of `leadre`: fused AdamW, cosine rate, gradients
  clipped, and only labelled positions projected onto the vocabulary.

Columns: `tokens/s` counts what is read and no padding, `targets/s` answers learnt; `x one target`:
how many times as many targets a second as with a target a sequence; `x bare`: how many times as
many tokens a second as the bare loop; `of peak`: of `--peak-tflops`, 6 FLOPs a weight and token
(Kaplan et al. 2020, arXiv 2001.08361, section 2.1). The methods take turns of some steps, so that
whatever else the machine does meets them alike; the median over the turns is reported, of ratios
that of those within a round, after some turns that warm up. Checkpoints and validation are left
out. On CPUs the run fails if the bare loop's losses are not ours in the first two turns: later,
rounding has added up.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from leadre_lib.model import load, sid_tokens
from leadre_lib.packing import NO_LABEL, attention_mask
from leadre_lib.settings import ModelSettings, Settings, SftSettings
from leadre_lib.training import prepare_sft, rank_arguments
from leadre_lib.training_rank import (
    Rows,
    collate,
    open_trainer,
    tokens_and_targets,
    warmup_steps,
)

SIZES = (64, 64, 64, 8)  # codes of the levels
TITLE_WORDS = 4
MODELS = {
    "embedded": ModelSettings(),
    "bench-5.7m": ModelSettings(
        hidden_size=256, intermediate_size=768, layers=6, heads=8, vocabulary=4608
    ),
}
TOLERANCE = 1e-3  # of losses, which add up in another order
OURS, SPLIT, TWO, BARE = (
    "leadre",
    "leadre, a target a sequence",
    "leadre, 2 ranks",
    "bare loop",
)


class Turn(NamedTuple):
    """What some steps took, and what they read and learnt; the loss of each step."""

    seconds: float
    tokens: int
    targets: int
    losses: list[float]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--model", choices=MODELS, default="embedded", help="from scratch")
    parser.add_argument("--peak-tflops", type=float, help="of the device: adds `of peak`")
    parser.add_argument(
        "--loss-on",
        choices=("semantic_ids", "response"),
        default="semantic_ids",
        help="as sft.loss_on (default semantic_ids)",
    )
    parser.add_argument("--no-two-ranks", action="store_true", help="leave that row out")
    for name, value, text in (
        ("users", 600, "of whom examples are made up"),
        ("behaviours", 14, "that a prompt tells, at 12 tokens or so"),
        ("targets", 8, "of a prompt"),
        ("rows", 8, "packed rows a step, all ranks together"),
        ("steps", 5, "of a turn"),
        ("turns", 12, "that are measured"),
        ("warm-up", 2, "turns that are not"),
        ("threads", 2, "of torch"),
    ):
        text = f"{text} (default {value})"
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    return parser


def examples(users: int, behaviours: int, targets: int) -> pa.Table:
    """Prompts as the chain writes them, `targets` of each user, as `prepare_sft` takes them."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghiklmnoprstuvw"))
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(1500)]
    rows = []
    for user in range(users):
        days = sorted(rng.integers(1, 90, behaviours), reverse=True)
        told = [f"{day}*{behaviour(rng, words)}" for day in days]
        age = rng.integers(18, 70)
        begin = (
            "You are an ad recommendation system.\n"
            f"The user: {age} years old, lives in {rng.choice(words)}.\n"
            f"Recent behaviours: {'; '.join(told)}.\n"
            f"Long-term interests: {', '.join(f'{rng.choice(words)}*{n}' for n in (5, 3, 2))}.\n"
        )
        for target in range(targets):
            scene = f"Scene: {rng.choice(words[:20])}.\n" if target % 2 else ""
            question = "What ad will the user be interested in next?\nAnswer: "
            rows.append((begin + scene + question, ad(rng), 1.0, f"request-{user}"))
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(("prompt", "response", "weight", "request_id"), columns, strict=True)))


def behaviour(rng: np.random.Generator, words: list[str]) -> str:
    """With an ad or, as often, with content."""
    if rng.random() < 0.5:
        return f"{rng.choice(['click', 'conversion'])}*{ad(rng)}"
    return f"{rng.choice(['play', 'read'])}*{' '.join(rng.choice(words, TITLE_WORDS))}"


def ad(rng: np.random.Generator) -> str:
    """A random Semantic ID."""
    return "".join(f"<{level}_{rng.integers(n)}>" for level, n in zip("abcd", SIZES, strict=True))


class Turns:
    """Lets a training take some steps at a time, when it is told to over a pipe."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        self.losses: list[float] = []
        self.tokens = self.targets = 0
        self.start = 0.0

    def wait(self) -> bool:
        """Until it is this training's turn; false: there is none any more."""
        going = bool(self.pipe.recv())
        self.losses, self.tokens, self.targets = [], 0, 0
        self.start = time.perf_counter()
        return going

    def step(self, loss: float, tokens: int, targets: int) -> bool:
        """Count a step; whether to take another one."""
        self.losses.append(loss)
        self.tokens, self.targets = self.tokens + tokens, self.targets + targets
        if len(self.losses) < self.steps:
            return True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        self.pipe.send(Turn(seconds, self.tokens, self.targets, self.losses))
        return self.wait()


def train_ours(folder: Path, turns: Turns) -> None:
    """A rank of the chain's own training, in a process of its own."""
    from transformers import TrainerCallback

    trainer = open_trainer(folder, json.loads((folder / "run.json").read_bytes()))

    class InTurns(TrainerCallback):
        """After every step is logged."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not turns.wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                more = turns.step(logs["loss"], logs["tokens"], logs["targets"])
                control.should_training_stop = not more

    trainer.add_callback(InTurns())
    trainer.train()
    torch.distributed.destroy_process_group()


def train_bare(folder: Path, turns: Turns) -> None:
    """The loop that one would write without trainers, in a process of its own."""
    section = SftSettings.model_validate(json.loads((folder / "run.json").read_bytes())["section"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load(folder / "init")[0]
    model = model.to(device).train()
    weights = list(model.parameters())
    # As everywhere: no decay of norms and biases.
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (0.9, section.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, fused=True)
    rows, padding = Rows.open(folder), model.config.pad_token_id or 0
    steps = len(rows) // section.batch_size
    warm = warmup_steps(section, steps)

    def rate(step: int) -> float:
        if step < warm:
            return step / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    going = turns.wait()
    for step in range(steps):
        if not going:
            break
        numbers = range(step * section.batch_size, (step + 1) * section.batch_size)
        batch = collate([rows[row] for row in numbers], padding)
        counts = tokens_and_targets(batch["documents"], batch["branches"])
        tokens, targets = counts.tolist()
        batch = {name: values.to(device) for name, values in batch.items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = bare_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        going = turns.step(loss.item(), tokens, targets)


def bare_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted mean over the labels of a batch."""
    hidden = model.model(
        input_ids=batch["tokens"],
        position_ids=batch["positions"],
        attention_mask=attention_mask(batch["documents"], batch["branches"]),
        use_cache=False,
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    chosen = targets != NO_LABEL
    logits = model.lm_head(hidden[:, :-1][chosen]).float()
    losses = torch.nn.functional.cross_entropy(logits, targets[chosen], reduction="none")
    return (losses * batch["weights"][:, 1:][chosen]).mean()


class Method:
    """Processes that train on one prepared folder, and what their turns took."""

    def __init__(self, kind: str, folder: Path, ranks: int, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.turns: list[Turn] = []
        self.pipes, self.processes = [], []
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        for rank in range(ranks):
            own, theirs = context.Pipe()
            threads = max(1, args.threads // ranks)
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
            numbers |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads}
            # Read when the process imports torch, so it has to be there before.
            os.environ.update({name: str(value) for name, value in numbers.items()})
            target = train_bare if kind == BARE else train_ours
            process = context.Process(
                target=target, args=(folder, Turns(theirs, args.steps)), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(own)
            self.processes.append(process)

    def turn(self) -> None:
        """Some steps; all ranks count what all of them do."""
        for pipe in self.pipes:
            pipe.send(True)
        try:
            found = [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise SystemExit("a training has ended before its time: its error is above") from None
        self.turns.append(max(found, key=lambda turn: turn.seconds))

    def end(self) -> None:
        """Let the processes end."""
        for pipe in self.pipes:
            pipe.send(False)
        for process in self.processes:
            process.join(30)


def prepare(table: pa.Table, work: Path, ranks: int, args: argparse.Namespace) -> Path:
    """What one method trains on."""
    steps = args.steps * (args.turns + args.warm_up) + 1
    gpu = torch.cuda.is_available()
    section = SftSettings(
        ranks=ranks,
        batch_size=args.rows // ranks,
        loss_on=args.loss_on,
        max_steps=steps,
        checkpoint_steps=steps + 1,
        deepspeed="deepspeed_gpu.json" if gpu else "deepspeed_cpu.json",
    )
    settings = Settings(model=MODELS[args.model], sft=section)
    prepare_sft(table, work, None, settings, sid_tokens(SIZES))
    told = rank_arguments("sft", work, section, settings, None)
    (work / "sft" / "run.json").write_text(json.dumps(told))
    return work / "sft"


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods in turns; one row each."""
    table = examples(args.users, args.behaviours, args.targets)
    alone = table.set_column(3, "request_id", pa.nulls(len(table), pa.string()))
    packed = prepare(table, folder / "packed", 1, args)
    tasks = {OURS: (packed, 1), SPLIT: (prepare(alone, folder / "alone", 1, args), 1)}
    tasks[BARE] = (packed, 1)
    if not args.no_two_ranks and torch.cuda.device_count() != 1:
        tasks[TWO] = (prepare(table, folder / "two", 2, args), 2)
    parameters = sum(weight.numel() for weight in load(packed / "init")[0].parameters())
    methods = {name: Method(name, *task, args) for name, task in tasks.items()}
    for _ in range(args.warm_up + args.turns):
        for method in methods.values():
            method.turn()
    for method in methods.values():
        method.end()
    check(methods[OURS], methods[BARE])
    return rows_of(methods, parameters, args)


def check(ours: Method, bare: Method) -> None:
    """Fail where the bare loop does not do the same."""
    losses = [np.array([x for turn in m.turns for x in turn.losses]) for m in (ours, bare)]
    early = slice(0, 2 * len(ours.turns[0].losses))  # rounding adds up from step to step
    apart = float(np.abs(losses[0] - losses[1])[early].max())
    if not torch.cuda.is_available() and apart > TOLERANCE:
        raise SystemExit(f"the losses of leadre and the bare loop are {apart:.4f} apart")


def rows_of(
    methods: dict[str, Method], parameters: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The table."""
    rates = {
        name: np.array(
            [
                (turn.tokens / turn.seconds, turn.targets / turn.seconds)
                for turn in method.turns[args.warm_up :]
            ]
        )
        for name, method in methods.items()
    }
    rows = []
    for name, rate in rates.items():
        tokens, targets = np.median(rate, axis=0)
        row: dict[str, Any] = {
            "method": name,
            "tokens/s": round(tokens),
            "targets/s": round(targets, 1),
            "x one target": round(float(np.median(rate[:, 1] / rates[SPLIT][:, 1])), 3),
            "x bare": round(float(np.median(rate[:, 0] / rates[BARE][:, 0])), 3),
        }
        if args.peak_tflops:
            row["of peak"] = round(6 * parameters * tokens / (args.peak_tflops * 1e12), 4)
        rows.append({"model": args.model, "parameters": parameters, **row})
    return rows


def main() -> None:
    """Measure, print the table."""
    args = (parser := arguments()).parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of the ranks
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if args.rows < 2 or args.rows % 2:
        parser.error("rows is an even number, for two ranks share them")
    if min(args.users, args.targets, args.steps, args.turns, args.threads) < 1:
        parser.error("counts are at least 1")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args)
    heads = [head for head in rows[0] if head not in ("model", "parameters")]
    device = "cuda" if torch.cuda.is_available() else f"cpu, {args.threads} threads"
    table = Table(*heads, title=f"{rows[0]['parameters'] / 1e6:.1f} M parameters, {device}")
    for row in rows:
        table.add_row(*[str(row[head]) for head in heads])
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
