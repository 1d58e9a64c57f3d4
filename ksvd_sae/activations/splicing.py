"""A language model's runs that differ at one hook, and what they predict of the next token.

Whatever asks a model for its loss does it here: the loss of spliced dictionaries (evals/loss), SAEBench's core shared
by a panel (evals/core), and the gradients that metrics follow from (gradients.py). What comes before the hook is
computed once for all dictionaries; logits are made some rows at a time, as those of a vocabulary of 262,144 words fill
memory.

Notation: B contexts, L positions, D model dimensions, N predictions, n of a chunk, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from ksvd_sae.activations.language import check_hook, hook_layer, is_bridge
from ksvd_sae.errors import EvaluationError, HookError

if TYPE_CHECKING:
    from ksvd_sae.activations.language import AnyModel

# 268 MB in float32, some three of which exist at once. For Gemma's vocabulary that is 256 rows; products with 128 or 64
# take 1.3 and 1.6 times as long a row (one-off, one CPU core).
LOGITS_AT_ONCE = 2**26
# Of the largest: in 16 bits products of other shapes are rounded otherwise.
_SAME_LOGITS = 2**-5
# Bridges whose unembedding is known to be what it is taken for.
_CHECKED: WeakSet[Any] = WeakSet()

# What a bridge's unembedding gets.
_UNEMBEDDED = "unembed.hook_in"

# ---------------------------------------------------------------- runs


def before_unembedding(model: "AnyModel", start: Tensor, first_layer: int = 0, **options: Any) -> Tensor:
    """(B, L, D) that the unembedding gets.

    Args: start: tokens (B, L), or the residual stream (B, L, D) at ``first_layer``; a bridge starts from tokens only.
    Raises: HookError: a bridge to a model without an unembedding.
    """
    if is_bridge(model):
        return _bridge_before_unembedding(model, start)
    starts = {"start_at_layer": first_layer} if start.is_floating_point() else {}
    final_BLD: Tensor = model(start, stop_at_layer=model.cfg.n_layers, **starts, **options)
    return final_BLD if model.cfg.normalization_type is None else model.ln_final(final_BLD)


class _ReachedError(Exception):
    """Ends a bridge's run: transformers offers no other way."""


def _bridge_before_unembedding(model: "AnyModel", tokens_BL: Tensor) -> Tensor:
    check_hook(model, _UNEMBEDDED)
    reached: list[Tensor] = []

    def stop(final_BLD: Tensor, hook: Any) -> None:
        reached.append(final_BLD)
        raise _ReachedError

    with suppress(_ReachedError), model.hooks(fwd_hooks=[(_UNEMBEDDED, stop)]):
        model(tokens_BL, return_type=None)
    return reached[0]


@dataclass(frozen=True)
class Started:
    """Where the run of some contexts starts again.

    start_BLD: residual stream at that layer; None: the run starts from the tokens.
    options: what the model's forward is to be told besides.
    """

    tokens_BL: Tensor
    start_BLD: Tensor | None
    options: dict[str, Any]


def check_changes(model: "AnyModel", hook: str) -> None:
    """Raise HookError for a hook of which a bridge gives the activation, but not what follows from a change of it."""
    if is_bridge(model) and hook.endswith(".hook_resid_mid"):
        raise HookError(
            f"hook {hook!r}: a bridge reads it, and cannot change it",
            cause="there it is what goes into the second norm; the residual stream passes by",
            cure="use the layer's hook_resid_post or hook_resid_pre, or a HookedTransformer",
        )


