"""Published SAEs in both formats do what SAEBench and SAELens make of them; what does not fit is refused."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from sae_bench.custom_saes.run_all_evals_dictionary_learning_saes import TRAINER_LOADERS
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import dictionary_learning_sae_huggingface_loader_1
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.errors import ConfigError, DictionaryError, HubError, ShapeError
from ksvd_sae.methods.base import load_sae
from ksvd_sae.methods.published import PublishedSAEMethod, saes
from ksvd_sae.methods.published.hub_files import hub_files
from ksvd_sae.methods.published.saes import check_fetched, read_tensors, take_published
from tests.strategies import generator
from tests.tiny_hub import (
    COMMIT,
    GATED,
    PRIVATE,
    dictionary_learning_files,
    served_hub,
    write_repository,
)
from tests.tiny_saes import one_thread
from tests.tolerances import SAE_CODE, UNIT_NORM

MODEL, HOOK, D_IN, D_SAE, K = "google/gemma-2-2b", "blocks.12.hook_resid_post", 16, 48, 4
REPOSITORY, FOLDER = "someone/saes", "TopK/resid_post_layer_12/trainer_0"
# dict_class, trainer_class (which SAEBench's loaders go by), the parameters' names.
KINDS = {
    "topk": ("AutoEncoderTopK", "TopKTrainer", "linear"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer", "linear"),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", "plain"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer", "plain"),
    "relu": ("AutoEncoder", "StandardTrainer", "linear"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer", "gated"),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def weights(kind: str, norm: float = 1.0) -> dict[str, Tensor]:
    """Random tensors under the names that dictionary_learning gives them."""
    draw = generator(3)
    w_enc_DM, b_enc_M = torch.randn(D_IN, D_SAE, generator=draw) / 4, 0.1 * torch.randn(D_SAE, generator=draw)
    w_dec_MD, b_dec_D = torch.randn(D_SAE, D_IN, generator=draw), torch.randn(D_IN, generator=draw)
    spread_M = norm if norm == 1 else norm * (0.5 + torch.rand(D_SAE, 1, generator=draw))
    w_dec_MD = normalize(w_dec_MD, dim=1) * spread_M
    if kind == "gated":
        biases = {name: 0.1 * torch.randn(D_SAE, generator=draw) for name in ("r_mag", "gate_bias", "mag_bias")}
        return {"encoder.weight": w_enc_DM.T, "decoder.weight": w_dec_MD.T, "decoder_bias": b_dec_D, **biases}
    if kind in ("matryoshka", "jumprelu"):
        named = {"W_enc": w_enc_DM, "W_dec": w_dec_MD, "b_enc": b_enc_M, "b_dec": b_dec_D}
    else:
        named = {"encoder.weight": w_enc_DM.T, "decoder.weight": w_dec_MD.T, "encoder.bias": b_enc_M, "bias": b_dec_D}
    if kind == "matryoshka":
        named["group_sizes"] = torch.tensor([16, 32])
    if kind == "jumprelu":
        named["threshold"] = 0.5 * torch.rand(D_SAE, generator=draw)
    if kind in ("topk", "batchtopk", "matryoshka"):
        named |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
    return {name: tensor.contiguous() for name, tensor in named.items()}


def trainer(kind: str, **changes: Any) -> dict[str, Any]:
    dict_class, trainer_class, _ = KINDS[kind]
    facts = {
        "dict_class": dict_class,
        "trainer_class": trainer_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 12,
        "lm_name": MODEL,
        "submodule_name": "resid_post_layer_12",
        "steps": 1000,
        **({"k": K} if kind in ("topk", "batchtopk", "matryoshka") else {}),
    }
    return {**facts, **changes}


def publish(cache: Path, kind: str, norm: float = 1.0, **changes: Any) -> PublishedSAEMethod:
    files = dictionary_learning_files(
        FOLDER, weights(kind, norm), trainer(kind, **changes), {"out_batch_size": 2048, "ctx_len": 1024}
    )
    write_repository(cache, REPOSITORY, files)
    return PublishedSAEMethod(repo_id=REPOSITORY, path=FOLDER, format="dictionary_learning")


def take(config: PublishedSAEMethod, folder: Path, d_in: int = D_IN, **run: Any) -> dict[str, Any]:
    """What its manifest says."""
    return take_published(config, folder, model_name=MODEL, hook_name=HOOK, d_in=d_in, **run).manifest(0.0)


def inputs() -> Tensor:
    return 2 * torch.randn(300, D_IN, generator=generator(9))


def assert_does_the_same(ours: Any, theirs: Any, norms_M: Tensor | None = None) -> None:
    """Same latents, same reconstruction; codes in units of the decoder rows' norms."""
    x_BD = inputs()
    with torch.no_grad():
        code_BM, expected_BM = ours.encode(x_BD), theirs.encode(x_BD)
        rebuilt_BD, expected_BD = ours.decode(code_BM), theirs.decode(expected_BM)
    assert torch.equal(code_BM != 0, expected_BM != 0)
    assert 0 < int((code_BM != 0).sum()) < 0.9 * code_BM.numel()
    expected_BM = expected_BM if norms_M is None else expected_BM * norms_M
    torch.testing.assert_close(code_BM, expected_BM, rtol=SAE_CODE, atol=SAE_CODE)
    torch.testing.assert_close(rebuilt_BD, expected_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)


