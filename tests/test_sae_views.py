"""The two views of a signed dictionary: the same codes and the same reconstruction, with signs or without."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor, nn

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import DictionaryError, ShapeError
from ksvd_sae.learning.sparse_coding import CODERS
from ksvd_sae.learning.weighting import weighting_by_fisher, weighting_by_std
from ksvd_sae.sae import DBKSVDSAE, DBKSVDSAEConfig
from tests.strategies import generator, unit_atoms
from tests.tiny_saes import D_MODEL, HOOK, WORDS, tiny_db_ksvd_sae, tiny_dictionary, tiny_model, tiny_sae_of
from tests.tolerances import SAE_CODE, SPLICED_LOSS, UNIT_NORM

M = 24
GROUPS = (8, 16)
# Every way to code, in every kind of coordinates.
DICTIONARIES: dict[str, Callable[[], Dictionary]] = {
    **{coder: (lambda coder=coder: tiny_dictionary(coder)) for coder in CODERS},
    "diagonal weighting": lambda: replace(
        tiny_dictionary(), weighting=weighting_by_std(torch.rand(D_MODEL, generator=generator(11)) + 0.05)
    ),
    "full weighting": lambda: replace(
        tiny_dictionary("omp"),
        weighting=weighting_by_fisher(torch.cov(torch.randn(D_MODEL, 3 * D_MODEL, generator=generator(12)))),
    ),
    "matryoshka": lambda: tiny_dictionary("matryoshka", groups=GROUPS),
}
dictionaries = pytest.mark.parametrize("kind", DICTIONARIES)


def samples(*shape: int, seed: int = 7) -> Tensor:
    return 3 * torch.randn(*shape, D_MODEL, generator=generator(seed)) + 1


# ---------------------------------------------------------------- exactness


@dictionaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_code_and_same_bits(kind: str, dtype: torch.dtype) -> None:
    dictionary = DICTIONARIES[kind]()
    signed, split = (tiny_sae_of(dictionary, view).to(dtype=dtype) for view in ("signed", "split"))
    x_BD = samples(50).to(dtype)
    f_BM, f_BF = signed.encode(x_BD), split.encode(x_BD)
    assert f_BF.dtype == dtype
    assert f_BF.shape == (50, 2 * dictionary.n_atoms)
    assert bool((f_BM < 0).any()), "there are signs to split"
    assert float(f_BF.detach().min()) == 0
    plus_BM, minus_BM = f_BF.chunk(2, dim=1)
    assert torch.equal(plus_BM - minus_BM, f_BM)
    assert not bool(((plus_BM > 0) & (minus_BM > 0)).any())
    assert torch.equal((f_BF != 0).sum(dim=1), (f_BM != 0).sum(dim=1))
    assert torch.equal(split.decode(f_BF), signed.decode(f_BM))
    assert torch.equal(split(x_BD), signed(x_BD))


@dictionaries
def test_weights_are_what_saebench_expects(kind: str) -> None:
    dictionary = DICTIONARIES[kind]()
    signed, split = tiny_sae_of(dictionary), tiny_sae_of(dictionary, "split")
    assert split.cfg.d_sae == 2 * split.cfg.n_atoms == 2 * signed.cfg.d_sae
    assert torch.equal(split.W_dec, torch.cat([signed.W_dec, -signed.W_dec]))
    assert torch.equal(split.W_enc, split.W_dec.T)
    assert split.W_enc.is_contiguous()
    assert split.W_dec.is_contiguous()
    assert torch.equal(split.b_enc, torch.zeros(split.cfg.d_sae))
    assert torch.equal(split.b_dec, signed.b_dec)
    norms_F = torch.linalg.vector_norm(split.W_dec.detach(), dim=1)
    assert float((norms_F - 1).abs().max()) < UNIT_NORM[torch.float32]


@dictionaries
def test_decode_is_the_dense_product(kind: str) -> None:
    """Of codes that no encoder gives too, with both signs of an atom at once, as evals make by swapping latents."""
    sae = tiny_sae_of(DICTIONARIES[kind](), "split")
    acts_BF = torch.randn(20, sae.cfg.d_sae, generator=generator(3))
    wanted_BD = acts_BF.double() @ sae.W_dec.detach().double() + sae.b_dec.detach().double()
    rebuilt_BD = sae.decode(acts_BF).detach().double()
    assert float((rebuilt_BD - wanted_BD).norm() / wanted_BD.norm()) < SAE_CODE


def test_gradient_flows_to_the_latents() -> None:
    """RAVEL trains masks through decode."""
    sae = tiny_db_ksvd_sae(view="split")
    acts_BF = sae.encode(samples(3)).detach().requires_grad_()
    sae.decode(acts_BF).sum().backward()  # type: ignore[no-untyped-call]
    assert acts_BF.grad is not None
    assert torch.allclose(acts_BF.grad, sae.W_dec.detach().sum(dim=1).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0,)], ids=str)
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    sae, x = tiny_db_ksvd_sae(view="split"), samples(*leading)
    acts = sae.encode(x)
    assert acts.shape == (*leading, 2 * M)
    assert sae.decode(acts).shape == x.shape


def test_coding_is_done_once_an_atom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not over the 2m rows of the decoder: that would cost twice as much, and find the same code."""
    widths: list[int] = []
    original = type(tiny_db_ksvd_sae().cfg.coding).encode

    def encode(self: object, y_BD: Tensor, atoms_MD: Tensor, gram_MM: Tensor) -> object:
        widths.extend((len(atoms_MD), len(gram_MM)))
        return original(self, y_BD, atoms_MD, gram_MM)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tiny_db_ksvd_sae().cfg.coding), "encode", encode)
    tiny_db_ksvd_sae(view="split").encode(samples(5))
    assert widths == [M, M]


