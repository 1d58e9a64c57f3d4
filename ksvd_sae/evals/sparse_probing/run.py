"""SAEBench's sparse probing."""

from pathlib import Path
from typing import Any

from ksvd_sae.evals.config import SparseProbingConfig
from ksvd_sae.evals.saebench.runner import EvalSetting, Panelist, drop_half_written, run_eval
from ksvd_sae.store import content_hash


def run_sparse_probing(
    panel: list[Panelist],
    config: SparseProbingConfig,
    classes: dict[str, list[str]],
    setting: EvalSetting,
    output: Path,
) -> dict[str, Path]:
    """SAEBench's sparse probing.

    Args: classes: local data sets of text and label (in ``setting.data_folder``) and their labels.
    Returns, Raises: as ``core.run_core``.
    """
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    from ksvd_sae.evals.saebench.adapters import labelled_text_datasets, working_directory

    eval_config = SparseProbingEvalConfig(
        random_seed=config.seed,
        probe_train_set_size=config.train_set_size,
        probe_test_set_size=config.test_set_size,
        context_length=config.context_tokens,
        llm_batch_size=config.llm_batch_contexts,
        llm_dtype=setting.dtype,
        model_name=setting.model_name,
        k_values=config.k_values,
        **({} if config.datasets is None else {"dataset_names": config.datasets}),
    )
    # SAEBench reuses LLM activations by the data set's name alone: the folder carries the rest.
    shared = {"config": config.model_dump(), "model": setting.model_name, "dtype": setting.dtype}
    artifacts = setting.artifacts.resolve() / f"sparse_probing-{content_hash({**shared, 'data': setting.data_hash})}"
    output = output.resolve()

    def evaluate(saes: list[tuple[str, Any]], reasons: list[str]) -> None:
        drop_half_written(artifacts)
        with working_directory(setting.data_folder), labelled_text_datasets(classes):
            probing.run_eval(
                eval_config, saes, setting.device, str(output), artifacts_path=str(artifacts), save_activations=True
            )

    return run_eval("sparse_probing", panel, {"config": config.model_dump()}, setting, output, evaluate)
