"""Randomness as a function of names: every draw has a seed of its own, so that no run depends on what ran before."""

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the draw that `names` name, such as `("round", 1, "rollouts", chunk)`.

    Hashing keeps draws of neighbouring seeds and names unrelated, and lets a stage that was killed repeat
    exactly the draws that it still owes, on any number of processes.
    """
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
