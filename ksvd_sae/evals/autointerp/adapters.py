"""What stands in SAEBench's place while autointerp runs; why: ``ksvd_sae.replaced``."""

from typing import Any

from sae_bench.sae_bench_utils import dataset_utils
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.activations.weights import OwnWeights
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.autointerp.judging import Judging, autointerp_class, client_class, output_class
from ksvd_sae.evals.llm_cache import TensorCache, model_fingerprint, tokens_hash
from ksvd_sae.replaced import Changes
from ksvd_sae.store import content_hash


def judged_by(judging: Judging, seed: int) -> Changes:
    """``judging`` answers what SAEBench would ask OpenAI, and counts what it answers."""
    return {
        "sae_bench.evals.autointerp.main.OpenAI": client_class(judging),
        "sae_bench.evals.autointerp.main.AutoInterp": autointerp_class(judging, seed),
        "sae_bench.evals.autointerp.main.AutoInterpEvalOutput": output_class(judging),
    }


def enough_text(prepend_bos: bool | None = None) -> Changes:
    """An error that says which data set is too short, and by how much.

    Args: prepend_bos: False: contexts do not begin with a BOS, which SAEBench would write over their first token.
    """
    original = dataset_utils.load_and_tokenize_dataset

    def load(dataset_name: str, ctx_len: int, num_tokens: int, tokenizer: Any, *args: Any, **options: Any) -> Any:
        if prepend_bos is False:
            options["add_bos"] = False
        try:
            return original(dataset_name, ctx_len, num_tokens, tokenizer, *args, **options)
        except AssertionError as error:
            raise EvaluationError(
                f"autointerp: data set {dataset_name} has too little text",
                limit=f"total_tokens: {num_tokens:,}",
                cause="documents of 100 characters and less are left out",
                cure="lower evaluation.autointerp.total_tokens, or give more text",
            ) from error

    return {"sae_bench.sae_bench_utils.dataset_utils.load_and_tokenize_dataset": load}


def activations_kept(cache: TensorCache | None, weights: OwnWeights | None = None) -> Changes:
    """``run_with_cache(tokens, stop_at_layer=…, names_filter=hook)`` is answered from ``cache``, if there is one.

    Autointerp reads the activations and not the model's output; calls of any other form go to the model.
    """
    if cache is None:
        return {}
    original, fingerprints = HookedTransformer.run_with_cache, dict[int, str]()

    def run_with_cache(self: HookedTransformer, *args: Any, **options: Any) -> Any:
        hook = options.get("names_filter")
        plain = len(args) == 1 and set(options) == {"stop_at_layer", "names_filter"}
        if not (plain and isinstance(args[0], Tensor) and isinstance(hook, str)):
            return original(self, *args, **options)
        tokens_BL = args[0]
        if id(self) not in fingerprints:
            # One model at a time: SAEBench has dropped the one before.
            fingerprints.clear()
            fingerprints[id(self)] = model_fingerprint(self, weights)
        asked = {"hook": hook, "asked": "run_with_cache", "tokens": tokens_hash(tokens_BL)}
        key = content_hash({"model": fingerprints[id(self)], **asked})
        if (kept := cache.get(key, tokens_BL.device)) is not None:
            return None, kept
        output, activations = original(self, *args, **options)
        cache.put(key, {hook: activations[hook]})
        return output, activations

    return {"transformer_lens.HookedTransformer.run_with_cache": run_with_cache}
