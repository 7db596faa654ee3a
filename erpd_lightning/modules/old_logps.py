"""Old log-probs, those of pi_old: the policy as it was when an iteration began, which importance ratios divide by."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..data.batching import RolloutBatch
from ..models.policy import Policy


class OldLogps:
    """Log-probs of the tokens that a policy is trained on, under that policy when the iteration began, by row.

    Numbers instead of a second model in memory. They go into checkpoints, because the policy that they came from is
    gone when a run that was killed in the middle of an iteration goes on.
    """

    def __init__(self) -> None:
        self._offsets = torch.zeros(1, dtype=torch.long)
        self._logps = torch.zeros(0)

    @torch.no_grad()
    def take(
        self,
        policy: Policy,
        offsets: Tensor,
        batches: Iterable[RolloutBatch],
        device: torch.device,
        merge: Callable[[Tensor], Tensor],
    ) -> None:
        """Note the log-probs of a policy, in nats.

        Args:
            policy: The policy as it is.
            offsets: `(N + 1,)` long, where the tokens of each row of the store start.
            batches: This rank's share of the rows, as many batches on every rank.
            device: Where the policy is.
            merge: The sum over ranks of `(tokens,)`, where each token is not 0 on the rank that had it alone.
        """
        self._offsets = offsets.to(device)
        logps = torch.zeros(int(offsets[-1]), device=device)
        for batch in batches:
            batch = batch.to(device)
            found = policy.token_logps(batch).logps
            logps[self._index(batch)[batch.mask]] = found[batch.mask].to(logps.dtype)
        self._logps = merge(logps)

    def logps(self, batch: RolloutBatch) -> Tensor:
        """Of the response tokens of a batch, `(B, T)` in nats; 0 in padding."""
        device = batch.mask.device
        self._offsets, self._logps = self._offsets.to(device), self._logps.to(device)
        return self._logps[self._index(batch)].where(batch.mask, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What was noted last."""
        return {"offsets": self._offsets.cpu(), "logps": self._logps.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self._offsets, self._logps = state["offsets"], state["logps"]

    def _index(self, batch: RolloutBatch) -> Tensor:
        """Where the tokens of a batch are, `(B, T)` long; that of padding, and of a dummy micro-batch, is 0."""
        starts = self._offsets[batch.rows.clamp(min=0)][:, None]
        return (starts + torch.arange(batch.mask.shape[1], device=starts.device)) * batch.mask
