"""A language model's run that starts again at a hook: what comes before it is computed once for all dictionaries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksvd_sae.activations.language import hook_layer

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


@dataclass(frozen=True)
class Started:
    """Where the run of some contexts starts again.

    start_BLD: residual stream at that layer; None: the run starts from the tokens.
    options: what the model's forward is to be told besides.
    """

    tokens_BL: Tensor
    start_BLD: Tensor | None
    options: dict[str, Any]


class RunsFromHook:
    """Runs of one model that differ only in the activation at one hook.

    From a hook of the residual stream the run goes on with the next layer, from another inside a block with that block,
    from the embedding at the start.
    """

    def __init__(self, model: "HookedTransformer", hook: str):
        self.model, self.hook = model, hook
        self._layer, self._direct = _resume(hook, model.cfg.n_layers)

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
            embedded_BLD, _, shortformer, mask = model.input_to_embed(tokens_BL)
            options = {"shortformer_pos_embed": shortformer, "attention_mask": mask}
            start_BLD = embedded_BLD
            if self._layer is not None:
                start_BLD = model(embedded_BLD, start_at_layer=0, stop_at_layer=self._layer, **options)
            final_BLD = self._finish(start_BLD, options)
        started = Started(tokens_BL, None if self._layer is None else start_BLD, options)
        return started, kept[0] if kept else None, final_BLD

    @torch.no_grad()
    def again(self, started: Started, change: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, L, d_model) that the unembedding gets when the hook's activation is changed."""
        if self._direct:
            assert started.start_BLD is not None
            return self._finish(change(started.start_BLD), started.options)
        with self.model.hooks(fwd_hooks=[(self.hook, lambda activation, hook: change(activation))]):
            start_BLD = started.start_BLD
            if start_BLD is None:
                start_BLD = self.model.input_to_embed(started.tokens_BL)[0]
            return self._finish(start_BLD, started.options)

    def _finish(self, start_BLD: Tensor, options: dict[str, Any]) -> Tensor:
        """From a layer to what the unembedding gets."""
        n_layers = self.model.cfg.n_layers
        first = 0 if self._layer is None else self._layer
        final_BLD: Tensor = self.model(start_BLD, start_at_layer=first, stop_at_layer=n_layers, **options)
        return final_BLD if self.model.cfg.normalization_type is None else self.model.ln_final(final_BLD)


def _resume(hook: str, n_layers: int) -> tuple[int | None, bool]:
    """The layer that a spliced run starts at (None: the embedding), and whether its input is what the hook gives."""
    layer = hook_layer(hook)
    if layer is None:
        return (n_layers if hook.startswith("ln_final.") else None), False
    if hook == f"blocks.{layer}.hook_resid_post":
        return layer + 1, True
    return layer, hook == f"blocks.{layer}.hook_resid_pre"
