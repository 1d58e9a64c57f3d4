"""SAEBench's autointerp on a tiny model under judges of ours: SAEBench's own scores, from one run of the model.

Endpoints that fail are in test_autointerp_endpoint.py.
"""

import asyncio
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_bench.evals.autointerp import main as autointerp
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.autointerp import AutoInterpEval
from ksvd_sae.evals.autointerp.lexical import LexicalJudge
from ksvd_sae.evals.autointerp.run import bench_config
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.evals.panel import run_evals, tidy_rows
from ksvd_sae.evals.saebench.runner import read_metrics
from ksvd_sae.sae import DBKSVDSAE
from tests.evals.autointerp.tiny_autointerp import CONFIG, ShuffledSAE, changed, run_on, word_sae
from tests.evals.conftest import COMMIT, LONG_TEXT, CountedPanel
from tests.tiny_saes import CONTEXT_TOKENS, D_MODEL, WORDS, tiny_db_ksvd_sae, tiny_topk_sae
from tests.tolerances import SAME_SCORE


@pytest.fixture
def counted() -> CountedPanel:
    return CountedPanel({"words": word_sae, "topk-sae": tiny_topk_sae})


@pytest.fixture
def words() -> CountedPanel:
    return CountedPanel({"words": word_sae})


def score(path: Path) -> float:
    found = read_metrics(path)["autointerp_score"]
    assert found is not None
    return found


# ---------------------------------------------------------------- scores


def test_results(counted: CountedPanel, setting: EvalSetting, model_loads: list[str], tmp_path: Path) -> None:
    files = run_on(counted, setting, tmp_path / "out")
    assert model_loads == ["tiny"]
    for name, path in files.items():
        assert re.fullmatch(rf"{name}-[0-9a-f]{{12}}_custom_sae_eval_results\.json", path.name)
        result = json.loads(path.read_text())
        assert result["eval_type_id"] == "autointerp"
        assert result["eval_config"]["dataset_name"] == LONG_TEXT
        latents = result["eval_result_unstructured"]
        assert len(latents) == 6
        scores = [found["score"] for found in latents.values()]
        metrics = read_metrics(path)
        assert set(metrics) == {"autointerp_score", "autointerp_std_dev"}
        assert metrics["autointerp_score"] == pytest.approx(sum(scores) / 6, abs=SAME_SCORE)
        for found in latents.values():
            assert set(found) == {"latent", "explanation", "predictions", "correct seqs", "score"}
        judge = result["judge"]
        assert (judge["name"], judge["version"]) == ("lexical", LexicalJudge.version)
        assert judge["latents"]["wanted"] == judge["latents"]["with_texts"] == judge["latents"]["judged"] == 6
        assert 6 <= judge["latents"]["alive"] <= 24
        assert "usage" not in judge
        (logs,) = setting.artifacts.rglob(path.name.replace("_custom_sae_eval_results.json", ".txt"))
        assert logs.read_text().count("Scoring phase") == 6


def test_words_are_interpretable_and_noise_is_not(setting: EvalSetting, tmp_path: Path) -> None:
    """Texts drawn at random count as inactive although a word that is said may occur there: hence not 1."""
    makers = {"words": word_sae, "shuffled": lambda: word_sae(ShuffledSAE)}
    files = run_on(CountedPanel(makers), setting, tmp_path / "out", changed(n_latents=len(WORDS)))
    assert score(files["words"]) > 0.8
    assert score(files["words"]) > score(files["shuffled"]) + 0.15
    found = json.loads(files["words"].read_text())["eval_result_unstructured"]
    said = {WORDS[int(latent)]: json.loads(one["explanation"]) for latent, one in found.items()}
    assert len(said) > 10
    assert all(explanation[0] == word for word, explanation in said.items())


