"""The roofline against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
import roofline
from roofline import CARDS, MODELS, Work

QWEN = MODELS["qwen3-1.7b"]  # hidden 2048, 16 query and 8 KV heads of 128
H100 = CARDS["H100"]  # 3.35 TB/s, 989.5 TFLOP/s


def test_decode_reads_the_cache_once() -> None:
    """64 rows x 4096 tokens x 8 heads x 128 x K and V x 2 bytes = 1 GiB, plus 64 x 2048 x 2 bytes of q and of out."""
    work = roofline.decode(QWEN, 64, 4096)
    assert work.bytes == 2**30 + 2 * 262_144
    assert work.tensor_flops == 64 * 4 * 4096 * 128 * 16
    assert work.floor_microseconds(H100) == pytest.approx(320.68, abs=0.01)
    assert work.bound_by(H100) == "memory"


def test_int8_cache_has_scales() -> None:
    """Per token and head: 2 x 128 bytes and two fp32 scales, 264 bytes instead of 512."""
    assert roofline.kv_bytes(QWEN, 10, 1) == 10 * 8 * 264
    assert roofline.kv_bytes(QWEN, 10, 2) == 10 * 8 * 512


def test_causal_prefill_counts_the_triangle() -> None:
    """8192 * 8193 / 2 = 33,558,528 pairs, times 4 * 128 * 16 operations = 274.9 GFLOP, 277.8 us of tensor time."""
    work = roofline.prefill(QWEN, 8192)
    assert work.tensor_flops == 33_558_528 * 8192
    assert work.floor_microseconds(H100) == pytest.approx(277.83, abs=0.01)
    assert work.bound_by(H100) == "tensor"


def test_a_chunk_sees_its_prefix_in_full() -> None:
    """3 new tokens behind 10: 3 * 10 pairs and 1 + 2 + 3."""
    assert roofline.prefill(QWEN, 3, 10).tensor_flops == 36 * 4 * 128 * 16


def test_beams_read_the_prompt_once_for_all() -> None:
    """Prompt 1000 x 4096 bytes; 256 beams x 3 own tokens x 4096; parents 256 x 2 x 4; q and out 256 x 4096 each."""
    work = roofline.beam(QWEN, 1, 256, 1000, 2)
    assert work.bytes == 4_096_000 + 3_145_728 + 2048 + 2_097_152
    assert work.tensor_flops == 4 * 256 * 1003 * 2048


def test_beam_step_at_a_million_items() -> None:
    """A million candidates of 4 + 4 + 12 bytes: 20 MB, 6 us on an H100; the 50 us target is eight floors."""
    work = roofline.beam_step(1, 1, 10**6, 256)
    assert work.bytes == 20_000_000 + 256 * 16 + 12
    assert work.floor_microseconds(H100) == pytest.approx(5.971, abs=0.001)
    unfiltered = roofline.beam_step(1, 1, 10**6, 256, filtered=False)
    assert work.bytes - unfiltered.bytes == 12_000_000
    # Seven more groups at the same nodes: their logits and what they select, the same tables.
    assert roofline.beam_step(8, 1, 10**6, 256).bytes == work.bytes + 7 * (4_000_000 + 256 * 16 + 12)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_card_is_known_by_its_whole_name(device: str, name: str | None) -> None:
    """Boards of other peaks share parts of the name: no floor rather than another card's."""
    card = roofline.card_of(device)
    assert (card and card.name) == name


def test_elementwise_ops() -> None:
    """norm: 4 x 8192 x 2048 x 2 bytes and the weight; swiglu: 3 x 8192 x 6144 x 2; sample: 64 x 151,936 x 2."""
    assert roofline.norm(QWEN, 8192).bytes == 134_217_728 + 4096
    assert roofline.norm(QWEN, 8192, residual=False).bytes == 67_108_864 + 4096
    assert roofline.swiglu(QWEN, 8192).bytes == 301_989_888
    assert roofline.sample(QWEN, 64).bytes == 19_447_808
    # One token: q 2 x 4096, k and v 4096 read and written, cos and sin 512, position 4, slot 8.
    assert roofline.kv_write(QWEN, 1).bytes == 8192 + 8192 + 524
    # Two rows of three splits: 2 x 3 x 16 x 129 fp32 partials, 2 x 4096 bytes of output.
    assert roofline.merge(QWEN, 2, 3).bytes == 4 * 12_384 + 8192
    # 8 tokens behind 1000: q and out 2 x 8 x 4096, 1008 keys and values of 4096, a bit for each of 8 x 1008; 16 heads.
    assert roofline.forks(QWEN, 1, 8, 1000).bytes == 65_536 + 4_128_768 + 1008
    assert roofline.forks(QWEN, 2, 8, 1000).tensor_flops == 2 * 4 * 8 * 1000 * 128 * 16
    # Keys 4096 x 2048 bytes, q 4096, log-sum-exps 64, two spans of 8 + 32 bytes.
    assert roofline.span_mass(QWEN, 1, 4096, 2).bytes == 8_388_608 + 4096 + 64 + 80
    # 12,288 x 2048 weights of one or half a byte, 12,288 scales or 64 times as many pairs, 64 x (2048 + 12,288) x 2.
    assert roofline.weight_only(12_288, 2048, 64, 8).bytes == 25_165_824 + 49_152 + 1_835_008
    assert roofline.weight_only(12_288, 2048, 64, 4).bytes == 12_582_912 + 3_145_728 + 1_835_008
    assert roofline.unpack(12_288, 2048, 8).bytes == 25_165_824 + 49_152 + 50_331_648
    assert roofline.unpack(12_288, 2048, 4).bytes == 12_582_912 + 3_145_728 + 50_331_648
    # 64 rows of 2048: two bytes read and one written an element, a scale a row.
    assert roofline.quantise_rows(64, 2048).bytes == 3 * 131_072 + 256


def test_the_floor_is_the_largest_of_the_three() -> None:
    card = roofline.Card("test", memory_gb_per_second=1, tensor_tflops=1, fp8_tflops=2, vector_tflops=1, device="")
    assert Work(1000).floor_microseconds(card) == pytest.approx(1.0)
    assert Work(1000, tensor_flops=3_000_000).floor_microseconds(card) == pytest.approx(3.0)
    assert Work(1000, tensor_flops=3_000_000).floor_microseconds(card, fp8=True) == pytest.approx(1.5)
    assert Work(1000, vector_flops=2_000_000).bound_by(card) == "vector"


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Every op has a row, for the models and cards asked for."""
    assert roofline.main(["--model", "qwen3-1.7b", "--card", "H100", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["op"] for row in rows} == {
        "prefill", "decode", "beam", "merge", "forks", "span_mass", "kv_write", "norm", "swiglu", "weight_only",
        "unpack", "quantise_rows", "beam_step", "sample",
    }  # fmt: skip
    decode = next(row for row in rows if row["op"] == "decode")
    assert decode["floor_microseconds"] == {"H100": pytest.approx(320.68, abs=0.01)}
    assert roofline.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(MODELS) * len(rows)
    assert lines[0].split()[-5:] == ["A100", "L4", "H100", "H200", "B200"]
