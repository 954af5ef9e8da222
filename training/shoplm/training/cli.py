"""`shoplm train`, `shoplm adapt` and `shoplm evaluate`: plain typer command functions."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from shoplm.bundle_cli import table
from shoplm.errors import ConfigurationError
from shoplm.training.folder_lock import exclusive
from shoplm.training.terminal import errors, fail, print_problems, watching

if TYPE_CHECKING:
    from shoplm.training.log import ShopLog

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

EventsOption = Annotated[Path, typer.Option(help="events: .parquet or .csv; see docs/training.md", exists=True)]
ItemsOption = Annotated[Path | None, typer.Option(help="the catalogue: .parquet or .csv", exists=True)]
CustomersOption = Annotated[Path | None, typer.Option(help="profile attributes: .parquet or .csv", exists=True)]
CampaignsOption = Annotated[Path | None, typer.Option(help="coupon campaigns: .parquet or .csv", exists=True)]
TimezoneOption = Annotated[str, typer.Option(help="zone of times that name none, such as Europe/Berlin")]
BaseOption = Annotated[
    str | None, typer.Option(help="base model: folder, GGUF file or hub id; default: the default base")
]
DeviceOption = Annotated[
    str, typer.Option(help="what an adapter or a base is trained on: cpu, cuda, cuda:1; auto: a GPU, if there is one")
]
WorkOption = Annotated[Path | None, typer.Option(help="where hidden states are kept; default: beside the bundle")]

ExplainedOption = Annotated[
    int, typer.Option(min=0, help="customers whose explanations are compared with leave-one-out; 0: none")
]
LogsOption = Annotated[Path | None, typer.Option(help="folder for TensorBoard: losses and validation NDCG")]


def train(
    events: EventsOption,
    out: Annotated[Path, typer.Option(help="the bundle's folder; an older bundle there is replaced")],
    items: ItemsOption = None,
    customers: CustomersOption = None,
    campaigns: CampaignsOption = None,
    base: BaseOption = None,
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter that `shoplm adapt` trained", exists=True, file_okay=False)
    ] = None,
    knowledge: Annotated[
        Path | None, typer.Option(help="folder of .md files for chat", exists=True, file_okay=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="the bundle's name; default: the folder's")] = None,
    title: Annotated[str | None, typer.Option(help="the shop's name for people")] = None,
    preamble: Annotated[str | None, typer.Option(help="first words of every prompt: who the assistant is")] = None,
    currency: Annotated[str, typer.Option(help="ISO 4217 code")] = "USD",
    notice: Annotated[str, typer.Option(help="where the data come from and what they may be used for")] = "",
    notes: Annotated[
        Path | None, typer.Option(help="a text for the card: what you tried, what to know", exists=True, dir_okay=False)
    ] = None,
    timezone: TimezoneOption = "UTC",
    history_tokens: Annotated[int, typer.Option(min=64, help="history budget of every prompt")] = 512,
    history_block: Annotated[int, typer.Option(min=16, help="the oldest baskets go in blocks of so many tokens")] = 256,
    minutes: Annotated[float, typer.Option(min=0.0, help="about how long it may take; 0: as long as needed")] = 30.0,
    max_customers: Annotated[int, typer.Option(min=0, help="a random sample of customers; 0: as time allows")] = 0,
    demo_customers: Annotated[int, typer.Option(min=0, help="customers whose true events go into the bundle")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="most passes over the baskets")] = 6,
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
    explained: ExplainedOption = 20,
    device: DeviceOption = "auto",
    work: WorkOption = None,
    resume: Annotated[bool, typer.Option(help="go on from what a stopped run computed")] = True,
    logs: LogsOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and stop")] = False,
) -> None:
    """Train a bundle from a shop's event log."""
    from shoplm.training.adapt.causal import training_device
    from shoplm.training.run import Run, TrainRequest
    from shoplm.training.terminal_tables import print_report

    console = Console(stderr=True)
    chosen = name or re.sub(r"[^a-z0-9._-]+", "-", out.resolve().name.lower()).strip("-.") or "shop"
    if not _NAME.fullmatch(chosen):
        fail(console, f"--name {chosen!r}: use lower-case letters, digits, '.', '_' and '-'")
    if history_block > history_tokens:
        fail(console, f"--history-block {history_block} is larger than --history-tokens {history_tokens}")
    if not _may_become_bundle(out):
        fail(console, f"--out {out} is there and is no bundle, and its files would be lost: name another folder")
    folder = work or out.resolve().with_name(f".{out.resolve().name}.train")
    shown = title or chosen.replace("-", " ").title()
    with errors(console):
        where = training_device(device)
    request = TrainRequest(
        out=out,
        base=base,
        adapter=adapter,
        knowledge=knowledge,
        name=chosen,
        title=shown,
        preamble=preamble or f"You are the assistant of {shown}, a shop. Be friendly, brief and honest.",
        currency=currency,
        notice=notice,
        notes=_text(console, notes) if notes is not None else "",
        history_tokens=history_tokens,
        history_block=history_block,
        minutes=minutes or None,
        max_customers=max_customers or None,
        demo_customers=demo_customers,
        epochs=epochs,
        seed=seed,
        work=folder,
        explained=explained,
        device=where,
    )
    with errors(console), exclusive(folder):
        if not resume:
            _forget(folder)
        log = _read(console, events, items, customers, campaigns, timezone)
        with watching(console, logs) as watch:
            run = Run(request, log, watch)
            if dry_run:
                console.print(table("would do", ("what", "value"), run.estimate()))
                return
            report = run.train()
    print_report(console, report)
    written = escape(str(out))
    console.print(f"wrote [bold]{written}[/bold]; serve it with: shoplm serve --bundle {written}")


