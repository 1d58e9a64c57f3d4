"""A place with a tiny model under a real name and some text, where configs of eval_configs/ can run."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tiny_models
from tests.command_line import EVAL_CONFIGS, ksvd_sae, set_options

CONFIG = "pythia-160m"
# The one cell of the shrunken grid: two groups of 256 atoms.
CELL = "-m512-k20"
SHRUNK = {
    # The Pile is not here. The folder is relative: results name what the config names.
    "text.source": "folder",
    "text.dataset": "text",
    "harvest.train_tokens": "6000",
    "harvest.heldout_tokens": "1000",
    "harvest.context_tokens": "32",
    "harvest.batch_contexts": "8",
    "harvest.shard_tokens": "2048",
    "grid": "{m: [512], k: [20]}",
    **{f"dictionaries.{name}.batch_samples": "2048" for name in ("db-ksvd", "matryoshka")},
    "dictionaries.topk-sae.batch_samples": "512",
    "dictionaries.topk-sae.passes": "2",
    "evaluation.core": "{dataset: heldout, context_tokens: 32, batch_contexts: 4, reconstruction_batches: 2, "
    "sparsity_batches: 2}",
    "evaluation.sparse_probing": "{datasets: [bbc-news], train_set_size: 40, test_set_size: 20, context_tokens: 32}",
    "evaluation.sparse_probing_sae_probes": "{datasets: [119_us_state_TX], k_values: [1]}",
    "evaluation.scr": "{datasets: [templated-bias_in_bios], pairs: {templated-bias_in_bios: [[professor, nurse]]}, "
    "train_set_size: 40, test_set_size: 20, context_tokens: 32, n_values: [2]}",
    # Random weights know no letters.
    "evaluation.absorption": "null",
    # A thousand held-out tokens are too little text for it.
    "evaluation.autointerp": "null",
}


@dataclass(frozen=True)
class Workplace:
    """folder: working directory, with text/, results/ and cache/. hf_home: has the tiny model."""

    folder: Path
    hf_home: Path

    @property
    def results(self) -> Path:
        return self.folder / "results" / CONFIG

    def ksvd_sae(
        self,
        command: str,
        *options: str,
        changes: dict[str, str] | None = None,
        hf_home: Path | None = None,
        cache: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """``ksvd-sae COMMAND`` on the shrunken config with further ``changes``."""
        return ksvd_sae(
            command,
            str(EVAL_CONFIGS / f"{CONFIG}.yaml"),
            *set_options({**SHRUNK, **(changes or {})}),
            *options,
            folder=self.folder,
            hf_home=hf_home or self.hf_home,
            cache=cache or self.folder / "cache",
        )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("path")
    tiny_models.pythia_160m(folder / "hf-home")
    tiny_models.write_text_folder(folder / "text", 300)
    return Workplace(folder, folder / "hf-home")
