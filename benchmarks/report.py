"""What benchmarks/results/ says.

python -m benchmarks.report                  # README's tables, and the pictures in docs/figures/
python -m benchmarks.report --check          # exit status 1 where either is not in step with them
python -m benchmarks.report --goals          # id goal measured met|missed|unmeasured; 1 where a measured one is missed
python -m benchmarks.report --compare A B    # files, directories or git revisions; 1 where B is slower beyond noise
"""

import argparse
import re
import sys
from typing import Any

from benchmarks import compare, figures, goals, kernels, record, timing

RESULTS = record.ROOT / "benchmarks" / "results"


def cpu_table() -> str:
    """Ratios of pytest-benchmark's JSON in results/cpu/, and of results/cpu-*/ beside them."""
    lines, machines = _ratios("encode.json", "peer's fill", "peer_fill", ".2f")
    return "\n".join([*lines, "", machines])


def jobs_table() -> str:
    """Jobs against `encode` and CTranslate2, and what they need of time and memory."""
    lines, machines = _ratios("jobs.json", "mean cosine", "mean_cosine", ".4f")
    facts = [
        f"A process that embeds one text takes {entry['stats']['median']:.1f} s from start to end."
        for entry in _read("jobs.json")["benchmarks"]
        if entry["name"].startswith("bench_start")
    ]
    facts += [
        f"The blocks' matrix products alone, of the same batches, with nothing between them, take "
        f"{1 / entry['extra_info']['products_ratio']:.2f} of CTranslate2's time in float32."
        for entry in _read("jobs.json")["benchmarks"]
        if "products_ratio" in entry["extra_info"]
    ]
    facts += [
        f"Tokenising on one thread: {words['tokens_per_second']:,.0f} tokens/s, {words['of_bare']:.2f} of the bare "
        f"tokenizer's, {words['over_call']:.1f}x transformers' call."
        for words in (entry["extra_info"] for entry in _read("tokenizer.json")["benchmarks"])
    ]
    for entry in _read("memory.json")["benchmarks"]:
        info = entry["extra_info"]
        if "late_bytes" in info:
            facts.append(
                f"A job of {info['rows']:,} short rows: {info['early_bytes'] / 2**20:,.0f} MiB at most in its first "
                f"fifth, {info['late_bytes'] / 2**20:,.0f} MiB in its second half (two layers of width 32)."
            )
    facts += [line for name in ("tokenizer.json", "memory.json") for line in _failures(_read(name))]
    return "\n".join([*lines, "", *facts, "", machines])


def _ratios(name: str, last: str, key: str, form: str) -> tuple[list[str], str]:
    """A suite's table, with the ratios on other processors as columns of their own, and a line for each machine."""
    result = _read(name)
    others = [record.measured(path) for path in sorted(RESULTS.glob(f"cpu-*/{name}"))]
    head = f"| against | ratio | fastdistil, tokens/s | peer, tokens/s | {last} |"
    lines = [
        head + "".join(f" ratio, {_short(other)} |" for other in others),
        "|---" + "|--:" * (4 + len(others)) + "|",
    ]
    beside = [
        {entry["extra_info"].get("peer"): entry["extra_info"] for entry in other["benchmarks"]} for other in others
    ]
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        if "ratio" in info:
            more = format(info[key], form) if info.get(key) else ""
            line = f"| {info['peer']} | {info['ratio']:.2f}x | {' | '.join(_rates(info))} | {more} |"
            there = (found.get(info["peer"]) for found in beside)
            lines.append(line + "".join(f" {one['ratio']:.2f}x |" if one else " |" for one in there))
    lines += [line for failure in _failures(result) for line in ("", failure)]
    return lines, "  \n".join(map(_machine, (result, *others)))


def _short(result: dict[str, Any]) -> str:
    """A processor by its maker's name for it, without what every name has."""
    return re.sub(r"\((?:R|TM)\)|\b(?:Processor|CPU)\b.*", "", result["machine_info"]["cpu"]).strip()


def _failures(result: dict[str, Any]) -> list[str]:
    """What has no figures, for one of its checks failed."""
    found = [name.partition("::")[2] for name in result.get("wrong", ())]
    return [f"WRONG, so without figures: {', '.join(found)}."] if found else []


def pipelines_table() -> str:
    """Labels of texts against transformers' pipelines."""
    lines, machines = _ratios("pipelines.json", "peer's batch size", "batch_size", "d")
    return "\n".join([*lines, "", machines])


def host_table() -> str:
    """What a call on a GPU takes of the host, on a driver that runs nothing."""
    result = _read("host.json")
    lines = [
        "| batch | fastdistil, us | by the ops and Triton's look at arguments, us | transformers' dispatch, us |",
        "|---|--:|--:|--:|",
    ]
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        lines.append(f"| {info['batch']} | {' | '.join(f'{us:,.0f}' for us in info['us'].values())} |")
    return "\n".join([*lines, *_failures(result), "", _machine(result)])


