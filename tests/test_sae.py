"""A dictionary as a SAELens SAE: same codes, and everything of SAELens takes it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pytest
import torch
from sae_lens import SAE, ActivationsStore, HookedSAETransformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import InputTypeError, ShapeError
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.gram import GramRows
from ksvd_sae.learning.sparse_coding import CODERS, Coder
from ksvd_sae.learning.weighting import weighting_by_fisher, weighting_by_std
from ksvd_sae.sae import (
    ARCHITECTURE,
    ARCHITECTURE_ON_DISK,
    DBKSVDSAE,
    DBKSVDSAEConfig,
    sae_from_dictionary,
)
from tests.strategies import generator, unit_atoms
from tests.tiny_saes import (
    CONTEXT_TOKENS,
    D_MODEL,
    HOOK,
    MODEL_NAME,
    WORDS,
    grouped_queries,
    identity_sae,
    tiny_db_ksvd_sae,
    tiny_dictionary,
    tiny_model,
    tiny_topk_sae,
)
from tests.tolerances import BFLOAT16, SAE_CODE, SPLICED_LOSS, UNIT_NORM, WEIGHTED_CODE

coders = pytest.mark.parametrize("coder", CODERS)


def samples(*shape: int, seed: int = 7) -> Tensor:
    return 3 * torch.randn(*shape, D_MODEL, generator=generator(seed)) + 1


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest ‖got − wanted‖ / ‖wanted‖ over rows."""
    got, wanted = got.detach().double(), wanted.detach().double()
    gap = torch.linalg.vector_norm(got - wanted, dim=-1)
    return float((gap / torch.linalg.vector_norm(wanted, dim=-1)).max())


# ---------------------------------------------------------------- codes


@coders
def test_codes_and_reconstruction_are_the_dictionarys(coder: Coder) -> None:
    dictionary, sae, x_BD = tiny_dictionary(coder), tiny_db_ksvd_sae(coder), samples(50)
    code = dictionary.encode(x_BD)
    dense_BM = sae.encode(x_BD)
    assert dense_BM.shape == (50, dictionary.n_atoms)
    assert torch.equal(dense_BM != 0, code.to_dense(dictionary.n_atoms) != 0)
    assert relative(dense_BM, code.to_dense(dictionary.n_atoms)) < SAE_CODE
    assert relative(sae.decode(dense_BM), dictionary.decode(code)) < SAE_CODE


WEIGHTINGS = {
    "diagonal": weighting_by_std(torch.rand(D_MODEL, generator=generator(11)) + 0.05),
    "full": weighting_by_fisher(torch.cov(torch.randn(D_MODEL, 3 * D_MODEL, generator=generator(12)))),
}


@pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp", "ormp", "matryoshka"])
@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_weighted_dictionary(kind: str, coder: AnyCoder, tmp_path: Path) -> None:
    """Unit rows in raw space, codes rescaled to match: the reconstruction is the dictionary's; and back from disk."""
    plain = tiny_dictionary("mp")
    half = plain.n_atoms // 2
    coding = replace(plain.coding, coder=coder, groups=(half, plain.n_atoms - half))
    weighted = replace(plain, coding=coding, weighting=WEIGHTINGS[kind])
    sae = sae_from_dictionary(weighted, model_name=MODEL_NAME, hook_name=HOOK)
    x_BD = samples(50)
    code, acts_BM = weighted.encode(x_BD), sae.encode(x_BD)
    assert float((sae.W_dec.detach().norm(dim=1) - 1).abs().max()) <= UNIT_NORM[torch.float32]
    assert torch.equal(acts_BM != 0, code.to_dense(weighted.n_atoms) != 0)
    scale_M = weighted.raw_atoms().norm(dim=1)
    assert relative(acts_BM, code.to_dense(weighted.n_atoms) * scale_M) < WEIGHTED_CODE
    assert relative(sae.decode(acts_BM), weighted.decode(code)) < WEIGHTED_CODE
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded.encode(x_BD), acts_BM)


def test_non_negative_dictionary() -> None:
    sae = sae_from_dictionary(tiny_dictionary("omp", nonnegative=True), model_name=MODEL_NAME, hook_name=HOOK)
    acts_BM = sae.encode(samples(50)).detach()
    assert float(acts_BM.min()) == 0
    assert float(acts_BM.max()) > 0


