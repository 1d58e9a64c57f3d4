"""docs/saebench.md: its code runs, and SAEBench's own plots show what a run of ours wrote."""

import csv
import functools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from sae_bench.evals.core import main as core
from sae_bench.evals.sparse_probing import eval_config
from sae_bench.evals.sparse_probing import main as probing
from typer.testing import CliRunner

from ksvd_sae.cli import app
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.panel import result_files, run_evals
from ksvd_sae.report.raw import RAW, result_name, write_raw
from tests.command_line import REPOSITORY
from tests.evals.conftest import TEXT, CountedPanel
from tests.evals.test_saebench import CORE, PROBING, SCR, TPP, strict_json
from tests.tiny_saes import COLOURS, CONTEXT_TOKENS, METALS, TREES, tiny_db_ksvd_sae, tiny_topk_sae

pytestmark = pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "saebench.md"
ONE, ALL, PLOTS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
# As many as SAEBench's plot by width knows.
N_LATENTS = 4096
PANEL = {
    "db-ksvd": lambda: tiny_db_ksvd_sae(n_atoms=N_LATENTS),
    "topk-sae": lambda: tiny_topk_sae(N_LATENTS),
    "random": lambda: tiny_db_ksvd_sae(n_atoms=N_LATENTS, seed=1),
}


