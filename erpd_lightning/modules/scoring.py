"""Scores of a policy on stored responses: log-probs of the sampled tokens, and over a support of each state."""

from ..data.batching import RolloutBatch
from ..data.predict_data import Scores
from ..models.policy import Policy

SUPPORT_MASS = 0.999
"""Probability mass of the base policy that a support holds, if `SUPPORT_SIZE` entries hold as much."""

SUPPORT_SIZE = 64
"""The most vocabulary entries of a support."""


def score(policy: Policy, rollouts: RolloutBatch) -> Scores:
    """What a policy says of stored responses, in nats, over their support or, where they have none, its own."""
    hidden = policy.hidden(rollouts)
    ids = rollouts.support_ids
    if ids is None:
        ids = policy.select_support(rollouts, SUPPORT_MASS, SUPPORT_SIZE, hidden)
    return Scores(policy.token_logps(rollouts, hidden).logps, ids, policy.support_logps(rollouts, ids, hidden))
