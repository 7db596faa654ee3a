"""Stage 2: distil the teacher's opinion back into the base policy under a KL budget."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.batching import RolloutBatch, RolloutTable
from .errors import UserError
from .objectives.distillation import DistillObjective, TiltedTarget
from .objectives.signal import Signal
from .objectives.tilt import BetaSolution, UnreachableBudget, solve_beta
from .policy_module import PolicyModule


class DistillModule(PolicyModule):
    """Distils a signal into the base policy; beta is solved for the budget and reported.

    Args:
        policy: Folder or hub name of the base policy, which the student starts from.
        kl_budget: KL of the target to the base policy to spend, in nats per response token on the stored states.
        beta: Price of a nat of KL, where it is given and not solved; `kl_budget` is then None.
        signal: What the policies say about a token, as clipped log-ratios.
        objective: How the student is drawn to the tilted base policy.
        learning_rate: AdamW's learning rate after warm-up.
        lr_scheduler: What follows warm-up, by its name in `transformers.get_scheduler`.
        **kwargs: Further arguments of `PolicyModule`.

    Raises:
        UserError: For a budget or beta that is not a positive number, both or none of them.
    """

    def __init__(
        self,
        policy: str | Path,
        kl_budget: float | None = 0.05,
        beta: float | None = None,
        signal: Signal | None = None,
        objective: DistillObjective | None = None,
        learning_rate: float = 1e-3,
        lr_scheduler: str = "cosine",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, learning_rate=learning_rate, lr_scheduler=lr_scheduler, **kwargs)
        for name, value in (("kl_budget", kl_budget), ("beta", beta)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"distill.{name} is {value}: it must be a positive, finite number")
        if (kl_budget is None) == (beta is None):
            raise UserError("give either distill.kl_budget or distill.beta, and leave the other null")
        self.kl_budget = kl_budget
        self.beta = beta
        self.signal = signal or Signal()
        self.objective = objective or TiltedTarget()
        self.solution: BetaSolution | None = None

    def setup(self, stage: str) -> None:
        """Solve beta for the budget on the stored states."""
        if stage != "fit" or self.solution is not None:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        rollouts = getattr(data, "rollouts", None)
        if rollouts is None or not rollouts.scores:
            raise UserError(
                "distillation needs rollouts with scores: RolloutDataModule(scores=…), "
                "filled by Trainer.predict with its scoring(name)"
            )
        self._check_policies(rollouts)
        if self.beta is None:
            self.solution = self.solve(rollouts)
            self.beta = self.solution.beta

    def solve(self, rollouts: RolloutTable) -> BetaSolution:
        """The beta that spends the budget on the states of some scored rollouts.

        Raises:
            UserError: If no beta does.
        """
        assert self.kl_budget is not None
        logps = {name: rollouts.flat_scores(name) for name in {"base", *self.signal.policies}}
        try:
            return solve_beta(logps["base"], self.signal(logps), self.kl_budget)
        except UnreachableBudget as error:
            raise UserError(f"distill.kl_budget: {error}") from error

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """See `PolicyModule.select`: every stored response holds states to learn in."""
        return torch.ones_like(rewards, dtype=torch.bool)

    def terms(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `PolicyModule.terms`: the objective between student and tilted base policy."""
        assert batch.scores is not None
        assert batch.support_ids is not None
        assert self.beta is not None
        hidden = self.policy.hidden(batch)
        student = self.policy.support_logps(batch, batch.support_ids, hidden)
        terms = self.objective(student, batch.scores["base"], self.signal(batch.scores), self.beta)
        return terms, {}

    def _check_policies(self, rollouts: RolloutTable) -> None:
        missing = {"base", *self.signal.policies} - rollouts.scores.keys()
        if missing:
            raise UserError(
                f"distill.signal uses the policies {', '.join(sorted(missing))}, which were not scored; "
                f"there are {', '.join(sorted(rollouts.scores))}"
            )
