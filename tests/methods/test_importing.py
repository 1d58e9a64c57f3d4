"""Imported SAEs rebuild what they rebuilt, from the same latents; a pursuit makes less error; the rest is refused."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save as serialized
from safetensors.torch import save_file
from torch import Tensor

from ksvd_sae import Dictionary, import_sae, sae_from_dictionary
from ksvd_sae.errors import ConfigError, DictionaryError, HubError, InputTypeError, ShapeError
from ksvd_sae.learning.code import Code
from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.sparse_coding import refit_code
from ksvd_sae.methods.published import PublishedSAEMethod
from tests.methods.test_published_saes import KINDS, Malicious, trainer, weights
from tests.strategies import generator
from tests.tiny_hub import COMMIT, dictionary_learning_files, write_repository
from tests.tiny_saes import one_thread, tiny_db_ksvd_sae
from tests.tolerances import RISE, SAE_CODE

MODEL, HOOK, D_IN, D_SAE, K = "google/gemma-2-2b", "blocks.12.hook_resid_post", 16, 48, 4
METADATA = {"model_name": MODEL, "hook_name": HOOK}
# SAELens' classes of SAEs, in the form that is used and in the one that is trained, with options that matter here.
USED: dict[str, tuple[type[SAE[Any]], dict[str, Any]]] = {
    "standard": (sae_lens.StandardSAE, {}),
    "standard, b_dec not subtracted": (sae_lens.StandardSAE, {"apply_b_dec_to_input": False}),
    "gated": (sae_lens.GatedSAE, {}),
    "jumprelu": (sae_lens.JumpReLUSAE, {}),
    "topk": (sae_lens.TopKSAE, {"k": K}),
    "topk, scaled by norms": (sae_lens.TopKSAE, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": (sae_lens.AbsTopKSAE, {"k": K}),
    "matching_pursuit": (sae_lens.MatchingPursuitSAE, {"max_iterations": K}),
    "matching_pursuit, no b_dec": (
        sae_lens.MatchingPursuitSAE,
        {"max_iterations": K, "apply_b_dec_to_input": False},
    ),
}
TRAINED: dict[str, tuple[type[TrainingSAE[Any]], dict[str, Any]]] = {
    "standard": (sae_lens.StandardTrainingSAE, {}),
    "gated": (sae_lens.GatedTrainingSAE, {}),
    "jumprelu": (sae_lens.JumpReLUTrainingSAE, {}),
    "topk": (sae_lens.TopKTrainingSAE, {"k": K}),
    "abstopk": (sae_lens.AbsTopKTrainingSAE, {"k": K}),
    "batchtopk": (sae_lens.BatchTopKTrainingSAE, {"k": K}),
    "matryoshka_batchtopk": (sae_lens.MatryoshkaBatchTopKTrainingSAE, {"k": K, "matryoshka_widths": [16, D_SAE]}),
    "matching_pursuit": (sae_lens.MatchingPursuitTrainingSAE, {"max_iterations": K, "decoder_init_norm": 1.0}),
}
# Imported by name of why they cannot be.
REFUSED = {"temporal", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def made(kind: type[SAE[Any]], *, seed: int = 0, **options: Any) -> Any:
    """An SAE of random weights, decoder rows of all norms, and few latents active."""
    _, config = next(pair for pair in _registered() if pair[0] is kind)
    options = {"d_in": D_IN, "d_sae": D_SAE, "metadata": SAEMetadata(**METADATA), **options}
    sae = kind(config(**options))
    draw = generator(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
            if name in ("b_enc", "b_gate"):
                parameter.sub_(4)
            elif name == "threshold":
                parameter.abs_()
        sae.W_dec.mul_(0.5 + 4 * torch.rand(len(sae.W_dec), 1, generator=draw))
        if isinstance(sae, sae_lens.MatchingPursuitSAE | sae_lens.MatchingPursuitTrainingSAE):
            sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
    return sae


def _registered() -> Iterator[tuple[type, type]]:
    yield from SAE_CLASS_REGISTRY.values()
    yield from SAE_TRAINING_CLASS_REGISTRY.values()


def inputs(n: int = 200, seed: int = 9) -> Tensor:
    return 2 * torch.randn(n, D_IN, generator=generator(seed)) + 0.5


def latents(sae: Any, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The SAE's own, in units of decoder rows of norm 1, and what it rebuilds from them."""
    with torch.no_grad():
        acts_BM = sae.encode(x_BD)
        rebuilt_BD = sae.decode(acts_BM)
        in_unit_rows = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        return acts_BM if in_unit_rows else acts_BM * sae.W_dec.norm(dim=1), rebuilt_BD


