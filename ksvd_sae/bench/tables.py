"""``ksvd-sae bench table``: Markdown from the rows in results/bench/*.jsonl.

Of rows that differ only in when they were measured, or at which commit, the last counts.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ksvd_sae.bench import rows as row_files
from ksvd_sae.bench.gpu import GOALS
from ksvd_sae.bench.rows import OURS
from ksvd_sae.bench.scaling import slope
from ksvd_sae.bench.settings import SUITES
from ksvd_sae.errors import ManifestError
from ksvd_sae.report.markdown import markdown_table
from ksvd_sae.store import atomic_path

Row = dict[str, Any]
README = "README.md"
# A case: what is compared with each other.
_CASE = ("suite", "case", "case_n", "d", "m", "k", "data", "cpu", "threads")
_CONTENDER = ("impl", "config", "backend", "dtype", "device")
_ORDER = (*SUITES, "gpu")
INTRO = """# Benchmarks

Written by `ksvd-sae bench table --write` from the rows in this folder (`*.jsonl`, one object a measurement; their
fields are explained in `ksvd_sae/bench/rows.py`). Measured by `ksvd-sae bench all`, `harvest` and `evals`.

**seconds**: median of the repeats, with the 20 and 80 % quantiles; the implementations take turns. **samples timed**:
fewer than the case's where an implementation is too slow for all of them; its seconds are then scaled up. **FVU**:
Σ‖y − ŷ‖² / Σ‖y − ȳ‖², lower is better. **of floor**: the least time that the matrix products and the memory traffic of
the job take at the rates measured in the same run, over the time taken (`ksvd_sae/bench/ceilings.py`). **peak MiB**:
memory that a call needs on top of its input (`ksvd_sae/memory.py`)."""


def render(folder: Path) -> str:
    """All tables as Markdown.

    Raises: ManifestError if the folder holds no rows.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise ManifestError(
            f"bench table: no rows in {folder}",
            cause="no benchmark has run there",
            cure="run `ksvd-sae bench all`, or give the folder above bench/ with --results",
        )
    order = [*(name for name in _ORDER if name in files or name == "gpu"), *(n for n in files if n not in _ORDER)]
    sections = [INTRO]
    for name in order:
        rows = latest(row_files.read(files[name])) if name in files else []
        sections.append(f"## {name}")
        sections += _SECTIONS.get(name, _plain)(rows)
    return "\n\n".join(sections) + "\n"


def write(folder: Path, text: str) -> Path:
    """Put the tables into the folder's README.md."""
    with atomic_path(folder / README) as temporary:
        temporary.write_text(text)
    return folder / README


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last of the rows that measure the same, in the order in which they were first measured."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        row = {"case_n": row.get("n"), **row}
        kept[tuple(row.get(name) for name in (*_CASE, *_CONTENDER))] = row
    return list(kept.values())


def _cases(rows: list[Row]) -> list[list[Row]]:
    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in _CASE)

    return [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]


def _heading(case: list[Row]) -> str:
    row = case[0]
    sizes = f"n = {row['case_n']:,}, d = {row['d']:,}, m = {row['m']:,}, k = {row['k']:,}"
    devices = sorted({r["device"] for r in case} - {"cpu"})
    where = ", ".join([*devices, f"{row.get('cpu') or 'CPU'} with {row['threads']} threads"])
    commits = ", ".join(dict.fromkeys(r["commit"] for r in case))
    dictionary = f"; atoms: {row['dictionary']}" if row.get("dictionary") else ""
    return f"### {row['case']}: {sizes}\n\nData: {row.get('data')}{dictionary}. On {where}; commit {commits}."


def _coding(rows: list[Row]) -> list[str]:
    parts = []
    for case in _cases(rows):
        commons = {row["n_common"] for row in case}
        on = (
            f"FVU on the same {min(commons):,} samples for all"
            if len(commons) == 1
            else "FVU on the samples each coded"
        )
        fvu = "fvu_common" if len(commons) == 1 else "fvu"
        parts += [f"{_heading(case)} {on}.", _speed_table(case, "coder", fvu), *_notes(case)]
    return parts


def _update(rows: list[Row]) -> list[str]:
    parts = []
    for case in _cases(rows):
        before = case[0]["fvu_before"]
        parts += [
            f"{_heading(case)} FVU before the update: {before:.4f}.",
            _speed_table(case, "update", "fvu"),
            *_notes(case),
        ]
    return parts


