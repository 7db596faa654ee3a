"""What is checked of a server before it is sampled from: which policy it serves, and of what its log-probs are."""

import math
from dataclasses import replace
from pathlib import Path

from ...errors import UserError
from ..http import HttpClient, ServerError
from .protocols import Draw, ServerProtocol
from .protocols.base import IMPOSSIBLE_LOGP
from .requests import Requests

DRAWS = 8
"""A server may list no log-probs with a token that it draws; with one of so many it does."""

MIN_SPREAD = 0.5
"""Nats between the most and the least probable listed token, below which two temperatures cannot be told apart."""


def check_policy(protocol: ServerProtocol, client: HttpClient, policy: str | Path, served_as: str | None) -> str | None:
    """Whether a server that was started by somebody else says that it serves the policy; returns the policy's name.

    Args:
        protocol: What the server speaks.
        client: The server.
        policy: Folder or hub name of the policy.
        served_as: What the server calls it, if that is to be taken for true.

    Raises:
        UserError: If it does not answer, or says that it serves another policy.
    """

    def get(path: str) -> object:
        try:
            return client.get(path)
        except ServerError as error:
            if error.status in (404, 405):
                return None
            raise UserError(f"urls: the {protocol.name} server at {client.url} {error}") from None

    name, source = protocol.served(get)
    if served_as is not None:
        if served_as not in (name, source):
            raise UserError(
                f"served_as is {served_as!r}, but the {protocol.name} server at {client.url} serves {source or name!r}"
            )
        return name
    if source is None or not _is_same(source, policy):
        raise UserError(
            f"urls: the {protocol.name} server at {client.url} serves {source or name!r}, not {str(policy)!r}, "
            "which is sampled from: start one with command, or say what it is called (served_as) if it is the same"
        )
    return name


def _is_same(source: str, policy: str | Path) -> bool:
    if source == str(policy):
        return True
    try:
        return Path(source).samefile(policy)
    except OSError:
        return False


def check_logps(protocol: ServerProtocol, requests: Requests, draw: Draw, vocabulary: int) -> None:
    """Whether log-probs are those of the tempered policy over the whole vocabulary.

    Between two tokens, the difference of their log-probs at temperature t is that of their logits divided by t. So at
    twice the temperature it is half as large, unless the log-probs are raw: then it stays as it is. Where it is no
    larger than the rounding of a low precision, nothing can be said, and nothing is refused.

    Args:
        protocol: What the servers speak.
        requests: Asks them.
        draw: What is drawn first.
        vocabulary: Size of the policy's vocabulary.

    Raises:
        UserError: If they are not.
    """
    top = min(protocol.top_count, vocabulary)

    def first_logps(temperature: float) -> dict[int, float]:
        for seed in range(DRAWS):
            probe = replace(draw, max_new_tokens=1, seed=seed, temperature=temperature)
            if found := requests.ask(probe, top, lambda answer, _: protocol.first_logps(answer)):
                return found
        return {}

    at_once = first_logps(draw.temperature)
    listed = {token: logp for token, logp in at_once.items() if math.isfinite(logp) and logp > IMPOSSIBLE_LOGP}
    if len(listed) < top:
        raise UserError(
            f"the {protocol.name} server gives log-probs of {len(listed)} tokens where {top} were asked for: it draws "
            "from a part of the vocabulary (top-k, top-p, min-p, a grammar), and rollouts are drawn from all of it"
        )
    if (total := sum(math.exp(logp) for logp in listed.values())) > 1.01:
        raise UserError(f"the {protocol.name} server gives log-probs whose probabilities add up to {total:.3g}")
    if draw.temperature == 1.0:
        return  # Raw log-probs are those of the policy.
    other = first_logps(2 * draw.temperature)
    common = sorted(listed.keys() & other.keys(), key=lambda token: listed[token])
    if len(common) < 2 or (spread := listed[common[-1]] - listed[common[0]]) < MIN_SPREAD:
        return
    ratio = (other[common[-1]] - other[common[0]]) / spread
    if abs(ratio - 0.5) > 0.2:
        raise UserError(
            f"the {protocol.name} server gives raw log-probs, which are not those of the policy at temperature "
            f"{draw.temperature:g}: {protocol.raw_logps_hint}"
        )
