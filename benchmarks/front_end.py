"""What the front end costs: ShopLM with an engine that computes nothing, beside a bare grpc.aio server, in one run.

    python benchmarks/front_end.py                    # writes JSON; about two minutes
    python benchmarks/front_end.py --bundle DIR --base BASE --rounds 5

Client, server and engine are processes of their own. The bare server gets the same bytes as ours, and answers without
parsing them with the bytes that ours answers; it is the best that grpc.aio can do on the machine. Rounds alternate
between the two, and the medians of the ratios are reported, because machines have slow spells.

    unary       Predict of a demo customer, `--concurrency` calls at once: calls per second
    streamed    Chat, as many answers at once: tokens per second. The bare server sends a message per token; ours
                sends tokens together that came while a message was under way: `messages_per_token` says how often
    latency     open loop at half of our unary rate, the same for both: percentiles of either, and `added`, by how much
                ours are later, in ms; medians over the rounds, whose order alternates

The engine's steps take no time unless `--step-milliseconds` says so. With a millisecond each, a call waits for the step
under way and for its own: a millisecond and a half on average and two at the most of what is added is that.

`cpu_microseconds` are spent per call or token, by process: where client, server and engine share the cores, their sum
is what bounds the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
import uvloop
from shoplm.batch import Batch, PredictReadout, Row, RowOutput, SampleReadout, StepResult
from shoplm.bench.report import machine, write_json_of
from shoplm.config import ServerConfig
from shoplm.config_sources import load_config
from shoplm.engine.process import read_start_input
from shoplm.engine.process import run as run_engine
from shoplm.engine.spec import EngineSpec
from shoplm.engine.supervisor import ProcessEngineClient
from shoplm.model.backend import BackendInfo, Finished
from shoplm.model.base import Base
from shoplm.request import Select
from shoplm.serve import serve
from shoplm.v1 import chat_pb2, model_pb2, prediction_pb2, shop_pb2

PREDICT = "/shoplm.v1.PredictionService/Predict"
CHAT = "/shoplm.v1.ChatService/Chat"
STREAM_TOKENS = 64
HEAD_OUTPUTS = 64
TEXT_TOKEN = 30  # some token of plain text
WARM_UP_SECONDS, RUN_SECONDS = 1.0, 4.0
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
Call = Callable[[], Awaitable[object]]


class NullBackend:
    """Implements `model.backend.Backend`: every step takes the same time and computes nothing."""

    lane_count = 1

    def __init__(self, spec: EngineSpec, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._info = BackendInfo(
            name="null",
            pages=65_536,
            page_size=spec.page_size,
            state_slots=spec.max_running_requests,
            max_context_tokens=2048,
            vocab_size=1 << 31,
            trie_depths={"": 1},
            trie_items={"": 1},
            feature_count=0,
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def lanes(self, select: Select) -> int:
        return self.lane_count

    def submit(self, batch: Batch) -> Finished:
        if self._step_seconds:
            time.sleep(self._step_seconds)
        return Finished(StepResult(tuple(map(_answer, batch.rows)), self._step_seconds))

    def close(self) -> None:
        """Holds nothing."""


def _answer(row: Row) -> RowOutput:
    match row.readout:
        case SampleReadout():
            return TEXT_TOKEN
        case PredictReadout():
            return (0.1,) * HEAD_OUTPUTS
    return None


class NullEngine(ProcessEngineClient):
    """The engine's process, with this file's backend in it."""


async def serve_echo(reply: bytes, delta: bytes, summary: bytes) -> None:
    """A bare grpc.aio server on any free port, which it prints. It sends these messages, whatever it is asked."""

    async def echo(data: bytes, _: object) -> bytes:
        return reply

    async def stream(data: bytes, _: object) -> Any:
        for _ in range(STREAM_TOKENS):
            yield delta
        yield summary

    handlers = {
        "Predict": grpc.unary_unary_rpc_method_handler(echo),
        "Chat": grpc.unary_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(path.split("/")[1], {path.split("/")[2]: handlers[path.split("/")[2]]})
            for path in (PREDICT, CHAT)
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.collect()
    gc.freeze()  # as ours does: what was imported is in nobody's collections
    print(f"gRPC 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


class Subject:
    """One server under load, in a process of its own."""

    def __init__(self, role: str, flags: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), role, *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "gRPC 127.0.0.1:" in line:
                self.address = line.split("gRPC ")[1].split()[0]
                return
        raise RuntimeError(f"{role} ended with code {self._process.wait()}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def cpu_seconds(self) -> list[float]:
        """Of this client, of the server and of its children, since they started."""
        server = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (server, *server.children())]
        return [time.process_time(), *(each.user + each.system for each in times)]


class Round(NamedTuple):
    """What a few seconds of load gave."""

    per_second: float
    cpu_microseconds: list[float]  # of client, server and engine, per call or token


async def rate(call: Call, concurrency: int, subject: Subject) -> Round:
    """What `call` returns, summed and divided by the time, with this many at once."""
    total = 0.0
    counting = False
    stop = asyncio.Event()

    async def worker() -> None:
        nonlocal total
        while not stop.is_set():
            done: Any = await call()
            if counting:
                total += done

    workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
    await asyncio.sleep(WARM_UP_SECONDS)
    counting, started, used = True, time.perf_counter(), subject.cpu_seconds()
    await asyncio.sleep(RUN_SECONDS)
    counting, seconds = False, time.perf_counter() - started
    spent = [1e6 * (after - before) / total for before, after in zip(used, subject.cpu_seconds(), strict=True)]
    stop.set()
    await asyncio.gather(*workers)
    return Round(total / seconds, spent)


async def latencies(call: Call, per_second: float) -> list[float]:
    """Seconds of each call, from the moment it was meant to be sent, open loop at a fixed rate; ascending. Those of the
    first second do not count."""
    found: list[float] = []

    async def timed(intended: float) -> None:
        await call()
        if intended - start >= WARM_UP_SECONDS:
            found.append(time.perf_counter() - intended)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as calls:
        for number in range(round(per_second * (WARM_UP_SECONDS + RUN_SECONDS))):
            intended = start + number / per_second
            if (delay := intended - time.perf_counter()) > 0:
                await asyncio.sleep(delay)
            calls.create_task(timed(intended))
    return sorted(found)


class Caller:
    """Calls of bytes: the client parses nothing, so that the server is what is measured."""

    def __init__(self, address: str, predict: bytes, chat: bytes) -> None:
        # A client of one connection would be the limit; gRPC shares connections between equal channels unless told.
        self._channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        channel: Any = self._channel  # its stubs ask for serialisers, which are optional
        self._predict_message, self._chat_message = predict, chat
        self._predict = channel.unary_unary(PREDICT)
        self._chat = channel.unary_stream(CHAT)
        self.messages = self.tokens = 0  # of chat answers

    async def predict(self) -> int:
        await self._predict(self._predict_message)
        return 1

    async def chat(self) -> int:
        last = b""
        async for message in self._chat(self._chat_message):
            self.messages += 1
            last = message
        tokens: int = chat_pb2.ChatResponse.FromString(last).summary.usage.completion_tokens
        self.tokens += tokens
        return tokens

    async def answers(self) -> tuple[bytes, bytes, bytes]:
        """A prediction, the first piece of a chat answer, and its end."""
        chat = [message async for message in self._chat(self._chat_message)]
        return await self._predict(self._predict_message), chat[0], chat[-1]

    async def model(self) -> model_pb2.GetModelResponse:
        channel: Any = self._channel
        method = channel.unary_unary("/shoplm.v1.ModelService/GetModel")
        return model_pb2.GetModelResponse.FromString(await method(b""))


async def messages_for(address: str) -> tuple[bytes, bytes]:
    """What the calls send: a prediction of a demo customer, and a question."""
    chat = chat_pb2.ChatRequest(
        messages=[chat_pb2.Message(role="user", content="hello")],
        max_tokens=STREAM_TOKENS,
        grounding=chat_pb2.GROUNDING_OFF,
    )
    model = await Caller(address, b"", b"").model()
    customer = shop_pb2.Customer(customer_id=model.demo_customer_ids[0])
    return prediction_pb2.PredictRequest(customer=customer).SerializeToString(), chat.SerializeToString()


async def measure(ours: Subject, rounds: int, concurrency: int) -> dict[str, Any]:
    """Alternating rounds against our server and a bare one that answers as it does."""
    messages = await messages_for(ours.address)
    answers = await Caller(ours.address, *messages).answers()
    bare = Subject("echo", [answer.hex() for answer in answers])
    try:
        return await _measure({"echo": bare, "shoplm": ours}, messages, rounds, concurrency)
    finally:
        bare.close()


async def _measure(
    subjects: dict[str, Subject], messages: tuple[bytes, bytes], rounds: int, concurrency: int
) -> dict[str, Any]:
    callers = {name: Caller(subject.address, *messages) for name, subject in subjects.items()}
    unary: dict[str, list[Round]] = {name: [] for name in callers}
    streamed: dict[str, list[Round]] = {name: [] for name in callers}
    late: dict[str, list[dict[str, float]]] = {name: [] for name in callers}
    for number in range(rounds):
        order = list(callers.items())[:: -1 if number % 2 else 1]  # neither is always the one before or after the other
        for name, caller in order:
            unary[name].append(await rate(caller.predict, concurrency, subjects[name]))
        for name, caller in order:
            streamed[name].append(await rate(caller.chat, concurrency, subjects[name]))
        half = unary["shoplm"][-1].per_second / 2
        for name, caller in order:
            seconds = await latencies(caller.predict, half)
            late[name].append({name: 1e3 * _at(seconds, share) for name, share in QUANTILES.items()})
    ours = callers["shoplm"]
    added = [{key: ours[key] - bare[key] for key in ours} for bare, ours in zip(*late.values(), strict=True)]
    return {
        "unary": _compared(unary, "calls_per_second"),
        "streamed": {
            **_compared(streamed, "tokens_per_second"),
            "messages_per_token": round(ours.messages / ours.tokens, 3),
        },
        "latency_milliseconds": {name: _medians(found) for name, found in {**late, "added": added}.items()},
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(each[key] for each in rounds), 2) for key in rounds[0]}


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _compared(values: dict[str, list[Round]], unit: str) -> dict[str, Any]:
    ratios = [ours.per_second / bare.per_second for bare, ours in zip(values["echo"], values["shoplm"], strict=True)]
    report: dict[str, Any] = {"ratio": round(statistics.median(ratios), 3), "cpu_microseconds": {}}
    for name, found in values.items():
        report[f"{name}_{unit}"] = round(statistics.median(each.per_second for each in found), 1)
        parts = zip(*(each.cpu_microseconds for each in found), strict=True)
        medians = (round(statistics.median(part), 1) for part in parts)
        report["cpu_microseconds"][name] = dict(zip(("client", "server", "engine"), medians, strict=False))
    return report


def _null_engine(config: ServerConfig, base: Base, _: object) -> NullEngine:
    return NullEngine(config.engine_spec(base.folder))


def main() -> int:
    if sys.argv[1:2] == ["engine"]:
        step_seconds, connection = 1e-3 * float(sys.argv[2]), socket.socket(fileno=int(sys.argv[3]))
        spec = read_start_input().spec.result()
        return 0 if spec is None else run_engine(connection, spec, lambda spec: NullBackend(spec, step_seconds))
    if sys.argv[1:2] == ["serve"]:
        NullEngine.program = (sys.executable, str(Path(__file__).resolve()), "engine", sys.argv[2])
        return uvloop.run(serve(load_config(sys.argv[3:]), _null_engine))
    if sys.argv[1:2] == ["echo"]:
        uvloop.run(serve_echo(*map(bytes.fromhex, sys.argv[2:5])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="bundles/complete-journey")
    parser.add_argument("--base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--step-milliseconds", type=float, default=0.0, help="of the engine that computes nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/front-end.json"))
    arguments = parser.parse_args()
    flags = [str(arguments.step_milliseconds), "--bundle", arguments.bundle, "--port", "0", "--metrics-port", "0"]
    flags += [] if arguments.base is None else ["--base", arguments.base]
    before, ours = machine(), Subject("serve", flags)
    gc.freeze()  # what was imported: the client's own collections are in neither's latencies then
    try:
        report = uvloop.run(measure(ours, arguments.rounds, arguments.concurrency))
    finally:
        ours.close()
    settings = {name: vars(arguments)[name] for name in ("rounds", "concurrency", "step_milliseconds")}
    write_json_of({"settings": settings, **report}, before, arguments.out)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