def test_coders_differ() -> None:
    """Else the test above could compare one coder with itself four times."""
    x_BD = samples(50)
    codes = [tiny_db_ksvd_sae(coder).encode(x_BD) for coder in ("mp", "mp_refit", "omp")]
    assert not torch.allclose(codes[0], codes[1])
    assert not torch.allclose(codes[1], codes[2])


@coders
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (1, 2, 3), (0,)], ids=str)
def test_any_leading_shape(coder: Coder, leading: tuple[int, ...]) -> None:
    sae, x = tiny_db_ksvd_sae(coder), samples(*leading)
    acts = sae.encode(x)
    assert acts.shape == (*leading, sae.cfg.d_sae)
    assert sae.decode(acts).shape == x.shape
    one_by_one = [sae.encode(row) for row in x.reshape(-1, D_MODEL)]
    assert torch.allclose(acts.reshape(-1, sae.cfg.d_sae), torch.stack(one_by_one), atol=1e-5) if one_by_one else True


def test_weights_are_what_saebench_expects() -> None:
    sae = tiny_db_ksvd_sae()
    norms = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
    assert float((norms - 1).abs().max()) < UNIT_NORM[torch.float32]
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.is_contiguous()
    assert sae.W_dec.is_contiguous()
    assert torch.equal(sae.b_enc, torch.zeros(24))
    assert torch.equal(sae.b_dec, tiny_dictionary().centre_D)


def test_fresh_sae_has_unit_atoms() -> None:
    """Before any dictionary is copied in, as SAELens makes it to load a state dict into."""
    sae = DBKSVDSAE(DBKSVDSAEConfig(d_in=D_MODEL, d_sae=10, k=3))
    norms = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
    assert float((norms - 1).abs().max()) < UNIT_NORM[torch.float32]
    assert sae.W_enc.is_contiguous()
    assert int((sae.encode(samples(5)) != 0).sum(dim=1).max()) <= 3


def test_state_dict_is_complete() -> None:
    source, target = tiny_db_ksvd_sae(seed=1), tiny_db_ksvd_sae(seed=2)
    x_BD = samples(9)
    assert sorted(source.state_dict()) == ["W_dec", "W_enc", "b_dec", "b_enc"]
    assert not torch.equal(source.encode(x_BD), target.encode(x_BD))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source.encode(x_BD), target.encode(x_BD))
    assert torch.equal(source(x_BD), target(x_BD))


@coders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(coder: Coder, dtype: torch.dtype) -> None:
    """As SAEBench does it: ``.to(dtype)``, then activations of that dtype."""
    d_in, k = 128, 8
    atoms_MD = unit_atoms(200, d_in, 3, torch.float32)
    if coder == "projection":
        atoms_MD = torch.linalg.qr(atoms_MD[:k].T).Q.T.contiguous()
    dictionary = Dictionary(atoms_MD, torch.randn(d_in, generator=generator(5)), Coding(k, coder))
    sae = sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK)
    x_BD = 3 * torch.randn(40, d_in, generator=generator(6)).to(dtype)
    exact_BD = sae(x_BD.float()).detach()
    sae = sae.to(device="cpu", dtype=dtype)
    acts_BM = sae.encode(x_BD)
    rebuilt_BD = sae.decode(acts_BM).detach()
    assert acts_BM.dtype == rebuilt_BD.dtype == dtype
    assert bool(torch.isfinite(acts_BM).all())
    assert int((acts_BM != 0).sum(dim=1).max()) <= k
    # A near tie may give another atom, so it is the error that stays, not the code.
    error = torch.linalg.vector_norm(rebuilt_BD.float() - x_BD.float())
    exact_error = torch.linalg.vector_norm(exact_BD - x_BD.float())
    size = torch.linalg.vector_norm(x_BD.float())
    tolerance = BFLOAT16 if dtype == torch.bfloat16 else SAE_CODE
    assert float(abs(error - exact_error) / size) < tolerance
    # The dense product that decode is, in float64.
    by_hand_BD = acts_BM.double() @ sae.W_dec.detach().double() + sae.b_dec.detach().double()
    assert relative(rebuilt_BD, by_hand_BD) < tolerance


