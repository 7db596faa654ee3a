"""Prompts from files and data sets, through a chat template, and what becomes of their responses."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from erpd_lightning.data.batching import replaced
from erpd_lightning.data.prompt_batches import PromptBatch
from erpd_lightning.data.prompts import (
    Prompt,
    PromptPlan,
    PromptSource,
    as_text,
    read_prompts,
    tokenize,
)
from erpd_lightning.data.samplers import Response, Sampler
from erpd_lightning.data.sources import check_sources, fingerprint_of
from erpd_lightning.data.store import ROLLOUTS
from erpd_lightning.data.tokenize import _rendered, check_chat_template_kwargs
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import InvalidArgument, UserError
from erpd_lightning.models.loading import context_length, load_tokenizer
from erpd_lightning.models.policy import load_policy
from support.policies import TASK, save_policy

MESSAGES = [{"role": "system", "content": "1"}, {"role": "user", "content": "2+3:"}]
TEMPLATE = (
    "{% for m in messages %}{{ '*' if m.role == 'user' else '-' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def write_lines(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def message_of(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which has to fit a line or two."""
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# Files


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_of_prompts(tmp_path: Path, end: str) -> None:
    rows = [
        {"prompt": "1+2:", "answer": "3"},
        {"prompt": MESSAGES, "answer": 5, "source": "elsewhere"},
        {"prompt": "half?", "answer": 0.5},
        {"prompt": "36 / 2", "answer": 18.0},
        {"prompt": "0 * -1", "answer": -0.0},
        {"prompt": "a googol", "answer": 1e100},
        {"prompt": "line\nline\u2028line\x85line\x0cline", "answer": "ä"},
    ]
    lines = [json.dumps(rows[0]), "", *(json.dumps(row, ensure_ascii=False) for row in rows[1:]), " "]
    path = write_lines(tmp_path / "prompts.jsonl", *lines, end=end)
    assert read_prompts(path).prompts == [
        Prompt("1+2:", "3"),
        Prompt(MESSAGES, "5"),
        Prompt("half?", "0.5"),
        Prompt("36 / 2", "18"),
        Prompt("0 * -1", "0"),
        Prompt("a googol", "1e+100"),
        Prompt("line\nline\u2028line\x85line\x0cline", "ä"),
    ]
    assert read_prompts(str(path)).prompts == read_prompts(path).prompts


