"""A run that is stopped and resumed ends with the bits of one that was not."""

import json
import logging
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ksvd_sae.errors import ActivationError, ManifestError, ShapeError
from ksvd_sae.learning.dbksvd import BatchLog, DictionaryLearner
from ksvd_sae.learning.weighting import weighting_by_std
from tests.learners import learner
from tests.strategies import generator, planted

X_ND = planted(600, 12, 20, 3, noise=0.1).x_BD + 0.5
BATCHES = 4  # of 150, a pass
PASSES = 3


class StopError(Exception):
    pass


def stop_after(n_batches: int) -> Callable[[BatchLog], None]:
    def on_batch(line: BatchLog) -> None:
        if line.batch + 1 == n_batches:
            raise StopError

    return on_batch


def learner_in(folder: Path, **options: Any) -> DictionaryLearner:
    defaults: dict[str, Any] = {
        "passes": PASSES,
        "batch_samples": 150,
        "seed": 3,
        "checkpoint_path": folder / "run" / "training.safetensors",
        "checkpoint_every": 1,
        "log_path": folder / "run" / "train.jsonl",
    }
    return learner(20, 3, **{**defaults, **options})


def lines(ksvd: DictionaryLearner) -> list[dict[str, Any]]:
    """The log in memory, which must be the one on disk, without the times."""
    assert ksvd.log_path is not None
    on_disk = [json.loads(line) for line in ksvd.log_path.read_text().splitlines()]
    assert on_disk == [asdict(line) for line in ksvd.log]
    return [{**line, "seconds": 0} for line in on_disk]


class Source:
    """The samples as a source that gives its own order, as shards do."""

    n_samples, d_in = X_ND.shape
    centre_D = X_ND.double().mean(dim=0)

    def batches(self, batch_samples: int, *, seed: int | None = None) -> Iterator[Tensor]:
        order = torch.arange(600) if seed is None else torch.randperm(600, generator=generator(seed + 99))
        for start in range(0, 600, batch_samples):
            yield X_ND[order[start : start + batch_samples]]


def stream() -> Iterator[Tensor]:
    return iter(X_ND.split([200, 150, 100, 150]))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"update": "exact", "atom_batch": 4},
    "matryoshka": {"groups": [8, 12], "coder": "matryoshka"},
    "weighted, non-negative": {"weighting": weighting_by_std(X_ND.var(dim=0)), "nonnegative": True},
    # Draws from the generator in every batch.
    "redrawn": {"duplicate_cosine": 0.5},
}


