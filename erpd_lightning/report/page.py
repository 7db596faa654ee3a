"""The page of a report: one HTML file with everything in it, for light and dark, for desks and phones."""

from collections.abc import Sequence

from ..text import visible
from .cells import (
    NO_VALUE,
    budget_share_text,
    estimate_text,
    kl_estimate,
    number_text,
    percent_text,
    policy_cells,
    policy_text,
    price_cells,
    seed_text,
)
from .markup import escaped, figure, note, table
from .measures import accuracy_gain, kl_saving
from .plots import accuracy_of_runs
from .read import Run
from .run_section import run_section
from .style import STYLE
from .tables import SET_COLUMNS, set_rows

MAX_DETAILED_RUNS = 4
"""Number of runs that have a section of their own, which keeps a page below 2 MB."""

SET_HEADING = "Evaluation sets"
BUDGET_HEADING, PRICE_HEADING = "Budget asked for and spent", "Rollouts per point gained"


def page(runs: Sequence[Run]) -> str:
    """HTML page on some runs; the first is the main one, with which the others are compared."""
    title = f"Report on {', '.join(visible(run.name) for run in runs)}"
    parts = [_overview(runs), _set_table(runs), _budget_table(runs), _price_table(runs)]
    parts += [run_section(run) for run in runs[:MAX_DETAILED_RUNS]]
    if len(runs) > MAX_DETAILED_RUNS:
        left = ", ".join(visible(run.name) for run in runs[MAX_DETAILED_RUNS:])
        parts.append(note(f"Only the first {MAX_DETAILED_RUNS} runs are shown in detail, not {left}."))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
{"".join(parts)}
</main>
</body>
</html>
"""


def _overview(runs: Sequence[Run]) -> str:
    """Table of the runs, plot of accuracy against KL, and table of all evaluations."""
    measured = [row for run in runs for entry in run.rounds for row in entry.policies.values()]
    rows = [
        (run.name, seed_text(run.seed), str(entry.number), name, *policy_cells(row))
        for run in runs
        for entry in run.rounds
        for name, row in entry.policies.items()
    ]
    kls = ("KL/token (nats)", "KL/token to first (nats)")
    columns = ("run", "seed", "round", "policy", "pass@1", "pass@k", *kls, "entropy (nats/token)", "length (tokens)")
    parts = [_run_table(runs), "<h2>Accuracy against KL</h2>"]
    if not measured:
        return "".join([*parts, note("No policy has been evaluated yet.")])
    sizes = {(row["prompts"], row["samples_per_prompt"]) for row in measured}
    held_out = " or ".join(f"{samples:g} samples for each of {prompts:g} prompts" for prompts, samples in sorted(sizes))
    parts.append(
        figure(
            lambda theme: accuracy_of_runs(runs, theme),
            "Accuracy against KL to the first policy: "
            + "; ".join(f"{run.name}: {_run_text(run)}" for run in runs if run.rounds),
            "Each line is a run, from its first base policy through the student of each round. "
            f"Hollow marks are the other policies of {runs[0].name}. pass@1 is the mean reward of fresh responses to "
            f"held-out prompts ({held_out}); KL is exact over the vocabulary, in nats per sampled token, drawn "
            "on the scale of its square root. Bars are one standard error, with prompts as the sampling unit: they say "
            "nothing of how runs from other seeds differ.",
        )
    )
    parts.append(table("What was measured of each policy", columns, rows, words=4))
    bases = {run.rounds[0].base for run in runs if run.rounds} - {None}
    if len(bases) > 1:
        parts.append(note("These runs started from different base policies: their accuracies are not comparable."))
    return "".join(parts)


def _set_table(runs: Sequence[Run]) -> str:
    """Table of the evaluations on sets beside the held-out prompts."""
    rows = [
        (run.name, str(entry.number), *(cell or NO_VALUE for cell in cells))
        for run in runs
        for entry in run.rounds
        for cells in set_rows(entry.sets)
    ]
    caption = (
        "k is the number of responses to a prompt. Each set has a sampling of its own, under which no KL is measured: "
        "that above is of the rollouts' sampling. ± one standard error, with prompts as the sampling unit."
    )
    columns = ("run", "round", *SET_COLUMNS)
    return f"<h2>{SET_HEADING}</h2>{table(SET_HEADING, columns, rows, caption, words=4)}" if rows else ""


def _run_table(runs: Sequence[Run]) -> str:
    """Table of the runs: where they are, and how many rounds are done."""
    rows = []
    for run in runs:
        done = sum("student" in entry.policies for entry in run.rounds)
        planned = len(run.rounds) if run.planned_rounds is None else run.planned_rounds
        state = "finished" if done >= planned > 0 else "unfinished"
        seconds = f"{sum(entry.seconds for entry in run.rounds):.0f}"
        rows.append((run.name, str(run.path), seed_text(run.seed), f"{done} of {planned}", state, seconds))
    return table("Runs", ("run", "folder", "seed", "rounds done", "state", "seconds of its stages"), rows, words=2)


def _budget_table(runs: Sequence[Run]) -> str:
    """Table of the KL budget of each round and what was spent of it."""
    columns = (
        "run",
        "round",
        "budget (nats/token)",
        "spent (nats/token)",
        "spent of it",
        "budget of all rounds",
        "spent of that",
        "teacher's KL (nats/token)",
        "teacher's KL that the student did without",
    )
    rows = []
    for run in runs:
        for entry in run.rounds:
            student, teacher = entry.policies.get("student"), entry.policies.get("teacher")
            rows.append(
                (
                    run.name,
                    str(entry.number),
                    number_text(entry.budget),
                    estimate_text(kl_estimate(student), 4),
                    budget_share_text(kl_estimate(student), entry.budget),
                    number_text(entry.total_budget),
                    budget_share_text(kl_estimate(student, "kl_per_token_to_first"), entry.total_budget),
                    estimate_text(kl_estimate(teacher), 4),
                    percent_text(kl_saving(student, teacher)) if student and teacher else NO_VALUE,
                )
            )
    caption = (
        "Budget and KL are to the round's base policy, those of all rounds to the first policy. What is spent is "
        "measured on the student's own fresh samples, the teacher's KL on the teacher's. ± one standard error."
    )
    return f"<h2>{BUDGET_HEADING}</h2>{table(BUDGET_HEADING, columns, rows, caption)}" if rows else ""


def _price_table(runs: Sequence[Run]) -> str:
    """Table of the rollouts that a point of accuracy took."""
    columns = (
        "run",
        "round",
        "rollouts",
        "points gained",
        "rollouts per point",
        "rollouts so far",
        "points gained so far",
        "rollouts per point so far",
    )
    rows = []
    for run in runs:
        total = 0
        for entry in run.rounds:
            if entry.rollouts is None:
                continue
            total += entry.rollouts
            first, base = run.rounds[0].policies.get("base"), entry.policies.get("base")
            student = entry.policies.get("student")
            in_round = accuracy_gain(base, student) if base and student else None
            so_far = accuracy_gain(first, student) if first and student else None
            cells = (*price_cells(entry.rollouts, in_round), str(total), *price_cells(total, so_far))
            rows.append((run.name, str(entry.number), str(entry.rollouts), *cells))
    caption = (
        "A point is a hundredth of pass@1 on held-out prompts. Rollouts are verified samples. Gains of less than twice "
        "their standard error have no price. The standard error of a gain takes base policy and student for "
        "independent, though they answer the same prompts: if anything it is too large."
    )
    return f"<h2>{PRICE_HEADING}</h2>{table(PRICE_HEADING, columns, rows, caption)}" if rows else ""


def _run_text(run: Run) -> str:
    """Accuracy and KL of the last student, for readers who do not see the plot."""
    chain = [entry.policies["student"] for entry in run.rounds if "student" in entry.policies]
    return "no student yet" if not chain else f"student {policy_text(chain[-1], 'kl_per_token_to_first')}"
