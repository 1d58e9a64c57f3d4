"""What the libraries that load and run models need to work with transformers 5.

TransformerLens 3.2 and SAEBench 0.6 were written for transformers 4, which ``constraints.txt`` names. What differs:

- GPT-NeoX's (Pythia's) unembedding is called ``lm_head`` and no longer ``embed_out``, for which TransformerLens asks:
  here.
- A decoder layer returns a tensor and no longer a tuple, of which SAEBench's RAVEL takes the first:
  ``evaluation/saebench/ravel_adapters.py``, which treats Llama's layers of transformers 4 in the same way.
"""

from typing import Any

from torch import nn


def make_loadable() -> None:
    """Let TransformerLens find the weights of models whose parts transformers 5 has renamed; any number of times."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        transformers.GPTNeoXForCausalLM.embed_out = property(unembedding)


def unembedding(model: nn.Module) -> Any:
    """The unembedding under either name."""
    return model._modules.get("embed_out") or model._modules["lm_head"]