class TestResumed:
    @pytest.mark.parametrize("stopped_after", [1, 3, 4, 6, 11])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
    def test_is_uninterrupted(self, tmp_path: Path, options: dict[str, Any], stopped_after: int) -> None:
        """StopError in the first pass, at its end, in a later one and before the last batch."""
        whole = learner_in(tmp_path / "whole", **options).fit(X_ND)
        with pytest.raises(StopError):
            learner_in(tmp_path / "part", on_batch=stop_after(stopped_after), **options).fit(X_ND)
        resumed = learner_in(tmp_path / "part", **options).fit(X_ND, resume=True)
        assert torch.equal(resumed.atoms_MD, whole.atoms_MD)
        assert torch.equal(resumed.centre_D, whole.centre_D)
        assert lines(resumed) == lines(whole)
        assert resumed.samples_seen == whole.samples_seen == PASSES * 600
        if options == OPTIONS["redrawn"]:
            assert sum(line.redrawn for line in whole.log[stopped_after:]) > 0, "the generator's state must matter"

    @pytest.mark.parametrize("samples", [Source(), stream], ids=["source", "stream"])
    @pytest.mark.parametrize("stopped_after", [2, 5])
    def test_from_other_sources(self, tmp_path: Path, samples: Any, stopped_after: int) -> None:
        whole = learner_in(tmp_path / "whole").fit(samples)
        with pytest.raises(StopError):
            learner_in(tmp_path / "part", on_batch=stop_after(stopped_after)).fit(samples)
        resumed = learner_in(tmp_path / "part").fit(samples, resume=True)
        assert torch.equal(resumed.atoms_MD, whole.atoms_MD)
        assert lines(resumed) == lines(whole)

    @pytest.mark.parametrize(("every", "stopped_after"), [(3, 5), (3, 8), (None, 7), (5, 2)])
    def test_batches_after_the_last_checkpoint_are_learned_again(
        self, tmp_path: Path, every: int | None, stopped_after: int
    ) -> None:
        whole = learner_in(tmp_path / "whole").fit(X_ND)
        with pytest.raises(StopError):
            learner_in(tmp_path / "part", checkpoint_every=every, on_batch=stop_after(stopped_after)).fit(X_ND)
        assert len((tmp_path / "part" / "run" / "train.jsonl").read_text().splitlines()) == stopped_after
        learned: list[BatchLog] = []
        # How often it is written may change: it is no part of the result.
        resumed = learner_in(tmp_path / "part", on_batch=learned.append).fit(X_ND, resume=True)
        checkpointed = stopped_after // (every or BATCHES) * (every or BATCHES)
        assert [line.batch for line in learned] == list(range(checkpointed, PASSES * BATCHES))
        assert torch.equal(resumed.atoms_MD, whole.atoms_MD)
        assert lines(resumed) == lines(whole)

    def test_twice(self, tmp_path: Path) -> None:
        whole = learner_in(tmp_path / "whole").fit(X_ND)
        for stopped_after in (3, 7):
            with pytest.raises(StopError):
                learner_in(tmp_path / "part", on_batch=stop_after(stopped_after)).fit(X_ND, resume=True)
        resumed = learner_in(tmp_path / "part").fit(X_ND, resume=True)
        assert torch.equal(resumed.atoms_MD, whole.atoms_MD)
        assert lines(resumed) == lines(whole)

    def test_after_an_error_in_the_samples(self, tmp_path: Path) -> None:
        """A shard that turns out to be broken, and is mended."""

        def broken() -> Iterator[Tensor]:
            yield from stream()
            yield X_ND[:150] * float("nan")

        with pytest.raises(ActivationError):
            learner_in(tmp_path, passes=1).fit(broken)
        resumed = learner_in(tmp_path, passes=1).fit(lambda: iter([*stream(), X_ND[:150]]), resume=True)
        assert [line.batch for line in resumed.log] == [0, 1, 2, 3, 4]

    def test_more_passes_than_at_first(self, tmp_path: Path) -> None:
        whole = learner_in(tmp_path / "whole").fit(X_ND)
        with pytest.raises(StopError):
            learner_in(tmp_path / "part", passes=2, on_batch=stop_after(7)).fit(X_ND)
        resumed = learner_in(tmp_path / "part").fit(X_ND, resume=True)
        assert torch.equal(resumed.atoms_MD, whole.atoms_MD)

    def test_nothing_to_resume_is_a_start(self, tmp_path: Path) -> None:
        assert torch.equal(
            learner_in(tmp_path / "a").fit(X_ND, resume=True).atoms_MD, learner_in(tmp_path / "b").fit(X_ND).atoms_MD
        )

    def test_another_number_of_threads_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(2)).fit(X_ND)
        torch.set_num_threads(2)  # the fixture of these tests puts it back
        with caplog.at_level(logging.WARNING, "ksvd_sae"):
            learner_in(tmp_path).fit(X_ND, resume=True)
        assert "1 threads on cpu, going on with 2 on cpu" in caplog.text


