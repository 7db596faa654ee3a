"""Small inference server of the tests' own: a bigram model over HTTP, in the protocols that `ServerSampler` speaks.

It fails where a test says so. Started as a program, `inference_server.py PROTOCOL PORT POLICY [FAULT…]`, it starts a
child of its own, as real servers do, and notes both processes beside the policy.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY_SIZE = 19
EOS = 2
HALF_A_CHARACTER = 9
"""Token after which a text ends within a character: llama.cpp gives no log-prob of it."""

LOGITS = np.random.default_rng(0).normal(size=(VOCABULARY_SIZE, VOCABULARY_SIZE)) * 2

Fault = Callable[[int, dict[str, Any]], str | None]
"""What goes wrong with a request, from its number and its body: one of the names in `Handler`, or None."""


def logps(last: int, temperature: float) -> np.ndarray:
    """Log-probs `(V,)` after a token."""
    scaled = LOGITS[last] / temperature
    return scaled - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()


def draw(prompt: list[int], length: int, temperature: float, seed: int) -> list[int]:
    """A response."""
    generator, ids = np.random.default_rng(seed), [*prompt]
    for _ in range(length):
        ids.append(int(generator.choice(VOCABULARY_SIZE, p=np.exp(logps(ids[-1], temperature)))))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


class Spoken:
    """A protocol: what a request asks for, and what is answered."""

    path: str

    def asked(self, body: dict[str, Any]) -> tuple[list[int], int, float, int, int]:
        """Prompt, longest response, temperature, seed, and how many tokens are listed."""
        raise NotImplementedError

    def answer(self, ids: list[int], values: list[float], top: list[dict[int, float]], reason: str) -> dict[str, Any]:
        """The answer."""
        raise NotImplementedError

    def spoil(self, fault: str, answer: dict[str, Any]) -> Any:
        """The answer with a fault."""
        raise NotImplementedError


class VLLM(Spoken):
    """As read in vLLM's documentation."""

    path = "/v1/completions"

    def asked(self, body: dict[str, Any]) -> tuple[list[int], int, float, int, int]:
        assert body["top_p"] == 1
        assert body["top_k"] in (0, -1)
        assert body["repetition_penalty"] == 1
        assert body["return_token_ids"] is True
        return body["prompt"], body["max_tokens"], body["temperature"], body["seed"], body["logprobs"]

    def answer(self, ids: list[int], values: list[float], top: list[dict[int, float]], reason: str) -> dict[str, Any]:
        listed = [{f"token_id:{token}": logp for token, logp in each.items()} for each in top]
        logprobs = {"token_logprobs": values, "tokens": [f"token_id:{i}" for i in ids], "top_logprobs": listed}
        choice = {"index": 0, "text": "…", "token_ids": ids, "logprobs": logprobs, "finish_reason": reason}
        return {"object": "text_completion", "choices": [choice]}

    def spoil(self, fault: str, answer: dict[str, Any]) -> Any:
        choice = answer["choices"][0]
        if fault == "no choices":
            answer["choices"] = []
        elif fault == "no logps":
            choice["logprobs"] = None
        elif fault == "text":
            del choice["token_ids"]
        elif fault == "outside":
            choice["token_ids"][-1] = VOCABULARY_SIZE + 5
        return answer


class SGLang(Spoken):
    """As read in SGLang's documentation."""

    path = "/generate"

    def asked(self, body: dict[str, Any]) -> tuple[list[int], int, float, int, int]:
        said = body["sampling_params"]
        assert said["top_p"] == 1
        assert said["top_k"] == -1
        assert body["return_logprob"] is True
        return (
            body["input_ids"],
            said["max_new_tokens"],
            said["temperature"],
            said["sampling_seed"],
            body["top_logprobs_num"],
        )

    def answer(self, ids: list[int], values: list[float], top: list[dict[int, float]], reason: str) -> dict[str, Any]:
        return {
            "text": "…",
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": reason},
                "completion_tokens": len(ids),
                "output_token_logprobs": [[logp, token, None] for logp, token in zip(values, ids, strict=True)],
                "output_top_logprobs": [[[logp, token, None] for token, logp in each.items()] for each in top],
            },
        }

    def spoil(self, fault: str, answer: dict[str, Any]) -> Any:
        pairs = answer["meta_info"]["output_token_logprobs"]
        if fault == "no choices":
            return []
        if fault == "no logps":
            del answer["meta_info"]["output_token_logprobs"]
        elif fault == "text":
            answer["meta_info"]["output_token_logprobs"] = [[logp, "text", None] for logp, _, _ in pairs]
        elif fault == "outside":
            pairs[-1][1] = answer["output_ids"][-1] = VOCABULARY_SIZE + 5
        return answer