class RunsFromHook:
    """Runs of one model that differ only in the activation at one hook.

    From a hook of the residual stream the run goes on with the next layer, from another inside a block with that block,
    from the embedding at the start. A bridge cannot go on in the middle: its runs are whole, with the same results.

    Raises: as ``check_changes``.
    """

    def __init__(self, model: "AnyModel", hook: str):
        check_changes(model, hook)
        self.model, self.hook = model, hook
        self._layer, self._direct = (None, False) if is_bridge(model) else _resume(hook, model.cfg.n_layers)

    @torch.no_grad()
    def first(self, tokens_BL: Tensor) -> tuple[Started, Tensor | None, Tensor]:
        """The run as it is.

        Returns: where others start; the activation at the hook (None if it did not fire); (B, L, d_model) what the
            unembedding gets.
        """
        kept: list[Tensor] = []

        def keep(activation: Tensor, hook: Any) -> None:
            kept.append(activation.detach().clone())

        model = self.model
        with model.hooks(fwd_hooks=[(self.hook, keep)]):
            start_BLD, options = self.start(tokens_BL)
            if self._layer is not None:
                start_BLD = model(start_BLD, start_at_layer=0, stop_at_layer=self._layer, **options)
            final_BLD = before_unembedding(model, start_BLD, self._layer or 0, **options)
        started = Started(tokens_BL, None if self._layer is None else start_BLD, options)
        return started, kept[0] if kept else None, final_BLD

    @torch.no_grad()
    def again(self, started: Started, change: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, L, d_model) that the unembedding gets when the hook's activation is changed."""
        return self.differentiable(started, change)

    def differentiable(self, started: Started, change: Callable[[Tensor], Tensor]) -> Tensor:
        """As ``again``, with gradients where they are enabled and ``change`` gives what requires them."""
        if self._direct:
            assert started.start_BLD is not None
            return self._finish(change(started.start_BLD), started)
        with self.model.hooks(fwd_hooks=[(self.hook, lambda activation, hook: change(activation))]):
            start_BLD = started.start_BLD
            if start_BLD is None:
                start_BLD, _ = self.start(started.tokens_BL)
            return self._finish(start_BLD, started)

    def start(self, tokens_BL: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the model's forward gets first, and what it is to be told besides."""
        if is_bridge(self.model):
            return tokens_BL, {}
        embedded_BLD, _, shortformer, mask = self.model.input_to_embed(tokens_BL)
        return embedded_BLD, {"shortformer_pos_embed": shortformer, "attention_mask": mask}

    def _finish(self, start_BLD: Tensor, started: Started) -> Tensor:
        return before_unembedding(self.model, start_BLD, self._layer or 0, **started.options)


def replace_rows(replaced_BL: Tensor, rebuilt_ND: Tensor, activation: Tensor) -> Tensor:
    """The activation with other rows at some tokens, in its dtype; heads come back."""
    spliced = activation.clone()
    spliced[replaced_BL] = rebuilt_ND.to(spliced).reshape(-1, *spliced.shape[2:])
    return spliced


def _resume(hook: str, n_layers: int) -> tuple[int | None, bool]:
    """The layer that a spliced run starts at (None: the embedding), and whether its input is what the hook gives."""
    layer = hook_layer(hook)
    if layer is None:
        return (n_layers if hook.startswith("ln_final.") else None), False
    if hook == f"blocks.{layer}.hook_resid_post":
        return layer + 1, True
    return layer, hook == f"blocks.{layer}.hook_resid_pre"


# ---------------------------------------------------------------- logits


class Unembedding:
    """From what the unembedding gets to logits, as the model's forward makes them.

    Raises: EvaluationError: a bridge's forward makes them in another way.
    """

    def __init__(self, model: "AnyModel"):
        self._model = model
        self._space = model.W_U.new_empty(0)
        if is_bridge(model) and model not in _CHECKED:
            self._check()
            _CHECKED.add(model)

    @torch.no_grad()
    def _check(self) -> None:
        """Compare with the forward: some models of transformers scale logits in ways of their own."""
        tokens_BL = torch.arange(min(4, self._model.cfg.d_vocab), device=self._model.cfg.device)[None]
        theirs_LV: Tensor = self._model(tokens_BL)[0].float()
        off = (self.logits(before_unembedding(self._model, tokens_BL)[0]).float() - theirs_LV).abs().max()
        if not float(off) <= _SAME_LOGITS * float(theirs_LV.abs().max()):
            raise EvaluationError(
                f"model {self._model.cfg.model_name!r}: its logits are not W_U·x + b_U, softly capped",
                got=f"{float(off):.3g} off, of {float(theirs_LV.abs().max()):.3g}",
                cause="a model that scales its logits, or one in which NaN or infinity arises",
                cure="a HookedTransformer, if TransformerLens has the model; activations can be read all the same",
            )

    def logits(self, rows_nD: Tensor) -> Tensor:
        """(n, V); in memory that the next call overwrites, unless a gradient is asked for."""
        # Not model.unembed: it makes W_Uᵀ contiguous at every call, which for some layouts copies the whole matrix.
        model, cap = self._model, self._model.cfg.output_logits_soft_cap
        if rows_nD.requires_grad:
            logits_nV = torch.addmm(model.b_U, rows_nD, model.W_U)
            return cap * torch.tanh(logits_nV / cap) if cap > 0.0 else logits_nV
        # Memory fresh from the system costs as much as a softmax of what is written there.
        if len(self._space) < len(rows_nD):
            self._space = model.W_U.new_empty(len(rows_nD), model.W_U.shape[1])
        logits_nV = torch.addmm(model.b_U, rows_nD, model.W_U, out=self._space[: len(rows_nD)])
        return logits_nV.div_(cap).tanh_().mul_(cap) if cap > 0.0 else logits_nV

    def rows_at_once(self, logits: int) -> int:
        return max(1, logits // self._model.cfg.d_vocab_out)

    def divergence_gradient(self, final_ND: Tensor, clean_ND: Tensor, logits_at_once: int) -> tuple[float, Tensor]:
        """Σ KL(clean ‖ final) over the rows' distributions, and its gradient in ``final_ND``.

        Cost: three products with the unembedding a row. Numerics: softmax in float32 at least.
        """
        step = self.rows_at_once(logits_at_once)
        total, gradients = 0.0, list[Tensor]()
        for rows_nD, clean_nD in zip(torch.split(final_ND, step), torch.split(clean_ND, step), strict=True):
            with torch.no_grad():
                log_p_nV = torch.log_softmax(_wide(self.logits(clean_nD.detach())), dim=1)
            rows_nD = rows_nD.detach().requires_grad_()
            with torch.enable_grad():
                log_q_nV = torch.log_softmax(_wide(self.logits(rows_nD)), dim=1)
                divergence = torch.nn.functional.kl_div(log_q_nV, log_p_nV, reduction="sum", log_target=True)
            gradients += torch.autograd.grad(divergence, rows_nD)
            total += float(divergence.detach())
        return total, torch.cat(gradients)

    def loss_gradient(self, final_ND: Tensor, targets_N: Tensor, logits_at_once: int) -> Tensor:
        """Gradient of Σ −ln p(target) in what the unembedding gets."""
        step = self.rows_at_once(logits_at_once)
        gradients: list[Tensor] = []
        for rows_nD, targets_n in zip(torch.split(final_ND, step), torch.split(targets_N, step), strict=True):
            rows_nD = rows_nD.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(_wide(self.logits(rows_nD)), targets_n, reduction="sum")
            gradients += torch.autograd.grad(loss, rows_nD)
        return torch.cat(gradients)


def _wide(logits_nV: Tensor) -> Tensor:
    """In float32 at least."""
    return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))


