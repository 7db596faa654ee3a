"""Protocols of inference servers: what a request says, and where an answer has its token ids and log-probs."""

from .base import AnswerError, Draw, ServerProtocol
from .llama_cpp import LlamaCpp
from .sglang import SGLang
from .vllm import VLLM

__all__ = ["VLLM", "AnswerError", "Draw", "LlamaCpp", "SGLang", "ServerProtocol"]
