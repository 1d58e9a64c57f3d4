"""Core with shared runs gives what SAEBench's core gives, and asks the model once for a whole panel.

``stock`` runs SAEBench's functions as they are: the judge.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_bench.evals.core import main as core
from sae_bench.sae_bench_utils import general_utils
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from ksvd_sae.activations import splicing
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.evals.core import CoreEval
from ksvd_sae.evals.core import shared as shared_core
from ksvd_sae.evals.core.run import run_core
from ksvd_sae.evals.core.shared import shared_core_runs
from ksvd_sae.evals.llm_cache import TensorCache
from ksvd_sae.replaced import replaced
from tests import tiny_models
from tests.evals.conftest import TEXT, CountedPanel
from tests.evals.test_splice import CASES, MODELS, random_tokens
from tests.strategies import generator
from tests.tiny_saes import CONTEXT_TOKENS, tiny_db_ksvd_sae, tiny_model, tiny_topk_sae
from tests.tolerances import SHARED_CORE
from tests.upstream import mended

CORE = CoreEval(
    dataset=TEXT, context_tokens=CONTEXT_TOKENS, batch_contexts=3, reconstruction_batches=2, sparsity_batches=2
)
MEMORY = 1 << 20
Loss = dict[str, Tensor]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.byte_pair_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def sae_at(hook: str, d_in: int, seed: int = 0, head: int | None = None) -> Any:
    metadata = SAEMetadata(model_name="small", hook_name=hook, hook_head_index=head)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=3 * d_in, k=4, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.copy_(normalize(torch.randn(sae.W_dec.shape, generator=generator(seed)), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    # Core reads hook_name and hook_head_index beside the configuration, where this puts them.
    _, formatted, _ = general_utils.load_and_format_sae("small", sae, "cpu")
    return formatted


def width_at(model: HookedTransformer, hook: str) -> int:
    _, cache = model.run_with_cache(random_tokens(), names_filter=[hook])
    return cache[hook].flatten(2).shape[-1]


def recons_loss(model: Any, sae: Any, tokens_BL: Tensor, special: set[int | None], exclude: bool) -> Loss:
    return core.get_recons_loss(
        sae,
        model,
        tokens_BL,
        None,
        compute_kl=True,
        compute_ce_loss=True,
        ignore_tokens=special,
        exclude_special_tokens_from_reconstruction=exclude,
    )


def agree(shared: Loss, wanted: Loss) -> None:
    assert shared.keys() == wanted.keys()
    for name, value in wanted.items():
        assert shared[name].shape == value.shape, name
        torch.testing.assert_close(
            shared[name], value, **SHARED_CORE, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


# SAEBench has no layer for hooks outside the blocks.
@pytest.mark.parametrize(("model_name", "hook"), [case for case in CASES if case[1].startswith("blocks.")])
def test_losses_are_saebenchs(model_name: str, hook: str, tokenizer: Any, tmp_path: Path) -> None:
    model = MODELS[model_name](tokenizer)
    saes, tokens_BL = [sae_at(hook, width_at(model, hook), seed) for seed in (0, 1)], random_tokens()
    stock = [recons_loss(model, sae, tokens_BL, {0}, exclude) for sae in saes for exclude in (True, False)]
    with replaced(shared_core_runs(TensorCache(tmp_path, 10**8), MEMORY)):
        shared = [recons_loss(model, sae, tokens_BL, {0}, exclude) for sae in saes for exclude in (True, False)]
    for ours, wanted in zip(shared, stock, strict=True):
        agree(ours, wanted)
    assert not torch.equal(shared[0]["kl_div_with_sae"], shared[2]["kl_div_with_sae"]), "two SAEs, two scores"


@pytest.mark.parametrize("memory_bytes", [0, 1 << 12, 1 << 20])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunks_and_memory_do_not_change_losses(
    memory_bytes: int, chunk_tokens: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splicing, "LOGITS_AT_ONCE", chunk_tokens * tiny_models.VOCABULARY_SIZE)
    model, hook = MODELS["gemma-2"](tokenizer), "blocks.1.hook_resid_post"
    sae, tokens_BL = sae_at(hook, 24), random_tokens()
    wanted = recons_loss(model, sae, tokens_BL, {0}, True)
    with replaced(shared_core_runs(TensorCache(tmp_path, 10**8), memory_bytes)):
        for _ in range(2):
            agree(recons_loss(model, sae, tokens_BL, {0}, True), wanted)


def test_probabilities_that_underflow_are_infinite_as_in_saebench(tokenizer: Any, tmp_path: Path) -> None:
    """Logits 200 nats apart: log(softmax) is −inf for some, and the loss is not."""
    model, hook = MODELS["gpt-2"](tokenizer), "blocks.1.hook_resid_post"
    with torch.no_grad():
        model.unembed.W_U.mul_(60)
    sae, tokens_BL = sae_at(hook, 24), random_tokens()
    wanted = recons_loss(model, sae, tokens_BL, {0}, True)
    assert not torch.isfinite(wanted["kl_div_with_sae"]).all()
    assert torch.isfinite(wanted["ce_loss_with_sae"]).all()
    assert wanted["ce_loss_with_sae"].max() > 110
    with replaced(shared_core_runs(TensorCache(tmp_path, 10**8), MEMORY)):
        agree(recons_loss(model, sae, tokens_BL, {0}, True), wanted)


def test_a_large_vocabulary_loses_no_digits() -> None:
    """Gemma's has 262,144 words: added up one after another, float32 is 0.003 nats off."""
    logits_nV = 3 * torch.randn(4, 2**18, generator=generator(0))
    other_nV = logits_nV + 0.5 * torch.randn(logits_nV.shape, generator=generator(1))
    p_nV, q_nV = (torch.softmax(x_nV, dim=-1) for x_nV in (logits_nV, other_nV))
    exact_n = (p_nV.double() * (p_nV.double().log() - q_nV.double().log())).sum(dim=-1)
    found_n = shared_core._Clean(p_nV, (p_nV * p_nV.log()).sum(dim=-1)).divergence(q_nV.log())
    assert exact_n.mean() > 0.1
    torch.testing.assert_close(found_n.double(), exact_n, rtol=0, atol=1e-5)


