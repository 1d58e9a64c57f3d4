"""Splicing: the scores of a plain run of the whole model with hooks, from runs that start at the hook.

``Plain`` judges: TransformerLens' own logits of whole runs, and sums in float64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_bench.evals.core import main as core
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.errors import ActivationError, ConfigError, EvaluationError, HookError, ShapeError
from ksvd_sae.evals.loss import LossEval, of_contexts
from ksvd_sae.evals.loss.splice import SpliceEvaluator
from tests import tiny_models
from tests.evals.test_items import means
from tests.strategies import generator
from tests.tiny_saes import HOOK, tiny_model, tiny_topk_sae
from tests.tolerances import BFLOAT16, SPLICED_LOSS

BOS, CONTEXT_TOKENS = 0, 12
POST = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TransformerLens loads a tokenizer again by its name: it needs a place on disk."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.byte_pair_tokenizer().save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def small_model(tokenizer: Any, **changes: Any) -> HookedTransformer:
    """Three layers of random weights large enough for the loss to notice."""
    config: dict[str, Any] = {
        "n_layers": 3,
        "d_model": 24,
        "d_head": 8,
        "n_heads": 3,
        "d_mlp": 48,
        "n_ctx": 64,
        "d_vocab": tiny_models.VOCABULARY_SIZE,
        "act_fn": "gelu",
        "initializer_range": 0.3,
        "seed": 0,
        "device": "cpu",
    }
    return HookedTransformer(HookedTransformerConfig(**{**config, **changes}), tokenizer=tokenizer).eval()


# Each has something else after the hook: positions in the attention or added to it, blocks in parallel, caps, no norm.
MODELS: dict[str, Callable[[Any], HookedTransformer]] = {
    "gpt-2": small_model,
    "neox": lambda t: small_model(t, parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=2),
    "gemma-2": tiny_models.hooked_gemma_2,
    "shortformer": lambda t: small_model(t, positional_embedding_type="shortformer"),
    "alibi": lambda t: small_model(t, positional_embedding_type="alibi"),
    "no norm, no MLP": lambda t: small_model(t, normalization_type=None, attn_only=True),
}
HOOKS = {
    "gpt-2": ["blocks.0.hook_resid_pre", POST, "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post", "hook_embed"],
    "neox": [POST, "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"],
    "gemma-2": [POST, "blocks.1.hook_attn_out", "blocks.1.attn.hook_k", "blocks.0.mlp.hook_post", "hook_embed"],
    "shortformer": [POST, "blocks.1.hook_mlp_out", "hook_embed"],
    "alibi": [POST, "ln_final.hook_normalized"],
    "no norm, no MLP": [POST, "blocks.2.hook_resid_post"],
}
CASES = [(model, hook) for model, hooks in HOOKS.items() for hook in hooks]


def random_tokens(n_contexts: int = 5, seed: int = 0) -> Tensor:
    """Contexts that start with BOS; the second holds another between two documents."""
    tokens_CL = torch.randint(1, tiny_models.VOCABULARY_SIZE, (n_contexts, CONTEXT_TOKENS), generator=generator(seed))
    tokens_CL[:, 0] = BOS
    tokens_CL[1:2, 7] = BOS
    return tokens_CL


def distortion(d_in: int) -> Callable[[Tensor], Tensor]:
    """A reconstruction with an error that depends on the activation."""
    error_DD = torch.randn(d_in, d_in, generator=generator(1)) / d_in**0.5
    return lambda x_ND: 0.8 * x_ND + 0.3 * x_ND @ error_DD


class Plain:
    """Whole runs of the model, all logits at once."""

    def __init__(self, model: HookedTransformer, hook: str, tokens_CL: Tensor, norm_limit: float | None):
        self.model, self.hook, self.tokens_CL = model, hook, tokens_CL
        _, cache = model.run_with_cache(tokens_CL, names_filter=hook)
        norms_CL = cache[hook].flatten(2).norm(dim=2)
        self.replaced_CL = tokens_CL != BOS
        if norm_limit is not None:
            self.replaced_CL &= norms_CL <= norm_limit
        self.counted_CL = tokens_CL[:, 1:] != BOS
        self.clean = self.logs()

    @torch.no_grad()
    def logs(self, change: Callable[[Tensor], Tensor] | None = None, everywhere: bool = False) -> Tensor:
        """Log-probabilities (C, L − 1, V)."""

        def splice(activation: Tensor, hook: Any) -> Tensor:
            assert change is not None
            flat = activation.flatten(2)
            chosen_CL = torch.ones_like(self.replaced_CL) if everywhere else self.replaced_CL
            flat = torch.where(chosen_CL[..., None], change(flat.reshape(-1, flat.shape[2])).reshape(flat.shape), flat)
            return flat.reshape(activation.shape)

        hooks = [] if change is None else [(self.hook, splice)]
        logits: Tensor = self.model.run_with_hooks(self.tokens_CL, return_type="logits", fwd_hooks=hooks)
        return logits[:, :-1].double().log_softmax(dim=2)

    def losses(self, logs: Tensor) -> Tensor:
        return -logs.gather(2, self.tokens_CL[:, 1:, None])[..., 0]

    def ce(self, logs: Tensor) -> float:
        return float(self.losses(logs)[self.counted_CL].mean())

    def kl(self, logs: Tensor) -> float:
        return float((self.clean.exp() * (self.clean - logs)).sum(dim=2)[self.counted_CL].mean())

    def lost_C(self, logs: Tensor) -> Tensor:
        lost_CL = self.losses(logs) - self.losses(self.clean)
        return (lost_CL * self.counted_CL).sum(dim=1) / self.counted_CL.sum(dim=1)


# ---------------------------------------------------------------- against plain runs


@pytest.mark.parametrize(("name", "hook"), CASES)
def test_scores_are_those_of_plain_runs(tokenizer: Any, name: str, hook: str) -> None:
    model, tokens_CL = MODELS[name](tokenizer), random_tokens()
    x_ND = ActivationReader(model, hook).read(tokens_CL)
    # A tenth of the tokens are outliers. Behind a norm none is: but for rounding, all are as large.
    limit = None if hook.endswith("hook_normalized") else float(x_ND.norm(dim=1).quantile(0.9))
    change, plain = distortion(x_ND.shape[1]), Plain(model, hook, tokens_CL, limit)
    evaluator = SpliceEvaluator(model, hook, tokens_CL, norm_limit=limit, batch_contexts=2, chunk_tokens=10)
    scores, spliced = evaluator.score(change), plain.logs(change)
    assert scores.n_replaced == int(plain.replaced_CL.sum())
    assert (scores.n_replaced < len(x_ND)) == (limit is not None)
    assert scores.n_tokens == int(plain.counted_CL.sum())
    assert scores.ce_clean == pytest.approx(plain.ce(plain.clean), abs=SPLICED_LOSS)
    assert scores.ce_ablated == pytest.approx(plain.ce(plain.logs(torch.zeros_like)), abs=SPLICED_LOSS)
    assert scores.ce_spliced == pytest.approx(plain.ce(spliced), abs=SPLICED_LOSS)
    assert scores.kl == pytest.approx(plain.kl(spliced), abs=SPLICED_LOSS)
    assert scores.nats_lost == scores.ce_spliced - scores.ce_clean
    torch.testing.assert_close(scores.nats_lost_C, plain.lost_C(spliced), rtol=0, atol=SPLICED_LOSS)
    # What is compared is no rounding.
    assert scores.kl > 20 * SPLICED_LOSS


def test_the_loss_is_transformer_lens_own(tokenizer: Any) -> None:
    """Where every target counts, the losses are what the model itself returns."""
    model, tokens_CL = MODELS["gemma-2"](tokenizer), random_tokens(1)
    change = distortion(24)

    def splice(activation: Tensor, hook: Any) -> Tensor:
        return torch.cat([activation[:, :1], change(activation[:, 1:])], dim=1)

    model.requires_grad_(False)
    plain = model.run_with_hooks(tokens_CL, return_type="loss", fwd_hooks=[(POST, splice)])
    scores = SpliceEvaluator(model, POST, tokens_CL, norm_limit=None).score(change)
    assert scores.ce_spliced == pytest.approx(float(plain), abs=SPLICED_LOSS)
    assert scores.ce_clean == pytest.approx(float(model(tokens_CL, return_type="loss")), abs=SPLICED_LOSS)


@pytest.mark.parametrize("name", ["gpt-2", "gemma-2"])
def test_a_tokenizer_that_pads_on_the_left(tokenizer: Any, name: str) -> None:
    """As Gemma's does: TransformerLens then masks padding, also in runs that start in the middle."""
    model, tokens_CL = MODELS[name](tokenizer), random_tokens()
    model.tokenizer.padding_side = "left"
    # Two leading tokens of padding beside the context's own BOS.
    tokens_CL[2, :3] = BOS
    change, plain = distortion(24), Plain(model, POST, tokens_CL, None)
    scores = SpliceEvaluator(model, POST, tokens_CL, norm_limit=None).score(change)
    assert scores.ce_spliced == pytest.approx(plain.ce(plain.logs(change)), abs=SPLICED_LOSS)
    assert scores.kl == pytest.approx(plain.kl(plain.logs(change)), abs=SPLICED_LOSS)


