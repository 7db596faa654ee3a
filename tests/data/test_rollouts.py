"""`RolloutDataModule`: what its stores hold, on any number of ranks and after any interruption."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from erpd_lightning.data.batching import RolloutTable
from erpd_lightning.data.predict_data import PredictToStore
from erpd_lightning.data.prompts import Prompt, tokenize
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.data.store import SCORES, Store
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import UserError
from erpd_lightning.modules import scoring
from erpd_lightning.modules.distill import DistillModule
from erpd_lightning.modules.evaluation import EvaluationModule
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.objectives.advantages import STD_OFFSET
from erpd_lightning.objectives.extreme import CrossEntropy
from support.policies import TASK, VOCABULARY_SIZE, make_model, make_rows, save_policy, token_logps, write_rollouts
from support.trainers import fake_trainer, make_trainer, run_prediction

GROUP_SIZE = 4
PROMPTS = [("3+4*2:", "4"), ("5-9-1:", "5"), ("7*8+1:", "7"), ("1+1:", "2"), ("2*2*2:", "8"), ("0-1+5:", "4")]


class LastDigit(Verifier):
    """Rewards responses whose text ends with an even digit; what ends with a 9 cannot be checked."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [self.check(response) for response in responses]

    @staticmethod
    def check(response: str) -> float | None:
        return None if response.endswith("9") else float(response[-1:] in set("02468"))


class Same(Verifier):
    """The same reward for everyone."""

    def __init__(self, reward: float | None) -> None:
        self.reward = reward

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [self.reward for _ in responses]


class Counting(TransformersSampler):
    """Counts the responses that were asked for."""

    drawn = 0

    def sample(self, *args: Any, **kwargs: Any) -> list[Response]:
        responses = super().sample(*args, **kwargs)
        Counting.drawn += len(responses)
        return responses


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policies") / "base")


@pytest.fixture(scope="module")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policies") / "other", seed=1)


@pytest.fixture
def make_data(tmp_path: Path, policy: Path) -> Callable[..., RolloutDataModule]:
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def make(store: str = "rollouts", **settings: Any) -> RolloutDataModule:
        defaults: dict[str, Any] = {
            "tokenizer": policy,
            "prompts": tmp_path / "prompts.jsonl",
            "sampler": TransformersSampler(8, batch_size=8),
            "verifier": LastDigit(),
            "group_size": GROUP_SIZE,
            "seed": 3,
        }
        return RolloutDataModule(tmp_path / store, **{**defaults, **settings})

    return make


def make_module(policy: Path) -> PolicyModule:
    module = PolicyModule(policy, references={})
    module.configure_model()
    return module


def sample(data: RolloutDataModule, policy: Path, ranks: Sequence[int] = (0,), world_size: int = 1) -> Store:
    """Sample on some ranks of a world, one after the other; rank 0, which finishes the store, comes last."""
    for rank in ranks:
        run_prediction(data.sampling(), make_module(policy), rank, world_size)
    return Store.open(data.store)


# Sampling


