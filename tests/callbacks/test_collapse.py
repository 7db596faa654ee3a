"""The monitor against NumPy, by hand, over two processes, and in the chain of stages."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from erpd_lightning.callbacks import CollapseMonitor, Limit, ResumeCheckpoint
from erpd_lightning.callbacks.collapse import (
    empty_token_sums,
    format_rows,
    merge_token_sums,
    token_quantities,
    token_sums,
)
from erpd_lightning.modules.training import TrainingDiverged
from support import monitoring
from support.monitoring import Batch, micro_batch, watch
from support.policies import write_round
from support.processes import start_ranks

INTERVAL, TAIL = (0.8, 1.28), 10.0


def expected(
    batches: Sequence[Batch], interval: tuple[float, float] = INTERVAL, tail: float = TAIL
) -> dict[str, float]:
    """The definitions, token by token over unpadded float64 values."""
    tokens: list[tuple[float, float, float, bool]] = []
    for batch in batches:
        for row, reward in enumerate(batch["rewards"].tolist()):
            for column in batch["mask"][row].nonzero()[:, 0].tolist():
                values = [float(batch[name][row, column]) for name in ("log_ratio", "entropy", "logp")]
                tokens.append((values[0], values[1], values[2], reward == 1))
    log_ratio, entropy, logp, correct = (np.array(column) for column in zip(*tokens, strict=True))
    ratio = np.exp(log_ratio)
    return {
        "collapse/ess": ratio.sum() ** 2 / (ratio**2).sum() / len(ratio),
        "collapse/max_log_ratio": log_ratio.max(),
        "collapse/tail_share": np.mean(ratio > tail),
        "collapse/clipped_share": 1 - np.mean((ratio >= interval[0]) & (ratio <= interval[1])),
        "collapse/entropy": entropy.mean(),
        "collapse/logp_correct": logp[correct.astype(bool)].mean(),
        "collapse/logp_incorrect": logp[~correct.astype(bool)].mean(),
    }


def quantities(batch: Any) -> dict[str, float]:
    return token_quantities(token_sums(batch, INTERVAL, TAIL))


def ratios(log_ratio: Sequence[float]) -> Batch:
    values = torch.tensor([log_ratio], dtype=torch.float64)
    return {"mask": torch.ones_like(values, dtype=torch.bool), "log_ratio": values}


VALIDATION_QUANTITIES = ("pass@1", "kl_per_token", "entropy_per_token", "mean_length", "truncated", "distinct")

# What is computed of tokens.


def test_values_by_hand() -> None:
    batch = {
        "mask": torch.tensor([[True, True, True], [True, False, False]]),
        "log_ratio": torch.tensor([[0.0, math.log(2), math.log(0.5)], [math.log(12), torch.nan, torch.inf]]),
        "entropy": torch.tensor([[1.0, 2.0, 3.0], [6.0, torch.nan, 9.0]]),
        "logp": torch.tensor([[-1.0, -2.0, -3.0], [-7.0, torch.nan, 0.0]]),
        "rewards": torch.tensor([1.0, 0.0]),
    }
    assert quantities(batch) == pytest.approx(
        {
            "collapse/ess": 15.5**2 / (4 * (1 + 4 + 0.25 + 144)),
            "collapse/max_log_ratio": math.log(12),
            "collapse/tail_share": 1 / 4,
            "collapse/clipped_share": 3 / 4,
            "collapse/entropy": 3.0,
            "collapse/logp_correct": -2.0,
            "collapse/logp_incorrect": -7.0,
        }
    )


@pytest.mark.parametrize(("interval", "tail"), [(INTERVAL, TAIL), ((0.5, 1.5), 2.0), ((0.0, 1.0), 1.0)])
def test_values_of_many_tokens(interval: tuple[float, float], tail: float) -> None:
    batch = micro_batch(1, [30, 7, 1, 0, 12, 25])
    found = token_quantities(token_sums(batch, interval, tail))
    assert found == pytest.approx(expected([batch], interval, tail), rel=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_merged_parts_of_a_step_equal_the_step(parts: int) -> None:
    batches = [micro_batch(n, [n + 1, 2 * n + 1]) for n in range(parts)]
    sums = torch.stack([token_sums(batch, INTERVAL, TAIL) for batch in batches])
    assert token_quantities(merge_token_sums(sums)) == pytest.approx(expected(batches), rel=1e-12)
    halves = [merge_token_sums(half) for half in (sums[: parts // 2], sums[parts // 2 :]) if len(half)]
    torch.testing.assert_close(merge_token_sums(torch.stack(halves)), merge_token_sums(sums), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("log_ratio", "ess"),
    [
        ([200.0, -200.0], 1 / 2),
        ([200.0] * 3, 1.0),
        ([900.0, -900.0, 900.0, -900.0], 1 / 2),
        ([-200.0] * 5, 1.0),
        ([200.0, 200.0, -200.0, 0.0], 1 / 2),
        ([-200.0, -200.0 + math.log(3)], (1 + 3) ** 2 / 2 / (1 + 9)),
    ],
)
def test_the_effective_sample_size_of_extreme_ratios(log_ratio: list[float], ess: float) -> None:
    assert quantities(ratios(log_ratio))["collapse/ess"] == pytest.approx(ess, rel=1e-9)
    parts = [token_sums(ratios([value]), INTERVAL, TAIL) for value in log_ratio]
    assert token_quantities(merge_token_sums(torch.stack(parts)))["collapse/ess"] == pytest.approx(ess, rel=1e-9)


def test_quantities_without_tokens_are_absent() -> None:
    assert token_quantities(empty_token_sums()) == {}
    assert quantities({"mask": torch.zeros(2, 3, dtype=torch.bool), "log_ratio": torch.full((2, 3), torch.nan)}) == {}
    for nothing in (None, {}, {"loss": torch.zeros(())}):
        assert quantities(nothing) == {}
    all_correct = {**micro_batch(0, [3]), "rewards": torch.ones(1)}
    assert "collapse/logp_correct" in quantities(all_correct)
    assert "collapse/logp_incorrect" not in quantities(all_correct)


# What is logged.


def test_a_step_is_logged_as_a_whole(tmp_path: Path) -> None:
    batches = [batch for step in monitoring.STEPS for of_rank in step for batch in of_rank]
    _, notes = watch(batches, CollapseMonitor(), accumulate=4)
    logged = notes.steps()
    assert [step for step, _ in logged] == [0, 1, 2]
    for n, (_, values) in enumerate(logged):
        assert values == pytest.approx(expected(batches[4 * n : 4 * n + 4]), rel=1e-6)


def test_every_so_many_steps_those_steps_alone_are_logged() -> None:
    batches = [micro_batch(n, [3, n + 1]) for n in range(14)]
    monitor = CollapseMonitor(every_n_steps=3)
    _, notes = watch(batches, monitor, accumulate=2)
    logged = notes.steps()
    assert [step for step, _ in logged] == [2, 5]
    assert logged[0][1] == pytest.approx(expected(batches[4:6]), rel=1e-6)
    assert logged[1][1] == pytest.approx(expected(batches[10:12]), rel=1e-6)
    (row,) = monitor.rows
    monitored = expected([*batches[4:6], *batches[10:12]])
    assert {name: value for name, value in row.items() if name in monitored} == pytest.approx(monitored, rel=1e-6)


def test_its_cost_is_logged() -> None:
    monitor = CollapseMonitor()
    _, notes = watch([micro_batch(0, [3, 2])] * 3, monitor, epochs=2)
    seconds = [logged["collapse/seconds"] for _, logged in notes.logged if "collapse/seconds" in logged]
    assert 0 < seconds[0] < seconds[1] == pytest.approx(monitor.seconds, rel=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, rollouts and prompts."""
    return write_round(tmp_path_factory.mktemp("collapse"))


