"""An OpenAI-compatible endpoint on the loopback that says what a test wants it to say."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-4711"
Reply = tuple[int, dict[str, str], str]


def said(text: str | None, tokens: int = 3) -> Reply:
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens},
    }
    return 200, {}, json.dumps(body)


def failed(status: int, **headers: str) -> Reply:
    message = f"no, {KEY}"
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps({"error": message})


class Endpoint:
    """Gives the replies in order, the last one again and again; remembers what it was asked.

    ``answers``, where it is set, gives the reply to a question instead.
    """

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[], Reply]] = []
        self.answers: Callable[[dict[str, Any]], Reply] | None = None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.asked.append(question)
                endpoint.headers.append(self.headers.get("authorization"))
                status, headers, text = endpoint.reply(question)
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that waits no longer has gone when its answer comes.
        self.server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def reply(self, question: dict[str, Any]) -> Reply:
        if self.answers is not None:
            return self.answers(question)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return reply() if callable(reply) else reply

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
