"""What core's losses are means of: SAEBench adds up all tokens, and keeps no context's own."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.core import main as core
from torch import Tensor

from ksvd_sae.evals.core import CONTEXTS
from ksvd_sae.evals.items import neighbours
from ksvd_sae.replaced import Changes
from ksvd_sae.store import atomic_path

_LOSS = "sae_bench.evals.core.main.get_recons_loss"


def contexts_kept(losses: Changes) -> Changes:
    """Results say the sums and numbers of the losses of each context, under ``CONTEXTS``.

    Args: losses: what stands in place of SAEBench's ``get_recons_loss``, if anything does.
    Returns: the same changes, and these.
    """
    loss: Callable[..., dict[str, Tensor]] = losses.get(_LOSS, core.get_recons_loss)
    save = core.save_single_eval_result
    # By SAE: one that failed in the middle leaves some.
    sums: dict[int, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def recons_loss(sae: Any, model: Any, batch_tokens: Tensor, *rest: Any, **options: Any) -> dict[str, Tensor]:
        losses = loss(sae, model, batch_tokens, *rest, **options)
        counts_BL = torch.ones_like(batch_tokens, dtype=torch.bool)
        for token in options.get("ignore_tokens", ()):
            counts_BL &= batch_tokens != (-1 if token is None else token)
        for name, loss_Bl in losses.items():
            # A prediction's loss counts by the token before it; the last has none.
            counts_Bl = counts_BL[:, : loss_Bl.shape[1]].to(loss_Bl.device)
            summed_B = torch.where(counts_Bl, loss_Bl, 0).double().sum(dim=1)
            sums[id(sae)][name].append(torch.stack([summed_B, counts_Bl.sum(dim=1).double()]).cpu())
        return losses

    def saved(result: Any, eval_id: str, version: str, commit: str, path: Any, sae: Any) -> Any:
        kept = {name: _by_item(torch.cat(parts, dim=1)) for name, parts in sums.pop(id(sae)).items()}
        # A result without them would be taken for a whole one.
        with atomic_path(Path(path)) as temporary:
            save(result, eval_id, version, commit, str(temporary), sae)
            temporary.write_text(json.dumps({**json.loads(temporary.read_text()), CONTEXTS: kept}))
        return path

    return {**losses, _LOSS: recons_loss, "sae_bench.evals.core.main.save_single_eval_result": saved}


def _by_item(sums_2C: Tensor) -> list[list[float]]:
    item_C = neighbours(torch.arange(sums_2C.shape[1]), sums_2C.shape[1])
    sums_2I = torch.zeros(2, int(item_C.max()) + 1, dtype=torch.float64).index_add_(1, item_C, sums_2C)
    return [[float(f"{value:.7g}") for value in row] for row in sums_2I.tolist()]