def test_against_saebench_core() -> None:
    """Core's own function on the same contexts, averaged over the same predictions."""
    model, sae = tiny_model(), tiny_topk_sae()
    tokens_CL = torch.randint(4, model.cfg.d_vocab, (4, CONTEXT_TOKENS), generator=generator(0))
    tokens_CL[:, 0] = bos = model.tokenizer.bos_token_id
    # SAEBench puts these into the config before it calls the function.
    sae.cfg.hook_name, sae.cfg.hook_head_index = HOOK, None
    theirs = core.get_recons_loss(
        sae, model, tokens_CL, None, True, True, ignore_tokens={bos}, exclude_special_tokens_from_reconstruction=True
    )
    evaluator = SpliceEvaluator(model, HOOK, tokens_CL, norm_limit=None, ablation="all")
    scores = evaluator.score(lambda x: sae.decode(sae.encode(x)))
    assert scores.ce_clean == pytest.approx(float(theirs["ce_loss_without_sae"].mean()), abs=SPLICED_LOSS)
    assert scores.ce_ablated == pytest.approx(float(theirs["ce_loss_with_ablation"].mean()), abs=SPLICED_LOSS)
    assert scores.ce_spliced == pytest.approx(float(theirs["ce_loss_with_sae"].mean()), abs=SPLICED_LOSS)
    assert scores.kl == pytest.approx(float(theirs["kl_div_with_sae"][:, :-1].mean()), abs=SPLICED_LOSS)
    assert min(abs(scores.ce_ablated - scores.ce_clean), abs(scores.nats_lost), scores.kl) > 100 * SPLICED_LOSS


