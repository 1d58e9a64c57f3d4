"""SAEBench's RAVEL on tiny models: the scores of stock code, for any decoder, and no score from nothing."""

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sae_bench
import torch
from sae_bench.evals.ravel import intervention, mdbm
from sae_bench.evals.ravel import main as stock
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.ravel.instance import RAVELInstance
from sae_bench.sae_bench_utils import activation_collection, general_utils
from torch import Tensor, nn

from ksvd_sae.activations.weights import find_weights
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.panel import run_evals
from ksvd_sae.evals.ravel import RavelEval
from ksvd_sae.evals.ravel import adapters as adapters
from ksvd_sae.evals.ravel.run import run_ravel, scored_pairs
from ksvd_sae.evals.saebench.runner import read_metrics
from ksvd_sae.replaced import replaced
from ksvd_sae.sae import DBKSVDSAE
from tests.evals.conftest import CountedPanel
from tests.tiny_ravel import ARCHITECTURES, DATASET, ENTITIES, KIND, PROMPTS, tiny_language_model, write_prompts
from tests.tiny_saes import MODEL_NAME, identity_sae, one_thread, tiny_db_ksvd_sae, tiny_tokenizer, tiny_topk_sae

CONFIG = RavelEval(
    dataset=DATASET,
    attributes={KIND: list(PROMPTS)},
    pairs_per_attribute=20,
    learning_rate=0.1,
    epochs=1,
    n_generated_tokens=2,
    llm_batch_prompts=6,
    seed=3,
)
METRICS = {"disentanglement_score", "cause_score", "isolation_score"}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


class Models:
    """Makes a tiny model the one that RAVEL loads; what was asked for, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.made: list[Any] = []
        self.architecture = "gpt_neox"

    def model(self, name: str, **options: Any) -> Any:
        self.asked.append("model")
        self.made.append(tiny_language_model(self.architecture))
        return self.made[-1]

    def tokenizer(self, name: str) -> Any:
        self.asked.append("tokenizer")
        return tiny_tokenizer()


def offered(patch: pytest.MonkeyPatch) -> Models:
    models = Models()
    patch.setattr(stock, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=models.model))
    patch.setattr(stock, "AutoTokenizer", SimpleNamespace(from_pretrained=models.tokenizer))
    # SAEBench collects garbage all the time: a second each, in a process with so many modules.
    for module in (stock, mdbm):
        patch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))
    return models


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    return offered(monkeypatch)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The data folder of an architecture; read only."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            write_prompts(made[architecture] / DATASET, tiny_language_model(architecture))
        return made[architecture]

    return folder


def setting_in(folder: Path, data_folder: Path) -> EvalSetting:
    return EvalSetting(
        model_name=MODEL_NAME,
        dtype="float32",
        device="cpu",
        data_folder=data_folder,
        data_hash="0123456789ab",
        artifacts=folder / "artifacts",
    )


@pytest.fixture
def setting(prompts: Callable[[str], Path], models: Models, tmp_path: Path) -> EvalSetting:
    return setting_in(tmp_path, prompts("gpt_neox"))


@pytest.fixture(scope="module")
def once(prompts: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of the TopK SAE in out/ and what was kept for it in artifacts/; read only."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        offered(patch)
        run(CountedPanel({"topk-sae": tiny_topk_sae}), setting_in(folder, prompts("gpt_neox")), folder / "out")
    return folder


@pytest.fixture
def finished(once: Path, tmp_path: Path, setting: EvalSetting) -> dict[str, float | None]:
    """The test's own folder as after a run of the TopK SAE; its scores."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "out").rglob("topk-sae-*.json")
    return read_metrics(path)


@pytest.fixture
def counted() -> CountedPanel:
    return CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae})


