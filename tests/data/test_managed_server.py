"""Servers that a run starts: on the policy, while it samples, and gone afterwards, however that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.data import http
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import ServerSampler, protocols, requests
from erpd_lightning.data.store import Store
from erpd_lightning.errors import UserError
from erpd_lightning.modules.policy_module import PolicyModule
from support import inference_server
from support.inference_server import logps, processes_file
from support.processes import ENVIRONMENT, ROOT
from support.rollouts import GROUP_SIZE, PROMPTS
from support.trainers import make_trainer
from support.verifiers import Constant, EvenEnd

START = f"{sys.executable} {inference_server.__file__}"
COMMAND = f"{START} VLLM {{port}} {{policy}}"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def _no_processes_of_others(policy: Path) -> None:
    processes_file(policy).unlink(missing_ok=True)


def make(command: str = COMMAND, **settings: Any) -> ServerSampler:
    defaults: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 8, "start_timeout": 30.0, "retries": 7}
    return ServerSampler(protocols.VLLM(), command=command, **{**defaults, **settings})


def processes(policy: Path) -> list[int]:
    """Those of the servers that were started."""
    return [int(process) for process in processes_file(policy).read_text().split()]


def wait_until_gone(policy: Path) -> None:
    limit = time.monotonic() + 15
    while left := [process for process in processes(policy) if is_there(process)]:
        assert time.monotonic() < limit, left
        time.sleep(0.02)


def is_there(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def predict(data: RolloutDataModule, policy: Path) -> PolicyModule:
    module = PolicyModule(policy, references={})
    make_trainer().predict(module, datamodule=data.sampling(), return_predictions=False)
    return module


def test_rollouts_of_a_server(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    data = make_data(sampler=make())
    module = predict(data, policy)
    assert not hasattr(module, "policy")  # Nobody needed it in memory.
    wait_until_gone(policy)
    assert len(processes(policy)) == 2  # One server, with a child.
    rows = Store.open(data.store).table().to_pylist()
    assert [(row["group"], row["sample"]) for row in rows] == [
        (group, number) for group in range(len(PROMPTS)) for number in range(GROUP_SIZE)
    ]
    for row in rows:
        before = [row["prompt_ids"][-1], *row["response_ids"][:-1]]
        known = [logps(last, 1.0)[token] for last, token in zip(before, row["response_ids"], strict=True)]
        assert row["logps"] == pytest.approx(known, abs=1e-5)
        reward = EvenEnd.check(row["response"])
        assert (row["reward"], row["checked"]) == (reward or 0.0, reward is not None)
    log = next(data.store.glob("server-*.log")).read_text().splitlines()
    assert log == [f"$ {sys.executable} {inference_server.__file__} VLLM {port_of(log)} {policy}", f"serving {policy}"]
    # What is finished needs no server.
    predict(data, policy)
    assert len(processes(policy)) == 2


def port_of(log: list[str]) -> str:
    return log[0].split()[-2]


def test_a_server_that_dies_is_started_again(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    data = make_data("steady", sampler=make())
    predict(data, policy)
    again = make_data("dying", sampler=make(f"{COMMAND} dies"))
    processes_file(policy).unlink()
    predict(again, policy)
    assert len(processes(policy)) == 2 * 3
    wait_until_gone(policy)
    # The command is no part of what rollouts depend on.
    assert Store.open(again.store).fingerprint == Store.open(data.store).fingerprint


def test_a_server_that_keeps_dying(
    make_data: Callable[..., RolloutDataModule], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MOST_RESTARTS", 1)
    data = make_data(sampler=make(f"{COMMAND} dies"))
    with pytest.raises(
        UserError, match=r"sampler.command started a server that ended 2 times while it was sampled from: see .*\.log"
    ):
        predict(data, policy)
    wait_until_gone(policy)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{COMMAND} broken", "ended with exit code 1 before it answered: error: no such device (LOG)"),
        (
            "no-such-program {policy} {port}",
            "exit code 127 before it answered: no-such-program: No such file or directory",
        ),
        ("sleep 0 {policy} {port}", "sleep"),
        (f"{sys.executable} -c pass {{policy}} {{port}}", "exit code 0 before it answered: it wrote nothing (LOG)"),
    ],
)
def test_a_command_that_does_not_start(tmp_path: Path, policy: Path, command: str, said: str) -> None:
    with pytest.raises(UserError) as error, make(command).serving(policy, tmp_path):
        pass
    assert said.replace("LOG", str(tmp_path / "server-0.log")) in str(error.value)
    assert str(error.value).startswith("sampler.command started a server that ")
    assert "\n" not in str(error.value)


def test_a_server_that_never_answers(tmp_path: Path, policy: Path) -> None:
    silent = f"{sys.executable} -c 'import time; print(\"loading\", flush=True); time.sleep(60)' {{policy}} {{port}}"
    began = time.monotonic()
    with (
        pytest.raises(UserError, match=r"did not answer within 1 seconds \(start_timeout\): loading"),
        make(silent, start_timeout=1.0).serving(policy, tmp_path),
    ):
        pass
    assert time.monotonic() - began < 10


def test_a_prediction_that_fails_ends_the_server(make_data: Callable[..., RolloutDataModule], policy: Path) -> None:
    with pytest.raises(UserError, match="nan"):
        predict(make_data(sampler=make(), verifier=Constant(float("nan"))), policy)
    wait_until_gone(policy)


def test_what_ignores_being_asked_to_end_is_killed(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erpd_lightning.data.samplers.managed_server.GRACE_SECONDS", 0.3)
    with make(f"{COMMAND} stubborn").serving(policy, tmp_path):
        assert all(is_there(process) for process in processes(policy))
    assert not any(is_there(process) for process in processes(policy))


SAMPLE_FOREVER = """
import sys
from pathlib import Path
from erpd_lightning.data.samplers import ServerSampler, protocols
from erpd_lightning.models.loading import load_tokenizer

command, policy = sys.argv[1:]
sampler = ServerSampler(protocols.VLLM(), command=command, max_new_tokens=4)
tokenizer = load_tokenizer(policy)  # Imports may swallow an interrupt.
with sampler.serving(policy, Path(policy).parent):
    print("serving", flush=True)
    sampler.sample(None, tokenizer, [[3]] * 100_000, 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how a process ends is read from /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_leaves_no_server(policy: Path, number: signal.Signals) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", SAMPLE_FOREVER, COMMAND, str(policy)],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"serving\n"
    assert all(is_there(process) for process in processes(policy))
    os.kill(run.pid, number)
    assert run.wait(20) != 0
    wait_until_gone(policy)