def as_code(acts_BM: Tensor) -> Code:
    k = int((acts_BM != 0).sum(dim=1).max())
    support_BK = acts_BM.abs().topk(k, dim=1).indices
    values_BK = acts_BM.gather(1, support_BK)
    return Code(values_BK, torch.where(values_BK == 0, 0, support_BK).int())


def assert_rebuilds_as(dictionary: Dictionary, sae: Any) -> None:
    acts_BM, rebuilt_BD = latents(sae, inputs())
    assert 0 < int((acts_BM != 0).sum()) < 0.9 * acts_BM.numel()
    torch.testing.assert_close(dictionary.decode(as_code(acts_BM)), rebuilt_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)


def errors(x_BD: Tensor, rebuilt_BD: Tensor) -> Tensor:
    return (x_BD - rebuilt_BD).double().square().sum(dim=1)


# ---------------------------------------------------------------- SAELens


def test_every_architecture_of_saelens_is_here() -> None:
    of_saelens = {name for name, (kind, _) in SAE_CLASS_REGISTRY.items() if kind.__module__.startswith("sae_lens.")}
    assert of_saelens == {name.partition(",")[0] for name in USED} | REFUSED
    assert set(SAE_TRAINING_CLASS_REGISTRY) == set(TRAINED)


@pytest.mark.parametrize("name", USED)
def test_it_rebuilds_the_same_from_the_saes_latents(tmp_path: Path, name: str) -> None:
    kind, options = USED[name]
    sae = made(kind, **options)
    sae.save_model(tmp_path)
    dictionary = import_sae(tmp_path, k=K)
    assert_rebuilds_as(dictionary, sae)
    assert dictionary.coding == Coding(K, "omp", nonnegative=name != "abstopk")
    from_object = import_sae(sae, k=K)
    assert torch.equal(from_object.atoms_MD, dictionary.atoms_MD)
    assert torch.equal(from_object.centre_D, dictionary.centre_D)


@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
@pytest.mark.parametrize("name", TRAINED)
def test_saes_as_they_are_trained(tmp_path: Path, name: str, save: str) -> None:
    kind, options = TRAINED[name]
    sae = made(kind, **options)
    # Saving for use may fold norms into the weights.
    acts_BM, rebuilt_BD = latents(sae, inputs())
    getattr(sae, save)(tmp_path)
    rebuilt_by_import_BD = import_sae(tmp_path, k=K).decode(as_code(acts_BM))
    torch.testing.assert_close(rebuilt_by_import_BD, rebuilt_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)


