"""Weights of one's own for an architecture that TransformerLens knows: a folder, or a repository on the Hub.

Only safetensors are read, and no code that comes with a model is run.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksvd_sae.activations.hub import hub_errors
from ksvd_sae.activations.layers import LayerModel
from ksvd_sae.errors import ConfigError, HubError
from ksvd_sae.offline.gguf import converted
from ksvd_sae.store import file_sha256

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Mean KL, in nats, between what transformers and what TransformerLens makes of the same weights. In float32 they differ
# by less than 1e-6, in 16 bits by some hundredths.
_SAME, _SAME_16_BITS, _COMPARED_TOKENS = 1e-3, 0.3, 16


@dataclass(frozen=True)
class OwnWeights:
    """A model's weights, its config and, if it has one, its tokenizer, as files on this machine.

    name: as given; of a folder, without those that it lies in. commit: on the Hub; None for a folder.
    content: hash of all these files.
    """

    folder: Path
    name: str
    commit: str | None
    content: str

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).exists() for name in _TOKENIZER)

    def as_metadata(self) -> dict[str, str]:
        """What an SAE says of the model that it is of."""
        at = {} if self.commit is None else {"revision": self.commit}
        return {"name": self.name, **at, "content": self.content}

    def hooked(self, load: "Callable[..., HookedTransformer]", model_name: str, **options: Any) -> "HookedTransformer":
        """The model that ``load``, TransformerLens' from_pretrained, makes of them.

        Raises: ConfigError (not of this architecture, or files that are damaged), HubError (the architecture's own
            config or tokenizer is needed, and cannot be had).
        """
        self._check_architecture(model_name)
        weights = self._weights(options.get("dtype", torch.float32))
        tokenizer = {"tokenizer": self.tokenizer(model_name)} if self.has_tokenizer else {}
        try:
            model = load(model_name, hf_model=weights, **tokenizer, **options)
            nats = _divergence(model, weights)
        # The architecture's own tokenizer, where there is none beside the weights.
        except OSError as error:
            raise _unreachable(model_name, "tokenizer", error) from error
        # What TransformerLens does with sizes that it does not expect is many errors.
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise self._misfit(
                model_name, f"TransformerLens cannot make it of them ({type(error).__name__}: {_first_line(error)})"
            ) from error
        if math.isnan(nats):
            raise ConfigError(
                f"model.weights {self.name!r}: predictions are NaN",
                cause=f"overflow in {model.cfg.dtype}, or broken weights",
                cure="set model.dtype to bfloat16 or float32",
            )
        if nats > (_SAME if model.cfg.dtype == torch.float32 else _SAME_16_BITS):
            raise self._misfit(
                model_name,
                "TransformerLens computes something else with them than transformers does",
                got=f"{nats:.3g} nats a token between the two",
                cause="a config.json that differs in what no size shows, such as the scaling of rotary positions",
            )
        return model

    def bridged(self, boot: "Callable[..., TransformerBridge]", **options: Any) -> "TransformerBridge":
        """What ``boot``, TransformerLens' boot_transformers, makes of them.

        Raises: ConfigError (damaged files, no tokenizer beside them, an architecture without a bridge).
        """
        architecture = architecture_of(config_of(str(self.folder)))
        if not self.has_tokenizer or not has_bridge(architecture):
            raise ConfigError(
                f"model.weights {self.name!r}: TransformerLens does not know their name, and has no bridge to them",
                got=f"architecture {architecture}; {'a' if self.has_tokenizer else 'no'} tokenizer beside the weights",
                cure="set model.name to the model of TransformerLens that they were tuned from, "
                "or save the tokenizer beside them",
            )
        weights = self._weights(options.get("dtype", torch.float32))
        # By which TransformerLens has the scores and patterns of attention.
        weights.set_attn_implementation("eager")
        model = boot(str(self.folder), hf_model=weights, tokenizer=self.tokenizer(str(self.folder)), **options)
        model.cfg.model_name = self.name
        return model

    def layered(self, device: str = "cpu", dtype: torch.dtype = torch.float32, **_: Any) -> LayerModel:
        """Hooks around their layers. Raises: ConfigError (damaged files, no tokenizer beside them; as LayerModel)."""
        if not self.has_tokenizer:
            raise ConfigError(
                f"model.weights {self.name!r}: no tokenizer beside them",
                cure="save it there with tokenizer.save_pretrained",
            )
        tokenizer = self.tokenizer(str(self.folder))
        return LayerModel(self._weights(dtype).to(device), tokenizer, self.name)

    def tokenizer(self, model_name: str) -> Any:
        """Theirs, or the architecture's if they have none."""
        from transformers import AutoTokenizer

        place = str(self.folder) if self.has_tokenizer else model_name
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as error:
            raise ConfigError(
                f"model.weights {self.name!r}: its tokenizer cannot be read: {_first_line(error)}",
                cause="files of the tokenizer that are missing or damaged, or one that brings code along",
                cure="save it again with tokenizer.save_pretrained, or take its files away: the architecture's is used",
            ) from error

    def _check_architecture(self, model_name: str) -> None:
        """Refuse weights whose config has another class or other sizes than TransformerLens has for the name."""
        from transformer_lens.loading_from_pretrained import get_official_model_name, get_pretrained_model_config
        from transformers import AutoConfig

        try:
            own = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(_CONFIG, error) from error
        official = get_official_model_name(model_name)
        try:
            named = get_pretrained_model_config(official)
        except (OSError, ValueError) as error:
            raise _unreachable(official, _CONFIG, error) from error
        text = own.get_text_config()
        of_theirs = {
            "class": (own.architectures or [None])[0],
            "layers": getattr(text, "num_hidden_layers", None),
            "width": getattr(text, "hidden_size", None),
            "heads": getattr(text, "num_attention_heads", None),
        }
        wanted = dict(
            zip(of_theirs, (named.original_architecture, named.n_layers, named.d_model, named.n_heads), strict=True)
        )
        other = [name for name, value in of_theirs.items() if value is not None and value != wanted[name]]
        if other:
            raise self._misfit(
                model_name,
                "they are of another architecture",
                got=", ".join(f"{name} {of_theirs[name]}" for name in other),
                limit=", ".join(f"{name} {wanted[name]}" for name in other),
            )

    def _weights(self, dtype: torch.dtype | str) -> Any:
        """The model as transformers has it."""
        from transformers import AutoModelForCausalLM

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, LookupError, ImportError, SafetensorError) as error:
            raise self._unreadable("weights", error) from error
        # transformers draws what is missing at random.
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"model.weights {self.name!r}: {len(missing)} tensors of {type(model).__name__} are missing",
                got=f"none for {', '.join(missing[:4])}",
                cause="only a part of the model was saved, or its tensors have other names",
                cure="save the whole model with save_pretrained",
            )
        return model.eval()

    def _misfit(self, model_name: str, why: str, **more: Any) -> ConfigError:
        cure = "set model.name to the model of TransformerLens that these weights were tuned from"
        return ConfigError(
            f"model.weights {self.name!r} do not fit model.name {model_name!r}: {why}", **{"cure": cure, **more}
        )

    def _unreadable(self, what: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"model.weights {self.name!r}: its {what} cannot be read: {_first_line(error)}",
            cause="damaged files, other sizes than config.json says, or a model that brings its own code, "
            "which is never run",
            cure="save the model again with save_pretrained, of a class that transformers has",
        )


