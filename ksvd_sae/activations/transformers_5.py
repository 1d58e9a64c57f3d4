"""What TransformerLens 3.2, written for transformers 4, needs to load models with transformers 5.

What SAEBench needs beside: ``activation_collection.get_module`` in ``ksvd_sae.replaced``.
"""

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ksvd_sae.replaced import replaced


def loadable() -> AbstractContextManager[None]:
    """Inside, TransformerLens finds the weights of models whose parts transformers 5 has renamed."""
    import transformers

    renamed = int(transformers.__version__.split(".")[0]) >= 5
    return replaced({"transformers.GPTNeoXForCausalLM.embed_out": property(unembedding)} if renamed else {})


def unembedding(model: nn.Module) -> Any:
    """The unembedding under either name."""
    return model._modules.get("embed_out") or model._modules["lm_head"]