def test_a_file_by_another_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.txt", '{"prompt": "1", "answer": "2"}')
    assert read_prompts(path).prompts == [Prompt("1", "2")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "1", "answer": ', "not JSON"),
        ("1+2:", "not JSON"),
        ('["1", "2"]', "must be an object"),
        ("null", "must be an object"),
        ('{"prompt": "1"}', r"has no column 'answer' \(there are: prompt\)"),
        ('{"question": "1", "answer": "2"}', r"has no column 'prompt' \(there are: question, answer\)"),
        ('{"prompt": "", "answer": "2"}', "prompt must be"),
        ('{"prompt": [], "answer": "2"}', "prompt must be"),
        ('{"prompt": 7, "answer": "2"}', "prompt must be"),
        ('{"prompt": null, "answer": "2"}', "prompt must be"),
        ('{"prompt": [{"role": "user"}], "answer": "2"}', "prompt must be"),
        ('{"prompt": ["1"], "answer": "2"}', "prompt must be"),
        ('{"prompt": "1", "answer": null}', r"there is no answer in answer \(null\)"),
        ('{"prompt": "1", "answer": " "}', "there is no answer in answer"),
        ('{"prompt": "1", "answer": true}', "answer must be"),
        ('{"prompt": "1", "answer": false}', "answer must be"),
        ('{"prompt": "1", "answer": ["2"]}', "answer must be"),
        ('{"prompt": "1", "answer": NaN}', "answer must be"),
        ('{"prompt": "1", "answer": Infinity}', "answer must be"),
        ('{"prompt": "1", "answer": -1e999}', "answer must be"),
        (r'{"prompt": "1 \ud83d", "answer": "2"}', r"prompt has half a character, '\\ud83d'"),
        (r'{"prompt": [{"role": "user", "content": "\udc00"}], "answer": "2"}', "prompt has half a character"),
        (r'{"prompt": "1", "answer": "\ud800"}', "answer has half a character"),
        ("[" * 200_000, "nested too deeply"),
        ('{"prompt": "a", "answer": "1", "answer": "2"}', "the key 'answer' is given twice"),
        ('{"prompt": [{"role": "user", "content": "a", "content": "b"}], "answer": 1}', "'content' is given twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    good = '{"prompt": "1", "answer": "2"}'
    path = write_lines(tmp_path / "prompts.jsonl", good, "", line, good)
    with pytest.raises(UserError, match=complaint) as error:
        read_prompts(path)
    assert message_of(error).startswith(f"{path}, line 3")


def test_a_byte_order_mark_and_whole_emoji_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes('{"prompt": "1+1=", "answer": "\\ud83d\\ude00"}\r\n'.encode("utf-8-sig"))
    assert read_prompts(path).prompts == [Prompt("1+1=", "\U0001f600")]


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(UserError, match="is missing") as error:
        read_prompts(missing)
    assert str(missing) in message_of(error)
    empty = write_lines(tmp_path / "empty.jsonl", "", " ")
    with pytest.raises(UserError, match="holds no prompts") as error:
        read_prompts(empty)
    assert str(empty) in message_of(error)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read") as error:
        read_prompts(binary)
    assert str(binary) in message_of(error)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "folder.jsonl")


# Data sets


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_data_set(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"prompt": [{"role": "user", "content": "1"}], "answer": 2},
        {"prompt": [*MESSAGES], "answer": 5},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    else:
        write_lines(folder / "train.jsonl", *(json.dumps(row) for row in rows))
    assert read_prompts(folder).prompts == [Prompt([{"role": "user", "content": "1"}], "2"), Prompt(MESSAGES, "5")]


def test_a_data_set_of_other_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "1", "answer": "2"}, {"prompt": "", "answer": "2"}]
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    with pytest.raises(UserError, match="prompt must be") as error:
        read_prompts(folder)
    assert message_of(error).startswith(f"{folder}, row 2")


def test_data_sets_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "test_only").mkdir()
    pq.write_table(pa.table({"prompt": ["1"]}), tmp_path / "test_only" / "test.parquet")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("empty", "script", "not there"):
        with pytest.raises(UserError, match="neither a JSONL file nor a data set") as error:
            read_prompts(tmp_path / name)
        assert str(tmp_path / name) in message_of(error)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"test_only has no split train: there are test$"):
        read_prompts(tmp_path / "test_only")


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with the splits train and test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, answers in (("train", "123"), ("test", "34")):
        rows = [json.dumps({"prompt": f"{answer}=", "answer": answer}) for answer in answers]
        write_lines(folder / f"{split}.jsonl", *rows)
    return folder


def test_a_split_of_a_data_set(splits: Path) -> None:
    assert [row.answer for row in read_prompts(splits).prompts] == ["1", "2", "3"]
    assert [row.answer for row in read_prompts(f"{splits}?split=test").prompts] == ["3", "4"]
    mixed = read_prompts(f"{splits}?config=default&split=train[:1]+test[1:]")
    assert [row.answer for row in mixed.prompts] == ["1", "4"]
    with pytest.raises(UserError) as error:
        read_prompts(f"{splits}?split=held_out")
    assert message_of(error) == f"{splits} has no split held_out: there are train, test"


@pytest.mark.parametrize("options", ["test", "splits=test", "split=", "split=a&split=b", "", "split=test&"])
def test_options_that_no_data_set_has(options: str) -> None:
    with pytest.raises(UserError, match="is no option of a data set") as error:
        read_prompts(f"some/data?{options}")
    assert message_of(error).startswith(f"some/data?{options}: ")


def test_a_folder_with_a_question_mark_in_its_name(splits: Path) -> None:
    odd = splits.rename(splits.with_name("mine?split=test"))
    assert PromptSource.parse(odd) == PromptSource(str(odd))


