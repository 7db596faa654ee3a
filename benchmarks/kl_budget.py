"""What `KLBudget` makes of a student whose learning rate is five times too high.

    OMP_NUM_THREADS=1 python benchmarks/kl_budget.py --jobs 2

From one base policy, for each seed, configs/demo.yaml up to the signal of its first round, then distillation without
calibration, watched by the callback with one action after the other. What the student spends is measured afterwards, by
the stage evaluation on other prompts: 2,048 held-out ones x 2 fresh samples. It ends with a table in Markdown,
`table.md`.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = 0.05
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
STAGES = ("rollouts", "extreme_region", "unlearned", "signal")


def call(folder: Path, seed: int, *options: str) -> int:
    """One call of the command line; what it says lies beside the run."""
    command = [sys.executable, "-m", "erpd_lightning", "fit", *options]
    command += [f"--run_dir={folder}", f"--seed_everything={seed}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".log"), "a") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode


def prepare(out: Path) -> list[str]:
    """The base policy; half of its training prompts are held out."""
    base = out / "base"
    if call(base, 0, DEMO, "--stage=base"):
        sys.exit(f"the base policy failed, see {base}.log")
    lines = (base / "prompts" / "train.jsonl").read_text().splitlines(keepends=True)
    (out / "train.jsonl").write_text("".join(lines[::2]))
    (out / "held_out.jsonl").write_text("".join(lines[1::2]))
    prompts = {"prompts": out / "train.jsonl", "validation_prompts": out / "held_out.jsonl"}
    return [*OPTIONS, f"--policy={base / 'base'}", *(f"--data.{key}={path}" for key, path in prompts.items())]


def run(out: Path, seed: int, actions: list[str], options: list[str]) -> None:
    """The stages that all actions share, once, and then each action on a copy."""
    shared = out / f"seed-{seed}"
    for stage in STAGES:
        if call(shared, seed, *options, f"--stage={stage}"):
            sys.exit(f"seed {seed}: the stage {stage} failed, see {shared}.log")
    for action in actions:
        folder = out / f"seed-{seed}-{action}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(folder.name + ".log").unlink(missing_ok=True)
        shutil.copytree(shared, folder)
        settings = {"budget": BUDGET, "action": action}
        callback = {"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": settings}
        code = call(folder, seed, *options, f"--distill_trainer.callbacks={json.dumps([callback])}")
        print(f"seed {seed}, {action}: exit code {code}", flush=True)


def row(out: Path, seed: int, action: str) -> list[str] | None:
    """What a run says: the KL where it was first outside, at its end, and by independent measurement."""
    folder = out / f"seed-{seed}-{action}"
    log = folder.with_name(folder.name + ".log")
    if not log.is_file():
        return None
    said = log.read_text()
    overran = re.search(r"KL ([\d.]+) .* is outside", said)
    ended = re.search(r"KL ([\d.]+) .* at the end, inside", said)
    summary = folder / "summary.json"
    spent = error = ""
    if summary.is_file():
        student = json.loads(summary.read_text())["rounds"][0]["policies"]["student"]
        spent = f"{student['kl_per_token'] / BUDGET:.1%}"
        error = f"{student['kl_per_token_stderr'] / BUDGET:.1%}"
    exceeded = "BudgetExceeded" if "training ended outside its budget" in said else ""
    at_end = f"{float(ended[1]) / BUDGET:.1%}" if ended else exceeded
    return [str(seed), action, f"{float(overran[1]) / BUDGET:.0%}" if overran else "", at_end, spent, error]



def main() -> None:
    """Run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--actions", nargs="+", default=["search"])
    parser.add_argument("--out", type=Path, default=Path("runs/kl_budget"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core for each")
    options = parser.parse_args()
    out = options.out.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        settings = prepare(out)
        for job in [pool.submit(run, out, seed, options.actions, settings) for seed in options.seeds]:
            job.result()
    found = [row(out, seed, action) for action in options.actions for seed in options.seeds]
    rows = [each for each in found if each is not None]
    titles = ["seed", "action", "overran at", "the callback measured", "independently", "±"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(each)} |" for each in rows]
    spent = [float(each[4].rstrip("%")) for each in rows if each[4]]
    if spent:
        lines.append(f"\nIndependently: {min(spent):.1f} to {max(spent):.1f} %, mean {statistics.mean(spent):.1f} %")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
