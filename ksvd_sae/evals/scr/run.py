"""SAEBench's spurious correlation removal, and its code, which is that of targeted probe perturbation too."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.saebench.runner import drop_half_written, made_by, result_file, results, run_eval
from ksvd_sae.evals.scr import AblationEval, ScrEval
from ksvd_sae.offline import biographies
from ksvd_sae.replaced import Changes, replaced
from ksvd_sae.store import content_hash

# Local data sets laid out as bias_in_bios: name -> professions -> number.
PROFESSIONS = {biographies.NAME: biographies.PROFESSIONS}
# Counts up when the same input gives other scores.
_VERSION = 2
_ACTIVATIONS = "*_activations.pt"


def run_scr(panel: list[Panelist], config: ScrEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's spurious correlation removal; see ``run_ablations``."""
    from ksvd_sae.evals.scr.adapters import bias_in_bios_datasets

    options: dict[str, Any] = {"perform_scr": True}
    if config.pairs is not None:
        options["column1_vals_lookup"] = config.pairs
    changes, version = bias_in_bios_datasets(PROFESSIONS), {"version": _VERSION}
    return run_ablations(panel, config, setting, output, changes, options, version)


def run_ablations(
    panel: list[Panelist],
    config: AblationEval,
    setting: EvalSetting,
    output: Path,
    changes: Changes,
    options: dict[str, Any],
    version: dict[str, int],
) -> EvalResults:
    """SAEBench's SCR or TPP; see ``Eval.run``.

    A dictionary of fewer latents than some ``n_values`` is scored at the others; SAEBench cannot ablate more latents
    than there are. It ablates them in padding too, where the code is that of −b_dec, and divides by the tokens that are
    not padding: where texts are much shorter than ``context_tokens``, that is most of what the probes see. Published
    scores (128 tokens of short biographies) have it in them.

    Args:
        changes: for SAEBench to read our data sets.
        options: more of its config; ``perform_scr`` says which eval.
        version: of our own part, in the key of results.
    """
    from sae_bench.evals.scr_and_tpp import main as scr
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

    from ksvd_sae.evals.saebench.adapters import heads_flattened, working_directory

    key = {"config": config.model_dump(), **version}
    shared = {**key, "data": setting.data_hash, **made_by(setting)}
    artifacts = setting.artifacts.resolve() / f"{config.name}-{content_hash(shared)}"
    if config.datasets is not None:
        options = {**options, "dataset_names": config.datasets}
    whole = ScrAndTppEvalConfig(**options)
    pairs = whole.column1_vals_lookup if options["perform_scr"] else {}
    n_files = len({(name, *pair) for name in whole.dataset_names for pair in pairs.get(name, [()])})

    def score(sae: tuple[str, Any], n_values: list[int], scratch: str) -> None:
        eval_config = ScrAndTppEvalConfig(
            random_seed=config.seed,
            train_set_size=config.train_set_size,
            test_set_size=config.test_set_size,
            context_length=config.context_tokens,
            probe_epochs=config.probe_epochs,
            sae_batch_size=config.sae_batch_texts,
            llm_batch_size=config.llm_batch_contexts,
            llm_dtype=setting.dtype,
            model_name=setting.model_name,
            n_values=n_values,
            **options,
        )
        scr.run_eval(eval_config, [sae], setting.device, scratch, force_rerun=True, artifacts_path=str(artifacts))

    def evaluate(saes: list[tuple[str, Any]], folder: Path, reasons: list[str]) -> None:
        drop_half_written(artifacts)
        _drop_without_probes(artifacts)
        # SAEBench puts a folder of the eval's name below the one that it is given.
        with (
            working_directory(setting.data_folder),
            replaced(heads_flattened(), changes),
            TemporaryDirectory(prefix="unfinished-", dir=folder) as scratch,
        ):
            for stem, sae in saes:
                n_values = [n for n in config.n_values if n <= sae.cfg.d_sae]
                if not n_values:
                    raise EvaluationError(
                        f"{config.name}: a dictionary has fewer latents than the least of n_values",
                        limit=f"n_values: {config.n_values}",
                        cause="the dictionary cannot have that many latents ablated",
                        cure=f"add a smaller number to evaluation.{config.name}.n_values",
                    )
                if len(list(artifacts.rglob(_ACTIVATIONS))) < n_files:
                    # Both draw all the time: TPP texts of other classes, SCR an order of texts. The SAE in whose turn
                    # probes are trained would draw others than those after it, and so would the probes of what an
                    # interrupted run had not come to: all are trained in a turn of their own, where nothing is ablated.
                    shutil.rmtree(artifacts, ignore_errors=True)
                    score((stem, sae), [], scratch)
                score((stem, sae), n_values, scratch)
                result_file(Path(scratch) / config.name, stem).replace(result_file(folder, stem))

    files = run_eval(config.name, panel, key, setting, output, evaluate)
    data = "SAEBench's two data sets" if config.datasets is None else ", ".join(config.datasets)
    return results(config.name, data, config.test_set_size, files, config.seed)


def _drop_without_probes(artifacts: Path) -> None:
    """Remove activations whose probes an interrupted run did not write, or not to the end: SAEBench would stumble."""
    for path in artifacts.rglob(_ACTIVATIONS):
        probes = path.with_name(path.name.removesuffix("activations.pt") + "probes.pkl")
        # The last byte of a whole pickle says so; nothing is loaded here.
        if not probes.exists() or probes.read_bytes()[-1:] != b".":
            path.unlink()
