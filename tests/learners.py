"""Learners from flat options, as tables of cases name them."""

from dataclasses import fields
from typing import Any

from ksvd_sae.learning.coding import Coding
from ksvd_sae.learning.dbksvd import DictionaryLearner, LearnerOptions

_OF_CODING = {field.name for field in fields(Coding)}
_OF_TRAINING = {field.name for field in fields(LearnerOptions)}


def learner(n_atoms: int, k: int, **options: Any) -> DictionaryLearner:
    """On the CPU unless told otherwise; options of ``Coding``, ``LearnerOptions`` and ``DictionaryLearner`` by name."""
    of_coding, of_training = (
        {name: options.pop(name) for name in names & options.keys()} for names in (_OF_CODING, _OF_TRAINING)
    )
    if of_coding.get("groups") is not None:
        of_coding["groups"] = tuple(of_coding["groups"])
    chosen = LearnerOptions(n_atoms, Coding(k, **of_coding), **of_training)
    return DictionaryLearner(chosen, **{"device": "cpu", **options})