def test_the_store_holds_what_was_sampled(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    data = make_data()
    make_trainer().predict(PolicyModule(policy, references={}), datamodule=data.sampling(), return_predictions=False)
    rows = Store.open(data.store).table().to_pylist()
    assert [(row["group"], row["sample"]) for row in rows] == [
        (group, number) for group in range(len(PROMPTS)) for number in range(GROUP_SIZE)
    ]
    model, tokenizer = make_model(), TASK.tokenizer()
    for row in rows:
        assert (row["prompt"], row["answer"]) == PROMPTS[row["group"]]
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
        response = row["response_ids"]
        assert row["response"] == tokenizer.decode([token for token in response if token > 2])
        assert row["finish_reason"] == ("stop" if response[-1] == 2 else "length")
        reward = LastDigit.check(row["response"])
        assert (row["reward"], row["checked"]) == (reward or 0.0, reward is not None)
        logps = token_logps(model, row["prompt_ids"], response)
        expected = logps.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert row["logps"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({tuple(row["response_ids"]) for row in rows}) > len(rows) // 2
    assert {row["checked"] for row in rows} == {row["reward"] == 1.0 for row in rows} == {True, False}


def test_the_store_depends_on_no_rank(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    alone = sample(make_data("alone"), policy)
    data = make_data("pair")
    run_prediction(data.sampling(), make_module(policy), 1, 2)
    assert [path.name for path in data.store.iterdir()] == ["part-00001.parquet"]
    pair = sample(data, policy, ranks=(0,), world_size=2)
    # Three parts of two prompts each: one rank of four has nothing to do.
    four = sample(make_data("four"), policy, ranks=(3, 1, 2, 0), world_size=4)
    assert [part["rows"] for part in alone.parts] == [8, 8, 8]
    assert alone.fingerprint == pair.fingerprint == four.fingerprint
    assert alone.table().equals(four.table())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"sampler": TransformersSampler(7, batch_size=8)},
        {"sampler": TransformersSampler(8, temperature=0.9, batch_size=8)},
        {"verifier": Same(1.0)},
        {"group_size": 2},
        {"prompts_per_round": 3},
        {"prompts_per_round": 3, "round": 2},
    ],
)
def test_the_fingerprint_tells_settings_apart(
    make_data: Callable[..., RolloutDataModule], policy: Path, change: dict[str, Any]
) -> None:
    store, other = sample(make_data("a"), policy), sample(make_data("b", **change), policy)
    assert store.metadata != other.metadata
    assert store.fingerprint != other.fingerprint


def test_policies_and_rounds_sample_differently(
    make_data: Callable[..., RolloutDataModule], policy: Path, other_policy: Path
) -> None:
    store, other = sample(make_data("a"), policy), sample(make_data("b"), other_policy)
    assert store.metadata != other.metadata
    assert not store.table()["response_ids"].equals(other.table()["response_ids"])


def test_a_killed_pass_goes_on(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    whole = sample(make_data("whole"), policy)
    data = make_data("killed")
    killed = sample(data, policy, ranks=(1, 0), world_size=2)
    for file in ("manifest.json", "part-00001.parquet"):
        (killed.path / file).unlink()
    kept = (killed.path / "part-00000.parquet").stat().st_mtime_ns
    data.sampler = Counting(8, batch_size=8)
    data.sampler.__class__.__qualname__ = TransformersSampler.__qualname__
    Counting.drawn = 0
    assert sample(data, policy).fingerprint == whole.fingerprint
    assert Counting.drawn == 8
    assert (killed.path / "part-00000.parquet").stat().st_mtime_ns == kept


def test_a_pass_killed_before_its_manifest_is_finished(
    make_data: Callable[..., RolloutDataModule], policy: Path
) -> None:
    data = make_data()
    fingerprint = sample(data, policy).fingerprint
    (data.store / "manifest.json").unlink()
    module = PolicyModule(policy, references={})
    make_trainer().predict(module, datamodule=data.sampling(), return_predictions=False)
    assert Store.open(data.store).fingerprint == fingerprint
    # And a finished one stays as it is.
    make_trainer().predict(module, datamodule=data.sampling(), return_predictions=False)
    assert Store.open(data.store).fingerprint == fingerprint


def test_a_finished_store_is_not_another_policys(
    make_data: Callable[..., RolloutDataModule], policy: Path, other_policy: Path
) -> None:
    fingerprint = sample(make_data(), policy).fingerprint
    with pytest.raises(UserError, match="other settings"):
        sample(make_data(), other_policy)
    assert Store.open(make_data().store).fingerprint == fingerprint


@pytest.mark.parametrize("file", ["part-00001.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", ["altered", "truncated"])
def test_a_damaged_store_is_refused(
    make_data: Callable[..., RolloutDataModule], policy: Path, file: str, damage: str
) -> None:
    data = make_data()
    path = sample(data, policy).path / file
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "altered" else content[:-9])
    with pytest.raises(UserError, match=file):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data())


