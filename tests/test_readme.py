"""The README's Python section runs as it stands, in a folder with a small base policy and prompts."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from erpd_lightning.data.arithmetic import Arithmetic
from erpd_lightning.models.policy import export_policy, policy_fingerprint

README = Path(__file__).parents[1] / "README.md"


def python_section() -> str:
    sections: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(sections) == 1
    return sections[0]


def test_the_python_section_makes_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Arithmetic(operations=1, train_prompts=48, validation_prompts=4, hidden_size=16, layers=1)
    base = task.initial_policy(0)
    export_policy(base, task.tokenizer(), tmp_path / "base")
    train, validation = task.prompts(0)
    for name, rows in (("train", train), ("validation", validation)):
        lines = [json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    section = python_section()
    # What random weights say is never correct; the last token's parity stands in for the answer.
    section = section.replace("group_size=8,", "group_size=8, sampler=SAMPLER, verifier=VERIFIER,")
    section = section.replace("max_epochs=6", "max_epochs=2").replace("max_epochs=4", "max_epochs=2")
    from erpd_lightning.data.samplers import TransformersSampler
    from erpd_lightning.data.verifiers import Verifier

    class Longer(Verifier):
        """Rewards responses of more than four characters."""

        def __call__(self, responses: object, answers: object) -> list[float | None]:
            return [float(len(response) > 4) for response in responses]  # type: ignore[attr-defined]

    names = {"SAMPLER": TransformersSampler(max_new_tokens=8), "VERIFIER": Longer()}
    exec(compile(section, str(README), "exec"), names)

    student = AutoModelForCausalLM.from_pretrained("student")
    assert AutoTokenizer.from_pretrained("student").eos_token == "<eos>"
    assert policy_fingerprint("student") != policy_fingerprint("base")
    moved = [not torch.equal(a, b) for a, b in zip(student.parameters(), base.parameters(), strict=True)]
    assert any(moved)
