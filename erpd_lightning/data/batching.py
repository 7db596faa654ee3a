"""Stored rollouts and scores as flat tensors in memory, and the padded batches made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ..errors import UserError
from ..objectives.tilted_policy import LOG_ZERO

T = TypeVar("T")


def opaque(kind: type[T]) -> type[T]:
    """A dataclass that Lightning takes as a whole, by its `to`; a class decorator.

    With a precision such as `bf16-true` Lightning walks into dataclasses and rounds their tensors, log-probs and
    rewards among them, and refuses frozen ones. `dataclasses.replace` refuses this one; `replaced` does not.
    """
    del kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind


def replaced(batch: T, **changes: Any) -> T:
    """A copy of an opaque dataclass with some attributes changed."""
    return type(batch)(**{**vars(batch), **changes})


@opaque
@dataclass
class RolloutBatch:
    """One micro-batch of `B` responses; `L` is the longest prompt with response, `T` the longest
    response.

    Attributes:
        input_ids: (B, L) long, prompt then response, right padded with 0.
        attention_mask: (B, L) bool, True on prompt and response.
        positions: (B, T) long, where in L the hidden state that predicts response token t is; pads
            0.
        response_ids: (B, T) long, pads 0.
        mask: (B, T) bool, True on response tokens; all False in a dummy micro-batch that only
            keeps the ranks in step.
        sampler_logps: (B, T) float32, the sampler's log-probs in nats; pads 0.
        trainer_logps: (B, T) float32, those of the policy that sampled as the trainer computes them, in nats; pads 0.
            The sampler's where these are the trainer's own.
        rewards: (B,) float32.
        advantages: (B,) float32.
        rows: (B,) long, rows of the rollout store; -1 in a dummy micro-batch.
        step_tokens: Response tokens of the whole optimiser step, all ranks and micro-batches.
        step_responses: Responses of the whole optimiser step.
        last: Whether this is the step's last micro-batch.
        temperature: At which the responses were drawn.
        scores: Per policy (B, T, K+1) float32 log-probs of the support and, last, of the tail, in
            nats; unused support slots hold `LOG_ZERO`. Positions that are padding put all mass on
            the tail, so that what is computed there is finite.
        support_ids: (B, T, K) long, the vocabulary entries of the support, the same for all
            policies; pads -1.
        token_scores: Per policy (B, T) float32 log-probs of the response tokens, in nats; pads 0.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    response_ids: Tensor
    mask: Tensor
    sampler_logps: Tensor
    trainer_logps: Tensor
    rewards: Tensor
    advantages: Tensor
    rows: Tensor
    step_tokens: int
    step_responses: int
    last: bool
    temperature: float
    scores: dict[str, Tensor] | None = None
    support_ids: Tensor | None = None
    token_scores: dict[str, Tensor] | None = None

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """The same batch with all tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        for name in ("scores", "token_scores"):
            if (scores := getattr(self, name)) is not None:
                moved[name] = {policy: logps.to(device) for policy, logps in scores.items()}
        return replaced(self, **moved)


@dataclass(frozen=True)
class ScoreTable:
    """What one policy says about the tokens of `M` responses, `N` tokens in all (nats).

    Attributes:
        rows: (M,) long, rows of the rollout store, increasing.
        token_offsets: (M+1,) long, where each row's tokens start.
        logps: (N,) float32, of the sampled tokens.
        sizes: (N,) long, support entries of each token.
        support_offsets: (N+1,) long, where each token's support starts.
        support_ids: (S,) int32.
        support_logps: (S,) float32.
        tail_logps: (N,) float32.
    """

    rows: Tensor
    token_offsets: Tensor
    logps: Tensor
    sizes: Tensor
    support_offsets: Tensor
    support_ids: Tensor
    support_logps: Tensor
    tail_logps: Tensor

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "ScoreTable":
        """From a table of the `SCORES` schema, in any order of rows.

        Raises:
            UserError: a row is there twice, or the columns of a row differ in length.
        """
        rows = _flat(table["row"])
        if bool((rows.diff() < 0).any()):
            # Arrow sorts lists with 32-bit offsets only as long as they hold 2^31 values in all.
            wide = [
                f.with_type(pa.large_list(f.type.value_type)) if pa.types.is_list(f.type) else f for f in table.schema
            ]
            table = table.cast(pa.schema(wide)).sort_by("row")
            rows = _flat(table["row"])
        if bool((rows.diff() == 0).any()):
            raise UserError("scores: a row is there twice; a policy scores each response once")
        logps, token_offsets = _ragged(table["logps"])
        sizes, size_offsets = _ragged(table["support_size"])
        tails, tail_offsets = _ragged(table["tail_logps"])
        support_ids, id_offsets = _ragged(table["support_ids"])
        support_logps, support_row_offsets = _ragged(table["support_logps"])
        support_offsets = offsets_of(sizes)
        _check_equal_lengths("scores", logps=token_offsets, support_size=size_offsets, tail_logps=tail_offsets)
        _check_equal_lengths(
            "scores",
            support_size=support_offsets[token_offsets],
            support_ids=id_offsets,
            support_logps=support_row_offsets,
        )
        return cls(
            rows,
            token_offsets,
            logps,
            sizes.long(),
            support_offsets,
            support_ids,
            support_logps,
            tails,
        )

    @property
    def max_size(self) -> int:
        """K, the most support entries that any token has."""
        return int(self.sizes.max()) if len(self.sizes) else 0

    def token_starts(self, rows: Tensor) -> Tensor:
        """(B,) where the tokens of these store rows start; UserError if one is not scored."""
        index = torch.searchsorted(self.rows, rows).clamp_max(len(self.rows) - 1)
        missing = rows[self.rows[index] != rows]
        if len(missing):
            raise UserError(f"scores: row {int(missing[0])} of the rollouts is missing; score it too")
        return self.token_offsets[index]


@dataclass(frozen=True)
class RolloutTable:
    """A rollout store in memory: `N` responses as flat tensors with offsets.

    Attributes:
        prompt_ids: Flat int32; row i's are `prompt_ids[prompt_offsets[i] : prompt_offsets[i + 1]]`.
        prompt_offsets: (N+1,) long.
        response_ids: Flat int32.
        response_offsets: (N+1,) long.
        logps: Flat float32, the sampler's log-probs of `response_ids` (nats).
        trainer_logps: Flat float32, those of the same policy as the trainer computes them (nats).
        rewards: (N,) float32.
        groups: (N,) long.
        temperature: At which the responses were drawn; one for all, since what is said of a policy holds at one.
        scores: Per policy its scores, all on the same rows and supports.
    """

    prompt_ids: Tensor
    prompt_offsets: Tensor
    response_ids: Tensor
    response_offsets: Tensor
    logps: Tensor
    trainer_logps: Tensor
    rewards: Tensor
    groups: Tensor
    temperature: float
    scores: dict[str, ScoreTable] = field(default_factory=dict)

    @classmethod
    def from_arrow(
        cls,
        table: pa.Table,
        scores: Mapping[str, ScoreTable] | None = None,
        trainer_logps: pa.ChunkedArray | None = None,
    ) -> "RolloutTable":
        """From a table of the `ROLLOUTS` schema; row i is the i-th row of the table.

        Args:
            table: The table; it needs no more columns than `TOKEN_COLUMNS`.
            scores: What policies say of them.
            trainer_logps: The trainer's own log-probs, in the order of the rows; None where the sampler's are these.

        Raises:
            UserError: a prompt without tokens, log-probs that are not one per response token, or
                scores that were made for other rollouts or on different supports, or several
                temperatures.
        """
        prompt_ids, prompt_offsets = _ragged(table["prompt_ids"])
        response_ids, response_offsets = _ragged(table["response_ids"])
        logps, logp_offsets = _ragged(table["logps"])
        own, own_offsets = (logps, logp_offsets) if trainer_logps is None else _ragged(trainer_logps)
        _check_equal_lengths("rollouts", response_ids=response_offsets, logps=logp_offsets, trainer_logps=own_offsets)
        empty = (prompt_offsets.diff() == 0).nonzero()
        if len(empty):
            raise UserError(
                f"rollouts: row {int(empty[0])} has a prompt without tokens; "
                "there must be one to predict the response from"
            )
        return cls(
            prompt_ids,
            prompt_offsets,
            response_ids,
            response_offsets,
            logps,
            own,
            _flat(table["reward"]),
            _flat(table["group"]),
            _one_temperature(table["temperature"]),
            dict(scores or {}),
        )

    def __post_init__(self) -> None:
        for name, score in self.scores.items():
            self._check_scores(name, score, next(iter(self.scores.values())))

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """(N,) long, tokens of each prompt."""
        return self.prompt_offsets.diff()

    @cached_property
    def response_lengths(self) -> Tensor:
        """(N,) long, tokens of each response."""
        return self.response_offsets.diff()

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) long, tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def token_rows(self) -> Tensor:
        """(tokens,) long, the row of each response token; of scored rows only, if any are."""
        score = next(iter(self.scores.values()), None)
        rows = torch.arange(len(self.rewards)) if score is None else score.rows
        return rows.repeat_interleave(self.response_lengths[rows])

    def flat_scores(self, policy: str) -> Tensor:
        """(tokens, K+1) float32 log-probs of support and tail, in the order of `token_rows`.

        K is the largest support of the store; unused slots hold `LOG_ZERO`.
        """
        score = self.scores[policy]
        logps = torch.full((len(score.sizes), score.max_size + 1), LOG_ZERO)
        used = torch.arange(score.max_size) < score.sizes[:, None]
        logps[:, :-1][used] = score.support_logps
        logps[:, -1] = score.tail_logps
        return logps

    def batch(
        self,
        rows: Tensor,
        advantages: Tensor,
        *,
        step_tokens: int,
        step_responses: int,
        last: bool,
    ) -> RolloutBatch:
        """The batch of some rows.

        Args:
            rows: (B,) long.
            advantages: (N,) of all rows of the table.
            step_tokens, step_responses, last: As in `RolloutBatch`.
        """
        prompt = self.prompt_lengths[rows][:, None]
        response = self.response_lengths[rows][:, None]
        column = torch.arange(int((prompt + response).max()))
        token = torch.arange(int(response.max()))
        mask = token < response
        attention_mask = column < prompt + response
        in_prompt = column < prompt
        starts = self.response_offsets[rows][:, None]
        prompt_index = (self.prompt_offsets[rows][:, None] + column) * in_prompt
        column_index = (starts - prompt + column) * (attention_mask & ~in_prompt)
        token_index = (starts + token) * mask
        prompt_ids = _take(self.prompt_ids, prompt_index)
        input_ids = prompt_ids.where(in_prompt, _take(self.response_ids, column_index))
        return RolloutBatch(
            input_ids=input_ids.where(attention_mask, 0).long(),
            attention_mask=attention_mask,
            positions=(prompt + token - 1).where(mask, 0),
            response_ids=_take(self.response_ids, token_index).where(mask, 0).long(),
            mask=mask,
            sampler_logps=_take(self.logps, token_index).where(mask, 0.0),
            trainer_logps=_take(self.trainer_logps, token_index).where(mask, 0.0),
            rewards=self.rewards[rows],
            advantages=advantages[rows],
            rows=rows,
            step_tokens=step_tokens,
            step_responses=step_responses,
            last=last,
            temperature=self.temperature,
            **self._batch_scores(rows, token, mask),
        )

    def _batch_scores(self, rows: Tensor, token: Tensor, mask: Tensor) -> dict[str, Any]:
        """What a batch holds of the scores, where there are any."""
        reference = next(iter(self.scores.values()), None)
        if reference is None:
            return {}
        # All policies share rows and supports: one index serves them all.
        token_index = (reference.token_starts(rows)[:, None] + token) * mask
        sizes = _take(reference.sizes, token_index).where(mask, 0)[..., None]
        slot = torch.arange(int(sizes.max()) if sizes.numel() else 0)
        used = slot < sizes
        index = (_take(reference.support_offsets, token_index)[..., None] + slot) * used
        scores, token_scores = {}, {}
        for name, score in self.scores.items():
            token_scores[name] = _take(score.logps, token_index).where(mask, 0.0)
            support = _take(score.support_logps, index).where(used, LOG_ZERO)
            tail = _take(score.tail_logps, token_index).where(mask, 0.0)
            scores[name] = torch.cat([support, tail[..., None]], dim=-1)
        support_ids = _take(reference.support_ids, index).where(used, -1).long()
        return {"scores": scores, "support_ids": support_ids, "token_scores": token_scores}

    def _check_scores(self, name: str, score: ScoreTable, reference: ScoreTable) -> None:
        fits = len(score.rows) > 0 and score.rows[0] >= 0 and score.rows[-1] < len(self.rewards)
        if not fits or not torch.equal(score.token_offsets.diff(), self.response_lengths[score.rows]):
            raise UserError(f"scores of {name!r} were made for other rollouts; score these")
        if not (
            torch.equal(score.rows, reference.rows)
            and torch.equal(score.sizes, reference.sizes)
            and torch.equal(score.support_ids, reference.support_ids)
        ):
            raise UserError(
                f"scores of {name!r} and {next(iter(self.scores))!r} are on different supports; "
                "score all policies on the same ones"
            )


def _one_temperature(column: pa.ChunkedArray) -> float:
    """The temperature of all responses.

    Raises:
        UserError: If there are several.
    """
    found = sorted(pc.unique(column).to_pylist())
    if len(found) > 1:
        raise UserError(
            f"rollouts: responses were drawn at the temperatures {', '.join(f'{t:g}' for t in found)}; ratios and KL "
            "hold at one: train on rollouts of one temperature"
        )
    return float(found[0]) if found else 1.0


def _take(flat: Tensor, index: Tensor) -> Tensor:
    """`flat[index]` for an index of any shape, faster than written so."""
    return flat.index_select(0, index.flatten()).view(index.shape)


def _flat(column: pa.ChunkedArray) -> Tensor:
    """A column of numbers as a tensor of its own memory (Arrow's is read-only)."""
    arrays = [chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks]
    return torch.from_numpy(np.concatenate(arrays))


def _ragged(column: pa.ChunkedArray) -> tuple[Tensor, Tensor]:
    """A column of lists as its values, one after the other, and the (N+1,) offsets of the lists."""
    # By chunk: Arrow's own 32-bit offsets cannot count the tokens of a large store.
    values = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    offsets = offsets_of(torch.from_numpy(np.concatenate(lengths)))
    return torch.from_numpy(np.concatenate(values)), offsets


def offsets_of(lengths: Tensor) -> Tensor:
    """(N+1,) long, 0 and the running sums of (N,) lengths."""
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0, dtype=torch.long)])


def _check_equal_lengths(what: str, **offsets: Tensor) -> None:
    (first, reference), *others = offsets.items()
    for name, other in others:
        different = (reference.diff() != other.diff()).nonzero()
        if len(different):
            raise UserError(f"{what}: {first} and {name} differ in length in row {int(different[0])}")