class Outputs(Callback):
    """What Lightning hands to callbacks."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((outputs, float(trainer.callback_metrics["train/loss"])))


def test_training_hands_out_what_it_logs_and_no_graph(folder: Path) -> None:
    outputs, monitor, notes = Outputs(), CollapseMonitor(), monitoring.Notes()
    monitoring.fit(folder, monitor, outputs, epochs=1, logger=notes)
    for handed, loss in outputs.seen:
        assert {"loss", "mask", "rewards", "log_ratio", "logp", "entropy"} <= handed.keys()
        assert not any(value.requires_grad for value in handed.values())
        assert float(handed["loss"]) == pytest.approx(loss)
    trained = [logged for _, logged in notes.logged if "train/entropy" in logged]
    monitored = [logged for _, logged in notes.steps()]
    assert len(trained) == len(monitored) == 3
    for own, module in zip(monitored, trained, strict=True):
        assert own["collapse/entropy"] == pytest.approx(module["train/entropy"], rel=1e-5)
    (row,) = monitor.rows
    (epoch,) = [logged for _, logged in notes.logged if "train/logp_correct" in logged]
    for kind in ("correct", "incorrect"):
        assert row[f"collapse/logp_{kind}"] == pytest.approx(epoch[f"train/logp_{kind}"], rel=1e-5)
    assert row["val/pass@1"] in (0.0, 0.5, 1.0)


# Limits.


def warned(batches: Sequence[Batch], *callbacks: Callback, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch(batches, *callbacks, **settings)
    return [text for text in (str(warning.message) for warning in caught) if text.startswith("optimiser step")]


def largest(values: Sequence[float]) -> list[Batch]:
    return [ratios([0.0, value]) for value in values]


def test_a_crossing_is_warned_of_once() -> None:
    monitor = CollapseMonitor({"collapse/max_log_ratio": Limit(max=2.0)})
    messages = warned(largest([1, 2, 3, 4, 1, 5, 2]), monitor)
    reasons = [
        "optimiser step 3: collapse/max_log_ratio is 3, above 2",
        "optimiser step 6: collapse/max_log_ratio is 5, above 2",
    ]
    assert messages == monitor.reasons == reasons


def test_patience() -> None:
    monitor = CollapseMonitor({"collapse/max_log_ratio": Limit(min=1.5, max=2.0, patience=2)})
    warned(largest([3, 2, 3, 1, 3, 2, 3]), monitor)
    assert monitor.reasons == ["optimiser step 4: collapse/max_log_ratio is 1, below 1.5 (2 measurements in a row)"]


def test_a_stop() -> None:
    monitor = CollapseMonitor({"collapse/max_log_ratio": Limit(max=2.0, action="stop")})
    trainer, _ = watch(largest([1, 3, 1, 1]), monitor)
    assert trainer.global_step == 2
    assert monitor.reasons == ["optimiser step 2: collapse/max_log_ratio is 3, above 2; training stops"]


@pytest.mark.parametrize("name", VALIDATION_QUANTITIES)
def test_limits_of_what_validation_says(name: str) -> None:
    monitor = CollapseMonitor({f"val/{name}": Limit(min=0.25, action="stop")})
    validated = [{f"val/{name}": value} for value in (0.5, 0.25, 0.125, 0.5)]
    trainer, _ = watch(largest([1.0, 1.0]), monitor, epochs=4, validated=validated)
    assert trainer.global_step == 6
    assert monitor.reasons == [f"optimiser step 6: val/{name} is 0.125, below 0.25; training stops"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_stops_with_the_step(value: float) -> None:
    with pytest.raises(TrainingDiverged, match=r"optimiser step 2: collapse/ess is NaN"):
        watch(largest([1.0, value, 1.0]), CollapseMonitor())
    with pytest.raises(TrainingDiverged, match=r"optimiser step 3: val/pass@1 is NaN"):
        watch(largest([1.0]), CollapseMonitor(), epochs=3, validated=[{"val/pass@1": v} for v in (0.5, 0.5, math.nan)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"limits": {"collapse/essence": Limit(max=1.0)}},
            "'collapse/essence' is not monitored; .* ess, max_log_ratio",
        ),
        ({"limits": {"train/entropy": Limit(max=1.0)}}, "'train/entropy' is not monitored"),
        ({"limits": {"collapse/ess": Limit()}}, "collapse/ess has min None and max None"),
        ({"limits": {"collapse/ess": Limit(min=2.0, max=1.0)}}, "collapse/ess has min 2.0 and max 1.0"),
        ({"limits": {"collapse/ess": Limit(min=math.nan)}}, "collapse/ess has min nan"),
        ({"limits": {"collapse/ess": Limit(min=0.1, patience=0)}}, "patience of collapse/ess is 0"),
        ({"limits": {"collapse/ess": Limit(min=0.1, action="halt")}}, "action of collapse/ess is 'halt'"),  # type: ignore[arg-type]
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"interval": (1.2, 0.8)}, "interval is"),
        ({"tail": 0.0}, "tail is 0"),
    ],
)
def test_settings_that_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollapseMonitor(**settings)


# Going on after a kill.


def test_a_run_that_goes_on_ends_like_one_that_was_not_killed(tmp_path: Path) -> None:
    def monitor() -> CollapseMonitor:
        return CollapseMonitor({"collapse/max_log_ratio": Limit(max=2.0, patience=3)})

    steps = largest([1, 3, 3, 3, 1, 3])
    whole, first, second = monitor(), monitor(), monitor()
    warned(steps, whole, epochs=2)
    saver = ResumeCheckpoint(tmp_path, every_n_steps=100)
    warned(steps, first, saver, epochs=1)
    warned(steps, second, epochs=2, ckpt_path=saver.latest(), weights_only=True)
    assert len(first.reasons) == 1
    assert len(whole.reasons) == 2
    assert second.reasons == whole.reasons
    assert second.rows == whole.rows
    assert second.state_dict()["measurements_outside"] == whole.state_dict()["measurements_outside"]


def test_a_run_that_goes_on_within_an_epoch_counts_what_it_saw_before(folder: Path, tmp_path: Path) -> None:
    whole, resumed = CollapseMonitor(), CollapseMonitor()
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    monitoring.fit(folder, whole, saver)
    monitoring.fit(folder, resumed, ckpt_path=tmp_path / "step=5.ckpt")
    assert [row["step"] for row in whole.rows] == [3, 6]
    assert resumed.rows == whole.rows


def test_a_run_that_was_stopped_stays_stopped(tmp_path: Path) -> None:
    def monitor() -> CollapseMonitor:
        return CollapseMonitor({"collapse/max_log_ratio": Limit(max=2.0, action="stop")})

    stopped, resumed = monitor(), monitor()
    saver = ResumeCheckpoint(tmp_path, every_n_steps=1)
    watch(largest([1, 3, 1]), stopped, saver, epochs=2)
    trainer, notes = watch(largest([1, 1, 1]), resumed, epochs=2, ckpt_path=saver.latest(), weights_only=True)
    assert trainer.global_step == 2
    assert notes.steps() == []
    assert resumed.reasons == stopped.reasons != []


class Saved(ResumeCheckpoint):
    """Notes whether validation had had its say when it saved."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, every_n_steps=1)
        self.validated: list[tuple[int, bool]] = []

    def _save(self, trainer: Any) -> None:
        self.validated.append((trainer.global_step, "val/pass@1" in trainer.callback_metrics))
        super()._save(trainer)


