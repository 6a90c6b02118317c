"""Training from outside: what the ranks read, and starting, watching and ending them.

`prepare_sft` and `prepare_dpo` write what supervised fine-tuning and Direct Preference Optimization
read, `run_ranks` starts the ranks under DeepSpeed and sees them through; what a rank does is in
`training_rank`. The folder of a stage, `work/sft` or `work/dpo`, holds

    train.parquet              token ids: packed sequences of SFT (see `packing`), pairs of DPO
    order.npy                  of DPO: the order in which steps take the pairs
    rows.npz                   of SFT: which sequences are in each row, in the order of the steps;
                               the mean weight of a label
    validation/                of SFT: cases on which the best weights are chosen, and their index
    init/                      the model that SFT starts from (DPO starts from `work/sft/model`)
    fingerprint.json           sha256 of all of the above and of the settings: equal means resume
    reference.npy              log-probabilities under the model that DPO starts from
    run.json, ranks.json       what the ranks are told; the session that they run in
    hosts.env                  with a hostfile: what ranks elsewhere get of the environment
    checkpoints/               of the trainer; private, they hold pickles; gone once it is done
    best/, validation.json     the best weights so far, and the validation curve
    loss.json, model/          the result; `model/` appears whole and last

Every random choice is in `order.npy` or `rows.npz`, so a resumed run takes the same steps as one
that was never stopped. Knows nothing of the lake, of what a prompt says, of losses, or of releases.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leadre_lib import model as models
from leadre_lib.budget import fit
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.errors import LeadreError
from leadre_lib.facts import write_json
from leadre_lib.packing import NO_LABEL, Ragged, fill_rows, sequences
from leadre_lib.settings import REPOSITORY, Settings, TrainingSettings
from leadre_lib.templates import load_template

log = logging.getLogger(__name__)

Stage = Literal["sft", "dpo"]
CHUNK_ROWS = 8192  # examples held as Python lists at once
BUCKET_STEPS = 16  # steps among which examples are sorted by length
BUILDERS = {"ninja", "c++", "g++", "cc1plus", "ld"}
LOCK_SECONDS = 300
HOSTS_SECONDS = 60  # for the ranks of other hosts to end
# Hosts of a hostfile have the same paths as this machine.
EXPORTED = (
    "CUDA_HOME",
    "CXX",
    "DS_ACCELERATOR",
    "HF_HUB_DISABLE_TELEMETRY",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "PATH",
    "TORCH_EXTENSIONS_DIR",
)
RESULTS = ("loss.json", "validation.json")


class TrainingError(LeadreError):
    """Training can't start or was stopped; the message says why, and what a rerun does."""


