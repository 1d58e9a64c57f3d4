"""What SAEBench's RAVEL needs changed around it: any decoder, one load for a panel, no score from nothing."""

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_bench.evals.ravel import intervention
from sae_bench.evals.ravel import main as ravel
from sae_bench.evals.ravel.instance import RAVELInstance
from sae_bench.sae_bench_utils import activation_collection
from torch import Tensor, nn

from ksvd_sae.errors import EvaluationError

# Llama's place, which most share; what text models inside image models have; Pythia's; OPT's; GPT-2's.
_LAYERS = (
    "model.layers",
    "model.language_model.layers",
    "gpt_neox.layers",
    "model.decoder.layers",
    "transformer.h",
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's random numbers, and put them back as they were.

    RAVEL draws prompts and pairs with Python's, and seeds the whole process for it.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def model_known_by_name(name: str) -> Iterator[None]:
    """Let RAVEL take the model's own name: its table from TransformerLens' names to the Hub's has two entries."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        on_the_hub = get_official_model_name(name)
    except ValueError:
        on_the_hub = name
    before = dict(ravel.LLM_NAME_MAP)
    ravel.LLM_NAME_MAP[name] = on_the_hub
    try:
        yield
    finally:
        ravel.LLM_NAME_MAP.clear()
        ravel.LLM_NAME_MAP.update(before)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model of transformers.

    Raises: EvaluationError if they are at none of the usual places.
    """
    for place in _LAYERS:
        found: Any = model
        for part in place.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise EvaluationError(
        f"ravel: the decoder layers of {type(model).__name__} were not found",
        limit=" or ".join(_LAYERS),
        cause="an architecture that names its layers differently",
        cure="leave evaluation.ravel out for this model",
    )


class _Layer:
    """A decoder layer whose hooks get a tuple, whether the layer returns one or a tensor."""

    def __init__(self, layer: nn.Module, handles: list[Any]):
        self._layer, self._handles = layer, handles

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:
        def tupled(module: nn.Module, inputs: Any, outputs: Any) -> Any:
            if isinstance(outputs, tuple):
                return hook(module, inputs, outputs)
            changed = hook(module, inputs, (outputs,))
            return changed[0] if isinstance(changed, tuple) else changed

        self._handles.append(self._layer.register_forward_hook(tupled))
        return self._handles[-1]


@contextmanager
def hooks_on_any_decoder() -> Iterator[None]:
    """Let RAVEL hook the layers of any decoder.

    SAEBench knows Gemma-2's and GPT-NeoX's layers, and takes ``outputs[0]`` of what they return: of a tensor, which
    Llama's layers return, and all of them from transformers 5 on, that is the first row of the batch. And where a
    dictionary fails inside a hook, SAEBench leaves the hook on the model.
    """
    original, handles = activation_collection.get_module, list[Any]()
    activation_collection.get_module = lambda model, layer: _Layer(decoder_layers(model)[layer], handles)
    try:
        yield
    finally:
        activation_collection.get_module = original
        for handle in handles:
            handle.remove()


class _SeenError(Exception):
    """Ends a forward pass whose activations have been read."""


@contextmanager
def activations_kept(kept: dict[str, Tensor]) -> Iterator[None]:
    """Compute the source prompts' activations once for a panel, and no further than the layer.

    SAEBench runs the whole model for them, in every epoch and for every SAE, although they follow from the prompts
    alone, and the prompts are the same for every SAE (same seed).

    Args: kept: filled here; hash of prompts and layer -> activations.
    """
    original = activation_collection.get_layer_activations

    def read(model: Any, target_layer: int, inputs: Any, source_pos_B: Tensor) -> Tensor:
        mask = inputs["attention_mask"]
        parts = (inputs["input_ids"], mask, source_pos_B, torch.tensor([target_layer]))
        key = hashlib.sha256(b"".join(str(t.shape).encode() + t.cpu().numpy().tobytes() for t in parts)).hexdigest()
        if key not in kept:
            kept[key] = _activations(model, target_layer, inputs, source_pos_B)
        return kept[key]

    activation_collection.get_layer_activations = read
    try:
        yield
    finally:
        activation_collection.get_layer_activations = original


@torch.no_grad()
def _activations(model: Any, layer: int, inputs: Any, position_B: Tensor) -> Tensor:
    found: list[Tensor] = []

    def keep(module: nn.Module, _: Any, outputs: tuple[Tensor, ...]) -> None:
        rows = torch.arange(len(position_B), device=outputs[0].device)
        found.append(outputs[0][rows, position_B].clone())
        raise _SeenError

    handle = activation_collection.get_module(model, layer).register_forward_hook(keep)
    try:
        model(input_ids=inputs["input_ids"].to(model.device), attention_mask=inputs["attention_mask"])
    except _SeenError:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def loaded_once(loaded: dict[Any, Any], prepare: Callable[[Any, Any], None]) -> Iterator[None]:
    """Load model and tokenizer once for a panel, and as an eval needs them.

    SAEBench loads the tokenizer several times for each attribute (seconds, with Gemma's vocabulary), trains its masks
    with gradients for every weight of the model, asks for the logits of every token where it reads the last one's, and
    leaves dropout on once a mask was trained.

    Args:
        loaded: filled here; what was loaded before is taken from it.
        prepare: called with model and tokenizer before the first SAE of a call is evaluated.
    """
    before = ravel.AutoModelForCausalLM, ravel.AutoTokenizer

    def tokenizer(name: str) -> Any:
        if ("tokenizer", name) not in loaded:
            loaded["tokenizer", name] = before[1].from_pretrained(name)
        return loaded["tokenizer", name]

    def model(name: str, **options: Any) -> Any:
        if ("model", name) not in loaded:
            loaded["model", name] = _for_inference(before[0].from_pretrained(name, **options))
        prepare(loaded["model", name], tokenizer(name))
        return loaded["model", name]

    ravel.AutoModelForCausalLM = SimpleNamespace(from_pretrained=model)
    ravel.AutoTokenizer = SimpleNamespace(from_pretrained=tokenizer)
    try:
        yield
    finally:
        ravel.AutoModelForCausalLM, ravel.AutoTokenizer = before


def _for_inference(model: Any) -> Any:
    """No weight gets a gradient, dropout stays off, only the last token gets logits, completions are of full length."""
    model.eval().requires_grad_(False)
    model.train = lambda mode=True: model
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_last_logits_only, with_kwargs=True)
    generate = model.generate

    def of_full_length(input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        # SAEBench takes the last max_new_tokens of what comes back: of completions that all ended early, too many.
        output_BL: Tensor = generate(input_ids=input_ids, max_new_tokens=max_new_tokens, **options)
        missing = input_ids.shape[1] + max_new_tokens - output_BL.shape[1]
        return torch.cat([output_BL, output_BL[:, -1:].expand(-1, missing)], dim=1)

    model.generate = of_full_length
    return model


def _last_logits_only(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"logits_to_keep": 1, **options}


@contextmanager
def entity_positions_without_bos() -> Iterator[None]:
    """Find an entity's last token also where the tokenizer puts no token before a text.

    SAEBench counts the tokens of what follows the entity, and takes it that one of them is a <bos>, which makes up for
    the entity's last token lying one before it. Pythia's tokenizer adds none: the position was that of the next token,
    or the first of all where nothing follows.
    """
    original = RAVELInstance.build_and_tokenize_prompts

    def build(self: Any, tokenizer: Any) -> Any:
        prompts = original(self, tokenizer)
        n_before = len(tokenizer.encode(""))
        for prompt in prompts:
            prompt.final_entity_token_pos += n_before - 1
        return prompts

    RAVELInstance.build_and_tokenize_prompts = build
    try:
        yield
    finally:
        RAVELInstance.build_and_tokenize_prompts = original


@contextmanager
def no_score_of_no_pairs() -> Iterator[None]:
    """Refuse to score where no pair is left to score, and store with each score how many pairs there were.

    SAEBench takes the mean over pairs whose first token should change, and over those whose should not, also where
    there are none: NaN.
    """
    evaluate, generate = ravel.run_eval_single_cause_attribute, intervention.generate_batched_interventions
    pairs: dict[str, int] = {}
    now: list[str] = []

    def counted(model: Any, mdbm: Any, tokenizer: Any, val_loader: Any, **options: Any) -> Any:
        kept = [bool(base == source) for batch in val_loader for base, source in zip(batch[4], batch[5], strict=True)]
        pairs.update(cause_pairs=len(kept) - sum(kept), isolation_pairs=sum(kept))
        if not 0 < sum(kept) < len(kept):
            raise EvaluationError(
                f"ravel: no pairs to score {' / '.join(now)} by",
                got=", ".join(f"{n} {name.replace('_', ' ')}" for name, n in pairs.items()),
                limit="at least one of each",
                cause="too few pairs are left after the split, or all answers begin with the same token",
                cure="raise evaluation.ravel.pairs_per_attribute (or downsample), or leave the attribute out",
            )
        return generate(model, mdbm, tokenizer, val_loader, **options)

    def evaluated(dataset: Any, cause_attribute: str, *args: Any, **options: Any) -> dict[str, Any]:
        now[:] = [dataset.config["entity_type"], cause_attribute]
        return {**evaluate(dataset, cause_attribute, *args, **options), **pairs}

    ravel.run_eval_single_cause_attribute, intervention.generate_batched_interventions = evaluated, counted
    try:
        yield
    finally:
        ravel.run_eval_single_cause_attribute, intervention.generate_batched_interventions = evaluate, generate