def test_one_split_for_training_and_validation_is_refused(splits: Path) -> None:
    (splits.parent / "p.jsonl").write_text("")
    check_sources(splits, f"{splits}?split=test")
    check_sources(splits, None)
    check_sources(splits.parent / "p.jsonl", splits.parent / "p.jsonl")
    for other in (splits, f"{splits}/", f"{splits}?split=train"):
        with pytest.raises(UserError, match="whose split train is what prompts names too") as error:
            check_sources(splits, other)
        assert message_of(error).startswith("validation_prompts ")
    with pytest.raises(UserError, match="whose split train is what prompts names too"):
        check_sources(splits, PromptSource(splits, suffix="!", limit=3))
    easy, hard = ({"difficulty_column": "d", f"{bound}_difficulty": 3} for bound in ("max", "min"))
    check_sources(PromptSource(splits, **easy), PromptSource(splits, **hard))  # type: ignore[arg-type]


def test_a_fingerprint_is_of_the_rows(splits: Path) -> None:
    path = write_lines(splits.parent / "prompts.jsonl", '{"prompt": "1", "answer": "2"}')
    before = [fingerprint_of(read_prompts(source).prompts) for source in (path, splits, f"{splits}?split=test")]
    assert before == [fingerprint_of(read_prompts(source).prompts) for source in (path, splits, f"{splits}?split=test")]
    assert len(set(before)) == 3
    write_lines(path, '{"prompt": "1", "answer": "3"}')
    write_lines(splits / "train.jsonl", *(f'{{"prompt": "{n}=", "answer": "0"}}' for n in (1, 2, 3)))
    after = [fingerprint_of(read_prompts(source).prompts) for source in (path, splits, f"{splits}?split=test")]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True]
    moved = splits.rename(splits.with_name("elsewhere"))
    assert fingerprint_of(read_prompts(moved).prompts) == after[1]
    with pytest.raises(UserError, match="is missing"):
        read_prompts(splits.parent / "none.jsonl")


def make_plan(
    train: PromptSource | Path | str, validation: PromptSource | Path | str | None, max_validation: int | None = None
) -> PromptPlan:
    return PromptPlan(train, validation, lambda _: [1], None, 1, 0, max_validation, 0)


@pytest.mark.parametrize("train_first", [True, False])
def test_prompts_of_both_training_and_validation_are_counted(
    splits: Path, train_first: bool, recwarn: pytest.WarningsRecorder
) -> None:
    plan = make_plan(splits, f"{splits}?split=test")
    read = [lambda: len(plan.sampled()), lambda: len(plan.held_out)]
    assert read[not train_first]() > 0
    assert not _warned(recwarn)
    for _ in range(2):
        assert read[train_first]() > 0
    (message,) = _warned(recwarn)
    assert message.startswith(f"1 of the 2 held-out prompts in {splits}?split=test are training prompts of {splits}")


def test_prompts_are_the_same_whatever_stands_around_them(splits: Path, recwarn: pytest.WarningsRecorder) -> None:
    plan = make_plan(PromptSource(splits, chat=True, suffix="?"), PromptSource(splits, split="test", system_prompt="1"))
    assert (len(plan.sampled()), len(plan.held_out)) == (3, 2)
    (message,) = _warned(recwarn)
    assert message.startswith(f"1 of the 2 held-out prompts in {splits}?split=test are training prompts of {splits} ")


def test_prompts_that_are_not_used_are_not_counted(splits: Path, recwarn: pytest.WarningsRecorder) -> None:
    plan = make_plan(f"{splits}?split=test", splits, max_validation=2)
    assert (len(plan.sampled()), len(plan.held_out)) == (2, 2)
    plan = make_plan(splits, None)
    assert (len(plan.sampled()), len(plan.held_out)) == (3, 0)
    assert not _warned(recwarn)


def _warned(record: pytest.WarningsRecorder) -> list[str]:
    """Messages about prompts; libraries warn of other things."""
    return [text for each in record if "prompts" in (text := str(each.message)) or "template" in text]


# Tokens


def test_a_chat_goes_through_the_template() -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(tokenize(tokenizer, MESSAGES)) == "-1*2+3:="
    assert tokenize(tokenizer, "2+3:") == tokenizer("2+3:").input_ids