def test_spliced_into_a_model() -> None:
    model = tiny_model(HookedSAETransformer)
    tokens_BL = model.to_tokens([" ".join(WORDS[:8]), " ".join(WORDS[8:16])])
    signed, split = tiny_db_ksvd_sae(), tiny_db_ksvd_sae(view="split")
    logits, wanted = (model.run_with_saes(tokens_BL, saes=[sae]) for sae in (split, signed))
    assert torch.equal(logits, wanted)
    assert not torch.allclose(logits, model(tokens_BL), atol=100 * SPLICED_LOSS)
    _, cache = model.run_with_cache_with_saes(tokens_BL, saes=[split])
    assert cache[f"{HOOK}.hook_sae_acts_post"].shape[-1] == 2 * M
    assert float(cache[f"{HOOK}.hook_sae_acts_post"].detach().min()) == 0


# ---------------------------------------------------------------- what has no split view


def test_non_negative_dictionary_is_refused() -> None:
    dictionary = tiny_dictionary("omp", nonnegative=True)
    assert tiny_sae_of(dictionary).cfg.split is False
    with pytest.raises(DictionaryError, match=r"(?s)no split view.*non-negative as it comes.*cure.*'signed'"):
        tiny_sae_of(dictionary, "split")


def test_unknown_view_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"(?s)unknown view.*'halved'.*'signed' or 'split'"):
        tiny_sae_of(tiny_dictionary(), "halved")  # type: ignore[arg-type]


def test_odd_number_of_latents_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"(?s)two latents an atom.*d_sae = 9.*even"):
        DBKSVDSAEConfig(d_in=4, d_sae=9, k=2, split=True)


# ---------------------------------------------------------------- changes to W_dec


def _write_to_data(sae: DBKSVDSAE, rows_FD: Tensor) -> None:
    """As SAELens' own fold functions do; the parameter's version does not move."""
    sae.W_dec.data.copy_(rows_FD)


def _replace_parameter(sae: DBKSVDSAE, rows_FD: Tensor) -> None:
    sae.W_dec = nn.Parameter(rows_FD.clone())


def _load_state(sae: DBKSVDSAE, rows_FD: Tensor) -> None:
    sae.load_state_dict({**sae.state_dict(), "W_dec": rows_FD})


changes = pytest.mark.parametrize(
    "change", [_write_to_data, _replace_parameter, _load_state], ids=lambda change: change.__name__.strip("_")
)


