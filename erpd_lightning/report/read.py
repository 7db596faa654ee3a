"""Readers of run directories, finished or not: records, logs and samples, without torch."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..data.samples import SAMPLES_FILE
from ..errors import UserError
from ..files import is_altered, sha256_file

Measured = Mapping[str, float]
"""Evaluation of a policy, by the names of `test/…` in docs/metrics.md."""

Log = Mapping[str, Mapping[int, float]]
"""Log of a stage: the value of each metric at each step."""

EVALUATION_KEYS = (
    "pass@1",
    "pass@1_stderr",
    "pass@k",
    "kl_per_token",
    "kl_per_token_stderr",
    "kl_per_token_to_first",
    "kl_per_token_to_first_stderr",
    "entropy_per_token",
    "mean_length",
    "prompts",
    "samples_per_prompt",
)
"""Keys of an evaluation that the report needs."""

SET_KEYS = (
    "avg@k",
    "avg@k_stderr",
    "pass@k",
    "pass@k_stderr",
    "mean_length",
    "truncated",
    "unchecked",
    "prompts",
    "samples_per_prompt",
)
"""Keys of an evaluation on an evaluation set that the report needs; `majority@k` may be there too."""

LOG_DIGESTS = "metrics/digests.json"
"""Where a finished stage notes the digests of its logs, in its directory."""

POLICY_ORDER = ("base", "teacher", "unlearned")
"""The order of policies; further teachers follow, and the student comes last."""

T = TypeVar("T")


@dataclass(frozen=True)
class Round:
    """Records of a round; None and empty where there are none yet.

    Attributes:
        number: The round, from 1.
        policies: Evaluation of each policy.
        budget: KL to the round's base policy that was to be spent, in nats per token.
        total_budget: KL to the first policy that was to be spent in all rounds, in nats per token.
        rollouts: Verified samples of the round.
        seconds: Time that its finished stages took.
        logs: Log of the stage that trained each policy.
        samples: File of each policy's first responses.
        base: Fingerprint of its base policy.
        sets: Evaluation of each policy on each evaluation set.
    """

    number: int
    policies: Mapping[str, Measured]
    budget: float | None
    total_budget: float | None
    rollouts: int | None
    seconds: float
    logs: Mapping[str, Log]
    samples: Mapping[str, Path]
    base: str | None
    sets: Mapping[str, Mapping[str, Measured]]


@dataclass(frozen=True)
class Run:
    """Records of a run.

    Attributes:
        path: Its directory.
        name: Name that no other run of the report has.
        seed: Its seed; None without a record.
        planned_rounds: Number of rounds in its configuration; None without one.
        rounds: Its rounds that have begun.
    """

    path: Path
    name: str
    seed: int | None
    planned_rounds: int | None
    rounds: list[Round]


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read some runs.

    Raises:
        UserError: Names the folder that is no run, or the file in it that is damaged.
    """
    paths = list(paths)
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise UserError(f"{paths[number]} is given twice")
    return [read_run(path, name) for path, name in zip(paths, run_names(resolved), strict=True)]


def run_names(paths: list[Path]) -> list[str]:
    """Shortest ends of different paths that differ from one another."""
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def read_run(path: Path, name: str) -> Run:
    """Read one run.

    Raises:
        UserError: If the folder is no run, or a file in it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path} is missing: the folder of a run is expected")
    folders = {int(found[1]): p for p in path.iterdir() if (found := re.fullmatch(r"round-(\d+)", p.name))}
    summary = path / "summary.json"
    if not folders and not summary.is_file() and not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run: neither summary.json nor config.yaml nor round-1 is there")
    entries = _read_json(summary, _summary) if summary.is_file() else {}
    options = _options(path / "config.yaml")
    rounds, seeds = [], []
    for number in sorted({*folders, *entries}):
        folder = path / f"round-{number}"
        records = {p.parent: _read_json(p, _record) for p in _record_files(folder)}
        for stage, record in records.items():
            _check_files(stage, record)
            if (logs := stage / LOG_DIGESTS).is_file():
                _check_files(stage, _read_json(logs, _files))
        seeds += [record["seed"] for record in records.values()]
        first = "student" if options.get("last_stage") == "extreme_region" else "teacher"
        rounds.append(_round(number, folder, first, entries.get(number), records))
    planned = options.get("rounds", "")
    return Run(path, name, next(iter(seeds), None), int(planned) if planned.isdecimal() else None, rounds)


def read_log(folder: Path) -> Log:
    """Log of a stage by Lightning's CSV logger, over all of its attempts.

    A stage that was killed goes on from a checkpoint and logs some steps again: the later attempt counts.

    Raises:
        UserError: Names the file and line that is damaged.
    """
    versions = folder.glob("metrics/version_*/metrics.csv")
    log: dict[str, dict[int, float]] = {}
    for path in sorted(versions, key=_version):
        for step, values in _csv_rows(path):
            for name, value in values.items():
                log.setdefault(name, {})[step] = value
    return {name: dict(sorted(values.items())) for name, values in log.items()}


def ordered_policies(policies: Iterable[str]) -> list[str]:
    """Names of policies in the order in which they are shown."""
    names = set(policies)
    further = sorted(names - {*POLICY_ORDER, "student"})
    return [name for name in (*POLICY_ORDER, *further, "student") if name in names]


def _options(path: Path) -> dict[str, str]:
    """The options of a configuration that stand on a line of their own, none where there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return dict(re.findall(r"^(\w+): (\S+)$", text, flags=re.MULTILINE))


