"""A run from YAML: every mistake is named with its key, and what is read can be written back."""

import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ksvd_sae.errors import ConfigError
from ksvd_sae.methods.controls import PCAMethod, RandomMethod
from ksvd_sae.methods.db_ksvd import DBKSVDMethod
from ksvd_sae.methods.sae import TopKSAEMethod
from ksvd_sae.run.config import RunConfig, TextRunConfig, dump_config, load_config, parse_config, view_name
from ksvd_sae.run.curves import load_curves
from ksvd_sae.run.grid import load_study
from ksvd_sae.run.replicas import replicas
from tests.command_line import EVAL_CONFIGS

RAW: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {"name": "some/model", "hook": "blocks.3.hook_resid_post"},
    "text": {"source": "folder", "dataset": "texts"},
    "harvest": {"train_tokens": 4096, "heldout_tokens": 512},
    "dictionaries": {
        "ours": {"kind": "db_ksvd", "n_atoms": 256, "k": 8, "update": "exact"},
        "topk": {"kind": "topk_sae", "n_atoms": 256, "k": 8},
        "pca": {"kind": "pca", "k": 8},
        "random": {"kind": "random", "n_atoms": 256, "k": 8},
    },
    "evaluation": {"sparse_probing": {"datasets": ["bbc-news"], "k_values": [1, 5]}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """RAW with one value set, at a dotted path."""
    raw = deepcopy(RAW)
    node: Any = raw
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    return raw


def without(path: str) -> dict[str, Any]:
    raw = deepcopy(RAW)
    node: Any = raw
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    del node[last]
    return raw


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RAW, sort_keys=False))
    return path


class TestRead:
    def test_values_and_defaults(self, path: Path) -> None:
        run = load_config(path)
        assert isinstance(run, RunConfig)
        assert (run.name, run.seed, run.device) == ("small", 3, "auto")
        assert (run.model.source, run.harvest.train_tokens, run.harvest.outlier_factor) == ("hub", 4096, 4.0)
        assert (run.harvest.gradient_tokens, run.harvest.gradient_batch_contexts) == (0, 4)
        kinds = [type(dictionary) for dictionary in run.dictionaries.values()]
        assert kinds == [DBKSVDMethod, TopKSAEMethod, PCAMethod, RandomMethod]
        assert run.evaluation.core is not None
        assert run.evaluation.sparse_probing is not None
        assert run.evaluation.sparse_probing.datasets == ["bbc-news"]

    def test_name_is_the_files_by_default(self, tmp_path: Path) -> None:
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(without("name")))
        assert load_config(tmp_path / "other.yaml").name == "other"

    def test_a_path_may_be_a_string(self, path: Path) -> None:
        assert load_config(str(path)) == load_config(path)

    def test_round_trip(self, path: Path, tmp_path: Path) -> None:
        run = load_config(path, ["evaluation.core=null", "harvest.outlier_factor=null", "dictionaries.topk.lr=3e-5"])
        copy = tmp_path / "copy.yaml"
        copy.write_text(dump_config(run))
        assert load_config(copy) == run
        assert dump_config(load_config(copy)) == dump_config(run)

    def test_is_frozen(self, path: Path) -> None:
        with pytest.raises(ValueError, match="frozen"):
            load_config(path).seed = 4


class TestViews:
    @pytest.mark.parametrize("name", ["ours", "pca", "random"])
    @pytest.mark.parametrize(
        ("view", "wanted"), [("signed", ["signed"]), ("split", ["split"]), ("both", ["signed", "split"])]
    )
    def test_of_signed_codes(self, name: str, view: str, wanted: list[str]) -> None:
        run = parse_config(changed(f"dictionaries.{name}.view", view))
        assert list(run.dictionaries[name].views) == wanted

    def test_by_default_codes_are_as_they_come(self) -> None:
        assert {method.views for method in parse_config(RAW).dictionaries.values()} == {("signed",)}

    @pytest.mark.parametrize("name", ["ours", "a.b_c-d", "0"])
    def test_names_are_names(self, name: str) -> None:
        """Names of views become file names, as those of dictionaries."""
        assert view_name(name, "signed") == name
        assert view_name(name, "split") == f"{name}.split"
        run = parse_config({**RAW, "dictionaries": {view_name(name, "split"): RAW["dictionaries"]["pca"]}})
        assert list(run.dictionaries) == [f"{name}.split"]


