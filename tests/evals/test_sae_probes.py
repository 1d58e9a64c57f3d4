"""SAEBench's sparse probing on sae-probes' data sets: its own scores, one run of the model, no silent gap."""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sae_probes
import torch
from sae_bench.evals.sparse_probing_sae_probes import main as stock
from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
from sae_probes import generate_model_activations, generate_sae_activations, run_baselines, utils_data
from sklearn.exceptions import ConvergenceWarning
from transformer_lens import HookedTransformer

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.panel import run_evals
from ksvd_sae.evals.sae_probes import SaeProbesEval, adapters
from ksvd_sae.evals.sae_probes.adapters import texts_read_once
from ksvd_sae.evals.sae_probes.run import run_sae_probes
from ksvd_sae.evals.saebench.runner import read_metrics
from ksvd_sae.replaced import replaced
from tests.evals.conftest import CountedPanel
from tests.tiny_saes import (
    COLOURS,
    HOOK,
    METALS,
    MODEL_NAME,
    TREES,
    heads_as_attention_output,
    identity_sae,
    tiny_db_ksvd_sae,
    tiny_model,
    tiny_topk_sae,
)

pytestmark = [
    pytest.mark.usefixtures("own_data"),
    # sae-probes passes penalty='l1' alone, which scikit-learn 1.9 obeys and warns of.
    pytest.mark.filterwarnings("ignore:Inconsistent values. penalty=l1 with l1_ratio=0.0:UserWarning"),
    # As sae-probes itself asks at its import.
    pytest.mark.filterwarnings(f"ignore::{ConvergenceWarning.__module__}.ConvergenceWarning"),
]
COLOUR, METAL = "1_colour", "2_metal"
N_TEXTS = 160
CONFIG = SaeProbesEval(datasets=[COLOUR, METAL], k_values=[1, 5])


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two data sets in sae-probes' layout: what the texts end in, in words that the tiny model knows."""
    folder, draw = tmp_path / "data", random.Random(0)
    (folder / "cleaned_data").mkdir(parents=True)
    names = {COLOUR: (COLOURS[:3], COLOURS[3:]), METAL: (METALS[:2], METALS[2:])}
    for name, endings in names.items():
        rows = [
            {"prompt": " ".join([*draw.choices(TREES, k=draw.randint(1, 4)), draw.choice(words)]), "target": target}
            for target, words in enumerate(endings)
            for _ in range(N_TEXTS // 2)
        ]
        draw.shuffle(rows)
        pd.DataFrame(rows).to_csv(folder / "cleaned_data" / f"{name}.csv.zst", index=False, compression="zstd")
    master = [
        {"Data type": "Binary Classification", "Dataset Tag": name[2:], "Dataset save name": f"cleaned_data/{name}.csv"}
        for name in names
    ]
    pd.DataFrame(master).to_csv(folder / "probing_datasets_MASTER.csv.zst", index=False, compression="zstd")
    caches = (utils_data.get_binary_df, utils_data.read_dataset_df, utils_data.get_dataset_sizes)
    for cached in caches:
        cached.cache_clear()
    for module in (utils_data, generate_model_activations):
        monkeypatch.setattr(module, "DATA_PATH", folder)
    for module in (generate_sae_activations, run_baselines):
        monkeypatch.setattr(module, "DATASET_SIZES", dict.fromkeys(names, N_TEXTS))
    monkeypatch.setattr(sae_probes, "DATASETS", list(names))
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def panel() -> CountedPanel:
    return CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae, "identity": identity_sae})


def stock_scores(sae: Any, folder: Path, seed: int = 42) -> dict[str, Any]:
    config = SparseProbingSaeProbesEvalConfig(
        model_name=MODEL_NAME,
        random_seed=seed,
        dataset_names=[COLOUR, METAL],
        ks=[1, 5],
        results_path=str(folder / "probes"),
        model_cache_path=str(folder / "activations"),
    )
    stock.run_eval(config, [("sae", sae)], "cpu", str(folder / "output"))
    found: dict[str, Any] = json.loads((folder / "output" / "sae_custom_sae_eval_results.json").read_text())
    return found


