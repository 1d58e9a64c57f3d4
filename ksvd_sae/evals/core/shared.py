"""SAEBench's core on a panel, the language model's part done once: same numbers, a fraction of the work.

For every SAE, core runs the model as it is, with the hook zeroed, and spliced, takes the softmax of all the logits that
two KL divergences need, and reads the hook's activations from more text. All but the spliced run is the same for every
SAE of a model and hook. Here it is done for the first and kept (``TensorCache``); another SAE costs the layers after
the hook, one product with the unembedding and one softmax.

Notation: B contexts, L positions, D model dimensions, V vocabulary, n rows of a chunk.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from sae_bench.evals.core import main as core
from torch import Tensor

from ksvd_sae.activations.splicing import Arithmetic, NextTokenLosses, RunsFromHook, Started
from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.evals.llm_cache import TensorCache, model_fingerprint, tokens_hash
from ksvd_sae.replaced import Changes
from ksvd_sae.store import content_hash

logger = logging.getLogger(__name__)
# Nats: e^-60 is far above where float32 loses digits (e^-87).
_EXACT_UP_TO = 60.0
# Names of hooks whose heads core flattens before an SAE sees them.
_FLATTENED_BY_CORE = ("hook_q", "hook_k", "hook_v", "hook_z")


def shared_core_runs(cache: TensorCache, memory_bytes: int, weights: OwnWeights | None = None) -> Changes:
    """The SAEs that core is given share the model's runs.

    Two functions of SAEBench's get what they ask of the model from here. An SAE on a single head of a hook goes
    SAEBench's own way.

    Args: cache: for what the model gave.  memory_bytes: for probabilities of the model as it is, which are too large
        for a disk (a gigabyte for 1,000 tokens of Gemma); what does not fit is computed again for each SAE.
        weights: of the model, where they are not those of its name.
    """
    shared = _SharedRuns(cache, memory_bytes, weights)
    loss, sparsity = core.get_recons_loss, core.get_sparsity_and_variance_metrics

    def recons_loss(sae: Any, model: Any, batch_tokens: Tensor, *rest: Any, **options: Any) -> dict[str, Any]:
        if sae.cfg.hook_head_index is not None or options.get("model_kwargs"):
            return loss(sae, model, batch_tokens, *rest, **options)
        return shared.of(model, sae.cfg.hook_name).recons_loss(sae, batch_tokens, *rest, **options)

    def sparsity_metrics(sae: Any, model: Any, *rest: Any, **options: Any) -> Any:
        if options.get("model_kwargs"):
            return sparsity(sae, model, *rest, **options)
        return sparsity(sae, _KeptActivations(shared.of(model, sae.cfg.hook_name)), *rest, **options)

    return {
        "sae_bench.evals.core.main.get_recons_loss": recons_loss,
        "sae_bench.evals.core.main.get_sparsity_and_variance_metrics": sparsity_metrics,
    }


@dataclass
class _SharedRuns:
    """The runs of each model and hook."""

    cache: TensorCache
    memory_bytes: int
    weights: OwnWeights | None
    _of: dict[tuple[int, str], "_HookRuns"] = field(default_factory=dict)

    def of(self, model: Any, hook: str) -> "_HookRuns":
        key = (id(model), hook)
        if key not in self._of:
            # One model at a time: SAEBench has dropped the one before.
            self._of = {key: _HookRuns(model, hook, self.cache, self.memory_bytes, self.weights)}
        return self._of[key]


class _HookRuns:
    """What one model gives around one hook."""

    def __init__(self, model: Any, hook: str, cache: TensorCache, memory_bytes: int, weights: OwnWeights | None):
        self.model, self.hook, self.cache, self._weights = model, hook, cache, weights
        self.runs = RunsFromHook(model, hook)
        self._next_token = NextTokenLosses(model, _AsCore(), memory_bytes)

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self.model, self._weights)

    def key(self, asked: str, tokens_BL: Tensor) -> str:
        """Under which an answer of the model is kept."""
        return content_hash(
            {"model": self._fingerprint, "hook": self.hook, "asked": asked, "tokens": tokens_hash(tokens_BL)}
        )

    # ------------------------------------------------------------ losses

    @torch.no_grad()
    def recons_loss(
        self,
        sae: Any,
        batch_tokens: Tensor,
        activation_store: Any,
        compute_kl: bool,
        compute_ce_loss: bool,
        ignore_tokens: frozenset[int | None] | set[int | None] = frozenset(),
        exclude_special_tokens_from_reconstruction: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """``get_recons_loss`` of SAEBench's core: its arguments, its result."""
        batch_tokens = batch_tokens.to(self.model.cfg.device)
        clean = self._clean(batch_tokens)
        kept_BL = torch.ones_like(batch_tokens, dtype=torch.bool)
        if ignore_tokens and exclude_special_tokens_from_reconstruction:
            for token in ignore_tokens:
                # A tokenizer without, say, a padding token gives None: no token equals that.
                kept_BL &= batch_tokens != (-1 if token is None else token)
        started = Started(batch_tokens, clean.get("start_BLD"), self.runs.start(batch_tokens)[1])
        final_BLD = self.runs.again(started, partial(_replaced, sae, kept_BL))
        ce_BL, kl_BL = self._losses(final_BLD, clean["final_BLD"], batch_tokens)
        losses: dict[str, Tensor] = {}
        if compute_kl:
            losses |= {"kl_div_with_sae": kl_BL, "kl_div_with_ablation": clean["kl_ablated_BL"]}
        if compute_ce_loss:
            losses |= {"ce_loss_with_sae": ce_BL, "ce_loss_without_sae": clean["ce_BL"]}
            losses |= {"ce_loss_with_ablation": clean["ce_ablated_BL"]}
        return losses

    def _clean(self, tokens_BL: Tensor) -> dict[str, Tensor]:
        """The run as it is and with zeros: where others start, what the unembedding got, and what was lost."""
        key = self.key("clean and zeroed run, divergences added up in pairs", tokens_BL)
        if (kept := self.cache.get(key, self.model.cfg.device)) is not None:
            return kept
        started, _, final_BLD = self.runs.first(tokens_BL)
        zeroed_BLD = self.runs.again(started, torch.zeros_like)
        ce_BL, _ = self._losses(final_BLD, final_BLD, tokens_BL)
        ce_ablated_BL, kl_ablated_BL = self._losses(zeroed_BLD, final_BLD, tokens_BL)
        clean = {"final_BLD": final_BLD, "ce_BL": ce_BL, "ce_ablated_BL": ce_ablated_BL, "kl_ablated_BL": kl_ablated_BL}
        if started.start_BLD is not None:
            clean["start_BLD"] = started.start_BLD
        self.cache.put(key, clean)
        return clean

    def _losses(self, final_BLD: Tensor, clean_BLD: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L−1) −ln p(next token) and (B, L) KL(clean ‖ this); the clean run itself may be given."""
        targets_N, clean_ND = tokens_BL.roll(-1, dims=1).flatten(), clean_BLD.flatten(0, 1)
        final_ND = clean_ND if final_BLD is clean_BLD else final_BLD.flatten(0, 1)
        losses_N, divergences_N = self._next_token.of(final_ND, clean_ND, targets_N, tokens_hash(tokens_BL))
        return losses_N.reshape(tokens_BL.shape)[:, :-1], divergences_N.reshape(tokens_BL.shape)


def _replaced(sae: Any, kept_BL: Tensor, activation: Tensor) -> Tensor:
    """The reconstruction where a token is to be replaced, as core's hooks put it in."""
    rows = activation.to(sae.device)
    rebuilt = sae.decode(sae.encode(rows.flatten(2))).to(rows.dtype).reshape(rows.shape)
    where = kept_BL.to(rows.device).reshape(*kept_BL.shape, *([1] * (rows.ndim - 2)))
    return torch.where(where, rebuilt, rows).to(activation.device)


