"""Token ids of prompts: plain ones, and chat messages through a tokenizer's template, the same at each run."""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ..errors import InvalidArgument, UserError, first_line
from ..models.generation import eos_token_ids

Message = dict[str, str]

# The day that the templates of Llama 3 fall back to themselves where there is no clock.
FIXED_DATE = {
    "%F": "2024-07-26", "%D": "07/26/24", "%x": "07/26/24", "%c": "Fri Jul 26 00:00:00 2024",
    "%X": "00:00:00", "%T": "00:00:00", "%R": "00:00", "%-d": "26", "%-m": "7", "%-H": "0", "%-I": "12", "%-M": "0",
    "%-S": "0", "%-j": "208", "%A": "Friday", "%a": "Fri", "%B": "July", "%b": "Jul", "%h": "Jul", "%d": "26",
    "%e": "26", "%m": "07", "%Y": "2024", "%y": "24", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%f": "000000",
    "%p": "AM", "%j": "208", "%u": "5", "%w": "5", "%U": "29", "%W": "30", "%V": "30", "%G": "2024", "%z": "", "%Z": "",
    "%s": "1721952000", "%%": "%",
}  # fmt: skip
"""What each directive of `strftime` gives on 26 July 2024, at midnight."""

PROBE = "PROBE OF THE END OF A TURN"
"""What an assistant says in a chat that is rendered to see how the template ends its turn."""

OWN_ARGUMENTS = (
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "messages",
    "conversation",
    "return_tensors",
    "return_dict",
)
"""Arguments of a tokenizer's `apply_chat_template` that are no variables of a template, or follow from the prompt."""

_told: set[tuple[str, str]] = set()


def as_text(prompt: str | list[Message]) -> str:
    """A prompt as one string; chat messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def shorten(prompt: str | list[Message], most: int = 60) -> str:
    """The beginning of a prompt, for a message about it."""
    text = repr(as_text(prompt))
    return text if len(text) <= most else f"{text[:most]}…"


def tokenize(
    tokenizer: Any, prompt: str | list[Message], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt, for a response to follow; chat messages go through the tokenizer's chat template.

    A plain prompt gets what its tokenizer puts in front of a text, unless it begins with that already, as a rendered
    chat does; what the tokenizer would put behind it, such as the end of the sequence, is left out. A chat whose last
    turn is the assistant's is continued there. A template that prints the date always prints 26 July 2024. Of that,
    of a template that leaves out what the user or the system says, and of turns that end with a token at which
    sampling does not stop, one warning is given.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        chat_template_kwargs: Variables of the chat template, such as `enable_thinking`; none for a plain prompt.

    Raises:
        InvalidArgument: For a variable that the template does not have.
        UserError: If the prompt has no tokens, a message is no text, or the tokenizer has no template or refuses the
            messages.
    """
    variables = chat_template_kwargs or {}
    if isinstance(prompt, str):
        ids = _plain_ids(tokenizer, prompt)
        if variables:
            _tell_once(
                "chat_template_kwargs",
                "chat_template_kwargs change no prompt that is text: chat: true makes chats of them (PromptSource)",
            )
    else:
        _check_messages(prompt)
        _check_variables(tokenizer, variables)
        try:
            text = _rendered(tokenizer, prompt, variables)
        except Exception as error:  # Templates are programs: they raise what they like.
            raise UserError(
                f"the tokenizer's chat template takes no prompt {shorten(prompt)}: {first_line(error)}"
            ) from error
        _warn_of_what_is_left_out(tokenizer, prompt, text)
        _warn_of_turn_end(tokenizer, prompt, variables)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"prompt {shorten(prompt)} has no tokens: there must be one to predict a response from")
    return ids


def _check_messages(messages: list[Message]) -> None:
    """Refuse what many templates would print as Python does, such as None or a list of parts."""
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise UserError(
                    f"prompt {shorten(messages)}: {key} of a chat message is {message[key]!r:.40}: it must be text"
                )