@given(seed=st.integers(0, 1000), name=st.sampled_from(sorted(USED)))
def test_less_error_from_the_same_atoms(seed: int, name: str) -> None:
    """Least squares on the SAE's own support can only lower the error; OMP, which chooses too, does on the whole."""
    kind, options = USED[name]
    sae, x_BD = made(kind, seed=seed, **options), inputs(60, seed)
    acts_BM, rebuilt_BD = latents(sae, x_BD)
    theirs_B = errors(x_BD, rebuilt_BD)
    dictionary = import_sae(sae, k=K)
    code = as_code(acts_BM)
    refit = refit_code(x_BD - dictionary.centre_D, code, dictionary.atoms_MD)
    ours_B = errors(x_BD, dictionary.decode(refit))
    assert bool((ours_B <= theirs_B + RISE[torch.float32] * x_BD.double().square().sum(dim=1)).all())
    k = max(1, round(float(code.l0().float().mean())))
    omp = replace(dictionary, coding=Coding(min(k, D_IN), "omp")).encode(x_BD)
    assert float(omp.l0().float().mean()) <= k
    assert float(errors(x_BD, dictionary.decode(omp)).sum()) <= float(theirs_B.sum())


@pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp", "ormp"])
def test_it_is_saved_and_coded_like_any_other(tmp_path: Path, coder: Any) -> None:
    sae = made(sae_lens.TopKSAE, k=K)
    sae.save_model(tmp_path / "sae")
    dictionary = import_sae(str(tmp_path / "sae"), coder=coder, nonnegative=False)
    dictionary.save(tmp_path / "dictionary")
    loaded = Dictionary.load(tmp_path / "dictionary")
    assert loaded.coding == Coding(K, coder)
    assert loaded.provenance == dictionary.provenance
    ours = sae_from_dictionary(loaded, model_name=loaded.provenance["model"], hook_name=loaded.provenance["hook"])
    x_BD = inputs()
    rebuilt_BD = dictionary.decode(dictionary.encode(x_BD))
    torch.testing.assert_close(ours(x_BD).detach(), rebuilt_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)
    assert float(errors(x_BD, rebuilt_BD).sum()) < float(errors(x_BD, sae(x_BD).detach()).sum())


def test_where_it_came_from(tmp_path: Path) -> None:
    made(sae_lens.TopKSAE, k=K).save_model(tmp_path)
    provenance = import_sae(tmp_path).provenance
    assert (provenance["model"], provenance["hook"]) == (MODEL, HOOK)
    facts = provenance["sae"]
    assert (facts["architecture"], facts["format"], facts["folder"]) == ("topk", "saelens", str(tmp_path))
    assert {name: len(digest) for name, digest in facts["sha256"].items()} == {
        "cfg.json": 64,
        "sae_weights.safetensors": 64,
    }
    assert facts["metadata"]["sae_lens_version"] == sae_lens.__version__
    assert (facts["rows_left_out"], facts["near_duplicates"]) == ([], 0)


