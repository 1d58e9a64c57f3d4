"""SAEs that others published, as SAELens SAEs of this run's model and hook.

Two formats: SAELens' own (JSON and safetensors), and dictionary_learning's (config.json and ae.pt), which SAEBench's
SAEs are in. ``ae.pt`` is read as tensors only: a pickle from outside could run anything.

dictionary_learning's classes have equals in SAELens (the choice of sae_lens.loading, where it follows
sae_bench.custom_saes): AutoEncoder is a standard SAE, AutoEncoderNew one that does not subtract b_dec first,
AutoEncoderTopK a TopK SAE, BatchTopKSAE and MatryoshkaBatchTopKSAE at inference JumpReLU SAEs with one threshold,
JumpReluAutoEncoder a JumpReLU SAE that does not subtract b_dec first, GatedAutoEncoder a gated SAE. Decoder rows are
brought to unit norm, which SAEBench wants, without changing what the SAE does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name, sae_lens_disk_loader
from sae_lens.loading.pretrained_saes_directory import (
    get_config_overrides,
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
)
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file
from torch import Tensor

from ksvd_sae.errors import ConfigError, DictionaryError, ShapeError
from ksvd_sae.methods.base import Facts
from ksvd_sae.methods.published import WEIGHTS, PublishedSAEMethod
from ksvd_sae.methods.published.hub_files import hub_files
from ksvd_sae.methods.sae.raw_units import weighted_topk

# SAEBench calls rows normalised within this.
_UNIT_NORM = 1e-5
SIGNED = ("db_ksvd", "abstopk")
# SAELens' names of the formats that are read here.
CONVERSIONS = {"sae_lens": "saelens", "dictionary_learning_1": "dictionary_learning"}
_LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "bias": "b_dec"}
_NEW = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "decoder.bias": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_GATED = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "decoder_bias": "b_dec",
    "r_mag": "r_mag",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}


@dataclass(frozen=True)
class _Layout:
    """A class of dictionary_learning: its equal in SAELens, and our names of its tensors.

    left_out: tensors that inference does not need.
    """

    sae: type[SAE[Any]]
    config: type[Any]
    names: dict[str, str]
    left_out: tuple[str, ...] = ()
    subtracts_b_dec: bool = True


_LAYOUTS = {
    "AutoEncoder": _Layout(StandardSAE, StandardSAEConfig, _LINEAR),
    "AutoEncoderNew": _Layout(StandardSAE, StandardSAEConfig, _NEW, subtracts_b_dec=False),
    # Its threshold is an option that SAEBench leaves unused.
    "AutoEncoderTopK": _Layout(TopKSAE, TopKSAEConfig, _LINEAR, ("k", "threshold")),
    "BatchTopKSAE": _Layout(JumpReLUSAE, JumpReLUSAEConfig, {**_LINEAR, "threshold": "threshold"}, ("k",)),
    "MatryoshkaBatchTopKSAE": _Layout(
        JumpReLUSAE, JumpReLUSAEConfig, {**_PLAIN, "threshold": "threshold"}, ("k", "group_sizes")
    ),
    "JumpReluAutoEncoder": _Layout(
        JumpReLUSAE, JumpReLUSAEConfig, {**_PLAIN, "threshold": "threshold"}, subtracts_b_dec=False
    ),
    "GatedAutoEncoder": _Layout(GatedSAE, GatedSAEConfig, _GATED),
}


@dataclass(frozen=True)
class Source:
    """The files of an SAE.

    name: for messages. origin: where they come from, as manifests keep it.
    norm_factor: what activations are to be multiplied by first, where SAELens' directory says so.
    overrides: of its config, from there too.
    """

    name: str
    format: str
    config: Path
    weights: Path
    origin: Mapping[str, JsonValue]
    norm_factor: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def fetch(config: PublishedSAEMethod, *, endpoint: str | None = None) -> Source:
    """Download the SAE that a config names, or find it in the Hub's cache.

    Raises: ConfigError (unknown release or sae_id), HubError.
    """
    if config.release is not None:
        return fetch_listed(config.release, str(config.sae_id), config.revision, endpoint)
    return fetch_from(str(config.repo_id), config.folder, str(config.format), config.revision, endpoint)


def fetch_listed(release: str, sae_id: str, revision: str | None = None, endpoint: str | None = None) -> Source:
    """As ``fetch``, an SAE of SAELens' directory."""
    source = fetch_from(*_listed(release, sae_id), revision, endpoint)
    factor, overrides = get_norm_scaling_factor(release, sae_id), get_config_overrides(release, sae_id)
    return replace(source, norm_factor=factor, overrides=overrides)


