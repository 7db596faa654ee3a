"""Decoding from the distillation target itself: the base policy tilted by a signal, with no student trained. Ours."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...models.generation import end_tokens
from ...objectives.divergences import entropy, exact_kl
from ...objectives.signal import Signal
from ...objectives.tilted_policy import LOG_ZERO, tilt
from .base import Response, Sampler
from .decoding import PolicyReader, StopStrings, decode
from .transformers import TransformersSampler, models_in_eval_mode


class TiltedResponse(NamedTuple):
    """A response drawn from the target, and what it spent.

    Attributes:
        response: The response, with the target's log-probs.
        kl: KL of the target to the base policy, in nats, exact over the vocabulary, at each token.
        entropy: Entropy of the target, in nats, at each token.
    """

    response: Response
    kl: list[float]
    entropy: list[float]


class TiltedSampler:
    """Samples from `pi*_beta(v) = pi_0(v) exp(s(v) / beta) / Z` with models in memory.

    All policies read along, each with a cache of its own. They are the policies at the sampler's temperature, as they
    were when the rollouts were scored, and so is the target that is drawn from; KL and entropy are the target's.

    Args:
        sampler: Longest response, temperature and batch size.
        signal: What tilts the base policy.
        beta: Price of a nat of KL.
    """

    def __init__(self, sampler: Sampler, signal: Signal, beta: float) -> None:
        self.temperature = sampler.temperature
        self.sampler = TransformersSampler(sampler.max_new_tokens, batch_size=sampler.batch_size, stop=sampler.stop)
        self.signal = signal
        self.beta = beta

    @torch.inference_mode()
    def sample(
        self, models: Mapping[str, Any], tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int
    ) -> list[TiltedResponse]:
        """One response to each of the tokenised prompts, in order; the same for the same seed.

        Args:
            models: The base policy, called `base`, and those that the signal compares, as language models.
            tokenizer: Their tokenizer, padding on the left.
            prompts: Token ids.
            seed: Seed of the draws. Global random state is left as it was.

        Raises:
            UserError: If the policies' log-probs are not finite.
        """
        read = {name: models[name] for name in ("base", *self.signal.policies)}
        base = models["base"]
        ends = end_tokens(tokenizer, base.generation_config.eos_token_id)
        stops = StopStrings(tokenizer, self.sampler.stop)
        found: dict[int, TiltedResponse] = {}
        with models_in_eval_mode(*read.values()):
            for rows, encoded, uniforms in self.sampler.batches(base.device, tokenizer, prompts, seed):
                mask, longest = encoded["attention_mask"], self.sampler.max_new_tokens
                readers = {name: PolicyReader(model, mask, longest) for name, model in read.items()}
                target = _Target(readers, self.temperature, self.signal, self.beta, uniforms)
                responses = decode(target, encoded["input_ids"], ends, uniforms, stops)
                for row, response, kl, own in zip(rows, responses, *target.spent(), strict=True):
                    length = len(response.ids)
                    found[row] = TiltedResponse(response, kl[:length], own[:length])
        return [found[row] for row in range(len(prompts))]


class _Target:
    """The tilted policy as what responses are drawn from (`NextLogps`); notes its KL and entropy at each token.

    Args:
        readers: The policies by name.
        temperature: Theirs.
        signal: What tilts the base policy.
        beta: Price of a nat of KL.
        like: A tensor `(B, T)` with a place for each token of each response.
    """

    def __init__(
        self, readers: Mapping[str, PolicyReader], temperature: float, signal: Signal, beta: float, like: Tensor
    ) -> None:
        self._readers = readers
        self._temperature = temperature
        self._signal = signal
        self._beta = beta
        self._kls, self._entropies = like.new_zeros(like.shape), like.new_zeros(like.shape)
        self._rows = torch.arange(len(like), device=like.device)
        self._step = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """See `NextLogps`."""
        logps = {name: (reader(ids) / self._temperature).log_softmax(-1) for name, reader in self._readers.items()}
        # An entry that is ruled out in two policies has no ratio.
        logps = {name: values.clamp(min=LOG_ZERO) for name, values in logps.items()}
        target = tilt(logps["base"], self._signal(logps), self._beta).log_softmax(-1)
        # Rounding may leave a vanishing KL slightly negative.
        self._kls[self._rows, self._step] = exact_kl(target, logps["base"]).clamp(min=0).double()
        self._entropies[self._rows, self._step] = entropy(target).double()
        self._step += 1
        return target

    def keep(self, rows: Tensor) -> None:
        """See `NextLogps`."""
        self._rows = self._rows[rows]
        for reader in self._readers.values():
            reader.keep(rows)

    def spent(self) -> tuple[list[list[float]], list[list[float]]]:
        """KL to the base policy and entropy at each token, `(B, T)`; meaningless after a response's end."""
        return self._kls.tolist(), self._entropies.tolist()
