"""Gradient moments: what plain autograd gives, of the right tokens, beside activations that are not collected again.

``plain_gradients`` judges: one backward pass from TransformerLens' own loss, parameters and all.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ksvd_sae.activations import gradients
from ksvd_sae.activations.gradients import (
    GRADIENTS_FILE,
    GradientMoments,
    collect_gradient_moments,
    gradients_folder,
    gradients_key,
    open_gradients,
    read_gradients,
)
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS, HarvestConfig, run_harvest
from ksvd_sae.activations.language import ActivationReader, ModelConfig
from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.text import TextConfig, contexts
from ksvd_sae.errors import ActivationError, HookError, ManifestError, ShapeError, ShardError, TextError
from ksvd_sae.store import MANIFEST, content_hash
from tests import tiny_models, tolerances
from tests.activations.conftest import GivenTexts
from tests.strategies import generator

HOOK = "blocks.8.hook_resid_post"
GEMMA_HOOK = "blocks.1.hook_resid_post"
BOS = 0
CONTEXT_TOKENS = 16


class StoppedError(Exception):
    """Raised in the middle, as a power cut would."""


def random_tokens(n_contexts: int, seed: int = 0) -> Tensor:
    """Contexts that start with BOS; the second, if there is one, holds another between two documents."""
    tokens_BL = torch.randint(1, tiny_models.VOCABULARY_SIZE, (n_contexts, CONTEXT_TOKENS), generator=generator(seed))
    tokens_BL[:, 0] = BOS
    tokens_BL[1:2, 7] = BOS
    return tokens_BL


@pytest.fixture
def gemma(tokenizer: Any) -> Any:
    return tiny_models.hooked_gemma_2(tokenizer)


@pytest.fixture
def gemma_float64(tokenizer: Any) -> Any:
    return tiny_models.hooked_gemma_2(tokenizer, torch.float64)


def plain_loss(model: Any, tokens_BL: Tensor) -> Tensor:
    """Sum over the targets that are not special."""
    loss_BL = model(tokens_BL, return_type="loss", loss_per_token=True)
    return loss_BL[tokens_BL[:, 1:] != BOS].sum()


def plain_gradients(model: Any, hook: str, tokens_BL: Tensor) -> Tensor:
    kept = []

    def keep(activation: Tensor, hook: Any) -> None:
        activation.retain_grad()
        kept.append(activation)

    with model.hooks(fwd_hooks=[(hook, keep)]):
        plain_loss(model, tokens_BL).backward()
    model.zero_grad()
    gradient_BLD: Tensor = kept[0].grad.flatten(2)
    return gradient_BLD[tokens_BL != BOS]


def assert_close(found: Tensor, true: Tensor, tolerance: float) -> None:
    assert found.shape == true.shape
    assert float((found - true).abs().max()) <= tolerance * float(true.abs().max())


# ---------------------------------------------------------------- gradients of a batch


@pytest.mark.parametrize(
    "hook", [HOOK, "blocks.9.hook_resid_post", "blocks.7.attn.hook_z", "blocks.8.mlp.hook_post", "hook_embed"]
)
def test_neox_gradients_are_plain_autograds(model: Any, hook: str) -> None:
    reader, tokens_BL = ActivationReader(model, hook), random_tokens(3)
    x_ND, g_ND = read_gradients(reader, tokens_BL)
    assert_close(g_ND, plain_gradients(model, hook, tokens_BL), tolerances.GRADIENT[torch.float32])
    assert torch.equal(x_ND, reader.read(tokens_BL))
    assert x_ND.dtype == g_ND.dtype == torch.float32
    assert not x_ND.requires_grad
    assert not g_ND.requires_grad


@pytest.mark.parametrize(
    "hook", [GEMMA_HOOK, "blocks.2.hook_resid_mid", "blocks.1.attn.hook_k", "ln_final.hook_normalized", "hook_embed"]
)
def test_gemma_gradients_are_plain_autograds(gemma_float64: Any, hook: str) -> None:
    reader, tokens_BL = ActivationReader(gemma_float64, hook), random_tokens(3)
    _, g_ND = read_gradients(reader, tokens_BL)
    assert g_ND.dtype == torch.float64
    assert_close(g_ND, plain_gradients(gemma_float64, hook, tokens_BL), tolerances.GRADIENT[torch.float64])


def test_the_cap_of_the_logits_matters(gemma: Any) -> None:
    """Otherwise the test above could not see it missing."""
    tokens_BL = random_tokens(2)
    capped = plain_gradients(gemma, GEMMA_HOOK, tokens_BL)
    gemma.cfg.output_logits_soft_cap = 0.0
    assert float((plain_gradients(gemma, GEMMA_HOOK, tokens_BL) - capped).abs().max()) > 0.1 * float(capped.abs().max())


def test_gradients_are_finite_differences(gemma_float64: Any) -> None:
    """The loss itself, with one token's activation pushed a little to either side."""
    tokens_BL, step = random_tokens(1), 1e-5
    _, g_ND = read_gradients(ActivationReader(gemma_float64, GEMMA_HOOK), tokens_BL)
    for position in (1, 4, CONTEXT_TOKENS - 2):
        direction_D = torch.randn(g_ND.shape[1], generator=generator(position), dtype=torch.float64)
        losses = []
        for push in (step, -step):

            def shift(
                activation: Tensor, hook: Any, position: int = position, by_D: Tensor = push * direction_D
            ) -> Tensor:
                activation[:, position] += by_D
                return activation

            with torch.no_grad(), gemma_float64.hooks(fwd_hooks=[(GEMMA_HOOK, shift)]):
                losses.append(float(plain_loss(gemma_float64, tokens_BL)))
        slope = (losses[0] - losses[1]) / (2 * step)
        # Row 0 is the token after BOS.
        assert float(g_ND[position - 1] @ direction_D) == pytest.approx(slope, rel=tolerances.FINITE_DIFFERENCE)


