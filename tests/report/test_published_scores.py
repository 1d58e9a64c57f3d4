"""Published scores: all there, typed, and held beside a run's own only where protocol and version match."""

import math
import re
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from ksvd_sae.evals import EVALS
from ksvd_sae.evals.absorption import AbsorptionEval
from ksvd_sae.evals.autointerp import AutoInterpEval, EndpointConfig
from ksvd_sae.evals.base import Eval
from ksvd_sae.evals.core import CoreEval
from ksvd_sae.evals.ravel import RavelEval
from ksvd_sae.evals.scr import ScrEval
from ksvd_sae.evals.sparse_probing import SparseProbingEval
from ksvd_sae.evals.tpp import TppEval
from ksvd_sae.methods.published import PublishedSAEMethod
from ksvd_sae.report.published import scores
from ksvd_sae.report.published.scores import (
    COMPARABLE,
    MEANS,
    REPRODUCED,
    OwnScore,
    PublishedScore,
    RunProtocol,
    beside,
    matches,
    published_scores,
)
from ksvd_sae.run.config import load_config
from tests.command_line import EVAL_CONFIGS

GEMMA, GEMMA_HOOK = "google/gemma-2-2b", "blocks.12.hook_resid_post"
PYTHIA, PYTHIA_HOOK = "EleutherAI/pythia-160m-deduped", "blocks.8.hook_resid_post"
JUDGED = AutoInterpEval(judge="endpoint", endpoint=EndpointConfig(model="gpt-4o-mini"))
DEFAULTS: dict[str, Eval] = {
    section.name: section
    for section in (CoreEval(), SparseProbingEval(), ScrEval(), TppEval(), AbsorptionEval(), RavelEval(), JUDGED)
}


def protocol(**changes: Any) -> RunProtocol:
    return replace(RunProtocol(GEMMA, GEMMA_HOOK, DEFAULTS, "0.6.0"), **changes)


def changed(name: str, **changes: Any) -> RunProtocol:
    return protocol(evals={**DEFAULTS, name: DEFAULTS[name].model_copy(update=changes)})


def own(l0: float = 20.0, **changes: Any) -> OwnScore:
    score = OwnScore("db-ksvd", "signed", 4096, l0, "core", "ce_loss_score", 0.93)
    return replace(score, **changes)


def found(score: OwnScore, of: RunProtocol | None = None) -> dict[str, scores.Match]:
    return {m.published.architecture: m for m in matches([score], of or protocol())}


# ---------------------------------------------------------------- the data


def test_everything_is_there() -> None:
    counts = Counter((s.file, s.eval, s.metric) for s in published_scores())
    assert counts[REPRODUCED, "core", "ce_loss_score"] == 252
    for metric in ("disentanglement_score", "cause_score", "isolation_score"):
        assert counts[REPRODUCED, "ravel", metric] == 42
    for metric in ("mean_absorption_fraction_score", "mean_full_absorption_score"):
        assert counts[REPRODUCED, "absorption", metric] == 84
    assert counts[MEANS, "autointerp", "autointerp_score"] == 22
    assert counts[MEANS, "absorption", "mean_absorption_fraction_score"] == 18
    # A header each, and a line each.
    lines = sum(len(files(scores.__package__).joinpath(n).read_text().splitlines()) - 1 for n in (REPRODUCED, MEANS))
    assert sum(counts.values()) == len(published_scores()) == lines


def test_every_score_is_whole() -> None:
    for score in published_scores():
        assert score.model in ("gemma-2-2b", "pythia-160m-deduped")
        assert score.layer == {"gemma-2-2b": 12, "pythia-160m-deduped": 8}[score.model]
        assert math.isfinite(score.value)
        assert -1 < score.value < 1
        assert score.version in scores.VERSIONS
        if score.file == REPRODUCED:
            assert score.l0 is not None
            assert 1 < score.l0 < 2000
            assert score.l0_range is None
            assert isinstance(score.trainer, int)
        else:
            assert (score.l0_range is None) == (score.architecture == "pca")


def test_known_numbers() -> None:
    """TopK on Gemma, 4k, k = 20, in the README of the data: 0.943; its RAVEL score gets its L0 from core."""
    by_name = {
        (s.eval, s.metric, s.model, s.d_sae, s.architecture, s.trainer, s.version): s for s in published_scores()
    }
    core = by_name["core", "ce_loss_score", "gemma-2-2b", 4096, "topk", 0, "0.6.0"]
    assert (core.value, core.l0, core.hook) == (0.943119, 20.0, GEMMA_HOOK)
    ravel = by_name["ravel", "disentanglement_score", "gemma-2-2b", 4096, "topk", 2, "0.6.0"]
    assert ravel.l0 == 80.0
    # The plots show 1 − absorption.
    mean = by_name["absorption", "mean_absorption_fraction_score", "gemma-2-2b", 65536, "gated", None, "0.3.2"]
    assert (mean.value, mean.l0, mean.l0_range) == (0.51, None, (40.0, 200.0))
    drift = [
        by_name["absorption", "mean_absorption_fraction_score", "pythia-160m-deduped", 4096, "relu", 0, v].value
        for v in ("0.3.2", "0.6.0")
    ]
    assert drift[0] > 5 * drift[1]


