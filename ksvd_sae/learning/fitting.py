"""One call of ``fit``: passes over a source, with the log and the checkpoint that belong to it."""

from collections.abc import Generator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ksvd_sae.device import resolve_device
from ksvd_sae.errors import ShapeError
from ksvd_sae.learning.checkpoint import (
    Fingerprint,
    check_probe,
    digest,
    load_checkpoint,
    probe,
    save_checkpoint,
)
from ksvd_sae.learning.sources import SampleSource, StreamSource, TensorSource, kept_on_device, prefetched, same_device

if TYPE_CHECKING:
    from ksvd_sae.learning.dbksvd import DoubleBatchKSVD

# Arguments that the bits of a run do not follow from. More passes may be asked for later; the coder is for afterwards;
# a device is looked at by itself.
NOT_IN_FINGERPRINT = (
    "passes",
    "coder",
    "device",
    "keep_on_device",
    "log_path",
    "checkpoint_path",
    "checkpoint_every",
    "on_batch",
)
# Batches where no size is asked for; measured in averaging.py.
BATCH_PER_ATOM = 4
FEWEST_IN_A_BATCH = 1024


class Fit:
    """Passes of ``ksvd`` over ``samples``, from the start or from a checkpoint."""

    def __init__(self, ksvd: "DoubleBatchKSVD", source: SampleSource | StreamSource):
        self.ksvd = ksvd
        self.checkpoint_path = None if ksvd.checkpoint_path is None else Path(ksvd.checkpoint_path)
        self.device = resolve_device(ksvd.device)
        if isinstance(source, StreamSource):
            self._check_stream(source)
            self.source: SampleSource | StreamSource = source
        else:
            self._check_size(source)
            self.source = kept_on_device(source, self.device, ksvd.keep_on_device)

    def run(self, resume: bool) -> None:
        self._begin(resume)
        ksvd = self.ksvd
        first_pass = 0 if ksvd._state is None else ksvd._state.pass_index
        for pass_index in range(first_pass, ksvd.passes):
            self._learn_pass(pass_index)
        if self.checkpoint_path is not None:
            self.checkpoint_path.unlink(missing_ok=True)

    def _check_stream(self, source: StreamSource) -> None:
        if source.one_pass_only and self.ksvd.passes > 1:
            raise ShapeError(
                "DoubleBatchKSVD.fit: an iterator can be gone over only once",
                got=f"passes = {self.ksvd.passes}",
                cure="pass a function that returns a fresh iterator, or passes=1",
            )

    def _check_size(self, source: SampleSource) -> None:
        self.ksvd.check(source.d_in)
        if source.n_samples < self.ksvd.n_atoms:
            raise ShapeError(
                "DoubleBatchKSVD.fit: fewer samples than atoms",
                got=f"{source.n_samples} samples, n_atoms = {self.ksvd.n_atoms}",
                cure="harvest more tokens or ask for fewer atoms",
            )

    def _begin(self, resume: bool) -> None:
        """The state to train from, and the files as they belong to it."""
        ksvd, path = self.ksvd, self.checkpoint_path
        # A stream's centre comes with its first batch.
        ksvd._state = None if isinstance(self.source, StreamSource) else ksvd._started(self.source.centre_D)
        if path is not None and resume and path.exists():
            started = ksvd._state or ksvd._started(torch.zeros(1))
            ksvd._state = load_checkpoint(path, self._fingerprint, started)
        elif path is not None:
            path.unlink(missing_ok=True)
        if ksvd.log_path is not None:
            Path(ksvd.log_path).parent.mkdir(parents=True, exist_ok=True)
            # A run that was stopped may have logged more than its checkpoint knows of.
            Path(ksvd.log_path).write_text("".join(line.json() for line in ksvd.log))

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        ksvd = self.ksvd
        arguments = {name: value for name, value in ksvd.get_params().items() if name not in NOT_IN_FINGERPRINT}
        arguments["weighting"] = None if ksvd.weighting is None else digest(ksvd.weighting.matrix)
        arguments["groups"] = None if ksvd.groups is None else list(ksvd.groups)
        if isinstance(self.source, StreamSource):
            return {"arguments": arguments, "samples": {"stream": True}}
        source = self.source
        samples = {
            "n_samples": source.n_samples,
            "d_in": source.d_in,
            "centre": digest(source.centre_D),
            # A source without an order of its own is shuffled otherwise once it is kept on the device.
            "shuffled_here": isinstance(source, TensorSource) and source.shuffled_here,
        }
        return {"arguments": arguments, "samples": samples}

    def _learn_pass(self, pass_index: int) -> None:
        ksvd = self.ksvd
        done = 0 if ksvd._state is None else ksvd._state.batches_done
        with closing(self._batches(pass_index)) as batches:
            for number, batch_BD in enumerate(batches):
                if number == 0 and ksvd._state is not None and done:
                    check_probe(ksvd._state, batch_BD)
                if number < done:
                    continue
                state = ksvd._learn(batch_BD, pass_index)
                state.batches_done = number + 1
                state.pass_probe = probe(batch_BD) if number == 0 else state.pass_probe
                if ksvd.checkpoint_every is not None and len(state.log) % ksvd.checkpoint_every == 0:
                    self._save()
                if ksvd.on_batch is not None:
                    ksvd.on_batch(state.log[-1])
        state = ksvd._fitted[0]
        state.pass_index, state.batches_done, state.pass_probe = pass_index + 1, 0, ""
        if ksvd.checkpoint_every is None:
            self._save()

    def _save(self) -> None:
        if self.checkpoint_path is not None:
            save_checkpoint(self.checkpoint_path, self.ksvd._fitted[0], self._fingerprint)

    def _batches(self, pass_index: int) -> Generator[Tensor, None, None]:
        if isinstance(self.source, StreamSource):
            return prefetched(self.source.batches(), self.device)
        # Batches of nearly equal size: a short last one would see many atoms unused and redraw them.
        largest = self.ksvd.batch_samples or max(FEWEST_IN_A_BATCH, BATCH_PER_ATOM * self.ksvd.n_atoms)
        n_batches = -(-self.source.n_samples // largest)
        size = -(-self.source.n_samples // n_batches)
        seed = None if pass_index == 0 else self.ksvd.seed + pass_index
        if isinstance(self.source, TensorSource) and same_device(self.source.samples_ND.device, self.device):
            return self.source.batches(size, seed=seed)  # nothing to wait for
        return prefetched(self.source.batches(size, seed=seed), self.device)
