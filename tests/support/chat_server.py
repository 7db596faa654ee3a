"""A chat server as OpenAI's, on this machine, that does what the message tells it to."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "judge"


class ChatServer(ThreadingHTTPServer):
    """Replies to what stands in `<response>` of a message.

    `right` and `wrong` get a verdict. Everything else gets it from the third time on, if it says `at last`, and before
    that, or for ever: `status N`, `hang`, `no json`, `no choices`, `no verdict` or `break off`.

    Attributes:
        asked: How often each response was asked about.
        requests: The bodies of all requests.
        keys: The `Authorization` of all requests.
        most: The most requests that were in flight at a time.
    """

    daemon_threads = True

    def __init__(self, port: int = 0, models: bool = True) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.models = models
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.server.models:
            self.reply({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        self.in_flight = True
        try:
            self.answer(body["messages"][-1]["content"])
        finally:
            self.leave()

    def leave(self) -> None:
        """The request is in flight no more: before its reply is out, after which the next one may come at once."""
        with self.server.lock:
            self.server.now -= self.in_flight
            self.in_flight = False

    def answer(self, message: str) -> None:
        what = message.split("<response>\n")[1].split("\n</response>")[0]
        with self.server.lock:
            self.server.asked[what] += 1
            count = self.server.asked[what]
        time.sleep(0.02)
        if what in ("right", "wrong") or ("at last" in what and count >= 3):
            verdict = "incorrect" if what == "wrong" else "correct"
            return self.reply({"choices": [{"message": {"content": f"<think>…</think> So:\n**Verdict: {verdict}**"}}]})
        if what.startswith("status"):
            return self.send_error(int(what.split()[1]), "as told")
        if what.startswith("hang"):
            self.server.ended.wait(60)
        elif what.startswith("no json"):
            self.reply("{", raw=True)
        elif what.startswith("no choices"):
            self.reply({"choices": []})
        elif what.startswith("no verdict"):
            self.reply({"choices": [{"message": {"content": "Verdict: correct or incorrect, who knows"}}]})
        elif what.startswith("score"):
            self.reply({"choices": [{"message": {"content": f"Score: {what.split()[1]}"}}]})
        return None  # Broken off.

    def reply(self, value: Any, raw: bool = False) -> None:
        data = (value if raw else json.dumps(value)).encode()
        if self.command == "POST":
            self.leave()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def chat_server(**settings: Any) -> Iterator[ChatServer]:
    """A server that runs for a while."""
    server = ChatServer(**settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
