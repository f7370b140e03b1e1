"""Pictures of the results in docs/figures/, an SVG for light pages and one for dark ones; `make report` draws them.

Each is of one machine and says which in its title. It carries the digest of the result file that it was drawn from, so
that `python -m benchmarks.report --check` needs no matplotlib to see whether it is in step.
"""

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from benchmarks import record, timing

RESULTS = record.ROOT / "benchmarks" / "results"
FIGURES = record.ROOT / "docs" / "figures"
OURS = "#e8590c"
PEERS = ("#1c7ed6", "#2f9e44", "#9c36b5", "#0c8599", "#c2255c", "#868e96", "#5f3dc4", "#99801d")
MARKS = "osD^vPX*<>ph"
THEMES = {"light": ("#24292f", "#d0d7de"), "dark": ("#e6edf3", "#444c56")}  # text, grid; both on a clear ground
# of an element that is moved: LayerNorm reads two and writes one, and does nine operations for each it writes; pack and
# unpack move it alone, and are drawn as if that were one
ELEMENTWISE = {"add_layer_norm": 3.0, "embed_layer_norm": 3.0, "pool": 1.0, "pack": 1.0, "unpack": 1.0}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def precision(rows: list[dict[str, Any]]) -> str:
    """What people run: bfloat16 where it was measured."""
    found = {row["dtype"] for row in rows}
    return next((name for name in ("bfloat16", "float16", "float32") if name in found), "float32")


def _ours(provider: str) -> bool:
    return provider.startswith("fastdistil")


