"""SAEBench's automated interpretability, judged by whom the config says."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ksvd_sae.evals.autointerp import AutoInterpEval
from ksvd_sae.evals.autointerp.endpoint import EndpointJudge
from ksvd_sae.evals.autointerp.lexical import Judge, LexicalJudge
from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.saebench.runner import drop_half_written, made_by, results, run_eval
from ksvd_sae.replaced import replaced
from ksvd_sae.store import content_hash

# What scores follow from of these, the judge's identity says.
_NO_SCORE = {"judge", "endpoint"}


def run_autointerp(panel: list[Panelist], config: AutoInterpEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's automated interpretability ("detection" score); see ``Eval.run``.

    Each result has a field ``judge`` beside SAEBench's own: who judged, how many latents, tokens and cost. What the
    judge was shown and said lies in ``setting.artifacts``, by the result's name.

    It looks at positive activations only: of a signed code, half is not judged; its split view has both halves.

    Answers of an endpoint are kept, and not asked for again.
    """
    from sae_bench.evals.autointerp import main as autointerp

    from ksvd_sae.evals.autointerp.adapters import activations_kept, enough_text, judged_by
    from ksvd_sae.evals.autointerp.judging import Judging
    from ksvd_sae.evals.saebench.adapters import heads_flattened, working_directory

    dataset, judge = setting.data(config.dataset), judge_of(config, setting.artifacts.resolve())
    # SAEBench reuses tokens by the model's name and their number alone: the folder carries the rest.
    sizes = {"total_tokens": config.total_tokens, "context_tokens": config.context_tokens}
    tokens = {"data": setting.data_hash, "dataset": dataset, **sizes, **made_by(setting)}
    artifacts = setting.artifacts.resolve() / f"autointerp-{content_hash(tokens)}"
    judging = Judging(judge, config.least_latents, artifacts / "logs", _prices(config))

    def evaluate(saes: list[tuple[str, Any]], folder: Path, reasons: list[str]) -> None:
        drop_half_written(artifacts)
        with (
            working_directory(setting.data_folder),
            replaced(
                heads_flattened(),
                judged_by(judging, config.seed),
                enough_text(setting.prepend_bos),
                activations_kept(setting.cache, setting.weights),
            ),
        ):
            _outside_event_loops(
                lambda: autointerp.run_eval(
                    bench_config(config, dataset, setting),
                    saes,
                    setting.device,
                    "no key: the judge has its own",
                    str(folder),
                    artifacts_path=str(artifacts),
                )
            )

    settings = {name: value for name, value in config.model_dump().items() if name not in _NO_SCORE}
    key = {"config": settings, "dataset": dataset, "judge": judge.identity}
    files = run_eval("autointerp", panel, key, setting, output, evaluate)
    n_judged = {name: judged_latents(path) for name, path in files.items()}
    return results("autointerp", f"{dataset}, judge: {config.judge_name}", n_judged, files, config.seed)


def judge_of(config: AutoInterpEval, artifacts: Path) -> Judge:
    """The judge that the config asks for; an endpoint's answers are kept below ``artifacts``."""
    if config.judge == "lexical" or config.endpoint is None:
        return LexicalJudge()
    endpoint = config.endpoint
    who = {"model": endpoint.model, "base_url": endpoint.base_url}
    return EndpointJudge(
        endpoint.model,
        artifacts / f"judge-{content_hash(who)}",
        base_url=endpoint.base_url,
        key_variable=endpoint.key_variable,
        requests_per_minute=endpoint.requests_per_minute,
        timeout_s=endpoint.timeout_s,
        tries=endpoint.max_retries + 1,
    )


def judged_latents(path: Path) -> int:
    """How many latents a result's score is the mean of."""
    return int(json.loads(path.read_text())["judge"]["latents"]["judged"])


def _prices(config: AutoInterpEval) -> tuple[float, float] | None:
    endpoint = config.endpoint
    if endpoint is None or endpoint.input_price is None or endpoint.output_price is None:
        return None
    return endpoint.input_price, endpoint.output_price


def bench_config(config: AutoInterpEval, dataset: str, setting: EvalSetting) -> Any:
    """The eval's settings as SAEBench takes them."""
    from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig

    same = (
        *("n_latents", "dead_latent_threshold", "total_tokens", "buffer", "no_overlap", "act_threshold_frac"),
        *("max_tokens_in_explanation", "use_demos_in_explanation"),
        *("n_top_ex_for_generation", "n_iw_sampled_ex_for_generation"),
        *("n_top_ex_for_scoring", "n_random_ex_for_scoring", "n_iw_sampled_ex_for_scoring"),
    )
    return AutoInterpEvalConfig(
        model_name=setting.model_name,
        random_seed=config.seed,
        dataset_name=dataset,
        llm_context_size=config.context_tokens,
        llm_batch_size=config.llm_batch_contexts,
        llm_dtype=setting.dtype,
        **{name: getattr(config, name) for name in same},
    )


def _outside_event_loops(call: Callable[[], Any]) -> None:
    """SAEBench begins an event loop, which cannot be done inside another one, such as a notebook's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        call()
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()