def test_our_defaults_are_the_published_settings() -> None:
    """So a config that says nothing about an eval is scored as SAEBench's SAEs were."""
    for section in DEFAULTS.values():
        assert section.published
        # Who judges has no default that is SAEBench's: here it is theirs.
        ours = section.as_published()
        assert {key: ours[key] for key in section.published} == section.published
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    probing, scr = SparseProbingEvalConfig(), ScrAndTppEvalConfig()
    published = {name: section.published or {} for name, section in DEFAULTS.items()}
    assert published["sparse_probing"]["train_set_size"] == probing.probe_train_set_size
    assert published["sparse_probing"]["test_set_size"] == probing.probe_test_set_size
    assert published["sparse_probing"]["context_tokens"] == probing.context_length
    assert published["sparse_probing"]["seed"] == probing.random_seed
    for ours, theirs in (
        ("train_set_size", "train_set_size"),
        ("test_set_size", "test_set_size"),
        ("context_tokens", "context_length"),
        ("probe_epochs", "probe_epochs"),
        ("seed", "random_seed"),
    ):
        assert published["scr"][ours] == published["tpp"][ours] == getattr(scr, theirs)
    assert {kind.name for kind in EVALS if kind.published is not None} == set(DEFAULTS)


# ---------------------------------------------------------------- what is chosen


def test_the_nearest_l0_of_each_kind() -> None:
    kinds = found(own(38.0))
    assert set(kinds) == {"relu", "topk", "batchtopk", "jumprelu", "gated", "panneal", "matryoshka_batchtopk"}
    assert (kinds["topk"].published.l0, kinds["topk"].published.value) == (40.0, 0.964574)
    assert kinds["batchtopk"].published.l0 == 40.36
    assert all(m.published.d_sae == 4096 and m.published.model == "gemma-2-2b" for m in kinds.values())
    assert kinds["topk"].verdict == COMPARABLE
    for match in kinds.values():
        same = [
            s
            for s in published_scores()
            if (s.eval, s.model, s.d_sae, s.architecture) == ("core", "gemma-2-2b", 4096, match.published.architecture)
        ]
        assert match.published.l0_ratio(38.0) == min(s.l0_ratio(38.0) for s in same)


def test_nearness_is_by_factor() -> None:
    """28 is nearer to 20 in steps, and to 40 as a factor: 1.40 against 1.43."""
    assert found(own(28.0))["topk"].published.l0 == 20.0
    assert found(own(28.5))["topk"].published.l0 == 40.0


def test_every_dictionary_meets_its_own_width_and_the_nearest_l0() -> None:
    ours = [own(l0, dictionary=f"{m}-{l0}", d_sae=m) for m in (4096, 16384) for l0 in (20.0, 39.0, 81.0)]
    topk = [m for m in matches(ours, protocol()) if m.published.architecture == "topk"]
    assert [(m.own.dictionary, m.published.d_sae, round(m.published.l0 or 0)) for m in topk] == [
        ("4096-20.0", 4096, 20),
        ("4096-39.0", 4096, 40),
        ("4096-81.0", 4096, 80),
        ("16384-20.0", 16384, 20),
        ("16384-39.0", 16384, 40),
        ("16384-81.0", 16384, 80),
    ]
    assert all(m.verdict == COMPARABLE for m in topk)


@pytest.mark.parametrize(
    "of",
    [
        protocol(model="google/gemma-3-270m"),
        protocol(model="google/gemma-2-2b-it"),
        protocol(hook="blocks.5.hook_resid_post"),
        protocol(hook="blocks.12.hook_mlp_out"),
        protocol(model=PYTHIA),
    ],
    ids=["another model", "its chat version", "another layer", "another hook", "the other model's hook"],
)
def test_another_place_has_no_published_scores(of: RunProtocol) -> None:
    assert matches([own()], of) == []


@pytest.mark.parametrize("model", ["gemma-2-2b", GEMMA, "Gemma-2-2B"])
def test_a_models_owner_may_be_left_out(model: str) -> None:
    assert matches([own()], protocol(model=model))