def test_ablating_all_is_not_ablating_what_is_replaced(tokenizer: Any) -> None:
    model, tokens_CL = MODELS["gemma-2"](tokenizer), random_tokens()
    plain = Plain(model, POST, tokens_CL, None)
    for ablation, everywhere in (("replaced", False), ("all", True)):
        found = SpliceEvaluator(model, POST, tokens_CL, norm_limit=None, ablation=ablation).ce_ablated  # type: ignore[arg-type]
        assert found == pytest.approx(plain.ce(plain.logs(torch.zeros_like, everywhere)), abs=SPLICED_LOSS)
    assert abs(plain.ce(plain.logs(torch.zeros_like, True)) - plain.ce(plain.logs(torch.zeros_like))) > 0.1


# ---------------------------------------------------------------- ends of the scale


@pytest.mark.parametrize("name", MODELS)
def test_identity_and_zeros(tokenizer: Any, name: str) -> None:
    evaluator = SpliceEvaluator(MODELS[name](tokenizer), POST, random_tokens(), norm_limit=None)
    same, zeros = evaluator.score(lambda x: x), evaluator.score(torch.zeros_like)
    assert abs(same.nats_lost) < SPLICED_LOSS
    assert same.loss_recovered == pytest.approx(1, abs=SPLICED_LOSS)
    assert abs(same.kl) < SPLICED_LOSS
    assert zeros.loss_recovered == 0
    assert zeros.ce_spliced == zeros.ce_ablated
    assert zeros.kl > 0


def test_identity_in_bfloat16(tokenizer: Any) -> None:
    """The rows that are spliced are the model's own numbers, so nothing is rounded twice."""
    model = tiny_models.hooked_gemma_2(tokenizer, torch.bfloat16)
    scores = SpliceEvaluator(model, POST, random_tokens(), norm_limit=None).score(lambda x: x)
    assert abs(scores.nats_lost) < SPLICED_LOSS
    full = SpliceEvaluator(tiny_models.hooked_gemma_2(tokenizer), POST, random_tokens(), norm_limit=None)
    assert scores.ce_clean == pytest.approx(full.ce_clean, rel=BFLOAT16)


