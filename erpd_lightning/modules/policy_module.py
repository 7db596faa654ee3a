"""What the two stages share: one policy that is trained, evaluated on fresh samples, and exported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..data.batching import RolloutBatch
from ..data.predict_data import Scores, ScoringPart, StorePass
from ..data.prompts import PromptBatch
from ..errors import InvalidArgument, UserError
from ..models.head import MAX_LOGITS
from ..models.loading import load_tokenizer
from ..models.policy import Policy, export_policy, load_frozen, load_policy, policy_fingerprint
from ..objectives.reduction import masked_sum
from ..seeds import derive_seed
from .evaluation import add_metrics, evaluated, prompt_sums, update_metrics
from .old_logps import Anchor

SUPPORT_MASS = 0.999
SUPPORT_SIZE = 64

EVALUATIONS = ("val", "calibration", "test")
"""What is sampled afresh: held-out prompts, unused training prompts, and held-out prompts again."""


class TrainingDiverged(UserError):
    """A loss or gradient that is not finite: the run stops before the weights take it in."""


class PolicyModule(LightningModule):
    """A policy under training; the stages say what its loss is.

    Args:
        policy: Folder or hub name of the causal language model to start from.
        references: Policies that evaluation measures the KL to, by name, as folders or hub names; None for the
            starting policy alone, as `base`.
        learning_rate: AdamW's learning rate after warm-up.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's decay rates of the moments.
        warmup_steps: Optimiser steps over which the learning rate rises from 0.
        lr_scheduler: What follows, by its name in `transformers.get_scheduler`, such as `cosine`.
        dtype: Data type of the weights, as in `torch`.
        max_logits: The most logits to hold at a time, the bound on the output head's memory.
        pass_at_k: The k of pass@k, or None for as many as there are samples of a prompt.

    Raises:
        UserError: For a value out of range.
    """

    needs_groups = False
    calibrates = False
    re_anchors = False
    """Whether the anchor of its importance ratios is taken again in every iteration."""
    iterations = 1
    """Parts of the prompts that it answers itself while it is distilled; 1 for the rollouts that it is given."""

    def __init__(
        self,
        policy: str | Path,
        references: dict[str, str] | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup_steps: int = 5,
        lr_scheduler: str = "constant_with_warmup",
        dtype: str = "float32",
        max_logits: int = MAX_LOGITS,
        pass_at_k: int | None = None,
    ) -> None:
        from transformers.trainer_utils import SchedulerType

        super().__init__()
        if not 0 < learning_rate < float("inf"):
            raise InvalidArgument("learning_rate", f"is {learning_rate}: it must be a positive number")
        if warmup_steps < 0:
            raise InvalidArgument("warmup_steps", f"is {warmup_steps}: it must be at least 0")
        if not 0 <= weight_decay < float("inf"):
            raise InvalidArgument("weight_decay", f"is {weight_decay}: it must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise InvalidArgument("betas", f"is {betas}: both must be at least 0 and below 1")
        if max_logits < 1:
            raise InvalidArgument("max_logits", f"is {max_logits}: it must be at least 1")
        if pass_at_k is not None and pass_at_k < 1:
            raise InvalidArgument("pass_at_k", f"is {pass_at_k}: it must be at least 1")
        if lr_scheduler not in [kind.value for kind in SchedulerType]:
            raise InvalidArgument("lr_scheduler", f"is {lr_scheduler!r}: it must be one of {', '.join(SchedulerType)}")
        kind = getattr(torch, dtype, None)
        if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise InvalidArgument("dtype", f"is {dtype!r}: it must be a floating-point type of torch such as bfloat16")
        self.policy_path = policy
        self.references = {"base": str(policy)} if references is None else references
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.lr_scheduler_name = lr_scheduler
        self.weights_dtype = dtype
        self.max_logits = max_logits
        self.pass_at_k = pass_at_k
        self.policy: Policy
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict() for stage in EVALUATIONS})
        # Frozen policies, kept from the optimizer, from checkpoints and from wrapping by leaving them unregistered.
        self._frozen: dict[str, Policy] = {}
        self._old = Anchor()
        self._step_sums: dict[str, Tensor] = {}
        self._step_rows: list[Tensor] = []
        self._epoch_sums: dict[str, Tensor] = {}
        self._finished = False

    # What a stage has to say.

    def select(self, rewards: Tensor, advantages: Tensor) -> Tensor:
        """Which of the stored responses enter the loss: `(N,)` rewards and advantages to bool `(N,)`.

        The reward of what could not be checked is NaN, its advantage 0.
        """
        raise NotImplementedError

    def terms(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms of the loss, and further `(B, T)` values whose token means are logged.

        Terms of tokens are `(B, T)` and of responses `(B,)`; what is outside the mask does not count.
        """
        raise NotImplementedError

    # Building.

    @property
    def fingerprint(self) -> str:
        """What tells the starting policy apart from others."""
        return policy_fingerprint(self.policy_path)

    def configure_model(self) -> None:
        """Load the policy, once; sharded strategies call this inside their own context."""
        if not hasattr(self, "policy"):
            self.policy = load_policy(self.policy_path, self.weights_dtype, self.max_logits)

    def configure_optimizers(self) -> Any:
        """AdamW and a scheduler of `transformers`, stepped after every optimiser step."""
        from transformers import get_scheduler

        optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )
        steps = self.trainer.estimated_stepping_batches  # Not below: this builds the data loader.
        if steps == float("inf"):
            raise UserError("the trainer never ends: give it max_epochs or max_steps")
        try:
            scheduler = get_scheduler(
                self.lr_scheduler_name,
                optimizer,
                num_warmup_steps=self.warmup_steps,
                num_training_steps=int(steps),
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"lr_scheduler is {self.lr_scheduler_name!r}: {error}") from error
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # Training: sums of micro-batches, divided once by the tokens or responses of the whole optimiser step.

    def on_train_epoch_start(self) -> None:
        """Take the anchor of the importance ratios again where an iteration begins, with the policy as it is."""
        if not self.re_anchors:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise UserError("an anchor that is taken again in every iteration needs a RolloutDataModule")
        if not data.trained.begins_iteration():
            return
        copies = self.trainer.world_size // self._data_parallel_size  # of a batch, where tensors are parallel
        # As in training, so that the ratios begin at 1.
        with self.trainer.precision_plugin.train_step_context():
            self._old.take(
                self.policy,
                data.trained.rollouts.response_offsets,
                data.trained.sweep(),
                self.device,
                lambda logps: self.trainer.strategy.reduce(logps, reduce_op="sum") / copies,
            )

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Tensor]:
        """The micro-batch's share of the step's loss, per response token or per response of the step, as `loss`.

        With it goes what callbacks may ask of a micro-batch, detached: `mask` `(B, T)`, `rewards` `(B,)`, and the
        values `(B, T)` of `terms` by their names.

        Lightning divides by the micro-batches of a step and averages gradients over ranks; both are undone here,
        so that the gradient is that of the sum over the step divided by its tokens or responses, however it was
        cut. A filler counts as neither.
        """
        terms, values = self.terms(batch)
        if terms.dim() == 1:
            loss = masked_sum(terms, batch.mask.any(-1)) / batch.step_responses
        else:
            loss = masked_sum(terms, batch.mask) / batch.step_tokens
        self._note(batch, loss, values)
        return {
            **{name: value.detach() for name, value in values.items()},
            "mask": batch.mask,
            "rewards": batch.rewards,
            "loss": loss * (self.trainer.accumulate_grad_batches * self._data_parallel_size),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step as a whole, and stop before a step that is not finite.

        Gradients are the same on all ranks by now, so all of them stop together.

        Raises:
            TrainingDiverged: Names the step and the stored rows that it was made of.
        """
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        rows, self._step_rows = torch.cat(self._step_rows), []
        rows = rows[rows >= 0]  # without fillers
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
        """Log the mean log-prob of right and of wrong responses as they passed by in this epoch."""
        sums = self._reduced(self._epoch_sums)
        self._epoch_sums = {}
        for kind in ("right", "wrong"):
            if sums and sums[f"{kind}_tokens"] > 0:
                mean = sums[f"{kind}_logp"] / sums[f"{kind}_tokens"]
                self.log(f"train/logp_{kind}", mean, sync_dist=True)

    # The end of training: what is done to the weights after the last step, once, and never in a checkpoint, so that a
    # run that is killed here ends the same.

    def settle(self) -> None:
        """Bring the weights to where training is to end."""

    def finish(self) -> None:
        """Settle, unless that is done; a callback whose last word is on the weights calls it first."""
        if not self._finished:
            self._finished = True
            self.settle()

    def on_fit_start(self) -> None:
        """A new training, a new end."""
        self._finished = False

    def on_train_end(self) -> None:
        """Settle, with the policy still on its device."""
        self.finish()

    def on_fit_end(self) -> None:
        """Settle where Lightning found nothing left to train, after a kill, and free the reference policies."""
        if not self._finished:
            self.to(self.trainer.strategy.root_device)
        self.finish()
        self.release_frozen()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the running sums of an epoch that is not over, and the anchor of its iteration."""
        checkpoint["epoch_sums"] = self._reduced(self._epoch_sums)
        if self.re_anchors:
            checkpoint["anchor"] = self._old.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them. The running sums are those of all ranks: one of them takes them over.

        Raises:
            UserError: If the checkpoint holds no anchor and one is needed.
        """
        share = 1.0 if self.trainer.is_global_zero else 0.0
        self._epoch_sums = {name: total * share for name, total in checkpoint["epoch_sums"].items()}
        if self.re_anchors:
            if "anchor" not in checkpoint:
                raise UserError("the checkpoint holds no anchor: the objective or its anchor was another one then")
            self._old.load_state_dict(checkpoint["anchor"])

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
        right = mask & (batch.rewards == 1)[:, None]
        wrong = mask & (batch.rewards != 1)[:, None]
        _add(
            self._epoch_sums,
            {
                "right_logp": masked_sum(logps, right),
                "right_tokens": right.sum().float(),
                "wrong_logp": masked_sum(logps, wrong),
                "wrong_tokens": wrong.sum().float(),
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

    # Evaluation on fresh samples.

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample, verify, and measure; see `evaluate`. A second loader's prompts are for calibration."""
        self.evaluate(batch, self.metrics[EVALUATIONS[dataloader_idx]])

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The same as validation, under `test/`."""
        self.evaluate(batch, self.metrics["test"])

    @torch.no_grad()
    def evaluate(self, prompts: PromptBatch, metrics: Any) -> None:
        """Add the policy's own fresh responses to some prompts to the metrics.

        All that is said per token is the mean over all sampled tokens; standard errors count prompts, because
        responses to one prompt are alike. KL and entropy are exact over the vocabulary.
        """
        self._add_metrics(metrics, prompts.samples)
        if not prompts.prompts:
            return
        table = prompts.respond(self.policy.model, derive_seed(prompts.seed, self.global_step))
        sums = self._prompt_sums(table, prompts)
        update_metrics(metrics, sums, prompts.samples, self.references)

    def _prompt_sums(self, table: pa.Table, prompts: PromptBatch) -> dict[str, Tensor]:
        """What the metrics take of responses to some prompts."""
        return prompt_sums(self.policy, self.frozen, self.references, table, prompts)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """What Lightning's loops do around an evaluation, for one outside of them."""
        with self.trainer.precision_plugin.val_step_context():
            self.eval()
            yield
            self.train()

    def _add_metrics(self, metrics: Any, samples: int) -> None:
        """Make the metrics when the first batch says how many samples there are."""
        if len(metrics):
            return
        k = self.pass_at_k or samples
        if metrics is self.metrics["calibration"]:  # Nothing but its KL is asked for.
            k = min(k, samples)
        if k > samples:
            raise UserError(f"pass_at_k is {k}, but only {samples} responses are sampled to a prompt")
        add_metrics(metrics, k, self.references)
        metrics.to(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log and reset."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log and reset."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        metrics: Any = self.metrics[stage]
        shown = ("pass@1", "kl_per_token")
        for name, value in evaluated(metrics).items():
            # The value is the same on all ranks: sync_dist only says that it is meant to be.
            shown_here = stage == "val" and name in shown
            self.log(f"{stage}/{name}", value.float(), prog_bar=shown_here, sync_dist=True)
        for metric in metrics.values():
            metric.reset()

    def frozen(self, name: str) -> Policy:
        """A reference policy, loaded on first use and kept until training or evaluation ends."""
        if name not in self._frozen:
            key = "references" if name in self.references else "policies"
            path = self._paths[name]
            self._frozen[name] = load_frozen(path, self.policy, f"{key}.{name}", self.weights_dtype)
        return self._frozen[name]

    @contextmanager
    def borrowed(self, name: str) -> Iterator[Policy]:
        """A reference policy for a while; it goes again unless it was in memory before."""
        held = name in self._frozen
        try:
            yield self.frozen(name)
        finally:
            if not held:
                self._frozen.pop(name, None)

    @property
    def _paths(self) -> dict[str, str]:
        """Where the policies lie that can be had frozen."""
        return self.references

    def release_frozen(self) -> None:
        """Let the reference policies go from memory."""
        self._frozen.clear()

    def on_validation_end(self) -> None:
        """Free the reference policies: between evaluations one policy alone is in memory."""
        self.release_frozen()

    on_test_end = on_validation_end

    # Prediction: fresh responses, or the scores of stored ones.

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch | ScoringPart | None, batch_idx: int) -> pa.Table | list[Scores]:
        """Responses to prompts, a table of the `ROLLOUTS` schema; or the scores of stored responses."""
        if batch is None:
            return []
        if isinstance(batch, PromptBatch):
            return batch.respond(self.policy.model)
        return [self._score(rollouts) for rollouts in batch.batches]

    def _score(self, rollouts: RolloutBatch) -> Scores:
        hidden = self.policy.hidden(rollouts)
        ids = rollouts.support_ids
        if ids is None:
            ids = self.policy.select_support(rollouts, SUPPORT_MASS, SUPPORT_SIZE, hidden)
        return Scores(
            self.policy.token_logps(rollouts, hidden).logps,
            ids,
            self.policy.support_logps(rollouts, ids, hidden),
        )

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Hand a pass over prompts or rollouts what its store is to keep."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StorePass) and batch is not None:
            data.write(batch, outputs)

    def on_predict_end(self) -> None:
        """Finish the store of a pass."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(data, StorePass):
            data.finish()

    # Export.

    def export(self, path: str | Path, tokenizer: str | Path | None = None) -> None:
        """Write the policy as a Hugging Face folder; call it on every rank.

        Args:
            path: The folder, which appears whole or not at all.
            tokenizer: Where the tokenizer is; None for beside the starting policy.
        """
        with self._on_rank_zero() as writes:
            if writes:
                source = self.policy_path if tokenizer is None else tokenizer
                export_policy(self.policy.model, load_tokenizer(source), Path(path))

    @contextmanager
    def _on_rank_zero(self) -> Iterator[bool]:
        """Whether this rank does the block's work; all ranks leave it together."""
        trainer = self._trainer
        try:
            yield trainer is None or trainer.is_global_zero
        finally:
            if trainer is not None:
                trainer.strategy.barrier()


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def _shorten(rows: list[int], most: int = 16) -> str:
    shown = ", ".join(str(row) for row in rows[:most])
    return shown if len(rows) <= most else f"{shown}, … ({len(rows)} in all)"