def _round(number: int, folder: Path, first: str, entry: Any, records: Mapping[Path, Any]) -> Round:
    """Round of a summary entry, or of the records of its stages; `first` is the policy of its first stage."""
    outcomes = {str(path.relative_to(folder)): record["outcome"] for path, record in records.items()}
    prefix = "evaluation/"
    evaluated = {name.removeprefix(prefix): outcome for name, outcome in outcomes.items() if name.startswith(prefix)}
    if entry is None:
        sampled = (
            outcomes.get(stage, {}).get("rollouts") for stage in ("rollouts", "extreme_region", "signal_selection")
        )
        counts = [count for count in sampled if count is not None]
        spending = outcomes.get("distill", {}).get("spending", {})
        seconds = sum(record["seconds"] for record in records.values())
        on_sets: dict[str, dict[str, Any]] = {}
        for path, record in records.items():
            if path.parent.parent == folder / "evaluation_sets":
                on_sets.setdefault(path.parent.name, {})[path.name] = _measured_on_set(record["outcome"])
        entry = {**spending, "policies": evaluated, "rollouts": sum(counts) or None, "seconds": seconds}
        entry["evaluation_sets"] = on_sets
    based = records.get(folder / "evaluation" / "base", {})
    trained = {first: "extreme_region"}
    if first == "teacher":
        trained |= {"unlearned": "unlearned", "student": "distill"}
    trained |= {path.name: f"teachers/{path.name}" for path in folder.glob("teachers/*")}
    logs = {name: read_log(folder / trained[name]) for name in ordered_policies(trained)}
    return Round(
        number=number,
        policies={
            name: _checked(entry["policies"][name], folder, name) for name in ordered_policies(entry["policies"])
        },
        budget=entry.get("budget"),
        total_budget=entry.get("total_budget"),
        rollouts=entry["rollouts"],
        seconds=entry["seconds"],
        logs={name: log for name, log in logs.items() if log},
        samples={path.parent.name: path for path in sorted(folder.glob(f"evaluation/*/{SAMPLES_FILE}"))},
        base=based.get("inputs", {}).get("base"),
        sets={
            name: {policy: policies[policy] for policy in ordered_policies(policies)}
            for name, policies in entry.get("evaluation_sets", {}).items()
        },
    )


def _record_files(folder: Path) -> list[Path]:
    patterns = ("*/stage.json", "teachers/*/stage.json", "evaluation/*/stage.json", "evaluation_sets/*/*/stage.json")
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _read_json(path: Path, take: Callable[[Any], T]) -> T:
    """Content of a JSON file, converted and checked by `take`.

    Raises:
        UserError: If it is no JSON, or `take` refuses it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if is_altered(content):
            raise UserError(f"{path} is damaged: it was altered since the run wrote it")
        return take(content)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or half-written: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: it is not what a run writes under that name") from error


def _check_files(stage: Path, noted: Any) -> None:
    """Refuse logs and samples that are not those that a finished stage noted; those that are gone are not shown.

    Raises:
        UserError: Names the file.
    """
    for name, digest in noted.get("files", {}).items():
        path = stage / name
        if path.is_file() and sha256_file(path) != digest:
            raise UserError(f"{path} is damaged: it was altered since the stage was finished")


def _files(content: Any) -> Any:
    content["files"].items()
    return content


def _summary(content: Any) -> dict[int, Any]:
    for entry in content["rounds"]:
        for name in ("budget", "total_budget"):
            _optional_number(entry.get(name))
        _number(entry["rollouts"])
        _number(entry["seconds"])
        for measured in entry["policies"].values():
            _measured(measured)
        for policies in entry.get("evaluation_sets", {}).values():
            for measured in policies.values():
                _measured_on_set(measured)
    return {_integer(entry["round"]): entry for entry in content["rounds"]}


def _record(content: Any) -> Any:
    _number(content["seconds"])
    _integer(content["seed"])
    content.get("inputs", {}).get("base")
    content.get("files", {}).items()
    outcome = content["outcome"]
    spending = outcome.get("spending", {})
    for value in (outcome.get("rollouts"), spending.get("budget"), spending.get("total_budget")):
        _optional_number(value)
    if content["stage"] == "evaluation":
        (_measured_on_set if "set" in content.get("settings", {}) else _measured)(outcome)
    return content


def _measured(content: Any) -> Measured:
    return {name: _number(content[name]) for name in EVALUATION_KEYS}


def _measured_on_set(content: Any) -> Measured:
    majority = ("majority@k", "majority@k_stderr") if "majority@k" in content else ()
    return {name: _number(content[name]) for name in (*SET_KEYS, *majority)}


def _checked(content: Any, folder: Path, name: str) -> Measured:
    """Evaluation of a policy; the record of another kind of stage may lie in its place."""
    try:
        return _measured(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'evaluation' / name} holds no evaluation") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _optional_number(value: Any) -> None:
    if value is not None:
        _number(value)


def _version(path: Path) -> int:
    number = path.parent.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and finite values of each row; no rows for the empty file of a logger that has just begun.

    Raises:
        UserError: Names the line that is damaged.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not text:
        return
    lines = text.splitlines()
    header = next(csv.reader(lines[:1]))
    if "step" not in header:
        raise UserError(f"{path} is damaged: its first line names no column step")
    if not text.endswith("\n"):
        raise UserError(f"{path}, line {len(lines)} is half-written")
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = dict(zip(header, next(csv.reader([line])), strict=True))
            step = int(row["step"])
            values = {name: float(cell) for name, cell in row.items() if cell and name not in ("step", "epoch")}
        except (ValueError, StopIteration, csv.Error) as error:
            raise UserError(f"{path}, line {number} is damaged: a number for each column is expected") from error
        yield step, {name: value for name, value in values.items() if math.isfinite(value)}
