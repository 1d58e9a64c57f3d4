"""What stands in SAEBench's place for sparse probing; why: ``ksvd_sae.replaced``."""

from typing import Any

import torch
from sae_bench.evals.sparse_probing import main as probing
from sae_bench.sae_bench_utils import activation_collection, dataset_utils

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


def llm_probes_apart() -> Changes:
    """An SAE's scores are the same whether it or another one before it had the LLM's own probes trained.

    The LLM's probes of each data set are seeded; the SAE's draw what they draw where the LLM's are there already.
    """
    collect, encode = probing.get_dataset_activations, activation_collection.get_sae_meaned_activations
    kept: list[Any] = []

    def collected(dataset_name: str, config: Any, *rest: Any) -> Any:
        kept.append((torch.get_rng_state(), torch.cuda.get_rng_state_all()))
        torch.manual_seed(config.random_seed)
        return collect(dataset_name, config, *rest)

    def encoded(*arguments: Any) -> Any:
        if kept:
            of_cpu, of_gpus = kept.pop()
            torch.set_rng_state(of_cpu)
            torch.cuda.set_rng_state_all(of_gpus)
        return encode(*arguments)

    return {
        "sae_bench.evals.sparse_probing.main.get_dataset_activations": collected,
        "sae_bench.sae_bench_utils.activation_collection.get_sae_meaned_activations": encoded,
    }
