"""Records of stages, `stage.json`: what a stage was made from and what came of it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ..budget.controller import spending_warning
from ..budget.search import Measurement
from ..errors import UserError, first_line
from ..files import atomic_write, is_altered, seal, sha256_file, write_errors_named
from ..models.policy import policy_fingerprint
from ..report.read import LOG_DIGESTS

Record = dict[str, Any]

SUMMARY_KEYS = ("correct", "truncated", "unscorable", "groups", "mixed_groups", "sampler_gap")
"""What of the audit of the rollouts goes into `summary.json`."""

RECORD_KEYS: tuple[tuple[str, Any], ...] = (
    ("settings", dict),
    ("inputs", dict),
    ("seed", int),
    ("outcome", dict),
    ("stage", str),
    ("seconds", int | float),
    ("cpu_seconds", int | float),
)
"""Keys of a record and what they hold; the first three are those of a stage that has begun."""


def fingerprint_of(fingerprints: Sequence[str]) -> str:
    """One fingerprint for several; that of one is itself."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


@rank_zero_only
def write_record(path: Path, content: Record) -> None:
    """Write a record whole and sealed, on one rank.

    Raises:
        UserError: If the disk is full, or the folder cannot be written.
    """
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(seal(content), indent=2) + "\n")


def read_record(path: Path, made_with: Record) -> Record | None:
    """A record that fits `made_with`, or None if there is none.

    Raises:
        UserError: Names the first setting or input that differs.
    """
    if not path.exists():
        return None
    record = load_record(path)
    for part in ("settings", "inputs", "seed"):
        difference = _difference(record.get(part), made_with[part], "")
        if difference is None:
            continue
        key, old, new = difference
        name = "seed_everything" if part == "seed" else key
        raise UserError(
            f"{path.parent} was made with {name}: {old}, not {new}. "
            "Give another run_dir, or delete that folder and what follows from it"
        )
    return record


