"""What SAEBench does today, for which something else stands in its place (``ksvd_sae.replaced``).

Each test runs SAEBench's own code: as it is, or, where it would not come so far, with every replacement but the one in
question. A failure that says "upstream has mended this" is good news: the replacement can go.
"""

import asyncio
import inspect
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pandas as pd
import pytest
import sae_bench
import sklearn.metrics
import torch
from sae_bench.evals.absorption import feature_absorption, k_sparse_probing, probing
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.absorption.prompting import first_letter_formatter
from sae_bench.evals.absorption.vocab import LETTERS
from sae_bench.evals.autointerp import main as autointerp
from sae_bench.evals.core import main as core
from sae_bench.evals.ravel import intervention
from sae_bench.evals.ravel import main as ravel
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.ravel.instance import RAVELInstance
from sae_bench.evals.scr_and_tpp import main as scr
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import activation_collection, dataset_utils, general_utils
from sae_probes import generate_model_activations as sae_probes_activations
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.evals.autointerp.run import bench_config
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.ravel import adapters as ravel_adapters
from ksvd_sae.evals.saebench.adapters import heads_flattened, random_states_kept, seed_all, working_directory
from ksvd_sae.evals.scr.adapters import bias_in_bios_datasets
from ksvd_sae.evals.scr.run import PROFESSIONS
from ksvd_sae.evals.sparse_probing.adapters import labelled_text_datasets, llm_probes_apart
from ksvd_sae.evals.sparse_probing.run import LABELS
from ksvd_sae.replaced import Changes, replaced, resolve
from tests.evals.autointerp.test_lexical import CFG, example
from tests.evals.autointerp.tiny_autointerp import CONFIG as AUTOINTERP
from tests.evals.conftest import BIASED, CLASSES, LONG_TEXT, TEXT
from tests.evals.test_ravel import entity_tokens, offered, stock_config
from tests.evals.test_saebench import NotANumber
from tests.tiny_letters import MODEL_NAME as LETTERS_MODEL_NAME
from tests.tiny_letters import WORDS, letters_model, letters_tokenizer, letters_topk_sae
from tests.tiny_ravel import tiny_language_model, write_prompts
from tests.tiny_saes import (
    CONTEXT_TOKENS,
    HOOK,
    MODEL_NAME,
    one_thread,
    tiny_db_ksvd_sae,
    tiny_model,
    tiny_tokenizer,
    tiny_topk_sae,
)
from tests.upstream import mended, still_raises

ABSORPTION, AUTOINTERP_MAIN = "sae_bench.evals.absorption.", "sae_bench.evals.autointerp.main."
RAVEL, UTILS = "sae_bench.evals.ravel.", "sae_bench.sae_bench_utils."
RUN_WITH_CACHE = "transformer_lens.HookedTransformer.run_with_cache"


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """SAEBench seeds, and switches gradients, for the whole process."""
    with random_states_kept(), torch.set_grad_enabled(torch.is_grad_enabled()):
        yield


def as_saebench_takes_it(sae: Any) -> Any:
    """With the layer and the hook's name in its configuration, where SAEBench puts them."""
    return general_utils.load_and_format_sae("sae", sae, "cpu")[1]


# ---------------------------------------------------------------- core


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_core_writes_minus_one_for_nan(setting: EvalSetting, tmp_path: Path) -> None:
    with working_directory(setting.data_folder):
        core.multiple_evals(
            [("broken", NotANumber(tiny_db_ksvd_sae().cfg))],
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            dataset=TEXT,
            context_size=CONTEXT_TOKENS,
            output_folder=str(tmp_path),
            device="cpu",
        )
    (path,) = tmp_path.glob("*_eval_results.json")
    scores = json.loads(path.read_text())["eval_result_metrics"]["model_performance_preservation"]
    assert scores["ce_loss_score"] == -1, mended("sae_bench.evals.core.main.replace_nans_with_negative_one")


