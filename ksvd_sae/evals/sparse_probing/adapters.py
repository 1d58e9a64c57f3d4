"""What stands in SAEBench's place for sparse probing to read our data sets; why: ``ksvd_sae.replaced``."""

from sae_bench.sae_bench_utils import dataset_utils

from ksvd_sae.replaced import Changes


def labelled_text_datasets(classes: dict[str, list[str]]) -> Changes:
    """Data sets of text and integer label besides SAEBench's own eight, under their own names.

    Args: classes: data set name -> its labels, as strings.
    """
    original = dataset_utils.get_multi_label_train_test_data

    def read(
        dataset_name: str, train_set_size: int, test_set_size: int, random_seed: int
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if dataset_name not in classes:
            return original(dataset_name, train_set_size, test_set_size, random_seed)
        return dataset_utils.get_ag_news_dataset(
            dataset_name, classes[dataset_name], train_set_size, test_set_size, random_seed
        )

    return {
        "sae_bench.sae_bench_utils.dataset_info.chosen_classes_per_dataset": classes,
        "sae_bench.sae_bench_utils.dataset_utils.get_multi_label_train_test_data": read,
    }
