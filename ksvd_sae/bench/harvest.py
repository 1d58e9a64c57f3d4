"""``ksvd-sae bench harvest``: a harvest, to its last byte on disk, beside the bare model's pass up to the hook's layer.

Ours is the whole stage: text to tokens, the pass, special tokens and outliers out, raw parts, shuffled shards, hashes.
Bare is the pass alone over as many contexts in batches of the same size, nothing kept: of TransformerLens' model, which
harvests run, and of transformers' with the layers behind the hook's cut off. The fastest of them is the floor, so that
'of floor' is the part of its throughput that a harvest reaches. A model on a GPU must fit twice.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations.documents import Document
from ksvd_sae.activations.harvest import Harvest, HarvestConfig, run_harvest
from ksvd_sae.activations.language import ActivationReader, ModelConfig, hook_layer, load_model
from ksvd_sae.activations.text import TextConfig
from ksvd_sae.bench.measure import Job, Measured, limited_threads, measure
from ksvd_sae.bench.rows import OURS, Who, row
from ksvd_sae.bench.settings import Outcome, Settings
from ksvd_sae.errors import ConfigError

TRANSFORMER_LENS, TRANSFORMERS = "transformer-lens", "transformers"
_TOKENS, _SMALL_TOKENS = 16_384, 512
_REPEATS = 3
_WORDS = [f"w{i}" for i in range(1000)]
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass
class _Counting:
    """A reader that counts the contexts it is given."""

    reader: ActivationReader
    contexts: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def read(self, tokens_BL: Tensor) -> Tensor:
        self.contexts += len(tokens_BL)
        return self.reader.read(tokens_BL)


def run(settings: Settings) -> Outcome:
    """A row of ours and of each bare model on the config's model, hook and text.

    Raises: ConfigError: a hook outside the blocks.
    """
    from ksvd_sae.run.config import load_config, on_text

    config = on_text(load_config(settings.config), "bench harvest")
    config.model.prepare()
    tokens = settings.samples or (_SMALL_TOKENS if settings.small else _TOKENS)
    sizes = {"train_tokens": tokens, "heldout_tokens": tokens // 8, "shard_tokens": max(1, tokens // 4)}
    wanted = replace(config.harvested, config=config.harvest.model_copy(update={**sizes, "gradient_tokens": 0}))
    if hook_layer(wanted.model.hook) is None:
        raise ConfigError("bench harvest: the hook is in no block", got=wanted.model.hook)
    reader = ActivationReader(load_model(wanted.model, settings.device), wanted.model.hook)
    bare = {TRANSFORMER_LENS: _transformer_lens(reader), TRANSFORMERS: _transformers(wanted, settings.device)}
    with limited_threads(settings.threads):
        return beside(reader, wanted, bare, settings)


@dataclass(frozen=True)
class _MadeUp(Harvest):
    """Of words drawn at random, without end."""

    def texts(self) -> Iterator[Document]:
        draw = random.Random(self.seed)
        while True:
            yield " ".join(draw.choices(_WORDS, k=1000))


def on_random_weights(device: torch.device, *, small: bool) -> Outcome:
    """The same without the Hub: Gemma-2-2B's first 13 layers in bfloat16 with random weights, which take as long."""
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    layers, tokens, batch = (2, 512, 4) if small else (13, 262_144, 64)
    cfg = get_pretrained_model_config("google/gemma-2-2b", device=str(device), dtype=torch.bfloat16)
    cfg.n_layers, cfg.attn_types = layers, (cfg.attn_types or [])[:layers]
    if small:
        cfg.d_model, cfg.d_mlp, cfg.n_heads, cfg.d_head, cfg.n_key_value_heads, cfg.d_vocab = 32, 64, 2, 16, 1, 1024
        cfg.d_vocab_out, cfg.rotary_dim, cfg.n_ctx = 1024, 16, 256
    cfg.tokenizer_name, cfg.init_weights, cfg.initializer_range = None, True, 0.02
    model = HookedTransformer(cfg).eval()
    # Not at once: TransformerLens would load it again, by its name.
    model.tokenizer = _words()
    hook = f"blocks.{layers - 1}.hook_resid_post"
    config = HarvestConfig(
        train_tokens=tokens,
        heldout_tokens=tokens // 8,
        batch_contexts=batch,
        shard_tokens=max(1, tokens // 4),
        dtype="bfloat16",
        outlier_factor=None,
    )
    given = ModelConfig(name="google/gemma-2-2b", hook=hook, dtype="bfloat16")
    harvest = _MadeUp(given, TextConfig(source="hub", dataset="random words"), config, seed=0)
    reader = ActivationReader(model, hook)
    return beside(reader, harvest, {TRANSFORMER_LENS: _transformer_lens(reader)}, Settings(device=device))


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<bos>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict.fromkeys(_ROLES, "<bos>"))