def test_heads(tmp_path: Path) -> None:
    """W_dec is flat where activations have heads; the SAE goes on taking them as they come."""
    hook = "blocks.0.attn.hook_z"
    metadata = SAEMetadata(model_name=MODEL, hook_name=hook)
    sae = made(sae_lens.TopKSAE, k=K, reshape_activations="hook_z", metadata=metadata)
    x_BHd = inputs(20).reshape(20, 2, D_IN // 2)
    dictionary = import_sae(sae)
    rebuilt_BHd = sae(x_BHd).detach()
    assert rebuilt_BHd.shape == x_BHd.shape
    sae.turn_off_forward_pass_hook_z_reshaping()
    assert_rebuilds_as(dictionary, sae)
    ours = sae_from_dictionary(dictionary, model_name=MODEL, hook_name=dictionary.provenance["hook"])
    found_BHd = ours(x_BHd).detach()
    assert found_BHd.shape == x_BHd.shape
    flat_BD = dictionary.decode(dictionary.encode(x_BHd.flatten(1)))
    torch.testing.assert_close(found_BHd.flatten(1), flat_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)


def test_in_bfloat16_far_from_zero() -> None:
    sae = made(sae_lens.TopKSAE, k=K)
    sae.b_dec.data += 1000
    sae.to(torch.bfloat16)
    dictionary = import_sae(sae)
    assert torch.equal(dictionary.centre_D, sae.b_dec.detach().float())
    cosines_M = torch.nn.functional.cosine_similarity(dictionary.atoms_MD, sae.W_dec.detach().float())
    assert float(cosines_M.min()) > 1 - SAE_CODE


# ---------------------------------------------------------------- rows


def test_rows_of_norm_0_are_left_out(tmp_path: Path) -> None:
    sae = made(sae_lens.StandardSAE)
    sae.W_dec.data[[0, 7, D_SAE - 1]] = 0
    dictionary = import_sae(sae, k=K)
    assert dictionary.provenance["sae"]["rows_left_out"] == [0, 7, D_SAE - 1]
    acts_BM, rebuilt_BD = latents(sae, inputs())
    kept_M = torch.ones(D_SAE, dtype=torch.bool)
    kept_M[[0, 7, D_SAE - 1]] = False
    ours_BD = dictionary.decode(as_code(acts_BM[:, kept_M]))
    torch.testing.assert_close(ours_BD, rebuilt_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)


def test_rows_that_are_short_are_atoms() -> None:
    sae = made(sae_lens.StandardSAE)
    sae.W_dec.data[3] *= 1e-9
    dictionary = import_sae(sae, k=K)
    assert dictionary.provenance["sae"]["rows_left_out"] == []
    assert_rebuilds_as(dictionary, sae)


@pytest.mark.parametrize(("nonnegative", "count"), [(True, 2), (False, 3)])
def test_repeated_rows_are_counted_and_stay(nonnegative: bool, count: int) -> None:
    sae = made(sae_lens.StandardSAE)
    # Twice the same direction, and once the opposite one, which only codes with signs have twice.
    sae.W_dec.data[5], sae.W_dec.data[9], sae.W_dec.data[11] = sae.W_dec[2] * 3, sae.W_dec[2] / 3, -sae.W_dec[4]
    dictionary = import_sae(sae, k=K, nonnegative=nonnegative)
    assert dictionary.n_atoms == D_SAE
    assert dictionary.provenance["sae"]["near_duplicates"] == count
    # A pursuit takes one of them at most: the others add nothing to it.
    uses_B3 = dictionary.encode(inputs()).to_dense(D_SAE)[:, [2, 5, 9]] != 0
    assert bool(uses_B3.any())
    assert int(uses_B3.sum(dim=1).max()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sae: sae.W_dec.data.zero_(), "all rows of its decoder have norm 0"),
        (lambda sae: sae.W_dec.data[5].fill_(float("nan")), "holds NaN or infinity"),
        (lambda sae: sae.b_dec.data[2].fill_(float("inf")), "holds NaN or infinity"),
    ],
)
def test_weights_that_make_no_dictionary(change: Callable[[Any], Any], message: str) -> None:
    sae = made(sae_lens.StandardSAE)
    change(sae)
    with pytest.raises(DictionaryError, match=message):
        import_sae(sae, k=K)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_what_rebuilds_other_than_what_it_reads(tmp_path: Path, architecture: str) -> None:
    kind, _ = SAE_CLASS_REGISTRY[architecture]
    options = {"n_heads": 2, "bottleneck_factor": 4} if architecture == "temporal" else {"d_out": D_IN}
    options |= {"apply_b_dec_to_input": architecture == "temporal"}
    made(kind, **options).save_model(tmp_path)
    with pytest.raises(DictionaryError, match=rf"(?s)no dictionary of what it reads.*{architecture}\b.*rebuilds"):
        import_sae(tmp_path, k=K)


@pytest.mark.parametrize(
    ("how", "cure"),
    [
        ("expected_average_only_in", "fold_activation_norm_scaling_factor"),
        ("covariance_whitening", "fold_activation_whitening"),
        ("layer_norm", "trained without"),
        ("constant_norm_rescale", "trained without"),
    ],
)
def test_normalised_activations(how: Any, cure: str) -> None:
    sae = made(sae_lens.TopKSAE, k=K, normalize_activations=how)
    with pytest.raises(DictionaryError, match=rf"(?s)normalize_activations: {how}.*normalised first.*cure: .*{cure}"):
        import_sae(sae)


