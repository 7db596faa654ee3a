"""The method against its rivals, at equal verified rollouts, over several seeds.

    OMP_NUM_THREADS=1 python benchmarks/compare.py --seeds 0 1 2 3 4 --jobs 2
    OMP_NUM_THREADS=1 python benchmarks/compare.py --seeds 0 1 2 3 4 --jobs 2 --group_size 4

Every method is a configuration of the same chain on top of configs/demo.yaml (`methods`), every figure comes from its
`summary.json`: fresh samples for 320 held-out prompts x 8, KL exact over the vocabulary. All methods of a seed start
from one base policy. A run that was cut off goes on when the command is given again. It ends with a table in Markdown,
`table.md`, all numbers, `results.json`, and a drawing of accuracy against KL, `comparison.png`.
"""

import argparse
import csv
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.yaml"
BASELINES = ROOT / "configs" / "baselines"
ROLLOUTS_PER_ROUND = 4096

SPARED = 512
"""What a method may leave of its rollouts: `signal: auto` does not always preview as many candidates."""

COEFFICIENTS = (0.03, 0.1, 0.3, 1.0)

GROUP_SIZE = 8
"""Responses to a prompt, unless `--group_size` says otherwise; there are as many rollouts either way."""

SQUARED_ERROR = "erpd_lightning.objectives.regression.SquaredError"


def share(rollouts: int, group_size: int, held_out: int = 0) -> list[str]:
    """Groups of this size that make so many rollouts in a round, and prompts that previews take."""
    return [f"--data.group_size={group_size}", f"--data.prompts_per_round={rollouts // group_size + held_out}"]


def grpo(learning_rate: float, inner_epochs: int, group_size: int) -> list[str]:
    """On-policy GRPO over the rollouts of three rounds, without a break between them."""
    iterations = 32 * 3
    return [
        f"--config={BASELINES / 'grpo.yaml'}",
        *share(3 * ROLLOUTS_PER_ROUND, group_size),
        f"--data.iterations={iterations}",
        f"--extreme_region.learning_rate={learning_rate}",
        f"--extreme_region_trainer.max_epochs={iterations * inner_epochs}",
        f"--extreme_region_trainer.check_val_every_n_epoch={32 * inner_epochs}",
    ]


def sapo_kl(coefficient: float, group_size: int) -> list[str]:
    """SAPO with a KL term of this weight and no second stage; iterated where the weight is neither large nor small."""
    rounds = 3 if 0.1 <= coefficient < 1 else 1
    return [
        f"--config={BASELINES / 'sapo_kl.yaml'}",
        f"--extreme_region.kl_coef={coefficient}",
        f"--rounds={rounds}",
        *share(ROLLOUTS_PER_ROUND, group_size),
    ]


