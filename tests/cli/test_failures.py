"""What goes wrong while a run goes on."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from erpd_lightning.pipeline.evaluation import RoundEvaluation
from support.chain import arguments
from support.command_line import STAGES, Run, digests, student


def test_a_budget_out_of_reach_and_then_one_within(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path]
) -> None:
    run_dir = copy("distill", "evaluation")
    before = digests(run_dir)
    message = refused(*arguments(run_dir), "--distill.kl_budget=50")
    assert message.startswith("distill.kl_budget cannot be spent: a KL budget of 50 nats per token is out of reach")
    assert {name: digest for name, digest in digests(run_dir).items() if name in before} == before
    run(*arguments(run_dir), "--stage=distill")
    assert student(run_dir) == student(finished[0])


def test_a_callback_that_watches_what_nobody_logs(refused: Run, copy: Callable[..., Path]) -> None:
    callback = '{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/accuracy"}}'
    message = refused(*arguments(copy("distill", "evaluation")), f"--distill_trainer.callbacks={callback}")
    assert message == "EarlyStopping: no metric is called val/accuracy; docs/metrics.md lists those that are logged"


def test_a_loss_that_is_not_finite(refused: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[2:])
    wild = ["--extreme_region.learning_rate=1e30", "--checkpoint_every=1", "--stage=extreme_region"]
    message = refused(*arguments(run_dir), *wild)
    assert re.match(
        r"optimiser step 2: loss or gradient is not finite \(norm nan\); rows of the store: \d+, \d+.* "
        r"The last checkpoint is untouched",
        message,
    )
    folder = run_dir / "round-1" / "extreme_region"
    checkpoints = list((folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step=1.ckpt"]
    checkpoint = torch.load(checkpoints[0], weights_only=True)
    assert checkpoint["global_step"] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert not (folder / "teacher").exists()
    # What was begun is not taken over into another configuration without being told.
    assert "extreme_region was made with extreme_region.learning_rate: 1e+30, not 0.003" in refused(*arguments(run_dir))


def no_space(path: object = None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_when_a_record_is_written(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy("distill", "evaluation")
    record = run_dir / "round-1" / "distill" / "stage.json"
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == record:
            raise no_space()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert refused(*arguments(run_dir)).startswith(f"disk full while writing {record}: free some space")
    assert list(run_dir.rglob("*.tmp")) == []
    run(*arguments(run_dir), "--stage=distill")
    assert student(run_dir) == student(finished[0])


def test_a_disk_that_is_full_when_a_checkpoint_is_written(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the temporary directory is another disk, half of a checkpoint is left."""
    run_dir = copy("distill", "evaluation")
    folder = run_dir / "round-1" / "distill" / "checkpoints"
    move, moved = shutil.move, []

    def full(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(target)
        if len(moved) == 2:
            content = Path(source).read_bytes()
            Path(target).write_bytes(content[: len(content) // 2])
            raise no_space()
        return move(source, target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", full)
        assert refused(*arguments(run_dir)).startswith(f"disk full while writing {run_dir}: free some space")
    assert len(moved) == 2
    assert [path.name for path in folder.glob("*.ckpt")] == ["step=2.ckpt"]
    torch.load(folder / "step=2.ckpt", weights_only=True)
    run(*arguments(run_dir), "--stage=distill")
    assert len(moved) == 2
    assert student(run_dir) == student(finished[0])


def test_a_disk_that_is_full_when_a_policy_is_written(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy("distill", "evaluation")

    def full(self: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert refused(*arguments(run_dir)).startswith(f"disk full while writing {run_dir}: free some space")
    assert not (run_dir / "round-1" / "distill" / "student").exists()
    run(*arguments(run_dir), "--stage=distill")
    assert student(run_dir) == student(finished[0])


def test_a_fast_dev_run_goes_through_all_stages(run: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy(*STAGES[1:])
    out = run(*arguments(run_dir), "--trainer.fast_dev_run=true", "--data.sampler.batch_size=64")
    assert "[base] base: done already" in out
    steps = {
        stage: [path.name for path in (run_dir / "round-1" / stage / "checkpoints").glob("*.ckpt")]
        for stage in ("extreme_region", "unlearned", "distill")
    }
    assert list(steps.values()) == [["step=1.ckpt"]] * 3
    # What the stages share is whole: the two parts that 128 rollouts make.
    assert len(list((run_dir / "round-1" / "rollouts").glob("part-*.parquet"))) == 2


def test_an_error_of_ours_is_not_taken_for_one_of_the_users(
    run: Run, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RoundEvaluation, *_: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(RoundEvaluation, "evaluate", broken)
    with pytest.raises(KeyError, match="a mistake of ours"):
        run(*arguments(copy("evaluation")))
