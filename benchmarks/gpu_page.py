"""What the GPU's benchmarks found, for people: a line for each row, and a table of layers for a page of docs/."""

from pathlib import Path

from benchmarks import pages
from benchmarks.records import Row, is_ours

NAME = "kernels_gpu"
OURS = "moe_compile fused"
PUBLISHED = {
    "40960,768,256,128,8": (337, 365),
    "24576,1536,256,128,8": (363, 404),
    "32768,4096,512,128,8": (501, 509),
    "32768,4096,1024,128,8": (556, 565),
    "32768,4096,2048,64,4": (593, 584),
}
"""SonicMoE on an H100 by its authors (arXiv 2512.14080), without the router: TFLOP/s of the forward and backward."""
PEAK_GIB = {"24576,1536,256,128,8": 0.61}  # likewise: activation memory of a layer
REASONS: dict[str, str] = {}
"""Why ours is behind, by shape; filled by whoever found out."""


def line(row: Row, ceiling: float) -> str:
    """A row of kernels_gpu."""
    head = f"{row['shape']:<24}{row['routing']:<10}{row['what']:<18}{row['way']:<29}"
    if row.get("skipped"):
        return f"{head}{row['skipped']}"
    if row.get("red"):
        return f"{head}RED {row['red']}"
    ratio = f"  error {row['error_ratio']:.2f} of the loop's" if row.get("error_ratio") is not None else ""
    ratio += f"  keeps {row['kept_bytes'] / 2**20:.3f} MiB" if row.get("kept_bytes") is not None else ""
    if row["time_us"] is None:
        return f"{head}right, not timed{ratio}"
    tflops, gbs = (row[k] / row["time_us"] / f for k, f in (("flop", 1e6), ("bytes", 1e3)))
    speed = f"{tflops:>9.0f} TFLOP/s{100 * tflops / ceiling:>5.0f} %" if row["flop"] else " " * 24
    speed += f"{gbs:>9.0f} GB/s" if row["bytes"] else " " * 14
    return f"{head}{row['time_us']:>10.0f} us{speed}{row['peak_bytes'] / 2**30:>8.2f} GiB{ratio}"


def write(page: Path, machine: str, rows: list[Row]) -> None:
    """Put the table into its place in a page.  Raises `ValueError` if the page has none."""
    pages.write_into(page, NAME, summary(machine, rows))


def summary(machine: str, rows: list[Row]) -> str:
    """A table for each routing, of all shapes with a measured row of ours, and what is red."""
    mine = [row for row in rows if row["bench"] == NAME]
    of_layers = [row for row in mine if row.get("time_us") and row["what"] in ("layer forward", "layer f+b")]
    parts = [facts(machine, mine)]
    for routing in dict.fromkeys(row["routing"] for row in of_layers):
        here = [row for row in of_layers if row["routing"] == routing]
        lines = [of_shape(shape, here) for shape in dict.fromkeys(row["shape"] for row in here)]
        parts.append(f"Routing {routing}:\n\n{pages.table(HEAD, [found for found in lines if found])}")
    parts += [text for text in (of_slices(rows), of_tests(rows)) if text]
    red = [f"{r['bench']} {r['shape']} {r['routing']} {r['what']} {r['way']}: {r['red']}" for r in rows if r.get("red")]
    parts.append(f"Red or left out: {'; '.join(' '.join(text.split()) for text in red) or 'none'}.")
    return "\n\n".join(parts)


HEAD = [
    "T,H,I,E,K", "forward TFLOP/s", "of dense", "GB/s", "nearest peer: x", "f+b TFLOP/s", "of dense", "nearest peer: x",
    "keeps GiB", "peak GiB", "SonicMoE, published: forward, f+b", "behind: why",
]  # fmt: skip


def facts(machine: str, rows: list[Row]) -> str:
    """Where, when and with what."""
    if not rows:
        return f"{machine}: no layer was measured."
    found = {name: ", ".join(sorted({row[name] for row in rows})) for name in ("torch", "triton", "transformers")}
    dates, ceilings = [row["date"][:10] for row in rows], [row.get("dense_tflops", 0.0) for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    when = " to ".join(dict.fromkeys((min(dates), max(dates))))
    ceiling = " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(ceilings), max(ceilings))))
    return (
        f"{machine}, {versions}, {when}, `python -m benchmarks.kernels_gpu`, bf16; dense: 8192^3 in the same run, "
        f"{ceiling} TFLOP/s. x: the peer's time / ours. GB/s: by bytes that a forward must move at least. SonicMoE: on "
        "an H100, by its authors."
    )


def of_shape(shape: str, rows: list[Row]) -> list[str]:
    """One line of the table; nothing where ours was not timed."""
    cells, peers, kept, peak = [shape], [], "-", "-"
    for what in ("layer forward", "layer f+b"):
        here = {row["way"]: row for row in rows if (row["shape"], row["what"]) == (shape, what)}
        ours = here.get(OURS)
        if ours is None:
            cells += ["-"] * (4 if what == "layer forward" else 3)
            continue
        tflops = ours["flop"] / ours["time_us"] / 1e6
        cells += [f"{tflops:.0f}", f"{100 * tflops / ours['dense_tflops']:.0f} %"]
        cells += [f"{ours['bytes'] / ours['time_us'] / 1e3:.0f}"] if what == "layer forward" else []
        fastest = min((row for way, row in here.items() if not is_ours(way)), key=lambda r: r["time_us"], default=None)
        ratio = None if fastest is None else fastest["time_us"] / ours["time_us"]
        peers += [] if ratio is None else [ratio]
        cells.append("-" if fastest is None else f"{fastest['way']}: {ratio:.2f}")
        if what == "layer f+b":
            kept, peak = (gib(ours.get(name)) for name in ("kept_bytes", "peak_bytes"))
    if len(cells) == cells.count("-") + 1:
        return []
    published = f"{PEAK_GIB[shape]} GiB" if shape in PEAK_GIB else ""
    if shape in PUBLISHED:
        forward, backward = PUBLISHED[shape]
        both = 3 / (1 / forward + 2 / backward)  # 6 and 12 FLOP at those rates
        published = ", ".join(filter(None, [f"{forward}, {both:.0f}", published]))
    behind = any(ratio < 1 for ratio in peers)
    return [*cells, kept, peak, published or "-", REASONS.get(shape, "not known yet") if behind else ""]


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def of_slices(rows: list[Row]) -> str:
    """Steps of whole slices of models."""
    here = [row for row in rows if row["bench"] == "slices" and row.get("step_ms")]
    lines = [
        [row["shape"], row["way"], f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.0f}", gib(row["peak_bytes"])]
        for row in here
    ]
    return pages.table(["model", "way", "step ms", "tokens/s", "peak GiB"], lines) if here else ""


def of_tests(rows: list[Row]) -> str:
    """What the kernels' tests gave, in one line."""
    here = [row for row in rows if row["bench"] == "tests"]
    counts = [sum(row.get(name, 0) for row in here) for name in ("passed", "failed", "skipped")]
    return "Tests of kernels: {} passed, {} failed, {} skipped.".format(*counts) if here else ""
