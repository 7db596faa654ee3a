"""The page of a report: one HTML file with everything in it, for light and dark, for desks and phones."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence

from ..data.samples import read_samples
from ..text import visible
from .measures import Estimate, Row, gain, kl_by_kind, kl_by_position, per_point, saved
from .plots import DARK, LIGHT, Draw, accuracy_of_round, accuracy_of_runs, by_kind, by_position, over_steps, validations
from .read import Log, Measured, Round, Run, in_order
from .style import STYLE

DETAILED_RUNS = 4
"""Runs that have a section of their own, which keeps a page below 2 MB."""

SHOWN_ROUNDS = 6
"""Rounds of a run, the last ones, that have a plot of their own."""

SHOWN_PROMPTS = 8
"""Prompts, the first ones, whose responses are shown."""

SHOWN_TOKENS = 300
"""Tokens of a response that are shown."""

LONG = 24
"""Characters from which on a name in a table is broken into lines."""

STEPS_OF_KL = (0.01, 0.1, 0.5, 2.0)
"""Where the colours of tokens change, in nats."""

BUDGETS, PRICES = "Budget asked for and spent", "Rollouts per point gained"

NOTHING = "—"


def page(runs: Sequence[Run]) -> str:
    """The report on some runs, the first of which is what it is about; the others are compared with it."""
    title = f"Report on {', '.join(visible(run.name) for run in runs)}"
    parts = [_overview(runs), _budgets(runs), _prices(runs)]
    parts += [_details(run) for run in runs[:DETAILED_RUNS]]
    if len(runs) > DETAILED_RUNS:
        left = ", ".join(visible(run.name) for run in runs[DETAILED_RUNS:])
        parts.append(_note(f"Only the first {DETAILED_RUNS} runs are shown in detail, not {left}."))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
{"".join(parts)}
</main>
</body>
</html>
"""


# Sections.


def _overview(runs: Sequence[Run]) -> str:
    measured = [row for run in runs for entry in run.rounds for row in entry.policies.values()]
    rows = [
        (run.name, _seed(run), str(entry.number), name, *_policy_cells(row))
        for run in runs
        for entry in run.rounds
        for name, row in entry.policies.items()
    ]
    kls = ("KL/token (nats)", "KL/token to first (nats)")
    columns = ("run", "seed", "round", "policy", "pass@1", "pass@k", *kls, "entropy (nats/token)", "length (tokens)")
    parts = [_state(runs), "<h2>Accuracy against KL</h2>"]
    if not measured:
        return "".join([*parts, _note("No policy has been evaluated yet.")])
    sizes = {(row["prompts"], row["samples_per_prompt"]) for row in measured}
    held_out = " or ".join(f"{samples:g} samples for each of {prompts:g} prompts" for prompts, samples in sorted(sizes))
    parts.append(
        _figure(
            lambda theme: accuracy_of_runs(runs, theme),
            "Accuracy against KL to the first policy: "
            + "; ".join(f"{run.name}: {_told(run)}" for run in runs if run.rounds),
            "Each line is a run, from its first base policy through the student of each round. "
            f"Hollow marks are the other policies of {runs[0].name}. pass@1 is the mean reward of fresh responses to "
            f"held-out prompts ({held_out}); KL is exact over the vocabulary, in nats per sampled token, drawn "
            "on the scale of its square root. Bars are one standard error, with prompts as the sampling unit: they say "
            "nothing of how runs from other seeds differ.",
        )
    )
    parts.append(_table("What was measured of each policy", columns, rows, words=4))
    bases = {run.rounds[0].base for run in runs if run.rounds} - {None}
    if len(bases) > 1:
        parts.append(_note("These runs started from different base policies: their accuracies are not comparable."))
    return "".join(parts)


def _state(runs: Sequence[Run]) -> str:
    """What the runs are, and how far they have come."""
    rows = []
    for run in runs:
        done = sum("student" in entry.policies for entry in run.rounds)
        wanted = len(run.rounds) if run.wanted is None else run.wanted
        state = "finished" if done >= wanted > 0 else "unfinished"
        seconds = f"{sum(entry.seconds for entry in run.rounds):.0f}"
        rows.append((run.name, str(run.path), _seed(run), f"{done} of {wanted}", state, seconds))
    return _table("Runs", ("run", "folder", "seed", "rounds done", "state", "seconds of its stages"), rows, words=2)