def _speed_table(case: list[Row], method: str, fvu: str) -> str:
    head = ["implementation", method, "backend", "dtype", "samples/s ↑", "seconds ↓", "20–80 %", "FVU ↓"]
    head += ["of floor", "peak MiB ↓", "samples timed"]
    body = []
    for row in sorted(case, key=lambda row: -row["samples_per_s"]):
        scale = row["case_n"] / row["n"]
        body.append(
            [
                *_names(row),
                f"{row['samples_per_s']:,.0f}",
                _number(scale * row["median_s"]),
                f"{_number(scale * row['q20_s'])}–{_number(scale * row['q80_s'])}",
                _fixed(row.get(fvu)),
                _share(row),
                _whole(row["peak_mib"]),
                f"{row['n']:,}",
            ]
        )
    return markdown_table(head, body, head[4:])


def _train(rows: list[Row]) -> list[str]:
    head = ["implementation", "method", "backend", "dtype", "passes", "seconds ↓", "held-out FVU ↓"]
    head += ["ours has it after", "speed-up", "peak MiB ↓"]
    parts = []
    for case in _cases(rows):
        body = []
        for row in sorted(case, key=lambda row: row["fvu"]):
            ours_s = row.get("ours_s")
            reached = "never" if ours_s is None else f"{_number(ours_s)} s"
            faster = "" if ours_s is None else f"{_number(row['median_s'] / ours_s)} ×"
            versus = ["", ""] if row["impl"] == OURS else [reached, faster]
            times = [f"{row['passes']}", _number(row["median_s"]), _fixed(row["fvu"])]
            body.append([*_names(row), *times, *versus, _whole(row["peak_mib"])])
        heldout = f"FVU of {case[0]['n_heldout']:,} held-out samples, all coded by our OMP."
        parts += [f"{_heading(case)} {heldout}", markdown_table(head, body, head[4:]), *_notes(case)]
    return parts


def _scaling(rows: list[Row]) -> list[str]:
    """An exponent for each coder and variable: time ∝ variable^exponent, with its 95 % interval."""
    head = [
        "coder",
        "backend",
        "variable",
        "from",
        "to",
        "seconds",
        "exponent of time",
        "R² of a line",
        "exponent of memory",
    ]
    body, memory = [], []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["config"], row["backend"], row["device"], row["threads"], row["varied"]), []).append(row)
    for (config, backend, *_, varied), points in groups.items():
        points = sorted(points, key=lambda row: row[varied])
        x = [row[varied] for row in points]
        seconds, peaks = [row["median_s"] for row in points], [row["peak_mib"] for row in points]
        grows = slope(x, seconds)
        ends = [f"{x[0]:,}", f"{x[-1]:,}", f"{_number(seconds[0])} → {_number(seconds[-1])}"]
        r_squared = "n/a" if grows is None else f"{grows.r_squared:.3f}"
        body.append([config, backend, varied, *ends, _exponent(x, seconds), r_squared, _exponent(x, peaks)])
        if varied == "n" and all(peak is not None for peak in peaks):
            rest = [row["peak_mib"] - row["output_mib"] for row in points]
            memory.append(
                f"{config}: memory beyond the code itself {rest[0]:,.1f} MiB at n = {x[0]:,}, "
                f"{rest[-1]:,.1f} MiB at n = {x[-1]:,}."
            )
    base = rows[0]
    where = f"Planted samples, one variable varied at a time, on {base['device']} ({base.get('cpu')}), "
    where += f"{base['threads']} threads; commit {base['commit']}. time ∝ variable^exponent, ± the 95 % interval."
    return [where, markdown_table(head, body, head[3:]), "\n".join(f"- {line}" for line in memory)]


def _evals(rows: list[Row]) -> list[str]:
    """A line for each eval: ours and SAEBench's own run of the same panel."""
    head = ["eval", "SAEBench's own, s", "ours, s ↓", "faster", "a further dictionary: SAEBench's own, s", "ours, s ↓"]
    head += ["faster", "scores compared", "largest difference", "SAEBench's own, peak MiB", "ours, peak MiB ↓"]
    body = []
    for case in _cases(rows):
        by_impl = {row["impl"]: row for row in case}
        ours, theirs = by_impl[OURS], by_impl.get("sae_bench")
        cells = [ours["case"]]
        for name in ("median_s", "further_s"):
            cells += [_number(theirs[name]) if theirs else "", _number(ours[name])]
            cells += [f"{_number(theirs[name] / ours[name])} ×" if theirs else ""]
        cells += [f"{ours['n_scores']:,}", f"{ours['largest_difference']:.1e}"] if theirs else ["", ""]
        body.append([*cells, _whole(theirs["peak_mib"]) if theirs else "", _whole(ours["peak_mib"])])
    base = rows[-1]
    where = f"A panel of {base['n']} dictionaries ({base['dictionary']}) of {base['data']}, on {base.get('cpu')} with "
    where += f"{base['threads']} threads; commit {base['commit']}. Both start with nothing on disk; "
    where += "`ksvd_sae/bench/evals.py` says what SAEBench's own run is. A further dictionary: the time between the "
    where += "first result and the last, for each after the first. Difference: |a − b| / max(1, |b|)."
    return [where, markdown_table(head, body, head[1:])]


