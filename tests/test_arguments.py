"""Numbers, switches, paths, devices and JSON as Python users write them."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksvd_sae.arguments import dtype_name, flag, json_value, number, path, whole
from ksvd_sae.device import named_device, resolve_device
from ksvd_sae.errors import ConfigError, InputTypeError, KsvdSaeError, ShapeError
from tests.strategies import shown


class TestNumbers:
    @pytest.mark.parametrize(
        "value",
        [
            4,
            np.int64(4),
            np.uint8(4),
            4.0,
            np.float32(4),
            np.float64(4),
            np.array(4),
            torch.tensor(4),
            torch.tensor(4.0),
        ],
        ids=shown,
    )
    def test_whole(self, value: Any) -> None:
        taken = whole(value, "k", "here")
        assert (taken, type(taken)) == (4, int)

    @pytest.mark.parametrize(
        "value",
        [
            True,
            np.bool_(True),
            torch.tensor(True),
            "4",
            4.5,
            float("nan"),
            float("inf"),
            None,
            [4],
            np.array([4]),
            4 + 0j,
        ],
        ids=shown,
    )
    def test_not_whole(self, value: Any) -> None:
        with pytest.raises(InputTypeError, match=r"(?s)here: k must be a whole number.*got:.*cure: k=int"):
            whole(value, "k", "here")

    @pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), Fraction(1, 2)], ids=shown)
    def test_number(self, value: Any) -> None:
        taken = number(value, "rtol", "here")
        assert (taken, type(taken)) == (0.5, float)

    @pytest.mark.parametrize("value", ["0.5", True, None, [0.5], 1j], ids=shown)
    def test_not_a_number(self, value: Any) -> None:
        with pytest.raises(InputTypeError, match=r"(?s)here: rtol must be a number.*got:.*cure"):
            number(value, "rtol", "here")

    @pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), torch.tensor(-float("inf"))], ids=shown)
    def test_not_finite(self, value: Any) -> None:
        with pytest.raises(ShapeError, match=r"(?s)here: rtol must be a finite number.*got"):
            number(value, "rtol", "here")

    @pytest.mark.parametrize("value", [True, np.bool_(True), 1, np.int8(1), np.array(True)], ids=shown)
    def test_flag(self, value: Any) -> None:
        assert flag(value, "centre", "here") is True

    @pytest.mark.parametrize("value", ["yes", 2, 1.0, None, []], ids=shown)
    def test_not_a_flag(self, value: Any) -> None:
        with pytest.raises(InputTypeError, match=r"(?s)here: centre must be True or False.*got"):
            flag(value, "centre", "here")


class TestPaths:
    @pytest.mark.parametrize("value", ["a/b", Path("a/b"), np.str_("a/b")], ids=shown)
    def test_taken(self, value: Any) -> None:
        assert path(value, "folder", "here") == Path("a/b")

    @pytest.mark.parametrize("value", [b"a/b", 3, None, "", True], ids=shown)
    def test_refused(self, value: Any) -> None:
        with pytest.raises(InputTypeError, match=r"(?s)here: folder must be a path.*got:.*limit"):
            path(value, "folder", "here")


class TestDevices:
    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"], ids=shown)
    def test_taken(self, device: Any) -> None:
        assert resolve_device(device).type == "cpu"

    @pytest.mark.parametrize("device", ["gpu", "", 0, None, "cuda:x", ["cpu"]], ids=shown)
    def test_no_device(self, device: Any) -> None:
        with pytest.raises(ConfigError, match=r"(?s)no device of this name.*got:.*limit"):
            resolve_device(device)

    @pytest.mark.parametrize("device", ["mps", torch.device("mps"), "xpu", torch.device("meta")], ids=shown)
    def test_not_one_to_learn_on(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert named_device(device).type in ("mps", "xpu", "meta")
        with pytest.raises(ConfigError, match=r"(?s)not one to learn on.*limit.*cure: use device 'cpu'"):
            resolve_device(device)

    def test_a_gpu_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert named_device("cuda:1").index == 1
        with pytest.raises(ConfigError, match=r"'cuda:2'.*sees 2 GPUs"):
            named_device("cuda:2")


@pytest.mark.parametrize("value", ["float32", torch.float32, np.float32, np.dtype("float32")], ids=shown)
def test_dtype(value: Any) -> None:
    assert dtype_name(value, "here") == "float32"


@pytest.mark.parametrize("value", ["int8", torch.int64, np.int32, "half", None, 32, float("nan")], ids=shown)
def test_no_dtype(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)here: no dtype.*got:.*float32, float64"):
        dtype_name(value, "here")


class TestJson:
    @pytest.mark.parametrize(
        ("value", "wanted"),
        [
            (np.float32(0.5), 0.5),
            (np.int64(3), 3),
            (np.bool_(True), True),
            (np.str_("a"), "a"),
            (np.arange(3), [0, 1, 2]),
            (np.array(2.5), 2.5),
            (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [1.0, 2.0]),
            (Path("a/b"), "a/b"),
            (torch.float32, "torch.float32"),
            (torch.device("cpu"), "cpu"),
            ({"a": (1, np.float64(2)), 3: None}, {"a": [1, 2.0], "3": None}),
            ({np.int64(1): [np.array([True])]}, {"1": [[True]]}),
        ],
        ids=shown,
    )
    def test_taken(self, value: Any, wanted: Any) -> None:
        taken = json_value(value, "facts", "here")
        assert taken == wanted
        assert json.loads(json.dumps(taken, allow_nan=False)) == wanted

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (float("nan"), "facts is nan"),
            ({"a": [1, np.float32("inf")]}, r"facts\.a\[1\] is inf"),
            (torch.tensor([0.0, float("nan")]), r"facts\[1\] is nan"),
            (object(), "facts cannot be stored as JSON"),
            ({"a": {1, 2}}, r"facts\.a cannot be stored"),
            (1j, "cannot be stored"),
            (np.datetime64("2020-01-01"), "cannot be stored"),
            ({(1, 2): 3}, "a key of facts is not text"),
            (lambda: 3, "cannot be stored"),
        ],
        ids=shown,
    )
    def test_refused(self, value: Any, words: str) -> None:
        with pytest.raises(ShapeError, match=f"here: .*{words}"):
            json_value(value, "facts", "here")


def test_a_refusal_is_what_python_and_we_call_it() -> None:
    with pytest.raises(KsvdSaeError) as caught:
        whole("4", "k", "here")
    assert isinstance(caught.value, TypeError | ValueError)
    assert isinstance(caught.value, TypeError)
