"""A finished training, and what the tables say of it beside its scores."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ksvd_sae.methods.derived_config import has_signs
from ksvd_sae.methods.options import View
from ksvd_sae.methods.published.config import PublishedSAEConfig
from ksvd_sae.run.config import DictionaryConfig, view_name, views
from ksvd_sae.store import content_hash


@dataclass(frozen=True)
class TrainedDictionary:
    """A finished training: its name in this run, config, folder, manifest, and the view that its codes are given in.

    seed: None where nothing is drawn. label: its name, with the seed where the run has several trainings of it.
    """

    name: str
    config: DictionaryConfig
    folder: Path
    manifest: dict[str, Any]
    seed: int | None
    label: str
    view: View = "signed"

    def in_views(self) -> "list[TrainedDictionary]":
        """The same in each view that the config asks for, signed first."""
        return [replace(self, view=view) for view in views(self.config)]

    @property
    def panelist(self) -> str:
        """Its name among what is evaluated, which says the view too."""
        return view_name(self.label, self.view)

    @property
    def content(self) -> str:
        """Hash of the dictionary as it codes."""
        key = {"trained": self.manifest["hash"], "coder": getattr(self.config, "coder", None)}
        # Only here: scores from before there were views stay valid.
        return content_hash(key if self.view == "signed" else {**key, "view": self.view})

    def facts(self, l0: float | None) -> dict[str, Any]:
        """What every row of the comparison says of it.

        Args: l0: as measured on held-out tokens.
        """
        config: Any = self.config
        if isinstance(config, PublishedSAEConfig):
            known = self.manifest
            view = "signed" if known["signed"] else "non-negative"
            facts = {"dictionary": self.name, "view": view, "d_sae": known["d_sae"], "k": known["k"]}
            return {**facts, "l0": l0, "seed": None}
        n_atoms = self.manifest.get("n_latents") or getattr(config, "n_atoms", config.k)
        return {
            "dictionary": self.name,
            "view": self.view if has_signs(config) else "non-negative",
            "d_sae": 2 * n_atoms if self.view == "split" else n_atoms,
            "k": config.k or self.manifest["k"],
            "l0": l0,
            "seed": self.seed,
        }

    def training_rows(self, facts: dict[str, Any], data: str) -> list[dict[str, Any]]:
        """samples_seen and seconds, as rows of the table; what is not known of one is NaN.

        Args: data: what it was trained on, by its name.
        """
        # Downloading is no training.
        known = {**self.manifest, "seconds": None} if isinstance(self.config, PublishedSAEConfig) else self.manifest
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
