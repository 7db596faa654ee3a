"""Prompts from files and data sets: which rows, which columns, which answer, and what is left out."""

from .read import ReadPrompts, fingerprint_of, read_prompts
from .rows import Prompt
from .source import PromptSource, check_sources

__all__ = ["Prompt", "PromptSource", "ReadPrompts", "check_sources", "fingerprint_of", "read_prompts"]