def encoder_table() -> str:
    """Our quickest call and transformers' at each batch: of a GPU where one was measured, else of the CPU."""
    results = goals.Results()
    result = results.table("encoder")
    if result is None:
        return "Not measured yet."
    peers = [n for n in dict.fromkeys(r["provider"] for r in result["rows"]) if not n.startswith("fastdistil")]
    timed: dict[tuple[str, str], dict[str, Any]] = {}
    most = max((row["texts"] for row in result["rows"] if row["fill"] == 1), default=0)
    for row in result["rows"]:
        if "tokens_per_s" in row and _telling(row, most):
            timed.setdefault((row["batch"], row["dtype"]), {})[row["provider"]] = row
    peers = [name for name in peers if any(name in case for case in timed.values())]
    head = [name.removeprefix("transformers ") for name in peers]
    memory = any(row.get("peak_bytes") for case in timed.values() for row in case.values())
    lines = [
        f"| batch | precision | fastdistil, tokens/s | ms (p99, or slowest of fewer than 100) "
        f"{'| peak MiB (of sdpa) ' * memory}| {' | '.join(f'{n}, ratio' for n in head)} |"
    ]
    lines.append("|---|---|--:|--:|" + "--:|" * memory + "--:|" * len(peers))
    for (batch, dtype), case in sorted(timed.items(), key=_by_size):
        ours = [row for name, row in case.items() if timing.is_ours(name)]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["median_us"])
        ratios = [f"{timing.ratio(case[p], best):.2f}x" if p in case else "" for p in peers]
        took = f"{best['median_us'] / 1e3:,.1f} ({best['p99_us'] / 1e3:,.1f})"
        took += f" | {_mib(best)} ({_mib(case.get('transformers sdpa', {}))})" * memory
        lines.append(f"| {batch} | {dtype} | {best['tokens_per_s']:,.0f} | {took} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", *_stopped(result), *_missing(result), *_wrong(result), "", _where(result)])


