"""A model that TransformerLens has by no name, and only a bridge to: from the shortest YAML to SAEBench's scores."""

from pathlib import Path

import pandas as pd
import torch

from ksvd_sae.activations.shards import ActivationShards
from ksvd_sae.activations.text import contexts
from tests import tiny_models, tolerances
from tests.command_line import ksvd_sae, set_options

DB_KSVD = "{db-ksvd: {kind: db_ksvd, n_atoms: 64, k: 4, batch_samples: 1024}}"
CONFIG = f"""
model: {{name: {tiny_models.SMOLLM2}, hook: blocks.1.hook_resid_post}}
text: {{source: folder, dataset: text}}
dictionaries: {DB_KSVD}
evaluation: {{core: {{dataset: heldout}}, sparse_probing: {{datasets: [bbc-news]}}}}
"""
SMALL = {
    **{"harvest.train_tokens": "3000", "harvest.heldout_tokens": "600", "harvest.context_tokens": "32"},
    **{"evaluation.core.context_tokens": "32", "evaluation.core.batch_contexts": "4"},
    **{"evaluation.core.reconstruction_batches": "2", "evaluation.core.sparsity_batches": "2"},
    **{"evaluation.sparse_probing.train_set_size": "40", "evaluation.sparse_probing.test_set_size": "20"},
    **{"evaluation.sparse_probing.context_tokens": "32"},
}


def run(folder: Path, run_name: str, dictionaries: str = DB_KSVD, **model: str) -> pd.DataFrame:
    """The table of a run in ``folder``, which has a hf-home and some text."""
    (folder / f"{run_name}.yaml").write_text(CONFIG.replace(DB_KSVD, dictionaries))
    changes = SMALL | {f"model.{key}": value for key, value in model.items()}
    places = {"folder": folder, "hf_home": folder / "hf-home", "cache": folder / "cache"}
    done = ksvd_sae("run", f"{run_name}.yaml", *set_options(changes), **places)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(folder / "results" / run_name / "comparison.csv")


def test_from_text_to_scores(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    snapshot = tiny_models.smollm2(tmp_path / "hf-home")
    tiny_models.write_text_folder(tmp_path / "text", 150)
    table = run(tmp_path, "any")
    assert {"heldout", "core", "sparse_probing"} <= set(table["eval"])
    core = table[table["eval"] == "core"].set_index("metric")["value"]
    assert core[["ce_loss_with_sae", "ce_loss_without_sae", "ce_loss_with_ablation"]].nunique() == 3

    (manifest,) = (tmp_path / "cache" / "activations").glob("*/manifest.json")
    shards = ActivationShards.open(manifest.parent)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    n_heldout = len((shards.folder / "heldout_documents.jsonl").read_text().splitlines())
    texts = [path.read_text() for path in sorted((tmp_path / "text").iterdir())][n_heldout:]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(snapshot)
    tokens_BL = torch.stack(list(contexts(iter(texts), tokenizer, 32, prepend_bos=shards.prepend_bos)))
    with torch.no_grad():
        true_BLD = model(tokens_BL, output_hidden_states=True).hidden_states[2]
    true_ND = true_BLD[tokens_BL != tokenizer.bos_token_id][: shards.n_samples].double()
    found_ND = shards.tensor().double()
    bound = tolerances.HOOK_AGAINST_TRANSFORMERS * float(true_ND.abs().max())
    # Shuffled, so by the nearest row.
    assert float(torch.cdist(found_ND[:500], true_ND).amin(dim=1).max()) <= bound


def test_without_a_bridge(tmp_path: Path) -> None:
    """Scores that need the stream between layers alone; all others are refused by name, before anything is read."""
    tiny_models.helium(tmp_path / "hf-home")
    tiny_models.write_text_folder(tmp_path / "text", 150)
    places = {"folder": tmp_path, "hf_home": tmp_path / "hf-home", "cache": tmp_path / "cache"}
    (tmp_path / "layers.yaml").write_text(CONFIG.replace(tiny_models.SMOLLM2, tiny_models.HELIUM))
    refused = ksvd_sae("run", "layers.yaml", *set_options(SMALL), **places)
    assert refused.returncode == 1
    assert "evaluation.core cannot be had of it" in refused.stderr
    assert "heldout, loss, sparse_probing, stability, truth" in refused.stderr
    assert not list((tmp_path / "cache").rglob("*.safetensors"))

    changes = {
        **{k: v for k, v in SMALL.items() if "core" not in k},
        "evaluation.core": "null",
        "evaluation.loss": "{}",
    }
    done = ksvd_sae("run", "layers.yaml", *set_options(changes), **places)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "results" / "layers" / "comparison.csv")
    assert {"heldout", "loss", "sparse_probing"} <= set(table["eval"])
    assert table.loc[table["eval"] == "loss", "value"].notna().all()


def test_scores_are_those_of_transformer_lens_own_model(tmp_path: Path) -> None:
    """Of one folder of weights: under a name that TransformerLens knows, and under one that it does not.

    By a dictionary that small differences change by little; where one is chosen step by step, they grow.
    """
    weights = str(tiny_models.pythia_160m(tmp_path / "hf-home"))
    tiny_models.write_text_folder(tmp_path / "text", 150)
    hooked, bridge = (
        run(tmp_path, name, "{pca: {kind: pca, k: 4}}", name=model, weights=weights).set_index(["eval", "metric"])[
            "value"
        ]
        for name, model in (("hooked", tiny_models.PYTHIA), ("bridge", "my-pythia"))
    )
    scored = hooked.loc[["heldout", "core", "sparse_probing"]]
    assert len(scored) > 20
    pd.testing.assert_series_equal(bridge.loc[scored.index], scored, rtol=0, atol=tolerances.SPLICED_LOSS)
