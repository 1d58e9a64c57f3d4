"""SAEBench's core: loss recovered, KL, L0."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ksvd_sae.evals.config import CoreConfig
from ksvd_sae.evals.saebench.runner import EvalSetting, Panelist, run_eval

# Counts up when the same input gives other scores. 2: KL is no longer 0.001 nats too high.
_VERSION = 2


def run_core(
    panel: list[Panelist], config: CoreConfig, dataset: str, setting: EvalSetting, output: Path
) -> dict[str, Path]:
    """SAEBench's core eval: loss recovered, KL, L0.

    Args: dataset: a Hub name, or the name of a folder in ``setting.data_folder``.
    Returns: the result file of each panelist.
    Raises: EvaluationError naming every panelist without a result, and why.
    """
    from sae_bench.evals.core import main as core

    from ksvd_sae.evals.core.shared import shared_core_runs
    from ksvd_sae.evals.saebench.adapters import collected_errors, nan_stays_nan, working_directory

    output = output.resolve()

    def shared() -> AbstractContextManager[None]:
        return nullcontext() if setting.cache is None else shared_core_runs(setting.cache, setting.memory_bytes)

    def evaluate(saes: list[tuple[str, Any]], reasons: list[str]) -> None:
        errors = collected_errors(core.__name__, reasons)
        with working_directory(setting.data_folder), nan_stays_nan(), errors, shared():
            core.multiple_evals(
                selected_saes=saes,
                n_eval_reconstruction_batches=config.reconstruction_batches,
                n_eval_sparsity_variance_batches=config.sparsity_batches,
                eval_batch_size_prompts=config.batch_contexts,
                compute_featurewise_density_statistics=True,
                compute_featurewise_weight_based_metrics=True,
                exclude_special_tokens_from_reconstruction=True,
                dataset=dataset,
                context_size=config.context_tokens,
                output_folder=str(output),
                dtype=setting.dtype,
                device=setting.device,
            )

    key = {"config": config.model_dump(), "dataset": dataset, "version": _VERSION}
    return run_eval("core", panel, key, setting, output, evaluate)
