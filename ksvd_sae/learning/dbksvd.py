"""Double-batch K-SVD (arXiv 2505.18441): alternate coding and atom updates, batch by batch.

"Double batch": samples come in batches, each coded once and used for one update of the atoms; and
inside the exact update the atoms come in batches too. So memory depends on the batch, not on the
number of samples.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ksvd_sae.device import resolve_device
from ksvd_sae.errors import ActivationError, NotFittedError, ShapeError
from ksvd_sae.learning.atom_update import update_atoms_exact, update_atoms_sums
from ksvd_sae.learning.checks import check_samples
from ksvd_sae.learning.sparse_coding import Code, Coder, encode

logger = logging.getLogger(__name__)


class SampleSource(Protocol):
    """What ``fit`` reads besides a tensor: activation shards, or anything of this shape."""

    @property
    def n_samples(self) -> int: ...

    @property
    def d_in(self) -> int: ...

    @property
    def centre_D(self) -> Tensor: ...

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class BatchLog:
    """One batch of training, as a line of the JSONL log.

    fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖² of the batch as coded, before the update; fvu_after_update: after it,
    before the next coding. l0: mean nonzeros a sample. dead: atoms that no sample of the batch used.
    redrawn: how many of them were replaced.
    """

    pass_index: int
    batch: int
    samples_seen: int
    fvu: float
    fvu_after_update: float
    l0: float
    dead: int
    redrawn: int
    seconds: float


class DoubleBatchKSVD:
    """Learn a dictionary of unit atoms such that k of them, with signs, rebuild a sample.

    Args:
        n_atoms: M.
        k: most atoms a sample.
        passes: times that ``fit`` goes over the samples.
        batch_samples: largest batch; ``fit`` makes batches of nearly equal size at most this.
        update: 'sums' (all atoms at once, with a line search) or 'exact' (SVD); see atom_update.py.
        atom_batch: atoms updated in parallel by 'exact'.
        init: 'data' (atoms start as random samples) or 'random' (uniform, as the paper). Atoms that a
            batch leaves unused are redrawn the same way.
        centre: subtract the mean of the samples first (the paper does not).
        rtol, max_steps: see ``matching_pursuit``.
        coder: the coder of ``encode`` and of the dictionary; training always codes by plain MP.
        seed: same seed, same data, same thread count: the same bits on CPU.
        device: 'cpu', 'cuda' or 'auto'.
        log_path: JSONL file with a line a batch (see BatchLog); starts empty with each ``fit``.
        on_batch: called with each BatchLog (progress bars).

    Attributes after fitting: ``atoms_MD``, ``centre_D``, ``samples_seen``, ``log`` (list of BatchLog).

    >>> ksvd = DoubleBatchKSVD(n_atoms=512, k=8).fit(x_ND)         # doctest: +SKIP
    >>> x_hat_ND = ksvd.decode(ksvd.encode(x_ND))                  # doctest: +SKIP
    """

    atoms_MD: Tensor
    centre_D: Tensor

    def __init__(
        self,
        n_atoms: int,
        k: int,
        *,
        passes: int = 1,
        batch_samples: int = 65_536,
        update: Literal["sums", "exact"] = "sums",
        atom_batch: int = 128,
        init: Literal["data", "random"] = "data",
        centre: bool = True,
        rtol: float = 0.0,
        max_steps: int | None = None,
        coder: Coder = "mp",
        seed: int = 0,
        device: str = "auto",
        log_path: Path | None = None,
        on_batch: Callable[[BatchLog], None] | None = None,
    ):
        if update not in ("sums", "exact") or init not in ("data", "random"):
            raise ShapeError("DoubleBatchKSVD: unknown option", got=f"update={update!r}, init={init!r}")
        if not 1 <= k <= n_atoms:
            raise ShapeError("DoubleBatchKSVD: k must be between 1 and n_atoms", got=f"k = {k}, n_atoms = {n_atoms}")
        if min(passes, batch_samples, atom_batch) < 1:
            raise ShapeError("DoubleBatchKSVD: passes, batch_samples and atom_batch must be at least 1")
        self.n_atoms, self.k, self.passes, self.batch_samples = n_atoms, k, passes, batch_samples
        self.update, self.atom_batch, self.init, self.centre = update, atom_batch, init, centre
        self.rtol, self.max_steps, self.coder, self.seed = rtol, max_steps, coder, seed
        self.device = resolve_device(device)
        self.log_path, self.on_batch = log_path, on_batch
        self._reset()

    def _reset(self) -> None:
        self.samples_seen = 0
        self.log: list[BatchLog] = []
        self._generator = torch.Generator().manual_seed(self.seed)
        for name in ("atoms_MD", "centre_D"):
            self.__dict__.pop(name, None)

    def fit(self, samples: "Tensor | SampleSource") -> "DoubleBatchKSVD":
        """Learn from a (N, D) tensor or a SampleSource, starting afresh.

        Raises: ShapeError (fewer samples than atoms, k above D), ActivationError (NaN, infinite or constant samples).
        """
        source = _TensorSource(samples) if isinstance(samples, Tensor) else samples
        if source.n_samples < self.n_atoms:
            raise ShapeError(
                "DoubleBatchKSVD.fit: fewer samples than atoms",
                got=f"{source.n_samples} samples, n_atoms = {self.n_atoms}",
                cure="harvest more tokens or ask for fewer atoms",
            )
        self._reset()
        if self.log_path is not None:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.log_path.write_text("")
        self.centre_D = source.centre_D.float().to(self.device) * float(self.centre)
        # Batches of nearly equal size: a short last one would see many atoms unused and redraw them.
        n_batches = -(-source.n_samples // self.batch_samples)
        size = -(-source.n_samples // n_batches)
        for pass_index in range(self.passes):
            for batch_BD in source.batches(size, seed=None if pass_index == 0 else self.seed + pass_index):
                self._learn(batch_BD, pass_index)
        return self

    def partial_fit(self, batch_BD: Tensor) -> "DoubleBatchKSVD":
        """One update from one batch. The first batch sets the centre and the initial atoms."""
        first = "centre_D" not in self.__dict__
        if first:
            source = _TensorSource(batch_BD)
            if not len(batch_BD):
                raise ShapeError("DoubleBatchKSVD.partial_fit: the first batch is empty")
            self.centre_D = source.centre_D.float().to(self.device) * float(self.centre)
        try:
            self._learn(batch_BD, 0)
        except (ShapeError, ActivationError):
            if first:  # a refused first batch leaves nothing behind
                self._reset()
            raise
        return self

    def encode(self, x_BD: Tensor) -> Code:
        """Code raw samples with ``coder``."""
        self._require_fitted()
        x_BD = self._centred(x_BD)
        return encode(x_BD, self.atoms_MD, self.k, coder=self.coder, max_steps=self.max_steps, rtol=self.rtol)

    def decode(self, code: Code) -> Tensor:
        """Rebuild raw samples, (B, D)."""
        self._require_fitted()
        return code.reconstruct(self.atoms_MD) + self.centre_D

    def _require_fitted(self) -> None:
        if "atoms_MD" not in self.__dict__:
            raise NotFittedError("DoubleBatchKSVD: not fitted yet", cure="call fit or partial_fit first")

    def _learn(self, raw_BD: Tensor, pass_index: int) -> None:
        started = time.perf_counter()
        x_BD = self._prepared(raw_BD)
        if "atoms_MD" not in self.__dict__:
            self.atoms_MD = self._draw_atoms(self.n_atoms, x_BD)
        code = encode(x_BD, self.atoms_MD, self.k, coder="mp", max_steps=self.max_steps, rtol=self.rtol)
        if self.update == "sums":
            updated = update_atoms_sums(x_BD, code, self.atoms_MD)
        else:
            updated = update_atoms_exact(
                x_BD, code, self.atoms_MD, atom_batch=self.atom_batch, generator=self._generator
            )
        self.atoms_MD = updated.atoms_MD
        unused = (updated.usage_M == 0).nonzero().flatten()
        # A batch smaller than the dictionary says little about which atoms are dead.
        redrawn = unused if len(x_BD) >= self.n_atoms else unused[:0]
        if len(redrawn):
            self.atoms_MD[redrawn] = self._draw_atoms(len(redrawn), x_BD)
        self.samples_seen += len(x_BD)
        self._log(
            BatchLog(
                pass_index=pass_index,
                batch=len(self.log),
                samples_seen=self.samples_seen,
                fvu=updated.error_before / self._variance(x_BD),
                fvu_after_update=updated.error_after / self._variance(x_BD),
                l0=float(code.l0().double().mean()),
                dead=len(unused),
                redrawn=len(redrawn),
                seconds=time.perf_counter() - started,
            )
        )

    def _centred(self, raw_BD: Tensor) -> Tensor:
        if raw_BD.ndim != 2 or raw_BD.shape[1] != len(self.centre_D):
            raise ShapeError(
                "DoubleBatchKSVD: samples do not fit",
                got=str(tuple(raw_BD.shape)),
                limit=f"(B, {len(self.centre_D)})",
                cause="activations of another model or hook",
            )
        if not raw_BD.is_floating_point():
            raise ShapeError("DoubleBatchKSVD: samples are not floating point", got=str(raw_BD.dtype))
        return raw_BD.to(self.device).float() - self.centre_D

    def _prepared(self, raw_BD: Tensor) -> Tensor:
        x_BD = self._centred(raw_BD)
        if self.k > x_BD.shape[1]:
            raise ShapeError("DoubleBatchKSVD: k is above d_in", got=f"k = {self.k}", limit=f"d_in = {x_BD.shape[1]}")
        check_samples(x_BD, "DoubleBatchKSVD")
        # Rounding leaves a variance of about 1e-14 of the energy where all samples are the same.
        if not self._variance(x_BD) > 1e-12 * float(x_BD.double().square().sum()):
            raise ActivationError(
                "DoubleBatchKSVD: all samples of the batch are the same: there is nothing to learn",
                cause="a hook that gives constants, or padding tokens",
                cure="check the hook name and the text",
            )
        return x_BD

    @staticmethod
    def _variance(x_BD: Tensor) -> float:
        """Σ‖x − x̄‖² over the batch."""
        return float((x_BD - x_BD.mean(dim=0)).double().pow(2).sum())

    def _draw_atoms(self, n: int, x_BD: Tensor) -> Tensor:
        """n fresh unit atoms: random samples (of nonzero norm), or uniform(-½, ½) directions."""
        if self.init == "data":
            nonzero = (torch.linalg.vector_norm(x_BD, dim=1) > 0).nonzero().flatten()
            if len(nonzero) >= n:
                picks = torch.randperm(len(nonzero), generator=self._generator)[:n]
                return torch.nn.functional.normalize(x_BD[nonzero[picks.to(nonzero.device)]], dim=1)
            if "atoms_MD" not in self.__dict__:
                raise ShapeError(
                    "DoubleBatchKSVD: the first batch has fewer nonzero samples than atoms",
                    got=f"{len(nonzero)} samples, n_atoms = {self.n_atoms}",
                    cure="use larger batches, fewer atoms, or init='random'",
                )
        drawn = torch.rand(n, x_BD.shape[1], generator=self._generator) - 0.5
        return torch.nn.functional.normalize(drawn, dim=1).to(x_BD.device)

    def _log(self, entry: BatchLog) -> None:
        self.log.append(entry)
        logger.debug("%s", entry)
        if self.log_path is not None:
            with self.log_path.open("a") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        if self.on_batch is not None:
            self.on_batch(entry)


class _TensorSource:
    """A tensor in memory as a SampleSource; passes after the first are shuffled."""

    def __init__(self, samples_ND: Tensor):
        if samples_ND.ndim != 2 or not samples_ND.is_floating_point():
            raise ShapeError(
                "DoubleBatchKSVD: samples must be a floating-point (N, D) tensor",
                got=f"{samples_ND.dtype} {tuple(samples_ND.shape)}",
            )
        check_samples(samples_ND, "DoubleBatchKSVD")
        self.samples_ND = samples_ND
        self.n_samples, self.d_in = samples_ND.shape

    @property
    def centre_D(self) -> Tensor:
        return self.samples_ND.double().mean(dim=0)

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Iterable[Tensor]:  # type: ignore[override]
        order = None
        if seed is not None:
            order = torch.randperm(self.n_samples, generator=torch.Generator().manual_seed(seed))
        for start in range(0, self.n_samples, batch_samples):
            stop = start + batch_samples
            yield self.samples_ND[start:stop] if order is None else self.samples_ND[order[start:stop]]
