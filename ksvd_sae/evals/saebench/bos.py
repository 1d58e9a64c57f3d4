"""Whether a BOS stands before each text that SAEBench gives a model: as in the contexts that were harvested.

SAEBench leaves it to the tokenizer, or to TransformerLens' default for the model.
"""

from typing import Any

from ksvd_sae.activations.text import has_bos
from ksvd_sae.errors import EvaluationError


def begin_texts(tokenizer: Any, with_bos: bool) -> None:
    """Make a tokenizer put a BOS before each text, or none.

    Raises: EvaluationError if it has none, or cannot be made to.
    """
    if _begins(tokenizer) == with_bos:
        return
    if tokenizer.is_fast:
        from tokenizers.processors import TemplateProcessing

        bos = [(str(tokenizer.bos_token), tokenizer.bos_token_id)] if with_bos and has_bos(tokenizer) else []
        single = " ".join([*(token for token, _ in bos), "$A"])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=bos
        )
    else:
        tokenizer.add_bos_token = with_bos
    if _begins(tokenizer) != with_bos:
        raise EvaluationError(
            f"a BOS before each text: {type(tokenizer).__name__} cannot be told to {'add' if with_bos else 'leave'} it",
            limit=f"harvest.prepend_bos: {str(with_bos).lower()}, as the contexts that dictionaries were learned on",
            cure=f"set harvest.prepend_bos to {str(not with_bos).lower()}",
        )


def _begins(tokenizer: Any) -> bool:
    """Whether it puts a BOS before a text."""
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
