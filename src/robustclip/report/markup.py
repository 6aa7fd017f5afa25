"""HTML that needs no script: blocks for a notebook or a page, folded parts, badges. All text is escaped here."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from robustclip.report.words import FLAGGED, STALE

SYMBOLS = {"supported": "✓", "mixed": "◐", "contradicted": "✗", "open": "?", "outside this world": "○"}
MARKS = {STALE: "measured with an older version of the code", FLAGGED: "the audit found this attack at fault"}


@dataclass(frozen=True, repr=False)
class Block:
    """A part of a page: its HTML, and the Markdown that stands for it where HTML is not shown."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def marked(text: str) -> str:
    """Escape a text; its marks † and ⚑ say what they mean."""
    text = escape(text)
    for mark, meaning in MARKS.items():
        text = text.replace(mark, f'<abbr title="{meaning}">{mark}</abbr>')
    return text


def folded(summary: str, html: str) -> str:
    """One line that opens to show more; nothing if there is no more."""
    opening = '<details class="robustclip-fold">'
    return f"{opening}<summary>{escape(summary)}</summary>\n{html}\n</details>" if html else ""


def paragraphs(texts: Iterable[str], kind: str) -> str:
    """Paragraphs of the class `robustclip-kind`."""
    return "\n".join(f'<p class="robustclip-{kind}">{escape(text)}</p>' for text in texts)


def badge(word: str, count: int | None = None) -> str:
    """A verdict as symbol and word, with a count if given: no meaning hangs on the color alone."""
    text = f"{SYMBOLS[word]} {word}" + (f" {count}" if count is not None else "")
    return f'<span class="robustclip-badge robustclip-{word.partition(" ")[0]}">{escape(text)}</span>'
