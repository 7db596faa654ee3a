"""What tests of the modules share: the first step of training, evaluations, and what stored scores hold."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import Response, TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.modules.training import TrainingModule
from support import trainers
from support.policies import token_logps
from support.reference import Array

NAMES = ("base", "teacher", "unlearned", "student")
CLIP = 3.0
PROMPTS = ["1+2*3:", "4-5:", "6*7-8+9:", "0:", "1-1:"]
SAMPLES = 4


def make_data(folder: Path, policies: dict[str, str], **settings: Any) -> RolloutDataModule:
    defaults: dict[str, Any] = {"batch_size": 100, "tokenizer": policies["base"]}
    return RolloutDataModule(folder / "rollouts", **{**defaults, **settings})


class FirstStep(Callback):
    """Notes the gradient of the first optimiser step, before it is clipped."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {
                name: parameter.grad.clone() for name, parameter in module.policy.model.named_parameters()
            }


def make_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """One that clips gradients hard, and logs each step."""
    return trainers.make_trainer(*callbacks, **{"log_every_n_steps": 1, "gradient_clip_val": 0.01, **settings})


def first_step(module: TrainingModule, data: RolloutDataModule, **settings: Any) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of the first step."""
    seen = FirstStep()
    trainer = make_trainer(seen, max_steps=1, **settings)
    trainer.fit(module, datamodule=data)
    return seen.gradients, float(trainer.callback_metrics["train/loss"])


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], factor * gradient, atol=2e-5 * largest, rtol=1e-3)


def sampled_logps(model: Any, row: dict[str, Any]) -> Tensor:
    logps = token_logps(model, row["prompt_ids"], row["response_ids"])
    return logps.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0]


class Recorder(TransformersSampler):
    """Remembers the responses, of which so many in a row are alike, whatever their prompts."""

    def __init__(self, alike: int = 1) -> None:
        super().__init__(6, batch_size=8)
        self.alike = alike
        self.drawn: list[tuple[list[int], Response]] = []
        self.seeds: list[int] = []

    def sample(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[Response]:
        responses = super().sample(model, tokenizer, prompts, seed)
        responses = [responses[n - n % self.alike] for n in range(len(responses))]
        self.drawn += [(list(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
        self.seeds.append(seed)
        return responses


class Validations(Callback):
    """Notes what each validation found, and the policies in memory."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []
        self.frozen: dict[int, Any] = {}
        self.during: list[int] = []
        self.training: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.training.append(len(module._references))

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.frozen |= {id(policy): weakref.ref(policy) for policy in module._references.values()}
        self.during.append(len(module._references))

    def on_test_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.on_validation_batch_end(trainer, module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.found.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.frozen.values())


def stored_logps(scores: Path) -> Iterator[dict[str, Array]]:
    """Log-probs over support and tail of each stored token in turn, by policy, from the files alone."""
    tables = {path.name: Store.open(path).table().to_pylist() for path in scores.iterdir()}
    for row in range(len(tables["base"])):
        entry = 0
        for t, size in enumerate(tables["base"][row]["support_size"]):
            yield {
                name: np.array([*table[row]["support_logps"][entry : entry + size], table[row]["tail_logps"][t]])
                for name, table in tables.items()
            }
            entry += size
