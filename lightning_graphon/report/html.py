"""Pieces of a page of HTML that needs nothing but itself: no script, no network."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 88rem; background: #fff; color: #1b1b1b;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid #ddd; }
h3 { font-size: 1.02rem; margin: 0 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
nav a { margin-right: 1rem; }
a { color: #0369a1; }
.grid .card { margin: 0; }
.grid { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
.card { min-width: 0; margin-bottom: 1rem; padding: .9rem; border: 1px solid #ddd; border-radius: .5rem; }
.scroll { overflow-x: auto; }
figure { margin: 0 0 .6rem; }
figcaption, .note { font-size: .86rem; color: #555; margin-bottom: .3rem; }
img { display: block; max-width: 100%; min-width: 32rem; height: auto; }
.wide img { min-width: 60rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .3rem 0 .8rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { font-weight: 600; } thead th { border-bottom: 1px solid #999; vertical-align: bottom; }
tbody th, th:first-child, td:first-child { text-align: left; }
tbody th small { display: block; min-width: 11rem; max-width: 20rem; font-weight: 400; color: #555;
  white-space: normal; line-height: 1.3; }
summary { cursor: pointer; color: #0369a1; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document around the pieces of its body, which are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(anchor: str, heading: str, *content: str) -> str:
    """A part of the page with a heading and a target for links."""
    return f'<section id="{escape(anchor)}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(content) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """Text; escaped."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def grid(cards: Iterable[str]) -> str:
    """Cards side by side where there is room."""
    return '<div class="grid">\n' + "\n".join(cards) + "\n</div>"


def card(heading: str, *content: str) -> str:
    """A frame with a heading."""
    return f'<div class="card">\n<h3>{escape(heading)}</h3>\n' + "\n".join(content) + "\n</div>"


def details(summary: str, content: str) -> str:
    """Content that opens on a click, without a script."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def figure(png: bytes, alt: str, caption: str, *, wide: bool = False) -> str:
    """A picture inside the page; a wide one scrolls within its frame on a small screen."""
    data = base64.b64encode(png).decode("ascii")
    kind = "scroll wide" if wide else "scroll"
    return (
        f'<figure><div class="{kind}"><img src="data:image/png;base64,{data}" alt="{escape(alt)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], meanings: Mapping[str, str] | None = None
) -> str:
    """A table; the first cell of each row is its heading.

    Args:
        caption: What the table shows, above it.
        header: Headings of the columns.
        rows: Cells of each row; escaped.
        meanings: Heading of a row -> what it means, below the heading.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(_row(row, (meanings or {}).get(row[0], "")) for row in rows)
    return (
        f'<p class="note">{escape(caption)}</p>\n<div class="scroll"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(cells: Sequence[str], meaning: str) -> str:
    first, *rest = cells
    small = f"<small>{escape(meaning)}</small>" if meaning else ""
    others = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    return f'<tr><th scope="row">{escape(first)}{small}</th>{others}</tr>'
