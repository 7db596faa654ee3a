"""Verifiers: is the answer in a response correct? What could not be checked is never rewarded."""

from .base import Unverified, Verifier, take_rewards
from .exact_match import ExactMatch
from .math_verify import MathVerify

__all__ = ["ExactMatch", "MathVerify", "Unverified", "Verifier", "take_rewards"]