def beside(
    reader: ActivationReader, harvest: Harvest, bare: dict[str, Callable[[Tensor], Any]], settings: Settings
) -> Outcome:
    """Rows of a harvest and of passes over as many tokens. Args: bare: from a batch of contexts to anything."""
    length, outcome = harvest.config.context_tokens, Outcome()
    counted = _Counting(reader)
    _harvested(harvest, counted)
    batches = [counted.contexts // harvest.config.batch_contexts or 1, harvest.config.batch_contexts, length]
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.randint(reader.model.cfg.d_vocab, batches, generator=generator).to(settings.device)
    dtype = str(reader.model.cfg.dtype).removeprefix("torch.")

    def who(impl: str, package: str) -> Who:
        return Who(impl, "harvest" if impl == OURS else "bare pass", "torch", dtype, settings.device, (package,))

    jobs = [Job(who(OURS, TRANSFORMER_LENS), tokens.numel(), lambda _: _harvested(harvest, reader), dict)]
    for impl, call in bare.items():
        jobs.append(Job(who(impl, impl), tokens.numel(), partial(_passes, call, tokens), lambda _: {}))
    found = measure(jobs, settings.repeats or _REPEATS, outcome.failures)
    floor_s = min((median(one.seconds) for one in found if one.job.who.impl != OURS), default=None)
    outcome.rows = [_row(one, floor_s, harvest, reader, settings) for one in found]
    return outcome


def _row(
    measured: Measured, floor_s: float | None, harvest: Harvest, reader: ActivationReader, settings: Settings
) -> dict[str, Any]:
    job = measured.job
    return row(
        "harvest",
        f"{harvest.model.name} {harvest.model.hook}",
        job.who,
        n=job.n,
        d=reader.model.cfg.d_model,
        m=0,
        k=0,
        seconds=measured.seconds,
        warmups=1,
        seed=settings.seed,
        fvu=None,
        peak_mib=measured.peak_mib,
        floor_s=floor_s,
        data=harvest.text.name,
        batch_contexts=harvest.config.batch_contexts,
        stored_as=harvest.config.dtype,
    )


def _harvested(harvest: Harvest, reader: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-harvest-") as name:
        # A harvest's locks lie two folders above it.
        shards = run_harvest(harvest, Path(name) / "activations" / "harvest", lambda: reader)
        return {"stored": shards.n_samples}


@torch.no_grad()
def _passes(call: Callable[[Tensor], Any], tokens_NBL: Tensor, _: Any) -> None:
    for tokens_BL in tokens_NBL:
        call(tokens_BL)


def _transformer_lens(reader: ActivationReader) -> Callable[[Tensor], Any]:
    stop = (hook_layer(reader.hook) or 0) + 1
    return partial(reader.model, return_type=None, stop_at_layer=stop)


def _transformers(harvest: Harvest, device: torch.device) -> Callable[[Tensor], Any]:
    from transformers import AutoModelForCausalLM

    own = harvest.model.own_weights()
    place = harvest.model.name if own is None else str(own.folder)
    whole = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, harvest.model.dtype))
    layers = whole.config.get_text_config().num_hidden_layers
    inner, name = next(
        (module, name)
        for module in whole.eval().to(device).modules()
        for name, child in module.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == layers
    )
    del getattr(inner, name)[(hook_layer(harvest.model.hook) or 0) + 1 :]
    return partial(inner, use_cache=False)
