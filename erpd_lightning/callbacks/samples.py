"""What a policy writes, and what training did to each token of it, for a person to look at while it trains."""

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from ..data.batching import RolloutTable
from ..data.loader import micro_batches
from ..data.prompts import PromptBatch
from ..data.rollouts import RolloutDataModule
from ..data.samples import token_texts
from ..errors import UserError
from ..models.policy import Policy
from ..modules.policy_module import PolicyModule
from ..text import visible, wrapped
from .undisturbed import undisturbed

MARKS = ((-1.0, "="), (-0.1, "-"), (0.1, "."), (1.0, "+"), (math.inf, "*"))
"""Marks of the signal up to so many nats; the last one is above all of them."""

LEGEND = "signal = log-prob minus the base policy's, nats: * above 1, + above 0.1, . between, - below -0.1, = below -1"

COLOURS = {"=": "\033[1;31m", "-": "\033[31m", "+": "\033[32m", "*": "\033[1;32m"}
PLAIN = "\033[0m"

COLUMNS = ("step", "prompt", "response", "reward", "tokens", "truncated", "kl_per_response", "signal")
"""Of the table that loggers get."""

LEAST_COLUMNS = 20
LOGGED_COLUMNS = 100
"""Width of a terminal at the least, and of the text that loggers get."""


@dataclass(frozen=True)
class Sample:
    """A response to a prompt.

    Attributes:
        prompt: The prompt as text.
        pieces: The response's tokens as text, the end of the sequence included where it was reached.
        reward: None where the answer could not be checked.
        truncated: Whether the response was cut off.
        kl: KL to the base policy, exact over the vocabulary, nats per response; None without a base policy.
        signal: Log-prob of each token minus that of the base policy, nats; None without a base policy.
    """

    prompt: str
    pieces: list[str]
    reward: float | None
    truncated: bool
    kl: float | None = None
    signal: list[float] | None = None


class SampleTable(Callback):
    """Shows responses to a few held-out prompts, with reward, length, KL and the signal of every token.

    They are printed on rank zero, with a line of marks below the text: which tokens the policy says more and which
    less often than the base policy. `TensorBoardLogger` and `MLFlowLogger` get the same text, `WandbLogger` a table;
    every logger gets `sample_table/seconds`, what this took so far on rank zero. Where a terminal writes letters from
    right to left, the marks stay in the order of the tokens.

    Training is not disturbed: the draws have seeds of their own, the same each time, so that what changes is the
    policy; global random state and the modules' modes are as they were afterwards. All ranks answer the same prompts,
    as sharded policies need it.

    It takes a module with a `policy` (`erpd_lightning.models.policy.Policy`), such as any `PolicyModule`, and a
    `RolloutDataModule`; without held-out prompts it shows nothing. KL and signal need a `PolicyModule` with the
    reference `base`. A student that `DistillModule` moves to its budget after training is shown as it was trained.

    Args:
        prompts: Held-out prompts that are answered, the first ones.
        samples: Responses to each of them.
        every_n_validations: Validations from one that is followed by samples to the next; at the end of training
            there are samples in any case.
        max_tokens: Tokens of a response that are shown.

    Raises:
        UserError: For a value out of range; when training begins, for a module or data that it cannot sample from.
    """

    def __init__(self, prompts: int = 4, samples: int = 1, every_n_validations: int = 2, max_tokens: int = 512) -> None:
        counts = {
            "prompts": prompts,
            "samples": samples,
            "every_n_validations": every_n_validations,
            "max_tokens": max_tokens,
        }
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"{name} is {count}: it must be at least 1")
        self.prompts = prompts
        self.samples = samples
        self.every_n_validations = every_n_validations
        self.max_tokens = max_tokens
        self.validations = 0
        self.seconds = 0.0
        self._batches: list[PromptBatch] = []
        self._shown: int | None = None

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
        prompts = data.held_out_prompts()[: self.prompts]
        self._batches = list(data.prompt_batches(prompts, self.samples, "sample table", 0, 1)) if prompts else []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show samples where they are due."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show samples of what was trained, unless they were just shown."""
        if self._shown != trainer.global_step:
            self._show(trainer, pl_module)
        if isinstance(pl_module, PolicyModule):
            pl_module.release_frozen()  # Lightning takes the policy from its device next, and would leave them there.

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.seconds = state_dict["validations"], state_dict["seconds"]

    def _show(self, trainer: Trainer, pl_module: Any) -> None:
        if not self._batches:
            return
        began = perf_counter()
        self._shown = step = trainer.global_step
        logged_at = max(step - 1, 0)  # Where Lightning counts the step's other values.
        has_base = isinstance(pl_module, PolicyModule) and "base" in pl_module.references
        with undisturbed(trainer, pl_module), torch.no_grad():
            base = pl_module.frozen("base") if has_base else None
            found = [sample for batch in self._batches for sample in respond(pl_module.policy, base, batch)]
        if trainer.is_global_zero:
            title = f"Samples after optimiser step {step}"
            _print(title, found, self.max_tokens)
            for logger in trainer.loggers:
                log_samples(logger, title, found, self.max_tokens, logged_at)
        self.seconds += perf_counter() - began
        for logger in trainer.loggers:
            logger.log_metrics({"sample_table/seconds": self.seconds}, step=logged_at)


