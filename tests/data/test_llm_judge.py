"""A judge behind a real server: its verdicts, the server's mistakes, and that nothing is asked twice."""

import json
import pickle
import re
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data import http
from erpd_lightning.data.verifiers import LLMJudge, take_verdicts
from erpd_lightning.errors import UserError
from support.chat_server import MODEL, ChatServer, chat_server


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LONGEST_PAUSE_SECONDS", 0.01)


def judge(server: ChatServer, *responses: str, **settings: Any) -> list[float | None]:
    verifier = LLMJudge(server.url, MODEL, **{"timeout": 5.0, **settings})
    verifier.start()
    count = len(responses)
    return take_verdicts(verifier, ["What?"] * count, responses, ["7"] * count).rewards


def test_verdicts_and_what_is_asked(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = judge(server, "right", "wrong", "<think>hm</think> right", "<think>right", system="Be strict.")
    assert found == [1.0, 0.0, 1.0, 0.0]
    assert server.asked == {"right": 1, "wrong": 1}
    request = next(request for request in server.requests if "right" in request["messages"][-1]["content"])
    assert (request["model"], request["temperature"]) == (MODEL, 0.0)
    assert request["messages"][0] == {"role": "system", "content": "Be strict."}
    asked = request["messages"][1]["content"]
    assert "<problem>\nWhat?\n</problem>" in asked
    assert "<reference_answer>\n7\n</reference_answer>" in asked
    assert server.keys == ["Bearer secret"] * 2
    assert "secret" not in json.dumps(LLMJudge(server.url, MODEL).settings())


def test_braces_in_a_response_are_not_filled_in(server: ChatServer) -> None:
    verifier = LLMJudge(server.url, MODEL, template="{answer} <response>\n{response}\n</response>", retries=0)
    with pytest.warns(UserWarning, match="not checked"):
        verifier(["no verdict {answer} {0} \\boxed{7}"], ["5"])
    assert server.requests[0]["messages"][0]["content"].startswith("5 <response>\nno verdict {answer} {0} \\boxed{7}\n")


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ('[{"role": "system", "content": "S"}, {"role": "user", "content": "Ä?"}]', "Ä?"),
        ('[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]', "user: 1\n\nassistant: 2"),
        ("[1, 2] is a list", "[1, 2] is a list"),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_chat_prompts_are_shown_as_text(server: ChatServer, prompt: str, shown: str) -> None:
    LLMJudge(server.url, MODEL).verify([prompt], ["right"], ["7"])
    assert f"<problem>\n{shown}\n</problem>" in server.requests[0]["messages"][0]["content"]


MISTAKES = ["status 500", "status 429", "no json", "no choices", "no verdict", "break off"]


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_that_passes_costs_further_tries(server: ChatServer, what: str) -> None:
    assert judge(server, f"{what}, at last", "right") == [1.0, 1.0]
    assert server.asked[f"{what}, at last"] == 3


@pytest.mark.parametrize("what", [*MISTAKES, "hang"])
def test_a_mistake_that_lasts_is_counted_and_not_rewarded(server: ChatServer, what: str) -> None:
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"^LLMJudge: 2 of 4 responses are not checked, as in: http") as told:
        found = judge(server, what, "right", what, "wrong", timeout=0.5, retries=2)
    assert found == [None, 1.0, None, 0.0]
    assert server.asked[what] == 3
    assert "\n" not in str(told[0].message)
    assert time.monotonic() - start < 10


def test_what_is_refused_is_not_asked_again(server: ChatServer) -> None:
    with pytest.warns(UserWarning, match="1 of 2 responses are not checked.*status 400"):
        assert judge(server, "status 400", "right") == [None, 1.0]
    assert server.asked["status 400"] == 1
    with pytest.raises(UserError, match=r"^LLMJudge: the server refused all of 2 requests, as in: http.*status 401"):
        judge(server, "status 401", "status 401 too")


def test_requests_in_flight_are_limited(server: ChatServer) -> None:
    responses = [f"<think>{number}</think>right" for number in range(4)] + [f"score {n / 40}" for n in range(40)]
    settings: dict[str, Any] = {"pattern": r"(?:Score|Verdict): ([\w.]+)", "rewards": {"correct": 2.0}}
    found = judge(server, *responses, concurrency=4, **settings)
    assert found == [2.0] * 4 + [n / 40 for n in range(40)]
    assert 1 < server.most <= 4


# Nobody there


def test_no_server_is_a_line_at_the_start() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=rf"^LLMJudge: {url}/models cannot be reached: Connection refused") as error:
        LLMJudge(url, MODEL).start()
    assert "\n" not in str(error.value)


def test_another_model_is_a_line_at_the_start(server: ChatServer) -> None:
    with pytest.raises(UserError, match=rf"^model is 'other': the server at {server.url} has judge"):
        LLMJudge(server.url, "other").start()