def test_projection_in_bfloat16_at_a_small_width() -> None:
    """Atoms rounded to bfloat16 are orthonormal to about 1 / (100·√d_in), not to 1e-3."""
    sae, x_BD = tiny_db_ksvd_sae("projection", k=8), samples(20)
    exact_BD = sae(x_BD)
    sae = sae.to(dtype=torch.bfloat16)
    assert relative(sae(x_BD.bfloat16()), exact_BD) < BFLOAT16


# ---------------------------------------------------------------- the cached Gram matrix


def _copy_in_place(sae: DBKSVDSAE, atoms_MD: Tensor) -> None:
    with torch.no_grad():
        sae.W_dec.copy_(atoms_MD)


def _write_to_data(sae: DBKSVDSAE, atoms_MD: Tensor) -> None:
    """As SAELens' own fold functions do; the parameter's version does not move."""
    sae.W_dec.data.copy_(atoms_MD)


def _replace_data(sae: DBKSVDSAE, atoms_MD: Tensor) -> None:
    sae.W_dec.data = atoms_MD.clone()


def _replace_parameter(sae: DBKSVDSAE, atoms_MD: Tensor) -> None:
    sae.W_dec = nn.Parameter(atoms_MD.clone())


def _load_state(sae: DBKSVDSAE, atoms_MD: Tensor) -> None:
    sae.load_state_dict({**sae.state_dict(), "W_dec": atoms_MD})


def _assign_state(sae: DBKSVDSAE, atoms_MD: Tensor) -> None:
    sae.load_state_dict({**sae.state_dict(), "W_dec": atoms_MD.clone()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [_copy_in_place, _write_to_data, _replace_data, _replace_parameter, _load_state, _assign_state],
    ids=lambda change: change.__name__.strip("_"),
)
def test_codes_follow_w_dec(change: Callable[[DBKSVDSAE, Tensor], None]) -> None:
    sae, x_BD = tiny_db_ksvd_sae(), samples(20)
    before_BM = sae.encode(x_BD)
    other_MD = unit_atoms(24, D_MODEL, 11, torch.float32)
    change(sae, other_MD)
    fresh = tiny_db_ksvd_sae()
    with torch.no_grad():
        fresh.W_dec.copy_(other_MD)
    assert torch.equal(sae.encode(x_BD), fresh.encode(x_BD))
    assert not torch.equal(sae.encode(x_BD), before_BM)


def test_codes_follow_w_dec_when_it_is_cast() -> None:
    sae, x_BD = tiny_db_ksvd_sae(), samples(20)
    sae.encode(x_BD)
    sae = sae.to(dtype=torch.bfloat16)
    fresh = tiny_db_ksvd_sae().to(dtype=torch.bfloat16)
    assert torch.equal(sae.encode(x_BD), fresh.encode(x_BD))
    sae, fresh = sae.to(dtype=torch.float32), fresh.to(dtype=torch.float32)
    assert torch.equal(sae.encode(x_BD), fresh.encode(x_BD))


def test_codes_follow_the_weighting() -> None:
    dictionary = replace(tiny_dictionary(), weighting=WEIGHTINGS["diagonal"])
    sae, x_BD = sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK), samples(20)
    before_BM = sae.encode(x_BD)
    with torch.no_grad():
        sae.weighting.copy_(sae.weighting.flip(0))
    fresh = sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK)
    fresh.load_state_dict(sae.state_dict())
    assert torch.equal(sae.encode(x_BD), fresh.encode(x_BD))
    assert not torch.equal(sae.encode(x_BD), before_BM)