def run_code(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory. No word in its name is one by which SAEBench tells evals."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ---------------------------------------------------------------- SAEBench runs our SAEs


@pytest.fixture
def _small(here: Path, data_folder: Path, model_loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's data set, and SAEBench's protocol at sizes of the tiny model; it stays what it is otherwise."""
    draw, words = random.Random(0), (COLOURS, METALS, TREES, ("one", "two", "six", "ten"))
    for split, n in (("train", 30), ("test", 15)):
        rows = [
            {"text": " ".join(draw.choices(w, k=8)), "label": label} for label, w in enumerate(words) for _ in range(n)
        ]
        path = here / "fancyzhx" / "ag_news" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / TEXT).symlink_to(data_folder / TEXT)
    sizes = {"probe_train_set_size": 40, "probe_test_set_size": 20, "context_length": CONTEXT_TOKENS}
    small = functools.partial(probing.SparseProbingEvalConfig, **{"dataset_names": ["fancyzhx/ag_news"], **sizes})
    for module in (probing, eval_config):
        monkeypatch.setattr(module, "SparseProbingEvalConfig", small)
    original = core.multiple_evals

    def a_few_batches(**options: Any) -> Any:
        few = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2, "eval_batch_size_prompts": 3}
        return original(**{**options, **few, "dataset": TEXT, "context_size": CONTEXT_TOKENS})

    monkeypatch.setattr(core, "multiple_evals", a_few_batches)


@pytest.mark.usefixtures("_small")
def test_saebench_runs_our_sae(here: Path) -> None:
    tiny_db_ksvd_sae().save_model(here / "my-dictionary")
    names = run_code(ONE, {})
    (one,) = (here / "eval_results" / "sparse_probing").iterdir()
    assert strict_json(one)["sae_cfg_dict"]["architecture"] == "db_ksvd"
    one.unlink()
    run_code(ALL, names)
    found = {path.parent.name: strict_json(path) for path in (here / "eval_results").rglob("*.json")}
    assert set(found) == {"core", "sparse_probing"}
    assert found["core"]["eval_result_metrics"]["sparsity"]["l0"] == 4
    assert found["sparse_probing"]["eval_result_metrics"]["sae"]["sae_top_1_test_accuracy"] > 0.5
    listed = re.search(r"eval_types=(.*)", ALL)
    assert listed is not None
    types = set(re.findall(r"[a-z_]{3,}", listed[1])) - {"eval_types"}
    assert types == set(names["saebench"].output_folders) - {"unlearning"}, "SAEBench has other evals now"


# ---------------------------------------------------------------- SAEBench plots our results


@pytest.fixture
def graphing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SAEBench's plots, which stay open."""
    with matplotlib.rc_context():
        # It changes fonts as it is imported.
        from sae_bench.sae_bench_utils import graphing_utils

        monkeypatch.setattr(plt, "show", lambda: None)
        plt.close("all")
        yield graphing_utils
        plt.close("all")


@pytest.fixture
def unpacked(here: Path, setting: EvalSetting) -> Path:
    """SAEBench's files of a small run of four evals, one of them with two seeds, out of its raw.zip."""
    # With fewer epochs both of its directions tie, and SAEBench gives no score.
    scr = SCR.model_copy(update={"probe_epochs": 20})
    evals = [CORE, PROBING.with_seed(1), PROBING.with_seed(2), scr, TPP]
    results = list(run_evals(CountedPanel(PANEL).panelists(), evals, setting, here / "cache"))
    files = {
        result_name(eval_name, file): here / "cache" / eval_name / file
        for eval_name, of in result_files(results, here / "cache").items()
        for file in of.values()
    }
    assert len(files) == len(evals) * len(PANEL)
    write_raw(here / "results" / "demo" / RAW, files)
    done = CliRunner().invoke(app, ["unpack", "results/demo"])
    assert done.exit_code == 0, done.output
    return Path("results/demo/saebench")


def scores(path: Path, group: str) -> dict[str, float]:
    found: dict[str, float] = strict_json(path)["eval_result_metrics"][group]
    return found


def points(figure: Figure) -> list[list[float]]:
    """What a figure shows, beside its colour bar."""
    return sorted(point for drawn in figure.axes[0].collections for point in drawn.get_offsets().data.tolist())


def test_saebenchs_plots_show_a_run_of_ours(unpacked: Path, graphing: Any) -> None:
    names = run_code(PLOTS, {})
    assert names["kinds"] == ["db_ksvd", "topk"]
    assert {path.name for path in Path().glob("*.png")} == {"probing_2var_sae_type.png", "probing_2var_dict_size.png"}
    by_kind, by_width = (points(plt.figure(number)) for number in plt.get_fignums())
    # Of two seeds, the last that is found counts.
    accuracy = {path.name: scores(path, "sae")["sae_top_5_test_accuracy"] for path in map(Path, names["probing"])}
    assert len(accuracy) == len(PANEL)
    assert by_kind == by_width == sorted([4.0, value] for value in accuracy.values())

    plt.close("all")
    core_files = names["core"]
    for folder in sorted(path for path in unpacked.glob("*/*") if path.parent.name != "core"):
        files = graphing.find_eval_results_files([str(folder)])
        found = graphing.get_eval_results(files)
        assert set(found) == set(graphing.get_core_results(core_files)), folder
        classes = {name.rpartition("-")[0]: result["sae_class"] for name, result in found.items()}
        assert classes == {"db-ksvd": "db_ksvd", "topk-sae": "topk", "random": "db_ksvd"}
        styles = {"trainer_markers": names["markers"], "trainer_colors": names["colors"]}
        graphing.plot_results(files, core_files, folder.parent.name, "any", k=5, **styles)
        by_kind, by_width = (points(plt.figure(number)) for number in plt.get_fignums())
        assert by_kind == by_width
        assert len(by_kind) == len(PANEL)
        plt.close("all")


def test_the_best_of_several_sizes(unpacked: Path, graphing: Any) -> None:
    """What SAEBench's own function for it would draw, if that could be called."""
    folder = next((unpacked / "sparse_probing").iterdir())
    probing_files, core_files = (graphing.find_eval_results_files([str(p)]) for p in (folder, unpacked / "core"))
    with pytest.raises(TypeError, match="positional argument"):
        graphing.plot_best_of_ks_results([], str(folder), str(unpacked / "core"), "best", ks=[1, 5])
    found = graphing.get_eval_results(probing_files)
    for name, result in graphing.get_core_results(core_files).items():
        found[name].update(result)
    best = graphing.get_best_results(found, "sparse_probing", ks=[1, 5])
    graphing.plot_3var_graph(best, "best", "best_custom_metric", output_filename="best.png")
    assert points(plt.gcf()) == sorted([4.0, result["ce_loss_score"]] for result in found.values())


def test_saebenchs_plots_show_the_demo(here: Path, graphing: Any) -> None:
    """The committed run: its dictionaries' scores; of the widths that the second plot knows it has none."""
    shutil.copytree(REPOSITORY / "results" / "demo", here / "results" / "demo")
    done = CliRunner().invoke(app, ["unpack", "results/demo"])
    assert done.exit_code == 0, done.output
    run_code(PLOTS, {})
    by_kind, by_width = (points(plt.figure(number)) for number in plt.get_fignums())
    with (here / "results" / "demo" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = [
        float(r["value"]) for r in rows if (r["eval"], r["metric"]) == ("sparse_probing", "sae_top_5_test_accuracy")
    ]
    assert sorted(accuracy for _, accuracy in by_kind) == pytest.approx(sorted(wanted))
    assert len(wanted) >= 6
    assert by_width == []
