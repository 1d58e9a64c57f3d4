"""SAEBench's core on a panel, the language model's part done once: same numbers, a fraction of the work.

For every SAE, core runs the model as it is, with the hook zeroed, and spliced, takes the softmax of all the logits that
two KL divergences need, and reads the hook's activations from more text. All but the spliced run is the same for every
SAE of a model and hook. Here it is done for the first and kept (``TensorCache``); another SAE costs the layers after
the hook, one product with the unembedding and one softmax.

Notation: B contexts, L positions, D model dimensions, V vocabulary, n rows of a chunk.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from sae_bench.evals.core import main as core
from torch import Tensor

from ksvd_sae.evals.llm_cache import TensorCache, model_fingerprint, tokens_hash
from ksvd_sae.evals.runs_from_hook import RunsFromHook, Started
from ksvd_sae.store import content_hash

logger = logging.getLogger(__name__)
# Logits made at a time: 268 MB in float32.
_LOGITS_AT_ONCE = 2**26
# Nats: e^-60 is far above where float32 loses digits (e^-87).
_EXACT_UP_TO = 60.0
# Hooks whose activations core flattens before an SAE sees them.
_WITH_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z")


@contextmanager
def shared_core_runs(cache: TensorCache, memory_bytes: int) -> Iterator[None]:
    """Let core share the model's runs between the SAEs that it is given.

    SAEBench evaluates each SAE as if it were the only one. Its functions stay; two of them get what they ask of the
    model from here. An SAE on a single head of a hook goes SAEBench's own way.

    Args: cache: for what the model gave.  memory_bytes: for probabilities of the model as it is, which are too large
        for a disk (a gigabyte for 1,000 tokens of Gemma); what does not fit is computed again for each SAE.
    """
    shared = _SharedRuns(cache, memory_bytes)
    loss, sparsity = core.get_recons_loss, core.get_sparsity_and_variance_metrics

    def recons_loss(sae: Any, model: Any, batch_tokens: Tensor, *rest: Any, **options: Any) -> dict[str, Any]:
        if sae.cfg.hook_head_index is not None or options.get("model_kwargs"):
            return loss(sae, model, batch_tokens, *rest, **options)
        return shared.of(model, sae.cfg.hook_name).recons_loss(sae, batch_tokens, *rest, **options)

    def sparsity_metrics(sae: Any, model: Any, *rest: Any, **options: Any) -> Any:
        if options.get("model_kwargs"):
            return sparsity(sae, model, *rest, **options)
        return sparsity(sae, _KeptActivations(shared.of(model, sae.cfg.hook_name)), *rest, **options)

    core.get_recons_loss, core.get_sparsity_and_variance_metrics = recons_loss, sparsity_metrics
    try:
        yield
    finally:
        core.get_recons_loss, core.get_sparsity_and_variance_metrics = loss, sparsity


@dataclass
class _SharedRuns:
    """The runs of each model and hook."""

    cache: TensorCache
    memory_bytes: int
    _of: dict[tuple[int, str], "_HookRuns"] = field(default_factory=dict)

    def of(self, model: Any, hook: str) -> "_HookRuns":
        key = (id(model), hook)
        if key not in self._of:
            # One model at a time: SAEBench has dropped the one before.
            self._of = {key: _HookRuns(model, hook, self.cache, self.memory_bytes)}
        return self._of[key]


class _HookRuns:
    """What one model gives around one hook."""

    def __init__(self, model: Any, hook: str, cache: TensorCache, memory_bytes: int):
        self.model, self.hook, self.cache = model, hook, cache
        self.runs = RunsFromHook(model, hook)
        self._clean_distributions = _CleanDistributions(memory_bytes)
        self._space = _Space()

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self.model)

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
        started = Started(batch_tokens, clean.get("start_BLD"), self._options(batch_tokens))
        final_BLD = self.runs.again(started, partial(_replaced, sae, kept_BL))
        ce_BL, kl_BL = self._losses(final_BLD, clean["final_BLD"], batch_tokens)
        found: dict[str, Tensor] = {}
        if compute_kl:
            found |= {"kl_div_with_sae": kl_BL, "kl_div_with_ablation": clean["kl_ablated_BL"]}
        if compute_ce_loss:
            found |= {"ce_loss_with_sae": ce_BL, "ce_loss_without_sae": clean["ce_BL"]}
            found |= {"ce_loss_with_ablation": clean["ce_ablated_BL"]}
        return found

    def _clean(self, tokens_BL: Tensor) -> dict[str, Tensor]:
        """The run as it is and with zeros: where others start, what the unembedding got, and what was lost."""
        key = self.key("clean and zeroed run, divergences added up in pairs", tokens_BL)
        if (kept := self.cache.get(key, self.model.cfg.device)) is not None:
            return kept
        started, _, final_BLD = self.runs.first(tokens_BL)
        zeroed_BLD = self.runs.again(started, torch.zeros_like)
        ce_BL, _ = self._losses(final_BLD, final_BLD, tokens_BL)
        ce_ablated_BL, kl_ablated_BL = self._losses(zeroed_BLD, final_BLD, tokens_BL)
        found = {"final_BLD": final_BLD, "ce_BL": ce_BL, "ce_ablated_BL": ce_ablated_BL, "kl_ablated_BL": kl_ablated_BL}
        if started.start_BLD is not None:
            found["start_BLD"] = started.start_BLD
        self.cache.put(key, found)
        return found

    def _options(self, tokens_BL: Tensor) -> dict[str, Any]:
        _, _, shortformer, mask = self.model.input_to_embed(tokens_BL)
        return {"shortformer_pos_embed": shortformer, "attention_mask": mask}

    def _losses(self, final_BLD: Tensor, clean_BLD: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L−1) −ln p(next token) and (B, L) KL(clean ‖ this), chunk by chunk; the clean run itself may be given."""
        n_contexts, n_positions = tokens_BL.shape
        targets_N, name = tokens_BL.roll(-1, dims=1).flatten(), tokens_hash(tokens_BL)
        step = max(1, _LOGITS_AT_ONCE // self.model.cfg.d_vocab_out)
        rows_ND, clean_ND = final_BLD.flatten(0, 1), clean_BLD.flatten(0, 1)
        losses, divergences = [], []
        for start in range(0, len(rows_ND), step):
            part, kept_as = slice(start, start + step), f"{name}-{start}"
            logits_nV = self._logits(_one_if_equal(rows_ND[part]))
            p_nV = torch.softmax(logits_nV, dim=-1, out=self._space.like(logits_nV, "p"))
            # The clean distribution is kept as it is; another one is needed for its logarithm alone.
            log_q_nV = p_nV.log() if final_BLD is clean_BLD else p_nV.log_()
            losses.append(_cross_entropy(logits_nV, log_q_nV, targets_N[part]))
            if final_BLD is clean_BLD:
                self._clean_distributions.keep(kept_as, p_nV, log_q_nV)
                divergences.append(torch.zeros_like(losses[-1]))
                continue
            clean = self._clean_distributions.of(kept_as, partial(self._logits, clean_ND[part]))
            divergences.append(clean.divergence(log_q_nV))
        ce_BL = torch.cat(losses).reshape(n_contexts, n_positions)[:, :-1]
        return ce_BL, torch.cat(divergences).reshape(n_contexts, n_positions)

    def _logits(self, rows_nD: Tensor) -> Tensor:
        """What the model's forward makes of what the unembedding gets; in memory that the next call overwrites."""
        model, cap = self.model, self.model.cfg.output_logits_soft_cap
        out_nV = self._space.of("logits", len(rows_nD), model.W_U)
        # Not model.unembed: it makes W_Uᵀ contiguous at every call, which for some layouts copies the whole matrix.
        logits_nV = torch.addmm(model.b_U, rows_nD, model.W_U, out=out_nV)
        return logits_nV.div_(cap).tanh_().mul_(cap) if cap > 0.0 else logits_nV


class _Space:
    """Memory for logits, used again and again: 268 MB fresh from the system cost as much as a softmax of them."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, n: int, weight_DV: Tensor) -> Tensor:
        """(n, V), not initialized, of the weight's kind."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < n or kept.dtype != weight_DV.dtype:
            kept = self._kept[name] = weight_DV.new_empty(n, weight_DV.shape[1])
        return kept[:n]

    def like(self, logits_nV: Tensor, name: str) -> Tensor:
        return self.of(name, len(logits_nV), logits_nV)


def _one_if_equal(rows_nD: Tensor) -> Tensor:
    """One row if all are equal, as behind zeros in a model without biases: it has one distribution."""
    # In 16 bits a product of one row is rounded otherwise than one of many.
    if rows_nD.dtype == torch.float32 and bool((rows_nD == rows_nD[0]).all()):
        return rows_nD[:1]
    return rows_nD


def _replaced(sae: Any, kept_BL: Tensor, activation: Tensor) -> Tensor:
    """The reconstruction where a token is to be replaced, as core's hooks put it in."""
    heads = any(name in sae.cfg.hook_name for name in _WITH_HEADS)
    rows = activation.to(sae.device)
    rebuilt = sae.decode(sae.encode(rows.flatten(-2, -1) if heads else rows)).to(rows.dtype).reshape(rows.shape)
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


class _CleanDistributions:
    """Of the model as it is, as many as fit into memory."""

    def __init__(self, memory_bytes: int):
        self._left = memory_bytes
        self._kept: dict[str, _Clean] = {}

    def of(self, name: str, logits: Callable[[], Tensor]) -> _Clean:
        if name in self._kept:
            return self._kept[name]
        p_nV = torch.softmax(logits(), dim=-1)
        return self.keep(name, p_nV, p_nV.log(), own=True)

    def keep(self, name: str, p_nV: Tensor, log_p_nV: Tensor, own: bool = False) -> _Clean:
        """Keep a distribution if there is room. ``log_p_nV`` is overwritten; ``own``: p is nobody else's memory."""
        room = p_nV.nbytes <= self._left
        clean = _Clean(p_nV.clone() if room and not own else p_nV, log_p_nV.mul_(p_nV).sum(dim=-1))
        if room:
            self._left -= p_nV.nbytes
            self._kept[name] = clean
        return clean


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
            _, found = runs.model.run_with_cache(tokens_BL, **options)
            kept = {"activation": found[runs.hook]}
            runs.cache.put(key, kept)
        return None, {runs.hook: kept["activation"]}
