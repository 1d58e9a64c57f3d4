"""Autointerp by an endpoint that is slow, busy, wrong or away: nothing lost, nothing asked twice, no key anywhere."""

import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.autointerp import endpoint as endpoint_judge
from ksvd_sae.evals.autointerp.endpoint import ANSWERS
from ksvd_sae.evals.autointerp.lexical import LexicalJudge
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.panel import run_evals
from ksvd_sae.evals.saebench.runner import read_metrics
from tests.evals.autointerp.endpoints import KEY, Endpoint, Reply, failed, said
from tests.evals.autointerp.tiny_autointerp import CONFIG, asking, run_on, word_sae
from tests.evals.conftest import CountedPanel
from tests.tiny_saes import tiny_topk_sae

# Latents, each of which is two questions.
N = CONFIG.n_latents


@pytest.fixture
def counted() -> CountedPanel:
    return CountedPanel({"words": word_sae, "topk-sae": tiny_topk_sae})


@pytest.fixture
def words() -> CountedPanel:
    return CountedPanel({"words": word_sae})


def readable(question: dict[str, Any]) -> Reply:
    """An answer to either kind of question, always the same, and not what is right."""
    text = question["messages"][-1]["content"]
    if text.startswith("Here is the explanation"):
        return said(f"{1 + len(text) % 3}, 5")
    return said(f"This neuron activates on word {len(text) % 5}", 5)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(endpoint_judge, "_LONGEST_WAIT_S", 0.01)
    found = Endpoint()
    found.answers = readable
    yield found
    found.close()


