"""Samplers: responses to prompts, with the log-probs of the distribution that they were drawn from."""

from .base import Response, Sampler
from .server import ServerSampler
from .transformers import TransformersSampler
from .truncated import TruncatedSampler

__all__ = ["Response", "Sampler", "ServerSampler", "TransformersSampler", "TruncatedSampler"]