def test_a_copy_shares_what_codes_are_found_with_until_it_is_changed() -> None:
    """The Gram matrix is the largest part of a SAE that has coded something, and no weight."""
    sae, x_BD = tiny_db_ksvd_sae(), samples(20)
    wanted_BM = sae.encode(x_BD)
    ready = sae._prepared
    assert ready is not None
    copy = deepcopy(sae)
    assert copy._prepared is ready
    assert copy.W_dec is not sae.W_dec
    assert torch.equal(copy.encode(x_BD), wanted_BM)
    assert copy._prepared is ready
    _write_to_data(copy, unit_atoms(24, D_MODEL, 11, torch.float32))
    assert not torch.equal(copy.encode(x_BD), wanted_BM)
    assert copy._prepared is not ready
    assert torch.equal(sae.encode(x_BD), wanted_BM)
    assert sae._prepared is ready
    # Where the weights were, it would keep the memory of that device.
    assert sae.to(dtype=torch.bfloat16)._prepared is None


def test_a_gram_matrix_that_is_too_large_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BD = samples(50)
    wanted_BM = tiny_db_ksvd_sae("omp").encode(x_BD)
    monkeypatch.setattr("ksvd_sae.learning.gram.memory_bytes", lambda device: 1000)
    sae = tiny_db_ksvd_sae("omp")
    assert relative(sae.encode(x_BD), wanted_BM) < SAE_CODE
    sae.encode(x_BD).sum().backward()
    assert sae._prepared is not None
    assert isinstance(sae._prepared.gram_MM, GramRows)


@pytest.mark.parametrize("coder", ["projection", "matryoshka"])
def test_coders_that_read_no_gram_matrix_have_none(coder: AnyCoder) -> None:
    groups = (8, 16) if coder == "matryoshka" else None
    dictionary = tiny_dictionary(coder, groups=groups)  # type: ignore[arg-type]
    sae = sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK)
    sae.encode(samples(5))
    assert sae._prepared is not None
    assert sae._prepared.gram_MM is None


def test_exact_budgets_are_on_disk(tmp_path: Path) -> None:
    coding = Coding(5, "matryoshka", groups=(8, 16), exact_budgets=True)
    dictionary = replace(tiny_dictionary(), coding=coding)
    sae, x_BD = sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK), samples(50)
    codes_BM = sae.encode(x_BD)
    assert int((codes_BM[:, :8] != 0).sum(dim=1).max()) == 3
    assert int((codes_BM[:, 8:] != 0).sum(dim=1).max()) == 2
    assert codes_BM.grad_fn is not None
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.coding == coding
    assert torch.equal(loaded.encode(x_BD), codes_BM)


@pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp", "ormp"])
def test_rows_of_any_norm_and_their_fold(coder: Coder) -> None:
    """As SAELens tests its own: latents differ by the norms, reconstructions do not."""
    sae, x = tiny_db_ksvd_sae(coder), samples(4, 5)
    for parameter in sae.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator(2))
    folded, norms_M = deepcopy(sae), sae.W_dec.detach().norm(dim=1)
    folded.fold_W_dec_norm()
    assert float((folded.W_dec.detach().norm(dim=1) - 1).abs().max()) < UNIT_NORM[torch.float32]
    assert float((norms_M - 1).abs().max()) > 0.1
    assert torch.equal(folded.encode(x) != 0, sae.encode(x) != 0)
    assert relative(folded.encode(x), sae.encode(x) * norms_M) < SAE_CODE
    assert relative(folded(x), sae(x)) < SAE_CODE


def test_codes_follow_saelens_scaling_fold() -> None:
    """SAELens' fold: the SAE of x·s, W_dec / s, so its rows are no longer of unit norm; the product is the same."""
    sae, x_BD = tiny_db_ksvd_sae(), samples(20)
    exact_BD = sae(x_BD)
    sae.fold_activation_norm_scaling_factor(2.0)
    # b_dec was halved too: x is the activation before scaling.
    assert relative(sae(x_BD / 2), exact_BD / 2) < SAE_CODE


def test_encode_under_inference_mode() -> None:
    x_BD, wanted_BM = samples(4), tiny_db_ksvd_sae().encode(samples(4))
    with torch.inference_mode():
        made_inside = tiny_db_ksvd_sae()
        assert torch.equal(made_inside.encode(x_BD), wanted_BM)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("architecture", [ARCHITECTURE, ARCHITECTURE_ON_DISK])
