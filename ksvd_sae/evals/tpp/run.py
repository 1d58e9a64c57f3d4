"""SAEBench's targeted probe perturbation."""

from pathlib import Path

from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.scr.run import run_ablations
from ksvd_sae.evals.sparse_probing.run import LABELS
from ksvd_sae.evals.tpp import TppEval


def run_tpp(panel: list[Panelist], config: TppEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's targeted probe perturbation, on its own data sets and on local ones of text and label.

    See ``run_ablations``.
    """
    from ksvd_sae.evals.sparse_probing.adapters import labelled_text_datasets

    # Which SAEBench looks up for every data set, and uses for SCR alone.
    second_attribute = {"sae_bench.evals.scr_and_tpp.main.COLUMN2_VALS_LOOKUP": dict.fromkeys(LABELS)}
    changes = {**labelled_text_datasets(LABELS), **second_attribute}
    return run_ablations(panel, config, setting, output, changes, {"perform_scr": False}, {})
