"""SAEBench's RAVEL: an attribute of an entity changed, its others kept."""

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import EvalResults, EvalSetting, Panelist
from ksvd_sae.evals.ravel import RavelEval
from ksvd_sae.evals.saebench.runner import made_by, results, run_eval
from ksvd_sae.replaced import replaced
from ksvd_sae.store import atomic_path, content_hash, file_sha256

HUB_DATASET = "adamkarvonen/ravel_prompts"
# Where SAEBench keeps prompts and completions, below the working directory.
_KEPT = Path("artifacts") / "ravel"
_HOOK = re.compile(r"blocks\.\d+\.hook_resid_post")


def run_ravel(panel: list[Panelist], config: RavelEval, setting: EvalSetting, output: Path) -> EvalResults:
    """SAEBench's RAVEL; see ``Eval.run``.

    For each attribute a mask over the latents is trained to bring another entity's value of it; scored is how often it
    does (cause) and how often another attribute's value stays (isolation). What depends on no dictionary, such as which
    prompts the model answers right, is computed once for a panel, and the answers are kept.

    Raises: also EvaluationError if too few prompts are answered right.
    """
    from sae_bench.evals.ravel import main as ravel

    from ksvd_sae.evals.ravel import adapters as adapters
    from ksvd_sae.evals.saebench.adapters import working_directory

    prompts = _local_prompts(config, setting)
    hashes = {path.name: file_sha256(path) for path in prompts}
    kept = setting.artifacts.resolve() / f"ravel-{content_hash(_completions_key(config, setting, hashes))}"
    loaded: dict[Any, Any] = {}
    activations: dict[str, Any] = {}

    def prepare(model: Any, tokenizer: Any) -> None:
        name, asked = ravel.LLM_NAME_MAP[setting.model_name], _saebench_config(config, setting)
        _complete(asked, name, model, tokenizer)
        for kind, attributes in config.attributes.items():
            _require_right_answers(kind, attributes, _answers_file(kind, name, asked), config.right_prompts_needed)

    def evaluate(saes: list[tuple[str, Any]], folder: Path, reasons: list[str]) -> None:
        _lay_out(prompts, kept)
        with (
            working_directory(kept),
            adapters.seeded(config.seed),
            ExitStack() as hooks,
            replaced(
                adapters.model_known_by_name(setting.model_name),
                adapters.hooks_on_any_decoder(hooks),
                adapters.activations_kept(activations),
                adapters.entity_positions_without_bos(),
                adapters.no_score_of_no_pairs(),
                adapters.loaded_once(loaded, prepare, setting.weights, setting.prepend_bos),
            ),
        ):
            for name, sae in saes:
                _require_residual_stream(name, sae)
                sae.requires_grad_(False)
                # A config of its own: SAEBench changes it.
                ravel.run_eval(
                    _saebench_config(config, setting),
                    [(name, sae)],
                    setting.device,
                    str(folder),
                    artifacts_path=_KEPT.parts[0],
                )

    key = {"config": config.model_dump(), "prompts": hashes}
    files = run_eval("ravel", panel, key, setting, output, evaluate)
    n_pairs = {name: scored_pairs(path) for name, path in files.items()}
    return results("ravel", config.dataset or HUB_DATASET, n_pairs, files, config.seed)


def _require_residual_stream(name: str, sae: Any) -> None:
    """SAEBench takes the hook's number for a decoder layer, and changes what the layer gives out, whatever the hook."""
    hook = str(sae.cfg.metadata.hook_name)
    if not _HOOK.fullmatch(hook):
        raise EvaluationError(
            f"ravel: {name} is not of a layer's output",
            got=hook,
            limit="blocks.<layer>.hook_resid_post",
            cause="RAVEL swaps codes at the output of a decoder layer only",
            cure="leave evaluation.ravel out for this hook",
        )


def scored_pairs(path: Path) -> int:
    """How many pairs the scores of a result are averaged over, all attributes together."""
    details = json.loads(path.read_text())["eval_result_unstructured"]
    scored = [attribute for attributes in details.values() for attribute in attributes.values()]
    return sum(int(attribute["cause_pairs"]) + int(attribute["isolation_pairs"]) for attribute in scored)


def _saebench_config(config: RavelEval, setting: EvalSetting) -> Any:
    from sae_bench.evals.ravel.eval_config import RAVELEvalConfig

    return RAVELEvalConfig(
        entity_attribute_selection=config.attributes,
        top_n_entities=config.top_n_entities,
        full_dataset_downsample=config.downsample,
        num_pairs_per_attribute=config.pairs_per_attribute,
        train_test_split=config.train_fraction,
        model_name=setting.model_name,
        llm_dtype=setting.dtype,
        llm_batch_size=config.llm_batch_prompts,
        learning_rate=config.learning_rate,
        num_epochs=config.epochs,
        n_generated_tokens=config.n_generated_tokens,
        random_seed=config.seed,
        artifact_dir=str(_KEPT),
    )


