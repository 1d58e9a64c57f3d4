"""An endpoint on the loopback that is slow, busy, wrong or away: answers come in the end, or a clear error, and every
answer is kept."""

import email.utils
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evals.autointerp.endpoint import ANSWERS, EndpointJudge
from tests.evals.autointerp.endpoints import KEY, Endpoint, Reply, failed, said

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    found = Endpoint()
    yield found
    found.close()


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
    again.answer(QUESTION, 31)
    third = EndpointJudge("m", tmp_path, base_url=endpoint.url, key_variable="JUDGE_KEY")
    third.answer(QUESTION, 31)
    assert len(endpoint.asked) == 2, "what is kept next stands on a line of its own"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_busy_or_broken_for_a_while(status: int, endpoint: Endpoint, judge: EndpointJudge, waits: list[float]) -> None:
    endpoint.replies = [failed(status), failed(status), said("a cat")]
    assert judge.answer(QUESTION, 30) == "a cat"
    assert waits == [1, 2]
    assert judge.usage.retries == 2


def test_waits_as_long_as_it_is_told(endpoint: Endpoint, judge: EndpointJudge, waits: list[float]) -> None:
    endpoint.replies = [failed(429, retry_after="7"), failed(429, retry_after="9000"), said("a cat")]
    judge.answer(QUESTION, 30)
    assert waits == [7, 60]


def test_waits_until_it_is_told(endpoint: Endpoint, judge: EndpointJudge, waits: list[float]) -> None:
    """Retry-After may be a date."""
    endpoint.replies = [failed(429, retry_after=email.utils.formatdate(time.time() + 30, usegmt=True)), said("a cat")]
    judge.answer(QUESTION, 30)
    assert 20 < waits[0] <= 30


NO_COMPLETIONS = {
    "not JSON": "<html>502</html>",
    "cut off": '{"choices": [{"mess',
    "a list": "[]",
    "null": "null",
    "no choices": "{}",
    "choices are null": '{"choices": null}',
    "empty choices": '{"choices": []}',
    "no message": '{"choices": [{}]}',
    "message is null": '{"choices": [{"message": null}]}',
    "content is a list": '{"choices": [{"message": {"content": [1]}}]}',
    "tokens are words": '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}}',
}


@pytest.mark.parametrize("body", NO_COMPLETIONS.values(), ids=NO_COMPLETIONS)
def test_replies_that_are_no_completions(body: str, endpoint: Endpoint, judge: EndpointJudge) -> None:
    endpoint.replies = [(200, {}, body), said("a cat")]
    assert judge.answer(QUESTION, 30) == "a cat"
    assert len(endpoint.asked) == 2
    endpoint.replies = [(200, {}, body)]
    with pytest.raises(EvaluationError, match=r"6 tries; the last: (a reply that is no chat|an empty answer)"):
        judge.answer(QUESTION, 31)


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
    gone.close()
    judge = EndpointJudge("m", tmp_path, base_url=gone.url, key_variable="JUDGE_KEY", tries=3, wait=waits.append)
    with pytest.raises(EvaluationError, match=r"(?s)3 tries.*Connection.*run again"):
        judge.answer(QUESTION, 30)
    assert waits == [1, 2], "and not after the last try"


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


def test_no_money_is_no_use_either(endpoint: Endpoint, judge: EndpointJudge) -> None:
    """OpenAI says so with 429, as it does when asked too often."""
    endpoint.replies = [(429, {}, json.dumps({"error": {"code": "insufficient_quota", "message": "pay"}}))]
    with pytest.raises(EvaluationError, match="429 - pay"):
        judge.answer(QUESTION, 30)
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("status", [503, 401])
def test_an_endpoint_that_is_away_is_asked_nothing_more(
    status: int, endpoint: Endpoint, judge: EndpointJudge, waits: list[float]
) -> None:
    endpoint.replies = [said("a cat"), failed(status)]
    judge.answer(QUESTION, 30)
    with pytest.raises(EvaluationError, match=str(status)):
        judge.answer(QUESTION, 31)
    n_asked, n_waits = len(endpoint.asked), len(waits)
    with pytest.raises(EvaluationError, match=f"(?s)not asked, as before.*{status}"):
        judge.answer(QUESTION, 32)
    assert (len(endpoint.asked), len(waits)) == (n_asked, n_waits)
    assert judge.answer(QUESTION, 30) == "a cat", "what is on disk can still be had"


@pytest.mark.parametrize("reply", [failed(400), said("no idea")], ids=["refused", "unreadable"])
def test_one_question_without_an_answer_does_not_end_it(reply: Reply, endpoint: Endpoint, judge: EndpointJudge) -> None:
    endpoint.replies = [reply]
    with pytest.raises(EvaluationError):
        judge.answer(QUESTION, 30, accepts=str.isdigit)
    endpoint.replies = [said("3")]
    assert judge.answer(QUESTION, 31, accepts=str.isdigit) == "3"


def test_tokens_of_answers_on_disk_are_known(endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path) -> None:
    endpoint.replies = [said("no idea", 7), said("3", 2)]
    judge.answer(QUESTION, 30, accepts=str.isdigit)
    again = EndpointJudge("m", tmp_path, base_url=endpoint.url, key_variable="JUDGE_KEY")
    again.answer(QUESTION, 30)
    assert (again.usage.prompt_tokens, again.usage.completion_tokens) == (0, 0)
    assert (again.usage.reused_prompt_tokens, again.usage.reused_completion_tokens) == (20, 9)


@pytest.mark.parametrize("key", ["sk-“quoted”", "sk-two\nlines"])
def test_a_key_that_cannot_be_sent(
    key: str, judge: EndpointJudge, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(EvaluationError, match=r"(?s)cannot be sent.*JUDGE_KEY.*copy") as caught:
        judge.answer(QUESTION, 30)
    assert "sk-" not in str(caught.value)
    assert endpoint.asked == []


def test_an_answer_that_holds_the_key(endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path) -> None:
    endpoint.replies = [said(f"your key is {KEY}")]
    assert judge.answer(QUESTION, 30) == "your key is [key]"
    assert KEY not in (tmp_path / ANSWERS).read_text()


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