def fetch_from(
    repo_id: str, folder: str, format_: str, revision: str | None = None, endpoint: str | None = None
) -> Source:
    """As ``fetch``, an SAE in a folder of a repository."""
    files = hub_files(repo_id, folder, WEIGHTS[format_], revision=revision, endpoint=endpoint)
    config, weights = (files.folder / name for name in WEIGHTS[format_])
    origin: dict[str, JsonValue] = {
        "format": format_,
        "repo_id": files.repo_id,
        "path": files.path,
        "revision": files.commit,
        "sha256": dict(files.sha256),
    }
    return Source(f"{repo_id}/{folder}", format_, config, weights, origin)


def _listed(release: str, sae_id: str) -> tuple[str, str, str]:
    """Repository, folder and format of an SAE of SAELens' directory."""
    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise ConfigError(
            f"published SAE {release}, {sae_id}: SAELens' directory has no such release",
            cure="see https://decoderesearch.github.io/SAELens/latest/pretrained_saes/, or give repo_id and path",
        )
    listed = directory[release]
    if sae_id not in listed.saes_map:
        raise ConfigError(
            f"published SAE {release}: no such sae_id", got=sae_id, limit=", ".join(list(listed.saes_map)[:8]) + ", …"
        )
    conversion = get_conversion_loader_name(release)
    if conversion not in CONVERSIONS:
        raise ConfigError(
            f"published SAE {release}, {sae_id}: no loader for its format",
            got=conversion,
            limit=", ".join(CONVERSIONS),
            cure="convert it: SAE.from_pretrained(...).save_model(...), upload that, and name it by repo_id",
        )
    return listed.repo_id, listed.saes_map[sae_id], CONVERSIONS[conversion]


@torch.no_grad()
def take_published(
    config: PublishedSAEMethod, folder: Path, *, model_name: str, hook_name: str, d_in: int, prepend_bos: bool = True
) -> Facts:
    """Fetch an SAE and save it in SAELens' format, in float32, as one of this run's.

    Args: prepend_bos: whether this run's contexts begin with a BOS: what evals do where the SAE does not say.
    Returns: with where it came from: repo_id, path, revision, sha256 of its files.
    Raises: HubError; ConfigError (another model, hook or k), ShapeError (another width), DictionaryError (no SAE in the
        files, or one that cannot be loaded).
    """
    source = fetch(config)
    sae, seen, k = load(source, prepend_bos)
    if isinstance(sae, TrainingSAE):
        raise DictionaryError(
            f"published SAE {source.name}: it is in the form that it is trained in",
            got=sae.cfg.architecture(),
            cure="save it with save_inference_model, and publish that",
        )
    check_place(source, sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name, model_name, hook_name)
    if sae.cfg.d_in != d_in:
        raise ShapeError(
            f"published SAE {source.name}: its width is not that of the run's activations",
            got=f"d_in = {sae.cfg.d_in}",
            limit=f"{d_in} ({model_name}, {hook_name})",
        )
    if k is not None and config.k is not None and config.k != k:
        raise ConfigError(f"published SAE {source.name}: it has another k", got=f"k: {config.k}", limit=k)
    sae = with_unit_rows(sae, source.name)
    sae.cfg.metadata.model_name = model_name
    sae.save_model(folder)
    return Facts(
        d_sae=sae.cfg.d_sae,
        k=config.k if k is None else k,
        signed=sae.cfg.architecture() in SIGNED and not getattr(sae.cfg, "nonnegative", False),
        samples_seen=seen if config.samples_seen is None else config.samples_seen,
        timed=False,
        more={"architecture": sae.cfg.architecture(), **source.origin},
    )


def check_place(source: Source, its_model: str | None, its_hook: str | None, model_name: str, hook_name: str) -> None:
    """Refuse an SAE of another model or hook than the run's, or of none that it names."""
    if its_model is None or its_hook is None:
        raise ConfigError(
            f"published SAE {source.name}: its config does not say of which model and hook it is",
            got=f"model_name {its_model}, hook_name {its_hook}",
            limit=f"{model_name}, {hook_name}",
        )
    # TransformerLens and SAELens often drop the owner's name.
    if its_model.split("/")[-1].lower() != model_name.split("/")[-1].lower() or its_hook != hook_name:
        raise ConfigError(
            f"published SAE {source.name}: it is of another model or hook than this run",
            got=f"{its_model}, {its_hook}",
            limit=f"{model_name}, {hook_name}",
            cure="choose an SAE of the run's hook, or run on the SAE's",
        )


