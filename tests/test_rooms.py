"""A kind of dictionary has one room and an eval has one: the docs' examples are added, and nothing else is touched."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import ksvd_sae
from ksvd_sae.activations.harvest import HELDOUT_DOCUMENTS
from ksvd_sae.evals import EVALS
from ksvd_sae.methods import METHODS
from ksvd_sae.run.config import parse_config
from tests.tiny_shards import raw_activations, write_harvest

PACKAGE = Path(ksvd_sae.__file__).parent
DOCS = PACKAGE.parent / "docs"
PLAIN: dict[str, Any] = {
    "name": "rooms",
    "device": "cpu",
    "training_seeds": [0, 1],
    "model": {"name": "some/model", "hook": "blocks.0.hook_resid_post"},
    "text": {"source": "hub", "dataset": "owner/some-texts"},
    "harvest": {"train_tokens": 2000, "heldout_tokens": 500, "context_tokens": 12},
    "dictionaries": {"learned": {"kind": "db_ksvd", "n_atoms": 24, "k": 3, "batch_samples": 500}},
    "evaluation": {"core": None, "sparse_probing": None, "seeds": [1, 2]},
    "report": {"atoms": 0},
}
RUN = """
import sys, yaml
from pathlib import Path
from ksvd_sae.report.compare import compare
from ksvd_sae.run.config import parse_config
from ksvd_sae.run.pipeline import Run

run = Run(parse_config(yaml.safe_load(sys.stdin.read())), Path("results"), Path("cache"))
run.evaluate(train=True)
print(compare(run))
"""


def example(page: str, package: Path) -> tuple[Path, str]:
    """Write the page's example into a package; the file, and the import that its registry is to have."""
    text = (DOCS / page).read_text()
    code = re.search(r'```python title="ksvd_sae/(\S+)"\n(.*?)```', text, re.DOTALL)
    line = re.search(r"```python\n(from .*)\n```", text)
    assert code is not None
    assert line is not None
    path = package / code[1]
    path.parent.mkdir(exist_ok=True)
    path.write_text(code[2])
    return path, line[1]


def register(path: Path, line: str, registry: str) -> None:
    """Add the class of an import to a registry, the tuple of that name in the file."""
    before = path.read_text()
    first = re.search(rf"^{registry}: .* = \(\n", before, re.MULTILINE)
    assert first is not None
    entry = f"    {line.rsplit(' ', 1)[1]},\n"
    after = before[: first.end()] + entry + before[first.end() :]
    path.write_text(after.replace("\nfrom ksvd_sae", f"\n{line}\nfrom ksvd_sae", 1))


def written(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}


def test_a_kind_and_an_eval_are_added_from_the_docs(tmp_path: Path) -> None:
    package = tmp_path / "ksvd_sae"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = written(package)
    kind, kind_line = example("add-a-kind.md", package)
    eval_file, eval_line = example("add-an-eval.md", package)
    register(package / "methods" / "__init__.py", kind_line, "METHODS")
    register(package / "evals" / "__init__.py", eval_line, "EVALS")
    after = written(package)
    changed = {name for name in after if after[name] != before.get(name)}
    new = {str(path.relative_to(package)) for path in (kind, eval_file)}
    assert changed == {"methods/__init__.py", "evals/__init__.py", *new}, "the two rooms and their lines, and no more"

    harvested = parse_config(PLAIN).harvested
    folder, x_ND = harvested.folder(tmp_path / "cache"), raw_activations(2500)
    write_harvest(folder, harvested.key, x_ND[:2000], x_ND[2000:])
    (folder / HELDOUT_DOCUMENTS).write_text(json.dumps({"text": "a document"}) + "\n")
    config = {
        **PLAIN,
        "dictionaries": {
            **PLAIN["dictionaries"],
            "samples": {"kind": "samples", "n_atoms": 24, "k": 3, "view": "both"},
            "by-omp": {"kind": "recoded", "of": "samples"},
        },
        "evaluation": {**PLAIN["evaluation"], "robustness": {"noise": 0.1, "tokens": 200}},
    }
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", RUN]
    done = subprocess.run(
        command,
        input=yaml.safe_dump(config),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "results" / "rooms" / "comparison.md").read_text().splitlines()
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][:5]
    shown = {(row[0], row[head.index("view")]): row[head.index("support kept ↑")] for row in rows}
    assert set(shown) == {("learned", "signed"), ("samples", "signed"), ("samples", "split"), ("by-omp", "signed")}
    assert all(re.search(r"0\.\d+ ± 0\.\d+", cell) for cell in shown.values()), shown
    assert "atoms that a code and that of the disturbed activation share" in "\n".join(lines)
    page = Path(done.stdout.strip()).read_text()
    assert "support kept" in page


def test_nobody_knows_kinds_or_evals_apart() -> None:
    """Outside its own room and the registry, a kind's or an eval's class has no name; nor is its word compared with."""
    source = written(PACKAGE)
    rooms = {kind: kind.__module__.split(".")[1:] for kind in (*METHODS, *EVALS)}
    for kind, (area, room, *_) in rooms.items():
        users = [name for name, text in source.items() if re.search(rf"\b{kind.__name__}\b", text)]
        allowed = {f"{area}/__init__.py", f"{area}/{room}.py"}
        strangers = {name for name in users if name not in allowed and not name.startswith(f"{area}/{room}/")}
        assert strangers <= NAMED.get(kind.__name__, set()), kind
    words = {kind.model_fields["kind"].default for kind in METHODS} | {section.name for section in EVALS}
    compared = re.compile(rf"\b(?:kind|eval|name) (?:[!=]=|in|not in) \(?\"(?:{'|'.join(map(re.escape, words))})\"")
    found = {name: hit[0] for name, text in source.items() if (hit := compared.search(text))}
    assert found == {}


# A study's rows say over how many predictions its loss is a mean; curves are of this eval.
NAMED = {"LossEval": {"run/study.py"}, "TruthEval": {"run/curves.py"}}
