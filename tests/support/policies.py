"""Tiny policies and rollouts that several tests share, and what a policy says, the slow and obvious way."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from erpd_lightning.data.arithmetic import Arithmetic
from erpd_lightning.data.store import ROLLOUTS, Store, StoreWriter
from erpd_lightning.models.policy import export_policy

TASK = Arithmetic(operations=2, hidden_size=16, layers=1)
VOCABULARY_SIZE = 19


def sharpen(model: Any, factor: float = 8.0) -> Any:
    """Scale a fresh model's matrices: its distributions are far from uniform, and differ from state to state."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model.eval()


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
TOKENS: dict[str, Any] = {name: SMALL[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, **TOKENS),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, final_logit_softcapping=1.5, attn_logit_softcapping=2.0, sliding_window=4
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True
    ),
    "cohere": lambda: transformers.CohereConfig(
        **{key: value for key, value in SMALL.items() if key != "head_dim"}, logit_scale=0.3
    ),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=3.0, embedding_multiplier=2.0),
    "phi": lambda: transformers.PhiConfig(**SMALL),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=8,
        max_position_embeddings=32,
        **TOKENS,
    ),
    "falcon": lambda: transformers.FalconConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, **TOKENS),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**GPT2, **TOKENS),
}


def build(name: str, dropout: float = 0.0) -> Any:
    """A model of one of `ARCHITECTURES`, with all dropout rates set to the same."""
    config = ARCHITECTURES[name]()
    for key, value in vars(config).copy().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, dropout)
    torch.manual_seed(0)
    model = sharpen(transformers.AutoModelForCausalLM.from_config(config), 6.0)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def make_model(seed: int = 0) -> Any:
    """A Qwen3 of a few thousand parameters."""
    return sharpen(TASK.initial_policy(seed))


def save_policy(path: Path, model: Any = None, seed: int = 0) -> Path:
    """A policy with the task's tokenizer, as a Hugging Face folder."""
    export_policy(make_model(seed) if model is None else model, TASK.tokenizer(), path)
    return path


def save_policies(folder: Path, *names: str) -> dict[str, str]:
    """Policies of the seeds 0, 1, ... by name, as folders below one."""
    return {name: str(save_policy(folder / name, seed=seed)) for seed, name in enumerate(names)}


def token_logps(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probs over the vocabulary at each response token, `(T, V)`: one sequence, no padding, all logits."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    first = len(prompt) - 1
    return logits[first : first + len(response)].log_softmax(-1)


WITHOUT_TEXT: dict[str, Any] = {
    **{"finish_reason": "stop", "checked": True, "prompt": "", "response": "", "answer": "", "rewards": "{}"}
}
"""The rest of a made-up rollout, of which the token ids are all that counts."""


def make_rows(groups: int = 4, group_size: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up rollouts of unequal length with log-probs of nobody; each group has correct and incorrect ones."""
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
                    "temperature": 1.0,
                    "reward": float(sample <= group % (group_size - 1)),
                    **WITHOUT_TEXT,
                }
            )
    return rows


def write_rollouts(path: Path, rows: Sequence[dict[str, Any]]) -> Store:
    """A finished rollout store."""
    writer = StoreWriter(path, ROLLOUTS, {})
    writer.write_part(0, {name: [row[name] for row in rows] for name in ROLLOUTS.names})
    return writer.finish(1)


def write_prompts(path: Path, prompts: Iterable[tuple[str, str]]) -> Path:
    """A JSON Lines file of prompts and their answers."""
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in prompts))
    return path


def write_round(folder: Path) -> Path:
    """A base policy, rollouts and a prompt in a folder; returns the folder."""
    save_policy(folder / "base")
    write_rollouts(folder / "rollouts", make_rows())
    write_prompts(folder / "prompts.jsonl", [("1+1:", "2")])
    return folder
