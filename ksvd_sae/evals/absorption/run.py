"""SAEBench's first-letter absorption: how far latents for a word take the place of the latent for its first letter.

Lower is better. Two scores: the mean absorption fraction (how much of the letter's direction other latents carry) and
full absorption (the share of words on which the letter's latents are silent and another one stands in for them).
SAEBench redefined the fraction between 0.3.2, which all published numbers are from, and 0.6.0: compare it within a
table only.

Signed codes: k-sparse probes take the latents of the largest weight, not of the largest in size; a latent's part in the
letter's direction counts only where code times cosine is positive, and a latent with a negative code counts as silent.
The scores of signed codes are left as SAEBench gives them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ksvd_sae.activations.language import hook_layer
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.config import AbsorptionConfig
from ksvd_sae.evals.saebench.runner import EvalSetting, Panelist, run_eval
from ksvd_sae.store import content_hash, versions

# SAEBench looks at this many latents of each word.
_LATENTS = 10
# What changes no score.
_WITHOUT_EFFECT = {"llm_cache_bytes"}
# What the probes follow from; hook and layer are in SAEBench's own path.
_OF_THE_PROBES = {"vocabulary_sample", "prompt_template", "prompt_token_pos", "seed"}


def run_absorption(
    panel: list[Panelist], config: AbsorptionConfig, setting: EvalSetting, output: Path
) -> dict[str, Path]:
    """SAEBench's absorption eval, on words of the model's own vocabulary.

    The LLM runs once for the panel, and no further than the hook; without a ``setting.cache`` whole and for each SAE,
    as SAEBench has it. Words that are no single token in the prompt are left out; their number is in the log and in the
    results' ``eval_result_unstructured``.

    Returns, Raises: as ``core.run_core``; also for a dictionary of another hook than a block's ``hook_resid_post``, of
        fewer than 10 latents, and where probes on the activations find too few letters.
    """
    from sae_bench.evals.absorption import main as absorption

    from ksvd_sae.evals.absorption import adapters as adapters
    from ksvd_sae.evals.absorption.probes import LetterProbes
    from ksvd_sae.evals.saebench.adapters import random_states_kept, working_directory

    shared = {
        "config": config.model_dump(include=_OF_THE_PROBES),
        "model": setting.model_name,
        "dtype": setting.dtype,
        "sae_bench": versions().get("sae-bench"),
    }
    folder = setting.artifacts.resolve() / f"absorption-{content_hash(shared)}"
    probes = LetterProbes(config, folder, setting.device)
    memory = adapters.WordActivations(config.llm_cache_bytes)
    words, facts = _vocabulary(config)
    output = output.resolve()

    @contextmanager
    def llm_shared() -> Iterator[None]:
        if setting.cache is None:
            yield
            return
        with adapters.stopped_at_the_hook(), adapters.llm_once(memory), adapters.quick_metrics():
            yield

    def evaluate(saes: list[tuple[str, Any]], reasons: list[str]) -> None:
        # In the panel's order, which tells whoever asks which of them failed.
        fit = list(takewhile(lambda named: _unfit(named[1], config, probes.too_few) is None, saes))
        if fit:
            with (
                TemporaryDirectory(prefix="absorption-") as workspace,
                # SAEBench writes tables under the working directory, too.
                working_directory(Path(workspace)),
                random_states_kept(),
                adapters.own_words(words),
                llm_shared(),
                adapters.seeded_in_folders(Path(workspace), folder, config.seed, probes.make_ready),
                adapters.noted(facts),
            ):
                absorption.run_eval(_eval_config(config, setting), fit, setting.device, str(output))
        if len(fit) < len(saes):
            raise _unfit(saes[len(fit)][1], config, probes.too_few) or EvaluationError("absorption: not scored")

    key = {"config": config.model_dump(exclude=_WITHOUT_EFFECT)}
    return run_eval("absorption", panel, key, setting, output, evaluate)


def words_scored(path: Path) -> int:
    """How many words a result's scores are averaged over: those in which the probes find the letter."""
    details: list[dict[str, Any]] = json.loads(path.read_text())["eval_result_details"]
    return sum(detail["num_probe_true_positives"] for detail in details)


def _eval_config(config: AbsorptionConfig, setting: EvalSetting) -> Any:
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

    own = {"vocabulary_sample", "llm_cache_bytes", "seed", "llm_batch_contexts", "min_gt_probe_f1"}
    return AbsorptionEvalConfig(
        model_name=setting.model_name,
        llm_dtype=setting.dtype,
        random_seed=config.seed,
        llm_batch_size=config.llm_batch_contexts,
        min_GT_probe_f1=config.min_gt_probe_f1,
        **config.model_dump(exclude=own),
    )


def _vocabulary(config: AbsorptionConfig) -> tuple[Callable[[Any], list[str]], Callable[[], dict[str, Any]]]:
    """The words of a tokenizer, and what to say about them; made once, though SAEBench asks for each SAE."""
    from ksvd_sae.evals.absorption.vocabulary import Vocabulary

    made: list[Vocabulary] = []

    def words(tokenizer: Any) -> list[str]:
        if not made:
            made.append(
                Vocabulary(
                    tokenizer, config.prompt_template, config.prompt_token_pos, config.vocabulary_sample, config.seed
                )
            )
        return made[0].words

    return words, lambda: made[0].facts()


def _unfit(sae: Any, config: AbsorptionConfig, too_few: dict[int, EvaluationError]) -> EvaluationError | None:
    """Why an SAE cannot be scored, as far as is known without scoring it."""
    hook = str(sae.cfg.metadata.hook_name)
    layer = hook_layer(hook)
    if layer is None or hook != f"blocks.{layer}.hook_resid_post":
        return EvaluationError(
            f"absorption: the dictionary is of hook {hook!r}",
            limit="blocks.N.hook_resid_post",
            cause="SAEBench reads the activations of that hook alone, whatever the dictionary was learned on",
            cure="leave evaluation.absorption out for this hook",
        )
    if sae.cfg.d_sae < (least := max(_LATENTS, config.max_k_value)):
        return EvaluationError(
            "absorption: the dictionary has too few latents",
            got=sae.cfg.d_sae,
            limit=f"at least {least}",
            cause=f"SAEBench looks at the {_LATENTS} first latents of a word, and probes use up to max_k_value",
            cure="leave this dictionary out, or lower evaluation.absorption.max_k_value where that is the limit",
        )
    if layer in too_few:
        return EvaluationError(f"absorption: too few letters at layer {layer}, as said before")
    return None
