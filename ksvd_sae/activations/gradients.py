"""What the model reads of its activations: second moments of the loss's gradient at the hook.

An error δ in one token's activation changes the loss by about g·δ, g = ∂loss/∂activation, so by (g·δ)² = δᵀ(g gᵀ)δ
when squared. The mean of g gᵀ over tokens (the empirical Fisher matrix of the activation) therefore says which
directions the model reads, in nats² per squared unit of activation.

The moments lie inside the harvest's folder, under a key of their own: asking for them, or for more of them, does
not collect the activations again.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ksvd_sae.activations.documents import Document
from ksvd_sae.activations.language import ActivationReader, check_tokens
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.splicing import Unembedding, before_unembedding, check_changes
from ksvd_sae.activations.text import contexts
from ksvd_sae.errors import ActivationError, HookError, ManifestError, ShapeError, ShardError, TextError
from ksvd_sae.progress import Advance, progress
from ksvd_sae.store import MANIFEST, atomic_path, content_hash, file_sha256, read_manifest, sole_writer, write_manifest
from ksvd_sae.strict import Strict

if TYPE_CHECKING:
    from ksvd_sae.activations.language import AnyModel

logger = logging.getLogger(__name__)
STAGE = "gradients"
GRADIENTS_FILE = "gradients.safetensors"
# 134 MB in float32. Gemma's vocabulary has 262,144 tokens: the logits of 4 contexts of 128 tokens would be four times
# that, and the loss and its gradient need several copies.
GRADIENT_LOGITS_AT_ONCE = 2**25


class GradientConfig(Strict):
    """How much of the loss's gradient is collected."""

    context_tokens: int = Field(128, ge=2)
    gradient_tokens: int = Field(
        0, ge=0, description="tokens to collect the moments of the loss's gradient from; 0 collects none"
    )
    gradient_batch_contexts: int = Field(4, ge=1)


# What of it says nothing about activations.
GRADIENT_SETTINGS = {"gradient_tokens", "gradient_batch_contexts"}


