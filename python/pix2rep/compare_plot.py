"""Pictures of a comparison: Dice against the number of labelled patients, and test slices as every method segments them."""

from dataclasses import replace
from pathlib import Path

from pix2rep import evaluate, overlay
from pix2rep.checkpoint import atomic

MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (8, 2)))  # tell lines apart in grey
# Okabe and Ito's, the dark ones first: yellow is hard to see as a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def write(comparison, result: dict) -> None:
    """Write label_efficiency.png, label_efficiency.svg and overlays/ of a `compare.Comparison`."""
    import matplotlib

    if any(entry["dice"]["mean"]["mean"] == entry["dice"]["mean"]["mean"] for entry in result["summary"]):
        figure = label_efficiency(result)
        for suffix, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            with atomic(comparison.out / f"label_efficiency.{suffix}") as temporary, matplotlib.rc_context({"svg.hashsalt": "pix2rep"}):
                figure.savefig(temporary, format=suffix, **options)
    _overlays(comparison)


def label_efficiency(result: dict):
    """A panel a task: mean Dice over the number of labelled patients with its interval as a band, a line a method; dashed, the reference
    with all labels. Returns a matplotlib Figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry["task"] for entry in result["summary"]))
    methods = list(dict.fromkeys(entry["method"] for entry in result["summary"]))
    counts = sorted({entry["labelled"] for entry in result["summary"]})
    figure = Figure(figsize=(1.0 + 4.2 * len(tasks), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        own = [entry for entry in result["summary"] if entry["task"] == task]
        for index, method in enumerate(methods):
            _line(panel, [entry for entry in own if entry["method"] == method], index, method)
        for entry in own:
            if entry["method"] == result["reference"] and entry["labelled"] == result["labelled_of"]:
                panel.axhline(entry["dice"]["mean"]["mean"], color="0.35", linestyle=(0, (6, 4)), linewidth=1, label=f"{entry['method']}, all labels")
        panel.set_xscale("log")
        panel.set_xticks(counts, [f"all ({n})" if n == result["labelled_of"] else str(n) for n in counts])
        panel.minorticks_off()
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("labelled patients")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"3D Dice, mean over {len(result['split']['test'])} test patients")
    lines = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(4, len(lines)), fontsize=8, frameon=False)
    return figure


def _line(panel, entries: list[dict], index: int, method: str) -> None:
    entries = sorted((entry for entry in entries if any(v is not None for v in entry["seeds"].values())), key=lambda entry: entry["labelled"])
    if not entries:
        return
    counts = [entry["labelled"] for entry in entries]
    means, low, high = ([entry["dice"]["mean"][key] for entry in entries] for key in ("mean", "low", "high"))
    colour = COLOURS[index % len(COLOURS)]
    panel.plot(counts, means, color=colour, marker=MARKERS[index % len(MARKERS)], linestyle=DASHES[index % len(DASHES)], markersize=5, label=method)
    if len(counts) > 1:
        panel.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        panel.vlines(counts, low, high, color=colour, linewidth=1)


def _overlays(comparison) -> list[Path]:
    """Test slices by every method at the smallest number of labels, first seed that has a result."""
    done, _ = comparison.finished()
    folder, study, written = comparison.out / "overlays", comparison.study, []
    test = study.volumes("test")
    cases = [test[i] for i in overlay.spread(len(test), study.config.downstream.overlays)]
    for task in dict.fromkeys(job.task for job, _ in done):
        fewest = min(job.labelled for job, _ in done if job.task == task)
        own = [job for job, _ in done if (job.task, job.labelled) == (task, fewest)]
        predictions = {}
        for name in comparison.plan.methods:
            job = next((job for job in own if job.method == name), None)
            if job is not None:
                model, _ = evaluate.load_model(job.record.with_suffix(".safetensors"), replace(study, config=job.config))
                predictions[name] = {case.id: evaluate.predict_case(model, case, study) for case in cases}
        seed = own[0].seed
        written += overlay.write(folder, cases, predictions, study, f"{task}, {fewest} labelled, seed {seed}", f"{task}_")
    for file in folder.glob("*.png"):
        if file not in written:
            file.unlink()
    return written