def test_scores_are_stock_saebench_s(panel: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    files = run_sae_probes(panel.panelists(), CONFIG, setting, tmp_path / "ours").files
    for name, make in panel.makers.items():
        ours, theirs = json.loads(files[name].read_text()), stock_scores(make(), tmp_path / name)
        assert ours["eval_result_metrics"] == theirs["eval_result_metrics"], name
        by_name = [{d["dataset_name"]: d for d in r["eval_result_details"]} for r in (ours, theirs)]
        assert by_name[0] == by_name[1], name


def test_scores_at_hook_z_are_those_of_the_flattened_heads(
    setting: EvalSetting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load = "from_pretrained_no_processing"
    monkeypatch.setattr(HookedTransformer, load, lambda name, **options: heads_as_attention_output())
    hooks = {"flat": "blocks.0.hook_attn_out", "heads": "blocks.0.attn.hook_z"}
    panel = CountedPanel({name: partial(tiny_db_ksvd_sae, hook=hook) for name, hook in hooks.items()}).panelists()
    metrics = run_sae_probes(panel, CONFIG, setting, tmp_path).metrics
    assert metrics["heads"] == metrics["flat"]


def test_what_a_result_holds(panel: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    results = run_sae_probes(panel.panelists(), CONFIG, setting, tmp_path / "ours")
    files, metrics = results.files, results.metrics
    assert metrics == {name: read_metrics(path) for name, path in files.items()}
    # The last word tells the class, and the model adds it to what it read.
    assert {name: found["llm_test_accuracy"] for name, found in metrics.items()} == dict.fromkeys(metrics, 1.0)
    for found in metrics.values():
        top_1, top_5 = found["sae_top_1_test_accuracy"], found["sae_top_5_test_accuracy"]
        assert top_1 is not None
        assert top_5 is not None
        assert 0.5 < top_1 <= top_5
        assert None not in found.values()
    assert results.n == 2
    assert str(tmp_path) not in files["db-ksvd"].read_text(), "a result names no folder of this machine"
    # Which SAEBench forgets here.
    kinds = {name: json.loads(path.read_text())["sae_cfg_dict"]["architecture"] for name, path in files.items()}
    assert kinds == {"db-ksvd": "db_ksvd", "topk-sae": "topk", "identity": "db_ksvd"}


def test_the_model_runs_once_for_a_panel_and_its_seeds(
    panel: CountedPanel, setting: EvalSetting, model_loads: list[str], tmp_path: Path
) -> None:
    evals = [CONFIG.with_seed(seed) for seed in (1, 2)]
    results = list(run_evals(panel.panelists(), evals, setting, tmp_path))
    assert model_loads == [MODEL_NAME]
    assert [(r.seed, r.n, r.data) for r in results] == [(s, 2, "2 of the data sets of sae-probes") for s in (1, 2)]
    theirs = stock_scores(tiny_topk_sae(), tmp_path / "stock", seed=2)["eval_result_metrics"]
    assert results[1].metrics["topk-sae"]["sae_top_1_test_auc"] == theirs["sae"]["sae_top_1_test_auc"]


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.attn.hook_z"])
def test_each_text_is_read_once_and_gives_what_sae_probes_reads(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    model = heads_as_attention_output()
    model.blocks[0].register_forward_hook(lambda _, __, given: read.append(tuple(given.shape[:2])))
    draw = random.Random(0)
    first = [" ".join(draw.choices(TREES, k=draw.randint(1, 30))) for _ in range(40)]
    data_sets = [[*first, *first[:7]], [*first[20:], *reversed(first[20:]), TREES[0] + " " + TREES[0]]]
    # Texts of more than 12 tokens lose their beginning.
    asked = [(texts, 4, 12, [hook], None, "cpu") for texts in data_sets]
    theirs = [generate_model_activations._process_activations(model, *one) for one in asked]
    read.clear()
    monkeypatch.setattr(adapters, "_TOKENS_AT_ONCE", 60)
    with replaced(texts_read_once()):
        ours = [generate_model_activations._process_activations(model, *one) for one in asked]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(rows for rows, _ in read) == len({*data_sets[0], *data_sets[1]})
    lengths = [length for _, length in read[:-1]]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 12
    assert all(rows * length <= max(60, 4 * length) for rows, length in read)
    assert max(rows for rows, _ in read) > 4


def test_what_does_not_fit_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_model(), list[int]()
    model.blocks[0].register_forward_hook(lambda _, __, given: read.append(len(given)))
    monkeypatch.setattr(adapters, "_KEPT_BYTES", 2 * 4 * model.cfg.d_model)
    with replaced(texts_read_once()):
        for _ in range(2):
            generate_model_activations._process_activations(model, TREES[:3], 32, 1024, [HOOK], None, "cpu")
    assert read == [3, 1]


def test_files_that_an_interrupted_run_left_are_made_again(
    panel: CountedPanel, setting: EvalSetting, tmp_path: Path
) -> None:
    whole = run_sae_probes(panel.panelists(), CONFIG, setting, tmp_path / "whole").files
    wanted = read_metrics(whole["db-ksvd"])
    broken = [*setting.artifacts.rglob("*_l1.json"), *setting.artifacts.rglob("*_logreg.json")]
    broken += [path for path in setting.artifacts.rglob("*.pt") if "activations" in path.parent.name]
    assert len(broken) == 3 * 2 + 2 + 2
    for path in broken:
        path.write_bytes(path.read_bytes()[:20])
    again = run_sae_probes(panel.panelists(), CONFIG, setting, tmp_path / "again").files
    assert read_metrics(again["db-ksvd"]) == wanted


def test_a_data_set_that_there_is_not(panel: CountedPanel, setting: EvalSetting, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"datasets": ["1_color"]})
    with pytest.raises(EvaluationError, match="no data set '1_color'") as error:
        run_sae_probes(panel.panelists(), config, setting, tmp_path)
    assert COLOUR in str(error.value)
    assert panel.loads == []


def test_a_mean_over_fewer_data_sets_is_an_error(
    panel: CountedPanel, setting: EvalSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stock._aggregate_metrics_from_sae_probes_json
    monkeypatch.setattr(
        stock, "_aggregate_metrics_from_sae_probes_json", lambda path: {} if METAL in path.name else read(path)
    )
    with pytest.raises(EvaluationError, match="db-ksvd: the mean is over 1 data sets") as error:
        run_sae_probes(panel.panelists(), CONFIG, setting, tmp_path / "ours")
    assert f"no score for {METAL}" in str(error.value)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("option", "value"), [("datasets", []), ("k_values", [3]), ("k_values", []), ("reg_type", "l3")]
)
def test_what_saebench_cannot_do_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        SaeProbesEval.model_validate({option: value})
