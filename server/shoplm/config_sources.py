"""Reads the server's settings: a TOML file < environment `SHOPLM_*` < flags, with errors that say where one was set."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, EnvSettingsSource, SettingsError
from shoplm.config import ENVIRONMENT_PREFIX, ServerConfig, read_file
from shoplm.errors import ConfigurationError

# Variables of the same prefix that other parts read: the model cache; what the client's verbs connect with.
OTHER_VARIABLES = frozenset({"CACHE", "CONFIG", "ADDRESS", "TOKEN", "TENANT", "CA_FILE", "CERT_FILE", "KEY_FILE"})
# What Kubernetes sets in every pod for a Service that is called shoplm or shoplm-something.
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


def load_config(
    flags: Sequence[str] = (), environment: Mapping[str, str] | None = None, file: Path | None = None
) -> ServerConfig:
    """Settings of a TOML file, the environment and flags, the later ones winning.

    `file` is the `--config` flag's default; `environment` is what to read instead of `os.environ`. Exits as argparse
    does for `--help`. Raises ConfigurationError naming the setting, where it was set, its value and what to do.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, default=file or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG"))
    chosen, rest = finder.parse_known_args(list(flags))
    if chosen.config is not None:
        path = Path(chosen.config)
        for name, value in _read_toml(path).items():
            values[name], origin[name] = value, f"{path}: {name}"
    for name, value in _read_environment(environment).items():
        values[name], origin[name] = value, _variable(name)
    for name, value in _read_flags(rest).items():
        values[name], origin[name] = value, _flag(name)
    try:
        return ServerConfig(**values)
    except ValidationError as error:
        raise ConfigurationError(_explain(error, origin)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(read_file("config", path).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    _refuse_unknown(values, str, where=f"{path}: ")
    return values


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    ours: dict[str, str | None] = {}
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        linked = _SERVICE_LINK.fullmatch(name) or _SERVICE_LINK_VALUE.match(value)
        if name not in OTHER_VARIABLES and not linked:
            ours[name.lower()] = value
    _refuse_unknown(ours, _variable)
    source = EnvSettingsSource(ServerConfig)
    source.env_vars = {_variable(name).lower(): value for name, value in ours.items()}
    try:
        return source()
    except SettingsError as error:
        raise ConfigurationError(str(error)) from error


def _flag_parser(arguments: Sequence[str]) -> CliSettingsSource[Any]:
    return CliSettingsSource(
        ServerConfig,
        cli_parse_args=list(arguments),
        cli_prog_name="shoplm serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )


def _read_flags(arguments: Sequence[str]) -> dict[str, Any]:
    known = {_flag(name): name for name in ServerConfig.model_fields}
    for argument in arguments:
        if argument.startswith("--") and argument != "--help":
            flag = argument.split("=", 1)[0]
            positive = "--" + flag.removeprefix("--").removeprefix("no-")
            if flag not in known and positive not in known:
                raise ConfigurationError(
                    f"{flag}: no such flag{_nearest(flag, [*known, '--config', '--print-config'])}"
                )
    try:
        return _flag_parser(arguments)()
    except SettingsError as error:
        raise ConfigurationError(str(error)) from error


def _refuse_unknown(names: Iterable[str], written: Callable[[str], str], where: str = "") -> None:
    """Raises ConfigurationError for the first that is no setting. `written` is a setting's name in this source."""
    known = list(map(written, ServerConfig.model_fields))
    for name in map(written, names):
        if name not in known:
            raise ConfigurationError(f"{where}{name}: no such setting{_nearest(name, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; `shoplm serve --print-config` lists all"


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        text = problem["msg"].removeprefix("Value error, ")
        if not name:
            lines.append(text)
            continue
        secret = name == "auth_tokens"
        value = "" if secret else f" is {ascii(problem['input'])[:80]}"
        lines.append(f"{origin.get(name, name)}{value}: {text}")
    return "; ".join(lines)


def _variable(name: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
