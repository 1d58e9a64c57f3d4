"""How SAEBench's absorption is run, on words of the model's own vocabulary."""

import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ksvd_sae.activations.language import hook_layer
from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.absorption import AbsorptionEval
from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.saebench.runner import results, run_eval
from ksvd_sae.replaced import replaced
from ksvd_sae.store import content_hash, versions

# SAEBench looks at this many latents of each word.
_LATENTS = 10
# What changes no score.
_WITHOUT_EFFECT = {"llm_cache_bytes"}
# What the probes follow from; hook and layer are in SAEBench's own path.
_OF_THE_PROBES = {"vocabulary_sample", "prompt_template", "prompt_token_pos", "seed"}


def run_absorption(panel: list[Panelist], config: AbsorptionEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's absorption eval, on words of the model's own vocabulary.

    The LLM runs once for the panel, and no further than the hook; without a ``setting.cache`` whole and for each SAE,
    as SAEBench has it. Words that are no single token in the prompt are left out; their number is in the log and in the
    results' ``eval_result_unstructured``.

    Returns, Raises: as ``Eval.run``; also for a dictionary of another hook than a block's ``hook_resid_post``, of
        fewer than 10 latents, and where probes on the activations find too few letters.
    """
    from sae_bench.evals.absorption import main as absorption

    from ksvd_sae.evals.absorption import adapters as adapters
    from ksvd_sae.evals.absorption.probes import LetterProbes
    from ksvd_sae.evals.saebench.adapters import random_states_kept, working_directory

    shared = {
        "config": config.model_dump(include=_OF_THE_PROBES),
        "model": setting.model,
        "dtype": setting.dtype,
        "sae_bench": versions().get("sae-bench"),
    }
    folder = setting.artifacts.resolve() / f"absorption-{content_hash(shared)}"
    probes = LetterProbes(config, folder, setting.device)
    memory = adapters.WordActivations(config.llm_cache_bytes)
    words, facts = _vocabulary(config)
    output = output.resolve() / "absorption"

    def evaluate(saes: list[tuple[str, Any]], reasons: list[str]) -> None:
        # In the panel's order, which tells whoever asks which of them failed.
        fit = list(takewhile(lambda named: _unfit(named[1], config, probes.too_few) is None, saes))
        if fit:
            with (
                TemporaryDirectory(prefix="absorption-") as workspace,
                # SAEBench writes tables under the working directory, too.
                working_directory(Path(workspace)),
                random_states_kept(),
                replaced(
                    adapters.own_words(words),
                    {} if setting.cache is None else adapters.less_work(memory),
                    adapters.seeded_in_folders(Path(workspace), folder, config.seed, probes.make_ready),
                    adapters.noted(facts),
                ),
            ):
                absorption.run_eval(_eval_config(config, setting), fit, setting.device, str(output))
        if len(fit) < len(saes):
            raise _unfit(saes[len(fit)][1], config, probes.too_few) or EvaluationError("absorption: not scored")

    key = {"config": config.model_dump(exclude=_WITHOUT_EFFECT)}
    files = run_eval("absorption", panel, key, setting, output, evaluate)
    sample = config.vocabulary_sample
    data = "vocabulary" if sample is None else f"vocabulary sample of {sample}"
    return results("absorption", data, words_scored(next(iter(files.values()))), files, config.seed)


def words_scored(path: Path) -> int:
    """How many words a result's scores are averaged over: those in which the probes find the letter."""
    details: list[dict[str, Any]] = json.loads(path.read_text())["eval_result_details"]
    return sum(detail["num_probe_true_positives"] for detail in details)


def _eval_config(config: AbsorptionEval, setting: EvalSetting) -> Any:
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


def _vocabulary(config: AbsorptionEval) -> tuple[Callable[[Any], list[str]], Callable[[], dict[str, Any]]]:
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


def _unfit(sae: Any, config: AbsorptionEval, too_few: dict[int, EvaluationError]) -> EvaluationError | None:
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