@pytest.mark.parametrize(
    "score", [own(d_sae=2048), own(l0=float("nan")), own(l0=0.0), own(metric="kl_div_score"), own(eval="heldout")]
)
def test_no_row_for_what_nobody_published(score: OwnScore) -> None:
    assert matches([score], protocol()) == []


def test_principal_components_have_no_l0() -> None:
    score = own(d_sae=2304, eval="scr", metric="scr_metric_threshold_20")
    assert matches([score], protocol()) == []


# ---------------------------------------------------------------- what stands in the way


def test_published_settings_are_comparable() -> None:
    kinds = found(own(20.0))
    assert {name for name, m in kinds.items() if m.verdict == COMPARABLE} >= {"topk", "batchtopk"}
    assert kinds["relu"].verdict == "L0 20.0, theirs 45.8"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "heldout"}, "dataset heldout, theirs Skylion007/openwebtext"),
        ({"context_tokens": 32}, "context_tokens 32, theirs 128"),
        ({"batch_contexts": 4}, "batch_contexts 4, theirs 16"),
        ({"reconstruction_batches": 2}, "reconstruction_batches 2, theirs 200"),
        ({"sparsity_batches": 2}, "sparsity_batches 2, theirs 2000"),
        (
            {"dataset": "x", "context_tokens": 32},
            "dataset x, theirs Skylion007/openwebtext; context_tokens 32, theirs 128",
        ),
    ],
)
def test_other_settings_of_core(changes: dict[str, Any], reason: str) -> None:
    assert found(own(20.0), changed("core", **changes))["topk"].verdict == reason


def test_other_data_of_sparse_probing() -> None:
    score = own(60.0, eval="sparse_probing", metric="sae_top_1_test_accuracy", view="non-negative")
    assert found(score)["topk"].verdict == COMPARABLE
    assert (
        found(score, changed("sparse_probing", datasets=["bbc-news"]))["topk"].verdict
        == "datasets bbc-news, theirs SAEBench's own"
    )


@pytest.mark.parametrize(
    ("l0", "comparable"), [(20.0, False), (39.9, False), (40.0, True), (200.0, True), (201.0, False)]
)
def test_a_mean_is_for_the_l0_that_it_is_over(l0: float, comparable: bool) -> None:
    score = own(l0, eval="scr", metric="scr_metric_threshold_20", d_sae=16384)
    match = found(score)["topk"]
    assert match.published.l0_range == (40.0, 200.0)
    assert match.verdict == (COMPARABLE if comparable else f"L0 {l0:.1f}, theirs 40 to 200")


def pythia(**changes: Any) -> RunProtocol:
    return protocol(model=PYTHIA, hook=PYTHIA_HOOK, **changes)


@pytest.fixture
def checked() -> RunProtocol:
    return pythia()


@pytest.mark.parametrize("version", ["0.3.2", "0.6.0"])
def test_absorption_of_the_same_definition_is_chosen(checked: RunProtocol, version: str) -> None:
    score = own(20.0, eval="absorption", metric="mean_absorption_fraction_score", view="non-negative")
    match = found(score, replace(checked, version=version))["topk"]
    assert (match.published.version, match.verdict) == (version, COMPARABLE)


def test_absorption_of_another_definition_is_marked(checked: RunProtocol) -> None:
    """Gemma's are of 0.3.2 alone."""
    score = own(50.0, eval="absorption", metric="mean_absorption_fraction_score", view="non-negative", d_sae=16384)
    on_gemma = replace(checked, model=GEMMA, hook=GEMMA_HOOK)
    match = found(score, on_gemma)["topk"]
    assert match.published.version == "0.3.2"
    assert match.verdict.startswith("of SAEBench 0.3.2, here 0.6.0: the fraction was redefined")
    assert found(score, replace(on_gemma, version="0.3.2"))["topk"].verdict == COMPARABLE


def test_the_full_absorption_score_means_the_same_in_both(checked: RunProtocol) -> None:
    score = own(20.0, eval="absorption", metric="mean_full_absorption_score", view="non-negative")
    theirs = next(s for s in published_scores() if s.metric == score.metric and s.version == "0.3.2" and s.l0 == 20.0)
    assert beside(theirs, score, checked).verdict == COMPARABLE


@pytest.mark.parametrize("version", [None, "0.5.0", "0.7.0"])
def test_a_version_that_was_not_compared(version: str | None) -> None:
    told = found(own(20.0), protocol(version=version))["topk"].verdict
    assert told == f"SAEBench {version or 'of an unknown version'}: only 0.3.2 and 0.6.0 were compared"


