"""What `generate` of transformers goes by: which tokens end a response, and settings other than those shipped."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def generation_config(model: Any, **settings: Any) -> Iterator[None]:
    """Generate by these settings alone: what a checkpoint ships, such as top-k or penalties, would come on top.

    Args:
        model: The language model; its own settings are back afterwards.
        **settings: Those of a `GenerationConfig`.
    """
    from transformers import GenerationConfig

    shipped = model.generation_config
    model.generation_config = GenerationConfig(**settings)
    try:
        yield
    finally:
        model.generation_config = shipped


def end_tokens(tokenizer: Any, shipped: Any) -> set[int]:
    """Tokens that end a response: the tokenizer's end of sequence and those shipped, of which a chat model has several.

    Args:
        tokenizer: The policy's tokenizer.
        shipped: `eos_token_id` of a configuration: a token, a list of them, or None.
    """
    listed = shipped if isinstance(shipped, list) else [shipped]
    return {tokenizer.eos_token_id, *(token for token in listed if token is not None)}


def eos_token_ids(tokenizer: Any) -> set[int]:
    """Tokens that end a response, by the tokenizer and by the policy that lies beside it, which need not be loaded.

    Where nothing can be read beside it, the tokenizer's alone.
    """
    from transformers import AutoConfig, GenerationConfig

    for kind in (GenerationConfig, AutoConfig):
        with suppress(Exception):  # Of an absent file and of a damaged one they raise many errors.
            return end_tokens(
                tokenizer, kind.from_pretrained(tokenizer.name_or_path, trust_remote_code=False).eos_token_id
            )
    return end_tokens(tokenizer, None)