class TestTheFile:
    def test_is_gone_after_the_end(self, tmp_path: Path) -> None:
        learner_in(tmp_path).fit(X_ND)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["train.jsonl"]

    def test_paths_may_be_words(self, tmp_path: Path) -> None:
        paths = {"checkpoint_path": str(tmp_path / "a" / "c"), "log_path": str(tmp_path / "a" / "l")}
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(2), **paths).fit(X_ND)
        resumed = learner_in(tmp_path, **paths).fit(X_ND, resume=True)
        assert len((tmp_path / "a" / "l").read_text().splitlines()) == len(resumed.log) == PASSES * BATCHES

    def test_holds_tensors_and_json(self, tmp_path: Path) -> None:
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(2)).fit(X_ND)
        with safe_open(tmp_path / "run" / "training.safetensors", framework="pt") as file:
            assert {"atoms", "centre", "generator"} <= set(file.keys())
            facts = json.loads(file.metadata()["training"])
        assert (facts["pass_index"], facts["batches_done"], facts["samples_seen"]) == (0, 2, 300)
        assert facts["fingerprint"]["arguments"]["n_atoms"] == 20
        assert facts["threads"] == 1

    def test_a_fit_that_does_not_resume_starts_afresh(self, tmp_path: Path) -> None:
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(5)).fit(X_ND)
        again = learner_in(tmp_path).fit(X_ND)
        assert len(again.log) == PASSES * BATCHES
        assert len(lines(again)) == PASSES * BATCHES

    def test_is_never_half_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """StopError while writing the third: the second is still there, and nothing else."""
        from ksvd_sae.learning import checkpoint

        whole = learner_in(tmp_path / "whole").fit(X_ND)
        save_file, calls = checkpoint.save_file, 0

        def failing(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                path.write_bytes(b"half a fi")
                raise StopError
            save_file(tensors, path, metadata=metadata)

        monkeypatch.setattr(checkpoint, "save_file", failing)
        with pytest.raises(StopError):
            learner_in(tmp_path / "part").fit(X_ND)
        names = sorted(path.name for path in (tmp_path / "part" / "run").iterdir())
        assert names == ["train.jsonl", "training.safetensors"]
        resumed = learner_in(tmp_path / "part").fit(X_ND, resume=True)
        assert [line.batch for line in resumed.log] == list(range(PASSES * BATCHES))
        assert torch.equal(resumed.atoms_MD, whole.atoms_MD)


class TestRefused:
    @pytest.fixture
    def stopped(self, tmp_path: Path) -> Path:
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(5)).fit(X_ND)
        return tmp_path

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"seed": 4}, r"arguments\.seed: found 3, wanted 4"),
            ({"rtol": 0.1}, r"arguments\.rtol: found 0\.0, wanted 0\.1"),
            ({"groups": (8, 12)}, r"arguments\.groups: found None, wanted \[8, 12\]"),
            ({"batch_samples": 100}, r"arguments\.batch_samples"),
            (
                {"weighting": weighting_by_std(X_ND.var(dim=0))},
                r"arguments\.weighting: found None, wanted '[0-9a-f]{12}'",
            ),
        ],
        ids=["seed", "rtol", "groups", "batch_samples", "weighting"],
    )
    def test_other_arguments(self, stopped: Path, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ManifestError, match=r"(?s)from another run.*" + words + ".*cause.*cure"):
            learner_in(stopped, **options).fit(X_ND, resume=True)
        learner_in(stopped).fit(X_ND, resume=True)  # the refusal has left the checkpoint alone

    @pytest.mark.parametrize(
        ("samples", "words"),
        [
            (X_ND + 0.01, r"samples\.centre"),
            (X_ND[:599], r"samples\.centre.*samples\.n_samples: found 600, wanted 599"),
            (stream, r"samples\.stream: found None, wanted True"),
        ],
        ids=["moved", "fewer", "stream"],
    )
    def test_other_samples(self, stopped: Path, samples: Any, words: str) -> None:
        with pytest.raises(ManifestError, match=r"(?s)from another run.*" + words):
            learner_in(stopped).fit(samples, resume=True)

    def test_another_order_of_the_same_samples(self, tmp_path: Path) -> None:
        """Kept on the device, a source that does not tell its order is shuffled in another way."""
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(4)).fit(Source())
        with pytest.raises(ManifestError, match=r"samples\.shuffled_here: found False, wanted True"):
            learner_in(tmp_path, keep_on_device=True).fit(Source(), resume=True)

    @pytest.mark.parametrize("stopped_after", [2, 5])
    def test_a_stream_that_does_not_repeat_itself(self, tmp_path: Path, stopped_after: int) -> None:
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(stopped_after)).fit(stream)
        with pytest.raises(ManifestError, match=rf"(?s)samples of pass {stopped_after // 4} do not begin.*cause.*cure"):
            learner_in(tmp_path).fit(lambda: iter(X_ND.flip(0).split(150)), resume=True)

    @pytest.mark.parametrize(
        "content", [b"", b"no checkpoint", b"\x08\0\0\0\0\0\0\0{}      "], ids=["empty", "text", "safetensors"]
    )
    def test_no_checkpoint(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "run" / "training.safetensors"
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=r"(?s)resuming from .*training\.safetensors.*cause.*cure"):
            learner_in(tmp_path).fit(X_ND, resume=True)
        assert path.read_bytes() == content

    def test_without_a_path(self, tmp_path: Path) -> None:
        with pytest.raises(ShapeError, match="resume needs a checkpoint_path"):
            learner_in(tmp_path, checkpoint_path=None, checkpoint_every=None).fit(X_ND, resume=True)

    @pytest.mark.parametrize("options", [{"checkpoint_path": None}, {"checkpoint_every": 0}], ids=str)
    def test_arguments_that_do_not_fit(self, tmp_path: Path, options: dict[str, Any]) -> None:
        with pytest.raises(ShapeError, match="checkpoint_every"):
            learner_in(tmp_path, **options).fit(X_ND)