def stock_config(kept: Path, config: RavelEval = CONFIG) -> RAVELEvalConfig:
    """``config`` as SAEBench takes it; what it keeps goes to ``kept``, where the prompts are."""
    return RAVELEvalConfig(
        entity_attribute_selection=config.attributes,
        num_pairs_per_attribute=config.pairs_per_attribute,
        learning_rate=config.learning_rate,
        num_epochs=config.epochs,
        n_generated_tokens=config.n_generated_tokens,
        llm_batch_size=config.llm_batch_prompts,
        model_name=MODEL_NAME,
        llm_dtype="float32",
        random_seed=config.seed,
        artifact_dir=str(kept),
    )


def run(counted: CountedPanel, setting: EvalSetting, output: Path, config: RavelEval = CONFIG) -> dict[str, Path]:
    return run_ravel(counted.panelists(), config, setting, output).files


def by_attribute(path: Path) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = json.loads(path.read_text())["eval_result_unstructured"][f"{KIND}_results"]
    return scores


# ---------------------------------------------------------------- the numbers


def test_results(setting: EvalSetting, models: Models, tmp_path: Path) -> None:
    makers = {"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae, "identity": identity_sae}
    files = run(CountedPanel(makers), setting, tmp_path)
    assert models.asked == ["model", "tokenizer"]
    scores = {}
    for name, path in files.items():
        assert path.parent.parent == tmp_path / "ravel"
        result = json.loads(path.read_text())
        assert result["eval_type_id"] == "ravel"
        metrics = scores[name] = read_metrics(path)
        assert set(metrics) == METRICS
        assert all(value is not None and 0 <= value <= 1 for value in metrics.values())
        assert metrics["disentanglement_score"] == pytest.approx(
            (metrics["cause_score"] + metrics["isolation_score"]) / 2
        )
        assert set(by_attribute(path)) == {f"{KIND}_{attribute}" for attribute in PROMPTS}
        # 40 pairs of each attribute, 12 of them not for training.
        assert scored_pairs(path) == 2 * 12
        assert str(tmp_path) not in path.read_text()
    assert scores["identity"] != scores["topk-sae"]
    assert 0 < scores["identity"]["disentanglement_score"] < 1


@pytest.mark.skipif(
    int(version("transformers").split(".")[0]) >= 5,
    reason="SAEBench's own RAVEL takes outputs[0] of a layer, which from transformers 5 on is the batch's first row",
)
@pytest.mark.parametrize(
    ("architecture", "make"),
    [("gpt_neox", tiny_db_ksvd_sae), ("gpt_neox", identity_sae), ("gemma2", tiny_topk_sae)],
    ids=["gpt_neox of db-ksvd", "gpt_neox of identity", "gemma2 of topk"],
)
def test_scores_are_those_of_stock_saebench(
    architecture: str,
    make: Callable[[], Any],
    prompts: Callable[[str], Path],
    setting: EvalSetting,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the two architectures that it knows, with a tokenizer that puts <bos> before every text."""
    models.architecture = architecture
    setting = replace(setting, data_folder=prompts(architecture))
    options = CONFIG.model_copy(update={"epochs": 2})
    ours = run(CountedPanel({"sae": make}), setting, tmp_path / "ours", options)["sae"]

    kept = tmp_path / "stock-artifacts"
    write_prompts(kept, tiny_language_model(architecture))
    monkeypatch.setitem(stock.LLM_NAME_MAP, MODEL_NAME, MODEL_NAME)
    with adapters.seeded(0), torch.set_grad_enabled(torch.is_grad_enabled()):
        config = stock_config(kept, options)
        stock.run_eval(config, [("sae", make())], "cpu", str(tmp_path), artifacts_path=str(kept))
    (theirs,) = tmp_path.glob("*_eval_results.json")
    assert read_metrics(ours) == pytest.approx(read_metrics(theirs), abs=1e-5)
    for attribute, scores in by_attribute(theirs).items():
        assert by_attribute(ours)[attribute].items() >= scores.items()


def test_scores_do_not_depend_on_what_else_is_scored(
    counted: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    """Stock code draws the prompts to ask while it scores the first SAE, from the same random numbers as its pairs."""
    config = CONFIG.model_copy(update={"downsample": 90, "pairs_per_attribute": 12})
    together = run(counted, setting, tmp_path / "together", config)
    # The second of the two, now alone and the first to be scored.
    alone = replace(setting, artifacts=tmp_path / "other-artifacts")
    files = run(CountedPanel({"topk-sae": tiny_topk_sae}), alone, tmp_path / "alone", config)
    assert read_metrics(files["topk-sae"]) == read_metrics(together["topk-sae"])
    assert by_attribute(files["topk-sae"]) == by_attribute(together["topk-sae"])


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_any_decoder(
    architecture: str, prompts: Callable[[str], Path], setting: EvalSetting, models: Models, tmp_path: Path
) -> None:
    models.architecture = architecture
    setting = replace(setting, data_folder=prompts(architecture))
    files = run(CountedPanel({"identity": identity_sae}), setting, tmp_path / "out")
    assert all(value is not None and math.isfinite(value) for value in read_metrics(files["identity"]).values())
    # What the identity leaves unchanged is unchanged: isolation fails only where the mask says so.
    assert read_metrics(files["identity"])["isolation_score"] > 0.5


def test_weights_of_ones_own(
    once: Path, prompts: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAVEL loads the model by its name in transformers' form: it gets what lies in the folder."""
    for module in (stock, mdbm):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))
    tiny_language_model("gpt_neox").save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    setting = replace(setting_in(tmp_path, prompts("gpt_neox")), weights=find_weights(str(tmp_path / "tuned"), None))
    with torch.no_grad():
        files = run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out")
    (path,) = (once / "out").rglob("topk-sae-*.json")
    assert read_metrics(files["topk-sae"]) == read_metrics(path)
    # Answers of the one are not taken for the other's.
    kept = [{path.name for path in (folder / "artifacts").iterdir()} for folder in (once, tmp_path)]
    assert kept[0].isdisjoint(kept[1])


