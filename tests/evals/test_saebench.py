"""SAEBench's core and sparse probing on a tiny model: real scores, cached by content, and no failure unnoticed."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_bench.evals.core import main as core
from sae_bench.evals.scr_and_tpp import main as scr
from sae_bench.evals.sparse_probing import main as probing
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, general_utils
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals import base
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.core import CoreEval
from ksvd_sae.evals.core.run import run_core
from ksvd_sae.evals.saebench.adapters import working_directory
from ksvd_sae.evals.saebench.runner import read_metrics, result_file
from ksvd_sae.evals.scr import ScrEval
from ksvd_sae.evals.scr.run import run_scr
from ksvd_sae.evals.sparse_probing import SparseProbingEval
from ksvd_sae.evals.sparse_probing.adapters import labelled_text_datasets
from ksvd_sae.evals.sparse_probing.run import LABELS, run_sparse_probing
from ksvd_sae.evals.tpp import TppEval
from ksvd_sae.evals.tpp.run import run_tpp
from ksvd_sae.replaced import replaced
from ksvd_sae.sae import DBKSVDSAE
from ksvd_sae.store import content_hash, versions
from tests.evals.conftest import BIASED, CLASSES, COMMIT, ONE_TEXT, TEXT, THE_TEXT, CountedPanel
from tests.tiny_saes import CONTEXT_TOKENS, HOOK, identity_sae, tiny_db_ksvd_sae, tiny_model, tiny_topk_sae
from tests.tolerances import SPLICED_LOSS

pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
CORE = CoreEval(
    dataset=TEXT, context_tokens=CONTEXT_TOKENS, batch_contexts=3, reconstruction_batches=1, sparsity_batches=2
)
PROBING = SparseProbingEval(
    datasets=[CLASSES],
    train_set_size=40,
    test_set_size=20,
    context_tokens=CONTEXT_TOKENS,
    llm_batch_contexts=16,
    k_values=[1, 5],
)
SCR = ScrEval(
    datasets=[BIASED],
    pairs={BIASED: [("professor", "nurse")]},
    train_set_size=40,
    test_set_size=20,
    context_tokens=CONTEXT_TOKENS,
    llm_batch_contexts=16,
    probe_epochs=3,
    n_values=[2, 5, 20],
)
TPP = TppEval(
    datasets=[CLASSES],
    train_set_size=40,
    test_set_size=20,
    context_tokens=CONTEXT_TOKENS,
    llm_batch_contexts=16,
    probe_epochs=3,
    n_values=[2, 5, 20],
)
Runner = Callable[..., dict[str, Path]]


def run_core_on(counted: CountedPanel, setting: EvalSetting, output: Path, config: CoreEval = CORE) -> dict[str, Path]:
    return run_core(counted.panelists(), config, setting, output).files


def run_probing_on(
    counted: CountedPanel, setting: EvalSetting, output: Path, config: SparseProbingEval = PROBING
) -> dict[str, Path]:
    return run_sparse_probing(counted.panelists(), config, setting, output).files


def run_scr_on(counted: CountedPanel, setting: EvalSetting, output: Path, config: ScrEval = SCR) -> dict[str, Path]:
    return run_scr(counted.panelists(), config, setting, output).files


def run_tpp_on(counted: CountedPanel, setting: EvalSetting, output: Path, config: TppEval = TPP) -> dict[str, Path]:
    return run_tpp(counted.panelists(), config, setting, output).files


CACHED = (run_probing_on, run_scr_on, run_tpp_on)
evals = pytest.mark.parametrize(
    "run", [run_core_on, run_probing_on, run_scr_on, run_tpp_on], ids=["core", "sparse_probing", "scr", "tpp"]
)


@pytest.fixture
def counted() -> CountedPanel:
    """The two kinds of SAE that are compared in earnest."""
    return CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae})


def strict_json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, dict):
        return [s for key, inner in value.items() for s in [key, *strings(inner)]]
    if isinstance(value, list):
        return [s for inner in value for s in strings(inner)]
    return [value] if isinstance(value, str) else []


# ---------------------------------------------------------------- core: the numbers


def loss_by_hand(change: Callable[[Tensor], Tensor]) -> float:
    """Mean next-token loss in float64 over the ordinary tokens of THE_TEXT, activations changed at ``HOOK``."""
    model = tiny_model()
    tokens_1L = model.to_tokens(THE_TEXT)
    assert tokens_1L.shape == (1, CONTEXT_TOKENS)
    logits = model.run_with_hooks(tokens_1L, fwd_hooks=[(HOOK, lambda x_1LD, hook: change(x_1LD))])[0]
    logits = logits.detach().double().numpy()
    tokens = tokens_1L[0].numpy()
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    # The prediction made at <bos> is left out, as the activation there is left alone.
    return -float(np.mean([log_p[i, tokens[i + 1]] for i in range(1, CONTEXT_TOKENS - 1)]))


def spliced(sae: Any) -> Callable[[Tensor], Tensor]:
    def change(x_1LD: Tensor) -> Tensor:
        rebuilt_1LD = sae.decode(sae.encode(x_1LD))
        return torch.cat([x_1LD[:, :1], rebuilt_1LD[:, 1:]], dim=1)

    return change


def test_core_scores_are_the_losses_by_hand(setting: EvalSetting, tmp_path: Path) -> None:
    makers = {"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae, "identity": identity_sae}
    config = CORE.model_copy(update={"dataset": ONE_TEXT})
    files = run_core_on(CountedPanel(makers), setting, tmp_path, config)
    clean, ablated = loss_by_hand(lambda x: x), loss_by_hand(torch.zeros_like)
    assert abs(clean - ablated) > 100 * SPLICED_LOSS
    for name, make in makers.items():
        with_sae = loss_by_hand(spliced(make()))
        found = read_metrics(files[name])
        assert found["ce_loss_without_sae"] == pytest.approx(clean, abs=SPLICED_LOSS)
        assert found["ce_loss_with_ablation"] == pytest.approx(ablated, abs=SPLICED_LOSS)
        assert found["ce_loss_with_sae"] == pytest.approx(with_sae, abs=SPLICED_LOSS)
        recovered = (ablated - with_sae) / (ablated - clean)
        assert found["ce_loss_score"] == pytest.approx(recovered, abs=20 * SPLICED_LOSS)
    assert read_metrics(files["identity"])["ce_loss_score"] == pytest.approx(1, abs=20 * SPLICED_LOSS)
    assert [read_metrics(files[name])["l0"] for name in makers] == [4, 4, 16]


def test_core_reads_the_split_view_whole(setting: EvalSetting, tmp_path: Path) -> None:
    """The same losses; but what core counts by codes above 0 it gets by half from the signed view."""
    makers = {"ours": tiny_db_ksvd_sae, "ours.split": lambda: tiny_db_ksvd_sae(view="split")}
    files = run_core_on(CountedPanel(makers), setting, tmp_path)
    assert re.fullmatch(r"ours\.split-[0-9a-f]{12}_custom_sae_eval_results\.json", files["ours.split"].name)
    signed, split = (read_metrics(files[name]) for name in makers)
    for name in ("ce_loss_score", "ce_loss_with_sae", "kl_div_with_sae", "l0", "mse", "cossim"):
        assert split[name] == pytest.approx(signed[name], rel=1e-5), name
    assert split["l0"] == 4
    # l1 is the sum of codes: signs cancel in one view.
    assert split["l1"] > 2 * abs(signed["l1"])
    densities = {
        name: np.array([latent["feature_density"] for latent in strict_json(path)["eval_result_details"]])
        for name, path in files.items()
    }
    assert (len(densities["ours"]), len(densities["ours.split"])) == (24, 48)
    # A density is the share of tokens, so they add up to the L0 if the count is whole.
    assert densities["ours.split"].sum() == pytest.approx(4, rel=1e-5)
    assert densities["ours"].sum() < 3.5
    assert densities["ours"] == pytest.approx(densities["ours.split"][:24]), "the positive half"


def test_core_results(counted: CountedPanel, setting: EvalSetting, model_loads: list[str], tmp_path: Path) -> None:
    files = run_core_on(counted, setting, tmp_path)
    assert sorted(files) == ["db-ksvd", "topk-sae"]
    assert model_loads == ["tiny"]
    for name, path in files.items():
        assert re.fullmatch(rf"{name}-[0-9a-f]{{12}}_custom_sae_eval_results\.json", path.name)
        assert path.parent.parent == tmp_path / "core"
        result = strict_json(path)
        assert result["eval_type_id"] == "core"
        found = read_metrics(path)
        assert found["ce_loss_score"] is not None
        assert math.isfinite(found["ce_loss_score"])
        assert found["l0"] == 4
        tokens = result["eval_result_metrics"]["token_stats"]
        assert tokens["total_tokens_eval_reconstruction"] == CONTEXT_TOKENS * 3
        assert tokens["total_tokens_eval_sparsity_variance"] == CONTEXT_TOKENS * 3 * 2
        assert result["eval_config"]["dataset"] == TEXT
    first, second = (read_metrics(path) for path in files.values())
    for clean in ("ce_loss_without_sae", "ce_loss_with_ablation", "kl_div_with_ablation", "l2_norm_in"):
        assert first[clean] == second[clean]
    assert first["ce_loss_with_sae"] != second["ce_loss_with_sae"]


# ---------------------------------------------------------------- sparse probing: the numbers


def test_sparse_probing_results(setting: EvalSetting, model_loads: list[str], tmp_path: Path) -> None:
    """The three classes share no word, so their mean activations lie apart and a probe on them is nearly always right.

    The identity dictionary's code is the activation, so its probe is one on the activations; a random dictionary's
    sparse code still tells the words of one class from another's, better than chance.
    """
    makers = {"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae, "identity": identity_sae}
    counted = CountedPanel(makers)
    files = run_probing_on(counted, setting, tmp_path / "probing")
    assert model_loads == ["tiny"]
    for name, path in files.items():
        assert re.fullmatch(rf"{name}-[0-9a-f]{{12}}_custom_sae_eval_results\.json", path.name)
        result = strict_json(path)
        assert result["eval_type_id"] == "sparse_probing"
        assert [detail["dataset_name"] for detail in result["eval_result_details"]] == [f"{CLASSES}_results"]
        found = read_metrics(path)
        # What SAEBench has a field for and was not asked for is left out, and nothing is None.
        assert set(found) == {
            f"{side}{probe}_test_accuracy" for side in ("llm", "sae") for probe in ("", "_top_1", "_top_5")
        }
        assert all(value is not None and 0 <= value <= 1 for value in found.values())
        assert found["llm_test_accuracy"] > 0.9
    identity = read_metrics(files["identity"])
    assert identity["sae_test_accuracy"] > 0.9
    assert identity["sae_top_5_test_accuracy"] > 0.9
    assert identity["sae_top_5_test_accuracy"] == pytest.approx(identity["llm_top_5_test_accuracy"], abs=0.1)
    assert read_metrics(files["db-ksvd"])["sae_test_accuracy"] > 0.7


@pytest.fixture
def _quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at accuracies: they spend most of their time on probes trained for 100 epochs."""
    original = probe_training.train_probe_on_activations

    def train(*args: Any, epochs: int = 5, **options: Any) -> Any:
        return original(*args, epochs=min(epochs, 3), **options)

    monkeypatch.setattr(probe_training, "train_probe_on_activations", train)


