"""Prompts in batches, with all that it takes to sample and verify responses to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from ..errors import InvalidArgument
from ..seeds import derive_seed
from .batching import opaque
from .deferred import Deferred
from .prompts import Prompt, PromptSet, as_text
from .reward_parts import parts_column
from .samplers import Response, Sampler
from .store import ROLLOUTS
from .verifiers import Verdicts, Verifier, take_verdicts

ADDED_TOKENS = 512
"""Tokens that a chat template may add to a prompt; more of them are found when a prompt's batch is made."""


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
        judge_truncated: Whether a response that was cut off is judged by what it says so far.
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
    judge_truncated: bool = True
    answers_only: bool = False

    def to(self, device: Any) -> "PromptBatch":
        """Itself: the prompts move to the policy's device when they are padded."""
        return self

    def respond(self, model: Any, seed: int | None = None) -> pa.Table:
        """Sample and verify `samples` responses to each prompt: a table of the `ROLLOUTS` schema.

        Args:
            model: The language model to sample from; None for a sampler that needs none.
            seed: Another seed than the batch's own.

        Raises:
            UserError: If the verifier gives a reward that is no finite number.
        """
        return self.verified(self.draw(model, seed))

    def draw(self, model: Any, seed: int | None = None) -> "Drawn":
        """Sample `samples` responses to each prompt, without verifying them; see `respond`."""
        if not self.prompts:
            return Drawn([], [], [], [])
        repeated = [i for i in range(len(self.prompts)) for _ in range(self.samples)]
        responses = self.sampler.sample(
            model,
            self.tokenizer,
            [self.prompt_ids[i] for i in repeated],
            self.seed if seed is None else seed,
        )
        return self._drawn(responses, repeated)

    def record(self, responses: Sequence[Response], prompts: Sequence[int]) -> pa.Table:
        """Verify responses: a table of the `ROLLOUTS` schema.

        Args:
            responses: The responses.
            prompts: Which prompt of the batch each responds to.

        Raises:
            UserError: If the verifier gives a reward that is no finite number.
        """
        return self.verified(self._drawn(responses, prompts))

    def _drawn(self, responses: Sequence[Response], prompts: Sequence[int]) -> "Drawn":
        shown = self.tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        return Drawn(list(prompts), list(responses), shown, self._verified_texts(responses))

    def verified(self, drawn: "Drawn") -> pa.Table:
        """Verify what was drawn: a table of the `ROLLOUTS` schema. It uses no tokenizer, so that a thread may do it."""
        if not drawn.responses:
            return ROLLOUTS.empty_table()
        return self._table(drawn, self._verdicts(drawn.verified_texts, drawn.prompts, drawn.responses))

    def verify(self, responses: Sequence[Response], prompts: Sequence[int]) -> Verdicts:
        """The reward of each response, any finite number, and its parts; None for what could not be checked.

        Nor, without `judge_truncated`, could a response that was cut off: what it would have ended with is not known.

        Args:
            responses: The responses.
            prompts: Which prompt of the batch each responds to.

        Raises:
            UserError: For another reward, naming the verifier's class and the reward.
        """
        return self._verdicts(self._verified_texts(responses), prompts, responses)

    def final_answers(self, table: pa.Table) -> Sequence[str | None] | None:
        """The final answers of responses, as the verifier finds them; None where it does not look for any.

        Args:
            table: The responses, of the `ROLLOUTS` schema.
        """
        ids, reasons = (table[name].to_pylist() for name in ("response_ids", "finish_reason"))
        return self.verifier.final_answers(verified_texts(self.tokenizer, ids, reasons))

    def _verdicts(self, texts: Sequence[str], prompts: Sequence[int], responses: Sequence[Response]) -> Verdicts:
        asked = [as_text(self.prompts[i].prompt) for i in prompts]
        verdicts = take_verdicts(self.verifier, asked, texts, [self.prompts[i].answer for i in prompts])
        if self.judge_truncated:
            return verdicts
        ended = [response.finish_reason != "length" for response in responses]
        return Verdicts(_where(ended, verdicts.rewards), {n: _where(ended, each) for n, each in verdicts.parts.items()})

    def _verified_texts(self, responses: Sequence[Response]) -> list[str]:
        return verified_texts(self.tokenizer, [r.ids for r in responses], [r.finish_reason for r in responses])

    def _table(self, drawn: "Drawn", verdicts: Verdicts) -> pa.Table:
        """The rows of the responses; an answer that could not be checked is never rewarded."""
        responses, prompts = drawn.responses, [self.prompts[i] for i in drawn.prompts]
        columns = {
            "group": [self.groups[i] for i in drawn.prompts],
            "sample": [n % self.samples for n in range(len(responses))],
            "prompt_ids": [self.prompt_ids[i] for i in drawn.prompts],
            "response_ids": [r.ids for r in responses],
            "logps": [r.logps for r in responses],
            "temperature": [self.sampler.temperature] * len(responses),
            "reward": [0.0 if reward is None else reward for reward in verdicts.rewards],
            "finish_reason": [r.finish_reason for r in responses],
            "checked": [reward is not None for reward in verdicts.rewards],
            "prompt": [as_text(prompt.prompt) for prompt in prompts],
            "response": drawn.texts,
            "answer": [prompt.answer for prompt in prompts],
            "rewards": parts_column(verdicts.parts, len(responses)),
        }
        return pa.Table.from_pydict(columns, schema=ROLLOUTS)