# Which prompts


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
    data = make_data(validation_prompts=tmp_path / "prompts.jsonl", validation_samples=4, max_validation_prompts=5)

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
    rows = [{"prompt": "1+" * count + "1:", "answer": "1"} for count in (1, 11, 12)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    key = "prompts" if purpose == "rollouts" else "validation_prompts"
    data = make_data(**{key: tmp_path / "long.jsonl"})
    message = rf"^sampler.max_new_tokens is 8: with the 26 tokens of {purpose} prompt 3 .*context of {TASK.context}"
    run = make_trainer().predict if purpose == "rollouts" else make_trainer().test
    with pytest.raises(UserError, match=message):
        run(EvaluationModule(policy), datamodule=data.sampling() if purpose == "rollouts" else data)
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:2]))
    data = make_data(**{key: tmp_path / "long.jsonl"})
    run(EvaluationModule(policy), datamodule=data.sampling() if purpose == "rollouts" else data)


def test_sampling_without_prompts(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    data = make_data(prompts=None)
    with pytest.raises(UserError, match=r"^prompts is null: it has to name a file"):
        sample(data, policy)
    with pytest.raises(UserError, match=r"^prompts is null: it has to name a file"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=data)
    assert list(data.prompt_plan.unused) == []


@pytest.mark.parametrize(
    "key",
    [
        "group_size",
        "prompts_per_round",
        "round",
        "batch_size",
        "max_tokens",
        "validation_samples",
        "max_validation_prompts",
        "calibration_samples",
    ],
)
def test_counts_out_of_range(make_data: Callable[..., RolloutDataModule], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key} is 0"):
        make_data(**{key: 0})


# Advantages, and what enters a loss


def write_made_up(path: Path, **changes: dict[int, Any]) -> list[dict[str, Any]]:
    """A store of three groups of four with some values changed by row; its rows."""
    rows = make_rows(groups=3, group_size=4)
    for column, values in changes.items():
        for row, value in values.items():
            rows[row][column] = value
    write_rollouts(path, rows)
    return rows


def test_advantages_leave_out_what_was_not_checked(make_data: Callable[..., RolloutDataModule], tmp_path: Path) -> None:
    rewards = dict(enumerate([1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0]))
    # Of the last group the only right one is not checked... so none is.
    checked = dict(enumerate([True, True, True, False, True, True, True, True, False, True, True, True]))
    write_made_up(tmp_path / "rollouts", reward=rewards, checked=checked)
    advantages = make_data().stored.advantages.tolist()
    three, four = (1 / 3) ** 0.5 + STD_OFFSET, (1 / 3) ** 0.5 + STD_OFFSET
    assert advantages[:4] == pytest.approx([2 / 3 / three, -1 / 3 / three, -1 / 3 / three, 0.0], rel=1e-6)
    assert advantages[4:8] == pytest.approx([0.5 / four] * 2 + [-0.5 / four] * 2, rel=1e-6)
    assert advantages[8:] == [0.0] * 4


class Rows(Callback):
    """Notes the rows of each optimiser step, padded sizes, and micro-batches."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = [[]]
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.steps[-1] += [row for row in batch.rows.tolist() if row >= 0]
        self.sizes.append(batch.input_ids.numel())
        if batch.last:
            self.steps.append([])


@pytest.mark.parametrize(
    ("objective", "sign", "expected"),
    [
        (None, 1, {0, 1, 2, 4, 5, 6, 7}),
        (None, -1, {0, 1, 2, 4, 5, 6, 7}),
        (CrossEntropy(), 1, {0, 4, 5}),
        # What was not checked (3 and 8) is not wrong either.
        (CrossEntropy(), -1, {1, 2, 6, 7, 9, 10, 11}),
    ],
)
def test_which_rows_are_trained_on(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    tmp_path: Path,
    objective: Any,
    sign: int,
    expected: set[int],
) -> None:
    rewards = dict(enumerate([1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]))
    write_made_up(tmp_path / "rollouts", reward=rewards, checked={3: False, 8: False})
    module, seen = ExtremeRegionModule(policy, objective=objective, sign=sign), Rows()
    make_trainer(max_epochs=2, callbacks=[seen]).fit(module, datamodule=make_data(batch_size=100))
    assert [sorted(step) for step in seen.steps] == [sorted(expected)] * 2 + [[]]


def test_epochs_are_shuffled_by_the_seed(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")

    def steps(seed: int) -> list[set[int]]:
        seen = Rows()
        trainer = make_trainer(max_epochs=2, callbacks=[seen])
        trainer.fit(ExtremeRegionModule(policy), datamodule=make_data(batch_size=4, seed=seed))
        return [set(step) for step in seen.steps[:-1]]

    first = steps(0)
    assert set.union(*first[:3]) == set.union(*first[3:]) == set(range(12))
    assert first[:3] != first[3:]
    assert steps(0) == first != steps(1)


@pytest.mark.parametrize(
    ("reward", "threshold", "sign", "objective", "problem"),
    [
        (1.0, 1.0, 1, None, "all of 24 responses are correct; sample harder"),
        (0.0, 1.0, 1, None, "none of 24 responses is correct; sample easier"),
        (0.0, 1.0, 1, CrossEntropy(), "none of 24 responses is correct; sample easier"),
        (0.5, 0.75, 1, CrossEntropy(), "none of 24 responses is correct; sample easier"),
        (0.5, 0.25, -1, CrossEntropy(), "all of 24 responses are correct; sample harder"),
        (-1.0, -1.0, 1, None, "all of 24 responses are correct; sample harder"),
        (None, 1.0, 1, None, "none of 24 responses could be checked; look at"),
        (None, -1.0, 1, CrossEntropy(), "none of 24 responses could be checked; look at"),
    ],
)
def test_nothing_to_learn_from(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    reward: float | None,
    threshold: float,
    sign: int,
    objective: Any,
    problem: str,
) -> None:
    module = ExtremeRegionModule(policy, objective=objective, sign=sign)
    data = make_data(verifier=Same(reward), correct_threshold=threshold)
    with pytest.raises(UserError, match=f"no response enters the loss: {problem}"):
        make_trainer(max_epochs=1).fit(module, datamodule=data)
    # Nothing that was finished is lost.
    assert Store.open(data.store).rows == 24


def test_nothing_was_checked(make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path) -> None:
    write_made_up(tmp_path / "rollouts", checked=dict.fromkeys(range(12), False))
    with pytest.raises(UserError, match="no response enters the loss: none of 12 responses could be checked"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data())


def test_groups_that_are_alike(make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path) -> None:
    rows = [{**row, "reward": float(row["group"] == 1), "checked": row["sample"] > 0} for row in make_rows(groups=3)]
    write_rollouts(tmp_path / "rollouts", rows)
    problem = r"no group has both correct and incorrect answers \(33% of 9 responses that could be checked, of 12, are "
    with pytest.raises(UserError, match=problem):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data())


def test_a_group_of_one(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    Counting.drawn = 0
    data = make_data(group_size=1, sampler=Counting(8, batch_size=8), verifier=Same(1.0))
    with pytest.raises(UserError, match=r"^group_size is 1"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=data)
    assert Counting.drawn == 0
    make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy, objective=CrossEntropy()), datamodule=data)
    assert Counting.drawn == len(PROMPTS)


# Micro-batches


def fewest_runs(lengths: list[int], most: int) -> int:
    """Runs of the lengths, longest first, whose count times longest length is at most `most`."""
    runs = count = longest = 0
    for length in sorted(lengths, reverse=True):
        if count and (count + 1) * longest <= most:
            count += 1
        else:
            runs, count, longest = runs + 1, 1, length
    return runs


@pytest.mark.parametrize(("max_tokens", "wanted"), [(10_000, 1), (60, 1), (24, 1), (60, 7)])
def test_accumulation_is_raised_to_what_max_tokens_needs(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path, max_tokens: int, wanted: int
) -> None:
    rows = write_made_up(tmp_path / "rollouts")
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]
    longest_five = sorted(lengths)[-5:]
    needed = fewest_runs(longest_five, max_tokens)
    assert (needed > 1) == (max_tokens < 100)
    seen = Rows()
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=wanted, callbacks=[seen])
    data = make_data(batch_size=5, max_tokens=max_tokens)
    trainer.fit(ExtremeRegionModule(policy), datamodule=data)
    assert trainer.accumulate_grad_batches == max(needed, wanted)
    assert trainer.global_step == 3
    assert [len(step) for step in seen.steps] == [5, 5, 2, 0]
    assert max(seen.sizes) <= max_tokens
    assert len(seen.sizes) == 3 * max(needed, wanted)


def test_ranks_share_the_micro_batches(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    rows = write_made_up(tmp_path / "rollouts")
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]
    needed = fewest_runs(sorted(lengths)[-6:], 40)
    assert needed > 2
    taken = []
    for rank in range(2):
        data = make_data(batch_size=6, max_tokens=40)
        data.trainer = fake_trainer(rank, 2)
        batches = list(data.train_dataloader())
        assert data.trainer.accumulate_grad_batches == -(-needed // 2)
        assert len(batches) == 2 * -(-needed // 2)
        taken.append([row for batch in batches for row in batch.rows.tolist() if row >= 0])
    assert sorted(taken[0] + taken[1]) == list(range(12))


def test_a_response_longer_than_max_tokens(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")
    with pytest.raises(UserError, match="max_tokens is 5"):
        make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=make_data(max_tokens=5))


# Scores


def score(data: RolloutDataModule, name: str, policy: Path) -> Store:
    run_prediction(data.scoring(name), make_module(policy))
    assert data.scores is not None
    return Store.open(data.scores / name)


def smallest_support(logps: torch.Tensor, mass: float) -> list[int]:
    kept, held = [], 0.0
    for index in logps.argsort(descending=True).tolist():
        if held >= mass:
            break
        kept.append(index)
        held += float(logps[index].exp())
    return kept


def check_scores(store: Store, rows: list[dict[str, Any]], model: Any, base: Any) -> None:
    """Against both policies' full distributions, token by token."""
    stored = {row["row"]: row for row in store.table().to_pylist()}
    assert len(stored) == store.rows == len(rows)
    sizes = set()
    for number, row in enumerate(rows):
        own, entry = stored[number], 0
        logps = token_logps(model, row["prompt_ids"], row["response_ids"]).detach()
        base_logps = token_logps(base, row["prompt_ids"], row["response_ids"]).detach()
        for t, token in enumerate(row["response_ids"]):
            assert own["logps"][t] == pytest.approx(float(logps[t, token]), abs=1e-5)
            size = own["support_size"][t]
            ids = own["support_ids"][entry : entry + size]
            assert sorted(ids) == sorted(smallest_support(base_logps[t], 0.9))
            expected = logps[t][ids].tolist()
            assert own["support_logps"][entry : entry + size] == pytest.approx(expected, abs=1e-5)
            rest = [v for v in range(VOCABULARY_SIZE) if v not in ids]
            assert own["tail_logps"][t] == pytest.approx(float(logps[t][rest].logsumexp(0)), abs=1e-4)
            entry += size
            sizes.add(size)
        assert entry == len(own["support_ids"])
    assert len(sizes) > 3


def test_scores_are_the_policies_log_probs(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    other_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SUPPORT_MASS", 0.9)
    rows = write_made_up(tmp_path / "rollouts")
    data = make_data(scores=tmp_path / "scores", max_tokens=40)
    trainer = make_trainer()
    trainer.predict(PolicyModule(policy, references={}), datamodule=data.scoring("base"), return_predictions=False)
    base, teacher = Store.open(tmp_path / "scores" / "base"), score(data, "teacher", other_policy)
    check_scores(base, rows, make_model(), make_model())
    check_scores(teacher, rows, make_model(seed=1), make_model())
    assert base.schema == SCORES.metadata[b"name"].decode()
    assert set(data.rollouts.scores) == {"base", "teacher"}


def interrupted(data: PredictToStore, policy: Path, parts: int) -> None:
    """A prediction that dies after some parts."""
    data.trainer = fake_trainer()
    data.connect(make_module(policy))
    for batch in list(data.predict_dataloader())[:parts]:
        data.write(batch, make_module(policy).predict_step(batch, 0))


def test_scores_depend_on_no_rank_and_no_interruption(
    make_data: Callable[..., RolloutDataModule],
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("erpd_lightning.data.predict_data.PART_TOKENS", 50)
    write_made_up(tmp_path / "rollouts")
    alone = score(make_data(scores=tmp_path / "alone"), "base", policy)
    assert len(alone.parts) > 2
    pair = make_data(scores=tmp_path / "pair")
    for rank in (1, 0):
        run_prediction(pair.scoring("base"), make_module(policy), rank, 2)
    assert Store.open(tmp_path / "pair" / "base").fingerprint == alone.fingerprint
    killed = make_data(scores=tmp_path / "killed")
    interrupted(killed.scoring("base"), policy, parts=2)
    assert not Store.exists(tmp_path / "killed" / "base")
    assert killed.rollouts.scores == {}
    assert score(killed, "base", policy).fingerprint == alone.fingerprint
    assert set(killed.rollouts.scores) == {"base"}


def test_scoring_goes_on_within_less_memory(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erpd_lightning.data.predict_data.PART_TOKENS", 80)
    rows = write_made_up(tmp_path / "rollouts")
    scores = tmp_path / "scores"
    interrupted(make_data(scores=scores, max_tokens=80).scoring("base"), policy, parts=1)
    data = make_data(scores=scores, max_tokens=20)
    base = data.scoring("base")
    parts = [base.part(index) for index in range(base.part_count())]
    assert max(batch.input_ids.numel() for part in parts for batch in part.batches) <= 20
    score(data, "base", policy)
    assert data.rollouts.scores["base"].rows.tolist() == list(range(len(rows)))
    # Nor is a finished store in the way of another memory limit.
    assert score(make_data(scores=scores, max_tokens=30), "base", policy).rows == len(rows)


def test_scores_of_other_rollouts_are_refused(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")
    write_made_up(tmp_path / "others", reward={1: 1.0})
    score(make_data(scores=tmp_path / "scores"), "base", policy)
    data = make_data("others", scores=tmp_path / "scores")
    with pytest.raises(UserError, match="scores other rollouts"):
        _ = data.rollouts
    with pytest.raises(UserError, match="other settings"):
        score(data, "base", policy)


def test_the_base_is_scored_first(make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path) -> None:
    write_made_up(tmp_path / "rollouts")
    data = make_data(scores=tmp_path / "scores")
    with pytest.raises(UserError, match="score the policy 'base' first"):
        data.scoring("teacher")
    with pytest.raises(UserError, match="directory for the scores"):
        make_data().scoring("base")


def test_a_policy_of_another_vocabulary_is_not_asked(
    make_data: Callable[..., RolloutDataModule], policy: Path, tmp_path: Path
) -> None:
    write_made_up(tmp_path / "rollouts")
    data = make_data(scores=tmp_path / "scores")
    score(data, "base", policy)
    stranger = shutil.copytree(policy, tmp_path / "stranger")
    tokenizer = (stranger / "tokenizer.json").read_text()
    (stranger / "tokenizer.json").write_text(tokenizer.replace('"7"', '"x"'))
    with pytest.raises(UserError, match=r"stranger has another vocabulary than .*'teacher' cannot be asked"):
        score(data, "teacher", stranger)
    for path in stranger.glob("tokenizer*"):  # Weights alone: there is nothing to compare.
        path.unlink()
    score(data, "teacher", stranger)


def test_one_data_module_serves_all_stages(
    make_data: Callable[..., RolloutDataModule], policy: Path, other_policy: Path, tmp_path: Path
) -> None:
    """Scores that were made after the rollouts were first read are seen."""
    data = make_data(scores=tmp_path / "scores", calibration_prompts=0)
    make_trainer(max_epochs=1).fit(ExtremeRegionModule(policy), datamodule=data)
    assert data.rollouts.scores == {}
    student = DistillModule(policy, kl_budget=0.01)
    with pytest.raises(UserError, match="needs rollouts with scores"):
        make_trainer(max_epochs=1).fit(student, datamodule=data)
    score(data, "base", policy)
    score(data, "teacher", other_policy)
    with pytest.raises(UserError, match="unlearned, which were not scored; there are base, teacher"):
        make_trainer(max_epochs=1).fit(student, datamodule=data)
    score(data, "unlearned", policy)
    make_trainer(max_epochs=1).fit(student, datamodule=data)
    assert student.beta is not None
    assert isinstance(data.rollouts, RolloutTable)