# ---------------------------------------------------------------- dictionary_learning's format


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_what_saebench_makes_of_it(cache: Path, tmp_path: Path, kind: str) -> None:
    config = publish(cache, kind)
    facts = take(config, tmp_path / "sae")
    theirs = TRAINER_LOADERS[KINDS[kind][1]](
        repo_id=REPOSITORY,
        filename=f"{FOLDER}/ae.pt",
        model_name="gemma-2-2b",
        device=torch.device("cpu"),
        dtype=torch.float32,
        layer=12,
        # A local_dir would be asked of the Hub.
        local_dir=None,
    )
    assert_does_the_same(load_sae(tmp_path / "sae", torch.device("cpu")), theirs)
    assert facts["samples_seen"] == 1000 * 2048
    assert (facts["d_sae"], facts["signed"]) == (D_SAE, False)
    assert facts["k"] == (K if kind in ("topk", "batchtopk", "matryoshka") else None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_what_saelens_makes_of_it(cache: Path, tmp_path: Path, kind: str) -> None:
    """Decoder rows of all norms: SAELens takes them as they are, we bring them to 1."""
    config = publish(cache, kind, norm=1.7)
    take(config, tmp_path / "sae")
    ours = load_sae(tmp_path / "sae", torch.device("cpu"))
    theirs = SAE.from_pretrained(REPOSITORY, FOLDER, converter=dictionary_learning_sae_huggingface_loader_1)
    norms_M = torch.linalg.vector_norm(theirs.W_dec.detach(), dim=1)
    assert float(norms_M.max() / norms_M.min()) > 2
    assert_does_the_same(ours, theirs, norms_M)
    unit_M = torch.linalg.vector_norm(ours.W_dec.detach(), dim=1)
    assert float((unit_M - 1).abs().max()) < UNIT_NORM[torch.float32]


@pytest.mark.parametrize("bos", [True, False])
def test_evals_begin_texts_as_the_run_does_where_it_does_not_say(bos: bool, cache: Path, tmp_path: Path) -> None:
    take(publish(cache, "topk"), tmp_path / "sae", prepend_bos=bos)
    assert load_sae(tmp_path / "sae", torch.device("cpu")).cfg.metadata.prepend_bos is bos


def test_what_is_kept_is_safe_and_says_where_it_came_from(cache: Path, tmp_path: Path) -> None:
    config = publish(cache, "topk")
    facts = take(config, tmp_path / "sae")
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    where = {name: facts[name] for name in ("repo_id", "path", "revision", "format")}
    assert where == {
        "repo_id": REPOSITORY,
        "path": FOLDER,
        "revision": COMMIT,
        "format": "dictionary_learning",
    }
    assert sorted(facts["sha256"]) == ["ae.pt", "config.json"]
    assert all(len(digest) == 64 for digest in facts["sha256"].values())
    metadata = load_sae(tmp_path / "sae", torch.device("cpu")).cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.context_size) == (MODEL, HOOK, 1024)
    json.dumps(facts)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_later_versions_call_the_bias_b_dec(cache: Path, tmp_path: Path, kind: str) -> None:
    take(publish(cache, kind), tmp_path / "before")
    tensors = weights(kind)
    tensors["b_dec"] = tensors.pop("bias")
    write_repository(cache, REPOSITORY, dictionary_learning_files(FOLDER, tensors, trainer(kind)))
    take(PublishedSAEMethod(repo_id=REPOSITORY, path=FOLDER, format="dictionary_learning"), tmp_path / "later")
    before, later = (load_sae(tmp_path / name, torch.device("cpu")) for name in ("before", "later"))
    assert torch.equal(later(inputs()), before(inputs()))