@opaque
@dataclass(frozen=True)
class Drawn:
    """Responses that are not verified yet.

    Attributes:
        prompts: Which prompt of the batch each responds to.
        responses: The responses.
        texts: Their texts without special tokens, which are stored.
        verified_texts: Their texts as they are verified.
    """

    prompts: list[int]
    responses: list[Response]
    texts: list[str]
    verified_texts: list[str]


def verified_texts(tokenizer: Any, ids: Sequence[Sequence[int]], finish_reasons: Sequence[str]) -> list[str]:
    """What a verifier is shown of responses.

    An answer may stand between special tokens: only those that begin, end or pad a sequence are no part of it, and one
    that ended the response, of which chat models have several.

    Args:
        tokenizer: The policy's tokenizer.
        ids: Token ids of the responses.
        finish_reasons: Whether each ended by itself, `stop`.
    """
    special = set(tokenizer.all_special_ids)
    frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    kept = []
    for row, reason in zip(ids, finish_reasons, strict=True):
        content = row[:-1] if reason == "stop" and row and row[-1] in special else row
        kept.append([token for token in content if token not in frame])
    texts: list[str] = tokenizer.batch_decode(kept, skip_special_tokens=False)
    return texts


class PromptBatches(Deferred[PromptBatch]):
    """Batches of prompts, each made when it is asked for.

    Args:
        make: Makes a batch of its number.
        numbers: Numbers of the batches.
        responses: How many responses are drawn for each, which is known without making it.
    """

    def __init__(self, make: Callable[[int], PromptBatch], numbers: Sequence[int], responses: Sequence[int]) -> None:
        super().__init__(make, numbers)
        self.responses = responses


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
    judge_truncated: bool = True
    answers_only: bool = False

    def batches(
        self, prompts: PromptSet, samples: int, purpose: str, rank: int = 0, world_size: int = 1
    ) -> PromptBatches:
        """This rank's batches, each made when it is asked for; what is in a batch depends on no rank.

        A prompt that is too long for the policy is told at once where its length in bytes says that it may be, which
        is nearly always, and otherwise with its batch.

        Args:
            prompts: The prompts of all ranks.
            samples: Responses to each prompt.
            purpose: Draws are a function of the seed, of this and of the batch's number.
            rank: This process, from 0.
            world_size: How many processes there are.

        Raises:
            InvalidArgument: If a prompt and its response do not fit the policy's context.
            UserError: If the verifier cannot check anything.
        """
        self.verifier.start()
        if self.context is not None:
            room = self.context - self.sampler.max_new_tokens - ADDED_TOKENS
            self._check_context(prompts, [i for i, row in enumerate(prompts) if _bytes(row) > room], purpose)
        size = max(1, self.sampler.batch_size // samples)
        count = -(-len(prompts) // size)
        # A rank without prompts of its own still gets a batch, an empty one, to take part in the reductions.
        numbers = range(rank, max(count, rank + 1), world_size)
        make = partial(self._batch, prompts, samples, purpose, size)
        sizes = [len(range(len(prompts))[number * size : (number + 1) * size]) for number in numbers]
        return PromptBatches(make, numbers, [samples * each for each in sizes])

    def _batch(self, prompts: PromptSet, samples: int, purpose: str, size: int, index: int) -> PromptBatch:
        chosen = range(index * size, min((index + 1) * size, len(prompts)))
        self._check_context(prompts, chosen, purpose)
        return PromptBatch(
            index=index,
            prompts=[prompts[i] for i in chosen],
            prompt_ids=[prompts.token_ids(i) for i in chosen],
            groups=chosen,
            samples=samples,
            seed=derive_seed(self.seed, purpose, index),
            max_tokens=self.max_tokens,
            tokenizer=self.tokenizer,
            sampler=self.sampler,
            verifier=self.verifier,
            correct_threshold=self.correct_threshold,
            judge_truncated=self.judge_truncated,
            answers_only=self.answers_only,
        )

    def _check_context(self, prompts: PromptSet, chosen: Sequence[int], purpose: str) -> None:
        lengths = {i: len(prompts.token_ids(i)) for i in chosen}
        number = max(lengths, key=lambda i: lengths[i], default=0)
        longest = lengths.get(number, 0)
        if self.context is not None and longest + self.sampler.max_new_tokens > self.context:
            raise InvalidArgument(
                "sampler.max_new_tokens",
                f"is {self.sampler.max_new_tokens}: with the {longest} tokens of {purpose} prompt {number + 1} that is "
                f"more than the policy's context of {self.context}",
            )


def _bytes(prompt: Prompt) -> int:
    """Bytes of a prompt: it has about as many tokens at the most, and what a chat template adds."""
    return len(as_text(prompt.prompt).encode())


def _where(ended: Sequence[bool], rewards: Sequence[float | None]) -> list[float | None]:
    return [reward if end else None for reward, end in zip(rewards, ended, strict=True)]
