"""What stands in SAEBench's place for SCR to read our data sets; why: ``ksvd_sae.replaced``."""

from sae_bench.evals.scr_and_tpp.main import COLUMN2_VALS_LOOKUP
from sae_bench.sae_bench_utils.dataset_info import dataset_metadata

from ksvd_sae.replaced import Changes


def bias_in_bios_datasets(professions: dict[str, dict[str, int]]) -> Changes:
    """Data sets that are laid out as LabHC/bias_in_bios, under their own names.

    Args: professions: data set name, with 'bias_in_bios' in it, by which SAEBench knows spurious correlations ->
        profession -> its number.
    """
    layout, genders = dataset_metadata["LabHC/bias_in_bios"], COLUMN2_VALS_LOOKUP["LabHC/bias_in_bios_class_set1"]
    return {
        "sae_bench.sae_bench_utils.dataset_info.dataset_metadata": {
            name: {**layout, "column1_mapping": numbers} for name, numbers in professions.items()
        },
        "sae_bench.evals.scr_and_tpp.main.COLUMN2_VALS_LOOKUP": dict.fromkeys(professions, genders),
    }