def _warn_of_what_is_left_out(tokenizer: Any, messages: list[Message], text: str) -> None:
    """Warn once of a template that does not print what a user or the system says, apart from spaces around it."""
    for message in messages:
        if message["role"] in ("user", "system") and message["content"].strip() not in text:
            _tell_once(
                tokenizer.get_chat_template(),
                f"the tokenizer's chat template leaves out what the {message['role']} says: responses are sampled "
                "without it",
            )


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text and of what its tokenizer puts in front of it; of that once, and of nothing behind it."""
    ids: list[int] = tokenizer(text).input_ids
    plain: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    starts = [start for start in range(len(ids) - len(plain) + 1) if ids[start : start + len(plain)] == plain]
    if not plain or not starts:
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    prefix = ids[: starts[0]]
    return plain if plain[: len(prefix)] == prefix else prefix + plain


def check_chat_template_kwargs(variables: Mapping[str, Any] | None) -> None:
    """Refuse variables of a chat template that this module sets itself.

    Raises:
        InvalidArgument: Names the one that it does.
    """
    for name in variables or {}:
        if name in OWN_ARGUMENTS:
            raise InvalidArgument("chat_template_kwargs", f"has {name}, which is set for each prompt")


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Refuse what a template would leave unread.

    Raises:
        InvalidArgument: Names it.
    """
    for name in variables:
        if tokenizer.chat_template and not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise InvalidArgument(
                "chat_template_kwargs", f"has {name}, but the tokenizer's chat template has no such variable"
            )


def _rendered(
    tokenizer: Any, messages: list[Message], variables: Mapping[str, Any] = MappingProxyType({}), closed: bool = False
) -> str:
    """A chat as a text that an answer can follow; `closed` for one whose last turn is over."""
    continued = not closed and messages[-1]["role"] == "assistant"
    if continued and not messages[-1]["content"]:  # An answer that has not begun.
        messages, continued = messages[:-1], False
    template = tokenizer.get_chat_template()
    settings = dict(variables)
    if "strftime_now" in template:
        settings["chat_template"] = _fixed_clock() + template
        _tell_once(
            template,
            "the tokenizer's chat template prints the date of the day: 26 July 2024 is put in its place, so that "
            "prompts are the same at each run",
        )
    text: str = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not (closed or continued),
        continue_final_message=continued,
        tokenize=False,
        **settings,
    )
    return text


def _fixed_clock() -> str:
    """A template's function `strftime_now` on the fixed date, as text of a template: they can be given no function."""
    replaced = "".join(f"|replace({key!r}, {value!r})" for key, value in FIXED_DATE.items())
    # The line end is one that a template leaves out: what follows begins a line, as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def _warn_of_turn_end(tokenizer: Any, messages: list[Message], variables: Mapping[str, Any]) -> None:
    """Warn once of a template that ends the assistant's turns with a token that does not end a response."""
    template = tokenizer.get_chat_template()
    key = (template, f"end of turn {tokenizer.name_or_path} {tokenizer.eos_token_id}")
    if key in _told:
        return
    _told.add(key)
    turns = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    try:
        text = _rendered(tokenizer, [*turns, {"role": "assistant", "content": PROBE}], variables, closed=True)
    except Exception:  # A template that takes no such chat cannot be asked.
        return
    _, answered, rest = text.rpartition(PROBE)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    ends = [token for token in tokenizer(rest, add_special_tokens=False).input_ids if token in special]
    if answered and ends and ends[0] not in eos_token_ids(tokenizer):
        rank_zero_warn(
            f"the tokenizer's chat template ends a turn with {tokenizer.convert_ids_to_tokens(ends[0])!r}, which is "
            "not among the end-of-sequence tokens of tokenizer and generation_config.json: responses go on after it"
        )


def _tell_once(template: str, message: str) -> None:
    if (template, message) not in _told:
        _told.add((template, message))
        rank_zero_warn(message)
