"""eval_configs/dinov2-s.yaml and dinov2-b.yaml from images to report, through the command line, on tiny models of those
names."""

import base64
import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from ksvd_sae.report.raw import RawResults
from tests import tiny_vision
from tests.command_line import EVAL_CONFIGS, REPOSITORY, ksvd_sae, set_options

CONFIGS = ("dinov2-s", "dinov2-b")
PIXELS = 96


def dictionaries(config: str) -> list[str]:
    return list(yaml.safe_load((EVAL_CONFIGS / f"{config}.yaml").read_text())["dictionaries"])


def shrunk(config: str) -> dict[str, str]:
    """What makes a config small enough for random models of 32 and 48 dimensions and two hundred images."""
    names = dictionaries(config)
    groups = [name for name in names if "matryoshka" in name]
    return {
        # ImageNet is not here. The folder is relative: results name what the config names.
        "images": "{source: folder, dataset: images}",
        "harvest.train_tokens": "10000",
        "harvest.heldout_tokens": "12000",
        "harvest.batch_images": "8",
        "harvest.shard_tokens": "4096",
        **{f"dictionaries.{name}.n_atoms": "96" if "16k" in name else "64" for name in names if name != "pca"},
        **{f"dictionaries.{name}.batch_samples": "2048" for name in names if name not in ("pca", "random")},
        **{f"dictionaries.{name}.passes": "2" for name in names if name.endswith("sae")},
        **{f"dictionaries.{name}.groups": "[16, 48]" for name in groups},
        **{f"dictionaries.{name}.k": "8" for name in names},
        "evaluation.spatial.min_images": "5",
        "evaluation.transfer": "{images: {source: folder, dataset: elsewhere}, n_images: 30}",
        "report": f"{{atoms: 3, examples: 3, pixels: {PIXELS}}}",
    }


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    tiny_vision.vision_models(folder / "hf-home")
    tiny_vision.write_images(folder / "images", 40)
    tiny_vision.write_images(folder / "elsewhere", 10, seed=1)
    return folder


def run(place: Path, config: str, command: str = "run", **changes: str) -> subprocess.CompletedProcess[str]:
    options = set_options({**shrunk(config), **changes})
    return ksvd_sae(
        command,
        str(EVAL_CONFIGS / f"{config}.yaml"),
        *options,
        folder=place,
        hf_home=place / "hf-home",
        cache=place / "cache",
    )


@pytest.fixture(scope="module", params=CONFIGS)
def finished(workplace: Path, request: pytest.FixtureRequest) -> tuple[str, Path, str]:
    """(config, its results, what the command printed), once for all tests."""
    done = run(workplace, request.param)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return request.param, workplace / "results" / request.param, done.stdout


def test_every_dictionary_has_its_scores(finished: tuple[str, Path, str]) -> None:
    config, results, printed = finished
    table = pd.read_csv(results / "comparison.csv")
    names = dictionaries(config)
    assert list(dict.fromkeys(table["dictionary"])) == names
    for eval_name, metric in (
        ("heldout", "fvu"),
        ("heldout", "coherence_mean_max"),
        ("probe_preservation", "preservation"),
        ("image_probing", "auc"),
        ("monosemanticity", "similarity"),
        ("transfer", "composite"),
    ):
        rows = table[(table["eval"] == eval_name) & (table["metric"] == metric)]
        assert sorted(rows["dictionary"]) == sorted(names), (eval_name, metric)
        assert np.isfinite(rows["value"]).all(), (eval_name, metric)
        assert rows["value"].nunique() > 1, "evals tell dictionaries apart"
    spatial = table[(table["eval"] == "spatial") & (table["metric"] == "morans_i")].set_index("dictionary")["value"]
    assert np.isfinite(spatial["db-ksvd"])
    assert set(table.loc[table["eval"] == "heldout", "data"]) == {"images-heldout"}
    assert set(table.loc[table["eval"] == "transfer", "data"]) == {"elsewhere"}
    scores = table.pivot_table(index="dictionary", columns=["eval", "metric"], values="value")
    assert scores.loc["db-ksvd-refit", ("heldout", "fvu")] < scores.loc["db-ksvd", ("heldout", "fvu")]
    # The model without a dictionary is the same one for all.
    assert scores["probe_preservation", "accuracy_raw"].nunique() == 1
    assert "| db-ksvd-refit |" in printed