def test_an_endpoint_judges(
    counted: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ksvd_sae"):
        files = run_on(counted, setting, tmp_path / "out", asking(endpoint))
    assert len(endpoint.asked) == 2 * 2 * N
    assert {question["model"] for question in endpoint.asked} == {"m"}
    for path in files.values():
        judge = json.loads(path.read_text())["judge"]
        assert (judge["name"], judge["model"], judge["base_url"]) == ("m", "m", endpoint.url)
        usage = judge["usage"]
        assert (usage["requests"], usage["prompt_tokens"], usage["completion_tokens"]) == (2 * N, 20 * N, 8 * N)
        assert usage["cost"] == pytest.approx((20 * N * 2 + 8 * N * 8) / 1e6)
        assert f'"prompt_tokens": {usage["prompt_tokens"]}' in caplog.text


BAD = [
    failed(429, retry_after="1"),
    failed(500),
    (200, {}, "<html>"),
    (200, {}, '{"choices": []}'),
    said(""),
    said("I think the first, and perhaps the second"),
    said("²"),  # a digit to SAEBench, and no number to Python
]


def test_every_second_reply_is_bad(
    counted: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path
) -> None:
    bad, seen = cycle(BAD), set()

    def sometimes(question: dict[str, Any]) -> Reply:
        text = question["messages"][-1]["content"]
        if text in seen or not text.startswith("Here"):
            return readable(question)
        seen.add(text)
        return next(bad)

    files = run_on(counted, setting, tmp_path / "out", asking(endpoint))
    fine = [read_metrics(path) for path in files.values()]
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(setting.artifacts)
    endpoint.asked.clear()
    endpoint.answers = sometimes
    files = run_on(counted, setting, tmp_path / "out", asking(endpoint))
    assert len(seen) == 2 * N > len(BAD), "every kind was met"
    assert [read_metrics(path) for path in files.values()] == fine
    usages = [json.loads(path.read_text())["judge"]["usage"] for path in files.values()]
    assert [usage["retries"] for usage in usages] == [N, N]
    assert len(endpoint.asked) == 2 * 3 * N


def test_slow(words: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path) -> None:
    seen: list[int] = []

    def first_is_slow(question: dict[str, Any]) -> Reply:
        seen.append(1)
        if len(seen) == 1:
            time.sleep(1.0)
        return readable(question)

    endpoint.answers = first_is_slow
    files = run_on(words, setting, tmp_path / "out", asking(endpoint, timeout_s=0.5))
    assert json.loads(files["words"].read_text())["judge"]["usage"]["retries"] >= 1


def test_an_endpoint_that_goes_away_and_comes_back(
    counted: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path
) -> None:
    """What was answered is not asked again, in the order in which a second run asks too."""
    answered: list[str] = []

    def for_a_while(question: dict[str, Any]) -> Reply:
        if len(answered) >= 11:
            return failed(503)
        answered.append(json.dumps(question, sort_keys=True))
        return readable(question)

    endpoint.answers = for_a_while
    with pytest.raises(EvaluationError) as caught:
        run_on(counted, setting, tmp_path / "out", asking(endpoint))
    text = str(caught.value)
    assert re.search(r"no score for words, topk-sae", text)
    assert re.search(r"judge m gave no score for \d of 6 latents", text)
    assert re.search(r"latent \d+: .*503", text)
    assert re.search(r"\d latents are judged, and every answer is kept", text)
    assert KEY not in text
    assert not list((tmp_path / "out").rglob("*.json"))
    (kept,) = setting.artifacts.rglob(ANSWERS)
    assert len(kept.read_text().splitlines()) == 11
    # It was asked little after it went: ten threads, two tries each, and none for the other SAE.
    assert len(endpoint.asked) <= 11 + 20
    endpoint.answers = readable
    endpoint.asked.clear()
    files = run_on(counted, setting, tmp_path / "out", asking(endpoint))
    assert len(endpoint.asked) == 4 * N - 11
    assert not {json.dumps(question, sort_keys=True) for question in endpoint.asked} & set(answered)
    usages = [json.loads(path.read_text())["judge"]["usage"] for path in files.values()]
    assert sum(usage["reused"] for usage in usages) == 11
    assert sum(usage["reused_prompt_tokens"] for usage in usages) == 110


def test_nobody_there(counted: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.close()
    with pytest.raises(EvaluationError, match=r"(?s)no score for words, topk-sae.*Connection.*0 latents are judged"):
        run_on(counted, setting, tmp_path / "out", asking(endpoint))


def test_one_latent_without_an_answer(
    words: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path
) -> None:
    """The others are judged all the same, and a second run asks for that one."""
    odd: list[str] = []

    def all_but_one(question: dict[str, Any]) -> Reply:
        text = question["messages"][-1]["content"]
        if text.startswith("Here") and not odd:
            odd.append(text)
        return said("no idea") if text in odd else readable(question)

    endpoint.answers = all_but_one
    with pytest.raises(EvaluationError, match=r"(?s)for 1 of 6 latents.*latent \d+: .*2 tries.*no idea.*5 latents are"):
        run_on(words, setting, tmp_path / "out", asking(endpoint))
    assert len(endpoint.asked) == N + N - 1 + 2
    endpoint.answers = readable
    endpoint.asked.clear()
    run_on(words, setting, tmp_path / "out", asking(endpoint))
    assert [question["messages"][-1]["content"] for question in endpoint.asked] == odd


@pytest.mark.parametrize("bad", [None, failed(429), failed(401), failed(400), (200, {}, KEY)], ids=str)
def test_key_is_nowhere(
    bad: Reply | None,
    words: CountedPanel,
    setting: EvalSetting,
    endpoint: Endpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not in a file, log, message or traceback, whatever the endpoint answers: these repeat the key."""
    text = ""
    if bad is not None:
        reply = bad
        endpoint.answers = lambda question: reply
    with caplog.at_level(logging.DEBUG):
        try:
            run_on(words, setting, tmp_path / "out", asking(endpoint))
        except EvaluationError as error:
            text = str(error)
    assert bool(text) == (bad is not None)
    assert endpoint.headers
    assert set(endpoint.headers) == {f"Bearer {KEY}"}, "it was used"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    # The test's own endpoint's reply is logged by no one.
    assert KEY not in caplog.text + text + "".join(capfd.readouterr())


def test_judges_share_no_result(
    words: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [CONFIG, asking(endpoint), asking(endpoint, model="n"), asking(endpoint, base_url=endpoint.url + "/")]
    found = [run_on(words, setting, tmp_path / "out", config)["words"] for config in configs]
    monkeypatch.setattr(LexicalJudge, "version", LexicalJudge.version + 1)
    found.append(run_on(words, setting, tmp_path / "out")["words"])
    assert len(set(found)) == len(found)
    assert [json.loads(path.read_text())["judge"]["name"] for path in found] == ["lexical", "m", "n", "m", "lexical"]


def test_the_table_names_the_model(
    words: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path
) -> None:
    (results,) = run_evals(words.panelists(), [asking(endpoint)], setting, tmp_path / "out")
    assert results.data == f"{CONFIG.dataset}, judge: m"
    assert results.n == {"words": N}


def test_how_an_endpoint_is_asked_is_no_other_judge(
    words: CountedPanel, setting: EvalSetting, endpoint: Endpoint, tmp_path: Path
) -> None:
    files = run_on(words, setting, tmp_path / "out", asking(endpoint))
    n_asked = len(endpoint.asked)
    config = asking(endpoint, requests_per_minute=1, timeout_s=1.0, max_retries=9, input_price=3.0)
    assert run_on(words, setting, tmp_path / "out", config) == files
    assert len(endpoint.asked) == n_asked
