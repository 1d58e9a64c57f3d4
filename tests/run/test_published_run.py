"""A published SAE in a run: fetched before the model is loaded, not trained, scored and shown like any other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS
from ksvd_sae.errors import ConfigError, HubError, ShapeError
from ksvd_sae.report.compare import compare
from ksvd_sae.report.headline import UNKNOWN, column_texts
from ksvd_sae.report.scores import read_csv
from ksvd_sae.run import data
from ksvd_sae.run.config import RunConfig, dump_config, load_config, parse_config
from ksvd_sae.run.pipeline import Run
from tests.strategies import generator
from tests.tiny_hub import COMMIT, dictionary_learning_files, new_sessions, offline_hub, write_repository
from tests.tiny_saes import one_thread
from tests.tiny_shards import raw_activations, write_harvest
from tests.tolerances import UNIT_NORM

D_IN, D_SAE, K = 16, 40, 3
REPOSITORY, FOLDER = "someone/saes", "TopK/trainer_0"
PUBLISHED = {"kind": "published_sae", "repo_id": REPOSITORY, "path": FOLDER, "format": "dictionary_learning"}
RAW: dict[str, Any] = {
    "name": "tiny-run",
    "device": "cpu",
    "model": {"name": "some/model", "hook": "blocks.0.hook_resid_post"},
    "text": {"source": "hub", "dataset": "owner/some-texts"},
    "harvest": {"train_tokens": 2000, "heldout_tokens": 500, "context_tokens": 12},
    "dictionaries": {"published": PUBLISHED, "pca": {"kind": "pca", "k": 3}},
    "evaluation": {"core": None, "sparse_probing": None},
    # There is no model here to read text.
    "report": {"atoms": 0},
}


def config_with(**dictionaries: Any) -> RunConfig:
    return parse_config({**RAW, "dictionaries": dictionaries} if dictionaries else RAW)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished harvest, and the Hub's cache with one SAE of its activations in it."""
    harvested = config_with().harvested
    key, folder = harvested.key, harvested.folder(tmp_path / "cache")
    x_ND = raw_activations(2500)
    write_harvest(folder, key, x_ND[:2000], x_ND[2000:])
    (folder / HELDOUT_DOCUMENTS).write_text('{"text": "a document"}\n')
    offline_hub(tmp_path / "hub", monkeypatch)
    publish(tmp_path)
    yield tmp_path
    monkeypatch.undo()
    new_sessions()


def publish(place: Path, d_in: int = D_IN, buffer: dict[str, int] | None = None, **changes: Any) -> None:
    w_MD = normalize(torch.randn(D_SAE, d_in, generator=generator(0)), dim=1)
    tensors = {
        "encoder.weight": w_MD,
        "decoder.weight": w_MD.T.contiguous(),
        "encoder.bias": torch.zeros(D_SAE),
        "bias": raw_activations(2000)[:, :d_in].mean(dim=0),
        "k": torch.tensor(K),
    }
    trainer = {"dict_class": "AutoEncoderTopK", "lm_name": "some/model", "layer": 0, "k": K, "steps": 10, **changes}
    write_repository(place / "hub", REPOSITORY, dictionary_learning_files(FOLDER, tensors, trainer, buffer))


def run_in(place: Path, config: RunConfig | None = None) -> Run:
    return Run(config or config_with(), place / "results", place / "cache")


def test_it_is_scored_and_shown_like_any_other(place: Path) -> None:
    run = run_in(place)
    published, _ = run.train()
    facts = published.manifest
    assert (facts["repo_id"], facts["path"], facts["revision"]) == (REPOSITORY, FOLDER, COMMIT)
    assert sorted(facts["sha256"]) == ["ae.pt", "config.json"]
    assert sorted(p.name for p in published.folder.iterdir()) == [
        "cfg.json",
        "manifest.json",
        "sae_weights.safetensors",
    ]
    rows = {(r["dictionary"], r["eval"], r["metric"]): r for r in run.evaluate()["rows"]}
    scored = rows["published", "heldout", "fvu"]
    assert (scored["view"], scored["d_sae"], scored["k"]) == ("non-negative", D_SAE, K)
    # An untrained SAE around the mean: better than the mean, by its own three latents.
    assert 0.3 < scored["value"] < 1
    assert scored["l0"] == pytest.approx(K, abs=0.2)
    compare(run)
    # Nobody says how long it was trained: not 0, and no time of ours either.
    assert rows["published", "training", "samples_seen"]["value"] is None
    assert rows["published", "training", "seconds"]["value"] is None
    line = next(
        text for text in (run.results / "comparison.md").read_text().splitlines() if text.startswith("| published")
    )
    assert line.split("|")[6].strip() == UNKNOWN
    table = read_csv(run.results / "comparison.csv")
    assert table[(table["dictionary"] == "published") & (table["metric"] == "samples_seen")]["value"].isna().all()


def test_samples_seen_where_its_files_tell(place: Path) -> None:
    publish(place, buffer={"out_batch_size": 2048})
    run = run_in(place)
    run.train()
    rows = {(r["dictionary"], r["metric"]): r["value"] for r in run.evaluate()["rows"] if r["eval"] == "training"}
    assert rows["published", "samples_seen"] == 20_480


