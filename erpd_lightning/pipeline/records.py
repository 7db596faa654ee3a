"""Records of stages, `stage.json`: what a stage was made from and what came of it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ..budget.controller import spending_warning
from ..budget.search import Measurement
from ..errors import UserError
from ..files import atomic_write

Record = dict[str, Any]


@rank_zero_only
def write_record(path: Path, content: Record) -> None:
    """Write a record whole, on one rank.

    Raises:
        UserError: If the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def read_record(path: Path, made_with: Record) -> Record | None:
    """A record that fits `made_with`, or None if there is none.

    Raises:
        UserError: Names the first setting or input that differs.
    """
    if not path.is_file():
        return None
    try:
        record: Record = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no readable record of a stage: {error}") from error
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


def holds_work(folder: Path) -> bool:
    """Whether an unfinished stage left anything to go on from, and not only the note that it began."""
    return any(path.suffix in (".ckpt", ".parquet", ".safetensors") for path in folder.rglob("*"))


def round_summary(folder: Path, number: int, policies: Iterable[str]) -> Record:
    """What `summary.json` says of a round, out of the records in its directory.

    Args:
        folder: The round's directory.
        number: The round.
        policies: Names of the policies that were evaluated.
    """
    stages = ("rollouts", "extreme_region", "unlearned", "scoring", "signal_selection", "distill")
    paths = [folder / stage / "stage.json" for stage in stages]
    paths += sorted(folder.glob("teachers/*/stage.json"))
    records = [json.loads(path.read_text()) for path in paths if path.is_file()]
    outcomes = {record["stage"]: record["outcome"] for record in records}
    evaluations = {name: json.loads((folder / "evaluation" / name / "stage.json").read_text()) for name in policies}
    records += evaluations.values()
    selection = outcomes.get("signal_selection")
    previewed = 0 if selection is None else selection["rollouts"]
    chosen = {} if selection is None else {"signal": selection["name"], "candidates": selection["candidates"]}
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
        "rollouts": outcomes.get("rollouts", outcomes["extreme_region"])["rollouts"] + previewed,
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records), 1),
        "warnings": warnings,
        "policies": {name: record["outcome"] for name, record in evaluations.items()},
    }


@rank_zero_only
def write_summary(run_dir: Path, rounds: list[Record]) -> None:
    """Write `summary.json` from what `round_summary` says of the rounds so far, unless it holds them already."""
    total = 0
    for summary in rounds:
        total += summary["rollouts"]
        summary["rollouts_total"] = total
    path = run_dir / "summary.json"
    known = json.loads(path.read_text())["rounds"] if path.is_file() else []
    if known[: len(rounds)] != rounds:
        atomic_write(path, json.dumps({"rounds": rounds}, indent=2) + "\n")


def _difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    """The first leaf that two nested dictionaries do not share, by its dotted name."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (key, old, new)
    for name in sorted({*old, *new}):
        found = _difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        if found is not None:
            return found
    return None
