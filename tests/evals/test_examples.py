"""Atoms in context: the strongest tokens there are, cut out of the right document; each result computed once."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.errors import EvaluationError, ShapeError
from ksvd_sae.evals.atoms import examples
from ksvd_sae.evals.atoms.examples import (
    AROUND,
    ExampleSetting,
    ReadText,
    atoms_in_context,
    evaluate_examples,
    read_text,
    sample_atoms,
)
from ksvd_sae.evals.atoms.logit_lens import SHOWN, logit_lens
from ksvd_sae.evals.atoms.token_texts import TokenTexts
from tests import tiny_models
from tests.evals.conftest import CountedPanel
from tests.strategies import generator
from tests.tiny_saes import (
    CONTEXT_TOKENS,
    D_MODEL,
    HOOK,
    WORDS,
    identity_sae,
    tiny_db_ksvd_sae,
    tiny_model,
    tiny_topk_sae,
)

SETTING = ExampleSetting(
    atoms=12, examples=3, tokens=400, context_tokens=CONTEXT_TOKENS, batch_contexts=4, norm_limit=None, seed=0
)
EOS, BOS = 1, 2


def setting(**changes: Any) -> ExampleSetting:
    return ExampleSetting(**{**SETTING.__dict__, **changes})


@pytest.fixture(scope="module")
def reader() -> ActivationReader:
    return ActivationReader(tiny_model(), HOOK)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 3 to 30 words."""
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 30)))} for _ in range(60)]
    path = tmp_path_factory.mktemp("documents") / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(documents: Path) -> list[str]:
    return [json.loads(line)["text"] for line in documents.read_text().splitlines()]


@pytest.fixture(scope="module")
def text(reader: ActivationReader, documents: Path) -> ReadText:
    return read_text(reader, iter(texts_of(documents)), SETTING)


