"""A finished training, and what the tables say of it beside its scores."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ksvd_sae.methods.base import Method, View
from ksvd_sae.run.config import view_name
from ksvd_sae.store import content_hash


@dataclass(frozen=True)
class TrainedDictionary:
    """A finished training: its name in this run, method, folder, manifest, and the view that its codes are given in.

    seed: None where nothing is drawn. label: its name, with the seed where the run has several trainings of it.
    """

    name: str
    method: Method
    folder: Path
    manifest: dict[str, Any]
    seed: int | None
    label: str
    view: View = "signed"

    def in_views(self) -> "list[TrainedDictionary]":
        """The same in each view that the config asks for, signed first."""
        return [replace(self, view=view) for view in self.method.views]

    @property
    def learns_anywhere(self) -> bool:
        """Whether its kind can be learned on any activations, and its codes are as they come."""
        return self.view == "signed" and self.method.learns_anywhere

    @property
    def panelist(self) -> str:
        """Its name among what is evaluated, which says the view too."""
        return view_name(self.label, self.view)

    @property
    def content(self) -> str:
        """Hash of the dictionary as it codes."""
        return self.content_of(self.manifest["hash"], self.method, self.view)

    @staticmethod
    def content_of(trained: str, method: Method, view: View) -> str:
        """``content`` by the hash of what the training follows from."""
        return content_hash({"trained": trained, "view": view, **method.choices()})

    def facts(self, l0: float | None) -> dict[str, Any]:
        """What every row of the comparison says of it.

        Args: l0: as measured on held-out tokens.
        """
        known = self.manifest
        return {
            "dictionary": self.name,
            "view": self.view if known["signed"] else "non-negative",
            "d_sae": 2 * known["d_sae"] if self.view == "split" else known["d_sae"],
            "k": known["k"],
            "l0": l0,
            "seed": self.seed,
        }

    def training_rows(self, facts: dict[str, Any], data: str) -> list[dict[str, Any]]:
        """samples_seen and seconds, as rows of the table; what is not known of one is NaN.

        Args: data: what it was trained on, by its name.
        """
        known = self.manifest
        return [
            {
                **facts,
                "eval": "training",
                "data": data,
                "metric": metric,
                "value": float("nan") if known[metric] is None else float(known[metric]),
                "eval_seed": None,
                "n": known["samples_seen"],
                "source": self.folder.name,
            }
            for metric in ("samples_seen", "seconds")
        ]