# --- what the ranks read ------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """Cases on which the best weights of a training are chosen, by HR@10.

    `prompts` [cases]; `target` is int64 [cases], rows of the index; `unwanted` are for each case
    the rows that it must not get, or None; `index` holds the objects that may be written.
    """

    prompts: list[str]
    target: np.ndarray
    unwanted: list[np.ndarray] | None
    index: ConstraintIndex

    def save(self, folder: Path) -> None:
        """Write into a new folder."""
        folder.mkdir(parents=True)
        none: list[list[int]] = [[] for _ in self.prompts]
        unwanted = none if self.unwanted is None else [u.tolist() for u in self.unwanted]
        table = {
            "prompt": pa.array(self.prompts, pa.string()),
            "target": pa.array(self.target, pa.int64()),
            "unwanted": pa.array(unwanted, pa.list_(pa.int64())),
        }
        pq.write_table(pa.table(table), folder / "cases.parquet")
        self.index.save(folder / "constraint.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Validation:
        """Read what `save` wrote."""
        table = pq.read_table(folder / "cases.parquet")
        return cls(
            table["prompt"].to_pylist(),
            table["target"].to_numpy(),
            [np.array(rows, np.int64) for rows in table["unwanted"].to_pylist()],
            ConstraintIndex.load(folder / "constraint.safetensors"),
        )


def prepare_sft(
    examples: pa.Table,
    work: Path,
    base_release: Path | None,
    settings: Settings,
    sid_vocab: Sequence[str],
    meanings: models.Meanings | None = None,
    validation: Validation | None = None,
) -> None:
    """Write what supervised fine-tuning reads, in `work/sft`; keep what is there if it is equal.

    Args:
        examples: columns `prompt`, `response`, `weight` and `request_id`. Examples of one request
            share what their prompts begin with (see `packing`); null: an example by itself. What
            the loss is on, `settings.sft.loss_on` says; weights are taken relative to the mean of
            all labels.
        work: the day's scratch folder.
        base_release: a folder whose `model/` training goes on from; its tokenizer is kept, and new
            tokens of `sid_vocab` are added. None: `settings.model.base`, or a model from scratch.
        settings: sections `model` and `sft`, and the seed.
        sid_vocab: all Semantic ID tokens (`model.sid_tokens`).
        meanings: of the tokens of `sid_vocab` and of words, where a new model's embeddings start.
        validation: without it the last weights are the result.

    Raises:
        TrainingError: a response leaves no room for a prompt.
        ModelError: the base model can't be loaded.
    """
    folder = work / "sft"
    end_ranks(folder)
    staged = _fresh(folder / "prepared")
    model, tokenizer = _start(examples, base_release, settings, sid_vocab, meanings)
    models.save(model, tokenizer, staged / "init")
    examples = _by_request(examples)
    lengths = _write_parts(staged / "train.parquet", _sft_parts(examples, tokenizer, settings))
    section = settings.sft
    rows = training_rows(
        lengths,
        section.row_tokens or settings.model.max_tokens,
        section.batch_size * section.ranks,
        section.epochs,
        section.max_steps,
        settings.seed,
    )
    np.savez(
        staged / "rows.npz",
        sequences=rows.values,
        offsets=rows.offsets,
        mean_weight=_mean_weight(staged / "train.parquet"),
    )
    if validation is not None:
        validation.save(staged / "validation")
    _adopt(staged, folder, staged / "init", settings, section)


def prepare_dpo(lists: pa.Table, work: Path, settings: Settings) -> None:
    """Write what preference optimization of `work/sft/model` reads, in `work/dpo`.

    Args:
        lists: columns `prompt`, `chosen`, `rejected` (list of string, one or more) and `weight`.
        work: the day's scratch folder, with a finished SFT.
        settings: sections `model` and `dpo`, and the seed.

    Raises:
        TrainingError: a response leaves no room for a prompt.
    """
    folder, start = work / "dpo", work / "sft" / "model"
    end_ranks(folder)
    staged = _fresh(folder / "prepared")
    _, tokenizer = models.load(start)
    lengths = _write_parts(staged / "train.parquet", _dpo_parts(lists, tokenizer, settings))
    section = settings.dpo
    batch, steps = section.batch_size * section.ranks, training_steps(len(lengths), section)
    np.save(staged / "order.npy", training_order(lengths, batch, steps, settings.seed))
    _adopt(staged, folder, start, settings, section)


def _start(
    examples: pa.Table,
    base_release: Path | None,
    settings: Settings,
    sid_vocab: Sequence[str],
    meanings: models.Meanings | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that training starts from."""
    if base_release is None and not settings.model.base:
        # What many examples say counts once: a prompt stands in each example of its request.
        columns = (pc.unique(examples[name]) for name in ("prompt", "response"))
        texts = (str(text) for column in columns for text in column.to_pylist())
        phrases = load_template(settings.prompt.language).phrases
        tokenizer = models.build_tokenizer(texts, sid_vocab, settings.model.vocabulary, phrases)
        return models.build_model(settings.model, tokenizer, settings.seed, meanings), tokenizer
    model: PreTrainedModel
    base: PreTrainedTokenizerBase
    if base_release is not None:
        model, base = models.load(base_release / "model")
    else:
        model, base = models.load_base(settings.model.base)
    models.add_sid_tokens(model, base, sid_vocab, settings.seed)
    return model, base


def _by_request(examples: pa.Table) -> pa.Table:
    """The examples in an order in which those of a request are neighbours; `group` numbers them."""
    request = examples["request_id"].combine_chunks().dictionary_encode()
    alone = np.arange(len(examples)) + len(request.dictionary)
    group = np.where(
        pc.is_null(request.indices), alone, pc.fill_null(request.indices, -1).to_numpy()
    )
    ordered = examples.append_column("group", pa.array(group))
    return ordered.take(pa.array(np.argsort(group, kind="stable")))


