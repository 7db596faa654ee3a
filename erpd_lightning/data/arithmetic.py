"""The embedded task: chains of digit operations with written steps, and a deliberately weak base policy.

A prompt such as `7+5*3-4:` is worked out from left to right, modulo ten, one written step after the other:
`7+5=2;2*3=6;6-4=2`. The last digit is the answer. There are 300 facts (three operations on two digits) to know.

The base policy is *engineered to be weak*: it learns from demonstrations in which a share of the facts, drawn
from the seed, carries a planted misconception, a wrong result that the demonstrator writes in 35 to 85 of 100
cases. It therefore knows the right result of each fact with some probability and has to be talked out of
its misconceptions by the reward, which sees the last digit only. It says nothing about how large a real model's
gains would be.
"""

import random
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

DIGITS = "0123456789"
OPERATIONS = "+-*"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = (*SPECIAL_TOKENS, *DIGITS, *OPERATIONS, "=", ";", ":")

Fact = tuple[str, int, int]


def apply(operation: str, left: int, right: int) -> int:
    """The result of one step, modulo ten."""
    value = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return value % 10


@dataclass(frozen=True)
class Misconception:
    """A wrong result that is written instead of the right one with probability `rate`."""

    result: int
    rate: float


class Arithmetic:
    """Digit chains and their tiny base policy.

    Args:
        operations: Operations in a chain; a chain of three has 270,000 prompts.
        train_prompts: Prompts to sample rollouts from.
        validation_prompts: Held-out prompts, disjoint from the training prompts.
        demonstrations: Written solutions that the base policy learns from, misconceptions included.
        misconceived: Share of the 300 facts that carries a misconception, between 0 and 1.
        hidden_size: Width of the base policy's hidden states.
        layers: Number of its layers.
        epochs: Passes of its supervised fine-tuning over the demonstrations.
        batch_size: Demonstrations per optimiser step.
        learning_rate: Peak learning rate, which falls to 0 on a cosine.
    """

    def __init__(
        self,
        operations: int = 3,
        train_prompts: int = 4096,
        validation_prompts: int = 320,
        demonstrations: int = 24576,
        misconceived: float = 0.6,
        hidden_size: int = 64,
        layers: int = 2,
        epochs: int = 3,
        batch_size: int = 128,
        learning_rate: float = 5e-3,
    ) -> None:
        space = 10 * (len(OPERATIONS) * 10) ** operations
        if not 1 <= operations <= 8:
            raise UserError(f"task.operations is {operations}: it must lie between 1 and 8")
        if min(train_prompts, validation_prompts, demonstrations) < 1:
            raise UserError("task.train_prompts, task.validation_prompts and task.demonstrations must be at least 1")
        if train_prompts + validation_prompts > space // 2:
            raise UserError(
                f"task.train_prompts + task.validation_prompts is {train_prompts + validation_prompts}: "
                f"chains of {operations} operations give at most {space // 2}"
            )
        if min(layers, epochs, batch_size) < 1:
            raise UserError("task.layers, task.epochs and task.batch_size must be at least 1")
        if hidden_size < 8 or hidden_size % 8:
            raise UserError(f"task.hidden_size is {hidden_size}: it must be a multiple of 8")
        if not 0 < learning_rate < float("inf"):
            raise UserError(f"task.learning_rate is {learning_rate}: it must be a positive number")
        if not 0 <= misconceived <= 1:
            raise UserError(f"task.misconceived is {misconceived}: it must lie between 0 and 1")
        self.operations = operations
        self.train_prompts = train_prompts
        self.validation_prompts = validation_prompts
        self.demonstrations = demonstrations
        self.misconceived = misconceived
        self.hidden_size = hidden_size
        self.layers = layers
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate

    def prompts(self, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Training and held-out rows `{"prompt": …, "answer": …}`, all distinct."""
        rng = random.Random(f"prompts {seed}")
        chains: dict[str, str] = {}
        while len(chains) < self.train_prompts + self.validation_prompts:
            prompt = self._prompt(rng)
            chains[prompt] = self.solve(prompt)[-1]
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in chains.items()]
        return rows[: self.train_prompts], rows[self.train_prompts :]

    def demonstrate(self, seed: int) -> list[tuple[str, str]]:
        """Prompts with written solutions in which the planted misconceptions show at their rates."""
        rng = random.Random(f"demonstrations {seed}")
        beliefs = self.misconceptions(seed)
        prompts = [self._prompt(rng) for _ in range(self.demonstrations)]
        return [(prompt, self.solve(prompt, beliefs, rng)) for prompt in prompts]

    def misconceptions(self, seed: int) -> dict[Fact, Misconception]:
        """Which facts are misconceived, as what, and how often."""
        rng = random.Random(f"misconceptions {seed}")
        facts = [(o, a, b) for o in OPERATIONS for a in range(10) for b in range(10)]
        chosen = rng.sample(facts, round(self.misconceived * len(facts)))
        return {
            (operation, left, right): Misconception(
                result=(apply(operation, left, right) + rng.randrange(1, 10)) % 10,
                rate=rng.uniform(0.35, 0.85),
            )
            for operation, left, right in chosen
        }

    @staticmethod
    def solve(
        prompt: str,
        beliefs: dict[Fact, Misconception] | None = None,
        rng: random.Random | None = None,
    ) -> str:
        """The written steps for a prompt; with `beliefs` and `rng`, misconceptions included."""
        running, steps = int(prompt[0]), []
        for operation, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
            right = int(digit)
            result = apply(operation, running, right)
            belief = (beliefs or {}).get((operation, running, right))
            if belief is not None and rng is not None and rng.random() < belief.rate:
                result = belief.result
            steps.append(f"{running}{operation}{right}={result}")
            running = result
        return ";".join(steps)

    def tokenizer(self) -> Any:
        """A character tokenizer in Hugging Face format, loadable with `AutoTokenizer`."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        pad, bos, eos = SPECIAL_TOKENS
        core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}, unk_token=pad))
        core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token=pad,
            bos_token=bos,
            eos_token=eos,
            padding_side="left",
            model_max_length=self.context,
            clean_up_tokenization_spaces=False,
        )

    @property
    def context(self) -> int:
        """Tokens that the longest prompt and its steps take, rounded up to a power of two."""
        longest = (2 * self.operations + 2) + 6 * self.operations
        return 1 << (longest + 8).bit_length()

    def initial_policy(self, seed: int) -> Any:
        """A Qwen3 of about 100,000 parameters with random weights drawn from `seed`."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden_size // 4,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.05,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Qwen3ForCausalLM(config)

    def _prompt(self, rng: random.Random) -> str:
        tail = "".join(rng.choice(OPERATIONS) + rng.choice(DIGITS) for _ in range(self.operations))
        return f"{rng.choice(DIGITS)}{tail}:"
