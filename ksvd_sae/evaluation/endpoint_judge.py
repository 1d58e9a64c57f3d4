"""A judge behind an OpenAI-compatible endpoint: slow, busy or wrong answers are waited for and asked again.

Every answer is kept on disk as it comes, by a hash of what was asked, so an eval that is stopped or fails goes on
without paying twice. The key is read from the environment when it is needed, and appears in no file, log or message.
"""

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evaluation.judges import Messages
from ksvd_sae.provenance import content_hash

logger = logging.getLogger(__name__)
ANSWERS = "answers.jsonl"
# Between tries: 1, 2, 4, … s at most this, unless the endpoint says how long.
_LONGEST_WAIT_S = 60.0
_PER_MILLION = 1e6


@dataclass
class Usage:
    """What was asked of the endpoint so far; ``reused`` answers came from disk and cost nothing."""

    requests: int = 0
    reused: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, input_price: float, output_price: float) -> float:
        """In the currency of the prices, which are for a million tokens."""
        return (self.prompt_tokens * input_price + self.completion_tokens * output_price) / _PER_MILLION


class EndpointJudge:
    """Asks ``model`` at ``base_url``.

    Args:
        folder: keeps the answers.
        key_variable: environment variable that holds the API key; endpoints that want none get the word 'none'.
        requests_per_minute: most requests begun in any minute; None for no limit of ours.
        timeout_s: of one request.
        tries: of one question, before it counts as unanswered.
        wait: how to wait (seconds).
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        *,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        requests_per_minute: int | None = None,
        timeout_s: float = 60.0,
        tries: int = 6,
        wait: Callable[[float], None] = time.sleep,
    ):
        if tries < 1 or (requests_per_minute is not None and requests_per_minute < 1):
            raise ConfigError(
                f"judge {model}: tries and requests_per_minute must be at least 1",
                got=f"tries = {tries}, requests_per_minute = {requests_per_minute}",
                cure="leave requests_per_minute out for no limit",
            )
        self.model, self.base_url, self._key_variable = model, base_url, key_variable
        self._timeout_s, self._tries, self._wait = timeout_s, tries, wait
        self._path, self._lock = folder / ANSWERS, threading.Lock()
        self._pace = _Pace(requests_per_minute, wait)
        self._kept = _read(self._path)
        self._client: openai.OpenAI | None = None
        self.usage = Usage()

    @property
    def name(self) -> str:
        return self.model

    def answer(self, messages: Messages, max_tokens: int, accepts: Callable[[str], bool] | None = None) -> str:
        """See ``Judge``; an answer on disk is given again.

        Raises: EvaluationError at once where asking again is of no use (no key, no such model), else after all tries.
        """
        question = {"model": self.model, "max_tokens": max_tokens, "messages": [dict(m) for m in messages]}
        key = content_hash({**question, "base_url": self.base_url})
        with self._lock:
            if key in self._kept:
                self.usage.reused += 1
                return self._kept[key]
        problem = ""
        for attempt in range(self._tries):
            if attempt:
                with self._lock:
                    self.usage.retries += 1
            self._pace.next()
            try:
                text = self._ask(question)
            except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
                problem = self._without_key(f"{type(error).__name__}: {error}")
                logger.debug("judge %s, try %d: %s", self.model, attempt + 1, problem)
                self._wait(_delay(error, attempt))
                continue
            except openai.APIError as error:
                raise self._error(self._without_key(f"{type(error).__name__}: {error}")) from None
            if text and (accepts is None or accepts(text)):
                self._keep(key, text)
                return text
            problem = f"an answer that cannot be read: {text[:80]!r}" if text else "an empty answer"
        raise self._error(f"{self._tries} tries; the last: {problem}")

    def _ask(self, question: dict[str, Any]) -> str:
        result = self._connected().chat.completions.create(**question, n=1, stream=False)
        with self._lock:
            self.usage.requests += 1
            if result.usage is not None:
                self.usage.prompt_tokens += result.usage.prompt_tokens
                self.usage.completion_tokens += result.usage.completion_tokens
        return (result.choices[0].message.content or "").strip() if result.choices else ""

    def _connected(self) -> openai.OpenAI:
        with self._lock:
            if self._client is None:
                key = os.environ.get(self._key_variable)
                if not key and self.base_url is None:
                    raise EvaluationError(
                        f"autointerp: no key for judge {self.model}",
                        cause=f"the environment variable {self._key_variable} is not set",
                        cure=f"export {self._key_variable}=…, give a base_url that needs none, or use judge 'lexical'",
                    )
                # The library's own retries would not keep to the pace.
                self._client = openai.OpenAI(
                    api_key=key or "none", base_url=self.base_url, timeout=self._timeout_s, max_retries=0
                )
            return self._client

    def _keep(self, key: str, text: str) -> None:
        with self._lock:
            self._kept[key] = text
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "model": self.model, "answer": text}) + "\n")

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self._key_variable)
        return text.replace(key, "[key]") if key else text

    def _error(self, problem: str) -> EvaluationError:
        return EvaluationError(
            f"autointerp: judge {self.model} at {self.base_url or 'api.openai.com'} gave no answer",
            cause=problem,
            cure="run again when it answers: answers so far are kept and not asked for again",
        )


class _Pace:
    """At most ``per_minute`` begun in any minute, over all threads."""

    def __init__(self, per_minute: int | None, wait: Callable[[float], None]):
        self._per_minute, self._wait, self._lock = per_minute, wait, threading.Lock()
        self._begun: deque[float] = deque()

    def next(self) -> None:
        """Return when the next may begin."""
        if self._per_minute is None:
            return
        with self._lock:
            if len(self._begun) == self._per_minute:
                # Others wait for the lock meanwhile: it is not their turn either.
                self._wait(max(0.0, self._begun.popleft() + 60.0 - time.monotonic()))
            self._begun.append(time.monotonic())


def _delay(error: openai.OpenAIError, attempt: int) -> float:
    """Seconds to wait: what the endpoint says, else twice as long each time."""
    response = getattr(error, "response", None)
    try:
        said = float(response.headers["retry-after"]) if response is not None else 0.0
    except (KeyError, ValueError):
        said = 0.0
    return min(_LONGEST_WAIT_S, max(said, 2.0**attempt))


def _read(path: Path) -> dict[str, str]:
    """Answers on disk; a line that was cut off is asked for again."""
    kept: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            kept[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a line is no answer; it will be asked for again", path)
    return kept
