"""What is read beside a policy: its tokenizer and its context length, with one clear line where that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import UserError, first_line

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder one of an adapter: `transformers` would load its base, wherever that lies, and both."""


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a policy, padding on the left as generation needs it.

    Raises:
        UserError: If none lies there, or it knows no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    with loading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), padding_side="left", trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {path} has no end-of-sequence token: responses would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Whether a language model knows every token of a tokenizer; quick enough to be asked for each batch.

    An embedding may be larger than the tokenizer, as many are for speed, but not smaller.

    Args:
        tokenizer: The tokenizer.
        model: The language model that is to be given its ids.

    Raises:
        UserError: Names the token with the largest id, where that lies beyond the model's embedding.
    """
    size, token, number = _last_tokens.get(tokenizer, (None, "", 0))
    if size != len(tokenizer):
        token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        _last_tokens[tokenizer] = len(tokenizer), token, number
    rows = len(model.get_input_embeddings().weight)
    if number >= rows:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} has the token {token!r} of id {number}, but {type(model).__name__} "
            f"has an embedding of {rows} rows: they do not belong together"
        )


_last_tokens: WeakKeyDictionary[Any, tuple[int | None, str, int]] = WeakKeyDictionary()
"""Of each tokenizer its size and its token with the largest id: to look for it takes 30 ms and more."""


def has_tokenizer(path: str | Path) -> bool:
    """Whether a tokenizer lies beside a policy; of a hub name it is taken for granted."""
    folder = Path(path)
    return not folder.is_dir() or any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))


def context_length(path: str | Path) -> int | None:
    """Tokens that the policy at `path` can attend to, or None where its configuration does not say."""
    length: int | None = getattr(_text_config(path), "max_position_embeddings", None)
    return length


def vocabulary_size(path: str | Path) -> int:
    """Tokens that the policy at `path` has logits for; its tokenizer may have fewer."""
    size: int = _text_config(path).vocab_size
    return size


def _text_config(path: str | Path) -> Any:
    from transformers import AutoConfig

    with loading(path, "policy"):
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False).get_text_config()


def is_adapter(path: str | Path) -> UserError:
    """What to say of a policy that is an adapter."""
    return UserError(
        f"policy {path} is an adapter of PEFT, which is not supported: merge it into its base policy "
        "(merge_and_unload) and save that"
    )


@cache
def hub_commit(name: str) -> str:
    """The commit of a model on the hub, or in its cache, that `from_pretrained` takes; asked for once in a process.

    Raises:
        UserError: If there is none of that name.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    with loading(name, "policy"):
        commit = extract_commit_hash(cached_file(name, "config.json"), None)
    if commit is None:
        raise UserError(f"no policy can be loaded from {name}: the hub does not say which commit it is")
    return commit


@contextmanager
def loading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn what `transformers` raises for an unusable path into one clear line.

    Raises:
        UserError: Instead of its error; for an adapter, which says nothing of its base policy's weights, before it.
    """
    if kind == "policy" and (Path(path) / ADAPTER_CONFIG).is_file():
        raise is_adapter(path)
    try:
        yield
    except Exception as error:  # A damaged file or an odd configuration raises errors of many libraries.
        raise UserError(f"no {kind} can be loaded from {path}: {first_line(error)}") from error
