"""The language model is loaded once for all evals.

Building TransformerLens' model takes long: masks over its whole context, weights twice. Evals leave it as it was but
for its tokenizer, whose side of truncation sae-probes changes, and for hooks if they end in an exception; both are put
back.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jaxtyping
import torch
from transformer_lens import HookedTransformer

from ksvd_sae.activations.language import is_bridge, load_as
from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.evals.llm_cache import model_fingerprint
from ksvd_sae.evals.saebench.bos import begin_texts
from ksvd_sae.replaced import replaced

if TYPE_CHECKING:
    from ksvd_sae.activations.language import AnyModel

logger = logging.getLogger(__name__)
# Entries of what a tokenizer's user may set.
_SETTINGS = 1000


class LoadedModel:
    """The model that was asked for last; ``HookedTransformer.from_pretrained_no_processing`` gives it while in use.

    Args:
        weights: in place of those that its name stands for.
        prepend_bos: whether texts that it gets begin with a BOS; None leaves that to its tokenizer.
    """

    def __init__(self, weights: OwnWeights | None = None, prepend_bos: bool | None = None) -> None:
        self._weights, self._prepend_bos = weights, prepend_bos
        self._load: Any = None
        self._asked: Any = None
        self._model: Any = None

    @contextmanager
    def in_use(self) -> Iterator["LoadedModel"]:
        """Whoever loads a model inside gets the one that was loaded before, if it is the same."""
        self._load = HookedTransformer.from_pretrained_no_processing
        loader = "transformer_lens.HookedTransformer.from_pretrained_no_processing"
        checked = jaxtyping.config.jaxtyping_disable
        try:
            with replaced({loader: staticmethod(self.get)}):
                yield self
        finally:
            jaxtyping.config.update("jaxtyping_disable", checked)

    def get(self, model_name: str, **options: Any) -> "AnyModel":
        """The model as if it had just been loaded; loaded if it is another than the last one."""
        # Whoever names no dtype means TransformerLens' default.
        asked = {name: str(value) for name, value in {"dtype": torch.float32, **options}.items()} | {"": model_name}
        if self._model is None or asked != self._asked or not self._as_it_was():
            self.release()
            # sae-probes loads in inference mode: such weights could never take part in autograd again.
            with torch.inference_mode(False):
                self._model = self._loaded(model_name, **options)
            self._asked, self._was = asked, model_fingerprint(self._model)
            self._tokenizer_was = _plain_state(self._model.tokenizer)
        if is_bridge(self._model):
            # SAEBench's annotations, which it has checked at each call, name HookedTransformer alone.
            jaxtyping.config.update("jaxtyping_disable", True)
        self._model.reset_hooks()
        vars(self._model.tokenizer).update({name: _copied(value) for name, value in self._tokenizer_was.items()})
        return self._model

    def _loaded(self, model_name: str, **options: Any) -> "AnyModel":
        model = load_as(self._load, self._weights, model_name, **options)
        if self._prepend_bos is not None:
            begin_texts(model.tokenizer, self._prepend_bos)
            model.cfg.default_prepend_bos = model.cfg.tokenizer_prepends_bos = self._prepend_bos
        return model

    def release(self) -> None:
        """Forget the model, where something large is to take its place in memory."""
        self._model = None

    def _as_it_was(self) -> bool:
        if model_fingerprint(self._model) == self._was:
            return True
        logger.warning("an eval changed the weights of the language model; loading it again")
        return False


def _plain_state(tokenizer: Any) -> dict[str, Any]:
    """What in a tokenizer is set by assignment: sides, special tokens, lengths; not the compiled tokenizer itself."""
    plain = (str, int, float, bool, type(None), list, dict, tuple)
    return {name: _copied(value) for name, value in vars(tokenizer).items() if isinstance(value, plain)}


def _copied(value: Any) -> Any:
    """A copy, but of a vocabulary and its merges: half a million of them take seconds, and no eval alters these."""
    large = isinstance(value, list | dict | tuple) and len(value) > _SETTINGS
    return value if large else copy.deepcopy(value)
