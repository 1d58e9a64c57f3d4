"""A model in a GGUF file as transformers writes it: a folder of safetensors with its tokenizer, made once in the cache.

transformers reads the file and undoes its quantisation; a check of what it makes of the tokenizer is ours.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ksvd_sae.errors import ConfigError, MissingExtraError
from ksvd_sae.replaced import replaced
from ksvd_sae.store import cache_dir, require_disk_space

logger = logging.getLogger(__name__)
# float32 beside four bits or more a weight.
_GROWS = 8


def converted(file: Path, sha256: str) -> Path:
    """The folder made of a file.

    Raises: MissingExtraError, ConfigError (a model or tokenizer that transformers cannot read, or reads wrongly),
        DiskSpaceError.
    """
    folder = cache_dir() / "gguf" / sha256[:12]
    if folder.exists():
        return folder
    what = f"model.weights {file.name!r}"
    if find_spec("gguf") is None:
        raise MissingExtraError(f"{what}: the package gguf is not installed", cure="pip install 'ksvd-sae[demo]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_disk_space(folder.parent, _GROWS * file.stat().st_size, f"{what}: writing it as safetensors")
    logger.info("%s: written as safetensors, once", what)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as name:
        new = Path(name) / "model"
        try:
            with read_once(file):
                write_weights(file, new)
                _tokenizer(file, what).save_pretrained(new)
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, ImportError) as error:
            raise ConfigError(
                f"{what} cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}",
                cause="a damaged file, one part of several, or an architecture that transformers does not read from "
                "GGUF",
                cure="get its safetensors, and give their folder",
            ) from error
        # Another process may have been faster.
        if not folder.exists():
            new.rename(folder)
    return folder


@contextmanager
def read_once(file: Path) -> Iterator[None]:
    """Inside, whoever opens a GGUF file gets this one, opened once: its vocabulary takes seconds to read."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    with replaced({"gguf.GGUFReader": lambda path: reader}):
        yield


def write_weights(file: Path, folder: Path) -> Any:
    """Write a file's weights as float32 safetensors; transformers' model. Raises: ConfigError, as transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    read, info = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    # transformers draws what is missing at random.
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{file.name}: {len(missing)} tensors of {type(read).__name__} are missing",
            got=f"none for {', '.join(missing[:4])}",
            cause="one part of several, or tensors that transformers does not know the names of",
        )
    # transformers 5.24 takes what it read from such a file for quantized, and does not write it: the same weights
    # in a model that was never that.
    vars(read.config).pop("quantization_config", None)
    model = type(read)(read.config).eval()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    return model


def _tokenizer(file: Path, what: str) -> Any:
    """The tokenizer in the file. Raises: ConfigError for one that transformers makes another kind of."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    kind = GGUFReader(file).fields["tokenizer.ggml.model"].contents()
    made = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    # What GGUF calls llama and gpt2 merges pairs of pieces.
    if made != {"llama": "BPE", "gpt2": "BPE", "t5": "Unigram", "bert": "WordPiece"}.get(kind):
        raise ConfigError(
            f"{what}: transformers makes another tokenizer of it",
            got=f"{made}, of {kind}",
            cause="as of Gemma's: text would be cut into other tokens than the model was trained on",
            cure="get the model's safetensors and tokenizer, and give their folder",
        )
    return tokenizer
