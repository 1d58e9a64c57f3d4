"""What a row of a data set can hold: a text, token ids, or a chat. Anything else is refused."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from ksvd_sae.errors import TextError
from ksvd_sae.store import atomic_path

# Of a held-out document that came as token ids. No name that SAELens takes for a tokenised data set's column.
_IDS = "token_ids"


@dataclass(frozen=True)
class TokenIds:
    """A document that was tokenised elsewhere. where: it comes from, for errors."""

    ids: list[int]
    where: str = "token ids"


@dataclass(frozen=True)
class Chat:
    """Messages with role and content. where: they come from, for errors."""

    messages: list[dict[str, Any]]
    where: str = "chat"


Document = str | TokenIds | Chat
# As the packing takes it.
Readable = str | TokenIds


def document(value: Any, column: str, where: str) -> Document:
    """A row's value as a document.

    Raises: TextError if it is no text, no list of whole numbers and no list of messages.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(message, dict) for message in value):
            return Chat(_messages(value, column, where), where)
        if all(isinstance(token, Integral) and not isinstance(token, bool) for token in value):
            return TokenIds([int(token) for token in value], where)
    raise TextError(
        f"{where}: column {column!r} holds no text",
        got=_described(value),
        limit="a text, token ids (a list of whole numbers), or a chat (a list of messages with role and content)",
        cause="another column was meant, or the text lies deeper in it",
        cure="set text.column to the column of the documents, or write one with a text in each row",
    )


def _messages(value: Iterable[dict[str, Any]], column: str, where: str) -> list[dict[str, Any]]:
    """Messages as a chat template takes them; Arrow gives a key that a message lacks the value None."""
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise TextError(
                f"{where}: column {column!r} holds a list of mappings that is no chat",
                got=_described(message),
                limit="each with a text as 'role' and a text as 'content'",
                cause="messages under other names ('from' and 'value'), or with images or calls of tools",
                cure="rename their keys to role and content, or write a column with a text in each row",
            )
    return messages


def _described(value: Any) -> str:
    """The type of a value and its beginning."""
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        kind += " of " + (" and ".join(sorted({type(part).__name__ for part in value})) or "nothing")
    shown = repr(value[:8] if isinstance(value, (list, tuple, bytes)) else value)
    return f"{kind}: {shown if len(shown) <= 80 else shown[:80] + '…'}"


# ---------------------------------------------------------------- with the model's tokenizer


def readable(document: Document, tokenizer: Any, n_vocabulary: int | None = None) -> Readable:
    """A document as the packing takes it: chats as text, token ids checked.

    Args: n_vocabulary: of the model, above which token ids are refused; None: no limit.
    Raises: TextError (an id that the model lacks, no chat template, a chat that the template refuses).
    """
    if isinstance(document, Chat):
        return _chat_text(document, tokenizer)
    if isinstance(document, TokenIds):
        _check(document, n_vocabulary)
    return document


def without_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """Ids without the BOS that they may begin with: the packing puts one before every document."""
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


def _check(document: TokenIds, n_vocabulary: int | None) -> None:
    ids = document.ids
    if ids and (min(ids) < 0 or (n_vocabulary is not None and max(ids) >= n_vocabulary)):
        wrong = next(i for i in ids if i < 0 or (n_vocabulary is not None and i >= n_vocabulary))
        raise TextError(
            f"{document.where}: token id {wrong} is none of the model's",
            got=f"{wrong}, the {ids.index(wrong) + 1}. of {len(ids)} ids",
            limit="0 or more" if n_vocabulary is None else f"0 to {n_vocabulary - 1}",
            cause="ids of a label column, or of another model's tokenizer",
            cure="give ids that the model's own tokenizer made, or text (text.column)",
        )


def _chat_text(chat: Chat, tokenizer: Any) -> str:
    """A chat as the model's template writes it, without BOS at its beginning."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{chat.where}: a chat, and the model's tokenizer has no chat template",
            got=f"{len(chat.messages)} messages, the first of role {chat.messages[0]['role']!r}",
            cause="a base model, which has not been trained on chats",
            cure="take the model that was tuned on chats, or a column with a text in each row (text.column)",
        )
    try:
        text: str = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise TextError(
            f"{chat.where}: the model's chat template refuses the chat: {error}",
            got=", ".join(message["role"] for message in chat.messages[:8]),
            cause="roles that the model does not know, or in an order that it does not know",
            cure="leave these chats out of the data set, or rename their roles",
        ) from error
    return text.removeprefix(tokenizer.bos_token or "")


# ---------------------------------------------------------------- held-out documents


def write_documents(path: Path, documents: Iterable[Readable], tokenizer: Any) -> None:
    """JSONL with each document under 'text'; token ids stay beside what they say, as a text may have others."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for document in documents:
            row: dict[str, Any] = {"text": document}
            if isinstance(document, TokenIds):
                said = tokenizer.decode(without_bos(document.ids, tokenizer), clean_up_tokenization_spaces=False)
                row = {"text": said, _IDS: document.ids}
            file.write(json.dumps(row) + "\n")


def read_documents(path: Path) -> Iterator[Readable]:
    """What ``write_documents`` wrote."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield TokenIds(row[_IDS]) if _IDS in row else row["text"]
