"""Runs that are killed at random moments and started again with the same command: do they end as if nothing had been?

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 50 --seed 0

Each variant of the chain runs once undisturbed. Then runs of it are started in fresh directories, killed with SIGKILL,
SIGTERM or SIGINT at a moment drawn from the whole length of the undisturbed one, and started again until they end.
Signal, moment and who gets it come from the seed: the run, all its processes as by Ctrl-C in a terminal, or, with two
processes, the second one alone. What a run has made (weights, fingerprints of stores, measurements) has to be what the
undisturbed one made, and no process of its session may be left after a while. One row a kill goes to `kills.jsonl` in
the output folder, where runs that ended otherwise stay; the table in Markdown is printed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SHORT = [f"--config={CONFIGS / 'demo.yaml'}", f"--config={CONFIGS / 'smoke.yaml'}"]
QUIET = ["--trainer.enable_progress_bar=false", "--checkpoint_every=3"]

VARIANTS = {
    "demo": [],
    "on-policy GRPO": [
        f"--config={CONFIGS / 'baselines' / 'grpo.yaml'}",
        "--data.iterations=4",
        "--extreme_region_trainer.max_epochs=8",
        "--extreme_region_trainer.check_val_every_n_epoch=4",
    ],
    "ClippedPolicyGradient": [
        "--distill.objective=erpd_lightning.objectives.distillation.ClippedPolicyGradient",
        "--distill.iterations=2",
        "--distill_trainer.max_epochs=4",
    ],
    "auto signal": [
        f"--config={CONFIGS / 'auto.yaml'}",
        "--data.prompts_per_round=64",
        "--data.group_size=8",
        "--extreme_region_trainer.max_epochs=2",
        "--unlearned_trainer.max_epochs=2",
    ],
    "two processes": ["--trainer.devices=2", "--trainer.strategy=ddp", "--rounds=1"],
}

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ORPHAN_SECONDS = 10
END_SECONDS = 600
"""A run that has not ended by then hangs."""


@dataclass
class Killed:
    """What became of a run that was killed.

    Attributes:
        target: Who got the signal.
        seconds: From the start to the signal.
        stage: The last stage that the run had announced.
        exit_code: Of the run, negative for a signal.
        lines: On stderr.
        orphans: Processes of its session that were there after a while.
        identical: Whether it made the same as an undisturbed run once it was started again.
    """

    variant: str
    signal: str
    target: str
    seconds: float
    stage: str
    exit_code: int
    lines: list[str]
    orphans: int
    identical: bool


def command(variant: str, run_dir: Path) -> list[str]:
    """What starts a run, the first time and after the kill."""
    options = [*SHORT, *VARIANTS[variant], *QUIET, f"--run_dir={run_dir}"]
    return [sys.executable, "-m", "erpd_lightning", "fit", *options]


def start(variant: str, run_dir: Path) -> "subprocess.Popen[str]":
    """A run in a session of its own; what it prints lies beside its directory."""
    with run_dir.with_suffix(".out").open("w") as out, run_dir.with_suffix(".err").open("w") as err:
        return subprocess.Popen(
            command(variant, run_dir), cwd=ROOT, stdout=out, stderr=err, text=True, start_new_session=True
        )


def finish(variant: str, run_dir: Path) -> float:
    """Run to the end; returns the seconds that it took."""
    began = time.monotonic()
    process = start(variant, run_dir)
    if process.wait(END_SECONDS) != 0:
        raise RuntimeError(f"{variant}: exit code {process.returncode}\n{run_dir.with_suffix('.err').read_text()}")
    return time.monotonic() - began


def members(session: int) -> dict[int, str]:
    """The living processes of a session, and their commands."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # It has just ended.
            continue
    return found


def second_rank(process: int) -> int:
    """The process of the second rank, which the first has started; the first where it has not done so yet."""
    for child, text in members(process).items():
        if child != process and "-m erpd_lightning" in text:
            return child
    return process


def made(run_dir: Path) -> dict[str, Any]:
    """Digests of all weights, fingerprints of all stores, and what was measured, without the time that it took."""
    weights = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run_dir.rglob("*.safetensors")}
    stores = {path: json.loads(path.read_text())["fingerprint"] for path in run_dir.rglob("manifest.json")}
    rounds = json.loads((run_dir / "summary.json").read_text())["rounds"]
    measured = [{key: value for key, value in each.items() if "seconds" not in key} for each in rounds]
    return {**{str(path.relative_to(run_dir)): text for path, text in (weights | stores).items()}, "rounds": measured}


