"""Where held-out and training text part when whole documents do not suffice.

The held-out part draws documents first, a batch at a time, and the training part has those after them. Where these
are too few, training goes on with what the held-out part drew and did not need: whole documents, and then the rest
of the document in which the held-out part ends, after a gap.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ksvd_sae.activations.documents import Document, Readable, TokenIds, readable
from ksvd_sae.activations.text import Packing, pieces


@dataclass(frozen=True)
class Split:
    """What the held-out part keeps of the documents that it drew.

    drawn: how many these are. whole: how many of them, from the first on, it keeps whole. cut_tokens: how many tokens
    of the next it keeps; 0: none. gap_tokens: after these tokens, which are nobody's: a context, so that no context
    of training goes on where one of the held-out part ends.
    """

    drawn: int
    whole: int
    cut_tokens: int
    gap_tokens: int

    @classmethod
    def after(cls, n_contexts: int, drawn: list[Readable], tokenizer: Any, packing: Packing) -> "Split":
        """Where the first ``n_contexts`` contexts of these documents end."""
        step, end = packing.step, 0
        for index, (separated, ids) in enumerate(pieces(iter(drawn), tokenizer, packing)):
            start = end + separated
            end = start + len(ids)
            if end > n_contexts * step:
                return cls(len(drawn), index, max(0, n_contexts * step - start), packing.tokens)
        return cls(len(drawn), len(drawn), 0, packing.tokens)

    def heldout(self, drawn: list[Readable], tokenizer: Any) -> list[Readable]:
        """What the held-out part keeps."""
        cut = [_beginning(drawn[self.whole], self.cut_tokens, tokenizer)] if self.cut_tokens else []
        return [*drawn[: self.whole], *cut]

    def training(self, drawn: list[Document], after: Iterator[Document], tokenizer: Any) -> Iterator[Document]:
        """What training has, in its order. Args: after: the documents after the drawn ones."""
        yield from after
        yield from drawn[self.whole + bool(self.cut_tokens) :]
        if self.cut_tokens:
            ids = _tokens(drawn[self.whole], tokenizer)[self.cut_tokens + self.gap_tokens :]
            if ids:
                yield TokenIds(ids)

    def __str__(self) -> str:
        cut = f"the first {self.cut_tokens:,} tokens of one" if self.cut_tokens else ""
        whole = f"{self.whole:,} whole document{'' if self.whole == 1 else 's'}"
        return f"{whole} and {cut} more" if cut and self.whole else cut or whole


def _tokens(document: Document, tokenizer: Any) -> list[int]:
    return next(pieces(iter([document]), tokenizer, Packing(1, None, None)))[1]


def _beginning(document: Readable, n_tokens: int, tokenizer: Any) -> Readable:
    """The longest beginning of at most ``n_tokens`` tokens."""
    document = readable(document, tokenizer)
    if isinstance(document, TokenIds):
        return TokenIds(_tokens(document, tokenizer)[:n_tokens], document.where)
    # Not every tokenizer knows where its tokens lie in the text: found by halving.
    fits, over = 0, min(n_tokens, len(document)) + 1
    while over <= len(document) and len(_tokens(document[:over], tokenizer)) <= n_tokens:
        fits, over = over, 2 * over
    over = min(over, len(document) + 1)
    while over - fits > 1:
        middle = (fits + over) // 2
        if len(_tokens(document[:middle], tokenizer)) <= n_tokens:
            fits = middle
        else:
            over = middle
    return document[:fits]
