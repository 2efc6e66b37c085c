"""The command `pix2rep`. Every command imports what it needs when it runs: `--help` must not wait for PyTorch."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

DEBUG = "debug"


class _Group(TyperGroup):
    """Ends a command in one line and an exit code: the error's `exit_code`, 2 for unusable input. Bugs keep their traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, OSError, RuntimeError) as error:
            code = getattr(error, "exit_code", 2 if isinstance(error, ValueError | OSError) else None)
            if code is None or ctx.params.get(DEBUG):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(code) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pre-train a segmentation network on unlabelled medical images, then probe or fine-tune it with a few labels.",
)

Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="Folder of .nii or .nii.gz volumes: ACDC's layout, imagesTr/labelsTr, or any.", show_default=False),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Options, such as data.size=64,64 pretrain.steps=2000.", show_default=False),
]


class Kind(str, Enum):
    heart, ct = "heart", "ct"


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    from pix2rep.heap import ask_for_huge_pages

    ask_for_huge_pages()


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.", show_default=False)],
    kind: Annotated[Kind, typer.Option(help="Cardiac short-axis MR, two volumes a patient, or abdominal CT in 3D, one.")] = Kind.heart,
    patients: Annotated[int, typer.Option(min=1, help="Patients.")] = 40,
    size: Annotated[int, typer.Option(min=32, help="Pixels a side of a slice.")] = 96,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a labelled set of synthetic volumes: cardiac short-axis (ACDC's layout) or CT (imagesTr, labelsTr)."""
    if kind is Kind.ct:
        from pix2rep.data.phantom_ct import write_ct_phantoms as write
    else:
        from pix2rep.data.phantom import write_phantoms as write

    files = write(out, patients=patients, seed=seed, size=size)
    typer.echo(f"{len(files)} files of {patients} patients in {out}", err=True)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Volumes: ACDC's layout, imagesTr/labelsTr, or any .nii, .nii.gz.", show_default=False)
    ],
    overrides: Overrides = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a contact sheet here (.png): slices with their labels.", show_default=False)
    ] = None,
    sheet_cases: Annotated[int, typer.Option(min=1, help="Most tiles on the sheet.")] = 48,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything here too.", show_default=False)] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that remembers what was read; default: the user's cache.", show_default=False)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read; default: one a core, at most 8.", show_default=False)] = None,
) -> None:
    """Show what a folder of volumes holds, and what in it would go wrong.

    Patients, shapes, spacings, intensities and labels with the volumes that
    are far off, then warnings and files that cannot be used. Warnings are
    those of training with the options given, such as data.size=64,64. Exits
    with 1 when a file cannot be used, with 2 when there is no volume at all.

    pix2rep inspect data --sheet data.png --json data.json
    """
    from pix2rep.config import load

    data = load(None, overrides or ()).data
    _show_logging()
    from pix2rep.inspect_data import inspect as inspect_folder

    if inspect_folder(folder, data, json, sheet, sheet_cases, cache, workers)["problems"]:
        raise typer.Exit(1)


@app.command()
def pretrain(
    data: Data,
    run: Run,
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help="YAML file, or a preset's name (see `pix2rep info`).", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in RUN.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out volumes that cannot be used (data.skip_bad=true).")] = False,
) -> None:
    """Pre-train a backbone on the volumes of DATA; labels are checked, not learnt from. Weights, log and splits go to RUN."""
    from pix2rep.config import load

    file = run / "config.yaml" if config is None and resume and (run / "config.yaml").is_file() else config
    options = load(file, [*(overrides or ()), *(["data.skip_bad=true"] if skip_bad else [])])
    _show_logging()
    from pix2rep.pretrain import run as pretrain_run

    pretrain_run(data, run, options, resume)


@app.command()
def profile(
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help="YAML file, or a preset's name (see `pix2rep info`).", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of volumes to read as `pretrain` does; default: one batch of noise.", show_default=False)] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Instead: the largest batch within SIZE, such as 24GiB.", show_default=False)
    ] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that timing, or one check of --fit, may take.")] = 60,
    resident: Annotated[bool, typer.Option(help="On a CPU: also how much a fresh process grows by.")] = True,
    snapshot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="On CUDA: every allocation, for pytorch.org/memory_viz.", show_default=False)
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything here too.", show_default=False)] = None,
) -> None:
    """Show where the memory and the time of a pre-training step go, or which batch fits.

    Runs the step that `pretrain` would run with the same options, of any
    method, on noise unless --data is given. Prints a row for every part
    (views, backbone, heads, loss, backward, optimiser, moving average): the
    bytes it leaves behind, the most within it, its time and share. The loss
    is all that lies between the networks: warps and poolings of features too.
    Of pix2rep the step runs twice: with the fused loss ("ours") and with the
    papers' plain PyTorch formula ("eager"). The eager InfoNCE stores the
    similarities of all pixels with all; where memory cannot hold them, their
    bytes are stated from the shape.

    With --fit SIZE the step is measured at three small batches, every part's
    peak gets a law, and the largest batch within SIZE is predicted; of pix2rep
    for both losses, with loss.num_samples pixels (1000 where that is null) and
    with all. The step is then run at the predicted batch, or as near to it as the
    memory here and --limit allow: measured bytes stand beside predicted ones.

    Memory is that of PyTorch's tensors. Leave room for the rest: on a GPU the
    CUDA context and fragmentation, on a CPU the libraries and their scratch.

    pix2rep profile --config pix2rep_v1 loss.num_samples=null --json step.json

    pix2rep profile --fit 24GiB data.size=128,128 pretrain.amp=off
    """
    if fit is not None and (snapshot or data):
        raise typer.BadParameter("--fit takes neither --snapshot nor --data")
    from pix2rep.config import load

    options = load(config, overrides or ())
    _show_logging()
    from pix2rep import profile_report as shown

    if fit is None:
        from contextlib import nullcontext

        from pix2rep.profile import folder_source, profile_step

        with folder_source(data, options) if data else nullcontext() as source:
            result = profile_step(options, source, limit=limit, resident=resident, snapshot=snapshot)
    else:
        from pix2rep.fit import fit_batch, parse_size

        result = fit_batch(options, parse_size(fit), limit)
    result = shown.surroundings(options) | result
    (shown.show_step if fit is None else shown.show_fit)(result)
    if json:
        shown.write(json, result)


