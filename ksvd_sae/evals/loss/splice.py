"""What a dictionary does to the model: its reconstruction put in the activation's place, for many dictionaries at once.

SAEBench's core runs the whole model three times for every dictionary: as it is, with the hook zeroed, and spliced. Here
the first two, and all that comes before the hook, are run once; a dictionary costs the layers after the hook and the
logits. Contexts, tokens and targets are the same for all dictionaries, so differences between two can be paired.

Notation: C contexts, L positions, N tokens that are replaced, P predictions that count, V vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ksvd_sae.activations.language import ActivationReader, check_tokens
from ksvd_sae.activations.splicing import Exact, NextTokenLosses, RunsFromHook, Started
from ksvd_sae.errors import ActivationError, ConfigError, EvaluationError, ShapeError

if TYPE_CHECKING:
    from ksvd_sae.activations.language import AnyModel

logger = logging.getLogger(__name__)
Reconstruct = Callable[[Tensor], Tensor]
Ablation = Literal["replaced", "all"]


@dataclass(frozen=True)
class SpliceScores:
    """What splicing a reconstruction does to the next-token predictions. Means are over ``n_tokens`` predictions.

    Attributes:
        ce_clean, ce_ablated, ce_spliced: mean −ln p(target), nats: model as it is; with zeros for the activations;
            with their reconstructions.
        kl: mean KL(clean ‖ spliced) of the predicted distributions, nats a token.
        n_tokens: predictions counted: those whose target is not a special token.
        n_replaced: activations that were replaced.
        nats_lost_C, kl_C, nats_to_lose_C: ce_spliced − ce_clean, the KL and ce_ablated − ce_clean in each context, for
            error bars and paired differences (float64). n_C: predictions counted in each.
    """

    ce_clean: float
    ce_ablated: float
    ce_spliced: float
    kl: float
    n_tokens: int
    n_replaced: int
    nats_lost_C: Tensor
    kl_C: Tensor
    nats_to_lose_C: Tensor
    n_C: Tensor

    @property
    def nats_lost(self) -> float:
        return self.ce_spliced - self.ce_clean

    @property
    def loss_recovered(self) -> float:
        """1 for a perfect reconstruction, 0 for zeros; NaN if zeros cost nothing: then there is nothing to recover."""
        gap = self.ce_ablated - self.ce_clean
        return (self.ce_ablated - self.ce_spliced) / gap if gap else float("nan")

    @property
    def nats_lost_error(self) -> float:
        """Standard error of the mean of ``nats_lost_C``; NaN for one context."""
        n_contexts = len(self.nats_lost_C)
        return float(self.nats_lost_C.std() / n_contexts**0.5) if n_contexts > 1 else float("nan")


@dataclass(frozen=True)
class _Batch:
    """Some contexts: where their run starts again, and the activations to be rebuilt."""

    started: Started
    replaced_BL: Tensor
    x_ND: Tensor


class SpliceEvaluator:
    """Scores many dictionaries on the same contexts of one model and one hook.

    Special tokens (BOS, EOS, padding …) and outliers are left alone when a reconstruction is spliced in: the harvest
    leaves them out, so no dictionary has learned them. A prediction counts if its target is not special.

    ``ablation`` says what a loss recovered of 0 stands for. 'replaced' zeroes the tokens that are replaced, so zeros
    score 0. 'all' zeroes every token, as SAEBench's core does. The two are far apart: in Gemma-3-270M, layer 9, zeros
    everywhere give all words of the vocabulary the same probability, 12.5 nats, but zeros beside a BOS that is left
    alone cost 22.9 nats, so losing 0.7 nats is a loss recovered of .92 by 'all' and of .96 by 'replaced'.

    Beyond that, core splices outliers too; counts predictions by their own token rather than by their target (without
    that from BOS, with that of EOS); and takes the logarithm of a softmax, so its KL is infinite where a probability
    underflows.

    Args:
        model: as ``load_model`` gives it.
        hook: any hook with one row a token. From a hook of the residual stream the run goes on with the next layer,
            from another inside a block with that block, from the embedding at the start.
        tokens_BL: contexts of equal length, with their BOS.
        ablation: see above.
        norm_limit: the harvest's outlier limit (manifest, statistics.outlier_limit); None: no token is an outlier.
        chunk_tokens: predictions whose logits are made at a time; None: as many as make 268 MB in float32.
        batch_contexts: contexts in a run of the model.
        cache_bytes: for the clean log-probabilities; chunks that do not fit are computed again for each dictionary.
    Raises: HookError (no such hook, or not one row a token), ShapeError (tokens), ConfigError (ablation),
        ActivationError (NaN or infinity at the hook), EvaluationError (the model gives NaN).
    Numerics: blocks in the model's dtype, as in a plain run; softmax in float32 at least, means in float64.
    Memory: (C·L)·d_model floats twice, ``cache_bytes``, and three chunks of logits.
    """

    def __init__(
        self,
        model: "AnyModel",
        hook: str,
        tokens_BL: Tensor,
        *,
        norm_limit: float | None,
        ablation: Ablation = "replaced",
        chunk_tokens: int | None = None,
        batch_contexts: int = 16,
        cache_bytes: int = 2 << 30,
    ):
        self._reader = ActivationReader(model, hook)
        self.model, self.hook = model, hook
        self._runs = RunsFromHook(model, hook)
        check_tokens(model, tokens_BL, "splice", least=2)
        tokens_BL = tokens_BL.to(model.cfg.device)
        if ablation not in get_args(Ablation):
            raise ConfigError("splice: unknown ablation", got=repr(ablation), limit=" or ".join(get_args(Ablation)))
        self._limit = float("inf") if norm_limit is None else norm_limit
        self._next_token = NextTokenLosses(model, Exact(), cache_bytes, chunk_tokens)
        predicted_CL = self._reader.ordinary(tokens_BL)[:, 1:]
        self._n_C = predicted_CL.sum(dim=1).cpu()
        if not bool((self._n_C > 0).all()):
            raise ShapeError(
                "splice: a context has no token to predict but special ones",
                got=f"context {int(self._n_C.argmin())} of {len(tokens_BL)}",
                cure="give contexts of text",
            )
        self._targets_P = tokens_BL[:, 1:][predicted_CL]
        self._batches: list[_Batch] = []
        final_PD = []
        for batch_BL in torch.split(tokens_BL, batch_contexts):
            batch, final_BLD = self._first_run(batch_BL)
            self._batches.append(batch)
            final_PD.append(self._predicting(batch_BL, final_BLD))
        self._clean_PD = torch.cat(final_PD)
        self._clean_ce_P = self._losses(self._clean_PD, "the model as it is")[0]
        self.ce_clean = float(self._clean_ce_P.mean())
        zeroed_PD = self._zeroed() if ablation == "all" else self._spliced(torch.zeros_like, "zeros")
        ablated_ce_P = self._losses(zeroed_PD, "zeros")[0]
        self.ce_ablated = float(ablated_ce_P.mean())
        self._nats_to_lose_C = self._by_context(ablated_ce_P - self._clean_ce_P)
        if not self.ce_ablated > self.ce_clean:
            logger.warning(
                "splice: zeroing %s does not raise the loss (%.3f, %.3f as it is): loss recovered means nothing here",
                *(hook, self.ce_ablated, self.ce_clean),
            )

    @property
    def n_replaced(self) -> int:
        return sum(len(batch.x_ND) for batch in self._batches)

    def score(self, reconstruct: Reconstruct, name: str = "the dictionary") -> SpliceScores:
        """Splice a reconstruction and measure.

        Args:
            reconstruct: raw activations (n, d_in), float32, to their reconstructions, same shape; heads, if the hook
                has them, are flattened. For a SAELens SAE: ``lambda x: sae.decode(sae.encode(x))``.
            name: for error messages.
        Raises: ShapeError (the reconstruction's shape), EvaluationError (NaN or infinity in it, or after it).
        Cost: the layers from the hook on, and one product with the unembedding.
        """
        ce_P, kl_P = self._losses(self._spliced(reconstruct, name), name)
        return SpliceScores(
            ce_clean=self.ce_clean,
            ce_ablated=self.ce_ablated,
            ce_spliced=float(ce_P.mean()),
            kl=float(kl_P.mean()),
            n_tokens=len(ce_P),
            n_replaced=self.n_replaced,
            nats_lost_C=self._by_context(ce_P - self._clean_ce_P),
            kl_C=self._by_context(kl_P),
            nats_to_lose_C=self._nats_to_lose_C,
            n_C=self._n_C,
        )

    def _by_context(self, values_P: Tensor) -> Tensor:
        """The mean over each context's predictions."""
        return torch.stack([part_P.mean() for part_P in torch.split(values_P, self._n_C.tolist())])

    # ------------------------------------------------------------ running the model

    def _first_run(self, tokens_BL: Tensor) -> tuple[_Batch, Tensor]:
        """The clean run, and what later runs start from."""
        started, activation, final_BLD = self._runs.first(tokens_BL)
        self._reader.check_rows([] if activation is None else [activation], tokens_BL)
        assert activation is not None
        ordinary_BL = self._reader.ordinary(tokens_BL)
        x_BLD = activation.flatten(2).float()
        if not bool(torch.isfinite(x_BLD[ordinary_BL]).all()):
            raise ActivationError(
                f"splice: activations of {self.hook} hold NaN or infinity",
                cause=f"overflow in {self.model.cfg.dtype}, or broken weights",
                cure="set model.dtype to bfloat16 or float32",
            )
        replaced_BL = ordinary_BL & (torch.linalg.vector_norm(x_BLD, dim=2) <= self._limit)
        return _Batch(started, replaced_BL, x_BLD[replaced_BL]), final_BLD

    @torch.no_grad()
    def _spliced(self, reconstruct: Reconstruct, name: str) -> Tensor:
        """(P, d_model) that the unembedding gets when the activations are replaced."""
        final_PD = []
        for batch in self._batches:
            rebuilt_ND = _checked_rows(reconstruct(batch.x_ND.clone()), batch.x_ND, name)
            final_BLD = self._runs.again(batch.started, partial(_replace_rows, batch.replaced_BL, rebuilt_ND))
            final_PD.append(self._predicting(batch.started.tokens_BL, final_BLD))
        return torch.cat(final_PD)

    def _zeroed(self) -> Tensor:
        """The same when every token's activation is zero."""
        started = [batch.started for batch in self._batches]
        return torch.cat([self._predicting(s.tokens_BL, self._runs.again(s, torch.zeros_like)) for s in started])

    def _predicting(self, tokens_BL: Tensor, final_BLD: Tensor) -> Tensor:
        """The rows whose prediction counts."""
        rows_PD: Tensor = final_BLD[:, :-1][self._reader.ordinary(tokens_BL)[:, 1:]]
        return rows_PD

    def _losses(self, final_PD: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """(P,) −ln p(target) and (P,) KL(clean ‖ this), float64 on the CPU."""
        ce_P, kl_P = self._next_token.of(final_PD, self._clean_PD, self._targets_P)
        if not bool(torch.isfinite(ce_P).all() and torch.isfinite(kl_P).all()):
            broken = int((~(torch.isfinite(ce_P) & torch.isfinite(kl_P))).sum())
            raise EvaluationError(
                f"splice at {self.hook}: {name} gives {broken} of {len(ce_P)} predictions that are NaN or infinite",
                cause=f"overflow in {self.model.cfg.dtype}, or broken weights",
                cure="set model.dtype to bfloat16 or float32",
            )
        return ce_P, kl_P


def _replace_rows(replaced_BL: Tensor, rebuilt_ND: Tensor, activation: Tensor) -> Tensor:
    """The activation with the rebuilt rows, in its dtype; heads come back."""
    spliced = activation.clone()
    spliced[replaced_BL] = rebuilt_ND.to(spliced).reshape(-1, *spliced.shape[2:])
    return spliced


def _checked_rows(rebuilt_ND: Tensor, x_ND: Tensor, name: str) -> Tensor:
    if rebuilt_ND.shape != x_ND.shape:
        raise ShapeError(
            f"splice: {name} gives reconstructions of another shape than the activations",
            got=str(tuple(rebuilt_ND.shape)),
            limit=str(tuple(x_ND.shape)),
            cause="a dictionary of another model or hook",
        )
    finite_N = torch.isfinite(rebuilt_ND).all(dim=1)
    if not bool(finite_N.all()):
        raise EvaluationError(
            f"splice: {name} gives {int((~finite_N).sum())} of {len(x_ND)} reconstructions with NaN or infinity",
            cause="training diverged, or a file was altered",
        )
    return rebuilt_ND
