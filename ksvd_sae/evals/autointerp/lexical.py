"""Judges of the autointerp eval: who says in words what a latent does, and predicts from the words where it is active.

SAEBench talks to its judge in chat messages, two for each latent: texts with the active tokens in << >>, to be
explained in a sentence; then that sentence and numbered texts, to be answered with the numbers of those where the
latent is active. A judge here answers such messages and nothing else, so SAEBench's code draws the texts and counts
the hits whoever judges. Judges are called from several threads at once.

``LexicalJudge`` needs no language model: it explains a latent by the tokens that it marks. It cannot see meaning, so
its scores are below a language model's and comparable among themselves only. ``EndpointJudge`` asks any
OpenAI-compatible endpoint; see endpoint.py.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ksvd_sae.errors import EvaluationError

Messages = Sequence[Mapping[str, str]]
_MARKED = re.compile(r"<<(.*?)>>", re.DOTALL)
# Each text begins "1. "; newlines inside a text are written ↵.
_NUMBERED = re.compile(r"^(\d+)\. ", re.MULTILINE)
_EXPLANATION = re.compile(r"this neuron fires on (.*?)\.\n\nHere are the examples:", re.DOTALL)


class Judge(Protocol):
    """Answers chat messages.

    name: stands in tables beside the scores that it gave.
    identity: what its answers follow from besides the question; two judges of one identity are one judge.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def answer(self, messages: Messages, max_tokens: int, accepts: Callable[[str], bool] | None = None) -> str:
        """The answer's text.

        Args: accepts: whether an answer is one that SAEBench can read; others do not count as answers.
        Raises: EvaluationError if there is none.
        """
        ...


class LexicalJudge:
    """Explains a latent by its most telling tokens and expects it to be active wherever one of them occurs.

    A token tells the more, the more texts mark it and the fewer times it stands unmarked in the same texts. The same
    messages always get the same answer.

    Args:
        n_tokens: most tokens in an explanation.
        least_share: least part of a token's occurrences that must be marked.
    """

    name = "lexical"
    # Goes up with every change of its answers: scores of another version are another judge's.
    version = 1

    def __init__(self, n_tokens: int = 8, least_share: float = 0.5):
        self._n_tokens, self._least_share = n_tokens, least_share

    @property
    def identity(self) -> dict[str, Any]:
        own = {"n_tokens": self._n_tokens, "least_share": self._least_share}
        return {"judge": self.name, "version": self.version, **own}

    def answer(self, messages: Messages, max_tokens: int, accepts: Callable[[str], bool] | None = None) -> str:
        text = messages[-1]["content"]
        explanation = _EXPLANATION.search(text)
        if explanation is None:
            return self._explain(_texts(text))
        return self._predict(explanation[1], _texts(text[explanation.end() :]))

    def _explain(self, texts: dict[int, str]) -> str:
        marked: Counter[str] = Counter()
        for text in texts.values():
            marked.update({token.lower() for token in _MARKED.findall(text) if token.strip()})
        plain = " ".join(_MARKED.sub(r"\1", text).lower() for text in texts.values())
        share = {token: _count(token, texts) / max(1, _occurrences(token, plain)) for token in marked}
        telling = [token for token in marked if share[token] >= self._least_share] or list(marked)
        telling.sort(key=lambda token: (-marked[token], -share[token], token))
        # SAEBench takes what follows "activates on".
        return f"This neuron activates on {json.dumps(telling[: self._n_tokens], ensure_ascii=False)}"

    def _predict(self, explanation: str, texts: dict[int, str]) -> str:
        tokens = _tokens(explanation)
        where = [n for n, text in texts.items() if any(_occurrences(token, text.lower()) for token in tokens)]
        return ", ".join(map(str, where)) or "None"


def _texts(message: str) -> dict[int, str]:
    """The numbered texts of a message."""
    parts = _NUMBERED.split(message)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def _tokens(explanation: str) -> list[str]:
    """The tokens that ``LexicalJudge`` put into an explanation."""
    start = explanation.find("[")
    try:
        tokens = json.loads(explanation[start:])
    except ValueError as error:
        raise EvaluationError(
            "autointerp: the lexical judge was given an explanation that is not its own",
            got=explanation[:80],
            cause="explanations kept from another judge",
            cure="a folder of artifacts for each judge",
        ) from error
    return [str(token) for token in tokens]


def _count(token: str, texts: dict[int, str]) -> int:
    """Times that the token is marked."""
    return sum(marked.lower() == token for text in texts.values() for marked in _MARKED.findall(text))


def _occurrences(token: str, text: str) -> int:
    """Times that the token's characters occur; a token that begins a word only where a word begins."""
    begins = r"(?:^|(?<=\W))" if token.startswith(" ") else ""
    return len(re.findall(begins + re.escape(token.strip()), text))
