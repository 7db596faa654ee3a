"""A run that samples from a server that it starts."""

import sys
from pathlib import Path

from erpd_lightning.data.store import Store
from support import inference_server
from support.command_line import Run, with_yaml

SAMPLER = """
data:
  sampler:
    class_path: erpd_lightning.data.samplers.ServerSampler
    init_args:
      protocol: erpd_lightning.data.samplers.protocols.{protocol}
      command: {python} {server} VLLM {{port}} {{policy}} {fault}
      max_new_tokens: 8
  verifier:
    class_path: support.verifiers.EvenEnd
"""


def with_server(path: Path, fault: str = "", protocol: str = "VLLM") -> list[str]:
    text = SAMPLER.format(python=sys.executable, server=inference_server.__file__, fault=fault, protocol=protocol)
    return with_yaml(path, text)


def test_rollouts_of_a_server_that_the_run_starts(run: Run, refused: Run, tmp_path: Path) -> None:
    run(*with_server(tmp_path), "--stage=base")
    message = refused(*with_server(tmp_path, "broken"), "--stage=rollouts")
    assert message.startswith("data.sampler.command started a server that ended with exit code 1")
    assert "error: no such device" in message
    # How a server is started is no part of what a run is: it goes on with another command.
    assert "rollouts: sampling" in run(*with_server(tmp_path), "--stage=rollouts")
    rollouts = Store.open(tmp_path / "run" / "round-1" / "rollouts").table()
    assert rollouts.num_rows == 16 * 8
    assert "rollouts: done already" in run(*with_server(tmp_path, "slow"), "--stage=extreme_region")
    assert "was made with" in refused(*with_server(tmp_path, protocol="SGLang"))


def test_other_stages_sample_in_process(run: Run, tmp_path: Path) -> None:
    args = [*with_server(tmp_path), "--last_stage=extreme_region", "--rounds=1"]
    run(*args)
    # One server for the rollouts: what is trained is in memory alone.
    assert len(inference_server.processes_file(tmp_path / "run" / "base").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "summary.json").exists()
