"""Text that others wrote, made safe to look at."""

import unicodedata

UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode categories of what cannot be seen, or turns the order of what follows."""


def visible(text: str) -> str:
    """The text with all but line breaks of what cannot be seen, or turns the order of what follows, spelled out."""
    return "".join(_spelled(c) if c != "\n" and unicodedata.category(c) in UNSEEN else c for c in text)


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