def test_the_class_of_the_april_update(cache: Path, tmp_path: Path) -> None:
    """AutoEncoderNew: the decoder has the bias, and the encoder does not subtract it."""
    tensors = weights("relu")
    tensors["decoder.bias"] = tensors.pop("bias")
    files = dictionary_learning_files(FOLDER, tensors, trainer("relu", dict_class="AutoEncoderNew"))
    write_repository(cache, REPOSITORY, files)
    take(PublishedSAEMethod(repo_id=REPOSITORY, path=FOLDER, format="dictionary_learning"), tmp_path / "sae")
    acts_BM = torch.relu(inputs() @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    expected_BD = acts_BM @ tensors["decoder.weight"].T + tensors["decoder.bias"]
    rebuilt_BD = load_sae(tmp_path / "sae", torch.device("cpu"))(inputs()).detach()
    torch.testing.assert_close(rebuilt_BD, expected_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.witness, "code has run"))


def test_a_pickle_that_runs_code_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = io.BytesIO()
    torch.save({**weights("topk"), "extra": Malicious(tmp_path / "witness")}, checkpoint)
    config = publish(cache, "topk")
    write_repository(cache, REPOSITORY, {f"{FOLDER}/ae.pt": checkpoint.getvalue()})
    # What makes torch.load unpickle anything where its caller does not say.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(DictionaryError, match=r"(?s)ae\.pt.*more than tensors.*run code"):
        take(config, tmp_path / "sae")
    assert not (tmp_path / "witness").exists()
    assert not (tmp_path / "sae").exists()
    # The file is what it claims to be: it does run code where it is let.
    torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=False)
    assert (tmp_path / "witness").read_text() == "code has run"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", json.dumps({"W": 1}).encode()])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ae.pt").write_bytes(content)
    with pytest.raises(DictionaryError, match=r"loading it: ae\.pt"):
        read_tensors(tmp_path / "ae.pt", "loading it")


def test_tensors_without_names(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "ae.pt")
    with pytest.raises(DictionaryError, match=r"(?s)no tensors by name.*list"):
        read_tensors(tmp_path / "ae.pt", "loading it")