@pytest.mark.parametrize("bos", [True, False])
def test_prompts_begin_as_the_harvests_contexts_did(bos: bool, models: Models) -> None:
    asked: list[list[int]] = []
    with replaced(adapters.loaded_once({}, lambda model, tokenizer: asked.append(tokenizer.encode("iron")), None, bos)):
        stock.AutoModelForCausalLM.from_pretrained(MODEL_NAME)
    assert [ids[0] == tiny_tokenizer().bos_token_id for ids in asked] == [bos]


# ---------------------------------------------------------------- layers and positions


@architectures
@pytest.mark.parametrize("layer", [0, 1])
def test_activations_are_those_of_the_hooks_layer(architecture: str, layer: int) -> None:
    """hidden_states[0] is the embedding; the last one is normed, so no layer is compared with it."""
    model, tokenizer = tiny_language_model(architecture), tiny_tokenizer()
    inputs = tokenizer(["six red iron", "ten black zinc"], return_tensors="pt")
    position_B = torch.tensor([-1, -2])
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[layer + 1]
    # transformers 5 leaves hooks of its own.
    before = [dict(module._forward_hooks) for module in model.modules()]
    kept: dict[str, Tensor] = {}
    with ExitStack() as hooks, replaced(adapters.hooks_on_any_decoder(hooks), adapters.activations_kept(kept)):
        rows_BD = activation_collection.get_layer_activations(model, layer, inputs, position_B)
    torch.testing.assert_close(rows_BD, torch.stack([hidden[0, -1], hidden[1, -2]]), rtol=0, atol=1e-6)
    assert len(kept) == 1
    assert [dict(module._forward_hooks) for module in model.modules()] == before


@architectures
def test_a_hook_changes_what_any_decoders_layer_gives_out(architecture: str) -> None:
    model = tiny_language_model(architecture)
    inputs = tiny_tokenizer()(["six red iron"], return_tensors="pt")

    def zero(module: nn.Module, _: Any, outputs: Any) -> Any:
        return (torch.zeros_like(outputs[0]), *outputs[1:])

    with torch.no_grad(), ExitStack() as hooks, replaced(adapters.hooks_on_any_decoder(hooks)):
        before = model(**inputs).logits
        handle = activation_collection.get_module(model, 2).register_forward_hook(zero)
        during = model(**inputs).logits
        handle.remove()
        after = model(**inputs).logits
    assert not during.any(), "of nothing come no logits"
    assert before.any()
    assert torch.equal(before, after)