def test_a_template_writes_its_own_special_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = "<bos>" + TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    # Once, by the tokenizer for a plain prompt, by the template for a chat.
    assert tokenize(tokenizer, "2")[:2] == [1, 5]
    assert tokenize(tokenizer, [{"role": "user", "content": "2"}])[:3] == [1, 15, 5]


@pytest.mark.parametrize("bos", ["<bos>", "<eos>"])
def test_special_tokens_around_a_plain_prompt(bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = TASK.tokenizer()
    first = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.bos_token = bos
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} <pad> $A <eos>", special_tokens=[(bos, first), ("<pad>", 0), ("<eos>", 2)]
    )
    # What the tokenizer puts in front stays, what it puts behind does not.
    assert tokenize(tokenizer, "2+3:") == [first, 0, 5, 13, 6, 18]
    # A prompt that was rendered before begins with it already, and ends with what its author wrote.
    assert tokenize(tokenizer, f"{bos}<pad>2<eos>") == [first, 0, 5, 2]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, first)])
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenize(tokenizer, rendered) == tokenize(tokenizer, MESSAGES)
    assert tokenize(tokenizer, MESSAGES)[:2] != [first, first]


def test_variables_of_a_template(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %};{% endif %}"
    chat = [{"role": "user", "content": "2"}]
    assert tokenizer.decode(tokenize(tokenizer, chat)) == "*2="
    assert tokenizer.decode(tokenize(tokenizer, chat, {"enable_thinking": False})) == "*2=;"
    with pytest.raises(
        InvalidArgument, match=r"^chat_template_kwargs has thinking, but the tokenizer's chat template h"
    ):
        tokenize(tokenizer, chat, {"thinking": False})
    for name in ("tokenize", "add_generation_prompt"):
        with pytest.raises(InvalidArgument, match=f"^chat_template_kwargs has {name}, which is set for each prompt"):
            check_chat_template_kwargs({name: True})
    assert not [text for text in _warned(recwarn) if "chat_template_kwargs" in text]
    for _ in range(2):
        assert tokenize(tokenizer, "2", {"enable_thinking": False}) == tokenize(tokenizer, "2")
    (message,) = [text for text in _warned(recwarn) if "chat_template_kwargs" in text]
    assert message.startswith("chat_template_kwargs change no prompt that is text")


ROLES = ("user", "assistant", "user")
TURNS = (
    "{% for m in messages %}{{ '+*' if m.role == 'user' else '=*' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}=*{% endif %}"
)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["1+1", "=2;"], "+*1+1<eos>=*=2;"),
        (["1+1", "=2", "+1"], "+*1+1<eos>=*=2<eos>+*+1<eos>=*"),
        (["1+1", ""], "+*1+1<eos>=*"),
    ],
)
def test_an_answer_that_was_begun_is_continued(turns: list[str], expected: str) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = TURNS
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, turns, strict=False)]
    assert tokenize(tokenizer, messages) == tokenizer(expected).input_ids


