"""Prompts in batches, with all that it takes to sample and verify responses to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..errors import InvalidArgument
from ..seeds import derive_seed
from .batching import opaque
from .prompts import Prompt, PromptSet, as_text
from .samplers import Response, Sampler
from .store import ROLLOUTS
from .verifiers import Verifier, take_rewards


@opaque
@dataclass(frozen=True)
class PromptBatch:
    """Prompts with all that it takes to sample and verify responses to them.

    Attributes:
        index: Number of the batch among those of all ranks.
        prompts: The prompts.
        prompt_ids: Their token ids.
        groups: What numbers each prompt among those of all batches.
        samples: Responses to each prompt.
        seed: Seed of the draws.
        max_tokens: Padded tokens that may be run through a policy at a time.
        tokenizer: The policy's tokenizer.
        sampler: Draws the responses.
        verifier: Checks them.
        correct_threshold: Reward from which a response counts as correct.
        answers_only: Whether the responses are drawn in another way than rollouts, as those of an `EvaluationSet` are:
            answers and lengths are then all that is measured of them, and no KL or entropy.
    """

    index: int
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[list[int]]
    groups: Sequence[int]
    samples: int
    seed: int
    max_tokens: int
    tokenizer: Any
    sampler: Sampler
    verifier: Verifier
    correct_threshold: float = 1.0
    answers_only: bool = False

    def to(self, device: Any) -> "PromptBatch":
        """Itself: the prompts move to the policy's device when they are padded."""
        return self

    def respond(self, model: Any, seed: int | None = None) -> pa.Table:
        """Sample and verify `samples` responses to each prompt: a table of the `ROLLOUTS` schema.

        Args:
            model: The language model to sample from.
            seed: Another seed than the batch's own.

        Raises:
            UserError: If the verifier gives a reward that is no finite number.
        """
        if not self.prompts:
            return ROLLOUTS.empty_table()
        repeated = [i for i in range(len(self.prompts)) for _ in range(self.samples)]
        responses = self.sampler.sample(
            model,
            self.tokenizer,
            [self.prompt_ids[i] for i in repeated],
            self.seed if seed is None else seed,
        )
        texts = self.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        return self._table(repeated, responses, texts, self.verify(responses, repeated))

    def verify(self, responses: Sequence[Response], prompts: Sequence[int]) -> list[float | None]:
        """The reward of each response, any finite number; None for what could not be checked.

        Args:
            responses: The responses.
            prompts: Which prompt of the batch each responds to.

        Raises:
            UserError: For another reward, naming the verifier's class and the reward.
        """
        return take_rewards(self.verifier, self._verified_texts(responses), [self.prompts[i].answer for i in prompts])

    def final_answers(self, table: pa.Table) -> Sequence[str | None] | None:
        """The final answers of responses, as the verifier finds them; None where it does not look for any.

        Args:
            table: The responses, of the `ROLLOUTS` schema.
        """
        columns = (table[name].to_pylist() for name in ("response_ids", "logps", "finish_reason"))
        return self.verifier.final_answers(self._verified_texts([Response(*row) for row in zip(*columns, strict=True)]))

    def _verified_texts(self, responses: Sequence[Response]) -> list[str]:
        # An answer may stand between special tokens: only those that begin, end or pad a sequence are no part of it.
        texts: list[str] = self.tokenizer.batch_decode(
            [self._content(response) for response in responses], skip_special_tokens=False
        )
        return texts

    def _content(self, response: Response) -> list[int]:
        """A response's ids without those that begin, end or pad a sequence, or are special and ended it."""
        tokenizer, ids = self.tokenizer, response.ids
        if response.finish_reason == "stop" and ids and ids[-1] in tokenizer.all_special_ids:
            ids = ids[:-1]  # Chat models have several such tokens.
        frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        return [token for token in ids if token not in frame]

    def _table(
        self,
        repeated: Sequence[int],
        responses: Sequence[Response],
        texts: Sequence[str],
        rewards: Sequence[float | None],
    ) -> pa.Table:
        """The rows of the responses; an answer that could not be checked is never rewarded."""
        columns = {
            "group": [self.groups[i] for i in repeated],
            "sample": [n % self.samples for n in range(len(repeated))],
            "prompt_ids": [self.prompt_ids[i] for i in repeated],
            "response_ids": [r.ids for r in responses],
            "logps": [r.logps for r in responses],
            "temperature": [self.sampler.temperature] * len(responses),
            "reward": [0.0 if reward is None else reward for reward in rewards],
            "finish_reason": [r.finish_reason for r in responses],
            "checked": [reward is not None for reward in rewards],
            "prompt": [as_text(self.prompts[i].prompt) for i in repeated],
            "response": list(texts),
            "answer": [self.prompts[i].answer for i in repeated],
        }
        return pa.Table.from_pydict(columns, schema=ROLLOUTS)


@dataclass(frozen=True)
class PromptBatcher:
    """Cuts prompts into batches of about `sampler.batch_size` responses.

    Attributes:
        tokenizer: The policy's tokenizer.
        sampler: Draws the responses.
        verifier: Checks them.
        max_tokens: Padded tokens that may be run through a policy at a time.
        context: Tokens that the policy can attend to, or None where nobody says.
        seed: Seed of all draws.
        correct_threshold: Reward from which a response counts as correct.
        answers_only: See `PromptBatch`.
    """

    tokenizer: Any
    sampler: Sampler
    verifier: Verifier
    max_tokens: int
    context: int | None
    seed: int
    correct_threshold: float = 1.0
    answers_only: bool = False

    def batches(
        self, prompts: PromptSet, samples: int, purpose: str, rank: int = 0, world_size: int = 1
    ) -> Iterator[PromptBatch]:
        """This rank's batches; what is in a batch depends on no rank.

        Args:
            prompts: The prompts of all ranks.
            samples: Responses to each prompt.
            purpose: Draws are a function of the seed, of this and of the batch's number.
            rank: This process, from 0.
            world_size: How many processes there are.

        Raises:
            InvalidArgument: If a prompt and its response do not fit the policy's context.
        """
        token_ids = [prompts.token_ids(i) for i in range(len(prompts))]
        self._check_context(token_ids, purpose)
        size = max(1, self.sampler.batch_size // samples)
        count = -(-len(prompts) // size)
        # A rank without prompts of its own still gets a batch, an empty one, to take part in the reductions.
        for index in range(rank, max(count, rank + 1), world_size):
            chosen = range(index * size, min((index + 1) * size, len(prompts)))
            yield PromptBatch(
                index=index,
                prompts=[prompts[i] for i in chosen],
                prompt_ids=[token_ids[i] for i in chosen],
                groups=chosen,
                samples=samples,
                seed=derive_seed(self.seed, purpose, index),
                max_tokens=self.max_tokens,
                tokenizer=self.tokenizer,
                sampler=self.sampler,
                verifier=self.verifier,
                correct_threshold=self.correct_threshold,
                answers_only=self.answers_only,
            )

    def _check_context(self, token_ids: Sequence[Sequence[int]], purpose: str) -> None:
        longest = max((len(ids) for ids in token_ids), default=0)
        if self.context is not None and longest + self.sampler.max_new_tokens > self.context:
            number = next(i for i, ids in enumerate(token_ids) if len(ids) == longest) + 1
            raise InvalidArgument(
                "sampler.max_new_tokens",
                f"is {self.sampler.max_new_tokens}: with the {longest} tokens of {purpose} prompt {number} that is "
                f"more than the policy's context of {self.context}",
            )
