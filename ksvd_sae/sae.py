"""Dictionaries as SAELens SAEs: the border where W_dec, d_in and d_sae begin.

``W_dec`` is the atoms, ``b_dec`` the centre, and ``encode`` runs the dictionary's own coder: matching
pursuit, matching pursuit with refit, OMP, or projection. Everything that takes a SAELens SAE takes
these: HookedSAETransformer, ActivationsStore, SAEBench.

SAELens finds classes by name in a registry that this module's import fills; ``import ksvd_sae`` sees to
it. A process that has not imported it cannot know the name, so the name on disk says what to do.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from torch import Tensor, nn
from typing_extensions import override

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.sparse_coding import CODERS, Coder, encode
from ksvd_sae.provenance import write_json

ARCHITECTURE = "db_ksvd"
# Without `import ksvd_sae` SAELens answers with KeyError('<this>').
ARCHITECTURE_ON_DISK = "db_ksvd (run `import ksvd_sae` first, from the package ksvd-sae)"


@dataclass
class DBKSVDSAEConfig(SAEConfig):
    """What SAELens stores beside the weights.

    k, coder, rtol, max_steps: see ``ksvd_sae.learning.sparse_coding``.
    """

    k: int = 20
    coder: Coder = "mp"
    rtol: float = 0.0
    max_steps: int | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coder not in CODERS:
            raise ShapeError("DBKSVDSAEConfig: unknown coder", got=self.coder, limit=", ".join(CODERS))


class DBKSVDSAE(SAE[DBKSVDSAEConfig]):
    """A dictionary that codes by pursuit. Codes are signed unless every one happens to be positive.

    Parameters: W_dec (d_sae, d_in) unit rows; b_dec (d_in,); W_enc = W_decᵀ, b_enc = 0: kept because SAEBench
    and SAELens read them, not used by ``encode``.
    """

    b_enc: nn.Parameter

    def __init__(self, cfg: DBKSVDSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._prepared_of: Tensor | None = None
        self._prepared: tuple[Tensor, Tensor, Tensor] | None = None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        with torch.no_grad():
            self.W_dec.data = torch.nn.functional.normalize(self.W_dec.data, dim=1)
            self.W_enc.data = self.W_dec.data.T.contiguous()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    @override
    def encode(self, x: Tensor) -> Tensor:
        """(..., d_in) to a dense code (..., d_sae), at most k nonzero. No gradient flows through the choice."""
        sae_in = self.process_sae_in(x)
        atoms_MD, norms_M, gram_MM = self._unit_atoms()
        flat_BD = sae_in.detach().reshape(-1, self.cfg.d_in).float()
        code = encode(
            flat_BD,
            atoms_MD,
            self.cfg.k,
            coder=self.cfg.coder,
            gram_MM=gram_MM,
            max_steps=self.cfg.max_steps,
            rtol=self.cfg.rtol,
        )
        dense_BM = code.to_dense(self.cfg.d_sae) / norms_M
        acts = dense_BM.to(sae_in.dtype).reshape(*sae_in.shape[:-1], self.cfg.d_sae)
        return self.hook_sae_acts_post(self.hook_sae_acts_pre(acts))

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        """(..., d_sae) to (..., d_in)."""
        sae_out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        sae_out = self.run_time_activation_norm_fn_out(sae_out)
        return self.reshape_fn_out(sae_out, self.d_head)

    def _unit_atoms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Atoms in float32 scaled to unit norm, the norms, and the Gram matrix; made again when W_dec changes.

        In float32 the norms are 1 to rounding; W_dec in bfloat16 is off by up to 1/256. W_dec is compared with the
        copy that was prepared: SAELens writes through ``.data``, which no version counter sees.
        """
        rows_MD = self.W_dec.detach()
        seen_MD = self._prepared_of
        same = seen_MD is not None and seen_MD.device == rows_MD.device and seen_MD.dtype == rows_MD.dtype
        if self._prepared is None or seen_MD is None or not same or not torch.equal(seen_MD, rows_MD):
            norms_M = torch.linalg.vector_norm(rows_MD.float(), dim=1)
            atoms_MD = rows_MD.float() / norms_M[:, None]
            self._prepared, self._prepared_of = (atoms_MD, norms_M, atoms_MD @ atoms_MD.T), rows_MD.clone()
        return self._prepared

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        weights_path, cfg_path = super().save_model(path)
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
    device: str = "cpu",
    dtype: str = "float32",
    **metadata: Any,
) -> DBKSVDSAE:
    """Wrap a dictionary for SAELens and SAEBench.

    Args:
        model_name: TransformerLens name of the model the activations came from.
        hook_name: the hook they were read at.
        context_size: tokens a context, for SAELens' ActivationsStore.
        metadata: anything else to keep in ``cfg.metadata`` (JSON values).
    """
    cfg = DBKSVDSAEConfig(
        d_in=dictionary.d_in,
        d_sae=dictionary.n_atoms,
        dtype=dtype,
        device=device,
        # hook_z has heads; the harvest flattens them, and so must HookedSAETransformer.
        reshape_activations="hook_z" if hook_name.endswith("hook_z") else "none",
        k=dictionary.k,
        coder=dictionary.coder,
        rtol=dictionary.rtol,
        max_steps=dictionary.max_steps,
        metadata=SAEMetadata(
            model_name=model_name,
            hook_name=hook_name,
            context_size=context_size,
            prepend_bos=True,
            **metadata,
        ),
    )
    sae = DBKSVDSAE(cfg)
    with torch.no_grad():
        sae.W_dec.copy_(dictionary.atoms_MD)
        sae.W_enc.copy_(dictionary.atoms_MD.T)
        sae.b_dec.copy_(dictionary.centre_D)
    return sae


register_sae_class(ARCHITECTURE, DBKSVDSAE, DBKSVDSAEConfig)
register_sae_class(ARCHITECTURE_ON_DISK, DBKSVDSAE, DBKSVDSAEConfig)