def change_tensors(cache: Path, **tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in {**weights("batchtopk"), **tensors}.items() if tensor is not None}
    write_repository(cache, REPOSITORY, dictionary_learning_files(FOLDER, given, trainer("batchtopk")))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"threshold": None}, "missing: threshold"),
        ({"encoder.weight": None, "bias": None}, "missing: bias, encoder.weight"),
        ({"surplus": torch.zeros(1)}, "unknown: surplus"),
        ({"threshold": torch.tensor(-1.0)}, r"(?s)without a threshold.*-1\.0"),
        ({"threshold": torch.tensor(float("nan"))}, "without a threshold"),
        ({"encoder.bias": torch.zeros(D_SAE + 1)}, "sizes that do not fit"),
        ({"decoder.weight": torch.zeros(D_IN, D_SAE)}, "decoder rows of norm 0"),
        ({"decoder.weight": torch.full((D_IN, D_SAE), float("nan"))}, "not finite"),
    ],
)
def test_tensors_that_make_no_sae(cache: Path, tmp_path: Path, tensors: dict[str, Tensor | None], message: str) -> None:
    config = publish(cache, "batchtopk")
    change_tensors(cache, **tensors)
    with pytest.raises(DictionaryError, match=message):
        take(config, tmp_path / "sae")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dict_class": "CrossCoder"}, DictionaryError, r"(?s)unknown class.*CrossCoder.*AutoEncoderTopK"),
        ({"submodule_name": "mlp_out_layer_12"}, ConfigError, rf"(?s)got: .*mlp_out_layer_12.*limit: .*{HOOK}"),
        ({"layer": 5, "submodule_name": "resid_post_layer_5"}, ConfigError, rf"(?s)blocks\.5\.hook.*limit: .*{HOOK}"),
        ({"lm_name": "google/gemma-2-2b-it"}, ConfigError, r"(?s)gemma-2-2b-it.*limit: google/gemma-2-2b,"),
        ({"k": 7}, None, ""),
    ],
)
def test_configs_that_do_not_fit(
    cache: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    config = publish(cache, "topk", **changes)
    if error is None:
        assert take(config, tmp_path / "sae")["k"] == 7
        with pytest.raises(ConfigError, match=r"(?s)another k.*got: k: 8.*limit: 7"):
            take(config.model_copy(update={"k": 8}), tmp_path / "sae")
        return
    with pytest.raises(error, match=message):
        take(config, tmp_path / "sae")
    if error is ConfigError:
        with pytest.raises(error, match=message):
            check_fetched(config, model_name=MODEL, hook_name=HOOK)


def test_a_config_of_another_kind(cache: Path, tmp_path: Path) -> None:
    config = publish(cache, "topk")
    for content, message in ((b"{", "no JSON"), (b"[1]", "no mapping"), (b'{"a": 1}', "none of dictionary_learning's")):
        write_repository(cache, REPOSITORY, {f"{FOLDER}/config.json": content})
        with pytest.raises(DictionaryError, match=message):
            take(config, tmp_path / "sae")


@pytest.mark.parametrize("model", ["gemma-2-2b", "google/gemma-2-2b", "Gemma-2-2B"])
def test_an_owner_may_be_left_out_of_a_models_name(cache: Path, tmp_path: Path, model: str) -> None:
    config = publish(cache, "topk", lm_name=model)
    take(config, tmp_path / "sae")
    assert load_sae(tmp_path / "sae", torch.device("cpu")).cfg.metadata.model_name == MODEL


def test_another_width(cache: Path, tmp_path: Path) -> None:
    config = publish(cache, "topk")
    with pytest.raises(ShapeError, match=rf"(?s)got: d_in = {D_IN}\b.*limit: 24 \({MODEL}, {HOOK}\)"):
        take(config, tmp_path / "sae", d_in=24)
    assert not (tmp_path / "sae").exists()


def test_samples_seen_that_nobody_tells(cache: Path, tmp_path: Path) -> None:
    files = dictionary_learning_files(FOLDER, weights("topk"), trainer("topk"))
    write_repository(cache, REPOSITORY, files)
    config = PublishedSAEMethod(repo_id=REPOSITORY, path=FOLDER, format="dictionary_learning")
    assert take(config, tmp_path / "sae")["samples_seen"] is None
    told = config.model_copy(update={"samples_seen": 500_000_000})
    assert take(told, tmp_path / "sae")["samples_seen"] == 500_000_000


# ---------------------------------------------------------------- SAELens' format


def write_saelens(cache: Path, tmp_path: Path, *, metadata: dict[str, Any] | None = None, **options: Any) -> TopKSAE:
    named = {"model_name": "gemma-2-2b", "hook_name": HOOK} if metadata is None else metadata
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, metadata=SAEMetadata(**named), **options))
    given = weights("topk")
    with torch.no_grad():
        sae.W_enc.copy_(given["encoder.weight"].T)
        sae.W_dec.copy_(given["decoder.weight"].T)
        sae.b_enc.copy_(given["encoder.bias"])
        sae.b_dec.copy_(given["bias"])
    sae.save_model(tmp_path / "made")
    files = {f"layer_12/{path.name}": path.read_bytes() for path in (tmp_path / "made").iterdir()}
    write_repository(cache, REPOSITORY, files)
    return sae


