"""The atoms of one dictionary under the coders of others, in a run: what changes, what must not, what is made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE
from torch import Tensor
from torch.nn.functional import normalize

from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import ConfigError, ManifestError
from ksvd_sae.learning.coding import Coding
from ksvd_sae.methods.base import TRAIN_LOG
from ksvd_sae.methods.sae.raw_units import WeightedTopKSAE
from ksvd_sae.report.compare import compare
from ksvd_sae.run.config import RunConfig, parse_config
from ksvd_sae.run.pipeline import Run
from ksvd_sae.run.trained import TrainedDictionary
from tests.run.test_pipeline import RAW, _one_thread, config_with, heldout_fvu, place, run_in, snapshot, trainings
from tests.tolerances import UNIT_NORM

__all__ = ["_one_thread", "place", "trainings"]
KSVD = RAW["dictionaries"]["db-ksvd"]
TOPK: dict[str, Any] = {**RAW["dictionaries"]["topk-sae"], "passes": 10, "lr": 5e-3}
LINEAR: dict[str, Any] = {"kind": "linear_topk", "passes": 8, "batch_samples": 128, "lr": 5e-3}
FULL: dict[str, Any] = {"kind": "std", "power": 1.0}


def panel(**dictionaries: dict[str, Any]) -> RunConfig:
    return config_with(dictionaries=dictionaries)


def train(place: Path, **dictionaries: dict[str, Any]) -> tuple[Run, dict[str, TrainedDictionary]]:
    run = run_in(place, panel(**dictionaries))
    return run, {trained.name: trained for trained in run.train()}


def codes(run: Run, trained: TrainedDictionary) -> Tensor:
    found: Tensor = run.load_sae(trained).encode(run.shards("heldout").tensor())
    return found.detach()


# ---------------------------------------------------------------- recoded


@pytest.mark.parametrize("coder", ["mp", "mp_refit", "omp", "ormp"])
@pytest.mark.parametrize("weighting", ["none", "std"])
def test_the_same_coder_gives_the_same_codes(place: Path, coder: str, weighting: str) -> None:
    ksvd = {**KSVD, "weighting": weighting, "coder": coder, "max_steps_factor": 2}
    run, trained = train(place, ksvd=ksvd, again={"kind": "recoded", "of": "ksvd", "coder": coder})
    assert torch.equal(codes(run, trained["ksvd"]), codes(run, trained["again"]))
    first, second = (Dictionary.load(trained[name].folder) for name in ("ksvd", "again"))
    assert torch.equal(first.atoms_MD, second.atoms_MD)
    assert second.coding.coder == coder
    # What is on disk codes so too.
    x_BD = run.shards("heldout").tensor()
    assert torch.equal(SAE.load_from_disk(trained["again"].folder / "sae").encode(x_BD), codes(run, trained["ksvd"]))


def test_coders_differ(place: Path) -> None:
    kinds = {c: {"kind": "recoded", "of": "ksvd", "coder": c} for c in ("mp", "mp_refit", "omp", "ormp")}
    run, trained = train(place, ksvd=KSVD, **kinds)
    fvu = {name: heldout_fvu(run, one) for name, one in trained.items()}
    assert fvu["ksvd"] == fvu["mp"] > fvu["mp_refit"] > fvu["omp"] > fvu["ormp"]


@pytest.mark.parametrize("kind", ["topk_sae", "batchtopk_sae", "matryoshka_batchtopk_sae", "jumprelu_sae"])
@pytest.mark.parametrize("weighting", ["none", "std"])
def test_an_sae_under_a_pursuit_rebuilds_with_its_own_atoms(place: Path, kind: str, weighting: str) -> None:
    sae = {**TOPK, "kind": kind, "weighting": weighting}
    if kind.startswith("matryoshka"):
        sae["groups"] = [8, 16]
    run, trained = train(place, sae=sae, omp={"kind": "recoded", "of": "sae", "coder": "omp"})
    theirs, ours = run.load_sae(trained["sae"]), run.load_sae(trained["omp"])
    assert float((theirs.W_dec - ours.W_dec).abs().max().detach()) < UNIT_NORM[torch.float32]
    assert torch.equal(theirs.b_dec, ours.b_dec)
    x_BD = run.shards("heldout").tensor()
    code_BM = ours.encode(x_BD).detach()
    assert float(code_BM.min()) == 0, "an SAE's codes have no signs"
    assert int((code_BM != 0).sum(dim=1).max()) == 3
    by_hand_BD = code_BM @ theirs.W_dec + theirs.b_dec
    assert torch.allclose(ours.decode(code_BM), by_hand_BD, rtol=1e-4, atol=1e-2)
    # Signs may only help, and here they do.
    signed = {"kind": "recoded", "of": "sae", "coder": "omp", "nonnegative": False}
    run, trained = train(place, sae=sae, omp=signed)
    assert float(codes(run, trained["omp"]).min()) < 0


def test_a_pursuit_chooses_in_the_metric(place: Path) -> None:
    """The residual's products with the atoms, in the metric that was asked for, are largest at the first choice."""
    raw = {"kind": "recoded", "of": "sae", "k": 1, "coder": "mp", "nonnegative": False}
    run, trained = train(
        place,
        sae={**TOPK, "weighting": FULL},
        as_trained=raw,
        plain={**raw, "weighting": "none"},
    )
    x_BD = run.shards("heldout").tensor().double()
    sae = run.load_sae(trained["sae"])
    centred_BD, atoms_MD = x_BD - sae.b_dec.detach().double(), sae.W_dec.detach().double()
    deviation_D = run.shards().statistics.variance_D.double().sqrt()
    chosen = {}
    for name, scale_D in (("as_trained", 1 / deviation_D), ("plain", torch.ones_like(deviation_D))):
        products_BM = (centred_BD * scale_D) @ normalize(atoms_MD * scale_D, dim=1).T
        chosen[name] = products_BM.abs().argmax(dim=1)
        assert float((codes(run, trained[name]).abs().argmax(dim=1) == chosen[name]).double().mean()) > 0.995
    assert float((chosen["plain"] != chosen["as_trained"]).double().mean()) > 0.05, "the metrics must tell apart"


