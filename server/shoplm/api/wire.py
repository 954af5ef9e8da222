"""From bytes to a message, with errors that name the field.

protobuf's own parser says only that it could not parse. These walk the same bytes along the message's descriptor, and
only once parsing has failed or the message is too long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from shoplm.api.validation import quote
from shoplm.errors import InvalidRequestError

M = TypeVar("M", bound=Message)

_LENGTH_DELIMITED = 2  # wire type of strings, bytes and messages
_MAX_DEPTH = 16  # our messages nest four deep


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
    """(path, field, value) of the length-delimited fields, in the order of the bytes. Stops where bytes are damaged."""
    try:
        carrier = Empty.FromString(data)  # keeps every field as an unknown one
    except DecodeError:
        return
    seen: dict[int, int] = {}
    unknown_fields = UnknownFieldSet(carrier)
    for unknown in map(unknown_fields.__getitem__, range(len(unknown_fields))):
        if unknown.wire_type != _LENGTH_DELIMITED:
            continue
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None:
            continue
        index = seen.get(field.number, 0)
        seen[field.number] = index + 1
        yield f"{field.name}[{index}]" if field.is_repeated else field.name, field, unknown.data


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
        sizes[field.name] = sizes.get(field.name, 0) + len(value)
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
