"""A language model and one hook in it: tokens in, activations of the non-special tokens out."""

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from ksvd_sae.activations.layers import LayerModel
from ksvd_sae.activations.transformers_5 import loadable
from ksvd_sae.activations.weights import (
    OwnWeights,
    architecture_of,
    as_weights,
    config_of,
    find_weights,
    has_bridge,
    has_layers,
    hub_layers,
    weights_name,
)
from ksvd_sae.errors import ActivationError, ConfigError, HookError, HubError, ShapeError
from ksvd_sae.offline import gemma
from ksvd_sae.strict import Strict

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    AnyModel: TypeAlias = HookedTransformer | TransformerBridge

logger = logging.getLogger(__name__)
Dtype = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Strict):
    """The language model and the place in it."""

    name: str = Field(
        description="a TransformerLens model name, or a Hub repository; beside weights, of their architecture"
    )
    hook: str = Field(description="any TransformerLens hook name, e.g. blocks.8.hook_resid_post")
    source: Literal["hub", "offline"] = Field("hub", description="offline: assembled from Python packages")
    dtype: Dtype = "float32"
    weights: str | None = Field(
        None, description="a folder or Hub repository with weights of one's own; null: those that the name stands for"
    )
    revision: str | None = Field(None, description="of weights on the Hub: commit, branch or tag; null: the newest")

    @model_validator(mode="after")
    def _of_weights(self) -> "ModelConfig":
        if self.revision is not None and self.weights is None:
            raise ValueError("model.revision goes with model.weights: give the repository there")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialised: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that came later are there only where they are given: what was made without them is found again."""
        later = ("weights", "revision")
        return {key: value for key, value in serialised(self).items() if value is not None or key not in later}

    @property
    def title(self) -> str:
        """The model as reports name it."""
        if self.weights is None:
            return self.name
        at = f" at {self.revision}" if self.revision else ""
        return f"{self.name} with weights of {weights_name(self.weights)}{at}"

    def own_weights(self) -> OwnWeights | None:
        """The weights beside the name, if there are any. Raises: as ``find_weights``."""
        return None if self.weights is None else find_weights(self.weights, self.revision)

    def prepare(self) -> None:
        """Make the model findable. Comes before anything that imports the Hub libraries.

        Raises: ConfigError: no such offline model; else as ``prepare_gemma``.
        """
        if self.source == "hub":
            return
        if self.name != gemma.MODEL_NAME:
            raise ConfigError(
                f"model.source offline has no model {self.name!r}",
                limit=gemma.MODEL_NAME,
                cure=f"set model.name to {gemma.MODEL_NAME} or model.source to hub",
            )
        gemma.prepare_gemma()

    def content_hash(self) -> str | None:
        """Of the weights, where they are known before they are loaded."""
        own = self.own_weights()
        if own is not None:
            return own.content
        return gemma.GGUF_SHA256 if self.source == "offline" else None


def load_model(config: ModelConfig, device: torch.device) -> "AnyModel":
    """The model as SAEBench loads it: no folding, no centring.

    Raises: HubError: a name that neither TransformerLens nor the Hub knows (with the nearest), or weights that are
        neither in the cache nor reachable. ConfigError: weights that are not of the name's architecture.
    """
    own = config.own_weights()
    if own is None and not has_hooked(config.name):
        check_bridgeable(config.name)
    from transformer_lens import HookedTransformer

    load = HookedTransformer.from_pretrained_no_processing
    try:
        with loadable():
            model = load_as(load, own, config.name, device=str(device), dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise HubError(
            f"loading model {config.name!r}: {str(error).splitlines()[0][:300]}",
            cause="no network and no copy in the Hub cache, or a gated model without `hf auth login`",
            cure="check with `ksvd-sae doctor`; accept the model's terms on its Hub page; or use model.source: offline",
        ) from error
    return model.eval()


def load_as(load: "Callable[..., HookedTransformer]", own: OwnWeights | None, name: str, **options: Any) -> "AnyModel":
    """What ``load``, TransformerLens' from_pretrained, makes of a name or of weights beside it; of a name that it does
    not know, a bridge to the model of transformers; where it has none, hooks around its layers. Raises: as they do."""
    try:
        return load(name, **options) if own is None else own.hooked(load, name, **options)
    # Of a name that it does not know; it looks there before it loads anything.
    except ValueError:
        if has_hooked(name):
            raise
    if _layers_alone(name, own):
        logger.info("TransformerLens has neither a model named %r nor a bridge to it: hooks around its layers", name)
        return hub_layers(name, **options) if own is None else own.layered(**options)
    from transformer_lens.model_bridge import TransformerBridge

    logger.info("TransformerLens has no model of its own named %r: a bridge to that of transformers", name)
    if own is None:
        return TransformerBridge.boot_transformers(name, **options)
    return own.bridged(TransformerBridge.boot_transformers, **options)


def layers_alone(config: ModelConfig) -> bool:
    """Whether of this model nothing but the residual stream between its layers is known. No weights are loaded."""
    return not has_hooked(config.name) and _layers_alone(config.name, config.own_weights())


def _layers_alone(name: str, own: OwnWeights | None) -> bool:
    architecture = architecture_of(config_of(name if own is None else str(own.folder)))
    return not has_bridge(architecture) and has_layers(architecture)


def has_hooked(name: str) -> bool:
    """Whether TransformerLens has a model of its own by this name."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        get_official_model_name(name)
    except ValueError:
        return False
    return True


