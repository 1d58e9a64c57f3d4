"""Text and tables in Markdown."""

from collections.abc import Collection, Sequence

from tabulate import tabulate


def markdown_text(text: str) -> str:
    """Text that cannot end a cell, a line, or become a tag."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str]) -> str:
    """An aligned table of cells that are Markdown already, without an end of line.

    Args: numbers: the heads whose columns are aligned to the right.
    """
    sides = ["right" if head in numbers else "left" for head in heads]
    return tabulate(rows, heads, tablefmt="pipe", colalign=sides, disable_numparse=True)
