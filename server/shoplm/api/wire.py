"""From bytes to a message, with errors that name the field.

protobuf's own parser says only that it could not parse. These walk the same bytes along the message's descriptor, and
only once parsing has failed or the message is too long.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from shoplm.api.validation import quote
from shoplm.errors import InvalidRequestError

M = TypeVar("M", bound=Message)

_VARINT, _FIXED_64, _LENGTH_DELIMITED, _FIXED_32 = 0, 1, 2, 5  # wire types
_MAX_DEPTH = 16  # our messages nest four deep
_LEAST_BYTES = 2  # of a field: its number and its length
_MOST_FIELDS = 10_000  # of a message that are looked at: other calls wait meanwhile


def parse(data: bytes, message: type[M], max_bytes: int) -> M:
    """Parse a request. Raises InvalidRequestError naming the field that is too long or not UTF-8."""
    descriptor = cast(Descriptor, message.DESCRIPTOR)
    if len(data) > max_bytes:
        field = _largest(data, descriptor)
        raise InvalidRequestError(
            (field, f"the message has {len(data)} bytes, at most {max_bytes} are allowed (max_message_bytes)")
        )
    try:
        return message.FromString(data)
    except DecodeError as error:
        bad = _not_utf8(data, descriptor)
        if bad is None:
            name = descriptor.name
            raise InvalidRequestError((name, f"the message's {len(data)} bytes are not a {name}")) from error
        raise InvalidRequestError((bad[0], f"is not valid UTF-8: {quote_bytes(bad[1])}")) from error


def quote_bytes(value: bytes) -> str:
    """The part around the first byte that is not UTF-8, in ASCII."""
    try:
        value.decode()
    except UnicodeDecodeError as error:
        start = max(error.start - 10, 0)
        return f"{value[start : error.start + 10]!r} at byte {error.start}"
    return quote(value)


def _fields(data: bytes, descriptor: Descriptor) -> Iterator[tuple[str, FieldDescriptor, bytes]]:
    """(path, field, value) of the first length-delimited fields, in the order of the bytes. Stops where bytes are
    damaged."""
    seen: dict[int, int] = {}
    for number, value in itertools.islice(_delimited(data), _MOST_FIELDS):
        field = descriptor.fields_by_number.get(number)
        if field is None:
            continue
        index = seen.get(number, 0)
        seen[number] = index + 1
        yield f"{field.name}[{index}]" if field.is_repeated else field.name, field, value


def _delimited(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, value) of the length-delimited fields (https://protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            size, at = _varint(data, at)
            if at + size > len(data):
                return
            yield tag >> 3, data[at : at + size]
            at += size
        elif kind == _VARINT:
            at = _varint(data, at)[1]
        elif kind in (_FIXED_32, _FIXED_64):
            at += 4 if kind == _FIXED_32 else 8
        else:
            return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends; the end of the data where it is damaged."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, len(data)


def _not_utf8(data: bytes, descriptor: Descriptor, depth: int = 0) -> tuple[str, bytes] | None:
    """Path and bytes of the first string that is not UTF-8."""
    for path, field, value in _fields(data, descriptor):
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                value.decode()
            except UnicodeDecodeError:
                return path, value
        elif field.message_type is not None and depth < _MAX_DEPTH:
            inner = _not_utf8(value, field.message_type, depth + 1)
            if inner is not None:
                return f"{path}.{inner[0]}", inner[1]
    return None


def _largest(data: bytes, descriptor: Descriptor, depth: int = 0) -> str:
    """Path of the field that takes most of the message: a list by all its entries, or the one entry that dominates."""
    sizes: dict[str, int] = {}
    values: dict[str, tuple[str, FieldDescriptor, bytes]] = {}
    for path, field, value in _fields(data, descriptor):
        sizes[field.name] = sizes.get(field.name, 0) + len(value) + _LEAST_BYTES
        if field.name not in values or len(value) > len(values[field.name][2]):
            values[field.name] = (path, field, value)
    if not sizes:
        return descriptor.name
    name = max(sizes, key=sizes.__getitem__)
    path, field, value = values[name]
    if len(value) * 2 < sizes[name]:
        return name
    if field.message_type is not None and depth < _MAX_DEPTH:
        inner = _largest(value, field.message_type, depth + 1)
        return path if inner == field.message_type.name else f"{path}.{inner}"
    return path
