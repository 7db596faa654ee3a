"""Table of responses to held-out prompts during training, with the change of each token's log-prob."""

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from ..data.batching import RolloutTable
from ..data.loader import micro_batches
from ..data.prompt_batches import PromptBatch
from ..data.rollouts import RolloutDataModule
from ..data.samples import token_texts
from ..errors import UserError, check_at_least
from ..models.policy import Policy
from ..modules.eval_mode import eval_mode
from ..modules.policy_module import PolicyModule
from ..text import visible, wrapped

SIGNAL_MARKS = ((-1.0, "="), (-0.1, "-"), (0.1, "."), (1.0, "+"), (math.inf, "*"))
"""Marks of the signal, each with the greatest signal in nats that has it."""

SIGNAL_LEGEND = (
    "signal = log-prob minus the base policy's, nats: * above 1, + above 0.1, . between, - below -0.1, = below -1"
)

MARK_COLOURS = {"=": "\033[1;31m", "-": "\033[31m", "+": "\033[32m", "*": "\033[1;32m"}
COLOUR_RESET = "\033[0m"

TABLE_COLUMNS = ("step", "prompt", "response", "reward", "tokens", "truncated", "kl_per_response", "signal")
"""Columns of the table that loggers get."""

MIN_TERMINAL_WIDTH = 20
"""Least width of a terminal, in characters."""

LOG_WIDTH = 100
"""Width of the text that loggers get, in characters."""


@dataclass(frozen=True)
class Sample:
    """Response to a prompt.

    Attributes:
        prompt: The prompt as text.
        tokens: Text of each token, the end of the sequence included where it was reached.
        reward: None where the answer could not be checked.
        truncated: Whether the response was cut off.
        kl: KL to the base policy, exact over the vocabulary, nats per response; None without a base policy.
        signal: Log-prob of each token minus that of the base policy, nats; None without a base policy.
    """

    prompt: str
    tokens: list[str]
    reward: float | None
    truncated: bool
    kl: float | None = None
    signal: list[float] | None = None


class SampleTable(Callback):
    """Callback that shows responses to held-out prompts with reward, length, KL and the signal of every token.

    They are printed on rank zero. A line of marks below the text shows which tokens are more and which are less
    probable than under the base policy. `TensorBoardLogger` and `MLFlowLogger` get the same text, `WandbLogger` a
    table. Every logger gets `sample_table/seconds`, the time that this took so far on rank zero. Where a terminal
    writes letters from right to left, the marks stay in the order of the tokens.

    It does not affect training: global random state and the modules' modes are restored. The draws have the same
    seeds each time, so that only the policy changes. All ranks sample the same prompts, as sharded policies need it.

    It takes a module with a `policy` (`erpd_lightning.models.policy.Policy`), such as any `PolicyModule`, and a
    `RolloutDataModule`. Without held-out prompts it shows nothing. KL and signal need a `PolicyModule` with the
    reference `base`. The student of a `DistillModule` is shown before it is interpolated to its budget.

    Args:
        prompts: Number of held-out prompts, the first ones.
        samples: Number of responses to each of them.
        every_n_validations: Validations from one that is followed by samples to the next; at the end of training
            there are samples in any case.
        max_tokens: Number of tokens of a response that are shown.

    Raises:
        UserError: For a value out of range; when training begins, for a module or data that it cannot sample from.
    """

    def __init__(self, prompts: int = 4, samples: int = 1, every_n_validations: int = 2, max_tokens: int = 512) -> None:
        check_at_least(
            1, prompts=prompts, samples=samples, every_n_validations=every_n_validations, max_tokens=max_tokens
        )
        self.prompts = prompts
        self.samples = samples
        self.every_n_validations = every_n_validations
        self.max_tokens = max_tokens
        self.validations = 0
        self.seconds = 0.0
        self._batches: list[PromptBatch] = []
        self._last_shown_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the prompts.

        Raises:
            UserError: For a module or data that it cannot sample from.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, RolloutDataModule):
            raise UserError("SampleTable takes its prompts from a RolloutDataModule: trainer.fit(…, datamodule=…)")
        if not isinstance(getattr(pl_module, "policy", None), Policy):
            kind = type(pl_module).__name__
            raise UserError(f"SampleTable samples from a module's `policy`, an erpd_lightning Policy: {kind} has none")
        prompts = data.prompt_plan.held_out[: self.prompts]
        self._batches = list(data.batcher.batches(prompts, self.samples, "sample table")) if prompts else []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show samples after every `every_n_validations` validations."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show samples of the trained policy, unless they were just shown."""
        if self._last_shown_step != trainer.global_step:
            self._show(trainer, pl_module)
        if isinstance(pl_module, PolicyModule):
            # Lightning takes the policy from its device next, and would leave them there.
            pl_module.release_references()

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.seconds = state_dict["validations"], state_dict["seconds"]

    def _show(self, trainer: Trainer, pl_module: Any) -> None:
        if not self._batches:
            return
        start = perf_counter()
        self._last_shown_step = step = trainer.global_step
        logged_at = max(step - 1, 0)  # Where Lightning counts the step's other values.
        has_base = isinstance(pl_module, PolicyModule) and "base" in pl_module.references
        with eval_mode(trainer, pl_module), torch.no_grad():
            base = pl_module.reference("base") if has_base else None
            samples = [sample for batch in self._batches for sample in sample_responses(pl_module.policy, base, batch)]
        if trainer.is_global_zero:
            title = f"Samples after optimiser step {step}"
            _print(title, samples, self.max_tokens)
            for logger in trainer.loggers:
                log_samples(logger, title, samples, self.max_tokens, logged_at)
        self.seconds += perf_counter() - start
        for logger in trainer.loggers:
            logger.log_metrics({"sample_table/seconds": self.seconds}, step=logged_at)


