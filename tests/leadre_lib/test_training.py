"""Training by two real DeepSpeed ranks, stopped and damaged as was seen to happen."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from leadre_lib import training
from leadre_lib.constraint_index import ConstraintIndex
from leadre_lib.decoding import BeamDecoder
from leadre_lib.errors import LeadreError
from leadre_lib.model import load, sid_ids, sid_token_ids, sid_tokens
from leadre_lib.packing import NO_LABEL, Ragged
from leadre_lib.settings import (
    REPOSITORY,
    DecodingSettings,
    DpoSettings,
    ModelSettings,
    Settings,
    SftSettings,
    TrainingSettings,
)
from leadre_lib.training_rank import Rows, kept

SIZES = (4, 4, 2)
EXAMPLES = 60


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(
        model=ModelSettings(
            hidden_size=32, intermediate_size=64, layers=2, vocabulary=300, max_tokens=48
        ),
        sft=SftSettings(
            max_steps=8, batch_size=2, checkpoint_steps=2, learning_rate=0.02, validations=4
        ),
        dpo=DpoSettings(max_steps=3, batch_size=4, checkpoint_steps=2),
        decoding=DecodingSettings(beam=16),
    )


@pytest.fixture(scope="module")
def examples() -> pa.Table:
    """A user's prompt names the codes of the ad that they want; each request has two of them."""
    codes = np.random.default_rng(0).integers(0, SIZES, (EXAMPLES, 3))
    codes[1::2, :2] = codes[::2, :2]
    return examples_of(codes, [f"request-{n // 2}" for n in range(EXAMPLES)])


def examples_of(codes: np.ndarray, requests: list[str | None]) -> pa.Table:
    prompts = [f"user{'*' * (a + b)} likes {a} and {b}" for a, b, _ in codes]
    responses = [f"<a_{a}><b_{b}><c_{c}>" for a, b, c in codes]
    return pa.table(
        {
            "prompt": prompts,
            "response": responses,
            "weight": np.ones(len(codes)),
            "request_id": pa.array(requests, pa.string()),
        }
    )


def cases() -> training.Validation:
    """Every user's prompt, with one of the ads that the user wants."""
    objects = np.array([(a, b, c) for a in range(4) for b in range(4) for c in range(2)], np.int32)
    prompts = examples_of(objects, [None] * len(objects))["prompt"].to_pylist()
    index = ConstraintIndex.build(objects, SIZES)
    return training.Validation(prompts, np.arange(len(objects)), None, index)


def prepare(examples: pa.Table, work: Path, settings: Settings) -> None:
    training.prepare_sft(examples, work, None, settings, sid_tokens(SIZES), None, cases())


