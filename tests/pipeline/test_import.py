"""The chain begins with responses from elsewhere, and an import that is killed ends as if nothing had happened."""

import json
import random
from pathlib import Path

import pytest

from erpd_lightning.data.arithmetic import Arithmetic
from support.chain import arguments
from support.kills import after, written
from support.runs import Runs, contents

PROMPTS = 40
GROUP_SIZE = 8


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than fit in a part, as token ids with log-probs of nobody's, and scores that are wrong for one prompt."""
    rng, tokenizer = random.Random(0), Arithmetic().tokenizer()
    rows = []
    for number, both in enumerate(rng.sample(range(100), PROMPTS)):
        left, right = divmod(both, 10)
        prompt, answer = f"{left}+{right}:", (left + right) % 10
        results = [rng.choice([answer, (answer + 1) % 10]) for _ in range(GROUP_SIZE)]
        ids = [[*tokenizer(f"{left}+{right}={result}").input_ids, 2] for result in results]
        rows.append(
            {
                "prompt": prompt,
                "response": ids,
                "logps": [[-rng.random() for _ in each] for each in ids],
                "answer": answer,
                "score": [float((result == answer) != (number == 0)) for result in results],
            }
        )
    path = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(run_dir: Path, responses: Path, **overrides: object) -> list[str]:
    imported = {"data.imported.path": responses, "data.imported.reward_column": "score"}
    return arguments(run_dir, **{**imported, **overrides})


def test_a_killed_import_ends_the_same_and_the_chain_goes_on_from_it(
    runs: Runs, responses: Path, tmp_path: Path
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for run_dir in (alone, killed):
        runs.run(command(run_dir, responses, stage="base"))
    _, printed = runs.run(command(alone, responses, stage="rollouts"))
    assert f"{PROMPTS * GROUP_SIZE} responses: " in printed
    assert f"disagree on {GROUP_SIZE} of {PROMPTS * GROUP_SIZE} responses" in printed
    assert "sampler and trainer differ by " in printed
    folder = killed / "round-1" / "rollouts"
    kills = [
        written(r"rollouts/part-00000\.parquet"),
        after(written(r"rollouts/part-00000\.parquet")),
        written(r"rollouts/manifest\.json"),
        written(r"recorded/part-00000\.parquet"),
        written(r"disagreements\.jsonl"),
        written(r"rescored/part-00001\.parquet"),
        written(r"rescored/manifest\.json"),
        written(r"rollouts/stage\.json"),
    ]
    for kill in kills:
        runs.run(command(killed, responses, stage="rollouts"), kill)
        assert not (folder / "stage.json").exists()
    runs.run(command(killed, responses, stage="rollouts"))
    assert contents(killed) == contents(alone)
    _, printed = runs.run(command(killed, responses))
    assert "[round 1/1] rollouts: done already" in printed
    (entry,) = json.loads((killed / "summary.json").read_text())["rounds"]
    assert entry["rollouts"] == PROMPTS * GROUP_SIZE
    assert entry["sampled"]["sampler_gap"]["mean"] > 0.1
    assert any("between the log-probs of sampler and trainer" in warning for warning in entry["warnings"])
    assert entry["sampled"]["optimizer_steps"] == -(-GROUP_SIZE * entry["sampled"]["mixed_groups"] // 32)


def test_other_responses_are_not_those_of_a_finished_stage(runs: Runs, responses: Path, tmp_path: Path) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "other.jsonl"
    other.write_text(responses.read_text())
    for stage in ("base", "rollouts"):
        runs.run(command(run_dir, responses, stage=stage))
    _, printed = runs.run(command(run_dir, other, stage="rollouts", round=1))
    assert "rollouts: done already" in printed
    other.write_text("".join(responses.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(AssertionError, match="was made with imported: "):
        runs.run(command(run_dir, other, stage="rollouts", round=1))
