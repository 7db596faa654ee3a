"""Demonstrations as a rollout store, so that supervised fine-tuning is cross-entropy on correct responses."""

from pathlib import Path

from .arithmetic import Arithmetic
from .store import ROLLOUTS, Store, StoreWriter


def write_demonstrations(task: Arithmetic, seed: int, path: Path) -> Store:
    """Write a task's demonstrations as responses with reward 1; their sampler log-probs are unknown, hence 0."""
    tokenizer = task.tokenizer()
    prompts, solutions = zip(*task.demonstrate(seed), strict=True)
    responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(solutions)).input_ids]
    count = len(prompts)
    writer = StoreWriter(path, ROLLOUTS, {"task": type(task).__name__, "seed": seed, **vars(task)})
    writer.write_part(
        0,
        {
            "group": range(count),
            "sample": [0] * count,
            "prompt_ids": tokenizer(list(prompts)).input_ids,
            "response_ids": responses,
            "logps": [[0.0] * len(ids) for ids in responses],
            "temperature": [1.0] * count,
            "reward": [1.0] * count,
            "finish_reason": ["stop"] * count,
            "checked": [True] * count,
            "prompt": prompts,
            "response": solutions,
            "answer": [task.solve(prompt)[-1] for prompt in prompts],
            "rewards": ["{}"] * count,
        },
    )
    return writer.finish(1)
