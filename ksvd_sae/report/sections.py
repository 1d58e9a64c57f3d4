"""A further table of a comparison, for its Markdown and its page: a lead, columns, rows of texts, remarks."""

from dataclasses import dataclass, field
from typing import Any

from ksvd_sae.report.markdown import markdown_table, markdown_text


@dataclass(frozen=True)
class Section:
    """What both show.

    anchor: its name in links. lead: what the table shows. numbers: those of ``heads`` whose columns hold numbers. rows:
    texts, in the order of heads. remarks: what stands below, an item each.
    """

    title: str
    anchor: str
    lead: str
    heads: tuple[str, ...]
    numbers: frozenset[str]
    rows: list[list[str]]
    remarks: list[str] = field(default_factory=list)


def section_markdown(section: Section) -> list[str]:
    """The section as lines of Markdown."""
    rows = [[markdown_text(text) for text in row] for row in section.rows]
    table = markdown_table(section.heads, rows, section.numbers).splitlines()
    remarks = [f"- {markdown_text(remark)}" for remark in section.remarks]
    lead = [f"## {section.title}", "", markdown_text(section.lead), ""]
    return [*lead, *table, "", *remarks, *([""] if remarks else [])]


def section_context(section: Section) -> dict[str, Any]:
    """What the page's template needs of the section."""
    heads = [{"name": head, "number": head in section.numbers} for head in section.heads]
    shown = {"title": section.title, "anchor": section.anchor, "lead": section.lead}
    return {**shown, "heads": heads, "rows": section.rows, "remarks": section.remarks}
