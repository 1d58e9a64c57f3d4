"""The model reads sae-probes' texts once each, beside others as long.

sae-probes reads each data set's texts in their order, 32 at a time, padded to the longest. Of the 113 data sets many
are one text asked different things, and texts come up to five times within a data set. The activations are the same but
for the rounding of products of other shapes.

Notation: n texts, D dimensions of the hook.
"""

from collections.abc import Iterator
from typing import Any

from sae_probes import generate_model_activations
from torch import Tensor, stack

from ksvd_sae.replaced import Changes

# Of a batch, padding included; more texts than sae-probes' own batch only if they are shorter than 64 tokens.
_TOKENS_AT_ONCE = 2048
# Rows of activations that are kept for later data sets: of 2,304 dimensions, 232,000 texts.
_KEPT_BYTES = 2**31


def texts_read_once() -> Changes:
    """For one model: data sets after the first get what was read before, up to 2 GB of it."""
    theirs = generate_model_activations._process_activations
    kept: dict[tuple[str, str], Tensor] = {}

    def read(
        model: Any,
        texts: list[str],
        batch_size: int,
        max_seq_len: int,
        hook_names: list[str],
        max_layer: int | None,
        device: str,
    ) -> dict[str, Tensor]:
        """(n, D) at the last token of each text, by hook."""
        found = {(hook, text): kept[hook, text] for hook in hook_names for text in texts if (hook, text) in kept}
        new = [text for text in dict.fromkeys(texts) if any((hook, text) not in found for hook in hook_names)]
        lengths = [min(n, max_seq_len) for n in generate_model_activations._get_text_lengths(model, new)]
        for batch in _alike(new, lengths, batch_size):
            of_batch = theirs(model, batch, len(batch), max_seq_len, hook_names, max_layer, device)
            for hook, rows_nD in of_batch.items():
                found |= {(hook, text): row_D for text, row_D in zip(batch, rows_nD, strict=True)}
        room = _KEPT_BYTES - sum(row_D.nbytes for row_D in kept.values())
        for key, row_D in found.items():
            if key not in kept and (room := room - row_D.nbytes) >= 0:
                kept[key] = row_D
        return {hook: stack([found[hook, text] for text in texts]) for hook in hook_names}

    return {"sae_probes.generate_model_activations._process_activations": read}


def _alike(texts: list[str], lengths: list[int], at_least: int) -> Iterator[list[str]]:
    """Batches of texts of about one length, the longest first, so that what does not fit into memory shows at once."""
    order = sorted(range(len(texts)), key=lambda i: lengths[i], reverse=True)
    start = 0
    while start < len(order):
        n = max(at_least, _TOKENS_AT_ONCE // max(1, lengths[order[start]]))
        yield [texts[i] for i in order[start : start + n]]
        start += n
