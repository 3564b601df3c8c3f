"""The ``kcomplex`` application: its own commands, and those that plug-ins add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kcomplex.cli.container import decode, encode, verify
from kcomplex.cli.describe import describe
from kcomplex.cli.estimators import estimators
from kcomplex.cli.plot import plot
from kcomplex.cli.quantise import quantise
from kcomplex.cli.runs import runs
from kcomplex.errors import PluginError
from kcomplex.registry import registry
from kcomplex.version import VERSION


def build_app() -> typer.Typer:
    """Return the command-line application with the commands of all plug-ins."""
    app = typer.Typer(
        name="kcomplex",
        help="Measure the algorithmic complexity of neural-network weights, and train networks to be simpler.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for command in (describe, encode, decode, verify, quantise, estimators, runs, plot):
        app.command(command.__name__)(command)
    commands = registry("kcomplex.commands")
    for name in commands.names():
        try:
            app.command(name)(commands.load(name))
        except PluginError as error:
            app.command(name, help=f"Can't be loaded: {error}")(_broken(error))
    return app


def _broken(error: PluginError) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(VERSION)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before every command."""
