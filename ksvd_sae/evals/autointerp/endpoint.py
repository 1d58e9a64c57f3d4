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
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import openai

from ksvd_sae.errors import ConfigError, EvaluationError
from ksvd_sae.evals.autointerp.lexical import Messages
from ksvd_sae.store import content_hash

logger = logging.getLogger(__name__)
ANSWERS = "answers.jsonl"
# Goes up with every change of what is asked.
VERSION = 1
# Between tries: 1, 2, 4, … s at most this, unless the endpoint says how long.
_LONGEST_WAIT_S = 60.0
_PER_MILLION = 1e6


# These will not be answered otherwise the next time, whatever is asked: no such key, no money, no such model.
_HOPELESS = (401, 402, 403, 404)
_PASSING = (408, 409, 425, 429)


@dataclass
class Usage:
    """What was asked of the endpoint so far; ``reused`` answers came from disk and cost what they did when asked."""

    requests: int = 0
    reused: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused_prompt_tokens: int = 0
    reused_completion_tokens: int = 0

    def since(self, before: "Usage") -> "Usage":
        return Usage(**{name: value - getattr(before, name) for name, value in asdict(self).items()})

    def cost(self, input_price: float, output_price: float) -> float:
        """In the currency of the prices, which are for a million tokens; without what was reused."""
        return (self.prompt_tokens * input_price + self.completion_tokens * output_price) / _PER_MILLION


@dataclass(frozen=True)
class _Answer:
    """Text and tokens, which count the tries that it took."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


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
        # Why the endpoint is asked nothing more.
        self._away: str | None = None
        self._client: openai.OpenAI | None = None
        self.usage = Usage()

    @property
    def name(self) -> str:
        return self.model

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "endpoint", "model": self.model, "base_url": self.base_url, "version": VERSION}

    def answer(self, messages: Messages, max_tokens: int, accepts: Callable[[str], bool] | None = None) -> str:
        """See ``Judge``; an answer on disk is given again.

        An endpoint that gave no answer after all tries, or says that there will be none, is asked nothing more:
        what is on disk can still be had.

        Raises: EvaluationError at once where asking again is of no use (no key, no such model), else after all tries.
        """
        question = {"model": self.model, "max_tokens": max_tokens, "messages": [dict(m) for m in messages]}
        key = content_hash({**question, "base_url": self.base_url})
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self.usage.reused += 1
                self.usage.reused_prompt_tokens += kept.prompt_tokens
                self.usage.reused_completion_tokens += kept.completion_tokens
                return kept.text
        problem, delay_s, spent, last_was_away = "", 0.0, [0, 0], False
        for attempt in range(self._tries):
            if attempt:
                with self._lock:
                    self.usage.retries += 1
                if delay_s:
                    self._wait(delay_s)
            if self._away is not None:
                raise self._error(f"not asked, as before: {self._away}")
            self._pace.next()
            try:
                text, problem = self._ask(question, spent)
            except openai.APIError as error:
                problem = self._without_key(f"{type(error).__name__}: {error}")
                logger.debug("judge %s, try %d: %s", self.model, attempt + 1, problem)
                if not _may_pass(error):
                    self._away = problem if _is_hopeless(error) else self._away
                    raise self._error(problem) from None
                text, delay_s = "", _delay(error, attempt)
                last_was_away = True
                continue
            last_was_away, delay_s = False, 0.0
            if text and (accepts is None or accepts(text)):
                self._keep(key, _Answer(text, *spent))
                return text
            problem = problem or f"an answer that cannot be read: {text[:80]!r}"
        problem = f"{self._tries} tries; the last: {problem}"
        if last_was_away:
            self._away = problem
        raise self._error(problem)

    def _ask(self, question: dict[str, Any], spent: list[int]) -> tuple[str, str]:
        """(answer, '') or ('', what is wrong with the reply); adds its tokens to ``spent``."""
        completions = self._connected().chat.completions.with_raw_response
        reply = self._without_key(completions.create(**question, n=1, stream=False).text)
        try:
            body = json.loads(reply)
            tokens = [int((body.get("usage") or {}).get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            choices = body["choices"]
            text = (choices[0]["message"]["content"] or "").strip() if choices else ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "", f"a reply that is no chat completion: {reply[:80]!r}"
        with self._lock:
            self.usage.requests += 1
            self.usage.prompt_tokens += tokens[0]
            self.usage.completion_tokens += tokens[1]
        spent[:] = [spent[0] + tokens[0], spent[1] + tokens[1]]
        return text, "" if text else "an empty answer"

    def _connected(self) -> openai.OpenAI:
        with self._lock:
            if self._client is None:
                key = self._key()
                if not key and self.base_url is None:
                    raise EvaluationError(
                        f"autointerp: no key for judge {self.model}",
                        cause=f"the environment variable {self._key_variable} is not set",
                        cure=f"export {self._key_variable}=…, give a base_url that needs none, or use judge 'lexical'",
                    )
                if not key.isascii() or not key.isprintable():
                    raise EvaluationError(
                        f"autointerp: the key for judge {self.model} cannot be sent",
                        cause=f"the environment variable {self._key_variable} holds characters that no key has",
                        cure="copy the key again",
                    )
                # The library's own retries would not keep to the pace.
                self._client = openai.OpenAI(
                    api_key=key or "none", base_url=self.base_url, timeout=self._timeout_s, max_retries=0
                )
            return self._client

    def _keep(self, key: str, answer: _Answer) -> None:
        tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        entry = {"key": key, "model": self.model, "answer": answer.text, **tokens}
        with self._lock:
            self._kept[key] = answer
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _key(self) -> str:
        return os.environ.get(self._key_variable, "").strip()

    def _without_key(self, text: str) -> str:
        key = self._key()
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


def _may_pass(error: openai.APIError) -> bool:
    """Whether the same question may be answered a little later."""
    if isinstance(error, openai.APIStatusError):
        return not _is_hopeless(error) and (error.status_code in _PASSING or error.status_code >= 500)
    return isinstance(error, openai.APIConnectionError)


def _is_hopeless(error: openai.APIError) -> bool:
    return error.code == "insufficient_quota" or getattr(error, "status_code", None) in _HOPELESS


def _delay(error: openai.APIError, attempt: int) -> float:
    """Seconds to wait: what the endpoint says, else twice as long each time."""
    response = getattr(error, "response", None)
    said = response.headers.get("retry-after", "") if response is not None else ""
    try:
        said_s = float(said)
    except ValueError:
        try:
            said_s = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            said_s = 0.0
    return min(_LONGEST_WAIT_S, max(said_s, 2.0**attempt))


def _read(path: Path) -> dict[str, _Answer]:
    """Answers on disk; a line that was cut off is asked for again."""
    kept: dict[str, _Answer] = {}
    if not path.exists():
        return kept
    text = path.read_text()
    if text and not text.endswith("\n"):
        # What is kept next must not end the line that was cut off.
        with path.open("a") as file:
            file.write("\n")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            tokens = int(entry.get("prompt_tokens", 0)), int(entry.get("completion_tokens", 0))
            kept[entry["key"]] = _Answer(str(entry["answer"]), *tokens)
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s: a line is no answer; it will be asked for again", path)
    return kept