def check_bridgeable(name: str) -> None:
    """Raise HubError for a name that is no repository of a causal language model of TransformerLens or transformers.

    Before any weights are downloaded.
    """
    from transformer_lens.supported_models import MODEL_ALIASES

    config = config_of(name)
    # A folder goes beside a name, and by its content: what is in it may change.
    architecture = architecture_of(config)
    if not Path(name).expanduser().is_dir() and (has_bridge(architecture) or has_layers(architecture)):
        return
    known = [*MODEL_ALIASES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    cure = f"did you mean {' or '.join(map(repr, near))}?" if near else "see TransformerLens' model table"
    raise HubError(f"model {name!r}: TransformerLens does not know this name", cure=as_weights(name, config) or cure)


def is_bridge(model: Any) -> bool:
    """Whether this is a bridge to a model of transformers, TransformerLens' or ours, and not TransformerLens' own."""
    from transformer_lens.model_bridge import TransformerBridge

    return isinstance(model, TransformerBridge | LayerModel)


def hook_layer(hook: str) -> int | None:
    """The block that a hook name lies in, None for hooks outside the blocks."""
    block = re.match(r"blocks\.(\d+)\.", hook)
    return int(block.group(1)) if block else None


# TransformerLens' hooks between a block's projections and its attention, and back.
_HEADS = re.compile(r"hook_(rot_)?[qk]|hook_[vz]|hook_result|hook_[qkv]_input|hook_attn_in")


def has_heads(hook: str) -> bool:
    """Whether activations at a hook have heads: (B, L, heads, d_head). Harvests and evals flatten them."""
    return _HEADS.fullmatch(hook.rpartition(".")[2]) is not None


def check_hook(model: "AnyModel", hook: str) -> None:
    """Raise HookError for a hook name that the model lacks, with the nearest that it has; or one that is off."""
    if hook in model.hook_dict:
        if is_bridge(model):
            _check_on(model, hook)
        return
    near = difflib.get_close_matches(hook, list(model.hook_dict), n=3, cutoff=0.3)
    raise HookError(
        f"model {model.cfg.model_name!r} has no hook {hook!r}",
        limit=f"blocks.0 to blocks.{model.cfg.n_layers - 1}",
        cure=f"did you mean {' or '.join(map(repr, near))}?",
    )


def _check_on(model: "AnyModel", hook: str) -> None:
    """Of hooks that a setting switches on, a bridge says so where they are used."""
    try:
        with model.hooks(fwd_hooks=[(hook, lambda activation, hook: None)]):
            pass
    except ValueError as error:
        cure = "switch it on, or use a hook of the residual stream, an MLP or attention output"
        raise HookError(f"hook {hook!r} is switched off: {error}", cure=cure) from error


def check_contexts(model: "AnyModel", lengths: Mapping[str, int]) -> None:
    """Raise ConfigError for contexts that are longer than what the model reads.

    Learned positions end there with an error of torch's; rotary ones go on, to where the model was never trained.

    Args: lengths: tokens of a context, by the key of the config that says so.
    """
    limit = model.cfg.n_ctx
    for key, tokens in lengths.items():
        if tokens > limit:
            rotary = model.cfg.positional_embedding_type == "rotary"
            raise ConfigError(
                f"{key}: contexts are longer than model {model.cfg.model_name!r} reads",
                got=f"{tokens} tokens",
                limit=f"{limit} tokens",
                cause="it was not trained on positions beyond" if rotary else "it has no embedding of positions beyond",
                cure=f"set {key} to {limit} or less",
            )


def check_tokens(model: "AnyModel", tokens_BL: Tensor, what: str, least: int = 1) -> None:
    """Raise ShapeError for what is no contexts of the model's token ids.

    Args: least: tokens of a context.
    """
    if tokens_BL.ndim != 2 or not len(tokens_BL) or tokens_BL.shape[1] < least or not _whole(tokens_BL):
        raise ShapeError(
            f"{what}: tokens must be contexts of token ids",
            got=f"{tokens_BL.dtype} of shape {tuple(tokens_BL.shape)}",
            limit=f"integers (contexts ≥ 1, tokens ≥ {least})",
        )
    beyond_BL = (tokens_BL < 0) | (tokens_BL >= model.cfg.d_vocab)
    if bool(beyond_BL.any()):
        context, position = beyond_BL.nonzero()[0].tolist()
        raise ShapeError(
            f"{what}: {int(beyond_BL.sum())} token ids are none of model {model.cfg.model_name!r}",
            got=f"{int(tokens_BL[context, position])}, at context {context}, position {position}",
            limit=f"0 to {model.cfg.d_vocab - 1}",
            cause="another model's tokenizer, or one with more tokens than the model has been given embeddings for",
            cure="give ids of the model's own tokenizer; or model.resize_token_embeddings(...), and save it again",
        )


def _whole(tokens: Tensor) -> bool:
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


class ActivationReader:
    """Runs contexts up to the hook's layer and keeps the activations of ordinary tokens.

    Args: keep_special: keep those of special tokens too.
    """

    def __init__(self, model: "AnyModel", hook: str, keep_special: bool = False):
        check_hook(model, hook)
        self.model, self.hook, self._keep_special = model, hook, keep_special
        layer = hook_layer(hook)
        # Hooks outside the blocks (embed, final norm) need the whole model or none of it: let it run through.
        # (contexts, heads, to, from): its shape alone does not tell heads from tokens.
        self._over_pairs = hook.endswith(("hook_pattern", "hook_attn_scores"))
        self._stop_at_layer = None if layer is None else layer + 1
        special = sorted({i for i in _special_ids(model.tokenizer) if i is not None})
        self._special = torch.tensor(special, device=model.cfg.device)

    @torch.no_grad()
    def read(self, tokens_BL: Tensor) -> Tensor:
        """(n, d_in) float32 activations of the tokens that are kept, in reading order.

        Heads, if the hook has them, are flattened into d_in.
        Raises: ShapeError (no contexts of ids that the model has), HookError if the hook does not give one row a token,
            ActivationError on NaN or infinity.
        """
        check_tokens(self.model, tokens_BL, "harvest")
        tokens_BL = tokens_BL.to(self.model.cfg.device)
        kept: list[Tensor] = []

        def keep(activation: Tensor, hook: Any) -> None:
            kept.append(activation)

        self.model.run_with_hooks(
            tokens_BL, return_type=None, stop_at_layer=self._stop_at_layer, fwd_hooks=[(self.hook, keep)]
        )
        self.check_rows(kept, tokens_BL)
        x_BLD = kept[0].flatten(2).float()
        kept_BL = self.kept(tokens_BL)
        x_ND = x_BLD[kept_BL]
        finite_N = torch.isfinite(x_ND).all(dim=1)
        if not bool(finite_N.all()):
            context, position = kept_BL.nonzero()[int((~finite_N).int().argmax())].tolist()
            raise ActivationError(
                f"harvest: {int((~finite_N).sum())} of {len(x_ND)} activations of {self.hook} hold NaN or infinity",
                got=f"first at context {context} of the batch, position {position}",
                cause=f"overflow in {self.model.cfg.dtype}, or broken weights",
                cure="set model.dtype to bfloat16 or float32",
            )
        return x_ND

    def ordinary(self, tokens_BL: Tensor) -> Tensor:
        """True where a token is not BOS, EOS, padding or another special one."""
        return ~torch.isin(tokens_BL, self._special)

    def kept(self, tokens_BL: Tensor) -> Tensor:
        """True where ``read`` gives a token's activation."""
        return torch.ones_like(tokens_BL, dtype=torch.bool) if self._keep_special else self.ordinary(tokens_BL)

    def check_rows(self, fired: list[Tensor], tokens_BL: Tensor) -> None:
        """Raise HookError if what the hook gave in a pass is not one row a token."""
        if not fired or fired[0].ndim < 3 or fired[0].shape[:2] != tokens_BL.shape or self._over_pairs:
            raise HookError(
                f"hook {self.hook!r} does not give one row a token",
                got="it did not fire" if not fired else f"shape {tuple(fired[0].shape)}",
                limit=f"(contexts, tokens, ...) = ({tokens_BL.shape[0]}, {tokens_BL.shape[1]}, ...)",
                cause="a hook over pairs of positions, after the pass, or one that the model's config switches off",
                cure="use a hook of the residual stream, an MLP or attention output, e.g. blocks.0.hook_resid_post",
            )


def _special_ids(tokenizer: Any) -> list[int | None]:
    return [*tokenizer.all_special_ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