CLOCK = (
    "\n  {%- if strftime_now is defined %}{% set day = strftime_now('%Y-%m-%d') %}"
    "{% else %}{% set day = '0' %}{% endif %}"
    "{% macro turn(m) %}{{ day }}{{ strftime_now('%d;%-m;%H;%M') }}:{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def test_a_template_that_prints_the_date(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = CLOCK
    message = [{"role": "user", "content": "1"}]
    assert tokenizer.decode(tokenize(tokenizer, message)) == "2024-07-2626;7;00;00:1="
    assert tokenize(tokenizer, message)
    (told,) = _warned(recwarn)
    assert "26 July 2024" in told
    # Nothing else of the template is changed: neither lines nor spaces.
    tokenizer.chat_template = "\n  {% if 1 %}1{% endif %}\n" + TEMPLATE
    without = tokenizer.apply_chat_template(message, tokenize=False)
    tokenizer.chat_template += "{% if 0 %}{{ strftime_now('') }}{% endif %}"
    assert _rendered(tokenizer, message, closed=True) == without


def test_turns_that_end_with_a_token_at_which_nothing_stops(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = save_policy(tmp_path / "policy")
    tokenizer = load_tokenizer(path)
    message = [{"role": "user", "content": "1"}]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<bos>;{% endfor %}"
    for _ in range(2):
        tokenize(tokenizer, message)
    (told,) = _warned(recwarn)
    assert "ends a turn with '<bos>', which is not among the end-of-sequence tokens" in told
    recwarn.clear()
    # With the tokenizer's own end, one that the policy is shipped with, or none at all.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos><bos>{% endfor %}"
    tokenize(tokenizer, message)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    tokenize(tokenizer, message)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>:{% endfor %}"
    tokenize(tokenizer, message)
    assert not _warned(recwarn)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(None, "chat_template"), ("{{ raise_exception('roles must alternate') }}", "roles must alternate")],
)
def test_a_template_that_takes_no_such_prompt(template: str | None, reason: str) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason) as error:
        tokenize(tokenizer, MESSAGES)
    assert '"role": "system"' in message_of(error)


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (TEMPLATE, []),
        ("{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% endfor %}", ["system"]),
        ("{{ messages[0].content }}:", ["user"]),
        ("1+1:", ["system", "user"]),
    ],
)
def test_a_template_that_leaves_out_what_is_said(
    template: str, left_out: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = template
    for question in (" 1+2: ", " 3+2: "):
        tokenize(tokenizer, [{"role": "system", "content": "9"}, {"role": "user", "content": question}])
    told = [text for text in _warned(recwarn) if "leaves out" in text]
    assert [role for text in told for role in ("system", "user") if f"what the {role} says" in text] == left_out


@pytest.mark.parametrize(
    ("key", "value"), [("content", None), ("content", [{"type": "text", "text": "1"}]), ("content", 3), ("role", 3)]
)
def test_a_message_that_is_no_text(key: str, value: Any) -> None:
    """Many templates would print it as Python does: `None`."""
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = TEMPLATE
    message: Any = {"role": "user", "content": "1", key: value}
    with pytest.raises(UserError, match=f"{key} of a chat message is .*: it must be text"):
        tokenize(tokenizer, [message])


def test_a_prompt_without_tokens() -> None:
    with pytest.raises(UserError, match="has no tokens"):
        tokenize(TASK.tokenizer(), "")


def test_a_tokenizer_is_made_fit_for_generation(tmp_path: Path) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no_pad")
    loaded = load_tokenizer(tmp_path / "no_pad")
    assert (loaded.padding_side, loaded.pad_token_id) == ("left", loaded.eos_token_id)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "no_eos")


def test_context_length(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy")
    assert context_length(path) == TASK.context
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "bloom", "eos_token_id": 2}))
    assert context_length(path) is None
    assert config["max_position_embeddings"] == TASK.context


def test_code_beside_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_policy(tmp_path / "policy")
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    for file, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        content = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**content, key: "unheard_of", "auto_map": names}))
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    # Whoever is asked would say yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="custom code") as error:
        load_policy(path)
    assert str(path) in message_of(error)
    with pytest.raises(UserError, match="custom code"):
        context_length(path)
    with pytest.raises(UserError):
        load_tokenizer(path)
    assert sys.stdin.read() == "y\n" * 9
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [load_policy, load_tokenizer, context_length])
def test_nothing_to_load(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "not there"):
        with pytest.raises(UserError, match="can be loaded from") as error:
            load(tmp_path / name)
        assert str(tmp_path / name) in message_of(error)


# Responses