def test_sixteen_bits(tokenizer: Any, tmp_path: Path) -> None:
    model = MODELS["gemma-2"](tokenizer).to(torch.bfloat16)
    sae, tokens_BL = sae_at("blocks.1.hook_resid_post", 24).to(torch.bfloat16), random_tokens()
    wanted = recons_loss(model, sae, tokens_BL, {0}, True)
    with replaced(shared_core_runs(TensorCache(tmp_path, 10**8), MEMORY)):
        agree(recons_loss(model, sae, tokens_BL, {0}, True), wanted)


def test_single_head_goes_saebenchs_way(tokenizer: Any, tmp_path: Path) -> None:
    model, hook = MODELS["gpt-2"](tokenizer), "blocks.1.attn.hook_z"
    sae = sae_at(hook, 8, head=1)
    wanted = recons_loss(model, sae, random_tokens(), {0}, True)
    with replaced(shared_core_runs(TensorCache(tmp_path, 10**8), MEMORY)):
        shared = recons_loss(model, sae, random_tokens(), {0}, True)
    assert all(torch.equal(shared[name], wanted[name]) for name in wanted)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the whole eval


@pytest.fixture
def block_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tiny model; every forward of each of its blocks, by the block's number."""
    ran: list[int] = []

    def load(name: str, **options: Any) -> HookedTransformer:
        model = tiny_model()
        for number, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, n=number: ran.append(n))
        return model

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", load)
    monkeypatch.setattr(core, "gc", SimpleNamespace(collect=lambda: 0))
    return ran


MAKERS: dict[str, Callable[[], Any]] = {
    "mp": tiny_db_ksvd_sae,
    "omp": lambda: tiny_db_ksvd_sae("omp"),
    "topk": tiny_topk_sae,
}


def scores(folder: Path, setting: EvalSetting, *names: str) -> dict[str, Any]:
    panel = CountedPanel({name: MAKERS[name] for name in names}).panelists()
    files = run_core(panel, CORE, setting, folder).files
    results = {name: json.loads(path.read_text()) for name, path in files.items()}
    return {
        name: {key: one[key] for key in ("eval_result_metrics", "eval_result_details")} for name, one in results.items()
    }


def numbers(value: Any, path: str = "") -> dict[str, float | None]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in numbers(inner, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}/{i}").items()}
    return {path: value}


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_panel_has_saebenchs_scores_and_runs_the_model_once(
    setting: EvalSetting, block_runs: list[int], tmp_path: Path
) -> None:
    stock = numbers(scores(tmp_path / "stock", setting, *MAKERS))
    n_stock = block_runs.count(0)
    shared_setting = replace(setting, cache=TensorCache(tmp_path / "llm", 10**8), memory_bytes=MEMORY)
    block_runs.clear()
    shared = numbers(scores(tmp_path / "shared", shared_setting, *MAKERS))
    assert shared.keys() == stock.keys()
    assert len(stock) > 400
    for name, value in stock.items():
        assert shared[name] == (None if value is None else pytest.approx(value, **_approx())), name
    batches = CORE.reconstruction_batches + CORE.sparsity_batches
    # Block 0 holds the hook: what comes before and in it runs for the first SAE alone.
    assert block_runs.count(0) == batches
    assert n_stock == len(MAKERS) * (3 * CORE.reconstruction_batches + CORE.sparsity_batches), mended(
        "sae_bench.evals.core.main.get_recons_loss", "sae_bench.evals.core.main.get_sparsity_and_variance_metrics"
    )
    # Block 1 comes after the hook: as it is, zeroed, and spliced for each.
    assert block_runs.count(1) == CORE.reconstruction_batches * (2 + len(MAKERS))


@pytest.mark.filterwarnings("ignore:Dataset is not tokenized:UserWarning")
def test_next_process_finds_what_the_first_one_kept(
    setting: EvalSetting, block_runs: list[int], tmp_path: Path
) -> None:
    def shared_setting() -> EvalSetting:
        return replace(setting, cache=TensorCache(tmp_path / "llm", 10**8), memory_bytes=MEMORY)

    scores(tmp_path / "first", shared_setting(), "mp")
    block_runs.clear()
    again = numbers(scores(tmp_path / "second", shared_setting(), "mp", "topk"))
    assert block_runs.count(0) == 0
    stock = numbers(scores(tmp_path / "stock", setting, "mp", "topk"))
    for name, value in stock.items():
        assert again[name] == (None if value is None else pytest.approx(value, **_approx())), name


def _approx() -> dict[str, float]:
    return {"rel": SHARED_CORE["rtol"], "abs": SHARED_CORE["atol"]}
