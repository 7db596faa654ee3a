"""What the command line makes of damaged files in a run directory: the damage suite.

    PYTHONPATH=.:tests python -m support.damage --out /tmp/damage

It makes runs of configs/smoke.yaml: a finished one of two rounds, and some of one round that were killed in a stage.
Then it truncates, alters (a byte), empties and deletes each kind of file in them, one at a time on a copy, and runs
`fit`, `test`, `preview` and `report` on that. What came of it is one of `VERDICTS`; those in `FAULTS` must not occur,
and are listed. It ends with a table of counts, and with exit code 1 where there is a fault.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.chain import parsers_built_once
from support.kills import CHECKPOINT, MODULE, Kill, after, written
from support.processes import ROOT, exit_code, fork
from support.runs import contents

VERDICTS = {
    "repaired": "exit code 0, and all files are as they were before the damage, policies bit for bit",
    "not read": "exit code 0, and the same result: nothing that was asked for depends on the file",
    "shown without": "exit code 0 of a report or preview that shows what is left, for the file is gone or empty",
    "own settings": "exit code 0 with config.yaml, which is the user's to change, read as it now is",
    "refused": "exit code 2 and a line or two that name the file or its folder",
    "misnamed": "exit code 2, but what is damaged is not named, or not in two lines",
    "traceback": "another end",
    "silent": "exit code 0, but another result, or a damaged file that others rely on is left as it is",
}
FAULTS = ("misnamed", "traceback", "silent")

COMMANDS = ("fit", "test", "preview", "report")

OUTPUTS = r"(preview\.(json|png)|report\.html|predictions-.*\.jsonl|\.lock|\.tmp)$"
"""Files that nothing reads."""

FOR_PEOPLE = r"config\.yaml$|(^|/)metrics/"
"""Files that a finished stage does not read."""

OF_UNFINISHED_STAGES = r"(started\.json|\.ckpt)$|prepare/(initial|demonstrations)/"
"""Files that only an unfinished stage reads."""

SETTINGS = ["--trainer.enable_progress_bar=false", "--data.sampler.init_args.batch_size=128", "--checkpoint_every=4"]

STOPPED = {
    "base": [Kill(f"{MODULE}.training_step", count=30)],
    "rollouts": [after(written(r"rollouts/part-00002\.parquet"))],
    "extreme_region": [after(written(f"extreme_region/checkpoints/{CHECKPOINT}", count=2))],
    "scoring": [written("scoring/unlearned/manifest.json")],
    "distill": [Kill("erpd_lightning.modules.distill:DistillModule.on_validation_epoch_end", count=2)],
}
"""Where a run of one round is killed, by the stage that it is in then."""


@dataclass(frozen=True)
class Result:
    """End of a command: its exit code, what it printed, and what it made."""

    code: int
    output: str
    made: Any


@dataclass(frozen=True)
class Case:
    """A damaged file and a command that is run on it.

    Attributes:
        run: Name of the run.
        file: Path in the run directory.
        damage: What was done to it.
        command: The command.
    """

    run: str
    file: str
    damage: str
    command: str


def truncated(path: Path, _: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def altered(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def emptied(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def deleted(path: Path, _: random.Random) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (truncated, altered, emptied, deleted)


def verdict(case: Case, run_dir: Path, result: Result, expected: Result, original: bytes) -> str:
    """One of `VERDICTS`.

    Args:
        case: The damaged file and the command.
        run_dir: The run directory, after the command.
        result: End of the command.
        expected: End of the same command without damage.
        original: Content of the file before.
    """
    path = run_dir / case.file
    if result.code not in (0, 2) or "Traceback" in result.output:
        return "traceback"
    if result.code == 2:
        _, _, message = result.output.rpartition("error: ")
        folders = [folder for folder in path.parents if run_dir in folder.parents]
        named = any(str(each) in message for each in [path, *folders[:2]])
        named |= case.file == "config.yaml"  # Of a configuration the key is named that is wrong.
        return "refused" if named and len(message.strip().splitlines()) <= 2 else "misnamed"
    restored = path.is_file() and path.read_bytes() == original
    same = result.made == expected.made
    if case.command == "fit" and case.file in expected.made:
        restored = restored or result.made.get(case.file) == expected.made[case.file]
        same = same or {**result.made, case.file: ""} == {**expected.made, case.file: ""}
    if same:
        if restored or case.command != "fit":
            return "repaired" if restored else "not read"
        harmless = [OUTPUTS, FOR_PEOPLE, OF_UNFINISHED_STAGES] if path_is_finished(path, run_dir) else [OUTPUTS]
        return "not read" if any(re.search(pattern, case.file) for pattern in harmless) else "silent"
    if case.file == "config.yaml":
        return "own settings"
    if case.command == "report" and case.damage in ("deleted", "emptied"):
        return "shown without"
    # Without its record the stage scoring is not finished: the round before is previewed, which the command says.
    earlier = case.command == "preview" and case.damage == "deleted" and case.file.endswith("scoring/stage.json")
    return "shown without" if earlier else "silent"


def path_is_finished(path: Path, run_dir: Path) -> bool:
    """Whether the stage of a file is finished, or it is none's."""
    stages = [folder for folder in path.parents if folder != run_dir and run_dir in folder.parents]
    return not stages or any((folder / "stage.json").is_file() for folder in stages)