def _sft_parts(
    examples: pa.Table, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Iterator[pa.Table]:
    """Packed sequences, some thousand examples at a time; no request is parted by that."""
    on_prompts = settings.sft.loss_on == "semantic_ids"
    known = np.array(sorted(models.sid_ids(tokenizer)) if on_prompts else [], np.int64)
    weights = examples["weight"].to_numpy().astype(np.float32)
    if not len(weights):
        return
    if not weights.sum() > 0:
        raise TrainingError("no example has a weight above 0: check the weights of the tasks")
    groups, limit = examples["group"].to_numpy(), settings.model.max_tokens
    opens = np.flatnonzero(np.diff(groups, prepend=-1))
    starts = opens[np.searchsorted(opens, np.arange(0, len(groups), CHUNK_ROWS), "right") - 1]
    for start, stop in pairwise([*np.unique(starts), len(groups)]):
        part = examples.slice(start, stop - start)
        answers = _answers(tokenizer, part["response"].to_pylist())
        prompts = Ragged.of(_prompts(tokenizer, part["prompt"].to_pylist(), answers, limit))
        learnt = np.isin(prompts.values, known)
        chosen = slice(start, stop)
        yield sequences(prompts, learnt, Ragged.of(answers), weights[chosen], groups[chosen], limit)


def _dpo_parts(
    lists: pa.Table, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Iterator[pa.Table]:
    """Parts with `input_ids`, `branches` and `weight`: one sequence a list, its prompt read once.

    The sequence is the prompt but for its last token, and then a branch an answer: that last token
    and the answer. So every token of an answer follows what it is predicted from. `branches` is 0
    on the prompt, 1 on the branch of the chosen, and 2 and so on where answers were rejected.
    """
    for chunk in _chunks(lists, ("prompt", "chosen", "rejected", "weight")):
        texts = [[c, *r] for c, r in zip(chunk["chosen"], chunk["rejected"], strict=True)]
        flat = iter(_answers(tokenizer, [text for each in texts for text in each]))
        answers = [[next(flat) for _ in each] for each in texts]
        longest = [max(each, key=len) for each in answers]
        prompts = _prompts(tokenizer, chunk["prompt"], longest, settings.model.max_tokens)
        inputs, branches = [], []
        for prompt, each in zip(prompts, answers, strict=True):
            inputs.append(prompt[:-1] + [t for answer in each for t in (prompt[-1], *answer)])
            numbers = [n for n, answer in enumerate(each, 1) for _ in range(len(answer) + 1)]
            branches.append([0] * (len(prompt) - 1) + numbers)
        ids = pa.list_(pa.int32())
        columns = {"input_ids": pa.array(inputs, ids), "branches": pa.array(branches, ids)}
        yield pa.table({**columns, "weight": pa.array(chunk["weight"], pa.float32())})


def _chunks(table: pa.Table, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    for batch in table.select(names).to_batches(max_chunksize=CHUNK_ROWS):
        yield {name: batch[name].to_pylist() for name in names}


def _answers(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of responses, each closed by the EOS token."""
    return [
        [*ids, tokenizer.eos_token_id]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]


def _prompts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], answers: list[list[int]], limit: int
) -> list[list[int]]:
    """Token ids of prompts, shortened so that the answer fits within `limit` tokens too."""
    longest = max(map(len, answers))
    if longest >= limit:
        raise TrainingError(
            f"a response of {longest} tokens leaves no room for a prompt: raise model.max_tokens"
            f" (now {limit})"
        )
    asked = list(zip(texts, (limit - len(answer) for answer in answers), strict=True))
    distinct = list(dict.fromkeys(asked))  # examples of a request say the same
    # As the decoder reads prompts.
    found = fit([text for text, _ in distinct], tokenizer, [room for _, room in distinct])
    tokens = dict(zip(distinct, found, strict=True))
    return [tokens[each] for each in asked]


def _write_parts(path: Path, parts: Iterator[pa.Table]) -> np.ndarray:
    """Write token ids, the first column; return the tokens of each row, int64 [rows]."""
    writer: pq.ParquetWriter | None = None
    lengths = []
    for table in parts:
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        lengths.append(pc.list_value_length(table[0]).to_numpy())
    if writer is None:
        raise TrainingError("no examples to train on")
    writer.close()
    return np.concatenate(lengths).astype(np.int64)


def _mean_weight(path: Path) -> float:
    """Of the labels of packed sequences."""
    total, labels = 0.0, 0
    for batch in pq.ParquetFile(path).iter_batches(columns=["labels", "weights"]):
        learnt = batch["labels"].flatten().to_numpy() != NO_LABEL
        total += float(batch["weights"].flatten().to_numpy()[learnt].sum(dtype=np.float64))
        labels += int(learnt.sum())
    return total / labels


def training_rows(
    lengths: np.ndarray, capacity: int, batch: int, epochs: float, max_steps: int, seed: int
) -> Ragged:
    """Which sequences each row holds, in the order of the steps, by the seed alone.

    One random permutation of the sequences after the other. Rows are filled from some steps' worth
    of sequences at a time and shuffled among these, so that they are nearly full.

    Args:
        lengths: tokens of each sequence, int [sequences].
        capacity: tokens of a row.
        batch: rows a step, all ranks together.
        epochs: how often each sequence is taken, if `max_steps` is 0.
        max_steps: optimizer steps, as many epochs as they take.
        seed: of the random choices.

    Returns:
        Sequence numbers, one list a row; rows a multiple of `batch`, at least one step.
    """
    rng = np.random.default_rng(seed)
    window = max(1, round(batch * BUCKET_STEPS * capacity / max(lengths.mean(), 1)))
    rows: list[list[int]] = []
    left = round(epochs * len(lengths))
    while len(rows) < max_steps * batch or (not max_steps and left > 0) or len(rows) < batch:
        taken = rng.permutation(len(lengths))[: None if max_steps else max(left, 1)]
        left -= len(taken)
        for part in np.split(taken, np.arange(window, len(taken), window)):
            filled = fill_rows(lengths[part], capacity)
            rows += [part[filled[row]].tolist() for row in rng.permutation(len(filled))]
    steps = max_steps or max(1, len(rows) // batch)
    return Ragged.of(rows[: steps * batch])


def training_order(lengths: np.ndarray, batch: int, steps: int, seed: int) -> np.ndarray:
    """Which example each step takes, int64 [steps * batch], by the seed alone.

    One random permutation of the examples after the other. Within a bucket of steps examples are
    sorted by length, so that a step pads little and the ranks finish together, and the steps are
    shuffled.

    Args:
        lengths: tokens of each example, int [examples].
        batch: examples a step, all ranks together.
        steps: optimizer steps.
        seed: of the random choices.
    """
    rng = np.random.default_rng(seed)
    rounds = -(-steps * batch // len(lengths))
    taken = rng.permuted(np.tile(np.arange(len(lengths)), (rounds, 1)), axis=1)
    taken = taken.ravel()[: steps * batch]
    bucket = np.arange(len(taken)) // (batch * BUCKET_STEPS)
    by_step = taken[np.lexsort((lengths[taken], bucket))].reshape(steps, batch)
    return by_step[np.lexsort((rng.random(steps), np.arange(steps) // BUCKET_STEPS))].ravel()


def training_steps(examples: int, section: TrainingSettings) -> int:
    """Optimizer steps that the settings ask for."""
    return section.max_steps or max(
        1, round(section.epochs * examples / (section.batch_size * section.ranks))
    )


def _adopt(
    staged: Path, folder: Path, init: Path, settings: Settings, section: TrainingSettings
) -> None:
    """Move what was prepared into the stage's folder, unless the folder holds the same already."""
    own = sorted(path for path in staged.rglob("*") if path.is_file() and init not in path.parents)
    fingerprint = {
        "prepared": {str(path.relative_to(staged)): _sha256(path) for path in own},
        "init": {path.name: _sha256(path) for path in sorted(init.iterdir())},
        "settings": section.model_dump(
            mode="json", exclude={"hostfile", "master_port", "checkpoint_steps"}
        ),
        "deepspeed": _sha256(deepspeed_config(section)),
        "seed": settings.seed,
    }
    if read_json(folder / "fingerprint.json") == fingerprint:
        log.info("%s: examples, settings and first weights are as before", folder.name)
    else:
        _clear(folder)
        for path in staged.iterdir():
            path.rename(folder / path.name)
        write_json(folder / "fingerprint.json", fingerprint)
    shutil.rmtree(staged)


def _clear(folder: Path) -> None:
    """Remove what this module writes; the fingerprint first, for it vouches for the rest."""
    (folder / "fingerprint.json").unlink(missing_ok=True)
    for name in (
        "train.parquet",
        "order.npy",
        "rows.npz",
        "reference.npy",
        "run.json",
        "hosts.env",
        *RESULTS,
    ):
        (folder / name).unlink(missing_ok=True)
    for name in ("model", "best", "checkpoints", "init", "validation"):
        shutil.rmtree(folder / name, ignore_errors=True)


# --- the launcher -------------------------------------------------------------------------------


def run_ranks(stage: Stage, work: Path, settings: Settings) -> Path:
    """Train what was prepared, resuming where an earlier attempt stopped; return `model/`.

    Ranks that an earlier attempt left behind are ended first. A polite kill (SIGTERM) of this
    process ends its ranks.

    Raises:
        TrainingError: there is no compiler, not enough GPUs, a hostfile that does not fit, or a
            rank failed.
    """
    folder = work / stage
    section: TrainingSettings = settings.sft if stage == "sft" else settings.dpo
    end_ranks(folder)
    if not (folder / "fingerprint.json").is_file():
        raise TrainingError(f"{folder}: nothing is prepared there")
    if (folder / "model").is_dir():
        log.info("%s: already trained, %s", stage, folder / "model")
        return folder / "model"
    _check_machine(section)
    _clear_stale_locks()
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint:
        log.info("%s: resuming from %s", stage, checkpoint)
    write_json(folder / "run.json", rank_arguments(stage, work, section, settings, checkpoint))
    code = _launch(folder, section)
    if not (folder / "model").is_dir():
        raise TrainingError(
            f"{stage}: the ranks stopped with exit code {code} before the end (their errors are"
            f" above); a rerun resumes from {newest_checkpoint(folder / 'checkpoints') or 'step 0'}"
        )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "model"


def rank_arguments(
    stage: Stage,
    work: Path,
    section: TrainingSettings,
    settings: Settings,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """What a rank needs to know, as `run.json` holds it."""
    return {
        "stage": stage,
        "init": str(work / "sft" / ("init" if stage == "sft" else "model")),
        "resume": str(checkpoint) if checkpoint else None,
        "seed": settings.seed,
        "section": section.model_dump(),
        "decoding": settings.decoding.model_dump(),
        "max_tokens": settings.model.max_tokens,
        "launcher": None if section.hostfile else _identity(psutil.Process()),
    }


def _launch(folder: Path, section: TrainingSettings) -> int:
    """Run DeepSpeed's launcher and wait for it; all its processes are gone afterwards."""
    with socket.socket() as probe:  # the default port may be taken by another day's training
        probe.bind(("", 0))
        port = section.master_port or probe.getsockname()[1]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    if not torch.cuda.is_available():
        threads = max(1, len(os.sched_getaffinity(0)) // _ranks_of_a_host(section))
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    if section.hostfile:
        # Also a single host is one that the file names; DeepSpeed would take this machine for it.
        where = ["--hostfile", str(REPOSITORY / section.hostfile), "--force_multi"]
        environment["DS_ENV_FILE"] = str(_write_exports(folder, environment))
    else:
        where = ["--num_accelerators", str(section.ranks)]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *where]
    command += ["--master_port", str(port), "--log_level", "error"]
    command += ["--module", "jobs.train_rank", str(folder)]
    with _polite():
        launcher = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, start_new_session=True
        )
        try:
            write_json(folder / "ranks.json", _identity(psutil.Process(launcher.pid)))
            return launcher.wait()
        finally:
            if section.hostfile and launcher.poll() is None:
                launcher.terminate()  # which ends the ranks of all hosts
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(HOSTS_SECONDS)
            end_ranks(folder)
            launcher.wait()
            # DeepSpeed leaves the ranks' shared memory, 69 MB each, behind.
            for buffer in Path("/dev/shm").glob(  # noqa: S108 (where DeepSpeed puts it)
                f"deepspeed_allreduce_buffer_*_{port}_*"
            ):
                buffer.unlink(missing_ok=True)


def _write_exports(folder: Path, environment: dict[str, str]) -> Path:
    """What ranks on other hosts get of the environment, as DeepSpeed reads it.

    DeepSpeed itself hands on what begins with `PYTHON` or `NCCL`, and its own file of the user's
    or of the repository, which ours replaces and therefore begins with.
    """
    named = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    own = (place / named for place in (Path.home(), REPOSITORY))
    lines = [line for path in own if path.is_file() for line in path.read_text().splitlines()]
    lines += [f"{name}={environment[name]}" for name in EXPORTED if name in environment]
    path = folder / "hosts.env"
    path.write_text("".join(f"{line}\n" for line in lines if line.strip()), encoding="utf-8")
    return path


@contextmanager
def _polite() -> Iterator[None]:
    """Turn SIGTERM into an exit that runs `finally` blocks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_machine(section: TrainingSettings) -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++")):
        raise TrainingError(
            "DeepSpeed compiles an extension and finds no C++ compiler: install g++"
        )
    if section.hostfile:
        slots = _slots(REPOSITORY / section.hostfile)
        if sum(slots.values()) != section.ranks:
            raise TrainingError(
                f"{section.hostfile} has {sum(slots.values())} slots, the settings ask for"
                f" {section.ranks} ranks: let them be equal"
            )
        missing = [name for name in ("ssh", "pdsh") if not shutil.which(name)]
        if missing:
            raise TrainingError(
                f"DeepSpeed reaches the hosts of {section.hostfile} by {missing[0]}: install it"
            )
    elif torch.cuda.is_available() and torch.cuda.device_count() < section.ranks:
        raise TrainingError(
            f"{section.ranks} ranks need as many GPUs, and there are {torch.cuda.device_count()}:"
            " lower ranks"
        )


def _slots(hostfile: Path) -> dict[str, int]:
    """Ranks that each host of a DeepSpeed hostfile (`host slots=8` a line) offers."""
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TrainingError(f"hostfile {hostfile}: {error.strerror}") from None
    slots: dict[str, int] = {}
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if match is None or match[1] in slots:
            raise TrainingError(
                f"hostfile {hostfile}: {line!r} is not a line like `host slots=8`, or the host has"
                " two"
            )
        slots[match[1]] = int(match[2])
    return slots


def _ranks_of_a_host(section: TrainingSettings) -> int:
    return (
        max(_slots(REPOSITORY / section.hostfile).values()) if section.hostfile else section.ranks
    )


def deepspeed_config(section: TrainingSettings) -> Path:
    """The DeepSpeed configuration that the settings name, a file in `conf`."""
    path = REPOSITORY / "conf" / section.deepspeed
    if not path.is_file():
        raise TrainingError(f"deepspeed {section.deepspeed!r}: no file {path}")
    return path


def _clear_stale_locks() -> None:
    """Remove the locks of extension builds whose builder is gone: waiting on one never ends."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    deadline = time.monotonic() + LOCK_SECONDS
    for lock in root.glob("**/lock"):
        while lock.exists():
            if not _building(lock.parent) and time.time() - lock.stat().st_mtime > 10:
                log.warning("removing the stale lock of a build that was killed: %s", lock)
                lock.unlink(missing_ok=True)
            elif time.monotonic() > deadline:
                raise TrainingError(f"{lock}: another process has been building for minutes")
            else:
                time.sleep(1)


def _building(folder: Path) -> bool:
    return any(
        process.info["name"] in BUILDERS and process.info["cwd"] == str(folder)
        for process in psutil.process_iter(["name", "cwd"])
    )


# --- who the ranks are --------------------------------------------------------------------------


def _identity(process: psutil.Process) -> dict[str, float]:
    """A process id alone may belong to another process by now."""
    return {"pid": process.pid, "create_time": process.create_time()}


def is_alive(identity: dict[str, float]) -> bool:
    """Whether the process of this identity still runs."""
    try:
        process = psutil.Process(int(identity["pid"]))
        same = process.create_time() == identity["create_time"]
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_ranks(folder: Path) -> None:
    """End the launcher that an attempt recorded in `folder`, and every rank that it started.

    The launcher leads a session of its own. Its number stays taken for as long as one of the
    session lives, so the ranks are found by it even when all between them and us are gone.
    """
    leader = read_json(folder / "ranks.json")
    if leader is None:
        return
    if psutil.pid_exists(int(leader["pid"])) and not is_alive(leader):
        members = []  # the number is another process's by now, so the session is over
    else:
        members = [p for p in psutil.process_iter() if _session(p.pid) == leader["pid"]]
    for process in members:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(members, timeout=30)
    if members:
        log.warning("ended %d processes of an unfinished %s", len(members), folder.name)
    (folder / "ranks.json").unlink()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


# --- checkpoints --------------------------------------------------------------------------------


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged and unfinished ones are deleted on the way."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        if read_json(path / "complete.json") == _contents(path):
            return path
        log.warning("%s is damaged or unfinished: removed", path)
        shutil.rmtree(path)
    return None


def seal_checkpoint(path: Path) -> None:
    """Vouch for a checkpoint, when all ranks have written theirs."""
    write_json(path / "complete.json", _contents(path))


def _contents(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(path)): _sha256(file) for file in files if file.name != "complete.json"
    }


# --- files --------------------------------------------------------------------------------------


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The file's content; None where it is missing or damaged, as a kill may leave it."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