def test_k_of_its_own(place: Path) -> None:
    run, trained = train(place, ksvd=KSVD, one={"kind": "recoded", "of": "ksvd", "coder": "mp", "k": 1})
    assert int((codes(run, trained["one"]) != 0).sum(dim=1).max()) == 1
    assert Dictionary.load(trained["one"].folder).coding.max_steps is None


def test_groups_are_left_behind(place: Path) -> None:
    """A Matryoshka dictionary's atoms are coded whole."""
    ksvd = {**KSVD, "groups": [8, 16]}
    run, trained = train(place, ksvd={**ksvd, "coder": "omp"}, omp={"kind": "recoded", "of": "ksvd", "coder": "omp"})
    assert Dictionary.load(trained["omp"].folder).coding.groups is None
    assert torch.equal(codes(run, trained["omp"]), codes(run, trained["ksvd"]))


def test_random_atoms_in_a_metric(place: Path) -> None:
    """As random in the metric as the plain ones are in raw space: the same draw, of another space."""
    random = RAW["dictionaries"]["random"]
    run, trained = train(place, plain=random, weighted={**random, "weighting": FULL})
    plain, weighted = (Dictionary.load(trained[name].folder) for name in ("plain", "weighted"))
    assert torch.equal(plain.atoms_MD, weighted.atoms_MD)
    assert weighted.weighting is not None
    assert heldout_fvu(run, trained["weighted"]) != heldout_fvu(run, trained["plain"])


# ---------------------------------------------------------------- linear encoders


@pytest.mark.parametrize("weighting", ["none", "std"])
@pytest.mark.parametrize("of", ["ksvd", "sae", "random"])
def test_a_linear_encoder_leaves_the_decoder_alone(place: Path, of: str, weighting: str) -> None:
    learned = {"ksvd": KSVD, "sae": TOPK, "random": RAW["dictionaries"]["random"]}
    run, trained = train(place, **{of: {**learned[of], "weighting": weighting}, "linear": {**LINEAR, "of": of}})
    sae, other = run.load_sae(trained["linear"]), run.load_sae(trained[of])
    assert type(sae) is (TopKSAE if weighting == "none" else WeightedTopKSAE)
    rows_MD = other.W_dec.detach()
    rows_FD = rows_MD if of == "sae" else torch.cat([rows_MD, -rows_MD])
    assert sae.W_dec.shape == rows_FD.shape
    if of == "sae":  # its rows have been through two maps
        assert float((sae.W_dec - rows_FD).abs().max().detach()) < UNIT_NORM[torch.float32]
    else:
        assert torch.equal(sae.W_dec, rows_FD)
    assert torch.equal(sae.b_dec, other.b_dec)
    assert sae.cfg.metadata.hook_name == RAW["model"]["hook"]
    assert torch.equal(
        SAE.load_from_disk(trained["linear"].folder).encode(run.shards().tensor()[:9]),
        sae.encode(run.shards().tensor()[:9]),
    )
    code_BF = codes(run, trained["linear"])
    assert int((code_BF != 0).sum(dim=1).max()) <= 3
    assert float(code_BF.min()) == 0
    # It learns to use the atoms: far better than none, and not so well as a search for the best ones.
    found = heldout_fvu(run, trained["linear"])
    assert heldout_fvu(run, trained[of]) * 0.9 < found < (0.98 if of == "random" else 0.6)


