"""The LaTeX table: what TeX reads as a command is escaped, and every row has its columns. (There is no TeX here.)"""

import re

import pandas as pd
import pytest

from ksvd_sae.report import tables
from ksvd_sae.report.latex import latex_text, to_latex, write_latex

CONTROLS = frozenset({"pca", "random"})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b & 5% #1 $x", r"a\_b \& 5\% \#1 \$x"),
        ("\\{x}~^", r"\textbackslash{}\{x\}\textasciitilde{}\textasciicircum{}"),
        ("FVU ↓", r"FVU $\downarrow$"),
        ("0.93 ± 0.01", r"0.93 $\pm$ 0.01"),
        ('<b> | "q"', r"\textless{}b\textgreater{} \textbar{} ''q''"),
        ("−1 × 2…", r"$-$1 $\times$ 2\dots{}"),
        ("two\nlines", "two lines"),
        ("Größe", "Größe"),
    ],
)
def test_escapes(text, shown):
    assert latex_text(text) == shown


def rows_of(text):
    """Cells of each row of the tabular: split at the & that are not escaped."""
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    return [re.split(r" (?<!\\)& ", line.removesuffix(r" \\")) for line in lines]


def test_same_cells_as_the_markdown(frame, methods):
    table = tables.summary(frame)
    heads, *rows = rows_of(to_latex(table, CONTROLS))
    assert [head.replace(r"$\downarrow$", "↓").replace(r"$\uparrow$", "↑").replace(r"\_", "_") for head in heads] == (
        tables.headings(table)
    )
    assert [row[0] for row in rows] == list(methods), "real methods first, as here, then controls"
    for row, cells in zip(rows, tables.cells(table, CONTROLS), strict=True):
        assert row == [rf"\textbf{{{latex_text(c.text)}}}" if c.best else latex_text(c.text) for c in cells]
    assert sum(cell.startswith(r"\textbf{") for row in rows for cell in row) == 8


def test_structure(frame):
    text = to_latex(tables.summary(frame), CONTROLS)
    n_columns = len(tables.summary(frame).columns)
    assert text.startswith(rf"\begin{{tabular}}{{ll{'r' * (n_columns - 2)}}}" + "\n\\toprule\n")
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    assert {len(row) for row in rows_of(text)} == {n_columns}
    assert text.count("\\midrule") == 2
    assert to_latex(tables.summary(frame)).count("\\midrule") == 1, "no controls, no rule above them"
    # Controls stand below the second rule even where the frame has them first.
    mixed = tables.summary(frame.iloc[::-1].reset_index(drop=True))
    names = [row[0] for row in rows_of(to_latex(mixed, CONTROLS))][1:]
    assert set(names[-2:]) == CONTROLS


@pytest.mark.parametrize("name", ["[x]", "*x", "50%_{a}&\\b"])
def test_names_cannot_break_the_table(frame, name):
    frame["dictionary"] = frame["dictionary"].replace({"db-ksvd": name})
    rows = rows_of(to_latex(tables.summary(frame), CONTROLS))
    assert {len(row) for row in rows} == {len(tables.summary(frame).columns)}
    first = rows[1][0]
    assert not first.startswith(("[", "*")), "would be an argument of the line break before it"
    assert not re.search(r"(?<!\\)[%&_#$]", first)


def test_intervals_stand_behind_the_means(frame):
    several = pd.concat([frame, frame.assign(seed=1, value=frame["value"] * 1.1)], ignore_index=True)
    table, widths = tables.summary(several), tables.intervals(several)
    rows = rows_of(to_latex(table, CONTROLS, widths))
    assert any(r" $\pm$ " in cell for cell in rows[1])
    assert {len(row) for row in rows} == {len(tables.summary(frame).columns)}


def balance(text):
    """Open braces that nothing closes, escaped ones left out."""
    bare = re.sub(r"\\[{}]", "", text)
    return bare.count("{") - bare.count("}")


def test_document(frame, tmp_path):
    write_latex(frame, tmp_path / "table.tex", CONTROLS, title="Comparison: my_run", label="my_run")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert balance(code) == 0
    assert re.findall(r"\\(?:begin|end)\{(\w+)\}", code) == ["table", "tabular", "tabular", "table"]
    assert r"\label{tab:my_run}" in code
    (caption,) = re.findall(r"\\caption\{(.*)\}", code)
    assert caption.startswith(r"Comparison: my\_run. $\downarrow$ lower is better")
    assert "leaving out the controls pca and random" in caption
    assert "One training seed (0)" in caption
    # pdfLaTeX has no glyph for these.
    assert not re.search("[↓↑±−×]", code)
    comments = [line for line in text.splitlines() if line.startswith("% ")]
    assert len(comments) == 1 + len(tables.summary(frame).columns), "what each column means"
    assert all(line.startswith("%") for line in text.split(r"\end{table}")[1].strip().splitlines())