def test_layers_of_no_decoder() -> None:
    with pytest.raises(EvaluationError, match="Linear"):
        adapters.decoder_layers(nn.Linear(2, 2))


def entity_tokens(build: Callable[[Any, Any], list[Any]], bos: bool) -> list[tuple[str, str, int]]:
    """Of four prompts: the token at the position of the entity, the entity's last word, and the position."""
    tokenizer = tiny_tokenizer()
    if not bos:
        encode = tokenizer.encode
        tokenizer = SimpleNamespace(encode=lambda text: encode(text)[1:])
    instance = RAVELInstance()
    templates = ["six %s oak one", "yew %s"]
    instance.entityLBL_attrTYP_attrLBL = {"red iron": {"Tree": "oak"}, "tin": {"Tree": "elm"}}
    instance.attribute_type_to_templates = {"Tree": templates}
    instance.template_splits = dict.fromkeys(templates, "train")
    instance.entity_splits = dict.fromkeys(instance.entityLBL_attrTYP_attrLBL, "train")
    return [
        (
            tiny_tokenizer().decode([prompt.input_ids[prompt.final_entity_token_pos]]),
            prompt.entity_label.split()[-1],
            prompt.final_entity_token_pos,
        )
        for prompt in build(instance, tokenizer)
    ]


@pytest.mark.parametrize("bos", [True, False], ids=["<bos>", "no <bos>"])
def test_position_is_the_entitys_last_token(bos: bool) -> None:
    with replaced(adapters.entity_positions_without_bos()):
        prompts = entity_tokens(RAVELInstance.build_and_tokenize_prompts, bos)
    assert len(prompts) == 4
    for token, last_word, position in prompts:
        assert token == last_word
        assert position < 0, "prompts are padded on the left"


def test_completions_that_end_early_are_of_full_length() -> None:
    class Ends(nn.Module):
        def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
            return torch.cat([input_ids, torch.full((len(input_ids), 1), 9)], dim=1)

        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    completions_BL = adapters.ModelForInference(Ends()).generate(
        input_ids=torch.tensor([[5, 6], [7, 8]]), max_new_tokens=3
    )
    assert completions_BL.tolist() == [[5, 6, 9, 9, 9], [7, 8, 9, 9, 9]]