def _harvest(rows: list[Row]) -> list[str]:
    """Tokens a second of harvests, and of bare passes up to the hook's layer."""
    head = ["implementation", "what", "dtype", "device", "tokens/s ↑", "seconds ↓", "of the fastest bare pass"]
    parts = []
    for case in _cases(rows):
        body = [
            [
                f"**{row['impl']}**" if row["impl"] == OURS else row["impl"],
                *(row[name] for name in ("config", "dtype", "device")),
                f"{row['samples_per_s']:,.0f}",
                _number(row["median_s"]),
                _share(row),
            ]
            for row in sorted(case, key=lambda row: -row["samples_per_s"])
        ]
        first = case[0]
        where = f"{first['n']:,} tokens of {first['data']} in batches of {first['batch_contexts']} contexts, on "
        where += f"{first['cpu']} with {first['threads']} threads; commit {first['commit']}. Ours reads, shuffles, "
        where += "writes and hashes; bare passes keep nothing."
        parts += [f"### {first['case']}", where, markdown_table(head, body, head[4:])]
    return parts


def _exponent(x: Sequence[float], y: Sequence[float | None]) -> str:
    known = [value for value in y if value]
    fitted = slope(x, known) if len(known) == len(y) else None
    return "n/a" if fitted is None else f"{fitted.exponent:.2f} ± {fitted.interval:.2f}"


def _gpu(rows: list[Row]) -> list[str]:
    """The goals, reached or not, or not measured; then the rows."""
    body = []
    for goal in GOALS:
        on_gpu = [row for row in rows if row["device"] != "cpu"]
        names = (goal.suite, goal.case, goal.config)
        times = [row for row in on_gpu if (row["suite"], row["case"], row.get("config")) == names]
        best = min(times, key=lambda row: row["median_s"], default=None)
        if best is None:
            body.append([goal.what, "not measured", "", ""])
        else:
            share = (best["floor_s"] or 0.0) / best["median_s"]
            reached = "yes" if best["median_s"] <= goal.most_s and share >= goal.of_floor else "no"
            measured = f"{share:.0%}" if goal.of_floor else f"{_number(1e3 * best['median_s'])} ms"
            body.append([goal.what, f"{measured}, {best['dtype']}", reached, best["device"]])
    goals = markdown_table(["goal on an H200", "measured", "reached", "device"], body, ())
    where = "Planted samples of the paper's shapes, d = 2,304; measured by `python -m ksvd_sae.bench gpu` on a GPU."
    return [where, goals, *(_plain(rows) if rows else [])]


def _plain(rows: list[Row]) -> list[str]:
    """Rows as they are."""
    head = [
        "suite",
        "case",
        "device",
        "coder",
        "dtype",
        "backend",
        "n",
        "d",
        "m",
        "k",
        "median ms",
        "of floor",
        "FVU",
        "peak MiB",
        "commit",
    ]
    body = []
    for row in rows:
        sizes = [f"{row[name]:,}" for name in ("n", "d", "m", "k")]
        names = [str(row.get(name, "")) for name in ("suite", "case", "device", "config", "dtype", "backend")]
        scores = [
            _number(1e3 * row["median_s"]),
            _share(row),
            _fixed(row["fvu"]),
            _whole(row["peak_mib"]),
            row["commit"],
        ]
        body.append([*names, *sizes, *scores])
    return [markdown_table(head, body, head[6:])]


def _names(row: Row) -> list[str]:
    impl = f"**{row['impl']}**" if row["impl"] == OURS else row["impl"]
    backend = row["backend"] + ("" if row["device"] == "cpu" else f", {row['device']}")
    return [impl, row["config"], backend, row["dtype"]]


def _notes(case: list[Row]) -> list[str]:
    """What must be known to compare a row, a line each."""
    notes = dict.fromkeys(f"- {row['impl']}, {row['config']}: {row['note']}." for row in case if row.get("note"))
    return ["\n".join(notes)] if notes else []


def _share(row: Row) -> str:
    return "n/a" if row.get("floor_s") is None else f"{row['floor_s'] / row['median_s']:.0%}"


def _fixed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}" if value < 100 else f"{value:.3g}"


def _whole(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_SECTIONS: dict[str, Callable[[list[Row]], list[str]]] = {
    "coding": _coding,
    "update": _update,
    "train": _train,
    "scaling": _scaling,
    "harvest": _harvest,
    "evals": _evals,
    "gpu": _gpu,
}