def test_training_is_what_lowers_the_error(place: Path) -> None:
    still = {**LINEAR, "of": "ksvd", "lr": 1e-12}
    run, trained = train(place, ksvd=KSVD, linear={**LINEAR, "of": "ksvd"}, still=still)
    assert heldout_fvu(run, trained["linear"]) < 0.95 * heldout_fvu(run, trained["still"])


def test_it_starts_from_the_atoms(place: Path) -> None:
    """An encoder that was hardly moved looks along its own decoder row, in the metric of the dictionary."""
    still = {**LINEAR, "of": "ksvd", "lr": 1e-12, "passes": 1}
    run, trained = train(place, ksvd={**KSVD, "weighting": "std"}, still=still)
    sae, dictionary = run.load_sae(trained["still"]), Dictionary.load(trained["ksvd"].folder)
    assert dictionary.weighting is not None
    along_MD = normalize(dictionary.weighting.apply(dictionary.atoms_MD), dim=1)
    wanted_FD = torch.cat([along_MD, -along_MD])
    assert torch.allclose(normalize(sae.W_enc.detach().T, dim=1), wanted_FD, atol=1e-5)
    assert float(sae.b_enc.abs().max().detach()) < 1e-4


def test_signs_are_worth_their_latents(place: Path) -> None:
    """Atoms that were learned with signs: half of what they say is lost to an encoder that has none."""
    run, trained = train(
        place, ksvd=KSVD, both={**LINEAR, "of": "ksvd"}, half={**LINEAR, "of": "ksvd", "signed": False}
    )
    assert run.load_sae(trained["half"]).cfg.d_sae == 24
    assert heldout_fvu(run, trained["both"]) < 0.9 * heldout_fvu(run, trained["half"])


# ---------------------------------------------------------------- in a run


