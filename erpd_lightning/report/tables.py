"""Tables for a person at a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..text import aligned, visible
from .measures import accuracy_gain, rollouts_per_point
from .read import Run

SUMMARY_COLUMNS = (
    "round",
    "policy",
    "pass@1",
    "pass@k",
    "KL/token",
    "KL/response",
    "KL/token to first",
    "entropy",
    "rollouts",
    "seconds",
)

PREVIEW_COLUMNS = (
    "candidate",
    "budget",
    "beta",
    "KL on stored states",
    "pass@1",
    "KL/token",
    "entropy",
    "length",
    "samples",
)


REPORT_COLUMNS = (
    "run",
    "seed",
    "round",
    "policy",
    "pass@1",
    "KL/token",
    "KL/token to first",
    "of budget",
    "rollouts",
    "rollouts/point",
)


SET_COLUMNS = ("set", "policy", "avg@k", "pass@k", "majority@k", "k", "prompts", "length", "truncated", "unchecked")


def format_summary(summary: dict[str, Any]) -> str:
    """Table of a `summary.json`: a line for each policy of each round, and the budgets below.

    KL in nats against the round's base policy, measured on fresh samples; entropy in nats per token.
    """
    rows: list[tuple[str, ...]] = [SUMMARY_COLUMNS]
    for entry in summary["rounds"]:
        for name, measured in entry["policies"].items():
            last = name == "student"
            rows.append(
                (
                    str(entry["round"]),
                    name,
                    f"{measured['pass@1']:.3f} ± {measured['pass@1_stderr']:.3f}",
                    f"{measured['pass@k']:.3f}",
                    f"{measured['kl_per_token']:.4f} ± {measured['kl_per_token_stderr']:.4f}",
                    f"{measured['kl_per_response']:.2f}",
                    f"{measured['kl_per_token_to_first']:.4f}",
                    f"{measured['entropy_per_token']:.3f}",
                    str(entry["rollouts_total"]) if last else "",
                    f"{entry['seconds']:.0f}" if last else "",
                )
            )
    parts = [aligned(rows), *(_budget_line(entry) for entry in summary["rounds"])]
    for entry in summary["rounds"]:
        if sets := entry.get("evaluation_sets"):
            parts += [f"Round {entry['round']}, evaluation sets, each under its own sampling:", format_sets(sets)]
    return "\n".join(parts)


def format_sets(sets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Table of evaluation sets: a line for each policy on each set, with standard errors; length in tokens.

    Args:
        sets: What was measured, by the names of sets and of policies.
    """
    return aligned([SET_COLUMNS, *set_rows(sets)])


def set_rows(sets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """The cells of `SET_COLUMNS`; an empty one for what was not measured."""
    return [
        (
            name,
            policy,
            *(_with_error(row, key) for key in ("avg@k", "pass@k", "majority@k")),
            f"{row['samples_per_prompt']:g}",
            f"{row['prompts']:g}",
            f"{row['mean_length']:.1f}",
            *(f"{row[key]:.3f}" for key in ("truncated", "unchecked")),
        )
        for name, policies in sets.items()
        for policy, row in policies.items()
    ]


def _with_error(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.3f} ± {row[f'{key}_stderr']:.3f}" if key in row else ""


def format_preview(previews: Sequence[Mapping[str, Any]], policies: Mapping[str, Mapping[str, Any]]) -> str:
    """Table of a `preview.json`: a line for each candidate, and below them the policies that were evaluated.

    KL in nats against the round's base policy; entropy in nats per token, length in tokens.
    """
    rows: list[tuple[str, ...]] = [PREVIEW_COLUMNS]
    for row in previews:
        solved = (_number(row["budget"]), f"{row['beta']:.4g}", f"{row['kl_on_stored_states']:.4f}")
        rows.append((row["candidate"], *solved, *_evaluation_cells(row), str(row["samples"])))
    for name, row in policies.items():
        samples = str(row["prompts"] * row["samples_per_prompt"])
        rows.append((name, "", "", "", *_evaluation_cells(row), samples))
    return aligned(rows)


def format_report(runs: Sequence[Run]) -> str:
    """Short table of a report: a line for the first policy of each run and for the student of each round.

    KL in nats per token; rollouts, all so far, for each point (hundredth) of pass@1 gained so far.
    """
    rows: list[tuple[str, ...]] = [REPORT_COLUMNS]
    for run in runs:
        total = 0
        for entry in run.rounds:
            total += entry.rollouts or 0
            start = (visible(run.name), "" if run.seed is None else str(run.seed), str(entry.number))
            first, student = run.rounds[0].policies.get("base"), entry.policies.get("student")
            if first is not None and entry is run.rounds[0]:
                rows.append((*start, "base", *_report_cells(first), "", "", ""))
            if student is not None:
                price = None if first is None else rollouts_per_point(total, accuracy_gain(first, student))
                spent = f"{student['kl_per_token'] / entry.budget:.0%}" if entry.budget else ""
                cost = f"{price.value:.0f}" if price else ""
                rows.append((*start, "student", *_report_cells(student), spent, str(total), cost))
    return aligned(rows)


def _report_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    to_first = f"{max(row['kl_per_token_to_first'], 0.0):.4f} ± {row['kl_per_token_to_first_stderr']:.4f}"
    return (*_evaluation_cells(row)[:2], to_first)


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _evaluation_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['pass@1']:.3f} ± {row['pass@1_stderr']:.3f}",
        f"{row['kl_per_token']:.4f} ± {row['kl_per_token_stderr']:.4f}",
        f"{row['entropy_per_token']:.3f}",
        f"{row['mean_length']:.1f}",
    )


def _budget_line(entry: dict[str, Any]) -> str:
    spent = entry["policies"]["student"]["kl_per_token"]
    if entry["beta"] is None:
        return f"Round {entry['round']}: no budget, {spent:.4f} nats per token spent"
    if entry["budget"] is None:
        return f"Round {entry['round']}: beta {entry['beta']:.4g} given, {spent:.4f} nats per token spent"
    effective = entry.get("effective_budget") or entry["budget"]
    left = f", min_beta left {effective:.4f}" if effective < entry["budget"] else ""
    line = (
        f"Round {entry['round']}: budget {entry['budget']:.4g} nats per token{left}, {spent:.4f} spent "
        f"({spent / entry['budget']:.0%}), beta {entry['beta']:.4g}"
    )
    if "signal" in entry:
        line = f"{line}, signal {entry['signal']}"
    if entry.get("total_budget") is None:
        return line
    total = entry["policies"]["student"]["kl_per_token_to_first"]
    return f"{line}; of {entry['total_budget']:.4g} in all rounds {total:.4f} ({total / entry['total_budget']:.0%})"