def respond(policy: Policy, base: Policy | None, prompts: PromptBatch) -> list[Sample]:
    """The policy's responses to some prompts, in their order, and what the base policy says of them.

    Args:
        policy: What responds.
        base: What it is compared with, if with anything.
        prompts: The prompts; their seed is that of the draws.
    """
    table = prompts.respond(policy.model)
    found = [
        Sample(
            prompt=row["prompt"],
            pieces=token_texts(prompts.tokenizer, row["response_ids"]),
            reward=row["reward"] if row["checked"] else None,
            truncated=row["finish_reason"] == "length",
        )
        for row in table.to_pylist()
    ]
    if base is None:
        return found
    for batch in micro_batches(RolloutTable.from_arrow(table), prompts.max_tokens):
        batch = batch.to(policy.head.weight.device)
        hidden = policy.hidden(batch)
        signal = policy.token_logps(batch, hidden).logps - base.token_logps(batch).logps
        kl = policy.divergence(base, batch, hidden).kl.sum(-1).tolist()
        for place, row in enumerate(batch.rows.tolist()):
            said = signal[place][batch.mask[place]].tolist()
            found[row] = Sample(**{**vars(found[row]), "kl": kl[place], "signal": said})
    return found


def format_samples(
    title: str, samples: Sequence[Sample], columns: int, max_tokens: int, colour: bool = False, encoding: str = "utf-8"
) -> str:
    """Samples as text: what each is like, its tokens, and below them the marks of `MARKS`.

    Args:
        title: The first line.
        samples: The samples.
        columns: Most columns of a line, at least 2.
        max_tokens: Tokens of a response that are shown.
        colour: Whether to colour the tokens by their marks, for a terminal.
        encoding: That of the terminal or file.
    """
    lines = [*_plain(title, columns)]
    if any(sample.signal is not None for sample in samples):
        lines += _plain(LEGEND, columns)
    for sample in samples:
        lines += ["", *_plain(f"prompt: {visible(sample.prompt, encoding)}", columns), *_plain(_about(sample), columns)]
        pieces = [visible(piece, encoding) for piece in sample.pieces[:max_tokens]]
        marks = " " * len(pieces) if sample.signal is None else [_mark(nats) for nats in sample.signal[:max_tokens]]
        for texts, below in wrapped(zip(pieces, marks, strict=True), columns):
            lines.append("".join(_coloured(text, mark, colour) for text, mark in texts))
            lines += [] if sample.signal is None else [below]
        if len(sample.pieces) > max_tokens:
            lines += _plain(f"... and {len(sample.pieces) - max_tokens} more tokens", columns)
    return "\n".join(lines)


def log_samples(logger: Logger, title: str, samples: Sequence[Sample], max_tokens: int, step: int) -> None:
    """Give samples to a logger that can show text or tables; others are left alone.

    Args:
        logger: The logger.
        title: First line of the text.
        samples: The samples.
        max_tokens: Tokens of a response that are shown.
        step: Where the logger shall count them.
    """
    if isinstance(logger, WandbLogger):
        rows: list[list[Any]] = [[step, *_cells(sample, max_tokens)] for sample in samples]
        logger.log_table(key="samples", columns=list(COLUMNS), data=rows, step=step)
        return
    text = format_samples(title, samples, LOGGED_COLUMNS, max_tokens)
    if isinstance(logger, TensorBoardLogger):
        # Indented, it is taken for code: no markup of a response is obeyed.
        indented = "\n".join(f"    {line}" for line in text.split("\n"))
        logger.experiment.add_text("samples", indented, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text + "\n", f"samples/step-{step:08}.txt")


def _cells(sample: Sample, max_tokens: int) -> tuple[Any, ...]:
    """A row of the table, without the step."""
    pieces = [visible(piece) for piece in sample.pieces[:max_tokens]]
    signal = None
    if sample.signal is not None:
        signal = " ".join(f"{piece}({nats:+.2f})" for piece, nats in zip(pieces, sample.signal, strict=False))
    about = (sample.reward, len(sample.pieces), sample.truncated, sample.kl, signal)
    return (visible(sample.prompt), "".join(pieces), *about)


def _about(sample: Sample) -> str:
    reward = "not checked" if sample.reward is None else f"reward {sample.reward:g}"
    length = f"{len(sample.pieces)} tokens{', cut off' if sample.truncated else ''}"
    return f"{reward}, {length}" + ("" if sample.kl is None else f", KL {sample.kl:.3g} nats")


def _mark(nats: float) -> str:
    if math.isnan(nats):
        return "?"
    return next(mark for most, mark in MARKS if nats <= most)


def _plain(text: str, columns: int) -> list[str]:
    """A visible text in lines."""
    return ["".join(part for part, _ in texts) for texts, _ in wrapped([(text, " ")], columns)]


def _coloured(text: str, mark: str, colour: bool) -> str:
    return f"{COLOURS[mark]}{text}{PLAIN}" if colour and mark in COLOURS else text


def _print(title: str, samples: Sequence[Sample], max_tokens: int) -> None:
    columns = max(shutil.get_terminal_size().columns, LEAST_COLUMNS)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    encoding = sys.stdout.encoding or "utf-8"
    print(format_samples(title, samples, columns, max_tokens, colour, encoding), flush=True)
