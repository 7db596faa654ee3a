"""Responses from elsewhere become the rollouts that the policy itself might have sampled."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from erpd_lightning.data.import_data import DISAGREEMENTS, RECORDED_FOLDER, Disagreements, disagreements
from erpd_lightning.data.imports import ImportSource, import_fingerprint
from erpd_lightning.data.rescoring import RESCORED
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import Store
from erpd_lightning.errors import InvalidArgument, UserError
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from support.policies import TASK, make_model, save_policy, token_logps, write_prompts
from support.rollouts import PROMPTS, sample
from support.trainers import fake_trainer, make_predictor, run_prediction
from support.verifiers import EvenEnd

TOKENIZER = TASK.tokenizer()
EOS = 2

Make = Callable[..., RolloutDataModule]


@pytest.fixture
def importer(tmp_path: Path, policy: Path) -> Make:
    """A data module that imports the rows of a file."""

    def make(
        rows: Sequence[dict[str, Any]] | str, store: str = "rollouts", name: str = "rows.jsonl", **settings: Any
    ) -> RolloutDataModule:
        path = tmp_path / name
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
        columns = {key: settings.pop(key) for key in [*settings] if key.endswith("_column") or key == "rewards"}
        defaults: dict[str, Any] = {"verifier": EvenEnd(), "sampler": TransformersSampler(temperature=0.7)}
        source = ImportSource(str(path), **columns)
        return RolloutDataModule(tmp_path / store, policy, imported=source, **{**defaults, **settings})

    return make


def run(data: RolloutDataModule, policy: Path) -> list[dict[str, Any]]:
    run_prediction(data.importing(), policy)
    if data.rescores:
        run_prediction(data.rescoring(), policy)
    rows: list[dict[str, Any]] = Store.open(data.store).table().to_pylist()
    return rows


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text).input_ids
    return found


def logps_of(prompt: Sequence[int], response: Sequence[int]) -> Any:
    logps = token_logps(make_model(), prompt, response, temperature=0.7)
    return pytest.approx(logps.gather(1, torch.tensor(response)[:, None])[:, 0].tolist(), abs=1e-5)


def test_texts_are_tokenised_scored_and_verified(importer: Make, policy: Path) -> None:
    data = importer(
        [
            {"prompt": "1+1:", "response": ["1+1=2", "1+1=3"], "answer": 2},
            {"prompt": "2*2:", "response": "2*2=9", "answer": "4"},
            {"prompt": "1+1:", "response": "1=", "answer": 2.0, "finish_reason": "length"},
        ]
    )
    rows = run(data, policy)
    assert [(row["group"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert [row["prompt"] for row in rows] == ["1+1:", "1+1:", "2*2:", "1+1:"]
    assert [row["answer"] for row in rows] == ["2", "2", "4", "2"]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop", "stop", "length"]
    assert rows[0]["response_ids"] == [*ids("1+1=2"), EOS]
    assert rows[3]["response_ids"] == ids("1=")
    assert [(row["reward"], row["checked"]) for row in rows] == [(1, True), (0, True), (0, False), (0, True)]
    for row in rows:
        assert row["prompt_ids"] == ids(row["prompt"])
        assert row["logps"] == logps_of(row["prompt_ids"], row["response_ids"])
        assert row["temperature"] == 0.7
    assert not data.rescores
    assert not Store.exists(data.store / RECORDED_FOLDER)


def test_token_ids_are_kept_and_recorded_log_probs_stand_beside_the_policys(importer: Make, policy: Path) -> None:
    first, second = [*ids("7-5="), EOS], ids("4;4")
    rows = [
        {"q": ids("7-5:"), "r": [first, second], "a": "2", "lp": [[-0.5] * 5, [-0.25, -1.5, 0.0]]},
        {"q": ids("1+1:"), "r": first, "a": "2", "lp": None},
    ]
    names = {"prompt_column": "q", "response_column": "r", "answer_column": "a", "logps_column": "lp"}
    data = importer(rows, **names)
    found = run(data, policy)
    assert [row["response_ids"] for row in found] == [first, second, first]
    assert [row["finish_reason"] for row in found] == ["stop", "length", "stop"]
    assert found[0]["prompt"] == "7-5:"
    assert [row["logps"] for row in found[:2]] == [[-0.5] * 5, [-0.25, -1.5, 0.0]]
    assert found[2]["logps"] == logps_of(ids("1+1:"), first)
    assert data.rescores
    rescored = Store.open(data.store / RESCORED).table()["logps"].to_pylist()
    for row, logps in zip(found, rescored, strict=True):
        assert logps == logps_of(row["prompt_ids"], row["response_ids"])
    assert not importer(rows, **names, rescore="never").rescores


def test_chats_are_prompts_too(importer: Make, policy: Path) -> None:
    messages = [{"role": "user", "content": "1+1:"}]
    with pytest.raises(UserError, match="chat template takes no prompt"):  # this tokenizer has none
        run(importer([{"prompt": messages, "response": "2", "answer": "2"}]), policy)


SCORED: list[dict[str, Any]] = [
    {"prompt": "1+1:", "response": ["2", "3", "9", "4"], "answer": "2", "reward": [1.0, 1, 0.0, None]},
    {"prompt": "1-1:", "response": ["0", "5"], "answer": "0", "reward": [False, 0]},
]


def test_recorded_scores_are_kept_and_disagreements_listed(importer: Make, policy: Path) -> None:
    data = importer(SCORED)
    rows = run(data, policy)
    assert [row["reward"] for row in rows] == [1, 0, 0, 1, 1, 0]
    recorded = Store.open(data.store / RECORDED_FOLDER).table().to_pydict()
    assert recorded == {"row": [0, 1, 2, 4, 5], "reward": [1, 1, 0, 0, 0]}
    # Row 2 could not be checked: the verifier says nothing to disagree with.
    assert disagreements(data.store) == Disagreements(compared=4, different=2)
    listed = [json.loads(line) for line in (data.store / DISAGREEMENTS).read_text().splitlines()]
    assert [(row["row"], row["response"], row["reward"], row["recorded"]) for row in listed] == [
        (1, "3", 0.0, 1.0),
        (4, "0", 1.0, 0.0),
    ]


def test_recorded_scores_may_be_the_rewards(importer: Make, policy: Path) -> None:
    rows = run(importer([{**row, "answer": "?"} for row in SCORED], rewards="recorded"), policy)
    assert [(row["reward"], row["checked"]) for row in rows] == [
        (1, True),
        (1, True),
        (0, True),
        (0, False),
        (0, True),
        (0, True),
    ]


def test_without_a_verifier_no_answer_is_needed(importer: Make, policy: Path) -> None:
    rows = [{"prompt": "1+1:", "response": "2", "reward": 0.5}]
    assert run(importer(rows, rewards="recorded"), policy)[0]["answer"] == ""
    with pytest.raises(UserError, match="has no column 'answer': there are prompt, response, reward"):
        run(importer(rows, name="other.jsonl"), policy)


def test_a_parquet_file_is_the_same(importer: Make, policy: Path, tmp_path: Path) -> None:
    lines = run(importer(SCORED), policy)
    same = [*SCORED[:1], {**SCORED[1], "reward": [0.0, 0.0]}]
    pq.write_table(pa.Table.from_pylist(same), tmp_path / "rows.parquet")
    source = ImportSource(str(tmp_path / "rows.parquet"))
    settings: dict[str, Any] = {"verifier": EvenEnd(), "sampler": TransformersSampler(temperature=0.7)}
    assert run(RolloutDataModule(tmp_path / "parquet", policy, imported=source, **settings), policy) == lines


def many(count: int = 20) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i % 7}+1:", "response": [f"{i % 10}", "4"], "answer": "2", "reward": [1, 0]} for i in range(count)
    ]


def test_it_depends_on_no_rank_and_no_kill(importer: Make, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erpd_lightning.data.imports.PART_RESPONSES", 7)
    alone = importer(many())
    run(alone, policy)
    store = Store.open(alone.store)
    assert [part["rows"] for part in store.parts] == [8, 8, 8, 8, 8]
    pair = importer(many(), store="pair")
    for rank in (1, 0):
        run_prediction(pair.importing(), policy, rank, 2)
    killed = importer(many(), store="killed")
    importing, module = killed.importing(), make_predictor(policy)
    importing.trainer = fake_trainer()
    importing.connect(module)
    for batch in list(importing.predict_dataloader())[:3]:
        importing.write(batch, module.predict_step(batch, 0))
    run(killed, policy)
    assert store.fingerprint == Store.open(pair.store).fingerprint == Store.open(killed.store).fingerprint
    recorded = [Store.open(data.store / RECORDED_FOLDER).fingerprint for data in (alone, pair, killed)]
    assert len({*recorded}) == 1
    groups = store.table(["group", "sample"]).to_pylist()
    assert len({(row["group"], row["sample"]) for row in groups}) == 40
    assert {row["group"] for row in groups} == set(range(7))


@pytest.mark.parametrize("number", [1, 2])
def test_a_training_begins_with_them_in_the_first_round(
    importer: Make, policy: Path, tmp_path: Path, number: int
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    response = ids("1+1=2")
    rows = [{"prompt": "1+1:", "response": response, "logps": [-0.5] * len(response), "answer": "2"}]
    settings: dict[str, Any] = {"prompts": prompts, "round": number, "sampler": TransformersSampler(4)}
    data = importer(rows, logps_column="logps", **settings)
    module = ExtremeRegionModule(policy)
    module.configure_model()
    data.trainer = fake_trainer()
    data.connect(module)
    data.sample_for_epoch(0)
    found = Store.open(data.store).table()["response_ids"].to_pylist()
    assert (found == [response]) == (number == 1)
    assert len(found) == (1 if number == 1 else 16 * len(PROMPTS))
    # Only recorded log-probs are computed again.
    assert Store.exists(data.store / RESCORED) == (number == 1)


def test_a_store_is_imported_as_it_is(make_data: Make, policy: Path, tmp_path: Path) -> None:
    sampled = sample(make_data(), policy).table()
    data = make_data("again", imported=ImportSource(str(tmp_path / "rollouts")))
    assert run(data, policy) == sampled.to_pylist()


def test_the_fingerprint_is_that_of_content_and_columns(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1", "response": "1"}\n' + "\n" * (name == "c"))
    first, moved, changed = (import_fingerprint(ImportSource(str(tmp_path / f"{name}.jsonl"))) for name in "abc")
    assert first == moved != changed
    assert import_fingerprint(ImportSource(str(tmp_path / "a.jsonl"), rewards="recorded")) != first


GOOD = '{"prompt": "1+1:", "response": "2", "answer": "2"}\n'


def bad(**changes: Any) -> str:
    return GOOD + "\n" + json.dumps({"prompt": "1+1:", "response": "2", "answer": "2", **changes}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"rows\.jsonl holds no responses"),
        (GOOD + '{"prompt": "1+1:", "resp', r"rows\.jsonl, line 2 is not JSON: "),
        (GOOD + "[1]\n", r"rows\.jsonl, line 2 is no object"),
        (GOOD + "\n" + '{"prompt": "1"}', r"line 3 has no column 'response': there are prompt$"),
        ('{"question": "1"}', r"rows\.jsonl has no column 'prompt': there are question$"),
        (bad(prompt=""), "line 3: a prompt must be a text, a list of chat messages or of token ids, not empty"),
        (bad(prompt=[3, 19]), r"line 3: prompt has the token id 19, but the policy's vocabulary ends at 18"),
        (bad(response=[3, -1]), "line 3: response has the token id -1, but the policy's vocabulary ends at 18"),
        (bad(response=[]), "line 3: response holds no response"),
        (bad(response=[[]]), "line 3: response must be a text or a list of token ids, not empty"),
        (bad(response=7), "line 3: response must be a text or a list of token ids"),
        (bad(response=[3] * 33), "line 3: prompt and response have 37 tokens, more than the policy's context of "),
        (bad(response="\ud800"), "line 3: response has half a character"),
        (bad(response="", finish_reason="length"), "line 3: a response has no tokens"),
        (bad(finish_reason="eos"), "line 3: finish_reason is 'eos': it must be stop or length, or null"),
        (bad(answer=None), "line 3: answer must be a text or a number"),
        (bad(reward="1"), "line 3: reward must be a finite number, or null"),
        (bad(reward=float("nan")), "line 3: reward must be a finite number, or null"),
        (bad(response=["1", "2"], reward=[1]), "line 3: reward must be a list with one entry for each of 2 responses"),
        (bad(logps=[-1.0]), "line 3: logps are log-probs of a text: nobody can say of which tokens"),
        (bad(response=[3, 2], logps=[-1.0]), "line 3: logps must have one number for each of the 2 response tokens"),
        (bad(response=[3, 2], logps=[-1.0, 0.5]), "line 3: logps must be log-probs in nats: finite, and not above 0"),
    ],
)
def test_broken_rows_are_named(importer: Make, policy: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(importer(text), policy)


def test_a_missing_file(policy: Path, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.parquet", "nowhere"):
        data = RolloutDataModule(tmp_path, policy, imported=ImportSource(str(tmp_path / name)))
        with pytest.raises(UserError, match=rf"{name} is "):
            data.importing()


def test_a_store_of_another_policy_tokenizer_or_temperature(
    make_data: Make, policy: Path, other_policy: Path, tmp_path: Path
) -> None:
    sample(make_data(), policy)
    source = ImportSource(str(tmp_path / "rollouts"))
    with pytest.raises(UserError, match="rollouts was sampled from another policy than"):
        run(make_data("again", imported=source), other_policy)
    with pytest.raises(InvalidArgument, match=r"sampler\.temperature is 0\.7, but .* was sampled at 1\.0"):
        run(make_data("again", imported=source, sampler=TransformersSampler(temperature=0.7)), policy)


def test_another_tokenizer_shows_in_what_the_ids_say(
    make_data: Make, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(make_data(), policy)
    folder = save_policy(tmp_path / "other")
    file = folder / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    model = vocabulary["model"]["vocab"]
    model["1"], model["2"] = model["2"], model["1"]
    file.write_text(json.dumps(vocabulary))
    data = make_data("again", imported=ImportSource(str(tmp_path / "rollouts")), tokenizer=folder)
    with pytest.raises(UserError, match="its token ids say something else with the policy's tokenizer"):
        run(data, policy)


def test_a_shard_that_was_cut_short(make_data: Make, policy: Path, tmp_path: Path) -> None:
    store = sample(make_data(), policy)
    part = store.path / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"part-00001\.parquet was altered or truncated"):
        make_data("again", imported=ImportSource(str(store.path))).importing()


def test_iterations_answer_the_prompts_themselves(make_data: Make) -> None:
    with pytest.raises(InvalidArgument, match=r"imported is given, but iterations \(2\) is above 1"):
        make_data(imported=ImportSource("rows.jsonl"), iterations=2)
