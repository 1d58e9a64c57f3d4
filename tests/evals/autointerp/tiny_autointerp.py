"""What autointerp needs on the tiny model: settings for little text, and a dictionary whose latents are words."""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.evals.autointerp import AutoInterpEval
from ksvd_sae.evals.autointerp.run import run_autointerp
from ksvd_sae.evals.base import EvalSetting
from ksvd_sae.sae import DBKSVDSAE
from tests.evals.autointerp.endpoints import Endpoint
from tests.evals.conftest import LONG_TEXT, CountedPanel
from tests.tiny_saes import CONTEXT_TOKENS, HOOK, WORDS, tiny_db_ksvd_sae, tiny_model

CONFIG = AutoInterpEval(
    dataset=LONG_TEXT,
    n_latents=6,
    min_latents=4,
    total_tokens=2400,
    context_tokens=CONTEXT_TOKENS,
    llm_batch_contexts=64,
    buffer=2,
    dead_latent_threshold=5,
    n_top_ex_for_generation=4,
    n_iw_sampled_ex_for_generation=2,
    n_random_ex_for_scoring=6,
)


def changed(**change: Any) -> AutoInterpEval:
    return AutoInterpEval(**{**CONFIG.model_dump(), **change})


def asking(endpoint: Endpoint, **change: Any) -> AutoInterpEval:
    """CONFIG with an endpoint for a judge: two tries, and a price."""
    own = {"model": "m", "base_url": endpoint.url, "key_variable": "JUDGE_KEY", "max_retries": 1}
    return changed(judge="endpoint", endpoint={**own, "input_price": 2.0, "output_price": 8.0, **change})


def run_on(
    counted: CountedPanel, setting: EvalSetting, output: Path, config: AutoInterpEval = CONFIG
) -> dict[str, Path]:
    return run_autointerp(counted.panelists(), config, setting, output).files


class WordSAE(DBKSVDSAE):
    """A latent a word: active exactly where the token is nearest to the word's mean activation."""

    shuffled = False

    def encode(self, x: Tensor) -> Tensor:
        flat_BD = x.reshape(-1, x.shape[-1])
        nearest_B = torch.cdist(flat_BD, self.W_enc.T).argmin(dim=1)
        if self.shuffled:
            nearest_B = nearest_B[torch.randperm(len(nearest_B), generator=torch.Generator().manual_seed(0))]
        codes_BM = torch.nn.functional.one_hot(nearest_B, self.cfg.d_sae).to(x.dtype)
        # Different strengths, so that some are top examples and others are drawn.
        strengths_B = 1 + torch.arange(len(flat_BD)) % 7
        return (codes_BM * strengths_B[:, None]).reshape(*x.shape[:-1], self.cfg.d_sae)


class ShuffledSAE(WordSAE):
    """As often and as strongly active as WordSAE, at other tokens."""

    shuffled = True


@lru_cache(maxsize=1)
def _word_means() -> Tensor:
    """Mean activation of each word at HOOK, as columns."""
    model, draw = tiny_model(), random.Random(2)
    tokens = model.to_tokens([" ".join(draw.choices(WORDS, k=CONTEXT_TOKENS - 1)) for _ in range(60)])
    acts = model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    return torch.stack([acts[tokens == model.to_single_token(word)].mean(dim=0) for word in WORDS], dim=1)


def word_sae(kind: type[WordSAE] = WordSAE) -> WordSAE:
    sae = kind(tiny_db_ksvd_sae(n_atoms=len(WORDS)).cfg)
    with torch.no_grad():
        sae.W_enc.copy_(_word_means())
    return sae
