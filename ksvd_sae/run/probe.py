"""What this machine needs for the pieces of a run, measured in seconds on a little of each.

The language model reads random tokens, at the batch of the harvest or as much of it as a few seconds allow. A
dictionary is learned at its own size from two batches, or at a smaller size where one batch would take long: then with
batches of two sizes, which tell what is done and held for a sample from what is for a batch; the rest is in proportion
to the counted operations. Peaks of memory are the process' own (``ksvd_sae.memory``).
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ksvd_sae.activations.gradients import GradientMoments, read_gradients
from ksvd_sae.activations.language import ActivationReader, has_hooked, hook_layer
from ksvd_sae.activations.shards import ActivationShards, shard_name, write_harvest, write_shard
from ksvd_sae.activations.splicing import LOGITS_AT_ONCE, Unembedding, before_unembedding
from ksvd_sae.activations.vision.heldout import write_images
from ksvd_sae.activations.vision.images import LabelledImage
from ksvd_sae.activations.vision.model import ImageReader, VisionModelConfig
from ksvd_sae.memory import peak_growth
from ksvd_sae.methods.base import Method, Source, TrainingSetting
from ksvd_sae.run.config import ImageRunConfig, on_text
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.replicas import source_training

# Of one measured piece, and of what is learned in one: some seconds on a core.
_SECONDS, _OPERATIONS = 2.0, 6e10
# Rows that are coded, and predicted from, to know how fast.
_CODED = 1024
# To learn from, where batches are smaller.
_ROWS = 8192
_T = TypeVar("_T")
clock = time.perf_counter


@dataclass(frozen=True)
class ModelRates:
    """Seconds of the language model: to load it, and of a token up to the hook, from there to its end, of a next
    token's distribution, of a gradient.

    slower: how many times as long reading takes with an eval's share of the threads, where evals run side by side.
    vocabulary: next tokens. load_bytes: most that loading took on the host. weight_bytes: of its parameters.
    read_bytes: most that reading a batch took beside them, on its device. rows_ND: activations, as they were read.
    """

    load_s: float
    read_s: float
    rest_s: float
    predict_s: float
    gradient_s: float
    write_s: float
    slower: float
    vocabulary: int
    load_bytes: int
    weight_bytes: int
    read_bytes: int
    rows_ND: Tensor = field(repr=False)

    @property
    def d_in(self) -> int:
        return self.rows_ND.shape[1]


@dataclass(frozen=True)
class ImageRates(ModelRates):
    """Of a vision model, an image's preprocessing included.

    image_tokens: of an image. image_s: to prepare and read an image. keep_s, keep_bytes: to keep an image as the model
    sees it, as a harvest keeps the held-out ones.
    """

    image_tokens: int
    image_s: float
    keep_s: float
    keep_bytes: int


@dataclass(frozen=True)
class TrainingRates:
    """Of a dictionary: seconds of its training, of coding a row, of a pass over a row's dense code; most bytes that
    training took; bytes on disk.

    scaled: measured at a smaller size.
    """

    seconds: float
    code_s: float
    pass_s: float
    peak_bytes: int
    disk_bytes: int
    scaled: bool


def timed(call: Callable[[], _T], device: torch.device) -> tuple[_T, float]:
    """A call's result and its seconds, the device's work included."""
    _wait(device)
    started = clock()
    result = call()
    _wait(device)
    return result, clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(mib: float | None) -> int:
    return int((mib or 0) * 2**20)


def _per_item(call: Callable[[], Any], items: int, device: torch.device) -> float:
    """Seconds an item, once what comes first is warm: the mean of as many calls as fit."""
    _, seconds = timed(call, device)
    times = [timed(call, device)[1] for _ in range(min(3, max(1, int(_SECONDS / max(seconds, 1e-9)))))]
    return sum(times) / len(times) / items


@torch.no_grad()
def probe_model(run: Run, *, predicts: bool) -> ModelRates:
    """Load the model and let it read. Args: predicts: whether anything asks beyond the hook.

    Raises: as ``load_model``.
    """
    # Imported once in a process: no part of a load.
    has_hooked(run.config.model.name)
    config, device = on_text(run.config, "plan").harvest, run.device
    host = torch.device("cpu")
    (reader, load_s), load_mib = peak_growth(lambda: timed(run.reader, device), host)
    length = config.context_tokens
    tokens_BL = _tokens(reader, config.batch_contexts, length)
    _, one_s = timed(lambda: reader.read(tokens_BL[:1]), device)
    n = min(len(tokens_BL), max(1, int(_SECONDS / one_s)))
    _, read_mib = peak_growth(partial(reader.read, tokens_BL[:n]), device)
    rows_ND = reader.read(tokens_BL[:n]).cpu()
    read_s = _per_item(lambda: reader.read(tokens_BL[:n]), n * length, device)
    slower, threads = 1.0, torch.get_num_threads()
    if run.config.evaluation.processes > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, threads // run.config.evaluation.processes))
        try:
            slower = _per_item(lambda: reader.read(tokens_BL[:n]), n * length, device) / read_s
        finally:
            torch.set_num_threads(threads)
    rest_s = predict_s = gradient_s = 0.0
    model = reader.model
    if predicts:
        few_BL = tokens_BL[: -(-n // 2)].to(device)
        whole_s = _per_item(lambda: before_unembedding(model, few_BL), few_BL.numel(), device)
        layers = (hook_layer(reader.hook) or 0) + 1
        rest_s = max(whole_s - read_s, read_s * (model.cfg.n_layers / layers - 1) / 2)
        unembedding = Unembedding(model)
        some_BL = tokens_BL[: -(-unembedding.rows_at_once(LOGITS_AT_ONCE) // length)].to(device)
        final_ND = before_unembedding(model, some_BL).flatten(0, 1)[: unembedding.rows_at_once(LOGITS_AT_ONCE)]
        predict_s = _per_item(lambda: unembedding.logits(final_ND).float().log_softmax(-1), len(final_ND), device)
    if config.gradient_tokens:
        gradient_s = _per_item(lambda: read_gradients(reader, tokens_BL[:1]), length, device)
    write_s = _writing(run, rows_ND.to(getattr(torch, config.dtype)))
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    peaks = (_bytes(load_mib), weight_bytes, _bytes(read_mib) * len(tokens_BL) // n)
    seconds = (load_s, read_s, rest_s, predict_s, gradient_s, write_s, slower)
    return ModelRates(*seconds, model.cfg.d_vocab, *peaks, rows_ND)


def _writing(run: Run, stored_ND: Tensor) -> float:
    """Seconds a byte."""
    with tempfile.TemporaryDirectory(dir=run.cache, prefix=".plan-") as folder:
        path = Path(folder) / shard_name(0)
        return _per_item(lambda: write_shard(path, stored_ND), stored_ND.nbytes, torch.device("cpu"))


@torch.no_grad()
def probe_images(run: Run, model: VisionModelConfig) -> ImageRates:
    """Load a vision model and let it read the run's first images. Raises: as ``ImageReader`` and what images raise."""
    config, device = run.config, run.device
    assert isinstance(config, ImageRunConfig)
    images = list(islice(config.images.images(config.seed), config.harvest.batch_images))
    (reader, load_s), load_mib = peak_growth(
        lambda: timed(partial(ImageReader, model, device), device), torch.device("cpu")
    )

    def read(some: list[LabelledImage]) -> Tensor:
        return reader.read(reader.pixels(some)).flatten(0, 1)

    _, one_s = timed(lambda: read(images[:1]), device)
    some = images[: max(1, int(_SECONDS / one_s))]
    rows_ND, read_mib = peak_growth(partial(read, some), device)
    image_s, tokens = _per_item(lambda: read(some), len(some), device), reader.grid.tokens
    rows_ND = rows_ND.cpu()
    with tempfile.TemporaryDirectory(dir=run.cache, prefix=".plan-") as folder:
        kept = Path(folder) / "kept"
        keep_s = _per_item(lambda: write_images(kept, some, reader, len(some)), len(some), torch.device("cpu"))
        keep_bytes = kept.stat().st_size // len(some)
    return ImageRates(
        load_s=load_s,
        read_s=image_s / tokens,
        rest_s=0.0,
        predict_s=0.0,
        gradient_s=0.0,
        write_s=_writing(run, rows_ND.to(getattr(torch, config.harvest.dtype))),
        slower=1.0,
        vocabulary=0,
        load_bytes=_bytes(load_mib),
        weight_bytes=sum(weight.nbytes for weight in reader.model.parameters()),
        read_bytes=_bytes(read_mib) * config.harvest.batch_images // len(some),
        rows_ND=rows_ND,
        image_tokens=tokens,
        image_s=image_s,
        keep_s=keep_s,
        keep_bytes=keep_bytes,
    )


