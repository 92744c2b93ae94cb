"""Pages of one file: readable on a phone, light or dark as the reader's system is, without a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files

from streamnorm_lab.common.chart import Chart


@cache
def asset(name: str) -> str:
    """A file beside this one."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def document(title: str, sections: Iterable[str], menu: Sequence[tuple[str, str]] = (), script: str = "") -> str:
    """A page that needs no other file.

    Args:
        title: the browser's title.
        sections: HTML.
        menu: links at the top: address and words.
        script: a file beside this one that the page runs, after the one that draws figures.
    """
    body = "\n".join(sections)
    links = "".join(f'<a href="{escape(address)}">{escape(words)}</a>' for address, words in menu)
    bar = f'<nav class="menu">{links}</nav>\n' if menu else ""
    drawing = "charts.js" if 'class="chart"' in body else ""
    scripts = "".join(f"<script>{asset(name)}</script>\n" for name in (drawing, script) if name)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{asset('page.css')}</style>\n</head>\n<body>\n"
        f"{bar}<main>\n{body}\n</main>\n{scripts}</body>\n</html>\n"
    )


def figure(chart: Chart, drawing: str) -> str:
    """A figure that the page's script draws; ``drawing`` is the address of the same as a file."""
    values = chart.json().replace("</", "<\\/")
    return (
        '<figure class="chart"><div class="sheet">'
        f'<script type="application/json">{values}</script>'
        f"<noscript>{escape(chart.description)}: the file below shows it.</noscript></div>\n"
        f'<figcaption>{escape(chart.caption)} <a href="{escape(drawing)}">As a file</a></figcaption></figure>'
    )


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A table whose first cells name the rows; on a phone each row is a block, its values one below the other.

    Args:
        head: the columns' names, as HTML.
        rows: cells, as HTML.
        numbers: whether the cells are numbers.
    """
    header = "".join(f"<th>{name}</th>" for name in head)
    body = "\n".join(_table_row(head, row) for row in rows)
    kind = "stacked numbers" if numbers else "stacked"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{header}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _table_row(head: Sequence[str], row: Sequence[str]) -> str:
    first, *others = row
    cells = "".join(
        f'<td data-label="{name}"><span>{cell}</span></td>' for name, cell in zip(head[1:], others, strict=True)
    )
    return f"<tr><th>{first}</th>{cells}</tr>"
