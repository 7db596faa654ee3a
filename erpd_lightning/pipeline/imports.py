"""A rollout store of responses that were generated elsewhere, made outside of any run."""

from pathlib import Path

from lightning.pytorch import Trainer

from ..data.imports import ImportSource
from ..data.rollout_generator import Rescore
from ..data.rollouts import RolloutDataModule
from ..data.samplers import TransformersSampler
from ..data.store import Store
from ..data.verifiers import Verifier
from ..modules.policy_module import PolicyModule
from .outcome import rollouts_outcome
from .stages import say


def import_rollouts(
    source: ImportSource,
    policy: str | Path,
    output: str | Path,
    verifier: Verifier | None = None,
    temperature: float = 1.0,
    rescore: Rescore = "auto",
    max_tokens: int = 16384,
    dtype: str = "float32",
    correct_threshold: float = 1.0,
    trainer: Trainer | None = None,
) -> Store:
    """Make a rollout store of responses that were generated elsewhere, and tell what there is in it.

    An import that was killed goes on with the parts that are missing.

    Args:
        source: Where they lie, and what the columns are called.
        policy: Folder or hub name of the policy whose rollouts they are to be: its tokenizer, and its log-probs where
            none were recorded.
        output: Directory of the store.
        verifier: Checks the responses where the source says that its rewards are the verifier's.
        temperature: At which they were drawn, and at which log-probs are taken.
        rescore: Whether the policy's log-probs are kept beside those that were recorded.
        max_tokens: Padded tokens that may be run through the policy at a time.
        dtype: Data type of its weights, as in `torch`.
        correct_threshold: Reward from which a response counts as correct.
        trainer: Runs the policy; None for one on whatever device there is.

    Raises:
        UserError: Names the row that is broken, the column that is missing, or what else cannot be.
    """
    data = RolloutDataModule(
        output,
        policy,
        imported=source,
        sampler=TransformersSampler(temperature=temperature),
        verifier=verifier,
        rescore=rescore,
        max_tokens=max_tokens,
        correct_threshold=correct_threshold,
    )
    trainer = trainer or Trainer(devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    module = PolicyModule(policy, references={}, dtype=dtype)
    trainer.predict(module, datamodule=data.importing(), return_predictions=False)
    if data.rescores:
        trainer.predict(module, datamodule=data.rescoring(), return_predictions=False)
    for line in rollouts_outcome(data, [Path(output)])[1]:
        say(line)
    return Store.open(output)
