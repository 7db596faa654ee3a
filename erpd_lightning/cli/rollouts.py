"""Command `python -m erpd_lightning rollouts`: stores are audited, verified again, and made of what lies elsewhere."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ..data.audit import Audit, audit
from ..data.imports import ImportSource
from ..data.store import Store
from ..data.verifiers import Verifier
from ..data.verify_again import verify_again
from ..errors import UserError, refuse
from ..files import write_errors_named
from ..models.loading import load_tokenizer
from ..pipeline.imports import import_rollouts
from ..pipeline.outcome import summary_line
from ..pipeline.records import load_record
from ..text import aligned
from .errors import rejected_value, with_key
from .noise import quieten_libraries


def run_audit(given: Namespace) -> None:
    """Print an audit of each round of a run, or of a store."""
    path = Path(given.path)
    found = {}
    for name, stores in _stores(path).items():
        threshold = given.correct_threshold or _correct_threshold(path)
        found[name] = audit([Store.open(store) for store in stores], threshold)
    steps = {name: _optimizer_steps(path / name) for name in found}
    if given.json:
        print(json.dumps({name: {**asdict(each), "optimizer_steps": steps[name]} for name, each in found.items()}))
        return
    for name, each in found.items():
        print(f"{name}: {summary_line(each, steps[name])}\n{_details(each)}\n")


def run_import(given: Namespace, parser: ArgumentParser) -> None:
    """Make a rollout store of responses from elsewhere."""
    verifier = parser.instantiate(given).verifier
    columns = {name: given[name] for name in COLUMNS}
    import_rollouts(
        ImportSource(given.source, **columns, rewards="recorded" if verifier is None else "verifier"),
        given.policy,
        given.output,
        verifier,
        **{name: given[name] for name in ("temperature", "rescore", "max_tokens", "dtype", "correct_threshold")},
    )
    print(f"The rollouts lie in {given.output}")


def run_verify(given: Namespace, parser: ArgumentParser) -> None:
    """Give stored responses the verdicts of another verifier, and tell which changed."""
    verifier = parser.instantiate(given).verifier
    tokenizer = None if given.tokenizer is None else load_tokenizer(given.tokenizer)
    for name, stores in _stores(Path(given.path)).items():
        for store in stores:
            output = Path(given.output) / ("" if name == "." else store.relative_to(given.path))
            changes = verify_again(store, verifier, output, tokenizer)
            print(f"{changes.summary()}; the rollouts with their new verdicts lie in {output}")
            for change in changes.changes[: given.show]:
                print(f"  {change}")


COLUMNS = [name for name in ImportSource.__dataclass_fields__ if name.endswith("_column")]


def _audit_parser() -> ArgumentParser:
    parser = _parser("audit", "Count what in the rollouts of a run, or of a store, training would learn nothing from.")
    parser.add_argument("path", metavar="RUN_OR_STORE", help="a run directory, or that of a rollout store")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--correct_threshold",
        type=float | None,
        default=None,
        help="reward from which a response counts as correct; by default that of the run, 1 of a store",
    )
    return parser


def _import_parser() -> ArgumentParser:
    parser = _parser("import", "Make a rollout store of responses that were generated elsewhere.")
    parser.add_argument("source", metavar="SOURCE", help="JSONL or Parquet file, data set, or rollout store")
    parser.add_class_arguments(ImportSource, skip={"path", "rewards"}, instantiate=False)
    parser.add_function_arguments(import_rollouts, skip={"source", "verifier", "trainer"})
    parser.add_subclass_arguments(
        Verifier, "verifier", required=False, help="checks the responses; without, the recorded scores are the rewards"
    )
    return parser


def _verify_parser() -> ArgumentParser:
    parser = _parser("verify", "Verify the stored responses of a run, or of a store, again, without sampling.")
    parser.add_argument("path", metavar="RUN_OR_STORE", help="a run directory, or that of a rollout store")
    parser.add_subclass_arguments(Verifier, "verifier", required=True, help="checks the responses")
    parser.add_argument("--output", required=True, help="directory of the new store, or of those of each round")
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="folder or hub name of the policy's tokenizer, with which a verifier sees special tokens inside of "
        "responses as it does while sampling; without, it sees the stored texts",
    )
    parser.add_argument("--show", type=int, default=20, help="how many of the verdicts that changed are shown")
    return parser


COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[..., None]]] = {
    "audit": (_audit_parser, lambda given, parser: run_audit(given)),
    "import": (_import_parser, run_import),
    "verify": (_verify_parser, run_verify),
}


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        prog=f"python -m erpd_lightning rollouts {name}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _stores(path: Path) -> dict[str, list[Path]]:
    """Directories of rollout stores by what to call them together: those of each round, or the one that is given.

    Raises:
        UserError: If there are none.
    """
    if Store.exists(path):
        return {".": [path]}
    found: dict[str, list[Path]] = {}
    rounds = [folder for folder in path.glob("round-*/rollouts") if folder.parent.name.removeprefix("round-").isdigit()]
    for folder in sorted(rounds, key=lambda folder: int(folder.parent.name.removeprefix("round-"))):
        stores = [store for store in [folder, *sorted(folder.glob("iteration-*"))] if Store.exists(store)]
        if stores:
            found[str(folder.relative_to(path))] = stores
    if not found:
        raise UserError(f"{path} is neither a finished rollout store nor a run directory with one")
    return found


def _correct_threshold(path: Path) -> float:
    """That of the run in a directory, 1 where there is none."""
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return float(config.get("data", {}).get("correct_threshold", 1.0))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read as the configuration of a run: give --correct_threshold") from error


def _optimizer_steps(folder: Path) -> int | None:
    record = folder / "stage.json"
    steps: int | None = load_record(record)["outcome"].get("optimizer_steps") if record.is_file() else None
    return steps


def _details(found: Audit) -> str:
    """The shares, and rewards by length and by prompt, as tables."""
    shares = [["", "share"]]
    shares += [[name, f"{found.measure(name):.1%}"] for name in ("duplicate", "empty", "uniform")]
    percentiles = [["tokens", *(f"{p} %" for p in found.length_percentiles), "longest", "mean"]]
    values = [f"{value:.0f}" for value in found.length_percentiles.values()]
    percentiles.append(["", *values, str(found.longest), f"{found.mean_length:.1f}"])
    by_length = [["tokens", "responses", "mean reward"]]
    by_length += [
        [f"{part.shortest} to {part.longest}", str(part.responses), _number(part.mean_reward)]
        for part in found.by_length
    ]
    by_prompt = [["correct", "prompts"]]
    by_prompt += [[_share(part.above, part.up_to), str(part.prompts)] for part in found.by_prompt]
    return "\n\n".join(aligned(table) for table in (shares, percentiles, by_length, by_prompt))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(above: float, up_to: float) -> str:
    if above == up_to:
        return f"{above:.0%}"
    return f"above {above:.0%}" if up_to == 1 else f"above {above:.0%} to {up_to:.0%}"


def main(args: Sequence[str]) -> None:
    """Run the command; a mistake of the user's ends in a line and exit code 2."""
    quieten_libraries()
    try:
        if not args or args[0] not in COMMANDS:
            given = args[0] if args else "nothing"
            if given in ("-h", "--help"):
                print(f"usage: python -m erpd_lightning rollouts {{{','.join(COMMANDS)}}} …; each has its --help")
                return
            raise UserError(f"rollouts is followed by {given}: one of {', '.join(COMMANDS)} is expected")
        make, run = COMMANDS[args[0]]
        parser = make()
        try:
            parsed = parser.parse_args(list(args[1:]))
        except ArgumentError as error:
            raise UserError(with_key(*rejected_value(str(error)))) from error
        with write_errors_named("the store"):
            run(parsed, parser)
    except UserError as error:
        refuse(str(error))
    except OSError as error:  # Of a folder or file that may not be read.
        refuse(f"{error.filename}: {error.strerror}")
