"""What a token looks like in a text: the piece of text that it adds, not the tokenizer's name for it."""

from collections.abc import Iterable
from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """Texts of token ids, each looked up once.

    A tokenizer may drop the blank at the start of what it decodes. So a token is decoded behind another one, and that
    one's text is cut off. A token that is part of a character has no text: it is shown by its name.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._n_before = len(self._decode(self._before))
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        if token not in self._known:
            text = self._decode([*self._before, token])[self._n_before :]
            self._known[token] = text if text and _BROKEN not in text else self._name(token)
        return self._known[token]

    def all(self, tokens: Iterable[int]) -> list[str]:
        return [self.of(token) for token in tokens]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))
