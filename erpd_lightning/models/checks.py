"""Whether a language model that was loaded is the policy it is taken for: all weights there and finite, a head that is
understood, and log-probs that do not depend on how a batch is padded.

What is asked here is what sampling and training rely on: that the log-probs of a response, read off the hidden states
of prompt and response by `head`, are those of the distributions that `generate` drew its tokens from.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, first_line
from .generation import generation_config

MAX_DIFFERENCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Nats by which two ways to the same log-prob may differ, by the weights' data type.

Real models were seen to differ by 2.3e-5 in float32, and by 0.34 at most in bfloat16, which rounds to 3 digits."""

PROMPTS = ((5, 7, 3), (9, 4))
"""Two prompts of different lengths, in thirteenths of the vocabulary; so few tokens that loading takes longer."""

NEW_TOKENS = 2
"""Tokens that are generated to each: the second one is decoded with a cache."""


def check_weights(model: Any, loaded: dict[str, Any], path: str | Path) -> None:
    """Whether every weight of a model came from its checkpoint, in its shape, and is finite.

    Args:
        model: The language model.
        loaded: What `from_pretrained` says of the weights with `output_loading_info`.
        path: What to call the policy in a message.

    Raises:
        UserError: Names the first weights that are missing, have another shape, belong to a part of the model that has
            no place for them, or are not finite.
    """
    if mismatched := sorted(loaded["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise UserError(
            f"policy {path}: {name} has the shape {tuple(found)} in the checkpoint, but the configuration asks for "
            f"{tuple(wanted)}{_and_others(mismatched)}"
        )
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"policy {path}: the checkpoint has no {missing[0]}{_and_others(missing)}, which "
            f"{type(model).__name__} needs: it would be drawn anew at each load"
        )
    # What belongs to no part, such as a head for another task, changes nothing: `transformers` reports it.
    if unplaced := sorted(name for name in loaded["unexpected_keys"] if _has_part(model, name)):
        raise UserError(
            f"policy {path}: the checkpoint has {unplaced[0]}{_and_others(unplaced)}, for which {type(model).__name__} "
            "has no place as it is configured: without it, the policy would be another one"
        )
    if errors := loaded["error_msgs"]:
        raise UserError(f"policy {path}: {first_line(Exception(errors[0]))}")
    broken = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if broken:
        raise UserError(f"policy {path}: {broken[0]}{_and_others(broken)} has values that are NaN or infinite")


def is_finite(weight: Tensor) -> bool:
    """Whether all values of a weight are finite; one pass without a temporary, where `isfinite` makes two."""
    weight = weight.detach()
    if not weight.numel() or not weight.is_floating_point():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())


def _has_part(model: Any, name: str) -> bool:
    """Whether the part that a weight's name stands for, such as a linear layer, is there and has weights of its own."""
    part = dict(model.named_modules()).get(name.rpartition(".")[0])
    return part is not None and next(part.parameters(recurse=False), None) is not None


