"""Whether token ids of a data set are those of the model's tokenizer, as far as the data set says."""

import json
import logging
from pathlib import Path
from typing import Any

from ksvd_sae.activations.documents import TokenIds
from ksvd_sae.activations.text import TextConfig
from ksvd_sae.errors import TextError

logger = logging.getLogger(__name__)
# What SAELens writes beside the data sets that it tokenises.
_MADE_BY = "sae_lens.json"
_SHOWN_TOKENS = 12


def check_tokenizer(config: TextConfig, first: TokenIds, tokenizer: Any) -> None:
    """Compare the model's tokenizer with the one that made the ids; where nothing says which, show what they say.

    Raises: TextError if the two have other vocabularies.
    """
    said = tokenizer.decode(first.ids[:_SHOWN_TOKENS])
    logger.info("text %s: token ids, used as they are; the first say %r", config.name, said)
    name = tokenizer_name(config)
    own = getattr(tokenizer, "name_or_path", "")
    if name is None:
        logger.warning(
            "text %s: nothing says which tokenizer made its token ids; see that %r is text", config.name, said
        )
        return
    if name == own:
        return
    from transformers import AutoTokenizer

    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    # A name that is nowhere, no network, a file that is none.
    except Exception as error:
        logger.warning(
            "text %s: its token ids were made by %r, which cannot be loaded to compare (%s: %s); see that %r is text",
            config.name,
            name,
            type(error).__name__,
            (str(error).splitlines() or [""])[0][:200],
            said,
        )
        return
    if vocabulary != tokenizer.get_vocab():
        raise TextError(
            f"text {config.dataset}: its token ids are of another tokenizer than the model's",
            got=f"{name}, {len(vocabulary):,} tokens; the first ids would say {said!r}",
            limit=f"{own or type(tokenizer).__name__}, {len(tokenizer.get_vocab()):,} tokens",
            cause="a data set that was tokenised for another model",
            cure="take its column of text (text.column), or one that was tokenised for this model",
        )


def tokenizer_name(config: TextConfig) -> str | None:
    """What the data set says of who made its ids; None if it says nothing."""
    path = Path(str(config.dataset)).expanduser() / _MADE_BY
    if config.source == "hub" and not path.parent.exists():
        from huggingface_hub import errors, hf_hub_download

        try:
            path = Path(hf_hub_download(str(config.dataset), _MADE_BY, repo_type="dataset", revision=config.revision))
        # No such file; or not in the cache and not to be asked for.
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
            return None
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["tokenizer_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None
