"""The stage `base`: prompts and a deliberately weak base policy of the embedded task."""

import json
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from ..data.arithmetic import Arithmetic
from ..data.demonstrations import write_demonstrations
from ..data.rollouts import RolloutDataModule
from ..data.store import Store
from ..files import atomic_write
from ..models.policy import export_policy, policy_fingerprint
from ..modules.extreme_region import ExtremeRegionModule
from ..objectives.extreme import CrossEntropy
from ..seeds import derive_seed
from .records import Record
from .run import task_files
from .stages import Stages


def make_base(task: Arithmetic, run_dir: Path, stages: Stages) -> None:
    """Write the task's prompts, and train its base policy on demonstrations."""
    folder = run_dir / "prepare"

    def body() -> Record:
        _write_task(task, run_dir, stages.seed)
        data = RolloutDataModule(
            store=folder / "demonstrations",
            tokenizer=folder / "initial",
            batch_size=task.batch_size,
            seed=derive_seed(stages.seed, "base"),
        )
        module = ExtremeRegionModule(
            folder / "initial",
            objective=CrossEntropy(),
            references={},
            learning_rate=task.learning_rate,
            warmup_steps=20,
            lr_scheduler="cosine",
        )
        stages.fit("base", folder, module, data, max_epochs=task.epochs, limit_val_batches=0)
        module.export(run_dir / "base")
        return {"policy": policy_fingerprint(run_dir / "base")}

    about = f"a deliberately weak base policy on {task.demonstrations} demonstrations"
    stages.run("base", 0, folder, about, {}, body, policy=run_dir / "base", files=task_files(run_dir))


@rank_zero_only
def _write_task(task: Arithmetic, run_dir: Path, seed: int) -> None:
    """Prompts, the initial policy and its demonstrations, which take longer and stay if they are there already."""
    folder = run_dir / "prepare"
    for path, rows in zip(task_files(run_dir), task.prompts(seed), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    export_policy(task.initial_policy(seed), task.tokenizer(), folder / "initial")
    if not Store.exists(folder / "demonstrations"):
        write_demonstrations(task, seed, folder / "demonstrations")
