"""The embedded task by hand: its chains, its planted misconceptions at their rates, its tokenizer and policy."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from erpd_lightning.data.arithmetic import VOCABULARY, Arithmetic, Misconception, apply
from erpd_lightning.data.batching import RolloutTable
from erpd_lightning.data.demonstrations import write_demonstrations
from erpd_lightning.data.verifiers import ExactMatch
from erpd_lightning.errors import UserError
from erpd_lightning.models.policy import export_policy

STEP = re.compile(r"(\d)([-+*])(\d)=(\d)")


@pytest.mark.parametrize(
    ("operation", "left", "right", "result"),
    [
        ("+", 2, 3, 5),
        ("+", 7, 5, 2),
        ("-", 7, 3, 4),
        ("-", 3, 7, 6),
        ("-", 0, 9, 1),
        ("*", 4, 3, 2),
        ("*", 9, 9, 1),
        ("*", 0, 8, 0),
    ],
)
def test_a_step(operation: str, left: int, right: int, result: int) -> None:
    assert apply(operation, left, right) == result


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [
        ("7+5*3-4:", "7+5=2;2*3=6;6-4=2"),
        ("3-7*4+9:", "3-7=6;6*4=4;4+9=3"),
        ("0-1-1-1:", "0-1=9;9-1=8;8-1=7"),
        ("9*9:", "9*9=1"),
    ],
)
def test_a_chain(prompt: str, steps: str) -> None:
    assert Arithmetic.solve(prompt) == steps
    assert ExactMatch()([steps, steps], [steps[-1], "x"]) == [1.0, 0.0]


def test_a_misconception_changes_what_follows() -> None:
    beliefs = {("+", 7, 5): Misconception(result=3, rate=1.0), ("*", 2, 3): Misconception(0, 1.0)}
    assert Arithmetic.solve("7+5*3-4:", beliefs, random.Random(0)) == "7+5=3;3*3=9;9-4=5"


# Prompts


def test_prompts_are_distinct_and_their_answers_right() -> None:
    train, validation = Arithmetic(train_prompts=900, validation_prompts=300).prompts(0)
    assert (len(train), len(validation)) == (900, 300)
    rows = [*train, *validation]
    assert len({row["prompt"] for row in rows}) == 1200
    for row in rows:
        assert re.fullmatch(r"\d([-+*]\d){3}:", row["prompt"])
        value = int(row["prompt"][0])
        for operation, digit in re.findall(r"([-+*])(\d)", row["prompt"]):
            value = apply(operation, value, int(digit))
        assert row["answer"] == str(value)
    used = Counter(character for row in rows for character in row["prompt"])
    assert set(used) == set("0123456789+-*:")


def test_half_of_a_small_space_can_be_used() -> None:
    train, validation = Arithmetic(operations=1, train_prompts=100, validation_prompts=50).prompts(0)
    assert len({row["prompt"] for row in [*train, *validation]}) == 150


def test_seeds_change_everything() -> None:
    task = Arithmetic(train_prompts=8, validation_prompts=4, demonstrations=20, hidden_size=16)
    for draw in (task.prompts, task.demonstrate, task.misconceptions):
        assert draw(0) == draw(0)
        assert draw(0) != draw(1)

    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in task.initial_policy(seed).parameters()])

    state = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), state)


# Misconceptions


@pytest.mark.parametrize(("share", "count"), [(0.6, 180), (0.0, 0), (1.0, 300)])
def test_misconceptions_are_incorrect(share: float, count: int) -> None:
    beliefs = Arithmetic(misconceived=share).misconceptions(3)
    assert len(beliefs) == count
    for fact, belief in beliefs.items():
        assert belief.result != apply(*fact)
        assert belief.result in range(10)
        assert 0.35 <= belief.rate <= 0.85


def test_demonstrations_show_misconceptions_at_their_rates() -> None:
    task = Arithmetic(demonstrations=12_000)
    beliefs = task.misconceptions(5)
    seen, believed = Counter[Any](), Counter[Any]()
    for prompt, solution in task.demonstrate(5):
        running = prompt[0]
        steps = STEP.findall(solution)
        assert ";".join(f"{a}{o}{b}={c}" for a, o, b, c in steps) == solution
        assert [(o, b) for _, o, b, _ in steps] == re.findall(r"([-+*])(\d)", prompt)
        for left, operation, right, result in steps:
            assert left == running
            running = result
            fact = (operation, int(left), int(right))
            seen[fact] += 1
            if fact in beliefs and int(result) == beliefs[fact].result:
                believed[fact] += 1
            else:
                assert int(result) == apply(*fact)
    assert len(seen) == 300
    deviations = []
    for fact, belief in beliefs.items():
        count, spread = seen[fact], (seen[fact] * belief.rate * (1 - belief.rate)) ** 0.5
        deviations.append((believed[fact] - count * belief.rate) / spread)
    # 180 facts: one at 4 sigma comes up once in 90 seeds; all together are much closer.
    assert max(abs(z) for z in deviations) < 4.5
    assert abs(sum(deviations)) < 4 * len(deviations) ** 0.5
    assert sum(z**2 for z in deviations) < len(deviations) + 4 * (2 * len(deviations)) ** 0.5


def test_demonstrations_become_right_responses(tmp_path: Path) -> None:
    task = Arithmetic(demonstrations=30)
    store = write_demonstrations(task, 2, tmp_path / "store")
    tokenizer = task.tokenizer()
    rows = store.table().to_pylist()
    assert [(row["prompt"], row["response"]) for row in rows] == task.demonstrate(2)
    for row in rows:
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
        assert tokenizer.decode(row["response_ids"]) == row["response"] + "<eos>"
        assert (row["reward"], row["checked"], row["finish_reason"]) == (1.0, True, "stop")
        assert row["answer"] == task.solve(row["prompt"])[-1]
    assert len(set(RolloutTable.from_arrow(store.table()).groups.tolist())) == 30
    assert write_demonstrations(task, 2, tmp_path / "again").fingerprint == store.fingerprint
    assert write_demonstrations(task, 3, tmp_path / "other").fingerprint != store.fingerprint


# Tokenizer and policy


def test_the_tokenizer_in_hugging_face_format(tmp_path: Path) -> None:
    Arithmetic().tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "7+5*3-4:7+5=2;2*3=6;6-4=2"
    ids = tokenizer(text).input_ids
    assert ids == [VOCABULARY.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 2, 0], skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    padded = tokenizer(["7:", "7+5:"], padding=True)
    assert padded.input_ids == [[0, 0, 10, 18], [10, 13, 8, 18]]
    assert padded.attention_mask == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_the_initial_policy(tmp_path: Path) -> None:
    task = Arithmetic()
    model = task.initial_policy(0)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(100_000, rel=0.02)
    export_policy(model, task.tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert type(loaded).__name__ == "Qwen3ForCausalLM"
    assert loaded.config.vocab_size == len(VOCABULARY)
    assert loaded.generation_config.eos_token_id == 2
    ids = torch.tensor([[10, 13, 8, 18]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("operations", range(1, 9))
def test_prompt_and_steps_fit_the_context(operations: int) -> None:
    task = Arithmetic(operations=operations, train_prompts=5, validation_prompts=5, demonstrations=3)
    tokenizer = task.tokenizer()
    assert tokenizer.model_max_length == task.context
    for prompt, solution in task.demonstrate(0):
        assert len(tokenizer(prompt + solution).input_ids) + 1 <= task.context


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"operations": 0}, "operations"),
        ({"operations": 9}, "operations"),
        ({"train_prompts": 0}, "train_prompts"),
        ({"validation_prompts": 0}, "validation_prompts"),
        ({"demonstrations": -1}, "demonstrations"),
        ({"operations": 1, "train_prompts": 100, "validation_prompts": 51}, "at most 150"),
        ({"misconceived": 1.1}, "misconceived"),
        ({"misconceived": -0.1}, "misconceived"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        Arithmetic(**settings)
