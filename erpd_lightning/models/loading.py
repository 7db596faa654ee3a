"""What is read beside a policy: its tokenizer and its context length, with one clear line where that fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import UserError, first_line


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
    from transformers import AutoConfig

    with loading(path, "policy"):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False).get_text_config()
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def vocabulary_size(path: str | Path) -> int:
    """Token ids that the policy at `path` knows: 0 to one less.

    Raises:
        UserError: If its configuration cannot be read, or does not say.
    """
    from transformers import AutoConfig

    with loading(path, "policy"):
        size: int = AutoConfig.from_pretrained(str(path), trust_remote_code=False).get_text_config().vocab_size
    return size


@contextmanager
def loading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn what `transformers` raises for an unusable path into one clear line.

    Raises:
        UserError: Instead of its error.
    """
    try:
        yield
    except Exception as error:  # A damaged file or an odd configuration raises errors of many libraries.
        raise UserError(f"no {kind} can be loaded from {path}: {first_line(error)}") from error