def test_dropout_stays_off_and_weights_get_no_gradient() -> None:
    model = adapters.ModelForInference(tiny_language_model("gpt_neox"))
    _, sae, _ = general_utils.load_and_format_sae("topk-sae", tiny_topk_sae(), "cpu")
    # SAEBench puts the mask into training before each epoch.
    mask = mdbm.MDBM(model, tiny_tokenizer(), RAVELEvalConfig(llm_batch_size=1), sae).train()
    assert mask.training
    assert not any(module.training for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model(input_ids=torch.tensor([[2, 5, 6]])).logits.shape[:2] == (1, 1)


# ---------------------------------------------------------------- computed once


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the model completes all prompts, and how often activations are computed."""
    done: Counter[str] = Counter()
    complete, read = RAVELInstance.generate_completions, adapters._activations

    def completes(*args: Any, **options: Any) -> None:
        done["completions"] += 1
        complete(*args, **options)

    def reads(*args: Any) -> Tensor:
        done["activations"] += 1
        return read(*args)

    monkeypatch.setattr(RAVELInstance, "generate_completions", completes)
    monkeypatch.setattr(adapters, "_activations", reads)
    return done


def test_what_depends_on_no_dictionary_is_computed_once(
    counted: CountedPanel, setting: EvalSetting, models: Models, work: Counter[str], tmp_path: Path
) -> None:
    run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "one")
    # 4 batches to train on and 2 to score, for each of 2 attributes.
    assert work == {"completions": 1, "activations": 12}
    models.asked.clear()
    # Another panel, other pairs and a longer training of the masks do not ask the model again; nor do epochs.
    run(counted, setting, tmp_path / "two", CONFIG.model_copy(update={"epochs": 2, "seed": 4}))
    assert work == {"completions": 1, "activations": 24}
    assert models.asked == ["model", "tokenizer"]


@pytest.mark.usefixtures("finished")
def test_second_call_reuses(setting: EvalSetting, models: Models, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "ravel").rglob("*.json")}
    counted = CountedPanel({"topk-sae": tiny_topk_sae})
    assert list(run(counted, setting, tmp_path / "out").values()) == list(before)
    assert (counted.loads, models.asked) == ([], [])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("change", ["config", "prompts"])
@pytest.mark.usefixtures("finished")
def test_another_input_is_another_result(change: str, setting: EvalSetting, work: Counter[str], tmp_path: Path) -> None:
    counted, config = CountedPanel({"topk-sae": tiny_topk_sae}), CONFIG
    if change == "config":
        config = CONFIG.model_copy(update={"n_generated_tokens": 1})
    else:
        write_prompts(tmp_path / DATASET, tiny_language_model("gpt_neox"))
        path = tmp_path / DATASET / "base" / f"ravel_{KIND}_entity_attributes.json"
        known = json.loads(path.read_text())
        path.write_text(json.dumps({name: known[name] for name in ENTITIES[:-1]}))
        setting = replace(setting, data_folder=tmp_path)
    run(counted, setting, tmp_path / "out", config)
    assert len(list((tmp_path / "out" / "ravel").rglob("*.json"))) == 2
    assert counted.loads == ["topk-sae"]
    assert work["completions"] == 1


@pytest.mark.parametrize("kind", ["unfiltered_full_instance", "filtered_dataset", "entity_attributes"])
def test_half_written_files_are_made_again(
    kind: str, setting: EvalSetting, finished: dict[str, float | None], tmp_path: Path
) -> None:
    """SAEBench writes them in place, so a process that is stopped leaves half a file."""
    (broken,) = setting.artifacts.rglob(f"*_{kind}.json")
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    next((tmp_path / "out" / "ravel").rglob("*.json")).unlink()
    if kind == "unfiltered_full_instance":
        # Read only where the prompts are not chosen yet.
        next(setting.artifacts.rglob("*_filtered_dataset.json")).unlink()
    again = run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out")
    assert read_metrics(again["topk-sae"]) == finished


@pytest.mark.parametrize("left", ["the first kind's answers", "the first kind's prompts"])
def test_prompts_are_drawn_as_if_nothing_had_been_there(
    left: str, setting: EvalSetting, models: Models, tmp_path: Path
) -> None:
    data, other = tmp_path / "data", "other"
    shutil.copytree(setting.data_folder, data)
    for path in (data / DATASET / "base").glob("*.json"):
        shutil.copyfile(path, path.with_name(path.name.replace(KIND, other)))
    attributes = {kind: list(PROMPTS) for kind in (KIND, other)}
    config, setting = (
        CONFIG.model_copy(update={"attributes": attributes, "downsample": 90}),
        replace(setting, data_folder=data),
    )
    run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out", config)
    (folder,) = setting.artifacts.rglob("artifacts/ravel")
    whole = {path.name: path.read_text() for path in folder.glob("*.json")}
    assert len(whole) == 4
    for path in folder.glob("*.json"):
        if path.name.startswith(other) or (left == "the first kind's prompts" and "unfiltered" not in path.name):
            path.unlink()
    next((tmp_path / "out" / "ravel").rglob("*.json")).unlink()
    run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out", config)
    assert {path.name: path.read_text() for path in folder.glob("*.json")} == whole


# ---------------------------------------------------------------- failures


def test_too_few_right_answers(counted: CountedPanel, setting: EvalSetting, models: Models, tmp_path: Path) -> None:
    """Stock code would leave a mask untrained, and average nothing: NaN."""
    config = CONFIG.model_copy(update={"pairs_per_attribute": 200, "llm_batch_prompts": 20})
    needed = config.right_prompts_needed
    assert needed == 32, "20 of 64 are not for training"
    with pytest.raises(EvaluationError) as caught:
        run(counted, setting, tmp_path / "out", config)
    message = str(caught.value)
    assert "no score for db-ksvd, topk-sae" in message.splitlines()[0]
    assert message.count(f"too few prompts of {KIND} / Tree were answered right") == 1
    assert "29 answered right" in message
    assert f"{needed} and 2" in message
    assert "evaluation.ravel.downsample" in message
    assert models.asked == ["model", "tokenizer"]
    assert not list((tmp_path / "out" / "ravel").rglob("*.json"))


def test_one_answer_for_all(setting: EvalSetting, tmp_path: Path) -> None:
    """There is no other entity with another answer to swap with."""
    write_prompts(tmp_path / DATASET, tiny_language_model("gpt_neox"))
    path = tmp_path / DATASET / "base" / f"ravel_{KIND}_entity_attributes.json"
    known = {name: {**labels, "Tree": "zinc"} for name, labels in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(known))
    with pytest.raises(EvaluationError, match=rf"(?s){KIND} / Tree.*with 1 different answers"):
        run(
            CountedPanel({"topk-sae": tiny_topk_sae}),
            replace(setting, data_folder=tmp_path),
            tmp_path / "out",
            CONFIG.model_copy(update={"pairs_per_attribute": 8, "llm_batch_prompts": 2}),
        )


@pytest.mark.parametrize("kept", [[True, True], [False, False]], ids=["no cause", "no isolation"])
def test_no_pairs_of_a_kind(kept: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairs of both kinds the numbers of pairs are beside the scores; with one kind only there is no score."""
    monkeypatch.setattr(intervention, "generate_batched_interventions", lambda *args, **options: (0.5, 0.25))

    def evaluate(dataset: Any, cause_attribute: str, loader: Any) -> dict[str, float]:
        isolation, cause = intervention.generate_batched_interventions(None, None, None, loader)
        return {"cause_score": cause, "isolation_score": isolation}

    monkeypatch.setattr(stock, "run_eval_single_cause_attribute", evaluate)
    dataset = SimpleNamespace(config={"entity_type": KIND})

    def loader(same: list[bool]) -> list[Any]:
        return [(None, None, None, None, torch.zeros(len(same)), 1 - torch.tensor(same).float(), [], [])]

    with replaced(adapters.no_score_of_no_pairs()):
        scores = stock.run_eval_single_cause_attribute(dataset, "Tree", loader([True, False, False]))
        assert scores == {"cause_score": 0.25, "isolation_score": 0.5, "cause_pairs": 2, "isolation_pairs": 1}
        with pytest.raises(EvaluationError, match=rf"(?s){KIND} / Tree.*0 (cause|isolation) pairs"):
            stock.run_eval_single_cause_attribute(dataset, "Tree", loader(kept))
    assert stock.run_eval_single_cause_attribute is evaluate


class Broken(DBKSVDSAE):
    def encode(self, x: Tensor) -> Tensor:
        raise RuntimeError("this code is broken")


@pytest.mark.parametrize("order", [("broken", "topk-sae"), ("topk-sae", "broken")], ids=["first", "last"])
def test_one_that_fails_leaves_the_others_result(
    order: tuple[str, str], setting: EvalSetting, models: Models, once: Path, tmp_path: Path
) -> None:
    """It fails inside a hook, which must not stay on the model that the next one is scored on."""
    makers = {"broken": lambda: Broken(tiny_db_ksvd_sae().cfg), "topk-sae": tiny_topk_sae}
    with pytest.raises(EvaluationError, match="this code is broken") as caught:
        run(CountedPanel({name: makers[name] for name in order}), setting, tmp_path / "out")
    assert "topk-sae" not in str(caught.value).splitlines()[0]
    assert models.asked == ["model", "tokenizer"]
    (kept,) = (tmp_path / "out" / "ravel").rglob("*.json")
    assert read_metrics(kept) == read_metrics(next((once / "out" / "ravel").rglob("*.json")))


def test_another_hook_is_refused(setting: EvalSetting, tmp_path: Path) -> None:
    """SAEBench would take the layer's number and swap codes where the dictionary was not learned."""

    def elsewhere() -> Any:
        sae = tiny_topk_sae()
        sae.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"
        return sae

    with pytest.raises(EvaluationError, match=r"(?s)mlp_out.*hook_resid_post"):
        run(CountedPanel({"topk-sae": elsewhere}), setting, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "not-there"}, r"data set not-there has no alloy"),
        ({"attributes": {"city": ["Country", "Continent"]}}, r"tiny-ravel has no city"),
        ({"attributes": {KIND: ["Tree", "Colour"]}}, r"alloy has no attribute Colour"),
        ({"downsample": 101}, r"(?s)fewer prompts.*got: 101.*limit: 100"),
    ],
    ids=["data set", "kind", "attribute", "downsample"],
)
def test_what_the_prompts_do_not_have(
    change: dict[str, Any], message: str, setting: EvalSetting, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=message):
        run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out", CONFIG.model_copy(update=change))