def _budgets(runs: Sequence[Run]) -> str:
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
                    _optional(entry.budget),
                    _estimate(_kl(student), 4),
                    _share(_kl(student), entry.budget),
                    _optional(entry.total_budget),
                    _share(_kl(student, "kl_per_token_to_first"), entry.total_budget),
                    _estimate(_kl(teacher), 4),
                    _percent(saved(student, teacher)) if student and teacher else NOTHING,
                )
            )
    caption = (
        "Budget and KL are to the round's base policy, those of all rounds to the first policy. What is spent is "
        "measured on the student's own fresh samples, the teacher's KL on the teacher's. ± one standard error."
    )
    return f"<h2>{BUDGETS}</h2>{_table(BUDGETS, columns, rows, caption)}" if rows else ""


def _prices(runs: Sequence[Run]) -> str:
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
            in_round = gain(base, student) if base and student else None
            so_far = gain(first, student) if first and student else None
            cells = (*_price(entry.rollouts, in_round), str(total), *_price(total, so_far))
            rows.append((run.name, str(entry.number), str(entry.rollouts), *cells))
    caption = (
        "A point is a hundredth of pass@1 on held-out prompts. Rollouts are verified samples. Gains of less than twice "
        "their standard error have no price. The standard error of a gain takes base policy and student for "
        "independent, though they answer the same prompts: if anything it is too large."
    )
    return f"<h2>{PRICES}</h2>{_table(PRICES, columns, rows, caption)}" if rows else ""


def _details(run: Run) -> str:
    parts = [f"<section><h2>{_text(visible(run.name))}</h2>"]
    drawn = [entry for entry in run.rounds if entry.policies or any(map(validations, entry.logs.values()))]
    if drawn:
        parts.append("<h3>Accuracy against KL within a round</h3>")
        if len(drawn) > SHOWN_ROUNDS:
            parts.append(_note(f"The last {SHOWN_ROUNDS} of {len(drawn)} rounds are drawn."))
        figures = [_round_figure(entry) for entry in drawn[-SHOWN_ROUNDS:]]
        parts.append(f'<div class="grid">{"".join(figures)}</div>')
    if any(entry.logs for entry in run.rounds):
        parts.append(_steps(run))
    else:
        parts.append(_note("No stage has left a metrics.csv: there is nothing to show over steps."))
    sampled = [entry for entry in run.rounds if entry.samples]
    parts.append(_of_samples(sampled[0], sampled[-1]) if sampled else _note(NO_SAMPLES))
    return "".join([*parts, "</section>"])


NO_SAMPLES = (
    "No samples.parquet lies beside its evaluations: KL by position and by kind of token, and samples before and "
    "after, are left out. Runs that were evaluated before it was kept have none; deleting a round's folder evaluation "
    "and running fit again makes it."
)


def _round_figure(entry: Round) -> str:
    told = "; ".join(f"{name} {_told_policy(row)}" for name, row in entry.policies.items())
    return _figure(
        lambda theme: accuracy_of_round(entry, theme),
        f"Round {entry.number}: accuracy against KL to the round's base policy: {told or 'policies in training'}",
        "Lines: from the base policy through the validations of training. Large marks: the policies that training "
        "left, with one standard error, on the same held-out prompts.",
    )


def _steps(run: Run) -> str:
    entropy = _figure(
        lambda theme: over_steps(run, "train/entropy", "val/entropy_per_token", "entropy (nats per token)", theme),
        f"Entropy over optimiser steps: {_told_logs(run, 'val/entropy_per_token')}",
        "Marks: on fresh samples for held-out prompts. Thin lines: on the stored responses of each training step, "
        "where it is logged.",
    )
    kl = _figure(
        lambda theme: over_steps(run, "train/kl", "val/kl_per_token", "KL (nats per token, root scale)", theme, True),
        f"KL to the round's base policy over optimiser steps: {_told_logs(run, 'val/kl_per_token')}",
        "KL to the round's base policy. Marks: on fresh samples, with one standard error. Thin lines: on the stored "
        "responses of each training step, where the objective has a KL term.",
    )
    return f'<h3>Entropy and KL over steps</h3><div class="grid">{entropy}{kl}</div>'


def _of_samples(first: Round, last: Round) -> str:
    """Where KL was spent in the last round that kept responses, and what changed from the first to it."""
    kept = {name: read_samples(last.samples[name]) for name in in_order(last.samples)}
    moved = {name: rows for name, rows in kept.items() if name != "base" and rows}
    parts = []
    if moved:
        parts += [_by_position(moved, last), _by_kind(moved, last)]
    if "base" in first.samples and "student" in kept:
        before = {f"base of round {first.number}": read_samples(first.samples["base"])}
        parts.append(_before_and_after(before, {f"student of round {last.number}": kept["student"]}))
    return "".join(parts)


def _counted(kept: Mapping[str, Sequence[Row]]) -> str:
    return "; ".join(
        f"{name}: {len(rows)} responses to {len({row['group'] for row in rows})} prompts" for name, rows in kept.items()
    )


