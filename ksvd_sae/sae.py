"""Dictionaries as SAELens SAEs: the border where W_dec, d_in and d_sae begin.

``W_dec`` is the atoms in raw space, ``b_dec`` the centre, and ``encode`` runs the dictionary's own coder, a pursuit or
a projection (``ksvd_sae.learning.coding``). Everything that takes a SAELens SAE takes
these: HookedSAETransformer, ActivationsStore, SAEBench.

SAEBench wants decoder rows of unit norm in raw space. A weighted dictionary has unit rows in weighted space; here each
row is W_dec_j = atom_j·W⁻¹ / n_j, n_j its norm, and codes are multiplied by n_j: the same reconstruction.

A signed code f has two views. 'signed' is f itself, a latent an atom. 'split' is [f₊, f₋], f₊ = max(f, 0) and
f₋ = max(−f, 0), over the decoder [D; −D]: two latents an atom, none negative, as many of them nonzero, and the same
reconstruction bit for bit. Evals that take a latent to be active only above 0 (SAEBench's core, autointerp and
absorption) read the split view right and the signed one by half.

Codes are computed in float32, under ``torch.autocast`` too, and given in the SAE's dtype, which ``half()`` and
``double()`` change as ``to`` does: a float64 SAE has no finer codes, and in float16 what is above 65,504 is infinite.

Gradients flow through ``encode`` to activations, W_dec, b_dec and weighting with the support held fixed: of the
coefficients, not of the choice of atoms (``ksvd_sae.learning.fixed_support``). They change no bit of the codes.

SAELens finds classes by name in a registry that this module's import fills; ``import ksvd_sae`` sees to
it. A process that has not imported it cannot know the name, so the name on disk says what to do.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor, nn
from typing_extensions import override

from ksvd_sae._registration import register_sae
from ksvd_sae.activations.language import has_heads
from ksvd_sae.arguments import dtype_name, flag, json_value, shown, whole
from ksvd_sae.arguments import path as as_path
from ksvd_sae.device import named_device, own_modes
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import DictionaryError, InputTypeError, ShapeError
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.gram import Gram
from ksvd_sae.learning.sources import same_device
from ksvd_sae.store import write_json

ARCHITECTURE = "db_ksvd"
# Input normalisations that can be folded into an SAE's weights, and how; others scale each activation by itself.
_FOLDED_BY = {
    "expected_average_only_in": "sae.fold_activation_norm_scaling_factor(factor), with the factor of its training",
    "covariance_whitening": "sae.fold_activation_whitening(...), with the map of its training",
}
# A latent so large that neither the centre nor rounding in bfloat16 counts beside what it adds.
_LARGE = 4096.0
# Without `import ksvd_sae` SAELens answers with KeyError('<this>').
ARCHITECTURE_ON_DISK = "db_ksvd (run `import ksvd_sae` first, from the package ksvd-sae)"


@dataclass
class DBKSVDSAEConfig(SAEConfig):
    """What SAELens stores beside the weights.

    k, coder, rtol, max_steps, nonnegative, groups, tau, tau_absolute, exact_budgets: the fields of ``coding``. One by
        one, because of a cfg.json SAELens hands on the keys that are fields of this class, and drops all others before
        any code of ours runs.
    weighting: 'none', or the shape of the map that is applied before coding: 'diagonal' or 'full'.
    split: whether latents are [f₊, f₋]; d_sae is then twice the number of atoms, while k and groups count atoms.
    """

    k: int = 20
    coder: AnyCoder = "mp"
    rtol: float = 0.0
    max_steps: int | None = None
    nonnegative: bool = False
    groups: list[int] | None = None
    tau: float = 0.0
    tau_absolute: float = 0.0
    exact_budgets: bool = False
    weighting: Literal["none", "diagonal", "full"] = "none"
    split: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "DBKSVDSAEConfig"
        taken: dict[str, Any] = {name: whole(getattr(self, name), name, where) for name in ("d_in", "d_sae")}
        # As they go to JSON; whether a device is there is not for a config to say.
        taken |= {"dtype": dtype_name(vars(self)["dtype"], where), "device": str(vars(self)["device"])}
        taken |= {"split": flag(self.split, "split", where), **Coding.from_json(vars(self)).as_json()}
        for name, value in taken.items():
            setattr(self, name, value)
        if self.weighting not in ("none", "diagonal", "full"):
            raise ShapeError("DBKSVDSAEConfig: unknown weighting", got=self.weighting, limit="none, diagonal, full")
        if self.split and self.nonnegative:
            raise DictionaryError(
                "DBKSVDSAEConfig: a non-negative code has no split view",
                cause="it is non-negative as it comes: its negative half would always be zero",
                cure="take the view 'signed', which is the code as it comes",
            )
        if self.split and self.d_sae % 2:
            raise ShapeError(
                "DBKSVDSAEConfig: the split view has two latents an atom", got=f"d_sae = {self.d_sae}", limit="even"
            )
        self.coding.check(self.n_atoms, self.d_in, "DBKSVDSAEConfig")
        self.check_input("DBKSVDSAEConfig")

    def check_input(self, where: str) -> None:
        """Raise DictionaryError unless activations are centred and not whitened: SAELens leaves both to the config."""
        if not self.apply_b_dec_to_input:
            raise DictionaryError(
                f"{where}: apply_b_dec_to_input = False would give other codes than the dictionary's",
                cause="atoms code the difference from the centre b_dec, which is subtracted from activations first",
                cure="apply_b_dec_to_input = True",
            )
        if self.normalize_activations == "covariance_whitening":
            raise DictionaryError(f"{where}: {_WHITENED}", cure=_WEIGHTED)

    @property
    def n_atoms(self) -> int:
        return self.d_sae // 2 if self.split else self.d_sae

    @property
    def coding(self) -> Coding:
        """How centred and weighted activations are coded."""
        return Coding.from_json(vars(self))


_WHITENED = "covariance whitening does not go with a pursuit"
_WEIGHTED = "a dictionary learned with a weighting, which is such a map and part of the SAE"


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What codes are found with, and copies of the weights that it was made from. Copies of the SAE share it."""

    made_from: tuple[Tensor, ...]
    atoms_MD: Tensor
    norms_M: Tensor
    gram_MM: Gram | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Prepared":
        return self


