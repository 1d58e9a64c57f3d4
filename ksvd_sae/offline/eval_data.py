"""The small data sets that a run's evals read where the Hub's cannot be had, written where the evals look."""

from pathlib import Path

from ksvd_sae.evals.config import EvaluationConfig
from ksvd_sae.offline import bbc_news, biographies, ravel


def write_eval_data(folder: Path, evaluation: EvaluationConfig) -> None:
    """Into ``folder``, a folder for each data set of ours that an eval names, under its own name."""
    probing = evaluation.sparse_probing
    if probing is not None and bbc_news.NAME in (probing.datasets or []):
        bbc_news.write_probing_dataset(folder / bbc_news.NAME)
    scr = evaluation.scr
    if scr is not None and biographies.NAME in (scr.datasets or []):
        # SAEBench takes a quarter of a set from each profession and gender, and twice that where they are biased.
        sizes = (size // 2 + 1 for size in (scr.train_set_size, scr.test_set_size))
        biographies.write_dataset(folder / biographies.NAME, *sizes)
    if evaluation.ravel is not None and evaluation.ravel.dataset == ravel.NAME:
        ravel.write_files(folder / ravel.NAME)
