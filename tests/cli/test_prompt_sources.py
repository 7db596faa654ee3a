"""Prompts by column, rule and filter, named in files and by dotted options."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from erpd_lightning.data.sources import PromptSource
from erpd_lightning.pipeline.rounds import Rounds
from support.command_line import Run, write

ROWS = [("1+1:", "2", "1/8"), ("1+2:", "3", "3/8"), ("1+2:", "3", "3/8"), ("1+1+1+1+1+1:", "6", "7/8")]


@pytest.fixture
def questions(own_policy: Callable[..., list[str]], tmp_path: Path) -> list[str]:
    """Arguments of a run on a file of questions with solutions and difficulties, which a YAML file describes."""
    rows = [{"question": q, "solution": f"It is #### {a}", "difficulty": d} for q, a, d in ROWS]
    path = write(tmp_path / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = {"path": str(path), "prompt_column": "question", "answer_column": "solution", "answer_rule": "hashes"}
    train = {**columns, "drop_duplicates": True, "max_prompt_tokens": 8}
    held_out = {**columns, "difficulty_column": "difficulty", "min_difficulty": "7/8"}
    settings = {"data": {"prompts": train, "validation_prompts": held_out}}
    arguments = own_policy(None)
    given = [each for each in arguments if not each.startswith(("--data.prompts=", "--data.validation_prompts="))]
    return [*given, f"--config={write(tmp_path / 'questions.yaml', yaml.safe_dump(settings))}"]


def test_a_source_in_a_file(run: Run, questions: list[str], tmp_path: Path, chain: Callable[..., Rounds]) -> None:
    printed = run(*questions, "--stage=rollouts", "--data.group_size=2")
    path, listed = tmp_path / "questions.jsonl", tmp_path / "run" / "prompts" / "left_out.jsonl"
    assert f"{path}: 2 of 4 prompts: 1 duplicates, 1 longer than 8 tokens (listed in {listed})\n" in printed
    assert f"{path}: 1 of 4 prompts: 3 of a difficulty below 7/8 (listed in {listed})\n" in printed
    left_out = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {each["reason"]: each["lines"] for each in left_out} == {
        "duplicates": [3],
        "longer than 8 tokens": [4],
        "of a difficulty below 7/8": [1, 2, 3],
    }
    # What lies in the run directory is the same configuration.
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["prompts"]
    assert (written["path"], written["answer_rule"], written["limit"]) == (str(path), "hashes", None)
    again = chain("fit", f"--config={tmp_path / 'run' / 'config.yaml'}").data(1)
    assert again.prompts == PromptSource(
        str(path),
        prompt_column="question",
        answer_column="solution",
        answer_rule="hashes",
        drop_duplicates=True,
        max_prompt_tokens=8,
    )
    # It is what was made, and other prompts are not.
    assert "rollouts: done already" in run(*questions, "--stage=rollouts", "--data.group_size=2")


def test_another_column_of_the_file_changes_nothing_and_another_answer_does(
    run: Run, refused: Run, questions: list[str], tmp_path: Path
) -> None:
    run(*questions, "--stage=rollouts", "--data.group_size=2")
    path = tmp_path / "questions.jsonl"
    path.write_text(path.read_text().replace("It is", "That makes"))
    run(*questions, "--stage=rollouts", "--data.group_size=2")
    path.write_text(path.read_text().replace("#### 2", "#### 4"))
    assert "prompts" in refused(*questions, "--stage=rollouts", "--data.group_size=2")


def test_dotted_options(chain: Callable[..., Rounds], questions: list[str], own_policy: Any, tmp_path: Path) -> None:
    data = chain(*questions, "--data.prompts.limit=2", "--data.prompts.max_prompt_tokens=null").data(1)
    assert [row.answer for row in data.prompt_plan.sampled()] == ["2", "3"]
    assert isinstance(data.prompts, PromptSource)
    assert data.prompts.limit == 2
    prompts = "".join(json.dumps({"prompt": f"{n}:", "answer": n}) + "\n" for n in range(3))
    given = [each for each in own_policy(prompts) if not each.startswith("--data.prompts=")]
    data = chain(*given, f"--data.prompts.path={tmp_path / 'prompts.jsonl'}", "--data.prompts.suffix=1").data(1)
    assert [row.prompt for row in data.prompt_plan.sampled()] == ["0:1", "1:1", "2:1"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.prompts.limit=0", "data.prompts.limit is 0: it must be at least 1"),
        ("--data.prompts.limit=many", "data.prompts.limit: expected int or null, not many"),
        ("--data.prompts.answer_rule=last", "data.prompts.answer_rule: expected one of"),
        ("--data.prompts.prompt_column=problem", "{file}, line 1 has no column 'problem' (there are: question, "),
        ("--data.prompts.split=test", "data.prompts.split is 'test', but a file has none"),
        ("--data.prompts.streaming=true", "data.prompts.streaming is true without limit"),
        ("--data.prompts.min_difficulty=hard", "data.prompts.min_difficulty is 'hard': it must be a number"),
        ("--data.prompts.min_difficulty=1", "data.prompts.difficulty_column is null"),
        ("--data.prompts.max_prompt_tokens=1", "{file} holds no prompts ({file}: 0 of 4 prompts: 3 longer than 1 tok"),
        ("--data.prompts.answer_rule=boxed", "{file}, line 1: there is no answer in a \\boxed{{}} in solution ("),
        ("--data.validation_prompts.limit=0", "data.validation_prompts.limit is 0"),
        ("--data.chat_template_kwargs.tokenize=true", "data.chat_template_kwargs has tokenize, which is set for each"),
        (
            "--data.prompts.limits=3",
            "data.prompts: class_path erpd_lightning.PromptSource: Option 'limits' is not accepted",
        ),
    ],
)
def test_mistakes(refused: Run, questions: list[str], tmp_path: Path, option: str, message: str) -> None:
    assert refused(*questions, option).startswith(message.format(file=tmp_path / "questions.jsonl"))


def test_variables_of_a_chat_template_that_is_not_there(refused: Run, questions: list[str]) -> None:
    chat = [*questions, "--stage=rollouts", "--data.group_size=2", "--data.prompts.chat=true"]
    assert "chat template" in refused(*chat, "--data.chat_template_kwargs.enable_thinking=false")
