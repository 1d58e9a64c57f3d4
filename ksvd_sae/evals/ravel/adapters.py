"""What stands in SAEBench's place while RAVEL runs; why: ``ksvd_sae.replaced``."""

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_bench.evals.ravel import intervention
from sae_bench.evals.ravel import main as ravel
from sae_bench.evals.ravel.instance import RAVELInstance
from sae_bench.sae_bench_utils import activation_collection
from torch import Tensor, nn

from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.saebench.bos import begin_texts
from ksvd_sae.replaced import Changes

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


def model_known_by_name(name: str) -> Changes:
    """RAVEL finds the Hub's name of the model, by the name that TransformerLens has for it."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        on_the_hub = get_official_model_name(name)
    except ValueError:
        on_the_hub = name
    return {"sae_bench.evals.ravel.main.LLM_NAME_MAP": {name: on_the_hub}}


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model of transformers.

    Raises: EvaluationError if they are at none of the usual places.
    """
    for place in _LAYERS:
        layers: Any = model
        for part in place.split("."):
            layers = getattr(layers, part, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise EvaluationError(
        f"ravel: the decoder layers of {type(model).__name__} were not found",
        limit=" or ".join(_LAYERS),
        cause="an architecture that names its layers differently",
        cure="leave evaluation.ravel out for this model",
    )


class _Layer:
    """A decoder layer whose hooks get a tuple, whether the layer returns one or a tensor."""

    def __init__(self, layer: nn.Module, hooks: ExitStack):
        self._layer, self._hooks = layer, hooks

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:
        def tupled(module: nn.Module, inputs: Any, outputs: Any) -> Any:
            if isinstance(outputs, tuple):
                return hook(module, inputs, outputs)
            changed = hook(module, inputs, (outputs,))
            return changed[0] if isinstance(changed, tuple) else changed

        handle = self._layer.register_forward_hook(tupled)
        self._hooks.callback(handle.remove)
        return handle


def hooks_on_any_decoder(hooks: ExitStack) -> Changes:
    """RAVEL hooks the layers of any decoder.

    Args: hooks: takes them off the model when it ends, also those that SAEBench leaves where a dictionary fails.
    """
    return {
        "sae_bench.sae_bench_utils.activation_collection.get_module": lambda model, layer: _Layer(
            decoder_layers(model)[layer], hooks
        )
    }


class _SeenError(Exception):
    """Ends a forward pass whose activations have been read."""


def activations_kept(kept: dict[str, Tensor]) -> Changes:
    """The source prompts' activations are computed once for a panel, and no further than the layer.

    The prompts are the same for every SAE: the same seed draws them.

    Args: kept: filled here; hash of prompts and layer -> activations.
    """

    def read(model: Any, target_layer: int, inputs: Any, source_pos_B: Tensor) -> Tensor:
        mask = inputs["attention_mask"]
        parts = (inputs["input_ids"], mask, source_pos_B, torch.tensor([target_layer]))
        key = hashlib.sha256(b"".join(str(t.shape).encode() + t.cpu().numpy().tobytes() for t in parts)).hexdigest()
        if key not in kept:
            kept[key] = _activations(model, target_layer, inputs, source_pos_B)
        return kept[key]

    return {"sae_bench.sae_bench_utils.activation_collection.get_layer_activations": read}


@torch.no_grad()
def _activations(model: Any, layer: int, inputs: Any, position_B: Tensor) -> Tensor:
    rows: list[Tensor] = []

    def keep(module: nn.Module, _: Any, outputs: tuple[Tensor, ...]) -> None:
        prompts_B = torch.arange(len(position_B), device=outputs[0].device)
        rows.append(outputs[0][prompts_B, position_B].clone())
        raise _SeenError

    handle = activation_collection.get_module(model, layer).register_forward_hook(keep)
    try:
        model(input_ids=inputs["input_ids"].to(model.device), attention_mask=inputs["attention_mask"])
    except _SeenError:
        pass
    finally:
        handle.remove()
    return rows[0]


def loaded_once(
    loaded: dict[Any, Any],
    prepare: Callable[[Any, Any], None],
    weights: OwnWeights | None = None,
    prepend_bos: bool | None = None,
) -> Changes:
    """Model and tokenizer are loaded once for a panel, the model as an eval needs it.

    Args:
        loaded: filled here; what was loaded before is taken from it.
        prepare: called with model and tokenizer before the first SAE of a call is evaluated.
        weights, prepend_bos: as ``EvalSetting`` has them.
    """
    load_model, load_tokenizer = ravel.AutoModelForCausalLM.from_pretrained, ravel.AutoTokenizer.from_pretrained
    # Never pickled ones, nor with code of their own.
    safely = {"use_safetensors": True, "trust_remote_code": False}

    def tokenizer(name: str) -> Any:
        if ("tokenizer", name) not in loaded:
            loaded["tokenizer", name] = load_tokenizer(name) if weights is None else weights.tokenizer(name)
            if prepend_bos is not None:
                begin_texts(loaded["tokenizer", name], prepend_bos)
        return loaded["tokenizer", name]

    def model(name: str, **options: Any) -> Any:
        if ("model", name) not in loaded:
            place, more = (name, {}) if weights is None else (str(weights.folder), safely)
            loaded["model", name] = ModelForInference(load_model(place, **options, **more))
        prepare(loaded["model", name], tokenizer(name))
        return loaded["model", name]

    return {
        "sae_bench.evals.ravel.main.AutoModelForCausalLM": SimpleNamespace(from_pretrained=model),
        "sae_bench.evals.ravel.main.AutoTokenizer": SimpleNamespace(from_pretrained=tokenizer),
    }


class ModelForInference:
    """A causal language model whose weights get no gradient, and which gives the logits of the last token alone.

    It is no module, so the mask that has it is put into training without it: dropout stays off.
    """

    def __init__(self, model: Any):
        self._model = model.eval().requires_grad_(False)
        takes_number = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if takes_number else {}

    def __call__(self, **options: Any) -> Any:
        return self._model(**self._options, **options)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Completions of full length: SAEBench takes the last ``max_new_tokens`` of what comes back."""
        output_BL: Tensor = self._model.generate(input_ids=input_ids, max_new_tokens=max_new_tokens, **options)
        missing = input_ids.shape[1] + max_new_tokens - output_BL.shape[1]
        return torch.cat([output_BL, output_BL[:, -1:].expand(-1, missing)], dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def entity_positions_without_bos() -> Changes:
    """An entity's last token is found also where the tokenizer puts no token before a text.

    SAEBench counts the tokens of what follows the entity with a <bos> among them, which makes up for the entity's last
    token lying one before it.
    """
    original = RAVELInstance.build_and_tokenize_prompts

    def build(self: Any, tokenizer: Any) -> Any:
        prompts = original(self, tokenizer)
        n_before = len(tokenizer.encode(""))
        for prompt in prompts:
            prompt.final_entity_token_pos += n_before - 1
        return prompts

    return {"sae_bench.evals.ravel.instance.RAVELInstance.build_and_tokenize_prompts": build}


def no_score_of_no_pairs() -> Changes:
    """No score where no pair is left to score, and with each score how many pairs there were.

    There are two kinds: pairs whose first token should change, and those whose should not.
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

    return {
        "sae_bench.evals.ravel.main.run_eval_single_cause_attribute": evaluated,
        "sae_bench.evals.ravel.intervention.generate_batched_interventions": counted,
    }
