"""The part of the report on kept responses: KL by position and by kind of token, and responses before and after."""

import math
from collections.abc import Mapping, Sequence

from ..data.samples import read_samples
from .cells import NO_VALUE, estimate_text, percent_text
from .markup import figure, multiline, note, table
from .measures import Estimate, Row, kl_by_kind, kl_by_position
from .plots import by_kind, by_position
from .read import Round, ordered_policies

MAX_SHOWN_PROMPTS = 8
"""Number of prompts, the first ones, whose responses are shown."""

MAX_SHOWN_TOKENS = 300
"""Number of tokens of a response that are shown."""

KL_COLOUR_BOUNDS = (0.01, 0.1, 0.5, 2.0)
"""Bounds between the colours of tokens, in nats."""


def sample_section(first: Round, last: Round) -> str:
    """KL by position and by kind of token in the last round that kept responses, and responses of first and last."""
    responses = {name: read_samples(last.samples[name]) for name in ordered_policies(last.samples)}
    trained = {name: rows for name, rows in responses.items() if name != "base" and rows}
    parts = []
    if trained:
        parts += [_position_section(trained, last), _kind_section(trained, last)]
    if "base" in first.samples and "student" in responses:
        before = {f"base of round {first.number}": read_samples(first.samples["base"])}
        parts.append(_response_comparison(before, {f"student of round {last.number}": responses["student"]}))
    return "".join(parts)


def _response_counts(responses: Mapping[str, Sequence[Row]]) -> str:
    """Number of responses and prompts of each policy."""
    return "; ".join(
        f"{name}: {len(rows)} responses to {len({row['group'] for row in rows})} prompts"
        for name, rows in responses.items()
    )


def _position_section(responses: Mapping[str, Sequence[Row]], entry: Round) -> str:
    """KL at each position, as a plot and as a table."""
    bins = {name: kl_by_position(rows) for name, rows in responses.items()}
    rows = [
        (
            name,
            str(b.first) if b.first == b.last else f"{b.first} to {b.last}",
            str(b.responses),
            estimate_text(b.kl, 4),
        )
        for name, found in bins.items()
        for b in found
    ]
    highest = {name: max(found, key=lambda b: b.kl.value) for name, found in bins.items() if found}
    description = "; ".join(
        f"{name} highest at {b.first} with {estimate_text(b.kl, 3)} nats" for name, b in highest.items()
    )
    drawing = figure(
        lambda theme: by_position(bins, theme),
        f"KL by position: {description}",
        f"Mean KL to the base policy of round {entry.number} at each position (the first token is 1), over the "
        f"responses that reach it; below, how many do. Bands are one standard error, by prompts. From the kept first "
        f"responses ({_response_counts(responses)}).",
    )
    columns = ("policy", "position", "responses that reach it", "KL (nats/token)")
    cells = table("KL by position", columns, rows)
    heading = f"<h3>KL by position, round {entry.number}</h3>"
    return f"{heading}{drawing}<details><summary>As a table</summary>{cells}</details>"


def _kind_section(responses: Mapping[str, Sequence[Row]], entry: Round) -> str:
    """KL at the tokens of each kind, as a plot and as a table."""
    kinds = {name: kl_by_kind(rows) for name, rows in responses.items()}
    teacher = {kind.name: kind.kl for kind in kinds.get("teacher", [])}
    rows = []
    for name, found in kinds.items():
        for kind in found:
            before = teacher.get(kind.name)
            without = NO_VALUE
            if name == "student" and before is not None and before.value > 0:
                without = percent_text(Estimate(1 - kind.kl.value / before.value, math.nan))
            share = percent_text(Estimate(kind.share, math.nan))
            rows.append((name, kind.name, str(kind.tokens), estimate_text(kind.kl, 4), share, without))
    description = "; ".join(
        f"{name}: " + ", ".join(f"{kind.name} {kind.kl.value:.3f}" for kind in found) for name, found in kinds.items()
    )
    drawing = figure(
        lambda theme: by_kind(kinds, theme),
        f"KL by kind of token in nats: {description}",
        "Mean KL at the tokens of each kind, by the Unicode category of the token that was drawn there; special "
        "tokens are those that the tokenizer calls so, such as the end of the sequence. Bars are one standard error, "
        "by prompts. From the same responses.",
    )
    columns = ("policy", "kind", "tokens", "KL (nats/token)", "share of its KL", "done without, of the teacher's")
    cells = table("KL by kind of token", columns, rows, words=2)
    return f"<h3>KL by kind of token, round {entry.number}</h3>{drawing}{cells}"


def _response_comparison(before: Mapping[str, Sequence[Row]], after: Mapping[str, Sequence[Row]]) -> str:
    """The first response of two policies to each of the first prompts."""
    firsts = {name: {row["group"]: row for row in reversed(rows)} for name, rows in {**before, **after}.items()}
    old, new = firsts.values()
    shared = [group for group in sorted(old.keys() & new.keys()) if old[group]["prompt"] == new[group]["prompt"]]
    blocks = [
        f'<article class="sample"><p class="prompt"><bdi>{multiline(old[group]["prompt"])}</bdi></p>'
        f'<p class="answer">correct answer: <bdi>{multiline(old[group]["answer"])}</bdi></p>'
        f"{''.join(_response(name, rows[group]) for name, rows in firsts.items())}</article>"
        for group in shared[:MAX_SHOWN_PROMPTS]
    ]
    steps = ["below 0.01", "to 0.1", "to 0.5", "to 2", "2 and more"]
    legend = " ".join(f'<span class="k{level}">{step}</span>' for level, step in enumerate(steps))
    return (
        "<h3>Samples before and after</h3>"
        "<p>The first response of each policy to the first held-out prompts, not picked. The colour of a token is the "
        f"KL to the base policy of its round, where it was drawn, in nats: {legend}</p>"
        f"{''.join(blocks) or note('They have no prompt in common.')}"
    )


def _response(name: str, row: Row) -> str:
    verdict = "could not be checked" if not row["checked"] else f"reward {row['reward']:g}"
    cut = ", cut off" if row["finish_reason"] == "length" else ""
    tokens = list(zip(row["token_texts"], row["kls"], strict=True))
    spans = [_token(text, kl) for text, kl in tokens[:MAX_SHOWN_TOKENS]]
    more = f" <i>… {len(tokens) - MAX_SHOWN_TOKENS} more tokens</i>" if len(tokens) > MAX_SHOWN_TOKENS else ""
    total = sum(max(kl, 0.0) for _, kl in tokens)
    return (
        f'<p class="response"><b>{name}</b> <small>{verdict}{cut}, {len(tokens)} tokens, {total:.2f} nats</small><br>'
        f'<bdi class="tokens">{"".join(spans)}</bdi>{more}</p>'
    )


def _token(text: str, kl: float) -> str:
    level = sum(kl >= bound for bound in KL_COLOUR_BOUNDS)
    return f'<span class="k{level}" title="{max(kl, 0.0):.3f} nats">{multiline(text)}</span>'
