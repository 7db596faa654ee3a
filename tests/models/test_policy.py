"""`Policy` against the model's own full logits, in several architectures; loading, dropout, export."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import Qwen3ForCausalLM

from erpd_lightning import files
from erpd_lightning.data.batching import RolloutBatch, RolloutTable
from erpd_lightning.data.store import ROLLOUTS
from erpd_lightning.errors import UserError
from erpd_lightning.models.loading import context_length, hub_commit, load_tokenizer
from erpd_lightning.models.policy import Policy, align, export_policy, load_policy, policy_fingerprint
from erpd_lightning.objectives.tilted_policy import LOG_ZERO
from support.policies import (
    ARCHITECTURES,
    TASK,
    VOCABULARY_SIZE,
    build,
    make_model,
    make_rows,
    save_policy,
    token_logps,
)


def make_table(rows: list[dict[str, Any]]) -> RolloutTable:
    import pyarrow as pa

    return RolloutTable.from_arrow(pa.Table.from_pylist(rows, schema=ROLLOUTS))


def make_batch(rows: list[dict[str, Any]]) -> RolloutBatch:
    """All rows in one batch, which is padded on the right."""
    table = make_table(rows)
    return table.batch(
        torch.arange(len(rows)),
        torch.zeros(len(rows)),
        step_tokens=1,
        step_responses=1,
        last=True,
    )


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rows = make_rows(groups=3, group_size=2)
    assert len({len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows}) > 3
    return rows


@pytest.fixture(scope="module")
def batch(rows: list[dict[str, Any]]) -> RolloutBatch:
    return make_batch(rows)


def full_logps(model: Any, rows: list[dict[str, Any]]) -> list[Tensor]:
    return [token_logps(model, row["prompt_ids"], row["response_ids"]).detach() for row in rows]


def check(aligned: Tensor, expected: list[Tensor], mask: Tensor, tolerance: float = 1e-5) -> None:
    """Row by row against values for the response tokens alone; 0 elsewhere."""
    assert aligned.shape[:2] == mask.shape
    for row, wanted in enumerate(expected):
        torch.testing.assert_close(aligned[row, : len(wanted)], wanted, atol=tolerance, rtol=1e-4, check_dtype=False)
    assert not aligned[~mask].any()


# Questions


@pytest.mark.parametrize("name", ["qwen3", *ARCHITECTURES])
def test_log_probs_of_many_architectures(name: str, rows: list[dict[str, Any]], batch: RolloutBatch) -> None:
    model = make_model() if name == "qwen3" else build(name)
    full = full_logps(model, rows)
    spread = torch.cat(full).std(dim=-1).mean()
    assert spread > 0.02, "a uniform distribution would hide a wrong position"
    policy = Policy(model, max_logits=VOCABULARY_SIZE * 5)
    stats = policy.token_logps(batch)
    sampled = [
        logps.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0] for logps, row in zip(full, rows, strict=True)
    ]
    check(stats.logps.detach(), sampled, batch.mask)
    check(stats.entropy, [-(logps.exp() * logps).sum(-1) for logps in full], batch.mask)
    assert not stats.entropy.requires_grad


def test_support_and_tail(rows: list[dict[str, Any]], batch: RolloutBatch) -> None:
    model, other = make_model(), make_model(seed=1)
    policy = Policy(model)
    ids = policy.select_support(batch, mass=0.8, max_size=6)
    logps = Policy(other, max_logits=VOCABULARY_SIZE * 5).support_logps(batch, ids).detach()
    sizes = set()
    for row, own, others in zip(range(len(rows)), full_logps(model, rows), full_logps(other, rows), strict=True):
        for t, (distribution, wanted) in enumerate(zip(own, others, strict=True)):
            kept = ids[row, t][ids[row, t] >= 0].tolist()
            held = distribution.exp()[kept].sum()
            weakest = distribution[kept].min()
            assert len(set(kept)) == len(kept)
            assert (distribution > weakest).sum() == len(kept) - 1
            assert len(kept) == 6 or held >= 0.8
            assert len(kept) == 1 or held - weakest.exp() < 0.8
            rest = [v for v in range(VOCABULARY_SIZE) if v not in kept]
            expected = [*wanted[kept].tolist(), *[LOG_ZERO] * (ids.shape[-1] - len(kept))]
            expected.append(float(wanted[rest].logsumexp(0)))
            assert logps[row, t].tolist() == pytest.approx(expected, abs=1e-4)
            sizes.add(len(kept))
    assert len(sizes) > 2
    assert (ids[~batch.mask] == -1).all()


def test_divergence_and_its_gradient(rows: list[dict[str, Any]], batch: RolloutBatch) -> None:
    model, other = make_model(), make_model(seed=1)
    policy, reference = Policy(model, max_logits=VOCABULARY_SIZE * 5), Policy(other)
    pairs = list(zip(full_logps(model, rows), full_logps(other, rows), strict=True))
    found = policy.divergence(reference, batch)
    check(found.kl.detach(), [(p.exp() * (p - q)).sum(-1) for p, q in pairs], batch.mask)
    check(found.entropy, [-(p.exp() * p).sum(-1) for p, _ in pairs], batch.mask)
    reverse = torch.cat([(q.exp() * (q - p)).sum(-1) for p, q in pairs])
    assert (found.kl[batch.mask] - reverse).abs().max() > 0.1
    found.kl.sum().backward()
    assert all(parameter.grad is None for parameter in other.parameters())

    again = make_model()
    total = torch.zeros(())
    for row, (_, q) in zip(rows, pairs, strict=True):
        p = token_logps(again, row["prompt_ids"], row["response_ids"])
        total = total + (p.exp() * (p - q)).sum()
    total.backward()
    for mine, wanted in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, atol=1e-4, rtol=1e-3)


def test_hidden_states_are_shared_between_questions(batch: RolloutBatch) -> None:
    policy = Policy(make_model())
    hidden = policy.hidden(batch)
    assert hidden.shape == (int(batch.mask.sum()), 16)
    assert torch.equal(policy.token_logps(batch, hidden).logps, policy.token_logps(batch).logps)
    kl = policy.divergence(policy, batch, hidden).kl
    assert kl.abs().max() < 1e-6


def test_padding_and_dummies_change_nothing(rows: list[dict[str, Any]], batch: RolloutBatch) -> None:
    policy = Policy(make_model())
    together = policy.token_logps(batch).logps
    for number, row in enumerate(rows):
        alone = policy.token_logps(make_batch([row])).logps[0]
        torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-5, rtol=0)
    empty = make_batch(rows[:1])
    empty.mask = torch.zeros_like(empty.mask)
    logps = policy.token_logps(empty).logps
    assert not logps.any()
    logps.sum().backward()


def test_align() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    assert align(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert align(torch.ones(3, 4), mask).sum() == 12


# Loading


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropout_is_off_in_training(name: str, tmp_path: Path, batch: RolloutBatch) -> None:
    model = build(name, dropout=0.5)
    if "drop" in str(model.config):
        with torch.no_grad():
            loose = [model.train()(batch.input_ids).logits for _ in range(2)]
        assert not torch.equal(*loose), "there is no dropout to be turned off"
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path).train()
    assert policy.model.training
    with torch.no_grad():
        first, second = (policy.token_logps(batch).logps for _ in range(2))
        wanted = Policy(model.eval()).token_logps(batch).logps
    assert torch.equal(first, second)
    torch.testing.assert_close(first, wanted, atol=1e-6, rtol=0)


def test_the_data_type_of_the_weights(tmp_path: Path) -> None:
    make_model().bfloat16().save_pretrained(tmp_path)
    for name in ("float32", "bfloat16"):
        kinds = {parameter.dtype for parameter in load_policy(tmp_path, name).parameters()}
        assert kinds == {getattr(torch, name)}


def test_a_loaded_policy_can_be_trained(tmp_path: Path) -> None:
    policy = load_policy(save_policy(tmp_path / "policy"), max_logits=7)
    assert policy.max_logits == 7
    assert all(module.training for module in policy.modules())
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_weights(tmp_path: Path, content: bytes | None) -> None:
    path = save_policy(tmp_path / "policy")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=f"no policy can be loaded from {path}") as error:
        load_policy(path)
    assert len(str(error.value).splitlines()) == 1


# Export


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2"])
def test_an_export_is_bit_exact(name: str, tmp_path: Path, batch: RolloutBatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model() if name == "qwen3" else build(name)
    export_policy(model, TASK.tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(loaded(batch.input_ids).logits, model(batch.input_ids).logits)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer("1+2:").input_ids == TASK.tokenizer()("1+2:").input_ids
    assert list(tmp_path.glob("policy/*.bin")) == []


def test_weights_of_a_sharded_model_are_taken_from_elsewhere(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=1)
    export_policy(model, TASK.tokenizer(), tmp_path / "policy", state_dict=other.state_dict())
    loaded = load_policy(tmp_path / "policy").model.state_dict()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in loaded.items())


class Broken:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, path: Path) -> None:
        assert (path / "model.safetensors").is_file()
        raise OSError("disk full")


def test_an_interrupted_export_leaves_no_policy(tmp_path: Path) -> None:
    path: Path = tmp_path / "stage" / "policy"
    with pytest.raises(OSError, match="disk full"):
        export_policy(make_model(), Broken(), path)
    assert not path.exists()
    export_policy(make_model(), TASK.tokenizer(), path)
    fingerprint = policy_fingerprint(path)
    # Nor does one that was there already suffer.
    with pytest.raises(OSError, match="disk full"):
        export_policy(make_model(seed=1), Broken(), path)
    assert policy_fingerprint(path) == fingerprint
    export_policy(make_model(seed=1), TASK.tokenizer(), path)
    assert policy_fingerprint(path) == policy_fingerprint(save_policy(tmp_path / "other", seed=1))
    assert [child.name for child in path.parent.iterdir()] == ["policy"]


def test_a_fingerprint_is_that_of_weights_and_files(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy")
    fingerprint = policy_fingerprint(path)
    assert policy_fingerprint(str(path)) == fingerprint == policy_fingerprint(save_policy(tmp_path / "same"))
    model = make_model()
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert policy_fingerprint(save_policy(tmp_path / "near", model)) != fingerprint
    config = path / "generation_config.json"
    config.write_text(config.read_text() + " ")
    assert policy_fingerprint(path) != fingerprint


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_commit.cache_clear()
    yield tmp_path
    hub_commit.cache_clear()


def cache_policy(hub: Path, name: str, commit: str) -> None:
    """A policy as it lies in the hub's cache."""
    folder = hub / f"models--{name.replace('/', '--')}"
    save_policy(folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_a_fingerprint_of_a_hub_name_is_that_of_its_commit(hub: Path) -> None:
    found = []
    for commit in ("a" * 40, "b" * 40):
        cache_policy(hub, "org/name", commit)
        hub_commit.cache_clear()  # Another process.
        found.append(policy_fingerprint("org/name"))
    assert found == [f"hub:org/name@{commit}" for commit in ("a" * 40, "b" * 40)]


def test_a_hub_name_of_nothing_has_no_fingerprint(hub: Path) -> None:
    with pytest.raises(UserError, match="no policy can be loaded from org/nothing: "):
        policy_fingerprint("org/nothing")


@pytest.mark.parametrize("ask", [load_policy, context_length])
def test_an_adapter_is_refused(ask: Callable[[Path], Any], tmp_path: Path) -> None:
    """Its folder says nothing of the base policy's weights, which count as much, and transformers would load both."""
    path = save_policy(tmp_path / "policy")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match=f"policy {path} is an adapter of PEFT, which is not supported: merge it into"):
        ask(path)


