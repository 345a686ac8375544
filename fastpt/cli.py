"""The command line: train, evaluate, plan, chat, check, merge, settings, doctor. Errors of fastpt come without a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from fastpt.errors import FastptError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[CONFIG.toml] [key=value]...", help="a config file, then overrides")
    ],
) -> None:
    """Train: `fastpt train config.toml optim.lr=1e-4`, or without a file: `fastpt train model=M data=rows.jsonl`."""
    from fastpt.trainer import Trainer

    run = Trainer(**_settings_of(arguments)).run()
    if run.status == "interrupted":
        raise typer.Exit(130)


@app.command()
def plan(
    arguments: Annotated[list[str], typer.Argument(metavar="[CONFIG.toml] [key=value]...", help="as for train")],
) -> None:
    """Say how much memory a run would take, without loading anything: `fastpt plan config.toml memory_limit=6GiB`."""
    from fastpt.memory_plan import plan

    found = plan(**_settings_of(arguments))
    print(found)
    raise typer.Exit(0 if found.fits else 1)


@app.command()
def evaluate(
    arguments: Annotated[list[str], typer.Argument(metavar="[CONFIG.toml] [key=value]...", help="as for train")],
) -> None:
    """What the objective measures of a model on rows, without training: `fastpt evaluate model=M data=rows.jsonl`."""
    from fastpt.evaluation import evaluate

    for name, value in evaluate(**_settings_of(arguments)).items():
        print(f"{name}\t{value:.6g}")


def _settings_of(arguments: list[str]) -> dict:
    """A config file, where the first argument is none of the overrides, and the overrides."""
    from fastpt import settings

    found: dict = {}
    if "=" not in arguments[0]:
        found = settings.read_file(arguments.pop(0))
    for key, value in map(settings.parse_override, arguments):
        found = settings.merge(found, {key: value})
    return found


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="folder of a run, a merged model, or a hub id")],
    system: Annotated[Optional[str], typer.Option(help="system message")] = None,  # noqa: UP045  typer on Python 3.10
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
) -> None:
    """Talk to a trained model; an empty line or Ctrl-D ends, /new starts over."""
    from fastpt.chat import talk

    talk(run, system=system, temperature=temperature, max_new_tokens=max_new_tokens)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="data file or hub id")],
    model: Annotated[Optional[str], typer.Option(help="model whose tokenizer counts the tokens")] = None,  # noqa: UP045
    max_length: Annotated[Optional[int], typer.Option(min=2)] = None,  # noqa: UP045
) -> None:
    """Look through a data set before training on it: problems by file and row, lengths, duplicates, one marked sample."""
    from rich.console import Console

    from fastpt.data.check import check as check_data
    from fastpt.models import load_tokenizer

    report = check_data(data, tokenizer=load_tokenizer(model) if model else None, max_length=max_length)
    Console().print(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    folder: Annotated[Path, typer.Argument(help="where the plain Hugging Face model goes")],
) -> None:
    """Merge a run's adapter into its model, and say how well the two agree."""
    from fastpt.run import load_run

    load_run(run).merge(folder)


@app.command()
def settings() -> None:
    """List every setting with its default."""
    from rich.console import Console

    from fastpt.config import settings_table

    Console().print(settings_table())


@app.command()
def doctor() -> None:
    """Say which kernels serve which op on this machine, and what is missing."""
    from fastpt.doctor import print_diagnosis

    raise typer.Exit(0 if print_diagnosis() else 1)


def main() -> None:
    """Entry point of the `fastpt` command."""
    try:
        app()
    except FastptError as error:
        print(f"fastpt: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
