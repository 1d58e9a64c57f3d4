"""A TransformerBridge gives what the HookedTransformer of the same weights gives, wherever a model is taken.

``PAIRS`` are tiny models of transformers in a folder, each booted as a bridge and converted to a HookedTransformer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights, convert_gpt2_weights

from ksvd_sae.activations.gradients import gradients_key, open_gradients, read_gradients
from ksvd_sae.activations.harvest import HarvestConfig, run_harvest
from ksvd_sae.activations.language import ActivationReader, ModelConfig
from ksvd_sae.activations.splicing import RunsFromHook, Unembedding
from ksvd_sae.activations.text import TextConfig, contexts
from ksvd_sae.dictionary import Dictionary
from ksvd_sae.errors import EvaluationError, HookError
from ksvd_sae.evals.atoms.logit_lens import logit_lens
from ksvd_sae.evals.atoms.token_texts import TokenTexts
from ksvd_sae.evals.loss.splice import SpliceEvaluator
from ksvd_sae.learning.coding import Coding
from ksvd_sae.sae import sae_from_dictionary
from ksvd_sae.store import content_hash
from tests import tiny_models
from tests.activations.conftest import GivenTexts
from tests.strategies import generator, unit_atoms
from tests.tiny_saes import one_thread
from tests.tolerances import GRADIENT, HOOK_AGAINST_TRANSFORMERS, SPLICED_LOSS

WIDTH = 24
RESIDUAL = "blocks.1.hook_resid_post"
MIDDLE = "blocks.1.hook_resid_mid"
HOOKS = [RESIDUAL, "blocks.1.hook_resid_pre", "blocks.1.attn.hook_k", "blocks.1.hook_mlp_out", "hook_embed"]


class Pair(SimpleNamespace):
    """name; folder; hooked: the HookedTransformer; bridge; tokens_BL."""


def gpt_2(tokenizer: Any, model_class: Any) -> Any:
    config = HookedTransformerConfig(
        n_layers=3,
        d_model=WIDTH,
        d_head=8,
        n_heads=3,
        d_mlp=4 * WIDTH,
        n_ctx=64,
        d_vocab=tiny_models.VOCABULARY_SIZE,
        act_fn="gelu_new",
        seed=0,
        device="cpu",
    )
    return model_class(config, tokenizer=tokenizer)


def converted(name: str, weights: Any, tokenizer: Any, model_class: Any = HookedTransformer) -> Any:
    """transformers' weights as TransformerLens' own model, nothing folded."""
    if name == "gpt-2":
        hooked, convert = gpt_2(tokenizer, model_class), convert_gpt2_weights
    else:
        hooked, convert = tiny_models.hooked_gemma_2(tokenizer, model_class=model_class), convert_gemma_weights
    state = {key: weight.clone() for key, weight in convert(weights, hooked.cfg).items()}
    hooked.load_state_dict(state, strict=False)
    return hooked.eval()


@pytest.fixture(scope="module", params=["gpt-2", "gemma-2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    from transformers import PreTrainedTokenizerFast

    name, folder = request.param, tmp_path_factory.mktemp("model")
    weights = {"gpt-2": tiny_models.gpt2_model, "gemma-2": tiny_models.gemma_2_model}[name]()
    weights.save_pretrained(folder)
    tiny_models.byte_pair_tokenizer().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens_BL = torch.stack(list(contexts(iter(tiny_models.documents(3)), tokenizer, 12))[:5])
    with one_thread():
        yield Pair(
            name=name,
            folder=folder,
            weights=weights,
            hooked=converted(name, weights, tokenizer),
            bridge=TransformerBridge.boot_transformers(str(folder), device="cpu").eval(),
            tokens_BL=tokens_BL,
        )


def same(found: Tensor, wanted: Tensor, bound: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound * float(wanted.detach().abs().max()))


def distortion(width: int) -> Callable[[Tensor], Tensor]:
    error_DD = torch.randn(width, width, generator=generator(1)) / width**0.5
    return lambda x_ND: 0.8 * x_ND + 0.3 * x_ND @ error_DD


@pytest.mark.parametrize("hook", [*HOOKS, MIDDLE, "blocks.1.attn.hook_z", "blocks.2.mlp.hook_post"])
def test_activations(pair: Pair, hook: str) -> None:
    found, wanted = (ActivationReader(model, hook).read(pair.tokens_BL) for model in (pair.bridge, pair.hooked))
    same(found, wanted, HOOK_AGAINST_TRANSFORMERS)


def test_a_reader_stops_a_bridge_behind_its_layer(pair: Pair) -> None:
    ran: list[int] = []
    for layer, block in enumerate(pair.bridge.blocks):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    ActivationReader(pair.bridge, "blocks.0.hook_resid_mid").read(pair.tokens_BL)
    assert ran == [0]


def test_a_harvest_and_its_gradients(pair: Pair, tmp_path: Path) -> None:
    """The same contexts, with the same BOS; the shards are shuffled alike."""
    sizes = {"train_tokens": 300, "heldout_tokens": 100, "context_tokens": 16, "shard_tokens": 200}
    harvest = GivenTexts(
        ModelConfig(name="tiny", hook=RESIDUAL),
        TextConfig(source="hub", dataset="none"),
        HarvestConfig(**sizes, gradient_tokens=100, outlier_factor=None),
        0,
        tuple(tiny_models.documents(40)),
    )
    found, wanted = (
        run_harvest(harvest, tmp_path / name, partial(ActivationReader, getattr(pair, name), RESIDUAL))
        for name in ("bridge", "hooked")
    )
    assert found.prepend_bos == wanted.prepend_bos
    same(found.tensor(), wanted.tensor(), HOOK_AGAINST_TRANSFORMERS)
    key = gradients_key(content_hash(harvest.key), harvest.config)
    moments, wanted_moments = (open_gradients(shards.folder, key) for shards in (found, wanted))
    same(moments.outer_DD, wanted_moments.outer_DD, 10 * GRADIENT[torch.float32])


@pytest.mark.parametrize("hook", HOOKS)
def test_gradients(pair: Pair, hook: str) -> None:
    readers = [ActivationReader(model, hook) for model in (pair.bridge, pair.hooked)]
    (x_ND, g_ND), (wanted_x_ND, wanted_g_ND) = (read_gradients(reader, pair.tokens_BL) for reader in readers)
    same(x_ND, wanted_x_ND, HOOK_AGAINST_TRANSFORMERS)
    same(g_ND, wanted_g_ND, GRADIENT[torch.float32])
    assert all(weight.requires_grad and weight.grad is None for weight in pair.bridge.parameters())


@pytest.mark.parametrize("hook", HOOKS)
def test_runs_from_a_hook(pair: Pair, hook: str) -> None:
    bridge, hooked = RunsFromHook(pair.bridge, hook), RunsFromHook(pair.hooked, hook)
    (started, activation, final_BLD), (wanted_started, wanted, wanted_final_BLD) = (
        runs.first(pair.tokens_BL) for runs in (bridge, hooked)
    )
    assert activation is not None
    assert wanted is not None
    same(activation, wanted, HOOK_AGAINST_TRANSFORMERS)
    same(final_BLD, wanted_final_BLD, SPLICED_LOSS)
    changed, wanted_changed = bridge.again(started, torch.neg), hooked.again(wanted_started, torch.neg)
    same(changed, wanted_changed, SPLICED_LOSS)
    assert not torch.allclose(changed, final_BLD, atol=0.1)
    with torch.no_grad():
        same(Unembedding(pair.bridge).logits(final_BLD.flatten(0, 1)), pair.hooked(pair.tokens_BL).flatten(0, 1), 1e-4)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_loss_of_a_splice(pair: Pair, hook: str) -> None:
    found, wanted = (
        SpliceEvaluator(model, hook, pair.tokens_BL, norm_limit=None, batch_contexts=2)
        for model in (pair.bridge, pair.hooked)
    )
    width = ActivationReader(pair.hooked, hook).read(pair.tokens_BL).shape[1]
    scores, wanted_scores = found.score(distortion(width)), wanted.score(distortion(width))
    for name in ("ce_clean", "ce_ablated", "ce_spliced", "kl"):
        assert getattr(scores, name) == pytest.approx(getattr(wanted_scores, name), abs=SPLICED_LOSS), name
    assert wanted_scores.kl > 20 * SPLICED_LOSS
    assert (scores.n_tokens, scores.n_replaced) == (wanted_scores.n_tokens, wanted_scores.n_replaced)


def test_the_logit_lens(pair: Pair) -> None:
    rows_AD, texts = unit_atoms(7, WIDTH, 0, torch.float32), TokenTexts(pair.hooked.tokenizer)
    found, wanted = (logit_lens(model, RESIDUAL, rows_AD, texts) for model in (pair.bridge, pair.hooked))
    assert found is not None
    assert wanted is not None
    for one, other in zip(found, wanted, strict=True):
        for end in ("raised", "lowered"):
            assert one[end] == other[end]
            assert one[f"{end}_logits"] == pytest.approx(other[f"{end}_logits"], rel=1e-3)


def test_one_of_our_saes_in_it(pair: Pair) -> None:
    """As SAELens attaches SAEs to either."""
    dictionary = Dictionary(unit_atoms(48, WIDTH, 0, torch.float32), torch.ones(WIDTH), Coding(4))
    sae = sae_from_dictionary(dictionary, model_name="tiny", hook_name=RESIDUAL)
    hooked = converted(pair.name, pair.weights, pair.hooked.tokenizer, HookedSAETransformer)
    bridge = SAETransformerBridge.boot_transformers(str(pair.folder), device="cpu").eval()
    found, wanted = (model.run_with_saes(pair.tokens_BL, saes=[sae]) for model in (bridge, hooked))
    same(found, wanted, SPLICED_LOSS)
    assert not torch.allclose(found, bridge(pair.tokens_BL), atol=0.1)


def test_hooks_that_a_bridge_does_not_offer(pair: Pair) -> None:
    with pytest.raises(HookError, match=r"(?s)no hook 'blocks\.1\.hook_resid_pots'.*did you mean"):
        ActivationReader(pair.bridge, "blocks.1.hook_resid_pots")
    with pytest.raises(HookError, match=r"blocks\.1\.attn\.hook_result"):
        ActivationReader(pair.bridge, "blocks.1.attn.hook_result").read(pair.tokens_BL)


def test_a_hook_that_a_bridge_only_reads(pair: Pair) -> None:
    """There a change of the stream's middle would not reach what passes by the MLP."""
    with pytest.raises(HookError, match=r"(?s)reads it, and cannot change it.*hook_resid_post"):
        SpliceEvaluator(pair.bridge, MIDDLE, pair.tokens_BL, norm_limit=None)
    with pytest.raises(HookError, match="reads it, and cannot change it"):
        read_gradients(ActivationReader(pair.bridge, MIDDLE), pair.tokens_BL)


def test_logits_that_are_scaled(pair: Pair) -> None:
    """As Cohere's and Granite's are, of which neither W_U nor the config's cap says anything."""
    bridge = TransformerBridge.boot_transformers(str(pair.folder), device="cpu").eval()
    forward = bridge.original_model.forward

    def scaled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = output.logits / 8
        return output

    bridge.original_model.forward = scaled
    with pytest.raises(EvaluationError, match=r"(?s)logits are not W_U.*cure: a HookedTransformer"):
        Unembedding(bridge)
    assert len(ActivationReader(bridge, RESIDUAL).read(pair.tokens_BL))