def made_by(command: str, run_dir: Path, output: str) -> Any:
    """What a command made, as far as it is to be the same again."""
    if command == "fit":
        files = contents(run_dir)
        return {name: digest for name, digest in files.items() if not re.search(f"started.json$|{OUTPUTS}", name)}
    if command == "test":
        return re.findall(r"test/\S+\s+\S\s+\S+", output)
    if command == "preview":
        found = sorted(run_dir.glob("round-*/preview.json"))
        return [path.read_text() for path in found]
    return (run_dir / "report.html").read_text() if (run_dir / "report.html").is_file() else None


class Suite:
    """Runs of the command line in forked children of this process, on copies of runs.

    Args:
        out: Folder for runs and copies.
        config: What every run is configured with.
    """

    def __init__(self, out: Path, config: Sequence[str]) -> None:
        self.out = out
        self.config = list(config)
        self.run_dir = out / "run"

    def call(self, command: str, *more: str, kill: Kill | None = None, fit: Sequence[str] = ()) -> Result:
        """Run a command on the run directory."""
        argv = {
            "fit": ["fit", *self.config, *fit, f"--run_dir={self.run_dir}"],
            "report": ["report", str(self.run_dir)],
        }.get(command, [command, f"--config={self.run_dir / 'config.yaml'}"])
        log = self.out / "output"
        code = exit_code(fork(functools.partial(_child, [*argv, *more], log, kill)))
        output = log.read_text(errors="replace")
        return Result(code, output, made_by(command, self.run_dir, output) if code == 0 else None)

    def finished(self, template: Path) -> None:
        """A finished run of two rounds, with all that other commands leave in it."""
        self._clear()
        for command in ("fit", "preview", "predict", "report"):
            result = self.call(command)
            assert result.code == 0, result.output
        self.run_dir.rename(template)

    def stopped(self, template: Path, stage: str) -> None:
        """A run of one round that was killed in a stage."""
        self._clear()
        for kill in STOPPED[stage]:
            result = self.call("fit", kill=kill, fit=["--rounds=1"])
            assert result.code < 0, result.output
            assert f"] {stage}: " in result.output.strip().splitlines()[-1], result.output
        self.run_dir.rename(template)

    def copy(self, template: Path) -> None:
        """Lay a fresh copy of a run where it was made."""
        self._clear()
        shutil.copytree(template, self.run_dir)

    def cases(
        self, name: str, template: Path, files: Sequence[str], commands: Sequence[str], flips: int
    ) -> Iterator[tuple[Case, str, Result]]:
        """Damage each of some files in every way, and run commands on it; gives what came of it."""
        fit = [] if name == "finished" else ["--rounds=1"]
        expected = {}
        for command in commands:
            self.copy(template)
            expected[command] = self.call(command, fit=fit)
        for file in files:
            original = (template / file).read_bytes()
            for damage in DAMAGES:
                if not original and damage is not deleted:
                    continue
                for number in range(flips if damage is altered else 1):
                    for command in commands:
                        self.copy(template)
                        damage(self.run_dir / file, random.Random(f"{file} {number}"))
                        case = Case(name, file, damage.__name__, command)
                        result = self.call(command, fit=fit)
                        yield case, verdict(case, self.run_dir, result, expected[command], original), result

    def _clear(self) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)


