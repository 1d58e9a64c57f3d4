"""Gradients through the SAE, and that they change no code; what autocast, torch.compile and hooks see of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sae_lens import HookedSAETransformer
from torch import Tensor

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ActivationError, DictionaryError
from ksvd_sae.learning import reference
from ksvd_sae.learning.coding import ANY_CODERS, AnyCoder, Coding
from ksvd_sae.sae import DBKSVDSAE, DBKSVDSAEConfig
from tests.strategies import generator
from tests.test_sae import WEIGHTINGS, samples
from tests.tiny_saes import D_MODEL, HOOK, WORDS, tiny_dictionary, tiny_model, tiny_sae_of
from tests.tolerances import GRADIENT_FLOAT32, LATENT_SLOPE, SPLICED_LOSS

Array = NDArray[np.float64]
View = Literal["signed", "split"]
M = 24
every_coder = pytest.mark.parametrize("coder", ANY_CODERS)
views = pytest.mark.parametrize("view", ["signed", "split"])
weightings = pytest.mark.parametrize("weighting", [None, *WEIGHTINGS])


def sae_of(
    coder: AnyCoder = "mp", weighting: str | None = None, view: View = "signed", nonnegative: bool = False
) -> DBKSVDSAE:
    groups = (8, M - 8) if coder == "matryoshka" else None
    dictionary = tiny_dictionary(coder, groups=groups, nonnegative=nonnegative)
    return tiny_sae_of(replace(dictionary, weighting=None if weighting is None else WEIGHTINGS[weighting]), view)


# ---------------------------------------------------------------- right

ORACLES: dict[str, Callable[[Array, Array, int], Array]] = {
    "mp": reference.matching_pursuit,
    "mp+": lambda y_D, atoms_MD, k: reference.matching_pursuit(y_D, atoms_MD, k, nonnegative=True),
    "omp": reference.orthogonal_matching_pursuit,
    "omp+": reference.nonnegative_orthogonal_matching_pursuit,
    "ormp": reference.order_recursive_matching_pursuit,
}


def codes(oracle: str, x_BD: Array, rows_MD: Array, centre_D: Array, map_DD: Array, view: View) -> Array:
    """What the SAE says it codes, in float64 and by the reference."""
    weighted_MD = rows_MD @ map_DD
    norms_M = np.linalg.norm(weighted_MD, axis=1)
    atoms_MD = weighted_MD / norms_M[:, None]
    f_BM = np.stack([ORACLES[oracle](y_D, atoms_MD, 4) for y_D in (x_BD - centre_D) @ map_DD]) / norms_M
    return f_BM if view == "signed" else np.concatenate([np.maximum(f_BM, 0), np.maximum(-f_BM, 0)], axis=1)


@weightings
@pytest.mark.parametrize(
    ("oracle", "view"),
    [*((oracle, "signed") for oracle in ORACLES), ("mp", "split"), ("omp", "split")],
)
def test_against_finite_differences_of_the_reference(oracle: str, view: View, weighting: str | None) -> None:
    sae = sae_of(oracle.rstrip("+"), weighting, view, nonnegative=oracle.endswith("+"))  # type: ignore[arg-type]
    x_BD = samples(6).requires_grad_()
    acts_BF = sae.encode(x_BD)
    v_BF = torch.randn(acts_BF.shape, generator=generator(1))
    (acts_BF * v_BF).sum().backward()  # type: ignore[no-untyped-call]

    map_DD = np.eye(D_MODEL)
    if weighting is not None:
        matrix = sae.weighting.detach().double().numpy()
        map_DD = np.diag(matrix) if matrix.ndim == 1 else matrix
    here = [x_BD.detach(), sae.W_dec.detach()[:M], sae.b_dec.detach()]
    here = [each.double().numpy() for each in here]
    at_BF = codes(oracle, *here, map_DD, view)  # type: ignore[arg-type]
    assert np.array_equal(at_BF != 0, acts_BF.detach().numpy() != 0)
    assert x_BD.grad is not None
    assert sae.W_dec.grad is not None
    assert sae.b_dec.grad is not None
    got = (x_BD.grad, sae.W_dec.grad[:M], sae.b_dec.grad)
    for place in range(3):
        moved_by = np.random.default_rng(place).standard_normal(here[place].shape)
        ends = []
        for step in (1e-6, -1e-6):
            there = [each + step * moved_by if index == place else each for index, each in enumerate(here)]
            f_BF = codes(oracle, *there, map_DD, view)  # type: ignore[arg-type]
            assert np.array_equal(f_BF != 0, at_BF != 0), "the same choice"
            ends.append(float((f_BF * v_BF.double().numpy()).sum()))
        slope = float((got[place].double().numpy() * moved_by).sum())
        size = float(got[place].norm()) * np.linalg.norm(moved_by)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=GRADIENT_FLOAT32 * size)


def test_to_the_weighting() -> None:
    sae, x_BD = sae_of("omp", "diagonal"), samples(6)
    sae.encode(x_BD).sum().backward()  # type: ignore[no-untyped-call]
    assert sae.weighting.grad is not None
    here, by = sae.weighting.detach().double().numpy(), np.random.default_rng(0).standard_normal(D_MODEL)
    fixed = [each.detach().double().numpy() for each in (x_BD, sae.W_dec, sae.b_dec)]
    ends = [codes("omp", *fixed, np.diag(here + step * by), "signed").sum() for step in (1e-6, -1e-6)]  # type: ignore[arg-type]
    slope = float((sae.weighting.grad.double().numpy() * by).sum())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3)


def test_a_step_down_the_gradient_of_the_error() -> None:
    sae, x_BD = sae_of("omp"), samples(200)
    optimizer = torch.optim.SGD([sae.W_dec, sae.b_dec], lr=0.02)
    errors = []
    for _ in range(20):
        optimizer.zero_grad()
        error = (sae(x_BD) - x_BD).square().mean()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.9 * errors[0]


# ---------------------------------------------------------------- the same codes


@every_coder
@weightings
@views
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_bit_depends_on_gradients(coder: AnyCoder, weighting: str | None, view: View, dtype: torch.dtype) -> None:
    if coder == "projection" and weighting is not None:
        return
    sae, x = sae_of(coder, weighting, view).to(dtype=dtype), samples(3, 20).to(dtype)
    with torch.no_grad():
        plain = sae.encode(x)
    assert not plain.requires_grad
    tracked = sae.encode(x.clone().requires_grad_())
    assert tracked.requires_grad
    assert torch.equal(tracked, plain)
    for learned in (sae.W_dec, sae.b_dec):
        sae.requires_grad_(False)
        learned.requires_grad_(True)
        tracked = sae.encode(x)
        assert torch.equal(tracked, plain)
        tracked.sum().backward()  # type: ignore[no-untyped-call]
        assert learned.grad is not None
        assert learned.grad.dtype == dtype


@every_coder
def test_nothing_is_done_for_gradients_that_nobody_asks_for(coder: AnyCoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked(*args: object) -> None:
        raise AssertionError("nobody asked")

    sae, x = sae_of(coder), samples(20)
    monkeypatch.setattr(Coding, "with_gradient", unasked)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not sae.encode(x.clone().requires_grad_()).requires_grad
    assert not sae.requires_grad_(False).encode(x).requires_grad
    with pytest.raises(AssertionError, match="nobody asked"):
        sae.encode(x.clone().requires_grad_())


@pytest.mark.parametrize("name", ["encode", "decode", "forward"])
@every_coder
def test_autocast_changes_no_bit(coder: AnyCoder, name: str) -> None:
    sae, x = sae_of(coder), samples(20)
    given = sae.encode(x).detach() if name == "decode" else x
    wanted = getattr(sae, name)(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = getattr(sae, name)(given)
        # What a model in autocast hands on.
        low = getattr(sae, name)(given.bfloat16())
    assert got.dtype == low.dtype == torch.float32
    assert torch.equal(got, wanted)


# torch.compile hides this one by itself, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("coder", "backend"), [("mp", "eager"), ("omp", "aot_eager")])
def test_compiled(coder: AnyCoder, backend: str) -> None:
    torch.compiler.reset()
    sae, x = sae_of(coder, "full"), samples(20)
    wanted, wanted_acts = sae(x), sae.encode(x)
    wanted.sum().backward()  # type: ignore[no-untyped-call]
    assert sae.W_dec.grad is not None
    gradient, sae.W_dec.grad = sae.W_dec.grad, None
    assert torch.equal(torch.compile(sae.encode, backend=backend)(x), wanted_acts)
    rebuilt = torch.compile(sae, backend=backend)(x)
    assert torch.equal(rebuilt, wanted)
    rebuilt.sum().backward()
    assert torch.equal(sae.W_dec.grad, gradient)


# ---------------------------------------------------------------- hooks

HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output")


@pytest.fixture
def seen() -> dict[str, list[Tensor]]:
    return {}


def keeper(seen: dict[str, list[Tensor]]) -> Callable[..., None]:
    def keep(values: Tensor, hook: Any) -> None:
        seen.setdefault(hook.name, []).append(values.detach().clone())

    return keep


@views
@every_coder
def test_every_hook_sees_values_and_gradients(coder: AnyCoder, view: View, seen: dict[str, list[Tensor]]) -> None:
    sae, x = sae_of(coder, view=view), samples(2, 5).requires_grad_()
    back: dict[str, list[Tensor]] = {}
    forwards, backwards = [(name, keeper(seen)) for name in HOOKS], [(name, keeper(back)) for name in HOOKS]
    with sae.hooks(fwd_hooks=forwards, bwd_hooks=backwards):
        sae(x).square().sum().backward()
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(HOOKS, 1)
    assert {name: len(values) for name, values in back.items()} == dict.fromkeys(HOOKS, 1)
    (acts,), (to_acts,), (to_output,) = seen["hook_sae_acts_post"], back["hook_sae_acts_post"], back["hook_sae_output"]
    assert torch.equal(acts, sae.encode(x))
    assert torch.allclose(to_acts, to_output @ sae.W_dec.T, rtol=1e-4, atol=1e-4), "every latent has one, active or not"
    assert x.grad is not None
    assert torch.equal(x.grad, back["hook_sae_input"][0])
    assert float(x.grad.abs().max()) > 0


@pytest.mark.filterwarnings("ignore:Setting use_error_term directly:DeprecationWarning")
def test_with_the_error_term(seen: dict[str, list[Tensor]]) -> None:
    """The error is a constant to SAELens: gradients are those of the reconstruction."""
    sae, x = sae_of("omp"), samples(2, 5).requires_grad_()
    sae(x).square().sum().backward()
    sae.use_error_term = True
    back: dict[str, list[Tensor]] = {}
    y = samples(2, 5).requires_grad_()
    with sae.hooks(
        fwd_hooks=[("hook_sae_error", keeper(seen))], bwd_hooks=[(name, keeper(back)) for name in HOOKS[1:3]]
    ):
        output = sae(y)
        output.backward(2 * sae.decode(sae.encode(y)).detach())
    assert torch.allclose(output, y, atol=SPLICED_LOSS)
    assert torch.allclose(seen["hook_sae_error"][0], y - sae.decode(sae.encode(y)))
    assert set(back) == set(HOOKS[1:3])
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(y.grad, x.grad, rtol=1e-4, atol=1e-4)


@views
@pytest.mark.parametrize("use_error_term", [False, True])
def test_through_a_model(view: View, use_error_term: bool, seen: dict[str, list[Tensor]]) -> None:
    """Everything below the SAE gets a gradient, and a latent's is what the loss does when the latent is moved."""
    model = tiny_model(HookedSAETransformer).requires_grad_(True)
    tokens_BL = model.to_tokens([" ".join(WORDS[:8]), " ".join(WORDS[8:16])])
    latents = f"{HOOK}.hook_sae_acts_post"
    back: dict[str, list[Tensor]] = {}
    with model.saes([sae_of("mp", view=view)], use_error_term=use_error_term):
        with model.hooks(fwd_hooks=[(latents, keeper(seen))], bwd_hooks=[(latents, keeper(back))]):
            model(tokens_BL, return_type="loss").backward()
        assert model.W_E.grad is not None
        assert float(model.W_E.grad.abs().max()) > 0
        direction, step = torch.randn(seen[latents][0].shape, generator=generator(3)), 0.02
        losses = []
        for sign in (1, -1):
            moved = seen[latents][0] + sign * step * direction
            hook = (latents, lambda acts, hook, moved=moved: moved)
            losses.append(float(model.run_with_hooks(tokens_BL, return_type="loss", fwd_hooks=[hook]).detach()))
    slope = float((back[latents][0] * direction).sum())
    within = LATENT_SLOPE * float(back[latents][0].norm())
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=within)