def test_config_from_dict(architecture: str) -> None:
    cfg = tiny_db_ksvd_sae("omp").cfg
    assert cfg.to_dict()["architecture"] == "db_ksvd"
    again = DBKSVDSAEConfig.from_dict({**cfg.to_dict(), "architecture": architecture})
    assert isinstance(again, DBKSVDSAEConfig)
    assert again == cfg
    assert again.coding == tiny_dictionary("omp").coding
    assert again.metadata.hook_name == HOOK


def test_sae_from_dict() -> None:
    sae = SAE.from_dict(tiny_db_ksvd_sae("mp_refit").cfg.to_dict())
    assert isinstance(sae, DBKSVDSAE)
    assert sae.cfg.coding.coder == "mp_refit"


def test_wrong_coder() -> None:
    with pytest.raises(ShapeError, match=r"(?s)unknown coder.*lasso.*omp"):
        DBKSVDSAEConfig(d_in=4, d_sae=8, k=2, coder="lasso")  # type: ignore[arg-type]


def test_metadata_names_model_and_hook() -> None:
    sae = sae_from_dictionary(tiny_dictionary(), model_name="m", hook_name=HOOK, context_size=9, harvest="abc")
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.context_size, metadata.prepend_bos) == (
        "m",
        HOOK,
        9,
        True,
    )
    assert metadata.harvest == "abc"
    assert (
        sae_from_dictionary(
            tiny_dictionary(), model_name="m", hook_name=HOOK, prepend_bos=False
        ).cfg.metadata.prepend_bos
        is False
    )
    with pytest.raises(InputTypeError, match="prepend_bos must be True or False"):
        sae_from_dictionary(tiny_dictionary(), model_name="m", hook_name=HOOK, prepend_bos="auto")  # type: ignore


# ---------------------------------------------------------------- disk and other processes

LOAD = """
from safetensors.torch import load_file, save_file
sae = SAE.load_from_disk("sae")
x_BD = load_file("x.safetensors")["x"]
acts_BM = sae.encode(x_BD).detach()
save_file({"acts": acts_BM, "rebuilt": sae.decode(acts_BM).detach()}, "made-INDEX.safetensors")
"""
BEFORE_LOADING = {
    "ksvd_sae first": """
import ksvd_sae
from sae_lens import SAE
""",
    "sae_lens first, and a load that forgot ksvd_sae": """
from sae_lens import SAE
try:
    SAE.load_from_disk("sae")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
import ksvd_sae
""",
}