def test_a_budget_that_nobody_tells(place: Path) -> None:
    """A JumpReLU SAE has no k: a gap in the table."""
    publish(place)
    snapshot = place / "hub" / "models--someone--saes" / "snapshots" / COMMIT / FOLDER
    config = json.loads((snapshot / "config.json").read_text())
    config["trainer"] |= {"dict_class": "JumpReluAutoEncoder"}
    del config["trainer"]["k"]
    (snapshot / "config.json").write_text(json.dumps(config))
    w_MD = normalize(torch.randn(D_SAE, D_IN, generator=generator(0)), dim=1)
    biases = {"b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(D_IN), "threshold": torch.ones(D_SAE)}
    torch.save({"W_enc": w_MD.T.contiguous(), "W_dec": w_MD, **biases}, snapshot / "ae.pt")
    run = run_in(place)
    run.train()
    run.evaluate()
    compare(run)
    table = read_csv(run.results / "comparison.csv")
    assert table[table["dictionary"] == "published"]["k"].isna().all()


def test_once_here_the_hub_is_asked_no_more(place: Path) -> None:
    run_in(place).train()
    (place / "hub").rename(place / "gone")
    again = run_in(place)
    again.harvest()
    assert again.train()[0].manifest["repo_id"] == REPOSITORY
    with pytest.raises(HubError):
        run_in(place, config_with(other={**PUBLISHED, "path": "TopK/trainer_1"})).harvest()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "TopK/trainer_7"}, HubError, "trainer_7/config.json of someone/saes"),
        ({"repo_id": "someone/else"}, HubError, "someone/else"),
    ],
)
def test_harvest_fails_before_it_loads_the_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    def load_model(*_: Any) -> None:
        raise AssertionError("the model is loaded first")

    monkeypatch.setattr(data, "load_model", load_model)
    run = Run(config_with(published={**PUBLISHED, **changes}), place / "results", place / "elsewhere")
    with pytest.raises(error, match=message):
        run.harvest()
    with pytest.raises(AssertionError, match="the model is loaded first"):
        Run(config_with(), place / "results", place / "elsewhere").harvest()


def test_an_sae_of_another_model_is_refused_at_harvest(place: Path) -> None:
    publish(place, lm_name="some/other-model")
    with pytest.raises(ConfigError, match=r"(?s)got: some/other-model.*limit: some/model"):
        run_in(place).harvest()


def test_an_sae_of_another_width(place: Path) -> None:
    publish(place, d_in=12)
    with pytest.raises(ShapeError, match=r"(?s)got: d_in = 12.*limit: 16"):
        run_in(place).train()


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"repo_id": "a/b", "path": "c"}, "repo_id, path and format, or by release"),
        ({"release": "r"}, "or by release and sae_id"),
        ({**PUBLISHED, "release": "r", "sae_id": "s"}, "or by release and sae_id"),
        ({**PUBLISHED, "path": "../c"}, "leads out"),
        ({**PUBLISHED, "path": "/c"}, "leads out"),
        ({**PUBLISHED, "repo_id": "saes"}, "owner/name"),
        ({**PUBLISHED, "repo_id": "a/b/c"}, "owner/name"),
        ({**PUBLISHED, "format": "pickle"}, "format"),
        ({**PUBLISHED, "revison": "v1"}, "did you mean 'dictionaries.published.revision'"),
    ],
)
def test_how_it_is_named(published: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(published={"kind": "published_sae", **published})


@pytest.mark.parametrize(
    ("path", "folder"), [("a/b", "a/b"), ("a/b/ae.pt", "a/b"), ("a//b/", "a/b"), (".", ""), ("ae.pt", ""), ("./a", "a")]
)
def test_the_folder_of_a_path(path: str, folder: str) -> None:
    config = config_with(published={**PUBLISHED, "path": path}).dictionaries["published"]
    assert config.folder == folder  # type: ignore[union-attr]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = config_with()
    (tmp_path / "tiny-run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "tiny-run.yaml") == config


def test_an_unknown_amount_is_no_zero() -> None:
    assert column_texts("samples seen", [float("nan"), 0.0, 2048.0]) == [UNKNOWN, "0", "2,048"]
    assert column_texts("d_sae", [float("nan")]) == ["n/a"]


def test_its_atoms_under_another_coder(place: Path) -> None:
    """Nobody says how long it was trained, nor how many atoms it has before it is fetched."""
    derived = {
        "omp": {"kind": "recoded", "of": "published", "coder": "omp", "k": K},
        "linear": {"kind": "linear_topk", "of": "published", "k": K, "passes": 4, "batch_samples": 128, "lr": 5e-3},
    }
    run = run_in(place, config_with(published=PUBLISHED, **derived))
    published, omp, linear = run.train()
    saes = [run.load_sae(trained) for trained in (published, omp, linear)]
    for sae in saes[1:]:
        assert torch.allclose(sae.W_dec, saes[0].W_dec, atol=UNIT_NORM[torch.float32])
        assert torch.equal(sae.b_dec, saes[0].b_dec)
    assert linear.manifest["samples_seen"] is None
    assert linear.manifest["encoder_samples"] == 4 * 2000 // 128 * 128
    rows = {(r["dictionary"], r["metric"]): r for r in run.evaluate()["rows"]}
    assert rows["omp", "samples_seen"]["value"] is None
    assert {rows[name, "fvu"]["d_sae"] for name in ("published", "omp", "linear")} == {D_SAE}
    fvu = {name: rows[name, "fvu"]["value"] for name in ("published", "omp", "linear")}
    assert fvu["omp"] < fvu["linear"] < fvu["published"]
    with pytest.raises(ConfigError, match="the k of 'published' is not known before it is fetched; give k"):
        config_with(published=PUBLISHED, omp={"kind": "recoded", "of": "published"})