class Scripted(Sampler):
    """Answers with the prompt's own tokens, numbered."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int] = []

    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        self.seeds.append(seed)
        return [
            Response([*prompt, 3 + n, 2], [-0.5] * (len(prompt) + 2), "stop" if n else "length")
            for n, prompt in enumerate(prompts)
        ]


class Table(Verifier):
    """Rewards by number."""

    def __init__(self, *rewards: float | None) -> None:
        self.rewards = list(rewards)
        self.asked: list[tuple[str, str]] = []

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        self.asked += zip(responses, answers, strict=True)
        return self.rewards


def make_batch(prompts: list[Prompt], sampler: Sampler, verifier: Verifier) -> PromptBatch:
    tokenizer = TASK.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return PromptBatch(
        index=3,
        prompts=prompts,
        prompt_ids=[tokenize(tokenizer, prompt.prompt) for prompt in prompts],
        groups=range(7, 7 + len(prompts)),
        samples=2,
        seed=11,
        max_tokens=99,
        tokenizer=tokenizer,
        sampler=sampler,
        verifier=verifier,
    )


@pytest.mark.parametrize(("judge_truncated", "rewards"), [(True, [1.0, 1.0]), (False, [0.0, 1.0])])
def test_a_response_that_was_cut_off(judge_truncated: bool, rewards: list[float]) -> None:
    """The first response is cut off where it reads like the answer: judged as it is, or not checked at all."""
    batch = replaced(make_batch([Prompt("4:", "4")], Scripted(), Table(1.0, 1.0)), judge_truncated=judge_truncated)
    table = batch.respond(None)
    assert table["finish_reason"].to_pylist() == ["length", "stop"]
    assert table["checked"].to_pylist() == [judge_truncated, True]
    assert table["reward"].to_pylist() == rewards


def test_responses_become_rows() -> None:
    sampler, verifier = Scripted(), Table(1.0, None, 0.0, 1.0)
    chat = [{"role": "user", "content": "ä"}]
    batch = make_batch([Prompt("4:", "4"), Prompt(chat, "5")], sampler, verifier)
    table = batch.respond(None)
    assert table.schema.equals(ROLLOUTS)
    assert table["group"].to_pylist() == [7, 7, 8, 8]
    assert table["sample"].to_pylist() == [0, 1, 0, 1]
    assert table["prompt_ids"].to_pylist() == [[7, 18]] * 2 + [[15, 0, 16]] * 2
    assert table["response_ids"].to_pylist()[1] == [7, 18, 4, 2]
    assert table["logps"].to_pylist()[2] == [-0.5] * 5
    assert table["response"].to_pylist() == ["4:0", "4:1", "*=2", "*=3"]
    assert verifier.asked == [("4:0", "4"), ("4:1", "4"), ("*=2", "5"), ("*=3", "5")]
    # What could not be checked is never rewarded.
    assert table["reward"].to_pylist() == [1.0, 0.0, 0.0, 1.0]
    assert table["checked"].to_pylist() == [True, False, True, True]
    assert table["finish_reason"].to_pylist() == ["length", "stop", "stop", "stop"]
    assert table["prompt"].to_pylist()[2] == as_text(chat) == '[{"role": "user", "content": "ä"}]'
    assert table["answer"].to_pylist() == ["4", "4", "5", "5"]
    batch.respond(None, seed=12)
    assert sampler.seeds == [11, 12]
    assert batch.to(torch.device("cpu")) is batch


def test_rewards_are_finite_numbers() -> None:
    chat = [Prompt("4:", "4"), Prompt("5:", "5")]
    rewards: list[Any] = [np.float32(0.5), -1, True, 2.5]
    table = make_batch(chat, Scripted(), Table(*rewards)).respond(None)
    assert table["reward"].to_pylist() == [0.5, -1.0, 1.0, 2.5]
    assert table["checked"].to_pylist() == [True] * 4


@pytest.mark.parametrize(
    ("reward", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (1e39, r"1e\+39"),
        (10**400, "1000"),
        ("1", "'1'"),
        (torch.tensor(1.0), r"tensor\(1.\)"),
        ([1.0], r"\[1.0\]"),
        (1j, "1j"),
    ],
)
def test_other_rewards_are_refused(reward: Any, shown: str) -> None:
    batch = make_batch([Prompt("4:", "4")], Scripted(), Table(1.0, reward))
    with pytest.raises(
        UserError, match=rf"^Table gave {shown}.* as the reward of response 2 .*: it must be a finite"
    ) as error:
        batch.respond(None)
    assert len(message_of(error)) < 250


def test_no_prompts_give_no_rows() -> None:
    table = make_batch([], Scripted(), Table()).respond(None)
    assert table.schema.equals(ROLLOUTS)
    assert len(table) == 0
