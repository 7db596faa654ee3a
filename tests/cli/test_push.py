"""`push`: what would be pushed, what is pushed to a hub that is none, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from erpd_lightning import __version__
from erpd_lightning.cli.push import main, prepare, push
from erpd_lightning.errors import UserError
from support.command_line import digests

REPO = "somebody/student"


class Hub:
    """As much of an `HfApi` as pushing needs; it keeps what it is given."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses = refuses
        self.repos: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, **given: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.repos.append(given)

    def create_commit(self, *, repo_id: str, operations: list[Any], commit_message: str) -> Any:
        assert repo_id == REPO
        assert commit_message
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_a_run_is_pushed_as_its_last_student(finished: tuple[Path, str]) -> None:
    hub, folder = Hub(), finished[0] / "round-1" / "distill" / "student"
    before = digests(finished[0])
    assert push(finished[0], REPO, api=hub) == f"hub/{REPO}/commit/1"
    assert hub.repos == [{"repo_id": REPO, "private": True, "exist_ok": True}]
    card = hub.files.pop("README.md").decode()
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert card == prepare(folder, REPO).card
    assert digests(finished[0]) == before
    push(folder, REPO, public=True, api=hub)
    assert hub.repos[1]["private"] is False


def test_the_card_says_what_the_summary_says(finished: tuple[Path, str]) -> None:
    card = prepare(finished[0], REPO).card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["erpd-lightning"],
    }
    (entry,) = json.loads((finished[0] / "summary.json").read_text())["rounds"]
    rows = [
        line.strip("| ").split(" | ") for line in card.splitlines() if re.match(r"\| (1|rounds|made|seed|ver)", line)
    ]
    measured = entry["policies"]["student"]
    spent = f"{measured['kl_per_token']:.4f} ± {measured['kl_per_token_stderr']:.4f}"
    assert ["1", "0.01", spent, "—"] in rows
    accuracy = f"{measured['pass@1']:.3f} ± {measured['pass@1_stderr']:.3f}"
    assert [row[:5] for row in rows if row[1] == "student"] == [
        ["1", "student", accuracy, f"{measured['pass@k']:.3f}", spent]
    ]
    assert {row[1] for row in rows if len(row) == 7} == {"base", "student"}
    assert ["verified rollouts", f"{entry['rollouts_total']}"] in rows
    assert ["rounds", "1"] in rows
    (versions,) = (row[1] for row in rows if row[0] == "made with")
    assert versions.startswith(f"erpd_lightning {__version__}, torch 2.")
    assert f'from_pretrained("{REPO}")' in card
    assert str(finished[0].parent) not in card


def test_names_of_the_hub_are_linked_and_folders_are_not_told(copy: Callable[..., Path]) -> None:
    run_dir = copy()
    path = run_dir / "config.yaml"
    configuration = yaml.safe_load(path.read_text())
    configuration["policy"] = "Qwen/Qwen3-0.6B"
    configuration["data"]["prompts"] = "openai/gsm8k?config=main"
    configuration["data"]["validation_prompts"] = "/home/me/secret/held_out.jsonl"
    path.write_text(yaml.safe_dump(configuration))
    card = prepare(run_dir, REPO).card
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["datasets"]) == ("Qwen/Qwen3-0.6B", ["openai/gsm8k"])
    assert "| validation prompts | held_out.jsonl |" in card
    assert "/home" not in card
    configuration["data"]["prompts"] = {"path": "openai/gsm8k", "split": "train"}
    path.write_text(yaml.safe_dump(configuration))
    assert yaml.safe_load(prepare(run_dir, REPO).card.split("---\n")[1])["datasets"] == ["openai/gsm8k"]
    path.unlink()
    assert "| base policy | — |" in prepare(run_dir, REPO).card


def test_other_policies(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = finished[0] / "round-1"
    assert "\nThe teacher of round 1 of post-training by" in prepare(folder / "extreme_region" / "teacher", REPO).card
    assert "\nThe unlearned of round 1 " in prepare(folder / "unlearned" / "policy", REPO).card
    assert "\nThe base policy of a run of " in prepare(finished[0] / "base", REPO).card
    shutil.copytree(finished[0] / "base", tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("Another card.")
    upload = prepare(tmp_path / "own", REPO)
    assert "How it was made is not recorded." in upload.card
    assert "README.md" not in {path.name for path in upload.files}


def test_a_dry_run_shows_it_and_asks_nobody(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    main([str(finished[0]), f"--repo={REPO}", "--dry_run"])
    out = capsys.readouterr().out
    student = finished[0] / "round-1" / "distill" / "student"
    assert out.splitlines()[0] == f"To {REPO}, from {student}:"
    for path in student.iterdir():
        assert f"  {path.name}  {path.stat().st_size:,} bytes\n" in out
    assert out.endswith(f"\n{prepare(student, REPO).card}\n")


def test_what_is_refused(
    copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy()
    student = run_dir / "round-1" / "distill" / "student"
    assert refusal(capsys, run_dir).startswith("the following arguments are required: --repo")
    assert refusal(capsys, run_dir, "--repo=a/b/c").startswith("--repo a/b/c is no name of a repository")
    message = refusal(capsys, tmp_path, f"--repo={REPO}", "--dry_run")
    assert (
        message == f"{tmp_path} is neither a run nor a policy: config.json, summary.json or round-1 is expected there"
    )
    assert "is neither a run nor a policy" in refusal(capsys, tmp_path / "none", f"--repo={REPO}", "--dry_run")
    with pytest.raises(UserError, match=r"^somebody/student cannot be pushed to: OSError: no token$"):
        push(run_dir, REPO, api=Hub(refuses=OSError("no token\nmore")))
    weights = next(student.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    for source in (run_dir, student):
        assert refusal(capsys, source, f"--repo={REPO}", "--dry_run").startswith(f"{student} was altered or truncated")
    (student.parent / "stage.json").unlink()
    message = refusal(capsys, student, f"--repo={REPO}", "--dry_run")
    assert message.startswith(f"{student} has no record: fit has to finish")
    assert refusal(capsys, run_dir, f"--repo={REPO}", "--dry_run") == f"{run_dir} has no student yet: fit makes it"