@pytest.fixture(scope="module")
def trained(
    examples: pa.Table, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The work folder of an SFT that nothing disturbed."""
    work = tmp_path_factory.mktemp("trained")
    prepare(examples, work, settings)
    shared = set(Path("/dev/shm").glob("deepspeed_*"))
    training.run_ranks("sft", work, settings)
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= shared  # no memory is left behind
    return work


def weights(work: Path, stage: str = "sft") -> dict[str, np.ndarray]:
    return load_file(work / stage / "model" / "model.safetensors")


def validations(work: Path) -> list[dict[str, float]]:
    """The validation curve of an SFT."""
    curve: list[dict[str, float]] = json.loads((work / "sft" / "validation.json").read_text())
    return curve


def assert_same(work: Path, other: Path) -> None:
    ours, theirs = weights(work), weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)
    for name in ("loss.json", "validation.json"):
        curves = [json.loads((path / "sft" / name).read_text()) for path in (work, other)]
        assert curves[0] == curves[1]


def test_sft_learns_and_leaves_a_model(trained: Path, settings: Settings) -> None:
    curve = json.loads((trained / "sft" / "loss.json").read_text())
    assert [entry["step"] for entry in curve] == list(range(1, len(curve) + 1))
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    model, tokenizer = load(trained / "sft" / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert {weight.dtype for weight in weights(trained).values()} == {np.dtype(np.float32)}
    assert not (trained / "sft" / "checkpoints").exists()


def test_the_best_of_the_validated_weights_are_kept(trained: Path, settings: Settings) -> None:
    curve = validations(trained)
    assert [entry["step"] for entry in curve] == [2, 4, 6, 8][: len(curve)]
    best = curve[kept([entry["HR@10"] for entry in curve], len(cases().prompts))]
    assert [entry["kept"] for entry in curve] == [entry is best for entry in curve]
    model, tokenizer = load(trained / "sft" / "model")
    chosen = cases()
    decoder = BeamDecoder(
        model,
        tokenizer,
        chosen.index,
        sid_token_ids(tokenizer, SIZES),
        settings.decoding,
        settings.model.max_tokens,
    )
    found, _ = decoder.decode(chosen.prompts, 10)
    assert (found == chosen.target[:, None]).any(axis=1).mean() == pytest.approx(best["HR@10"])


def test_later_weights_are_kept_unless_they_are_worse() -> None:
    assert kept([0.1], 500) == 0
    assert kept([0.1, 0.2, 0.15], 500) == 1
    assert kept([0.1, 0.154, 0.148, 0.140], 500) == 3  # seven cases of 500
    assert kept([0.1, 0.154, 0.148, 0.136], 500) == 2
    assert kept([0.1, 0.154, 0.148, 0.146], 50_000) == 1
    assert kept([0.0, 0.0], 500) == 1


def test_a_finished_training_is_not_repeated(
    trained: Path, examples: pa.Table, settings: Settings
) -> None:
    before = (trained / "sft" / "model" / "model.safetensors").stat().st_mtime_ns
    prepare(examples, trained, settings)
    training.run_ranks("sft", trained, settings)
    assert (trained / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_other_examples_start_over(
    trained: Path, examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(trained / "sft", tmp_path / "sft")
    prepare(examples.slice(1), tmp_path, settings)
    assert not (tmp_path / "sft" / "model").exists()
    assert not (tmp_path / "sft" / "loss.json").exists()


def preferences(examples: pa.Table) -> pa.Table:
    """Lists that prefer what each user wants to what the next user wants."""
    others = examples["response"].take(pa.array(np.roll(np.arange(EXAMPLES), 1)))
    return pa.table(
        {
            "prompt": examples["prompt"],
            "chosen": examples["response"],
            "rejected": [[other] for other in others.to_pylist()],
            "weight": np.ones(EXAMPLES),
        }
    )


def test_dpo_goes_on_from_sft(trained: Path, examples: pa.Table, settings: Settings) -> None:
    training.prepare_dpo(preferences(examples), trained, settings)
    training.run_ranks("dpo", trained, settings)
    curve = json.loads((trained / "dpo" / "loss.json").read_text())
    sft = json.loads((trained / "sft" / "loss.json").read_text())
    # At first policy and reference agree: log 2, plus the SFT loss of the chosen.
    (step,) = (int(entry["step"]) for entry in validations(trained) if entry["kept"])
    loss = sft[step - 1]["loss"]
    assert curve[0]["loss"] == pytest.approx(np.log(2) + loss, rel=0.25)
    moved = [not np.array_equal(w, weights(trained)[n]) for n, w in weights(trained, "dpo").items()]
    assert all(moved)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def kill_a_rank_after(step: int, work: Path, stop: threading.Event, rank: int = 1) -> None:
    """`kill -9` of a rank, once a checkpoint of `step` is whole."""
    sealed = work / "sft" / "checkpoints" / f"checkpoint-{step}" / "complete.json"
    while not stop.wait(0.01):
        if sealed.exists():
            for process in psutil.Process().children(recursive=True):
                if f"--local_rank={rank}" in command_of(process):
                    process.kill()
                    return


def test_goes_on_after_a_kill_and_a_damaged_checkpoint(
    trained: Path, examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    prepare(examples, tmp_path, settings)
    stop = threading.Event()
    killer = threading.Thread(target=kill_a_rank_after, args=(4, tmp_path, stop))
    killer.start()
    try:
        with pytest.raises(LeadreError, match="a rerun resumes from"):
            training.run_ranks("sft", tmp_path, settings)
    finally:
        stop.set()
        killer.join()
    checkpoints = tmp_path / "sft" / "checkpoints"
    steps = sorted(
        int(path.name.removeprefix("checkpoint-")) for path in checkpoints.glob("checkpoint-*")
    )
    assert steps[-1] >= 4
    newest = checkpoints / f"checkpoint-{steps[-1]}" / "trainer_state.json"
    newest.write_bytes(newest.read_bytes()[:100])
    prepare(examples, tmp_path, settings)
    training.run_ranks("sft", tmp_path, settings)
    assert_same(tmp_path, trained)


def test_a_killed_launcher_takes_its_ranks_along(
    examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    """SIGTERM ends the ranks at once; what `kill -9` leaves behind, the next attempt ends."""
    endless = settings.model_copy(
        update={"sft": settings.sft.model_copy(update={"max_steps": 20000})}
    )
    prepare(examples, tmp_path, endless)
    job = tmp_path / "job.py"
    job.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from leadre_lib.settings import Settings\nfrom leadre_lib.training import run_ranks\n"
        "settings = Settings.model_validate_json(Path(sys.argv[2]).read_text())\n"
        "run_ranks('sft', Path(sys.argv[1]), settings)\n"
    )
    (tmp_path / "settings.json").write_text(endless.model_dump_json())
    command = [sys.executable, str(job), str(tmp_path), str(tmp_path / "settings.json")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for politely in (True, False):
        process = subprocess.Popen(command, env=environment)
        try:
            ranks = wait_for_ranks(process)
            process.terminate() if politely else process.kill()
            process.wait()
        finally:
            process.kill()
            if not politely:
                training.end_ranks(tmp_path / "sft")
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
        assert not (tmp_path / "sft" / "ranks.json").exists()


def wait_for_ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """DeepSpeed's processes and the two ranks, once they are there."""
    while process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        if sum("--local_rank=" in " ".join(command_of(child)) for child in children) >= 2:
            return children
        time.sleep(0.05)
    raise AssertionError("the job ended by itself")


def test_an_unrelated_process_is_left_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        record = {"pid": process.pid, "create_time": 1.0}
        (tmp_path / "ranks.json").write_text(json.dumps(record))
        training.end_ranks(tmp_path)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_order_takes_every_example_as_often_and_pads_little() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 640)
    order = training.training_order(lengths, batch=32, steps=40, seed=1)
    assert np.bincount(order, minlength=640).tolist() == [2] * 640
    assert np.array_equal(order, training.training_order(lengths, 32, 40, 1))
    assert not np.array_equal(order, training.training_order(lengths, 32, 40, 2))
    steps = lengths[order].reshape(40, 32)
    padding = 1 - steps.sum() / (steps.max(axis=1) * 32).sum()
    assert padding < 0.1
    assert len(set(np.argsort(steps.max(axis=1))[:3]) & {0, 1, 2}) < 3