def test_predicting_a_special_token_does_not_count(model: Any) -> None:
    reader = ActivationReader(model, HOOK)
    _, g_ND = read_gradients(reader, torch.tensor([[BOS, 5, BOS]]))
    assert g_ND.shape == (1, tiny_models.D_MODEL)
    assert float(g_ND.abs().max()) == 0
    _, g_ND = read_gradients(reader, torch.tensor([[BOS, 5, 6]]))
    assert float(g_ND[0].abs().max()) > 0
    # Nothing is predicted after the last token.
    assert float(g_ND[1].abs().max()) == 0


def test_special_tokens_that_are_kept_have_gradients(model: Any) -> None:
    """Those of what they do to the tokens after them; what is predicted stays the same."""
    tokens_BL = torch.tensor([[BOS, 5, 6, BOS]])
    reader = ActivationReader(model, HOOK, keep_special=True)
    x_ND, g_ND = read_gradients(reader, tokens_BL)
    ordinary_ND, ordinary_g_ND = read_gradients(ActivationReader(model, HOOK), tokens_BL)
    assert torch.equal(x_ND[1:3], ordinary_ND)
    assert torch.equal(g_ND[1:3], ordinary_g_ND)
    assert torch.equal(x_ND, reader.read(tokens_BL))
    assert float(g_ND[0].abs().max()) > 0
    assert float(g_ND[3].abs().max()) == 0