def _child(argv: Sequence[str], log: Path, kill: Kill | None) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if kill is not None:
        kill.arm()
    sys.argv = ["erpd_lightning", *argv]
    from erpd_lightning.__main__ import main

    main()


def one_of_each_kind(template: Path) -> list[str]:
    """Files of a run, one of those that differ in the number of their round or part alone."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(template.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(template))
            kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    return [random.Random(kind).choice(names) for kind, names in kinds.items()]


def table(verdicts: Counter[tuple[str, str]]) -> str:
    """Counts of verdicts by command."""
    lines = [f"{'':>14}" + "".join(f"{command:>9}" for command in COMMANDS) + f"{'all':>9}"]
    for name in VERDICTS:
        counts = [verdicts[name, command] for command in COMMANDS]
        lines.append(f"{name:>14}" + "".join(f"{count:>9}" for count in [*counts, sum(counts)]))
    return "\n".join(lines)


def main() -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs; runs that lie there are taken")
    parser.add_argument("--runs", nargs="+", default=["finished", *STOPPED], help="finished, or stages to be killed in")
    parser.add_argument("--files", default="", help="pattern of the files to damage")
    parser.add_argument("--commands", nargs="+", default=COMMANDS)
    parser.add_argument("--flips", type=int, default=2, help="bytes of each file to alter, one at a time")
    parser.add_argument("--every_file", action="store_true", help="not only one of each kind")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    configs = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("demo", "smoke")]
    suite = Suite(given.out.resolve(), [*configs, *SETTINGS])
    verdicts: Counter[tuple[str, str]] = Counter()
    with parsers_built_once(), open(given.out / "cases.jsonl", "a") as log:
        _import_all()
        for name in given.runs:
            template = given.out / f"template-{name}"
            if not template.exists():
                suite.finished(template) if name == "finished" else suite.stopped(template, name)
            files = one_of_each_kind(template)
            if given.every_file:
                files = sorted(str(path.relative_to(template)) for path in template.rglob("*") if path.is_file())
            files = [file for file in files if re.search(given.files, file)]
            # While a stage is unfinished there is nothing to test or preview but what `finished` shows.
            commands = [each for each in given.commands if name in ("finished", "distill") or each in ("fit", "report")]
            for case, found, result in suite.cases(name, template, files, commands, given.flips):
                verdicts[found, case.command] += 1
                print(
                    json.dumps([*vars(case).values(), found, result.code, result.output[-2000:]]), file=log, flush=True
                )
                if found in FAULTS:
                    print(f"{found}: {case}\n{result.output[-1500:]}", flush=True)
    print(table(verdicts))
    return int(any(verdicts[fault, command] for fault in FAULTS for command in COMMANDS))


def _import_all() -> None:
    """Import everything and build the parsers, so that a child has nothing left to do but its work."""
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import erpd_lightning.cli.main
    import erpd_lightning.report.command
    from erpd_lightning.report import plots  # noqa: F401

    torch.set_num_threads(1)
    sys.argv = ["erpd_lightning", "fit", "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        erpd_lightning.cli.main.main()


if __name__ == "__main__":
    sys.exit(main())