@dataclass(frozen=True)
class Elsewhere:
    """What a fresh process made of a saved SAE."""

    returncode: int
    stdout: str
    stderr: str
    made: Path


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Elsewhere]:
    """Both orders of imports, at the same time: each process spends many seconds on importing SAELens."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_db_ksvd_sae("omp").save_model(folder / "sae")
    save_file({"x": samples(30)}, folder / "x.safetensors")

    def load(index: int, script: str) -> Elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", script + LOAD.replace("INDEX", str(index))],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return Elsewhere(done.returncode, done.stdout, done.stderr, folder / f"made-{index}.safetensors")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BEFORE_LOADING, pool.map(load, range(2), BEFORE_LOADING.values()), strict=True))


@pytest.mark.parametrize("order", BEFORE_LOADING)
def test_another_process_loads_the_same_bits(loaded_elsewhere: dict[str, Elsewhere], order: str) -> None:
    there = loaded_elsewhere[order]
    assert there.returncode == 0, there.stderr
    sae, made = tiny_db_ksvd_sae("omp"), load_file(there.made)
    acts_BM = sae.encode(samples(30))
    assert torch.equal(made["acts"], acts_BM)
    assert torch.equal(made["rebuilt"], sae.decode(acts_BM))


def test_without_the_package_the_error_says_what_to_import(loaded_elsewhere: dict[str, Elsewhere]) -> None:
    said = loaded_elsewhere["sae_lens first, and a load that forgot ksvd_sae"].stdout
    assert "Error" in said
    assert "import ksvd_sae" in said


@coders
def test_save_and_load(tmp_path: Path, coder: Coder) -> None:
    sae, x_BD = tiny_db_ksvd_sae(coder), samples(30)
    sae.save_model(tmp_path)
    on_disk = json.loads((tmp_path / "cfg.json").read_text())
    assert on_disk["architecture"] == ARCHITECTURE_ON_DISK
    assert "import ksvd_sae" in on_disk["architecture"]
    assert sae.cfg.to_dict()["architecture"] == "db_ksvd"
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, DBKSVDSAE)
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded.encode(x_BD), sae.encode(x_BD))
    # A loaded SAE saves again to the same files.
    loaded.save_model(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "cfg.json").read_text()) == on_disk
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


FLAT = {"k": 4, "coder": "omp", "rtol": 0.1, "max_steps": 7}


@pytest.mark.parametrize(
    ("keys", "coding"),
    [
        (FLAT, Coding(4, "omp", 0.1, 7)),
        (FLAT | {"nonnegative": True, "groups": None, "weighting": "none"}, Coding(4, "omp", 0.1, 7, nonnegative=True)),
        (FLAT | {"coder": "matryoshka", "groups": [10, 14]}, Coding(4, "matryoshka", 0.1, 7, groups=(10, 14))),
    ],
    ids=["first", "non-negative", "groups"],
)
def test_saes_of_before_load(tmp_path: Path, keys: dict[str, object], coding: Coding) -> None:
    """A cfg.json written by hand, of before there was a Coding; its keys stay, as SAELens' users read them."""
    dictionary = replace(tiny_dictionary(), coding=coding)
    sae, x_BD = sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK), samples(30)
    sae.save_model(tmp_path)
    others = ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "metadata")
    written = json.loads((tmp_path / "cfg.json").read_text())
    by_hand = {name: written[name] for name in others} | {"architecture": ARCHITECTURE_ON_DISK, **keys}
    (tmp_path / "cfg.json").write_text(json.dumps(by_hand))
    loaded = SAE.load_from_disk(tmp_path)
    assert (loaded.cfg.coding, loaded.cfg.k) == (coding, 4)
    assert loaded.cfg == sae.cfg
    for each in (loaded, deepcopy(loaded)):
        assert torch.equal(each.encode(x_BD), sae.encode(x_BD))
    loaded.save_model(tmp_path / "again")
    assert keys.items() <= json.loads((tmp_path / "again" / "cfg.json").read_text()).items()


