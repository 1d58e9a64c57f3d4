"""Autointerp's part of a config: SAEBench's own defaults, limits that are told beforehand, and no key in a file."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig

from ksvd_sae.errors import ConfigError
from ksvd_sae.evals.autointerp import AutoInterpEval
from ksvd_sae.run.config import dump_config, load_config, parse_config

KEY = "sk-Secret_4711"
RAW: dict[str, Any] = {
    "name": "small",
    "model": {"name": "some/model", "hook": "blocks.3.hook_resid_post"},
    "text": {"source": "folder", "dataset": "texts"},
    "harvest": {"train_tokens": 4096, "heldout_tokens": 512},
    "dictionaries": {"random": {"kind": "random", "n_atoms": 256, "k": 8}},
}
ENDPOINT = {"model": "m", "base_url": "http://127.0.0.1:8000/v1"}


def run_of(autointerp: dict[str, Any]) -> Any:
    return parse_config({**RAW, "evaluation": {"autointerp": autointerp}}, "run.yaml")


def test_defaults_are_saebenchs() -> None:
    ours, theirs = AutoInterpEval(), AutoInterpEvalConfig()
    names = {
        "dataset": "dataset_name",
        "context_tokens": "llm_context_size",
        "seed": "random_seed",
    }
    own = {"judge", "endpoint", "min_latents", "llm_batch_contexts"}
    compared = set(AutoInterpEval.model_fields) - own
    assert len(compared) > 10
    for name in compared:
        assert getattr(ours, name) == getattr(theirs, names.get(name, name)), name
    assert ours.judge == "lexical"


def test_is_left_out_unless_asked_for() -> None:
    assert parse_config(RAW).evaluation.autointerp is None


def test_round_trip(tmp_path: Path) -> None:
    run = run_of({"judge": "endpoint", "endpoint": ENDPOINT, "n_latents": 50})
    path = tmp_path / "copy.yaml"
    path.write_text(dump_config(run))
    assert load_config(path) == run
    assert run.evaluation.autointerp.least_latents == 5


SECRETS = {
    "api_key": {"endpoint": {**ENDPOINT, "api_key": KEY}},
    "key": {"endpoint": {**ENDPOINT, "key": KEY}},
    "OPENAI_API_KEY": {"endpoint": {**ENDPOINT, "OPENAI_API_KEY": KEY}},
    "authorization": {"endpoint": {**ENDPOINT, "authorization": f"Bearer {KEY}"}},
    "beside the endpoint": {"api-key": KEY},
    "in place of its variable's name": {"endpoint": {**ENDPOINT, "key_variable": KEY}},
    "in the URL": {"endpoint": {**ENDPOINT, "base_url": f"https://me:{KEY}@host/v1"}},
    "in the query": {"endpoint": {**ENDPOINT, "base_url": f"https://host/v1?key={KEY}"}},
    "in what is no URL": {"endpoint": {**ENDPOINT, "base_url": f"https://[{KEY}"}},
}


@pytest.mark.parametrize("autointerp", SECRETS.values(), ids=SECRETS)
def test_a_key_in_the_config_is_refused_and_not_shown(autointerp: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of({"judge": "endpoint", **autointerp})
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert "environment" in str(caught.value)


def test_a_key_in_set_is_refused_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(RAW))
    with pytest.raises(ConfigError, match="environment") as caught:
        load_config(tmp_path / "a.yaml", [f"evaluation.autointerp.endpoint.api_key={KEY}"])
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("autointerp", "said"),
    [
        ({"judge": "endpoint"}, "needs an `endpoint`"),
        ({"judge": "someone"}, "lexical"),
        ({"n_latents": 20, "min_latents": 21}, "min_latents is more"),
        ({"buffer": 64}, "buffer"),
        ({"total_tokens": 1000}, "the top examples alone need 1536"),
        ({"total_tokens": 2**24 + 1}, "less than or equal to 16777216"),
        ({"endpoint": {**ENDPOINT, "input_price": 1.0}}, "belong together"),
        ({"endpoint": {**ENDPOINT, "requests_per_minute": 0}}, "requests_per_minute"),
        ({"scoring": False}, "unknown key 'evaluation.autointerp.scoring'"),
        ({"total_token": 5000}, "did you mean 'evaluation.autointerp.total_tokens'"),
        ({"endpoint": {**ENDPOINT, "timeout": 5}}, "did you mean 'evaluation.autointerp.endpoint.timeout_s'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_told_beforehand(autointerp: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(autointerp)
    assert said in str(caught.value)
    assert "run.yaml" in str(caught.value)