# ---------------------------------------------------------------- sparse probing, SCR


@pytest.mark.parametrize(
    ("missing", "error", "match"),
    [
        (UTILS + "dataset_info.chosen_classes_per_dataset", KeyError, CLASSES),
        (UTILS + "dataset_utils.get_multi_label_train_test_data", ValueError, "not supported"),
    ],
    ids=["labels", "reader"],
)
def test_sparse_probing_has_a_closed_list_of_data_sets(
    missing: str, error: type[Exception], match: str, setting: EvalSetting
) -> None:
    others = {target: value for target, value in labelled_text_datasets(LABELS).items() if target != missing}
    config = SparseProbingEvalConfig(
        model_name=MODEL_NAME, probe_train_set_size=40, probe_test_set_size=20, context_length=CONTEXT_TOKENS
    )
    with working_directory(setting.data_folder), replaced(others), still_raises(error, match, missing):
        sparse_probing.get_dataset_activations(CLASSES, config, tiny_model(), 16, 0, HOOK, "cpu")


def test_sparse_probing_scores_depend_on_what_was_there(setting: EvalSetting, tmp_path: Path) -> None:
    config = SparseProbingEvalConfig(
        **{"model_name": MODEL_NAME, "llm_dtype": "float32", "llm_batch_size": 16, "k_values": [1]},
        **{"probe_train_set_size": 40, "probe_test_set_size": 20, "context_length": CONTEXT_TOKENS},
        dataset_names=[CLASSES],
    )

    _, sae, _ = general_utils.load_and_format_sae("sae", tiny_topk_sae(), "cpu")

    def scores(*changes: Changes) -> list[list[float]]:
        artifacts = str(tmp_path / f"{len(changes)}")
        with working_directory(setting.data_folder), replaced(labelled_text_datasets(LABELS), *changes):
            found = [
                sparse_probing.run_eval_single_sae(config, sae, tiny_model(), "cpu", artifacts)[0] for _ in range(2)
            ]
        return [[value for value in once.values() if isinstance(value, float)] for once in found]

    first, again = scores(llm_probes_apart())
    assert first == again
    stock, then = scores()
    assert then == again
    assert stock != then, mended(
        "sae_bench.evals.sparse_probing.main.get_dataset_activations, "
        "sae_bench.sae_bench_utils.activation_collection.get_sae_meaned_activations"
    )


def test_heads_are_not_flattened(setting: EvalSetting) -> None:
    target, hook = "transformer_lens.hook_points.HookPoint.add_hook", "blocks.0.attn.hook_z"
    tokens = torch.ones(2, 5, dtype=torch.long)
    with still_raises(Exception, "return value|dimensions", target):
        activation_collection.get_llm_activations(tokens, tiny_model(), 2, 0, hook)
    with replaced(heads_flattened()):
        found = activation_collection.get_llm_activations(tokens, tiny_model(), 2, 0, hook)
    assert found.shape == (2, 5, 16)


@pytest.mark.parametrize(
    "missing",
    [UTILS + "dataset_info.dataset_metadata", "sae_bench.evals.scr_and_tpp.main.COLUMN2_VALS_LOOKUP"],
    ids=["columns", "genders"],
)
def test_scr_has_a_closed_list_of_data_sets(missing: str, setting: EvalSetting, tmp_path: Path) -> None:
    others = {target: value for target, value in bias_in_bios_datasets(PROFESSIONS).items() if target != missing}
    config = ScrAndTppEvalConfig(
        model_name=MODEL_NAME, train_set_size=40, test_set_size=20, context_length=CONTEXT_TOKENS, llm_batch_size=16
    )
    pair = ("professor", "nurse")
    with working_directory(setting.data_folder), replaced(others), still_raises(KeyError, BIASED, missing):
        scr.run_eval_single_dataset(
            BIASED, config, tiny_topk_sae(), tiny_model(), 0, HOOK, "cpu", str(tmp_path), column1_vals=pair
        )


