"""What came of a round's rollouts: the line that ends the stage, its warnings, and what its record keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ..data.audit import Audit, audit
from ..data.import_data import DISAGREEMENTS, disagreements
from ..data.rescoring import rescored_store
from ..data.reward_parts import mean_parts
from ..data.rollouts import RolloutDataModule
from ..data.store import Store
from ..errors import UserError
from .records import Record, fingerprint_of

FEW = 0.05
"""Share of correct responses below which, and share of incorrect ones below which, there is little to compare."""

MANY_TRUNCATED = 0.1


def rollouts_outcome(
    data: RolloutDataModule, paths: Sequence[Path], steps: int | None = None, stop: Mapping[str, float] | None = None
) -> tuple[Record, list[str]]:
    """What a record says of rollouts, and what the user is to be told of them.

    Args:
        data: The data module that sampled them.
        paths: Directories of their stores; of imported rollouts there is one.
        steps: Optimiser steps of an epoch on them; None where nobody knows.
        stop: Above which values the run is to stop, by the names of `audit.MEASURES`.

    Raises:
        UserError: If a measure is.
    """
    stores = [Store.open(path, verify=False) for path in paths]
    found = audit(stores, data.correct_threshold)
    told = [summary_line(found, steps)]
    if (line := advice(found, data.baseline)) is not None:
        told.append(line)
    recorded = disagreements(paths[0])
    if recorded is not None:
        listed = f": {paths[0] / DISAGREEMENTS} lists them" if recorded.different else ""
        told.append(
            f"recorded scores and verifier disagree on {recorded.different} of {recorded.compared} responses{listed}"
        )
    warnings = found.exceeded(data.audit_warn)
    told += [f"warning: {line}" for line in warnings]
    if stops := found.exceeded(stop or {}):
        raise UserError(f"{paths[0]}: {stops[0]}; they are kept, and the run goes on where data.audit_stop allows it")
    parts = [store.fingerprint for each in stores for store in (each, rescored_store(each)) if store is not None]
    record = {
        "fingerprint": fingerprint_of(parts),
        "rollouts": found.responses,
        "unchecked": round(found.unscorable * found.responses),
        "mean_reward": found.mean_reward,
        "optimizer_steps": steps,
        "audit": asdict(found),
        "warnings": warnings,
        "mean_rewards": mean_parts(table for store in stores for table in store.batches(["rewards"])),
        "recorded_rewards": None if recorded is None else asdict(recorded),
    }
    return record, told


def summary_line(found: Audit, steps: int | None = None) -> str:
    """Rollouts in a line."""
    correct = "none could be checked" if found.correct is None else f"{found.correct:.1%} correct"
    line = (
        f"{found.responses} responses: {correct}, {found.truncated:.1%} truncated, {found.unscorable:.1%} unscorable; "
        f"{found.mixed_groups} of {found.groups} groups mixed"
    )
    if steps is not None:
        line += f"; {steps} optimiser step{'s' * (steps != 1)} an epoch"
    if (gap := found.sampler_gap) is not None:
        line += (
            f"; sampler and trainer differ by {gap.mean:.2g} nats a token on average, by {gap.p999:.2g} at the 99.9th "
            f"percentile and by {gap.worst:.2g} at most"
        )
    return line


def advice(found: Audit, baseline: str) -> str | None:
    """What to try where the rewards say little; None where they say enough."""
    if found.correct is None:
        return "no response could be checked: look at the answers and at data.verifier"
    if FEW <= found.correct <= 1 - FEW:
        return None
    across_groups = "data.baseline: batch, which also compares the rewards of different prompts"
    compared = [across_groups] if baseline == "group" and 0 < found.correct < 1 else []
    if found.correct > FEW:
        what = "all responses are correct" if found.correct == 1 else "nearly all responses are correct"
        return f"{what}: try {', or '.join(['harder prompts', *compared])}"
    what = "no response is correct" if found.correct == 0 else "few responses are correct"
    tokens = ["a larger data.sampler.max_new_tokens"] if found.truncated > MANY_TRUNCATED else []
    easier = "easier prompts, or more responses to each (data.group_size)"
    return f"{what}: try {', or '.join([*tokens, *compared, easier])}"
