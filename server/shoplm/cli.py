"""`shoplm`: the server's commands, and the client's verbs beside them."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import typer
from shoplm.collector import pause_collector

# Commands of the optional parts: name -> (module, function, the extra that brings it).
_COMMANDS = {
    "train": ("shoplm.training.cli", "train", "train"),
    "adapt": ("shoplm.training.cli", "adapt", "train"),
    "evaluate": ("shoplm.training.cli", "evaluate", "train"),
    "score": ("shoplm.training.score.cli", "score", "train"),
    "bench": ("shoplm.bench.cli", "bench", "server"),
    "simulate": ("shoplm.simulate.cli", "simulate", "server"),
    "explain": ("shoplm.explain.cli", "explain", "server"),
    "bundle": ("shoplm.bundle_cli", "bundle", "server"),
}
_SHOWS = {"-h", "--help", "--print-config"}  # flags of `serve` that only show something
_HELP = """One language model for a shop's recommendations, chat and predictions.

`shoplm serve` starts the server (`shoplm serve --help` lists its flags); the other verbs call one or make a bundle.
"""


def main() -> None:
    """Entry point. A command imports only what it needs, so that the client works and starts fast without a server."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:
        sys.exit(_serve(arguments[1:]))
    _application(arguments[:1])()


def _serve(arguments: list[str]) -> int:
    # The engine is started as a fresh program, so gRPC need not survive a fork, nor warn of one.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    pause_collector()
    engine = None
    try:
        if not _SHOWS.intersection(arguments):
            engine = import_module("shoplm.engine.launch").EngineProcess()
        code: int = import_module("shoplm.serve").serve_command(arguments, engine)
    except ModuleNotFoundError as error:
        return _missing("serve", error, "server")
    finally:
        if engine is not None:
            engine.discard()
    return code


def _application(first: list[str]) -> typer.Typer:
    """All commands; those of other parts than the client are imported when they are called, or for the full help."""
    app = typer.Typer(help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    import_module("shoplm.client.cli").register(app)
    wanted = first if first and first[0] in _COMMANDS else ([] if first and not first[0].startswith("-") else _COMMANDS)
    for name in wanted:
        module, function, extra = _COMMANDS[name]
        try:
            found = getattr(import_module(module), function)
            if isinstance(found, typer.Typer):
                app.add_typer(found, name=name)
            else:
                app.command(name)(found)
        except ModuleNotFoundError as error:
            if first == [name]:
                sys.exit(_missing(name, error, extra))
    return app


def _missing(command: str, error: ModuleNotFoundError, extra: str) -> int:
    """Say which extra a command needs."""
    sys.stderr.write(f"shoplm {command}: {error}; install it, from a clone, with `pip install '.[{extra}]'`\n")
    return 2


if __name__ == "__main__":
    main()