def check_fetched(config: PublishedSAEMethod, *, model_name: str, hook_name: str) -> Source:
    """Fetch an SAE and check its model and hook by its config alone: before any work on a GPU."""
    source = fetch(config)
    if source.format == "dictionary_learning":
        upstream = _dictionary_learning_config(source)
        check_place(source, upstream["lm_name"], upstream["hook_name"], model_name, hook_name)
        return source
    stored = _json(source)
    named = {**stored, **(stored.get("metadata") or {}), **source.overrides}
    check_place(source, named.get("model_name"), named.get("hook_name"), model_name, hook_name)
    return source


def load(source: Source, prepend_bos: bool = True) -> tuple[Any, int | None, int | None]:
    """The SAE, in float32 on the CPU, samples seen and k.

    Args: prepend_bos: what its metadata are to say where its files do not (dictionary_learning's).
    Raises: DictionaryError (no SAE in the files, or one that cannot be loaded).
    """
    if source.format == "saelens":
        return _from_saelens(source)
    return _from_dictionary_learning(source, prepend_bos)


# ---------------------------------------------------------------- SAELens' format


def _from_saelens(source: Source) -> tuple[Any, int | None, int | None]:
    stored = _json(source)
    # Some are saved in the form that they are trained in, which SAELens lists apart.
    known = "architecture" not in stored or stored["architecture"] in SAE_CLASS_REGISTRY
    kind: type[SAE[Any]] = SAE if known else TrainingSAE
    try:
        loader = partial(_overridden_disk_loader, source.overrides)
        sae = kind.load_from_disk(source.config.parent, device="cpu", dtype="float32", converter=loader)
    # SAELens checks little of what it reads: KeyError for an unknown class, RuntimeError for a missing tensor.
    except Exception as error:
        raise DictionaryError(
            f"loading SAE {source.name}: SAELens cannot ({type(error).__name__}: {error})",
            cure="check that the folder holds an SAE that SAELens saved",
        ) from error
    if sae.cfg.normalize_activations == "expected_average_only_in":
        if source.norm_factor is None:
            raise DictionaryError(
                f"loading SAE {source.name}: it wants activations scaled by a factor that is not known",
                got="normalize_activations: expected_average_only_in",
                cure="name it by release and sae_id, if SAELens' directory has its norm_scaling_factor",
            )
        sae.fold_activation_norm_scaling_factor(source.norm_factor)
        sae.cfg.normalize_activations = "none"
    seen = sae.cfg.metadata.training_tokens
    return sae, seen if isinstance(seen, int) else None, getattr(sae.cfg, "k", None)


def _overridden_disk_loader(
    overrides: dict[str, Any], path: str | Path, device: str, cfg_overrides: dict[str, Any] | None
) -> Any:
    return sae_lens_disk_loader(path, device, {**overrides, **(cfg_overrides or {})})


# ---------------------------------------------------------------- dictionary_learning's format


def _json(source: Source) -> dict[str, Any]:
    path = source.config
    try:
        mapping = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DictionaryError(f"loading SAE {source.name}: {path.name} is no JSON ({error})") from error
    if not isinstance(mapping, dict):
        raise DictionaryError(f"loading SAE {source.name}: {path.name} holds no mapping", got=type(mapping))
    return mapping


