"""What the two stages share: a policy that is trained on stored rollouts, evaluated on fresh samples, and exported."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..data.batching import RolloutBatch
from ..data.rollouts import RolloutDataModule
from ..errors import InvalidArgument, UserError, check_at_least
from ..objectives.reduction import masked_sum
from .evaluation import EvaluationModule
from .old_logps import OldLogps
from .strategies import check_steps

HALF_PRECISIONS = ("bf16-true", "16-true")
"""Precisions of a trainer that round the weights themselves."""


class TrainingDiverged(UserError):
    """A loss or gradient that is not finite: the run stops before the weights take it in."""


class TrainingModule(EvaluationModule):
    """A policy under training; the stages say what its loss is.

    Args:
        policy: Folder or hub name of the causal language model to start from.
        learning_rate: AdamW's learning rate after warm-up.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's decay rates of the moments.
        warmup_steps: Optimiser steps over which the learning rate rises, the first one above 0 already.
        lr_scheduler: What follows, by its name in `transformers.get_scheduler`, such as `cosine`.
        **kwargs: Further arguments of `EvaluationModule`.

    Raises:
        InvalidArgument: For a value out of range.
    """

    iterations = 1
    """Parts of the prompts that it answers itself while it is trained; 1 for the rollouts that it is given."""
    needs_groups = False
    """Whether its objective compares the responses to a prompt."""
    calibrates = False
    """Whether it is also validated on unused training prompts."""
    refreshes_old_logps = False
    """Whether its importance ratios divide by the policy as it was when an iteration began."""

    def __init__(
        self,
        policy: str | Path,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup_steps: int = 5,
        lr_scheduler: str = "constant_with_warmup",
        **kwargs: Any,
    ) -> None:
        from transformers.trainer_utils import SchedulerType

        super().__init__(policy, **kwargs)
        if not 0 < learning_rate < float("inf"):
            raise InvalidArgument("learning_rate", f"is {learning_rate}: it must be a positive number")
        check_at_least(0, warmup_steps=warmup_steps)
        if not 0 <= weight_decay < float("inf"):
            raise InvalidArgument("weight_decay", f"is {weight_decay}: it must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise InvalidArgument("betas", f"is {betas}: both must be at least 0 and below 1")
        if lr_scheduler not in [kind.value for kind in SchedulerType]:
            raise InvalidArgument("lr_scheduler", f"is {lr_scheduler!r}: it must be one of {', '.join(SchedulerType)}")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.lr_scheduler_name = lr_scheduler
        self._scheduler(torch.optim.SGD([torch.zeros(1)], learning_rate), warmup_steps + 1)  # Whether there is one.
        self._lr_scheduler: Any = None
        self._total_steps: int | None = None
        self._old_logps = OldLogps()
        self._step_sums: dict[str, Tensor] = {}
        self._step_rows: list[Tensor] = []
        self._epoch_sums: dict[str, Tensor] = {}
        self._finalized = False

    # What a stage has to say.

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Which of the stored responses enter the loss: `(N,)` rewards and advantages to bool `(N,)`.

        The reward of what could not be checked is NaN, its advantage 0.
        """
        raise NotImplementedError

    def batch_loss(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each token or response, and further `(B, T)` values whose token means are logged.

        Losses of tokens are `(B, T)` and of responses `(B,)`; what is outside the mask does not count. The values carry
        no gradient: the entropy of `Policy.token_logps` is detached, so that none can be made of it by adding it to a
        loss.
        """
        raise NotImplementedError

    # Set-up: data, optimizer and schedule.

    def check_precision(self, trainer: Trainer) -> None:
        """Whether the weights have the precision that training needs: at a step's size, most of them would not move.

        Raises:
            InvalidArgument: If they are rounded to half precision, by `dtype` or by the trainer's `precision`.
        """
        right = "train float32 weights with --trainer.precision bf16-mixed, which computes in bfloat16"
        if torch.finfo(getattr(torch, self.weights_dtype)).eps > torch.finfo(torch.float32).eps:
            problem = f"is {self.weights_dtype!r}: weights of so few digits hardly learn; {right}"
            raise InvalidArgument("dtype", problem)
        if str(trainer.precision) in HALF_PRECISIONS:
            problem = f"is {trainer.precision!r}: weights of so few digits hardly learn; {right}"
            raise InvalidArgument("precision", problem)

    def setup(self, stage: str) -> None:
        """Say what the data module needs to know of the training.

        Raises:
            InvalidArgument: If the trainer's precision or steps are none that training can have.
        """
        super().setup(stage)
        if stage != "fit":
            return
        check_steps(self.trainer)
        self.check_precision(self.trainer)
        self._total_steps = None
        if self._rollout_data is not None:
            self._rollout_data.connect(self)

    @property
    def _rollout_data(self) -> RolloutDataModule | None:
        """The trainer's data module, if it is one of rollouts."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, RolloutDataModule) else None

    @property
    def correct_threshold(self) -> float:
        """Reward from which a response counts as correct: that of the data, 1 where these are of another kind."""
        data = None if self._trainer is None else self._rollout_data
        return 1.0 if data is None else data.correct_threshold

    def configure_optimizers(self) -> Any:
        """AdamW and a scheduler of `transformers`, stepped after every optimiser step.

        How many steps there will be is known once the rollouts are there, which may be sampled after this; until then
        the scheduler is one for a step more than warm-up, whose first learning rate is the same; see `on_train_start`.
        """
        optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise UserError("the trainer never ends: give it max_epochs or max_steps")
        self._lr_scheduler = self._scheduler(optimizer, self.warmup_steps + 1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler, "interval": "step"},
        }

    def _scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """The scheduler, whose warm-up takes `warmup_steps` and begins above 0: a step at 0 would teach nothing."""
        from transformers import get_scheduler

        name, warmup = self.lr_scheduler_name, self.warmup_steps
        try:
            scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        except (ValueError, TypeError) as error:
            raise InvalidArgument("lr_scheduler", f"is {name!r}: {error}") from error
        if not isinstance(scheduler, LambdaLR):
            raise InvalidArgument("lr_scheduler", f"is {name!r}, which goes by a metric: take one that goes by steps")
        (factor,) = scheduler.lr_lambdas
        if warmup == 0 or factor(0) > 0:
            return scheduler
        return LambdaLR(optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else factor(step))

    def on_fit_start(self) -> None:
        """Sample the rollouts where they are missing, with the policy on its device. A new training, a new end."""
        self._finalized = False
        if self._rollout_data is not None and self.trainer.ckpt_path is None:
            self._rollout_data.sample_for_epoch(0)

    def on_train_start(self) -> None:
        """Tell the scheduler how many steps there are, and sample what a training that goes on is to go on with.

        A checkpoint may be older than the rollouts of its next epoch. A scheduler of a subclass's own is left alone.
        """
        if self._rollout_data is not None and not self._is_over(self.trainer.current_epoch):
            self._rollout_data.sample_for_epoch(self.trainer.current_epoch)
        if self._total_steps is None:
            self._total_steps = int(self.trainer.estimated_stepping_batches)
        for config in self.trainer.lr_scheduler_configs:
            if config.scheduler is self._lr_scheduler:
                like = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
                vars(config.scheduler)["lr_lambdas"] = self._scheduler(like, self._total_steps).lr_lambdas

    # Training: sums of micro-batches, divided once by the tokens or responses of the whole optimiser step.

    def on_train_epoch_start(self) -> None:
        """Take the old log-probs again where an iteration begins, with the policy as it is.

        Raises:
            UserError: If a callback has steps of other micro-batches than the data were cut into, or they are taken
                from no rollouts.
        """
        data = self._rollout_data
        if data is not None:
            data.check_micro_batches()
        if not self.refreshes_old_logps:
            return
        if data is None:
            raise UserError("old log-probs that are taken again in every iteration need a RolloutDataModule")
        if not data.train_data.begins_iteration(self.trainer.current_epoch):
            return
        copies = self.trainer.world_size // self._data_parallel_size  # of a batch, where tensors are parallel
        # As in training, so that the ratios begin at 1.
        with self.trainer.precision_plugin.train_step_context():
            self._old_logps.take(
                self.policy,
                data.train_data.table.response_offsets,
                data.iterate_once(),
                self.device,
                lambda logps: self.trainer.strategy.reduce(logps, reduce_op="sum") / copies,
            )

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Tensor]:
        """The micro-batch's share of the step's loss, per response token or per response of the step, as `loss`.

        With it goes what callbacks may ask of a micro-batch, detached: `mask` `(B, T)`, `rewards` `(B,)`, `correct`
        `(B,)` bool, and the values `(B, T)` of `batch_loss` by their names.

        Lightning divides by the micro-batches of a step and averages gradients over ranks; both are undone here,
        so that the gradient is that of the sum over the step divided by its tokens or responses, however it was
        cut. A dummy micro-batch counts as neither.
        """
        losses, values = self.batch_loss(batch)
        if losses.dim() == 1:
            loss = masked_sum(losses, batch.mask.any(-1)) / batch.step_responses
        else:
            loss = masked_sum(losses, batch.mask) / batch.step_tokens
        self._note(batch, loss, values)
        return {
            **{name: value.detach() for name, value in values.items()},
            "mask": batch.mask,
            "rewards": batch.rewards,
            "correct": batch.rewards >= self.correct_threshold,
            "loss": loss * (self.trainer.accumulate_grad_batches * self._data_parallel_size),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step as a whole, and stop before a step that is not finite.

        Gradients are the same on all ranks by now, so all of them stop together.

        Raises:
            TrainingDiverged: Names the step and the stored rows that it was made of.
            RuntimeError: If no parameter has a gradient: they are kept elsewhere, where nothing here can check them.
        """
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        if not gradients:
            raise RuntimeError(
                f"optimiser step {self.global_step + 1}: no parameter of the policy has a gradient under "
                f"{type(self.trainer.strategy).__name__}"
            )
        norm = torch.nn.utils.get_total_norm(gradients)
        rows, self._step_rows = torch.cat(self._step_rows), []
        rows = rows[rows >= 0]  # without those of dummy micro-batches
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not scaled and not torch.isfinite(norm):
            raise TrainingDiverged(
                f"optimiser step {self.global_step + 1}: loss or gradient is not finite (norm {float(norm)}); "
                f"rows of the store: {_shorten(rows.tolist())}. The last checkpoint is untouched"
            )
        sums = self._reduced(self._step_sums)
        tokens = sums.pop("tokens")
        loss = sums.pop("loss")
        self._step_sums = {}
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/grad_norm", norm)
        for name, total in sums.items():
            self.log(f"train/{name}", total / tokens)

    def on_train_epoch_end(self) -> None:
        """Log the mean log-prob of correct and of incorrect responses in this epoch, and sample for the next one."""
        sums = self._reduced(self._epoch_sums)
        self._epoch_sums = {}
        for kind in ("correct", "incorrect"):
            if sums and sums[f"{kind}_tokens"] > 0:
                mean = sums[f"{kind}_logp"] / sums[f"{kind}_tokens"]
                self.log(f"train/logp_{kind}", mean, sync_dist=True)
        epochs = self.trainer.current_epoch + 1
        if self._rollout_data is not None and not self._is_over(epochs):
            self._rollout_data.sample_for_epoch(epochs)

    def _is_over(self, epochs: int) -> bool:
        """Whether training ends after so many epochs. Lightning's own answer changes its state."""
        trainer = self.trainer
        if epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps:
            return True
        may_stop = epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        return trainer.should_stop and may_stop

    # The end of training: what is done to the weights after the last step, once, and never in a checkpoint, so that a
    # run that is killed here ends the same.

    def finalize_weights(self) -> None:
        """Bring the weights to where training is to end."""

    def ensure_finalized(self) -> None:
        """Finalize the weights, unless that is done; a callback that judges the last weights calls it first."""
        if not self._finalized:
            self._finalized = True
            self.finalize_weights()

    def on_train_end(self) -> None:
        """Finalize the weights, with the policy still on its device."""
        self.ensure_finalized()

    def on_fit_end(self) -> None:
        """Finalize where Lightning found nothing left to train, after a kill, and free the references."""
        if not self._finalized:
            self.to(self.trainer.strategy.root_device)
        self.ensure_finalized()
        self.release_references()

    # Going on.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the running sums of an epoch that is not over, the steps in all, and the iteration's old log-probs."""
        checkpoint["epoch_sums"] = self._reduced(self._epoch_sums)
        checkpoint["schedule"] = {"steps": self._total_steps, "limits": self._limits}
        if self.refreshes_old_logps:
            checkpoint["old_logps"] = self._old_logps.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them. The running sums are those of all ranks: one of them takes them over.

        Raises:
            UserError: If the checkpoint holds no old log-probs and they are needed.
        """
        share = 1.0 if self.trainer.is_global_zero else 0.0
        self._epoch_sums = {name: total * share for name, total in checkpoint["epoch_sums"].items()}
        schedule = checkpoint["schedule"]
        # Of a training that is to be longer or shorter now, the steps are counted anew.
        self._total_steps = schedule["steps"] if schedule["limits"] == self._limits else None
        if self.refreshes_old_logps:
            if "old_logps" not in checkpoint:
                raise UserError(
                    "the checkpoint holds no old log-probs: it was made with another objective or old_policy"
                )
            self._old_logps.load_state_dict(checkpoint["old_logps"])

    @property
    def _limits(self) -> list[int | None]:
        return [self.trainer.max_epochs, self.trainer.max_steps]

    def _note(self, batch: RolloutBatch, loss: Tensor, values: dict[str, Tensor]) -> None:
        """Add a micro-batch to the sums of its step and of the epoch."""
        mask = batch.mask
        self._step_rows.append(batch.rows)
        step = {"loss": loss.detach(), "tokens": mask.sum().float()}
        step.update({name: masked_sum(value.detach(), mask) for name, value in values.items()})
        _add(self._step_sums, step)
        if "logp" not in values:
            return
        logps = values["logp"].detach()
        is_correct = (batch.rewards >= self.correct_threshold)[:, None]
        correct, incorrect = mask & is_correct, mask & ~is_correct
        _add(
            self._epoch_sums,
            {
                "correct_logp": masked_sum(logps, correct),
                "correct_tokens": correct.sum().float(),
                "incorrect_logp": masked_sum(logps, incorrect),
                "incorrect_tokens": incorrect.sum().float(),
            },
        )

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all ranks, in one reduction."""
        if not sums:
            return {}
        stacked = torch.stack([value.to(self.device).double() for value in sums.values()])
        total = self.trainer.strategy.reduce(stacked, reduce_op="sum")
        return dict(zip(sums, total.unbind(), strict=True))

    @property
    def _data_parallel_size(self) -> int:
        kwargs = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1}
        size: int = kwargs["num_replicas"]
        return size


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def _shorten(rows: list[int], most: int = 16) -> str:
    shown = ", ".join(str(row) for row in rows[:most])
    return shown if len(rows) <= most else f"{shown}, … ({len(rows)} in all)"
