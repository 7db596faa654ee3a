"""What `KLBudget` makes of a student whose learning rate is five times too high.

    OMP_NUM_THREADS=1 python benchmarks/kl_budget.py --jobs 2

From one base policy, for each seed, configs/demo.yaml up to the signal of its first round, then distillation without
calibration, watched by the callback with one action after the other. What the student spends is measured afterwards on
prompts that neither training nor callback has seen. KL differs from prompt to prompt by more than its mean, so it takes
thousands of them to know it within a hundredth; the embedded task has as many as one likes. It ends with a table in
Markdown, `table.md`, of all actions that were run. A run that is measured is not run again.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGET = 0.05
CONFIDENCE = 0.99
"""Ten students are to be inside, not one of them: the callback's own default is 0.95."""
PROMPTS = {"train": 2048, "watched": 32768, "independent": 32768}
DEMO = f"--config={ROOT / 'configs' / 'demo.yaml'}"
OPTIONS = [
    DEMO,
    "--rounds=1",
    "--task=null",
    "--data.validation_samples=2",
    "--extreme_region_trainer.max_epochs=2",
    "--extreme_region_trainer.limit_val_batches=0",
    "--unlearned_trainer.limit_val_batches=0",
    f"--distill.kl_budget={BUDGET}",
    "--distill.calibrate=false",
    "--distill.learning_rate=5.0e-3",
    "--trainer.enable_progress_bar=false",
]
SAMPLER = "erpd_lightning.data.samplers.TransformersSampler"
MEASURED = "independent.json"
ACTIONS = ("search", "rollback", "stop")
STAGES = ("rollouts", "extreme_region", "unlearned", "signal")


def call(folder: Path, seed: int, *options: str) -> int:
    """One call of the command line; what it says lies beside the run."""
    command = [sys.executable, "-m", "erpd_lightning", "fit", *options]
    command += [f"--run_dir={folder}", f"--seed_everything={seed}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".log"), "a") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode


def prepare(out: Path) -> list[str]:
    """The base policy, and three files of prompts that have none in common."""
    base = out / "base"
    if call(base, 0, DEMO, "--stage=base", f"--task.init_args.train_prompts={sum(PROMPTS.values())}"):
        sys.exit(f"the base policy failed, see {base}.log")
    lines = iter((base / "prompts" / "train.jsonl").read_text().splitlines(keepends=True))
    for name, number in PROMPTS.items():
        (out / f"{name}.jsonl").write_text("".join(islice(lines, number)))
    held_out = base / "prompts" / "validation.jsonl"
    return [
        *OPTIONS,
        f"--policy={base / 'base'}",
        f"--data.prompts={out / 'train.jsonl'}",
        f"--data.validation_prompts={held_out}",
    ]


def run(out: Path, seed: int, actions: list[str], options: list[str]) -> None:
    """The stages that all actions share, once, and then each action on a copy."""
    if all((out / f"seed-{seed}-{action}" / MEASURED).is_file() for action in actions):
        return
    shared = out / f"seed-{seed}"
    for stage in STAGES:
        if call(shared, seed, *options, f"--stage={stage}", "--round=1"):
            sys.exit(f"seed {seed}: the stage {stage} failed, see {shared}.log")
    for action in actions:
        folder = out / f"seed-{seed}-{action}"
        if (folder / MEASURED).is_file():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(folder.name + ".log").unlink(missing_ok=True)
        shutil.copytree(shared, folder)
        settings = {
            "budget": BUDGET,
            "action": action,
            "confidence": CONFIDENCE,
            "prompts": str(out / "watched.jsonl"),
            "max_prompts": PROMPTS["watched"] // 16,
            "samples": 1,
            "sampler": {"class_path": SAMPLER, "init_args": {"max_new_tokens": 24, "batch_size": 2048}},
        }
        callback = {"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": settings}
        code = call(folder, seed, *options, f"--distill_trainer.callbacks={json.dumps([callback])}")
        print(f"seed {seed}, {action}: exit code {code}", flush=True)
        if code == 0:
            measure(out, folder)


def measure(out: Path, folder: Path) -> None:
    """The KL of a student to the base policy, by samples that had no part in its training."""
    from lightning.pytorch import Trainer

    from erpd_lightning import RolloutDataModule
    from erpd_lightning.data.samplers import TransformersSampler
    from erpd_lightning.modules.evaluation import EvaluationModule

    base = out / "base" / "base"
    data = RolloutDataModule(
        store="",
        tokenizer=base,
        validation_prompts=out / "independent.jsonl",
        validation_samples=1,
        sampler=TransformersSampler(max_new_tokens=24, batch_size=2048),
        seed=2**20,
    )
    module = EvaluationModule(folder / "round-1" / "distill" / "student", references={"base": str(base)})
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    (found,) = Trainer(accelerator="cpu", devices=1, **quiet).validate(module, datamodule=data, verbose=False)
    (folder / MEASURED).write_text(json.dumps(found) + "\n")


def row(out: Path, seed: int, action: str) -> list[str] | None:
    """What a run says: the KL where it was first outside, at its end, and by independent measurement."""
    folder = out / f"seed-{seed}-{action}"
    log = folder.with_name(folder.name + ".log")
    if not log.is_file():
        return None
    said = log.read_text()
    overran = re.search(r"KL ([\d.]+) .* is outside", said)
    ended = re.search(r"KL ([\d.]+) .* at the end, inside", said)
    spent = error = ""
    if (folder / MEASURED).is_file():
        student = json.loads((folder / MEASURED).read_text())
        spent = f"{student['val/kl_per_token'] / BUDGET:.1%}"
        error = f"{student['val/kl_per_token_stderr'] / BUDGET:.1%}"
    exceeded = "BudgetExceeded" if "training ended outside its budget" in said else ""
    at_end = f"{float(ended[1]) / BUDGET:.1%}" if ended else exceeded
    return [str(seed), action, f"{float(overran[1]) / BUDGET:.0%}" if overran else "", at_end, spent, error]


def main() -> None:
    """Run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--actions", nargs="+", default=["search"], choices=ACTIONS)
    parser.add_argument("--out", type=Path, default=Path("runs/kl_budget"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core for each")
    options = parser.parse_args()
    out = options.out.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        settings = prepare(out)
        for job in [pool.submit(run, out, seed, options.actions, settings) for seed in options.seeds]:
            job.result()
    found = [row(out, seed, action) for action in ACTIONS for seed in options.seeds]
    rows = [each for each in found if each is not None]
    titles = ["seed", "action", "overran at", "the callback measured", "independently", "±"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(each)} |" for each in rows]
    spent = [float(each[4].rstrip("%")) for each in rows if each[1] == "search" and each[4]]
    if spent:
        span = f"{min(spent):.1f} to {max(spent):.1f} %, mean {statistics.mean(spent):.1f} %"
        lines.append(f"\nAfter a search, independently: {span}")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