def _mib(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else ""


def _by_size(item: tuple[tuple[str, str], dict[str, Any]]) -> tuple:
    """Batches of a precision from the largest on, however they were measured; docstrings last."""
    (batch, dtype), case = item
    row = next(iter(case.values()))
    return dtype, batch.endswith("docstrings"), -row["texts"], -row["length"], -row["fill"]


def _missing(result: dict[str, Any]) -> list[str]:
    gone = kernels.absent(result["rows"]).items()
    found = [f"{name} ({why})" for name, why in gone if name != timing.OVERLAPPED]  # which no user gets
    return [f"Missing: {'; '.join(found)}."] if found else []


def _stopped(result: dict[str, Any]) -> list[str]:
    whole = result.get("whole", True)
    return [] if whole else ["The run was stopped before its end: who and what is not here was not reached."]


def _wrong(result: dict[str, Any]) -> list[str]:
    """What has no speed, for what it computed was wrong or it broke."""
    found = [f"{row['provider']} at {row.get('batch') or row['shape']}" for row in result["rows"] if "wrong" in row]
    return [f"WRONG, so without a speed: {'; '.join(found)}."] if found else []


def _telling(row: dict[str, Any], most: int) -> bool:
    """Of all batches the most texts and a single one, of 32 and 128 tokens, full and half full, and docstrings."""
    few = row["texts"] in (1, most) and row["length"] in (32, 128) and (row["fill"] == 1 or 0.45 < row["fill"] < 0.6)
    return few or row["batch"].endswith("docstrings")


def kernels_table() -> str:
    """Every op beside its best peer at the largest shape of each kind, in the precision that people run: of a GPU where
    one was measured, else of the CPU. Lengths that are all alike, and for attention long-tailed ones."""
    results = goals.Results()
    result = results.table("kernels")
    if result is None:
        return "Not measured yet."
    dtype = figures.precision(result["rows"])
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        told = "=" not in row["shape"] or "fixed" in row["shape"]
        told |= row["op"] == "attention" and "long-tailed" in row["shape"]
        if row["dtype"] == dtype and "cold" in row and told:
            cases.setdefault(f"{row['op']}, {row['shape']}", {})[row["provider"]] = row
    kinds: dict[str, str] = {}  # what differs in more than the number of rows
    for name, case in cases.items():
        op, shape = next(iter(case.values()))["op"], name.partition(", ")[2]
        kind = name if "=" in shape else f"{op} {shape.partition(' x ')[2]}"
        largest = cases.get(kinds.get(kind, ""), case)
        if "fastdistil" in case and case["fastdistil"]["bytes"] >= largest["fastdistil"]["bytes"]:
            kinds[kind] = name
    predicted = any(row.get("predicted_us") for case in cases.values() for row in case.values())
    lines = [
        f"| op, {dtype} | fastdistil, us (IQR) {'| predicted ' * predicted}| in a graph | GB/s, of a copy "
        "| TFLOP/s, of a product | best peer | ratio | largest error by the peer's |",
        f"|---|--:|{'--:|' * predicted}--:|--:|--:|---|--:|--:|",
    ]
    for name in kinds.values():
        case = dict(cases[name])
        mine = case.pop("fastdistil")
        peers = {n: row for n, row in case.items() if not n.startswith("fastdistil")}
        best = min(peers, key=lambda n: peers[n]["cold"]["median_us"], default=None)
        took = mine["cold"]
        graph = f"{mine['graph']['median_us']:,.0f}" if result["gpu"] else "none on CPU"
        moved = f"{mine['bytes'] / took['median_us'] / 1e3:,.0f}, {mine['of_copy']:.0%}"
        computed = f"{mine['flops'] / took['median_us'] / 1e6:.2f}, {mine['of_matmul']:.0%}" if mine["flops"] else ""
        line = f"| {name} | {took['median_us']:,.0f} ({took['iqr_us']:,.0f}) "
        if predicted:
            line += f"| {_guess(mine['predicted_us'], took['median_us'])} "
        line += f"| {graph} "
        line += f"| {moved} | {computed} |"
        if best:
            off = peers[best]["error"]["max"]
            error = f"{mine['error']['max'] / off:.2f}" if off else ""
            line += f" {best} | {timing.ratio(peers[best]['cold'], took):.2f}x | {error} |"
        else:
            line += " none | | |"
        lines.append(line)
    return "\n".join([*lines, "", *_stopped(result), *_missing(result), *_wrong(result), "", _where(result)])


def _guess(predicted: float | None, measured: float) -> str:
    """The roofline model's time, and how much of it was taken."""
    return f"{predicted:,.0f}, {measured / predicted:.0%}" if predicted else "none"


def pictures() -> str:
    """Throughput by length and speedup by fill: of a GPU where one was measured, else of the CPU."""
    place = goals.Results().shown
    there = {name: result for where, name, result in figures.wanted(RESULTS) if where == place}
    return "\n\n".join(figures.tag(place, name, "docs/figures/") for name in ("throughput", "fill") if name in there)


def _where(result: dict[str, Any]) -> str:
    gpu = result["gpu"]
    device = f"{gpu['name']}, driver {gpu.get('driver_version', 'unknown')}" if gpu else result["cpu"]
    threads = "" if gpu else f", {result['threads']} threads"
    changed = " with changes" if result["commit"]["dirty"] else ""
    return (
        f"{device}{threads}, torch {result['torch']}, triton {result['triton']}, {result['date'][:10]}, "
        f"commit {str(result['commit']['id'])[:9]}{changed}."
    )


def _read(name: str) -> Any:
    return record.measured(RESULTS / "cpu" / name)


def _rates(info: dict[str, Any]) -> list[str]:
    return [f"{info[k]:,.0f}" if k in info else "" for k in ("tokens_per_second", "peer_tokens_per_second")]


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine_info"]
    commit = machine["commit"]
    changed = " with changes" if commit["dirty"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, Python {machine['python']}, torch {machine['torch']}, "
        f"{machine['date'][:10]}, commit {commit['id'][:9]}{changed}."
    )


TABLES = {
    "host": host_table,
    "cpu": cpu_table,
    "encoder": encoder_table,
    "kernels": kernels_table,
    "jobs": jobs_table,
    "pipelines": pipelines_table,
    "figures": pictures,
}


def tables(text: str) -> str:
    """README with its tables made anew."""
    for name, table in TABLES.items():
        content = table().replace("\\", r"\\")
        text = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="whether README is in step with the results")
    what.add_argument("--goals", action="store_true", help="what the results say of each goal")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="files, directories or git revisions")
    args = parser.parse_args(argv)
    try:
        if args.goals or args.compare:
            sides = compare.load_both(*args.compare) if args.compare else []
            lines, right = compare.compare(*sides) if sides else goals.table(goals.Results())
            print(*lines, sep="\n")
            return int(not right)
        path = record.ROOT / "README.md"
        text = path.read_text(encoding="utf-8")
        new = tables(text)
        if args.check:
            wrong = figures.out_of_step()
            wrong += ["README.md is not in step with benchmarks/results/"] if new != text else []
            for line in wrong:
                print(f"{line}; run `make report`", file=sys.stderr)
            return int(bool(wrong))
        figures.draw()
    except KeyError as error:
        print(f"benchmarks.report: a result lacks {error}; measure again", file=sys.stderr)
        return 1
    except (ValueError, ImportError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
