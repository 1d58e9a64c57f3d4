"""SAEs that others published, taken from the Hugging Face Hub and scored beside our own."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ksvd_sae.methods.base import Facts, KeptAsSAE, Source, TrainingSetting

# Files of an SAE: a path that names one of them means the folder that they lie in.
WEIGHTS = {"saelens": ("cfg.json", "sae_weights.safetensors"), "dictionary_learning": ("config.json", "ae.pt")}


class PublishedSAEMethod(KeptAsSAE):
    """An SAE that others trained, on more and other text than ours.

    Named by repo_id, path and format, or by a release and an sae_id of SAELens' directory.
    """

    kind: Literal["published_sae"] = "published_sae"
    repo_id: str | None = Field(None, description="owner/name on the Hub")
    revision: str | None = Field(None, description="a commit, branch or tag; null: main as it is then")
    path: str | None = Field(None, description="the SAE's folder in the repository; '.' for its top")
    format: Literal["saelens", "dictionary_learning"] | None = Field(
        None, description="saelens: cfg.json, sae_weights.safetensors; dictionary_learning: config.json, ae.pt"
    )
    release: str | None = Field(None, description="a release of SAELens' directory of SAEs")
    sae_id: str | None = Field(None, description="an SAE of that release")
    k: int | None = Field(None, gt=0, description="the budget, if the SAE's own files do not say")
    samples_seen: int | None = Field(None, gt=0, description="tokens of its training, if its own files do not say")

    is_sae: ClassVar[bool] = True
    learns: ClassVar[bool] = False

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        by_repository = (self.repo_id, self.path, self.format)
        by_release = (self.release, self.sae_id)
        if all(by_release) and not any(by_repository):
            return self
        if not all(by_repository) or any(by_release):
            raise ValueError("a published SAE is named by repo_id, path and format, or by release and sae_id")
        owner, _, name = str(self.repo_id).partition("/")
        if not owner or not name or "/" in name:
            raise ValueError(f"repo_id {self.repo_id!r} is not of the form owner/name")
        if str(self.path).startswith("/") or ".." in str(self.path).split("/"):
            raise ValueError(f"path {self.path!r} leads out of the repository")
        return self

    @property
    def budget(self) -> int | None:
        return self.k

    @property
    def folder(self) -> str:
        """``path`` without a file's name at its end; '' is the top."""
        parts = [part for part in str(self.path).split("/") if part not in ("", ".")]
        if parts and parts[-1] in WEIGHTS[str(self.format)]:
            parts.pop()
        return "/".join(parts)

    @classmethod
    def note(cls, names: list[str]) -> str:
        return (
            f"Published SAEs, scored here like every other: {', '.join(names)}. Others trained them, on more and other "
            "text than ours; their manifests name repository, commit and hashes."
        )

    def check_elsewhere(self, model_name: str, hook: str) -> None:
        """Download it, and check its model and hook by its config alone."""
        from ksvd_sae.methods.published.saes import check_fetched

        check_fetched(self, model_name=model_name, hook_name=hook)

    def train(self, setting: TrainingSetting, folder: Path, source: Source | None) -> Facts:
        from ksvd_sae.methods.published.saes import take_published

        return take_published(
            self,
            folder,
            model_name=setting.model_name,
            hook_name=setting.hook,
            d_in=setting.shards.d_in,
            prepend_bos=setting.shards.prepend_bos,
        )
