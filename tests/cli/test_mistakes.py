"""Mistakes in the configuration end in exit code 2 and a line that names the key or the file."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erpd_lightning.pipeline.rounds import Rounds
from support.chain import arguments
from support.command_line import Run, with_yaml
from support.processes import ROOT

MIXED = (
    "weights of so few digits hardly learn; train float32 weights with --trainer.precision bf16-mixed, which computes "
    "in bfloat16"
)


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "erpd_lightning", *arguments(tmp_path / "run"), "--distill.kl_budgte=0.1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: distill.kl_budgte is no option: did you mean distill.kl_budget?\n"
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # unknown keys
        ("--nonsense=3", "nonsense is no option: --help lists all that there are"),
        ("--kl_budget=3", "kl_budget is no option: did you mean distill.kl_budget?"),
        ("--data.group_sise=3", "data.group_sise is no option: did you mean data.group_size?"),
        ("--trainer.max_epoch=3", "trainer.max_epoch is no option: did you mean trainer.max_epochs?"),
        (
            "--distill_trainer.max_epoch=1",
            "distill_trainer.max_epoch is no option: did you mean distill_trainer.max_epochs?",
        ),
        ("--unlearned.kl_coeff=1", "unlearned.kl_coeff is no option: did you mean unlearned.kl_coef?"),
        ("--unlearned.sign=1", "unlearned.sign is no option: the chain of stages sets it"),
        ("--data.store=x", "data.store is no option: the chain of stages sets it"),
        ("--data.replay_stores=[x]", "data.replay_stores is no option: the chain of stages sets it"),
        ("--data.on_policy_store=x", "data.on_policy_store is no option: the chain of stages sets it"),
        ("--trainer.default_root_dir=x", "trainer.default_root_dir is no option: the chain of stages sets it"),
        # wrong types
        ("--data.group_size=x", "data.group_size: expected int, not x"),
        ("--rounds=1.5", "rounds: expected int, not 1.5"),
        ("--distill.kl_budget=many", "distill.kl_budget: expected float or null, not many"),
        ("--distill_trainer=3", "distill_trainer: expected dict or null, not 3"),
        ("--distill_trainer.max_epochs=x", "distill_trainer.max_epochs: expected int or null, not x"),
        ("--trainer.precision=foo", "trainer.precision: expected int or one of "),
        ("--seed_everything=x", "seed_everything: expected bool or int, not x"),
        ("--seed_everything=-4", "seed_everything is -4: it must lie between 0 and 4294967295"),
        ("--config=/nowhere.yaml", "config: File does not exist: '/nowhere.yaml'"),
        # classes
        ("--extreme_region.objective=SAPOO", "extreme_region.objective: SAPOO is no class path"),
        (
            "--extreme_region.objective=erpd_lightning.Nope",
            "extreme_region.objective: class_path erpd_lightning.Nope: module 'erpd_lightning' has no attribute 'Nope'",
        ),
        (
            "--extreme_region.objective=erpd_lightning.TiltedTarget",
            "extreme_region.objective: expected a subclass of ExtremeObjective or null, "
            "not erpd_lightning.TiltedTarget",
        ),
        ("--trainer.logger=foo", "trainer.logger: foo is no class path"),
        (
            '--trainer.callbacks=[{"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": {"budget": 0.0}}]',
            "trainer.callbacks: KLBudget.budget is 0.0: it must be a positive, finite number of nats",
        ),
        (
            '--trainer.callbacks=[{"class_path": "erpd_lightning.callbacks.KLBudget", '
            '"init_args": {"budget": 0.1, "reference": "foo"}}]',
            "KLBudget.reference is 'foo': it is neither a folder, nor a hub name, nor among the module's references",
        ),
        ("--extreme_region.objective.tau=1", "extreme_region.objective: class_path "),
        ("--extreme_region.objective.tau_positive=-1", "extreme_region.objective: tau_positive is -1.0; it has to be"),
        ("--extreme_region.objective.tau_negative=0", "extreme_region.objective: tau_negative is 0.0; it has to be"),
        ("--distill.signal.terms=[]", "distill.signal: a signal needs at least one term"),
        (
            '--distill.signal.terms=[{"numerator": "foo"}]',
            "distill.signal: no policy is called foo; there are base, teacher, unlearned",
        ),
        ("--data.verifier.pattern=(", "data.verifier.pattern is '(', which is no regular expression: "),
        ('--distill.signal.terms=[{"weight": "x"}]', "distill.signal.terms.weight: expected float, not x"),
        (
            '--distill.signal.terms=[{"numerater": "a"}]',
            "distill.signal.terms: class_path erpd_lightning.Term: Option ",
        ),
        ("--data.sampler.max_new_tokens=x", "data.sampler.max_new_tokens: expected int, not x"),
        ("--data=/nowhere.yaml", "data: /nowhere.yaml is no configuration file"),
        ("--data.sampler.temperature=0", "data.sampler.temperature is 0.0: it must be above 0"),
        ("--task.operations=0", "task.operations is 0: it must lie between 1 and 8"),
        (
            '--distill_trainer.callbacks=[{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]',
            "distill_trainer.callbacks: class_path lightning.pytorch.callbacks.EarlyStopping: the following arguments "
            "are required: monitor",
        ),
        (
            '--unlearned_trainer.callbacks={"class_path": "EarlyStopping", "init_args": {"monitor": "a", "mode": "b"}}',
            "unlearned_trainer.callbacks: `mode` can be min, max",
        ),
        # values out of range
        ("--distill.kl_budget=0", "distill.kl_budget is 0.0: it must be a positive, finite number"),
        ("--distill.kl_budget=-0.05", "distill.kl_budget is -0.05: it must be"),
        ("--distill.kl_budget=.nan", "distill.kl_budget is nan: it must be"),
        ("--distill.kl_budget=.inf", "distill.kl_budget is inf: it must be"),
        ("--distill.kl_budget=nan", "distill.kl_budget: expected float or null, not nan"),
        ("--distill.beta=2", "distill.kl_budget is 0.01 and beta is 2.0: give one of them, and leave the other null"),
        ("--distill.kl_budget=null", "distill.kl_budget is None and beta is None: give one of them, and leave"),
        ("--distill.learning_rate=-1", "distill.learning_rate is -1.0: it must be a positive number"),
        ("--distill.betas=[0.9,1]", "distill.betas is (0.9, 1.0): both must be"),
        ("--extreme_region.weight_decay=-1", "extreme_region.weight_decay is -1.0"),
        ("--dtype=int8", "dtype is 'int8': it must be a floating-point type of torch such as bfloat16"),
        ("--extreme_region.dtype=bfloat16", "extreme_region.dtype is no option: the chain of stages sets it"),
        ("--dtype=bfloat16", f"dtype is 'bfloat16': {MIXED}"),
        ("--trainer.precision=bf16-true", f"trainer.precision is 'bf16-true': {MIXED}"),
        ("--distill_trainer.precision=16-true", f"distill_trainer.precision is '16-true': {MIXED}"),
        ("--distill.lr_scheduler=cosin", "distill.lr_scheduler is 'cosin'"),
        ("--distill.lr_scheduler=reduce_lr_on_plateau", "distill.lr_scheduler is 'reduce_lr_on_plateau', which goes"),
        ("--distill.lr_scheduler=cosine_with_min_lr", "distill.lr_scheduler is 'cosine_with_min_lr': "),
        ("--unlearned.kl_coef=-1", "unlearned.kl_coef is -1.0: it must be at least 0"),
        (
            "--extreme_region.kl_estimator=k1",
            "extreme_region.kl_estimator is 'k1': k1 is no loss for the reverse KL",
        ),
        (
            '--unlearned={"kl_direction": "forward", "kl_estimator": "k2"}',
            "unlearned.kl_estimator is 'k2': k2 is no loss for the forward KL: its gradient is that of no KL",
        ),
        ("--distill.iterations=0", "distill.iterations is 0: it must be at least 1"),
        ("--distill.iterations=3", "distill_trainer.max_epochs is 2: it must be a multiple of distill.iterations (3)"),
        (
            '--distill.objective={"class_path": "ClippedPolicyGradient", "init_args": {"truncate": 0}}',
            "distill.objective: truncate is 0.0; it has to be a positive number",
        ),
        (
            '--distill={"objective": {"class_path": "ClippedPolicyGradient", "init_args": {"kl_term": false}}, '
            '"kl_budget": null, "beta": 1}',
            "distill.objective.kl_term is false, and no KL budget brings the student back: it would collapse",
        ),
        ("--distill.total_budget=0", "distill.total_budget is 0.0: it must be a positive, finite number"),
        ("--distill.signal.terms=[]", "distill.signal: a signal needs at least one term whose weight is not zero"),
        ('--distill.signal.terms=[{"weight": 0}]', "distill.signal: a signal needs at least one term whose weight"),
        (
            '--distill.signal.terms=[{"denominator": "unlerned"}]',
            "distill.signal: no policy is called unlerned; there are base, teacher, unlearned",
        ),
        ('--teachers={"mild": {"kl_coef": 0.3}}', "teachers.mild is trained in vain: distill.signal does not use it"),
        ('--teachers={"mild": {"kl_cof": 0.3}}', "teachers.mild.kl_cof is no option: did you mean"),
        ('--teachers={"mild": {"trainer": {"max_epoch": 1}}}', "teachers.mild.trainer.max_epoch is no option: did you"),
        ('--teachers={"mild": {"sign": 3}}', "teachers.mild.sign is 3: it must be 1 or -1"),
        ('--teachers={"base": {}}', "teachers.base: a policy of its own needs a name of its own"),
        ("--distill.signal=auto", "distill.signal holds out 48 prompts for previews, but data.prompts_per_"),
        ("--last_stage=scoring", "last_stage is 'scoring': it must be distill or extreme_region"),
        ("--data.iterations=2", "data.iterations is above 1, but a student is distilled from fixed rollouts"),
        ("--data.group_size=0", "data.group_size is 0: it must be at least 1"),
        ("--data.calibration_prompts=-1", "data.calibration_prompts is -1: it must be at least 0"),
        ("--distill.pass_at_k=9", "distill.pass_at_k is 9, but data.validation_samples is only 2"),
        ("--task.hidden_size=20", "task.hidden_size is 20: it must be a multiple of 8"),
        ("--task.learning_rate=.nan", "task.learning_rate is nan: it must be a positive number"),
        ("--task.epochs=0", "task.layers, task.epochs and task.batch_size must be at least 1"),
        ("--data.group_size=1", "data.group_size is 1: extreme_region.objective compares the responses of a group"),
        (
            '--distill_trainer.callbacks=[{"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": '
            '{"budget": 0.1}}, {"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": {"budget": 0.2}}]',
            "distill_trainer.callbacks: KLBudget is there twice, and a checkpoint keeps one: take one out",
        ),
        ("--trainer.devices=0", "trainer: `Trainer(devices='0')` value is not a valid input"),
        ("--distill_trainer.devices=0", "distill_trainer: `Trainer(devices=0)` value is not a valid input"),
        ("--trainer.accelerator=foo", "trainer: You selected an invalid accelerator name"),
        # the base policy
        ("--task=null", "give either policy, the base policy to start from, or task"),
        ("--policy=some/model", "give either policy, the base policy to start from, or task"),
        ("--data.prompts=x.jsonl", "data.prompts is given, but task makes the prompts"),
        ("--run_dir=/proc/nope", "run_dir /proc/nope cannot be used: "),
        ("--run_dir=", "run_dir is empty: a directory"),
        ("--run_dir=  ", "run_dir is empty: a directory"),
        # what Lightning takes in silence
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
        ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val is nan: it must be at least 0"),
        ("--extreme_region_trainer.max_epochs=0", "extreme_region_trainer.max_epochs is 0: nothing would be trained"),
        ("--trainer.limit_test_batches=0", "trainer.limit_test_batches is 0: the stage evaluation would measure"),
        ("--trainer.max_steps=0", "trainer.max_steps is 0: nothing would be trained"),
        ("--distill_trainer.limit_train_batches=0", "distill_trainer.limit_train_batches is 0: nothing would be"),
        ("--trainer.limit_train_batches=0.0", "trainer.limit_train_batches is 0: nothing would be trained"),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch is 0: it must be above 0; limit_val"),
        ("--distill_trainer.val_check_interval=0", "distill_trainer.val_check_interval is 0: it must be above 0"),
        ("--distill_trainer.accumulate_grad_batches=0", "distill_trainer.accumulate_grad_batches is 0: it must be at"),
        ('--distill_trainer={"max_epochs": 2, "max_epochs": 3}', "max_epochs is given twice in the same place"),
    ],
)
def test_a_mistake_on_the_command_line(refused: Run, tmp_path: Path, given: str, expected: str) -> None:
    assert refused(*arguments(tmp_path / "run"), given).startswith(expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distil: {kl_budget: 0.1}", "distil.kl_budget is no option: did you mean distill.kl_budget?"),
        ("distill:\n  kl_budgte: 0.1", "distill.kl_budgte is no option: did you mean distill.kl_budget?"),
        ("distill_trainer:\n  max_epoch: 1", "distill_trainer.max_epoch is no option: did you mean"),
        ("distill: 3", "distill is 3: its options are expected there"),
        ("rounds: 1\ndata:", "data is None: its options are expected there"),
        ("data:\n  group_size: many", "data.group_size: expected int, not many"),
        (
            "data:\n  sampler:\n    class_path: erpd_lightning.data.samplers.TransformersSampler\n"
            "    init_args: {max_new_token: 8}",
            "data.sampler: class_path erpd_lightning.data.samplers.TransformersSampler: Option 'max_new_token' is not",
        ),
        ("trainer:\n  callbacks:\n  - class_path: erpd_lightning.callbacks.Nope", "trainer.callbacks: class_path erpd"),
        ("distill: [", "{file} cannot be read as options: line "),
        ("\tdistill: 3", "{file} cannot be read as options: "),
        ("- a\n- b", "{file} cannot be read as options: it holds a list, where keys and their values are expected"),
        ("rounds: 1\nseed_everything: 2\nrounds: 2", "{file}, line 3: rounds is given twice in the same place"),
        ("distill:\n  objective:\n  - a: 1\n    a: 2\n", "{file}, line 4: a is given twice in the same place"),
        (
            "distill: {kl_budget: 1}\ndistill.kl_budget: 2",
            "{file}, line 2: distill.kl_budget is given twice in the same",
        ),
        ("distill.objective.a: 1\ndistill: {objective: {b: 1, a: 2}}", "{file}, line 2: a is given twice in the same"),
        ("run_dir: ''", "run_dir is empty: a directory"),
        ("", "{file} cannot be read as options: it holds nothing, where keys and their values are expected"),
        ("rounds: é", "{file} cannot be read as options: 'utf-8' codec can't decode byte"),
    ],
)
def test_a_mistake_in_a_configuration_file(refused: Run, tmp_path: Path, text: str, expected: str) -> None:
    args = with_yaml(tmp_path, text)
    (tmp_path / "more.yaml").write_bytes(text.encode("latin-1"))
    message = refused(*args)
    assert message.startswith(expected.format(file=tmp_path / "more.yaml"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # The key is the one that was set: a stage's own, or that of the group that it shares.
        (["--extreme_region.pass_at_k=0"], "extreme_region.pass_at_k is 0: it must be at least 1"),
        (["--extreme_region.pass_at_k=9", '--teachers={"mild": {}}'], "extreme_region.pass_at_k is 9, but data."),
        (['--teachers={"mild": {"pass_at_k": 9}}'], "teachers.mild.pass_at_k is 9, but data.validation_samples"),
        (['--teachers={"mild": {"kl_coef": -1}}'], "teachers.mild.kl_coef is -1.0: it must be at least 0"),
        (['--teachers={"mild": {"kl_coef": "x"}}'], "teachers.mild.kl_coef: expected float, not x"),
        (['--teachers={"mild": {"trainer": 3}}'], "teachers.mild.trainer is 3: options of the trainer are expected"),
        (["--unlearned.learning_rate=0"], "unlearned.learning_rate is 0.0: it must be a positive number"),
        # Classes that are arguments of a class, alone and in a list.
        (["--data.sampler.batch_size=0"], "data.sampler.batch_size is 0: it must be at least 1"),
        (
            [
                '--trainer.callbacks={"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": '
                '{"budget": 0.1, "samples": 0}}'
            ],
            "trainer.callbacks.samples is 0: it must be at least 1",
        ),
        (
            [
                '--distill_trainer.callbacks=[{"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": '
                '{"budget": 0.1}}, {"class_path": "erpd_lightning.callbacks.KLBudget", "init_args": {"budget": 0.1, '
                '"sampler": {"class_path": "erpd_lightning.data.samplers.TransformersSampler", "init_args": '
                '{"temperature": 0}}}}]'
            ],
            "distill_trainer.callbacks: KLBudget.sampler.temperature is 0.0: it must be above 0",
        ),
        # An argument that only the class which was chosen has is not taken for an unknown key.
        (
            [
                "--extreme_region.objective=PPOClip",
                "--extreme_region.objective.dual_clip=9",
                "--rounds=x",
            ],
            "rounds: expected int, not x",
        ),
        (["--distill", '{"kl_budgte": 0.1}'], "distill.kl_budgte is no option: did you mean distill.kl_budget?"),
    ],
)
def test_a_mistake_is_told_under_the_key_that_was_given(
    refused: Run, tmp_path: Path, given: list[str], expected: str
) -> None:
    assert refused(*arguments(tmp_path / "run"), *given).startswith(expected)


@pytest.mark.parametrize("option", ["config", "data", "data.sampler"])
def test_a_file_that_holds_no_options(refused: Run, tmp_path: Path, option: str) -> None:
    (tmp_path / "more.yaml").write_bytes("rounds: é".encode("latin-1"))
    message = refused(*arguments(tmp_path / "run"), f"--{option}={tmp_path / 'more.yaml'}")
    assert message.startswith(f"{tmp_path / 'more.yaml'} cannot be read as options: 'utf-8' codec can't decode byte")


@pytest.mark.parametrize("args", [[], ["fits"], ["fit", "--config"]])
def test_a_command_that_is_none(refused: Run, args: list[str]) -> None:
    refused(*args)


def test_an_estimate_of_the_kl_from_the_policy_s_own_rollouts(refused: Run, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", last_stage="extreme_region", **{"data.iterations": 2})
    estimate = ["--extreme_region.kl_coef=0.1", "--extreme_region.kl_estimator=k2"]
    assert refused(*args, *estimate).startswith("extreme_region.kl_estimator is k2, which takes rollouts for those of")


def test_a_group_of_one_is_enough_for_cross_entropy(chain: Callable[..., Rounds], refused: Run, tmp_path: Path) -> None:
    args = [*arguments(tmp_path), "--data.group_size=1", "--extreme_region.objective=CrossEntropy"]
    assert chain(*args).builder.data(store="", tokenizer="").group_size == 1
    message = refused(*args, "--unlearned.objective=erpd_lightning.SAPO")
    assert message.startswith("data.group_size is 1: unlearned.objective compares")


@pytest.mark.parametrize("key", ["trainer", "distill_trainer"])
def test_a_strategy_that_is_not_supported(key: str, refused: Run, tmp_path: Path) -> None:
    message = refused(*arguments(tmp_path / "run"), f"--{key}.strategy=ddp_spawn")
    assert message.startswith(f"{key}.strategy is DDPStrategy with start_method spawn (ddp_spawn)")
    assert message.endswith("use ddp, or auto on one device")