def found_in(sae: Any, text: ReadText, reader: ActivationReader, **changes: Any) -> dict[str, Any]:
    return atoms_in_context(sae, text, reader, TokenTexts(reader.model.tokenizer), setting(**changes))


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_what_the_harvest_reads(bos: bool, reader: ActivationReader, documents: Path) -> None:
    text = read_text(reader, iter(texts_of(documents)), SETTING, bos)
    assert text.tokens_CL.shape == (400 // (CONTEXT_TOKENS - bos), CONTEXT_TOKENS)
    assert bool((text.tokens_CL[:, 0] == BOS).all()) is bos
    assert bool((text.tokens_CL == BOS).any()) is bos
    assert torch.equal(text.x_ND, reader.read(text.tokens_CL))
    # Documents, put together again from the contexts, are those that were given.
    words: dict[int, list[str]] = {}
    for token, document in zip(text.tokens_CL.flatten().tolist(), text.document_CL.flatten().tolist(), strict=True):
        if token not in (BOS, EOS):
            words.setdefault(document, []).append(reader.model.tokenizer.decode([token]))
    whole = [" ".join(document) for document in words.values()]
    given = texts_of(documents)[: len(whole)]
    assert whole[:-1] == given[:-1]
    assert given[-1].startswith(whole[-1])
    assert text.n_documents == len(whole) > 10


def test_special_tokens_that_are_kept_are_not_shown(documents: Path, text: ReadText) -> None:
    """What the harvest keeps of them says nothing of an atom."""
    found = read_text(ActivationReader(tiny_model(), HOOK, keep_special=True), iter(texts_of(documents)), SETTING)
    assert torch.equal(found.coded_CL, text.coded_CL)
    assert torch.equal(found.x_ND, text.x_ND)


def test_outliers_are_not_coded(reader: ActivationReader, documents: Path, text: ReadText) -> None:
    norms_N = torch.linalg.vector_norm(text.x_ND, dim=1)
    limit = float(norms_N.quantile(0.7))
    fewer = read_text(reader, iter(texts_of(documents)), setting(norm_limit=limit))
    assert torch.equal(fewer.x_ND, text.x_ND[norms_N <= limit])
    assert 0 < len(fewer.x_ND) == int(fewer.coded_CL.sum()) < len(text.x_ND)
    assert torch.equal(fewer.ordinary_CL, text.ordinary_CL)
    shown = found_in(identity_sae(), fewer, reader)["atoms"][0]["positive"][0]
    assert shown["activations"][shown["peak"]] > 0


@pytest.mark.parametrize(
    ("texts", "changes", "said"), [([], {}, "fills no context"), (["red " * 30], {"norm_limit": 1e-9}, "an outlier")]
)
def test_no_text(reader: ActivationReader, texts: list[str], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        read_text(reader, iter(texts), setting(**changes))


# ---------------------------------------------------------------- examples


SAES: dict[str, Callable[[], Any]] = {
    "signed": tiny_db_ksvd_sae,
    "non-negative": tiny_topk_sae,
    "dense": identity_sae,
}


def best_by_document(code_CL: Tensor, text: ReadText, sign: int) -> list[tuple[float, int]]:
    """(activation, document), strongest first: over all tokens, one by one."""
    best: dict[int, float] = {}
    for value, document in zip(code_CL.flatten().tolist(), text.document_CL.flatten().tolist(), strict=True):
        if value * sign > 0 and value * sign > best.get(document, 0.0) * sign:
            best[document] = value
    return sorted(((value, document) for document, value in best.items()), key=lambda pair: -pair[0] * sign)


@pytest.mark.parametrize("kind", SAES)
def test_strongest_tokens_of_distinct_documents(kind: str, text: ReadText, reader: ActivationReader) -> None:
    sae = SAES[kind]()
    found = found_in(sae, text, reader)
    codes_NF = sae.encode(text.x_ND).detach()
    assert found["signed"] == (kind != "non-negative") == bool((codes_NF < 0).any())
    assert (found["n_tokens"], found["n_atoms"]) == codes_NF.shape
    assert found["n_dead"] == int((codes_NF == 0).all(dim=0).sum())
    assert len(found["atoms"]) == min(12, int((codes_NF != 0).any(dim=0).sum()))
    for atom in found["atoms"]:
        column_N = codes_NF[:, atom["atom"]]
        assert atom["density"] == pytest.approx(float((column_N != 0).double().mean()), rel=1e-3)
        assert atom["strongest"] == pytest.approx(float(column_N.abs().max()), rel=1e-3)
        code_CL = torch.zeros(text.tokens_CL.shape).masked_scatter(text.coded_CL, column_N)
        assert ("negative" in atom) == found["signed"]
        for name, sign in (("positive", 1), ("negative", -1)):
            shown = [(e["activations"][e["peak"]], e["document"]) for e in atom.get(name, [])]
            wanted = best_by_document(code_CL, text, sign)[:3] if name in atom else []
            assert [value for value, _ in shown] == pytest.approx([value for value, _ in wanted], rel=1e-3)
            # Words repeat, and with them activations: the document is only told apart where no other ties.
            values = [round(value, 3) for value, _ in wanted]
            if len(set(values)) == len(values):
                assert [document for _, document in shown] == [document for _, document in wanted]


def test_surroundings(text: ReadText, reader: ActivationReader, documents: Path) -> None:
    """Contiguous text of one document and one context, without special tokens, with every token's own activation."""
    sae, given = tiny_db_ksvd_sae(), texts_of(documents)
    codes_NF = sae.encode(text.x_ND).detach()
    rows_CL = torch.full(text.tokens_CL.shape, -1)
    rows_CL[text.coded_CL] = torch.arange(len(text.x_ND))
    checked = 0
    for atom in found_in(sae, text, reader)["atoms"]:
        for example in atom["positive"] + atom["negative"]:
            words = [token.strip() for token in example["tokens"]]
            assert f" {' '.join(words)} " in f" {given[example['document']]} "
            assert len(words) == len(example["activations"]) <= 2 * AROUND + 1
            in_document = (text.document_CL == example["document"]) & text.ordinary_CL
            places = [
                [c, position]
                for c in range(len(text.tokens_CL))
                if in_document[c].any()
                for position in [in_document[c].nonzero().flatten()]
                if len(position) == len(words)
                and [reader.model.tokenizer.decode([t]) for t in text.tokens_CL[c, position].tolist()] == words
            ]
            # A context of 12 tokens lies within the 12 around any of its own.
            assert places
            wanted = [codes_NF[rows_CL[c, position], atom["atom"]].tolist() for c, position in places]
            assert any(example["activations"] == pytest.approx(values, rel=1e-3) for values in wanted)
            checked += 1
    assert checked > 20


def test_nearest_atom(text: ReadText, reader: ActivationReader) -> None:
    sae = tiny_db_ksvd_sae()
    with torch.no_grad():
        sae.W_dec[5] = -sae.W_dec[3]
    unit_FD = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    cosines_FF = (unit_FD @ unit_FD.T).fill_diagonal_(0)
    found = {atom["atom"]: atom["nearest"] for atom in found_in(sae, text, reader, atoms=24)["atoms"]}
    assert found[3 if 3 in found else 5]["cosine"] == pytest.approx(-1)
    for atom, nearest in found.items():
        assert nearest["atom"] == int(cosines_FF[atom].abs().argmax())
        assert nearest["cosine"] == pytest.approx(float(cosines_FF[atom, nearest["atom"]]), abs=1e-4)


def test_a_code_that_is_not_sparse_is_cut_and_says_so(
    text: ReadText, reader: ActivationReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(examples, "_MOST_NONZEROS", 100 * D_MODEL)
    monkeypatch.setattr(examples, "_CODE_BYTES", 4 * D_MODEL * 30)
    with caplog.at_level(logging.WARNING):
        assert found_in(identity_sae(), text, reader)["n_tokens"] == 120
    assert "only 120 tokens" in caplog.text
    assert found_in(tiny_topk_sae(), text, reader)["n_tokens"] == len(text.x_ND)


def test_a_dictionary_of_another_width(text: ReadText, reader: ActivationReader) -> None:
    narrow = ReadText(**{**text.__dict__, "x_ND": text.x_ND[:, :8]})
    with pytest.raises(ShapeError, match="another model or hook"):
        found_in(tiny_topk_sae(), narrow, reader)


# ---------------------------------------------------------------- sample


def test_sample_is_of_all_kinds() -> None:
    density_F = torch.rand(200, generator=generator(0)).double() ** 3
    density_F[::7] = 0
    energy_F = density_F * torch.rand(200, generator=generator(1)).double()
    chosen = sample_atoms(density_F, energy_F, 24, seed=0)
    assert {stratum: len(atoms) for stratum, atoms in chosen.items()} == dict.fromkeys(examples.STRATA, 6)
    every = [atom for atoms in chosen.values() for atom in atoms]
    assert len(set(every)) == 24
    assert bool((density_F[every] > 0).all())
    assert set(chosen["strongest"]) == set(energy_F.argsort(descending=True)[:6].tolist())
    ranges = [(float(density_F[chosen[s]].min()), float(density_F[chosen[s]].max())) for s in examples.STRATA[1:]]
    assert ranges[0][0] >= ranges[1][1] >= ranges[1][0] >= ranges[2][1]
    for atoms in chosen.values():
        assert density_F[atoms].tolist() == sorted(density_F[atoms].tolist(), reverse=True)
    assert sample_atoms(density_F, energy_F, 24, seed=0) == chosen
    assert sample_atoms(density_F, energy_F, 24, seed=1) != chosen


@pytest.mark.parametrize("n_live", [0, 1, 2, 5, 11, 12, 13])
@pytest.mark.parametrize("n", [1, 3, 12])
def test_sample_of_few(n_live: int, n: int) -> None:
    density_F = torch.zeros(20).double()
    density_F[torch.randperm(20, generator=generator(0))[:n_live]] = 0.5
    chosen = [atom for atoms in sample_atoms(density_F, density_F, n, 0).values() for atom in atoms]
    assert len(chosen) == len(set(chosen)) == min(n, n_live)
    assert bool((density_F[chosen] > 0).all())


# ---------------------------------------------------------------- token texts and logit lens


def test_texts_of_tokens_put_together_are_the_text() -> None:
    tokenizer = tiny_models.byte_pair_tokenizer()
    texts = TokenTexts(tokenizer)
    text = " Halumne ba  co\n\tdi, <b> fu."
    assert "".join(texts.all(tokenizer(text, add_special_tokens=False)["input_ids"])) == text


def test_part_of_a_character_is_shown_by_name() -> None:
    tokenizer = tiny_models.byte_pair_tokenizer()
    ids = tokenizer("€", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert TokenTexts(tokenizer).all(ids) == tokenizer.convert_ids_to_tokens(ids)


def test_a_blank_that_decoding_drops_is_kept() -> None:
    """As Llama's tokenizer decodes: no blank before the first token."""

    class Stripping:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [0]}

        def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
            return "".join(["▁a", "▁the", "s"][i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert TokenTexts(Stripping()).all([1, 2]) == [" the", "s"]


def test_logit_lens_is_the_unembedding(reader: ActivationReader) -> None:
    model, rows_AD = reader.model, tiny_topk_sae().W_dec.detach()[:5]
    lens = logit_lens(model, HOOK, rows_AD, TokenTexts(model.tokenizer))
    assert lens is not None
    centred_AD = (rows_AD - rows_AD.mean(dim=1, keepdim=True)) * model.ln_final.w
    for row, found in zip((centred_AD @ model.W_U).tolist(), lens, strict=True):
        order = sorted(range(4, len(row)), key=lambda token: row[token])  # the first four tokens are special
        assert found["lowered"] == [" " + model.tokenizer.decode([t]) for t in order[:SHOWN]]
        assert found["raised"] == [" " + model.tokenizer.decode([t]) for t in order[::-1][:SHOWN]]


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.0.ln1.hook_scale"])
def test_no_logit_lens_outside_the_stream(reader: ActivationReader, hook: str) -> None:
    texts = TokenTexts(reader.model.tokenizer)
    assert logit_lens(reader.model, hook, torch.ones(1, D_MODEL), texts) is None
    assert logit_lens(reader.model, HOOK, torch.ones(1, D_MODEL + 1), texts) is None


# ---------------------------------------------------------------- files


class Readers:
    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> ActivationReader:
        self.made += 1
        return ActivationReader(tiny_model(), HOOK)


def test_each_result_is_computed_once(documents: Path, tmp_path: Path) -> None:
    counted, readers = CountedPanel({"db-ksvd": tiny_db_ksvd_sae, "topk-sae": tiny_topk_sae}), Readers()

    def run(harvest: str = "harvest", **changes: Any) -> dict[str, Path]:
        panel = counted.panelists()
        return evaluate_examples(panel, setting(**changes), documents, readers, harvest, tmp_path / "examples")

    first = run()
    before = {name: path.read_bytes() for name, path in first.items()}
    assert (sorted(counted.loads), readers.made) == (["db-ksvd", "topk-sae"], 1)
    assert run() == first
    assert (len(counted.loads), readers.made) == (2, 1), "nothing is read or coded again"
    counted.contents["db-ksvd"] = "learned again"
    again = run()
    assert (counted.loads[2:], readers.made) == (["db-ksvd"], 2)
    assert again["topk-sae"] == first["topk-sae"]
    assert again["db-ksvd"] != first["db-ksvd"]
    assert again["db-ksvd"].read_bytes() == before["db-ksvd"], "the same dictionary gives the same bytes"
    others = [run(harvest="another"), run(examples=2), run(seed=1)]
    assert len({path for files in (first, again, *others) for path in files.values()}) == 9
    found = json.loads(first["db-ksvd"].read_text())
    assert [found["signed"], len(found["atoms"])] == [True, 12]
    assert len(first["db-ksvd"].read_text().splitlines()) == 12 + 2, "a line an atom"
