"""A policy: a causal language model, loaded, run on stored responses in bounded memory, and exported."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument, UserError
from ..files import sha256_file
from ..objectives.divergences import Direction
from .checks import check_policy, check_weights
from .head import MAX_LOGITS, Divergence, Head, TokenStats, divergence, select_support, support_logps, token_logps
from .loading import hub_commit, is_adapter, loading

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "*.codes",
)
"""What a tokenizer consists of; which of them there are differs from one to another."""

DOCUMENTS = {".md", ".rst", ".pdf", ".png", ".jpg", ".svg"}
"""Endings of files beside a policy that say nothing of it but to people."""


class TokenBatch(Protocol):
    """What a policy is run on: prompts with their responses, right padded; see `data.batching.RolloutBatch`."""

    @property
    def input_ids(self) -> Tensor:
        """`(B, L)` long, prompt then response."""

    @property
    def attention_mask(self) -> Tensor:
        """`(B, L)` bool, True on prompt and response."""

    @property
    def positions(self) -> Tensor:
        """`(B, T)` long, where in L the hidden state is that predicts response token t."""

    @property
    def response_ids(self) -> Tensor:
        """`(B, T)` long."""

    @property
    def mask(self) -> Tensor:
        """`(B, T)` bool, True on response tokens."""

    @property
    def temperature(self) -> float:
        """At which the responses were drawn: whatever is asked about them is asked of the policy at it."""


class Policy(nn.Module):
    """A causal language model and the bounded-memory questions that are asked of it.

    Every method takes a `TokenBatch` and answers for its response tokens alone, aligned to `(B, T)`; what the
    mask leaves out is 0. Log-probs, entropy and KL are those of the policy at the batch's temperature. Nothing of size
    tokens x vocabulary is ever made (see `head`).

    Args:
        model: A causal language model of `transformers`.
        max_logits: The most logits to hold at a time.
    """

    def __init__(self, model: Any, max_logits: int = MAX_LOGITS) -> None:
        super().__init__()
        self.model = model
        self.max_logits = max_logits

    def hidden(self, batch: TokenBatch) -> Tensor:
        """The hidden states that predict the batch's response tokens, flat: `(N, D)`."""
        states = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
        ).last_hidden_state
        rows = torch.arange(len(states), device=states.device)[:, None].expand_as(batch.positions)
        return states[rows[batch.mask], batch.positions[batch.mask]]

    def token_logps(self, batch: TokenBatch, hidden: Tensor | None = None) -> TokenStats:
        """Log-probs of the response tokens and entropies (detached), in nats: both `(B, T)`."""
        hidden = self.hidden(batch) if hidden is None else hidden
        stats = token_logps(self._head_at(batch), hidden, batch.response_ids[batch.mask], max_logits=self.max_logits)
        return TokenStats(align(stats.logps, batch.mask), align(stats.entropy, batch.mask))

    def support_logps(self, batch: TokenBatch, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Log-probs over the support `ids` `(B, T, K)` and its tail: `(B, T, K + 1)`, nats."""
        hidden = self.hidden(batch) if hidden is None else hidden
        logps = support_logps(self._head_at(batch), hidden, ids[batch.mask], max_logits=self.max_logits)
        return align(logps, batch.mask)

    def select_support(self, batch: TokenBatch, mass: float, max_size: int, hidden: Tensor | None = None) -> Tensor:
        """The smallest sets of entries that hold `mass`: ids `(B, T, K)`, padded with -1."""
        hidden = self.hidden(batch) if hidden is None else hidden
        ids = select_support(self._head_at(batch), hidden, mass=mass, max_size=max_size, max_logits=self.max_logits)
        aligned = ids.new_full((*batch.mask.shape, ids.shape[-1]), -1)
        aligned[batch.mask] = ids
        return aligned

    def divergence(
        self,
        reference: "Policy",
        batch: TokenBatch,
        hidden: Tensor | None = None,
        direction: Direction = "reverse",
    ) -> Divergence:
        """`KL(self || reference)`, exact over the vocabulary, and own entropy: `(B, T)`, nats.

        With direction `forward` it is `KL(reference || self)`. Differentiable in this policy in both; the reference
        gets no gradient.
        """
        hidden = self.hidden(batch) if hidden is None else hidden
        with torch.no_grad():
            other = reference.hidden(batch)
        heads = self._head_at(batch), reference._head_at(batch)
        found = divergence(heads[0], hidden, heads[1], other, direction=direction, max_logits=self.max_logits)
        return Divergence(align(found.kl, batch.mask), align(found.entropy, batch.mask))

    def _apply(self, fn: Any, recurse: bool = True) -> "Policy":
        """Move or convert, but leave what is computed from the configuration in its data type.

        Such as the frequencies of rotary embeddings: `from_pretrained` keeps them in float32 whatever the weights are,
        where `bf16-true` would round them, and with them every position.
        """
        kept = {
            (module, name): module.get_buffer(name)
            for module in self.modules()
            for name in module._non_persistent_buffers_set
            if isinstance(module._buffers.get(name), Tensor)
        }
        super()._apply(fn, recurse)
        for (module, name), before in kept.items():
            after = module.get_buffer(name)
            if after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @property
    def head(self) -> Head:
        """The output head of the language model."""
        return Head.of(self.model)

    def _head_at(self, batch: TokenBatch) -> Head:
        """The output head at the temperature of a batch."""
        return replace(self.head, temperature=batch.temperature)


def align(flat: Tensor, mask: Tensor) -> Tensor:
    """Spread `(N, …)` values over the `N` true entries of a mask `(B, T)`: `(B, T, …)`, 0 elsewhere."""
    aligned = flat.new_zeros((*mask.shape, *flat.shape[1:]))
    aligned[mask] = flat
    return aligned


def check_dtype(dtype: str) -> None:
    """Whether weights can have a data type, by its name in `torch`.

    Raises:
        InvalidArgument: If it is no floating-point type.
    """
    kind = getattr(torch, dtype, None)
    if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise InvalidArgument("dtype", f"is {dtype!r}: it must be a floating-point type of torch such as bfloat16")


def load_policy(path: str | Path, dtype: str = "float32", max_logits: int = MAX_LOGITS) -> Policy:
    """Load a Hugging Face folder or hub name, with dropout off: a policy's log-probs are its own.

    Args:
        path: Folder or hub name.
        dtype: Data type of its weights, as in `torch`, whatever that of the files is.
        max_logits: The most logits to hold at a time.

    Raises:
        UserError: If nothing that `AutoModelForCausalLM` can load lies there, a weight is missing, has another shape or
            is not finite, or the model's log-probs are not what is read off its hidden states; see `checks`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading(path, "policy"):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        _no_dropout(config)
        # Of what does not fit it says only "see the above report" if it is not told to ignore it.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):  # Of a hub name, there is no folder to look into before.
        raise is_adapter(path)
    check_weights(model, info, path)
    policy = Policy(model, max_logits)
    check_policy(policy, path)
    return policy.train()


def load_reference(path: str | Path, policy: Policy, name: str, dtype: str | None = None) -> Policy:
    """Load a policy that others are compared with: on the device of `policy`, and without gradient.

    Args:
        path: Folder or hub name.
        policy: The policy that is to be compared.
        name: What to call the other one in a message.
        dtype: Data type of its weights, as in `torch`; None for that of `policy`.

    Raises:
        UserError: If it cannot be loaded, or there is no KL to it.
    """
    weight = policy.head.weight
    reference = load_policy(path, dtype or str(weight.dtype).removeprefix("torch."), policy.max_logits)
    sizes = len(reference.head.weight), len(weight)
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{name} ({path}) has a vocabulary of {sizes[0]} tokens, the policy one of {sizes[1]}: there is no KL "
            "between them"
        )
    return reference.to(weight.device).eval().requires_grad_(False)


