"""Run directory as the chain leaves it, made up without any training."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from erpd_lightning.data.samples import SAMPLES, write_samples
from erpd_lightning.report import plots

POLICIES = ("base", "teacher", "unlearned", "student")
KL = {"base": 0.0, "teacher": 0.4, "unlearned": 0.3, "student": 0.05}
ACCURACY = {"base": 0.2, "teacher": 0.4, "unlearned": 0.1, "student": 0.6}


def measured(pass_at_1: float, kl: float, **more: float) -> dict[str, float]:
    """Evaluation of a policy, as in `summary.json`."""
    return {
        "pass@1": pass_at_1,
        "pass@1_stderr": 0.01,
        "pass@k": 0.8,
        "kl_per_token": kl,
        "kl_per_token_stderr": kl / 50,
        "kl_per_response": 4 * kl,
        "kl_per_token_to_first": 2 * kl,
        "kl_per_token_to_first_stderr": kl / 25,
        "entropy_per_token": 0.25,
        "mean_length": 4.0,
        "truncated": 0.0,
        "prompts": 2,
        "samples_per_prompt": 2,
        **more,
    }


def sample(group: int, number: int, tokens: Sequence[str], kls: Sequence[float], **more: Any) -> dict[str, Any]:
    """Row of `samples.parquet`; `<eos>` alone is a special token."""
    return {
        "group": group,
        "sample": number,
        "prompt": f"prompt {group}",
        "response": "".join(tokens).removesuffix("<eos>"),
        "answer": "7",
        "reward": 1.0,
        "checked": True,
        "finish_reason": "stop",
        "token_ids": list(range(len(tokens))),
        "token_texts": list(tokens),
        "special": [token == "<eos>" for token in tokens],
        "kls": list(kls),
        **more,
    }


RESPONSES = [
    sample(0, 0, ["1", "+", "2", "<eos>"], [0.1, 0.0, 0.5, 0.0]),
    sample(0, 1, ["3", "<eos>"], [0.3, 0.2]),
    sample(1, 0, ["5", "\n", "six", "<eos>"], [0.2, 3.0, 0.1, 0.0], reward=0.0),
    sample(1, 1, ["5"], [0.6], checked=False, reward=0.0, finish_reason="length"),
]

SAMPLED = "val/entropy_per_token,val/kl_per_token,val/kl_per_token_stderr,val/pass@1"
HEADER = f"epoch,step,train/entropy,train/loss,{SAMPLED}"
LOG = [
    (0, 0, 0.5, 1.0, "", "", "", ""),
    (0, 1, 0.4, 0.9, "", "", "", ""),
    (0, 1, "", "", 0.35, 0.1, 0.01, 0.5),
    (1, 2, 0.3, 0.8, "", "", "", ""),
    (1, 2, "", "", 0.3, 0.2, "nan", 0.4),
]


def write_log(stage: Path, rows: Sequence[Sequence[Any]] = LOG, version: int = 0, header: str = HEADER) -> Path:
    """Log of an attempt at a stage, as Lightning writes it."""
    path = stage / "metrics" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\r\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\r\n", newline="")
    return path


def write_stage(folder: Path, stage: str, number: int, outcome: dict[str, Any], base: str = "b" * 64) -> Path:
    """Record of a finished stage."""
    record = {
        "stage": stage,
        "round": number,
        "settings": {},
        "inputs": {"base": base},
        "seed": 7,
        "seconds": 2.5,
        "cpu_seconds": 2.0,
        "outcome": outcome,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stage.json"
    path.write_text(json.dumps(record))
    return path


def make_run(
    path: Path,
    rounds: int = 1,
    policies: Sequence[str] = POLICIES,
    responses: Sequence[dict[str, Any]] = RESPONSES,
    base: str = "b" * 64,
) -> Path:
    """Finished run: two stages where the policies have a teacher, a single stage otherwise."""
    two_stages = "teacher" in policies
    entries = []
    for number in range(1, rounds + 1):
        folder = path / f"round-{number}"
        write_stage(folder / "rollouts", "rollouts", number, {"rollouts": 800, "mean_reward": 0.2})
        stages = ["extreme_region", "unlearned", "distill"] if two_stages else ["extreme_region"]
        for stage in stages:
            spending = {"budget": 0.05, "total_budget": None, "beta": 1.5}
            write_stage(folder / stage, stage, number, {"spending": spending} if stage == "distill" else {})
            write_log(folder / stage)
        outcomes = {name: measured(ACCURACY[name] + 0.05 * number, KL[name]) for name in policies}
        for name, outcome in outcomes.items():
            write_stage(folder / "evaluation" / name, "evaluation", number, outcome, base)
            if responses:
                kept = [{**row, "kls": [0.0] * len(row["kls"])} if name == "base" else row for row in responses]
                write_samples(folder / "evaluation" / name / "samples.parquet", [pa.Table.from_pylist(kept, SAMPLES)])
        budget = {"budget": 0.05, "beta": 1.5} if two_stages else {"budget": None, "beta": None}
        entry = {"round": number, **budget, "rollouts": 800, "rollouts_total": 800 * number, "seconds": 20.0}
        entries.append({**entry, "cpu_seconds": 19.0, "policies": outcomes})
    (path / "summary.json").write_text(json.dumps({"rounds": entries}))
    last = "distill" if two_stages else "extreme_region"
    (path / "config.yaml").write_text(f"seed_everything: 7\nrounds: {rounds}\nlast_stage: {last}\ndata:\n  rounds: 9\n")
    return path


def skip_painting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures without painting them, which takes most of the time."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format="png")
    monkeypatch.setattr(plots, "_small_png", lambda figure: file.getvalue())