def test_rows_take_every_sequence_as_often_and_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 900)
    rows = training.training_rows(lengths, 384, batch=1, epochs=2.5, max_steps=0, seed=1)
    taken = np.bincount(rows.values, minlength=900)
    assert set(taken) == {2, 3}
    assert taken.sum() == 2250
    assert lengths[rows.values].sum() > 0.9 * 384 * len(rows.lengths)
    again = training.training_rows(lengths, 384, batch=1, epochs=2.5, max_steps=0, seed=1)
    assert np.array_equal(rows.values, again.values)
    other = training.training_rows(lengths, 384, batch=1, epochs=2.5, max_steps=0, seed=2)
    assert not np.array_equal(rows.values, other.values)
    steps = training.training_rows(lengths, 384, batch=16, epochs=1, max_steps=70, seed=1)
    assert len(steps.lengths) == 70 * 16


def test_weights_are_relative_to_the_mean_of_all_labels(
    examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    unequal = np.where(np.arange(EXAMPLES) % 2, 3.0, 0.5)
    told = examples.set_column(2, "weight", pa.array(unequal))
    prepare(told, tmp_path, settings)
    rows = Rows.open(tmp_path / "sft")
    sequences = len(rows.parts)
    once = Rows(rows.parts, Ragged.of([[n] for n in range(sequences)]), rows.mean_weight)
    found = [once[n] for n in range(sequences)]
    labels = np.concatenate([row["labels"] for row in found]) != NO_LABEL
    weights = np.concatenate([row["weights"] for row in found])[labels]
    assert weights.mean() == pytest.approx(1)
    assert weights.max() == pytest.approx(6 * weights.min())


def test_steps_follow_the_epochs_unless_given() -> None:
    section = TrainingSettings(ranks=2, batch_size=8, epochs=1.5)
    assert training.training_steps(320, section) == 30
    assert training.training_steps(3, section) == 1
    assert training.training_steps(320, section.model_copy(update={"max_steps": 7})) == 7


def test_prompts_are_cut_on_the_left_and_answers_never(
    examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    long = examples.slice(0, 1).to_pylist()[0] | {"prompt": "word " * 400 + "the end"}
    long |= {"response": "<a_1><b_2><c_0>", "request_id": None}
    longer = pa.concat_tables([examples, pa.Table.from_pylist([long], examples.schema)])
    prepare(longer, tmp_path, settings)
    row = pq.read_table(tmp_path / "sft" / "train.parquet").to_pylist()[-1]
    _, tokenizer = load(tmp_path / "sft" / "init")
    assert len(row["tokens"]) == 48
    assert tokenizer.decode(row["tokens"]).endswith("the end<a_1><b_2><c_0><|endoftext|>")
    kept = [token for token in row["labels"] if token != NO_LABEL]
    assert tokenizer.decode(kept) == "<a_1><b_2><c_0><|endoftext|>"
    endless = pa.Table.from_pylist([long | {"response": "word " * 400}], examples.schema)
    with pytest.raises(LeadreError, match="no room"):
        prepare(endless, tmp_path, settings)


def test_prompts_lose_their_oldest_behaviours_first(
    examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    """As decoding reads them, see `tests/leadre_lib/test_budget.py`."""
    role = "You are an ad recommendation system."
    behaviours = [f"{n}*click*<a_{n % 4}><b_0><c_0>" for n in range(9, 0, -1)]
    prompt = (
        f"{role}\nRecent behaviours: {'; '.join(behaviours)}.\n"
        "What ad will the user be interested in next?\nAnswer: "
    )
    row = {"prompt": prompt, "response": "<a_1><b_2><c_0>", "weight": 1.0, "request_id": None}
    long = pa.Table.from_pylist([row] * 30, examples.schema)
    roomy = settings.model_copy(
        update={"model": settings.model.model_copy(update={"max_tokens": 50})}
    )
    prepare(pa.concat_tables([examples, long]), tmp_path, roomy)
    row = pq.read_table(tmp_path / "sft" / "train.parquet").to_pylist()[-1]
    _, tokenizer = load(tmp_path / "sft" / "init")
    text = tokenizer.decode(row["tokens"])
    assert len(row["tokens"]) <= 50 < len(tokenizer(prompt)["input_ids"])
    kept = sum(behaviour in text for behaviour in behaviours)
    assert 0 < kept < len(behaviours)
    shorter = "; ".join(behaviours[-kept:])
    assert text == prompt.replace("; ".join(behaviours), shorter) + ("<a_1><b_2><c_0><|endoftext|>")


def test_warm_start_keeps_weights_and_tokens(
    trained: Path, examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    """A release is a folder with `model/`; codes that are new since get tokens of their own."""
    wider = sid_tokens((4, 4, 3))
    training.prepare_sft(examples, tmp_path, trained / "sft", settings, wider)
    start, tokenizer = load(tmp_path / "sft" / "init")
    old = weights(trained)["model.embed_tokens.weight"]
    new = start.get_input_embeddings().weight.detach().numpy()
    assert len(new) == len(old) + 1 == len(tokenizer)
    np.testing.assert_array_equal(new[: len(old)], old)


def test_says_what_is_missing(
    examples: pa.Table, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LeadreError, match="nothing is prepared"):
        training.run_ranks("sft", tmp_path, settings)
    model = settings.model.model_copy(update={"base": str(tmp_path / "no_model")})
    with pytest.raises(LeadreError, match="no_model"):
        prepare(examples, tmp_path, settings.model_copy(update={"model": model}))
    with pytest.raises(LeadreError, match="no examples"):
        prepare(examples.slice(0, 0), tmp_path, settings)
    section = settings.sft.model_copy(update={"deepspeed": "none.json"})
    with pytest.raises(LeadreError, match=r"none\.json"):
        prepare(examples, tmp_path, settings.model_copy(update={"sft": section}))
    prepare(examples, tmp_path, settings)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LeadreError, match="install g"):
        training.run_ranks("sft", tmp_path, settings)


def programs(folder: Path, **scripts: str) -> str:
    """A PATH that begins with these shell scripts."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_hostfile_slots_must_match(
    examples: pa.Table, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    section = settings.sft.model_copy(update={"hostfile": str(hosts)})
    elsewhere = settings.model_copy(update={"sft": section})
    prepare(examples, tmp_path, elsewhere)
    for text, message in (
        ("# ours\nfirst slots=4\nsecond slots=4  # spare\n", "8 slots.* 2 ranks"),
        ("# none\n", "0 slots"),
        ("first\n", "'first' is not a line like"),
        ("first slots=1\nfirst slots=1\n", "the host has two"),
        ("first slots=one\n", "slots=one"),
    ):
        hosts.write_text(text)
        with pytest.raises(LeadreError, match=message):
            training.run_ranks("sft", tmp_path, elsewhere)
    hosts.unlink()
    with pytest.raises(LeadreError, match="hosts: No such file"):
        training.run_ranks("sft", tmp_path, elsewhere)
    hosts.write_text("first slots=2\n")
    monkeypatch.setattr(training.shutil, "which", lambda name: None if name == "pdsh" else name)
    with pytest.raises(LeadreError, match="by pdsh: install it"):
        training.run_ranks("sft", tmp_path, elsewhere)


@pytest.mark.parametrize("hosts", [("first", "second"), ("first",)])
def test_other_hosts_are_told_what_this_one_knows(
    hosts: tuple[str, ...],
    examples: pa.Table,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's own launcher, as far as the shell that would carry the command to the hosts."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{host} slots={2 // len(hosts)}\n" for host in hosts))
    section = settings.sft.model_copy(update={"hostfile": str(hostfile), "master_port": 29611})
    elsewhere = settings.model_copy(update={"sft": section})
    told = tmp_path / "told"
    path = programs(
        tmp_path / "bin",
        ssh=f'echo "$@" >> {tmp_path}/ssh; echo 10.0.0.7 10.1.0.7',
        pdsh=f'for word in "$@"; do echo "$word"; done > {told}; exit 3',
    )
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/ext/of us")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "mine"))
    (tmp_path / "mine").write_text("MY_FABRIC=ib0\n")
    prepare(examples, tmp_path, elsewhere)
    with pytest.raises(LeadreError, match="exit code 3"):
        training.run_ranks("sft", tmp_path, elsewhere)
    words = told.read_text().splitlines()
    assert words[words.index("-w") + 1] == ",".join(hosts)
    assert "first" in (tmp_path / "ssh").read_text()
    exports = next(word for word in words if word.startswith("export "))
    for setting in (
        f"PYTHONPATH={REPOSITORY}:/some/where",
        'TORCH_EXTENSIONS_DIR="/ext/of us"',
        f"PATH={path}",
        "MY_FABRIC=ib0",
        "DS_ACCELERATOR=cpu",
        f"OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) * len(hosts) // 2)}",
    ):
        assert f"export {setting};" in exports
    assert f"cd {REPOSITORY};" in words
    assert {"--node_rank=%n", "--master_addr=10.0.0.7", "--master_port=29611"} <= set(words)
    world = next(word for word in words if word.startswith("--world_info="))
    slots = json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))
    assert slots == {host: [*range(2 // len(hosts))] for host in hosts}
    assert "--module" in words
    assert words[-2:] == ["jobs.train_rank", str(tmp_path / "sft")]
    assert json.loads((tmp_path / "sft" / "run.json").read_text())["launcher"] is None


def test_stale_build_locks_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "some_extension" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    training._clear_stale_locks()
    assert not lock.exists()


def one_rank(settings: Settings, **options: object) -> Settings:
    """The settings with one rank of SFT that sees as many rows a step, and other options."""
    update = {"ranks": 1, "batch_size": 2 * settings.sft.batch_size, **options}
    return settings.model_copy(update={"sft": settings.sft.model_copy(update=update)})


def losses(work: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((work / "sft" / "loss.json").read_text())]


def test_adapters_train_little_and_leave_a_plain_model(
    trained: Path, examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    section = one_rank(settings, lora_rank=4, max_steps=20, patience=10)
    prepare(examples, tmp_path, section)
    start = load_file(tmp_path / "sft" / "init" / "model.safetensors")
    training.run_ranks("sft", tmp_path, section)
    # An adapter starts as nothing, so the first step is that of a training of all weights.
    assert losses(tmp_path)[0] == pytest.approx(losses(trained)[0], rel=1e-4)
    assert losses(tmp_path)[-1] < 0.9 * losses(tmp_path)[0]
    end, (_, tokenizer) = weights(tmp_path), load(tmp_path / "sft" / "model")
    assert end.keys() == start.keys()
    moved = {name for name in start if not np.array_equal(start[name], end[name])}
    assert moved == {n for n in start if "_proj.weight" in n or "embed_tokens" in n}
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert np.linalg.matrix_rank(end[layer] - start[layer], tol=1e-5) <= 4
    rows = start["model.embed_tokens.weight"] != end["model.embed_tokens.weight"]
    semantic = np.isin(np.arange(len(rows)), [*sid_ids(tokenizer)])
    assert not rows[~semantic].any()
    assert rows[semantic].any()
    # Validation decoded what is kept: the last weights alone are not what it measured before.
    assert len({entry["NDCG@10"] for entry in validations(tmp_path)}) > 1


def test_dpo_by_adapters_starts_from_the_sft_model(
    trained: Path, examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(trained / "sft", tmp_path / "sft")
    update = {"lora_rank": 2, "ranks": 1, "max_steps": 20, "learning_rate": 0.01}
    section = settings.model_copy(update={"dpo": settings.dpo.model_copy(update=update)})
    training.prepare_dpo(preferences(examples), tmp_path, section)
    training.run_ranks("dpo", tmp_path, section)
    curve = json.loads((tmp_path / "dpo" / "loss.json").read_text())
    losses = [entry["loss"] for entry in curve]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])  # batches differ: no single one tells
    start, end = weights(tmp_path), weights(tmp_path, "dpo")
    assert start.keys() == end.keys()
    moved = {name for name in start if not np.array_equal(start[name], end[name])}
    assert moved == {n for n in start if "_proj.weight" in n or "embed_tokens" in n}


def test_adapters_go_on_after_a_stop(
    examples: pa.Table, settings: Settings, tmp_path: Path
) -> None:
    section = one_rank(settings, lora_rank=2, deepspeed="deepspeed_cpu_zero2.json")
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        prepare(examples, folder, section)
    training.run_ranks("sft", folders[0], section)
    ended = threading.Event()
    killer = threading.Thread(target=kill_a_rank_after, args=(4, folders[1], ended, 0))
    killer.start()
    try:
        with pytest.raises(LeadreError, match=r"a rerun resumes from .*checkpoint"):
            training.run_ranks("sft", folders[1], section)
    finally:
        ended.set()
        killer.join()
    training.run_ranks("sft", folders[1], section)
    assert_same(*folders)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_zero_parts_gives_the_same_model(
    trained: Path, examples: pa.Table, settings: Settings, tmp_path: Path, stage: int
) -> None:
    """ZeRO-2 parts gradients and optimizer state, ZeRO-3 the weights, too; all ranks' together are
    those of ranks that part nothing, validation's too.
    """
    section = settings.sft.model_copy(update={"deepspeed": f"deepspeed_cpu_zero{stage}.json"})
    parted = settings.model_copy(update={"sft": section})
    prepare(examples, tmp_path, parted)
    training.run_ranks("sft", tmp_path, parted)
    np.testing.assert_allclose(losses(tmp_path), losses(trained), rtol=1e-3)
    ours, theirs = weights(tmp_path), weights(trained)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_allclose(weight, theirs[name], atol=2e-3, err_msg=name)
