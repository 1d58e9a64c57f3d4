"""SAEBench's AutoInterp under a judge of ours: what it asks, what is counted, and what becomes of failures.

SAEBench gathers the activations, draws the texts, writes the messages, reads the answers and counts the hits; the
classes made here stand in place of its own (``adapters.judged_by``).
"""

import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sae_bench.evals.autointerp.eval_output import AutoInterpEvalOutput
from sae_bench.evals.autointerp.main import AutoInterp

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.autointerp.endpoint import EndpointJudge, Usage
from ksvd_sae.evals.autointerp.lexical import Judge
from ksvd_sae.store import content_hash, write_json

logger = logging.getLogger(__name__)
# Failures that an error tells in full.
_TOLD = 3


class ScoringMessages(list[dict[str, str]]):
    """Messages whose answer is a list of numbers; all others ask for an explanation."""


class Judging:
    """One judge over the SAEs of a panel, one after another.

    Args:
        judge: whom to ask.
        least_latents: fewer judged latents are an error.
        logs: folder for each SAE's questions and answers, as SAEBench writes them out.
        prices: of a million tokens asked and answered; None where they are not known.
    """

    def __init__(self, judge: Judge, least_latents: int, logs: Path, prices: tuple[float, float] | None = None):
        self.judge, self.least_latents, self.logs, self.prices = judge, least_latents, logs, prices
        self._before = self._usage()
        self._latents: dict[str, int] = {}
        self._failures: dict[int, EvaluationError] = {}

    def answer(self, messages: Any, max_tokens: int) -> str:
        """The judge's answer, one that SAEBench can read."""
        readable = _is_prediction if isinstance(messages, ScoringMessages) else _is_explanation
        return self.judge.answer(messages, max_tokens, readable)

    def begin(self, n_wanted: int, n_alive: int) -> None:
        self._latents, self._failures, self._before = {"wanted": n_wanted, "alive": n_alive}, {}, self._usage()

    def texts_found(self, n_latents: int) -> None:
        """Texts were found for so many latents.

        Raises: EvaluationError if they are too few to be judged.
        """
        self._latents["with_texts"] = n_latents
        if n_latents < self._latents["wanted"]:
            logger.warning(
                "autointerp: %d of %d latents can be judged: %d fire often enough, and some of these in too few places",
                n_latents,
                self._latents["wanted"],
                self._latents["alive"],
            )
        if n_latents < self.least_latents:
            raise EvaluationError(
                "autointerp: too few latents fire often enough to be judged",
                got=f"{n_latents}, of {self._latents['alive']} that fire more than dead_latent_threshold times",
                limit=f"min_latents: {self.least_latents}",
                cause="too little text for so many latents, most of them dead, or codes that are seldom positive",
                cure="raise evaluation.autointerp.total_tokens, or lower min_latents",
            )

    def failed(self, latent: int, error: EvaluationError) -> None:
        """Goes on with the other latents, whose answers are kept."""
        self._failures[latent] = error

    def settle(self, n_judged: int) -> None:
        """
        Raises: EvaluationError if any latent has no answer.
        """
        self._latents["judged"] = n_judged
        if not self._failures:
            return
        told = [f"latent {latent}: {_reason(error)}" for latent, error in sorted(self._failures.items())[:_TOLD]]
        more = len(self._failures) - _TOLD
        raise EvaluationError(
            f"autointerp: judge {self.judge.name} gave no score for {len(self._failures)} of "
            f"{self._latents['with_texts']} latents",
            got="; ".join(told) + (f"; and {more} more" if more > 0 else ""),
            cause="see the endpoint's answers above",
            cure=f"{n_judged} latents are judged, and every answer is kept: run again, and only what is missing is "
            "asked; where the answers cannot be read, take another model",
        )

    def record(self) -> dict[str, Any]:
        """What a result says of its judge: who, how many latents, and what it cost."""
        record: dict[str, Any] = {"name": self.judge.name, **self.judge.identity, "latents": dict(self._latents)}
        if (now := self._usage()) is not None and self._before is not None:
            usage = now.since(self._before)
            record["usage"] = asdict(usage)
            if self.prices is not None:
                record["usage"]["cost"] = usage.cost(*self.prices)
        return record

    def _usage(self) -> Usage | None:
        return Usage(**asdict(self.judge.usage)) if isinstance(self.judge, EndpointJudge) else None


def _reason(error: EvaluationError) -> str:
    """In one line."""
    return " ".join(f"{error.what}: {error.cause}".split())


def _is_prediction(text: str) -> bool:
    try:
        return AutoInterp.parse_predictions(None, text) is not None
    except ValueError:  # '²' is a digit to SAEBench and no number to Python
        return False


def _is_explanation(text: str) -> bool:
    return bool(AutoInterp.parse_explanation(None, text))


def client_class(judging: Judging) -> Any:
    """In place of ``OpenAI``: as much of it as SAEBench calls."""

    class Client:
        def __init__(self, api_key: str):
            self.chat = SimpleNamespace(completions=self)

        def create(self, *, model: str, messages: Any, n: int, max_tokens: int, stream: bool) -> Any:
            message = SimpleNamespace(content=judging.answer(messages, max_tokens))
            return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    return Client


def autointerp_class(judging: Judging, seed: int) -> Any:
    """In place of ``AutoInterp``: the same, with failures and latents counted."""

    class Judged(AutoInterp):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            # SAEBench has made counts of the sparsity by now.
            n_alive = int((options["sparsity"] > self.cfg.dead_latent_threshold).sum())
            judging.begin(self.cfg.n_latents, n_alive)

        def gather_data(self) -> Any:
            generation, scoring = super().gather_data()
            judging.texts_found(len(generation))
            return generation, scoring

        def get_scoring_prompts(self, explanation: str, scoring_examples: Any) -> ScoringMessages:
            # It draws the example of an answer from the process's random state, as explanations come in.
            shown = content_hash([seed, explanation, [ex.to_str() for ex in scoring_examples]])
            with _random_state(shown):
                return ScoringMessages(super().get_scoring_prompts(explanation, scoring_examples))

        async def run_single_feature(self, executor: Any, latent: int, *args: Any) -> Any:
            try:
                return await super().run_single_feature(executor, latent, *args)
            except EvaluationError as error:
                judging.failed(latent, error)
                return None

        async def run(self, *args: Any) -> Any:
            results = await super().run(*args)
            judging.settle(len(results))
            # They come in the order of answers, and their float32 mean follows the order.
            return dict(sorted(results.items()))

    return Judged


def output_class(judging: Judging) -> Any:
    """In place of ``AutoInterpEvalOutput``: the same, written whole, with the judge and without the logs.

    The logs hold every text that the judge was shown, some 10 kB a latent; they go to ``judging.logs``.
    """

    class Output(AutoInterpEvalOutput):
        def to_json_file(self, file_path: str, indent: int = 2) -> None:
            result, path = json.loads(self.to_json()), Path(file_path)
            latents = result["eval_result_unstructured"].items()
            logs = [f"latent {number}\n{latent.pop('logs')}\n" for number, latent in latents]
            # The result's folder is of its settings.
            place = judging.logs / path.parent.name
            place.mkdir(parents=True, exist_ok=True)
            stem = path.name.removesuffix("_custom_sae_eval_results.json")
            (place / f"{stem}.txt").write_text("\n".join(logs), encoding="utf-8")
            record = judging.record()
            logger.info("autointerp of %s: judged by %s", stem, json.dumps(record))
            write_json(path, {**result, "judge": record})

    return Output


@contextmanager
def _random_state(seed: str) -> Iterator[None]:
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
