"""Model card of a policy: what it was made from, what was asked and spent, how accurate it is, and how to load it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .cells import NO_VALUE, estimate_text, kl_estimate, number_text
from .measures import Estimate
from .read import Run
from .tables import SET_COLUMNS, set_rows

PAPER = "https://arxiv.org/abs/2605.25582"

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

ACCURACY_COLUMNS = ("round", "policy", "pass@1", "pass@k", "KL/token", "KL/token to first", "length")


@dataclass(frozen=True)
class Origin:
    """Where a policy comes from.

    Attributes:
        run: Its run.
        round: The round that made it; 0 for the policy that the run started from.
        policy: Its name in the round.
        configuration: What lies in the run's `config.yaml`; empty where nothing does.
        versions: Versions of packages that made it, by name; empty where nobody recorded them.
    """

    run: Run
    round: int
    policy: str
    configuration: Mapping[str, Any]
    versions: Mapping[str, str]


def model_card(name: str, origin: Origin | None) -> str:
    """Model card in Markdown, with the header that the hub reads.

    Args:
        name: What the policy is called on the hub.
        origin: Where it comes from; None where that is not known.
    """
    parts = [_header(origin), f"# {name.rpartition('/')[2]}"]
    if origin is None:
        parts.append("A causal language model. How it was made is not recorded.")
    else:
        parts += _about(origin)
    parts.append(_loading(name))
    return "\n\n".join(parts) + "\n"


def read_configuration(run_dir: Path) -> dict[str, Any]:
    """What lies in the `config.yaml` of a run; empty where nothing can be read."""
    try:
        found = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _header(origin: Origin | None) -> str:
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["erpd-lightning"],
    }
    if origin is not None:
        base = origin.configuration.get("policy")
        if isinstance(base, str) and _hub_name(base):
            header["base_model"] = base
        if names := sorted({each for each in map(_hub_name, _sources(origin).values()) if each}):
            header["datasets"] = names
    return f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---"


def _about(origin: Origin) -> Iterator[str]:
    rounds = [entry for entry in origin.run.rounds if entry.number <= max(origin.round, 1)]
    method = f"[Extreme Region Policy Distillation]({PAPER}) with erpd_lightning"
    if origin.configuration.get("last_stage") == "extreme_region":
        method = "erpd_lightning, by a method of one stage (`last_stage: extreme_region`)"
    if origin.round == 0:
        yield f"The base policy of a run of post-training by {method}."
    else:
        yield f"The {origin.policy} of round {origin.round} of post-training by {method}."
    yield _table(("what", "which"), _facts(origin))
    students = [(entry, entry.policies["student"]) for entry in rounds if "student" in entry.policies]
    budgets = [
        (
            str(entry.number),
            number_text(entry.budget),
            estimate_text(kl_estimate(student), 4),
            number_text(entry.total_budget),
        )
        for entry, student in students
    ]
    if budgets:
        yield (
            "## KL budget\n\nIn nats per response token. What was spent is the KL of the student to its round's base "
            "policy, exact over the vocabulary, on fresh samples for held-out prompts."
        )
        yield _table(("round", "budget asked for", "spent", "budget of all rounds"), budgets)
    rows = [
        (
            str(entry.number),
            name,
            estimate_text(Estimate(row["pass@1"], row["pass@1_stderr"]), 3),
            f"{row['pass@k']:.3f}",
            estimate_text(kl_estimate(row), 4),
            estimate_text(kl_estimate(row, "kl_per_token_to_first"), 4),
            f"{row['mean_length']:.1f}",
        )
        for entry in rounds
        for name, row in entry.policies.items()
        if name in ("base", "student", origin.policy)
    ]
    if rows:
        sizes = {(row["prompts"], row["samples_per_prompt"]) for entry in rounds for row in entry.policies.values()}
        held_out = " or ".join(f"{samples:g} responses to each of {prompts:g}" for prompts, samples in sorted(sizes))
        yield (
            f"## Accuracy\n\nOn held-out prompts ({held_out}), drawn as the rollouts were. ± one standard error, with "
            "prompts as the sampling unit: it says nothing of how runs from other seeds differ."
        )
        yield _table(ACCURACY_COLUMNS, rows)
    sets = [
        (str(entry.number), *cells)
        for entry in rounds
        for cells in set_rows(entry.sets)
        if cells[1] in ("base", "student", origin.policy)
    ]
    if sets:
        yield "On evaluation sets, each under a sampling of its own:"
        yield _table(("round", *SET_COLUMNS), sets)


def _facts(origin: Origin) -> list[tuple[str, str]]:
    configuration = origin.configuration
    base = configuration.get("policy") or _class_name(configuration.get("task")) or NO_VALUE
    facts = [("base policy", _shown(base))]
    facts += [(key.replace("_", " "), _shown(source)) for key, source in _sources(origin).items()]
    one_stage = configuration.get("last_stage") == "extreme_region"
    for stage in ["extreme_region"] if one_stage else ["extreme_region", "distill"]:
        section = configuration.get(stage)
        if isinstance(section, Mapping) and (found := _class_name(section.get("objective"))):
            facts.append((f"objective of {stage}", found))
    rounds = [entry for entry in origin.run.rounds if entry.number <= origin.round]
    rollouts = sum(entry.rollouts or 0 for entry in rounds)
    facts += [("rounds", str(origin.round)), ("verified rollouts", f"{rollouts:,}")]
    facts.append(("seed", NO_VALUE if origin.run.seed is None else str(origin.run.seed)))
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return [*facts, ("made with", versions or "versions that were not recorded")]


def _sources(origin: Origin) -> dict[str, Any]:
    """The prompts that were given, by their options' names."""
    data = origin.configuration.get("data")
    found = {key: data.get(key) for key in ("prompts", "validation_prompts")} if isinstance(data, Mapping) else {}
    return {key: source for key, source in found.items() if source is not None}


def _hub_name(source: Any) -> str | None:
    """The name of a model or data set on the hub, None for a file or folder."""
    named = source.get("path") if isinstance(source, Mapping) else source
    name = str(named).partition("?")[0]
    is_file = Path(name).exists() or Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet")
    return name if HUB_NAME.fullmatch(name) and not is_file and not name.startswith(".") else None


def _shown(source: Any) -> str:
    """A model or data set for strangers, whom the folders of a machine tell nothing."""
    if _hub_name(source):
        return source if isinstance(source, str) else json.dumps(source)
    named = source.get("path") if isinstance(source, Mapping) else source
    return Path(str(named)).name or NO_VALUE


def _class_name(settings: Any) -> str | None:
    path = settings.get("class_path") if isinstance(settings, Mapping) else settings
    return path.rpartition(".")[2] if isinstance(path, str) else None


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') or NO_VALUE for cell in line)} |" for line in lines)


def _loading(name: str) -> str:
    return f"""## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
