"""The headline table for a paper: a booktabs table in LaTeX, the same numbers and marks as in Markdown."""

from pathlib import Path

import pandas as pd

from ksvd_sae.report.tables import cells, headings, intervals, legend, legend_intro, seeds_text, summary
from ksvd_sae.store import atomic_path

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    # In text fonts of pdfLaTeX these do not exist.
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": r"$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "‖": r"$\Vert$",
    "Σ": r"$\Sigma$",
    "σ": r"$\sigma$",
    "²": r"\textsuperscript{2}",
    "ᵀ": r"$^{\top}$",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "\N{NO-BREAK SPACE}": "~",
}


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it stands; letters beyond ASCII stay (LaTeX reads UTF-8)."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text.replace("\n", " "))


def to_latex(table: pd.DataFrame, controls: frozenset[str] = frozenset(), widths: pd.DataFrame | None = None) -> str:
    """A summary as a ``tabular``, the best real method of each column in bold, controls below a rule.

    Arguments as ``tables.cells``.
    """
    shown = cells(table, controls, widths)
    rows = [
        " & ".join(rf"\textbf{{{latex_text(cell.text)}}}" if cell.best else latex_text(cell.text) for cell in row)
        for row in shown
    ]
    is_control = [name in controls for name in table["dictionary"]]
    # A bracket or a star after the \\\\ of the row before would be its argument.
    rows = [row if row[:1].isalnum() or row[:1] == "\\" else "{}" + row for row in rows]
    groups = [[row for row, control in zip(rows, is_control, strict=True) if control == wanted] for wanted in (0, 1)]
    lines = [
        rf"\begin{{tabular}}{{{''.join('l' if name in ('dictionary', 'view') else 'r' for name in table.columns)}}}",
        r"\toprule",
        " & ".join(latex_text(head) for head in headings(table)) + r" \\",
    ]
    for group in groups:
        if group:
            lines += [r"\midrule", *(row + r" \\" for row in group)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write_latex(
    frame: pd.DataFrame, path: Path, controls: frozenset[str] = frozenset(), *, title: str, label: str
) -> None:
    """Write a table for ``\\input``: how to read it in its caption, what the columns mean as comments below it."""
    table = summary(frame)
    caption = f"{title}. {legend_intro(table, controls)} {seeds_text(frame)}"
    lines = [
        "% Needs \\usepackage{booktabs} and \\usepackage{graphicx}; pdfLaTeX, XeLaTeX and LuaLaTeX all set it.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        to_latex(table, controls, intervals(frame)).rstrip("\n") + "%",
        "}",
        r"\end{table}",
        # A percent sign makes a comment of all that follows it on its line.
        *(f"% {head}: {' '.join(text.split())}" for head, text in legend(frame)),
    ]
    with atomic_path(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