def test_same_seed_same_result_and_another_seed_another(
    words: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    def judged(folder: str, config: AutoInterpEval) -> Any:
        random.seed(folder)
        torch.manual_seed(len(folder))
        files = run_on(words, setting, tmp_path / folder, config)
        return {name: json.loads(path.read_text())["eval_result_unstructured"] for name, path in files.items()}

    first = judged("a", CONFIG)
    assert judged("other", CONFIG) == first
    assert judged("c", changed(seed=7)) != first


def hashed(messages: Any, max_tokens: int) -> str:
    """A judge with answers of no sense, which follow from the question's texts alone."""
    text = messages[-1]["content"]
    digest = hashlib.sha256(text.encode()).hexdigest()
    if text.startswith("Here is the explanation"):
        return ", ".join(sorted({str(1 + int(digit, 16) % 10) for digit in digest[:4]}))
    return f"This neuron activates on {digest}."


ANSWERING = {"lexical": LexicalJudge().answer, "hashed": hashed}


@pytest.mark.parametrize("answering", ANSWERING.values(), ids=ANSWERING)
def test_scores_are_stock_saebenchs(
    answering: Callable[[Any, int], str],
    counted: CountedPanel,
    setting: EvalSetting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SAEBench as it is, but for a client that answers in place of OpenAI's; and ours, with a judge that does."""

    class Client:
        def __init__(self, api_key: str):
            self.chat = SimpleNamespace(completions=self)

        def create(self, messages: Any, max_tokens: int, **_: Any) -> Any:
            message = SimpleNamespace(content=answering(messages, max_tokens))
            return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    monkeypatch.setattr(autointerp, "OpenAI", Client)
    monkeypatch.chdir(setting.data_folder)
    with torch.no_grad():
        stock = autointerp.run_eval(
            bench_config(CONFIG, LONG_TEXT, setting),
            [(name, make()) for name, make in counted.makers.items()],
            "cpu",
            "",
            str(tmp_path / "stock"),
            artifacts_path=str(tmp_path / "stock-artifacts"),
        )
    monkeypatch.setattr(LexicalJudge, "answer", lambda self, messages, n, accepts=None: answering(messages, n))
    files = run_on(counted, setting, tmp_path / "out")
    for name, path in files.items():
        expected = stock[f"{name}_custom_sae"]
        for metric, value in expected["eval_result_metrics"]["autointerp"].items():
            assert read_metrics(path)[metric] == pytest.approx(value, abs=SAME_SCORE)
        found = json.loads(path.read_text())["eval_result_unstructured"]
        for latent, one in expected["eval_result_unstructured"].items():
            del one["logs"]
            assert found[str(latent)] == one


# ---------------------------------------------------------------- the model runs once


def test_the_model_runs_once_for_all(
    counted: CountedPanel, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the scores are those without a cache, or with one that holds a part."""
    runs: list[int] = []
    original = HookedTransformer.forward
    monkeypatch.setattr(
        HookedTransformer, "forward", lambda self, *args, **options: runs.append(1) or original(self, *args, **options)
    )
    found = {}
    # safetensors' header takes a hundred bytes of a file.
    batch_bytes = 64 * CONTEXT_TOKENS * D_MODEL * 4 + 200
    caches = {
        "none": None,
        "part": TensorCache(tmp_path / "part", 2 * batch_bytes),
        "whole": TensorCache(tmp_path / "whole", 10**9),
    }
    for name, cache in caches.items():
        runs.clear()
        files = run_on(counted, replace(setting, cache=cache), tmp_path / f"out-{name}")
        found[name] = len(runs), [path.read_text().split("eval_result_metrics")[1] for path in files.values()]
    n_batches = found["whole"][0]
    assert n_batches > 2
    assert found["none"][0] == 4 * n_batches, "twice for each of two"
    assert found["part"][0] == 4 * n_batches - 2 * 3, "two batches are kept"
    assert found["none"][1] == found["part"][1] == found["whole"][1]
    runs.clear()
    run_on(counted, replace(setting, cache=caches["whole"]), tmp_path / "later")
    assert runs == [], "nor for a later panel"


def test_saebench_and_the_model_are_as_before(words: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    names = ("OpenAI", "AutoInterp", "AutoInterpEvalOutput")
    before = [getattr(autointerp, name) for name in names], HookedTransformer.run_with_cache, Path.cwd()
    load = autointerp.dataset_utils.load_and_tokenize_dataset
    run_on(words, setting, tmp_path / "out")
    with pytest.raises(EvaluationError):
        run_on(words, setting, tmp_path / "out", changed(dead_latent_threshold=1e6))
    assert ([getattr(autointerp, name) for name in names], HookedTransformer.run_with_cache, Path.cwd()) == before
    assert autointerp.dataset_utils.load_and_tokenize_dataset is load


# ---------------------------------------------------------------- reuse


def test_second_call_reuses(words: CountedPanel, setting: EvalSetting, model_loads: list[str], tmp_path: Path) -> None:
    files = run_on(words, setting, tmp_path / "out")
    words.loads.clear()
    model_loads.clear()
    assert run_on(words, setting, tmp_path / "out") == files
    assert (words.loads, model_loads) == ([], [])


CHANGES = {
    "latents": {"n_latents": 5},
    "tokens": {"total_tokens": 2000},
    "context": {"context_tokens": 10},
    "texts": {"n_random_ex_for_scoring": 5},
    "fewest": {"min_latents": 5},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_config_is_computed_anew(
    change: dict[str, Any], words: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    files = run_on(words, setting, tmp_path / "out")
    again = run_on(words, setting, tmp_path / "out", changed(**change))
    assert words.loads == ["words", "words"]
    assert again["words"] != files["words"]


def test_data_of_the_same_name_are_tokenized_anew(words: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    """SAEBench keeps tokens by the model's name and their number alone."""
    for data_hash in ("one", "two", "one"):
        run_on(words, replace(setting, data_hash=data_hash), tmp_path / "out")
    assert len(list(setting.artifacts.rglob("*_tokens_*.pt"))) == 2


# ---------------------------------------------------------------- latents that cannot be judged


def test_fewer_latents_than_asked(
    words: CountedPanel, setting: EvalSetting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nineteen words, and hundreds of latents wanted."""
    with caplog.at_level(logging.WARNING, "ksvd_sae"):
        files = run_on(words, setting, tmp_path / "out", changed(n_latents=300, min_latents=4))
    latents = json.loads(files["words"].read_text())["judge"]["latents"]
    assert latents["wanted"] == 300
    assert 10 < latents["judged"] <= len(WORDS)
    assert f"{latents['judged']} of 300 latents can be judged" in caplog.text


def test_too_few_latents(counted: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"(?s)no score for words.*too few.*got: 19.*min_latents: 20.*cure") as e:
        run_on(counted, setting, tmp_path / "out", changed(n_latents=300, min_latents=20))
    assert "topk-sae" not in str(e.value).splitlines()[0]
    assert len(list((tmp_path / "out").rglob("topk-sae-*"))) == 1, "the other is scored"


def test_too_little_text(words: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"(?s)long-text has too little text.*total_tokens: 9,000.*cure"):
        run_on(words, setting, tmp_path / "out", changed(total_tokens=9000))


# ---------------------------------------------------------------- the panel, and places to run in


def test_panel_rows(words: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    config = changed(n_latents=300, min_latents=4)
    (results,) = run_evals(words.panelists(), [config], setting, tmp_path / "out")
    assert results.seed == 42
    facts = {"words": {"view": "signed", "d_sae": 19, "k": 4, "l0": 4.0, "seed": 0}}
    rows = tidy_rows(results, facts, tmp_path / "out")
    assert {row["metric"] for row in rows} == {"autointerp_score", "autointerp_std_dev"}
    assert {(row["eval"], row["data"]) for row in rows} == {("autointerp", f"{LONG_TEXT}, judge: lexical")}
    assert all(10 < row["n"] <= len(WORDS) for row in rows), "latents that were judged, not those wanted"
    assert all((tmp_path / "out" / "autointerp" / row["source"]).exists() for row in rows)


def test_from_inside_an_event_loop(words: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    """As in a notebook."""

    async def cell() -> dict[str, Path]:
        return run_on(words, setting, tmp_path / "inside")

    files = run_on(words, setting, tmp_path / "outside")
    inside = asyncio.run(cell())
    assert [read_metrics(path) for path in inside.values()] == [read_metrics(path) for path in files.values()]


def test_one_that_fails_leaves_the_others_result(setting: EvalSetting, tmp_path: Path) -> None:
    class Broken(DBKSVDSAE):
        def encode(self, x: Tensor) -> Tensor:
            raise RuntimeError("this code is broken")

    counted = CountedPanel({"broken": lambda: Broken(tiny_db_ksvd_sae().cfg), "topk-sae": tiny_topk_sae})
    with pytest.raises(EvaluationError, match=r"(?s)no score for broken\n.*this code is broken"):
        run_on(counted, setting, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("topk-sae-*.json"))) == 1


def test_results_name_no_place_and_no_commit(
    words: CountedPanel, setting: EvalSetting, checkout: Path, tmp_path: Path
) -> None:
    for path in run_on(words, setting, Path(os.path.relpath(tmp_path / "out"))).values():
        text = path.read_text()
        assert COMMIT not in text
        assert str(tmp_path) not in text
        assert str(Path.home()) not in text


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_on_or_off_as_before(
    enabled: bool, words: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    with torch.set_grad_enabled(enabled):
        run_on(words, setting, tmp_path / "out")
        assert torch.is_grad_enabled() == enabled