# ---------------------------------------------------------------- absorption


@pytest.mark.parametrize(
    "target", [ABSORPTION + "common.get_alpha_tokens", ABSORPTION + "feature_absorption.get_alpha_tokens"]
)
def test_absorptions_words_come_in_the_tokenizers_order(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers give their vocabulary in another order at every call."""
    get_words = getattr(*resolve(target))
    tokenizer = letters_tokenizer()
    words = get_words(tokenizer)
    shuffled = dict(random.Random(1).sample(list(tokenizer.get_vocab().items()), len(tokenizer)))
    monkeypatch.setattr(type(tokenizer), "vocab", property(lambda self: shuffled))
    again = get_words(tokenizer)
    assert sorted(again) == sorted(words)
    assert again != words, mended(target)


def test_a_letter_without_words_ends_absorption_late() -> None:
    """Such a split is made, its letter's probe is no number, and SAEBench stumbles when it scores the first SAE."""
    target, x = ABSORPTION + "common.create_dataset_probe_training", LETTERS.index("x")
    train, test = (
        [(prompt.word, letter) for prompt, letter in prompts]
        for prompts in probing.create_dataset_probe_training(
            vocab=[word for word in WORDS if word[0] != "x"],
            formatter=first_letter_formatter(),
            num_prompts_per_token=1,
            base_template="{word} has the first letter:",
        )
    )
    sae, x_train_ND, x_test_ND = letters_topk_sae(), torch.randn(len(train), 32), torch.randn(len(test), 32)
    letters_NL = torch.nn.functional.one_hot(torch.tensor([letter for _, letter in train]), len(LETTERS))
    probe = probing.train_multi_probe(x_train_ND, letters_NL, num_epochs=1, show_progress=False, device=sae.device)
    assert probe.weights.isnan().any(dim=1).nonzero().flatten().tolist() == [x], mended(target)
    of_latents = k_sparse_probing.train_k_sparse_probes(sae, train, x_train_ND, ks=[1], num_epochs=1)
    with still_raises(KeyError, f"^{x}$", target):
        k_sparse_probing.eval_probe_and_sae_k_sparse_raw_scores(sae, probe, of_latents, test, x_test_ND)


def test_absorption_runs_the_whole_model_for_each_sae() -> None:
    model, ran = letters_model(), Counter[str]()
    model.blocks[0].register_forward_hook(lambda *_: ran.update(["the hook's block"]))
    model.unembed.register_forward_hook(lambda *_: ran.update(["logits"]))
    calculator = feature_absorption.FeatureAbsorptionCalculator(
        model=model, icl_word_list=list(WORDS[:12]), base_template="{word} has the first letter:", word_token_pos=-6
    )
    for seed in (0, 1):
        random.seed(0)
        sae = letters_topk_sae(seed=seed)
        calculator.calculate_absorption(sae, list(WORDS[20:24]), torch.ones(32), [0], 0, show_progress=False)
    assert ran["the hook's block"] == 2, mended(ABSORPTION + "feature_absorption.FeatureAbsorptionCalculator")
    assert ran["logits"] == 2, mended(RUN_WITH_CACHE)


def test_sae_probes_reads_a_text_again() -> None:
    """One that comes twice in a data set, and all again in the next, in batches of the data set's order."""
    target, read = "sae_probes.generate_model_activations._process_activations", list[tuple[int, ...]]()
    model = tiny_model()
    model.blocks[0].register_forward_hook(lambda _, __, given: read.append(given.shape[:2]))
    texts = ["oak", "oak elm ash", "oak", "elm"]
    for _ in range(2):
        sae_probes_activations._process_activations(model, texts, 2, 1024, [HOOK], None, "cpu")
    assert sum(rows for rows, _ in read) == 8, mended(target)
    assert read[0][1] > read[1][1], mended(target)


def test_absorption_asks_scikit_learn_for_every_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of 26 letters: 4 of the probe and 8 of the one k, each by a call."""
    target, asked = ABSORPTION + "k_sparse_probing.metrics", Counter[str]()

    class Counted:
        def __getattr__(self, name: str) -> Any:
            asked[name] += 1
            return getattr(sklearn.metrics, name)

    draw, letters = np.random.default_rng(0), np.array(list(2 * LETTERS))
    scores = {
        f"{kind}_{letter}{k}": draw.random(len(letters))
        for letter in LETTERS
        for kind, k in (("score_probe", ""), ("score_sparse_sae", "_k_1"), ("sum_sparse_sae", "_k_1"))
    }
    about = dict.fromkeys(("feats", "cos_probe_sae_enc", "cos_probe_sae_dec", "weights", "bias"), 0.0)
    of_probes = pd.DataFrame([{"letter": letter, "k": 1, "layer": 0, "sae_name": "sae", **about} for letter in LETTERS])
    assert k_sparse_probing.metrics is sklearn.metrics, mended(target)
    monkeypatch.setattr(k_sparse_probing, "metrics", Counted())
    k_sparse_probing.build_metrics_df(pd.DataFrame({"answer_letter": letters, **scores}), of_probes, max_k_value=1)
    assert sum(asked.values()) == 26 * 12, mended(target)


def test_absorption_uses_no_seed_and_writes_into_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two experiments draw follows from the process's seed, and folders are left to their defaults."""
    package, drawn, told = Path(sae_bench.__path__[0]), list[float](), list[set[str]]()
    names = ("run_k_sparse_probing_experiment", "run_feature_absortion_experiment")
    experiments = [getattr(absorption, name) for name in names]

    class SeenError(Exception):
        pass

    def probe(**options: Any) -> pd.DataFrame:
        drawn.append(random.random() + float(torch.rand(1)))
        told.append(set(options))
        return pd.DataFrame({"letter": list(LETTERS), "f1_probe": 1.0})

    def absorb(**options: Any) -> None:
        probe(**options)
        raise SeenError

    for name, seen in zip(names, (probe, absorb), strict=True):
        monkeypatch.setattr(absorption, name, seen)
    # A model that is made here would seed the process.
    model = letters_model()
    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: model)
    monkeypatch.setattr(absorption, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.chdir(tmp_path)
    for seed in (5, 6):
        seed_all(seed)
        config = AbsorptionEvalConfig(model_name=LETTERS_MODEL_NAME, random_seed=1)
        with pytest.raises(SeenError):
            absorption.run_eval(config, [("sae", letters_topk_sae())], "cpu", str(tmp_path))
    for i, (name, experiment) in enumerate(zip(names, experiments, strict=True)):
        target = f"{ABSORPTION}main.{name}"
        assert drawn[i] != drawn[2 + i], mended(target)
        folders = {n: p.default for n, p in inspect.signature(experiment).parameters.items() if n.endswith("_dir")}
        assert {"experiment_dir", "probes_dir"} <= set(folders)
        assert not set(folders) & told[i], mended(target)
        assert all(package in Path(folder).parents for folder in folders.values()), mended(target)


# ---------------------------------------------------------------- autointerp


def test_autointerp_runs_the_model_twice_for_each_sae(
    setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, forward = Counter[bytes](), HookedTransformer.forward

    def counted(self: Any, tokens_BL: Tensor, **options: Any) -> Any:
        runs[tokens_BL.numpy().tobytes()] += 1
        return forward(self, tokens_BL, **options)

    async def without_a_judge(self: Any) -> None:
        self.gather_data()

    monkeypatch.setattr(HookedTransformer, "forward", counted)
    monkeypatch.setattr(autointerp.AutoInterp, "run", without_a_judge)
    config, model = bench_config(AUTOINTERP, LONG_TEXT, setting), tiny_model()
    with working_directory(setting.data_folder):
        for seed in (0, 1):
            sae = as_saebench_takes_it(tiny_topk_sae(seed=seed))
            autointerp.run_eval_single_sae(config, sae, model, "cpu", str(tmp_path), "")
    assert len(runs) > 1
    assert set(runs.values()) == {2 * 2}, mended(RUN_WITH_CACHE)


def test_autointerp_asks_one_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Away:
        def __init__(self, api_key: str):
            self.chat = SimpleNamespace(completions=self)

        def create(self, *, model: str, **_: Any) -> None:
            asked.append(model)
            raise openai.APIConnectionError(request=httpx.Request("POST", "http://127.0.0.1"))

    monkeypatch.setattr(autointerp, "OpenAI", Away)
    bench: Any = SimpleNamespace(api_key="", cfg=CFG)
    with still_raises(openai.APIConnectionError, "Connection", AUTOINTERP_MAIN + "OpenAI"):
        autointerp.AutoInterp.get_api_response(bench, [{"role": "user", "content": "What is it?"}], 30)
    assert asked == ["gpt-4o-mini"], mended(AUTOINTERP_MAIN + "OpenAI")


def test_autointerp_drops_latents_and_draws_its_example_anew() -> None:
    bench = autointerp.AutoInterp.__new__(autointerp.AutoInterp)
    bench.cfg = CFG
    bench.get_api_response = lambda messages, max_tokens: (["I think the first, and perhaps the second"], "")
    texts = autointerp.Examples([example(f"red iron {word}", {"red"}) for word in ("oak", "elm")])
    with ThreadPoolExecutor(1) as pool:
        judged = asyncio.run(bench.run_single_feature(pool, 0, texts, texts))
    assert judged is None, mended(AUTOINTERP_MAIN + "AutoInterp")
    questions = {bench.get_scoring_prompts("red", texts)[0]["content"] for _ in range(8)}
    assert len(questions) > 1, mended(AUTOINTERP_MAIN + "AutoInterp")


def test_autointerps_result_holds_logs_and_no_judge(
    setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = {n: {"latent": n, "explanation": "x", "score": 1.0, "logs": f"what was said of {n}"} for n in (3, 4)}
    monkeypatch.setattr(autointerp, "run_eval_single_sae", lambda *_: latents)
    config = bench_config(AUTOINTERP, LONG_TEXT, setting)
    autointerp.run_eval(config, [("sae", tiny_topk_sae())], "cpu", "", str(tmp_path), artifacts_path=str(tmp_path))
    (path,) = tmp_path.glob("*_eval_results.json")
    text = path.read_text()
    assert "what was said of 3" in text, mended(AUTOINTERP_MAIN + "AutoInterpEvalOutput")
    assert "gpt-4o-mini" not in text, mended(AUTOINTERP_MAIN + "AutoInterpEvalOutput")


def test_too_little_text_is_a_bare_assertion(setting: EvalSetting) -> None:
    target = UTILS + "dataset_utils.load_and_tokenize_dataset"
    with working_directory(setting.data_folder), still_raises(AssertionError, "^$", target):
        dataset_utils.load_and_tokenize_dataset(LONG_TEXT, CONTEXT_TOKENS, 9000, tiny_tokenizer())


# ---------------------------------------------------------------- RAVEL


def test_ravel_knows_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ravel, "gc", SimpleNamespace(collect=lambda: 0))
    config = RAVELEvalConfig(model_name=MODEL_NAME, llm_dtype="float32")
    with still_raises(KeyError, MODEL_NAME, RAVEL + "main.LLM_NAME_MAP"):
        ravel.run_eval(config, [], "cpu", str(tmp_path))


@dataclass
class StockRavel:
    """What SAEBench's RAVEL did with a tiny model and one SAE, given only the names of model and layers."""

    model: Any
    tokenizers_loaded: int
    scores: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def stock_ravel(tmp_path_factory: pytest.TempPathFactory) -> StockRavel:
    folder = tmp_path_factory.mktemp("stock-ravel")
    write_prompts(folder, tiny_language_model("gpt_neox"))
    with (
        pytest.MonkeyPatch.context() as patch,
        one_thread(),
        ravel_adapters.seeded(0),
        torch.set_grad_enabled(torch.is_grad_enabled()),
        ExitStack() as hooks,
        replaced(ravel_adapters.model_known_by_name(MODEL_NAME), ravel_adapters.hooks_on_any_decoder(hooks)),
    ):
        models = offered(patch)
        ravel.run_eval(stock_config(folder), [("sae", tiny_topk_sae())], "cpu", str(folder), artifacts_path=str(folder))
    (path,) = folder.glob("*_eval_results.json")
    (scores,) = json.loads(path.read_text())["eval_result_unstructured"].values()
    (model,) = models.made
    return StockRavel(model, models.asked.count("tokenizer"), scores)


def test_ravel_trains_masks_on_a_model_in_training(stock_ravel: StockRavel) -> None:
    model = stock_ravel.model
    assert model.training, mended(RAVEL + "main.AutoModelForCausalLM")
    assert all(weight.grad is not None for weight in model.parameters()), mended(RAVEL + "main.AutoModelForCausalLM")


def test_ravel_loads_the_tokenizer_again_and_again(stock_ravel: StockRavel) -> None:
    assert stock_ravel.tokenizers_loaded > len(stock_ravel.scores), mended(RAVEL + "main.AutoTokenizer")


def test_ravels_scores_come_without_numbers_of_pairs(stock_ravel: StockRavel) -> None:
    for scores in stock_ravel.scores.values():
        assert set(scores) == {"cause_score", "isolation_score", "disentangle_score"}, mended(
            RAVEL + "main.run_eval_single_cause_attribute"
        )


def test_ravels_score_of_no_pairs_is_nan() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        scores = intervention.generate_batched_interventions(None, None, None, [])
    assert np.isnan(scores).all(), mended(RAVEL + "intervention.generate_batched_interventions")


def test_ravel_takes_it_that_there_is_a_bos() -> None:
    target = RAVEL + "instance.RAVELInstance.build_and_tokenize_prompts"
    for token, last_word, _ in entity_tokens(RAVELInstance.build_and_tokenize_prompts, bos=False):
        assert token != last_word, mended(target)


def test_ravel_knows_the_layers_of_two_architectures() -> None:
    with still_raises(ValueError, "not supported", UTILS + "activation_collection.get_module"):
        activation_collection.get_module(tiny_language_model("llama"), 0)


def test_ravel_takes_a_layers_tensor_for_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told where Llama's layers are, it takes the first text of the batch for the batch."""
    monkeypatch.setattr(activation_collection, "get_module", lambda model, layer: model.model.layers[layer])
    inputs = tiny_tokenizer()(["six red iron", "ten black zinc"], return_tensors="pt")
    with still_raises(IndexError, "too many indices", UTILS + "activation_collection.get_module"):
        activation_collection.get_layer_activations(tiny_language_model("llama"), 0, inputs, torch.tensor([-1, -2]))


def test_ravel_runs_the_whole_model_for_the_same_activations() -> None:
    model, ran = tiny_language_model("gpt_neox"), Counter[str]()
    ravel_adapters.decoder_layers(model)[-1].register_forward_hook(lambda *_: ran.update(["last layer"]))
    inputs = tiny_tokenizer()(["six red iron", "ten black zinc"], return_tensors="pt")
    with ExitStack() as hooks, replaced(ravel_adapters.hooks_on_any_decoder(hooks)):
        for _ in range(2):
            activation_collection.get_layer_activations(model, 0, inputs, torch.tensor([-1, -2]))
    assert ran["last layer"] == 2, mended(UTILS + "activation_collection.get_layer_activations")
