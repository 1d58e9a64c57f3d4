"""What SAEBench's absorption eval needs changed around it. Each adapter says why it exists.

All are context managers that put everything back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_bench.evals.absorption import common, feature_absorption, k_sparse_probing
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.vocab import LETTERS
from torch import Tensor
from transformer_lens import HookedTransformer

from ksvd_sae.activations.language import hook_layer
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.absorption import binary_metrics
from ksvd_sae.evals.saebench.adapters import replaced, seed_all


@contextmanager
def own_words(words: Callable[[Any], list[str]]) -> Iterator[None]:
    """Let the eval use these words, as they are.

    It takes the vocabulary in the tokenizer's order, which changes with every call, with words that stop it, and whole.
    And it makes the words that it stored into strings as if they were tokens: with tokenizers that drop a leading space
    in doing so (Llama's), the words that it goes on with are other ones, not all of them tokens.

    Args: words: a tokenizer's words.
    """

    class _AsTheyAre:
        @staticmethod
        def convert_tokens_to_string(tokens: list[str]) -> str:
            return "".join(tokens)

    parse = common._parse_probe_data_split

    def parsed(tokenizer: Any, *arguments: Any, **options: Any) -> Any:
        return parse(_AsTheyAre, *arguments, **options)

    with (
        replaced(common, "get_alpha_tokens", words),
        replaced(feature_absorption, "get_alpha_tokens", words),
        replaced(common, "_parse_probe_data_split", parsed),
    ):
        yield


@contextmanager
def stopped_at_the_hook() -> Iterator[None]:
    """End a forward pass behind the block that it is read at.

    The eval reads one block's output and runs the whole model, logits of the whole vocabulary and all: several times
    the work, and gigabytes. What the hook gives is the same.
    """
    whole = HookedTransformer.run_with_cache

    def stopped(self: Any, *arguments: Any, names_filter: Any = None, **options: Any) -> Any:
        layers = [hook_layer(name) for name in names_filter] if isinstance(names_filter, list) else [None]
        known = [layer for layer in layers if layer is not None]
        if known and len(known) == len(layers):
            options = {"stop_at_layer": max(known) + 1, **options}
        return whole(self, *arguments, names_filter=names_filter, **options)

    with replaced(HookedTransformer, "run_with_cache", stopped):
        yield


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


@contextmanager
def llm_once(memory: WordActivations) -> Iterator[None]:
    """Run the LLM once for all SAEs of a hook.

    The eval runs it on the same prompts for each SAE (the same words, and the same examples as they are drawn by the
    same seed), and uses the activation at the word alone.
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

    with replaced(feature_absorption, "FeatureAbsorptionCalculator", _Calculator):
        yield


@contextmanager
def quick_metrics() -> Iterator[None]:
    """Count hits and misses without scikit-learn's checks: the same numbers in less time."""
    with replaced(k_sparse_probing, "metrics", binary_metrics):
        yield


@contextmanager
def seeded_in_folders(workspace: Path, probes: Path, seed: int, before: Callable[[Any, int], None]) -> Iterator[None]:
    """Seed the eval, and let it write outside its own package.

    It has a seed in its config and never uses it. It writes probes and tables inside the installed package, and finds
    them again by names: the probes by model and layer, whatever the vocabulary, prompt and dtype were, the tables by
    the SAE's name, even if they were written by halves. Each SAE is seeded by itself, so its scores do not depend on
    which others are in the panel, nor on whether the probes were there already.

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

    with (
        replaced(absorption, "run_k_sparse_probing_experiment", probe),
        replaced(absorption, "run_feature_absortion_experiment", absorb),
    ):
        yield


@contextmanager
def noted(facts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Put facts into the result's ``eval_result_unstructured``: which words were left out belongs to the scores."""

    def output(**fields: Any) -> Any:
        return make(eval_result_unstructured=facts(), **fields)

    make = absorption.AbsorptionEvalOutput
    with replaced(absorption, "AbsorptionEvalOutput", output):
        yield


@contextmanager
def every_letter_to_learn_from() -> Iterator[None]:
    """Refuse a split that leaves a letter no word to learn from, before the LLM runs.

    The weight of that letter's positives is infinite, which makes the loss of all letters no number.

    Raises: EvaluationError naming the letters.
    """
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

    with replaced(common, "create_dataset_probe_training", checked):
        yield
