"""The lexical judge on SAEBench's own messages: it explains by what is marked and predicts by what it said."""

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig
from sae_bench.evals.autointerp.main import AutoInterp, Example, Examples

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.autointerp.lexical import LexicalJudge

CFG = AutoInterpEvalConfig(model_name="none")
# SAEBench's methods that make and read messages need nothing of the object but its settings.
BENCH: Any = SimpleNamespace(cfg=CFG)


def example(text: str, active: set[str]) -> Example:
    """Tokens are words with their space before; those in ``active`` fire."""
    found = Example.__new__(Example)
    words = text.split(" ")
    found.str_toks = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
    found.acts = [1.0 if word.strip(".,").lower() in active else 0.0 for word in words]
    found.act_threshold = 0.01
    found.toks_are_active = [act > 0.01 for act in found.acts]
    found.is_active = any(found.toks_are_active)
    return found


def explanation(judge: LexicalJudge, texts: list[str], active: set[str]) -> str:
    messages = AutoInterp.get_generation_prompts(BENCH, Examples([example(text, active) for text in texts]))
    return AutoInterp.parse_explanation(BENCH, judge.answer(messages, CFG.max_tokens_in_explanation))


def predictions(judge: LexicalJudge, said: str, texts: list[str]) -> list[int] | None:
    random.seed(0)
    messages = AutoInterp.get_scoring_prompts(BENCH, said, Examples([example(text, set()) for text in texts]))
    return AutoInterp.parse_predictions(BENCH, judge.answer(messages, CFG.max_tokens_in_prediction))


SHOWN = ["The bank raised its rates", "A rise in Rates hurt the bank", "rates, they said, will fall. So did it."]


def test_explains_by_what_is_marked_and_little_else() -> None:
    said = json.loads(explanation(LexicalJudge(), SHOWN, {"rates"}))
    assert {token.strip(" ,") for token in said} == {"rates"}


def test_a_token_that_mostly_stands_unmarked_tells_nothing() -> None:
    """'the' fires once in five."""
    shown = ["the dog and the cat and the cow chased the hen", "the dogs bark"]
    messages = AutoInterp.get_generation_prompts(BENCH, Examples([example(text, {"dog", "dogs"}) for text in shown]))
    marked = [{**messages[1], "content": messages[1]["content"].replace("1. the", "1. <<the>>")}]
    said = LexicalJudge().answer([messages[0], *marked], 30)
    assert '"the"' not in said
    assert "dog" in said


def test_predicts_where_a_token_occurs() -> None:
    judge = LexicalJudge()
    said = explanation(judge, SHOWN, {"rates"})
    texts = ["Interest Rates rose", "It was corporates that fell", "No sign of them", "Their rates went up"]
    assert predictions(judge, said, texts) == [1, 4], "and not inside another word"
    assert predictions(judge, said, ["nothing here", "nor there"]) == []


def test_perfect_on_a_latent_of_one_word_and_chance_on_one_of_none() -> None:
    judge, draw = LexicalJudge(), random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]

    def text() -> str:
        return " ".join(draw.choices(words, k=6))

    shown = [f"{text()} signal {text()}" for _ in range(15)]
    said = explanation(judge, shown, {"signal"})
    asked = [f"{text()} signal" if i < 4 else text() for i in range(14)]
    scoring = Examples([example(t, {"signal"}) for t in asked], shuffle=True)
    found = predictions(judge, said, ["".join(ex.str_toks) for ex in scoring])
    assert AutoInterp.score_predictions(BENCH, found or [], scoring) == 1.0
    # Active on words at random: what it marks does not tell where it fires next.
    noisy = explanation(judge, [text() for _ in range(15)], {"alpha"})
    scoring = Examples([example(text(), {draw.choice(words)}) for _ in range(14)])
    found = predictions(judge, noisy, ["".join(ex.str_toks) for ex in scoring])
    assert 0 < AutoInterp.score_predictions(BENCH, found or [], scoring) < 1


def test_same_messages_same_answer() -> None:
    assert explanation(LexicalJudge(), SHOWN, {"rates"}) == explanation(LexicalJudge(), SHOWN, {"rates"})


@pytest.mark.parametrize("token", ["(", "a.b", "$5", "\\d", "↵", "日本"])
def test_any_characters(token: str) -> None:
    judge = LexicalJudge()
    said = explanation(judge, [f"x {token} y", f"z {token} w"], {token.strip(".,").lower()})
    assert predictions(judge, said, [f"q {token} r", "q r"]) == [1]


def test_an_explanation_of_another_judge() -> None:
    with pytest.raises(EvaluationError, match=r"(?s)not its own.*cure"):
        predictions(LexicalJudge(), "words about money", ["a", "b"])
