"""Files of every kind, what is asked, answers by rule and pattern, filters, and what is told of what is left out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from erpd_lightning.data.sources import Prompt, PromptSource, fingerprint_of, read_prompts
from erpd_lightning.errors import InvalidArgument, UserError

ROWS: list[dict[str, Any]] = [{"q": "1, 2", "a": {"b": "x"}}, {"q": 'a "b"\nc', "a": {"b": "y"}}]


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **settings: Any) -> list[Prompt]:
    return read_prompts(PromptSource(path, **settings)).prompts


# Files


def write(path: Path) -> Path:
    """Two rows in a file of a kind; in CSV there are no columns in columns."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif path.suffix == ".jsonl":
        write_rows(path, *ROWS)
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        path.write_text(f'q{comma}a.b\n"1, 2"{comma}x\n"a ""b""\nc"{comma}y\n')
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}")
    assert read(path, prompt_column="q", answer_column="a.b") == [Prompt("1, 2", "x"), Prompt('a "b"\nc', "y")]
    unit = "row" if kind in ("json", "parquet") else "line"
    number = 2 if kind in ("csv", "tsv") else 1  # Behind the names.
    with pytest.raises(UserError, match=rf"rows\.{kind}, {unit} {number} has no column 'prompt' \(there are: q, a"):
        read(path)
    with pytest.raises(UserError, match=rf"none\.{kind} is missing"):
        read(tmp_path / f"none.{kind}")


