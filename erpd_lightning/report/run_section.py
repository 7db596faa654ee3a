"""The section of the report on one run: accuracy, entropy and KL in training, and its responses."""

from ..text import visible
from .cells import policy_text
from .markup import escaped, figure, note
from .plots import accuracy_of_round, over_steps, validations
from .read import Log, Round, Run
from .sample_section import sample_section

MAX_SHOWN_ROUNDS = 6
"""Number of rounds of a run, the last ones, that have a plot of their own."""

NO_SAMPLES = (
    "No samples.parquet lies beside its evaluations: KL by position and by kind of token, and samples before and "
    "after, are left out. Runs that were evaluated before it was kept have none; deleting a round's folder evaluation "
    "and running fit again makes it."
)


def run_section(run: Run) -> str:
    """HTML section on one run."""
    parts = [f"<section><h2>{escaped(visible(run.name))}</h2>"]
    drawn = [entry for entry in run.rounds if entry.policies or any(map(validations, entry.logs.values()))]
    if drawn:
        parts.append("<h3>Accuracy against KL within a round</h3>")
        if len(drawn) > MAX_SHOWN_ROUNDS:
            parts.append(note(f"The last {MAX_SHOWN_ROUNDS} of {len(drawn)} rounds are drawn."))
        figures = [_round_figure(entry) for entry in drawn[-MAX_SHOWN_ROUNDS:]]
        parts.append(f'<div class="grid">{"".join(figures)}</div>')
    if any(entry.logs for entry in run.rounds):
        parts.append(_step_figures(run))
    else:
        parts.append(note("No stage has left a metrics.csv: there is nothing to show over steps."))
    sampled = [entry for entry in run.rounds if entry.samples]
    parts.append(sample_section(sampled[0], sampled[-1]) if sampled else note(NO_SAMPLES))
    return "".join([*parts, "</section>"])


def _round_figure(entry: Round) -> str:
    policies = "; ".join(f"{name} {policy_text(row)}" for name, row in entry.policies.items())
    return figure(
        lambda theme: accuracy_of_round(entry, theme),
        f"Round {entry.number}: accuracy against KL to the round's base policy: {policies or 'policies in training'}",
        "Lines: from the base policy through the validations of training. Large marks: the policies that training "
        "left, with one standard error, on the same held-out prompts.",
    )


def _step_figures(run: Run) -> str:
    entropy = figure(
        lambda theme: over_steps(run, "train/entropy", "val/entropy_per_token", "entropy (nats per token)", theme),
        f"Entropy over optimiser steps: {_log_text(run, 'val/entropy_per_token')}",
        "Marks: on fresh samples for held-out prompts. Thin lines: on the stored responses of each training step, "
        "where it is logged.",
    )
    kl = figure(
        lambda theme: over_steps(run, "train/kl", "val/kl_per_token", "KL (nats per token, root scale)", theme, True),
        f"KL to the round's base policy over optimiser steps: {_log_text(run, 'val/kl_per_token')}",
        "KL to the round's base policy. Marks: on fresh samples, with one standard error. Thin lines: on the stored "
        "responses of each training step, where the objective has a KL term.",
    )
    return f'<h3>Entropy and KL over steps</h3><div class="grid">{entropy}{kl}</div>'


def _log_text(run: Run, metric: str) -> str:
    """Where a metric began and ended, for readers who do not see the plot."""

    def ends(log: Log) -> str:
        values = list(log[metric].values())
        return f"{values[0]:.3f} to {values[-1]:.3f}"

    description = [
        f"round {entry.number} {name} {ends(log)}"
        for entry in run.rounds
        for name, log in entry.logs.items()
        if metric in log
    ]
    return "; ".join(description) or "none on fresh samples"