def _tokens(reader: ActivationReader, contexts: int, length: int) -> Tensor:
    """Random ordinary tokens: none of them is left out."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(reader.model.cfg.d_vocab, (contexts, length), generator=generator)
    ordinary = reader.ordinary(ids.to(reader.model.cfg.device)).cpu()
    return torch.where(ordinary, ids, ids[ordinary][0])


class Trainings:
    """Trainings tried out, on rows such as the dictionary will see."""

    def __init__(self, run: Run, rows_ND: Tensor):
        self.run, self.rows_ND = run, rows_ND
        self._warm: set[str] = set()

    def rates(self, method: Method, n_samples: int) -> TrainingRates:
        """Args: n_samples: that the run will have. Raises: whatever training raises."""
        d_in, source = self.rows_ND.shape[1], source_training(self.run.config, method)
        small = _within(method, d_in)
        small_source = None if source is None else _within(source, d_in)
        own = small.batch(n_samples)
        # Enough of small batches to tell their time from what comes before and after.
        many = min(_ROWS, 8 * own, int(_OPERATIONS / max(1.0, small.operations(1 << 16, d_in) / (1 << 16))))
        rows = -(-max(own, 2 * (small.size or 1), many) // own) * own
        with tempfile.TemporaryDirectory(dir=self.run.cache, prefix=".plan-") as name:
            folder = Path(name)
            shards = self._shards(folder / "shards", 2 * rows)
            taken = None if small_source is None else self._source(small_source, folder / "source", shards)
            train = partial(self._train, small, folder, taken)
            if method.kind not in self._warm:
                train(self._part(shards))
                self._warm.add(method.kind)
            one_s, _ = train(self._part(shards))
            (more_s, made), peak_mib = peak_growth(partial(train, shards), self.run.device)
            # Of what is done for the rows, whatever comes before and after is not done twice.
            rows_s = min(max(more_s - one_s, 0.25 * one_s), one_s)
            if small is method and more_s < _SECONDS and hasattr(method, "passes"):
                # Next to what comes before and after, the rows take too little to be told from noise: more of them.
                passes = 1 + min(16, math.ceil(_SECONDS / max(rows_s, 1e-3)))
                rows_s = min(max(0.0, train(shards, passes)[0] - more_s) / (2 * (passes - 1)), one_s)
            if small is not method:
                large = small.resized({"batch_samples": 2 * own})
                (large_s, _), large_mib = peak_growth(
                    partial(self._train, large, folder, taken, shards), self.run.device
                )
            disk_bytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
            code_s, pass_s = self._coding(small, made)
        samples = n_samples * getattr(method, "passes", 1)
        seconds, peak_bytes = max(0.0, one_s - rows_s) + rows_s * samples / rows, float(_bytes(peak_mib))
        if small is not method:
            # Half as many batches: what is done once for each is done half as often, and what is held of each sample
            # is held twice.
            batches_s = min(max(more_s - large_s, 0.0), rows_s)
            # Small batches may hide in what is held besides.
            a_sample = max(4 * method.floats_of_sample(d_in), (_bytes(large_mib) - peak_bytes) / own)
            wider = (method.size or 1) / (small.size or 1)
            heavier = method.operations_of_batch(d_in) / small.operations_of_batch(d_in)
            batch = method.batch(n_samples)
            seconds = max(0.0, one_s - rows_s) + (rows_s - batches_s) * wider * samples / rows
            seconds += batches_s * heavier * samples / rows * own / batch
            peak_bytes = (
                max(0.0, peak_bytes - a_sample * own) * heavier + a_sample * (wider if method.is_sae else 1) * batch
            )
        return TrainingRates(
            seconds=seconds if method.learns else more_s,
            code_s=code_s * (method.size or 1) / (small.size or 1),
            pass_s=pass_s * (method.size or 1) / (small.size or 1),
            peak_bytes=int(peak_bytes),
            disk_bytes=int(disk_bytes * (method.size or 1) / (small.size or 1)),
            scaled=small is not method,
        )

    def _shards(self, folder: Path, n: int) -> ActivationShards:
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(self.rows_ND), (3, n + 64), generator=generator)
        # More rows than were read: sums of a row and a part of two others' difference.
        x_ND = self.rows_ND[picks[0]] + 0.3 * (self.rows_ND[picks[1]] - self.rows_ND[picks[2]])
        x_ND = x_ND.float()
        return write_harvest(folder, {"plan": n}, (x_ND[: n // 2], x_ND[n // 2 : n]), (x_ND[n:],))

    @staticmethod
    def _part(shards: ActivationShards) -> ActivationShards:
        """The first half alone."""
        train = {**shards.manifest["parts"]["train"]}
        train["shards"] = train["shards"][:1]
        parts = {**shards.manifest["parts"], "train": train}
        return ActivationShards(shards.folder, "train", {**shards.manifest, "parts": parts})

    def _setting(self, shards: ActivationShards) -> TrainingSetting:
        """Of no harvest: there need be none yet."""
        variance_D, config = shards.statistics.variance_D.double(), self.run.config
        moments = GradientMoments(len(variance_D), torch.diag(1 / (variance_D + variance_D.mean())))
        return TrainingSetting(
            model_name=config.model.name,
            hook=config.model.hook,
            context_tokens=1,
            seed=config.seed,
            device=self.run.device,
            harvest_hash="plan",
            shards=shards,
            gradient_moments=lambda: moments,
        )

    def _train(
        self, method: Method, folder: Path, source: Source | None, shards: ActivationShards, passes: int = 1
    ) -> tuple[float, Path]:
        made = Path(tempfile.mkdtemp(dir=folder))
        short = method.model_copy(update={"passes": passes}) if hasattr(method, "passes") else method
        _, seconds = timed(lambda: short.train(self._setting(shards), made, source), self.run.device)
        return seconds, made

    def _source(self, method: Method, folder: Path, shards: ActivationShards) -> Source:
        folder.mkdir()
        facts = method.train(self._setting(shards), folder, None)
        return Source(method, folder, facts.samples_seen)

    @torch.no_grad()
    def _coding(self, method: Method, made: Path) -> tuple[float, float]:
        """Seconds of a row: to code it and rebuild it; of a pass over its dense code."""
        shards = ActivationShards.open(made.parent / "shards")
        sae = method.load(self._setting(shards), made)
        x_BD = self.rows_ND[:_CODED].float().to(self.run.device)
        code_BF = sae.encode(x_BD)
        pass_s = _per_item(code_BF.square, len(x_BD), self.run.device)
        return _per_item(lambda: sae.decode(sae.encode(x_BD)), len(x_BD), self.run.device), pass_s


def _within(method: Method, d_in: int) -> Method:
    """The method, or the largest of half, a quarter … its size of which a batch takes little."""
    small = method
    while small.operations(small.batch(1 << 62), d_in) > _OPERATIONS and (small.size or 0) > 2 * (small.budget or 1):
        batch, n_atoms = small.batch(1 << 62), small.size or 1
        # The batch first: it is known how time goes with it.
        if batch > n_atoms:
            small = small.resized({"batch_samples": batch // 2})
        else:
            small = small.resized({"n_atoms": n_atoms // 2, "batch_samples": batch // 2})
    return small


@torch.no_grad()
def matmul_rate(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications a second of a product of a batch with weights."""
    x_BD, w_DD = (torch.randn(n, width, device=device).to(dtype) for n in (2048, 2048))
    return 1 / _per_item(lambda: x_BD @ w_DD.T, 2048 * 2048 * width, device)
