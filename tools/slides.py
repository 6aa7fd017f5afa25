"""Slides from the figures of the book that was made last, one deck per part: `make slides`, after `make book`.

A slide holds the title of a page, its first sentence, and one figure with its caption, all read from the executed
notebooks. Each deck is one file that asks nobody for anything: arrow keys turn the slides, and printing gives a page
for each.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

import nbformat

from parts import arguments, parts_of

FIGURE = re.compile(r'<figure class="robustclip-figure">.*?</figure>', re.DOTALL)
IMAGE = re.compile(r"<img [^>]*>")
CAPTION = re.compile(r"<figcaption>(.*?)(?:<span|</figcaption>)", re.DOTALL)
STYLE = """
body { margin: 0; font: 22px/1.4 system-ui, sans-serif; color: #222; background: #fff; }
section { box-sizing: border-box; height: 100vh; padding: 4vh 6vw; display: flex; flex-direction: column;
          align-items: center; justify-content: center; text-align: center; }
h1 { font-size: 2.4em; margin: 0; } h2 { font-size: 1.5em; margin: 0; } p { max-width: 48em; margin: 1vh 0; }
figure { margin: 0; min-height: 0; flex: 0 1 auto; display: flex; flex-direction: column; align-items: center; }
img { max-width: 100%; min-height: 0; max-height: 62vh; object-fit: contain; }
figcaption, footer { font-size: 0.75em; color: #555; }
@media print { @page { size: A4 landscape; margin: 0; } section { break-after: page; } }
"""
SCRIPT = """
const slides = [...document.querySelectorAll("section")];
const here = () => slides.findIndex((slide) => slide.getBoundingClientRect().bottom > innerHeight / 2);
addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 }[event.key];
  const next = slides[here() + (step || 0)];
  if (step && next) { event.preventDefault(); next.scrollIntoView(); }
});
"""


@dataclass(frozen=True)
class Slide:
    """One figure of a page: the page's title and first sentence, the figure's `<img>` and its caption, as HTML."""

    title: str
    said: str
    image: str
    caption: str


def slides_of(notebook: Path) -> Iterator[Slide]:
    """A slide for each figure in the outputs of an executed notebook, each figure once."""
    page = nbformat.read(notebook, as_version=4)
    prose = "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# (.+)$", prose, re.MULTILINE)
    title = heading[1] if heading else notebook.stem
    said = page.metadata.get("myst", {}).get("html_meta", {}).get("description", "")
    seen = set()
    for cell in page.cells:
        for output in cell.get("outputs", []):
            for figure in FIGURE.findall("".join(output.get("data", {}).get("text/html", ""))):
                image, caption = IMAGE.search(figure), CAPTION.search(figure)
                if image and 'src="data:' in image[0] and image[0] not in seen:
                    seen.add(image[0])
                    words = caption[1].strip() if caption else ""
                    yield Slide(escape(title), escape(whole(unescape(said))), image[0], words)


def whole(sentence: str) -> str:
    """A sentence as it is; one that was cut for previews up to its last whole word, with dots."""
    return sentence if not sentence or sentence[-1] in ".?!" else f"{sentence.rpartition(' ')[0]} …"


def deck(title: str, slides: list[Slide]) -> str:
    """One HTML file with all slides."""
    sections = [f"<section><h1>{escape(title)}</h1><p>Robust CLIP, Reproduced</p></section>"]
    for number, slide in enumerate(slides, start=1):
        sections.append(
            f"<section><h2>{slide.title}</h2>\n<p>{slide.said}</p>\n<figure>{slide.image}\n"
            f"<figcaption>{slide.caption}</figcaption></figure>\n<footer>{number} / {len(slides)}</footer></section>"
        )
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(sections)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def main() -> None:
    """Write one deck per part of the table of contents that has figures."""
    given = arguments(__doc__, "slides")
    for title, name, notebooks in parts_of(given.executed):
        slides = [slide for notebook in notebooks for slide in slides_of(notebook)]
        if slides:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / f"{name}.html").write_text(deck(title, slides), encoding="utf8")
        print(f"{len(slides):4} slides  {name}")


if __name__ == "__main__":
    main()