class LlamaCpp(Spoken):
    """As read off a real `llama-server`."""

    path = "/completion"

    def asked(self, body: dict[str, Any]) -> tuple[list[int], int, float, int, int]:
        assert body["samplers"] == ["temperature"]
        self._post = body["post_sampling_probs"]
        return body["prompt"], body["n_predict"], body["temperature"], body["seed"], body["n_probs"]

    def answer(self, ids: list[int], values: list[float], top: list[dict[int, float]], reason: str) -> dict[str, Any]:
        def named(token: int, logp: float) -> dict[str, Any]:
            value = {"prob": float(np.exp(logp))} if self._post else {"logprob": logp}
            return {"id": token, "token": "…", **value}

        key = "top_probs" if self._post else "top_logprobs"
        listed = [
            {**named(token, logp), key: [named(*pair) for pair in each.items()]}
            for token, logp, each in zip(ids, values, top, strict=True)
        ]
        listed = [each for each in listed if each["id"] != HALF_A_CHARACTER]
        stop = {"stop": "eos", "length": "limit"}[reason]
        return {"tokens": ids, "completion_probabilities": listed, "stop_type": stop, "truncated": False}

    def spoil(self, fault: str, answer: dict[str, Any]) -> Any:
        if fault == "no choices":
            return []
        if fault == "no logps":
            del answer["completion_probabilities"]
        elif fault == "text":
            answer["tokens"] = ["text" for _ in answer["tokens"]]
        elif fault == "outside":
            token = VOCABULARY_SIZE + 5
            answer |= {"tokens": [token], "completion_probabilities": [{"id": token, "logprob": -1.0}]}
        return answer


SPOKEN: dict[str, type[Spoken]] = {"VLLM": VLLM, "SGLang": SGLang, "LlamaCpp": LlamaCpp}


class InferenceServer:
    """Server in threads of this process.

    Args:
        protocol: What it speaks.
        policy: What it says that it serves.
        fault: What goes wrong with which request.
        port: Where it listens; 0 for any free port.
    """

    def __init__(
        self, protocol: str, policy: Any = "policy", fault: Fault = lambda number, body: None, port: int = 0
    ) -> None:
        self.spoken = SPOKEN[protocol]()
        self.policy = str(policy)
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []
        self.busiest = 0
        self._busy = 0
        self._lock = threading.Lock()
        self._http = _Listener(("127.0.0.1", port), type("Own", (Handler,), {"owner": self}))
        self._http.daemon_threads = True
        self.port: int = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=[0.02], daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def get(self, path: str) -> Any:
        return {
            "/health": {"status": "ok"},
            "/v1/models": {"data": [{"id": "name", "root": self.policy}]},
            "/get_model_info": {"model_path": self.policy},
            "/props": {"model_path": self.policy},
        }.get(path)

    def post(self, body: dict[str, Any]) -> tuple[Any, str | None]:
        """What is answered, and a fault that is not in the answer."""
        with self._lock:
            self.bodies.append(body)
            number = len(self.bodies)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        fault = self.fault(number, body)
        prompt, length, temperature, seed, count = self.spoken.asked(body)
        ids = draw(prompt, length, temperature, seed)
        if "logit_bias" in body:
            ids = [body["logit_bias"][0][0]]
        told = 1.0 if fault == "raw" else temperature
        values, top = [], []
        for last, token in zip([prompt[-1], *ids], ids, strict=False):
            known = logps(last, told)
            values.append(float(known[token]))
            listed = np.argsort(-known)[: 3 if fault == "nucleus" else count]
            top.append({int(i): float(known[i]) for i in listed})
        if fault == "slow":
            time.sleep(0.05)
        answer = self.spoken.answer(ids, values, top, "stop" if ids[-1] == EOS else "length")
        with self._lock:
            self._busy -= 1
        return self.spoken.spoil(fault, answer) if fault else answer, fault


class _Listener(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Nothing: that clients give up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    """Faults: 500, hang, die, hang up, not json, raw, nucleus, slow, no choices, no logps, text, outside."""

    owner: InferenceServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = self.owner.get(self.path)
        self._send(404 if found is None else 200, json.dumps(found).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != self.owner.spoken.path:
            return self._send(404, b"{}")
        answer, fault = self.owner.post(body)
        if fault == "die":
            os._exit(1)
        if fault == "hang":
            time.sleep(30)
        if fault == "hang up":
            self.close_connection = True
            return None
        if fault == "500":
            return self._send(500, b'{"error": {"message": "out of memory"}}')
        return self._send(200, b"<html>" if fault == "not json" else json.dumps(answer).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def processes_file(policy: str | Path) -> Path:
    """Where a server that was started as a program notes its processes, one in a line."""
    return Path(policy).parent / "server-processes"


def main(protocol: str, port: str, policy: str, *faults: str) -> None:
    """Serve until killed."""
    if "broken" in faults:
        sys.exit("error: no such device")
    if "stubborn" in faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    noted = processes_file(policy)
    with noted.open("a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    starts = len(noted.read_text().splitlines())

    def fault(number: int, body: dict[str, Any]) -> str | None:
        if "slow" in faults:
            time.sleep(0.2)
        # The first two that are started die on their way.
        return "die" if "dies" in faults and starts <= 2 and number == 5 else None

    print(f"serving {policy}", flush=True)
    InferenceServer(protocol, policy, fault, int(port))
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