def test_signed_codes_are_misread_by_absorption(checked: RunProtocol) -> None:
    score = own(20.0, eval="absorption", metric="mean_full_absorption_score", view="signed")
    assert found(score, checked)["topk"].verdict == "signed codes, of which absorption reads the positive part only"
    assert found(own(20.0, view="signed"))["topk"].verdict == COMPARABLE


def test_settings_that_were_not_checked_are_not_called_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    score = own(20.0, eval="ravel", metric="cause_score")
    assert found(score)["topk"].verdict == COMPARABLE
    monkeypatch.setattr(RavelEval, "published", None)
    assert found(score)["topk"].verdict == "whether ravel ran with the published settings was not checked"


@pytest.mark.parametrize(
    ("eval_name", "changes", "reason"),
    [
        ("absorption", {"vocabulary_sample": 1000}, "vocabulary_sample 1000, theirs SAEBench's own"),
        ("absorption", {"min_feats_for_eval": 6}, "min_feats_for_eval 6, theirs 20"),
        (
            "ravel",
            {"dataset": "own-ravel", "epochs": 1},
            "dataset own-ravel, theirs SAEBench's own; epochs 1, theirs 2",
        ),
        ("autointerp", {"judge": "lexical"}, "judge lexical, theirs gpt-4o-mini"),
        (
            "autointerp",
            {"endpoint": EndpointConfig(model="another")},
            "judge another, theirs gpt-4o-mini",
        ),
    ],
)
def test_other_settings_of_an_eval(eval_name: str, changes: dict[str, Any], reason: str) -> None:
    theirs = next(s for s in published_scores() if s.eval == eval_name)
    metric, l0 = theirs.metric, theirs.l0 or 50.0
    score = own(l0, eval=eval_name, metric=metric, view="non-negative", d_sae=theirs.d_sae)
    of = replace(changed(eval_name, **changes), version=theirs.version)
    assert beside(theirs, score, of).verdict == reason


def test_single_saes_go_before_means() -> None:
    """RAVEL at 4k has both."""
    score = own(60.0, eval="ravel", metric="disentanglement_score")
    assert found(score)["topk"].published.file == REPRODUCED
    assert found(replace(score, d_sae=16384))["topk"].published.file == MEANS


def test_ratio_of_a_score_without_an_l0() -> None:
    pca = next(s for s in published_scores() if s.architecture == "pca")
    assert isinstance(pca, PublishedScore)
    assert pca.l0_ratio(20.0) == math.inf


# ---------------------------------------------------------------- the configs that name published SAEs

_ARCHITECTURES = {
    "TopK": "topk",
    "BatchTopK": "batchtopk",
    "MatryoshkaBatchTopK": "matryoshka_batchtopk",
    "top_k": "topk",
    "batch_top_k": "batchtopk",
    "matryoshka_batch_top_k": "matryoshka_batchtopk",
}


@pytest.mark.parametrize("name", ["gemma-2-2b-baselines", "pythia-160m-baselines"])
def test_the_configs_name_published_saes_of_their_k(name: str) -> None:
    """Their folders' numbers are those of SAEs that use about k latents, by the published scores."""
    config = load_config(EVAL_CONFIGS / f"{name}.yaml")
    saes = {n: c for n, c in config.dictionaries.items() if isinstance(c, PublishedSAEMethod)}
    assert len(saes) >= 4
    directory = get_pretrained_saes_directory()
    for entry, sae in saes.items():
        listed = None if sae.release is None else directory[sae.release]
        repo_id = sae.repo_id if listed is None else listed.repo_id
        path = sae.folder if listed is None else listed.saes_map[str(sae.sae_id)]
        width = 2 ** int(re.search(r"width-2pow(\d+)", str(repo_id))[1])  # type: ignore[index]
        place = rf"(?:gemma-2-2b_)?(\w+?)_(?:width|{config.model.name.split('/')[1]})"
        folder, layer, trainer = path.split("/")
        kind = _ARCHITECTURES[re.match(place, folder)[1]]  # type: ignore[index]
        assert f"blocks.{layer.removeprefix('resid_post_layer_')}.hook_resid_post" == config.model.hook
        theirs = next(
            s
            for s in scores.of_place(protocol(model=config.model.name, hook=config.model.hook))
            if (s.eval, s.d_sae, s.architecture, f"trainer_{s.trainer}") == ("core", width, kind, trainer)
        )
        assert theirs.l0 == pytest.approx(sae.k, rel=0.1), entry
    # Ours of the same sizes, and the published settings: what the comparison is for.
    evals = {section.name: section for section in config.evaluation.evals()}
    run = RunProtocol(config.model.name, config.model.hook, evals, "0.6.0")
    assert found(own(20.0), run)["topk"].verdict == COMPARABLE