def _dictionary_learning_config(source: Source) -> dict[str, Any]:
    """The trainer's part of config.json, with hook_name, samples_seen and context_size worked out.

    Places in the model that are not residual streams have names of the trainer's own: no hook has them.
    """
    stored = _json(source)
    trainer, buffer = stored.get("trainer"), stored.get("buffer") or {}
    needed = ("dict_class", "lm_name", "layer")
    if not isinstance(trainer, dict) or not all(name in trainer for name in needed):
        raise DictionaryError(
            f"loading SAE {source.name}: config.json is none of dictionary_learning's",
            got=sorted(trainer if isinstance(trainer, dict) else stored),
            limit=f"a trainer with {', '.join(needed)}",
        )
    residual = f"resid_post_layer_{trainer['layer']}"
    place = str(trainer.get("submodule_name") or residual)
    steps, batch = trainer.get("steps"), buffer.get("out_batch_size")
    return {
        **trainer,
        "hook_name": f"blocks.{trainer['layer']}.hook_resid_post" if place == residual else place,
        "samples_seen": steps * batch if isinstance(steps, int) and isinstance(batch, int) else None,
        "context_size": buffer.get("ctx_len"),
    }


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """A checkpoint of tensors by name; anything else in it is refused, and none of it is run."""
    try:
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    # UnpicklingError for what is no tensor; RuntimeError, EOFError and others for what is no checkpoint.
    except Exception as error:
        raise DictionaryError(
            f"{what}: {path.name} is no file of tensors, or holds more than tensors ({type(error).__name__})",
            cause="another format, a broken download, or a file that would run code when it is loaded",
            cure="do not load it otherwise, unless you know who made it",
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise DictionaryError(f"{what}: {path.name} holds no tensors by name", got=type(tensors).__name__)
    return tensors


def _from_dictionary_learning(source: Source, prepend_bos: bool) -> tuple[Any, int | None, int | None]:
    what = f"loading SAE {source.name}"
    stored = _dictionary_learning_config(source)
    layout = _LAYOUTS.get(stored["dict_class"])
    if layout is None:
        raise DictionaryError(f"{what}: an unknown class", got=stored["dict_class"], limit=", ".join(_LAYOUTS))
    given = read_tensors(source.weights, what)
    if "b_dec" in given and "bias" in set(layout.names) - set(given):
        # Its name in TopK and BatchTopK SAEs of later versions.
        given["bias"] = given.pop("b_dec")
    missing = sorted(set(layout.names) - set(given))
    unknown = sorted(set(given) - set(layout.names) - set(layout.left_out))
    if missing or unknown:
        raise DictionaryError(
            f"{what}: its tensors are not those of {stored['dict_class']}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    tensors = {ours: given[theirs].float() for theirs, ours in layout.names.items()}
    if "encoder.weight" in layout.names:
        # torch's Linear has its weights the other way round.
        tensors |= {name: tensors[name].T.contiguous() for name in ("W_enc", "W_dec")}
    k = stored.get("k")
    config = layout.config(
        d_in=tensors["W_dec"].shape[-1],
        d_sae=tensors["W_dec"].shape[0],
        apply_b_dec_to_input=layout.subtracts_b_dec,
        metadata=SAEMetadata(
            model_name=stored["lm_name"],
            hook_name=stored["hook_name"],
            context_size=stored["context_size"],
            prepend_bos=prepend_bos,
        ),
        **({"k": k} if layout.config is TopKSAEConfig else {}),
    )
    if "threshold" in tensors:
        tensors["threshold"] = _thresholds(tensors["threshold"], config.d_sae, what)
    sae = layout.sae(config)
    try:
        sae.load_state_dict(tensors)
    except RuntimeError as error:
        raise DictionaryError(f"{what}: sizes that do not fit each other ({error})") from error
    return sae, stored["samples_seen"], k if isinstance(k, int) else None


def _thresholds(threshold: Tensor, d_sae: int, what: str) -> Tensor:
    if threshold.ndim == 0 and not threshold >= 0:
        raise DictionaryError(
            f"{what}: a BatchTopK SAE without a threshold", got=float(threshold), cause="its training ended too early"
        )
    return threshold.expand(d_sae).clone() if threshold.ndim == 0 else threshold


# ---------------------------------------------------------------- both


def with_unit_rows(sae: Any, what: str) -> Any:
    """The SAE with decoder rows of unit norm that has the same latents and rebuilds the same.

    Raises: DictionaryError (rows of norm 0 or not finite).
    """
    norms_M = torch.linalg.vector_norm(sae.W_dec.double(), dim=1)
    if not bool(torch.isfinite(norms_M).all()) or float(norms_M.min()) <= 0:
        raise DictionaryError(
            f"published SAE {what}: decoder rows of norm 0, or not finite",
            got=f"{int((~(norms_M > 0)).sum())} of {len(norms_M)} rows",
        )
    if float((norms_M - 1).abs().max()) <= _UNIT_NORM:
        return sae
    if not isinstance(sae, TopKSAE) or sae.cfg.rescale_acts_by_decoder_norm:
        if isinstance(sae, StandardSAE | JumpReLUSAE | GatedSAE | TopKSAE):
            sae.fold_W_dec_norm()
        return sae
    # Latents go on competing in their old units.
    sae.W_dec.data = (sae.W_dec.double() / norms_M[:, None]).float()
    sae.W_enc.data = (sae.W_enc.double() * norms_M).float()
    sae.b_enc.data = (sae.b_enc.double() * norms_M).float()
    return weighted_topk(sae, norms_M)