def test_all_tokens_outliers(tokenizer: Any) -> None:
    """Nothing is replaced, so nothing can be recovered: NaN, not a number."""
    evaluator = SpliceEvaluator(MODELS["gpt-2"](tokenizer), POST, random_tokens(), norm_limit=0.0)
    scores = evaluator.score(torch.zeros_like)
    assert (scores.n_replaced, scores.nats_lost, scores.kl) == (0, 0, 0)
    assert scores.loss_recovered != scores.loss_recovered


def test_an_ablation_that_costs_nothing_is_told(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    SpliceEvaluator(MODELS["gpt-2"](tokenizer), POST, random_tokens(), norm_limit=0.0)
    assert "loss recovered means nothing" in caplog.text


def test_standard_error(tokenizer: Any) -> None:
    model, change = MODELS["gpt-2"](tokenizer), distortion(24)
    scores = SpliceEvaluator(model, POST, random_tokens(4), norm_limit=None).score(change)
    lost = scores.nats_lost_C.tolist()
    mean = sum(lost) / 4
    expected = (sum((value - mean) ** 2 for value in lost) / 3 / 4) ** 0.5
    assert scores.nats_lost_error == pytest.approx(expected)
    one = SpliceEvaluator(model, POST, random_tokens(1), norm_limit=None).score(change)
    assert one.nats_lost_error != one.nats_lost_error


def test_contexts_give_the_scores(tokenizer: Any) -> None:
    evaluator = SpliceEvaluator(MODELS["gemma-2"](tokenizer), POST, random_tokens(), norm_limit=None)
    scores = evaluator.score(distortion(24))
    wanted = {"nats_lost": scores.nats_lost, "kl": scores.kl, "loss_recovered": scores.loss_recovered}
    # Six digits are kept.
    assert means(LossEval.items(of_contexts(scores))) == pytest.approx(wanted, abs=1e-5)
    # What older results say.
    old = means(LossEval.items({"nats_lost_of_contexts": scores.nats_lost_C.tolist()}))
    assert old == pytest.approx({"nats_lost": float(scores.nats_lost_C.mean())})


# ---------------------------------------------------------------- what it costs, and what does not matter


@pytest.mark.parametrize("cache_bytes", [0, 2 * 10 * 512 * 4, 2 << 30], ids=["none", "two chunks", "all"])
def test_the_cache_changes_nothing(tokenizer: Any, cache_bytes: int) -> None:
    model, change = MODELS["gemma-2"](tokenizer), distortion(24)
    evaluator = SpliceEvaluator(model, POST, random_tokens(), norm_limit=None, chunk_tokens=10, cache_bytes=cache_bytes)
    everything = SpliceEvaluator(model, POST, random_tokens(), norm_limit=None, chunk_tokens=10)
    found, expected = evaluator.score(change), everything.score(change)
    assert (found.ce_spliced, found.kl) == (expected.ce_spliced, expected.kl)


def test_chunks_and_batches_change_nothing(tokenizer: Any) -> None:
    model, change = MODELS["gpt-2"](tokenizer), distortion(24)
    scores = [
        SpliceEvaluator(model, POST, random_tokens(), norm_limit=None, chunk_tokens=chunk, batch_contexts=batch)
        for chunk, batch in ((None, 16), (1, 1), (7, 3))
    ]
    first, *others = [evaluator.score(change) for evaluator in scores]
    for other in others:
        assert other.kl == pytest.approx(first.kl, abs=SPLICED_LOSS)
        torch.testing.assert_close(other.nats_lost_C, first.nats_lost_C, rtol=0, atol=SPLICED_LOSS)


@pytest.mark.parametrize(
    ("hook", "expected"), [(POST, [2]), ("blocks.1.hook_resid_pre", [1, 2]), ("blocks.1.hook_mlp_out", [1, 2])]
)
def test_only_what_comes_after_the_hook_is_run(tokenizer: Any, hook: str, expected: list[int]) -> None:
    model = MODELS["gpt-2"](tokenizer)
    evaluator = SpliceEvaluator(model, hook, random_tokens(), norm_limit=None)
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    evaluator.score(lambda x: x)
    assert ran == expected


def test_the_dictionary_gets_the_harvests_rows(tokenizer: Any) -> None:
    """Heads flattened, special tokens left out; and what it does to its input stays its own."""
    model, tokens_CL, hook = MODELS["neox"](tokenizer), random_tokens(), "blocks.1.attn.hook_z"
    evaluator = SpliceEvaluator(model, hook, tokens_CL, norm_limit=None)
    first = evaluator.score(lambda x: x * 0.5)
    seen: list[Tensor] = []

    def in_place(x_ND: Tensor) -> Tensor:
        seen.append(x_ND.clone())
        return x_ND.mul_(0.5)

    again = evaluator.score(in_place)
    torch.testing.assert_close(torch.cat(seen), ActivationReader(model, hook).read(tokens_CL))
    assert seen[0].dtype == torch.float32
    assert again.kl == first.kl == evaluator.score(in_place).kl


def test_no_graph_is_built_and_no_hook_stays(tokenizer: Any) -> None:
    model = MODELS["gpt-2"](tokenizer)
    factor = torch.tensor(0.5, requires_grad=True)
    scores = SpliceEvaluator(model, "blocks.1.hook_mlp_out", random_tokens(), norm_limit=None).score(
        lambda x: x * factor
    )
    assert not scores.nats_lost_C.requires_grad
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


# ---------------------------------------------------------------- errors


def test_no_such_hook(tokenizer: Any) -> None:
    with pytest.raises(HookError, match=r"(?s)no hook 'blocks\.1\.hook_resid_pots'.*did you mean"):
        SpliceEvaluator(MODELS["gpt-2"](tokenizer), "blocks.1.hook_resid_pots", random_tokens(), norm_limit=None)


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_pattern", "unembed.hook_out"])
def test_hooks_without_a_row_a_token(tokenizer: Any, hook: str) -> None:
    with pytest.raises(HookError, match="one row a token"):
        SpliceEvaluator(MODELS["gpt-2"](tokenizer), hook, random_tokens(), norm_limit=None)


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.ones(2, 1), torch.ones(2, 4)],
)
def test_tokens_that_are_none(tokenizer: Any, tokens: Tensor) -> None:
    with pytest.raises(ShapeError, match="token ids"):
        SpliceEvaluator(MODELS["gpt-2"](tokenizer), POST, tokens, norm_limit=None)


