"""Committed results of `pix2rep compare`: `python -m benchmarks.few_shot OUT NAME` keeps what OUT/results.json and record.json hold."""

import argparse
import json
from pathlib import Path

from benchmarks.harness import ROOT, surroundings, write_json

PER = {"probe": "linear probe", "finetune": "fine-tuned", "mean_teacher": "mean teacher"}


def table(content: dict) -> str:
    """A row a label count: Dice of every method and task, mean and interval, the difference to the reference below its method."""
    tasks = list(dict.fromkeys(entry["task"] for entry in content["summary"]))
    methods = list(dict.fromkeys(entry["method"] for entry in content["summary"]))
    found = {(e["task"], e["labelled"], e["method"]): e["dice"]["mean"] for e in content["summary"]}
    differences = {(d["task"], d["labelled"], d["method"]): d for d in content["differences"]}
    columns = []
    for task in tasks:
        for method in methods:
            columns.append((f"{PER[task]}, {method}", found, (task, method), ".3f"))
            if any(key[0] == task and key[2] == method for key in differences):
                columns.append((f"minus {content['reference']}", differences, (task, method), "+.3f"))
    lines = [["labelled patients", *(title for title, *_ in columns)], ["---"] * (1 + len(columns))]
    for n in dict.fromkeys(entry["labelled"] for entry in content["summary"]):
        cells = [_interval(values.get((task, n, method)), form) for _, values, (task, method), form in columns]
        lines.append([f"all ({n})" if n == content["labelled_of"] else str(n), *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    parts = " / ".join(str(len(content["split"][part])) for part in ("pretrain", "val", "test"))
    seeds = len(content["plan"]["seeds"])
    steps = "; ".join(f"{name} {entry['steps']:,} steps of {entry['batch_size']}" for name, entry in content["methods"].items() if entry["pretrain"])
    minutes = sum(content["record"]["seconds_of_jobs"].values()) / 60  # a stopped session's are in there, its wall time is not
    return text + (
        f"\n3D Dice over classes, test patients and {seeds} seed{'s' * (seeds > 1)}, [{content['interval']}]. Patients for pre-training / validation /"
        f" test: {parts}; {steps}. `{content['command']}`, {minutes:.0f} minutes of one-thread jobs; {content['device']}; commit {content['commit'][:7]}.\n"
    )


def _interval(value: dict | None, form: str) -> str:
    if not value or value["mean"] is None:
        return ""
    ends = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of a finished comparison")
    parser.add_argument("name", help="of the plan")
    parser.add_argument("--device", default="cpu", help="folder below benchmarks/results")
    parser.add_argument("--commit", help="that the comparison ran under; default: the present one")
    given = parser.parse_args()
    result, record = (json.loads((given.out / name).read_text()) for name in ("results.json", "record.json"))
    known = surroundings()
    jobs = record["sessions"][-1]["jobs"]
    content = {"command": f"pix2rep compare {given.name} --data ACDC --jobs {jobs}", "device": known["device"], "commit": given.commit or known["commit"]}
    write_json(ROOT / f"benchmarks/results/{given.device}/{given.name}.json", content | result | {"record": record})


if __name__ == "__main__":
    main()