def _completions_key(config: RavelEval, setting: EvalSetting, prompts: dict[str, str]) -> dict[str, Any]:
    """What the model's answers follow from; not how masks are trained."""
    asked = {"attributes", "top_n_entities", "downsample", "n_generated_tokens", "llm_batch_prompts", "dataset"}
    if config.downsample is not None:
        asked.add("seed")
    return {
        "config": config.model_dump(include=asked),
        "data": setting.data_hash,
        "prompts": prompts,
        **made_by(setting),
    }


def _local_prompts(config: RavelEval, setting: EvalSetting) -> list[Path]:
    """The files of a local data set; none for the Hub's, which SAEBench downloads."""
    if config.dataset is None:
        return []
    folder = setting.data_folder / config.dataset / "base"
    files = sorted(folder.glob("ravel_*.json"))
    kinds = [kind for kind in config.attributes if not (folder / f"ravel_{kind}_entity_attributes.json").exists()]
    if kinds:
        raise EvaluationError(
            f"ravel: the data set {config.dataset} has no {', '.join(kinds)}",
            got=", ".join(path.name for path in files) or "no files",
            cause="evaluation.ravel.dataset or .attributes names what is not there",
            cure="own-ravel has city and nobel_prize_winner; null takes the Hub's data set",
        )
    return files


def _lay_out(prompts: list[Path], kept: Path) -> None:
    """Prompts where SAEBench looks for them, and nothing half written: an interrupted run leaves half a JSON file."""
    folder = kept / _KEPT
    (folder / "base").mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            path.unlink()
    for path in prompts:
        with atomic_path(folder / "base" / path.name) as temporary:
            shutil.copyfile(path, temporary)


def _complete(config: Any, model_name: str, model: Any, tokenizer: Any) -> None:
    """The model's answers to all prompts, as far as they are not there yet, as SAEBench has them before its first SAE.

    SAEBench would do it while it evaluates the first SAE, and draw random numbers for it that the others do not draw.
    """
    from sae_bench.evals.ravel.instance import RAVELInstance

    missing = [
        kind for kind in config.entity_attribute_selection if not _answers_file(kind, model_name, config).exists()
    ]
    if missing and config.full_dataset_downsample is not None:
        # A kind's prompts are drawn where the draw of those before it ended: what an interrupted run left is no start.
        missing = list(config.entity_attribute_selection)
        for path in Path(config.artifact_dir).glob("*.json"):
            path.unlink()
    for kind in missing:
        attributes = config.entity_attribute_selection[kind]
        asked = RAVELInstance()
        asked.load_files(kind, config.artifact_dir)
        _require_prompts(kind, attributes, asked, config.full_dataset_downsample)
        instance = RAVELInstance.create_from_files(
            config=config,
            entity_type=kind,
            data_dir=config.artifact_dir,
            tokenizer=tokenizer,
            model=model,
            model_name=model_name,
            attribute_types=attributes,
            downsample=config.full_dataset_downsample,
        )
        instance.create_and_save_filtered_dataset(config.artifact_dir, config.top_n_entities)


def _answers_file(kind: str, model_name: str, config: Any) -> Path:
    from sae_bench.evals.ravel.instance import get_instance_name

    name = get_instance_name(kind, model_name, config.full_dataset_downsample, config.top_n_entities)
    return Path(config.artifact_dir) / name


def _require_prompts(kind: str, attributes: list[str], asked: Any, downsample: int | None) -> None:
    templates = asked.attribute_type_to_templates
    if unknown := [attribute for attribute in attributes if attribute not in templates]:
        raise EvaluationError(
            f"ravel: {kind} has no attribute {', '.join(unknown)}",
            limit=", ".join(templates),
            cure="correct evaluation.ravel.attributes",
        )
    n_prompts = len(asked.entityLBL_attrTYP_attrLBL) * sum(len(templates[attribute]) for attribute in attributes)
    if downsample is not None and downsample > n_prompts:
        raise EvaluationError(
            f"ravel: {kind} has fewer prompts than evaluation.ravel.downsample asks for",
            got=downsample,
            limit=n_prompts,
            cure="set evaluation.ravel.downsample to null to ask all",
        )


def _require_right_answers(kind: str, attributes: list[str], path: Path, needed: int) -> None:
    """SAEBench would go on without batches: masks that nothing trained, and the mean of no scores, which is NaN."""
    from sae_bench.evals.ravel.instance import RAVELFilteredDataset

    answers = RAVELFilteredDataset.load(str(path))
    for attribute in attributes:
        right = answers.get_prompts_by_attribute(attribute)
        labels = {prompt.attribute_label for prompt in right}
        if len(right) < needed or len(labels) < 2:
            raise EvaluationError(
                f"ravel: too few prompts of {kind} / {attribute} were answered right",
                got=f"{len(right)} answered right, with {len(labels)} different answers",
                limit=f"{needed} and 2: a batch of llm_batch_prompts to train on and one to score",
                cause="the model knows too few of these facts, or too few were asked",
                cure="raise evaluation.ravel.downsample (null asks all), lower llm_batch_prompts, "
                "or leave the attribute out of evaluation.ravel.attributes",
            )
