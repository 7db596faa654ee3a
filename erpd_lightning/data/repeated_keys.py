"""Keys that an object in JSON has twice, of which parsers keep the last in silence."""

from typing import Any


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values; `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: Names the key that there is twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found