def test_no_checkpoint_lies_between_a_stop_and_its_validation(tmp_path: Path) -> None:
    saver = Saved(tmp_path)
    monitor = CollapseMonitor({"collapse/max_log_ratio": Limit(max=2.0, action="stop")})
    watch(largest([1, 3, 1]), monitor, saver, validated=[{"val/pass@1": 0.5}])
    assert saver.validated == [(1, False), (2, True)]


# Two processes.


def test_two_processes(tmp_path: Path) -> None:
    one, two = monitoring.collapse(tmp_path, 1), start_ranks(monitoring.__file__, tmp_path, "collapse")
    assert len(one["uneven"]["logged"]) == 3
    for rank in two:
        assert len(rank["uneven"]["logged"]) == 3
        for found, whole in zip(rank["uneven"]["logged"], one["uneven"]["logged"], strict=True):
            assert found[0] == whole[0]
            assert found[1] == pytest.approx(whole[1], rel=1e-6)
        for found, whole in zip(rank["uneven"]["rows"], one["uneven"]["rows"], strict=True):
            assert found == pytest.approx(whole, rel=1e-6)
        decided = rank["decisions"]
        assert decided["tokens"]["steps"] == 2
        assert "optimiser step 2: collapse/max_log_ratio is" in decided["tokens"]["reasons"][0]
        assert decided["validation"]["steps"] == 2
        assert decided["validation"]["reasons"] == [
            "optimiser step 2: val/entropy_per_token is 0.01, below 0.1; training stops"
        ]
        assert "optimiser step 2: collapse/ess is NaN" in decided["nan in tokens"]
        assert "optimiser step 1: val/distinct is NaN" in decided["nan in validation"]
    assert two[0]["decisions"] == two[1]["decisions"]


