"""The preference loss against TRL's own, and two real ranks that are stopped and go on."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from leadre_lib import model as models
from leadre_lib import training
from leadre_lib.errors import LeadreError
from leadre_lib.preference_rank import (
    Batch,
    ListCollator,
    PreferenceTrainer,
    answer_log_probs,
    list_losses,
    reference_log_probs,
)
from leadre_lib.settings import DpoSettings, ModelSettings, Settings
from leadre_lib.training_rank import _score_labels_only

SIZES = (4, 4, 2)
LISTS = 24
SETTINGS = Settings(
    model=ModelSettings(
        hidden_size=32, intermediate_size=64, layers=2, vocabulary=300, max_tokens=64
    ),
    dpo=DpoSettings(
        max_steps=6, batch_size=3, checkpoint_steps=2, learning_rate=0.01, sft_weight=0.5
    ),
)


def lists_of(rejected: int) -> pa.Table:
    """Lists of one chosen and at least one, at most `rejected` rejected."""
    rng = np.random.default_rng(0)
    texts = [[f"<a_{a}><b_{b}><c_{c}>" for c in range(2)] for a in range(4) for b in range(4)]
    flat = [text for pair in texts for text in pair]
    picks = [rng.permutation(len(flat))[: rejected + 1] for _ in range(LISTS)]
    return pa.table(
        {
            "prompt": [f"user{'*' * (n % 7)} likes {n}" for n in range(LISTS)],
            "chosen": [flat[pick[0]] for pick in picks],
            "rejected": [
                [flat[i] for i in pick[1 : 2 + n % rejected]] for n, pick in enumerate(picks)
            ],
            "weight": rng.uniform(0.5, 2.0, LISTS),
        }
    )


def model_folder(folder: Path) -> Path:
    """A model that was never trained, as SFT leaves one."""
    tokenizer = models.build_tokenizer(
        lists_of(1)["prompt"].to_pylist(), models.sid_tokens(SIZES), 300
    )
    models.save(models.build_model(SETTINGS.model, tokenizer, 1), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a day with an SFT model."""
    work = tmp_path_factory.mktemp("start")
    model_folder(work / "sft" / "model")
    return work


def prepared(work: Path, lists: pa.Table) -> Dataset:
    training.prepare_dpo(lists, work, SETTINGS)
    made = Dataset.from_dict(pq.read_table(work / "dpo" / "train.parquet").to_pydict())
    return made.add_column("row", np.arange(len(made)))


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    """The model as a rank has it on a CPU."""
    model, tokenizer = models.load(folder)
    _score_labels_only(model)
    return model.eval(), tokenizer


def batch_of(start: Path, lists: pa.Table) -> tuple[PreTrainedModel, Batch]:
    examples = prepared(start, lists)
    model, tokenizer = load(start / "sft" / "model")
    return model, ListCollator(tokenizer.pad_token_id)(list(examples))


def changed(folder: Path) -> PreTrainedModel:
    """A policy that has left the reference."""
    model, _ = load(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return model


def test_a_branch_reads_as_if_it_alone_followed_the_prompt(start: Path) -> None:
    lists = lists_of(4)
    model, batch = batch_of(start, lists)
    _, tokenizer = models.load(start / "sft" / "model")
    with torch.no_grad():
        found = answer_log_probs(model, batch)
    for row, each in enumerate(lists.to_pylist()):
        answers = [each["chosen"], *each["rejected"]]
        prompt = tokenizer(each["prompt"])["input_ids"]
        for place, answer in enumerate(answers):
            ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            alone = logits.log_softmax(-1)[range(len(ids)), ids].sum()
            assert found[row, place] == pytest.approx(alone.item(), abs=1e-4)
        assert torch.isinf(found[row, len(answers) :]).all()


def test_with_one_rejected_the_loss_is_that_of_dpo() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = (torch.tensor(rng.normal(size=50) * 20) for _ in range(2))
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected))
    torch.testing.assert_close(list_losses(chosen, rejected[:, None], 0.3), expected)
    # What a shorter list lacks counts for nothing.
    padded = torch.stack([rejected, torch.full_like(rejected, -torch.inf)], 1)
    torch.testing.assert_close(list_losses(chosen, padded, 0.3), expected)


