"""Whether another training seed finds the same atoms: what is there is found twice."""

import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.evals.base import Column, Eval, EvalResults, EvalSetting, Panelist, Reads, Work
from ksvd_sae.store import content_hash, write_json

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE

# Atoms with a larger |cos| are the same.
SAME = 0.8


class StabilityEval(Eval):
    """Each training of a dictionary against those with other seeds: atoms matched one to one so that their |cos| is
    largest on average (the Hungarian method), of decoder rows in raw coordinates. Needs no truth and no data."""

    name: ClassVar[str] = "stability"
    reads: ClassVar[Reads] = "activations"
    on_by_default: ClassVar[bool] = True
    ours: ClassVar[bool] = True
    cost: ClassVar[str] = "a matching of atoms for each pair of trainings: a second at 2,048, minutes at 16,384"
    demo_seconds: ClassVar[float] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "stable",
            "stability",
            "stable_fraction",
            "percent",
            f"atoms with |cos| above {SAME} to their partner in a training with another seed, matched one to one "
            "(% of atoms, mean over the other trainings; the values of seeds share pairs: their interval is narrow)",
            "higher",
            matters=0.02,
            optional=True,
        ),
    )

    def work(self, heldout_tokens: int, trainings: int) -> Work:
        return Work(other_each_s=(trainings - 1) * self.demo_seconds)

    def run(self, panel: list[Panelist], setting: EvalSetting, output: Path) -> EvalResults:
        files, metrics, n = {}, {}, {}
        for trainings in _trainings(panel):
            paths = {one.name: self._path(output, one, trainings) for one in trainings}
            if not all(path.exists() for path in paths.values()):
                atoms = {one.name: unit_rows(one.load()) for one in trainings}
                pairs = {frozenset(pair): agreement(*(atoms[name] for name in pair)) for pair in combinations(atoms, 2)}
                for name, path in paths.items():
                    own = [scores for pair, scores in pairs.items() if name in pair]
                    means = {metric: fmean(scores[metric] for scores in own) for metric in own[0]}
                    write_json(path, {"scores": means, "n_trainings": len(own)})
            for name, path in paths.items():
                result = json.loads(path.read_text())
                files[name], metrics[name], n[name] = path, result["scores"], result["n_trainings"]
        return EvalResults(self.name, "atoms", n, files, metrics)

    def _path(self, output: Path, one: Panelist, trainings: list[Panelist]) -> Path:
        others = sorted(other.content for other in trainings if other is not one)
        key = content_hash({"eval": self.name, "dictionary": one.content, "others": others, "same": SAME})
        return output / self.name / f"{one.name}-{key}.json"


def _trainings(panel: list[Panelist]) -> list[list[Panelist]]:
    """The panelists that are one dictionary, trained with different seeds, where there are several."""
    found: dict[str, list[Panelist]] = defaultdict(list)
    for panelist in panel:
        found[panelist.dictionary].append(panelist)
    return [trainings for name, trainings in found.items() if name and len(trainings) > 1]


def unit_rows(sae: "SAE[Any]") -> Tensor:
    """Atoms of an SAE, in raw coordinates."""
    # A split dictionary's decoder holds every atom twice, with either sign.
    return normalize(getattr(sae, "atoms_MD", sae.W_dec).detach().float().cpu(), dim=1)


def agreement(one_MD: Tensor, other_MD: Tensor) -> dict[str, float]:
    """How well unit rows can be matched one to one: stable_fraction and mean |cos| of the pairs."""
    from scipy.optimize import linear_sum_assignment

    cosines_MM = (one_MD @ other_MD.T).abs()
    matched_M = cosines_MM[linear_sum_assignment(cosines_MM.numpy(), maximize=True)]
    return {"stable_fraction": float((matched_M > SAME).double().mean()), "mean_cosine": float(matched_M.mean())}