def test_a_server_that_lists_no_models_is_there() -> None:
    with chat_server(models=False) as server:
        assert judge(server, "right") == [1.0]


def test_a_server_that_goes_is_a_line_and_nothing_is_lost(tmp_path: Path) -> None:
    with chat_server() as server:
        verifier = LLMJudge(server.url, MODEL, cache=tmp_path, timeout=2.0, retries=1)
        verifier.start()
        assert verifier(["right"], ["7"]) == [1.0]
        port = server.server_address[1]
    with pytest.raises(UserError, match=r"^LLMJudge: .* cannot be reached: .*when the server is back"):
        verifier(["right", "wrong"], ["7", "7"])
    with chat_server(port=port) as server:
        assert verifier(["right", "wrong"], ["7", "7"]) == [1.0, 0.0]
        assert server.asked == {"wrong": 1}


def test_a_key_that_no_header_can_hold_is_a_line(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sk-ä", "sk\nX-More: 1"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=r"^api_key_variable is 'OPENAI_API_KEY', .* no key has$"):
            LLMJudge(server.url, MODEL).start()


def test_the_address_is_left_out_of_no_mistake(server: ChatServer) -> None:
    said = f"as in: {server.url}/chat/completions answered with status 400: "
    with pytest.warns(UserWarning, match=re.escape(said)):
        judge(server, "status 400", "right")


# What is kept


def test_nothing_is_asked_twice(server: ChatServer, tmp_path: Path) -> None:
    folder = tmp_path / "verdicts"
    assert judge(server, "right", "wrong", cache=folder) == [1.0, 0.0]
    assert judge(server, "right", "wrong", "right", cache=folder) == [1.0, 0.0, 1.0]
    assert server.asked == {"right": 1, "wrong": 1}
    # Another reading of the same reply asks nothing.
    assert judge(server, "right", cache=folder, rewards={"correct": 0.5, "incorrect": 0.0}) == [0.5]
    assert server.asked["right"] == 1
    # Another question does.
    assert judge(server, "right", cache=folder, parameters={"max_tokens": 5}) == [1.0]
    assert judge(server, "right", cache=folder, system="Be strict.") == [1.0]
    assert server.asked["right"] == 3
    assert judge(server, "right") == [1.0]
    assert server.asked["right"] == 4


def test_what_was_not_answered_is_asked_again(server: ChatServer, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not checked"):
        assert judge(server, "no verdict, at last", cache=tmp_path, retries=0) == [None]
    assert judge(server, "no verdict, at last", cache=tmp_path, retries=1) == [1.0]


def test_a_line_that_was_cut_short_is_passed_over(server: ChatServer, tmp_path: Path) -> None:
    judge(server, "right", "wrong", cache=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines()
    row = json.loads(lines[0])
    assert set(row) == {"key", "asked", "reply"}
    assert row["asked"]["model"] == MODEL
    file.write_text(lines[0] + "\n" + lines[1][:40])
    assert judge(server, "right", "wrong", cache=tmp_path) == [1.0, 0.0]
    assert sum(server.asked.values()) == 3
    (tmp_path / "stray.jsonl").write_bytes(b"\xff\x00\n[]\nnull\n{}\n")
    assert judge(server, "right", "wrong", cache=tmp_path) == [1.0, 0.0]
    assert sum(server.asked.values()) == 3


def test_a_folder_that_is_none_is_a_line(server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cache .*file cannot be used for verdicts"):
        judge(server, "right", cache=tmp_path / "file")


def test_settings_and_copies(server: ChatServer, tmp_path: Path) -> None:
    verifier = LLMJudge(server.url, MODEL, cache=tmp_path)
    written = verifier.settings()
    # Where and how it is asked changes no verdict.
    assert written == LLMJudge("http://elsewhere:1/v1", MODEL, timeout=1.0, retries=0, concurrency=1).settings()
    assert set(written) == {"model", "template", "system", "pattern", "rewards", "parameters"}
    assert pickle.loads(pickle.dumps(verifier))(["right"], ["7"]) == [1.0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "localhost:8000"}, r"^url is 'localhost:8000'"),
        ({"url": "file:///etc/passwd"}, r"^url is"),
        ({"template": "{answer}"}, r"^template has no \{response\}"),
        ({"pattern": "("}, r"^pattern is"),
        ({"pattern": "a"}, r"^pattern is 'a': it must have exactly one group"),
        ({"timeout": 0}, r"^timeout is 0"),
        ({"retries": -1}, r"^retries is -1"),
        ({"concurrency": 0}, r"^concurrency is 0"),
    ],
)
def test_mistakes(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        LLMJudge(**{"url": "http://localhost:1/v1", "model": MODEL, **settings})
