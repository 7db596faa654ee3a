"""The responses that an evaluation keeps: their KL token by token, and what is kept of many."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from erpd_lightning.data import samples
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.samples import SAMPLES, read_samples, sample_table, write_samples
from erpd_lightning.data.store import ROLLOUTS
from erpd_lightning.errors import UserError
from erpd_lightning.modules.evaluation import EvaluationWithSamples
from support.policies import TASK, make_model, make_rows, save_policies, token_logps, write_prompts
from support.trainers import make_trainer
from support.verifiers import EvenEnd

PROMPTS = ["1+2*3:", "4-5:", "6*7-8+9:", "0:", "1-1:"]
PER_PROMPT = 3


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_policies(tmp_path_factory.mktemp("policies"), "base", "student", "first")


def keep(folder: Path, policies: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What a test keeps, and what it measured; prompts come in three batches, the last with one."""
    data = RolloutDataModule(
        folder / "rollouts",
        tokenizer=policies["base"],
        validation_prompts=write_prompts(folder / "prompts.jsonl", [(prompt, "?") for prompt in PROMPTS]),
        validation_samples=PER_PROMPT,
        sampler=TransformersSampler(6, batch_size=2 * PER_PROMPT),
        verifier=EvenEnd(),
        max_tokens=50,
    )
    trainer = make_trainer()
    references = {"first": policies["first"], "base": policies["base"]}
    keeper = EvaluationWithSamples(policies["student"], references, folder / "new" / "samples.parquet")
    trainer.test(keeper, datamodule=data, verbose=False)
    return read_samples(folder / "new" / "samples.parquet"), {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_each_token_has_its_kl_to_the_base_policy(tmp_path: Path, policies: dict[str, str]) -> None:
    rows, measured = keep(tmp_path, policies)
    tokenizer = TASK.tokenizer()
    student, base = make_model(1), make_model(0)
    assert [(row["group"], row["sample"]) for row in rows] == [(g, s) for g in range(5) for s in range(PER_PROMPT)]
    for row in rows:
        assert row["prompt"] == PROMPTS[row["group"]]
        ids = row["token_ids"]
        with torch.no_grad():
            p, q = (token_logps(m, tokenizer(row["prompt"]).input_ids, ids).double() for m in (student, base))
        assert row["kls"] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-4, abs=1e-6)
        assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["token_texts"] == [tokenizer.decode([token]) for token in ids]
        assert row["special"] == [token < 3 for token in ids]
        assert row["checked"] == (not row["response"].endswith("9"))
        assert row["finish_reason"] == ("stop" if ids[-1] == 2 else "length")
    tokens = sum(len(row["kls"]) for row in rows)
    assert sum(sum(row["kls"]) for row in rows) / tokens == pytest.approx(measured["test/kl_per_token"], rel=1e-5)
    assert sum(row["reward"] for row in rows) / len(rows) == pytest.approx(measured["test/pass@1"])
    assert 0 < measured["test/pass@1"] < 1
    assert len({len(row["kls"]) for row in rows}) > 1


def test_the_first_prompts_alone_are_kept(
    tmp_path: Path, policies: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "KEPT_PROMPTS", 3)
    rows, measured = keep(tmp_path, policies)
    assert [row["group"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    monkeypatch.setattr(samples, "KEPT_TOKENS", 20)
    fewer, again = keep(tmp_path, policies)
    assert again == measured
    kept = len(fewer)
    assert 0 < kept < len(rows)
    assert fewer == rows[:kept]
    assert sum(len(row["kls"]) for row in fewer) <= 20 < sum(len(row["kls"]) for row in rows[: kept + 1])


def made(groups: int = 3) -> pa.Table:
    """Samples of made-up responses."""
    table = pa.Table.from_pylist(make_rows(groups, 4), schema=ROLLOUTS)
    lengths = [len(ids) for ids in table["response_ids"].to_pylist()]
    return sample_table(table, [[float(i)] * length for i, length in enumerate(lengths)], TASK.tokenizer())


def test_what_several_ranks_kept_is_put_together(tmp_path: Path) -> None:
    """In the order of the prompts, each response once, even where two ranks answered together."""
    table = made()
    write_samples(tmp_path / "one.parquet", [table])
    write_samples(tmp_path / "two.parquet", [table.slice(4, 8), table.slice(0, 8)])
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert read_samples(tmp_path / "one.parquet") == table.to_pylist()
    write_samples(tmp_path / "none.parquet", [])
    assert read_samples(tmp_path / "none.parquet") == []


def test_what_is_kept_of_all_ranks_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = made()
    lengths = [len(row) for row in table["kls"].to_pylist()]
    monkeypatch.setattr(samples, "KEPT_TOKENS", sum(lengths[:5]))
    write_samples(tmp_path / "some.parquet", [table.slice(6), table.slice(0, 6)])
    assert read_samples(tmp_path / "some.parquet") == table.slice(0, 5).to_pylist()


class Words:
    """A tokenizer that drops the space before a text's first word, as those of SentencePiece do."""

    all_special_ids = (0,)
    words = ("</s>", " two", "words", " ", "\N{REPLACEMENT CHARACTER}")

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        if list(ids) == [4, 4]:
            return "é"
        return "".join(self.words[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        ([2, 1, 0], ["words", " two", "</s>"]),
        ([1, 1], ["two", " two"]),
        ([4, 4], ["\N{REPLACEMENT CHARACTER}"] * 2),  # Halves of a character have no text of their own.
        ([2], ["words"]),
    ],
)
def test_the_text_of_a_token_keeps_its_space(ids: list[int], texts: list[str]) -> None:
    row = {**make_rows(1, 2)[0], "response_ids": ids, "logps": [0.0] * len(ids)}
    table = sample_table(pa.Table.from_pylist([row], schema=ROLLOUTS), [[0.5] * len(ids)], Words())
    assert table["token_texts"].to_pylist() == [texts]
    assert table["special"].to_pylist() == [[token == 0 for token in ids]]
    assert table.schema == SAMPLES


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "samples.parquet"
    if content is None:
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"group": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.parquet cannot be read as the samples of an evaluation: ."):
        read_samples(path)
