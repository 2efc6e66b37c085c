"""One HTML file that needs nothing beside it: no script, no font, no address."""

import base64
import io
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

WIDEST = 1100  # pixels of a picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; } h3 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; } thead th { border-bottom: 1px solid #888; }
figure { margin: 1rem 0 1.6rem; } img, svg { max-width: 100%; height: auto; } figcaption { font-size: .92rem; color: #444; max-width: 62rem; }
.note { border-left: 4px solid #0072B2; background: #f0f6fb; padding: .4rem .8rem; }
.warn { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .4rem .8rem; }
summary { cursor: pointer; }
"""

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts that are HTML already."""
    return HEAD.format(title=escape(title), style=STYLE) + f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """kind: "" | "note" | "warn"."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(rows: Iterable[Iterable[object]], head: Iterable[str] = ()) -> str:
    """Without `head`, the first cell of a row is its heading."""
    head = list(head)
    text = "<table>\n"
    if head:
        text += "<thead><tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in head) + "</tr></thead>\n"
    for row in rows:
        cells = [escape(str(cell)) for cell in row]
        first = "" if head else f'<th scope="row">{cells.pop(0)}</th>'
        text += f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
    return text + "</table>"


def folded(title: str, inner: str) -> str:
    """What is shown on a click."""
    return f"<details><summary>{escape(title)}</summary>\n{inner}\n</details>"


def picture(png: bytes, alt: str, caption: str) -> str:
    from PIL import Image

    width, height = Image.open(io.BytesIO(png)).size
    data = base64.b64encode(png).decode()
    image = f'<img width="{width}" height="{height}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def png_of(figure) -> bytes:
    """Of a matplotlib Figure, at its own dpi."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return file.getvalue()


def png_from(path: Path) -> bytes:
    """A picture file, made smaller where it is wider than the page. Raises OSError for a file that is no picture."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.quantize(256, Image.Quantize.FASTOCTREE).save(file, "png", optimize=True)  # a third of the bytes; rare colours keep their hue
    return file.getvalue()


def svg_of(figure, alt: str) -> str:
    """A matplotlib Figure as an <svg> with its words as text. One a page: the ids within would be there twice."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pix2rep"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    named = text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    return f"<figure>{named}</figure>"