class TestUnknownKey:
    @pytest.mark.parametrize(
        ("key", "named", "nearest"),
        [
            ("modle", "'modle'", "did you mean 'model'?"),
            ("seeed", "'seeed'", "did you mean 'seed'?"),
            ("harvest.train_token", "'harvest.train_token'", "did you mean 'harvest.train_tokens'?"),
            ("model.hok", "'model.hok'", "did you mean 'model.hook'?"),
            ("dictionaries.ours.natoms", "'dictionaries.ours.natoms'", "did you mean 'dictionaries.ours.n_atoms'?"),
            ("dictionaries.topk.pases", "'dictionaries.topk.pases'", "did you mean 'dictionaries.topk.passes'?"),
            ("dictionaries.random.codr", "'dictionaries.random.codr'", "did you mean 'dictionaries.random.coder'?"),
            ("evaluation.cor", "'evaluation.cor'", "did you mean 'evaluation.core'?"),
            (
                "evaluation.sparse_probing.k_value",
                "'evaluation.sparse_probing.k_value'",
                "did you mean 'evaluation.sparse_probing.k_values'?",
            ),
        ],
    )
    def test_names_the_nearest(self, key: str, named: str, nearest: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(changed(key, 1), "run.yaml")
        assert str(caught.value).startswith(f"run.yaml: unknown key {named}\n")
        assert nearest in str(caught.value)

    @pytest.mark.parametrize(
        ("key", "valid"),
        [
            ("zzz", "dictionaries, evaluation, grid, harvest, model, name, report, seed, text"),
            ("model.zzz", "dtype, hook, name, revision, source, weights"),
            # pca is also the tag of its kind: the key's path must keep it once.
            ("dictionaries.pca.zzz", "valid keys here: k, kind, view"),
        ],
    )
    def test_lists_the_valid_ones_if_none_is_near(self, key: str, valid: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(changed(key, 1))
        assert f"unknown key {key!r}" in str(caught.value)
        assert valid in str(caught.value).replace("device, ", "")

    def test_a_key_of_another_kind(self) -> None:
        """atom_batch is DB-KSVD's: a TopK SAE must not swallow it."""
        with pytest.raises(ConfigError, match=r"unknown key 'dictionaries\.topk\.atom_batch'"):
            parse_config(changed("dictionaries.topk.atom_batch", 4))


class TestWrongValue:
    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("harvest.train_tokens", "many", ["harvest.train_tokens: ", "integer", "'many'"]),
            ("harvest.train_tokens", 0, ["harvest.train_tokens: ", "greater than 0", "got: 0"]),
            ("harvest.train_tokens", 10.5, ["harvest.train_tokens: ", "integer", "10.5"]),
            ("harvest.gradient_tokens", -1, ["harvest.gradient_tokens: ", "greater than or equal to 0", "got: -1"]),
            ("harvest.gradient_batch_contexts", 0, ["harvest.gradient_batch_contexts: ", "greater than or equal to 1"]),
            ("harvest.outlier_factor", 0.5, ["harvest.outlier_factor: ", "greater than 1"]),
            ("harvest.prepend_bos", "maybe", ["harvest.prepend_bos: ", "'auto', True or False", "got: 'maybe'"]),
            ("harvest", 3, ["harvest: ", "got: 3"]),
            ("model.dtype", "float8", ["model.dtype: ", "'float32'", "'float8'"]),
            ("device", "tpu", ["device: ", "'cuda'", "'tpu'"]),
            ("name", "a/b", ["name: ", "'a/b'"]),
            ("name", "", ["name: "]),
            ("dictionaries", {}, ["dictionaries: ", "at least 1"]),
            ("dictionaries.ours.k", None, ["dictionaries.ours.k: ", "integer"]),
            ("dictionaries.ours.update", "svd", ["dictionaries.ours.update: ", "'svd'"]),
            ("dictionaries.ours.kind", "ksvd", ["dictionaries.ours", "'ksvd'", "db_ksvd"]),
            ("dictionaries.pca.view", "unsigned", ["dictionaries.pca.view: ", "'both'", "'unsigned'"]),
            ("dictionaries.topk.lr", -1, ["dictionaries.topk.lr: ", "greater than 0"]),
            ("evaluation.sparse_probing.k_values", 5, ["evaluation.sparse_probing.k_values: ", "list"]),
        ],
    )
    def test_names_the_key_and_the_value(self, key: str, value: Any, words: list[str]) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(changed(key, value), "run.yaml")
        message = str(caught.value)
        assert message.startswith("run.yaml: ")
        assert [word for word in words if word not in message] == []
        assert "cure: " in message

    @pytest.mark.parametrize("key", ["model", "model.hook", "harvest.heldout_tokens", "dictionaries.topk.k"])
    def test_missing(self, key: str) -> None:
        with pytest.raises(ConfigError, match=rf"{key}: Field required"):
            parse_config(without(key))

    def test_kind_missing(self) -> None:
        with pytest.raises(ConfigError, match=r"dictionaries\.ours: .*'kind'"):
            parse_config(without("dictionaries.ours.kind"))

    @pytest.mark.parametrize("name", ["ours", "topk", "random"])
    def test_k_above_n_atoms(self, name: str) -> None:
        with pytest.raises(ConfigError, match=rf"dictionaries\.{name}: k = 300 is above n_atoms = 256"):
            parse_config(changed(f"dictionaries.{name}.k", 300))

    def test_more_atoms_than_tokens(self) -> None:
        with pytest.raises(ConfigError, match=r"ours: n_atoms = 5000 is above harvest\.train_tokens = 4096; harvest"):
            parse_config(changed("dictionaries.ours.n_atoms", 5000))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, r"exact_budgets are those of groups; give groups"),
            ({"groups": [64, 64, 128], "k": 2}, r"Matryoshka groups: k is too small for every group"),
            ({"groups": [64, 64, 128], "train_k": 2}, r"Matryoshka groups: k is too small for every group"),
        ],
    )
    def test_exact_budgets(self, options: dict[str, Any], words: str) -> None:
        ours = {**RAW["dictionaries"]["ours"], "exact_budgets": True}
        with pytest.raises(ConfigError, match=r"dictionaries\.ours: " + words):
            parse_config(changed("dictionaries.ours", {**ours, **options}))
        assert parse_config(changed("dictionaries.ours", {**ours, "groups": [64, 64, 128], "k": 3}))

    @pytest.mark.parametrize("view", ["split", "both"])
    def test_view_of_codes_without_signs(self, view: str) -> None:
        raw = changed("dictionaries.ours.nonnegative", True)
        raw["dictionaries"]["ours"]["view"] = view
        with pytest.raises(ConfigError, match=rf"dictionaries\.ours: .*view '{view}' needs signs.*leave view out"):
            parse_config(raw)

    def test_view_of_a_sae(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown key 'dictionaries\.topk\.view'"):
            parse_config(changed("dictionaries.topk.view", "split"))

    def test_a_name_that_a_split_view_takes(self) -> None:
        raw = changed("dictionaries.pca.view", "both")
        raw["dictionaries"]["pca.split"] = {"kind": "pca", "k": 4}
        with pytest.raises(ConfigError, match=r"dictionaries\.pca\.split: .*the split view of 'pca'.*another name"):
            parse_config(raw)
        raw["dictionaries"]["pca"]["view"] = "signed"
        assert list(parse_config(raw).dictionaries)[-1] == "pca.split"

    def test_text_that_needs_a_data_set(self) -> None:
        with pytest.raises(ConfigError, match=r"'folder' needs text\.dataset"):
            parse_config(without("text.dataset"))
        assert parse_config(changed("text", {"source": "bbc-news"})).text.dataset is None


class TestHooks:
    """What an eval cannot do at a hook is said when the config is read, with what can be had there."""

    @pytest.mark.parametrize("hook", ["hook_embed", "ln_final.hook_normalized", "hook_pos_embed"])
    def test_outside_the_blocks(self, hook: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(changed("model.hook", hook))
        said = str(caught.value)
        assert f"core, sparse_probing cannot be had at '{hook}'" in said
        assert "set evaluation.core: null, evaluation.sparse_probing: null" in said
        assert "to be had there: heldout, loss, stability, truth" in said

    @pytest.mark.parametrize(
        "section", ["absorption", "autointerp", "ravel", "scr", "sparse_probing_sae_probes", "tpp"]
    )
    def test_evals_that_are_not_on_by_default(self, section: str) -> None:
        raw = changed("model.hook", "hook_embed")
        raw["evaluation"] = {"core": None, "sparse_probing": None, section: {}}
        with pytest.raises(ConfigError, match=rf"hook: {section} cannot be had at 'hook_embed'"):
            parse_config(raw)

    @pytest.mark.parametrize("hook", ["blocks.3.hook_resid_pre", "blocks.3.attn.hook_z", "blocks.3.hook_resid_mid"])
    def test_in_a_block(self, hook: str) -> None:
        """SAEBench's absorption and RAVEL read what a layer gives out, whatever the hook."""
        able = ["core", "sparse_probing", "sparse_probing_sae_probes", "scr", "tpp", "autointerp", "loss"]
        raw = changed("model.hook", hook)
        raw["evaluation"] = {name: {} for name in (*able, "absorption", "ravel")}
        with pytest.raises(ConfigError, match=r"hook: absorption, ravel cannot be had") as caught:
            parse_config(raw)
        (listed,) = re.findall(r"to be had there: ([^)]*)\)", str(caught.value))
        assert set(listed.split(", ")) == {*able, "heldout", "stability", "truth"}
        assert parse_config(changed("model.hook", hook) | {"evaluation": {name: {} for name in able}})
        raw["model"]["hook"] = "blocks.3.hook_resid_post"
        assert parse_config(raw)

    def test_without_them(self) -> None:
        raw = changed("model.hook", "hook_embed")
        raw["evaluation"] = {"core": None, "sparse_probing": None}
        assert parse_config(raw).model.hook == "hook_embed"


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "where", "value"),
        [
            ("seed=7", "seed", 7),
            ("harvest.train_tokens=8192", "harvest.train_tokens", 8192),
            ("harvest.outlier_factor=null", "harvest.outlier_factor", None),
            ("harvest.outlier_factor=2.5", "harvest.outlier_factor", 2.5),
            ("dictionaries.ours.k=3", "dictionaries.ours.k", 3),
            ("dictionaries.topk.lr=1e-3", "dictionaries.topk.lr", 0.001),
            ("evaluation.core=null", "evaluation.core", None),
            ("evaluation.core.dataset=heldout", "evaluation.core.dataset", "heldout"),
            ("evaluation.sparse_probing.k_values=[1, 2, 3]", "evaluation.sparse_probing.k_values", [1, 2, 3]),
            ("text.streaming=false", "text.streaming", False),
            (" seed = 7", "seed", 7),
            ("model.name=a=b", "model.name", "a=b"),
        ],
    )
    def test_sets(self, path: Path, override: str, where: str, value: Any) -> None:
        node: Any = load_config(path, [override])
        for part in where.split("."):
            node = node[part] if isinstance(node, dict) else getattr(node, part)
        assert node == value
        assert type(node) is type(value)

    def test_a_new_dictionary(self, path: Path) -> None:
        run = load_config(path, ["dictionaries.more.kind=pca", "dictionaries.more.k=4"])
        assert run.dictionaries["more"] == PCAMethod(k=4)

    def test_the_last_one_wins(self, path: Path) -> None:
        assert load_config(path, ["seed=1", "seed=2"]).seed == 2

    @pytest.mark.parametrize("override", ["seed", "", "=3", " =3", "seed 3"])
    def test_bad_form(self, path: Path, override: str) -> None:
        with pytest.raises(ConfigError, match=r"(?s)--set .*not of the form key\.sub=value.*e\.g\. --set"):
            load_config(path, [override])

    def test_value_that_is_not_yaml(self, path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--set 'seed=\[1': the value is not YAML"):
            load_config(path, ["seed=[1"])

    def test_below_a_value(self, path: Path) -> None:
        with pytest.raises(ConfigError, match=r"(?s)'seed' holds a value, not keys.*got: 3"):
            load_config(path, ["seed.sub=1"])

    def test_unknown_key(self, path: Path) -> None:
        with pytest.raises(ConfigError, match=r"(?s)unknown key 'harvest\.train_token'.*'harvest\.train_tokens'"):
            load_config(path, ["harvest.train_token=1"])


class TestYamlAsPeopleWriteIt:
    @pytest.mark.parametrize(
        ("written", "key", "lines"),
        [
            ("seed: 1\nmodel: {}\nseed: 2\n", "seed", "lines 1 and 3"),
            ("harvest:\n  train_tokens: 1\n  heldout_tokens: 2\n  train_tokens: 3\n", "train_tokens", "lines 2 and 4"),
            ("model: {name: a, hook: b, name: c}\n", "name", "lines 1 and 1"),
            ("dictionaries:\n  ours: {kind: pca, k: 4}\n  'ours': {kind: pca, k: 5}\n", "ours", "lines 2 and 3"),
        ],
    )
    def test_a_key_twice(self, tmp_path: Path, written: str, key: str, lines: str) -> None:
        (tmp_path / "a.yaml").write_text(written)
        with pytest.raises(ConfigError, match=rf"(?s)a\.yaml: the key '{key}' is there twice.*got: {lines}"):
            load_config(tmp_path / "a.yaml")

    def test_a_key_twice_on_the_command_line(self, path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--set .*: the key 'k' is there twice"):
            load_config(path, ["dictionaries.ours={kind: pca, k: 4, k: 5}"])

    def test_what_is_merged_may_be_replaced(self, path: Path) -> None:
        text = (
            path.read_text()
            .replace("  pca:", "  pca: &pca")
            .replace("  random:", "  other: {<<: *pca, k: 4}\n  random:")
        )
        path.write_text(text)
        assert load_config(path).dictionaries["other"] == PCAMethod(k=4)

    @pytest.mark.parametrize(
        ("key", "read"), [("no", "False"), ("on", "True"), ("8", "8"), ("1.5", "1.5"), ("~", "None")]
    )
    def test_keys_that_are_no_text(self, path: Path, key: str, read: str) -> None:
        path.write_text(path.read_text().replace("  pca:", f"  {key}:"))
        with pytest.raises(ConfigError, match=rf"(?s)line \d+: the key {key} is read as {read}, not as text.*quotes"):
            load_config(path)
        path.write_text(path.read_text().replace(f"  {key}:", "  'no':"))
        assert "no" in load_config(path).dictionaries

    @pytest.mark.parametrize(
        ("key", "value", "named"),
        [
            ("seed", True, "seed: True is no number"),
            ("harvest.train_tokens", False, "harvest: .*train_tokens: False is no number"),
            ("dictionaries.topk.lr", True, "dictionaries.topk: .*lr: True is no number"),
            ("training_seeds", [0, True], "training_seeds: .*is no number"),
            ("evaluation.sparse_probing.k_values", [True, 5], "k_values: .*is no number"),
        ],
    )
    def test_booleans_are_no_numbers(self, key: str, value: Any, named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            parse_config(changed(key, value))

    @pytest.mark.parametrize("word", ["yes", "on", "true"])
    def test_in_words(self, path: Path, word: str) -> None:
        with pytest.raises(ConfigError, match="seed: True is no number"):
            load_config(path, [f"seed={word}"])
        assert load_config(path, [f"text.streaming={word}"]).text.streaming is True

    @pytest.mark.parametrize(
        ("written", "value"),
        [("2e6", 2_000_000), ("2E+6", 2_000_000), ("1.5e3", 1500), ("1_000", 1000), (".5e4", 5000), ("20e-1", 2)],
    )
    def test_powers_of_ten(self, path: Path, written: str, value: int) -> None:
        train = load_config(path, [f"harvest.train_tokens={written}", "dictionaries={p: {kind: pca, k: 1}}"])
        assert train.harvest.train_tokens == value
        assert type(train.harvest.train_tokens) is int

    @pytest.mark.parametrize("written", ["2e-1", "1.5", "2e6x", "0x"])
    def test_no_whole_number(self, path: Path, written: str) -> None:
        with pytest.raises(ConfigError, match=r"harvest\.train_tokens: .*integer"):
            load_config(path, [f"harvest.train_tokens={written}"])

    @pytest.mark.parametrize("name", ["2e6", "1e-3"])
    def test_text_that_looks_like_a_number_wants_quotes(self, path: Path, name: str) -> None:
        assert load_config(path, [f"model.name='{name}'"]).model.name == name
        with pytest.raises(ConfigError, match=r"model\.name: .*string"):
            load_config(path, [f"model.name={name}"])


class TestCures:
    @pytest.mark.parametrize(
        ("key", "value", "cure"),
        [
            ("device", "tpu", "device takes auto, cpu, cuda"),
            ("harvest.train_tokens", 0, "train_tokens takes a whole number above 0"),
            ("harvest.outlier_factor", 0.5, "outlier_factor takes a number above 1.0 or null (leave out tokens"),
            ("dictionaries.ours.update", "svd", "update takes sweep, two_sweeps, exact"),
            ("training_seeds", "x", "training_seeds takes a list of a whole number of at least 0 (learn each"),
            ("text.streaming", "maybe", "streaming takes true or false"),
            ("evaluation.core", 3, "core takes keys with values or null"),
            ("harvest", 3, "harvest takes keys with values"),
        ],
    )
    def test_say_what_is_allowed(self, key: str, value: Any, cure: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(changed(key, value))
        assert caught.value.cure is not None
        assert caught.value.cure.startswith(cure)
        assert ".py" not in str(caught.value)


class TestFile:
    def test_missing_names_the_neighbours(self, path: Path) -> None:
        with pytest.raises(ConfigError, match=r"(?s)other\.yaml: no such file.*small\.yaml"):
            load_config(path.parent / "other.yaml")

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"(?s)no such file.*check the path"):
            load_config(tmp_path / "nowhere" / "a.yaml")

    @pytest.mark.parametrize("content", [b"a: [1", b"a: b: c", b"\xff\xfe\x00\x80", b"a:\n\t- 1"])
    def test_not_yaml(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"(?s)a\.yaml: not YAML.*eval_configs/"):
            load_config(tmp_path / "a.yaml")

    @pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("- 1\n- 2", "list"), ("text", "str")])
    def test_not_a_mapping(self, tmp_path: Path, content: str, kind: str) -> None:
        (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(ConfigError, match=rf"(?s)not a mapping.*{kind}"):
            load_config(tmp_path / "a.yaml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="reading config"):
            load_config(tmp_path)

    def test_no_code_in_yaml(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("!!python/object/apply:os.getcwd []")
        with pytest.raises(ConfigError, match="not YAML"):
            load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("path", sorted(EVAL_CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_of_the_repository_loads(path: Path) -> None:
    """A run's, a study's or curves': those have a base."""
    if "base" in (raw := yaml.safe_load(path.read_text())):
        study, _ = load_curves(path) if "curves" in raw else load_study(path)
        assert study.name == path.stem
        return
    assert load_config(path).name == path.stem


def test_demo_full_has_seeds_for_error_bars() -> None:
    run = load_config(EVAL_CONFIGS / "demo-full.yaml")
    by_budget = Counter((replica.name, replica.method.budget) for replica in replicas(run))
    assert {n for (_, k), n in by_budget.items() if k != 20} == {1}
    assert {n for (name, k), n in by_budget.items() if k == 20 and name != "pca"} == {3}


def test_rates_are_chosen_on_documents_that_no_table_shows() -> None:
    """The configs with tables hold out 64 articles; those are in neither part, and what is held out they learn from."""

    def texts(name: str) -> list[Any]:
        run = load_config(EVAL_CONFIGS / f"{name}.yaml")
        assert isinstance(run, TextRunConfig)
        return list(run.harvested.texts())

    shown, rates = texts("fair-rivals"), texts("rivals-tuning")
    assert rates == shown[64:]
    # Of some 450 tokens each.
    assert load_config(EVAL_CONFIGS / "rivals-tuning.yaml").harvest.train_tokens < 300 * (len(rates) - 64)