class Styles:
    """A colour and a marker for each provider, the same in every picture of a file; ours are orange."""

    def __init__(self, rows: list[dict[str, Any]]):
        names = list(dict.fromkeys(row["provider"] for row in rows))
        peers, ours = [n for n in names if not _ours(n)], [n for n in names if _ours(n)]
        # after eight peers the colours come again with other markers
        self._of = {n: {"color": PEERS[i % 8], "marker": MARKS[(i + i // 8) % 8]} for i, n in enumerate(peers)}
        lines = ("-", "--", ":", "-.")
        self._of |= {n: {"color": OURS, "marker": MARKS[i % 8], "linestyle": lines[i % 4]} for i, n in enumerate(ours)}

    def __getitem__(self, provider: str) -> dict[str, Any]:
        return self._of[provider]


# --- pictures: axes and a result; False where the result has nothing to draw ------------------------------------------


def roofline(ax: Any, result: dict[str, Any]) -> bool:
    """Every op at its largest shape below what this machine reaches in copies and in matrix products."""
    dtype = precision(result["rows"])
    largest: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        if row["provider"] == "fastdistil" and row["dtype"] == dtype and "cold" in row:
            label = row["op"]
            if label in ("linear", "linear_add_layer_norm"):  # of two depths
                label += f", {row['shape'].partition(' x ')[2]}"
            if label not in largest or row["bytes"] > largest[label]["bytes"]:
                largest[label] = row
    if not largest:
        return False
    bandwidth, peak = result["ceilings"]["copy"]["bytes_per_s"], result["ceilings"][dtype]["flops_per_s"]
    points = {}
    for label, row in largest.items():
        work = row["flops"] or ELEMENTWISE[row["op"]] * row["bytes"] / SIZES[dtype]
        points[f"{label} ({row['shape']})"] = work / row["bytes"], work / row["cold"]["median_us"] * 1e6
    low, high = min(x for x, _ in points.values()) / 2, max(x for x, _ in points.values()) * 3
    edge = peak / bandwidth
    ax.plot([low, edge, max(high, 2 * edge)], [low * bandwidth, peak, peak], color="#868e96", zorder=1)
    for i, (label, (x, y)) in enumerate(points.items()):
        ax.plot(x, y, MARKS[i % len(MARKS)], color=(OURS, "#868e96")[i // len(MARKS) % 2], label=label, markersize=7)
    ax.set(xscale="log", yscale="log", xlabel="FLOP a byte moved", ylabel="FLOP/s")
    ax.set_title(f"Roofline, {dtype}: lines are this machine's measured copy and matrix product")
    return True


def _encoder(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    dtype = precision(result["rows"])
    yield from (row for row in result["rows"] if row["dtype"] == dtype and "tokens_per_s" in row and "texts" in row)


def throughput(ax: Any, result: dict[str, Any]) -> bool:
    """Tokens/s by length, full batches of the most texts measured, every provider."""
    rows = [row for row in _encoder(result) if row["fill"] == 1]
    most = max((row["texts"] for row in rows), default=0)
    lines = _lines((row for row in rows if row["texts"] == most), "length", lambda row: row["tokens_per_s"])
    _draw(ax, lines, Styles(result["rows"]))
    _powers(ax, lines, "tokens a text")
    ax.set(ylabel="tokens/s", ylim=(0, None))
    ax.set_title(f"Throughput, {most} texts of one length, {precision(result['rows'])}")
    return bool(lines)


def fill(ax: Any, result: dict[str, Any]) -> bool:
    """How many times as long each peer takes as our quickest call, by the part of a batch that is no padding."""
    rows = [row for row in _encoder(result) if not row["batch"].endswith("docstrings")]
    most = max((row["texts"] for row in rows), default=0)
    length = 128 if any(row["length"] == 128 for row in rows) else max((row["length"] for row in rows), default=0)
    rows = [row for row in rows if row["texts"] == most and row["length"] == length]
    best: dict[float, dict[str, Any]] = {}
    for row in rows:
        if (
            timing.is_ours(row["provider"])
            and row["median_us"] < best.get(row["fill"], {"median_us": math.inf})["median_us"]
        ):
            best[row["fill"]] = row
    peers = [row for row in rows if not _ours(row["provider"]) and row["fill"] in best]
    lines = _lines(peers, "fill", lambda row: timing.ratio(row, best[row["fill"]]))
    _draw(ax, lines, Styles(result["rows"]))
    ax.axhline(1, color=OURS, linewidth=1)
    ax.set(xlabel="fill: real tokens of all", ylabel="times as long as fastdistil", ylim=(0, None))
    ax.set_title(f"Speedup by fill, {most} texts of at most {length} tokens, {precision(result['rows'])}")
    return bool(lines)


def latency(ax: Any, result: dict[str, Any]) -> bool:
    """Median and 99th percentile of one call, by the number of texts."""
    rows = [row for row in _encoder(result) if row["fill"] == 1]
    length = 128 if any(row["length"] == 128 for row in rows) else max((row["length"] for row in rows), default=0)
    rows = [row for row in rows if row["length"] == length]
    lines = _lines(rows, "texts", lambda row: row["median_us"] / 1e3)
    late = _lines(rows, "texts", lambda row: row["p99_us"] / 1e3)
    styles = Styles(result["rows"])
    _draw(ax, lines, styles)
    for name, (xs, ys) in lines.items():
        ax.fill_between(xs, ys, late[name][1], color=styles[name]["color"], alpha=0.12, linewidth=0)
    _powers(ax, lines, "texts")
    until = "99th percentile" if all(row["rounds"] >= 100 for row in rows) else "99th percentile, or the slowest"
    ax.set(yscale="log", ylabel=f"milliseconds a call, to the {until}")
    ax.set_title(f"Latency, texts of {length} tokens, {precision(result['rows'])}")
    return bool(lines)


def error(ax: Any, result: dict[str, Any]) -> bool:
    """The largest error of each op by each provider, over all its shapes, by the largest value."""
    dtype = precision(result["rows"])
    largest: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["dtype"] == dtype and "error" in row:
            of_op = largest.setdefault(row["provider"], {})
            of_op[row["op"]] = max(row["error"]["max"], of_op.get(row["op"], 0))
    ops = list(dict.fromkeys(row["op"] for row in result["rows"]))
    styles = Styles(result["rows"])
    for name, of_op in largest.items():
        style = styles[name] | {"linestyle": "none"}
        ax.plot([v or None for v in of_op.values()], [ops.index(op) for op in of_op], label=name, alpha=0.8, **style)
    ax.set_yticks(range(len(ops)), ops)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="largest error against float64, by the largest value")
    ax.set_title(f"Error, {dtype}")
    return bool(largest)


def _lines(rows: Any, by: str, value: Callable[[dict[str, Any]], float]) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        found.setdefault(row["provider"], {})[row[by]] = value(row)
    return {name: tuple(zip(*sorted(points.items()), strict=True)) for name, points in found.items()}  # type: ignore[misc]


def _draw(ax: Any, lines: dict[str, tuple[list[float], list[float]]], styles: Styles) -> None:
    for name, (xs, ys) in lines.items():
        ax.plot(xs, ys, label=name, linewidth=2 if _ours(name) else 1.2, markersize=5, **styles[name])


def _powers(ax: Any, lines: dict[str, tuple[list[float], list[float]]], label: str) -> None:
    xs = sorted({x for found, _ in lines.values() for x in found})
    ax.set_xscale("log", base=2)
    ax.set_xticks(xs, [f"{x:g}" for x in xs])
    ax.minorticks_off()
    ax.set_xlabel(label)


# --- files ------------------------------------------------------------------------------------------------------------

PICTURES: dict[str, tuple[str, Callable[[Any, dict[str, Any]], bool]]] = {
    "throughput": ("encoder.json", throughput),
    "fill": ("encoder.json", fill),
    "latency": ("encoder.json", latency),
    "roofline": ("kernels.json", roofline),
    "error": ("kernels.json", error),
}


def wanted(results: Path = RESULTS) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(machine's directory, picture, result) of everything that has something to show. Raises ValueError for a file
    that was edited."""
    for place in sorted(p for p in results.iterdir() if p.is_dir()):
        for name, (file, picture) in PICTURES.items():
            if (place / file).is_file():
                result = record.measured(place / file)
                if result.get("model"):
                    raise ValueError(f"{place / file} is of another model, {result['model']}")
                if picture(MagicMock(), result):  # on axes that draw nothing
                    yield place.name, name, result


def draw(results: Path = RESULTS, figures: Path = FIGURES) -> None:
    """All pictures anew; those of what is no longer measured are removed."""
    import matplotlib

    matplotlib.use("svg")
    figures.mkdir(parents=True, exist_ok=True)
    stale = set(figures.glob("*.svg"))
    for place, name, result in wanted(results):
        for theme in THEMES:
            path = figures / f"{place}-{name}-{theme}.svg"
            path.write_text(_svg(PICTURES[name][1], theme, result), encoding="utf-8")
            stale.discard(path)
    for path in stale:
        path.unlink()
    drawn = [(place, name) for place, name, _ in wanted(results)]
    (figures / "README.md").write_text(page(drawn, figures), encoding="utf-8")


def tag(place: str, name: str, directory: str = "") -> str:
    """Markdown that shows a picture, as light or dark as the page."""
    light, dark = (f"{directory}{place}-{name}-{theme}.svg" for theme in THEMES)
    about = (PICTURES[name][1].__doc__ or "").splitlines()[0]
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{about}" src="{light}"></picture>'
    )


def page(found: list[tuple[str, str]], figures: Path) -> str:
    """docs/figures/README.md: every picture, by machine, and what the files there hold, so that an edit is seen."""
    lines = ["# Measured", "", "Drawn by `make report` from benchmarks/results/."]
    for place in dict.fromkeys(place for place, _ in found):
        lines += ["", f"## {place}"]
        for name in (name for where, name in found if where == place):
            lines += ["", (PICTURES[name][1].__doc__ or "").splitlines()[0], "", tag(place, name)]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(figures.glob("*.svg"))}
    lines += ["", "<!-- sha256", *(f"{digest} {name}" for name, digest in digests.items()), "-->"]
    return "\n".join(lines) + "\n"


def _svg(picture: Callable[[Any, dict[str, Any]], bool], theme: str, result: dict[str, Any]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text, grid = THEMES[theme]
    colours = {f"{name}.color": text for name in ("text", "xtick", "ytick")} | {
        f"axes.{name}color": text for name in ("edge", "label", "title")
    }
    style = {"svg.hashsalt": "fastdistil", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
    with mpl.rc_context(style | colours | {"grid.color": grid, "legend.labelcolor": text}):
        fig = Figure(figsize=(8.5, 4.2), layout="constrained")
        ax = fig.add_subplot()
        picture(ax, result)
        ax.grid(True, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        fig.suptitle(machine(result), fontsize=8)
        with io.StringIO() as file:
            about = {"Date": None, "Creator": None, "Description": f"drawn from {result['digest']}"}
            fig.savefig(file, format="svg", transparent=True, metadata=about)
            return re.sub(r"[ \t]+$", "", file.getvalue(), flags=re.MULTILINE)


def machine(result: dict[str, Any]) -> str:
    """The device and versions, in a line."""
    gpu = result["gpu"]
    where = gpu["name"] if gpu else f"on CPU, not on a GPU: {result['cpu']}, {result['threads']} threads"
    changed = " with changes" if result["commit"]["dirty"] else ""
    commit = f"commit {result['commit']['id'][:9]}{changed}"
    return f"{where}, torch {result['torch']}, triton {result['triton']}, {result['date'][:10]}, {commit}"


def out_of_step(results: Path = RESULTS, figures: Path = FIGURES) -> list[str]:
    """What differs between the pictures there and the results, without drawing: a missing, old or foreign file."""
    found, expected, drawn = [], {}, []
    for place, name, result in wanted(results):
        drawn.append((place, name))
        for theme in THEMES:
            expected[f"{place}-{name}-{theme}.svg"] = result["digest"]
    there = {path.name: path for path in figures.glob("*.svg")} if figures.is_dir() else {}
    for name, digest in expected.items():
        if name not in there:
            found.append(f"{name} is missing")
        elif f"drawn from {digest}" not in there[name].read_text(encoding="utf-8"):
            found.append(f"{name} was drawn from other results")
    found += [f"{name} shows nothing that is in the results" for name in sorted(there.keys() - expected.keys())]
    readme = figures / "README.md"
    if not found and (not readme.is_file() or readme.read_text(encoding="utf-8") != page(drawn, figures)):
        found.append("a picture or docs/figures/README.md is not as it was drawn")
    return found