def test_load_in_another_dtype(tmp_path: Path) -> None:
    tiny_db_ksvd_sae().save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert loaded.W_dec.dtype == torch.bfloat16
    assert loaded.encode(samples(3).bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------- inside SAELens


@pytest.fixture(scope="module")
def model() -> HookedSAETransformer:
    return tiny_model(HookedSAETransformer)


@pytest.fixture(scope="module")
def tokens_BL(model: HookedSAETransformer) -> Tensor:
    return model.to_tokens([" ".join(WORDS[:8]), " ".join(WORDS[8:16])])


@coders
def test_spliced_into_a_model(model: HookedSAETransformer, tokens_BL: Tensor, coder: Coder) -> None:
    sae = tiny_db_ksvd_sae(coder)
    clean = model(tokens_BL)

    def splice(x_BLD: Tensor, hook: object) -> Tensor:
        return sae.decode(sae.encode(x_BLD))

    wanted = model.run_with_hooks(tokens_BL, fwd_hooks=[(HOOK, splice)])
    spliced = model.run_with_saes(tokens_BL, saes=[sae])
    assert torch.allclose(spliced, wanted, atol=SPLICED_LOSS)
    assert not torch.allclose(spliced, clean, atol=100 * SPLICED_LOSS)
    with_error = model.run_with_saes(tokens_BL, saes=[sae], use_error_term=True)
    assert torch.allclose(with_error, clean, atol=SPLICED_LOSS)
    assert torch.equal(model(tokens_BL), clean)


def test_spliced_identity_changes_nothing(model: HookedSAETransformer, tokens_BL: Tensor) -> None:
    spliced = model.run_with_saes(tokens_BL, saes=[identity_sae()])
    assert torch.allclose(spliced, model(tokens_BL), atol=SPLICED_LOSS)


def test_cached_codes_are_the_codes(model: HookedSAETransformer, tokens_BL: Tensor) -> None:
    sae = tiny_db_ksvd_sae()
    _, clean = model.run_with_cache(tokens_BL, names_filter=HOOK)
    _, cache = model.run_with_cache_with_saes(tokens_BL, saes=[sae])
    assert torch.equal(cache[f"{HOOK}.hook_sae_acts_post"], sae.encode(clean[HOOK]))
    assert torch.equal(cache[f"{HOOK}.hook_sae_input"], clean[HOOK])


@pytest.mark.parametrize("hook", ["q", "k", "v", "z", "rot_q", "rot_k", "result"])
def test_at_a_hook_with_heads(hook: str, tokens_BL: Tensor) -> None:
    """A harvest flattens heads into d_in; SAELens gives the SAE of such a hook the heads apart."""
    model, name = grouped_queries(HookedSAETransformer), f"blocks.1.attn.hook_{hook}"
    model.cfg.use_attn_result = hook == "result"
    _, cache = model.run_with_cache(tokens_BL, names_filter=name)
    heads_BLHD = cache[name]
    assert heads_BLHD.shape[2] == (2 if hook in ("k", "v", "rot_k") else 4)
    width = heads_BLHD[0, 0].numel()
    dictionary = Dictionary(unit_atoms(3 * width, width, 0, torch.float32), torch.ones(width), Coding(4))
    sae = sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=name)
    rebuilt = sae.decode(sae.encode(heads_BLHD.flatten(2))).reshape(heads_BLHD.shape)
    wanted = model.run_with_hooks(tokens_BL, fwd_hooks=[(name, lambda x, hook: rebuilt)])
    assert torch.allclose(model.run_with_saes(tokens_BL, saes=[sae]), wanted, atol=SPLICED_LOSS)
    assert not torch.allclose(model(tokens_BL), wanted, atol=100 * SPLICED_LOSS)


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_activations_store_reads_for_it(model: HookedSAETransformer) -> None:
    texts = [" ".join(WORDS[i % 16 : i % 16 + 4]) for i in range(40)]
    store = ActivationsStore.from_sae(
        model,
        tiny_db_ksvd_sae(),
        datasets.Dataset.from_dict({"text": texts}),
        train_batch_size_tokens=20,
        store_batch_size_prompts=2,
        n_batches_in_buffer=4,
        total_tokens=len(texts),
    )
    assert store.context_size == CONTEXT_TOKENS
    batch_BL = store.get_batch_tokens(3)
    assert batch_BL.shape == (3, CONTEXT_TOKENS)
    assert bool((batch_BL[:, 0] == model.tokenizer.bos_token_id).all())
    x_BLD = store.get_activations(batch_BL).squeeze()
    assert x_BLD.shape == (3, CONTEXT_TOKENS, D_MODEL)
    _, cache = model.run_with_cache(batch_BL, names_filter=HOOK)
    assert torch.allclose(x_BLD, cache[HOOK], atol=SPLICED_LOSS)
    x_BD = next(store)
    assert x_BD.shape == (20, D_MODEL)
    assert tiny_db_ksvd_sae().encode(x_BD).shape == (20, 24)


def test_same_interface_as_saelens_topk() -> None:
    """What SAELens' own k-sparse architecture has, ours has, with the same shapes and dtypes."""
    ours, theirs, x = tiny_db_ksvd_sae(), tiny_topk_sae(), samples(2, 5)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        assert ours.get_parameter(name).shape == parameter.shape
    assert sorted(ours.hook_dict) == sorted(theirs.hook_dict)
    assert set(theirs.cfg.to_dict()) - {"rescale_acts_by_decoder_norm"} <= set(ours.cfg.to_dict())
    for sae in (ours, theirs):
        acts = sae.encode(x)
        assert acts.shape == (2, 5, 24)
        assert acts.dtype == torch.float32
        assert int((acts != 0).sum(dim=-1).max()) == 4
        assert sae.decode(acts).shape == sae(x).shape == x.shape
        _, cache = sae.run_with_cache(x)
        assert torch.equal(cache["hook_sae_acts_post"], acts)
        assert {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_recons", "hook_sae_output"} <= set(cache)
    assert bool((ours.encode(x) < 0).any()), "ours are signed"
    assert bool((theirs.encode(x) >= 0).all()), "theirs are not"