@changes
def test_codes_follow_w_dec(change: Callable[[DBKSVDSAE, Tensor], None]) -> None:
    sae, x_BD = tiny_db_ksvd_sae(view="split"), samples(20)
    before_BF = sae.encode(x_BD)
    other_MD = unit_atoms(M, D_MODEL, 11, torch.float32)
    change(sae, torch.cat([other_MD, -other_MD]))
    signed = tiny_db_ksvd_sae()
    with torch.no_grad():
        signed.W_dec.copy_(other_MD)
    assert torch.equal(sae(x_BD), signed(x_BD))
    assert not torch.equal(sae.encode(x_BD), before_BF)


@changes
@pytest.mark.parametrize("half", [0, 1])
def test_one_half_alone_is_refused(change: Callable[[DBKSVDSAE, Tensor], None], half: int) -> None:
    sae, x_BD = tiny_db_ksvd_sae(view="split"), samples(20)
    acts_BF, rows_FD = sae.encode(x_BD), sae.W_dec.detach().clone()
    rows_FD[half * M : half * M + 3] = unit_atoms(3, D_MODEL, 11, torch.float32)
    change(sae, rows_FD)
    wrong = rf"(?s)split view: 3 of the last {M} rows of W_dec.*cure.*\[D; −D\]"
    with pytest.raises(DictionaryError, match=wrong):
        sae.encode(x_BD)
    with pytest.raises(DictionaryError, match=wrong):
        sae.decode(acts_BF)


def test_a_step_of_training_is_refused() -> None:
    """Decode goes through one half, so a gradient step would move that half alone."""
    sae = tiny_db_ksvd_sae(view="split")
    sae(samples(5)).square().sum().backward()
    torch.optim.SGD([sae.W_dec], lr=0.1).step()
    with pytest.raises(DictionaryError, match="not the opposites"):
        sae.encode(samples(5))


def test_casts_and_folds_keep_the_halves_opposite() -> None:
    sae, signed, x_BD = tiny_db_ksvd_sae(view="split"), tiny_db_ksvd_sae(), samples(20)
    for change in (
        lambda one: one.to(dtype=torch.bfloat16),
        lambda one: one.to(dtype=torch.float32),
        lambda one: one.fold_W_dec_norm(),
        lambda one: one.fold_activation_norm_scaling_factor(3.0),
    ):
        before_FD = sae.W_dec.detach().clone()
        for one in (sae, signed):
            change(one)
        assert sae.W_dec.dtype != before_FD.dtype or not torch.equal(sae.W_dec, before_FD)
        assert torch.equal(sae(x_BD.to(sae.W_dec.dtype)), signed(x_BD.to(signed.W_dec.dtype)))


# ---------------------------------------------------------------- on disk


@dictionaries
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    sae, x_BD = tiny_sae_of(DICTIONARIES[kind](), "split"), samples(30)
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, DBKSVDSAE)
    assert loaded.cfg == sae.cfg
    assert loaded.cfg.split
    assert torch.equal(loaded.encode(x_BD), sae.encode(x_BD))
    assert torch.equal(loaded(x_BD), sae(x_BD))
    loaded.save_model(tmp_path / "again")
    assert (tmp_path / "again" / "cfg.json").read_bytes() == (tmp_path / "cfg.json").read_bytes()


def test_saes_from_before_there_were_views_load(tmp_path: Path) -> None:
    sae, x_BD = tiny_db_ksvd_sae(), samples(30)
    sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config.pop("split") is False
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded.encode(x_BD), sae.encode(x_BD))


def test_fresh_sae() -> None:
    """Before any dictionary is copied in, as SAELens makes it to load a state dict into."""
    sae = DBKSVDSAE(DBKSVDSAEConfig(d_in=D_MODEL, d_sae=20, k=3, split=True))
    norms_F = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
    assert float((norms_F - 1).abs().max()) < UNIT_NORM[torch.float32]
    assert sae.W_enc.is_contiguous()
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert int((sae.encode(samples(5)) != 0).sum(dim=1).max()) == 3