def _no_dropout(config: Any) -> None:
    """Set every dropout rate of a configuration, and of those inside it, to 0.

    Before the model is built: where a rate goes (a layer, an attribute, the configuration itself) differs.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _no_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def export_policy(model: Any, tokenizer: Any, path: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer) that appears at `path` whole or not at all.

    The tokenizer is left as it lay: what was set on it for sampling, such as a padding token, does not belong to the
    policy, and whoever trains on would mask the end of sequence with it.

    Args:
        model: The `transformers` model.
        tokenizer: Folder or hub name of its tokenizer, or the tokenizer. From a folder, that from which the tokenizer
            was loaded included, its files are copied byte for byte; otherwise it is saved.
        path: The folder; an unfinished or earlier one is replaced.
        state_dict: The weights where `model` holds only a shard of them.

    Raises:
        UserError: If a tokenizer that is given by name cannot be loaded.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial, state_dict=state_dict)
    _export_tokenizer(tokenizer, partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def _export_tokenizer(tokenizer: Any, path: Path) -> None:
    """Copy a tokenizer's files, or save it where it lies in no folder."""
    source = tokenizer if isinstance(tokenizer, str | Path) else getattr(tokenizer, "name_or_path", "")
    files = [file for pattern in TOKENIZER_FILES for file in Path(source).glob(pattern)] if str(source) else []
    for file in filter(Path.is_file, files):
        target = path / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if not files:
        if isinstance(tokenizer, str | Path):
            from transformers import AutoTokenizer

            with loading(tokenizer, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
        tokenizer.save_pretrained(path)


def policy_fingerprint(path: str | Path) -> str:
    """What tells two policies apart: the digests of a folder's files, or a hub name and the commit that it stands for.

    All files count, since weights come in many formats, but documents and hidden ones. A file that is the same by
    path, size, time and inode is read once in a process.

    Raises:
        UserError: If a name is neither that of a folder nor one that is found on the hub or in its cache.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}@{hub_commit(str(path))}"
    found = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    files = sorted(file for file in found if file.is_file() and file.name[0] != "." and file.suffix not in DOCUMENTS)
    listing = "\n".join(f"{file.relative_to(folder)} {sha256_file(file)}" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()
