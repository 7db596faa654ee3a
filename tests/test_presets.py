"""Configurations for real models and data sets, run on tiny ones of the same shape."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from erpd_lightning.cli.main import main
from erpd_lightning.data.verifiers import MathVerify
from erpd_lightning.pipeline.rounds import Rounds
from support.chain import DEMO

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SUFFIX = r" Please reason step by step, and put your final answer within \boxed{}."

SMALL: dict[str, Any] = {
    "rounds": 1,
    "data.prompts_per_round": 8,
    "data.group_size": 4,
    "data.batch_size": 16,
    "data.validation_samples": 2,
    "data.max_validation_prompts": 2,
    "data.calibration_prompts": 2,
    "data.sampler.max_new_tokens": 4,
    "data.verifier": "support.verifiers.Parity",
    "extreme_region.learning_rate": 0.003,
    "extreme_region.warmup_steps": 0,
    "distill.warmup_steps": 0,
    "extreme_region_trainer.max_epochs": 1,
    "unlearned_trainer.max_epochs": 1,
    "distill_trainer.max_epochs": 1,
    "distill.kl_budget": 0.01,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.enable_progress_bar": False,
}
"""What makes a preset short, and a policy of a few thousand parameters learn; of it nothing is ever correct."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of a few thousand parameters, with bytes for tokens and a chat template that can leave out thoughts."""
    folder = tmp_path_factory.mktemp("policy")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], eos_token=special[2]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_data_set(folder: Path, config: str, **splits: list[dict[str, Any]]) -> Path:
    """A data set of one configuration, as a hub's repository holds it."""
    folder.mkdir()
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: {split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def gsm8k(folder: Path) -> dict[str, Path]:
    rows = [{"question": f"{n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>\n#### {n + 1}"} for n in range(12)]
    made = write_data_set(folder / "gsm8k", "main", train=rows[:10], test=rows[10:])
    return {"data.prompts.path": made, "data.validation_prompts.path": made}


def polaris(folder: Path) -> dict[str, Path]:
    rows = [{"problem": f"{n} + 1?", "answer": f"{n + 1}", "difficulty": "4/8"} for n in range(10)]
    left_out = [{**rows[0], "difficulty": "8/8"}, rows[1], {**rows[2], "problem": "Prove it.", "answer": ""}]
    train = write_data_set(folder / "polaris", "default", train=[*rows, *left_out])
    held_out = [{"problem": f"{n}?", "solution": "…", "answer": f"{n}", "level": 1} for n in range(2)]
    return {
        "data.prompts.path": train,
        "data.validation_prompts.path": write_data_set(folder / "math", "default", test=held_out),
    }


@pytest.mark.parametrize(
    ("name", "make", "base", "thinks", "left_out"),
    [
        ("gsm8k_qwen3_0.6b", gsm8k, "Qwen/Qwen3-0.6B", False, set()),
        (
            "polaris_qwen3_4b",
            polaris,
            "Qwen/Qwen3-4B",
            True,
            {"of a difficulty above 7/8", "duplicates", "without an answer"},
        ),
    ],
)
def test_a_preset_runs(
    name: str,
    make: Any,
    base: str,
    thinks: bool,
    left_out: set[str],
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    run_dir = tmp_path / "run"

    def fit(overrides: dict[str, Any]) -> None:
        given = [f"--{key}={value}" for key, value in {**overrides, "run_dir": run_dir, "policy": policy}.items()]
        arguments = ["erpd_lightning", "fit", f"--config={DEMO.parent / name}.yaml", *given]
        monkeypatch.setattr("sys.argv", arguments)
        main()

    # As it stands, apart from where things are.
    found: list[Rounds] = []
    places = make(tmp_path)
    few = {"data.prompts_per_round": 8, "trainer.accelerator": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "run", lambda self: found.append(self))
        fit({**places, **few})
    text = (DEMO.parent / f"{name}.yaml").read_text()
    assert f"policy: {base}\n" in text
    for stage in ("extreme_region", "unlearned", "distill"):
        module = found[0].builder.module(stage, policy="")
        assert 1e-6 <= module.learning_rate <= 1e-5  # A toy's would leave nothing of a real model.
        assert module.warmup_steps > 0
        assert 1 <= (found[0].builder.trainer(stage).max_epochs or 0) < 100
    data = found[0].data(1)
    assert isinstance(data.verifier, MathVerify)
    assert data.verifier([r"\boxed{11}"], [data.prompt_plan.sampled()[7].answer]) == [0.0]
    assert data.sampler.temperature == 1.0
    assert data.prompt_plan.sampled()[0].prompt == [{"role": "user", "content": f"0 + 1?{SUFFIX}"}]
    rendered = data.tokenizer.decode(data.prompt_plan.sampled().token_ids(0))
    assert rendered.endswith("<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * (not thinks))
    # And short, from end to end.
    fit({**places, **SMALL})
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"base", "teacher", "unlearned", "student"} <= summary["rounds"][0]["policies"].keys()
    listed = run_dir / "prompts" / "left_out.jsonl"
    lines = listed.read_text().splitlines() if listed.exists() else []
    assert {json.loads(line)["reason"] for line in lines} == left_out
