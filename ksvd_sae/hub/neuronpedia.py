"""Atoms in context as SAEDashboard writes them for Neuronpedia: batch-0.json, which Neuronpedia's converter reads.

Neuronpedia counts positive activations only, so signed codes are given as the split view has them: an atom is two
latents, its negative part the one with the opposite row, whose logits are those of the atom with the other sign. What
atoms in context do not know (correlated latents and neurons, the histogram of all logits) is left empty. The format was
read from sae_dashboard/neuronpedia/neuronpedia_export.py of SAEDashboard.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ksvd_sae.activations.language import hook_layer
from ksvd_sae.hub.source import NONNEGATIVE

NAME = "batch-0.json"
_UNKNOWN = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)


def dashboards(
    found: Mapping[str, Any], model: str, hook: str, name: str, view: str, dataset: str
) -> dict[str, Any] | None:
    """One batch of dashboards.

    Args:
        found: atoms in context, as ``ksvd_sae.evals.atoms.examples`` writes them.
        name: of the dictionary. view: whose latents are meant. dataset: of the text that was read.
    Returns: None where Neuronpedia has no place for it: signed latents, or a hook that is in no layer.
    """
    layer = hook_layer(hook)
    if layer is None or view not in ("split", NONNEGATIVE):
        return None
    return {
        "model_id": model.rpartition("/")[2],
        "layer": layer,
        "sae_set": f"{name}-{view}",
        "features": [feature for atom in found["atoms"] for feature in _features(atom, found, dataset)],
    }


def _features(atom: Mapping[str, Any], found: Mapping[str, Any], dataset: str) -> Iterator[dict[str, Any]]:
    """The latents of an atom that fire on the text."""
    for side, sign, first in (("positive", 1, 0), ("negative", -1, found["n_atoms"])):
        if not atom.get(side):
            continue
        counts = atom["histogram"][side]["counts"]
        lens = atom["logit_lens"] or {"raised": [], "lowered": [], "raised_logits": [], "lowered_logits": []}
        ends = ("raised", "lowered") if sign == 1 else ("lowered", "raised")
        (pos, pos_logits), (neg, neg_logits) = ((lens[end], lens[f"{end}_logits"]) for end in ends)
        yield {
            "feature_index": first + atom["atom"],
            **{key: [] for key in _UNKNOWN},
            "pos_str": pos,
            "pos_values": [sign * value for value in pos_logits],
            "neg_str": neg,
            "neg_values": [sign * value for value in neg_logits],
            "frac_nonzero": sum(counts) / found["n_tokens"],
            "freq_hist_data_bar_values": atom["histogram"][side]["centres"],
            "freq_hist_data_bar_heights": counts,
            "n_prompts_total": found["n_contexts"],
            "n_tokens_in_prompt": found["context_tokens"],
            "dataset": dataset,
            "activations": [_activation(example, sign) for example in atom[side]],
        }


def _activation(example: Mapping[str, Any], sign: int) -> dict[str, Any]:
    values = [max(0.0, sign * value) for value in example["activations"]]
    peak = example["peak"]
    # -1: of the strongest, in SAEDashboard's manner, and in no interval.
    return {
        "tokens": example["tokens"],
        "values": values,
        "qualifying_token_index": peak,
        "bin_min": -1,
        "bin_max": values[peak],
        "bin_contains": -1,
    }