def test_the_table_has_the_columns_of_images(finished: tuple[str, Path, str]) -> None:
    """Those of text are not there as columns without a score."""
    _, results, _ = finished
    heads = (results / "comparison.md").read_text().splitlines()[2]
    for head in ("FVU ↓", "probe kept ↑", "image probing ↑", "spatial ↑", "monosemanticity ↑", "transfer ↑", "dead ↓"):
        assert head in heads
    assert "loss recovered" not in heads
    assert "probing top" not in heads


def test_saes_say_what_they_are_of(finished: tuple[str, Path, str], workplace: Path) -> None:
    config, _, _ = finished
    size = config.removeprefix("dinov2-")
    name = {"s": tiny_vision.SMALL, "b": tiny_vision.BASE}[size]
    stored = [json.loads(path.read_text()) for path in (workplace / "cache" / "dictionaries").rglob("cfg.json")]
    own = [sae for sae in stored if sae["metadata"]["model_name"] == name]
    # One training for two coders.
    assert len(own) == len(dictionaries(config)) - 1
    for sae in own:
        assert sae["metadata"]["hook_name"] == "encoder.layer.11-layernorm"
        assert sae["metadata"]["context_size"] == 256
        assert sae["metadata"]["prepend_bos"] is False
        assert sae["d_in"] == {"s": 32, "b": 48}[size]


def test_atoms_are_shown_on_images(finished: tuple[str, Path, str]) -> None:
    config, results, _ = finished
    page = (results / "report.html").read_text()
    assert "Atoms on images" in page
    assert "Atoms in context" not in page
    with RawResults(results) as raw:
        samples = [json.loads(content) for name, content in raw.items() if name.startswith("atoms/")]
    assert len(samples) == len(dictionaries(config))
    for sample in samples:
        assert sample["n_tokens"] == 256 * sample["n_images"]
        for atom in sample["atoms"]:
            sides = [atom[name] for name in ("positive", "negative") if atom.get(name)]
            assert sides, "a live atom fires somewhere"
            for side in sides:
                assert len(side["pictures"]) == len(side["images"])
                for picture in side["pictures"]:
                    assert f"data:image/jpeg;base64,{picture}" in page
                    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (PIXELS, PIXELS)
                assert [abs(v) for v in side["values"]] == sorted((abs(v) for v in side["values"]), reverse=True)


def test_results_hold_no_path_of_this_machine(finished: tuple[str, Path, str], workplace: Path) -> None:
    _, results, _ = finished
    secrets = {str(workplace), str(REPOSITORY), f"{Path.home()}/".replace("//", "/")} - {"/"}
    with RawResults(results) as raw:
        texts = {**{str(p): p.read_bytes() for p in results.rglob("*") if p.is_file()}, **raw}
    for name, content in texts.items():
        assert [secret for secret in secrets if secret.encode() in content] == [], name


def test_a_second_run_reuses_every_stage(finished: tuple[str, Path, str], workplace: Path, tmp_path: Path) -> None:
    """Without a model: its Hub cache is an empty folder."""
    config, results, _ = finished
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    (workplace / "hf-home").rename(tmp_path / "away")
    try:
        done = run(workplace, config)
    finally:
        os.rename(tmp_path / "away", workplace / "hf-home")
    assert done.returncode == 0, done.stderr
    for stage in ("harvest: reusing", "evaluate: reusing"):
        assert stage in done.stderr
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_each_stage_alone_and_what_cannot_be_had(finished: tuple[str, Path, str], workplace: Path) -> None:
    config, _, _ = finished
    changes = {"dictionaries.random.k": "5"}
    early = run(workplace, config, "evaluate", **changes)
    assert early.returncode == 1
    assert "ksvd-sae train" in early.stderr
    assert "training tokens of" in run(workplace, config, "harvest", **changes).stdout
    refused = run(workplace, config, **{"evaluation.core": "{}"})
    assert refused.returncode == 1
    assert "core cannot be had on images" in refused.stderr
    assert "image_probing" in refused.stderr
    assert "Traceback" not in early.stderr + refused.stderr