# ---------------------------------------------------------------- what would give other codes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_coder
@views
def test_what_is_not_finite_is_an_error(coder: AnyCoder, view: View, value: float) -> None:
    sae, x = sae_of(coder, view=view), samples(4)
    x[2, 3] = value
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(ActivationError, match=r"(?s)1 of 4 samples hold NaN or infinity.*row 2"):
            sae.encode(x.clone().requires_grad_())


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp", "ormp"])
def test_what_is_not_finite_is_an_error_of_every_backend(coder: Any, backend: Any) -> None:
    from ksvd_sae.learning.sparse_coding import encode

    x = samples(4)
    x[2, 3] = float("nan")
    with pytest.raises(ActivationError, match="row 2"):
        encode(x, tiny_dictionary().atoms_MD, 4, coder=coder, backend=backend)


def test_activations_that_are_not_centred() -> None:
    with pytest.raises(DictionaryError, match=r"(?s)DBKSVDSAEConfig: apply_b_dec_to_input = False.*centre b_dec"):
        DBKSVDSAEConfig(d_in=4, d_sae=8, k=2, apply_b_dec_to_input=False)
    sae = sae_of()
    sae.cfg.apply_b_dec_to_input = False
    with pytest.raises(DictionaryError, match=r"(?s)apply_b_dec_to_input = False.*cure"):
        sae.encode(samples(3))


