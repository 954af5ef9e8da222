"""`shoplm bundle show` and `shoplm bundle verify`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from shoplm.bundle import BASE_FOLDER, HeadSpec, ShopManifest, read_manifest
from shoplm.errors import ConfigurationError

bundle = typer.Typer(help="Look at a bundle, or check it.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="the bundle's folder", exists=True, file_okay=False)]
BaseOption = Annotated[
    str | None, typer.Option(help="base model: folder, GGUF file or hub id; compared with the bundle's")
]


@bundle.command()
def show(folder: Folder) -> None:
    """What a bundle is: shop, base, weights of the score, targets, files."""
    console = Console()
    try:
        manifest = read_manifest(folder, verify=False)
    except ConfigurationError as error:
        raise _failed(str(error)) from error
    console.print(table(manifest.title, ("what", "value"), _facts(folder, manifest)))
    if manifest.targets:
        header = ("target", "population mean", "parameters")
        console.print(table("targets", header, (_target(spec) for spec in manifest.targets)))
    if (folder / "card.md").is_file():
        console.print(f"its numbers: {escape(str(folder / 'card.md'))}", highlight=False, soft_wrap=True)


@bundle.command()
def verify(folder: Folder, base: BaseOption = None) -> None:
    """Check every file of a bundle against its hash and schema. Exit code 1 where something is wrong."""
    from shoplm.bundle_check import check_bundle
    from shoplm.model.base import bundle_base

    try:
        findings = check_bundle(folder, bundle_base(folder, base) if base or (folder / BASE_FOLDER).is_dir() else None)
    except ConfigurationError as error:
        raise _failed(str(error)) from error
    rows = (("ok" if each.good else "FAIL", each.what, each.found) for each in findings)
    Console().print(table(str(folder), ("", "what", "found"), rows))
    if base is None and not (folder / BASE_FOLDER).is_dir():
        Console(stderr=True).print("the base was not compared: give --base", style="dim")
    if not all(each.good for each in findings):
        raise typer.Exit(1)


def _facts(folder: Path, manifest: ShopManifest) -> list[tuple[str, str]]:
    score, prompt = manifest.score, manifest.prompt
    items = f"{manifest.level_sizes[0]:,}" if manifest.depth == 1 else f"codes of {manifest.depth} tokens"
    sizes = [(folder / name).stat().st_size for name in manifest.hashes]
    return [
        ("name and version", f"{manifest.name} {manifest.version}"),
        ("format, features", f"{manifest.format}, {manifest.feature_version}"),
        ("trained until", manifest.trained_until),
        ("base", f"{manifest.base.name} ({manifest.base.fingerprint[:12]})"),
        ("adapter", "yes" if manifest.has_adapter else "none"),
        ("items, product types", f"{items}, {manifest.type_count:,}"),
        ("score", score.formula),
        ("history", f"{prompt.history_budget_tokens} tokens, dropped in blocks of {prompt.history_block_tokens}"),
        ("profile attributes", ", ".join(prompt.attributes) or "none"),
        ("chat reads", "item tokens" if prompt.chat_reads_item_tokens else "the customer's habits in words"),
        ("demo customers", ", ".join(customer.customer_id for customer in manifest.customers) or "none"),
        ("currency", manifest.currency),
        ("notice", manifest.notice or "none"),
        ("files", f"{len(sizes)} hashed, {sum(sizes) / 1e6:.1f} MB"),
    ]


def _target(spec: HeadSpec) -> tuple[str, str, str]:
    parameters = ", ".join(f"{key} {value:.4g}" for key, value in sorted(spec.parameters.items()))
    return spec.label, f"{spec.base_rate:.4g}", parameters


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of text: what looks like markup is shown as it is."""
    drawn = Table(*header, title=escape(title), title_justify="left")
    for row in rows:
        drawn.add_row(*map(escape, row))
    return drawn


def _failed(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)
