"""Plans of runs on text and on images: what their models read, measured or by arithmetic."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch

from ksvd_sae.activations.gradients import gradients_folder, gradients_key
from ksvd_sae.activations.language import ModelConfig, has_heads, hook_layer
from ksvd_sae.activations.vision.model import VisionModelConfig
from ksvd_sae.errors import ConfigError, HubError, ImageError
from ksvd_sae.evals.base import Eval, Work
from ksvd_sae.run.config import ImageRunConfig, on_text
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.plan import Planner, Stage
from ksvd_sae.run.probe import ImageRates, ModelRates, TrainingRates, matmul_rate, probe_images, probe_model
from ksvd_sae.run.replicas import replicas
from ksvd_sae.store import MANIFEST, content_hash


def planner_of(run: Run) -> Planner:
    """Args: run: prepared."""
    return ImagePlanner(run) if isinstance(run.config, ImageRunConfig) else TextPlanner(run)


@dataclass(frozen=True)
class ModelSizes:
    """Of a model that is not here, as TransformerLens knows them."""

    d_in: int
    weights: int
    multiplications: float
    rest: float
    predicted: float
    vocabulary: int


def model_sizes(config: ModelConfig, context_tokens: int) -> ModelSizes:
    """Sizes by the model's name. Raises: HubError: TransformerLens asks the Hub for them."""
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    try:
        cfg = get_pretrained_model_config(config.name)
    except Exception as error:
        raise HubError(f"sizes of model {config.name!r}: {str(error).splitlines()[0][:200]}") from error
    heads, keys = cfg.n_heads * cfg.d_head, (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    block = 2 * cfg.d_model * (heads + keys) + cfg.d_model * (cfg.d_mlp or 0) * (3 if cfg.gated_mlp else 2)
    layer = hook_layer(config.hook)
    done = cfg.n_layers if layer is None else layer + 1
    a_token = block + 2 * heads * context_tokens
    hook = config.hook.rpartition(".")[2]
    d_in = cfg.d_mlp if hook in ("hook_pre", "hook_post") else heads if has_heads(config.hook) else cfg.d_model
    predicted = cfg.d_vocab * cfg.d_model
    weights, rest = cfg.n_layers * block + 2 * predicted, (cfg.n_layers - done) * a_token
    return ModelSizes(d_in, weights, done * a_token, rest, predicted, cfg.d_vocab)


class TextPlanner(Planner):
    """Of a run on a language model and a text."""

    batch_key: ClassVar[str] = "harvest.batch_contexts"

    def __init__(self, run: Run):
        super().__init__(run)
        self.on_text = on_text(run.config, "plan")

    @cached_property
    def has_gradients(self) -> bool:
        key = gradients_key(content_hash(self.on_text.harvested.key), self.on_text.harvest)
        return (gradients_folder(self.run.harvest_folder, key) / MANIFEST).exists()

    @cached_property
    def model(self) -> ModelRates | None:
        evals = [section for section in self.config.evaluation.seeded() if self.unscored(section)]
        if self.harvested and (self.has_gradients or not self.on_text.harvest.gradient_tokens) and not evals:
            return None
        predicts = any((w := self.work(section)) is not None and (w.rest or w.rest_each) for section in evals)
        try:
            return probe_model(self.run, predicts=predicts)
        except (HubError, ConfigError) as error:
            self.why = error.what
        try:
            return self._by_arithmetic(model_sizes(self.on_text.model, self.on_text.harvest.context_tokens))
        except HubError as error:
            self.why += f"; {error.what}"
            return None

    def _by_arithmetic(self, sizes: ModelSizes) -> ModelRates:
        dtype = getattr(torch, self.config.model.dtype)
        rate = matmul_rate(sizes.d_in, dtype, self.run.device)
        weight_bytes = sizes.weights * dtype.itemsize
        contexts, length = self._batch
        return ModelRates(
            load_s=weight_bytes / 2e8,
            read_s=sizes.multiplications / rate,
            rest_s=sizes.rest / rate,
            predict_s=sizes.predicted / rate,
            gradient_s=(sizes.multiplications + 3 * sizes.rest + 2 * sizes.predicted) / rate,
            write_s=1e-9,
            slower=1.0,
            vocabulary=sizes.vocabulary,
            # The checkpoint and the model made of it.
            load_bytes=2 * weight_bytes,
            weight_bytes=weight_bytes,
            read_bytes=16 * contexts * length * sizes.d_in * 4,
            rows_ND=torch.randn(2048, sizes.d_in, generator=torch.Generator().manual_seed(0)),
        )

    @property
    def _batch(self) -> tuple[int, int]:
        return self.on_text.harvest.batch_contexts, self.on_text.harvest.context_tokens

    @property
    def _kept_share(self) -> float:
        """All but a context's BOS."""
        harvest = self.on_text.harvest
        return 1 - (not harvest.keep_special_tokens) / harvest.context_tokens

    def _amount(self) -> str:
        harvest = self.config.harvest
        return f"{harvest.train_tokens:,} + {harvest.heldout_tokens:,} tokens at {self.config.model.hook}"

    def _harvest(self) -> list[Stage]:
        tokens = self.on_text.harvest.gradient_tokens
        stages = super()._harvest()
        if tokens and not self.has_gradients:
            stages.append(self._gradients(tokens, loads=self.harvested))
        elif tokens:
            stages.append(Stage(name="gradients", amount=f"{tokens:,} tokens", how="done"))
        return stages

    def _gradients(self, tokens: int, *, loads: bool) -> Stage:
        amount, harvest = f"{tokens:,} tokens", self.on_text.harvest
        if self.model is None:
            return self._unknown("gradients", amount, self.why)
        batch = harvest.gradient_batch_contexts * harvest.context_tokens
        seconds = (tokens + batch / 2) * self.model.gradient_s + loads * self.model.load_s
        host, device = self._memory(self.model, 0)
        stage = Stage(name="gradients", amount=amount, how=self.how_model, seconds=seconds, note=self.why)
        return stage.model_copy(
            update={"host_bytes": host, "device_bytes": device, "disk_bytes": 8 * self.model.d_in**2}
        )

    def _shown(self) -> tuple[str, float | None]:
        """The model loads once more and reads."""
        report, model, amount = self.on_text.report, self.model, f"{self.on_text.report.tokens:,} tokens"
        if model is None:
            return amount, None
        tokens = min(report.tokens, 2 * self.config.harvest.heldout_tokens)
        return amount, (model.load_s + tokens * model.read_s) * bool(report.atoms)


class ImagePlanner(Planner):
    """Of a run on a vision model and images. Of a model that is not here nothing is known."""

    batch_key: ClassVar[str] = "harvest.batch_images"

    def __init__(self, run: Run):
        super().__init__(run)
        assert isinstance(run.config, ImageRunConfig)
        self.on_images = run.config
        self._readers: dict[str, ImageRates | str] = {}

    @cached_property
    def model(self) -> ImageRates | None:
        # What is left then codes what lies there.
        if self.harvested:
            return None
        try:
            return probe_images(self.run, self.on_images.model)
        except (HubError, ConfigError, ImageError) as error:
            self.why = error.what
            return None

    @property
    def _image_tokens(self) -> int:
        """0: not known."""
        if self.harvested:
            return self.run.data.context_tokens()
        return 0 if self.model is None else self.model.image_tokens

    @property
    def _batch(self) -> tuple[int, int]:
        return self.on_images.harvest.batch_images, self._image_tokens

    def _images(self, tokens: int) -> int:
        return -(-tokens // self._image_tokens) if self._image_tokens else 0

    def _amount(self) -> str:
        harvest = self.config.harvest
        amount = f"{harvest.train_tokens:,} + {harvest.heldout_tokens:,} tokens at {self.config.model.hook}"
        if not self._image_tokens:
            return amount
        images = f"{self._images(harvest.train_tokens):,} + {self._images(harvest.heldout_tokens):,} images"
        return f"{images} of {self._image_tokens} tokens: {amount}"

    def _harvest(self) -> list[Stage]:
        """The held-out images are kept, too."""
        (stage,) = super()._harvest()
        if stage.how != "done" and self.model is not None:
            n = self._images(self.config.harvest.heldout_tokens)
            kept = {
                "seconds": (stage.seconds or 0) + n * self.model.keep_s,
                "disk_bytes": (stage.disk_bytes or 0) + n * self.model.keep_bytes,
            }
            stage = stage.model_copy(update=kept)
        return [stage]

    def _shown(self) -> tuple[str, float | None]:
        """Each dictionary codes images that are there; the model is not asked again."""
        report = self.on_images.report
        images = min(report.images, self._images(self.config.harvest.heldout_tokens)) if report.atoms else 0
        firsts = {one.name: one for one in reversed([*replicas(self.config)])}.values()
        code_s = sum(rates.code_s for one in firsts if isinstance(rates := self.rates(one), TrainingRates))
        return f"{report.images:,} images", images * self._image_tokens * code_s if self._image_tokens else None

    def work(self, section: Eval) -> Work | None:
        """Tokens of other images are coded and passed over beside the held-out ones."""
        work = super().work(section)
        if work is None or not work.images:
            return work
        more = 1 + work.images * self._image_tokens / self.config.harvest.heldout_tokens
        return replace(work, coded_each=more * work.coded_each, passes_each=more * work.passes_each)

    def _eval(self, section: Eval, finished: bool) -> Stage:
        stage, work, seeds = super()._eval(section, finished), self.work(section), self.config.evaluation.seeds
        others = 0 if work is None else work.images
        if stage.how == "measured" and (section.needs_labels or others):
            stage = stage.model_copy(update={"note": "without its probes"})
        reads = self.on_images.model if others else getattr(section, "backbone", None)
        # What the first seed leaves on disk, the others find.
        found = others and seeds and section.own_seed != seeds[0]
        if stage.how == "done" or found or not isinstance(reads, VisionModelConfig):
            return stage
        rates = self._reading_rates(reads)
        if isinstance(rates, str):
            return self._unknown(stage.name, stage.amount, rates)
        n = others or self._images(self.config.harvest.heldout_tokens)
        host, device = self._memory(rates, 0)
        seen = {
            "seconds": (stage.seconds or 0) + rates.load_s + n * rates.image_s,
            "amount": f"{n:,} images by {reads.shown_name}, {stage.amount}",
            "host_bytes": max(stage.host_bytes or 0, host),
            "device_bytes": max(stage.device_bytes or 0, device),
            "disk_bytes": (stage.disk_bytes or 0) + others * self._image_tokens * (self._token_bytes or 0),
        }
        return stage.model_copy(update=seen)

    def _reading_rates(self, model: VisionModelConfig) -> ImageRates | str:
        """Of a model that reads images for an eval, or why it is not known how fast."""
        if model == self.on_images.model and self.model is not None:
            return self.model
        key = str(model)
        if key not in self._readers:
            try:
                self._readers[key] = probe_images(self.run, model)
            except (HubError, ConfigError, ImageError) as error:
                self._readers[key] = error.what
        return self._readers[key]