SAELENS = PublishedSAEMethod(repo_id=REPOSITORY, path="layer_12", format="saelens")


def test_saelens_own_format(cache: Path, tmp_path: Path) -> None:
    theirs = write_saelens(cache, tmp_path)
    facts = take(SAELENS, tmp_path / "sae")
    assert_does_the_same(load_sae(tmp_path / "sae", torch.device("cpu")), theirs)
    assert (facts["k"], facts["d_sae"], facts["samples_seen"], facts["signed"]) == (K, D_SAE, None, False)
    assert facts["architecture"] == "topk"
    assert check_fetched(SAELENS, model_name=MODEL, hook_name=HOOK).origin["revision"] == COMMIT


def test_the_form_that_it_is_trained_in(cache: Path, tmp_path: Path) -> None:
    """Whose encoder looks at the other tokens of a batch."""
    metadata = SAEMetadata(model_name=MODEL, hook_name=HOOK)
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, metadata=metadata))
    sae.save_model(tmp_path / "made")
    files = {f"layer_12/{path.name}": path.read_bytes() for path in (tmp_path / "made").iterdir()}
    write_repository(cache, REPOSITORY, files)
    with pytest.raises(DictionaryError, match=r"(?s)trained in.*got: batchtopk.*cure: .*save_inference_model"):
        take(SAELENS, tmp_path / "sae")


