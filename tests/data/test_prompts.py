"""Prompts from files and data sets, through a chat template, and what becomes of their responses."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from erpd_lightning.data.prompt_batches import PromptBatch
from erpd_lightning.data.prompts import Prompt, as_text, read_prompts, tokenize
from erpd_lightning.data.samplers import Response, Sampler
from erpd_lightning.data.store import ROLLOUTS
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import UserError
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
        {"prompt": "line\nline\u2028line\x85line\x0cline", "answer": "ä"},
    ]
    lines = [json.dumps(rows[0]), "", *(json.dumps(row, ensure_ascii=False) for row in rows[1:]), " "]
    path = write_lines(tmp_path / "prompts.jsonl", *lines, end=end)
    assert read_prompts(path) == [
        Prompt("1+2:", "3"),
        Prompt(MESSAGES, "5"),
        Prompt("half?", "0.5"),
        Prompt("line\nline\u2028line\x85line\x0cline", "ä"),
    ]
    assert read_prompts(str(path)) == read_prompts(path)


def test_a_file_by_another_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.txt", '{"prompt": "1", "answer": "2"}')
    assert read_prompts(path) == [Prompt("1", "2")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "1", "answer": ', "not JSON"),
        ("1+2:", "not JSON"),
        ('["1", "2"]', "must be an object"),
        ("null", "must be an object"),
        ('{"prompt": "1"}', "must be an object"),
        ('{"question": "1", "answer": "2"}', "must be an object"),
        ('{"prompt": "", "answer": "2"}', "prompt must be"),
        ('{"prompt": [], "answer": "2"}', "prompt must be"),
        ('{"prompt": 7, "answer": "2"}', "prompt must be"),
        ('{"prompt": null, "answer": "2"}', "prompt must be"),
        ('{"prompt": [{"role": "user"}], "answer": "2"}', "prompt must be"),
        ('{"prompt": ["1"], "answer": "2"}', "prompt must be"),
        ('{"prompt": "1", "answer": null}', "answer must be"),
        ('{"prompt": "1", "answer": true}', "answer must be"),
        ('{"prompt": "1", "answer": ["2"]}', "answer must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    good = '{"prompt": "1", "answer": "2"}'
    path = write_lines(tmp_path / "prompts.jsonl", good, "", line, good)
    with pytest.raises(UserError, match=complaint) as error:
        read_prompts(path)
    assert message_of(error).startswith(f"{path}, line 3")


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
    assert read_prompts(folder) == [Prompt([{"role": "user", "content": "1"}], "2"), Prompt(MESSAGES, "5")]


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
    for name in ("empty", "test_only", "script", "not there"):
        with pytest.raises(UserError, match="neither a JSONL file nor a data set") as error:
            read_prompts(tmp_path / name)
        assert str(tmp_path / name) in message_of(error)
    assert not (tmp_path / "ran").exists()


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


def test_no_prompts_give_no_rows() -> None:
    table = make_batch([], Scripted(), Table()).respond(None)
    assert table.schema.equals(ROLLOUTS)
    assert len(table) == 0
