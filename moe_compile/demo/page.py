"""HTML pieces: escaping, tables, figures, the page around them. No file, font or script outside."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --tint: #f8fafc; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 28px 72px; background: #fff;
  color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { margin: 0 0 4px; font-size: 28px; letter-spacing: -0.01em; }
h2 { margin: 48px 0 6px; padding-top: 20px; border-top: 2px solid var(--line); font-size: 22px; }
h3 { margin: 30px 0 8px; font-size: 16px; }
p { margin: 6px 0 12px; max-width: 76ch; }
.soft { color: var(--soft); }
.badge { display: inline-block; padding: 2px 10px; border-radius: 999px; font-size: 13px;
  font-weight: 600; }
.pass { background: #dcfce7; color: #166534; }
.fail { background: #fee2e2; color: #991b1b; }
.none { background: #f3f4f6; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin: 20px 0; }
.card { padding: 14px 18px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--tint); }
.card b { display: block; font-size: 25px; line-height: 1.25; }
.card span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
table { width: 100%; margin: 10px 0 16px; border-collapse: collapse; font-size: 13.5px; }
th { padding: 7px 10px; border-bottom: 2px solid var(--line); color: var(--soft); text-align: left;
  font-weight: 600; white-space: nowrap; }
td { padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.best td { background: #eff6ff; }
figure { margin: 12px 0; }
figure img { display: block; max-width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
@media (max-width: 800px) { .pair { grid-template-columns: 1fr; } }
pre { overflow: auto; max-height: 520px; margin: 6px 0 14px; padding: 12px 14px;
  border: 1px solid var(--line); border-radius: 8px; background: var(--tint);
  font: 12px/1.5 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
pre i { color: var(--soft); font-style: normal; }
details { margin: 8px 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, body: str) -> str:
    """Return a whole document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = 0, best: int = -1) -> str:
    """Return a table of HTML cells: columns 1 to `numeric` align right, row `best` is tinted."""

    def cell(tag: str, column: int, content: str) -> str:
        kind = ' class="num"' if 1 <= column <= numeric else ""
        return f"<{tag}{kind}>{content}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(cell(tag, column, content) for column, content in enumerate(cells))

    body = "\n".join(
        f"<tr{' class=best' if index == best else ''}>{line('td', row)}</tr>" for index, row in enumerate(rows)
    )
    return (
        f'<div class="wide"><table><thead><tr>{line("th", head)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def badge(passed: bool | None, text: str = "") -> str:
    """Return a coloured word: green for True, red for False, grey for None."""
    kind = "none" if passed is None else "pass" if passed else "fail"
    return f'<span class="badge {kind}">{escape(text or ("PASS" if passed else "FAIL"))}</span>'


def card(value: str, label: str) -> str:
    """Return one headline number and what it is."""
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def figure(png: bytes, caption: str) -> str:
    """Return an inline picture."""
    data = base64.b64encode(png).decode()
    alt = escape(caption, quote=True)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"></figure>'


def facts(entries: dict[str, str]) -> str:
    """Return a two-column table of names and values."""
    return table(("", ""), [(escape(name), escape(value)) for name, value in entries.items()])