def test_what_it_is_of_comes_first(place: Path, trainings: list[str]) -> None:
    """In the config's order whatever that is; and what was made is found again."""
    run, trained = train(
        place, omp={"kind": "recoded", "of": "ksvd"}, linear={**LINEAR, "of": "topk"}, ksvd=KSVD, topk=TOPK
    )
    assert trainings == ["db_ksvd", "topk_sae"]
    assert list(trained) == ["omp", "linear", "ksvd", "topk"]
    before = snapshot(place / "cache")
    assert run.train() == list(trained.values()) == run.trained()
    assert snapshot(place / "cache") == before
    seen = {name: one.manifest["samples_seen"] for name, one in trained.items()}
    own = 8 * 2000 // 128 * 128
    assert seen == {"omp": 4000, "linear": seen["topk"] + own, "ksvd": 4000, "topk": 20_000 // 128 * 128}
    assert trained["linear"].manifest["encoder_samples"] == own
    assert (trained["linear"].folder / TRAIN_LOG).exists()


def test_what_it_is_of_is_in_its_key(place: Path) -> None:
    """By what it is, not by its name; and its coder is no matter."""
    recoded = {"kind": "recoded", "of": "it"}
    _, first = train(place, it=KSVD, omp=recoded, linear={**LINEAR, "of": "it"})
    _, other = train(place, it={**KSVD, "passes": 1}, omp=recoded, linear={**LINEAR, "of": "it"})
    assert not {first[name].content for name in first} & {other[name].content for name in other}
    _, named = train(place, that=KSVD, omp={**recoded, "of": "that"}, linear={**LINEAR, "of": "that"})
    _, coded = train(place, it={**KSVD, "coder": "omp"}, omp=recoded, linear={**LINEAR, "of": "it"})
    for name in ("omp", "linear"):
        assert named[name].folder == coded[name].folder == first[name].folder


@pytest.mark.parametrize(
    "change", [{"coder": "mp"}, {"k": 2}, {"nonnegative": True}, {"rtol": 0.5}, {"weighting": "std"}]
)
def test_every_option_is_in_its_key(place: Path, change: dict[str, Any]) -> None:
    recoded = {"kind": "recoded", "of": "it"}
    run, trained = train(place, it=KSVD, plain=recoded, other={**recoded, **change})
    assert trained["plain"].folder != trained["other"].folder
    assert trained["plain"].content != trained["other"].content
    assert not torch.equal(codes(run, trained["plain"]), codes(run, trained["other"]))


def test_without_the_one_it_is_of_it_is_not_made_again(place: Path) -> None:
    run, trained = train(place, it=KSVD, omp={"kind": "recoded", "of": "it"})
    shutil.rmtree(trained["it"].folder)
    with pytest.raises(ManifestError):
        run.trained()
    assert run.train_one("omp", trained["omp"].method).content == trained["omp"].content
    assert not trained["it"].folder.exists()


def test_evaluate_and_compare(place: Path) -> None:
    run, trained = train(
        place,
        ksvd=KSVD,
        omp={"kind": "recoded", "of": "ksvd", "view": "both"},
        linear={**LINEAR, "of": "ksvd"},
        pca=RAW["dictionaries"]["pca"],
        **{"pca.mp": {"kind": "recoded", "of": "pca", "coder": "mp", "k": 2}},
    )
    rows = run.evaluate()["rows"]
    facts = {(row["dictionary"], row["view"]): (row["d_sae"], row["k"]) for row in rows}
    assert facts == {
        ("ksvd", "signed"): (24, 3),
        ("omp", "signed"): (24, 3),
        ("omp", "split"): (48, 3),
        ("linear", "non-negative"): (48, 3),
        ("pca", "signed"): (3, 3),
        ("pca.mp", "signed"): (3, 2),
    }
    fvu = {row["dictionary"]: row["value"] for row in rows if row["metric"] == "fvu"}
    assert fvu["omp"] == pytest.approx(heldout_fvu(run, trained["omp"]), rel=1e-5)
    assert "linear" in compare(run).read_text()
    lines = (run.results / "comparison.md").read_text().splitlines()
    lines = lines[lines.index("## Dictionaries by coders") :]
    head, _, *table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert head == ["score", "dictionary", "linear TopK", "MP", "MP, k = 2", "OMP", "projection"]
    assert [row[:2] for row in table[:2]] == [["FVU ↓", "ksvd"], ["FVU ↓", "pca"]]
    assert table[0][4] == table[0][6] == "–", "neither MP with another k nor a projection"
    assert float(table[0][5]) == pytest.approx(fvu["omp"], rel=1e-2)
    assert "Dictionaries by coders" in (run.results / "report.html").read_text()
    again = parse_config(json.loads(json.dumps(run.evaluated()["config"])))
    assert again == run.config


def test_each_seed_takes_the_atoms_of_its_own(place: Path) -> None:
    """What is drawn is trained once for each seed of the run; atoms that do not depend on a seed are coded once."""
    raw = {
        "ksvd": KSVD,
        "omp": {"kind": "recoded", "of": "ksvd"},
        "linear": {**LINEAR, "of": "ksvd"},
        "pca": RAW["dictionaries"]["pca"],
        "pca.mp": {"kind": "recoded", "of": "pca", "coder": "mp", "k": 2},
    }
    run = run_in(place, config_with(dictionaries=raw, training_seeds=[0, 5]))
    trained = {(one.name, one.seed): one for one in run.train()}
    assert list(trained) == [
        *((name, seed) for name in ("ksvd", "omp", "linear") for seed in (0, 5)),
        ("pca", None),
        ("pca.mp", None),
    ]
    for seed in (0, 5):
        atoms_MD = run.load_sae(trained["ksvd", seed]).W_dec.detach()
        assert torch.equal(run.load_sae(trained["omp", seed]).W_dec.detach(), atoms_MD)
        assert torch.equal(run.load_sae(trained["linear", seed]).W_dec.detach()[:24], atoms_MD)
    assert trained["omp", 0].folder != trained["omp", 5].folder
    # One seed of the run is the same training as by itself.
    (_, alone) = run_in(place, config_with(dictionaries={"ksvd": KSVD, "omp": raw["omp"]})).train()
    assert alone.folder == trained["omp", 0].folder
    # And so is the other's own.
    own = run_in(place, config_with(dictionaries={"ksvd": {**KSVD, "seed": 5}, "omp": raw["omp"]}))
    assert own.train()[1].folder == trained["omp", 5].folder


def test_taken_as_a_dictionary(place: Path) -> None:
    """What an SAE gives to others; an encoder that was fitted to another's atoms has none to give."""
    run, trained = train(place, topk=TOPK, linear={**LINEAR, "of": "topk"})
    linear, topk = trained["linear"], trained["topk"]
    with pytest.raises(ConfigError, match=r"(?s)those of another dictionary, 'topk'.*from that one"):
        linear.method.dictionary(run.setting(), linear.folder)
    taken = topk.method.dictionary(run.setting(), topk.folder)
    assert torch.equal(taken.centre_D, run.load_sae(topk).b_dec.detach())
    assert taken.coding == Coding(3, nonnegative=True)
