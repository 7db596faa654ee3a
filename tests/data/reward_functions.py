"""Functions that tests name by import path."""

import os
import time
from typing import Any

import numpy as np


def plain(responses: list[str], answers: list[str]) -> list[float]:
    return [float(response == answer) for response, answer in zip(responses, answers, strict=True)]


def other_names(x: list[str], y: list[str], scale: float = 2.0) -> list[float]:
    return [scale * value for value in plain(x, y)]


def trl(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
    assert set(kwargs) == {"prompts"}
    values = plain(completions, answer)
    return [None if prompt == "skip" else value for prompt, value in zip(kwargs["prompts"], values, strict=True)]


def with_prompts(*, prompts: list[str], responses: list[str]) -> list[int]:
    return [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]


def as_array(completions: list[str], **kwargs: Any) -> Any:
    return np.array([len(text) for text in completions]) / 2


def counts(responses: list[str], answers: list[str]) -> list[float]:
    return [float(len(responses))] * len(responses)


def odd(responses: list[str], answers: list[str]) -> Any:
    (what,) = responses
    if what == "hang":
        time.sleep(600)
    if what == "spin":
        while True:
            pass
    if what == "exit":
        os._exit(1)
    if what == "system exit":
        raise SystemExit(3)
    if what == "memory":
        return [float(len("x" * 2**33))]
    if what == "print":
        print("noise")
    if what == "raise":
        raise KeyError("no\nsuch key")
    return {"text": ["1"], "short": [], "none": None, "string": "1", "nan": [float("nan")]}.get(what, [1.0])


def needs_more(responses: list[str], answers: list[str], tokenizer: Any) -> list[float]:
    return []


def one_value(response: str) -> float:
    return 1.0


not_a_function = 3