def test_a_context_with_nothing_to_predict(tokenizer: Any) -> None:
    tokens_CL = random_tokens()
    tokens_CL[3] = BOS
    with pytest.raises(ShapeError, match=r"(?s)no token to predict.*context 3 of 5"):
        SpliceEvaluator(MODELS["gpt-2"](tokenizer), POST, tokens_CL, norm_limit=None)


def test_unknown_ablation(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)'none'.*replaced or all"):
        SpliceEvaluator(MODELS["gpt-2"](tokenizer), POST, random_tokens(), norm_limit=None, ablation="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [lambda x: x[:, :-1], lambda x: x[:-1], lambda x: x[None]])
def test_wrong_shape(tokenizer: Any, wrong: Callable[[Tensor], Tensor]) -> None:
    evaluator = SpliceEvaluator(MODELS["gpt-2"](tokenizer), POST, random_tokens(), norm_limit=None)
    with pytest.raises(ShapeError, match="mine gives reconstructions of another shape"):
        evaluator.score(wrong, "mine")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_reconstruction(tokenizer: Any, value: float) -> None:
    evaluator = SpliceEvaluator(MODELS["gpt-2"](tokenizer), POST, random_tokens(), norm_limit=None)

    def broken(x_ND: Tensor) -> Tensor:
        x_ND[3, 2] = value
        return x_ND

    with pytest.raises(EvaluationError, match=r"mine gives 1 of 54 reconstructions with NaN"):
        evaluator.score(broken, "mine")
    assert evaluator.score(lambda x: x).nats_lost == pytest.approx(0, abs=SPLICED_LOSS)


def test_a_reconstruction_that_the_model_overflows_on(tokenizer: Any) -> None:
    evaluator = SpliceEvaluator(MODELS["no norm, no MLP"](tokenizer), POST, random_tokens(), norm_limit=None)
    with pytest.raises(EvaluationError, match=r"mine gives .* predictions that are NaN or infinite"):
        evaluator.score(lambda x: torch.full_like(x, 3e38), "mine")


def test_nan_in_the_model(tokenizer: Any) -> None:
    model = MODELS["gpt-2"](tokenizer)
    with torch.no_grad():
        model.blocks[0].mlp.W_out.fill_(float("nan"))
    with pytest.raises(ActivationError, match="NaN or infinity"):
        SpliceEvaluator(model, POST, random_tokens(), norm_limit=None)
    with pytest.raises(EvaluationError, match="the model as it is gives"):
        SpliceEvaluator(model, "hook_embed", random_tokens(), norm_limit=None)
