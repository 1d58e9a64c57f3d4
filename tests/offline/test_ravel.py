"""The small RAVEL set: SAEBench's own reader takes it, and its facts do not contradict each other."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.ravel.instance import RAVELInstance
from sae_bench.evals.ravel.validation import evaluate_completion

from ksvd_sae.offline.ravel import ENTITY_ATTRIBUTES, entities, prompts, write_files

KINDS = list(ENTITY_ATTRIBUTES)


def test_entities_and_attributes_are_those_saebench_asks_for() -> None:
    assert RAVELEvalConfig().entity_attribute_selection == ENTITY_ATTRIBUTES


@pytest.mark.parametrize("kind", KINDS)
def test_saebench_reads_the_files(kind: str, tmp_path: Path) -> None:
    write_files(tmp_path)
    instance = RAVELInstance()
    instance.load_files(kind, str(tmp_path))
    assert instance.entityLBL_attrTYP_attrLBL == entities(kind)
    assert instance.attribute_type_to_templates == prompts(kind)
    texts = [template for group in prompts(kind).values() for template in group]
    assert set(instance.template_splits) == set(texts)
    assert set(instance.entity_splits) == set(entities(kind))
    assert set(instance.template_splits.values()) == set(instance.entity_splits.values()) == {"train", "val"}
    assert len(list((tmp_path / "base").iterdir())) == 4 * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_one_place_and_end_before_the_answer(kind: str) -> None:
    for templates in prompts(kind).values():
        assert len(templates) == len(set(templates)) >= 6
        for template in templates:
            assert template.count("%s") == 1
            assert not template.endswith(" "), "the answer's own space belongs to it"
            # The place is near the end: nothing after it but the question.
            assert len(template.split("%s")[1]) < 45


@pytest.mark.parametrize("kind", KINDS)
def test_examples_in_prompts_are_no_entities_with_another_answer(kind: str) -> None:
    """An entity in a prompt's examples would be asked with its answer in sight."""
    shown = " ".join(template for templates in prompts(kind).values() for template in templates)
    asked = [name for name in entities(kind) if f"{name} " in shown or f"{name}:" in shown or f'"{name}"' in shown]
    if kind == "nobel_prize_winner":
        assert asked == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_attribute_has_different_answers(kind: str) -> None:
    known = entities(kind)
    assert len(known) >= 100
    for attribute in ENTITY_ATTRIBUTES[kind]:
        labels = Counter(labels[attribute] for labels in known.values())
        assert len(labels) >= 2
        assert labels.most_common(1)[0][1] < 0.85 * len(known)
    for one, other in combinations(ENTITY_ATTRIBUTES[kind], 2):
        pairs = {(labels[one], labels[other]) for labels in known.values()}
        assert len(pairs) > max(len({p[0] for p in pairs}), len({p[1] for p in pairs})) or kind == "city"


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_answer_is_right_for_saebench(kind: str) -> None:
    for name, labels in entities(kind).items():
        for attribute, templates in prompts(kind).items():
            for template in templates:
                assert evaluate_completion(template % name, labels[attribute], f" {labels[attribute]}. And then")


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    write_files(tmp_path / "a")
    write_files(tmp_path / "b")
    for path in (tmp_path / "a" / "base").iterdir():
        assert json.loads(path.read_text()) == json.loads((tmp_path / "b" / "base" / path.name).read_text())