def test_whitening() -> None:
    sae, before = sae_of(), sae_of().state_dict()
    eye_DD = torch.eye(D_MODEL)
    with pytest.raises(DictionaryError, match=r"(?s)fold_activation_whitening.*angles.*cure: .*weighting"):
        sae.fold_activation_whitening(torch.zeros(D_MODEL), 2 * eye_DD, eye_DD / 2)
    assert all(torch.equal(weight, before[name]) for name, weight in sae.state_dict().items()), "nothing is folded"
    with pytest.raises(DictionaryError, match=r"(?s)covariance whitening.*weighting"):
        DBKSVDSAEConfig(d_in=4, d_sae=8, k=2, normalize_activations="covariance_whitening")


def test_the_floor_is_scaled_with_the_activations() -> None:
    dictionary = Dictionary(tiny_dictionary().atoms_MD, torch.zeros(D_MODEL), Coding(4, tau_absolute=2.0))
    sae, x = tiny_sae_of(dictionary), samples(50)
    wanted = sae.encode(x)
    assert 0 < int((wanted != 0).sum()) < 4 * 50, "the floor stops some"
    sae.fold_activation_norm_scaling_factor(8.0)
    assert sae.cfg.tau_absolute == 0.25
    assert torch.equal(sae.encode(x / 8), wanted)