def load_record(path: Path) -> Record:
    """A record as it was written.

    Raises:
        UserError: If it cannot be read; what lies beside it is not in doubt.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable record of a stage: {first_line(error)}. {_remedy(path)}") from error
    keys = RECORD_KEYS if path.name == "stage.json" else RECORD_KEYS[:3]
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in keys):
        raise UserError(f"{path} is no record of a stage: keys are missing or hold something else. {_remedy(path)}")
    if is_altered(record):
        raise UserError(f"{path} was altered: it is not the record that the stage wrote. {_remedy(path)}")
    return record


def _remedy(path: Path) -> str:
    if path.name == "stage.json":
        return "Delete this file alone: the stage goes on from what it has made, which is kept"
    return f"It said what {path.parent} is made with: put back a copy of it, or give another run_dir"


def check_policy(path: Path | str, folder: Path) -> None:
    """Whether a policy is the one that a finished stage recorded.

    Args:
        path: The policy, a folder.
        folder: The directory of the stage that made it.

    Raises:
        UserError: If the stage is not finished, or its policy is missing or was altered since.
    """
    record = folder / "stage.json"
    if not Path(path).is_dir():
        remedy = f"delete {record}, and fit makes it again" if record.exists() else f"fit makes it, in {folder}"
        raise UserError(f"{path} is missing: {remedy}")
    if not record.exists():
        raise UserError(f"{path} has no record: {record} is missing, fit has to finish that stage first")
    recorded = load_record(record)["outcome"].get("policy")
    try:
        found = policy_fingerprint(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if recorded != found:
        raise UserError(
            f"{path} was altered or truncated: restore it, delete {record} to have it made again, or give another "
            "run_dir"
        )


def digests_of(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """Digests of files by their paths from a folder."""
    return {os.path.relpath(path, folder): sha256_file(path) for path in sorted(files)}


@rank_zero_only
def write_log_digests(folder: Path) -> None:
    """Note what the logs of a finished stage hold, for the report; not in its record, since they tell of each kill."""
    if logs := list(folder.glob("metrics/version_*/metrics.csv")):
        content = seal({"files": digests_of(logs, folder)})
        atomic_write(folder / LOG_DIGESTS, json.dumps(content, indent=2) + "\n")


def check_files(paths: Iterable[Path], folder: Path) -> None:
    """Whether files are those that a finished stage recorded.

    Args:
        paths: The files.
        folder: The directory of the stage that made them.

    Raises:
        UserError: If one is missing, or was altered since.
    """
    record = folder / "stage.json"
    if not record.exists():
        raise UserError(f"{record} is missing: fit has to finish that stage first")
    recorded = load_record(record).get("files", {})
    for path in paths:
        expected = recorded.get(os.path.relpath(path, folder))
        if not path.is_file():
            raise UserError(f"{path} is missing: delete {record}, and fit makes it again")
        if expected is not None and sha256_file(path) != expected:
            raise UserError(f"{path} was altered or truncated: restore it, or delete {record}, and fit makes it again")


def recorded_in(path: Path | str) -> Path | None:
    """The directory of the finished stage that recorded a policy, None for a policy of no run."""
    above = Path(path).parent
    stage = above / "prepare" if Path(path).name == "base" else above
    return stage if Path(path).is_dir() and (stage / "stage.json").is_file() else None


def holds_work(folder: Path) -> bool:
    """Whether an unfinished stage left anything to go on from, and not only the note that it began."""
    # Not rglob: another process may be renaming a folder that it finds.
    names = (name for _, _, files in os.walk(folder) for name in files)
    return any(name.endswith((".ckpt", ".parquet", ".safetensors")) for name in names)


def round_summary(folder: Path, number: int, policies: Sequence[str], sets: Sequence[str] = ()) -> Record:
    """What `summary.json` says of a round, out of the records in its directory.

    Args:
        folder: The round's directory.
        number: The round.
        policies: Names of the policies that were evaluated.
        sets: Names of the evaluation sets.
    """
    stages = ("rollouts", "extreme_region", "unlearned", "scoring", "signal_selection", "distill")
    paths = [folder / stage / "stage.json" for stage in stages]
    paths += sorted(folder.glob("teachers/*/stage.json"))
    records = [load_record(path) for path in paths if path.is_file()]
    outcomes = {record["stage"]: record["outcome"] for record in records}
    evaluations = {name: load_record(folder / "evaluation" / name / "stage.json") for name in policies}
    on_sets = {
        of_set: {name: load_record(folder / "evaluation_sets" / of_set / name / "stage.json") for name in policies}
        for of_set in sets
    }
    records += [record for found in (evaluations, *on_sets.values()) for record in found.values()]
    selection = outcomes.get("signal_selection")
    previewed = 0 if selection is None else selection["rollouts"]
    chosen = {} if selection is None else {"signal": selection["name"], "candidates": selection["candidates"]}
    rollouts = outcomes.get("rollouts", outcomes["extreme_region"])
    sampled = {key: rollouts["audit"][key] for key in SUMMARY_KEYS}
    spending = outcomes.get("distill", {"spending": {"budget": None, "beta": None}})["spending"]
    warnings = [f"{stage}: {warning}" for stage, outcome in outcomes.items() for warning in outcome.get("warnings", [])]
    student = evaluations["student"]["outcome"]
    if (budget := spending.get("effective_budget")) is not None:
        found = Measurement(student["kl_per_token"], student["kl_per_token_stderr"])
        if text := spending_warning(found, budget):
            warnings.append(f"evaluation: the student is {text}")
    return {
        "round": number,
        **spending,
        **chosen,
        "rollouts": rollouts["rollouts"] + previewed,
        "sampled": {**sampled, "optimizer_steps": rollouts["optimizer_steps"]},
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records), 1),
        "warnings": warnings,
        "policies": _outcomes(evaluations),
        **({"evaluation_sets": {of_set: _outcomes(found) for of_set, found in on_sets.items()}} if sets else {}),
    }


def _outcomes(records: Mapping[str, Record]) -> dict[str, Any]:
    return {name: record["outcome"] for name, record in records.items()}


@rank_zero_only
def write_summary(run_dir: Path, rounds: list[Record]) -> None:
    """Write `summary.json` from what `round_summary` says of the rounds so far, unless it holds them already."""
    total = 0
    for summary in rounds:
        total += summary["rollouts"]
        summary["rollouts_total"] = total
    path = run_dir / "summary.json"
    if _rounds_in(path)[: len(rounds)] != rounds:
        atomic_write(path, json.dumps(seal({"rounds": rounds}), indent=2) + "\n")


def _rounds_in(path: Path) -> list[Any]:
    """The rounds of a summary; none where it is damaged: it is made of the records, and is written again."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        rounds = summary["rounds"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return rounds if isinstance(rounds, list) and not is_altered(summary) else []


def _difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    """The first leaf that two nested dictionaries do not share, by its dotted name."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (key, old, new)
    for name in sorted({*old, *new}):
        found = _difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        if found is not None:
            return found
    return None
