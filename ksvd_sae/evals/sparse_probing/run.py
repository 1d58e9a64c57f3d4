"""SAEBench's sparse probing."""

from pathlib import Path
from typing import Any

from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.saebench.runner import drop_half_written, made_by, results, run_eval
from ksvd_sae.evals.sparse_probing import SparseProbingEval
from ksvd_sae.offline import bbc_news
from ksvd_sae.replaced import replaced
from ksvd_sae.store import content_hash

# Local data sets of text and label, and their labels.
LABELS = {bbc_news.NAME: [str(i) for i in range(len(bbc_news.CLASSES))]}
# Counts up when the same input gives other scores.
_VERSION = 2


def run_sparse_probing(
    panel: list[Panelist], config: SparseProbingEval, setting: EvalSetting, output: Path
) -> EvalResults:
    """SAEBench's sparse probing, on its own data sets and on local ones of text and label; see ``Eval.run``."""
    from sae_bench.evals.sparse_probing import main as probing
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    from ksvd_sae.evals.saebench.adapters import heads_flattened, working_directory
    from ksvd_sae.evals.sparse_probing.adapters import labelled_text_datasets, llm_probes_apart

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
    shared = {"config": config.model_dump(), "data": setting.data_hash, "version": _VERSION, **made_by(setting)}
    artifacts = setting.artifacts.resolve() / f"sparse_probing-{content_hash(shared)}"

    def evaluate(saes: list[tuple[str, Any]], folder: Path, reasons: list[str]) -> None:
        drop_half_written(artifacts)
        changes = heads_flattened(), labelled_text_datasets(LABELS), llm_probes_apart()
        with working_directory(setting.data_folder), replaced(*changes):
            probing.run_eval(
                eval_config, saes, setting.device, str(folder), artifacts_path=str(artifacts), save_activations=True
            )

    settings = {"config": config.model_dump(), "version": _VERSION}
    files = run_eval("sparse_probing", panel, settings, setting, output, evaluate)
    data = "SAEBench's eight data sets" if config.datasets is None else ", ".join(config.datasets)
    return results("sparse_probing", data, config.test_set_size, files, config.seed)
