"""Weights of one's own: the model is the one in the folder or repository; what is none is refused before any work."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksvd_sae.activations import weights
from ksvd_sae.activations.harvest import Harvest, HarvestConfig
from ksvd_sae.activations.language import ModelConfig, check_bridgeable, is_bridge, load_model
from ksvd_sae.activations.text import TextConfig
from ksvd_sae.activations.weights import find_weights
from ksvd_sae.errors import ConfigError, HubError
from ksvd_sae.store import content_hash
from tests import tiny_models, tolerances
from tests.tiny_hub import offline_hub, write_repository
from tests.tiny_models import byte_pair_tokenizer

HOOK = "blocks.3.hook_resid_post"
REPOSITORY = "someone/my-pythia"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub cache with the architecture's own model, tiny as all here; read only."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.pythia_160m(home)
    return home


@pytest.fixture(autouse=True)
def hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that Hub libraries look into, and nowhere else."""
    shutil.copytree(home / "hub", tmp_path / "hub")
    offline_hub(tmp_path / "hub", monkeypatch)
    weights._downloaded.cache_clear()
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other weights than the architecture's; without a tokenizer; read only."""
    folder = tmp_path_factory.mktemp("tuned") / "my-pythia"
    tiny_models.neox_model(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def own(tuned: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tuned, tmp_path / "my-pythia"))


def config(weights: Path | str | None = None, **options: Any) -> ModelConfig:
    return ModelConfig(name=tiny_models.PYTHIA, hook=HOOK, weights=None if weights is None else str(weights), **options)


def tokens() -> Tensor:
    return torch.tensor([[0, 7, 300, 41, 5, 5, 511]])


def logits_of(seed: int) -> Tensor:
    with torch.no_grad():
        return tiny_models.neox_model(seed)(tokens()).logits


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------- what is loaded


def check_is_seed(model: Any, seed: int) -> None:
    true = logits_of(seed)
    with torch.no_grad():
        bound = tolerances.HOOK_AGAINST_TRANSFORMERS * float(true.abs().max())
        assert float((model(tokens()) - true).abs().max()) <= bound


def test_without_weights_the_name_is_the_model() -> None:
    check_is_seed(load_model(config(), CPU), 0)


def test_of_a_folder_without_a_tokenizer(tuned: Path) -> None:
    model = load_model(config(tuned), CPU)
    check_is_seed(model, 1)
    # TransformerLens' asks for a BOS, which from transformers 5 on this tokenizer gives.
    own, plain = (t("co di", add_special_tokens=False) for t in (model.tokenizer, byte_pair_tokenizer()))
    assert own["input_ids"] == plain["input_ids"]


def test_of_a_repository_and_its_revisions(tuned: Path, hub: Path, tmp_path: Path) -> None:
    write_repository(hub, REPOSITORY, {path.name: path.read_bytes() for path in tuned.iterdir()})
    tiny_models.neox_model(seed=2).save_pretrained(tmp_path / "older")
    older = {path.name: path.read_bytes() for path in (tmp_path / "older").iterdir()}
    write_repository(hub, REPOSITORY, older, commit="b" * 40)
    refs = hub / f"models--{REPOSITORY.replace('/', '--')}" / "refs"
    (refs / "main").write_text("a" * 40)
    (refs / "v0").write_text("b" * 40)
    check_is_seed(load_model(config(REPOSITORY), CPU), 1)
    check_is_seed(load_model(config(REPOSITORY, revision="v0"), CPU), 2)
    found = find_weights(REPOSITORY, "v0")
    assert found.as_metadata() == {"name": REPOSITORY, "revision": "b" * 40, "content": found.content}


