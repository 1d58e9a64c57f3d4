"""A language model of transformers to which TransformerLens has no bridge: hooks around its layers, named as there.

Known are the residual stream before and after each decoder layer, and what the unembedding gets; nothing inside a
layer. That is enough to harvest, to splice and to probe.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ksvd_sae.errors import ConfigError

# (activation, the hook's name) to what takes its place; None leaves it.
Hook: TypeAlias = Callable[[Tensor, str], Tensor | None]
_LEFT_OUT = "a TransformerBridge, if a newer TransformerLens has one; or another model"
_UNEMBEDDED = "unembed.hook_in"
# In float32 a row does not depend on how many others are read; in 16 bits rounding does.
_SAME, _SAME_16_BITS = 1e-4, 3e-2


class _StopError(Exception):
    """Ends a run behind a layer."""


class LayerModel(nn.Module):
    """What harvests, splicing and probes use of a TransformerLens model, of a causal language model of transformers.

    Hooks: blocks.N.hook_resid_pre, blocks.N.hook_resid_post.

    Args: model: in eval mode, where it is to run. name: for messages.
    Raises: ConfigError: its layers do not hand on the hidden states that it gives itself, or it looks ahead.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        text, head = model.config.get_text_config(), model.get_output_embeddings()
        if head is None:
            raise ConfigError(f"model {name!r} ({type(model).__name__}) has no unembedding", cure=_LEFT_OUT)
        n_layers = text.num_hidden_layers
        self._layers = _layers(model, n_layers, name)
        self._head = [head]
        vocabulary = model.get_input_embeddings().weight
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.cfg = SimpleNamespace(
            model_name=name,
            device=vocabulary.device,
            dtype=vocabulary.dtype,
            d_model=text.hidden_size,
            d_vocab=len(vocabulary),
            d_vocab_out=len(head.weight),
            n_layers=n_layers,
            n_ctx=text.max_position_embeddings,
            positional_embedding_type="rotary",
            default_prepend_bos=begins,
            tokenizer_prepends_bos=begins,
            output_logits_soft_cap=getattr(text, "final_logit_softcapping", None) or -1.0,
            normalization_type=None,
        )
        sides = [f"blocks.{i}.hook_resid_{side}" for i in range(n_layers) for side in ("pre", "post")]
        self.hook_dict = dict.fromkeys([*sides, _UNEMBEDDED])
        self._check()

    @property
    def W_U(self) -> Tensor:
        weight: Tensor = self._head[0].weight
        return weight.T

    @property
    def b_U(self) -> Tensor:
        bias: Tensor | None = self._head[0].bias
        return self.W_U.new_zeros(self.cfg.d_vocab_out) if bias is None else bias

    def forward(self, tokens_BL: Tensor, return_type: str | None = "logits") -> Tensor | None:
        logits_BLV: Tensor = self.model(tokens_BL.to(self.cfg.device), use_cache=False).logits
        return None if return_type is None else logits_BLV

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str, Hook]] = ()) -> Iterator["LayerModel"]:
        """Inside, each function gets the activation at its hook, and may change it."""
        with ExitStack() as stack:
            for name, call in fwd_hooks:
                stack.callback(self._hooked(name, call).remove)
            yield self

    def run_with_hooks(
        self,
        tokens_BL: Tensor,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        fwd_hooks: Sequence[tuple[str, Hook]] = (),
    ) -> Tensor | None:
        """As ``forward``, with hooks. Args: stop_at_layer: the first that is not run; nothing is returned then."""
        if stop_at_layer is None:
            with self.hooks(fwd_hooks):
                return self(tokens_BL, return_type)

        def stop(activation: Tensor, hook: str) -> None:
            raise _StopError

        try:
            with self.hooks([*fwd_hooks, (f"blocks.{stop_at_layer - 1}.hook_resid_post", stop)]):
                self(tokens_BL, None)
        except _StopError:
            pass
        return None

    def reset_hooks(self) -> None:
        """There are none outside ``hooks``."""

    def _hooked(self, name: str, call: Hook) -> Any:
        if name == _UNEMBEDDED:
            module, before = self._head[0], True
        else:
            _, layer, side = name.split(".")
            module, before = self._layers[int(layer)], side == "hook_resid_pre"

        def enter(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
            changed = call(positional[0] if positional else named["hidden_states"], name)
            if changed is None:
                return None
            return ((changed, *positional[1:]), named) if positional else ((), {**named, "hidden_states": changed})

        # Before transformers 5 a layer gives a tuple.
        def leave(_: Any, __: Any, given: Any) -> Any:
            is_tuple = isinstance(given, tuple)
            changed = call(given[0] if is_tuple else given, name)
            return (changed, *given[1:]) if is_tuple and changed is not None else changed

        if before:
            return module.register_forward_pre_hook(enter, with_kwargs=True)
        return module.register_forward_hook(leave)

    @torch.no_grad()
    def _check(self) -> None:
        """Compare with what the model says itself of its hidden states, and with a shorter context."""
        tokens_BL = torch.arange(min(6, self.cfg.d_vocab), device=self.cfg.device)[None]
        found: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: str) -> None:
            found[hook] = activation.clone()

        names = [name for name in self.hook_dict if name != _UNEMBEDDED]
        with self.hooks([(name, keep) for name in names]):
            whole = self.model(tokens_BL, use_cache=False, output_hidden_states=True)
        for layer in range(self.cfg.n_layers):
            # The last of them has gone through the final norm.
            given = {"pre": whole.hidden_states[layer]}
            given |= {"post": whole.hidden_states[layer + 1]} if layer + 1 < self.cfg.n_layers else {}
            for side, wanted_BLD in given.items():
                if not torch.equal(found[f"blocks.{layer}.hook_resid_{side}"], wanted_BLD):
                    raise ConfigError(
                        f"model {self.cfg.model_name!r} ({type(self.model).__name__}): layer {layer} does not hand on "
                        "the hidden states that the model gives",
                        cause="layers that are called in another order, or more than one residual stream",
                        cure=_LEFT_OUT,
                    )
        shorter_LV = self.model(tokens_BL[:, :-1], use_cache=False).logits[0].float()
        logits_LV = whole.logits[0, :-1].float()
        bound = _SAME if self.cfg.dtype == torch.float32 else _SAME_16_BITS
        if float((shorter_LV - logits_LV).abs().max()) > bound * float(logits_LV.abs().max()):
            raise ConfigError(
                f"model {self.cfg.model_name!r} ({type(self.model).__name__}): a token changes what is predicted from "
                "those before it",
                cause="no causal language model: it looks ahead",
                cure=_LEFT_OUT,
            )


def _layers(model: Any, n_layers: int, name: str) -> nn.ModuleList:
    """The decoder's list of layers: the only one with as many."""
    found = [one for one in model.base_model.children() if isinstance(one, nn.ModuleList) and len(one) == n_layers]
    if len(found) != 1:
        raise ConfigError(
            f"model {name!r} ({type(model).__name__}): its decoder layers are not found",
            got=f"{len(found)} lists of {n_layers} layers",
            limit="one",
            cure=_LEFT_OUT,
        )
    return found[0]
