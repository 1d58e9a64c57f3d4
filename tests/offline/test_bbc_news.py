"""The news corpus: all of it, in an order of its own, and cut into halves that share nothing."""

import json
from collections import Counter
from pathlib import Path

import pytest

from ksvd_sae.errors import MissingExtraError, TextError
from ksvd_sae.offline import bbc_news
from ksvd_sae.offline.bbc_news import CLASSES, Article


def words(text: str) -> str:
    """A text apart from its white space."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def probing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Article]]:
    """The data set that probes see, train and test."""
    folder = tmp_path_factory.mktemp("probing")
    bbc_news.write_probing_dataset(folder)
    return {split: read(folder / f"{split}.jsonl") for split in ("train", "test")}


def read(path: Path) -> list[Article]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Article(row["text"], CLASSES[row["label"]]) for row in rows]


@pytest.fixture
def _fresh_corpus() -> None:
    """Articles are read once a process; this test reads them anew, and so does whatever comes after it."""
    bbc_news._articles.cache_clear()


# ---------------------------------------------------------------- the whole


def test_all_articles_in_five_classes() -> None:
    articles = bbc_news._articles()
    assert len(articles) == bbc_news.N_ARTICLES == 2225
    assert Counter(article.label for article in articles) == {
        "business": 510,
        "entertainment": 386,
        "politics": 417,
        "sports": 511,
        "tech": 401,
    }
    assert min(len(article.text) for article in articles) > 400


@pytest.mark.usefixtures("_fresh_corpus")
def test_the_order_is_not_the_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    articles, digest = bbc_news._articles(), bbc_news.corpus_hash()
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: sorted(listed(self, pattern), reverse=True))
    bbc_news._articles.cache_clear()
    assert bbc_news._articles() == articles
    assert bbc_news.corpus_hash() == digest


@pytest.mark.usefixtures("_fresh_corpus")
def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bbc_news, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"ksvd-sae\[demo\]"):
        bbc_news.harvest_articles(0)


@pytest.mark.usefixtures("_fresh_corpus")
def test_a_corpus_that_is_not_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    folder = tmp_path / "bbcnews" / "data" / "tech"
    folder.mkdir(parents=True)
    (folder / "001.txt").write_text("one article")
    monkeypatch.setattr(bbc_news, "find_spec", lambda _: Spec)
    with pytest.raises(TextError, match=r"(?s)1 articles.*2225"):
        bbc_news.corpus_hash()


# ---------------------------------------------------------------- halves


def test_the_seed_shuffles_the_harvest_half() -> None:
    first, again, second = (bbc_news.harvest_articles(seed) for seed in (0, 0, 1))
    assert first == again != second
    assert sorted(first, key=hash) == sorted(second, key=hash)
    # Classes are mixed: a held-out part at the front has all of them.
    assert {article.label for article in first[:64]} == set(CLASSES)


def test_halves_are_balanced(probing: dict[str, list[Article]]) -> None:
    harvest = Counter(article.label for article in bbc_news.harvest_articles(0))
    probed = Counter(article.label for part in probing.values() for article in part)
    for label in CLASSES:
        assert abs(harvest[label] - probed[label]) <= 0.05 * harvest[label], label
    assert sum(harvest.values()) > 1000
    assert sum(probed.values()) > 1000


def test_no_article_is_in_both_halves(probing: dict[str, list[Article]]) -> None:
    """Counted, since the corpus has some articles twice."""
    used = Counter(bbc_news.harvest_articles(0))
    for part in probing.values():
        used.update(part)
    assert used <= Counter(bbc_news._articles())


def test_no_probe_sees_a_text_that_a_dictionary_was_learned_on(probing: dict[str, list[Article]]) -> None:
    harvested = {words(article.text) for article in bbc_news.harvest_articles(0)}
    shared = [a.text for part in probing.values() for a in part if words(a.text) in harvested]
    assert len(shared) == 0


def test_no_text_is_in_the_harvest_half_twice() -> None:
    """Else it may be among the held-out documents and among those that a dictionary was learned on."""
    counts = Counter(words(article.text) for article in bbc_news.harvest_articles(0))
    assert [text[:60] for text, n in counts.items() if n > 1] == []


def test_no_probe_is_tested_on_a_text_that_it_was_trained_on(probing: dict[str, list[Article]]) -> None:
    trained = {words(article.text) for article in probing["train"]}
    shared = [article.text for article in probing["test"] if words(article.text) in trained]
    assert len(shared) == 0


def test_probing_splits_have_every_class_in_the_same_proportion(probing: dict[str, list[Article]]) -> None:
    train, test = (Counter(article.label for article in probing[split]) for split in ("train", "test"))
    for label in CLASSES:
        share = test[label] / (train[label] + test[label])
        assert abs(share - 0.35) < 0.01, label


def test_the_probing_set_is_the_same_each_time(tmp_path: Path, probing: dict[str, list[Article]]) -> None:
    bbc_news.write_probing_dataset(tmp_path)
    assert {split: read(tmp_path / f"{split}.jsonl") for split in probing} == probing
    other = tmp_path / "other"
    bbc_news.write_probing_dataset(other, seed=1)
    assert {split: read(other / f"{split}.jsonl") for split in probing} != probing
