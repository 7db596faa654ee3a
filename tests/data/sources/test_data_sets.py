"""Data sets of the field, a few rows of the shape that each has on the hub, read with a few lines of configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from erpd_lightning.data.sources import Prompt, PromptSource, read_prompts
from erpd_lightning.errors import UserError

SUFFIX = r" Please reason step by step, and put your final answer within \boxed{}."
DAPO = "Solve the following math problem step by step.\n\n"


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a data set: a folder of Parquet files with configurations and splits, as a hub's repository has them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name: str, parts: dict[tuple[str, str], list[dict[str, Any]]]) -> Path:
        folder = tmp_path / name
        lines = ["---", "configs:"]
        for config in dict.fromkeys(config for config, _ in parts):
            lines += [f"- config_name: {config}", "  data_files:"]
            for of, split in parts:
                if of == config:
                    (folder / config).mkdir(parents=True, exist_ok=True)
                    pq.write_table(pa.Table.from_pylist(parts[of, split]), folder / config / f"{split}.parquet")
                    lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
        return folder

    return make


def read(path: Path, **settings: Any) -> list[Prompt]:
    return read_prompts(PromptSource(path, **settings)).prompts


def test_gsm8k(data_set: Callable[..., Path]) -> None:
    rows = [
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"question": "Rent of a year?", "answer": "It is #### no.\n#### 1,200"},
    ]
    folder = data_set("gsm8k", {("main", "train"): rows, ("main", "test"): rows[:1], ("socratic", "train"): rows[1:]})
    gsm8k: dict[str, Any] = {"prompt_column": "question", "answer_rule": "hashes", "config": "main"}
    assert read(folder, **gsm8k) == [Prompt("Two and two?", "4"), Prompt("Rent of a year?", "1,200")]
    assert read(folder, split="test", **gsm8k) == [Prompt("Two and two?", "4")]
    asked = read(folder, split="test", suffix=SUFFIX, chat=True, **gsm8k)
    assert asked == [Prompt([{"role": "user", "content": f"Two and two?{SUFFIX}"}], "4")]
    with pytest.raises(UserError, match=r"gsm8k names no config: there are main, socratic$"):
        read(folder, prompt_column="question")
    with pytest.raises(UserError, match=r"gsm8k has no config mian: there are main, socratic$"):
        read(folder, prompt_column="question", config="mian")
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"gsm8k has no split validation: there are train, test$"):
            read(folder, split="validation", streaming=streaming, limit=1, **gsm8k)


def test_polaris(data_set: Callable[..., Path]) -> None:
    problems = [("p", "0/8"), ("q", "1/8"), ("r", "7/8"), ("s", "8/8"), ("t", None)]
    rows = [{"problem": name, "answer": r"\frac{1}{2}", "difficulty": each} for name, each in problems]
    rows[2]["answer"] = ""
    folder = data_set("polaris", {("default", "train"): rows})
    polaris: dict[str, Any] = {
        "prompt_column": "problem",
        "difficulty_column": "difficulty",
        "min_difficulty": "1/8",
        "max_difficulty": 0.875,
    }
    found = read_prompts(PromptSource(folder, skip_unanswered=True, **polaris))
    assert found.prompts == [Prompt("q", r"\frac{1}{2}")]
    assert found.left_out == {
        "of a difficulty below 1/8": [1],
        "without an answer": [3],
        "of a difficulty above 7/8": [4],
        "without a difficulty": [5],
    }
    with pytest.raises(UserError, match=r"polaris, row 3: there is no answer in answer \(''\); skip_unanswered: true"):
        read(folder, **polaris)


def test_dapo_processed(data_set: Callable[..., Path]) -> None:
    rows = [{"prompt": "Two and two?", "solution": "4", "data_source": "math_dapo"}]
    folder = data_set("dapo", {(config, "train"): rows for config in ("all", "en", "cn")})
    assert read(folder, config="en", answer_column="solution") == [Prompt("Two and two?", "4")]


def test_dapo_as_published(data_set: Callable[..., Path]) -> None:
    """Each row about a hundred times, chats, and the answer in a column of a column."""

    def row(question: str, answer: str) -> dict[str, Any]:
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": f"{DAPO}{question}", "role": "user"}],
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": question},
        }

    rows = [row("2 + 2?", "4"), row("3 + 3?", "6")] * 100 + [row("2 + 2?", "22")]
    folder = data_set("dapo", {("default", "train"): rows})
    dapo: dict[str, Any] = {"answer_column": "reward_model.ground_truth"}
    asked = [[{"content": f"{DAPO}{each}?", "role": "user"}] for each in ("2 + 2", "3 + 3")]
    distinct = [Prompt(asked[0], "4"), Prompt(asked[1], "6")]
    found = read_prompts(PromptSource(folder, drop_duplicates=True, **dapo))
    assert found.prompts == distinct
    assert found.left_out == {"duplicates": list(range(3, 201)), "duplicates with another answer": [201]}
    assert found.report() == f"{folder}: 2 of 201 prompts: 198 duplicates, 1 duplicates with another answer"
    assert len(read(folder, **dapo)) == 201
    first = read_prompts(PromptSource(folder, streaming=True, limit=2, drop_duplicates=True, **dapo))
    assert (first.prompts, first.rows) == (distinct, 2)
    with pytest.raises(UserError, match=r"row 1 has no column 'reward_model\.truth' \(there are: reward_model\.gr"):
        read(folder, answer_column="reward_model.truth")
    with pytest.raises(UserError, match=r"has no column 'answer' \(there are: data_source, prompt, reward_model, e"):
        read(folder)


def test_deepmath(data_set: Callable[..., Path]) -> None:
    rows = [{"question": "x?", "final_answer": r"\sqrt{2}", "difficulty": d, "r1_solution_1": "…"} for d in (4.5, 9.0)]
    folder = data_set("deepmath", {("default", "train"): rows})
    found = read(
        folder,
        prompt_column="question",
        answer_column="final_answer",
        difficulty_column="difficulty",
        min_difficulty=5,
    )
    assert found == [Prompt("x?", r"\sqrt{2}")]


def test_math_500(data_set: Callable[..., Path]) -> None:
    rows = [
        {"problem": "x?", "solution": r"So \boxed{1}? No, $\boxed{\frac{3}{\sqrt{2}}}$.", "answer": "a", "level": level}
        for level in (1, 5)
    ]
    folder = data_set("math_500", {("default", "test"): rows})
    math: dict[str, Any] = {"prompt_column": "problem", "split": "test"}
    assert read(folder, **math) == [Prompt("x?", "a")] * 2
    hard: dict[str, Any] = {"difficulty_column": "level", "min_difficulty": 3}
    boxed = read(folder, answer_column="solution", answer_rule="boxed", **hard, **math)
    assert boxed == [Prompt("x?", r"\frac{3}{\sqrt{2}}")]


@pytest.mark.parametrize(
    ("name", "config", "split", "row", "settings"),
    [
        ("aime_2024", "default", "train", {"id": 60, "problem": "x?", "solution": "…", "answer": "204"}, {}),
        ("aime25", "default", "test", {"problem": "x?", "answer": "204", "id": "0"}, {}),
        ("AIME2025", "AIME2025-I", "test", {"question": "x?", "answer": "204"}, {"prompt_column": "question"}),
        ("hmmt_feb_2026", "default", "train", {"problem_idx": 1, "problem": "x?", "answer": "204"}, {}),
        ("aime_2026", "default", "train", {"problem_idx": 1, "problem": "x?", "answer": 204}, {}),
    ],
)
def test_contests(
    data_set: Callable[..., Path], name: str, config: str, split: str, row: dict[str, Any], settings: dict[str, Any]
) -> None:
    other = {("AIME2025-II", split): [row]} if name == "AIME2025" else {}
    folder = data_set(name, {(config, split): [row], **other})
    named = {"config": config} if other else {}
    assert read(folder, **{"prompt_column": "problem", "split": split, **named, **settings}) == [Prompt("x?", "204")]