# ---------------------------------------------------------------- everything is put back


def stock_state() -> tuple[Any, ...]:
    return (
        Path.cwd(),
        dict(stock.LLM_NAME_MAP),
        stock.AutoModelForCausalLM,
        stock.AutoTokenizer,
        stock.run_eval_single_cause_attribute,
        intervention.generate_batched_interventions,
        activation_collection.get_module,
        activation_collection.get_layer_activations,
        RAVELInstance.build_and_tokenize_prompts,
        torch.is_grad_enabled(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("make", [tiny_topk_sae, lambda: Broken(tiny_db_ksvd_sae().cfg)], ids=["well", "failed"])
def test_saebench_is_left_as_it_was(make: Callable[[], Any], setting: EvalSetting, tmp_path: Path) -> None:
    package = Path(sae_bench.__file__).parent
    files = {path: path.stat().st_mtime_ns for path in package.rglob("*") if "__pycache__" not in path.parts}
    # SAELens draws random weights for a new SAE.
    sae = make()
    before = stock_state()
    try:
        run(CountedPanel({"sae": lambda: sae}), setting, tmp_path / "out")
    except EvaluationError:
        assert make is not tiny_topk_sae
    assert stock_state() == before
    assert files == {path: path.stat().st_mtime_ns for path in package.rglob("*") if "__pycache__" not in path.parts}


# ---------------------------------------------------------------- config, panel and data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": {"city": ["Country"]}}, "two or more"),
        ({"attributes": {"city": ["Country", "Country"]}}, "two or more"),
        ({"pairs_per_attribute": 31, "llm_batch_prompts": 20}, "at least 32"),
        ({"train_fraction": 1.0}, "train_fraction"),
    ],
)
def test_config_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RavelEval(**change)