quickly = pytest.mark.usefixtures("_quick_probes")


# ---------------------------------------------------------------- SCR: the numbers


def test_scr_results(setting: EvalSetting, model_loads: list[str], tmp_path: Path) -> None:
    """Gender and profession are in different words, so there is something to remove, and something to keep.

    A dictionary of 16 latents cannot have 20 of them ablated: that score is not there, the others are.
    """
    makers = {"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae, "identity": identity_sae}
    config = SCR.model_copy(update={"probe_epochs": 20})
    files = run_scr_on(CountedPanel(makers), setting, tmp_path, config)
    scores = {}
    for name, path in files.items():
        assert path.parent.parent == tmp_path / "scr"
        result = strict_json(path)
        assert result["eval_type_id"] == "scr"
        assert [d["dataset_name"] for d in result["eval_result_details"]] == [f"{BIASED}_scr_professor_nurse_results"]
        found = scores[name] = read_metrics(path)
        sizes = [2, 5] if makers[name]().cfg.d_sae < 20 else [2, 5, 20]
        assert set(found) == {f"scr_{kind}_threshold_{n}" for kind in ("dir1", "dir2", "metric") for n in sizes}
        assert all(value is not None and math.isfinite(value) for value in found.values())
    assert len({json.dumps(found) for found in scores.values()}) == len(makers)
    assert "20" not in str(set(scores["identity"])), "the case must have a dictionary that is too small"


def test_scr_of_a_dictionary_smaller_than_every_size(setting: EvalSetting, tmp_path: Path) -> None:
    """No score is an error, not a result without scores; the others keep theirs."""
    makers = {"topk-sae": tiny_topk_sae, "identity": identity_sae}
    assert identity_sae().cfg.d_sae < 20 <= tiny_topk_sae().cfg.d_sae
    with pytest.raises(EvaluationError, match=r"(?s)no score for identity.*fewer latents.*n_values") as caught:
        run_scr_on(CountedPanel(makers), setting, tmp_path, SCR.model_copy(update={"n_values": [20]}))
    assert "topk-sae" not in str(caught.value).splitlines()[0]
    assert len(list((tmp_path / "scr").rglob("topk-sae-*.json"))) == 1


@pytest.mark.parametrize("left", ["no probes", "half of the probes", "half of the activations", "one pair", "all"])
def test_scr_of_an_interrupted_run_starts_over(left: str, setting: EvalSetting, tmp_path: Path) -> None:
    """Scores follow from the seed alone: not from what was there already, nor from whoever had it made."""
    config = SCR.model_copy(update={"pairs": {BIASED: [("professor", "nurse"), ("nurse", "professor")]}})
    # Has fewer sizes ablated than the other, and so draws less.
    makers = {"identity": identity_sae, "topk-sae": tiny_topk_sae}
    whole = run_scr_on(CountedPanel(makers), setting, tmp_path, config)["topk-sae"]
    before = read_metrics(whole)
    for broken in setting.artifacts.rglob("*_nurse_professor_*"):
        if left == "one pair" or (left == "no probes" and broken.suffix == ".pkl"):
            broken.unlink()
        elif left == f"half of the {broken.stem.rpartition('_')[2]}":
            broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    whole.unlink()
    again = run_scr_on(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path, config)
    assert read_metrics(again["topk-sae"]) == before
    shutil.rmtree(setting.artifacts)
    whole.unlink()
    again = run_scr_on(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path, config)
    assert read_metrics(again["topk-sae"]) == before, "by itself"


# ---------------------------------------------------------------- TPP: the numbers


def test_tpp_results(setting: EvalSetting, tmp_path: Path) -> None:
    """What is zeroed takes from the class's own probe, and from others: the score is the difference."""
    makers = {"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae, "identity": identity_sae}
    files = run_tpp_on(CountedPanel(makers), setting, tmp_path, TPP.model_copy(update={"probe_epochs": 20}))
    scores = {}
    for name, path in files.items():
        result = strict_json(path)
        assert result["eval_type_id"] == "tpp"
        assert [detail["dataset_name"] for detail in result["eval_result_details"]] == [f"{CLASSES}_tpp_results"]
        found = scores[name] = read_metrics(path)
        sizes = [2, 5] if makers[name]().cfg.d_sae < 20 else [2, 5, 20]
        parts = ("total_metric", "intended_diff_only", "unintended_diff_only")
        assert set(found) == {f"tpp_threshold_{n}_{part}" for n in sizes for part in parts}
        for n in sizes:
            total, own, others = (found[f"tpp_threshold_{n}_{part}"] for part in parts)
            assert total == pytest.approx(own - others)  # type: ignore[operator]
    assert len({json.dumps(found) for found in scores.values()}) == len(makers)


def test_tpp_scores_are_saebenchs_and_follow_from_the_seed(setting: EvalSetting, tmp_path: Path) -> None:
    """Whoever comes first, and whether probes were there: SAEBench draws other texts for an SAE that it trains for."""
    ours = [
        {name: read_metrics(path) for name, path in run_tpp_on(CountedPanel(makers), place, tmp_path / out).items()}
        for out, place, makers in (
            ("one", setting, {"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae}),
            ("other", setting, {"topk-sae": tiny_topk_sae}),
            ("third", replace(setting, artifacts=tmp_path / "new"), {"topk-sae": tiny_topk_sae}),
        )
    ]
    assert ours[0]["topk-sae"] == ours[1]["topk-sae"] == ours[2]["topk-sae"]
    config = scr.ScrAndTppEvalConfig(
        dataset_names=[CLASSES],
        perform_scr=False,
        train_set_size=40,
        test_set_size=20,
        context_length=CONTEXT_TOKENS,
        probe_epochs=3,
        llm_batch_size=16,
        llm_dtype="float32",
        model_name=setting.model_name,
        n_values=[2, 5, 20],
    )
    changes = {
        **labelled_text_datasets(LABELS),
        "sae_bench.evals.scr_and_tpp.main.COLUMN2_VALS_LOOKUP": {CLASSES: None},
    }
    panel = [("first", identity_sae()), ("db-ksvd", tiny_db_ksvd_sae()), ("topk-sae", tiny_topk_sae())]
    with working_directory(setting.data_folder), replaced(changes), torch.set_grad_enabled(torch.is_grad_enabled()):
        config.n_values = [2, 5]
        scr.run_eval(config, panel[:1], "cpu", str(tmp_path), artifacts_path=str(tmp_path / "stock"))
        config.n_values = [2, 5, 20]
        scr.run_eval(config, panel[1:], "cpu", str(tmp_path), artifacts_path=str(tmp_path / "stock"))
    for name, found in ours[0].items():
        assert found == read_metrics(result_file(tmp_path / "tpp", name))


@pytest.mark.parametrize("left", ["no probes", "half of the activations"])
def test_tpp_of_an_interrupted_run_starts_over(left: str, setting: EvalSetting, tmp_path: Path) -> None:
    files = run_tpp_on(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path)
    whole = read_metrics(files["topk-sae"])
    (activations,), (probes,) = (list(setting.artifacts.rglob(f"*.{kind}")) for kind in ("pt", "pkl"))
    if left == "no probes":
        probes.unlink()
    else:
        activations.write_bytes(activations.read_bytes()[: activations.stat().st_size // 2])
    files["topk-sae"].unlink()
    again = run_tpp_on(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path)
    assert read_metrics(again["topk-sae"]) == whole


@evals
@quickly
@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_on_or_off_as_before(run: Runner, enabled: bool, setting: EvalSetting, tmp_path: Path) -> None:
    with torch.set_grad_enabled(enabled):
        run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path)
        assert torch.is_grad_enabled() == enabled


def test_scr_leaves_saebench_as_it_was(setting: EvalSetting, tmp_path: Path) -> None:
    known, genders = dict(dataset_info.dataset_metadata), dict(scr.COLUMN2_VALS_LOOKUP)
    run_scr_on(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path)
    assert (known, genders) == (dataset_info.dataset_metadata, scr.COLUMN2_VALS_LOOKUP)


# ---------------------------------------------------------------- both: reuse


@evals
@quickly
def test_second_call_reuses(
    run: Runner, counted: CountedPanel, setting: EvalSetting, model_loads: list[str], tmp_path: Path
) -> None:
    files = run(counted, setting, tmp_path / "out")
    before = {path: path.read_bytes() for path in files.values()}
    counted.loads.clear()
    model_loads.clear()
    assert run(counted, setting, tmp_path / "out") == files
    assert counted.loads == []
    assert model_loads == []
    assert {path: path.read_bytes() for path in files.values()} == before


@evals
@quickly
def test_result_of_another_name_is_reused(
    run: Runner, counted: CountedPanel, setting: EvalSetting, model_loads: list[str], tmp_path: Path
) -> None:
    """A run of several seeds calls the training 'topk-sae.s0' that a run of one seed calls 'topk-sae'."""
    files = run(counted, setting, tmp_path / "out")
    named = CountedPanel({f"{name}.s0": make for name, make in counted.makers.items()})
    named.contents = {f"{name}.s0": f"content of {name}" for name in counted.makers}
    model_loads.clear()
    again = run(named, setting, tmp_path / "out")
    assert (named.loads, model_loads) == ([], [])
    for name, path in files.items():
        before, now = strict_json(path), strict_json(again[f"{name}.s0"])
        assert now.pop("sae_lens_release_id") in again[f"{name}.s0"].name
        assert before.pop("sae_lens_release_id") in path.name
        assert now == before


@evals
@quickly
def test_changed_content_is_computed_anew(
    run: Runner, counted: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    files = run(counted, setting, tmp_path / "out")
    counted.loads.clear()
    counted.contents["db-ksvd"] = "learned again"
    counted.makers["db-ksvd"] = lambda: tiny_db_ksvd_sae(seed=5)
    again = run(counted, setting, tmp_path / "out")
    assert counted.loads == ["db-ksvd"]
    assert again["topk-sae"] == files["topk-sae"]
    assert again["db-ksvd"] != files["db-ksvd"]
    assert files["db-ksvd"].exists()
    assert read_metrics(again["db-ksvd"]) != read_metrics(files["db-ksvd"])


@quickly
@pytest.mark.parametrize(
    ("run", "change"),
    [
        (run_core_on, {"reconstruction_batches": 2}),
        (run_core_on, {"context_tokens": 10}),
        (run_core_on, {"dataset": ONE_TEXT}),
        (run_probing_on, {"train_set_size": 36}),
        (run_scr_on, {"n_values": [2, 4]}),
        (run_tpp_on, {"seed": 7}),
    ],
    ids=["batches", "context", "data set", "probe's training set", "SCR's sizes", "seed"],
)
def test_changed_config_is_computed_anew(
    run: Runner, change: dict[str, Any], setting: EvalSetting, tmp_path: Path
) -> None:
    counted = CountedPanel({"topk-sae": tiny_topk_sae})
    files = run(counted, setting, tmp_path / "out")
    config = {run_core_on: CORE, run_probing_on: PROBING, run_scr_on: SCR, run_tpp_on: TPP}[run]
    again = run(counted, setting, tmp_path / "out", config.model_copy(update=change))
    assert counted.loads == ["topk-sae", "topk-sae"]
    assert again != files
    assert read_metrics(again["topk-sae"]) != read_metrics(files["topk-sae"])


@evals
@quickly
def test_changed_data_is_computed_anew(
    run: Runner, setting: EvalSetting, model_loads: list[str], tmp_path: Path
) -> None:
    """Sparse probing's cached activations of the model too: SAEBench itself would take them by the data set's name."""
    counted = CountedPanel({"topk-sae": tiny_topk_sae})
    files = run(counted, setting, tmp_path / "out")
    cached = set(setting.artifacts.rglob("*.pt"))
    assert bool(cached) == (run in CACHED)
    again = run(counted, replace(setting, data_hash="another"), tmp_path / "out")
    assert again != files
    assert counted.loads == ["topk-sae", "topk-sae"]
    assert bool(set(setting.artifacts.rglob("*.pt")) - cached) == (run in CACHED)


@evals
@quickly
@pytest.mark.parametrize("package", ["sae-bench", "sae-lens", "transformer-lens", "transformers", "torch"])
def test_another_version_is_computed_anew(
    run: Runner, package: str, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of the model, too."""
    counted = CountedPanel({"topk-sae": tiny_topk_sae})
    files = run(counted, setting, tmp_path / "out")
    cached = set(setting.artifacts.rglob("*.pt"))
    monkeypatch.setattr(base, "versions", lambda: {**versions(), package: "0.0.1"})
    assert run(counted, setting, tmp_path / "out") != files
    assert counted.loads == ["topk-sae", "topk-sae"]
    assert bool(set(setting.artifacts.rglob("*.pt")) - cached) == (run in CACHED)


@evals
@quickly
def test_a_result_says_what_it_follows_from(
    run: Runner, counted: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    files = run(counted, setting, tmp_path / "out")
    assert len({path.parent for path in files.values()}) == 1
    for name, path in files.items():
        follows_from = strict_json(path)["follows_from"]
        assert path.name == f"{name}-{follows_from['dictionary']}_custom_sae_eval_results.json"
        assert follows_from.pop("dictionary") == content_hash(f"content of {name}")
        assert path.parent.name == content_hash(follows_from)
        assert follows_from["versions"] == base.scoring_versions()
        assert {"config", "eval", "data", "model", "dtype"} < set(follows_from)


@quickly
def test_a_result_of_other_settings_is_not_taken(setting: EvalSetting, tmp_path: Path) -> None:
    """Wherever it was put."""
    counted = CountedPanel({"topk-sae": tiny_topk_sae})
    first = run_scr_on(counted, setting, tmp_path / "out")["topk-sae"]
    other = SCR.model_copy(update={"seed": 7})
    second = run_scr_on(counted, setting, tmp_path / "out", other)["topk-sae"]
    assert first.name == second.name
    whole = second.read_bytes()
    shutil.copyfile(first, second)
    run_scr_on(counted, setting, tmp_path / "out", other)
    assert counted.loads == ["topk-sae"] * 3
    again, before = strict_json(second), json.loads(whole)
    assert again["follows_from"] == before["follows_from"]
    assert again["eval_result_metrics"] == before["eval_result_metrics"]
    shutil.copyfile(first, second.with_name(second.name.replace("topk-sae", "other-name")))
    second.unlink()
    run_scr_on(counted, setting, tmp_path / "out", other)
    assert counted.loads == ["topk-sae"] * 4, "nor under another name"


@evals
@quickly
def test_what_a_killed_run_had_finished_is_completed(
    run: Runner, setting: EvalSetting, model_loads: list[str], tmp_path: Path
) -> None:
    """SAEBench has written its file, and we have not been there to say what it follows from."""
    counted = CountedPanel({"topk-sae": tiny_topk_sae})
    path = run(counted, setting, tmp_path / "out")["topk-sae"]
    whole = strict_json(path)
    left = {name: value for name, value in whole.items() if name != "follows_from"}
    path.write_text(json.dumps({**left, "sae_cfg_dict": {}}))
    model_loads.clear()
    run(counted, setting, tmp_path / "out")
    assert model_loads == [], "nothing is scored"
    now = strict_json(path)
    # SAEBench adds where the SAE is, which it has from the SAE itself.
    assert now["sae_cfg_dict"]["architecture"] == "topk"
    assert {**now, "sae_cfg_dict": {}} == {**whole, "sae_cfg_dict": {}}


@quickly
def test_half_written_model_activations_are_made_again(setting: EvalSetting, tmp_path: Path) -> None:
    """SAEBench writes them in place, so a process that is stopped leaves half a file."""
    files = run_probing_on(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out")
    (cached,) = setting.artifacts.rglob("*.pt")
    cached.write_bytes(cached.read_bytes()[: cached.stat().st_size // 2])
    files["topk-sae"].unlink()
    again = run_probing_on(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out")
    assert again["topk-sae"].exists()


BROKEN_FILES = {
    "half": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no metrics": lambda text: "{}",
    "null": lambda text: "null",
    "list": lambda text: "[]",
}


@pytest.mark.parametrize("breaking", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_result_is_computed_again(
    breaking: Callable[[str], str], counted: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    files = run_core_on(counted, setting, tmp_path / "out")
    whole = read_metrics(files["db-ksvd"])
    files["db-ksvd"].write_text(breaking(files["db-ksvd"].read_text()))
    counted.loads.clear()
    assert run_core_on(counted, setting, tmp_path / "out") == files
    assert counted.loads == ["db-ksvd"]
    assert read_metrics(files["db-ksvd"]) == whole


def test_garbage_result_is_computed_again(counted: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    files = run_core_on(counted, setting, tmp_path / "out")
    files["db-ksvd"].write_bytes(b"\xff\xfe\x00garbage")
    assert run_core_on(counted, setting, tmp_path / "out") == files
    assert read_metrics(files["db-ksvd"])["l0"] == 4


@evals
@quickly
def test_output_may_be_a_relative_path(
    run: Runner, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, Path("out"))
    assert files["topk-sae"].exists()


# ---------------------------------------------------------------- both: failures


class Broken(DBKSVDSAE):
    def encode(self, x: Tensor) -> Tensor:
        raise RuntimeError("this code is broken")


def broken_sae() -> DBKSVDSAE:
    return Broken(tiny_db_ksvd_sae().cfg)


@evals
@quickly
@pytest.mark.parametrize("order", [("broken", "topk-sae"), ("topk-sae", "broken")], ids=["first", "last"])
def test_one_that_fails_leaves_the_others_result(
    run: Runner, order: tuple[str, str], setting: EvalSetting, tmp_path: Path
) -> None:
    makers = {"broken": broken_sae, "topk-sae": tiny_topk_sae}
    counted = CountedPanel({name: makers[name] for name in order})
    with pytest.raises(EvaluationError) as caught:
        run(counted, setting, tmp_path / "out")
    first_line = str(caught.value).splitlines()[0]
    assert "broken" in first_line
    assert "topk-sae" not in first_line
    assert "this code is broken" in str(caught.value)
    kept = list((tmp_path / "out").rglob("*.json"))
    assert [path.name.split("-")[0] for path in kept] == ["topk"]
    # Mended, only the broken one is computed.
    counted.loads.clear()
    counted.makers["broken"] = tiny_db_ksvd_sae
    files = run(counted, setting, tmp_path / "out")
    assert counted.loads == ["broken"]
    assert kept[0] in files.values()


@evals
@quickly
@pytest.mark.parametrize("order", [("lost", "topk-sae"), ("topk-sae", "lost")], ids=["first", "last"])
def test_one_that_cannot_be_loaded_leaves_the_others_result(
    run: Runner, order: tuple[str, str], setting: EvalSetting, tmp_path: Path
) -> None:
    def lost() -> None:
        raise OSError("no such dictionary")

    makers: dict[str, Any] = {"lost": lost, "topk-sae": tiny_topk_sae}
    with pytest.raises(EvaluationError, match="no such dictionary") as caught:
        run(CountedPanel({name: makers[name] for name in order}), setting, tmp_path / "out")
    assert "topk-sae" not in str(caught.value).splitlines()[0]
    assert len(list((tmp_path / "out").rglob("topk-sae-*.json"))) == 1


def test_core_on_a_data_set_that_is_not_there(
    counted: CountedPanel, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SAEBench tries again and again, and waits longer each time.
    monkeypatch.setattr(general_utils.time, "sleep", lambda seconds: None)
    (setting.data_folder / "empty-folder").mkdir(exist_ok=True)
    config = CORE.model_copy(update={"dataset": "empty-folder"})
    with pytest.raises(EvaluationError, match=r"(?s)no score for db-ksvd, topk-sae.*empty-folder"):
        run_core_on(counted, setting, tmp_path / "out", config)


@evals
@quickly
def test_model_that_is_not_there(
    run: Runner, counted: CountedPanel, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, **options: Any) -> None:
        raise OSError(f"{name}: no such model")

    monkeypatch.setattr(general_utils.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", missing)
    with pytest.raises(EvaluationError, match=r"(?s)no score for db-ksvd, topk-sae.*tiny: no such model"):
        run(counted, setting, tmp_path / "out")


@evals
@quickly
def test_everything_is_put_back_after_a_failure(run: Runner, setting: EvalSetting, tmp_path: Path) -> None:
    before = Path.cwd(), dict(dataset_info.chosen_classes_per_dataset), dataset_utils.get_multi_label_train_test_data
    with pytest.raises(EvaluationError):
        run(CountedPanel({"broken": broken_sae}), setting, tmp_path / "out")
    after = Path.cwd(), dict(dataset_info.chosen_classes_per_dataset), dataset_utils.get_multi_label_train_test_data
    assert after == before


@pytest.mark.parametrize(
    ("run", "module", "function"),
    [(run_core_on, core, "multiple_evals"), (run_probing_on, probing, "run_eval")],
    ids=["core", "sparse_probing"],
)
def test_an_eval_that_writes_nothing_and_says_nothing(
    run: Runner,
    module: Any,
    function: str,
    counted: CountedPanel,
    setting: EvalSetting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, function, lambda *args, **options: None)
    with pytest.raises(EvaluationError, match=r"(?s)no score for db-ksvd, topk-sae.*no reason"):
        run(counted, setting, tmp_path / "out")


# ---------------------------------------------------------------- values that are not finite


def test_nan_and_infinity_become_null(
    counted: CountedPanel, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """json.dumps writes both as words that no JSON parser has to take; SAEBench lets it."""

    def write(selected_saes: list[tuple[str, Any]], output_folder: str, **options: Any) -> None:
        for name, _ in selected_saes:
            metrics = {"kl": {"kl_div_score": -math.inf, "kl_div_with_sae": math.nan}, "sparsity": {"l0": 4.0}}
            details = [{"density": x} for x in (math.inf, 1, "NaN", math.nan, math.nan)]
            result = {"eval_type_id": "core", "eval_result_metrics": metrics, "eval_result_details": details}
            result["eval_result_unstructured"] = None
            path = Path(output_folder) / f"{name}_custom_sae_eval_results.json"
            path.write_text(json.dumps(result))

    monkeypatch.setattr(core, "multiple_evals", write)
    files = run_core_on(counted, setting, tmp_path / "out")
    result = strict_json(files["db-ksvd"])
    assert [detail["density"] for detail in result["eval_result_details"]] == [None, 1, "NaN", None, None]
    assert result["eval_result_unstructured"] == {
        "null because the value was": {
            "eval_result_metrics/kl/kl_div_score": {"-Infinity": 1},
            "eval_result_metrics/kl/kl_div_with_sae": {"NaN": 1},
            "eval_result_details/*/density": {"Infinity": 1, "NaN": 2},
        }
    }
    assert read_metrics(files["db-ksvd"]) == {"kl_div_score": None, "kl_div_with_sae": None, "l0": 4.0}


class NotANumber(DBKSVDSAE):
    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts) * math.nan


def test_a_loss_that_is_no_number_is_no_score(setting: EvalSetting, tmp_path: Path) -> None:
    """SAEBench's core writes −1 for NaN, and a loss recovered of −1 looks like one."""
    counted = CountedPanel({"broken": lambda: NotANumber(tiny_db_ksvd_sae().cfg)})
    files = run_core_on(counted, setting, tmp_path / "out")
    found = read_metrics(files["broken"])
    assert found["ce_loss_without_sae"] is not None
    assert found["ce_loss_with_sae"] is None
    assert found["ce_loss_score"] is None


# ---------------------------------------------------------------- what a result says of where it was made


@evals
@quickly
def test_results_name_no_place_of_this_machine(
    run: Runner, counted: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    files = run(counted, setting, tmp_path / "out")
    for path in files.values():
        for text in strings(strict_json(path)):
            assert not text.startswith(("/", "~")), text
            assert str(tmp_path) not in text
            assert str(Path.home()) not in text


@evals
@quickly
def test_result_does_not_carry_the_callers_commit(
    run: Runner,
    setting: EvalSetting,
    tmp_path: Path,
    checkout: Path,
) -> None:
    files = run(CountedPanel({"topk-sae": tiny_topk_sae}), setting, tmp_path / "out")
    assert COMMIT not in files["topk-sae"].read_text()