def test_what_is_folded_is_not_refused() -> None:
    scaled = made(sae_lens.TopKSAE, k=K, normalize_activations="expected_average_only_in")
    scaled.fold_activation_norm_scaling_factor(2.5)
    assert_rebuilds_as(import_sae(scaled), scaled)
    whitened = made(sae_lens.TopKSAE, k=K, normalize_activations="covariance_whitening")
    matrix = torch.randn(D_IN, D_IN, generator=generator(4)) + 3 * torch.eye(D_IN)
    whitened.fold_activation_whitening(torch.ones(D_IN), matrix, torch.linalg.inv(matrix))
    assert_rebuilds_as(import_sae(whitened), whitened)


def test_recoding_refuses_the_same(tmp_path: Path) -> None:
    """A run's other kinds take atoms of SAEs too."""
    made(sae_lens.TopKSAE, k=K, normalize_activations="layer_norm").save_model(tmp_path)
    method = PublishedSAEMethod(release="any", sae_id="any")
    with pytest.raises(DictionaryError, match=r"(?s)taking the atoms of .*normalize_activations: layer_norm"):
        method.dictionary(None, tmp_path)  # type: ignore[arg-type]


class ForeignSAE(sae_lens.StandardSAE):
    """Of another package: its decoder is not linear."""

    def decode(self, feature_acts: Tensor) -> Tensor:
        return torch.tanh(super().decode(feature_acts))


def test_a_decoder_of_another_package() -> None:
    sae = made(sae_lens.StandardSAE)
    sae.__class__ = ForeignSAE
    with pytest.raises(DictionaryError, match=r"(?s)no multiple of its row.*architecture standard.*not linear"):
        import_sae(sae, k=K)


def test_one_of_ours() -> None:
    with pytest.raises(DictionaryError, match=r"(?s)codes by pursuit as it is.*cure: set its cfg\.k"):
        import_sae(tiny_db_ksvd_sae())


def test_a_k_that_nobody_tells() -> None:
    with pytest.raises(DictionaryError, match=r"(?s)how many atoms.*cure: give k"):
        import_sae(made(sae_lens.JumpReLUSAE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coder": "lasso"}, r"(?s)no pursuit of that name.*got: lasso.*limit: mp, mp_refit, omp, ormp"),
        ({"coder": "ormp"}, r"(?s)'ormp' has signs.*latents have none.*cure: nonnegative=False"),
        ({"k": D_IN + 1}, r"(?s)k out of range.*got: 17.*limit: 1 to 16"),
    ],
)
def test_codes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        import_sae(made(sae_lens.TopKSAE, k=K), **options)


# ---------------------------------------------------------------- dictionary_learning


