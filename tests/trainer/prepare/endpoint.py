"""A small server that speaks the chat-completions form, for tests without a network."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver

KEY = "sk-a-key-that-must-not-be-seen"


class Endpoint(ThreadingHTTPServer):
    """Answers with what `reply(request)` says: a text, or (status, body) for anything else.

    `requests` holds the bodies, `sent` the headers, in lower case.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[dict], object]) -> None:
        self.reply, self.requests, self.sent = reply, [], []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def completion(text: str, finish: str = "stop", usage: bool = True) -> dict:
    message = {"role": "assistant", "content": text}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    counted = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {**body, "usage": counted} if usage else body


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.sent.append({k.lower(): v for k, v in self.headers.items()})
        reply = self.server.reply(body)
        status, body = reply if isinstance(reply, tuple) else (200, completion(reply))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(reply: Callable[[dict], object], monkeypatch):
    """A running endpoint, and the environment that leads to it."""
    server = Endpoint(reply)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    forkserver._forkserver._stop()  # one that an earlier test began has the environment of then
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