def _cross_entropy(logits_nV: Tensor, log_q_nV: Tensor, targets_n: Tensor) -> Tensor:
    """−ln q(target) as TransformerLens computes it, from the logits; ``log_q_nV`` is log(softmax) of them.

    The two differ where a probability is so small that float32 has lost its digits, and in 16 bits everywhere.
    """
    targets_n1 = targets_n[:, None]
    logits_nV, log_q_nV = (x_nV.expand(len(targets_n), -1) for x_nV in (logits_nV, log_q_nV))
    if logits_nV.dtype != torch.float32:
        return -torch.log_softmax(logits_nV, dim=-1).gather(-1, targets_n1)[:, 0]
    losses_n = -log_q_nV.gather(-1, targets_n1)[:, 0]
    far_X = (losses_n > _EXACT_UP_TO).nonzero().flatten()
    if len(far_X):
        losses_n[far_X] = -torch.log_softmax(logits_nV[far_X], dim=-1).gather(-1, targets_n1[far_X])[:, 0]
    return losses_n


# ---------------------------------------------------------------- KL as core has it


@dataclass(frozen=True)
class _Clean:
    """The clean model's distribution for some rows: p, and Σ p ln p."""

    p_nV: Tensor
    negative_entropy_n: Tensor

    def divergence(self, log_q_nV: Tensor) -> Tensor:
        """Σ p (ln p − ln q): infinite where q underflows, NaN where p does, as in core. May overwrite ``log_q_nV``."""
        if log_q_nV.dtype != torch.float32:
            # Sums in 16 bits: in core's own order, or they come out otherwise.
            return (self.p_nV * (self.p_nV.log() - log_q_nV)).sum(dim=-1)
        # Not a matrix product: on the CPU that adds a row of 262,144 entries up one by one, and is 0.001 nats off.
        p_log_q_nV = log_q_nV.mul_(self.p_nV) if len(log_q_nV) == len(self.p_nV) else log_q_nV * self.p_nV
        return self.negative_entropy_n - p_log_q_nV.sum(dim=-1)