def test_its_classes_are_as_their_source_has_them(tmp_path: Path) -> None:
    """By hand, a class's decoder, bias and their names in dictionary.py and trainers/ of dictionary_learning."""
    draw = generator(1)
    rows_MD, bias_D = torch.randn(D_SAE, D_IN, generator=draw), torch.randn(D_IN, generator=draw)
    other = {"encoder.weight": torch.randn(D_SAE, D_IN, generator=draw), "encoder.bias": torch.zeros(D_SAE)}
    plain = {"W_enc": other["encoder.weight"].T.contiguous(), "b_enc": torch.zeros(D_SAE)}
    linear, matrix = {"decoder.weight": rows_MD.T.contiguous()}, {"W_dec": rows_MD}
    batch = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.5)}
    gates = {name: torch.zeros(D_SAE) for name in ("r_mag", "gate_bias", "mag_bias")}
    tensors: dict[tuple[str, str], dict[str, Tensor]] = {
        ("AutoEncoder", "bias"): other | linear,
        ("AutoEncoderNew", "decoder.bias"): other | linear,
        ("AutoEncoderTopK", "bias"): other | linear,
        ("AutoEncoderTopK", "b_dec"): other | linear | batch,
        ("BatchTopKSAE", "b_dec"): other | linear | batch,
        ("MatryoshkaBatchTopKSAE", "b_dec"): plain | matrix | batch | {"group_sizes": torch.tensor([16, 32])},
        ("JumpReluAutoEncoder", "b_dec"): plain | matrix | {"threshold": torch.zeros(D_SAE)},
        ("GatedAutoEncoder", "decoder_bias"): {"encoder.weight": other["encoder.weight"]} | linear | gates,
    }
    acts_BM = torch.zeros(50, D_SAE).scatter_(1, torch.rand(50, D_SAE, generator=draw).topk(5).indices, 1.5)
    code = as_code(acts_BM * rows_MD.norm(dim=1))
    for (name, bias), given_ in tensors.items():
        files = dictionary_learning_files(name, given_ | {bias: bias_D}, trainer("topk", dict_class=name))
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(content)
        rebuilt_BD = import_sae(tmp_path / name).decode(code)
        expected_BD = acts_BM @ rows_MD + bias_D
        torch.testing.assert_close(rebuilt_BD, expected_BD, rtol=10 * SAE_CODE, atol=10 * SAE_CODE)


def write(folder: Path, kind: str, **changes: Any) -> Path:
    for path, content in dictionary_learning_files("sae", weights(kind, 1.7), trainer(kind, **changes)).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    return folder / "sae"


def test_its_tensors_may_be_safe(tmp_path: Path) -> None:
    folder = write(tmp_path, "batchtopk")
    pickled = import_sae(folder)
    assert pickled.coding.k == K
    save_file(weights("batchtopk", 1.7), folder / "ae.safetensors")
    (folder / "ae.pt").unlink()
    safe = import_sae(folder)
    assert torch.equal(safe.atoms_MD, pickled.atoms_MD)
    assert sorted(safe.provenance["sae"]["sha256"]) == ["ae.safetensors", "config.json"]
    (folder / "ae.safetensors").write_bytes(b"broken")
    with pytest.raises(DictionaryError, match=r"ae\.safetensors is no file of tensors"):
        import_sae(folder)


def test_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, checkpoint = write(tmp_path, "topk"), io.BytesIO()
    torch.save({**weights("topk"), "extra": Malicious(tmp_path / "witness")}, checkpoint)
    (folder / "ae.pt").write_bytes(checkpoint.getvalue())
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(DictionaryError, match=r"(?s)ae\.pt.*more than tensors.*run code"):
        import_sae(folder)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("place", "hook"), [("resid_post_layer_12", HOOK), (None, HOOK), ("mlp_out_layer_12", "mlp_out_layer_12")]
)
def test_its_place_in_the_model(tmp_path: Path, place: str | None, hook: str) -> None:
    provenance = import_sae(write(tmp_path, "topk", submodule_name=place)).provenance
    assert (provenance["model"], provenance["hook"]) == (MODEL, hook)


def test_crosscoders(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=r"(?s)unknown class.*got: CrossCoder.*limit: AutoEncoder, "):
        import_sae(write(tmp_path, "topk", dict_class="CrossCoder"))


# ---------------------------------------------------------------- places