def test_the_loss_of_a_list_is_that_of_the_paper() -> None:
    chosen, rejected = torch.tensor([0.7]), torch.tensor([[0.1, -2.0, 1.3]])
    total = sum(np.exp(0.5 * (r - 0.7)) for r in (0.1, -2.0, 1.3))
    expected = -np.log(1 / (1 + np.exp(np.log(total))))
    assert list_losses(chosen, rejected, 0.5).item() == pytest.approx(expected)


def trainer_of(
    start: Path,
    tmp_path: Path,
    examples: Dataset,
    weight: torch.Tensor,
    sft_weight: float = SETTINGS.dpo.sft_weight,
) -> PreferenceTrainer:
    """Our trainer in this process, with the reference of `start` and a policy that has left it."""
    args = arguments(tmp_path, precompute_ref_log_probs=True, remove_unused_columns=False)
    _, tokenizer = models.load(start / "sft" / "model")
    collator = ListCollator(tokenizer.pad_token_id)
    trainer = PreferenceTrainer(
        model=changed(start / "sft" / "model"),
        args=args,
        train_dataset=examples,
        processing_class=tokenizer,
        data_collator=collator,
        reference=reference_log_probs(
            tmp_path / "reference.npy",
            lambda: load(start / "sft" / "model")[0],
            examples,
            collator,
            args,
        ),
        weight=weight,
        sft_weight=sft_weight,
    )
    _score_labels_only(trainer.model)
    return trainer


def arguments(tmp_path: Path, **more: Any) -> DPOConfig:
    return DPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=None,
        beta=0.3,
        gradient_checkpointing=False,
        per_device_train_batch_size=LISTS,
        **more,
    )


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-3, msg=name)


