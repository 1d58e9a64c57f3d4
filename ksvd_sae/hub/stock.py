"""What SAELens loads without this package: never the dictionary itself, and never without what it was measured at.

SAELens' own ``matching_pursuit`` over [D; −D] is the same code where the dictionary codes by plain matching pursuit
with at most k steps in raw coordinates; that every held-out support is the same is checked before it is written. Any
other dictionary (more steps, a refit, OMP, a metric) is another code under it. For those a run's own SAEs over the same
atoms, such as `kind: linear_topk`, stand beside the dictionary, under their own names and scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAE, SAEMetadata

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.evals.heldout.metrics import heldout_metrics

_CHECKED_SAMPLES = 4096


@dataclass(frozen=True)
class Stock:
    """An SAE for SAELens alone.

    same: whether its codes are the dictionary's. measured: its own FVU and L0 on held-out activations, where no run has
    scored it. checked: on how many of these its supports were compared with the dictionary's.
    """

    sae: SAE[Any]
    same: bool
    measured: Mapping[str, float] = field(default_factory=dict)
    checked: int = 0


def by_matching_pursuit(dictionary: Dictionary, heldout: ActivationShards) -> Stock | None:
    """SAELens' matching pursuit over the dictionary's atoms, in both signs if it has them; None where codes differ."""
    coding = dictionary.coding
    plain = not (coding.rtol or coding.tau or coding.tau_absolute) and dictionary.weighting is None
    if coding.coder != "mp" or coding.max_steps != coding.k or not plain:
        return None
    atoms_MD = dictionary.atoms_MD.detach().cpu().float()
    rows_FD = atoms_MD if coding.nonnegative else torch.cat([atoms_MD, -atoms_MD])
    config = MatchingPursuitSAEConfig(
        d_in=dictionary.d_in,
        d_sae=len(rows_FD),
        residual_threshold=0.0,
        max_iterations=coding.k,
        stop_on_duplicate_support=False,
        metadata=SAEMetadata(),
    )
    theirs = MatchingPursuitSAE(config)
    with torch.no_grad():
        theirs.W_dec.copy_(rows_FD)
        theirs.b_dec.copy_(dictionary.centre_D)
        x_BD = next(heldout.batches(min(_CHECKED_SAMPLES, heldout.n_samples)))
        code_BM = dictionary.encode(x_BD).to_dense(dictionary.n_atoms)
        split_BF = code_BM if coding.nonnegative else torch.cat([code_BM.relu(), (-code_BM).relu()], dim=1)
        if not torch.equal(theirs.encode(x_BD) != 0, split_BF != 0):
            return None
    scores = heldout_metrics(theirs, heldout.batches(_CHECKED_SAMPLES)).scores
    return Stock(theirs, True, {"FVU": scores["fvu"], "L0": scores["l0"]}, len(x_BD))