class _AsCore(Arithmetic[_Clean]):
    """The logarithm of a softmax, in the model's dtype."""

    def __init__(self) -> None:
        self._q_nV = torch.empty(0)

    def clean(self, logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, _Clean]:
        p_nV = torch.softmax(logits_nV, dim=-1)
        log_p_nV = p_nV.log()
        losses_n = _cross_entropy(logits_nV, log_p_nV, targets_n)
        return losses_n, _Clean(p_nV, log_p_nV.mul_(p_nV).sum(dim=-1))

    def changed(self, logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._q_nV) < len(logits_nV):
            self._q_nV = torch.empty_like(logits_nV)
        log_q_nV = torch.softmax(logits_nV, dim=-1, out=self._q_nV[: len(logits_nV)]).log_()
        return _cross_entropy(logits_nV, log_q_nV, targets_n), log_q_nV

    def divergence(self, clean: _Clean, log_q_nV: Tensor) -> Tensor:
        return clean.divergence(log_q_nV)

    def nbytes(self, kept: _Clean) -> int:
        return kept.p_nV.nbytes


# ---------------------------------------------------------------- activations


class _KeptActivations:
    """Stands in for the model in core's sparsity metrics, which ask it for one hook's activations alone."""

    def __init__(self, runs: _HookRuns):
        self._runs = runs

    def run_with_cache(self, tokens_BL: Tensor, **options: Any) -> tuple[None, dict[str, Tensor]]:
        """As HookedTransformer's; gives no output, which core does not look at."""
        runs = self._runs
        key = runs.key("activations", tokens_BL)
        kept = runs.cache.get(key, runs.model.cfg.device)
        if kept is None:
            _, activations = runs.model.run_with_cache(tokens_BL, **options)
            kept = {"activation": activations[runs.hook]}
            runs.cache.put(key, kept)
        activation = kept["activation"]
        if not any(name in runs.hook for name in _FLATTENED_BY_CORE):
            activation = activation.flatten(2)
        return None, {runs.hook: activation}
