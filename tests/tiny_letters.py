"""A tiny model whose activations carry a word's first letter, and a vocabulary with words for all letters."""

from functools import lru_cache
from typing import Literal

import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import normalize
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.learning.coding import Coding
from ksvd_sae.sae import DBKSVDSAE, sae_from_dictionary
from tests.strategies import generator, unit_atoms
from tests.tiny_saes import as_of_the_hub, two_layers

MODEL_NAME = "tiny-letters"
HOOK = "blocks.0.hook_resid_post"
D_MODEL = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Two tokens wherever it stands, though it is one of the vocabulary's.
ODD = "qqzz"
_ENDINGS = [c + v for c in "bdfklmnprst" for v in "aou"]
WORDS = tuple(letter + ending for letter in LETTERS for ending in _ENDINGS[: 14 + LETTERS.index(letter) % 7])


def letters_tokenizer(words: tuple[str, ...] = WORDS, odd: bool = False) -> PreTrainedTokenizerFast:
    """A word a token; <bos> before every text. With ``odd``, the vocabulary has ODD, and its halves."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    known = [*special, "has", "the", "first", "letter", ":", *LETTERS.upper(), *words]
    known += ["qq", "zz", ODD] if odd else []
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("(?<=qq)(?=zz)"), "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return as_of_the_hub(tokenizer, MODEL_NAME)


def spaced_tokenizer(style: Literal["pythia", "llama"]) -> PreTrainedTokenizerFast:
    """A word a token, with the space before it, as Pythia's tokenizer writes them (Ġ) or Llama's (▁)."""
    mark = {"pythia": "Ġ", "llama": "▁"}[style]
    prompt = [*(mark + word for word in ("has", "the", "first", "letter")), ":", "Ċ", "\n"]
    known = ["<pad>", "<eos>", "<bos>", "<unk>", *prompt, *(mark + x for x in (*LETTERS.upper(), *WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    if style == "pythia":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        marked = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="never", split=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[\n:]"), "isolated"), marked])
        tokenizer.decoder = decoders.Metaspace(replacement=mark, prepend_scheme="never", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    # TransformerLens loads any tokenizer of the Hub so that it sets <bos>, Pythia's too.
    return as_of_the_hub(tokenizer, f"{MODEL_NAME}-{style}")


@lru_cache(maxsize=1)
def letter_directions() -> torch.Tensor:
    """Orthonormal, a row a letter."""
    return torch.linalg.qr(torch.randn(D_MODEL, len(LETTERS), generator=generator(3))).Q.T


def letters_model(tokenizer: PreTrainedTokenizerFast | None = None, strength: float = 5.0) -> HookedTransformer:
    """Two layers, the same weights at every call; a token's embedding has its first letter's direction.

    Args: strength: of the letter, beside noise of norm 1; 0: activations know nothing of letters.
    """
    tokenizer = tokenizer or letters_tokenizer()
    model = two_layers(tokenizer, D_MODEL, 96)
    with torch.no_grad():
        noise_VD = torch.randn(len(tokenizer), D_MODEL, generator=generator(4)) / D_MODEL**0.5
        model.embed.W_E.copy_(noise_VD)
        for word, i in tokenizer.get_vocab().items():
            if (letter := word.lstrip("Ġ▁")[:1].lower()) and letter in LETTERS:
                model.embed.W_E[i] += strength * letter_directions()[LETTERS.index(letter)]
    return model.eval().requires_grad_(False)


def letters_topk_sae(n_latents: int = 64, k: int = 4, seed: int = 0, hook: str = HOOK) -> TopKSAE:
    """SAELens' own architecture; a latent a letter, but with noise, and random ones beside."""
    metadata = SAEMetadata(model_name=MODEL_NAME, hook_name=hook, context_size=96, prepend_bos=True)
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=n_latents, k=k, metadata=metadata))
    with torch.no_grad():
        rows = torch.randn(n_latents, D_MODEL, generator=generator(seed)) / D_MODEL**0.5
        rows[: len(LETTERS)] += letter_directions()[:n_latents]
        sae.W_dec.copy_(normalize(rows, dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def letters_db_ksvd_sae(n_atoms: int = 64, k: int = 4, seed: int = 0) -> DBKSVDSAE:
    """A random dictionary, signed codes."""
    dictionary = Dictionary(unit_atoms(n_atoms, D_MODEL, seed, torch.float32), torch.zeros(D_MODEL), Coding(k))
    return sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK, context_size=96)
