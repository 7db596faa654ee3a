"""Verifiers: is the answer in a response correct? What could not be checked is never rewarded."""

from .base import Unverified, Verdicts, Verifier, take_rewards, take_verdicts
from .exact_match import ExactMatch
from .llm_judge import LLMJudge
from .math_verify import MathVerify
from .python_function import PythonFunction
from .weighted import WeightedReward, WeightedRewards

__all__ = [
    "ExactMatch",
    "LLMJudge",
    "MathVerify",
    "PythonFunction",
    "Unverified",
    "Verdicts",
    "Verifier",
    "WeightedReward",
    "WeightedRewards",
    "take_rewards",
    "take_verdicts",
]
