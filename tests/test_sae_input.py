"""What the SAE takes: shapes, dtypes, and arguments as Python users write them; the rest is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from ksvd_sae.errors import ActivationError, ConfigError, InputTypeError, ShapeError
from ksvd_sae.sae import DBKSVDSAE, DBKSVDSAEConfig, sae_from_dictionary
from tests.strategies import generator, shown
from tests.tiny_saes import D_MODEL, HOOK, MODEL_NAME, tiny_db_ksvd_sae, tiny_dictionary, tiny_sae_of
from tests.tolerances import BFLOAT16, SAE_CODE

M = 24
HOOK_Z = "blocks.0.attn.hook_z"
views = pytest.mark.parametrize("view", ["signed", "split"])


def samples(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, D_MODEL, generator=generator(7)) + 1


def sae_at(hook_name: str = HOOK, **options: Any) -> DBKSVDSAE:
    return sae_from_dictionary(tiny_dictionary(), model_name=MODEL_NAME, hook_name=hook_name, **options)


class TestActivations:
    @pytest.mark.parametrize(
        ("x", "words"),
        [
            (samples(2, 5)[..., :1], r"got: \(2, 5, 1\).*limit: \(\.\.\., 16\)"),
            (torch.tensor(1.0), r"got: \(\).*limit: \(\.\.\., 16\)"),
            (samples(2)[:, :15], r"got: \(2, 15\).*another model or hook"),
            (samples(2, 5).reshape(2, 5, 4, 4), r"got: \(2, 5, 4, 4\).*not flattened.*cure: x\.flatten\(-2\)"),
            (samples(2).numpy(), r"ndarray \(2, 16\).*limit: a tensor.*cure"),
            ([1.0] * 16, r"list.*limit: a tensor"),
            (samples(2).to(torch.complex64), r"complex64.*real numbers"),
            (samples(2).to_sparse(), r"sparse.*dense"),
        ],
        ids=["one wide", "scalar", "narrow", "heads", "array", "list", "complex", "sparse"],
    )
    @pytest.mark.parametrize("method", ["encode", "forward", "process_sae_in"])
    @views
    def test_of_another_shape(self, x: Any, words: str, method: str, view: Any) -> None:
        with pytest.raises(ShapeError, match=f"(?s)activations do not fit the SAE.*{words}"):
            getattr(tiny_db_ksvd_sae(view=view), method)(x)

    def test_whole_numbers_are_numbers(self) -> None:
        x = torch.arange(3 * D_MODEL).reshape(3, D_MODEL)
        assert torch.equal(tiny_db_ksvd_sae().encode(x), tiny_db_ksvd_sae().encode(x.float()))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value: float) -> None:
        x = samples(2, 3)
        x[1, 2, 5] = value
        with pytest.raises(ActivationError, match=r"(?s)1 of 6 samples.*row 5"):
            tiny_db_ksvd_sae().encode(x)

    def test_heads(self) -> None:
        sae, x = sae_at(HOOK_Z), samples(2, 5)
        for wrong in (x.reshape(2, 5, 2, 8)[..., :7], torch.tensor(1.0), x[0, 0, :8]):
            with pytest.raises(ShapeError, match=r"limit: \(\.\.\., 16\) or \(\.\.\., heads, d_head\)"):
                sae.encode(wrong)
        flat = sae_at()
        for rows in (x, x[0, 0], x[:, :, None], x[:1, :1]):
            assert torch.equal(sae.encode(rows), flat.encode(rows)), "flattened already, or one head"
            assert torch.equal(sae(rows), flat(rows))
        for d_head in (4, 8):
            heads = x.reshape(2, 5, -1, d_head)
            assert torch.equal(sae.encode(heads), flat.encode(x))
            assert torch.equal(sae(heads), flat(x).reshape(heads.shape)), "each time of the width that came in"

    def test_heads_that_no_one_has_seen(self) -> None:
        sae = sae_at(HOOK_Z)
        with pytest.raises(ShapeError, match=r"(?s)how wide a head is.*cure: encode first"):
            sae.decode(torch.ones(3, M))
        sae.turn_off_forward_pass_hook_z_reshaping()
        assert sae.decode(torch.ones(3, M)).shape == (3, D_MODEL)


class TestLatents:
    @pytest.mark.parametrize(
        ("acts", "words"),
        [
            (torch.ones(3, 1), r"got: \(3, 1\)"),
            (torch.tensor(1.0), r"got: \(\)"),
            (torch.ones(3, M - 1), r"got: \(3, 23\).*latents of another SAE"),
            (torch.ones(M, 3), r"got: \(24, 3\)"),
            (np.ones((3, M)), r"ndarray.*limit: a tensor"),
        ],
        ids=["one wide", "scalar", "narrow", "turned", "array"],
    )
    @views
    def test_of_another_shape(self, acts: Any, words: str, view: Any) -> None:
        with pytest.raises(ShapeError, match=f"(?s)latents do not fit the SAE.*{words}"):
            tiny_db_ksvd_sae(view=view).decode(acts)

    def test_a_signed_code_in_the_split_view(self) -> None:
        signed, split, x = tiny_db_ksvd_sae(), tiny_db_ksvd_sae(view="split"), samples(2, 5)
        f = signed.encode(x)
        cure = r"cure: torch\.cat\(\[f\.relu\(\), \(-f\)\.relu\(\)\], dim=-1\)"
        with pytest.raises(ShapeError, match=rf"(?s)limit: \(\.\.\., 48\).*a code with signs.*{cure}"):
            split.decode(f)
        assert torch.equal(split.decode(torch.cat([f.relu(), (-f).relu()], dim=-1)), signed.decode(f))
        with pytest.raises(ShapeError, match=r"(?s)got: \(2, 5, 48\).*limit: \(\.\.\., 24\)"):
            signed.decode(split.encode(x))


CASTS: dict[str, torch.dtype] = {
    "half": torch.float16,
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
}


class TestDtypes:
    @pytest.mark.parametrize("cast", CASTS)
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
    @views
    def test_casts_are_what_to_is(self, cast: str, x_dtype: torch.dtype, view: Any) -> None:
        dtype, x = CASTS[cast], samples(2, 5).to(x_dtype)
        sae, same = getattr(tiny_db_ksvd_sae(view=view), cast)(), tiny_db_ksvd_sae(view=view).to(dtype=dtype)
        assert sae.dtype == sae.W_dec.dtype == dtype
        assert sae.cfg.dtype == same.cfg.dtype == str(dtype).removeprefix("torch.")
        acts = sae.encode(x)
        assert acts.dtype == sae(x).dtype == dtype
        assert torch.equal(acts, same.encode(x))
        assert torch.equal(sae(x), same(x))
        # A near tie may give another atom, so it is the error that stays, not the code.
        rebuilt = [one(x).detach().double() for one in (sae, tiny_db_ksvd_sae())]
        errors = [float((each - x.double()).norm() / x.double().norm()) for each in rebuilt]
        assert errors[0] == pytest.approx(errors[1], abs=SAE_CODE if torch.finfo(dtype).bits >= 32 else BFLOAT16)

    @pytest.mark.parametrize("cast", CASTS)
    def test_latents_of_another_dtype(self, cast: str) -> None:
        sae, acts = getattr(tiny_db_ksvd_sae(), cast)(), tiny_db_ksvd_sae().encode(samples(4))
        assert torch.equal(sae.decode(acts), sae.decode(acts.to(CASTS[cast])))
        assert sae.decode(acts).dtype == CASTS[cast]

    @pytest.mark.parametrize("cast", ["half", "double"])
    def test_are_saved_and_loaded(self, cast: str, tmp_path: Path) -> None:
        sae = getattr(tiny_db_ksvd_sae(), cast)()
        sae.save_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert loaded.dtype == loaded.W_dec.dtype == CASTS[cast]
        assert loaded.cfg == sae.cfg
        assert torch.equal(loaded.encode(samples(5)), sae.encode(samples(5)))

    def test_by_type(self) -> None:
        sae = tiny_db_ksvd_sae().type(torch.float64)
        assert (sae.dtype, sae.cfg.dtype) == (torch.float64, "float64")

    def test_autocast_changes_no_code(self) -> None:
        sae, x = tiny_db_ksvd_sae("omp"), samples(20)
        wanted = sae.encode(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(tiny_db_ksvd_sae("omp").encode(x), wanted)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_the_default_dtype_changes_no_bit(self, dtype: torch.dtype) -> None:
        x, dictionary = samples(20), tiny_dictionary()
        wanted = tiny_sae_of(dictionary)(x)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(tiny_sae_of(dictionary)(x), wanted)
        finally:
            torch.set_default_dtype(before)


class TestArguments:
    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=shown)
    def test_of_other_libraries(self, dtype: Any, tmp_path: Path) -> None:
        sae = sae_at(
            device=torch.device("cpu"), dtype=dtype, context_size=np.int64(9), loss=np.float32(0.5), layers=np.arange(2)
        )
        assert (sae.cfg.device, sae.cfg.dtype, sae.cfg.metadata.context_size) == ("cpu", "bfloat16", 9)
        sae.save_model(str(tmp_path))
        metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
        assert (metadata["loss"], metadata["layers"], metadata["context_size"]) == (0.5, [0, 1], 9)
        assert SAE.load_from_disk(str(tmp_path)).cfg == sae.cfg

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"loss": float("nan")}, ShapeError, "loss is nan"),
            ({"scores": {"core": np.float64("inf")}}, ShapeError, r"scores\.core is inf"),
            ({"model": object()}, InputTypeError, "model cannot be stored"),
            ({"context_size": "128"}, InputTypeError, "context_size must be a whole number"),
            ({"hook_name": 3}, InputTypeError, "hook_name must be text"),
            ({"dtype": "int8"}, ConfigError, "no dtype for a SAE"),
            ({"dtype": torch.int64}, ConfigError, "no dtype for a SAE"),
            ({"device": "gpu"}, ConfigError, "no device of this name"),
            ({"device": "mps"}, ConfigError, "torch sees none"),
        ],
        ids=shown,
    )
    def test_refused(self, options: dict[str, Any], error: type[Exception], words: str) -> None:
        if options.get("device") == "mps" and torch.backends.mps.is_available():
            return
        with pytest.raises(error, match=words):
            sae_at(**{"hook_name": HOOK, **options})

    def test_no_dictionary(self) -> None:
        with pytest.raises(
            InputTypeError, match=r"(?s)no Dictionary.*got: DoubleBatch.*cure: Dictionary\.from_estimator"
        ):
            sae_from_dictionary(type("DoubleBatch", (), {})(), model_name=MODEL_NAME, hook_name=HOOK)

    def test_metadata_that_was_added_later(self, tmp_path: Path) -> None:
        sae = sae_at()
        sae.cfg.metadata.loss = float("nan")
        with pytest.raises(ShapeError, match=r"(?s)save_model: metadata\.loss is nan.*cure"):
            sae.save_model(tmp_path / "saved")
        assert not (tmp_path / "saved").exists(), "not half of it"
        sae.cfg.metadata.loss = np.float32(0.5)
        sae.save_model(tmp_path / "saved")
        assert SAE.load_from_disk(tmp_path / "saved").cfg.metadata.loss == 0.5

    def test_a_config_of_numpys_numbers(self, tmp_path: Path) -> None:
        numbers: dict[str, Any] = {
            "d_in": np.int64(4), "d_sae": 8.0, "k": np.int32(2), "rtol": np.float32(0.5), "max_steps": np.int64(3),
            "nonnegative": np.bool_(False), "split": np.bool_(False), "groups": np.array([3, 5]),
            "dtype": torch.float32, "device": torch.device("cpu"),
        }  # fmt: skip
        cfg = DBKSVDSAEConfig(**numbers)
        assert cfg == DBKSVDSAEConfig(d_in=4, d_sae=8, k=2, rtol=0.5, max_steps=3, groups=[3, 5])
        DBKSVDSAE(cfg).save_model(tmp_path)
        assert SAE.load_from_disk(tmp_path).cfg == cfg

    @pytest.mark.parametrize("number", ["2", 2.5, True, None], ids=shown)
    def test_a_config_of_other_things(self, number: Any) -> None:
        with pytest.raises(InputTypeError, match="must be a whole number"):
            DBKSVDSAEConfig(d_in=4, d_sae=8, k=number)
        with pytest.raises(InputTypeError, match="must be a whole number"):
            DBKSVDSAEConfig(d_in=number, d_sae=8, k=2)
