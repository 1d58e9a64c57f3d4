"""``ksvd-sae``: a subcommand for each stage, in the order of the path, all from the same YAML."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.logging import RichHandler

from ksvd_sae.errors import ConfigError, KsvdSaeError

if TYPE_CHECKING:
    from ksvd_sae.bench.settings import Settings
    from ksvd_sae.learning.coding import AnyCoder
    from ksvd_sae.run.pipeline import Run, Scores

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Learn DB-KSVD dictionaries of transformer activations and compare them with SAEs.",
)
_out, _err = Console(), Console(stderr=True)


# Commands that several processes, started by torchrun, run together.
_TOGETHER = ("harvest", "train", "evaluate", "compare", "run")


@app.callback()
def _process(context: typer.Context) -> None:
    if _is_one_of_several() and context.invoked_subcommand not in _TOGETHER:
        _err.print(f"ksvd-sae {context.invoked_subcommand} is for one process; under torchrun: {', '.join(_TOGETHER)}")
        sys.exit(2)
    # Large pages for large tensors, where Linux gives them when asked: 512 times fewer page faults in fresh memory.
    # torch reads this before its first tensor. Of a whole process, so that importing this module does not set it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


ConfigArgument = Annotated[
    Path, typer.Argument(help="a config that comes with the package, by name, or your own YAML", metavar="CONFIG")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. harvest.train_tokens=8192")
]
CellsOption = Annotated[
    str | None,
    typer.Option(
        "--cells",
        metavar="KEY=VALUE,...",
        help="only dictionaries of these m (n_atoms), k and dictionary (their names without), e.g. m=4096,k=20,k=40; "
        "tables have all others that are finished too",
    ),
]
ResultsOption = Annotated[Path, typer.Option("--results", help="folder that gets results/<name>/")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="debug log and tracebacks")]


def _stage(
    config: Path,
    overrides: list[str] | None,
    results: Path,
    verbose: bool,
    steps: Callable[..., None],
    cells: str | None = None,
) -> None:
    """Load the config, prepare the model's place, run ``steps`` on the Run; our errors end with exit code 1.

    Of several processes rank 0 speaks; the others' warnings and errors have their rank before them.
    """
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        from ksvd_sae.device import keep_freed_memory
        from ksvd_sae.together import Together

        together = Together.of_torchrun()
        if not together.is_first:
            _out.quiet = True
            logging.getLogger("ksvd_sae").setLevel(logging.WARNING)
            for handler in logging.getLogger().handlers:
                handler.setFormatter(logging.Formatter(f"rank {together.rank}: %(message)s"))
        keep_freed_memory()
        with together.joined():
            from ksvd_sae.run.config import load_config
            from ksvd_sae.run.pipeline import Run

            run = Run(load_config(config, overrides or ()), results, together=together)
            run.prepare()
            steps(run if cells is None else run.part(cells))


@app.command(epilog="Example: ksvd-sae plan demo --set harvest.train_tokens=8192")
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    cells: CellsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """What the run will take on this machine: time, memory and disk of each stage that is not done. Runs none."""

    def steps(run: "Run") -> None:
        from ksvd_sae.progress import printed_to
        from ksvd_sae.report.plan import plan_table
        from ksvd_sae.run.planners import planner_of

        if not verbose:
            # Of trainings that are tried out.
            logging.getLogger("ksvd_sae").setLevel(logging.WARNING)
        # What is loaded and trained prints as it goes.
        with printed_to(sys.stderr, "stdout"):
            made = planner_of(run).plan()
        if as_json:
            typer.echo(made.model_dump_json(indent=2))
        else:
            _out.print(plan_table(made))
        made.check()

    _stage(config, overrides, results, verbose, steps, cells)


@app.command(epilog="Example: ksvd-sae harvest demo")
def harvest(
    config: ConfigArgument,
    overrides: SetOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Run the model over the text and write its activations to disk. Stopped, it goes on at the next part."""

    def steps(run: "Run") -> None:
        shards = run.harvest()
        _out.print(f"{shards.n_samples:,} training tokens of {shards.d_in} dimensions in {shards.folder}")

    _stage(config, overrides, results, verbose, steps)