def _by_position(kept: Mapping[str, Sequence[Row]], entry: Round) -> str:
    bins = {name: kl_by_position(rows) for name, rows in kept.items()}
    rows = [
        (name, str(b.first) if b.first == b.last else f"{b.first} to {b.last}", str(b.responses), _estimate(b.kl, 4))
        for name, found in bins.items()
        for b in found
    ]
    highest = {name: max(found, key=lambda b: b.kl.value) for name, found in bins.items() if found}
    told = "; ".join(f"{name} highest at {b.first} with {_estimate(b.kl, 3)} nats" for name, b in highest.items())
    figure = _figure(
        lambda theme: by_position(bins, theme),
        f"KL by position: {told}",
        f"Mean KL to the base policy of round {entry.number} at each position (the first token is 1), over the "
        f"responses that reach it; below, how many do. Bands are one standard error, by prompts. From the kept first "
        f"responses ({_counted(kept)}).",
    )
    columns = ("policy", "position", "responses that reach it", "KL (nats/token)")
    table = _table("KL by position", columns, rows)
    heading = f"<h3>KL by position, round {entry.number}</h3>"
    return f"{heading}{figure}<details><summary>As a table</summary>{table}</details>"


def _by_kind(kept: Mapping[str, Sequence[Row]], entry: Round) -> str:
    kinds = {name: kl_by_kind(rows) for name, rows in kept.items()}
    teacher = {kind.name: kind.kl for kind in kinds.get("teacher", [])}
    rows = []
    for name, found in kinds.items():
        for kind in found:
            before = teacher.get(kind.name)
            without = NOTHING
            if name == "student" and before is not None and before.value > 0:
                without = _percent(Estimate(1 - kind.kl.value / before.value, math.nan))
            cells = (str(kind.tokens), _estimate(kind.kl, 4), _percent(Estimate(kind.share, math.nan)), without)
            rows.append((name, kind.name, *cells))
    told = "; ".join(
        f"{name}: " + ", ".join(f"{kind.name} {kind.kl.value:.3f}" for kind in found) for name, found in kinds.items()
    )
    figure = _figure(
        lambda theme: by_kind(kinds, theme),
        f"KL by kind of token in nats: {told}",
        "Mean KL at the tokens of each kind, by the Unicode category of the token that was drawn there; special "
        "tokens are those that the tokenizer calls so, such as the end of the sequence. Bars are one standard error, "
        "by prompts. From the same responses.",
    )
    columns = ("policy", "kind", "tokens", "KL (nats/token)", "share of its KL", "done without, of the teacher's")
    table = _table("KL by kind of token", columns, rows, words=2)
    return f"<h3>KL by kind of token, round {entry.number}</h3>{figure}{table}"


def _before_and_after(before: Mapping[str, Sequence[Row]], after: Mapping[str, Sequence[Row]]) -> str:
    """The first response of two policies to each of the first prompts."""
    firsts = {name: {row["group"]: row for row in reversed(rows)} for name, rows in {**before, **after}.items()}
    old, new = firsts.values()
    shared = [group for group in sorted(old.keys() & new.keys()) if old[group]["prompt"] == new[group]["prompt"]]
    blocks = [
        f'<article class="sample"><p class="prompt"><bdi>{_lines(old[group]["prompt"])}</bdi></p>'
        f'<p class="answer">right answer: <bdi>{_lines(old[group]["answer"])}</bdi></p>'
        f"{''.join(_response(name, rows[group]) for name, rows in firsts.items())}</article>"
        for group in shared[:SHOWN_PROMPTS]
    ]
    steps = ["below 0.01", "to 0.1", "to 0.5", "to 2", "2 and more"]
    legend = " ".join(f'<span class="k{level}">{step}</span>' for level, step in enumerate(steps))
    return (
        "<h3>Samples before and after</h3>"
        "<p>The first response of each policy to the first held-out prompts, not picked. The colour of a token is the "
        f"KL to the base policy of its round, where it was drawn, in nats: {legend}</p>"
        f"{''.join(blocks) or _note('They have no prompt in common.')}"
    )


def _response(name: str, row: Row) -> str:
    verdict = "could not be checked" if not row["checked"] else f"reward {row['reward']:g}"
    cut = ", cut off" if row["finish_reason"] == "length" else ""
    tokens = list(zip(row["token_texts"], row["kls"], strict=True))
    spans = [_token(text, kl) for text, kl in tokens[:SHOWN_TOKENS]]
    more = f" <i>… {len(tokens) - SHOWN_TOKENS} more tokens</i>" if len(tokens) > SHOWN_TOKENS else ""
    total = sum(max(kl, 0.0) for _, kl in tokens)
    return (
        f'<p class="response"><b>{name}</b> <small>{verdict}{cut}, {len(tokens)} tokens, {total:.2f} nats</small><br>'
        f'<bdi class="tokens">{"".join(spans)}</bdi>{more}</p>'
    )


