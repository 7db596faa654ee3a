"""Which prompts are sampled and held out, and the batches in which ranks answer them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.prompts import Prompt, tokenize
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.errors import UserError
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from support.policies import TASK, write_prompts
from support.rollouts import PROMPTS, sample
from support.trainers import fake_trainer, make_trainer


def test_rounds_take_the_next_prompts(make_data: Callable[..., RolloutDataModule]) -> None:
    prompts = [Prompt(*pair) for pair in PROMPTS]
    taken = [list(make_data(prompts_per_round=4, round=number).prompt_plan.sampled()) for number in (1, 2, 3)]
    assert taken == [prompts[:4], prompts[4:] + prompts[:2], prompts[2:]]
    assert list(make_data(round=5).prompt_plan.sampled()) == prompts
    unused = [list(make_data(prompts_per_round=4, round=number).prompt_plan.unused) for number in (1, 2, 3)]
    assert unused == [prompts[4:], prompts[2:4], prompts[:2]]
    assert list(make_data().prompt_plan.unused) == []
    with pytest.raises(UserError, match="prompts_per_round is 7"):
        make_data(prompts_per_round=7).prompt_plan.sampled()


def test_every_held_out_prompt_goes_to_one_rank(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    data = make_data(validation_prompts=tmp_path / "prompts.jsonl", validation_samples=4, max_evaluation_prompts=5)

    def batches(rank: int, world_size: int) -> list[Any]:
        data.trainer = fake_trainer(rank, world_size)
        (loader,) = data.test_dataloader()
        return list(loader)

    alone = batches(0, 1)
    assert [tuple(batch.groups) for batch in alone] == [(0, 1), (2, 3), (4,)]
    tokenizer = TASK.tokenizer()
    for batch in alone:
        assert batch.samples == 4
        for prompt, ids, number in zip(batch.prompts, batch.prompt_ids, batch.groups, strict=True):
            assert prompt == Prompt(*PROMPTS[number])
            assert ids == tokenize(tokenizer, prompt.prompt)
    assert len({batch.seed for batch in alone}) == 3
    shared = [batches(rank, 4) for rank in range(4)]
    # Each rank has a batch, the one without prompts an empty one.
    assert [[len(batch.prompts) for batch in own] for own in shared] == [[2], [2], [1], [0]]
    assert [own[0].seed for own in shared[:3]] == [batch.seed for batch in alone]
    assert len(make_data(validation_prompts=tmp_path / "prompts.jsonl").prompt_plan.held_out) == 6
    assert make_data().test_dataloader() == []


@pytest.mark.parametrize("purpose", ["rollouts", "validation"])
def test_a_prompt_too_long_for_the_context(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path, purpose: str
) -> None:
    assert TASK.context == 32
    # With 8 new tokens the second prompt just fits, the third does not.
    rows = [("1+" * count + "1:", "1") for count in (1, 11, 12)]
    write_prompts(tmp_path / "long.jsonl", rows)
    key = "prompts" if purpose == "rollouts" else "validation_prompts"
    data = make_data(**{key: tmp_path / "long.jsonl"})
    message = rf"^sampler.max_new_tokens is 8: with the 26 tokens of {purpose} prompt 3 .*context of {TASK.context}"
    run = make_trainer().predict if purpose == "rollouts" else make_trainer().test
    with pytest.raises(UserError, match=message):
        run(EvaluationModule(policy), datamodule=data.sampling() if purpose == "rollouts" else data)
    write_prompts(tmp_path / "long.jsonl", rows[:2])
    data = make_data(**{key: tmp_path / "long.jsonl"})
    run(EvaluationModule(policy), datamodule=data.sampling() if purpose == "rollouts" else data)


def test_sampling_without_prompts(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    data = make_data(prompts=None)
    with pytest.raises(UserError, match=r"^prompts is null: it has to name a file"):
        sample(data, policy)
    with pytest.raises(UserError, match=r"^prompts is null: it has to name a file"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=data)
    assert list(data.prompt_plan.unused) == []


def test_prompts_are_tokenised_with_their_batches(
    make_data: Callable[..., RolloutDataModule], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of many prompts few are needed at first; only those that may be too long are looked at before."""
    asked: list[Any] = []

    def counted(tokenizer: Any, prompt: Any, variables: Any = None) -> list[int]:
        asked.append(prompt)
        return tokenize(tokenizer, prompt, variables)

    monkeypatch.setattr("erpd_lightning.data.prompt_data.tokenize", counted)
    monkeypatch.setattr("erpd_lightning.data.prompt_data.context_length", lambda path: 4096)
    data = make_data(prompts=write_prompts(tmp_path / "p.jsonl", [*PROMPTS * 50, ("1" * 4090, "1")]))
    batches = data.batcher.batches(data.prompt_plan.sampled()[:300], 4, "rollouts")
    assert (len(batches), asked) == (150, [])
    assert len(batches[7].prompt_ids) == len(asked) == 2
    assert batches[7].prompt_ids == batches[7].prompt_ids
    assert len(asked) == 2  # Once.
    with pytest.raises(UserError, match="the 4090 tokens of rollouts prompt 301 "):
        data.batcher.batches(data.prompt_plan.sampled(), 4, "rollouts")
    # What its length in bytes did not tell is told with its batch.
    data = make_data(prompts=write_prompts(tmp_path / "p.jsonl", [*PROMPTS, ("1" * 3500, "1")]))
    data.sampler.max_new_tokens = 4096 - 3500
    monkeypatch.setattr("erpd_lightning.data.prompt_batches.ADDED_TOKENS", -10)
    batches = data.batcher.batches(data.prompt_plan.sampled(), 4, "rollouts")
    data.sampler.max_new_tokens += 1
    assert batches[2].groups == range(4, 6)
    with pytest.raises(UserError, match="the 3500 tokens of rollouts prompt 7 "):
        batches[3]
