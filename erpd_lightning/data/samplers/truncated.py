"""Sampling from the likeliest tokens alone, by top-k and top-p."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...errors import InvalidArgument, check_at_least
from .decoding import NextLogps, PolicyReader
from .transformers import TransformersSampler


class TruncatedSampler(TransformersSampler):
    """Samples with top-k and top-p, for evaluation: rollouts are drawn from the policy's whole distribution.

    The log-probs of the responses are those of the truncated distribution, not of the policy.

    Args:
        max_new_tokens: Longest response in tokens.
        temperature: What the logits are divided by.
        batch_size: Responses that are drawn at a time.
        top_p: Probability of the likeliest tokens that are drawn from, at least; 1 for all tokens.
        top_k: Number of the likeliest tokens that are drawn from; 0 for all tokens, 1 for greedy decoding.
        stop: Strings that end a response where it says them; they are part of it.

    Raises:
        InvalidArgument: For a value out of range.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        batch_size: int = 256,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
    ) -> None:
        super().__init__(max_new_tokens, temperature, batch_size, stop=stop)
        if not 0 < top_p <= 1:
            raise InvalidArgument("top_p", f"is {top_p}: it must be above 0 and at most 1")
        check_at_least(0, top_k=top_k)
        self.top_p = top_p
        self.top_k = top_k

    def next_logps(self, reader: PolicyReader) -> NextLogps:
        """See `TransformersSampler`."""
        policy = super().next_logps(reader)
        return policy if self.top_p == 1 and self.top_k == 0 else _TruncatedPolicy(policy, self.top_p, self.top_k)


class _TruncatedPolicy:
    """The likeliest tokens of what responses would be drawn from, top-k before top-p as in transformers."""

    def __init__(self, policy: NextLogps, top_p: float, top_k: int) -> None:
        from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

        warpers = [TopKLogitsWarper(top_k)] if top_k else []
        self._warpers: Any = LogitsProcessorList([*warpers, TopPLogitsWarper(top_p)] if top_p < 1 else warpers)
        self._policy = policy
        self.keep = policy.keep

    def __call__(self, ids: Tensor) -> Tensor:
        """See `NextLogps`."""
        kept: Tensor = self._warpers(ids, self._policy(ids))
        return kept.log_softmax(-1)
