"""Command `python -m erpd_lightning push`: a policy to the Hugging Face hub, with a model card."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError, first_line, refuse
from ..pipeline.records import check_policy, load_record, recorded_in
from ..report.model_card import Origin, model_card, read_configuration
from ..report.read import Run, read_run

CARD = "README.md"


class _Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@dataclass(frozen=True)
class Upload:
    """What is pushed.

    Attributes:
        folder: The policy.
        files: Its files, below the folder.
        card: Its model card.
    """

    folder: Path
    files: Sequence[Path]
    card: str

    def describe(self, repo: str) -> str:
        """What would be pushed, for a terminal."""
        sizes = [f"  {path.relative_to(self.folder)}  {path.stat().st_size:,} bytes" for path in self.files]
        return "\n".join([f"To {repo}, from {self.folder}:", *sizes, f"  {CARD}:", "", self.card])


def prepare(source: Path, repo: str) -> Upload:
    """What is pushed of a run, which is its last student, or of a policy folder.

    Args:
        source: The run, or the folder.
        repo: Name of the repository.

    Raises:
        UserError: If there is no policy, it is not the one that was recorded, or the name is none.
    """
    _check_name(repo)
    run_dir = _run_of(source)
    if (source / "config.json").is_file():
        folder = source
    elif run_dir == source:
        folder = _last_student(source)
    else:
        raise UserError(
            f"{source} is neither a run nor a policy: config.json, summary.json or round-1 is expected there"
        )
    stage = recorded_in(folder)
    if run_dir is not None and stage is None:
        raise UserError(f"{folder} has no record: fit has to finish the stage that makes it first")
    if stage is not None:
        check_policy(folder, stage)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in files if path.relative_to(folder) != Path(CARD)]
    return Upload(folder, kept, model_card(repo, None if run_dir is None else _origin(run_dir, folder)))


def push(source: Path, repo: str, public: bool = False, api: Any = None) -> str:
    """Push the last student of a run, or a policy folder, in one commit.

    Args:
        source: The run, or the folder.
        repo: Name of the repository, which is made where there is none.
        public: Whether one that is made can be seen by everybody.
        api: An `HfApi`; None for that of the user's own login.

    Returns:
        Address of the commit.

    Raises:
        UserError: As `prepare` does, and if the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    upload = prepare(source, repo)
    api = api or HfApi()
    operations = [CommitOperationAdd(str(path.relative_to(upload.folder)), str(path)) for path in upload.files]
    operations.append(CommitOperationAdd(CARD, upload.card.encode()))
    try:
        api.create_repo(repo_id=repo, private=not public, exist_ok=True)
        commit = api.create_commit(repo_id=repo, operations=operations, commit_message="A policy of erpd_lightning")
    except Exception as error:  # What comes of tokens, rights, networks and quotas has many types.
        raise UserError(f"{repo} cannot be pushed to: {type(error).__name__}: {first_line(error)}") from error
    return str(commit.commit_url)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo} is no name of a repository: {first_line(error)}") from error


def _run_of(path: Path) -> Path | None:
    """The run that a folder is, or lies in."""
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents[:4]):
        if (folder / "summary.json").is_file() or (folder / "round-1").is_dir():
            return path if folder == resolved else folder
    return None


def _last_student(run_dir: Path) -> Path:
    """The student of the last round that has one."""
    students = [
        path
        for stage in ("distill", "extreme_region")
        for path in run_dir.glob(f"round-*/{stage}/student")
        if _round_of(path) is not None and (path.parent / "stage.json").is_file()
    ]
    if not students:
        raise UserError(f"{run_dir} has no student yet: fit makes it")
    return max(students, key=lambda path: _round_of(path) or 0)


def _round_of(policy: Path) -> int | None:
    found = [re.fullmatch(r"round-(\d+)", part) for part in policy.resolve().parts]
    return next((int(match[1]) for match in reversed(found) if match), None)


def _origin(run_dir: Path, folder: Path) -> Origin:
    run: Run = read_run(run_dir, run_dir.resolve().name)
    stage = recorded_in(folder)
    assert stage is not None
    number = _round_of(folder) if folder.resolve() != (run_dir / "base").resolve() else 0
    name = folder.name if folder.name != "policy" else folder.parent.name
    versions = load_record(stage / "stage.json").get("versions", {})
    return Origin(run, number or 0, name, read_configuration(run_dir), versions)


def main(args: Sequence[str]) -> None:
    """Run the command; a mistake of the user's ends in a line and exit code 2."""
    parser = _Parser(
        prog="python -m erpd_lightning push",
        description="Push a policy to the Hugging Face hub, with a card that says how it was made and how good it is.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN_OR_FOLDER", type=Path, help="a run (its last student), or a policy")
    parser.add_argument("--repo", metavar="NAME", required=True, help="repository, such as my-name/my-model")
    parser.add_argument("--public", action="store_true", help="a repository that is made can be seen by everybody")
    parser.add_argument("--dry_run", action="store_true", help="show what would be pushed, and push nothing")
    try:
        given = parser.parse_args(args)
        if given.dry_run:
            print(prepare(given.source, given.repo).describe(given.repo))
        else:
            print(f"Pushed: {push(given.source, given.repo, given.public)}")
    except UserError as error:
        refuse(str(error))