def _and_others(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


_checked: set[tuple[Any, ...]] = set()
"""The kinds of models that were found to be in order in this process."""


@dataclass(frozen=True)
class _Tokens:
    """Prompts with their responses, right padded; see `policy.TokenBatch`."""

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    response_ids: Tensor
    mask: Tensor


@torch.no_grad()
def check_policy(policy: Any, path: str | Path) -> None:
    """Whether a policy's log-probs are its model's own: of a sequence alone, and of left-padded prompts.

    Two short prompts of different lengths are answered with two tokens by `generate`, padded on the left as in
    sampling. The log-probs that these were drawn from and those that the policy reads off its hidden states, padded on
    the right as in training, must agree over the whole vocabulary.

    What is found depends on the configuration, not on the weights: it is asked once in a process of each.

    Args:
        policy: A `Policy`, in training mode or not; it is left as it was.
        path: What to call it in a message.

    Raises:
        UserError: If they differ by more than `MAX_DIFFERENCE`: names the architecture and the largest difference.
    """
    model, name = policy.model, type(policy.model).__name__
    key = _kind(model)
    if key in _checked:
        return
    was_training = model.training
    model.eval()
    try:
        found = _disagreement(policy)
    except Exception as error:  # What an architecture does that is not one of a causal language model is its own.
        raise UserError(
            f"policy {path}: {name} cannot be used as a causal language model: {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)
    if found is not None:
        about, difference, limit = found
        raise UserError(
            f"policy {path}: {name} {about}: log-probs of the same tokens differ by up to {difference:.2g} nats, more "
            f"than the {limit:g} of rounding"
        )
    _checked.add(key)


def _kind(model: Any) -> tuple[Any, ...]:
    """What a model's log-probs are computed by, apart from its weights."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    attention = getattr(model.config, "_attn_implementation", None)
    return type(model), model.dtype, model.device.type, attention, json.dumps(config, sort_keys=True, default=str)


def _disagreement(policy: Any) -> tuple[str, float, float] | None:
    """What is wrong with a policy, the largest difference of log-probs that should be the same, and what it may be.

    None where they agree.
    """
    head = policy.head
    limit = MAX_DIFFERENCE.get(head.weight.dtype, MAX_DIFFERENCE[torch.bfloat16])
    vocabulary = len(head.weight)
    prompts = [[token * vocabulary // 13 for token in prompt] for prompt in PROMPTS]
    drawn, responses = _generate(policy.model, prompts)
    if drawn.shape[-1] != vocabulary:
        raise ValueError(f"its head has {vocabulary} rows, but there are {drawn.shape[-1]} logits")
    read = head.logps(policy.hidden(_right_padded(prompts, responses, head.weight.device))).view_as(drawn)
    difference = float((drawn - read).abs().max())
    if difference <= limit:
        return None
    alone = torch.tensor([[*prompts[0], *responses[0][:-1]]], device=read.device)
    own = policy.model(input_ids=alone, attention_mask=torch.ones_like(alone), use_cache=False).logits[0]
    own = own[-NEW_TOKENS:].to(read.dtype).log_softmax(-1)
    reasons = {
        "is no causal language model, what follows a token changes its log-prob": drawn[0, 0] - own[0],
        "does more to its logits than is known here": own - read[0],
        "decodes otherwise with a cache than in one pass": drawn[0, 1:] - own[1:],
    }
    reason = next((about for about, each in reasons.items() if not float(each.abs().max()) <= limit), None)
    return reason or "takes left padding for tokens", difference, limit


def _generate(model: Any, prompts: list[list[int]]) -> tuple[Tensor, list[list[int]]]:
    """Log-probs `(prompts, NEW_TOKENS, V)` that tokens were generated from, and the tokens; padded on the left."""
    width, device = max(map(len, prompts)), model.device
    # A token that the prompts hold too: padding is what the mask says, whatever stands there.
    ids = torch.tensor([[*[prompts[0][0]] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts], device=device)
    greedy = generation_config(
        model, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=int(ids[0, 0])
    )
    with greedy:
        out = model.generate(input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits, dim=1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1), out.sequences[:, width:].tolist()


def _right_padded(prompts: list[list[int]], responses: list[list[int]], device: torch.device) -> _Tokens:
    """Prompts with their responses as training sees them; the last token predicts none."""
    rows = [[*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    firsts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    tokens = _Tokens(
        input_ids=torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows]),
        attention_mask=torch.tensor([[*[True] * len(row), *[False] * (width - len(row))] for row in rows]),
        positions=firsts[:, None] + torch.arange(NEW_TOKENS),
        response_ids=torch.tensor(responses),
        mask=torch.ones(len(prompts), NEW_TOKENS, dtype=torch.bool),
    )
    return _Tokens(*(value.to(device) for value in vars(tokens).values()))