@app.command()
def probe(run: Run, overrides: Overrides = None) -> None:
    """Train a linear layer on the frozen backbone of RUN from a few labelled patients, beside the same on random weights."""
    _downstream(run, overrides, "probe")


@app.command()
def finetune(
    run: Run,
    overrides: Overrides = None,
    mean_teacher: Annotated[
        bool, typer.Option("--mean-teacher", help="Learn from the unlabelled images too; results go to RUN/mean_teacher, not to RUN/finetune.")
    ] = False,
) -> None:
    """Fine-tune the backbone of RUN from a few labelled patients, beside the same from random weights."""
    _downstream(run, overrides, "mean_teacher" if mean_teacher else "finetune")


@app.command()
def evaluate(
    run: Run,
    overrides: Overrides = None,
    predictions: Annotated[Path | None, typer.Option(help="Folder for the predicted labels as NIfTI files.", show_default=False)] = None,
) -> None:
    """Score the probes and fine-tuned models saved in RUN on its test patients again: 3D Dice and HD95 a class."""
    config = _config_of(run, overrides)
    _show_logging()
    from pix2rep.evaluate import run as evaluate_run

    evaluate_run(run, config, predictions=predictions)


@app.command()
def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write; default: RUN/report.html.", show_default=False)] = None,
    cases: Annotated[int, typer.Option(min=1, help="Patients of each part, pre-training and validation, to show pictures of.")] = 2,
) -> None:
    """Write one HTML file of RUN: curves, pictures of its features, and the downstream results that there are."""
    _show_logging()
    from pix2rep.run_report import write

    typer.echo(write(run, out, cases))


@app.command()
def compare(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="YAML file, or the name of a packaged plan.", show_default=False)],
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="Folder of volumes; default: the plan's.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: the plan's.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side; they share the CPU's threads.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to compute, and compute nothing.")] = False,
) -> None:
    """Compare methods at several numbers of labels, over several seeds: pre-train, probe and fine-tune whatever is missing, then report.

    The same command goes on where a stopped one ended, and computes only what a changed plan adds or alters. A cell that fails is
    reported, the others go on; the exit code is then 1.
    """
    from pix2rep.plan import load_plan

    loaded = load_plan(plan, overrides or (), data, out)
    _show_logging()
    if dry_run:
        from pix2rep.compare_dry import dry_run as show

        show(loaded, jobs)
        return
    from pix2rep import compare as comparing

    if comparing.run(loaded, jobs, comparing.command(plan, data, out, jobs, overrides))["failed"]:
        raise typer.Exit(1)


@app.command()
def check(
    run: Run,
    probe_above_random: Annotated[
        bool, typer.Option("--probe-above-random", help="The pre-trained one-shot probe's mean Dice must exceed the random one's.")
    ] = False,
) -> None:
    """Exit with 1 unless the results in RUN hold what is asked."""
    if not probe_above_random:
        raise typer.BadParameter("say what to check: --probe-above-random")
    from pix2rep.report import probe_above_random as holds

    if not holds(run):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Print versions, devices and presets: what a bug report needs."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from pix2rep.config import PRESETS

    typer.echo(f"{'python':<16} {platform.python_version()} ({platform.platform()})")
    for package in ("pix2rep-kernels", "torch", "triton", "monai", "nibabel", "numpy", "scikit-image", "safetensors", "tensorboard"):
        try:
            typer.echo(f"{package:<16} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package:<16} not installed")
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"{'devices':<16} cpu ({torch.get_num_threads()} threads){''.join(f', {name}' for name in gpus)}")
    typer.echo(f"{'presets':<16} {', '.join(sorted(path.stem for path in PRESETS.glob('*.yaml')))}")
    typer.echo("kernels          python -m pix2rep_kernels")


def main() -> None:
    app(prog_name="pix2rep")


def _downstream(run: Path, overrides: list[str] | None, what: str) -> None:
    config = _config_of(run, overrides)
    _show_logging()
    from pix2rep.downstream import run as downstream_run

    downstream_run(run, config, what=what)


def _config_of(run: Path, overrides: list[str] | None):
    from pix2rep.config import load

    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"run must be a folder written by pix2rep pretrain (with config.yaml), got {run}")
    return load(file, overrides or ())


def _show_logging() -> None:
    from pix2rep.log import show_logging

    show_logging()