def test_no_sae_there(tmp_path: Path) -> None:
    with pytest.raises(
        DictionaryError, match=r"(?s)no SAE there.*no such folder.*limit: cfg\.json and .*cure: .*release"
    ):
        import_sae(tmp_path / "nowhere")
    (tmp_path / "README.md").touch()
    with pytest.raises(DictionaryError, match=r"(?s)no SAE there.*got: README\.md"):
        import_sae(tmp_path)
    for nothing in (None, b"folder", 3):
        with pytest.raises(InputTypeError, match="no SAE and no place of one"):
            import_sae(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_listed_release(cache: Path, kind: str) -> None:
    release = "saebench_gemma-2-2b_width-2pow12_date-0108"
    place = "MatryoshkaBatchTopK_gemma-2-2b__0108/resid_post_layer_12/trainer_1"
    write_repository(
        cache, f"adamkarvonen/{release}", dictionary_learning_files(place, weights(kind, 1.7), trainer(kind))
    )
    dictionary = import_sae(release, "blocks.12.hook_resid_post__trainer_1", k=K)
    assert dictionary.n_atoms == D_SAE
    facts = dictionary.provenance["sae"]
    assert (facts["repo_id"], facts["path"], facts["revision"]) == (f"adamkarvonen/{release}", place, COMMIT)


def test_of_a_repository(cache: Path, tmp_path: Path) -> None:
    sae = made(sae_lens.TopKSAE, k=K)
    sae.save_model(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    write_repository(cache, "someone/saes", files | {f"a/b/{name}": content for name, content in files.items()})
    write_repository(cache, "someone/saes", dictionary_learning_files("c", weights("gated"), trainer("gated")))
    for sae_id in ("a/b", "a/b/", "a/b/cfg.json", "."):
        assert_rebuilds_as(import_sae("someone/saes", sae_id), sae)
    assert import_sae("someone/saes", "c/ae.pt", k=K).provenance["sae"]["architecture"] == "gated"
    with pytest.raises(HubError, match="not in the Hub's cache"):
        import_sae("someone/saes", "d")


def llama_scope(cache: Path) -> tuple[str, str]:
    """A tiny SAE under the name of one of Llama Scope's, which SAELens alone can read: scaled activations, no k."""
    draw, folder = generator(2), "Llama3_1-8B-Base-L0R-8x"
    shapes = {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE), "encoder.bias": (D_SAE,)}
    shapes |= {"decoder.bias": (D_IN,)}
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "jump_relu_threshold": 0.1,
        "hook_point_in": "blocks.0.hook_resid_post",
        "dataset_average_activation_norm": {"in": 2.0},
    }
    files = {
        f"{folder}/hyperparams.json": json.dumps(config).encode(),
        f"{folder}/checkpoints/final.safetensors": serialized(
            {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
        ),
    }
    write_repository(cache, "fnlp/Llama3_1-8B-Base-LXR-8x", files)
    return "llama_scope_lxr_8x", "l0r_8x"


def test_of_a_release_that_saelens_alone_can_read(cache: Path) -> None:
    """Its activations are scaled by the factor that SAELens' directory has."""
    release, sae_id = llama_scope(cache)
    dictionary, sae = import_sae(release, sae_id, k=K), SAE.from_pretrained(release, sae_id)
    assert_rebuilds_as(dictionary, sae)
    facts = dictionary.provenance["sae"]
    assert (facts["format"], facts["release"], facts["sae_id"]) == ("llama_scope", release, sae_id)
    assert dictionary.provenance["hook"] == "blocks.0.hook_resid_post"


def test_saelens_own_loaders_do_not_unpickle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(DictionaryError, match=r"(?s)unpickled.*cure: unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        import_sae(*llama_scope(cache), k=K)


@pytest.mark.parametrize(
    ("release", "sae_id", "error", "message"),
    [
        ("no-such-release", "x", ConfigError, "no such release"),
        ("saebench_gemma-2-2b_width-2pow12_date-0108", "x", ConfigError, r"(?s)no such sae_id.*limit: blocks\.12"),
        ("llama_scope_lxr_8x", "x", HubError, r"(?s)SAELens cannot load it \(ValueError: ID x not found"),
        ("llama_scope_lxr_8x", "l0r_8x", HubError, r"(?s)SAELens cannot load it .*ksvd-sae doctor"),
    ],
)
def test_releases_that_cannot_be_had(
    cache: Path, release: str, sae_id: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        import_sae(release, sae_id, k=K)
