"""Messages between the API process and the engine, over a pair of connected stream sockets.

A message is its length (4 bytes, little-endian) and its msgpack, in which a prompt's tokens are bytes, four of each.

The system sends whatever was written before a process died and then the end of the stream, so each side learns of the
other's end at once, without looking for it.
"""

from __future__ import annotations

import select
import socket

import msgspec
from shoplm.request import EngineInput, EngineOutput, Tokens

_LENGTH_BYTES = 4
_READ_BYTES = 1 << 18
_SEND_BUFFER_BYTES = 1 << 20  # the system may allow less; an engine waits while it is full


def _from_bytes(_: type, data: bytes) -> Tokens:
    return Tokens("i", data)


encode = msgspec.msgpack.Encoder(enc_hook=Tokens.tobytes).encode
decode_input = msgspec.msgpack.Decoder(EngineInput, dec_hook=_from_bytes).decode
decode_outputs = msgspec.msgpack.Decoder(list[EngineOutput]).decode


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """The API process's end and the engine's."""
    pair = socket.socketpair()
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return pair


def frame(message: bytes) -> bytes:
    """A message as it is sent."""
    return len(message).to_bytes(_LENGTH_BYTES, "little") + message


class Frames:
    """Bytes as they come -> messages."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._wanted = _LENGTH_BYTES  # bytes without which there is no further message

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        """The messages that these bytes complete, in order."""
        view = memoryview(data)
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return []
            view, self._rest = memoryview(self._rest), bytearray()
        messages: list[memoryview] = []
        start, total = 0, len(view)
        while True:
            self._wanted = _LENGTH_BYTES
            if total - start >= _LENGTH_BYTES:
                self._wanted += int.from_bytes(view[start : start + _LENGTH_BYTES], "little")
            if total - start < self._wanted:
                self._rest += view[start:]
                return messages
            messages.append(view[start + _LENGTH_BYTES : start + self._wanted])
            start += self._wanted


class EngineEnd:
    """The engine's end: it blocks."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.setblocking(True)
        self._frames = Frames()
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def send(self, outputs: list[EngineOutput]) -> None:
        """Raises OSError when the other side has gone."""
        self._connection.sendall(frame(encode(outputs)))

    def wait(self, seconds: float | None) -> bool:
        """Whether there is something to receive before this many seconds have passed; None: however long it takes."""
        return bool(self._poll.poll(None if seconds is None else 1000 * seconds))

    def receive(self) -> list[EngineInput] | None:
        """What has come, without waiting; None when the other side has gone."""
        inputs: list[EngineInput] = []
        while True:
            try:
                count = self._connection.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return inputs
            except OSError:
                count = 0
            if not count:
                return inputs or None
            inputs += map(decode_input, self._frames.feed(self._buffer[:count]))
            if count < _READ_BYTES:
                return inputs

    def close(self) -> None:
        self._connection.close()
