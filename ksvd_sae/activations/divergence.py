"""What other activations at a hook do to a language model's predictions, and which way they should move.

The KL divergence of the spliced run's next-token distributions from those of the run as it is, and its gradient in the
rows that are spliced in. What comes before the hook is run once and without a graph; the model's weights have none.

Notation: B contexts, L positions, N tokens that are replaced, P predictions that count, D dimensions.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ksvd_sae.activations.gradients import GRADIENT_LOGITS_AT_ONCE, frozen
from ksvd_sae.activations.language import ActivationReader, check_tokens
from ksvd_sae.activations.splicing import RunsFromHook, Started, Unembedding, replace_rows
from ksvd_sae.errors import ActivationError


@dataclass(frozen=True)
class CleanRun:
    """Some contexts as they are.

    replaced_BL: tokens to be replaced: those that the harvest keeps, without outliers. x_ND: their activations, float32
    at least, heads flattened. predicting_BL: positions whose prediction counts. clean_PD: what the unembedding gets
    there.
    """

    started: Started
    replaced_BL: Tensor
    x_ND: Tensor
    predicting_BL: Tensor
    clean_PD: Tensor


class SplicedDivergence:
    """Divergences at one hook of one model, and their gradients.

    Special tokens and outliers keep their activations, and a prediction counts if its target is not special, as in the
    eval ``loss``.

    Args: norm_limit: of outliers; None: there are none.
    Raises: HookError: see ``check_changes``.
    """

    def __init__(self, reader: ActivationReader, norm_limit: float | None):
        self._reader, self._limit = reader, float("inf") if norm_limit is None else norm_limit
        self._runs, self._unembedding = RunsFromHook(reader.model, reader.hook), Unembedding(reader.model)

    def clean(self, tokens_BL: Tensor) -> CleanRun:
        """Raises: ShapeError (no contexts of ids that the model has), HookError (the hook gives not one row a token),
        ActivationError (NaN or infinity)."""
        reader, model = self._reader, self._reader.model
        check_tokens(model, tokens_BL, "divergence", least=2)
        tokens_BL = tokens_BL.to(model.cfg.device)
        started, activation, final_BLD = self._runs.first(tokens_BL)
        reader.check_rows([] if activation is None else [activation], tokens_BL)
        assert activation is not None
        x_BLD = activation.flatten(2).to(torch.promote_types(activation.dtype, torch.float32))
        kept_BL = reader.kept(tokens_BL)
        if not bool(torch.isfinite(x_BLD[kept_BL]).all()):
            raise ActivationError(
                f"divergence: activations of {reader.hook} hold NaN or infinity",
                cause=f"overflow in {model.cfg.dtype}, or broken weights",
                cure="set model.dtype to bfloat16 or float32",
            )
        replaced_BL = kept_BL & (torch.linalg.vector_norm(x_BLD, dim=2) <= self._limit)
        predicting_BL = torch.zeros_like(kept_BL)
        predicting_BL[:, :-1] = reader.ordinary(tokens_BL)[:, 1:]
        return CleanRun(started, replaced_BL, x_BLD[replaced_BL], predicting_BL, final_BLD[predicting_BL])

    @torch.enable_grad()
    def gradient(self, clean: CleanRun, rebuilt_ND: Tensor) -> tuple[float, Tensor]:
        """Mean KL(clean ‖ spliced) of the predictions, nats, and its gradient in ``rebuilt_ND``, the rows that replace
        x_ND."""
        leaf_ND = rebuilt_ND.detach().requires_grad_()
        with frozen(self._reader.model):
            final_BLD = self._runs.differentiable(clean.started, partial(replace_rows, clean.replaced_BL, leaf_ND))
            rows_PD = final_BLD[clean.predicting_BL]
            total, pull_PD = self._unembedding.divergence_gradient(rows_PD, clean.clean_PD, GRADIENT_LOGITS_AT_ONCE)
            (gradient_ND,) = torch.autograd.grad(rows_PD, leaf_ND, pull_PD)
        return total / len(rows_PD), gradient_ND / len(rows_PD)