def weights_name(weights: str) -> str:
    """A repository's name, or a folder's without those that it lies in."""
    return weights if _REPOSITORY.fullmatch(weights) else Path(weights).expanduser().resolve().name


def find_weights(weights: str, revision: str | None) -> OwnWeights:
    """A folder's, a GGUF file's or a repository's weights; those of the Hub are downloaded.

    Raises: ConfigError (no such folder; no safetensors, or not all of them; an adapter alone), HubError; of a GGUF file
        as ``converted``.
    """
    folder, commit = Path(weights).expanduser(), None
    if (gguf := _gguf(folder)) is not None:
        content = _sha256(gguf)
        return OwnWeights(converted(gguf, content), weights_name(weights), None, content[:12])
    if folder.is_dir():
        folder, name = folder.resolve(), weights_name(weights)
        if revision is not None:
            raise ConfigError(
                f"model.weights {weights!r}: a folder has no revisions",
                got=f"model.revision: {revision}",
                cure="leave model.revision out",
            )
    elif _REPOSITORY.fullmatch(weights):
        try:
            folder, name = _downloaded(weights, revision), weights
        except HubError as error:
            here = f"no folder {weights} in {Path.cwd()} either"
            raise HubError(error.what, got=error.got or here, cause=error.cause, cure=error.cure) from error
        commit = folder.name
    else:
        raise ConfigError(f"model.weights {weights!r}: no such folder", cure="give a folder, or owner/name on the Hub")
    files = [_CONFIG, *_weight_files(folder, name)]
    files += [file for file in (*_TOKENIZER, *_BESIDE) if (folder / file).exists()]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file}\0{_sha256(folder / file)}\n".encode())
    return OwnWeights(folder, name, commit, digest.hexdigest()[:12])