def test_tokens_that_were_added(own: Path) -> None:
    """A tuned chat model has a few more, in its tokenizer and its embeddings."""
    tokenizer, model = byte_pair_tokenizer(), tiny_models.neox_model(seed=1)
    tokenizer.add_tokens(["<|user|>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(own)
    tokenizer.save_pretrained(own)
    loaded = load_model(config(own), CPU)
    assert loaded.cfg.d_vocab == len(tokenizer) == tiny_models.VOCABULARY_SIZE + 1
    assert loaded.tokenizer("<|user|>co")["input_ids"][-2] == tiny_models.VOCABULARY_SIZE


def test_in_16_bits(tuned: Path) -> None:
    model = load_model(config(tuned, dtype="bfloat16"), CPU)
    assert model.W_E.dtype == torch.bfloat16
    assert torch.equal(model.W_E, tiny_models.neox_model(1).get_input_embeddings().weight.to(torch.bfloat16))


def test_in_several_files(own: Path) -> None:
    tiny_models.neox_model(seed=1).save_pretrained(own, max_shard_size="200KB")
    (own / "model.safetensors").unlink(missing_ok=True)
    assert len(list(own.glob("model-*.safetensors"))) > 1
    check_is_seed(load_model(config(own), CPU), 1)


# ---------------------------------------------------------------- keys


def key(model: ModelConfig) -> dict[str, Any]:
    sizes = HarvestConfig(train_tokens=100, heldout_tokens=10)
    return Harvest(model, TextConfig(source="hub", dataset="none"), sizes, 0).key


def test_keys_without_weights_are_what_they_were() -> None:
    assert key(config())["model"] == {"name": tiny_models.PYTHIA, "hook": HOOK, "source": "hub", "dtype": "float32"}
    # As computed before there were weights of one's own.
    assert content_hash(key(config())) == "407296a0f7bb"


def test_keys_follow_the_content_and_not_the_place(tuned: Path, own: Path) -> None:
    """One weight of another model at the same path is another key; the same files elsewhere are the same one."""
    elsewhere, before = key(config(tuned)), key(config(own))
    assert before == elsewhere != key(config())
    path = own / "model.safetensors"
    tensors = load_file(path)
    # One entry, which no sample of entries has.
    tensors["gpt_neox.layers.4.mlp.dense_4h_to_h.weight"][17, 23] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    assert content_hash(key(config(own))) != content_hash(before)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_keys_follow_what_is_beside_the_weights(file: str, own: Path) -> None:
    byte_pair_tokenizer().save_pretrained(own)
    before = find_weights(str(own), None).content
    (own / file).write_text((own / file).read_text() + "\n")
    assert find_weights(str(own), None).content != before


def test_a_report_names_no_place_of_this_machine(tuned: Path) -> None:
    assert config(tuned).title == f"{tiny_models.PYTHIA} with weights of my-pythia"
    assert config(REPOSITORY, revision="v0").title == f"{tiny_models.PYTHIA} with weights of {REPOSITORY} at v0"
    assert config().title == tiny_models.PYTHIA


# ---------------------------------------------------------------- refused before anything is loaded


def only(*names: str) -> Callable[[Path], None]:
    def leave(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    return leave


def pickled(folder: Path) -> None:
    only("config.json")(folder)
    torch.save(tiny_models.neox_model(1).state_dict(), folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def shard_missing(folder: Path) -> None:
    tiny_models.neox_model(seed=1).save_pretrained(folder, max_shard_size="200KB")
    next(folder.glob("model-00002-*.safetensors")).unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (only("generation_config.json"), "no safetensors there"),
        (pickled, "which run code when they are read"),
        (adapter, "merge_and_unload"),
        (shard_missing, "1 of its files are missing"),
        (only("model.safetensors"), "no config.json"),
        (cut, "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=["none", "pickled", "adapter", "a missing shard", "no config", "cut", "a broken index", "no folder"],
)
def test_files_that_are_no_weights(damage: Callable[[Path], Any], said: str, own: Path) -> None:
    damage(own)
    with pytest.raises(ConfigError) as caught:
        key(config(own))
    assert said in str(caught.value)
    assert caught.value.cure


def test_a_repository_that_is_not_there() -> None:
    with pytest.raises(HubError, match="not in the Hub's cache") as caught:
        key(config("runs/my-pythia"))
    assert "no folder runs/my-pythia" in str(caught.value)


def test_a_folder_has_no_revision(tuned: Path) -> None:
    with pytest.raises(ConfigError, match="a folder has no revisions"):
        key(config(tuned, revision="main"))
    with pytest.raises(ValidationError, match=r"goes with model\.weights"):
        config(revision="main")


# ---------------------------------------------------------------- of another architecture


def fewer_layers(folder: Path) -> None:
    model = tiny_models.neox_model(1)
    model.config.num_hidden_layers = 9
    type(model)(model.config).save_pretrained(folder)


def wider_mlp(folder: Path) -> None:
    model = tiny_models.neox_model(1)
    model.config.intermediate_size += 8
    type(model)(model.config).save_pretrained(folder)


def llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 10, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(folder)


def not_a_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["gpt_neox.layers.2.attention.dense.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def a_tensor_less(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["gpt_neox.layers.2.attention.dense.weight"]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (fewer_layers, "layers 9"),
        (llama, "class LlamaForCausalLM"),
        (wider_mlp, "TransformerLens cannot make it of them"),
        (not_a_number, "predictions are NaN"),
        (a_tensor_less, "1 tensors of GPTNeoXForCausalLM are missing"),
        (lambda folder: edit(folder, intermediate_size=64), "its weights cannot be read"),
        (lambda folder: edit(folder, rope_scaling={"rope_type": "linear", "factor": 4.0}), "something else"),
        (
            lambda folder: edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
            "its config.json cannot be read",
        ),
    ],
    ids=["layers", "class", "inner width", "NaN", "a missing tensor", "another config", "positions", "code of its own"],
)
def test_weights_of_another_model(damage: Callable[[Path], Any], said: str, own: Path) -> None:
    damage(own)
    with pytest.raises(ConfigError) as caught:
        load_model(config(own), CPU)
    assert said in str(caught.value)
    assert "my-pythia" in str(caught.value)


def test_no_code_is_run(own: Path) -> None:
    """Neither a pickle's nor a module's."""
    pickled(own)
    (own / "mine.py").write_text("raise SystemExit('code of a model was run')")
    edit(own, auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    with pytest.raises(ConfigError, match="no safetensors"):
        load_model(config(own), CPU)
    tiny_models.neox_model(1).save_pretrained(own)
    edit(own, auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    check_is_seed(load_model(config(own), CPU), 1)


def test_the_architectures_config_is_not_to_be_had(tuned: Path, hub: Path) -> None:
    shutil.rmtree(hub / f"models--{tiny_models.PYTHIA.replace('/', '--')}")
    with pytest.raises(HubError, match=r"config\.json of 'EleutherAI/pythia-160m-deduped'") as caught:
        load_model(config(tuned), CPU)
    assert "hf download" in str(caught.value.cure)


# ---------------------------------------------------------------- weights given as a name


def test_a_folder_given_as_a_name(tuned: Path) -> None:
    with pytest.raises(HubError) as caught:
        check_bridgeable(str(tuned))
    assert f"model.weights: {tuned} and model.name: " in str(caught.value.cure)
    assert "pythia" in str(caught.value.cure)


def test_a_folder_that_says_what_it_was_tuned_from(own: Path) -> None:
    edit(own, _name_or_path=tiny_models.PYTHIA)
    with pytest.raises(HubError) as caught:
        check_bridgeable(str(own))
    assert caught.value.cure == f"set model.weights: {own} and model.name: {tiny_models.PYTHIA}"


def test_a_repository_given_as_a_name(tuned: Path, hub: Path) -> None:
    """TransformerLens has a bridge to it."""
    files = {path.name: path.read_bytes() for path in tuned.iterdir()}
    tiny_models.byte_pair_tokenizer().save_pretrained(write_repository(hub, REPOSITORY, files))
    model = load_model(ModelConfig(name=REPOSITORY, hook=HOOK), CPU)
    assert is_bridge(model)
    check_is_seed(model, 1)


def test_a_folder_beside_a_name_of_its_own(own: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer beside the weights"):
        load_model(ModelConfig(name="my-pythia", hook=HOOK, weights=str(own)), CPU)
    tiny_models.byte_pair_tokenizer().save_pretrained(own)
    model = load_model(ModelConfig(name="my-pythia", hook=HOOK, weights=str(own)), CPU)
    assert is_bridge(model)
    check_is_seed(model, 1)


def test_a_folder_of_an_architecture_that_nobody_has(own: Path) -> None:
    edit(own, architectures=["MineForCausalLM"], model_type="mine")
    with pytest.raises(HubError) as caught:
        check_bridgeable(str(own))
    assert caught.value.cure == "TransformerLens has no model of its architecture (MineForCausalLM)"


@pytest.mark.parametrize("broken", ["{", "[]", '{"architectures": []}'])
def test_a_folder_that_says_nothing(broken: str, own: Path) -> None:
    (own / "config.json").write_text(broken)
    with pytest.raises(HubError, match="does not know this name") as caught:
        check_bridgeable(str(own))
    assert "model.weights" not in str(caught.value.cure)


def test_metadata_of_a_folder(tuned: Path) -> None:
    found = find_weights(str(tuned), None)
    assert found.as_metadata() == {"name": "my-pythia", "content": found.content}
    assert replace(found, content="other") != found
