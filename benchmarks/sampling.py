"""Sampling throughput of `TransformersSampler`, and of a server, over a hand-written loop in the same run.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py                        # the demo's policy, random weights
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --shape smollm2        # a Llama of SmolLM2-135M's shape
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --policy FOLDER
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --policy FOLDER --protocol LlamaCpp --command "… {policy} {port}"

The loop is what one writes for one batch of prompts of one length: a forward pass with the library's cache, softmax,
`torch.multinomial`, the sampled token's log-prob, until all rows have ended. `generate` with `output_logits` is run as
well. They take turns; what is printed is the ratio of the medians over the turns, which a noisy machine leaves alone
where seconds are not. Tokens of responses are counted, not padding. With a server, the log-probs that it gives are
compared with the model's own on the same tokens.
"""

import argparse
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from erpd_lightning.data.arithmetic import Arithmetic
from erpd_lightning.data.samplers import Response, Sampler, ServerSampler, TransformersSampler, protocols
from erpd_lightning.models.loading import load_tokenizer
from erpd_lightning.models.policy import load_policy

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@torch.no_grad()
def by_hand(model: Any, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, end: int) -> int:
    """Tokens that a plain loop draws."""
    ids = torch.tensor([list(prompt) for prompt in prompts])
    count, cache, logps = 0, None, []
    # transformers 5.24 renamed it.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    alive = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(tokens):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
        cache = output.get(name)
        known = (output.logits[:, -1].float() / temperature).log_softmax(-1)
        ids = torch.multinomial(known.exp(), 1)
        logps.append(known.gather(1, ids))
        count += int(alive.sum())
        alive &= ids[:, 0] != end
        if not alive.any():
            break
    return count


@torch.no_grad()
def by_generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, end: int) -> int:
    """Tokens that `generate` draws, with what log-probs are made of."""
    ids = torch.tensor([list(prompt) for prompt in prompts])
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "max_new_tokens": tokens}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=end,
        pad_token_id=end,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    drawn = out.sequences[:, ids.shape[1] :]
    for logits, token in zip(out.logits, drawn.T, strict=True):
        (logits.float() / temperature).log_softmax(-1).gather(1, token[:, None])
    ended = drawn == end
    return int(((ended.cumsum(1) - ended.long()) == 0).sum())


def compare(model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Response], temperature: float) -> str:
    """How far a sampler's log-probs are from the model's own."""
    gaps = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response.ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        own = logits.log_softmax(-1).gather(1, torch.tensor(response.ids)[:, None])[:, 0]
        gaps.append(torch.tensor(response.logps) - own)
    gap = torch.cat(gaps)
    size = gap.abs().double()
    return (
        f"log-probs on {len(size)} tokens: difference {float(gap.mean()):+.2e} on average, its size "
        f"{float(size.mean()):.2e}, 99.9th percentile {float(size.quantile(0.999)):.2e}, worst {float(size.max()):.2e}"
    )


def turns(contestants: dict[str, Callable[[], int]], repeats: int) -> None:
    """Print tokens a second of each, and its ratio to the first."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            count = run()
            if repeat:  # The first turn warms up.
                rates[name].append(count / (time.perf_counter() - began))
    first = statistics.median(rates[next(iter(rates))])
    for name, each in rates.items():
        median = statistics.median(each)
        print(f"{name:22} {median:9.1f} tokens/s  {median / first:.3f} of the first", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="Hugging Face folder of a policy")
    parser.add_argument("--shape", choices=["demo", "smollm2"], default="demo", help="random weights instead")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--protocol", choices=["VLLM", "SGLang", "LlamaCpp"])
    parser.add_argument("--command", help="command that starts a server, with {policy} and {port}")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.policy:
        model, tokenizer = load_policy(args.policy).model.eval(), load_tokenizer(args.policy)
    elif args.shape == "demo":
        task = Arithmetic()
        model, tokenizer = task.initial_policy(0).eval(), task.tokenizer()
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model, tokenizer = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval(), Arithmetic().tokenizer()
    length = min(16, model.config.max_position_embeddings - args.tokens)
    prompts = torch.randint(3, min(len(tokenizer), 15), (args.batch, length)).tolist()
    end = tokenizer.eos_token_id
    drawn = 0

    def sampled(sampler: Sampler) -> int:
        nonlocal drawn
        drawn += 1
        responses = sampler.sample(model if sampler.needs_model else None, tokenizer, prompts, drawn)
        return sum(len(response.ids) for response in responses)

    inside = TransformersSampler(args.tokens, args.temperature, args.batch)
    contestants = {
        "hand-written loop": lambda: by_hand(model, prompts, args.tokens, args.temperature, end),
        "TransformersSampler": lambda: sampled(inside),
        "generate": lambda: by_generate(model, prompts, args.tokens, args.temperature, end),
    }
    if args.command is None:
        return turns(contestants, args.repeats)
    server = ServerSampler(
        getattr(protocols, args.protocol)(),
        command=args.command,
        max_new_tokens=args.tokens,
        temperature=args.temperature,
        max_requests=args.batch,
    )
    with tempfile.TemporaryDirectory() as folder, server.serving(args.policy, Path(folder)):
        turns({**contestants, "ServerSampler": lambda: sampled(server)}, args.repeats)
        print(compare(model, prompts, server.sample(None, tokenizer, prompts, 0), args.temperature))


if __name__ == "__main__":
    main()
