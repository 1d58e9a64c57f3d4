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

SAELens finds classes by name in a registry that this module's import fills; ``import ksvd_sae`` sees to
it. A process that has not imported it cannot know the name, so the name on disk says what to do.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from torch import Tensor, nn
from typing_extensions import override

from ksvd_sae.arguments import dtype_name, flag, json_value, shown, whole
from ksvd_sae.arguments import path as as_path
from ksvd_sae.device import named_device, without_autocast
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import DictionaryError, InputTypeError, ShapeError
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.sources import same_device
from ksvd_sae.store import write_json

ARCHITECTURE = "db_ksvd"
# Without `import ksvd_sae` SAELens answers with KeyError('<this>').
ARCHITECTURE_ON_DISK = "db_ksvd (run `import ksvd_sae` first, from the package ksvd-sae)"


@dataclass
class DBKSVDSAEConfig(SAEConfig):
    """What SAELens stores beside the weights.

    k, coder, rtol, max_steps, nonnegative, groups, tau, tau_absolute: the fields of ``coding``. One by one, because of
        a cfg.json SAELens hands on the keys that are fields of this class, and drops all others before any code of ours
        runs.
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

    @property
    def n_atoms(self) -> int:
        return self.d_sae // 2 if self.split else self.d_sae

    @property
    def coding(self) -> Coding:
        """How centred and weighted activations are coded."""
        return Coding.from_json(vars(self))


class DBKSVDSAE(SAE[DBKSVDSAEConfig]):
    """A dictionary that codes by pursuit. Codes are signed, or cut into their positive and negative part (cfg.split).

    Parameters: W_dec (d_sae, d_in) unit rows, of which in the split view the second half is minus the first; b_dec
    (d_in,); W_enc = W_decᵀ, b_enc = 0: kept because SAEBench and SAELens read them, not used by ``encode``; weighting
    (d_in,) or (d_in, d_in) if the config says so: the map that centred activations go through before they are coded.
    Raises: DictionaryError by ``encode`` and ``decode`` if the halves of a split W_dec are no longer opposites;
    ShapeError for activations and latents of another shape; ActivationError for NaN and infinity.
    """

    dtype: torch.dtype
    device: torch.device
    b_enc: nn.Parameter
    weighting: nn.Parameter

    def __init__(self, cfg: DBKSVDSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._prepared_of: Tensor | None = None
        self._prepared: tuple[Tensor, Tensor, Tensor] | None = None

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
        """Activations as ``encode`` works on them: in the SAE's dtype, heads flattened at hook_z, and centred."""
        what = "DBKSVDSAE: activations do not fit the SAE"
        _check_tensor(sae_in, what)
        d_in, shape = self.cfg.d_in, tuple(sae_in.shape)
        with_heads = self.hook_z_reshaping_mode
        width = shape[-2:] if with_heads else shape[-1:]
        if len(width) < 1 + with_heads or math.prod(width) != d_in:
            limit = f"(..., heads, d_head) with heads·d_head = {d_in}" if with_heads else f"(..., {d_in})"
            cause, cure = "activations of another model or hook", None
            if with_heads and shape[-1:] == (d_in,):
                cause, cure = "heads that are flattened already", "turn_off_forward_pass_hook_z_reshaping()"
            elif not with_heads and math.prod(shape[-2:]) == d_in:
                cause, cure = "heads that are not flattened", "x.flatten(-2)"
            raise ShapeError(what, got=str(shape), limit=limit, cause=cause, cure=cure)
        centred = super().process_sae_in(sae_in)
        if with_heads:
            # SAELens remembers the first alone.
            self.d_head = shape[-1]
        return centred

    @override
    @without_autocast()
    def encode(self, x: Tensor) -> Tensor:
        """(..., d_in) to a dense code (..., d_sae), at most k nonzero. No gradient flows through the choice."""
        sae_in = self.process_sae_in(x)
        atoms_MD, norms_M, gram_MM = self._unit_atoms()
        flat_BD = self._weighted(sae_in.detach().reshape(-1, self.cfg.d_in).float())
        code = self.cfg.coding.encode(flat_BD, atoms_MD, gram_MM)
        dense_BM = (code.to_dense(self.cfg.n_atoms) / norms_M).to(sae_in.dtype)
        latents_BF = torch.cat([dense_BM.relu(), (-dense_BM).relu()], dim=1) if self.cfg.split else dense_BM
        acts = latents_BF.reshape(*sae_in.shape[:-1], self.cfg.d_sae)
        return self.hook_sae_acts_post(self.hook_sae_acts_pre(acts))

    @override
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
        matrix = self.weighting.detach().float()
        return rows_BD * matrix if matrix.ndim == 1 else rows_BD @ matrix

    def _unit_atoms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted atoms in float32 scaled to unit norm, the norms, and the Gram matrix; made again when W_dec changes.

        Without weighting the norms are 1 to rounding in float32, off by up to 1/256 in bfloat16. W_dec is compared with
        the copy that was prepared: SAELens writes through ``.data``, which no version counter sees.
        """
        rows_FD = self.W_dec.detach()
        seen_FD = self._prepared_of
        same = seen_FD is not None and seen_FD.device == rows_FD.device and seen_FD.dtype == rows_FD.dtype
        if self._prepared is None or seen_FD is None or not same or not torch.equal(seen_FD, rows_FD):
            weighted_MD = self._weighted(self.atoms_MD.detach().float())
            norms_M = torch.linalg.vector_norm(weighted_MD, dim=1)
            atoms_MD = weighted_MD / norms_M[:, None]
            self._prepared, self._prepared_of = (atoms_MD, norms_M, atoms_MD @ atoms_MD.T), rows_FD.clone()
        return self._prepared

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
    context_size: int = 128,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    view: Literal["signed", "split"] = "signed",
    prepend_bos: bool = True,
    **metadata: Any,
) -> DBKSVDSAE:
    """Wrap a dictionary for SAELens and SAEBench.

    Args:
        model_name: TransformerLens name of the model the activations came from.
        hook_name: the hook they were read at.
        context_size: tokens a context, for SAELens' ActivationsStore.
        view: 'signed', the code as it comes, or 'split', its positive and negative parts as two latents an atom.
        prepend_bos: whether contexts began with a BOS, for SAELens' ActivationsStore.
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
    weighting, split = dictionary.weighting, view == "split"
    cfg = DBKSVDSAEConfig(
        d_in=dictionary.d_in,
        d_sae=2 * dictionary.n_atoms if split else dictionary.n_atoms,
        dtype=dtype_name(dtype, where),
        device=str(named_device(device)),
        # hook_z has heads; the harvest flattens them, and so must HookedSAETransformer.
        reshape_activations="hook_z" if hook_name.endswith("hook_z") else "none",
        **dictionary.coding.as_json(),
        weighting="none" if weighting is None else "diagonal" if weighting.is_diagonal else "full",
        split=split,
        metadata=SAEMetadata(
            model_name=model_name,
            hook_name=hook_name,
            context_size=whole(context_size, "context_size", where),
            prepend_bos=flag(prepend_bos, "prepend_bos", where),
            **metadata,
        ),
    )
    sae = DBKSVDSAE(cfg)
    with torch.no_grad():
        if weighting is not None:
            sae.weighting.copy_(weighting.matrix)
        sae.W_dec.copy_(sae._both_signs(dictionary.unit_raw_atoms()))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(dictionary.centre_D)
    return sae


def _check_tensor(value: Any, what: str) -> None:
    if not isinstance(value, Tensor):
        raise InputTypeError(what, got=shown(value), limit="a tensor", cure="torch.as_tensor(x)")
    if value.is_complex() or value.layout != torch.strided or value.is_nested:
        raise InputTypeError(what, got=f"{value.dtype}, {value.layout}", limit="a dense tensor of real numbers")


register_sae_class(ARCHITECTURE, DBKSVDSAE, DBKSVDSAEConfig)
register_sae_class(ARCHITECTURE_ON_DISK, DBKSVDSAE, DBKSVDSAEConfig)
