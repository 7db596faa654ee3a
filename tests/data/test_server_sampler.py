"""Sampling from servers: what is drawn and told, what is refused, and what is asked again, over real HTTP."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data.samplers import Response, ServerSampler, TransformersSampler, protocols, requests
from erpd_lightning.data.samplers.protocols import llama_cpp
from erpd_lightning.errors import UserError
from support.inference_server import EOS, HALF_A_CHARACTER, SPOKEN, InferenceServer, logps
from support.policies import TASK, save_policy

# Of unequal length; the bigram model goes by the last token alone.
PROMPTS = [[3, 13, 4], [5], [6, 14, 7, 15, 8, 13, 9], [4, 13, 10, 18]] * 5

Serve = Callable[..., InferenceServer]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policies") / "base")


@pytest.fixture(scope="module")
def tokenizer(policy: Path) -> Any:
    tokenizer = TASK.tokenizer()
    tokenizer.name_or_path = str(policy)
    return tokenizer


@pytest.fixture
def serve(policy: Path) -> Iterator[Serve]:
    started: list[InferenceServer] = []

    def start(protocol: str, fault: Any = lambda number, body: None, **settings: Any) -> InferenceServer:
        started.append(InferenceServer(protocol, settings.pop("policy", policy), fault, **settings))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(requests, "LONGEST_PAUSE_SECONDS", 0.1)


def make(protocol: str, *servers: InferenceServer, **settings: Any) -> ServerSampler:
    defaults: dict[str, Any] = {"max_new_tokens": 8, "retries": 3, "timeout": 20.0}
    urls = [server.url for server in servers]
    return ServerSampler(getattr(protocols, protocol)(), urls=urls, **{**defaults, **settings})


def sample(
    sampler: ServerSampler, policy: Path, tokenizer: Any, prompts: Any = PROMPTS, seed: int = 1
) -> list[Response]:
    with sampler.serving(policy, policy.parent):
        return sampler.sample(None, tokenizer, prompts, seed)


def refused(sampler: ServerSampler, policy: Path, tokenizer: Any, prompts: Any = PROMPTS) -> str:
    with pytest.raises(UserError) as error:
        sample(sampler, policy, tokenizer, prompts)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 330
    return str(error.value)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("protocol", SPOKEN)
def test_responses_are_those_of_the_policy(
    serve: Serve, policy: Path, tokenizer: Any, protocol: str, temperature: float
) -> None:
    server = serve(protocol)
    responses = sample(make(protocol, server, temperature=temperature), policy, tokenizer)
    assert len({tuple(response.ids) for response in responses}) > 10
    assert any(HALF_A_CHARACTER in response.ids for response in responses)
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for prompt, response in zip(PROMPTS, responses, strict=True):
        before = [prompt[-1], *response.ids[:-1]]
        known = [logps(last, temperature)[token] for last, token in zip(before, response.ids, strict=True)]
        assert response.logps == pytest.approx(known, abs=1e-5)
        assert response.finish_reason == ("stop" if response.ids[-1] == EOS else "length")
        assert response.finish_reason == "stop" or len(response.ids) == 8
        assert EOS not in response.ids[:-1]


def test_logps_of_halves_of_characters() -> None:
    """Of equal tokens, of which some are not listed, it is not known which are."""
    aligned = llama_cpp._aligned
    assert aligned([5, 6, 7], [5, 6, 7]) == {0: 0, 1: 1, 2: 2}
    assert aligned([5, 7], [5, 9, 7]) == {0: 0, 2: 1}
    assert aligned([5, 6], [5, 9, 5, 6]) == {3: 1}
    assert aligned([5, 6], [5, 6, 6]) == {0: 0}
    assert aligned([6], [9, 6]) == {1: 0}
    for other in ([8], [7, 5], [5, 6, 7, 7]):
        with pytest.raises(protocols.AnswerError, match="not those of its response"):
            aligned(other, [5, 6, 7])


def test_a_seed_fixes_what_is_asked(serve: Serve, policy: Path, tokenizer: Any) -> None:
    sampler = make("VLLM", serve("VLLM", lambda number, body: "500" if number % 4 == 3 else None), serve("VLLM"))
    first = sample(sampler, policy, tokenizer)
    assert sample(sampler, policy, tokenizer) == first
    assert sample(sampler, policy, tokenizer, seed=2) != first
    # Each request has a seed of its own.
    assert len({tuple(response.ids) for response in sample(sampler, policy, tokenizer, [PROMPTS[0]] * 20)}) > 10


def test_many_requests_are_in_flight_under_a_limit(serve: Serve, policy: Path, tokenizer: Any) -> None:
    servers = [serve("VLLM", lambda number, body: "slow") for _ in range(2)]
    sample(make("VLLM", *servers, max_requests=6), policy, tokenizer)
    assert [server.busiest for server in servers] == [3, 3]
    # One of them was asked what its log-probs are of.
    assert sum(len(server.bodies) for server in servers) == len(PROMPTS) + 1


@pytest.mark.parametrize("fault", ["500", "hang up", "no choices"])
@pytest.mark.parametrize("protocol", SPOKEN)
def test_what_passes_is_asked_again(serve: Serve, policy: Path, tokenizer: Any, protocol: str, fault: str) -> None:
    expected = sample(make(protocol, serve(protocol)), policy, tokenizer)
    server = serve(protocol, lambda number, body: fault if number % 7 == 0 else None)
    assert sample(make(protocol, server, max_requests=1), policy, tokenizer) == expected


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "answered with status 500: out of memory; asked 4 times"),
        ("hang up", "could not be asked"),
        ("not json", "something else than JSON: '<html>'"),
        ("no choices", "fewer choices than it was asked for; asked 4 times"),
        ("no logps", "no log-probs"),
        ("text", "token ids"),
        ("outside", "token 24, but the policy has 19 of them"),
    ],
)
@pytest.mark.parametrize("protocol", SPOKEN)
def test_what_stays_is_said(serve: Serve, policy: Path, tokenizer: Any, protocol: str, fault: str, said: str) -> None:
    server = serve(protocol, lambda number, body: fault if number > 6 else None)
    message = refused(make(protocol, server), policy, tokenizer)
    assert message.startswith(f"the {protocols.__dict__[protocol].name} server at {server.url} ")
    assert said in message


def test_a_server_that_hangs(serve: Serve, policy: Path, tokenizer: Any) -> None:
    hanging = serve("VLLM", lambda number, body: "hang" if number == 7 else None)
    began = time.monotonic()
    assert len(sample(make("VLLM", hanging, timeout=0.5), policy, tokenizer)) == len(PROMPTS)
    always = serve("VLLM", lambda number, body: "hang" if number > 6 else None)
    message = refused(make("VLLM", always, timeout=0.3, retries=1), policy, tokenizer)
    assert "did not answer within 0.3 seconds; asked 2 times" in message
    assert time.monotonic() - began < 10


def test_an_error_gives_up_what_is_in_flight(serve: Serve, policy: Path, tokenizer: Any) -> None:
    def fault(number: int, body: dict[str, Any]) -> str | None:
        return {2: "hang", 3: "text"}.get(number)

    began = time.monotonic()
    refused(make("VLLM", serve("VLLM", fault)), policy, tokenizer)
    assert time.monotonic() - began < 5
    assert all("work" not in thread.name for thread in threading.enumerate() if thread.is_alive() and not thread.daemon)


def test_a_server_that_dies_and_comes_back(serve: Serve, policy: Path, tokenizer: Any) -> None:
    expected = sample(make("VLLM", serve("VLLM")), policy, tokenizer)
    first = InferenceServer("VLLM", policy, lambda number, body: "hang up" if number > 7 else "slow")
    sampler = make("VLLM", first, retries=8, max_requests=2)
    again: list[InferenceServer] = []

    def return_later() -> None:
        while len(first.bodies) < 9:
            time.sleep(0.01)
        first.close()
        time.sleep(0.1)
        again.append(InferenceServer("VLLM", policy, port=first.port))

    other = threading.Thread(target=return_later)
    other.start()
    try:
        assert sample(sampler, policy, tokenizer) == expected
    finally:
        other.join()
        again[0].close()
    # Nothing that was answered was asked again.
    assert len(first.bodies) + len(again[0].bodies) <= len(PROMPTS) + 1 + 4


@pytest.mark.parametrize("protocol", SPOKEN)
def test_raw_logps_are_refused_at_another_temperature(
    serve: Serve, policy: Path, tokenizer: Any, protocol: str
) -> None:
    server = serve(protocol, lambda number, body: "raw")
    message = refused(make(protocol, server, temperature=0.7), policy, tokenizer)
    assert "raw log-probs" in message
    assert protocols.__dict__[protocol].raw_logps_hint in message
    assert len(server.bodies) == 2  # Nothing was sampled.
    assert len(sample(make(protocol, server), policy, tokenizer)) == len(PROMPTS)


def test_logps_of_a_part_of_the_vocabulary_are_refused(serve: Serve, policy: Path, tokenizer: Any) -> None:
    server = serve("LlamaCpp", lambda number, body: "nucleus")
    assert "log-probs of 3 tokens where 19 were asked for" in refused(make("LlamaCpp", server), policy, tokenizer)


@pytest.mark.parametrize("protocol", SPOKEN)
def test_a_server_of_another_policy_is_refused(serve: Serve, policy: Path, tokenizer: Any, protocol: str) -> None:
    server = serve(protocol, policy="org/other")
    message = refused(make(protocol, server), policy, tokenizer)
    assert f"serves 'org/other', not '{policy}'" in message
    assert not server.bodies
    assert len(sample(make(protocol, server, served_as="org/other"), policy, tokenizer)) == len(PROMPTS)
    assert "served_as is 'another'" in refused(make(protocol, server, served_as="another"), policy, tokenizer)


def test_vllm_is_asked_for_its_model(serve: Serve, policy: Path, tokenizer: Any) -> None:
    server = serve("VLLM")
    sample(make("VLLM", server), policy, tokenizer)
    assert {body["model"] for body in server.bodies} == {"name"}


def test_nobody_there(serve: Serve, policy: Path, tokenizer: Any) -> None:
    server = serve("VLLM")
    server.close()
    assert f"the vLLM server at {server.url} could not be asked" in refused(make("VLLM", server), policy, tokenizer)


def test_it_samples_within_serving_alone(serve: Serve, policy: Path, tokenizer: Any) -> None:
    sampler = make("VLLM", serve("VLLM"))
    with sampler.serving(policy, policy.parent):
        assert sampler.sample(None, tokenizer, [], 1) == []
    with pytest.raises(UserError, match="in_process"):
        sampler.sample(None, tokenizer, PROMPTS, 1)


def test_settings_and_what_samples_in_process() -> None:
    sampler = ServerSampler(protocols.SGLang(), urls=["http://one:1"], max_new_tokens=5, temperature=0.9)
    settings = sampler.settings()
    other = ServerSampler(
        protocols.SGLang(), urls=["http://two:2"], max_new_tokens=5, temperature=0.9, timeout=9.0, max_requests=3
    )
    assert other.settings() == settings
    assert (
        ServerSampler(protocols.VLLM(), urls=["http://one:1"], max_new_tokens=5, temperature=0.9).settings() != settings
    )
    inside = sampler.in_process
    assert isinstance(inside, TransformersSampler)
    assert (inside.max_new_tokens, inside.temperature) == (5, 0.9)
    assert inside.in_process is inside


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "command or urls must be given"),
        ({"urls": ["http://one:1"], "command": "serve {policy} {port}"}, "not both"),
        ({"urls": ["localhost:8000"]}, "urls holds 'localhost:8000'"),
        ({"urls": ["http://localhost:port"]}, "urls holds"),
        ({"command": "serve {policy}"}, "without {port}"),
        ({"command": "serve it"}, "without {policy} and {port}"),
        ({"command": "serve '{policy} {port}"}, "cannot be split"),
        ({"command": "serve {policy} {port}", "served_as": "it"}, "served_as is for servers at urls"),
        ({"urls": ["http://one:1"], "timeout": 0.0}, "timeout is 0.0"),
        ({"urls": ["http://one:1"], "start_timeout": float("nan")}, "start_timeout is nan"),
        ({"urls": ["http://one:1"], "max_requests": 0}, "max_requests is 0"),
        ({"urls": ["http://one:1"], "retries": -1}, "retries is -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        ServerSampler(protocols.VLLM(), **settings)
    assert said in str(error.value)


def test_responses_that_cannot_be_taken() -> None:
    draw = protocols.Draw([1], 3, 1.0, 0, [EOS])

    def take(*args: Any) -> Response:
        return requests.checked(Response(*args), draw, 19, {EOS, 1})

    logs = [0.0] * 4
    # A server may go on after what the policy takes for the end.
    assert take([5, EOS, 6], logs[:3], "length") == Response([5, EOS], logs[:2], "stop")
    assert take([5, 1], logs[:2], "stop").finish_reason == "stop"
    for said, *args in [
        ("at most 3", [5, 5, 5, 5], logs, "length"),
        ("no end token", [5, 5], logs[:2], "stop"),
        ("after 2 of 3", [5, 5], logs[:2], "length"),
        ("token -1", [5, -1], logs[:2], "stop"),
    ]:
        with pytest.raises(protocols.AnswerError, match=said):
            take(*args)