# The table.


def test_the_table_shows_what_was_measured() -> None:
    rows = [
        {"epoch": 1, "step": 4, "val/pass@1": 0.5, "val/entropy_per_token": 0.625, "collapse/entropy": 9.0},
        {"epoch": 2, "step": 8, "val/pass@1": 0.75, "val/kl_per_token": 0.0625, "collapse/ess": 0.5},
        {"epoch": 3, "step": 12, "val/pass@1": 0.25, "val/kl_per_token": 0.125, "collapse/ess": 0.25},
    ]
    lines = [line.split() for line in format_rows(rows).splitlines()]
    assert lines[0] == ["epoch", "step", "pass@1", "KL/token", "entropy", "ESS"]
    assert lines[2:] == [
        ["1", "4", "0.5", "0.625"],
        ["2", "8", "0.75", "0.0625", "0.5", "highest"],
        ["3", "12", "0.25", "0.125", "0.25"],
    ]


def test_a_table_is_printed_when_training_ends(capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"val/distinct": Limit(min=0.1), "collapse/ess": Limit(min=0.0)}
    watch(largest([1.0, 1.0]), CollapseMonitor(limits), epochs=2, validated=[{"val/pass@1": 0.5}] * 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[2:4]] == [["1", "2", "0.5"], ["2", "4", "0.5"]]
    assert lines[4:] == ["Limits of what was not measured: val/distinct"]
    watch([{"mask": torch.ones(1, 1, dtype=torch.bool)}], CollapseMonitor())
    assert capsys.readouterr().out == ""