def test_one_rejected_and_a_reference_computed_once_are_trl_with_a_live_reference(
    start: Path, tmp_path: Path
) -> None:
    lists = lists_of(1)
    examples = prepared(start, lists)
    ours = trainer_of(start, tmp_path, examples, torch.ones(LISTS))
    loss = ours._compute_loss(ours.model, ours.data_collator(list(examples)), False)

    class Live(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

    policy = changed(start / "sft" / "model")
    reference, tokenizer = models.load(start / "sft" / "model")
    plain = [
        {
            "prompt_ids": tokenizer(each["prompt"])["input_ids"],
            "chosen_ids": [*tokenizer(each["chosen"])["input_ids"], tokenizer.eos_token_id],
            "rejected_ids": [*tokenizer(each["rejected"][0])["input_ids"], tokenizer.eos_token_id],
        }
        for each in lists.to_pylist()
    ]
    args = arguments(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    theirs = Live(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(plain),
        processing_class=tokenizer,
    )
    expected = theirs._compute_loss(theirs.model, theirs.data_collator(plain), False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() > 1.2 * (np.log(2) + 0.5 * np.log(len(tokenizer)) * 0.5)
    assert_same_gradients(gradients(ours.model, loss), gradients(theirs.model, expected))


def test_gradients_follow_the_weights(start: Path, tmp_path: Path) -> None:
    examples = prepared(start, lists_of(3))

    def pulled(*weights: float) -> dict[str, torch.Tensor]:
        weight = torch.zeros(LISTS)
        weight[: len(weights)] = torch.tensor(weights)
        trainer = trainer_of(start, tmp_path, examples, weight, sft_weight=0.0)
        batch = trainer.data_collator(list(examples))
        return gradients(trainer.model, trainer._compute_loss(trainer.model, batch, False))

    first, second = pulled(1.0), pulled(0.0, 1.0)
    both = pulled(0.5, 3.0)
    assert any(gradient.abs().max() > 1e-3 for gradient in first.values())
    assert_same_gradients(both, {n: 0.5 * first[n] + 3.0 * second[n] for n in first})


def test_the_reference_is_computed_once_and_then_read(start: Path, tmp_path: Path) -> None:
    examples = prepared(start, lists_of(3))
    model, tokenizer = load(start / "sft" / "model")
    collator = ListCollator(tokenizer.pad_token_id)
    args = arguments(tmp_path)
    path = tmp_path / "reference.npy"
    found = reference_log_probs(path, lambda: model, examples, collator, args)
    with torch.no_grad():
        live = answer_log_probs(model, collator(list(examples)))
    torch.testing.assert_close(found, live.masked_fill(live.isinf(), 0.0), atol=1e-4, rtol=1e-5)

    def never() -> PreTrainedModel:
        raise AssertionError("computed again")

    again = reference_log_probs(path, never, examples, collator, args)
    assert torch.equal(found, again)


def test_scoring_the_labels_alone_is_what_trl_scores(start: Path) -> None:
    model, batch = batch_of(start, lists_of(2))
    other, _ = models.load(start / "sft" / "model")
    add_fused_lm_head(other)
    with torch.no_grad():
        torch.testing.assert_close(
            answer_log_probs(model, batch), answer_log_probs(other.eval(), batch)
        )


def test_prompts_are_cut_on_the_left_and_answers_never(start: Path) -> None:
    long = pa.table(
        {
            "prompt": ["word " * 400 + "the end"],
            "chosen": ["<a_1><b_2><c_0>"],
            "rejected": [["<a_1><b_3><c_0>", "<a_2><b_2><c_1>"]],
            "weight": [1.0],
        }
    )
    (row,) = prepared(start, long).to_list()
    _, tokenizer = models.load(start / "sft" / "model")
    branches = np.array(row["branches"])
    ids = np.array(row["input_ids"])
    prompt = [*ids[branches == 0], ids[branches == 1][0]]
    assert len(prompt) + 4 == SETTINGS.model.max_tokens
    assert tokenizer.decode(prompt).endswith("the end")
    answers = [tokenizer.decode(ids[branches == n][1:]) for n in (1, 2, 3)]
    assert answers == [
        "<a_1><b_2><c_0><|endoftext|>",
        "<a_1><b_3><c_0><|endoftext|>",
        "<a_2><b_2><c_1><|endoftext|>",
    ]
    endless = long.set_column(2, "rejected", pa.array([["word " * 400]]))
    with pytest.raises(LeadreError, match="no room"):
        prepared(start, endless)


def curve(work: Path) -> list[dict[str, float]]:
    return list(json.loads((work / "dpo" / "loss.json").read_text()))


def kill_a_rank_after(step: int, work: Path, stop: threading.Event) -> None:
    """`kill -9` of the second rank, once a checkpoint of `step` is whole."""
    sealed = work / "dpo" / "checkpoints" / f"checkpoint-{step}" / "complete.json"
    while not stop.wait(0.01):
        if sealed.exists():
            for process in psutil.Process().children(recursive=True):
                try:
                    if "--local_rank=1" in process.cmdline():
                        process.kill()
                        return
                except psutil.NoSuchProcess:
                    continue


def test_two_ranks_learn_to_prefer_and_go_on_after_a_kill(tmp_path: Path) -> None:
    """With the optimizer's state parted among the ranks, as it is on GPUs."""
    section = SETTINGS.dpo.model_copy(update={"deepspeed": "deepspeed_cpu_zero2.json"})
    parted = SETTINGS.model_copy(update={"dpo": section})
    works = [tmp_path / name for name in ("whole", "killed")]
    for work in works:
        model_folder(work / "sft" / "model")
        training.prepare_dpo(lists_of(3), work, parted)
    whole, killed = works
    training.run_ranks("dpo", whole, parted)
    losses = [entry["loss"] for entry in curve(whole)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    reference = np.load(whole / "dpo" / "reference.npy")
    assert reference.shape == (LISTS, 4)

    stop = threading.Event()
    killer = threading.Thread(target=kill_a_rank_after, args=(2, killed, stop))
    killer.start()
    try:
        with pytest.raises(LeadreError, match="a rerun resumes from"):
            training.run_ranks("dpo", killed, parted)
    finally:
        stop.set()
        killer.join()
    kept = (killed / "dpo" / "reference.npy").stat().st_mtime_ns
    training.prepare_dpo(lists_of(3), killed, parted)
    training.run_ranks("dpo", killed, parted)
    assert (killed / "dpo" / "reference.npy").stat().st_mtime_ns == kept
    np.testing.assert_array_equal(reference, np.load(killed / "dpo" / "reference.npy"))
    assert curve(killed) == curve(whole)
    ours, theirs = (load_file(work / "dpo" / "model" / "model.safetensors") for work in works)
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)
    # Other lists are another training, with another reference.
    training.prepare_dpo(lists_of(2), killed, parted)
    assert not (killed / "dpo" / "reference.npy").exists()