class DBKSVDSAE(SAE[DBKSVDSAEConfig]):
    """A dictionary that codes by pursuit. Codes are signed, or cut into their positive and negative part (cfg.split).

    Parameters: W_dec (d_sae, d_in) unit rows, of which in the split view the second half is minus the first; b_dec
    (d_in,); W_enc = W_decᵀ, b_enc = 0: kept because SAEBench and SAELens read them, not used by ``encode``; weighting
    (d_in,) or (d_in, d_in) if the config says so: the map that centred activations go through before they are coded.
    Raises: DictionaryError by ``encode`` and ``decode`` if the halves of a split W_dec are no longer opposites;
    ShapeError for activations and latents of another shape; ActivationError for NaN and infinity, whatever the coder.
    """

    dtype: torch.dtype
    device: torch.device
    b_enc: nn.Parameter
    weighting: nn.Parameter

    def __init__(self, cfg: DBKSVDSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._prepared: _Prepared | None = None

    @override
    def get_activation_fn(self) -> TopK:
        """Not used here: by it SAEDashboard knows that a latent cannot be had without the others."""
        return TopK(self.cfg.k)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        with torch.no_grad():
            rows_MD = torch.nn.functional.normalize(self.W_dec.data[: self.cfg.n_atoms], dim=1)
            self.W_dec.data = self._both_signs(rows_MD)
            self.W_enc.data = self.W_dec.data.T.contiguous()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))
        if self.cfg.weighting != "none":
            ones_D = torch.ones(self.cfg.d_in, dtype=self.dtype, device=self.device)
            self.weighting = nn.Parameter(ones_D if self.cfg.weighting == "diagonal" else torch.diag(ones_D))

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DBKSVDSAE":
        """What all casts and moves go through; SAELens keeps dtype and device right in ``to`` alone."""
        super()._apply(fn, recurse)
        # It lies where the weights did.
        self._prepared = None
        self.dtype, self.cfg.dtype = self.W_dec.dtype, str(self.W_dec.dtype).removeprefix("torch.")
        if not same_device(self.device, self.W_dec.device):
            self.device, self.cfg.device = self.W_dec.device, str(self.W_dec.device)
        return self

    def _both_signs(self, rows_MD: Tensor) -> Tensor:
        """The decoder of these atoms: [D; −D] in the split view."""
        return torch.cat([rows_MD, -rows_MD]) if self.cfg.split else rows_MD

    @property
    def atoms_MD(self) -> Tensor:
        """The rows of W_dec that are coded with: all of them, or the first half in the split view.

        Raises: DictionaryError if the second half is not minus the first, bit for bit. Casting, and scaling rows or the
            whole, keeps it so.
        """
        if not self.cfg.split:
            return self.W_dec
        rows_MD, opposite_MD = self.W_dec[: self.cfg.n_atoms], self.W_dec.detach()[self.cfg.n_atoms :]
        if not torch.equal(opposite_MD, -rows_MD.detach()):
            n_wrong = int((opposite_MD != -rows_MD.detach()).any(dim=1).sum())
            raise DictionaryError(
                f"DBKSVDSAE in the split view: {n_wrong} of the last {self.cfg.n_atoms} rows of W_dec are not the "
                "opposites of the first",
                cause="W_dec was changed in one half only, or one half was trained",
                cure="write both halves: W_dec = [D; −D]; to train atoms, train the signed view and split it then",
            )
        return rows_MD

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """Activations as ``encode`` works on them: in the SAE's dtype, heads flattened, and centred."""
        self.cfg.check_input("DBKSVDSAE")
        what = "DBKSVDSAE: activations do not fit the SAE"
        _check_tensor(sae_in, what)
        d_in, shape = self.cfg.d_in, tuple(sae_in.shape)
        heads = len(shape) > 1 and math.prod(shape[-2:]) == d_in
        if shape[-1:] != (d_in,) and not (heads and self.hook_z_reshaping_mode):
            limit = f"(..., {d_in})"
            if self.hook_z_reshaping_mode:
                limit += f" or (..., heads, d_head) with heads·d_head = {d_in}"
            cause, cure = "activations of another model or hook", None
            if heads:
                cause, cure = "heads that are not flattened", "x.flatten(-2)"
            raise ShapeError(what, got=str(shape), limit=limit, cause=cause, cure=cure)
        return super().process_sae_in(sae_in)

    @override
    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Heads are flattened, and come back in reconstructions; rows that come flat stay so.

        SAELens' own refuses other hooks than hook_z, and flat rows; yet its evals and SAEBench's core flatten heads
        before an SAE sees them, and HookedSAETransformer does not.
        """
        self.hook_z_reshaping_mode = True
        self.reshape_fn_in, self.reshape_fn_out = self._without_heads, self._with_heads

    def _without_heads(self, x: Tensor) -> Tensor:
        self.d_head = x.shape[-1]
        return x if self.d_head == self.cfg.d_in else x.flatten(-2)

    def _with_heads(self, x: Tensor, d_head: int) -> Tensor:
        return x if d_head == self.cfg.d_in else x.reshape(*x.shape[:-1], -1, d_head)

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @own_modes()
    def encode(self, x: Tensor) -> Tensor:
        """(..., d_in) to a dense code (..., d_sae), at most k nonzero. Gradients: with the support held fixed.

        ``torch.compile`` leaves it as it is: the pursuits are compiled by themselves.
        """
        sae_in = self.process_sae_in(x)
        flat_BD, ready = self._weighted(sae_in.reshape(-1, self.cfg.d_in).float()), self._ready()
        code = self.cfg.coding.encode(flat_BD.detach(), ready.atoms_MD, ready.gram_MM)
        atoms_MD, norms_M = ready.atoms_MD, ready.norms_M
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self._coded_with()):
            atoms_MD, norms_M = self._unit_atoms()
        if flat_BD.requires_grad or atoms_MD.requires_grad:
            code = self.cfg.coding.with_gradient(code, flat_BD, atoms_MD)
        dense_BM = (code.to_dense(self.cfg.n_atoms) / norms_M).to(sae_in.dtype)
        latents_BF = torch.cat([dense_BM.relu(), (-dense_BM).relu()], dim=1) if self.cfg.split else dense_BM
        acts = latents_BF.reshape(*sae_in.shape[:-1], self.cfg.d_sae)
        return self.hook_sae_acts_post(self.hook_sae_acts_pre(acts))

    @override
    @own_modes()
    def decode(self, feature_acts: Tensor) -> Tensor:
        """(..., d_sae) to (..., d_in), in the SAE's dtype.

        The split view multiplies f₊ − f₋ by the atoms: half the work, and no bit differs from the signed view's.
        """
        what = "DBKSVDSAE: latents do not fit the SAE"
        _check_tensor(feature_acts, what)
        if feature_acts.shape[-1:] != (self.cfg.d_sae,):
            of_signed = self.cfg.split and feature_acts.shape[-1:] == (self.cfg.n_atoms,)
            raise ShapeError(
                what,
                got=str(tuple(feature_acts.shape)),
                limit=f"(..., {self.cfg.d_sae})",
                cause="a code with signs, where this SAE splits them" if of_signed else "latents of another SAE",
                cure="torch.cat([f.relu(), (-f).relu()], dim=-1)" if of_signed else None,
            )
        if self.hook_z_reshaping_mode and getattr(self, "d_head", None) is None:
            raise ShapeError(
                "DBKSVDSAE.decode: how wide a head is comes with the activations that are encoded, and none were yet",
                cure="encode first, or turn_off_forward_pass_hook_z_reshaping() for heads that stay flat",
            )
        atoms_MD = self.atoms_MD
        feature_acts = feature_acts.to(atoms_MD.dtype)
        if self.cfg.split:
            feature_acts = feature_acts[..., : self.cfg.n_atoms] - feature_acts[..., self.cfg.n_atoms :]
        sae_out = self.hook_sae_recons(feature_acts @ atoms_MD + self.b_dec)
        sae_out = self.run_time_activation_norm_fn_out(sae_out)
        return self.reshape_fn_out(sae_out, self.d_head)

    def _weighted(self, rows_BD: Tensor) -> Tensor:
        """Centred raw rows to the space that codes are found in."""
        if self.cfg.weighting == "none":
            return rows_BD
        matrix = self.weighting.float()
        return rows_BD * matrix if matrix.ndim == 1 else rows_BD @ matrix

    def _coded_with(self) -> tuple[Tensor, ...]:
        return (self.W_dec,) if self.cfg.weighting == "none" else (self.W_dec, self.weighting)

    def _unit_atoms(self) -> tuple[Tensor, Tensor]:
        """Weighted atoms in float32 scaled to unit norm, and the norms.

        Without weighting the norms are 1 to rounding in float32, off by up to 1/256 in bfloat16.
        """
        weighted_MD = self._weighted(self.atoms_MD.float())
        norms_M = torch.linalg.vector_norm(weighted_MD, dim=1)
        return weighted_MD / norms_M[:, None], norms_M

    def _ready(self) -> _Prepared:
        """Unit atoms, norms and Gram matrix; made again when the weights change.

        The weights are compared with copies: SAELens writes through ``.data``, which no version counter sees.
        """
        weights, ready = tuple(parameter.detach() for parameter in self._coded_with()), self._prepared
        if ready is None or not all(map(_same, ready.made_from, weights)):
            with torch.no_grad():
                atoms_MD, norms_M = self._unit_atoms()
            copies = tuple(weight.clone() for weight in weights)
            self._prepared = ready = _Prepared(copies, atoms_MD, norms_M, self.cfg.coding.gram(atoms_MD))
        return ready

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        # In the units of the activations, which the factor changes.
        self.cfg.tau_absolute /= scaling_factor

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        raise DictionaryError(
            f"DBKSVDSAE.fold_activation_whitening: {_WHITENED}",
            cause="atoms are picked by their angles to the activations, and no W_dec makes up for other angles",
            cure=_WEIGHTED,
        )

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        # Before anything is written; metadata may have been added to at any time.
        for name, value in list(self.cfg.metadata.items()):
            self.cfg.metadata[name] = json_value(value, f"metadata.{name}", "DBKSVDSAE.save_model")
        weights_path, cfg_path = super().save_model(as_path(path, "path", "DBKSVDSAE.save_model"))
        config = json.loads(cfg_path.read_text())
        config["architecture"] = ARCHITECTURE_ON_DISK
        write_json(cfg_path, config)
        return weights_path, cfg_path


def sae_from_dictionary(
    dictionary: Dictionary,
    *,
    model_name: str,
    hook_name: str,
    context_size: int | None = 128,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    view: Literal["signed", "split"] = "signed",
    prepend_bos: bool | None = True,
    **metadata: Any,
) -> DBKSVDSAE:
    """Wrap a dictionary for SAELens and SAEBench.

    Args:
        model_name: TransformerLens name of the model the activations came from.
        hook_name: the hook they were read at.
        context_size: tokens a context, for SAELens' ActivationsStore; None: of images, which have none.
        view: 'signed', the code as it comes, or 'split', its positive and negative parts as two latents an atom.
        prepend_bos: whether contexts began with a BOS, for SAELens' ActivationsStore; None: of images.
        metadata: anything else to keep in ``cfg.metadata`` (JSON values; numpy's numbers and arrays become Python's).
    Raises: ShapeError (no such view, metadata that JSON has no form for, as NaN), DictionaryError (the split view of a
        non-negative dictionary), ConfigError (no such device or dtype).
    """
    where = "sae_from_dictionary"
    if not isinstance(dictionary, Dictionary):
        cure = "Dictionary.from_estimator(...) of a fitted estimator"
        raise InputTypeError(f"{where}: no Dictionary", got=type(dictionary).__name__, cure=cure)
    for name, value in (("model_name", model_name), ("hook_name", hook_name)):
        if not isinstance(value, str):
            raise InputTypeError(f"{where}: {name} must be text", got=shown(value))
    metadata = {name: json_value(value, name, where) for name, value in metadata.items()}
    if view not in ("signed", "split"):
        raise ShapeError("sae_from_dictionary: unknown view", got=repr(view), limit="'signed' or 'split'")
    contexts: dict[str, Any] = {}
    if context_size is not None:
        contexts["context_size"] = whole(context_size, "context_size", where)
    if prepend_bos is not None:
        contexts["prepend_bos"] = flag(prepend_bos, "prepend_bos", where)
    weighting, split = dictionary.weighting, view == "split"
    cfg = DBKSVDSAEConfig(
        d_in=dictionary.d_in,
        d_sae=2 * dictionary.n_atoms if split else dictionary.n_atoms,
        dtype=dtype_name(dtype, where),
        device=str(named_device(device)),
        reshape_activations="hook_z" if has_heads(hook_name) else "none",
        **dictionary.coding.as_json(),
        weighting="none" if weighting is None else "diagonal" if weighting.is_diagonal else "full",
        split=split,
        metadata=SAEMetadata(model_name=model_name, hook_name=hook_name, **contexts, **metadata),
    )
    sae = DBKSVDSAE(cfg)
    with torch.no_grad():
        if weighting is not None:
            sae.weighting.copy_(weighting.matrix)
        sae.W_dec.copy_(sae._both_signs(dictionary.unit_raw_atoms()))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(dictionary.centre_D)
    return sae


@torch.no_grad()
def decoder(sae: SAE[Any], what: str) -> tuple[Tensor, Tensor]:
    """An SAE's decoder as a dictionary: it rebuilds its centre plus a multiple of W_dec's row for each latent.

    Args: what: is done, for the message.
    Returns: W_dec (d_sae, d_in), rows of any norm, and the centre (d_in,), float32; heads are flat.
    Raises: DictionaryError for what rebuilds in another way (transcoders, temporal SAEs, normalised activations,
        decoders of other packages that are not linear), or from weights that are not finite.
    """
    _check_rebuilds_its_input(sae, what)
    # A copy that shares the weights: the caller's goes on reshaping.
    flat = copy.copy(sae)
    flat.turn_off_forward_pass_hook_z_reshaping()
    rows_MD = sae.W_dec.detach()
    probed = torch.linalg.vector_norm(rows_MD.float(), dim=1).topk(min(4, len(rows_MD))).indices
    latents_BM = rows_MD.new_zeros(1 + len(probed), len(rows_MD))
    latents_BM[torch.arange(len(probed)) + 1, probed] = _LARGE
    rebuilt_BD = flat.decode(latents_BM).float()
    added_BD, unit_BD = rebuilt_BD[1:] - rebuilt_BD[0], nn.functional.normalize(rows_MD[probed].float(), dim=1)
    aside_BD = added_BD - (added_BD * unit_BD).sum(dim=1, keepdim=True) * unit_BD
    if not bool(torch.isfinite(rebuilt_BD).all()):
        raise DictionaryError(f"{what}: its decoder holds NaN or infinity", cause="a training that diverged")
    if bool((aside_BD.norm(dim=1) > 0.01 * added_BD.norm(dim=1)).any()):
        raise DictionaryError(
            f"{what}: what a latent adds is no multiple of its row of W_dec",
            got=f"architecture {sae.cfg.architecture()}",
            cause="a decoder that is not linear, or has other weights",
        )
    return rows_MD, rebuilt_BD[0]


def _check_rebuilds_its_input(sae: SAE[Any], what: str) -> None:
    how, cure = sae.cfg.normalize_activations, None
    got = f"architecture {sae.cfg.architecture()}"
    if isinstance(sae, Transcoder):
        cause = "a transcoder rebuilds other activations than it reads"
    elif isinstance(sae, TemporalSAE):
        cause = "a temporal SAE rebuilds an activation from those before it too"
    elif how != "none":
        got, cure = f"normalize_activations: {how}", _FOLDED_BY.get(how, "an SAE that was trained without")
        cause = "its decoder is of activations that are normalised first"
    else:
        return
    raise DictionaryError(f"{what}: its decoder is no dictionary of what it reads", got=got, cause=cause, cure=cure)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def _check_tensor(value: Any, what: str) -> None:
    if not isinstance(value, Tensor):
        raise InputTypeError(what, got=shown(value), limit="a tensor", cure="torch.as_tensor(x)")
    if value.is_complex() or value.layout != torch.strided or value.is_nested:
        raise InputTypeError(what, got=f"{value.dtype}, {value.layout}", limit="a dense tensor of real numbers")


register_sae(DBKSVDSAE, DBKSVDSAEConfig, ARCHITECTURE, ARCHITECTURE_ON_DISK)