def test_samples_seen_from_saelens_metadata(cache: Path, tmp_path: Path) -> None:
    write_saelens(cache, tmp_path, metadata={"model_name": MODEL, "hook_name": HOOK, "training_tokens": 123_456})
    assert take(SAELENS, tmp_path / "sae")["samples_seen"] == 123_456


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"(?s)does not say.*model_name None"),
        ({"model_name": MODEL}, r"(?s)does not say.*hook_name None"),
        ({"model_name": "gpt2", "hook_name": HOOK}, rf"(?s)got: gpt2, {HOOK}.*limit: {MODEL}, {HOOK}"),
        ({"model_name": MODEL, "hook_name": "blocks.3.hook_mlp_out"}, r"(?s)got: .*hook_mlp_out.*limit"),
    ],
)
def test_saelens_sae_of_another_place(cache: Path, tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    write_saelens(cache, tmp_path, metadata=metadata)
    for check in (
        lambda: take(SAELENS, tmp_path / "sae"),
        lambda: check_fetched(SAELENS, model_name=MODEL, hook_name=HOOK),
    ):
        with pytest.raises(ConfigError, match=message):
            check()


def test_a_saelens_sae_that_saelens_cannot_load(cache: Path, tmp_path: Path) -> None:
    write_saelens(cache, tmp_path)
    write_repository(cache, REPOSITORY, {"layer_12/sae_weights.safetensors": b"broken"})
    with pytest.raises(DictionaryError, match="SAELens cannot"):
        take(SAELENS, tmp_path / "sae")


def test_a_scale_that_nobody_tells(cache: Path, tmp_path: Path) -> None:
    write_saelens(cache, tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(DictionaryError, match=r"(?s)factor that is not known.*release and sae_id"):
        take(SAELENS, tmp_path / "sae")


def test_rows_that_topk_already_scales_by(cache: Path, tmp_path: Path) -> None:
    theirs = write_saelens(cache, tmp_path, rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        theirs.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    theirs.save_model(tmp_path / "made")
    write_repository(
        cache, REPOSITORY, {f"layer_12/{path.name}": path.read_bytes() for path in (tmp_path / "made").iterdir()}
    )
    take(SAELENS, tmp_path / "sae")
    ours = load_sae(tmp_path / "sae", torch.device("cpu"))
    # SAELens' codes are in units of unit rows already.
    assert_does_the_same(ours, theirs)
    assert float((torch.linalg.vector_norm(ours.W_dec.detach(), dim=1) - 1).abs().max()) < 1e-5


# ---------------------------------------------------------------- SAELens' directory


def test_a_listed_release(cache: Path, tmp_path: Path) -> None:
    """The 4k Matryoshka SAEs of SAEBench are listed; a tiny one lies under their name here."""
    release = "saebench_gemma-2-2b_width-2pow12_date-0108"
    place = "MatryoshkaBatchTopK_gemma-2-2b__0108/resid_post_layer_12/trainer_1"
    files = dictionary_learning_files(place, weights("matryoshka"), trainer("matryoshka"))
    write_repository(cache, f"adamkarvonen/{release}", files)
    config = PublishedSAEMethod(release=release, sae_id="blocks.12.hook_resid_post__trainer_1")
    facts = take(config, tmp_path / "sae")
    assert (facts["repo_id"], facts["path"]) == (f"adamkarvonen/{release}", place)
    assert facts["format"] == "dictionary_learning"


@pytest.mark.parametrize(
    ("release", "sae_id", "message"),
    [
        ("no-such-release", "x", "no such release"),
        ("saebench_gemma-2-2b_width-2pow12_date-0108", "x", r"(?s)no such sae_id.*limit: blocks\.12"),
        ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", r"(?s)no loader for its format.*gemma_2"),
    ],
)
def test_a_release_that_cannot_be_had(cache: Path, release: str, sae_id: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        saes.fetch(PublishedSAEMethod(release=release, sae_id=sae_id))


# ---------------------------------------------------------------- the Hub


def test_files_of_a_served_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with served_hub({REPOSITORY: {"a/x": b"1", "a/y": b"2", "z": b"3"}}) as (endpoint, asked):
        found = hub_files(REPOSITORY, "a", ("x", "y"), endpoint=endpoint)
        top = hub_files(REPOSITORY, "", ("z",), endpoint=endpoint)
    assert (found.folder / "x").read_bytes() == b"1"
    assert (found.folder / "y").read_bytes() == b"2"
    assert (found.commit, top.commit, list(found.sha256)) == (COMMIT, COMMIT, ["x", "y"])
    # Whatever happens to main meanwhile, all files are of one commit.
    assert {path for path in asked if path.endswith("/y")} == {f"/{REPOSITORY}/resolve/{COMMIT}/a/y"}


@pytest.mark.parametrize(
    ("repo_id", "file", "revision", "message"),
    [
        (GATED, "x", None, r"(?s)reading a/x of someone/gated.*gated.*accept its terms"),
        (PRIVATE, "x", None, r"(?s)no such repository.*private.*huggingface\.co/someone/private"),
        (REPOSITORY, "missing", None, r"(?s)reading a/missing of someone/saes.*no such file.*tree/main"),
        (REPOSITORY, "x", "v9", r"(?s)no such revision.*v9"),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_id: str, file: str, revision: str | None, message: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with served_hub({REPOSITORY: {"a/x": b"1"}}) as (endpoint, _), pytest.raises(HubError, match=message):
        hub_files(repo_id, "a", (file,), revision=revision, endpoint=endpoint)


def test_offline(cache: Path, tmp_path: Path) -> None:
    config = publish(cache, "topk")
    (cache / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / COMMIT / FOLDER / "ae.pt").unlink()
    with pytest.raises(HubError, match=r"(?s)ae\.pt of someone/saes.*not in the Hub's cache.*HF_HUB_OFFLINE"):
        take(config, tmp_path / "sae")
    with pytest.raises(HubError, match="not in the Hub's cache"):
        hub_files("someone/else", "a", ("x",))


def test_no_hub_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    # huggingface_hub asks six times, with pauses in between.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with served_hub({}) as (endpoint, _):
        pass
    with pytest.raises(HubError, match="cannot be asked"):
        hub_files(REPOSITORY, "a", ("x",), endpoint=endpoint)


def test_no_name_of_a_repository(cache: Path) -> None:
    with pytest.raises(HubError, match="no name of a repository"):
        hub_files("some--one/saes", "", ("x",))
