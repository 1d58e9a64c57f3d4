"""``ksvd-sae``: a subcommand for each stage, in the order of the path, all from the same YAML."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from ksvd_sae.config import load_config
from ksvd_sae.errors import KsvdSaeError

if TYPE_CHECKING:
    from ksvd_sae.pipeline import Run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Learn DB-KSVD dictionaries of transformer activations and compare them with SAEs.",
)
_out, _err = Console(), Console(stderr=True)

ConfigArgument = Annotated[Path, typer.Argument(help="a YAML of eval_configs/, or your own", metavar="CONFIG.yaml")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. harvest.train_tokens=8192")
]
ResultsOption = Annotated[Path, typer.Option("--results", help="folder that gets results/<name>/")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="debug log and tracebacks")]


def _stage(config: Path, overrides: list[str] | None, results: Path, verbose: bool, steps: Callable[..., None]) -> None:
    """Load the config, prepare the model's place, run ``steps`` on the Run; our errors end with exit code 1."""
    _set_up_logging(verbose)
    with _errors_as_messages(verbose):
        loaded = load_config(config, overrides)
        from ksvd_sae.pipeline import Run

        run = Run(loaded, results)
        run.prepare()
        steps(run)


@app.command(epilog="Example: ksvd-sae harvest eval_configs/demo.yaml")
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


@app.command(epilog="Example: ksvd-sae train eval_configs/demo.yaml --set dictionaries.db-ksvd.passes=3")
def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Learn every dictionary of the config from the harvest."""

    def steps(run: "Run") -> None:
        for trained in run.train():
            _out.print(f"{trained.name}: {trained.folder}")

    _stage(config, overrides, results, verbose, steps)


@app.command(epilog="Example: ksvd-sae evaluate eval_configs/demo.yaml")
def evaluate(
    config: ConfigArgument,
    overrides: SetOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Score every dictionary: own metrics on held-out activations, and SAEBench's evals."""

    def steps(run: "Run") -> None:
        manifest = run.evaluate()
        _out.print(f"{len(manifest['rows'])} scores; `ksvd-sae compare` makes the tables")

    _stage(config, overrides, results, verbose, steps)


@app.command(epilog="Example: ksvd-sae compare eval_configs/demo.yaml")
def compare(
    config: ConfigArgument,
    overrides: SetOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """Write the tables, plots and report of a finished evaluation, and print the table."""
    _stage(config, overrides, results, verbose, _print_comparison)


@app.command(epilog="Example: ksvd-sae run eval_configs/demo.yaml")
def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    results: ResultsOption = Path("results"),
    verbose: VerboseOption = False,
) -> None:
    """All stages in order: harvest, train, evaluate, compare. What is finished is reused."""

    def steps(run: "Run") -> None:
        stages: list[tuple[str, Callable[[], object]]] = [
            ("harvest", run.harvest),
            ("train", run.train),
            ("evaluate", run.evaluate),
        ]
        for name, stage in stages:
            started = time.perf_counter()
            stage()
            _err.print(f"[bold]{name}[/bold] done in {time.perf_counter() - started:.0f} s", highlight=False)
        _print_comparison(run)

    _stage(config, overrides, results, verbose, steps)


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


def _print_comparison(run: "Run") -> None:
    report = run.compare()
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
    try:
        yield
    except KsvdSaeError as error:
        if verbose:
            traceback.print_exc()
        _err.print(f"[bold red]{type(error).__name__}[/bold red]", highlight=False)
        _err.print(str(error), highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _err.print("stopped; run the same command again to go on", highlight=False)
        sys.exit(130)


if __name__ == "__main__":
    app()