def test_an_adapter_of_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` loads it with its base policy, and says so in an attribute."""
    path = save_policy(tmp_path / "policy")
    monkeypatch.setattr(Qwen3ForCausalLM, "_hf_peft_config_loaded", True)
    with pytest.raises(UserError, match=f"policy {path} is an adapter of PEFT"):
        load_policy(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "q4.gguf", "weights.pt"])
def test_a_fingerprint_covers_weights_of_any_format(tmp_path: Path, name: str) -> None:
    path = save_policy(tmp_path / "policy")
    (path / name).write_bytes(b"one")
    fingerprint = policy_fingerprint(path)
    (path / name).write_bytes(b"two")
    assert policy_fingerprint(path) != fingerprint
    (path / name).write_bytes(b"one")
    assert policy_fingerprint(path) == fingerprint


def test_a_fingerprint_leaves_documents_out(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy")
    fingerprint = policy_fingerprint(path)
    for name in ("README.md", ".gitattributes"):
        (path / name).write_text("told")
    (path / "checkpoint-1").mkdir()
    assert policy_fingerprint(path) == fingerprint


def test_a_file_is_read_once_while_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def noted(file: Path, mode: str) -> Any:
        read.append(Path(file))
        return open(file, mode)

    monkeypatch.setattr(files, "open", noted, raising=False)
    path = save_policy(tmp_path / "policy")
    weights = path / "model.safetensors"
    hour = time.time() - 3600
    for file in path.iterdir():
        os.utime(file, (hour, hour))
    monkeypatch.setattr(files, "RECENT", -1)  # The time of the change of time is now.
    fingerprint = policy_fingerprint(path)
    once = len(read)
    assert policy_fingerprint(path) == fingerprint
    assert len(read) == once > 1
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert policy_fingerprint(path) != fingerprint
    assert read[once:] == [weights]


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "policy")
    weights = path / "model.safetensors"
    state, fingerprint = weights.stat(), policy_fingerprint(path)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert policy_fingerprint(path) != fingerprint


def tokenizer_files(path: Path) -> dict[str, bytes]:
    names = ("tokenizer*", "chat_template*", "special_tokens_map.json", "additional_chat_templates/*")
    return {str(f.relative_to(path)): f.read_bytes() for pattern in names for f in path.glob(pattern)}


@pytest.mark.parametrize("given", ["path", "text", "tokenizer"])
def test_the_tokenizer_is_exported_as_it_lay(tmp_path: Path, given: str) -> None:
    from transformers import AutoTokenizer

    base = save_policy(tmp_path / "base")
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps({**config, "padding_side": "right"}))  # not as `save_pretrained` indents it
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "special_tokens_map.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    tokenizer: Any = {"path": base, "text": str(base), "tokenizer": load_tokenizer(base)}[given]
    student = tmp_path / "student"
    export_policy(make_model(seed=1), tokenizer, student)
    assert tokenizer_files(student) == tokenizer_files(base)
    assert len(tokenizer_files(base)) >= 5
    loaded = AutoTokenizer.from_pretrained(student)
    assert (loaded.pad_token, loaded.padding_side) == (None, "right")
    assert policy_fingerprint(student) != policy_fingerprint(base)
    again = tmp_path / "again"
    export_policy(make_model(seed=1), student, again)
    assert policy_fingerprint(again) == policy_fingerprint(student)


def test_a_tokenizer_that_lies_nowhere_is_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        export_policy(make_model(), str(tmp_path / "none"), tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    export_policy(make_model(), TASK.tokenizer(), tmp_path / "policy")
    assert load_tokenizer(tmp_path / "policy").get_vocab() == TASK.tokenizer().get_vocab()
