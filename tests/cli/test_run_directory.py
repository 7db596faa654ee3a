"""Run directories of another configuration, and damaged ones."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erpd_lightning.pipeline.lock import lock_run_directory
from support.chain import arguments
from support.command_line import STAGES, Run, digests, student


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--distill.kl_budget=0.02", "round-1/distill was made with distill.kl_budget: 0.01, not 0.02"),
        ("--seed_everything=1", "prepare was made with seed_everything: 0, not 1"),
        ("--task.layers=2", "prepare was made with task.layers: 1, not 2"),
        ("--data.group_size=4", "round-1/rollouts was made with data.group_size: 8, not 4"),
        (
            "--data.sampler.temperature=0.5",
            "round-1/rollouts was made with data.sampler.init_args.temperature: 1.0, not 0.5",
        ),
        (
            "--extreme_region_trainer.max_epochs=3",
            "round-1/extreme_region was made with extreme_region_trainer.max_epochs: 2, not 3",
        ),
        ("--data.baseline=batch", "round-1/extreme_region was made with data.baseline: group, not batch"),
        ("--unlearned.kl_coef=0.1", "round-1/unlearned was made with unlearned.kl_coef: 0.0, not 0.1"),
        ("--data.calibration_prompts=3", "round-1/distill was made with data.calibration_prompts: 4, not 3"),
        ("--data.validation_samples=3", "round-1/evaluation/base was made with data.validation_samples: 2, not 3"),
    ],
)
def test_a_run_directory_of_another_configuration(
    finished: tuple[Path, str], refused: Run, given: str, expected: str
) -> None:
    before = digests(finished[0])
    assert refused(*arguments(finished[0]), given).startswith(f"{finished[0]}/{expected}. Give another run_dir")
    assert digests(finished[0]) == before


def test_settings_that_make_no_difference_are_not_compared(finished: tuple[Path, str], run: Run) -> None:
    more = ["--trainer.log_every_n_steps=2", "--trainer.enable_progress_bar=true", "--data.max_tokens=9999"]
    more += ["--extreme_region.objective=erpd_lightning.SAPO"]  # the same class by another name
    assert run(*arguments(finished[0]), *more).count("done already") == 10


@pytest.mark.parametrize(
    ("store", "damage"),
    [("rollouts", "altered"), ("rollouts", "truncated"), ("scoring/base", "lost"), ("scoring/unlearned", "altered")],
)
def test_a_damaged_store(refused: Run, copy: Callable[..., Path], store: str, damage: str) -> None:
    run_dir = copy("distill", "evaluation")
    part = run_dir / "round-1" / store / "part-00000.parquet"
    content = part.read_bytes()
    middle = len(content) // 2
    if damage == "altered":
        part.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncated":
        part.write_bytes(content[:-50])
    else:
        part.unlink()
    expected = f"{part} is missing" if damage == "lost" else f"{part} was altered or truncated"
    assert refused(*arguments(run_dir)).startswith(expected)
    assert not (run_dir / "round-1" / "distill").exists()


def test_what_the_advice_on_a_damaged_store_leads_to(refused: Run, run: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    store = run_dir / "round-1" / "scoring" / "teacher"
    part = store / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    message = refused(*arguments(run_dir))
    assert message.startswith(f"{part} was altered or truncated")
    assert message.endswith("delete manifest.json beside it and the stage's stage.json: fit makes that part again")
    (store / "manifest.json").unlink()
    (store.parent / "stage.json").unlink()
    kept = (run_dir / "round-1" / "scoring" / "unlearned" / "part-00000.parquet").stat().st_mtime_ns
    assert "scoring: scoring the rollouts" in run(*arguments(run_dir))
    assert part.read_bytes() == content
    assert (run_dir / "round-1" / "scoring" / "unlearned" / "part-00000.parquet").stat().st_mtime_ns == kept


def test_a_record_that_is_none(refused: Run, copy: Callable[..., Path]) -> None:
    record = copy() / "round-1" / "scoring" / "stage.json"
    record.write_text(record.read_text()[:40])
    assert refused(*arguments(record.parents[2])).startswith(f"{record} is no readable record of a stage")


@pytest.mark.parametrize("damage", ["altered", "truncated", "lost"])
@pytest.mark.parametrize(
    ("policy", "stage"),
    [
        ("base", "prepare"),
        ("round-1/extreme_region/teacher", "round-1/extreme_region"),
        ("round-1/unlearned/policy", "round-1/unlearned"),
        ("round-1/distill/student", "round-1/distill"),
    ],
)
def test_a_policy_that_is_not_the_one_that_was_made(
    refused: Run, copy: Callable[..., Path], policy: str, stage: str, damage: str
) -> None:
    run_dir = copy()
    weights = run_dir / policy / "model.safetensors"
    content = weights.read_bytes()
    if damage == "lost":
        shutil.rmtree(run_dir / policy)
    else:
        weights.write_bytes(content[:-4] + bytes(4) if damage == "altered" else content[:-4])
    made_by = {"base": "base", "teacher": "extreme_region", "policy": "unlearned", "student": "distill"}
    for command in (["fit"], ["test", f"--stage={made_by[weights.parent.name]}"]):
        message = refused(*arguments(run_dir, command[0]), *command[1:])
        assert message.startswith(str(weights.parent))
    message = refused(*arguments(run_dir))
    assert f"delete {run_dir / stage / 'stage.json'}" in message


def test_a_policy_without_a_record_is_not_measured(refused: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    (run_dir / "round-1" / "distill" / "stage.json").unlink()
    assert "has no record" in refused(*arguments(run_dir, "test"))


def test_what_the_advice_makes_again_is_the_same(run: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    weights = run_dir / "round-1" / "distill" / "student" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    (run_dir / "round-1" / "distill" / "stage.json").unlink()
    run(*arguments(run_dir))
    assert weights.read_bytes() == content


def test_samples_that_are_lost(refused: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    (run_dir / "round-1" / "evaluation" / "student" / "samples.parquet").unlink()
    assert "samples.parquet is missing: delete " in refused(*arguments(run_dir))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rounds": 3}', "\x00\xff"])
def test_a_damaged_summary_is_written_again(run: Run, copy: Callable[..., Path], text: str) -> None:
    summary = copy() / "summary.json"
    content = summary.read_text()
    summary.write_text(text)
    run(*arguments(summary.parent))
    assert summary.read_text() == content


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": 1}', "\x00"])
def test_a_damaged_record_is_named_and_nothing_else_is_to_go(
    refused: Run, copy: Callable[..., Path], text: str
) -> None:
    record = copy() / "round-1" / "evaluation" / "student" / "stage.json"
    record.write_text(text)
    for command in ("fit", "preview"):
        message = refused(*arguments(record.parents[3], command))
        assert message.startswith(f"{record} is no ")
        assert message.endswith("Delete this file alone: the stage goes on from what it has made, which is kept")


def test_a_run_directory_that_is_in_use(refused: Run, run: Run, copy: Callable[..., Path]) -> None:
    run_dir = copy()
    before = (run_dir / "config.yaml").read_bytes()
    with lock_run_directory(run_dir):
        message = refused(*arguments(run_dir), "--rounds=2")
        assert message.startswith(f"run_dir {run_dir} is in use by process {os.getpid()} on ")
        assert (run_dir / "config.yaml").read_bytes() == before
        run(*arguments(run_dir, "test"))  # It only reads.
    assert "done already" in run(*arguments(run_dir))


def test_a_configuration_that_is_no_text_is_written_again(run: Run, copy: Callable[..., Path]) -> None:
    written = copy() / "config.yaml"
    written.write_bytes(b"\xff\xfe\x00" + written.read_bytes())
    run(*arguments(written.parent))
    assert f"run_dir: {written.parent}\n" in written.read_text()


def test_a_mistake_leaves_even_a_damaged_configuration(refused: Run, copy: Callable[..., Path]) -> None:
    written = copy() / "config.yaml"
    written.write_bytes(b"\xff\xfe\x00")
    refused(*arguments(written.parent), "--distill.kl_budget=0.02")
    assert written.read_bytes() == b"\xff\xfe\x00"


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", ".lock"])
def test_a_folder_where_a_file_is_expected(refused: Run, copy: Callable[..., Path], name: str) -> None:
    path = copy() / name
    path.unlink(missing_ok=True)
    path.mkdir()
    message = refused(*arguments(path.parent))
    assert message.startswith(str(path))
    assert "Is a directory" in message


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("round-1/distill", STAGES[4:]),
        ("round-1/scoring", STAGES[4:]),
        ("round-1/evaluation", ["evaluation"]),
        ("round-1/distill/checkpoints", STAGES[5:]),
        ("round-1/distill/metrics", STAGES[5:]),
        ("round-1/distill/student", STAGES[5:]),
    ],
)
def test_a_file_where_a_folder_is_expected(
    refused: Run, copy: Callable[..., Path], name: str, stages: list[str]
) -> None:
    run_dir = copy(*stages)
    path = run_dir / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("what is this")
    assert str(path) in refused(*arguments(run_dir))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_stage_whose_folder_cannot_be_written(
    finished: tuple[Path, str],
    refused: Run,
    run: Run,
    copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    run_dir = copy("distill", "evaluation")
    mkdir = os.mkdir

    def read_only(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith("distill"):
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", read_only)
        message = refused(*arguments(run_dir))
    assert message.startswith(f"{run_dir / 'round-1' / 'distill'} cannot be written: {os.strerror(number)}")
    run(*arguments(run_dir))
    assert student(run_dir) == student(finished[0])


def test_a_damaged_checkpoint_and_what_its_advice_leads_to(
    finished: tuple[Path, str], refused: Run, run: Run, copy: Callable[..., Path]
) -> None:
    run_dir = copy("evaluation")
    folder = run_dir / "round-1" / "distill"
    shutil.rmtree(folder / "student")
    (folder / "stage.json").unlink()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    content = checkpoint.read_bytes()
    middle = len(content) // 2
    checkpoint.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert refused(*arguments(run_dir)).startswith(f"{checkpoint} is damaged (")
    checkpoint.unlink()
    run(*arguments(run_dir))
    assert student(run_dir) == student(finished[0])


def test_an_altered_digit_of_a_record(refused: Run, copy: Callable[..., Path]) -> None:
    record = copy() / "round-1" / "evaluation" / "student" / "stage.json"
    text = record.read_text()
    record.write_text(text.replace('"pass@1": 0.', '"pass@1": 1.'))
    assert record.read_text() != text
    assert refused(*arguments(record.parents[3])).startswith(f"{record} was altered: ")


@pytest.mark.parametrize("name", ["train", "validation"])
def test_altered_prompts_of_a_task(refused: Run, copy: Callable[..., Path], name: str) -> None:
    run_dir = copy()
    prompts = run_dir / "prompts" / f"{name}.jsonl"
    prompts.write_text(prompts.read_text().replace('"answer": "', '"answer": "1', 1))
    for command in ("fit", "test", "preview"):
        message = refused(*arguments(run_dir, command))
        assert message.startswith(f"{prompts} was altered or truncated: restore it, or delete {run_dir / 'prepare'}")
