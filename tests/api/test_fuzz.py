"""Random messages and random bytes: an answer or a refusal, never INTERNAL or UNKNOWN, never a hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_thread import ServerThread
from shoplm.api.methods import METHODS
from tiny_shop import CATEGORIES, DEMO_CUSTOMER, item_id

EXPECTED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
DEADLINE_SECONDS = 600.0  # so far off that no answer is refused for it, however long it may become
FUZZ = settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Half of the strings mean something, so that deep checks are reached as well as the first ones.
TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            DEMO_CUSTOMER,
            item_id(3),
            "rare-1",
            *CATEGORIES,
            "user",
            "assistant",
            "system",
            "age",
            "toy",
            "<|im_end|>",
        ]
    ),
    st.text(max_size=20),
)
EDGES = [0, 1, 2, 10, 30, 2047, 2**31 - 1, 2**31, 2**32 - 1]
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_UINT32: st.sampled_from(EDGES),
    FieldDescriptor.TYPE_UINT64: st.sampled_from([*EDGES, 2**64 - 1]),
    FieldDescriptor.TYPE_INT32: st.sampled_from([-(2**31), -1, 0, 999_999_999, 2**31 - 1]),
    FieldDescriptor.TYPE_INT64: st.sampled_from([-(2**63), -1, 0, 1_514_000_000, 2_000_000_000, 2**63 - 1]),
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 7),
    FieldDescriptor.TYPE_FLOAT: st.one_of(st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    FieldDescriptor.TYPE_DOUBLE: st.one_of(st.floats(), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
}


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Messages of a type, each field present or not."""
    fields = {field.name: _field(field) for field in descriptor.fields}
    build: Callable[[dict[str, Any]], Message] = lambda values: GetMessageClass(descriptor)(**values)  # noqa: E731
    return st.fixed_dictionaries({}, optional=fields).map(build)


def _field(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return st.dictionaries(TEXTS, TEXTS, max_size=3)
    one = messages(field.message_type) if field.message_type is not None else SCALARS[field.type]
    return st.lists(one, max_size=3) if field.is_repeated else one


def outcome(server: ServerThread, path: str, data: bytes) -> grpc.StatusCode:
    """Status of a call with these bytes."""
    try:
        if METHODS[path].streams:
            call = server.channel.unary_stream(path, None, None)
            list(call(data, timeout=DEADLINE_SECONDS))
        else:
            server.raw(path, data)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("path", METHODS)
@FUZZ
@given(data=st.data())
def test_random_messages(real_shop: ServerThread, path: str, data: st.DataObject) -> None:
    message = data.draw(messages(METHODS[path].request.DESCRIPTOR))  # type: ignore[arg-type]
    assert outcome(real_shop, path, message.SerializeToString()) in EXPECTED


@FUZZ
@given(path=st.sampled_from(sorted(METHODS)), noise=st.binary(max_size=200))
def test_random_bytes(real_shop: ServerThread, path: str, noise: bytes) -> None:
    assert outcome(real_shop, path, noise) in EXPECTED


@FUZZ
@given(data=st.data(), position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_damaged_messages(real_shop: ServerThread, data: st.DataObject, position: int, byte: int) -> None:
    path = data.draw(st.sampled_from(sorted(METHODS)))
    good = bytearray(data.draw(messages(METHODS[path].request.DESCRIPTOR)).SerializeToString())  # type: ignore[arg-type]
    if good:
        good[position % len(good)] = byte
    assert outcome(real_shop, path, bytes(good)) in EXPECTED