@dataclass(frozen=True)
class GradientMoments:
    """Second moments of g, the gradient of a context's summed next-token loss (nats) in the raw activation of a token.

    Attributes:
        n_tokens: tokens counted.
        outer_DD: mean over tokens of g gᵀ (float64).
    """

    n_tokens: int
    outer_DD: Tensor

    @property
    def square_D(self) -> Tensor:
        """Mean over tokens of g², one number a dimension."""
        return self.outer_DD.diagonal()

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            save_file({"outer": self.outer_DD.contiguous(), "n_tokens": torch.tensor(self.n_tokens)}, temporary)

    @classmethod
    def load(cls, path: Path) -> "GradientMoments":
        """Raises: ShardError if the file is missing, truncated or another's."""
        try:
            tensors = load_file(path)
            return cls(int(tensors["n_tokens"]), tensors["outer"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ShardError(
                f"reading gradient moments {path}: {error!r}",
                cause="missing, truncated, or another file",
                cure=f"delete {path.parent} and run `ksvd-sae harvest` again",
            ) from error


# ---------------------------------------------------------------- gradients of a batch


@torch.enable_grad()
def read_gradients(reader: ActivationReader, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and gradients, (n, d_in) float32 each (float64 if the model is), of the tokens that are kept.

    The rows are the ones that ``reader.read`` gives. The loss is the sum of −ln p over the targets of each context that
    are not special. A token's gradient counts what it does to the tokens after it too; the last token of a
    context, after which nothing is predicted, has gradient 0.

    Raises: ShapeError (no contexts of ids that the model has), HookError if the hook does not give one row a token,
        the loss does not depend on it or ``check_changes`` refuses it, ActivationError on NaN or infinity.
    Numerics: forward and backward pass in the model's dtype, the loss from the logits on in float32 at least.
    Cost: the graph starts at the hook and has no parameters in it; logits are made a chunk of tokens at a time.
    """
    model = reader.model
    check_changes(model, reader.hook)
    check_tokens(model, tokens_BL, "gradients")
    tokens_BL = tokens_BL.to(model.cfg.device)
    leaves: list[Tensor] = []

    def start_graph(activation: Tensor, hook: Any) -> Tensor:
        leaves.append(activation.detach().requires_grad_())
        return leaves[-1]

    with frozen(model):
        with model.hooks(fwd_hooks=[(reader.hook, start_graph)]):
            final_BLD = before_unembedding(model, tokens_BL)
        reader.check_rows(leaves, tokens_BL)
        predicted_BL = reader.ordinary(tokens_BL)[:, 1:]
        targets_N = tokens_BL[:, 1:][predicted_BL]
        pull_BLD = torch.zeros_like(final_BLD)
        final_ND = final_BLD.detach()[:, :-1][predicted_BL]
        pull_BLD[:, :-1][predicted_BL] = Unembedding(model).loss_gradient(final_ND, targets_N, GRADIENT_LOGITS_AT_ONCE)
        gradient = None
        if final_BLD.requires_grad:
            (gradient,) = torch.autograd.grad(final_BLD, leaves[0], pull_BLD, allow_unused=True)
    if gradient is None:
        raise HookError(
            f"hook {reader.hook!r}: the loss does not depend on what it gives",
            cause="nothing after it uses the activation, or another hook on the model replaces or detaches it",
            cure="use a hook of the residual stream, an MLP or attention output; remove other hooks from the model",
        )
    wide = torch.promote_types(gradient.dtype, torch.float32)
    x_ND, g_ND = (t.detach().flatten(2)[reader.kept(tokens_BL)].to(wide) for t in (leaves[0], gradient))
    n_broken = int((~torch.isfinite(g_ND).all(dim=1)).sum())
    if n_broken:
        raise ActivationError(
            f"gradients: {n_broken} of {len(g_ND)} gradients at {reader.hook} hold NaN or infinity",
            cause=f"overflow in {model.cfg.dtype}, or broken weights",
            cure="set model.dtype to bfloat16 or float32",
        )
    return x_ND, g_ND


@contextmanager
def frozen(model: "AnyModel") -> Iterator[None]:
    """No parameter requires a gradient meanwhile: autograd then records nothing before the hook."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


# ---------------------------------------------------------------- moments


def collect_gradient_moments(
    reader: ActivationReader,
    stream: Iterator[Tensor],
    n_tokens: int,
    batch_contexts: int,
    *,
    norm_limit: float = float("inf"),
    advance: Advance | None = None,
) -> GradientMoments:
    """Moments over whole batches of contexts until ``n_tokens`` are counted.

    Args:
        stream: contexts of equal length.
        norm_limit: tokens whose activation has a larger norm are left out, as the harvest leaves out outliers; their
            loss counts all the same.
    Raises: TextError if the stream ends before, HookError, ActivationError (see ``read_gradients``).
    Numerics: products and sums in float64. Cost: a forward and a backward pass, D² a token.
    """
    if n_tokens < 1 or batch_contexts < 1:
        raise ShapeError(
            "gradients: n_tokens and batch_contexts must be at least 1", got=f"{n_tokens} and {batch_contexts}"
        )
    sum_DD: Tensor | None = None
    counted = 0
    while counted < n_tokens:
        batch = list(islice(stream, batch_contexts))
        if not batch:
            raise TextError(
                f"gradients: the text ended before {n_tokens:,} tokens",
                got=f"{counted:,} tokens",
                cure="ask for fewer tokens (harvest.gradient_tokens) or give more text",
            )
        x_ND, g_ND = read_gradients(reader, torch.stack(batch))
        g_ND = g_ND[torch.linalg.vector_norm(x_ND, dim=1) <= norm_limit].double()
        outer_DD = g_ND.T @ g_ND
        sum_DD = outer_DD if sum_DD is None else sum_DD.add_(outer_DD)
        counted += len(g_ND)
        if advance is not None:
            advance(len(g_ND))
    assert sum_DD is not None
    return GradientMoments(counted, (sum_DD / counted).cpu())


# ---------------------------------------------------------------- beside the activations


def gradients_key(harvest_hash: str, config: GradientConfig) -> dict[str, Any]:
    """Everything that the moments follow from; the harvest's hash stands for model, hook, text, seed and contexts."""
    return {"harvest": harvest_hash, **config.model_dump(mode="json", include=GRADIENT_SETTINGS)}


def gradients_folder(harvest: Path, key: dict[str, Any]) -> Path:
    return harvest / f"gradients-{content_hash(key)}"


def run_gradients(
    config: GradientConfig,
    shards: ActivationShards,
    reader: Callable[[], ActivationReader],
    training_texts: Callable[[], Iterator[Document]],
) -> GradientMoments:
    """Collect the moments that ``config`` asks for beside finished activations, or reuse the finished ones there.

    Args:
        training_texts: called once the reader is loaded; the moments are of their first contexts.
    Raises: see ``collect_gradient_moments``; ManifestError, ShardError (what is there was altered).
    """
    key = gradients_key(shards.manifest["hash"], config)
    folder = gradients_folder(shards.folder, key)
    if (folder / MANIFEST).exists():
        logger.info("gradients: reusing %s", folder)
        return open_gradients(shards.folder, key)
    with sole_writer(shards.folder, "gradients"):
        # Another process may have finished them meanwhile.
        if not (folder / MANIFEST).exists():
            _collect(config, shards, key, reader(), training_texts)
    return open_gradients(shards.folder, key)


def _collect(
    config: GradientConfig,
    shards: ActivationShards,
    key: dict[str, Any],
    loaded: ActivationReader,
    training_texts: Callable[[], Iterator[Document]],
) -> None:
    folder, limit = gradients_folder(shards.folder, key), shards.manifest["statistics"]["outlier_limit"]
    started = time.perf_counter()
    with progress("gradients", config.gradient_tokens, "tokens") as advance:
        moments = collect_gradient_moments(
            loaded,
            contexts(
                training_texts(),
                loaded.model.tokenizer,
                config.context_tokens,
                loaded.model.cfg.d_vocab,
                prepend_bos=shards.prepend_bos,
            ),
            config.gradient_tokens,
            config.gradient_batch_contexts,
            norm_limit=float("inf") if limit is None else limit,
            advance=advance,
        )
    moments.save(folder / GRADIENTS_FILE)
    write_manifest(
        folder,
        STAGE,
        key,
        n_tokens=moments.n_tokens,
        d_in=len(moments.outer_DD),
        sha256=file_sha256(folder / GRADIENTS_FILE),
        seconds=round(time.perf_counter() - started, 1),
    )


def open_gradients(harvest: Path, key: dict[str, Any]) -> GradientMoments:
    """The finished moments of a harvest.

    Args: key: see ``gradients_key``.
    Raises: ManifestError (none were collected), ShardError (the file is missing or was altered).
    """
    folder = gradients_folder(harvest, key)
    if not (folder / MANIFEST).exists():
        raise ManifestError(
            f"reading gradient moments of {harvest}: none were collected",
            got=f"harvest.gradient_tokens = {key['gradient_tokens']}",
            cure="set harvest.gradient_tokens (e.g. 16384) and run `ksvd-sae harvest CONFIG.yaml`; "
            "activations that are there are kept",
        )
    manifest, path = read_manifest(folder, STAGE, key), folder / GRADIENTS_FILE
    if path.exists() and file_sha256(path) != manifest["sha256"]:
        raise ShardError(
            f"reading gradient moments {path}: its checksum is not the manifest's",
            cause="the file was truncated or altered after the harvest",
            cure=f"delete {folder} and run `ksvd-sae harvest` again",
        )
    return GradientMoments.load(path)
