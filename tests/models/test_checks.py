"""What a policy is asked at loading: weights all there and finite, log-probs that are the model's own, tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from erpd_lightning.data.prompt_batches import PromptBatcher
from erpd_lightning.data.prompts import Prompt, PromptSet
from erpd_lightning.data.samplers import TransformersSampler
from erpd_lightning.data.verifiers import ExactMatch
from erpd_lightning.errors import UserError
from erpd_lightning.models import checks
from erpd_lightning.models.checks import check_policy
from erpd_lightning.models.head import Head
from erpd_lightning.models.loading import check_tokenizer, load_tokenizer
from erpd_lightning.models.policy import Policy, export_policy, load_policy, load_reference
from erpd_lightning.modules.policy_module import PolicyModule
from support.policies import ARCHITECTURES, SMALL, TASK, TOKENS, build, make_model, save_policy, sharpen

RECURRENT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, **TOKENS}
BERT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    **TOKENS,
}
SCALED: dict[str, Callable[[], Any]] = {
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SMALL,
        lm_head_multiplier=0.3,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "hyperclovax": lambda: transformers.HyperCLOVAXConfig(**SMALL, logits_scaling=0.25),
    "mpt": lambda: transformers.MptConfig(d_model=16, n_heads=4, n_layers=2, max_seq_len=32, logit_scale=0.3, **TOKENS),
    "nanochat": lambda: transformers.NanoChatConfig(**SMALL, final_logit_softcapping=1.5),
    "mamba": lambda: transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **TOKENS),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "rwkv": (lambda: transformers.RwkvConfig(**RECURRENT), "RwkvForCausalLM decodes otherwise with a cache"),
    "xlnet": (
        lambda: transformers.XLNetConfig(d_model=16, n_layer=2, n_head=4, d_inner=24, **TOKENS),
        "XLNetLMHeadModel is no causal language model",
    ),
    "recurrent_gemma": (
        lambda: transformers.RecurrentGemmaConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            lru_width=16,
            attention_window_size=32,
            intermediate_size=24,
            logits_soft_cap=1.5,
            **TOKENS,
        ),
        "RecurrentGemmaForCausalLM takes left padding for tokens",
    ),
    "bert, an encoder": (lambda: transformers.BertConfig(**BERT), "BertLMHeadModel is no causal language model"),
    "bert, a decoder": (
        lambda: transformers.BertConfig(**BERT, is_decoder=True),
        "BertLMHeadModel does more to its logits than is known here",
    ),
    "roberta": (
        lambda: transformers.RobertaConfig(**{**BERT, "max_position_embeddings": 40}, is_decoder=True),
        "RobertaForCausalLM",
    ),
}


@pytest.fixture(autouse=True)
def _nothing_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_checked", set())


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return sharpen(transformers.AutoModelForCausalLM.from_config(config), 4.0)


def off(model: Any) -> float:
    """Nats by which log-probs read off the hidden states differ from the model's own."""
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        read = Head.of(model).logps(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    return float((own - read).abs().max())


# The head


@pytest.mark.parametrize("name", SCALED)
def test_the_head_knows_what_a_configuration_does_to_the_logits(name: str) -> None:
    model = make(SCALED[name]())
    assert off(model) < 1e-4
    check_policy(Policy(model), name)


def test_a_soft_cap_of_recurrent_gemma() -> None:
    assert off(make(REFUSED["recurrent_gemma"][0]())) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_architectures_are_in_order(name: str, dtype: torch.dtype) -> None:
    policy = Policy(build(name).to(dtype)).train()
    shipped = policy.model.generation_config
    check_policy(policy, name)
    assert policy.model.training
    assert policy.model.generation_config is shipped


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_causal_language_model_is_refused(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    make(config()).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_policy(tmp_path)
    assert str(error.value).startswith(f"policy {tmp_path}: {reason}")
    assert "nats" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


class Scaled(nn.Linear):
    """An output layer whose logits are not those of its weight."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_not_understood_is_refused(dtype: torch.dtype) -> None:
    model = make_model()
    layer = Scaled(16, len(model.lm_head.weight), bias=False)
    layer.weight = model.lm_head.weight
    model.lm_head = layer
    with pytest.raises(
        UserError, match=r"policy mine: Qwen3ForCausalLM does more to its logits .* (4|3\.\d) nats, more"
    ):
        check_policy(Policy(model.to(dtype)), "mine")


def test_fewer_logits_than_rows_are_refused() -> None:
    model = make_model()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden)[..., :-2]
    with pytest.raises(UserError, match="its head has 19 rows, but there are 17 logits"):
        check_policy(Policy(model), "mine")


def test_a_configuration_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    disagreement = checks._disagreement

    def noted(policy: Any) -> Any:
        asked.append(policy)
        return disagreement(policy)

    monkeypatch.setattr(checks, "_disagreement", noted)
    for seed in range(2):
        check_policy(Policy(make_model(seed)), "one")
    assert len(asked) == 1
    check_policy(Policy(make_model().double()), "other weights")
    check_policy(Policy(build("llama")), "another model")
    assert len(asked) == 3


def test_a_check_draws_nothing() -> None:
    state = torch.get_rng_state()
    check_policy(Policy(make_model()), "mine")
    assert torch.equal(torch.get_rng_state(), state)


# Weights


def altered(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A policy whose weights are changed in their file."""
    file = save_policy(path) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return path


QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = altered(tmp_path / "one", lambda weights: weights.pop(QUERY))
    with pytest.raises(UserError, match=f"policy {path}: the checkpoint has no {QUERY}, which Qwen3ForCausalLM needs"):
        load_policy(path)

    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "mlp" in name]:
            del weights[name]

    path = altered(tmp_path / "several", drop)
    with pytest.raises(UserError, match=r"has no model\.layers\.0\.mlp\.down_proj\.weight \(and 2 more\)"):
        load_reference(path, Policy(make_model()), "base")


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    path = save_policy(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    assert load_policy(path).model.config.tie_word_embeddings
    config = path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(UserError, match=r"has no lm_head\.weight"):
        load_policy(path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    path = altered(tmp_path / "policy", lambda weights: weights.update({QUERY: torch.zeros(3, 5)}))
    with pytest.raises(UserError, match=rf"policy {path}: {QUERY} has the shape \(3, 5\) .* asks for \(16, 16\)$"):
        load_policy(path)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.up_proj.weight_scale_inv"]
)
def test_a_tensor_that_the_model_has_no_place_for_is_named(name: str, tmp_path: Path) -> None:
    """Biases that the configuration forgot, or the scale of quantised weights: without them it is another policy."""
    path = altered(tmp_path / "policy", lambda weights: weights.update({name: torch.ones(16)}))
    with pytest.raises(UserError, match=f"policy {path}: the checkpoint has {name}, for which Qwen3ForCausalLM has no"):
        load_policy(path)


@pytest.mark.parametrize("name", ["score.weight", "mtp.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.mask"])
def test_a_tensor_of_another_task_is_left_out(name: str, tmp_path: Path) -> None:
    load_policy(altered(tmp_path / "policy", lambda weights: weights.update({name: torch.ones(16)})))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_that_is_not_finite_is_named(value: float, dtype: str, tmp_path: Path) -> None:
    path = altered(tmp_path / "policy", lambda weights: weights[QUERY][3, 4:5].fill_(value))
    with pytest.raises(UserError, match=f"^policy {path}: {QUERY} has values that are NaN or infinite$"):
        load_policy(path, dtype)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sharpen(transformers.BertModel(transformers.BertConfig(**BERT))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the checkpoint has no cls"):
        load_policy(tmp_path)


# Tokenizer


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_policy(tmp_path / "policy"))
    model = make_model()
    check_tokenizer(tokenizer, model)
    tokenizer.add_tokens(["one", "more"])
    with pytest.raises(UserError) as error:
        check_tokenizer(tokenizer, model)
    assert str(error.value) == (
        f"tokenizer {tmp_path / 'policy'} has the token 'more' of id 20, but Qwen3ForCausalLM has an embedding of 19 "
        "rows: they do not belong together"
    )
    model.resize_token_embeddings(21)
    check_tokenizer(tokenizer, model)


def test_a_tokenizer_is_checked_where_it_meets_the_policy(tmp_path: Path) -> None:
    tokenizer = TASK.tokenizer()
    tokenizer.add_tokens(["one"])
    export_policy(make_model(), tokenizer, tmp_path / "policy")
    module = PolicyModule(tmp_path / "policy")
    module.configure_model()
    batcher = PromptBatcher(
        load_tokenizer(tmp_path / "policy"), TransformersSampler(max_new_tokens=2), ExactMatch(), 64, None, 0
    )
    prompts = PromptSet([Prompt("1+1", "2")], lambda prompt: [3, 4])
    with pytest.raises(UserError, match="has the token 'one' of id 19, but Qwen3ForCausalLM has an embedding of 19"):
        module.respond(next(iter(batcher.batches(prompts, 1, "test"))))
