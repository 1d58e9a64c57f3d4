"""What stands in SAEBench's place while absorption runs; why: ``ksvd_sae.replaced``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_bench.evals.absorption import common, feature_absorption
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.vocab import LETTERS
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.activations.language import hook_layer
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.absorption import binary_metrics
from ksvd_sae.evals.saebench.adapters import seed_all
from ksvd_sae.replaced import Changes


def own_words(words: Callable[[Any], list[str]]) -> Changes:
    """The eval uses these words, as they are.

    Args: words: a tokenizer's words.
    """

    class _AsTheyAre:
        @staticmethod
        def convert_tokens_to_string(tokens: list[str]) -> str:
            return "".join(tokens)

    parse = common._parse_probe_data_split

    def parsed(tokenizer: Any, *arguments: Any, **options: Any) -> Any:
        return parse(_AsTheyAre, *arguments, **options)

    return {
        "sae_bench.evals.absorption.common.get_alpha_tokens": words,
        "sae_bench.evals.absorption.feature_absorption.get_alpha_tokens": words,
        "sae_bench.evals.absorption.common._parse_probe_data_split": parsed,
    }


def stopped_at_the_hook() -> Changes:
    """A forward pass ends behind the block that it is read at; what the hook gives is the same."""
    whole = HookedTransformer.run_with_cache

    def stopped(self: Any, *arguments: Any, names_filter: Any = None, **options: Any) -> Any:
        layers = [hook_layer(name) for name in names_filter] if isinstance(names_filter, list) else [None]
        known = [layer for layer in layers if layer is not None]
        if known and len(known) == len(layers):
            options = {"stop_at_layer": max(known) + 1, **options}
        return whole(self, *arguments, names_filter=names_filter, **options)

    return {"transformer_lens.HookedTransformer.run_with_cache": stopped}


class WordActivations:
    """Activations at the words of prompts, kept up to ``limit_bytes``; beyond that the LLM runs again."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.n_bytes = limit_bytes, 0
        self._kept: dict[tuple[str, ...], Tensor] = {}

    def rows(self, model: Any, prompts: list[str], hook: str, position: int) -> Tensor:
        """(B, D) at one position of each prompt; by batch, so that a kept row is the very one that was computed."""
        key = (hook, *prompts)
        if key in self._kept:
            return self._kept[key]
        rows_BD: Tensor = model.run_with_cache(prompts, names_filter=[hook])[1][hook][:, position, :].clone()
        size = rows_BD.nbytes + sum(map(len, key))
        # The first ones stay: every SAE goes through the prompts in the same order, so dropping the oldest keeps none.
        if self.n_bytes + size <= self.limit_bytes:
            self._kept[key] = rows_BD
            self.n_bytes += size
        return rows_BD


def llm_once(memory: WordActivations) -> Changes:
    """The LLM runs once for all SAEs of a hook.

    Its prompts are the same for each SAE: the same words, and the same examples as they are drawn by the same seed.
    """

    class _Recalling:
        def __init__(self, model: Any, position: int):
            self._model, self._position = model, position

        def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, Tensor]]:
            (hook,) = names_filter
            rows_BD = memory.rows(self._model, prompts, hook, self._position)
            # What is read is [:, position]: the word's activation, whichever the position.
            return None, {hook: rows_BD[:, None].expand(-1, max(self._position + 1, -self._position), -1)}

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

    class _Calculator(feature_absorption.FeatureAbsorptionCalculator):
        def __init__(self, *, model: Any, word_token_pos: int, **options: Any):
            super().__init__(model=_Recalling(model, word_token_pos), word_token_pos=word_token_pos, **options)

    return {"sae_bench.evals.absorption.feature_absorption.FeatureAbsorptionCalculator": _Calculator}


def less_work(memory: WordActivations) -> Changes:
    """The same numbers in less time."""
    metrics = {"sae_bench.evals.absorption.k_sparse_probing.metrics": binary_metrics}
    return {**stopped_at_the_hook(), **llm_once(memory), **metrics}


def seeded_in_folders(workspace: Path, probes: Path, seed: int, before: Callable[[Any, int], None]) -> Changes:
    """The eval is seeded, and writes outside its own package.

    Each SAE is seeded by itself, so its scores do not depend on which others are in the panel, nor on whether the
    probes were there already.

    Args:
        workspace: for an SAE's tables, empty. probes: SAEBench's ``probes_dir``.
        before: called with model and layer before an SAE is probed.
    """
    probe_words, find_absorption = (
        absorption.run_k_sparse_probing_experiment,
        absorption.run_feature_absortion_experiment,
    )
    tables = workspace / "k_sparse_probing"

    def probe(*, model: Any, layer: int, **options: Any) -> Any:
        before(model, layer)
        seed_all(seed)
        return probe_words(model=model, layer=layer, experiment_dir=tables, probes_dir=probes, **options)

    def absorb(**options: Any) -> Any:
        seed_all(seed)
        return find_absorption(
            experiment_dir=workspace / "feature_absorption",
            sparse_probing_experiment_dir=tables,
            probes_dir=probes,
            **options,
        )

    return {
        "sae_bench.evals.absorption.main.run_k_sparse_probing_experiment": probe,
        "sae_bench.evals.absorption.main.run_feature_absortion_experiment": absorb,
    }


def noted(facts: Callable[[], dict[str, Any]]) -> Changes:
    """Facts are in the result's ``eval_result_unstructured``."""

    def output(**fields: Any) -> Any:
        return make(eval_result_unstructured=facts(), **fields)

    make = absorption.AbsorptionEvalOutput
    return {"sae_bench.evals.absorption.main.AbsorptionEvalOutput": output}


def every_letter_to_learn_from() -> Changes:
    """A split that leaves a letter no word to learn from is an error that names it, before the LLM runs."""
    split = common.create_dataset_probe_training

    def checked(*arguments: Any, **options: Any) -> Any:
        train, test = split(*arguments, **options)
        missing = [letter for i, letter in enumerate(LETTERS) if i not in {label for _, label in train}]
        if missing:
            raise EvaluationError(
                f"absorption: no training word begins with {', '.join(missing)}",
                got=f"{len(train)} training words",
                limit="a word for each of the 26 letters",
                cause="the vocabulary, or the sample of it, is too small",
                cure="raise evaluation.absorption.vocabulary_sample, or draw another one (seed)",
            )
        return train, test

    return {"sae_bench.evals.absorption.common.create_dataset_probe_training": checked}