def test_a_batch_without_a_target(model: Any) -> None:
    _, g_ND = read_gradients(ActivationReader(model, HOOK), torch.tensor([[5, BOS, BOS]]))
    assert torch.equal(g_ND, torch.zeros(1, tiny_models.D_MODEL))


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_of_the_vocabulary_change_nothing(
    gemma_float64: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    reader, tokens_BL = ActivationReader(gemma_float64, GEMMA_HOOK), random_tokens(3)
    _, whole_ND = read_gradients(reader, tokens_BL)
    calls = []
    original = torch.nn.functional.cross_entropy

    def counted(logits_CV: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(len(logits_CV))
        return original(logits_CV, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted)
    monkeypatch.setattr(gradients, "GRADIENT_LOGITS_AT_ONCE", chunk * tiny_models.VOCABULARY_SIZE + 1)
    _, g_ND = read_gradients(reader, tokens_BL)
    assert max(calls) == chunk
    assert sum(calls) == 3 * (CONTEXT_TOKENS - 1) - 1
    assert_close(g_ND, whole_ND, tolerances.GRADIENT[torch.float64])


def test_bfloat16(tokenizer: Any) -> None:
    tokens_BL = random_tokens(3)
    found, true = (
        read_gradients(ActivationReader(tiny_models.hooked_gemma_2(tokenizer, dtype), GEMMA_HOOK), tokens_BL)[1]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert found.dtype == torch.float32
    assert float(torch.linalg.vector_norm(found - true) / torch.linalg.vector_norm(true)) <= (
        tolerances.GRADIENT_BFLOAT16
    )


def test_the_model_is_left_as_it_was(model: Any) -> None:
    model.embed.W_E.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    reader = ActivationReader(model, HOOK)

    def check() -> None:
        for name, parameter in model.named_parameters():
            assert parameter.grad is None
            assert parameter.requires_grad == before[name][0], name
            assert torch.equal(parameter, before[name][1])
        assert all(not point.fwd_hooks for point in model.hook_dict.values())

    with torch.no_grad():
        assert float(read_gradients(reader, random_tokens(1))[1].abs().max()) > 0
    check()
    with pytest.raises(HookError):
        read_gradients(ActivationReader(model, "blocks.8.attn.hook_pattern"), random_tokens(1))
    check()


def test_the_graph_starts_at_the_hook(model: Any) -> None:
    recorded = {}
    for hook in ("blocks.8.hook_resid_pre", "blocks.9.hook_resid_pre"):
        model.add_hook(hook, lambda activation, hook: recorded.update({hook.name: activation.requires_grad}))
    read_gradients(ActivationReader(model, HOOK), random_tokens(1))
    assert recorded == {"blocks.8.hook_resid_pre": False, "blocks.9.hook_resid_pre": True}


@pytest.mark.parametrize(
    "hook",
    ["blocks.8.attn.hook_pattern", "blocks.8.attn.hook_result", "blocks.8.hook_mlp_in", "unembed.hook_out"],
)
def test_hook_without_a_row_for_each_token(model: Any, hook: str) -> None:
    with pytest.raises(HookError, match="does not give one row a token"):
        read_gradients(ActivationReader(model, hook), random_tokens(2))


@pytest.mark.parametrize("how", ["detached", "mixed with what does not depend on it"])
def test_hook_that_the_loss_does_not_depend_on(model: Any, how: str) -> None:
    def cut(activation: Tensor, hook: Any) -> Tensor:
        return activation.detach().requires_grad_(how != "detached")

    model.add_hook("blocks.9.hook_resid_post", cut)
    with pytest.raises(HookError, match="the loss does not depend on what it gives") as caught:
        read_gradients(ActivationReader(model, HOOK), random_tokens(2))
    assert "remove other hooks" in str(caught.value.cure)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_gradients(model: Any, value: float) -> None:
    model.blocks[9].mlp.W_out.data[0, 0] = value
    with pytest.raises(ActivationError, match=r"of 29 gradients at blocks\.8") as caught:
        read_gradients(ActivationReader(model, HOOK), random_tokens(2))
    assert "model.dtype" in str(caught.value.cure)


# ---------------------------------------------------------------- moments


def outer(g_ND: Tensor) -> Tensor:
    return g_ND.double().T @ g_ND.double() / len(g_ND)


@pytest.mark.parametrize("batch_contexts", [1, 2, 5])
def test_moments_are_the_mean_of_outer_products(model: Any, batch_contexts: int) -> None:
    tokens_BL = random_tokens(5)
    n_tokens = 5 * (CONTEXT_TOKENS - 1) - 1
    found = collect_gradient_moments(ActivationReader(model, HOOK), iter(tokens_BL), n_tokens, batch_contexts)
    assert found.n_tokens == n_tokens
    assert found.outer_DD.dtype == torch.float64
    true_ND = plain_gradients(model, HOOK, tokens_BL)
    assert_close(found.outer_DD, outer(true_ND), tolerances.GRADIENT[torch.float32])
    assert_close(found.square_D, (true_ND.double() ** 2).mean(dim=0), tolerances.GRADIENT[torch.float32])


def test_whole_batches_and_no_more(model: Any) -> None:
    stream, amounts = iter(random_tokens(9)), []
    found = collect_gradient_moments(
        ActivationReader(model, HOOK), stream, 40, 2, advance=lambda amount, note="": amounts.append(amount)
    )
    assert amounts == [29, 30]
    assert found.n_tokens == 59
    assert len(list(stream)) == 5


def test_outliers_are_left_out_and_their_loss_is_not(model: Any) -> None:
    reader, tokens_BL = ActivationReader(model, HOOK), random_tokens(4)
    norms_N = torch.linalg.vector_norm(reader.read(tokens_BL), dim=1)
    limit = float(norms_N.median())
    found = collect_gradient_moments(reader, iter(tokens_BL), 5, 4, norm_limit=limit)
    kept_N = norms_N <= limit
    assert 5 < found.n_tokens == int(kept_N.sum()) < len(norms_N)
    true_ND = plain_gradients(model, HOOK, tokens_BL)[kept_N]
    assert_close(found.outer_DD, outer(true_ND), tolerances.GRADIENT[torch.float32])


def test_text_that_ends_too_early(model: Any) -> None:
    with pytest.raises(TextError, match="the text ended before 45 tokens") as caught:
        collect_gradient_moments(ActivationReader(model, HOOK), iter(random_tokens(3)), 45, 2)
    assert "got: 44 tokens" in str(caught.value)
    assert "harvest.gradient_tokens" in str(caught.value.cure)


@pytest.mark.parametrize(("n_tokens", "batch_contexts"), [(0, 1), (1, 0)])
def test_nothing_to_collect(model: Any, n_tokens: int, batch_contexts: int) -> None:
    with pytest.raises(ShapeError):
        collect_gradient_moments(ActivationReader(model, HOOK), iter(random_tokens(3)), n_tokens, batch_contexts)


def test_moments_come_back_bit_for_bit(tmp_path: Path) -> None:
    moments = GradientMoments(7, torch.randn(5, 5, generator=generator(0), dtype=torch.float64))
    moments.save(tmp_path / "folder" / "moments.safetensors")
    found = GradientMoments.load(tmp_path / "folder" / "moments.safetensors")
    assert found.n_tokens == 7
    assert found.outer_DD.dtype == torch.float64
    assert torch.equal(found.outer_DD, moments.outer_DD)


@pytest.mark.parametrize("damage", ["missing", "truncated", "another"])
def test_damaged_file(tmp_path: Path, store_harvest: Any, damage: str) -> None:
    path = tmp_path / GRADIENTS_FILE
    if damage == "truncated":
        GradientMoments(7, torch.eye(5, dtype=torch.float64)).save(path)
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "another":
        path = store_harvest(torch.ones(3, 5)).folder / "train" / "shard-00000.safetensors"
    with pytest.raises(ShardError, match="gradient moments"):
        GradientMoments.load(path)


# ---------------------------------------------------------------- beside the activations

TEXTS = tiny_models.documents(100)


def harvest_of(
    gradient_tokens: int = 0,
    gradient_batch_contexts: int = 4,
    texts: list[str] | None = TEXTS,
    **settings: Any,
) -> GivenTexts:
    sizes = {"train_tokens": 600, "heldout_tokens": 100, "context_tokens": CONTEXT_TOKENS, "shard_tokens": 256}
    gradient = {"gradient_tokens": gradient_tokens, "gradient_batch_contexts": gradient_batch_contexts}
    return GivenTexts(
        ModelConfig(name="tiny", hook=HOOK),
        TextConfig(source="hub", dataset="none"),
        HarvestConfig(**{**sizes, **gradient, **settings}),
        0,
        None if texts is None else tuple(texts),
    )


class Loader:
    """Loads the reader, counts how often, and can refuse."""

    def __init__(self, model: Any, only_gradients: bool = False):
        self.model, self.only_gradients, self.calls = model, only_gradients, 0

    def __call__(self) -> ActivationReader:
        self.calls += 1
        reader = ActivationReader(self.model, HOOK)
        if self.only_gradients:
            reader.read = refuse  # type: ignore[method-assign]
        return reader


def refuse(*_: Any) -> Any:
    raise AssertionError("activations were collected, the model loaded or the text opened")


def moments_of(folder: Path, harvest: GivenTexts) -> GradientMoments:
    return open_gradients(folder, gradients_key(content_hash(harvest.key), harvest.config))


def own_folder(folder: Path, harvest: GivenTexts) -> Path:
    return gradients_folder(folder, gradients_key(content_hash(harvest.key), harvest.config))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_key_of_the_activations_knows_no_gradients(tmp_path: Path) -> None:
    key = harvest_of().key
    assert set(key["harvest"]) == {
        "train_tokens",
        "heldout_tokens",
        "context_tokens",
        "batch_contexts",
        "shard_tokens",
        "outlier_factor",
        "dtype",
    }
    assert harvest_of(100, 2).key == key
    assert harvest_of().folder(tmp_path).name == f"tiny-{HOOK}-{content_hash(key)}"


# 1.05: a limit that leaves out many tokens.
@pytest.mark.parametrize(("outlier_factor", "bos"), [(1.05, True), (None, False)])
def test_gradients_are_added_to_a_finished_harvest(
    tmp_path: Path, model: Any, tokenizer: Any, outlier_factor: float | None, bos: bool
) -> None:
    settings = {"outlier_factor": outlier_factor, "prepend_bos": bos}
    plain = run_harvest(harvest_of(**settings), tmp_path, Loader(model))
    before = files(tmp_path)
    config, loader = harvest_of(200, **settings), Loader(model, only_gradients=True)
    shards = run_harvest(config, tmp_path, loader)
    assert loader.calls == 1
    assert shards.manifest == plain.manifest
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    folder = own_folder(tmp_path, config)
    assert {tmp_path / name for name in set(after) - set(before)} == {folder / GRADIENTS_FILE, folder / MANIFEST}
    found = moments_of(tmp_path, config)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["n_tokens"], manifest["d_in"]) == (found.n_tokens, tiny_models.D_MODEL)

    # The first contexts of the training part, judged by plain autograd.
    n_heldout = len((tmp_path / HELDOUT_DOCUMENTS).read_text().splitlines())
    stream = contexts(iter(TEXTS[n_heldout:]), tokenizer, CONTEXT_TOKENS, prepend_bos=bos)
    limit = shards.manifest["statistics"]["outlier_limit"] or float("inf")
    true_ND, n_read = torch.empty(0, tiny_models.D_MODEL), 0
    while len(true_ND) < 200:
        tokens_BL = torch.stack([next(stream) for _ in range(4)])
        norms_N = torch.linalg.vector_norm(ActivationReader(model, HOOK).read(tokens_BL), dim=1)
        true_ND = torch.cat([true_ND, plain_gradients(model, HOOK, tokens_BL)[norms_N <= limit]])
        n_read += len(norms_N)
    assert found.n_tokens == len(true_ND)
    assert (len(true_ND) < 0.9 * n_read) == (outlier_factor is not None)
    assert_close(found.outer_DD, outer(true_ND), tolerances.GRADIENT[torch.float32])


def test_finished_gradients_are_reused(tmp_path: Path, model: Any) -> None:
    config, loader = harvest_of(200), Loader(model)
    run_harvest(config, tmp_path, loader)
    assert loader.calls == 1, "one model for the activations and the gradients"
    before = files(tmp_path)
    run_harvest(replace(config, documents=None), tmp_path, refuse)
    assert files(tmp_path) == before


def test_other_gradients_of_the_same_harvest(tmp_path: Path, model: Any) -> None:
    run_harvest(harvest_of(100), tmp_path, Loader(model))
    before = files(tmp_path)
    for config in (harvest_of(300), harvest_of(100, 3)):
        run_harvest(config, tmp_path, Loader(model, only_gradients=True))
    assert {name: content for name, content in files(tmp_path).items() if name in before} == before
    n_tokens = [moments_of(tmp_path, config).n_tokens for config in (harvest_of(100), harvest_of(300))]
    assert n_tokens[0] < 300 <= n_tokens[1]
    assert len(list(tmp_path.glob("gradients-*"))) == 3


@pytest.mark.parametrize("where", ["read_gradients", "write_manifest"])
def test_stopped_gradients_are_collected_again(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise StoppedError

    config = harvest_of(200)
    with monkeypatch.context() as patch:
        patch.setattr(gradients, where, stop)
        with pytest.raises(StoppedError):
            run_harvest(config, tmp_path, Loader(model))
    shards = ActivationShards.open(tmp_path, key=config.key)
    with pytest.raises(ManifestError, match="none were collected"):
        moments_of(tmp_path, config)
    run_harvest(config, tmp_path, Loader(model, only_gradients=True))
    assert moments_of(tmp_path, config).n_tokens >= 200
    assert ActivationShards.open(tmp_path).manifest == shards.manifest


def test_too_little_text_for_gradients_leaves_the_activations(tmp_path: Path, model: Any) -> None:
    with pytest.raises(TextError, match=r"harvest\.gradient_tokens"):
        # The tokenizer takes 64 documents at once for the held-out part.
        run_harvest(harvest_of(10**6, texts=TEXTS[:70]), tmp_path, Loader(model))
    run_harvest(harvest_of(texts=None), tmp_path, refuse)


def test_none_were_collected(tmp_path: Path, model: Any) -> None:
    run_harvest(harvest_of(), tmp_path, Loader(model))
    with pytest.raises(ManifestError, match=r"gradient_tokens = 0\n  cure: set harvest\.gradient_tokens"):
        moments_of(tmp_path, harvest_of())


@pytest.mark.parametrize(
    ("damage", "error"),
    [("altered file", ShardError), ("missing file", ShardError), ("altered manifest", ManifestError)],
)
def test_damaged_gradients_are_refused(tmp_path: Path, model: Any, damage: str, error: type[Exception]) -> None:
    config = harvest_of(100)
    run_harvest(config, tmp_path, Loader(model))
    folder = own_folder(tmp_path, config)
    if damage == "altered file":
        GradientMoments(100, torch.eye(tiny_models.D_MODEL, dtype=torch.float64)).save(folder / GRADIENTS_FILE)
    elif damage == "missing file":
        (folder / GRADIENTS_FILE).unlink()
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, "key": {**manifest["key"], "gradient_tokens": 5}}))
    before = files(tmp_path)
    with pytest.raises(error):
        moments_of(tmp_path, config)
    with pytest.raises(error):
        run_harvest(config, tmp_path, refuse)
    assert files(tmp_path) == before


def test_without_the_list_of_heldout_documents(tmp_path: Path, model: Any) -> None:
    """Where the training text starts is then not known, and the held-out text must not be used."""
    run_harvest(harvest_of(), tmp_path, Loader(model))
    (tmp_path / HELDOUT_DOCUMENTS).unlink()
    with pytest.raises(ManifestError, match=r"heldout_documents\.jsonl is missing"):
        run_harvest(harvest_of(100), tmp_path, Loader(model, only_gradients=True))
