"""Stage 1: optimise long and weakly constrained on one fixed set of rollouts."""

from pathlib import Path
from typing import Any

from torch import Tensor

from .data.batching import RolloutBatch
from .errors import UserError
from .objectives.extreme import SAPO, ExtremeObjective, flip
from .policy_module import PolicyModule


class ExtremeRegionModule(PolicyModule):
    """Drives a policy into the extreme region; the result, the teacher, is used only for its opinion.

    Args:
        policy: Folder or hub name of the causal language model to start from.
        objective: What is minimised on the stored rollouts.
        sign: 1 for a teacher; -1 for the unlearned policy, for which what was right counts as wrong.
        kl_coef: Weight of `KL(policy || base)`, exact over the vocabulary on the stored states, in the loss; 0
            for no constraint. It takes a second policy into memory.
        **kwargs: Arguments of `PolicyModule`.

    Raises:
        UserError: For a sign or a coefficient out of range.
    """

    def __init__(
        self,
        policy: str | Path,
        objective: ExtremeObjective | None = None,
        sign: int = 1,
        kl_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        if sign not in (1, -1):
            raise UserError(f"extreme_region.sign is {sign}: it must be 1 or -1")
        if not 0 <= kl_coef < float("inf"):
            raise UserError(f"extreme_region.kl_coef is {kl_coef}: it must be at least 0")
        if kl_coef > 0 and "base" not in self.references:
            raise UserError("extreme_region.kl_coef needs the reference `base` to measure the KL to")
        self.objective = objective or SAPO()
        self.sign = sign
        self.kl_coef = kl_coef

    @property
    def needs_groups(self) -> bool:  # type: ignore[override]
        """Whether the objective compares the responses of a group."""
        return self.objective.needs_groups

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """See `PolicyModule.select`: the objective's choice."""
        return self.objective.select(*self._outcomes(rewards, advantages))

    def terms(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `PolicyModule.terms`: the objective's terms and the weighted KL to the base policy."""
        hidden = self.policy.hidden(batch)
        stats = self.policy.token_logps(batch, hidden)
        outcomes = self._outcomes(batch.rewards, batch.advantages)
        terms = self.objective(stats.logps, batch.anchor_logps, batch.mask, *outcomes)
        self._check_shape(terms, batch.mask)
        values = {
            "entropy": stats.entropy,
            "logp": stats.logps,
            "log_ratio": stats.logps - batch.anchor_logps,
        }
        if self.kl_coef > 0:
            kl = self.policy.divergence(self.frozen("base"), batch, hidden).kl
            terms = terms + self.kl_coef * self._share(kl, batch)
            values["kl"] = kl
        return terms, values

    def on_validation_end(self) -> None:
        """Keep the base policy where the loss needs it."""
        if self.kl_coef == 0:
            self.release_frozen()

    def on_fit_end(self) -> None:
        """Free the base policy."""
        self.release_frozen()

    def _share(self, kl: Tensor, batch: RolloutBatch) -> Tensor:
        """The KL `(B, T)` in such terms as the objective's, so that the loss has its mean over the step's tokens."""
        if self.objective.per == "token":
            return kl
        return kl.sum(-1) * (batch.step_responses / batch.step_tokens)

    def _check_shape(self, terms: Tensor, mask: Tensor) -> None:
        per = self.objective.per
        expected = mask.shape if per == "token" else mask.shape[:1]
        if terms.shape != expected:
            raise UserError(
                f"extreme_region.objective: {type(self.objective).__name__} gave terms of shape {tuple(terms.shape)}; "
                f"with per = {per!r} they must be {tuple(expected)}"
            )

    def _outcomes(self, rewards: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        return (rewards, advantages) if self.sign == 1 else flip(rewards, advantages)
