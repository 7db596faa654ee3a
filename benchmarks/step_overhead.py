"""What a training step of either module costs over the same mathematics in a bare PyTorch loop.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py

Both sides see the same batches of the same stored rollouts and do forward, loss, backward, gradient clipping and an
AdamW step. The bare side is plain `transformers` and plain tensors: full logits, no head in chunks, no logging, and
batches that were collated before the clock starts. Module and loop take turns, and what is printed is the ratio of
the medians over the turns, which a noisy machine leaves alone where seconds are not.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM

from erpd_lightning import DistillModule, ExtremeRegionModule, RolloutDataModule
from erpd_lightning.data.arithmetic import Arithmetic
from erpd_lightning.data.batching import RolloutBatch
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.models.policy import export_policy

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Clock(Callback):
    """Seconds from the start of the first batch to the end of the last, and the batches seen."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.batches: list[RolloutBatch] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, *_: Any) -> None:
        self.batches.append(batch)

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.seconds


def prepare(folder: Path) -> None:
    """A random base policy, two random others, rollouts with coin-flip rewards, and scores."""
    task = Arithmetic(train_prompts=256)
    for seed, name in enumerate(("base", "teacher", "unlearned")):
        export_policy(task.initial_policy(seed), task.tokenizer(), folder / name)
    lines = [f'{{"prompt": "{row["prompt"]}", "answer": "1"}}' for row in task.prompts(0)[0]]
    (folder / "train.jsonl").write_text("\n".join(lines))
    scorer = data(folder)
    module = ExtremeRegionModule(folder / "base")
    Trainer(**QUIET).predict(module, datamodule=scorer.sampling(), return_predictions=False)
    for name in ("base", "teacher", "unlearned"):
        module = ExtremeRegionModule(folder / name)
        Trainer(**QUIET).predict(module, datamodule=scorer.scoring(name), return_predictions=False)


def data(folder: Path) -> RolloutDataModule:
    """Sixteen responses to each of 256 prompts; the last digit is 1 or not, by chance."""
    from erpd_lightning.data.verifiers import ExactMatch

    return RolloutDataModule(
        store=folder / "rollouts",
        tokenizer=folder / "base",
        prompts=folder / "train.jsonl",
        scores=folder / "signal",
        sampler=TransformersSampler(max_new_tokens=24, batch_size=1024),
        verifier=ExactMatch(r"(\d)\D*$"),
    )


def logps(model: Any, batch: RolloutBatch) -> torch.Tensor:
    """Full log-probs `(B, T, V)` at the positions that predict the response."""
    states = model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
    ).last_hidden_state
    rows = torch.arange(len(states))[:, None]
    return model.lm_head(states[rows, batch.positions]).log_softmax(-1)


def sapo(model: Any, batch: RolloutBatch) -> torch.Tensor:
    """SAPO (arXiv 2511.20347), the mean over the step's tokens."""
    logp = logps(model, batch).gather(-1, batch.response_ids[..., None])[..., 0]
    ratio = (logp - batch.sampler_logps).exp()
    advantage = batch.advantages[:, None]
    tau = torch.where(advantage > 0, 1.0, 1.05)
    terms = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantage
    return (terms * batch.mask).sum() / batch.step_tokens


def tilted(beta: float) -> Callable[[Any, RolloutBatch], torch.Tensor]:
    """KL to the tilted base policy over support and tail, the mean over the step's tokens."""

    def loss(model: Any, batch: RolloutBatch) -> torch.Tensor:
        assert batch.scores is not None
        assert batch.support_ids is not None
        logp, ids = logps(model, batch), batch.support_ids
        kept = logp.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -100.0)
        inside = torch.zeros_like(logp).scatter_add(-1, ids.clamp(min=0), (ids >= 0).float()) > 0
        tail = logp.masked_fill(inside, -1e30).logsumexp(-1, keepdim=True).clamp(min=-100.0)
        student = torch.cat([kept, tail], -1)
        scores = batch.scores
        signal = (scores["teacher"] - scores["unlearned"]).clamp(-3, 3)
        pad = scores["base"] <= -100.0
        target = (scores["base"] + signal / beta).masked_fill(pad, -1e30).log_softmax(-1)
        target = target.masked_fill(pad, -100.0)
        terms = (student.exp() * (student - target)).sum(-1)
        return (terms * batch.mask).sum() / batch.step_tokens

    return loss


def bare(folder: Path, batches: list[RolloutBatch], loss: Any, rate: float) -> tuple[float, float]:
    """Seconds of the bare loop over some batches, and its last loss."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0)
    start = time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step - 1) / 5)
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - start, float(value)


def compare(name: str, folder: Path, make: Callable[[], Any], turns: int) -> None:
    """Let module and loop take turns, and print the ratio of the medians."""
    ours, theirs, losses = [], [], []
    for _ in range(turns):
        clock, module = Clock(), make()
        trainer = Trainer(max_epochs=1, gradient_clip_val=1.0, callbacks=[clock], **QUIET)
        trainer.fit(module, datamodule=data(folder))
        loss = tilted(module.beta) if isinstance(module, DistillModule) else sapo
        seconds, last = bare(folder, clock.batches, loss, module.learning_rate)
        ours.append(clock.seconds / len(clock.batches))
        theirs.append(seconds / len(clock.batches))
        losses.append((float(trainer.callback_metrics["train/loss"]), last))
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"{name}: {statistics.median(ours) * 1e3:.1f} ms a step, bare loop "
        f"{statistics.median(theirs) * 1e3:.1f} ms, ratio {ratio:.3f} (median of {turns} turns); "
        f"last loss {losses[-1][0]:.6f} and {losses[-1][1]:.6f}"
    )


def main() -> None:
    """Measure both modules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="how often module and loop take turns")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        base = folder / "base"
        compare("ExtremeRegionModule", folder, lambda: ExtremeRegionModule(base), turns)
        constant = {"lr_scheduler": "constant_with_warmup", "kl_budget": 0.05}
        compare("DistillModule", folder, lambda: DistillModule(base, **constant), turns)


if __name__ == "__main__":
    main()
