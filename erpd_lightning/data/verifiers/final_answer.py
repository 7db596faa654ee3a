r"""The part of a response that is its final answer: after its thoughts, in its last box, or where words announce it."""

# ruff: noqa: RUF001 - signs that look like others are what this is about.

import re

ANNOUNCED_CHARACTERS = 400
"""Longest text in which an announced answer is looked for; an answer is shorter."""

ANNOUNCEMENT = re.compile(
    r"\banswer\b[^.\n:=?!]{0,60}?(?:\bis\b|\bare\b|\bequals\b|:|=)(?:\s*:)?"
    r"(?:\s+(?:therefore|thus|then|hence|simply|just|exactly)\b)?|答案(?:是|为|：|:)|الجواب(?:\s+هو)?\s*:?",
    re.IGNORECASE,
)
DOUBT = re.compile(
    r"\b(?:not|never|cannot|no|maybe|perhaps|might|may|could|would|if|whether|unless|suppose|assume|assuming|wrong|"
    r"incorrect|between|unclear|doubt|false|deny|disagree)\b|n't\b|\?",
    re.IGNORECASE,
)
RETRACTION = re.compile(
    r"\b(?:wait|no|not|actually|but|instead|correction|however|wrong|incorrect|mistake|error|sorry|hmm|rather|"
    r"should|the correct|the true|the right)\b|n't\b",
    re.IGNORECASE,
)
AFTERTHOUGHT = re.compile(
    r"[,;]?\s+(?:because|since|as|so|which|for|where|when|by)\b.*|[,;]\s+(?!(?:and|or)\b)[a-z]{3,}\b.*",
    re.DOTALL,
)
SENTENCE_END = re.compile(r"(?<=[^\s])[.。](?=\s|$|[\"')*])|\n|(?<=\S)[!?。](?=\s+[A-Z]|\s*$)")
PROSE_WORD = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|and|or)\b)[A-Za-z]{2,}|(?<!\w)I(?!\w)"
)
VERB = re.compile(r"(?<!here )\b(?:is|are|equals|gives|it's)\b\s*:?\s*")
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox)(?![A-Za-z])")
JOINED = re.compile(r"\s*\$?\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*\$?\s*")
GOES_ON = re.compile(r"\s*(?:\^|/\s*\d|\\times|\\cdot|\\div)")


def final_answer(response: str, require_box: bool = False) -> str | None:
    r"""The final answer in a response, or None where there is none.

    It is looked for after the last `</think>`; where thinking never ended there is none. The last `\boxed` is the
    answer; without one, what follows `####`, stands in `<answer>`, or is announced as in "the answer is X"; then
    `X` of a last sentence "... is X" or "... = X"; then the response itself where it is nothing but an answer. What
    is denied, doubted or taken back does not count, and neither does a number that merely stands there.

    Args:
        response: All that the policy wrote.
        require_box: Whether only a box counts.
    """
    text = after_thoughts(response)
    if text is None:
        return None
    boxes = _boxes(text)
    if boxes or require_box:
        return boxes[-1] if boxes else None
    for find in (_marked, _announced, _concluded):
        found, answer = find(text)
        if found:
            return answer
    return None


def without_box(answer: str) -> str:
    """A reference answer that may stand at the end of a solution, in its last box or after `####`."""
    boxes = _boxes(answer)
    if boxes:
        return boxes[-1] or ""
    return answer.rsplit("####", 1)[-1]


def after_thoughts(response: str) -> str | None:
    """What follows the last `</think>`; None where thinking never ended."""
    end = max(response.rfind(tag) + len(tag) if tag in response else 0 for tag in ("</think>", "</thinking>"))
    rest = response[end:]
    return None if "<think>" in rest or "<thinking>" in rest else rest


def _boxes(text: str) -> list[str | None]:
    """Contents of the boxes that stand in no other box; None for one that does not end or is only part of an answer."""
    found: list[str | None] = []
    end, last_end = 0, -1
    for match in BOX.finditer(text):
        if match.start() < end:
            continue
        end = closing_brace(text, match.end()) if text[match.end() : match.end() + 1] == "{" else -1
        if end < 0:
            return [*found, None]
        content: str | None = text[match.end() + 1 : end - 1]
        inner = _boxes(content or "")
        if inner:
            content = inner[-1] if (content or "").strip().startswith(("\\boxed", "\\fbox")) else None
        # "\\boxed{1} and \\boxed{2}" is neither of the two, nor both: a box holds all of an answer.
        joined = last_end >= 0 and found[-1] != content and JOINED.fullmatch(text[last_end : match.start()])
        found.append(None if joined or GOES_ON.match(text, end) else content)
        last_end = end
    return found


def closing_brace(text: str, start: int) -> int:
    """Index after the brace that closes the one at `start`, or -1."""
    depth = 0
    position = start
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position + 1
        position += 1
    return -1


def _marked(text: str) -> tuple[bool, str | None]:
    """What follows the last `####`, or stands in the last `<answer>`."""
    if "####" in text:
        return True, text.rsplit("####", 1)[1].strip().split("\n")[0]
    if "<answer>" in text:
        inside, closed, _ = text.rsplit("<answer>", 1)[1].partition("</answer>")
        return True, inside if closed else None
    return False, None


def _announced(text: str) -> tuple[bool, str | None]:
    """What the last announcement of an answer announces."""
    matches = list(ANNOUNCEMENT.finditer(text))
    if not matches:
        return False, None
    last = matches[-1]
    before = SENTENCE_END.split(text[max(0, last.start() - ANNOUNCED_CHARACTERS) : last.start()])[-1] or ""
    rest = _plain(text[last.end() : last.end() + 2 * ANNOUNCED_CHARACTERS]).strip()
    end = SENTENCE_END.search(rest)
    answer, later = (rest[: end.start()], rest[end.end() :]) if end else (rest, "")
    asked = end is not None and end.group() == "?"
    if asked or DOUBT.search(before) or RETRACTION.search(later):
        return True, None
    return True, AFTERTHOUGHT.sub("", answer)


def _concluded(text: str) -> tuple[bool, str | None]:
    """What the last sentence says that something is or equals; the whole of a response without words."""
    whole = _plain(text).strip()
    sentences = [s for s in SENTENCE_END.split(whole[-2 * ANNOUNCED_CHARACTERS :]) if s and s.strip()]
    if not sentences or len(sentences[-1]) > ANNOUNCED_CHARACTERS:
        return False, None
    last = sentences[-1].strip()
    if whole.endswith("?") or (DOUBT.search(last) and PROSE_WORD.search(last) and last != whole.rstrip(".")):
        return False, None
    verbs = list(VERB.finditer(last))
    if verbs:
        return True, None if DOUBT.search(last) else last[verbs[-1].end() :]
    if len(sentences) == 1 and len(whole) <= ANNOUNCED_CHARACTERS and not _has_sum(last):
        return True, last
    left, equals, right = last.partition("=")
    if equals and not DOUBT.search(last):
        words = list(PROSE_WORD.finditer(left))
        own = left[words[-1].end() :] if words else left
        own = own.rsplit(", ", 1)[-1]
        # A unit or other word before the sign: what stands left of it is no part of the answer.
        return True, f"{own.strip(' ,:')}={right}" if own.strip(" ,:") else right
    return False, None


def _has_sum(text: str) -> bool:
    """Whether prose holds an equation: then only what it ends in may be its answer."""
    return "=" in text and PROSE_WORD.search(text) is not None


def _plain(text: str) -> str:
    """Text without marks of emphasis."""
    return re.sub(r"\*\*([^*\n]*)\*\*", r"\1", text).replace("`", "")
