"""llama.cpp's server, built for this very processor, with 32 slots. Arguments: the GGUF file, the number of threads."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers.rows import LONGEST_CONTEXT, MOST_REQUESTS
from peers.worker import Tokens, serve

SERVER = Path(sys.prefix) / "native" / "llama-server"
TIMEOUT_SECONDS = 600.0
READY_SECONDS = 60.0


class LlamaCpp:
    """A client with a connection per request, as that server's callers have."""

    def __init__(self, port: int, described: dict[str, str]) -> None:
        self._port = port
        self._pool = ThreadPoolExecutor(MOST_REQUESTS)
        self.described = described

    def generate(self, prompts: Tokens, output_tokens: int) -> Tokens:
        return list(self._pool.map(lambda prompt: self._one(prompt, output_tokens), prompts))

    def search(self, prompt: Sequence[int], beams: int, tokens: int) -> None:
        raise NotImplementedError("llama.cpp's server has no beam search")

    def _one(self, prompt: Sequence[int], output_tokens: int) -> list[int]:
        body = {
            "prompt": list(prompt),
            "n_predict": output_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": True,
            "return_tokens": True,
        }
        tokens: list[int] = self._call("POST", "/completion", body)["tokens"]
        return tokens

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                self._call("GET", "/health")
                return
            except (OSError, RuntimeError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            if response.status != 200:
                raise RuntimeError(f"{path} answered {response.status}: {text[:300]!r}")
            answer: dict[str, Any] = json.loads(text)
            return answer
        finally:
            connection.close()


@contextmanager
def load(model: str, threads: str) -> Iterator[LlamaCpp]:
    """Starts the server and stops it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = str(LONGEST_CONTEXT * MOST_REQUESTS)
    flags = ["--threads", threads, "--parallel", str(MOST_REQUESTS), "--ctx-size", context, "--cache-ram", "0"]
    command = [str(SERVER), "--model", model, "--port", str(port), *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:
        try:
            version = subprocess.run([str(SERVER), "--version"], capture_output=True, text=True, check=True).stderr
            client = LlamaCpp(port, {"llama-server": version.splitlines()[0], "model": Path(model).name})
            client.wait_until_ready()
            yield client
        finally:
            process.terminate()


if __name__ == "__main__":
    serve(lambda: load(*sys.argv[1:3]))
