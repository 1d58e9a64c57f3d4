"""SAEBench's absorption on a tiny model: SAEBench's own scores, seeded, cached by content, and no failure unnoticed."""

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import sae_bench
import torch
from sae_bench.evals.absorption import common, feature_absorption
from sae_bench.evals.absorption import main as stock
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sklearn.exceptions import UndefinedMetricWarning
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.absorption import AbsorptionEval
from ksvd_sae.evals.absorption import probes as absorption_probes
from ksvd_sae.evals.absorption.adapters import WordActivations, own_words, stopped_at_the_hook
from ksvd_sae.evals.absorption.run import run_absorption, words_scored
from ksvd_sae.evals.absorption.vocabulary import Vocabulary
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.evals.panel import run_evals
from ksvd_sae.evals.saebench.adapters import random_states_kept, seed_all
from ksvd_sae.evals.saebench.runner import read_metrics
from ksvd_sae.replaced import replaced
from ksvd_sae.sae import DBKSVDSAE
from tests import tiny_models
from tests.evals.conftest import CountedPanel
from tests.tiny_letters import (
    HOOK,
    LETTERS,
    MODEL_NAME,
    ODD,
    WORDS,
    letters_db_ksvd_sae,
    letters_model,
    letters_tokenizer,
    letters_topk_sae,
    spaced_tokenizer,
)
from tests.tolerances import SAEBENCH_SCORE
from tests.upstream import mended, still_raises

# A latent that never fires has no precision: sklearn says so of most of them.
pytestmark = pytest.mark.filterwarnings(f"ignore::{UndefinedMetricWarning.__module__}.UndefinedMetricWarning")
CONFIG = AbsorptionEval(max_k_value=2, k_sparse_probe_num_epochs=20, precalc_k_sparse_probe_sae_acts=True)
PANEL = {"db-ksvd": letters_db_ksvd_sae, "topk-sae": letters_topk_sae}
PACKAGE = Path(sae_bench.__path__[0])
SCORES = ("mean_absorption_fraction_score", "mean_full_absorption_score")


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return letters_model(letters_tokenizer(odd=True))


