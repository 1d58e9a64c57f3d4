"""An endpoint on the loopback that is slow, busy, wrong or away: answers come in the end, or a clear error, and every
answer is kept."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evaluation.endpoint_judge import ANSWERS, EndpointJudge

KEY = "sk-secret-4711"
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
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
    """Gives the replies in order, the last one again and again; remembers what it was asked."""

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[], Reply]] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                endpoint.asked.append(json.loads(body))
                endpoint.headers.append(self.headers.get("authorization"))
                reply = endpoint.replies.pop(0) if len(endpoint.replies) > 1 else endpoint.replies[0]
                status, headers, text = reply() if callable(reply) else reply
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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def judge(endpoint: Endpoint, waits: list[float], tmp_path: Path) -> EndpointJudge:
    return EndpointJudge("m", tmp_path, base_url=endpoint.url, key_variable="JUDGE_KEY", wait=waits.append)


def test_answers_and_counts(endpoint: Endpoint, judge: EndpointJudge) -> None:
    endpoint.replies = [said(" a cat ")]
    assert judge.answer(QUESTION, 30) == "a cat"
    assert endpoint.asked == [{"model": "m", "max_tokens": 30, "messages": QUESTION, "n": 1, "stream": False}]
    assert endpoint.headers == [f"Bearer {KEY}"]
    assert (judge.usage.requests, judge.usage.prompt_tokens, judge.usage.completion_tokens) == (1, 10, 3)
    assert judge.usage.cost(2.0, 8.0) == pytest.approx((10 * 2 + 3 * 8) / 1e6)


def test_the_same_question_is_asked_once_ever(endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path) -> None:
    endpoint.replies = [said("a cat"), said("a dog")]
    assert judge.answer(QUESTION, 30) == judge.answer(QUESTION, 30) == "a cat"
    again = EndpointJudge("m", tmp_path, base_url=endpoint.url, key_variable="JUDGE_KEY")
    assert again.answer(QUESTION, 30) == "a cat"
    assert len(endpoint.asked) == 1
    assert (again.usage.requests, again.usage.reused) == (0, 1)
    assert again.answer(QUESTION, 31) == "a dog", "another question"


def test_a_line_that_was_cut_off(endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path) -> None:
    endpoint.replies = [said("a cat")]
    judge.answer(QUESTION, 30)
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"key": "abc", "ans')
    again = EndpointJudge("m", tmp_path, base_url=endpoint.url, key_variable="JUDGE_KEY")
    assert again.answer(QUESTION, 30) == "a cat"
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_or_broken_for_a_while(status: int, endpoint: Endpoint, judge: EndpointJudge, waits: list[float]) -> None:
    endpoint.replies = [failed(status), failed(status), said("a cat")]
    assert judge.answer(QUESTION, 30) == "a cat"
    assert waits == [1, 2]
    assert judge.usage.retries == 2


def test_waits_as_long_as_it_is_told(endpoint: Endpoint, judge: EndpointJudge, waits: list[float]) -> None:
    endpoint.replies = [failed(429, retry_after="7"), failed(429, retry_after="9000"), said("a cat")]
    judge.answer(QUESTION, 30)
    assert waits == [7, 60]


@pytest.mark.parametrize("wrong", [None, "", "I think 3 and 5, maybe"])
def test_wrong_answers_are_asked_again(wrong: str | None, endpoint: Endpoint, judge: EndpointJudge) -> None:
    endpoint.replies = [said(wrong), said("3, 5")]
    assert judge.answer(QUESTION, 30, accepts=lambda text: text[0].isdigit()) == "3, 5"
    assert judge.usage.requests == 2


def test_wrong_to_the_end(endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path) -> None:
    endpoint.replies = [said("no idea")]
    with pytest.raises(EvaluationError, match=r"(?s)6 tries.*no idea.*kept"):
        judge.answer(QUESTION, 30, accepts=str.isdigit)
    assert not (tmp_path / ANSWERS).exists()


def test_slow(endpoint: Endpoint, waits: list[float], tmp_path: Path) -> None:
    release = threading.Event()

    def late() -> Reply:
        release.wait(5)
        return said("too late")

    endpoint.replies = [late, said("a cat")]
    judge = EndpointJudge(
        "m", tmp_path, base_url=endpoint.url, key_variable="JUDGE_KEY", timeout_s=0.3, wait=waits.append
    )
    assert judge.answer(QUESTION, 30) == "a cat"
    release.set()
    assert waits == [1]


def test_nobody_there(waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    gone = Endpoint()
    gone.server.shutdown()
    gone.server.server_close()
    judge = EndpointJudge("m", tmp_path, base_url=gone.url, key_variable="JUDGE_KEY", tries=3, wait=waits.append)
    with pytest.raises(EvaluationError, match=r"(?s)3 tries.*Connection.*run again"):
        judge.answer(QUESTION, 30)
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_no_use_asking_again(
    status: int, endpoint: Endpoint, judge: EndpointJudge, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.replies = [failed(status)]
    with caplog.at_level(logging.DEBUG, "ksvd_sae"), pytest.raises(EvaluationError) as caught:
        judge.answer(QUESTION, 30)
    assert len(endpoint.asked) == 1
    assert waits == []
    assert KEY not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None, "a traceback would show the key"


def test_key_is_nowhere(
    endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.replies = [failed(429), said("a cat")]
    with caplog.at_level(logging.DEBUG, "ksvd_sae"):
        judge.answer(QUESTION, 30)
    assert KEY not in caplog.text
    assert KEY not in (tmp_path / ANSWERS).read_text()
    assert KEY not in repr(vars(judge))


def test_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(EvaluationError, match=r"(?s)JUDGE_KEY is not set.*lexical"):
        EndpointJudge("m", tmp_path, key_variable="JUDGE_KEY").answer(QUESTION, 30)


def test_local_endpoints_need_none(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = [said("a cat")]
    assert EndpointJudge("m", tmp_path, base_url=endpoint.url, key_variable="NO_KEY").answer(QUESTION, 30) == "a cat"


@pytest.mark.parametrize("options", [{"tries": 0}, {"requests_per_minute": 0}], ids=str)
def test_limits_of_nothing(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)at least 1.*cure"):
        EndpointJudge("m", tmp_path, **options)  # type: ignore[arg-type]


def test_pace(endpoint: Endpoint, waits: list[float], tmp_path: Path) -> None:
    endpoint.replies = [said("a cat")]
    judge = EndpointJudge(
        "m", tmp_path, base_url=endpoint.url, key_variable="NO_KEY", requests_per_minute=2, wait=waits.append
    )
    for n in range(4):
        judge.answer(QUESTION, 30 + n)
    assert len(waits) == 2
    assert all(50 < seconds <= 60 for seconds in waits)


def test_many_threads(endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path) -> None:
    endpoint.replies = [said("a cat")]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: judge.answer(QUESTION, n), range(1, 41)))
    assert answers == ["a cat"] * 40
    assert judge.usage.requests == 40
    assert len((tmp_path / ANSWERS).read_text().splitlines()) == 40
