"""RAVEL's prompts and tiny models of several architectures that answer them as the data say.

The models are random. An entity's answer is what a model says, so that some prompts are answered right: labels are made
from its answers to the first prompt of each attribute, and the second prompt is as often right as it happens to be.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.tiny_saes import COLOURS, D_MODEL, METALS, tiny_tokenizer

DATASET = "tiny-ravel"
KIND = "alloy"
PROMPTS = {"Tree": ["six %s oak one", "ten oak %s elm"], "Number": ["ash %s two ash", "%s yew"]}
ENTITIES = [f"{colour} {metal}" for colour, metal in product(COLOURS, METALS)]
ARCHITECTURES = ("gpt_neox", "gemma2", "gemma3", "llama")


def tiny_language_model(architecture: str) -> Any:
    """Three decoder layers, as ``from_pretrained`` would return it."""
    import transformers

    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": D_MODEL,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        # Large enough for answers to depend on what was asked.
        "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    grouped = {**sizes, "num_key_value_heads": 1, "head_dim": 8}
    config, model_class = {
        "gpt_neox": (lambda: transformers.GPTNeoXConfig(**sizes), "GPTNeoXForCausalLM"),
        "gemma2": (lambda: transformers.Gemma2Config(**grouped, query_pre_attn_scalar=8), "Gemma2ForCausalLM"),
        "gemma3": (lambda: transformers.Gemma3TextConfig(**grouped, query_pre_attn_scalar=8), "Gemma3ForCausalLM"),
        "llama": (lambda: transformers.LlamaConfig(**grouped), "LlamaForCausalLM"),
    }[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)._from_config(config(), attn_implementation="eager")
    model.config.architectures = [model_class]
    return model.eval()


def answer(model: Any, text: str) -> str:
    """The first word that the model says after a text."""
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([tokenizer.encode(text)])).logits[0, -1]
    return str(tokenizer.decode(logits_V.argmax()))


def write_prompts(folder: Path, model: Any) -> None:
    """The four files of ``KIND`` for a model, into ``folder``/base."""
    base = folder / "base"
    base.mkdir(parents=True)
    templates = [template for group in PROMPTS.values() for template in group]
    files = {
        "entity_attributes": {
            entity: {attribute: answer(model, group[0] % entity) for attribute, group in PROMPTS.items()}
            for entity in ENTITIES
        },
        "attribute_to_prompts": PROMPTS,
        "entity_to_split": dict.fromkeys(ENTITIES, "train"),
        "prompt_to_split": dict.fromkeys(templates, "train"),
    }
    for name, content in files.items():
        (base / f"ravel_{KIND}_{name}.json").write_text(json.dumps(content))