def methods(group_size: int) -> dict[str, list[str]]:
    """What each method changes in the demo, with groups of this size."""
    whole = share(ROLLOUTS_PER_ROUND, group_size)
    auto, replay = (f"--config={ROOT / 'configs' / name}" for name in ("auto.yaml", "replay.yaml"))
    group, batch = (f"--data.baseline={name}" for name in ("group", "batch"))
    short = [replay, "--rounds=2", *share(ROLLOUTS_PER_ROUND // 2, group_size)]
    return {
        "erpd": ["--rounds=3", *whole],
        "erpd_auto": [auto, "--rounds=3", *share(ROLLOUTS_PER_ROUND - 288, group_size, held_out=24)],
        "erpd_0.08": [
            auto,
            "--rounds=1",
            "--distill.kl_budget=0.08",
            "--distill.signal.init_args.shares=[1.0]",
            "--distill.signal.init_args.prompts=32",
            *share(ROLLOUTS_PER_ROUND - 256, group_size, held_out=32),
        ],
        "erpd_replay": [replay, *whole, group],
        "erpd_replay_batch": [replay, *whole, batch],
        "erpd_short": [*short, group],
        "erpd_short_batch": [*short, batch],
        "erpd_squared_error": ["--rounds=1", f"--extreme_region.objective={SQUARED_ERROR}", *whole],
        "rft": [f"--config={BASELINES / 'rft.yaml'}", "--rounds=1", *whole],
        **{name: sapo_kl(coefficient, group_size) for name, coefficient in SAPO_KL.items()},
        "sapo_kl_0.3_replay": [*sapo_kl(0.3, group_size), "--data.replay=2"],
        "sapo_kl_0.3_batch": [*sapo_kl(0.3, group_size), batch],
        "grpo": grpo(*BEST_GRPO[group_size], group_size),
        "grpo_batch": [*grpo(*BEST_GRPO_BATCH, group_size), batch],
    }


SAPO_KL = {f"sapo_kl_{coefficient:g}": coefficient for coefficient in COEFFICIENTS}

BEST_GRPO = {8: (5e-4, 2), 4: (2.5e-4, 2)}
"""Learning rate and inner epochs of `grpo` by group size: the best of its grid after three rounds' rollouts."""

BEST_GRPO_BATCH = (5e-4, 2)
"""The same of `grpo_batch`, chosen with groups of four."""


def grpo_grid(group_size: int) -> dict[str, list[str]]:
    """What `grpo` was chosen among, on seeds that nothing is judged on: `--methods grpo_0.0005_2 … --seeds 5 6`."""
    settings = product((2.5e-4, 5e-4, 1e-3, 2e-3), (1, 2))
    return {f"grpo_{rate:g}_{epochs}": grpo(rate, epochs, group_size) for rate, epochs in settings}


@dataclass(frozen=True)
class Point:
    """What a policy of a method had gained and cost after so many verified rollouts.

    KL in nats per token: to the policy that it was trained from in its round, and to the first base policy.
    """

    method: str
    seed: int
    rollouts: int
    accuracy: float
    accuracy_stderr: float
    kl: float
    kl_to_first: float
    kl_stderr: float
    seconds: float


def run(out: Path, method: str, seed: int, options: list[str]) -> None:
    """Run a method on a seed, or go on with it."""
    folder = out / method / f"seed-{seed}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(out / "base" / f"seed-{seed}", partial)
        partial.rename(folder)
    chain(folder, seed, *options)


def chain(folder: Path, seed: int, *options: str) -> None:
    """One call of the command line; what it says lies beside the run."""
    command = [sys.executable, "-m", "erpd_lightning", "fit", f"--config={DEMO}", *options]
    command += [f"--run_dir={folder}", f"--seed_everything={seed}", "--trainer.enable_progress_bar=false"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".log"), "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(f"{folder.parent.name}, seed {seed}, ended with exit code {code}: see {log.name}")
    print(f"{folder.parent.name}, seed {seed}: done", flush=True)


def points(out: Path, method: str, seed: int) -> list[Point]:
    """The students of a run, and what else it tells."""
    folder = out / method / f"seed-{seed}"
    found = []
    for entry in json.loads((folder / "summary.json").read_text())["rounds"]:
        rollouts = -(-entry["rollouts_total"] // ROLLOUTS_PER_ROUND) * ROLLOUTS_PER_ROUND
        if entry["rollouts_total"] < rollouts - SPARED:
            continue
        for name, measured in entry["policies"].items():
            labels = {"student": method, "teacher": f"{method}: teacher, last", "mild": f"{method}: mild teacher"}
            label = "base" if name == "base" and entry["round"] == 1 else labels.get(name)
            if label is None:
                continue
            found.append(
                Point(
                    label,
                    seed,
                    ROLLOUTS_PER_ROUND if label == "base" else rollouts,
                    measured["pass@1"],
                    measured["pass@1_stderr"],
                    measured["kl_per_token"],
                    measured["kl_per_token_to_first"],
                    measured["kl_per_token_to_first_stderr"],
                    entry["seconds"],
                )
            )
    return found + validated(folder, method, seed)


def validated(folder: Path, method: str, seed: int) -> list[Point]:
    """What validation saw on the way: the best epoch of a teacher of 4,096 rollouts, and GRPO after as many."""
    rows = [row for path in folder.glob("round-1/extreme_region/metrics/*/metrics.csv") for row in read(path)]
    seen = [
        Point(
            method,
            seed,
            ROLLOUTS_PER_ROUND,
            float(row["val/pass@1"]),
            float(row["val/pass@1_stderr"]),
            float(row["val/kl_per_token"]),
            float(row["val/kl_per_token"]),
            float(row["val/kl_per_token_stderr"]),
            math.nan,
        )
        for row in rows
        if row.get("val/pass@1")
    ]
    if method.startswith("grpo"):
        return seen[:1]
    if method.startswith("erpd") and not method.startswith("erpd_short"):
        best = max(seen, key=lambda point: point.accuracy)
        return [Point(**{**asdict(best), "method": f"{method}: teacher, best by looking"})]
    return []


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table(found: list[Point], reference: str) -> str:
    """Means, spreads, and paired differences to the reference method, in Markdown."""
    lines = [
        f"| rollouts | method | seeds | pass@1 | spread | {reference} minus it | worst | KL/token | to the first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rollouts in sorted({point.rollouts for point in found}):
        own = {p.seed: p for p in found if (p.method, p.rollouts) == (reference, rollouts)}
        for method in sorted({p.method for p in found if p.rollouts == rollouts}):
            those = {p.seed: p for p in found if (p.method, p.rollouts) == (method, rollouts)}
            differences = [own[seed].accuracy - p.accuracy for seed, p in those.items() if seed in own]
            accuracies = [p.accuracy for p in those.values()]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan
            cells = [
                f"{rollouts:,}",
                method,
                str(len(those)),
                f"{statistics.mean(accuracies):.3f}",
                f"{spread:.3f}",
                f"{statistics.mean(differences):+.3f}" if differences and method != reference else "",
                f"{min(differences):+.3f}" if differences and method != reference else "",
                f"{statistics.mean(p.kl for p in those.values()):.4f}",
                f"{statistics.mean(p.kl_to_first for p in those.values()):.4f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def frontier(found: list[Point], rollouts: int) -> str:
    """Students against SAPO with a KL term at the same KL, by interpolation between its coefficients."""
    lines = []
    for method in sorted({p.method for p in found if p.method.startswith("erpd") and ":" not in p.method}):
        gains = []
        for student in (p for p in found if (p.method, p.rollouts) == (method, rollouts)):
            rivals = [
                p
                for p in found
                if p.seed == student.seed and ((p.method in SAPO_KL and p.rollouts == rollouts) or p.method == "base")
            ]
            curve = sorted((p.kl_to_first, p.accuracy) for p in rivals)
            if len(curve) > len(COEFFICIENTS):
                gains.append(student.accuracy - interpolate(curve, student.kl_to_first))
        if gains:
            lines.append(
                f"{method} minus the frontier of SAPO with a KL term, {rollouts:,} rollouts: "
                f"{statistics.mean(gains):+.3f} on average, worst {min(gains):+.3f}, {len(gains)} seeds\n"
            )
    return "".join(lines)


def interpolate(curve: list[tuple[float, float]], x: float) -> float:
    """The height of a polygon at x; level beyond its ends."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in pairwise(curve):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return curve[-1][1]


def draw(found: list[Point], path: Path) -> None:
    """Accuracy against KL to the first base policy, means over the seeds with their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The last teachers, degenerate ones, are off the paper.
    shown = [p for p in found if ":" not in p.method or p.method == "erpd: teacher, best by looking"]
    sizes, methods = sorted({p.rollouts for p in shown}), sorted({p.method for p in shown})
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(4 * len(sizes) + 3, 4), squeeze=False, sharex=True, sharey=True
    )
    colors = pyplot.colormaps["tab20"].colors
    for panel, rollouts in zip(panels[0], sizes, strict=True):
        for number, method in enumerate(methods):
            those = [p for p in shown if (p.method, p.rollouts) == (method, rollouts)]
            if not those:
                continue
            x, y = ([getattr(p, name) for p in those] for name in ("kl_to_first", "accuracy"))
            bars = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0 for v in (x, y)]
            look = {"color": colors[number % 20], "marker": "osD^vP*X<>"[number % 10], "capsize": 2, "linestyle": ""}
            place = (statistics.mean(x), statistics.mean(y))
            panel.errorbar(*place, xerr=bars[0], yerr=bars[1], label=method, **look)
        panel.set_title(f"{rollouts:,} verified rollouts")
        panel.set_xlabel("KL to the first base policy, nats per token")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("pass@1 on held-out prompts")
    handles = [panel.get_legend_handles_labels() for panel in panels[0]]
    entries = {label: handle for pair in handles for handle, label in zip(*pair, strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 2.8 / (4 * len(sizes) + 3), 1))
    figure.savefig(path, dpi=120)


def finished(out: Path, methods: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
    """The runs that have a summary."""
    pairs = ((method, seed) for method in methods for seed in seeds)
    return [(m, s) for m, s in pairs if (out / m / f"seed-{s}" / "summary.json").is_file()]


def names() -> list[str]:
    """All methods that there are."""
    return [*methods(GROUP_SIZE), *grpo_grid(GROUP_SIZE)]


def main() -> None:
    """Run what is not done, then write table and drawing of all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="*", default=[*methods(GROUP_SIZE)], help=f"of {', '.join(names())}")
    parser.add_argument(
        "--group_size", type=int, choices=sorted(BEST_GRPO), default=GROUP_SIZE, help="responses to a prompt"
    )
    parser.add_argument("--reference", default="erpd", help="the method that the others are compared with")
    parser.add_argument("--out", type=Path, help="by default runs/comparison-GROUP_SIZE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core for each")
    options = parser.parse_args()
    if unknown := set(options.methods) - {*names()}:
        parser.error(f"no method is called {', '.join(sorted(unknown))}")
    out = (options.out or Path(f"runs/comparison-{options.group_size}")).resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in options.seeds:
            folder = out / "base" / f"seed-{seed}"
            if not (folder / "prepare" / "stage.json").is_file():
                pool.submit(chain, folder, seed, "--stage=base").result()
        changes = {**methods(options.group_size), **grpo_grid(options.group_size)}
        jobs = [pool.submit(run, out, name, seed, changes[name]) for name in options.methods for seed in options.seeds]
        for job in jobs:
            job.result()
    runs = finished(out, options.methods, options.seeds)
    # Every run of a seed has measured the same base policy.
    unique = {(p.method, p.seed, p.rollouts): p for method, seed in runs for p in points(out, method, seed)}
    found = [*unique.values()]
    (out / "results.json").write_text(json.dumps([asdict(point) for point in found], indent=1) + "\n")
    frontiers = [frontier(found, rounds * ROLLOUTS_PER_ROUND) for rounds in (1, 3)]
    (out / "table.md").write_text("\n".join([table(found, options.reference), *frontiers]))
    draw(found, out / "comparison.png")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