def _token(text: str, kl: float) -> str:
    level = sum(kl >= step for step in STEPS_OF_KL)
    return f'<span class="k{level}" title="{max(kl, 0.0):.3f} nats">{_lines(text)}</span>'


# Pieces.


def _figure(draw: Draw, alt: str, caption: str) -> str:
    light, dark = (base64.b64encode(draw(theme)).decode() for theme in (LIGHT, DARK))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{_text(visible(alt))}" src="data:image/png;base64,{light}"></picture>'
        f"<figcaption>{_text(visible(caption))}</figcaption></figure>"
    )


def _table(label: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", words: int = 1) -> str:
    """A table in a container that scrolls by itself; the first columns are words, the others numbers."""
    heads = (f"<th{_kind(i < words)} scope=col>{_text(column)}</th>" for i, column in enumerate(columns))
    lines = (
        "".join(f"<td{_kind(i < words, len(cell))}>{_text(visible(cell))}</td>" for i, cell in enumerate(row))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    below = f'<p class="caption">{_text(caption)}</p>' if caption else ""
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{_text(label)}">'
        f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>{below}"
    )


def _kind(word: bool, length: int = 0) -> str:
    """The class of a cell: numbers stay on their line, long names do not."""
    if not word:
        return ""
    return ' class="word long"' if length > LONG else ' class="word"'


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _lines(text: str) -> str:
    """Text from a policy or a data set: nothing in it is unseen, and its line breaks show."""
    return _text(visible(text, lines=True)).replace("\n", "⏎\n")


def _policy_cells(row: Measured) -> tuple[str, ...]:
    return (
        _estimate(Estimate(row["pass@1"], row["pass@1_stderr"]), 3),
        f"{row['pass@k']:.3f}",
        _estimate(_kl(row), 4),
        _estimate(_kl(row, "kl_per_token_to_first"), 4),
        f"{row['entropy_per_token']:.3f}",
        f"{row['mean_length']:.1f}",
    )


def _price(rollouts: int, gained: Estimate | None) -> tuple[str, str]:
    """Points gained and what one took."""
    if gained is None:
        return NOTHING, NOTHING
    price = per_point(rollouts, gained)
    return _estimate(gained, 1), "no clear gain" if price is None else _estimate(price, 0)


def _kl(row: Measured | None, name: str = "kl_per_token") -> Estimate | None:
    return None if row is None else Estimate(max(row[name], 0.0), row[f"{name}_stderr"])


def _estimate(found: Estimate | None, digits: int) -> str:
    if found is None:
        return NOTHING
    stderr = f" ± {found.stderr:.{digits}f}" if math.isfinite(found.stderr) else ""
    return f"{found.value:.{digits}f}{stderr}"


def _percent(found: Estimate | None) -> str:
    if found is None or not math.isfinite(found.value):
        return NOTHING
    stderr = f" ± {100 * found.stderr:.1f}" if math.isfinite(found.stderr) else ""
    return f"{100 * found.value:.1f}{stderr} %"


def _share(spent: Estimate | None, budget: float | None) -> str:
    if spent is None or not budget:
        return NOTHING
    return _percent(Estimate(spent.value / budget, spent.stderr / budget))


def _optional(number: float | None) -> str:
    return NOTHING if number is None else f"{number:.4g}"


def _seed(run: Run) -> str:
    return NOTHING if run.seed is None else str(run.seed)


def _told(run: Run) -> str:
    chain = [entry.policies["student"] for entry in run.rounds if "student" in entry.policies]
    return "no student yet" if not chain else f"student {_told_policy(chain[-1], 'kl_per_token_to_first')}"


def _told_policy(row: Measured, kl: str = "kl_per_token") -> str:
    return f"pass@1 {row['pass@1']:.3f} at {max(row[kl], 0.0):.4f} nats"


def _told_logs(run: Run, metric: str) -> str:
    """Where a metric began and ended, for readers who do not see the plot."""

    def ends(log: Log) -> str:
        values = list(log[metric].values())
        return f"{values[0]:.3f} to {values[-1]:.3f}"

    told = [
        f"round {entry.number} {name} {ends(log)}"
        for entry in run.rounds
        for name, log in entry.logs.items()
        if metric in log
    ]
    return "; ".join(told) or "none on fresh samples"