def _gguf(place: Path) -> Path | None:
    """A GGUF file, or the one in a folder without a model of transformers; None where there is none."""
    if place.is_file() and place.suffix == ".gguf":
        return place.resolve()
    if not place.is_dir() or (place / _CONFIG).exists():
        return None
    files = sorted(place.glob("*.gguf"))
    if len(files) > 1:
        raise ConfigError(
            f"model.weights {str(place)!r}: several GGUF files",
            got=", ".join(file.name for file in files[:4]),
            cure="give one of them; of a model in parts, its safetensors",
        )
    return files[0].resolve() if files else None


@lru_cache
def _downloaded(repo_id: str, revision: str | None) -> Path:
    """The folder of one commit; the same one as long as the process lives."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    # Of the same weights in other layouts.
    others = ["*/*", "consolidated*"]
    with hub_errors(repo_id, "", revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=others))


def _weight_files(folder: Path, name: str) -> list[str]:
    """The safetensors of a model, each of them whole."""
    what = f"model.weights {name!r}"
    present = sorted(path.name for path in folder.iterdir())
    if _ADAPTER in present:
        raise ConfigError(
            f"{what}: an adapter (LoRA), which is no model by itself",
            got=", ".join(present[:8]),
            cure="merge it: PeftModel.from_pretrained(base, ...).merge_and_unload().save_pretrained(folder)",
        )
    if _INDEX in present:
        try:
            files = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise _damaged(what, _INDEX, error) from error
    elif _WHOLE in present:
        files = [_WHOLE]
    else:
        pickled = any(entry.endswith(_PICKLED) for entry in present)
        raise ConfigError(
            f"{what}: no safetensors there",
            got=", ".join(present[:8]) or "an empty folder",
            limit=f"{_WHOLE}, or {_INDEX} and its files",
            cause="weights that are pickled, which run code when they are read: they are never read"
            if pickled
            else "another folder was meant, a download that ended early, or weights in another format",
            cure="where you trust it, AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)",
        )
    missing = [file for file in (_CONFIG, *files) if not (folder / file).exists()]
    if missing:
        raise ConfigError(
            f"{what}: {len(missing)} of its files are missing",
            got=f"no {', '.join(missing[:4])}",
            cause="a copy or download that ended early",
            cure="copy or download it again",
        )
    for file in files:
        try:
            with safe_open(folder / file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise _damaged(what, file, error) from error
    return files


def _damaged(what: str, file: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{what}: {file} is damaged: {_first_line(error)}",
        cause="a copy or download that ended early",
        cure="copy or download it again",
    )


def _unreachable(model_name: str, what: str, error: Exception) -> HubError:
    return HubError(
        f"the {what} of {model_name!r}, which says what the weights must fit, cannot be had: {_first_line(error)}",
        cause="no network and no copy in the Hub cache, or a gated model without `hf auth login`",
        cure=f"where there is a connection, `hf download {model_name} --include '*.json'`, and copy the Hub cache",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _sha256(path: Path) -> str:
    """Read once in a process, as long as it is the same file."""
    status = path.stat()
    return _sha256_as_of(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache
def _sha256_as_of(path: Path, *status: int) -> str:
    return file_sha256(path)


@torch.no_grad()
def _divergence(model: "HookedTransformer", weights: Any) -> float:
    """Mean KL, in nats, of TransformerLens' next-token distributions from those of transformers, after some tokens."""
    # TransformerLens masks padding by itself.
    special = torch.tensor(model.tokenizer.all_special_ids)
    tokens_V = torch.arange(model.cfg.d_vocab)
    tokens_V = tokens_V[~torch.isin(tokens_V, special)]
    tokens_BL = tokens_V[:: max(1, len(tokens_V) // _COMPARED_TOKENS)][None, :_COMPARED_TOKENS]
    theirs_LV: Tensor = weights(tokens_BL).logits[0].double().log_softmax(dim=-1)
    ours_LV = model(tokens_BL.to(model.cfg.device))[0].double().log_softmax(dim=-1).cpu()
    return float((theirs_LV.exp() * (theirs_LV - ours_LV)).sum(dim=-1).mean())


# ---------------------------------------------------------------- names that are weights


def as_weights(name: str, config: dict[str, Any]) -> str | None:
    """What to write in a YAML for a folder or repository whose name was taken for a model's; None for none.

    Args: config: its own.
    """
    architecture = architecture_of(config)
    if architecture is None:
        return None
    known = _models_of(
        architecture, str(config.get("model_type", "")), str(config.get("_name_or_path", "")), Path(name).name
    )
    if not known and has_bridge(architecture):
        return f"set model.weights: {name} and model.name: {Path(name).name}"
    if not known:
        return f"TransformerLens has no model of its architecture ({architecture})"
    which = known[0] if len(known) == 1 else f"{' or '.join(known)}, whichever it was tuned from"
    return f"set model.weights: {name} and model.name: {which}"


def architecture_of(config: dict[str, Any]) -> str | None:
    """The class that a model's config names."""
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else None


def has_bridge(architecture: str | None) -> bool:
    """Whether TransformerLens has a bridge to this class of language models."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    causal = architecture is not None and architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return causal and architecture in SUPPORTED_ARCHITECTURES


def has_layers(architecture: str | None) -> bool:
    """Whether transformers has this class of language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return architecture is not None and architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def hub_layers(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **_: Any) -> LayerModel:
    """A repository's model with hooks around its layers. Raises: OSError (not to be had), ConfigError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return LayerModel(model.eval().to(device), tokenizer, name)


def config_of(name: str) -> dict[str, Any]:
    """A folder's or repository's config; an empty one where there is none."""
    try:
        config = json.loads(_config_path(name).read_text())
    # Whatever is wrong with it, or with the way to it: it is no model that we can tell the architecture of.
    except Exception:
        return {}
    return config if isinstance(config, dict) else {}


def _config_path(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir() or not _REPOSITORY.fullmatch(name):
        return folder / _CONFIG
    from huggingface_hub import hf_hub_download

    with hub_errors(name, _CONFIG, None):
        return Path(hf_hub_download(name, _CONFIG))


def _models_of(architecture: str, kind: str, tuned_from: str, name: str) -> list[str]:
    """Names that TransformerLens has for an architecture: the one that was tuned, or else those that are most alike."""
    from transformer_lens.loading_from_pretrained import get_official_model_name
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES
    from transformer_lens.tools.model_registry import api

    try:
        return [get_official_model_name(tuned_from)]
    except ValueError:
        pass
    try:
        listed = set(api.get_architecture_models(architecture))
    # It has errors of its own for an architecture that it does not list.
    except Exception:
        listed = set()
    known = {
        official.split("/")[-1].lower(): official
        for official in OFFICIAL_MODEL_NAMES
        if official in listed or kind in official.lower()
    }
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.0)
    return [known[one] for one in near]
