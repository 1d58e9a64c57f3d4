"""SAEBench's core: loss recovered, KL, L0."""

from pathlib import Path
from typing import Any

from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.core import CoreEval
from ksvd_sae.evals.saebench.runner import results, run_eval
from ksvd_sae.replaced import replaced

# Counts up when the same input gives other scores. 2: KL is no longer 0.001 nats too high.
_VERSION = 2


def run_core(panel: list[Panelist], config: CoreEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's core eval: loss recovered, KL, L0; see ``Eval.run``."""
    from sae_bench.evals.core import main as core

    from ksvd_sae.evals.core.contexts import contexts_kept
    from ksvd_sae.evals.core.shared import shared_core_runs
    from ksvd_sae.evals.saebench.adapters import collected_errors, working_directory

    dataset = setting.data(config.dataset)
    nan_stays_nan = {"sae_bench.evals.core.main.replace_nans_with_negative_one": lambda value: value}

    def evaluate(saes: list[tuple[str, Any]], folder: Path, reasons: list[str]) -> None:
        errors = collected_errors(core.__name__, reasons)
        shared = {} if setting.cache is None else shared_core_runs(setting.cache, setting.memory_bytes, setting.weights)
        with working_directory(setting.data_folder), errors, replaced(nan_stays_nan, contexts_kept(shared)):
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
                output_folder=str(folder),
                dtype=setting.dtype,
                device=setting.device,
            )

    key = {"config": config.model_dump(), "dataset": dataset, "version": _VERSION}
    files = run_eval("core", panel, key, setting, output, evaluate)
    return results("core", dataset, config.n_predictions, files, None)
