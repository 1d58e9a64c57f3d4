"""Dashboards for Neuronpedia hold what the published latents do on the text."""

import json
from typing import Any

import pytest

from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.evals.atoms.examples import ExampleSetting, ReadText, atoms_in_context, read_text
from ksvd_sae.evals.atoms.token_texts import TokenTexts
from ksvd_sae.hub.neuronpedia import dashboards
from tests.hub.conftest import HOOK, Published
from tests.tiny_saes import (
    CONTEXT_TOKENS,
    WORDS,
    tiny_db_ksvd_sae,
    tiny_dictionary,
    tiny_model,
    tiny_sae_of,
    tiny_topk_sae,
)

SETTING = ExampleSetting(
    atoms=8, examples=3, tokens=400, context_tokens=CONTEXT_TOKENS, batch_contexts=4, norm_limit=None, seed=0
)
# What SAEDashboard's export to Neuronpedia takes from a latent and from an activation, without a default.
LATENT = (
    "feature_index",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "activations",
)
ACTIVATION = ("tokens", "values", "bin_contains", "bin_max", "bin_min", "qualifying_token_index")


@pytest.fixture(scope="module")
def reader() -> ActivationReader:
    return ActivationReader(tiny_model(), HOOK)


@pytest.fixture(scope="module")
def text(reader: ActivationReader) -> ReadText:
    texts = [" ".join(WORDS[(7 * i + j * (1 + i % 5)) % len(WORDS)] for j in range(20)) for i in range(40)]
    return read_text(reader, iter(texts), SETTING)


def found_in(sae: Any, text: ReadText, reader: ActivationReader) -> dict[str, Any]:
    found = atoms_in_context(sae, text, reader, TokenTexts(reader.model.tokenizer), SETTING)
    back: dict[str, Any] = json.loads(json.dumps(found))
    return back


def batch_of(found: dict[str, Any], view: str) -> dict[str, Any]:
    batch = dashboards(found, "owner/gemma-9", HOOK, "learned", view, "owner/some-texts")
    assert batch is not None
    return batch


@pytest.mark.parametrize("kind", ["split", "nonnegative"])
def test_a_latent_is_what_the_published_sae_codes(kind: str, reader: ActivationReader, text: ReadText) -> None:
    sae, signed = (
        (tiny_sae_of(tiny_dictionary("mp"), "split"), tiny_sae_of(tiny_dictionary("mp")))
        if kind == "split"
        else (tiny_topk_sae(),) * 2
    )
    batch = batch_of(found_in(signed, text, reader), kind)
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("gemma-9", 0, f"learned-{kind}")
    codes_NF = sae.encode(text.x_ND).detach()
    indices = [feature["feature_index"] for feature in batch["features"]]
    assert len(set(indices)) == len(indices) >= 8
    assert kind == "nonnegative" or max(indices) >= sae.W_dec.shape[0] // 2 > min(indices)
    norm, unembedding = reader.model.ln_final.w, reader.model.W_U
    for feature in batch["features"]:
        assert set(LATENT) <= set(feature)
        index = feature["feature_index"]
        code_N = codes_NF[:, index]
        assert feature["frac_nonzero"] == pytest.approx(float((code_N > 0).double().mean()))
        assert sum(feature["freq_hist_data_bar_heights"]) == int((code_N > 0).sum())
        assert max(feature["freq_hist_data_bar_values"], default=0) <= float(code_N.max())
        for shown in feature["activations"]:
            assert set(ACTIVATION) <= set(shown)
            assert len(shown["tokens"]) == len(shown["values"])
            assert min(shown["values"]) >= 0
            assert shown["values"][shown["qualifying_token_index"]] == shown["bin_max"]
        assert feature["activations"][0]["bin_max"] == pytest.approx(float(code_N.max()), rel=1e-3)
        row_D = sae.W_dec.detach()[index]
        logits_V = ((row_D - row_D.mean()) * norm) @ unembedding
        assert feature["pos_values"] == pytest.approx(
            sorted(logits_V[4:].tolist(), reverse=True)[:6], rel=2e-3
        )  # the first four tokens are special
        assert feature["neg_values"] == pytest.approx(sorted(logits_V[4:].tolist())[:6], rel=2e-3)


@pytest.mark.parametrize(
    ("view", "hook"), [("signed", HOOK), ("split", "hook_embed"), ("split", "ln_final.hook_scale")]
)
def test_where_neuronpedia_has_no_place(view: str, hook: str, reader: ActivationReader, text: ReadText) -> None:
    assert dashboards(found_in(tiny_db_ksvd_sae(), text, reader), "gemma", hook, "learned", view, "texts") is None


def test_dashboards_are_published(published: Published) -> None:
    folders = sorted(
        str(p.parent.parent.relative_to(published.folder / HOOK)) for p in published.folder.rglob("batch-0.json")
    )
    assert folders == ["learned/split"]
    batch = json.loads((published.folder / HOOK / "learned" / "split" / "neuronpedia" / "batch-0.json").read_text())
    assert [feature["feature_index"] for feature in batch["features"]] == [3, 24 + 3]
    assert [feature["dataset"] for feature in batch["features"]] == ["owner/some-texts"] * 2
