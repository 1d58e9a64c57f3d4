"""The atoms of another dictionary, coded by pursuit.

Is it the coder that limits a dictionary, its atoms, or the metric that they were learned in? Crossing dictionaries with
coders changes one of the three and keeps the others.
"""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import Self

from ksvd_sae.learning.coding import Coding
from ksvd_sae.methods.base import (
    CODER_LABELS,
    Coder,
    Derived,
    Facts,
    KeptAsDictionary,
    Method,
    Source,
    TrainingSetting,
)


class RecodedMethod(Derived, KeptAsDictionary):
    """The atoms of another dictionary, coded by pursuit; of an SAE the decoder's rows, and its bias as the centre."""

    kind: Literal["recoded"] = "recoded"
    coder: Coder = "omp"
    nonnegative: bool | None = Field(None, description="null: as the other's own codes, so that of SAEs: true")
    rtol: float | None = Field(None, ge=0, description="null: that of the other, 0 if it has none")
    tau: float | None = Field(None, ge=0, lt=1, description="null: that of the other, 0 if it has none")

    newer: ClassVar[frozenset[str]] = frozenset({"tau"})

    @property
    def has_signs(self) -> bool:
        return not self.nonnegative

    @property
    def coder_label(self) -> str:
        return CODER_LABELS[self.coder]

    def is_drawn(self, source: Method | None) -> bool:
        """A pursuit draws nothing; the atoms may be drawn."""
        return source is not None and source.is_drawn(None)

    def like(self, other: Method) -> Self:
        nonnegative = not other.has_signs if self.nonnegative is None else self.nonnegative
        if nonnegative and self.coder == "ormp":
            raise ValueError("coder 'ormp' has signs; use 'omp', or set nonnegative: false")
        if nonnegative and self.view != "signed":
            raise ValueError(f"view {self.view!r} needs signs to split; leave view out")
        if self.coder == "matryoshka" and other.group_sizes is None:
            raise ValueError(f"coder 'matryoshka' needs groups, which {self.of!r} has not; take coder 'omp'")
        theirs = other.coding or Coding(1)
        rtol = theirs.rtol if self.rtol is None else self.rtol
        tau = theirs.tau if self.tau is None else self.tau
        return self.model_copy(update={"nonnegative": nonnegative, "rtol": rtol, "tau": tau})

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        assert source is not None
        assert self.k is not None
        assert self.rtol is not None
        assert self.tau is not None
        dictionary = self.atoms_of(source, setting)
        theirs = dictionary.coding
        coding = replace(
            theirs,
            k=self.k,
            coder=self.coder,
            rtol=self.rtol,
            tau=self.tau,
            nonnegative=bool(self.nonnegative),
            # A limit that was chosen for another k says nothing of this one.
            max_steps=theirs.max_steps if self.k == theirs.k else None,
            groups=theirs.groups if self.coder == "matryoshka" else None,
        )
        setting.save(replace(dictionary, coding=coding), folder)
        return Facts(d_sae=dictionary.n_atoms, k=self.k, signed=self.has_signs, samples_seen=source.samples_seen)