def kill(variant: str, run_dir: Path, number: signal.Signals, target: str, seconds: float) -> Killed | None:
    """Start a run, kill it, and wait until nothing of it is left; None where it ended before the signal."""
    process = start(variant, run_dir)
    try:
        process.wait(seconds)
        return None
    except subprocess.TimeoutExpired:
        pass
    if target == "all processes":
        os.killpg(process.pid, number)
    else:
        os.kill(second_rank(process.pid) if target == "second process" else process.pid, number)
    code = process.wait(END_SECONDS)
    until = time.monotonic() + ORPHAN_SECONDS
    while (left := members(process.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    for orphan in left:
        os.kill(orphan, signal.SIGKILL)
    announced = [line for line in run_dir.with_suffix(".out").read_text().splitlines() if line.startswith("[")]
    stage = announced[-1].partition(":")[0] if announced else "start"
    lines = run_dir.with_suffix(".err").read_text().splitlines()
    return Killed(variant, number.name, target, round(seconds, 2), stage, code, lines, len(left), False)


def draw_target(random_: random.Random, variant: str) -> str:
    """Who gets the signal."""
    targets = ["the run", "all processes"]
    if variant == "two processes":
        targets.append("second process")
    return random_.choice(targets)


def disturb(folder: Path, variants: list[str], kills: int, seed: int) -> list[Killed]:
    """Kill so many runs, the variants in turn; returns what became of them."""
    expected, lengths, told = {}, {}, []
    for variant in variants:
        run_dir = folder / f"undisturbed-{variant.replace(' ', '-')}"
        shutil.rmtree(run_dir, ignore_errors=True)
        lengths[variant] = finish(variant, run_dir)
        expected[variant] = made(run_dir)
        print(f"{variant}: {lengths[variant]:.0f} s undisturbed", flush=True)
    random_ = random.Random(seed)
    while len(told) < kills:
        variant = variants[len(told) % len(variants)]
        number, target = random_.choice(SIGNALS), draw_target(random_, variant)
        run_dir = folder / "killed"
        shutil.rmtree(run_dir, ignore_errors=True)
        one = kill(variant, run_dir, number, target, random_.uniform(0, lengths[variant]))
        if one is None:
            continue
        finish(variant, run_dir)
        one.identical = made(run_dir) == expected[variant]
        told.append(one)
        with (folder / "kills.jsonl").open("a") as file:
            print(json.dumps(asdict(one)), file=file)
        if not one.identical or one.orphans:
            run_dir.rename(folder / f"kill-{len(told)}")
        print(
            f"{len(told)}/{kills} {variant}: {one.signal} to {target} after {one.seconds:.1f} s in {one.stage}: "
            f"exit code {one.exit_code}, {len(one.lines)} line(s), {one.orphans} orphan(s), "
            f"{'identical' if one.identical else 'NOT IDENTICAL'}",
            flush=True,
        )
    return told


def table(told: list[Killed]) -> str:
    """Counts of each variant, in Markdown, and of the stages in which runs were killed."""
    lines = [
        "| variant | kills | identical ends | orphans | exit codes | lines on stderr |",
        "|---|---|---|---|---|---|",
    ]
    for variant in [*dict.fromkeys(one.variant for one in told), "all"]:
        of_it = [one for one in told if variant in (one.variant, "all")]
        codes, spoken = (
            ", ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items()))
            for values in ([one.exit_code for one in of_it], [len(one.lines) for one in of_it])
        )
        identical, orphans = sum(one.identical for one in of_it), sum(one.orphans for one in of_it)
        lines.append(f"| {variant} | {len(of_it)} | {identical} | {orphans} | {codes} | {spoken} |")
    stages = Counter(one.stage.rpartition(" ")[2] for one in told)
    return "\n".join([*lines, "", ", ".join(f"{stage} ({count})" for stage, count in stages.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill runs at random moments, and compare how they end.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kills")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kills.jsonl").unlink(missing_ok=True)
    told = disturb(options.out.resolve(), options.variants, options.kills, options.seed)
    print(table(told))
    if not all(one.identical and not one.orphans for one in told):
        sys.exit(1)


if __name__ == "__main__":
    main()