@app.command(epilog="Example: ksvd-sae train demo --set dictionaries.db-ksvd.passes=3")
def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    cells: CellsOption = None,
    so_far: Annotated[
        bool,
        typer.Option("--so-far", help="from what a harvest that still runs, or was stopped, has collected up to now"),
    ] = False,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Learn every dictionary of the config from the harvest."""

    def steps(run: "Run") -> None:
        of = ""
        if so_far:
            run = run.so_far()
            of = f", of {run.harvest().n_samples:,} tokens"
        for trained in run.train():
            _out.print(f"{trained.name}{of}: {trained.folder}")

    _stage(config, overrides, results, verbose, steps, cells)


@app.command(epilog="Example: ksvd-sae evaluate demo")
def evaluate(
    config: ConfigArgument,
    overrides: SetOption = None,
    cells: CellsOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Score every dictionary: own metrics on held-out activations, and SAEBench's evals."""

    def steps(run: "Run") -> None:
        manifest = run.evaluate()
        _out.print(f"{len(manifest['rows'])} scores; `ksvd-sae compare` makes the tables")

    _stage(config, overrides, results, verbose, steps, cells)


@app.command(epilog="Example: ksvd-sae compare demo")
def compare(
    config: ConfigArgument,
    overrides: SetOption = None,
    cells: CellsOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Write the tables, plots and report of a finished evaluation, and print the table."""

    def steps(run: "Run") -> None:
        if run.together.is_first:
            _print_comparison(run)

    _stage(config, overrides, results, verbose, steps, cells)


@app.command(epilog="Example: ksvd-sae run demo")
def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    cells: CellsOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """All stages in order: harvest, train, evaluate, compare. What is finished is reused.

    By several processes: torchrun --nproc-per-node=N -m ksvd_sae run CONFIG ("Several processes" in the docs).
    """

    def steps(run: "Run") -> None:
        started, together = time.perf_counter(), run.together
        together.first(run.check_results)
        run.harvest()
        harvested = time.perf_counter()
        if together.is_first:
            _err.print(f"[bold]harvest[/bold] done in {harvested - started:.0f} s", highlight=False)
        # Of several processes rank 0 has all scores at the end.
        run.evaluate(partial(_show, run) if together.size == 1 else None, train=True)
        took_s = time.perf_counter() - harvested
        if together.is_first:
            _err.print(f"[bold]train, evaluate[/bold] done in {took_s:.0f} s", highlight=False)
            _print_comparison(run)

    _stage(config, overrides, results, verbose, steps, cells)


@app.command(epilog="Example: ksvd-sae study study-engine")
def study(
    config: Annotated[
        Path, typer.Argument(help="a study that comes with the package, by name, or your own YAML", metavar="STUDY")
    ],
    minutes: Annotated[float | None, typer.Option(help="begin no new training after this time")] = None,
    layer: Annotated[int | None, typer.Option(help="only this layer: a process for each shares the work")] = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Train and measure a grid of dictionaries, row by row; then its table and plot. Goes on where it stopped."""
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        from ksvd_sae.device import keep_freed_memory
        from ksvd_sae.report.study import write_report
        from ksvd_sae.run.grid import load_study
        from ksvd_sae.run.study import Study

        keep_freed_memory()
        grid, layers = load_study(config)
        if layer not in (None, *grid.layers):
            raise ConfigError(f"study: no layer {layer}", limit=f"layers: {grid.layers}", cure="give one of these")
        whole = Study(grid, layers, results)
        n_rows = whole.run(minutes, layer)
        left = sum(len(whole.missing(own)) for own in grid.layers)
        _out.print(f"{n_rows} new rows, {left} still to measure")
        _out.print(f"report: {write_report(whole)}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: ksvd-sae efficiency data-efficiency --passes 1 --passes 4")
def efficiency(
    config: ConfigArgument,
    passes: Annotated[list[int], typer.Option(help="over the activations, a SAE training each; may be repeated")],
    overrides: SetOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Held-out error against samples seen, for every DB-KSVD dictionary and SAE of the config."""

    def steps(run: "Run") -> None:
        from ksvd_sae.report.efficiency import write_efficiency

        run.check_results()
        run.harvest()
        plot, n_points = write_efficiency(run, passes)
        _out.print(f"{n_points} points; plot: {plot}", highlight=False, markup=False, soft_wrap=True)

    _stage(config, overrides, results, verbose, steps)


@app.command(epilog="Example: ksvd-sae curves truth-curves")
def curves(
    config: Annotated[
        Path, typer.Argument(help="curves that come with the package, by name, or your own YAML", metavar="CURVES")
    ],
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """How true dictionaries are against samples, budget, size or any other key. Goes on where it stopped."""
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        from ksvd_sae.device import keep_freed_memory
        from ksvd_sae.report.curves import write_curves
        from ksvd_sae.run.curves import load_curves

        keep_freed_memory()
        plot, n_points = write_curves(*load_curves(config), results)
        _out.print(f"{n_points} points; plot: {plot}", highlight=False, markup=False, soft_wrap=True)


@app.command(
    epilog="Example: ksvd-sae contrast results/demo-full/comparison.csv --of db-ksvd-fisher --against topk-sae-fisher"
)
def contrast(
    scores: Annotated[Path, typer.Argument(help="a run's comparison.csv", metavar="COMPARISON.csv")],
    of: Annotated[list[str], typer.Option(help="a dictionary; of several, the mean")],
    against: Annotated[list[str], typer.Option(help="a dictionary; of several, the mean")],
    verbose: VerboseOption = False,
) -> None:
    """Every score of some dictionaries minus that of others, paired by seed and item, with its 95 % interval."""
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        from ksvd_sae.report.differences import between, contrast_section
        from ksvd_sae.report.items import read_items
        from ksvd_sae.report.scores import read_csv
        from ksvd_sae.report.sections import section_markdown

        section = contrast_section(between(read_csv(scores), of, against, read_items(scores.parent)))
        _out.print("\n".join(section_markdown(section)).rstrip(), highlight=False, markup=False, soft_wrap=True)


@app.command("import", epilog="Example: ksvd-sae import saes/layer_9 --coder omp --k 20 --to dictionaries/layer_9")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="a folder with a SAELens SAE, or with one of dictionary_learning; or a release of SAELens' directory, "
            "or owner/name on the Hub",
        ),
    ],
    to: Annotated[Path, typer.Option(help="folder that gets dictionary.json and atoms.safetensors", metavar="FOLDER")],
    sae_id: Annotated[
        str | None,
        typer.Argument(
            help="the SAE of that release, or its folder there; of dictionary_learning's, the path of its ae.pt",
            metavar="[SAE_ID]",
        ),
    ] = None,
    coder: Annotated[str, typer.Option(help="mp, mp_refit, omp or ormp")] = "omp",
    k: Annotated[int | None, typer.Option("--k", help="most atoms a token; default: the SAE's own k")] = None,
    nonnegative: Annotated[
        bool | None,
        typer.Option(
            "--nonnegative/--signed", help="signs of the codes; default: as the SAE's latents", show_default=False
        ),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Make an SAE's decoder a dictionary that codes by pursuit. Files are read as tensors only; no pickle is run."""
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        from ksvd_sae.methods.published.importing import import_sae

        import_sae(source, sae_id, k=k, coder=cast("AnyCoder", coder), nonnegative=nonnegative).save(to)
        _out.print(f"dictionary: {to}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: ksvd-sae unpack results/demo")
def unpack(
    run: Annotated[Path, typer.Argument(help="a run's folder under results/, or its raw.zip", metavar="RUN")],
    to: Annotated[Path | None, typer.Option(help="folder to unpack into; default: the run's", metavar="FOLDER")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Unpack what a run's evals wrote (SAEBench's JSON), its atoms in context and training logs from raw.zip."""
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        from ksvd_sae.report import raw

        folder = to or (run if run.is_dir() else run.parent)
        _out.print(f"{raw.unpack(run, folder)} files in {folder}", highlight=False, markup=False, soft_wrap=True)


class Views(str, Enum):
    """In which codes with signs are published."""

    SPLIT = "split"
    SIGNED = "signed"
    BOTH = "both"


@app.command(epilog="Example: ksvd-sae publish results/demo somebody/gemma-3-270m-db-ksvd --license mit")
def publish(
    source: Annotated[
        Path,
        typer.Argument(help="a run's folder under results/, or a dictionary's folder", metavar="RUN-OR-DICTIONARY"),
    ],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hub", metavar="REPO")],
    dictionary: Annotated[
        list[str] | None, typer.Option(help="of a run, by name; may be repeated; default: all but controls")
    ] = None,
    view: Annotated[Views, typer.Option(help="of codes with signs")] = Views.SPLIT,
    license_id: Annotated[str | None, typer.Option("--license", help="by the Hub's name of it, such as mit")] = None,
    folder: Annotated[Path | None, typer.Option(help="to write; default: published/REPO")] = None,
    upload: Annotated[bool, typer.Option("--upload", help="send it; without, it is shown and nothing is sent")] = False,
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to commit to; default: main")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace other dictionaries in the repository")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Write SAEs, dictionaries, scores and a model card as the Hub takes them; --upload sends them there.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        from ksvd_sae.hub.source import open_source
        from ksvd_sae.hub.upload import upload as send
        from ksvd_sae.hub.write import write_folder
        from ksvd_sae.store import MANIFEST

        target = folder or Path("published") / repository
        manifest = write_folder(open_source(source, dictionary or [], view.value), repository, target, license_id)
        sizes = {name: (target / name).stat().st_size for name in (*manifest.files, MANIFEST)}
        for name, size in sizes.items():
            _out.print(f"{size:>13,}  {name}", highlight=False, markup=False, soft_wrap=True)
        _out.print(f"{sum(sizes.values()):,} bytes in {target}", highlight=False, markup=False, soft_wrap=True)
        if not upload:
            _out.print(f"nothing was sent; the same command with --upload sends it to {repository}", soft_wrap=True)
            return
        where = send(target, repository, revision=revision, private=private, force=force)
        _out.print(where, highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: ksvd-sae doctor")
def doctor(verbose: VerboseOption = False) -> None:
    """Versions, device, cache and Hub; whether the installed versions work together and, if not, what mends it."""
    from ksvd_sae.doctor import examine

    _set_up_logging(verbose)
    report = examine()
    for name, value in report.facts:
        _out.print(f"{name:<20} {value}", highlight=False, markup=False, soft_wrap=True)
    for problem in report.problems:
        _out.print(f"PROBLEM: {problem}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    if report.problems:
        raise typer.Exit(1)
    _out.print("The installed versions are a working set.", style="green")


class Suite(str, Enum):
    """What ``bench`` takes as its first word."""

    CODING = "coding"
    UPDATE = "update"
    TRAIN = "train"
    SCALING = "scaling"
    HARVEST = "harvest"
    EVALS = "evals"
    ALL = "all"
    TABLE = "table"


@app.command(epilog="Example: ksvd-sae bench coding --data planted --peers none")
def bench(
    suite: Annotated[
        Suite, typer.Argument(help="what to measure (all: without harvest, evals); table prints what has been measured")
    ],
    data: Annotated[
        str, typer.Option(help="activations (of CONFIG's finished harvest), imported (its TopK SAE's atoms) or planted")
    ] = "activations",
    config: Annotated[Path, typer.Option(metavar="CONFIG", help="by name, or a YAML")] = Path("demo"),
    samples: Annotated[int | None, typer.Option(help="n; the suite has a default, as for the next three")] = None,
    atoms: Annotated[int | None, typer.Option(help="m")] = None,
    k: Annotated[int | None, typer.Option("--k", help="most atoms a sample")] = None,
    dim: Annotated[int | None, typer.Option(help="d of planted samples")] = None,
    peers: Annotated[str, typer.Option(help="all, none, or names with commas")] = "all",
    threads: Annotated[int, typer.Option(help="most threads of every implementation")] = 2,
    device: Annotated[str, typer.Option(help="of ours and of the peers that can")] = "cpu",
    repeats: Annotated[int | None, typer.Option(help="timed calls of each")] = None,
    budget_s: Annotated[float, typer.Option(help="calls that would take longer get fewer samples")] = 20.0,
    seed: Annotated[int, typer.Option()] = 0,
    small: Annotated[bool, typer.Option("--small", help="tiny planted shapes: a smoke run")] = False,
    write: Annotated[bool, typer.Option("--write", help="table: put it into results/bench/README.md too")] = False,
    results: Annotated[Path, typer.Option("--results", help="folder that gets bench/<suite>.jsonl")] = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Speed, memory and the error reached, ours beside peers (pip install 'ksvd-sae\\[bench]'); appends rows."""
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        if suite is Suite.TABLE:
            _bench_table(results / "bench", write)
            return
        from ksvd_sae.bench.settings import ALL, Settings
        from ksvd_sae.device import resolve_device

        settings = Settings(
            data="planted" if small else data,
            samples=samples,
            atoms=atoms,
            k=k,
            dim=dim,
            threads=threads,
            device=resolve_device(device),
            repeats=repeats,
            budget_s=budget_s,
            peers=peers,
            seed=seed,
            config=config,
            small=small,
        )
        _bench_run(ALL if suite is Suite.ALL else (suite.value,), settings, results / "bench")


def _bench_run(names: tuple[str, ...], settings: "Settings", folder: Path) -> None:
    from ksvd_sae.bench import suites

    rows, failures = suites.run(names, settings, folder)
    _out.print(f"{len(rows)} rows in {folder}; `ksvd-sae bench table` shows them", highlight=False, soft_wrap=True)
    for failure in failures:
        _err.print(f"FAILED: {failure}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _bench_table(folder: Path, write: bool) -> None:
    from ksvd_sae.bench import tables

    text = tables.render(folder)
    _out.print(text, highlight=False, markup=False, soft_wrap=True)
    if write:
        _out.print(f"written: {tables.write(folder, text)}", highlight=False, markup=False, soft_wrap=True)


def _show(run: "Run", scores: "Scores") -> None:
    """The table as far as it is."""
    from ksvd_sae.report.compare import table_so_far

    _out.print(f"{scores.news}\n{table_so_far(run.config, scores)}", highlight=False, markup=False, soft_wrap=True)


def _print_comparison(run: "Run") -> None:
    from ksvd_sae.report.compare import compare

    report = compare(run)
    _out.print((run.results / "comparison.md").read_text(), highlight=False, markup=False, soft_wrap=True)
    _out.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)


def _set_up_logging(verbose: bool) -> None:
    handler = RichHandler(console=_err, show_path=False, show_level=verbose, rich_tracebacks=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True)
    logging.getLogger("ksvd_sae").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        # The libraries' own warnings (deprecations, advice) drown what we have to say; -v shows them.
        warnings.filterwarnings("ignore")
        for noisy in ("transformers", "datasets", "transformer_lens", "root", "sae_lens", "httpx"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def _errors_as_messages(verbose: bool) -> Iterator[None]:
    """Our own errors are messages for the user; anything else is a bug and keeps its traceback."""
    before = _stop_as_by_hand()
    try:
        yield
    except KsvdSaeError as error:
        if verbose:
            traceback.print_exc()
        who = f"rank {os.environ.get('RANK', '?')}: " if _is_one_of_several() else ""
        _err.print(f"[bold red]{who}{type(error).__name__}[/bold red]", highlight=False)
        _err.print(str(error), highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt as stopped:
        _err.print("stopped; what is finished is kept: run the same command again to go on", highlight=False)
        # As shells have it: 128 and the signal's number.
        sys.exit(128 + (signal.SIGTERM if isinstance(stopped, _Terminated) else signal.SIGINT))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _stop_as_by_hand() -> Any:
    """Let SIGTERM, by which schedulers stop a job, do what Ctrl-C does; returns what it did before."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(*_: object) -> None:
        raise _Terminated

    return signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    app()
