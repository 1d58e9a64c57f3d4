"""A BOS stands before texts that SAEBench gives a model if it stood before the contexts that were learned from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components import Embed
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from ksvd_sae.errors import EvaluationError
from ksvd_sae.evals.base import Eval, EvalSetting
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.evals.panel import run_evals
from ksvd_sae.evals.sae_probes import SaeProbesEval
from ksvd_sae.evals.saebench.bos import begin_texts
from ksvd_sae.evals.saebench.loaded_model import LoadedModel
from tests import tiny_models
from tests.evals.autointerp.tiny_autointerp import CONFIG as AUTOINTERP
from tests.evals.conftest import CountedPanel
from tests.evals.test_sae_probes import METAL, own_data  # noqa: F401
from tests.evals.test_saebench import CORE, PROBING
from tests.tiny_saes import MODEL_NAME, tiny_model, tiny_tokenizer, tiny_topk_sae

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning"),
    pytest.mark.filterwarnings("ignore:Inconsistent values. penalty=l1 with l1_ratio=0.0:UserWarning"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]


# ---------------------------------------------------------------- tokenizers


def without_bos() -> Any:
    """Knows <bos> and puts it before nothing, as Pythia's."""
    return tiny_models.byte_pair_tokenizer()


def slow(folder: Path) -> Any:
    tiny_models.byte_pair_tokenizer().backend_tokenizer.model.save(str(folder))
    return GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=tiny_models.END_OF_TEXT)


@pytest.mark.parametrize("kind", ["with", "without", "slow"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_tokenizer_begins_texts_as_told(kind: str, wanted: bool, tmp_path: Path) -> None:
    tokenizer = {"with": tiny_tokenizer, "without": without_bos, "slow": lambda: slow(tmp_path)}[kind]()
    plain = tokenizer("red iron", add_special_tokens=False)["input_ids"]
    # Again and back: it does not matter what was before.
    for with_bos in (not wanted, wanted, wanted):
        begin_texts(tokenizer, with_bos)
    bos = [tokenizer.bos_token_id] if wanted else []
    assert tokenizer("red iron")["input_ids"] == [*bos, *plain]
    assert tokenizer(["red iron", ""])["input_ids"] == [[*bos, *plain], bos]


def test_a_tokenizer_without_a_bos() -> None:
    backend = Tokenizer(models.WordLevel({"red": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    begin_texts(tokenizer, False)
    assert tokenizer("red")["input_ids"] == [0]
    with pytest.raises(EvaluationError, match="cannot be told to add it") as caught:
        begin_texts(tokenizer, True)
    assert "harvest.prepend_bos" in str(caught.value)


# ---------------------------------------------------------------- evals


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All tokens that models are given."""
    given: list[Tensor] = []
    embed = Embed.forward

    def forward(self: Any, tokens_BL: Tensor) -> Tensor:
        given.append(tokens_BL.clone())
        return embed(self, tokens_BL)

    monkeypatch.setattr(Embed, "forward", forward)
    return given


EVALS: list[Eval] = [CORE, PROBING, SaeProbesEval(datasets=[METAL], k_values=[1]), AUTOINTERP]


def of_contexts(bos: bool) -> Any:
    sae = tiny_topk_sae()
    sae.cfg.metadata.prepend_bos = bos
    return sae


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("section", EVALS, ids=lambda section: section.name)
@pytest.mark.parametrize("bos", [True, False])
def test_evals_begin_texts_as_told(
    section: Eval, bos: bool, setting: EvalSetting, seen: list[Tensor], tmp_path: Path
) -> None:
    told = replace(setting, prepend_bos=bos, cache=TensorCache(tmp_path / "llm", 10**8))
    panel = CountedPanel({"topk": lambda: of_contexts(bos)})
    list(run_evals(panel.panelists(), [section], told, tmp_path / "out"))
    first_B = torch.cat([tokens_BL[:, 0] for tokens_BL in seen])
    share = float((first_B == tiny_tokenizer().bos_token_id).float().mean())
    # Where texts are packed, a BOS between two of them may begin a context too.
    assert share == 1 if bos else share < 0.2


@pytest.mark.parametrize("bos", [True, False])
def test_prompts_of_absorption_begin_as_told(bos: bool, model_loads: list[str]) -> None:
    """It gives the model texts; TransformerLens has a default of its own for each model."""
    with LoadedModel(prepend_bos=bos).in_use():
        model = HookedTransformer.from_pretrained_no_processing(MODEL_NAME)
        tokens_BL = model.to_tokens(["red iron", "blue"])
    plain = tiny_model().tokenizer("red iron", add_special_tokens=False)["input_ids"]
    assert tokens_BL[0].tolist() == [*([model.tokenizer.bos_token_id] if bos else []), *plain]