def _text(console: Console, path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(console, f"--notes {path}: {error}")


def _may_become_bundle(folder: Path) -> bool:
    """Whether nothing but an older bundle would be replaced. `.` has no name that a folder beside it could take."""
    return bool(folder.name) and (
        not folder.exists() or (folder / "shop.toml").is_file() or (folder.is_dir() and not any(folder.iterdir()))
    )


def _forget(work: Path) -> None:
    """Remove what runs keep there, and nothing else: the folder may be one that holds other things."""
    for pattern in ("hidden-*", "scratch-*"):
        for folder in work.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    (work / "held-out.json").unlink(missing_ok=True)


def adapt(
    bundle: Annotated[Path, typer.Option(help="a bundle of this shop, from `shoplm train`", exists=True)],
    events: EventsOption,
    out: Annotated[Path, typer.Option(help="folder of the adapter, its checkpoint and its replayed answers")],
    items: ItemsOption = None,
    customers: CustomersOption = None,
    campaigns: CampaignsOption = None,
    base: BaseOption = None,
    timezone: TimezoneOption = "UTC",
    steps: Annotated[int, typer.Option(min=1, help="steps of four customers each")] = 340,
    rank: Annotated[int, typer.Option(min=1, max=256, help="of the low-rank matrices")] = 16,
    full: Annotated[bool, typer.Option("--full", help="train all layers, for machines with room")] = False,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="less memory, more time")] = False,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
    logs: LogsOption = None,
) -> None:
    """Adapt the base to a shop (LoRA): baskets, behaviour and chat in one run. Goes on where it was stopped.

    Give the result to `shoplm train --adapter`; that of `--full`, a base, to `shoplm train --base`.
    """
    from shoplm.training.adapt.causal import training_device
    from shoplm.training.adapt.run import AdaptRequest, adapt

    console = Console(stderr=True)
    with errors(console):
        where = training_device(device)
        log = _read(console, events, items, customers, campaigns, timezone)
        with watching(console, logs) as watch:
            request = AdaptRequest(bundle, out, base, steps, None if full else rank, checkpointing, seed, where)
            folder = adapt(request, log, watch)
    flag = "--base" if full else "--adapter"
    written = escape(str(folder))
    console.print(f"wrote [bold]{written}[/bold]; use it with: shoplm train {flag} {written}")


def evaluate(
    bundle: Annotated[Path, typer.Option(help="the bundle's folder", exists=True, file_okay=False)],
    events: EventsOption,
    items: ItemsOption = None,
    customers: CustomersOption = None,
    campaigns: CampaignsOption = None,
    base: BaseOption = None,
    timezone: TimezoneOption = "UTC",
    max_customers: Annotated[int, typer.Option(min=0, help="of the card's random order; 0: as many as the card")] = 0,
    explained: ExplainedOption = 100,
    write: Annotated[
        bool, typer.Option("--write", help="put the numbers of explanations, or of --cpu's format, into the bundle")
    ] = False,
    work: WorkOption = None,
    json: Annotated[Path | None, typer.Option(help="also write the numbers to this file")] = None,
    weight_format: Annotated[
        str, typer.Option(help="round the base like this format of the GPU backend: int8, int4 or fp8")
    ] = "model",
    cpu: Annotated[
        bool, typer.Option("--cpu", help="the formats are the C++ decoder's: int8 or int4, and int8")
    ] = False,
    kv_format: Annotated[
        str, typer.Option(help="round keys and values like this format of the GPU backend: int8 or fp8")
    ] = "model",
) -> None:
    """Measure a bundle again, on the files that it was trained on: the numbers of its card.

    With --weight-format or --kv-format, measures it as it is and rounded, without explanations, and the perplexity of
    talk; exits with 1 if the formats cost more than they may.
    """
    import msgspec
    from shoplm.training.card_explanations import record
    from shoplm.training.card_formats import record as record_format
    from shoplm.training.format_gate import Loss, weigh
    from shoplm.training.formats import UNROUNDED, Formats
    from shoplm.training.run import evaluate_bundle
    from shoplm.training.terminal_tables import print_losses, print_report

    console = Console(stderr=True)
    folder = work or bundle.resolve().with_name(f".{bundle.resolve().name}.train")
    formats = Formats(weight_format, None if kv_format == "model" else kv_format, cpu)
    costs: list[Loss] = []
    with errors(console):
        if cpu and formats == Formats(of_cpu=True):
            raise ConfigurationError("--cpu measures a --weight-format of int8 or int4, a --kv-format of int8, or both")
        log = _read(console, events, items, customers, campaigns, timezone)
        wanted = max_customers or None
        with exclusive(folder), watching(console) as watch:
            if formats == UNROUNDED:
                report = evaluate_bundle(
                    bundle, log, base=base, work=folder, max_customers=wanted, explained=explained, watch=watch
                )
            else:
                report, costs = weigh(bundle, log, formats, base=base, work=folder, max_customers=wanted, watch=watch)
        if write and report.explanations is not None:
            record(bundle, report.explanations)
        if write and cpu:
            record_format(bundle, formats, report.customers, costs)
    print_report(Console(), report)
    print_losses(Console(), formats.name, costs)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if not all(cost.holds for cost in costs):
        raise typer.Exit(1)


def _read(
    console: Console,
    events: Path,
    items: Path | None,
    customers: Path | None,
    campaigns: Path | None,
    timezone: str,
) -> ShopLog:
    from shoplm.training.log import read_log

    log = read_log(events, items, customers, campaigns, timezone=timezone, now=time.time())
    print_problems(console, log.problems)
    return log
