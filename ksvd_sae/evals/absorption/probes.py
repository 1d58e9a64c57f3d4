"""Letter probes of SAEBench's absorption eval: trained once for a model, layer and vocabulary, whole or not there."""

import logging
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.absorption import common
from sae_bench.evals.absorption.vocab import LETTERS

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.absorption import AbsorptionEval
from ksvd_sae.evals.absorption.adapters import every_letter_to_learn_from
from ksvd_sae.evals.saebench.adapters import seed_all
from ksvd_sae.replaced import replaced

logger = logging.getLogger(__name__)
# What SAEBench reads again. probe.pth is a pickle: it is only ever read from ``folder``, where this module put it.
_ARCHIVES, _TABLES = ("probe.pth", "data.npz"), ("train_df.csv", "test_df.csv")


@dataclass
class LetterProbes:
    """Where the probes lie, and which layers' probes find enough letters.

    folder: for one model, dtype, vocabulary and prompt; SAEBench's ``probes_dir``.
    too_few: layer -> why no dictionary of it can be scored.
    """

    config: AbsorptionEval
    folder: Path
    device: str
    too_few: dict[int, EvaluationError] = field(default_factory=dict)
    _checked: set[int] = field(default_factory=set)

    def make_ready(self, model: Any, layer: int) -> None:
        """Probes of a layer, trained or found.

        Raises: EvaluationError if they find too few letters: whatever the dictionary, it cannot be scored.
        """
        if layer in self._checked:
            return
        target = self.folder / f"{model.cfg.model_name}" / f"layer_{layer}"
        if target.exists() and not _is_whole(target):
            logger.warning("%s was left half written; making it again", target)
            shutil.rmtree(target)
        if not target.exists():
            self._train(model, layer, target)
        if (error := self._too_few_letters(model, layer)) is not None:
            self.too_few[layer] = error
            raise error
        self._checked.add(layer)

    def _train(self, model: Any, layer: int, target: Path) -> None:
        logger.info("absorption: training letter probes at layer %d", layer)
        seed_all(self.config.seed)
        # SAEBench takes probes for finished as soon as their first file is there.
        with (
            tempfile.TemporaryDirectory(prefix="absorption-probes-") as folder,
            replaced(every_letter_to_learn_from()),
        ):
            common.train_and_save_probes(
                model,
                layers=[layer],
                base_template=self.config.prompt_template,
                pos_idx=self.config.prompt_token_pos,
                probes_dir=folder,
                device=self.device,
            )
            made = Path(folder) / target.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                for name in (*_ARCHIVES, *_TABLES):
                    shutil.copyfile(made / name, beside / name)
                beside.chmod(0o755)  # mkdtemp makes folders that only their owner can read
                os.rename(beside, target)
            except OSError:
                # Another process may have been quicker; its probes are the same.
                if not _is_whole(target):
                    raise
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    @torch.inference_mode()
    def _too_few_letters(self, model: Any, layer: int) -> EvaluationError | None:
        """What SAEBench would say after probing the first SAE, and then leave all of them without a result."""
        place = {"layer": layer, "probes_dir": self.folder}
        probe = common.load_probe(model.cfg.model_name, device=self.device, **place)
        x_ND, words = common.load_probe_data_split(model, split="test", device=self.device, **place)
        said_NL = (probe(x_ND) > 0).cpu().numpy()
        f1 = {}
        for i, letter in enumerate(LETTERS):
            true_N = [label == i for _, label in words]
            hits = int((said_NL[:, i] & true_N).sum())
            f1[letter] = 2 * hits / max(1, int(said_NL[:, i].sum()) + sum(true_N))
        good = [letter for letter, score in f1.items() if score > self.config.min_gt_probe_f1]
        logger.info("absorption: probes at layer %d find %d of 26 letters: %s", layer, len(good), "".join(good))
        if len(good) >= self.config.min_feats_for_eval:
            return None
        return EvaluationError(
            f"absorption: probes on the activations of layer {layer} find too few letters",
            got=f"{len(good)} letters with F1 over {self.config.min_gt_probe_f1} on {len(words)} test words; "
            f"missed: {', '.join(f'{letter} {f1[letter]:.2f}' for letter in LETTERS if letter not in good)}",
            limit=f"min_feats_for_eval: {self.config.min_feats_for_eval}",
            cause="too few words to learn from, or a model or layer that does not tell a word's first letter",
            cure="raise evaluation.absorption.vocabulary_sample (null: all words), or take another layer; lowering "
            "min_feats_for_eval or min_gt_probe_f1 gives scores that are not comparable with SAEBench's",
        )


def _is_whole(folder: Path) -> bool:
    return all((folder / name).exists() for name in _TABLES) and all(
        zipfile.is_zipfile(folder / name) for name in _ARCHIVES
    )