@pytest.fixture(scope="module")
def loads(model: HookedTransformer) -> Iterator[list[str]]:
    """Makes the tiny model the one that is found by name; the names that were asked for."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def load(name: str, dtype: torch.dtype, **options: Any) -> HookedTransformer:
            asked.append(name)
            return model if dtype == torch.float32 else letters_model(model.tokenizer).to(dtype)

        patch.setattr(HookedTransformer, "from_pretrained_no_processing", load)
        # SAEBench collects garbage after every SAE: a second each time, in a process with so many modules.
        patch.setattr(stock, "gc", SimpleNamespace(collect=lambda: 0))
        yield asked


@pytest.fixture(autouse=True)
def _model_is_found(loads: list[str]) -> None:
    loads.clear()


class Run:
    """One place where the eval runs: cache and results."""

    def __init__(self, folder: Path):
        self.folder = folder
        cache = TensorCache(folder / "llm", 10**8)
        self.setting = EvalSetting(MODEL_NAME, "float32", "cpu", folder, "0123456789ab", folder / "artifacts", cache)

    def __call__(
        self, makers: dict[str, Any] | CountedPanel = PANEL, config: AbsorptionEval = CONFIG, **setting: Any
    ) -> dict[str, Path]:
        counted = makers if isinstance(makers, CountedPanel) else CountedPanel(makers)
        return run_absorption(counted.panelists(), config, replace(self.setting, **setting), self.folder).files

    @property
    def probes(self) -> list[Path]:
        return sorted(self.setting.artifacts.rglob("probe.pth"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def package_files() -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, loads: list[str]) -> tuple[Run, dict[str, Path], dict[str, Any]]:
    """The panel scored once, results not to be changed; what the run left behind."""
    place = Run(tmp_path_factory.mktemp("absorption"))
    seed_all(123)
    before = package_files(), random.getstate(), np.random.get_state()[1].tolist()
    files = place()
    after = package_files(), random.getstate(), np.random.get_state()[1].tolist()
    return place, files, {"before": before, "after": after}


# ---------------------------------------------------------------- the scores


def test_results(finished: tuple[Run, dict[str, Path], Any]) -> None:
    _, files, _ = finished
    for path in files.values():
        result = json.loads(path.read_text())
        assert result["eval_type_id"] == "absorption_first_letter"
        assert len(result["eval_result_details"]) >= CONFIG.min_feats_for_eval
        scores = read_metrics(path)
        assert {name for name in scores if not name.startswith("std_dev")} == {*SCORES, "mean_num_split_features"}
        assert all(value is not None and math.isfinite(value) for value in scores.values())
        assert all(0 <= scores[score] <= 1 for score in SCORES)
    assert all(0 < read_metrics(files["topk-sae"])[score] < 1 for score in SCORES), (
        "the case must have what is absorbed"
    )
    assert read_metrics(files["db-ksvd"]) != read_metrics(files["topk-sae"])
    assert words_scored(files["db-ksvd"]) == words_scored(files["topk-sae"]) > 50


def test_odd_words_are_left_out_and_counted(finished: tuple[Run, dict[str, Path], Any]) -> None:
    """SAEBench itself stops at such a word, as ``test_saebench_stops_at_an_odd_word`` shows."""
    _, files, _ = finished
    n_words = len(WORDS) + 26 + len(("has", "the", "first", "letter")) + len(("qq", "zz"))
    for path in files.values():
        assert json.loads(path.read_text())["eval_result_unstructured"] == {
            "words_in_vocabulary": n_words + 1,
            "words_left_out": 1,
            "words_left_out_such_as": [ODD],
            "words_used": n_words,
        }


def test_nothing_else_is_changed(finished: tuple[Run, dict[str, Path], dict[str, Any]]) -> None:
    """The installed package, the random states (torch's are drawn from to make the SAEs) and SAEBench's functions."""
    _, _, states = finished
    assert states["before"] == states["after"]
    assert feature_absorption.FeatureAbsorptionCalculator.__module__.startswith("sae_bench")
    for function in (stock.run_k_sparse_probing_experiment, common.get_alpha_tokens, HookedTransformer.run_with_cache):
        assert not function.__module__.startswith("ksvd_sae")


def test_results_name_no_place_of_this_machine(finished: tuple[Run, dict[str, Path], Any]) -> None:
    place, files, _ = finished
    for path in files.values():
        assert str(place.folder) not in path.read_text()
        assert str(Path.home()) not in path.read_text()


def saebench_itself(folder: Path, words: list[str], config: AbsorptionEval, model: Any) -> dict[str, Any]:
    """SAEBench's own run of the whole model for each SAE: only told its words and folders, and seeded three times."""
    probe, absorb = stock.run_k_sparse_probing_experiment, stock.run_feature_absortion_experiment
    tables = {"sparse_probing_experiment_dir": folder / "tables", "probes_dir": folder / "probes"}

    def seeded_probe(**options: Any) -> Any:
        seed_all(config.seed)
        common.load_or_train_probe(
            model, config.prompt_template, config.prompt_token_pos, options["layer"], folder / "probes", device="cpu"
        )
        seed_all(config.seed)
        return probe(experiment_dir=folder / "tables", probes_dir=folder / "probes", **options)

    def seeded_absorb(**options: Any) -> Any:
        seed_all(config.seed)
        return absorb(experiment_dir=folder / "absorption", **tables, **options)

    eval_config = AbsorptionEvalConfig(
        model_name=MODEL_NAME,
        max_k_value=config.max_k_value,
        k_sparse_probe_num_epochs=config.k_sparse_probe_num_epochs,
        precalc_k_sparse_probe_sae_acts=config.precalc_k_sparse_probe_sae_acts,
    )
    with pytest.MonkeyPatch.context() as patch, random_states_kept():
        patch.chdir(folder)
        patch.setattr(common, "get_alpha_tokens", lambda tokenizer: words)
        patch.setattr(feature_absorption, "get_alpha_tokens", lambda tokenizer: words)
        patch.setattr(stock, "run_k_sparse_probing_experiment", seeded_probe)
        patch.setattr(stock, "run_feature_absortion_experiment", seeded_absorb)
        saes = [(name, make()) for name, make in PANEL.items()]
        return stock.run_eval(eval_config, saes, "cpu", str(folder))


def test_scores_are_saebenchs(finished: tuple[Run, dict[str, Path], Any], model: Any, tmp_path: Path) -> None:
    _, files, _ = finished
    words = vocabulary(model.tokenizer).words
    results = saebench_itself(tmp_path, words, CONFIG, model)
    for name, path in files.items():
        ours, theirs = json.loads(path.read_text()), results[f"{name}_custom_sae"]
        assert theirs["eval_result_unstructured"] is None, mended(
            "sae_bench.evals.absorption.main.AbsorptionEvalOutput"
        )
        assert read_metrics(path) == pytest.approx(theirs["eval_result_metrics"]["mean"], abs=SAEBENCH_SCORE)
        assert len(ours["eval_result_details"]) == len(theirs["eval_result_details"])
        for own, other in zip(ours["eval_result_details"], theirs["eval_result_details"], strict=True):
            assert own.pop("first_letter") == other.pop("first_letter")
            assert own == pytest.approx(other, abs=SAEBENCH_SCORE)


def test_saebench_stops_at_an_odd_word(model: Any, tmp_path: Path) -> None:
    """The reason to leave such words out."""
    words = [*vocabulary(model.tokenizer).words[:60], ODD]
    calculator = feature_absorption.FeatureAbsorptionCalculator(
        model=model, icl_word_list=words[:12], max_icl_examples=10, base_template=CONFIG.prompt_template
    )
    module = "sae_bench.evals.absorption."
    targets = (module + "common.get_alpha_tokens", module + "feature_absorption.get_alpha_tokens")
    with still_raises(ValueError, "same token length", *targets):
        calculator.calculate_absorption(letters_topk_sae(), [words[20], ODD], torch.ones(32), [0], 0)


def test_defaults_are_saebenchs() -> None:
    theirs = AbsorptionEvalConfig()
    renamed = {"min_GT_probe_f1": "min_gt_probe_f1", "llm_batch_size": "llm_batch_contexts", "random_seed": "seed"}
    for field in fields(theirs):
        if field.name not in ("model_name", "llm_dtype"):
            ours = getattr(AbsorptionEval(), renamed.get(field.name, field.name))
            assert ours == getattr(theirs, field.name), field.name


# ---------------------------------------------------------------- reuse


def test_scores_do_not_depend_on_what_is_there_already(
    finished: tuple[Run, dict[str, Path], Any], run: Run, loads: list[str]
) -> None:
    """One of the panel by itself elsewhere; then with probes found on disk, no gradients and another seed of the
    process."""
    _, files, _ = finished
    panel = {"topk-sae": letters_topk_sae}
    assert next(iter(files)) != "topk-sae"
    wanted = read_metrics(files["topk-sae"])
    seed_all(5)
    again = run(panel)
    assert read_metrics(again["topk-sae"]) == wanted
    assert loads == [MODEL_NAME]
    (probes,) = run.probes
    made = probes.stat().st_mtime_ns
    again["topk-sae"].unlink()
    seed_all(6)
    with torch.no_grad():
        assert read_metrics(run(panel)["topk-sae"]) == wanted
        assert not torch.is_grad_enabled()
    assert probes.stat().st_mtime_ns == made


def test_second_call_reuses(finished: tuple[Run, dict[str, Path], Any], loads: list[str]) -> None:
    place, files, _ = finished
    before = {path: path.read_bytes() for path in files.values()}
    counted = CountedPanel(PANEL)
    # What changes no score makes no new result.
    assert place(counted, CONFIG.model_copy(update={"llm_cache_bytes": 7})) == files
    assert counted.loads == []
    assert loads == []
    assert {path: path.read_bytes() for path in files.values()} == before


@pytest.mark.parametrize(
    ("change", "setting", "new_probes"),
    [
        ({"f1_jump_threshold": 0.5}, {}, False),
        ({"seed": 7}, {}, True),
        ({"vocabulary_sample": 200}, {}, True),
        ({"prompt_template": "{word} begins with the letter:"}, {}, True),
        ({}, {"dtype": "bfloat16"}, True),
        ({}, {"model_name": "another"}, True),
        ({}, {"weights": OwnWeights(Path("folder"), "folder", None, "c0ffee")}, True),
        ({}, {"prepend_bos": False}, True),
    ],
    ids=["of the scores", "seed", "sample", "prompt", "dtype", "model", "weights", "BOS"],
)
def test_what_is_found_again_was_made_from_the_same(
    change: dict[str, Any], setting: dict[str, Any], new_probes: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def scored(config: AbsorptionEvalConfig, saes: list[Any], device: str, output: str) -> None:
        empty = {"eval_result_metrics": {}, "eval_result_details": []}
        (Path(output) / f"{saes[0][0]}_custom_sae_eval_results.json").write_text(json.dumps(empty))

    original = absorption_probes.LetterProbes
    monkeypatch.setattr(stock, "run_eval", scored)
    monkeypatch.setattr(absorption_probes, "LetterProbes", lambda *a: folders.append(a[1]) or original(*a))
    panel = {"topk-sae": letters_topk_sae}
    first, second = run(panel), run(panel, CONFIG.model_copy(update=change), **setting)
    assert first != second
    assert (folders[0] != folders[1]) == new_probes


def test_another_dtype_is_scored(run: Run) -> None:
    (path,) = run({"topk-sae": letters_topk_sae}, dtype="bfloat16").values()
    result = json.loads(path.read_text())
    assert result["eval_config"]["llm_dtype"] == "bfloat16"
    assert result["sae_cfg_dict"]["d_sae"] == 64
    assert 0 < read_metrics(path)["mean_absorption_fraction_score"] < 1


@pytest.mark.parametrize("left", ["interrupted", "no data", "half of the probe"])
def test_probes_of_an_interrupted_run_are_made_again(
    left: str, finished: tuple[Run, dict[str, Path], Any], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished[0].probes[0].parent
    target = tmp_path / MODEL_NAME / "layer_0"
    probes = absorption_probes.LetterProbes(CONFIG, tmp_path, "cpu")
    words = vocabulary(model.tokenizer).words
    if left == "interrupted":
        original = common.save_probe_and_data

        def interrupt(probe: Any, data: Any, probing_path: Path) -> None:
            original(probe, data, probing_path)
            raise KeyboardInterrupt

        monkeypatch.setattr(common, "save_probe_and_data", interrupt)
        with replaced(own_words(lambda tokenizer: words)), pytest.raises(KeyboardInterrupt):
            probes.make_ready(model, 0)
        monkeypatch.setattr(common, "save_probe_and_data", original)
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    else:
        shutil.copytree(whole, target)
        broken = target / ("data.npz" if left == "no data" else "probe.pth")
        half = broken.read_bytes()[:200]
        broken.unlink()
        if left != "no data":
            broken.write_bytes(half)
    with replaced(own_words(lambda tokenizer: words)):
        probes.make_ready(model, 0)
    assert {p.name for p in target.iterdir()} == {"probe.pth", "data.npz", "train_df.csv", "test_df.csv"}
    made_again, wanted = (common.load_probe(MODEL_NAME, 0, folder) for folder in (tmp_path, whole.parent.parent))
    assert torch.equal(made_again.weights, wanted.weights)
    assert (target / "test_df.csv").read_text() == (whole / "test_df.csv").read_text()


# ---------------------------------------------------------------- failures


class Broken(DBKSVDSAE):
    def encode(self, x: Tensor) -> Tensor:
        raise RuntimeError("this code is broken")


def test_those_that_cannot_be_scored_leave_the_others_result(finished: tuple[Run, dict[str, Path], Any]) -> None:
    place, _, _ = finished
    makers = {
        "broken": lambda: Broken(letters_db_ksvd_sae().cfg),
        "mlp": partial(letters_topk_sae, hook="blocks.0.hook_mlp_out"),
        "small": partial(letters_topk_sae, 8),
        "last": partial(letters_topk_sae, seed=3),
        "topk-sae": letters_topk_sae,
    }
    with pytest.raises(EvaluationError) as caught:
        place(makers)
    message = str(caught.value)
    assert message.splitlines()[0] == "absorption: no score for broken, mlp, small"
    assert "this code is broken" in message
    assert "hook 'blocks.0.hook_mlp_out'" in message
    assert "too few latents" in message
    assert len(list((place.folder / "absorption").rglob("last-*.json"))) == 1


def test_too_few_letters(run: Run, model: Any, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = letters_model(letters_tokenizer(), strength=0.0)
    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", lambda name, **options: deaf)
    counted = CountedPanel({**PANEL, "third": letters_topk_sae})
    trained: list[Any] = []
    monkeypatch.setattr(stock, "run_k_sparse_probing_experiment", lambda **options: trained.append(options))
    with pytest.raises(EvaluationError) as caught:
        run(counted)
    message = str(caught.value)
    assert message.splitlines()[0] == "absorption: no score for db-ksvd, topk-sae, third"
    assert "layer 0 find too few letters" in message
    assert "letters with F1 over 0.6 on" in message
    assert "min_feats_for_eval: 20" in message
    assert "raise evaluation.absorption.vocabulary_sample" in message
    # Said once, and before a dictionary is probed.
    assert message.count("min_feats_for_eval: 20") == 1
    assert trained == []


def test_a_letter_without_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before the LLM runs; SAEBench would end with a KeyError afterwards."""
    tokenizer = letters_tokenizer(tuple(word for word in WORDS if word[0] != "x"))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert "X" in backend["model"]["vocab"]
    monkeypatch.setattr(common, "get_alpha_tokens", lambda tokenizer: [])
    words = [word for word in vocabulary(tokenizer).words if word != "X"]
    monkeypatch.setattr(Vocabulary, "words", words)
    with pytest.raises(EvaluationError, match=r"(?s)no training word begins with x\n.*vocabulary_sample"):
        run({"topk-sae": letters_topk_sae})


# ---------------------------------------------------------------- the words


def vocabulary(tokenizer: Any, sample: int | None = None, seed: int = 42, position: int = -6) -> Vocabulary:
    return Vocabulary(tokenizer, CONFIG.prompt_template, position, sample, seed)


def test_words_do_not_depend_on_the_vocabularys_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers give their vocabulary in another order at every call."""
    tokenizer = letters_tokenizer(odd=True)
    shuffled = dict(random.Random(1).sample(list(tokenizer.get_vocab().items()), len(tokenizer)))
    first = vocabulary(tokenizer, sample=100).words
    monkeypatch.setattr(type(tokenizer), "vocab", property(lambda self: shuffled))
    assert list(tokenizer.vocab) == list(shuffled)
    assert vocabulary(tokenizer, sample=100).words == first
    assert len(set(first)) == 100
    assert vocabulary(tokenizer, sample=100, seed=1).words != first


def test_a_sample_is_even_over_letters() -> None:
    """As they come, rare letters would have no words to learn from; a letter with too few gives all that it has."""
    few = tuple(word for word in WORDS if word[0] != "x" or word in ("xba", "xbo"))
    counts = Counter(word[0].lower() for word in vocabulary(letters_tokenizer(few), sample=26 * 8).words)
    # With "X", the answer to its prompt.
    assert counts.pop("x") == 3
    assert sum(counts.values()) == 26 * 8 - 3
    assert set(counts.values()) == {8, 9}


def test_more_words_than_there_are() -> None:
    with pytest.raises(EvaluationError, match=r"(?s)fewer words.*vocabulary_sample: 9999"):
        vocabulary(letters_tokenizer(), sample=9999).words  # noqa: B018


@pytest.mark.parametrize(
    ("tokenizer", "position"),
    [(letters_tokenizer, -5), (tiny_models.byte_pair_tokenizer, -6)],
    ids=["another token of the prompt", "a prompt of other tokens"],
)
def test_a_position_that_is_not_the_words(tokenizer: Any, position: int) -> None:
    """SAEBench would read activations of another token, of all words."""
    with pytest.raises(EvaluationError, match=r"(?s)not one token at the place.*prompt_token_pos"):
        vocabulary(tokenizer(), position=position).words  # noqa: B018


def test_words_stay_as_they_are_behind_a_tokenizer_that_drops_spaces() -> None:
    """Llama's: SAEBench makes the words into strings again, which takes their leading space."""
    from tokenizers import decoders

    tokenizer = letters_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    table = SimpleNamespace(iloc=[{"token": " apple"}, {"token": "nan"}])
    parse = partial(
        lambda: common._parse_probe_data_split(tokenizer, torch.zeros(2, 1), split_labels=[0, 13], df=table)
    )
    assert parse()[1][0] == ("apple", 0), mended("sae_bench.evals.absorption.common._parse_probe_data_split")
    with replaced(own_words(lambda tokenizer: [])):
        assert parse()[1] == [(" apple", 0), ("nan", 13)]


# ---------------------------------------------------------------- adapters


def test_a_pass_that_is_stopped_gives_the_same(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["abda has the first letter:", "zeta has the first letter:"]
    whole = model.run_with_cache(prompts, names_filter=[HOOK])[1][HOOK]
    later: list[Any] = []
    handle = model.blocks[1].register_forward_hook(lambda *arguments: later.append(arguments))
    try:
        with replaced(stopped_at_the_hook()):
            stopped = model.run_with_cache(prompts, names_filter=[HOOK])[1][HOOK]
            assert torch.equal(stopped, whole)
            assert later == []
            # What is not a list of hooks in blocks runs through.
            model.run_with_cache(prompts, names_filter=[HOOK, "hook_embed"])
            model.run_with_cache(prompts, names_filter=lambda name: name == HOOK)
        assert len(later) == 2
    finally:
        handle.remove()


@pytest.mark.parametrize(("limit_bytes", "passes"), [(10_000, 2), (200, 3), (0, 4)])
def test_the_llm_runs_once_while_there_is_room(limit_bytes: int, passes: int) -> None:
    calls: list[Any] = []

    def run_with_cache(prompts: list[str], names_filter: list[str]) -> Any:
        calls.append(prompts)
        values = torch.tensor([[float(len(p) + i) for i in range(8)] for p in prompts])
        return None, {names_filter[0]: values[:, :, None].expand(-1, -1, 16)}

    memory, model = WordActivations(limit_bytes), SimpleNamespace(run_with_cache=run_with_cache)
    for _ in range(2):
        for prompts in (["one", "three"], ["fourteen", "six"]):
            rows_BD = memory.rows(model, prompts, HOOK, -6)
            assert rows_BD.tolist() == [[len(p) + 2.0] * 16 for p in prompts]
    assert len(calls) == passes
    assert memory.n_bytes <= limit_bytes
    assert memory.rows(model, ["one", "three"], "another hook", -6).shape == (2, 16)
    assert len(calls) == passes + 1, "another hook's activations are others"


def test_the_llm_runs_once_for_a_panel(finished: tuple[Run, dict[str, Path], Any], model: Any) -> None:
    """As often for two dictionaries as for one. The probes are there already."""
    place, _, _ = finished
    calls: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda *arguments: calls.append(1))
    counts = []
    try:
        for names in (("a",), ("b", "c")):
            calls.clear()
            place(dict.fromkeys(names, letters_topk_sae))
            counts.append(len(calls))
    finally:
        handle.remove()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("style", ["pythia", "llama"])
def test_tokenizers_whose_words_carry_their_space(
    style: Literal["pythia", "llama"], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pythia's writes a space as Ġ; Llama's as ▁, and drops it at the start of a text that it decodes."""
    spaced = letters_model(spaced_tokenizer(style))
    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: spaced)
    files = run({"topk-sae": letters_topk_sae})
    result = json.loads(files["topk-sae"].read_text())
    assert result["eval_result_unstructured"]["words_used"] == len(WORDS) + len(LETTERS) + len(
        ("has", "the", "first", "letter")
    )
    assert result["eval_result_unstructured"]["words_left_out"] == 0
    letters = {detail["first_letter"] for detail in result["eval_result_details"]}
    assert len(letters) >= CONFIG.min_feats_for_eval
    assert all(
        value is not None and 0 <= value <= 1 for value in (read_metrics(files["topk-sae"])[name] for name in SCORES)
    )


@pytest.mark.parametrize("leave", ["normally", "by exception"])
def test_random_states_are_put_back(leave: str) -> None:
    seed_all(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def inside() -> None:
        with random_states_kept():
            seed_all(4)
            if leave == "by exception":
                raise RuntimeError("out")

    if leave == "normally":
        inside()
    else:
        with pytest.raises(RuntimeError, match="out"):
            inside()
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


# ---------------------------------------------------------------- the panel


@pytest.mark.parametrize(("sample", "data"), [(None, "vocabulary"), (400, "vocabulary sample of 400")])
def test_in_a_panel(sample: int | None, data: str, finished: tuple[Run, dict[str, Path], Any]) -> None:
    place, files, _ = finished
    absorption = CONFIG.model_copy(update={"vocabulary_sample": sample})
    counted = CountedPanel({"topk-sae": letters_topk_sae})
    (results,) = run_evals(counted.panelists(), [absorption], place.setting, place.folder)
    assert (results.eval, results.data) == ("absorption", data)
    assert (results.files["topk-sae"] == files["topk-sae"]) == (sample is None)
    assert results.metrics["topk-sae"] == read_metrics(results.files["topk-sae"])
    result = json.loads(results.files["topk-sae"].read_text())
    n_words = result["eval_result_unstructured"]["words_used"]
    assert n_words == (sample or n_words)
    # A fifth of the words is for the test; the probes do not find all letters.
    assert n_words / 10 < results.n <= n_words / 5 + 1
