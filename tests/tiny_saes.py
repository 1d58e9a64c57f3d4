"""A language model of a few thousand weights and SAEs to splice into it: built here, nothing is downloaded.

The model is random, which is enough to check that codes, losses and files are what they should be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.nn.functional import normalize
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.learning.coding import AnyCoder, Coding
from ksvd_sae.learning.sparse_coding import Coder
from ksvd_sae.sae import DBKSVDSAE, sae_from_dictionary
from tests.strategies import generator, unit_atoms
from tests.tiny_models import hooked_gemma_2

MODEL_NAME = "tiny"
HOOK = "blocks.0.hook_resid_post"
D_MODEL = 16
CONTEXT_TOKENS = 12
COLOURS = ("red", "green", "blue", "black", "white")
METALS = ("iron", "gold", "tin", "lead", "zinc")
TREES = ("oak", "elm", "ash", "fir", "yew")
WORDS = (*COLOURS, *METALS, *TREES, "one", "two", "six", "ten")


@contextmanager
def one_thread() -> Iterator[None]:
    """Arrays are tiny here: two threads wait for each other for longer than one computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token; <bos> before every text, as Gemma's tokenizer does."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return as_of_the_hub(tokenizer, MODEL_NAME)


def as_of_the_hub(tokenizer: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers would load it; it knows <bos>, <eos>, <pad> and <unk>."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        # TransformerLens would otherwise load the tokenizer again, by its name.
        add_bos_token=True,
        name_or_path=name,
    )


def two_layers(
    tokenizer: PreTrainedTokenizerFast,
    d_model: int,
    n_ctx: int,
    model_class: type[HookedTransformer] = HookedTransformer,
) -> HookedTransformer:
    """A random model of two layers, the same weights at every call; named as its tokenizer."""
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=d_model,
        n_heads=2,
        d_head=8,
        d_mlp=32,
        n_ctx=n_ctx,
        d_vocab=len(tokenizer),
        act_fn="gelu",
        seed=0,
        device="cpu",
        model_name=tokenizer.name_or_path,
    )
    return model_class(cfg, tokenizer=tokenizer)


def tiny_model(model_class: type[HookedTransformer] = HookedTransformer) -> HookedTransformer:
    """Two layers, 16 dimensions, the same weights at every call."""
    model = two_layers(tiny_tokenizer(), D_MODEL, 64, model_class)
    with torch.no_grad():
        # As in trained models, the stream is far from zero and has a mean: else splicing zeros would cost nothing.
        model.embed.W_E.mul_(5).add_(1)
    return model.eval().requires_grad_(False)


def heads_as_attention_output() -> HookedTransformer:
    """The tiny model with the identity behind its first heads: hook_attn_out gives what hook_z does, flattened."""
    model = tiny_model()
    model.blocks[0].attn.W_O.copy_(torch.eye(D_MODEL).reshape(2, 8, D_MODEL))
    return model


def grouped_queries(model_class: type[HookedTransformer] = HookedTransformer) -> HookedTransformer:
    """Gemma-2's kind of model: four heads of queries, two of keys and values, rotated."""
    model: HookedTransformer = hooked_gemma_2(tiny_tokenizer(), model_class=model_class)
    return model.requires_grad_(False)


def tiny_dictionary(coder: AnyCoder = "mp", n_atoms: int = 24, k: int = 4, seed: int = 0, **options: Any) -> Dictionary:
    """Random unit atoms of the model's width (orthonormal ones for 'projection') and a centre that is not zero.

    Args: options: of ``Coding``.
    """
    centre_D = torch.randn(D_MODEL, generator=generator(seed + 1))
    if coder == "projection":
        atoms_MD = torch.linalg.qr(unit_atoms(D_MODEL, D_MODEL, seed)).Q.T[:k].float().contiguous()
    else:
        atoms_MD = unit_atoms(n_atoms, D_MODEL, seed, torch.float32)
    return Dictionary(atoms_MD, centre_D, Coding(k, coder, **options))


def tiny_db_ksvd_sae(
    coder: Coder = "mp",
    n_atoms: int = 24,
    k: int = 4,
    seed: int = 0,
    view: Literal["signed", "split"] = "signed",
    hook: str = HOOK,
) -> DBKSVDSAE:
    return tiny_sae_of(tiny_dictionary(coder, n_atoms, k, seed), view, hook)


def tiny_sae_of(dictionary: Dictionary, view: Literal["signed", "split"] = "signed", hook: str = HOOK) -> DBKSVDSAE:
    return sae_from_dictionary(
        dictionary, model_name=MODEL_NAME, hook_name=hook, context_size=CONTEXT_TOKENS, view=view
    )


def identity_sae() -> DBKSVDSAE:
    """A code that is the activation itself: one unit atom a dimension, all of them used."""
    dictionary = Dictionary(torch.eye(D_MODEL), torch.zeros(D_MODEL), Coding(D_MODEL, "projection"))
    return sae_from_dictionary(dictionary, model_name=MODEL_NAME, hook_name=HOOK, context_size=CONTEXT_TOKENS)


def tiny_topk_sae(n_latents: int = 24, k: int = 4, seed: int = 0) -> TopKSAE:
    """SAELens' own architecture with random tied weights."""
    metadata = SAEMetadata(model_name=MODEL_NAME, hook_name=HOOK, context_size=CONTEXT_TOKENS, prepend_bos=True)
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=n_latents, k=k, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.copy_(normalize(torch.randn(n_latents, D_MODEL, generator=generator(seed)), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae
