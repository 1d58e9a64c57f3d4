"""What a context longer than the texts does to SAEBench's SCR: the reason why short texts get short contexts."""

import torch
from sae_bench.evals.scr_and_tpp.main import ablated_precomputed_activations
from torch import Tensor

from ksvd_sae.sae import DBKSVDSAE
from tests.strategies import generator
from tests.tiny_saes import D_MODEL, identity_sae, tiny_db_ksvd_sae

TEXTS, TOKENS, PADDING = 3, 5, 12


def means(sae: DBKSVDSAE, ablated: int, padding: int) -> Tensor:
    """What SAEBench gives its probes, of the same texts, after the ablation of one latent."""
    x_BLD = torch.zeros(TEXTS, TOKENS + padding, D_MODEL)
    x_BLD[:, :TOKENS] = torch.randn(TEXTS, TOKENS, D_MODEL, generator=generator(0))
    with torch.no_grad():
        return ablated_precomputed_activations(x_BLD, sae, torch.arange(sae.cfg.d_sae) == ablated, TEXTS)


def test_latents_are_ablated_in_padding_too() -> None:
    """If this fails, SAEBench leaves padding out, and ``evaluation.scr.context_tokens`` may be more than texts have."""
    sae = tiny_db_ksvd_sae()
    # Padding is 0, and 0 has a code wherever there is a b_dec.
    strongest = int(sae.encode(torch.zeros(1, D_MODEL)).abs().argmax())
    texts_alone, padded = means(sae, strongest, 0), means(sae, strongest, PADDING)
    assert (padded - texts_alone).norm() > 0.5 * texts_alone.norm()


def test_not_where_padding_has_no_code() -> None:
    sae = identity_sae()
    torch.testing.assert_close(means(sae, 0, PADDING), means(sae, 0, 0))
