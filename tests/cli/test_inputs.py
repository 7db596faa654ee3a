"""Prompts and policies that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.chain import arguments
from support.command_line import STAGES, Run

PROMPT = '{"prompt": "1+1:", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (None, "{file} is missing"),
        ("", "{file} holds no prompts"),
        ("\n\n", "{file} holds no prompts"),
        (f"{PROMPT}{{oops\n{PROMPT}", "{file}, line 2 is not JSON"),
        (f'{PROMPT}\n{{"prompt": "1+1:"}}\n', "{file}, line 3 has no column 'answer' (there are: prompt)"),
        (f'{PROMPT}{{"answer": "2"}}\n', "{file}, line 2 has no column 'prompt' (there are: answer)"),
        (f'{PROMPT}{{"prompt": "", "answer": "2"}}\n', "{file}, line 2: prompt must be"),
    ],
)
@pytest.mark.parametrize("which", ["prompts", "validation_prompts"])
def test_prompts_that_cannot_be_used(
    refused: Run, own_policy: Any, tmp_path: Path, which: str, prompts: str | None, expected: str
) -> None:
    texts = (prompts, PROMPT) if which == "prompts" else (PROMPT, prompts)
    message = refused(*own_policy(*texts))
    assert message.startswith(expected.format(file=tmp_path / f"{which}.jsonl"))
    assert not (tmp_path / "run").exists()


def test_no_held_out_prompts(refused: Run, own_policy: Any) -> None:
    message = refused(*own_policy(PROMPT), "--data.validation_prompts=null")
    assert message.startswith("data.validation_prompts is missing")


def test_a_prompt_that_is_longer_than_the_context_and_then_is_not(refused: Run, run: Run, own_policy: Any) -> None:
    long = json.dumps({"prompt": "1" * 40 + ":", "answer": "1"})
    message = refused(*own_policy(f"{PROMPT}{long}\n"))
    assert message.startswith("data.sampler.max_new_tokens is 8: with the 41 tokens of rollouts prompt 2")
    # Nothing was sampled: the same run directory takes the mended file.
    assert "rollouts: sampling" in run(*own_policy(PROMPT), "--stage=rollouts")


def test_a_policy_that_is_not_there(refused: Run, own_policy: Any, tmp_path: Path) -> None:
    for missing in (tmp_path / "none", "./none", "a/b/c"):
        message = refused(*own_policy(PROMPT), f"--policy={missing}")
        assert message.startswith(f"policy {missing} is missing: a Hugging Face folder or")
    assert not (tmp_path / "run").exists()
    message = refused(*own_policy(PROMPT), f"--policy={tmp_path}")
    assert message.startswith(f"no policy can be loaded from {tmp_path}: ")


@pytest.mark.parametrize(
    ("verifier", "problem"),
    [
        ("--data.verifier.pattern=(never)", "none of 128 responses is correct"),
        ("--data.verifier=support.verifiers.Constant", "all of 128 responses are correct"),
    ],
)
def test_no_group_with_variance(refused: Run, copy: Callable[..., Path], verifier: str, problem: str) -> None:
    run_dir = copy(*STAGES[1:])
    message = refused(*arguments(run_dir), verifier)
    assert message.startswith(f"{run_dir / 'round-1' / 'rollouts'}: no response enters the loss")
    assert problem in message
