"""Data type and precision of the weights: one everywhere, log-probs and rewards in float32, and no training without."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from erpd_lightning.callbacks import fresh_kl
from erpd_lightning.data.batching import RolloutTable
from erpd_lightning.data.rollouts import RolloutDataModule
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.store import ROLLOUTS, Store
from erpd_lightning.data.verifiers import Verifier
from erpd_lightning.errors import InvalidArgument
from erpd_lightning.models.policy import Policy, load_policy, load_reference
from erpd_lightning.modules.evaluation import EvaluationModule, EvaluationWithSamples
from erpd_lightning.modules.extreme_region import ExtremeRegionModule
from erpd_lightning.modules.policy_module import PolicyModule
from erpd_lightning.pipeline.signal_search import load_models
from support.policies import make_rows, save_policy, write_rollouts
from support.trainers import make_trainer

TYPES = {"bf16-true": "bfloat16", "16-true": "float16"}
PROMPTS = ["1+2*3:", "4-5:", "6*7-8+9:", "0:", "1-1:"]


class Graded(Verifier):
    """Rewards that half precision would round."""

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [1 / 3 if len(text) % 2 else 0.1 for text in responses]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("policies")
    return {name: save_policy(folder / name, seed=seed) for seed, name in enumerate(("base", "student"))}


def make_data(folder: Path, policies: dict[str, Path], **settings: Any) -> RolloutDataModule:
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "?"}) for prompt in PROMPTS))
    return RolloutDataModule(
        folder / "rollouts",
        tokenizer=policies["base"],
        prompts=prompts,
        validation_prompts=prompts,
        validation_samples=2,
        group_size=2,
        sampler=TransformersSampler(6),
        verifier=Graded(),
        scores=folder / "scores",
        **settings,
    )


def ask(folder: Path, policies: dict[str, Path], dtype: str, **settings: Any) -> tuple[Any, Any, dict[str, float]]:
    """Stored rollouts, stored scores and what an evaluation measures, of a policy in a precision."""
    data = make_data(folder, policies)
    for part in (data.sampling, lambda: data.scoring("base")):
        module = PolicyModule(policies["base"], references={}, dtype=dtype)
        make_trainer(**settings).predict(module, datamodule=part(), return_predictions=False)
    trainer = make_trainer(**settings)
    references = {"base": str(policies["base"])}
    tested = EvaluationWithSamples(policies["student"], references, folder / "samples.parquet", dtype=dtype)
    trainer.test(tested, datamodule=data, verbose=False)
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert torch.get_default_dtype() == torch.float32
    return Store.open(folder / "rollouts").table(), Store.open(folder / "scores" / "base").table(), measured


@pytest.mark.parametrize("precision", TYPES)
def test_log_probs_and_rewards_are_not_rounded(precision: str, policies: dict[str, Path], tmp_path: Path) -> None:
    found = ask(tmp_path / "precision", policies, "float32", precision=precision)
    whole = ask(tmp_path / "float32", policies, "float32")
    assert whole[2]["test/kl_per_token"] != found[2]["test/kl_per_token"]
    logps = torch.tensor(found[0]["logps"].combine_chunks().values.to_numpy())
    assert logps.dtype == torch.float32
    assert not torch.equal(logps, logps.to(getattr(torch, TYPES[precision])).float())
    rewards = RolloutTable.from_arrow(found[0]).rewards
    assert all(float(reward) in {float(torch.tensor(1 / 3)), float(torch.tensor(0.1))} for reward in rewards)


class Seen(EvaluationModule):
    """A module of a user's own that is trained in a precision of his own."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen = batch
        return self.policy.token_logps(batch).logps.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_batches_are_not_rounded(policies: dict[str, Path], tmp_path: Path) -> None:
    rows = make_rows(groups=4, group_size=4)
    write_rollouts(tmp_path / "rollouts", rows)
    data = RolloutDataModule(tmp_path / "rollouts", tokenizer=policies["base"], batch_size=16)
    module = Seen(policies["base"])
    make_trainer(precision="bf16-true", max_steps=1, limit_val_batches=0).fit(module, datamodule=data)
    assert module.policy.head.weight.dtype == torch.bfloat16
    for row, logps, mask in zip(module.seen.rows.tolist(), module.seen.sampler_logps, module.seen.mask, strict=True):
        assert logps[mask].tolist() == torch.tensor(rows[row]["logps"]).tolist()


# Training


@pytest.mark.parametrize("precision", TYPES)
def test_half_precision_is_refused_for_training(precision: str, policies: dict[str, Path], tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts", make_rows())
    data = RolloutDataModule(tmp_path / "rollouts", tokenizer=policies["base"])
    line = "hardly learn; train float32 weights with --trainer.precision bf16-mixed"
    with pytest.raises(InvalidArgument, match=f"^dtype is '{TYPES[precision]}': .* {line}"):
        make_trainer(max_steps=1).fit(ExtremeRegionModule(policies["base"], dtype=TYPES[precision]), datamodule=data)
    with pytest.raises(InvalidArgument, match=f"^precision is '{precision}': .* {line}"):
        make_trainer(max_steps=1, precision=precision).fit(ExtremeRegionModule(policies["base"]), datamodule=data)


def test_mixed_precision_is_trained(policies: dict[str, Path], tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts", make_rows())
    data = RolloutDataModule(tmp_path / "rollouts", tokenizer=policies["base"])
    module = ExtremeRegionModule(policies["base"])
    make_trainer(max_steps=2, precision="bf16-mixed", limit_val_batches=0).fit(module, datamodule=data)
    assert module.policy.head.weight.dtype == torch.float32


def test_a_student_in_half_precision_is_tested(policies: dict[str, Path], tmp_path: Path) -> None:
    module = ExtremeRegionModule(policies["student"], references={"base": str(policies["base"])}, dtype="bfloat16")
    make_trainer().test(module, datamodule=make_data(tmp_path / "data", policies), verbose=False)
    assert module.policy.head.weight.dtype == torch.bfloat16


# Who loads a policy


def test_references_have_the_data_type_of_the_policy(policies: dict[str, Path]) -> None:
    policy = load_policy(policies["student"], "bfloat16")
    assert load_reference(policies["base"], policy, "base").head.weight.dtype == torch.bfloat16
    assert load_reference(policies["base"], policy, "base", "float32").head.weight.dtype == torch.float32
    module = PolicyModule(policies["student"], references={"base": str(policies["base"])}, dtype="bfloat16")
    module.configure_model()
    assert module.reference("base").head.weight.dtype == torch.bfloat16
    measured = fresh_kl.FreshKL(str(policies["base"]), "token", None, None, None, 1, 1, 0)
    with measured._policy(module) as reference:
        assert isinstance(reference, Policy)
        assert reference.head.weight.dtype == torch.bfloat16


def test_models_that_are_decoded_from_have_the_data_type(policies: dict[str, Path]) -> None:
    models = load_models(policies, make_trainer(), "bfloat16")
    assert {model.dtype for model in models.values()} == {torch.bfloat16}


def test_rollouts_are_of_the_schema() -> None:
    assert str(ROLLOUTS.field("logps").type) == "list<item: float>"
