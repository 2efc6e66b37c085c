"""The table, the targets and which backend won."""

from benchmarks.gpu.bench import GPU
from benchmarks.gpu.cases import Case

HEADER = f"{'op':10}{'case':32}{'dtype':10}{'who':14}{'ms':>10}{'% floor':>9}{'x peer':>8}{'MiB':>9}{'error':>10}"


def line(row: dict) -> str:
    start = f"{row['op']:10}{row['case']:32}{row['dtype']:10}{row['who']:14}"
    if reason := row.get("failed") or row.get("skipped"):
        return start + "  " + reason
    ratio = f"{row['times_best_peer']:.2f}" if "times_best_peer" in row else ""
    mib = "" if row.get("extra_MiB") is None else f"{row['extra_MiB']:.0f}"
    return f"{start}{1e3 * row['median_s']:10.3f}{row['percent_of_floor']:9.1f}{ratio:>8}{mib:>9}{row['error_gradient']:>10.1e}"


def verdicts(case: Case, rows: list[dict]) -> list[dict]:
    """Each number that the case must reach, what was reached by the faster of our backends, and PASS, MISS or the reason why neither."""
    if case.target is None:
        return []
    rows = [r for r in rows if f"{r['op']}|{r['case']}|{r['dtype']}" == case.key]
    ours = sorted((r for r in rows if r["who"] in GPU and "median_s" in r), key=lambda r: r["median_s"])
    asked = [("ms", case.target.ms, "<="), ("floors", case.target.floors, "<="), ("extra_MiB", case.target.extra_MiB, "<=")]
    asked += [(f"times {peer}", least, ">=") for peer, least in case.target.over.items()]
    found = []
    for what, bound, sign in asked:
        if bound is None:
            continue
        entry = {"op": case.op, "case": case.name, "what": what, "asked": f"{sign} {bound:g}"}
        reached, why = (None, "nothing of ours was measured") if not ours else _reached(what, ours[0], rows)
        if reached is None:
            found.append(entry | {"verdict": f"unknown: {why}"})
        else:
            ok = reached <= bound if sign == "<=" else reached >= bound
            found.append(entry | {"reached": reached, "by": ours[0]["who"], "verdict": "PASS" if ok else "MISS"})
    return found


def _reached(what: str, ours: dict, rows: list[dict]) -> tuple[float | None, str]:
    if what == "ms":
        return 1e3 * ours["median_s"], ""
    if what == "floors":
        return ours["median_s"] / ours["floor_s"], ""
    if what == "extra_MiB":
        return ours["extra_MiB"], "memory is not measured here"
    peer = next((r for r in rows if r["who"] == f"peer:{what.removeprefix('times ')}"), None)
    if peer is None or "median_s" not in peer:
        return None, (peer or {}).get("failed") or (peer or {}).get("skipped") or "that peer is not here"
    return peer["median_s"] / ours["median_s"], ""


def winners(rows: list[dict]) -> dict[str, str]:
    """op -> the backend that `auto` should take first: of the cases that both ran right, how many each won, and by how much in all."""
    found = {}
    for op in dict.fromkeys(r["op"] for r in rows):
        times = {}
        for r in rows:
            if r["op"] == op and r["who"] in GPU and "median_s" in r:
                times.setdefault((r["case"], r["dtype"]), {})[r["who"]] = r["median_s"]
        both = [t for t in times.values() if len(t) == 2]
        wrong = sorted({r["who"] for r in rows if r["op"] == op and r["who"] in GPU and str(r.get("failed", "")).startswith(("wrong", "died"))})
        note = f" ({', '.join(wrong)}: wrong or died in a case)" if wrong else ""
        if both:
            won = sum(t["cuda"] < t["triton"] for t in both)
            ratio = 1.0
            for t in both:
                ratio *= (t["triton"] / t["cuda"]) ** (1 / len(both))
            found[op] = f"{'cuda' if ratio > 1 else 'triton'}: cuda faster in {won} of {len(both)} cases, {ratio:.2f} times in the geometric mean{note}"
        else:
            alone = sorted({who for t in times.values() for who in t})
            found[op] = f"{', '.join(alone) or 'none'} alone was measured{note}"
    return found


def report(cases: list[Case], rows: list[dict]) -> str:
    """One table, one line a target, one line an op."""
    lines = [HEADER, *map(line, rows), ""]
    for entry in (entry for case in cases for entry in verdicts(case, rows)):
        reached = f"{entry['reached']:.4g} by {entry['by']}" if "reached" in entry else ""
        lines.append(f"{entry['verdict']:7} {entry['op']:10}{entry['case']:32}{entry['what']:14}{entry['asked']:>10}  {reached}")
    return "\n".join([*lines, "", *(f"auto     {op:10}{text}" for op, text in winners(rows).items())])
