"""SAEBench's spurious correlation removal."""

from itertools import groupby
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.saebench.runner import drop_half_written, results, run_eval
from ksvd_sae.evals.scr import ScrEval
from ksvd_sae.offline import biographies
from ksvd_sae.replaced import replaced
from ksvd_sae.store import content_hash

# Local data sets laid out as bias_in_bios: name -> professions -> number.
PROFESSIONS = {biographies.NAME: biographies.PROFESSIONS}


def run_scr(panel: list[Panelist], config: ScrEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's spurious correlation removal; see ``Eval.run``.

    A dictionary of fewer latents than some ``n_values`` is scored at the others; SAEBench cannot ablate more latents
    than there are. It ablates them in padding too, where the code is that of −b_dec, and divides by the tokens that are
    not padding: where texts are much shorter than ``context_tokens``, that is most of what the probes see. Published
    scores (128 tokens of short biographies) have it in them.
    """
    from sae_bench.evals.scr_and_tpp import main as scr
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

    from ksvd_sae.evals.saebench.adapters import working_directory
    from ksvd_sae.evals.scr.adapters import bias_in_bios_datasets

    options: dict[str, Any] = {}
    if config.datasets is not None:
        options["dataset_names"] = config.datasets
    if config.pairs is not None:
        options["column1_vals_lookup"] = config.pairs
    shared = {"config": config.model_dump(), "model": setting.model, "dtype": setting.dtype}
    artifacts = setting.artifacts.resolve() / f"scr-{content_hash({**shared, 'data': setting.data_hash})}"
    # SAEBench puts the eval's name below the folder that it is given.
    output = output.resolve()

    def evaluate(saes: list[tuple[str, Any]], reasons: list[str]) -> None:
        drop_half_written(artifacts)
        _drop_without_probes(artifacts)
        # In the panel's order, which tells whoever asks which of them failed.
        for n_values, some in groupby(saes, lambda named: _within(config.n_values, named[1])):
            if not n_values:
                raise EvaluationError(
                    "scr: a dictionary has fewer latents than the least of n_values",
                    limit=f"n_values: {config.n_values}",
                    cause="the dictionary cannot have that many latents ablated",
                    cure="add a smaller number to evaluation.scr.n_values",
                )
            eval_config = ScrAndTppEvalConfig(
                random_seed=config.seed,
                perform_scr=True,
                train_set_size=config.train_set_size,
                test_set_size=config.test_set_size,
                context_length=config.context_tokens,
                probe_epochs=config.probe_epochs,
                sae_batch_size=config.sae_batch_texts,
                llm_batch_size=config.llm_batch_contexts,
                llm_dtype=setting.dtype,
                model_name=setting.model_name,
                n_values=list(n_values),
                **options,
            )
            with working_directory(setting.data_folder), replaced(bias_in_bios_datasets(PROFESSIONS)):
                scr.run_eval(eval_config, list(some), setting.device, str(output), artifacts_path=str(artifacts))

    files = run_eval("scr", panel, {"config": config.model_dump()}, setting, output / "scr", evaluate)
    data = "SAEBench's two data sets" if config.datasets is None else ", ".join(config.datasets)
    return results("scr", data, config.test_set_size, files, config.seed)


def _drop_without_probes(artifacts: Path) -> None:
    """Remove activations whose probes an interrupted run did not write, or not to the end: SAEBench would stumble."""
    for path in artifacts.rglob("*_activations.pt"):
        probes = path.with_name(path.name.removesuffix("activations.pt") + "probes.pkl")
        # The last byte of a whole pickle says so; nothing is loaded here.
        if not probes.exists() or probes.read_bytes()[-1:] != b".":
            path.unlink()


def _within(n_values: list[int], sae: Any) -> tuple[int, ...]:
    return tuple(n for n in n_values if n <= sae.cfg.d_sae)