class TestStreams:
    """What a stream's training knows beside its atoms goes on, too."""

    BATCHES = (X_ND[:1], *X_ND.split(150), X_ND[:1])

    @pytest.mark.parametrize("n_batches", [1, 3, 4, 6])
    def test_batches_that_told_nothing_are_counted_once(self, tmp_path: Path, n_batches: int) -> None:
        whole = learner_in(tmp_path / "whole", passes=2).fit(lambda: iter(self.BATCHES))
        stopped = learner_in(tmp_path, passes=2, on_batch=stop_after(n_batches))
        with pytest.raises(StopError):
            stopped.fit(lambda: iter(self.BATCHES))
        resumed = learner_in(tmp_path, passes=2).fit(lambda: iter(self.BATCHES), resume=True)
        assert torch.equal(resumed.atoms_MD, whole.atoms_MD)
        assert resumed.batches_passed_over == whole.batches_passed_over == 4
        assert resumed.state is not None
        assert whole.state is not None
        assert resumed.state.drift is not None
        assert whole.state.drift is not None
        assert resumed.state.drift.n_samples == whole.state.drift.n_samples == 1200
        assert torch.equal(torch.as_tensor(resumed.state.drift.mean_D), torch.as_tensor(whole.state.drift.mean_D))

    def test_a_drift_is_seen_after_resuming(self, tmp_path: Path) -> None:
        batches = [*X_ND.split(150), X_ND + 20]
        with pytest.raises(StopError):
            learner_in(tmp_path, passes=1, on_batch=stop_after(3)).fit(lambda: iter(batches))
        with pytest.raises(ActivationError, match="drifted"):
            learner_in(tmp_path, passes=1).fit(lambda: iter(batches), resume=True)

    def test_partial_fit_after_resuming_wants_the_same_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(StopError):
            learner_in(tmp_path, on_batch=stop_after(3)).fit(X_ND)
        ksvd = learner_in(tmp_path).fit(X_ND, resume=True)
        ksvd.options = replace(ksvd.options, n_atoms=30)
        with pytest.raises(ShapeError, match="n_atoms: 20, now 30"):
            ksvd.partial_fit(X_ND)


@pytest.mark.parametrize("learn", [DictionaryLearner.fit, DictionaryLearner.partial_fit])
def test_interrupted_as_gradients_come_back(learn: Callable[[DictionaryLearner, Tensor], object]) -> None:
    """Ctrl-C just before torch.no_grad switches them on again, which it then does not; seen once in 30 test runs."""

    def interrupt(_: object) -> None:
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(learner(20, 3, on_batch=interrupt), X_ND)
    assert torch.is_grad_enabled()


def test_interrupted_at_any_moment(tmp_path: Path) -> None:
    """By a signal, as Ctrl-C and schedulers send it, between batches and within; what was learned is kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    wanted = learner_in(tmp_path / "whole", passes=20, checkpoint_every=None).fit(X_ND)
    draw, before, interrupts = random.Random(0), signal.signal(signal.SIGALRM, interrupt), 0
    seen = [0]
    try:
        while True:
            # Fewer batches than a pass has: nothing but the interrupt itself writes where training stands.
            ksvd = learner_in(tmp_path / "stopped", passes=20, checkpoint_every=None)
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.005, 0.03) * (1 + interrupts / 20))
                ksvd.fit(X_ND, resume=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except KeyboardInterrupt:
                interrupts += 1
                seen.append(max(seen[-1], ksvd.samples_seen))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts >= 5, "else this tests nothing"
    assert len(set(seen)) >= 3, "training went on between interrupts"
    assert torch.equal(ksvd.atoms_MD, wanted.atoms_MD)
    assert lines(ksvd) == lines(wanted)