def sample_responses(policy: Policy, base: Policy | None, prompts: PromptBatch) -> list[Sample]:
    """Responses of a policy to prompts, in their order, with KL and signal to the base policy.

    Args:
        policy: The policy that is sampled from.
        base: The base policy; None for neither KL nor signal.
        prompts: The prompts; their seed is that of the draws.
    """
    table = prompts.respond(policy.model)
    samples = [
        Sample(
            prompt=row["prompt"],
            tokens=token_texts(prompts.tokenizer, row["response_ids"]),
            reward=row["reward"] if row["checked"] else None,
            truncated=row["finish_reason"] == "length",
        )
        for row in table.to_pylist()
    ]
    if base is None:
        return samples
    for batch in micro_batches(RolloutTable.from_arrow(table), prompts.max_tokens):
        batch = batch.to(policy.head.weight.device)
        hidden = policy.hidden(batch)
        signal = policy.token_logps(batch, hidden).logps - base.token_logps(batch).logps
        kl = policy.divergence(base, batch, hidden).kl.sum(-1).tolist()
        for place, row in enumerate(batch.rows.tolist()):
            token_signal = signal[place][batch.mask[place]].tolist()
            samples[row] = replace(samples[row], kl=kl[place], signal=token_signal)
    return samples


def format_samples(
    title: str, samples: Sequence[Sample], columns: int, max_tokens: int, colour: bool = False, encoding: str = "utf-8"
) -> str:
    """Samples as text: reward, length and KL, the tokens, and below them the marks of `SIGNAL_MARKS`.

    Args:
        title: The first line.
        samples: The samples.
        columns: Greatest width of a line in characters, at least 2.
        max_tokens: Number of tokens of a response that are shown.
        colour: Whether to colour the tokens by their marks, for a terminal.
        encoding: Encoding of the terminal or file.
    """
    lines = [*_plain(title, columns)]
    if any(sample.signal is not None for sample in samples):
        lines += _plain(SIGNAL_LEGEND, columns)
    for sample in samples:
        lines += [
            "",
            *_plain(f"prompt: {visible(sample.prompt, encoding)}", columns),
            *_plain(_measures_text(sample), columns),
        ]
        tokens = [visible(token, encoding) for token in sample.tokens[:max_tokens]]
        marks = " " * len(tokens) if sample.signal is None else [_mark(nats) for nats in sample.signal[:max_tokens]]
        for texts, below in wrapped(zip(tokens, marks, strict=True), columns):
            lines.append("".join(_coloured(text, mark, colour) for text, mark in texts))
            lines += [] if sample.signal is None else [below]
        if len(sample.tokens) > max_tokens:
            lines += _plain(f"... and {len(sample.tokens) - max_tokens} more tokens", columns)
    return "\n".join(lines)


def log_samples(logger: Logger, title: str, samples: Sequence[Sample], max_tokens: int, step: int) -> None:
    """Log samples with a logger that can show text or tables; others get nothing.

    Args:
        logger: The logger.
        title: First line of the text.
        samples: The samples.
        max_tokens: Number of tokens of a response that are shown.
        step: Step that they are logged at.
    """
    if isinstance(logger, WandbLogger):
        rows: list[list[Any]] = [[step, *_cells(sample, max_tokens)] for sample in samples]
        logger.log_table(key="samples", columns=list(TABLE_COLUMNS), data=rows, step=step)
        return
    text = format_samples(title, samples, LOG_WIDTH, max_tokens)
    if isinstance(logger, TensorBoardLogger):
        # Indented text is code in Markdown: the markup of a response has no effect.
        indented = "\n".join(f"    {line}" for line in text.split("\n"))
        logger.experiment.add_text("samples", indented, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text + "\n", f"samples/step-{step:08}.txt")


def _cells(sample: Sample, max_tokens: int) -> tuple[Any, ...]:
    """Row of the table, without the step."""
    tokens = [visible(token) for token in sample.tokens[:max_tokens]]
    signal = None
    if sample.signal is not None:
        signal = " ".join(f"{token}({nats:+.2f})" for token, nats in zip(tokens, sample.signal, strict=False))
    measures = (sample.reward, len(sample.tokens), sample.truncated, sample.kl, signal)
    return (visible(sample.prompt), "".join(tokens), *measures)


def _measures_text(sample: Sample) -> str:
    """Reward, length and KL of a sample."""
    reward = "not checked" if sample.reward is None else f"reward {sample.reward:g}"
    length = f"{len(sample.tokens)} tokens{', cut off' if sample.truncated else ''}"
    return f"{reward}, {length}" + ("" if sample.kl is None else f", KL {sample.kl:.3g} nats")


def _mark(nats: float) -> str:
    if math.isnan(nats):
        return "?"
    return next(mark for bound, mark in SIGNAL_MARKS if nats <= bound)


def _plain(text: str, columns: int) -> list[str]:
    """Lines of a visible text."""
    return ["".join(part for part, _ in texts) for texts, _ in wrapped([(text, " ")], columns)]


def _coloured(text: str, mark: str, colour: bool) -> str:
    return f"{MARK_COLOURS[mark]}{text}{COLOUR_RESET}" if colour and mark in MARK_COLOURS else text


def _print(title: str, samples: Sequence[Sample], max_tokens: int) -> None:
    columns = max(shutil.get_terminal_size().columns, MIN_TERMINAL_WIDTH)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    encoding = sys.stdout.encoding or "utf-8"
    print(format_samples(title, samples, columns, max_tokens, colour, encoding), flush=True)