def test_a_json_file_of_lines(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", {"prompt": "1", "answer": "2"})
    assert read(path) == [Prompt("1", "2")]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.json", b'[{"prompt": "1", "answer": "2"}, 7]', r"p\.json, row 2 must be an object"),
        ("p.json", b'[{"prompt": "1"', r"p\.json is not JSON"),
        ("p.csv", b"prompt,answer\n1,2\n3\n", r"p\.csv, line 3 has not as many values .*: prompt, answer$"),
        ("p.csv", b"prompt,answer\n1,2,3\n", r"p\.csv, line 2 has not as many values"),
        ("p.csv", b"\xff\xfe\x00", r"p\.csv cannot be read as a CSV file"),
        ("p.parquet", b"PAR1 no", r"p\.parquet cannot be read as a Parquet file"),
        ("p.csv", b"", r"p\.csv holds no prompts"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        read(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_is_read_as_far_as_it_is_used(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", *({"prompt": f"{n}", "answer": "2"} for n in (1, 1, 2)))
    path.write_text(path.read_text() + "broken\n")
    found = read_prompts(PromptSource(path, limit=2, drop_duplicates=True, streaming=True))
    assert [row.prompt for row in found.prompts] == ["1", "2"]
    assert found.report() == f"{path}: the first 2, 2 of 3 prompts: 1 duplicates"
    with pytest.raises(UserError, match="line 4 is not JSON"):
        read(path, limit=3, drop_duplicates=True)


# What is asked


def test_text_around_a_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = write_rows(tmp_path / "p.jsonl", {"prompt": "a", "answer": 1}, {"prompt": turns, "answer": 1})
    around: dict[str, Any] = {"prefix": "<", "suffix": ">"}
    user = {"role": "user", "content": "<a>"}
    last = [*turns[:2], {"role": "user", "content": "<c>"}]
    assert [row.prompt for row in read(path, **around)] == ["<a>", last]
    assert [row.prompt for row in read(path, chat=True, **around)] == [[user], last]
    system = {"role": "system", "content": "s"}
    assert [row.prompt for row in read(path, system_prompt="s", **around)] == [[system, user], [system, *last]]
    assert [row.prompt for row in read(path)] == ["a", turns]


def test_text_that_a_chat_has_no_place_for(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", {"prompt": [{"role": "system", "content": "s"}], "answer": 1})
    with pytest.raises(UserError, match="line 1 has a system message of its own"):
        read(path, system_prompt="t")
    with pytest.raises(UserError, match="line 1 has no user's message of text"):
        read(path, suffix="t")


# Answers


@pytest.mark.parametrize(
    ("settings", "text", "answer"),
    [
        ({}, " 5 #### 6 ", "5 #### 6"),
        ({"answer_rule": "hashes"}, "#### 5\n#### 6 \n", "6"),
        ({"answer_rule": "hashes"}, "the answer is 6", None),
        ({"answer_rule": "hashes"}, "6 ####", None),
        ({"answer_rule": "boxed"}, r"\boxed{1}, so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ({"answer_rule": "boxed"}, "it is 6", None),
        ({"answer_rule": "boxed"}, r"\boxed{6", None),
        ({"answer_pattern": r"Answer: (\d+)"}, "Answer: 5. Answer: 6.", "6"),
        ({"answer_pattern": r"Answer: (\d+)"}, "6", None),
    ],
)
def test_answers(tmp_path: Path, settings: dict[str, Any], text: str, answer: str | None) -> None:
    good = "Answer: 1 #### 1" + r" \boxed{1}"
    path = write_rows(tmp_path / "p.jsonl", *({"prompt": p, "answer": a} for p, a in (("1", good), ("2", text))))
    if answer is not None:
        assert read(path, **settings)[1] == Prompt("2", answer)
        return
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: there is no .* in answer \(.*skip_unanswered: true"):
        read(path, **settings)
    found = read_prompts(PromptSource(path, skip_unanswered=True, **settings))
    assert [row.prompt for row in found.prompts] == ["1"]
    assert found.left_out == {"without an answer": [2]}


def test_a_pattern_that_takes_for_ever(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "answer": "a!"}, {"prompt": "2", "answer": "a" * 40 + "?"}]
    path = write_rows(tmp_path / "p.jsonl", *rows)
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: answer_pattern took longer than 0\.5 s"):
        read(path, answer_pattern=r"((?:a+)+)!", answer_timeout=0.5)


def test_answers_that_nobody_needs(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "2", "answer": None})
    assert read_prompts(path, answered=False).prompts == [Prompt("1", ""), Prompt("2", "")]


# Filters


class Characters:
    """A tokenizer of characters that counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompt: Any) -> list[int]:
        self.asked += 1
        text = prompt if isinstance(prompt, str) else "".join(f"<{each['role']}>{each['content']}" for each in prompt)
        return [1, *text.encode()]


@pytest.mark.parametrize("chat", [False, True])
def test_long_prompts_are_left_out_to_the_token(tmp_path: Path, chat: bool) -> None:
    texts = ["a", "a" * 20, "a" * 21, "ä" * 10, "ä" * 11, *["b"] * 50]
    path = write_rows(tmp_path / "p.jsonl", *({"prompt": text, "answer": 1} for text in texts))
    encode = Characters()
    most = 21 + len("<user>") * chat
    found = read_prompts(PromptSource(path, max_prompt_tokens=most, chat=chat), encode)
    assert found.left_out == {f"longer than {most} tokens": [3, 5]}
    assert len(found.prompts) == 53
    assert encode.asked == 5  # Of the last ones it is certain.
    with pytest.raises(InvalidArgument, match="max_prompt_tokens is given, but there is no tokenizer"):
        read(path, max_prompt_tokens=5)


def test_all_that_was_left_out_is_listed(tmp_path: Path) -> None:
    rows = [("1", "1", 1), ("1", "1", 2), ("22222", "1", 3), ("1", "2", 4), ("3", "1", "hard"), ("4", "1", 5)]
    path = write_rows(tmp_path / "p.jsonl", *({"prompt": p, "answer": a, "d": d} for p, a, d in rows))
    source = PromptSource(
        path, drop_duplicates=True, max_prompt_tokens=4, difficulty_column="d", max_difficulty=4, suffix="?"
    )
    found = read_prompts(source, Characters())
    assert found.prompts == [Prompt("1?", "1")]
    assert found.questions == ["1"]
    assert found.report() == (
        f"{path}: 1 of 6 prompts: 1 without a difficulty, 1 of a difficulty above 4, 1 duplicates, "
        "1 longer than 4 tokens, 1 duplicates with another answer"
    )
    listed = {each["reason"]: each["lines"] for each in map(json.loads, found.listed())}
    assert listed == {
        "duplicates": [2],
        "longer than 4 tokens": [3],
        "duplicates with another answer": [4],
        "without a difficulty": [5],
        "of a difficulty above 4": [6],
    }
    with pytest.raises(UserError, match=r"holds no prompts \(.*: 0 of 6 prompts: .*\): at least one is needed"):
        read(path, difficulty_column="d", min_difficulty=9)


def test_a_fingerprint_is_of_what_is_used(tmp_path: Path) -> None:
    def fingerprint(row: dict[str, Any], **settings: Any) -> str:
        return fingerprint_of(read(write_rows(tmp_path / "p.jsonl", row), **settings))

    row = {"prompt": "1", "answer": "2", "source": "here"}
    assert fingerprint(row) == fingerprint({**row, "source": "there"})
    assert fingerprint(row) == fingerprint(
        {"q": "1", "a": "#### 2"}, prompt_column="q", answer_column="a", answer_rule="hashes"
    )
    assert (
        len({fingerprint(row, **each) for each in ({}, {"chat": True}, {"suffix": "."}, {"system_prompt": "."})}) == 4
    )


# Settings


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"path": ""}, "path is empty"),
        ({"streaming": True}, "streaming is true without limit"),
        ({"path": "p.jsonl", "split": "train"}, "split is 'train', but a file has none"),
        ({"path": "p.csv", "config": "main"}, "config is 'main', but a file has none"),
        ({"revision": ""}, "revision is '', which names none"),
        ({"answer_rule": "last"}, "answer_rule is 'last'"),
        ({"answer_pattern": "(a)", "answer_rule": "boxed"}, "answer_pattern is given beside answer_rule boxed"),
        ({"answer_pattern": "("}, r"answer_pattern is '\(', which is no regular expression"),
        ({"answer_pattern": "a"}, "answer_pattern is 'a': it must have exactly one group"),
        ({"answer_pattern": "(a)", "answer_timeout": 0.0}, "answer_timeout is 0.0"),
        ({"min_difficulty": 1}, "difficulty_column is null"),
        ({"difficulty_column": "d"}, "difficulty_column is given without"),
        ({"difficulty_column": "d", "min_difficulty": "hard"}, "min_difficulty is 'hard': it must be a number"),
        ({"difficulty_column": "d", "min_difficulty": "3/8", "max_difficulty": 0.25}, "min_difficulty is 3/8, above"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{complaint}"):
        PromptSource(**{"path": "some/data", **settings})
