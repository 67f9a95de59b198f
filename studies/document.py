"""A report as a list of blocks, rendered as Markdown and as one self-contained HTML file."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from owl_det.annotate.label_spaces import escape_markdown

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto;
  margin: 1rem 0 }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.7rem; text-align: left }
th { border-bottom: 2px solid #888; vertical-align: bottom }
td { white-space: nowrap; vertical-align: top }
td.prose { white-space: normal; min-width: 16rem }
span { padding: 0.05rem 0.45rem; border-radius: 0.6rem; border: 1px solid transparent }
.good { background: #d3efdf; color: #0b4a2e }
.bad { background: #fbdcd0; color: #7a2400 }
.unsure { background: #e8e8e8; color: #333 }
.good-open { border-color: #0b7a4b; color: #0b4a2e }
.bad-open { border-color: #c04a12; color: #7a2400 }
img { max-width: 100% }
figure { margin: 1rem 0 }
pre { overflow-x: auto; font-size: 0.8rem }
"""

_PROSE = 30  # characters; longer cells may break


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


Tone = Literal["good", "bad", "unsure", "good-open", "bad-open"]


@dataclass(frozen=True)
class Mark:
    """Text in the colour of what it says."""

    text: str
    tone: Tone


Cell = str | Mark


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    file: str  # PNG, relative to the report
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under a summary."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Text | Table | Picture | Code | Details


def markdown(blocks: Iterable[Block]) -> str:
    """Text is escaped; pictures are links."""
    return "\n".join(f"{_markdown(block)}\n" for block in blocks)


def html_page(title: str, blocks: Iterable[Block], folder: Path) -> str:
    """One page: text is escaped, pictures of `folder` are within, and are links to their files."""
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Text(text):
            return escape_markdown(text)
        case Table(header, rows):
            lines = [header, ["---"] * len(header)]
            lines += [[escape_markdown(_text(cell)) for cell in row] for row in rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(file, caption):
            return f"![{escape_markdown(caption)}]({quote(file)})\n\n{escape_markdown(caption)}"
        case Code(text):
            return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        case Details(summary, blocks):
            opened = f"<details><summary>{html.escape(summary)}</summary>"
            return f"{opened}\n\n{markdown(blocks)}\n</details>"


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            head = f"<tr>{head}</tr>"
            body = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
            return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        case Picture(file, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            text = html.escape(caption)
            image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
            image = f'<a href="{quote(file)}">{image}</a>'
            return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Details(summary, blocks):
            body = "\n".join(_html(inner, folder) for inner in blocks)
            return f"<details><summary>{html.escape(summary)}</summary>\n{body}\n</details>"


def _html_cell(cell: Cell) -> str:
    """Numbers stay in one line; prose has room to break."""
    text = html.escape(_text(cell))
    if isinstance(cell, Mark):
        return f'<td><span class="{cell.tone}">{text}</span></td>'
    return f'<td class="prose">{text}</td>' if len(text) > _PROSE else f"<td>{text}</td>"


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Mark) else cell
