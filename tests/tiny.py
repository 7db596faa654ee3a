"""Tiny policies and rollouts that several tests share, and what a policy says, the slow and obvious way."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from erpd_lightning.data.arithmetic import Arithmetic
from erpd_lightning.data.store import ROLLOUTS, Store, StoreWriter
from erpd_lightning.policy import export_policy

TASK = Arithmetic(operations=2, hidden_size=16, layers=1)
VOCABULARY_SIZE = 19


def sharpen(model: Any, factor: float = 8.0) -> Any:
    """Scale a fresh model's matrices: its distributions are far from uniform, and differ from state to state."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model.eval()


def make_model(seed: int = 0) -> Any:
    """A Qwen3 of a few thousand parameters."""
    return sharpen(TASK.initial_policy(seed))


def save_policy(path: Path, model: Any = None, seed: int = 0) -> Path:
    """A policy with the task's tokenizer, as a Hugging Face folder."""
    export_policy(make_model(seed) if model is None else model, TASK.tokenizer(), path)
    return path


def token_logps(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-probs over the vocabulary at each response token, `(T, V)`: one sequence, no padding, all logits."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    first = len(prompt) - 1
    return logits[first : first + len(response)].log_softmax(-1)


def make_rows(groups: int = 4, group_size: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up rollouts of unequal length with log-probs of nobody; each group has right and wrong ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rows = []
    for group in range(groups):
        prompt = draw(3, VOCABULARY_SIZE, draw(2, 7)[0])
        for sample in range(group_size):
            response = [*draw(3, VOCABULARY_SIZE, draw(1, 9)[0]), 2]
            noise = torch.rand(len(response), generator=generator)
            rows.append(
                {
                    "group": group,
                    "sample": sample,
                    "prompt_ids": prompt,
                    "response_ids": response,
                    "logps": (-1.5 - 2 * noise).tolist(),
                    "reward": float(sample <= group % (group_size - 1)),
                    "finish_reason": "stop",
                    "checked": True,
                    "prompt": "",
                    "response": "",
                    "answer": "",
                }
            )
    return rows


def write_rollouts(path: Path, rows: Sequence[dict[str, Any]]) -> Store:
    """A finished rollout store."""
    writer = StoreWriter(path, ROLLOUTS, {})
    writer.write_part(0, {name: [row[name] for row in rows] for name in ROLLOUTS.names})
    return writer.finish(1)


def fake_trainer(module: Any, rank: int = 0, world_size: int = 1) -> Any:
    """As much of a trainer as passes and data loaders ask for, on one of several ranks."""
    return SimpleNamespace(
        lightning_module=module,
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        is_global_zero=rank == 0,
        strategy=SimpleNamespace(barrier=lambda *_: None),
        accumulate_grad_batches=1,
        state=SimpleNamespace(fn=None),
    )