def test_defaults_are_saebenchs() -> None:
    ours, theirs = RavelEval(), RAVELEvalConfig()
    assert ours.attributes == theirs.entity_attribute_selection
    assert ours.top_n_entities == theirs.top_n_entities
    assert ours.downsample == theirs.full_dataset_downsample
    assert ours.pairs_per_attribute == theirs.num_pairs_per_attribute
    assert ours.train_fraction == theirs.train_test_split
    assert ours.learning_rate == theirs.learning_rate
    assert ours.epochs == theirs.num_epochs
    assert ours.n_generated_tokens == theirs.n_generated_tokens
    assert ours.seed == theirs.random_seed


def test_panel_names_the_data_and_counts_pairs(counted: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    (results,) = run_evals(counted.panelists(), [CONFIG], setting, tmp_path)
    assert (results.eval, results.data, results.n) == ("ravel", DATASET, {"db-ksvd": 24, "topk-sae": 24})
    assert all(set(metrics) == METRICS for metrics in results.metrics.values())


def test_own_set_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    for name, ravel in {"hub": RavelEval(), "own": RavelEval(dataset="own-ravel")}.items():
        ravel.write_data(tmp_path / name)
        assert (tmp_path / name).exists() == (name == "own")
    assert len(list((tmp_path / "own" / "own-ravel" / "base").iterdir())) == 8
