"""What a score is a mean over: contexts, data sets, letters, latents. From these comes an interval that covers them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# More contexts than this are taken together, neighbour by neighbour: an interval gains nothing from more.
MOST_ITEMS = 512


@dataclass(frozen=True)
class Item:
    """A score's value on one item. The score is Σ weight · value / Σ weight; of a ratio of sums, the weight is the
    item's part of the lower sum."""

    metric: str
    name: str
    value: float
    weight: float = 1.0


def of_values(metric: str, values: Iterable[tuple[str, float | None]]) -> Iterator[Item]:
    """Items that count alike; those without a value are left out, as the score leaves them out."""
    for name, value in values:
        if value is not None:
            yield Item(metric, name, float(value))


def of_ratios(metric: str, upper: Iterable[float | None], lower: Iterable[float]) -> Iterator[Item]:
    """Items without names but their places, where the score is Σ upper / Σ lower; ``upper`` None: not finite."""
    for place, (above, below) in enumerate(zip(upper, lower, strict=True)):
        if below and above is not None:
            yield Item(metric, str(place), above / below, below)


def of_details(result: Mapping[str, Any], name: str, metrics: Mapping[str, str]) -> Iterator[Item]:
    """Of SAEBench's ``eval_result_details``, an entry an item.

    Args: name: the field that names an item. metrics: metric -> the field that holds its values.
    """
    details = result.get("eval_result_details", ())
    for metric, field in metrics.items():
        yield from of_values(metric, ((str(one[name]), one.get(field)) for one in details))


def of_groups(metric: str, groups: Mapping[str, Mapping[str, float | None]]) -> Iterator[Item]:
    """Where the score is the mean over groups, such as data sets, of the means over their members."""
    for group, members in groups.items():
        of_it = list(of_values(metric, members.items()))
        for one in of_it:
            yield Item(metric, f"{group.removesuffix('_results')}/{one.name}", one.value, 1 / len(of_it))


def neighbours(place_N: Tensor, n_places: int, at_least: int = 1) -> Tensor:
    """Which item each of N is of, where what stands side by side is one item: about equally many, at most MOST_ITEMS.

    Args: place_N: from 0 to ``n_places`` − 1. at_least: places of an item.
    """
    n_items = max(1, min(MOST_ITEMS, n_places // at_least))
    return torch.div(place_N * n_items, n_places, rounding_mode="floor")