def _one_if_equal(rows_nD: Tensor) -> Tensor:
    """One row if all are equal, as behind zeros in a model without biases: it has one distribution."""
    # In 16 bits a product of one row is rounded otherwise than one of many.
    if rows_nD.dtype == torch.float32 and bool((rows_nD == rows_nD[0]).all()):
        return rows_nD[:1]
    return rows_nD


# ---------------------------------------------------------------- losses and divergences

KeptT = TypeVar("KeptT")


class Arithmetic(ABC, Generic[KeptT]):
    """How a loss and a divergence come from logits. ``KeptT``: of the run as it is, what divergences from it need."""

    @abstractmethod
    def clean(self, logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, KeptT]:
        """(n,) −ln p(target) of the run as it is, and what to keep, in memory of its own."""

    @abstractmethod
    def changed(self, logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) −ln q(target) of another run, and ln q, which may be in memory that the next call overwrites.

        Where all rows are the same, logits and ln q are of one row.
        """

    @abstractmethod
    def divergence(self, clean: KeptT, log_q_nV: Tensor) -> Tensor:
        """(n,) KL(clean ‖ this); may overwrite ``log_q_nV``."""

    @abstractmethod
    def nbytes(self, kept: KeptT) -> int:
        """Memory of what is kept."""


class Exact(Arithmetic[Tensor]):
    """Logarithms of the softmax straight from the logits, in float32 at least; losses in float64 on the CPU."""

    def __init__(self) -> None:
        self._p_nV = torch.empty(0)

    def clean(self, logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        return self.changed(logits_nV, targets_n)

    def changed(self, logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        log_q_nV = torch.log_softmax(_wide(logits_nV), dim=1)
        return -log_q_nV.expand(len(targets_n), -1).gather(1, targets_n[:, None])[:, 0].double().cpu(), log_q_nV

    def divergence(self, clean: Tensor, log_q_nV: Tensor) -> Tensor:
        # Σ p (ln p − ln q), in place and in one space for p: fresh memory of this size costs more than the sums.
        if self._p_nV.shape != clean.shape:
            self._p_nV = torch.empty_like(clean)
        alone = len(log_q_nV) == len(clean)
        difference_nV = log_q_nV.neg_().add_(clean) if alone else clean - log_q_nV
        return difference_nV.mul_(torch.exp(clean, out=self._p_nV)).sum(dim=1).double().cpu()

    def nbytes(self, kept: Tensor) -> int:
        return kept.nbytes


class NextTokenLosses(Generic[KeptT]):
    """Losses and divergences of many runs of the same tokens from the run as it is.

    Args:
        arithmetic: how they are computed.
        memory_bytes: for what is kept of runs as they are; what does not fit is computed again for each other run.
        rows_at_once: predictions whose logits are made at a time; None: as many as make 268 MB in float32.
    """

    def __init__(
        self,
        model: "AnyModel",
        arithmetic: Arithmetic[KeptT],
        memory_bytes: int,
        rows_at_once: int | None = None,
    ):
        self._unembedding, self._arithmetic = Unembedding(model), arithmetic
        self._step = rows_at_once or self._unembedding.rows_at_once(LOGITS_AT_ONCE)
        self._left = memory_bytes
        self._kept: dict[tuple[str, int], KeptT] = {}

    @torch.no_grad()
    def of(self, final_ND: Tensor, clean_ND: Tensor, targets_N: Tensor, tokens: str = "") -> tuple[Tensor, Tensor]:
        """(N,) −ln p(target) and (N,) KL(clean ‖ this).

        Args:
            final_ND: what the unembedding gets; the clean run's itself may be given.
            clean_ND: what it gets in the run as it is.
            tokens: which tokens these are, where there are others.
        """
        losses, divergences = [], []
        for start in range(0, len(final_ND), self._step):
            part, name = slice(start, start + self._step), (tokens, start)
            if final_ND is clean_ND:
                loss_n, _ = self._clean(name, clean_ND[part], targets_N[part])
                losses.append(loss_n)
                divergences.append(torch.zeros_like(loss_n))
                continue
            logits_nV = self._unembedding.logits(_one_if_equal(final_ND[part]))
            loss_n, log_q_nV = self._arithmetic.changed(logits_nV, targets_N[part])
            losses.append(loss_n)
            kept = self._kept.get(name)
            if kept is None:
                _, kept = self._clean(name, clean_ND[part], targets_N[part])
            divergences.append(self._arithmetic.divergence(kept, log_q_nV))
        return torch.cat(losses), torch.cat(divergences)

    def _clean(self, name: tuple[str, int], rows_nD: Tensor, targets_n: Tensor) -> tuple[Tensor, KeptT]:
        loss_n, kept = self._arithmetic.clean(self._unembedding.logits(rows_nD), targets_n)
        if name not in self._kept and self._arithmetic.nbytes(kept) <= self._left:
            self._left -= self._arithmetic.nbytes(kept)
            self._kept[name] = kept
        return loss_n, kept
