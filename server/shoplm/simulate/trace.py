"""Who asks what when: traces as files of JSON lines, and seeded ones drawn from a description."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from shoplm.request import Service

PREAMBLE = -1  # the "customer" whose prefix is the shop's preamble, which all chats share


class TraceError(ValueError):
    """A trace cannot be read; the message names the line."""


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request. A line of a trace file is one of these as JSON; lines are in the order of `seconds`."""

    seconds: float  # after the start of the trace
    service: Service
    customer: int = 0  # requests of one customer share their prefix
    history_tokens: int = 0  # of the shared prefix
    suffix_tokens: int = 2  # behind it, shared with nobody
    output_tokens: int = 0  # chat: how long the answer is
    max_tokens: int = 0  # chat: how long it may be; 0: as long as it is
    deadline_seconds: float | None = None  # after the arrival; None: the caller sets none
    tenant: str = ""
    priority: int = 0
    beam_width: int = 32
    allow_degraded: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}: it must be 0 or more")
        if self.history_tokens < 0 or self.suffix_tokens < 1 or self.beam_width < 1:
            raise ValueError("history_tokens must be 0 or more, suffix_tokens and beam_width 1 or more")
        if self.service is Service.CHAT and self.output_tokens < 1:
            raise ValueError(f"output_tokens is {self.output_tokens}: a chat has at least 1")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a drawn trace looks like. The lengths are those of the default shop."""

    rate: float = 10.0  # requests per second
    seconds: float = 300.0
    mix: Mapping[Service, float] = field(
        default_factory=lambda: {Service.RECOMMENDATION: 4.0, Service.CHAT: 3.0, Service.PREDICTION: 3.0}
    )
    burstiness: float = 1.0  # of the gaps between arrivals: their coefficient of variation; 1 is a Poisson process
    customers: int = 64
    new_customer_share: float = 0.25  # of the requests: about a customer who never comes again
    history_tokens: int = 370  # mean
    preamble_tokens: int = 75  # of a chat
    output_tokens: int = 32  # mean
    tenants: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})
    allow_degraded: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("rate", "seconds", "burstiness"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a positive number")
        if self.customers < 1:
            raise ValueError(f"customers is {self.customers}: it must be at least 1")
        if sum(self.mix.values()) <= 0 or min(self.mix.values()) < 0:
            raise ValueError(f"mix is {dict(self.mix)}: it needs weights of 0 or more, one of them above 0")


def draw(shape: Shape) -> Iterator[Arrival]:
    """The arrivals of a shape. The same shape gives the same ones."""
    generator = random.Random(shape.seed)
    lengths = [_length(generator, shape.history_tokens) for _ in range(max(shape.customers, 1))]
    services, weights = list(shape.mix), list(shape.mix.values())
    tenants, tenant_weights = list(shape.tenants), list(shape.tenants.values())
    newcomer = shape.customers
    for moment in moments(generator, shape.rate, shape.burstiness):
        if moment >= shape.seconds:
            return
        service = generator.choices(services, weights)[0]
        tenant = generator.choices(tenants, tenant_weights)[0]
        if service is Service.CHAT:
            suffix, output = generator.randint(6, 30), _length(generator, shape.output_tokens)
            yield Arrival(
                moment, service, PREAMBLE, shape.preamble_tokens, suffix, output, tenant=tenant,
                allow_degraded=shape.allow_degraded,
            )  # fmt: skip
        else:
            is_new = generator.random() < shape.new_customer_share
            customer = newcomer if is_new else generator.randrange(len(lengths))
            length = _length(generator, shape.history_tokens) if is_new else lengths[customer]
            newcomer += is_new
            yield Arrival(moment, service, customer, length, tenant=tenant, allow_degraded=shape.allow_degraded)


def moments(generator: random.Random, rate: float, burstiness: float) -> Iterator[float]:
    """Moments without end, of `rate` per second; their gaps have a gamma distribution with this coefficient of
    variation. Each is drawn when it is asked for."""
    form = burstiness**-2  # the coefficient of variation is 1 / sqrt(form)
    moment = 0.0
    while True:
        moment += generator.gammavariate(form, 1 / (form * rate))
        yield moment


def _length(generator: random.Random, mean: int) -> int:
    """A length between a third and three times the mean, most of them below it."""
    drawn = generator.lognormvariate(math.log(mean) - 0.125, 0.5)
    return max(1, min(round(drawn), 3 * mean), mean // 3)


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals of a file. Raises TraceError."""
    arrivals: list[Arrival] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            arrivals.append(msgspec.json.decode(line, type=Arrival))
        except (msgspec.MsgspecError, ValueError) as error:
            raise TraceError(f"trace {path}, line {number}: {error}") from error
        if len(arrivals) > 1 and arrivals[-1].seconds < arrivals[-2].seconds:
            raise TraceError(f"trace {path}, line {number}: {arrivals[-1].seconds} s is before the line above")
    if not arrivals:
        raise TraceError(f"trace {path} has no arrivals")
    return arrivals


def write_trace(arrivals: Iterable[Arrival], path: Path) -> None:
    """A file that `read_trace` reads."""
    encode = msgspec.json.Encoder().encode
    path.write_bytes(b"".join(encode(arrival) + b"\n" for arrival in arrivals))


def faster(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """The same requests, `factor` times as many a second."""
    return [msgspec.structs.replace(each, seconds=each.seconds / factor) for each in arrivals]


def parse_mix(text: str) -> dict[Service, float]:
    """`recommendation=4,chat=3,prediction=3` as weights. ValueError names the part that is wrong."""
    mix: dict[Service, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in list(Service):
            raise ValueError(f"mix: {name!r} is not one of {', '.join(Service)}")
        try:
            mix[Service(name)] = float(weight)
        except ValueError as error:
            raise ValueError(f"mix: {part.strip()!r} is not SERVICE=WEIGHT") from error
    return mix
