"""The C++ decoder against the torch operations in fp32, whatever the chunks, pages and batch mates are."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shoplm.engine.cpu import cpu_backend
from shoplm.engine.spec import EngineSpec
from shoplm.errors import ConfigurationError
from shoplm.model.config import ModelConfig, RopeConfig
from shoplm.model.direct import DirectRunner, Output
from shoplm.model.linear import packing_supported
from shoplm.model.native import library as native
from shoplm.model.native.backend import NativeBackend
from shoplm.model.native.decoder import unsupported
from shoplm.model.native.head import NativeHead
from shoplm.model.native.library import InstructionSet, NativeLibrary, NativeUnavailableError, native_library
from shoplm.model.native.linear import GROUP, PackedLinear, WeightFormat
from shoplm.model.native.memory import WeightMemory
from shoplm.model.shop_weights import NamedTrie, ShopWeights, random_trie
from shoplm.model.torch_backend import TorchBackend
from shoplm.model.weights import DecoderWeights, LayerWeights
from shoplm.request import Embed, Explain, Generate, ItemScores, Sampling, Select, SelectOutput, Task

# Grouped heads, norms of heads, biases, a window, a layer without positions: each trait in some layer.
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=460,
    hidden_size=128,
    intermediate_size=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
    uses_rope=(True, True, False, True),
    sliding_windows=(None, 24, None, None),
    max_positions=256,
    tied_head=False,
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 150)


def loaded(instructions: InstructionSet) -> NativeLibrary | str:
    """The library, or why there is none."""
    try:
        return native_library(instructions)
    except NativeUnavailableError as error:
        return str(error)


LIBRARIES = {instructions: loaded(instructions) for instructions in InstructionSet}


@pytest.fixture(
    params=[
        pytest.param(instructions, marks=pytest.mark.skipif(isinstance(found, str), reason=str(found)))
        for instructions, found in LIBRARIES.items()
    ]
)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """One for each set of instructions that this machine has."""
    found = LIBRARIES[request.param]
    assert isinstance(found, NativeLibrary)
    return found


@lru_cache
def random_weights(head_dim: int = 64) -> DecoderWeights:
    """Values that bf16 holds exactly, so that both sides start from the same numbers."""
    generator = torch.Generator().manual_seed(5)

    def matrix(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(*shape, generator=generator) * float(shape[-1]) ** -0.5
        return values.bfloat16().float()

    def vector(size: int, mean: float) -> torch.Tensor:
        return (mean + 0.2 * torch.randn(size, generator=generator)).bfloat16().float()

    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    hidden, attended = config.hidden_size, config.num_heads * head_dim
    layers = tuple(
        LayerWeights(
            input_norm=vector(hidden, 1),
            qkv=matrix(config.qkv_size, hidden),
            qkv_bias=vector(config.qkv_size, 0),
            query_norm=vector(head_dim, 1),
            key_norm=vector(head_dim, 1),
            output=matrix(hidden, attended),
            output_bias=vector(hidden, 0),
            mlp_norm=vector(hidden, 1),
            gate_up=matrix(2 * config.intermediate_size, hidden),
            down=matrix(hidden, config.intermediate_size),
        )
        for _ in range(config.num_layers)
    )
    return DecoderWeights(
        matrix(config.vocab_size, hidden), layers, vector(hidden, 1), matrix(config.vocab_size, hidden)
    )


def tries() -> list[NamedTrie]:
    return [random_trie("shop", items=300, level_sizes=(9, 11, 7), hidden_size=CONFIG.hidden_size, seed=3)]


def make(
    library: NativeLibrary, *, page_size: int = 16, format: WeightFormat = WeightFormat.BF16, head_dim: int = 64
) -> NativeBackend:
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    backend = NativeBackend(
        config,
        random_weights(head_dim),
        tries=tries(),
        pages=2048 // page_size,
        page_size=page_size,
        format=format,
        library=library,
    )
    backend.pool.keys.fill_(torch.nan)  # whatever is read without having been written shows
    backend.pool.values.fill_(torch.nan)
    return backend


@lru_cache
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, 448, length).tolist() for length in LENGTHS]


@lru_cache
def reference_states(head_dim: int = 64) -> NDArray[np.float64]:
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    backend = TorchBackend(config, random_weights(head_dim), pages=64, state_slots=8)
    return np.array(DirectRunner(backend).run([(prompt, Embed()) for prompt in prompts()]))


def relative_errors(states: list[Output], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    errors: NDArray[np.float64] = np.linalg.norm(np.array(states) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return errors


@pytest.mark.parametrize(("page_size", "chunk_tokens"), [(16, 2048), (16, 1), (16, 13), (32, 40), (64, 17)])
def test_states_follow_fp32(library: NativeLibrary, page_size: int, chunk_tokens: int) -> None:
    backend = make(library, page_size=page_size)
    pages = np.random.default_rng(1).permutation(backend.info.pages).tolist()
    runner = DirectRunner(backend, chunk_tokens=chunk_tokens, free_pages=pages)
    states = runner.run([(prompt, Embed()) for prompt in prompts()])
    assert relative_errors(states, reference_states()).max() < 0.02


@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_states_follow_fp32_at_other_head_sizes(library: NativeLibrary, head_dim: int) -> None:
    states = DirectRunner(make(library, head_dim=head_dim)).run([(prompt, Embed()) for prompt in prompts()])
    assert relative_errors(states, reference_states(head_dim)).max() < 0.02


@pytest.mark.parametrize(("format", "most"), [(WeightFormat.INT8, 0.05), (WeightFormat.INT4, 0.4)])
def test_integer_states_follow_fp32(library: NativeLibrary, format: WeightFormat, most: float) -> None:
    states = DirectRunner(make(library, format=format)).run([(prompt, Embed()) for prompt in prompts()])
    errors = relative_errors(states, reference_states())
    assert 0.002 < errors.max() < most


@pytest.mark.parametrize("format", WeightFormat)
def test_a_result_does_not_depend_on_the_batch(library: NativeLibrary, format: WeightFormat) -> None:
    backend = make(library, format=format)
    select = Select(count=5, beam_width=6, trie="shop", own_items=(4, 250), own_counts=(2.0, 0.5))
    sampled = Generate(6, Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11))
    tasks: list[Task] = [Embed(), select, Generate(8), sampled, Embed(), select, Generate(3), Embed()]
    work = list(zip(prompts(), tasks, strict=True))
    alone = [DirectRunner(backend).run([one])[0] for one in work]
    for chunk_tokens in (5, 40, 2048):
        together = DirectRunner(backend, chunk_tokens=chunk_tokens).run(work)
        for one, other in zip(alone, together, strict=True):
            if isinstance(one, SelectOutput):  # torch multiplies the item rows
                assert isinstance(other, SelectOutput)
                assert one.items == other.items
                np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
            else:
                assert one == other  # to the last bit


@pytest.mark.parametrize("format", WeightFormat)
def test_a_result_does_not_depend_on_the_number_of_threads(library: NativeLibrary, format: WeightFormat) -> None:
    """More threads than cores: some come late to a loop that others have ended."""
    work: list[tuple[list[int], Task]] = [(prompt, Generate(12)) for prompt in prompts()]
    before, backend = torch.get_num_threads(), make(library, format=format)
    try:
        answers = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(DirectRunner(backend).run(work))
    finally:
        torch.set_num_threads(before)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("chunk_tokens", [2048, 41, 3])
def test_forks_follow_fp32(library: NativeLibrary, chunk_tokens: int) -> None:
    """Log-probabilities where parts of the history are hidden, one of the layers having a window."""
    shop = random_trie("", items=100, level_sizes=(100,), hidden_size=CONFIG.hidden_size, seed=3)
    weights = ShopWeights(shop.input_rows, shop.table(CONFIG.vocab_size), None)
    native_backend = NativeBackend(CONFIG, random_weights(), weights, pages=64, library=library)
    native_backend.pool.keys.fill_(torch.nan)
    native_backend.pool.values.fill_(torch.nan)
    reference = TorchBackend(CONFIG, random_weights(), weights, pages=64, state_slots=8)
    spans = ((), ((100, 150),), ((0, 1), (140, 149)), ((17, 120),), *(((at, at + 3),) for at in range(9)))
    work = [((*prompts()[-1], *(401, 402) * len(spans)), Explain(2, spans, ItemScores((5, 70))))]
    ours, theirs = (
        np.array(DirectRunner(backend, chunk_tokens=chunk_tokens).run(work)[0]).reshape(-1, 2)
        for backend in (native_backend, reference)
    )
    assert np.abs(theirs[1:4] - theirs[0]).max(axis=1).min() > 0.2  # of what follows it is a small part
    np.testing.assert_allclose(ours, theirs, atol=0.05)


def test_beams_follow_fp32(library: NativeLibrary) -> None:
    select = Select(count=20, beam_width=99, trie="shop", own_items=(4, 250), own_counts=(2.0, 0.5))
    reference = TorchBackend(CONFIG, random_weights(), tries=tries(), pages=128, state_slots=8)
    work = [(prompt, select) for prompt in prompts()[3:]]
    for one, other in zip(DirectRunner(make(library)).run(work), DirectRunner(reference).run(work), strict=True):
        assert isinstance(one, SelectOutput)
        assert isinstance(other, SelectOutput)
        scores = dict(zip(other.items, other.scores, strict=True))
        shared = [(score, scores[item]) for item, score in zip(one.items, one.scores, strict=True) if item in scores]
        assert len(shared) >= 17
        ours, theirs = np.array(shared).T
        np.testing.assert_allclose(ours, theirs, atol=0.08)


@pytest.mark.parametrize(
    ("format", "error"), [(WeightFormat.BF16, 0.004), (WeightFormat.INT8, 0.015), (WeightFormat.INT4, 0.12)]
)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 32, 64), (17, 70, 128), (300, 33, 192), (40, 64, 1152)])
def test_a_product_equals_torch(
    library: NativeLibrary, rows: int, outputs: int, inputs: int, format: WeightFormat, error: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    states = torch.randn(rows, inputs, generator=generator).bfloat16()
    expected = states.float() @ weight.bfloat16().float().T + bias
    result = PackedLinear(library, weight, bias, format=format)(states).float()
    assert ((result - expected).norm() / expected.norm()).item() < error


@pytest.mark.parametrize("format", [WeightFormat.INT8, WeightFormat.INT4])
def test_weights_and_states_on_the_grid_are_exact(library: NativeLibrary, format: WeightFormat) -> None:
    """Groups whose scales differ, integers that reach both ends of their range: only the bf16 of the result rounds."""
    generator = torch.Generator().manual_seed(2)
    low, high = (-127, 127) if format is WeightFormat.INT8 else (0, 15)
    group = GROUP[format]

    def grid(rows: int, low: int, high: int) -> torch.Tensor:
        values = torch.randint(low, high + 1, (rows, 384 // group, group), generator=generator).float()
        values[..., 0], values[..., 1] = low, high
        return values

    scales = 2.0 ** -(8 + torch.arange(384 // group) % 4)[:, None]
    weight = grid(64, low, high) * scales + (0.0 if format is WeightFormat.INT8 else 0.25)
    states = grid(20, -127, 127) / 64
    expected = states.flatten(1).double() @ weight.flatten(1).double().T
    result = PackedLinear(library, weight.flatten(1), format=format)(states.flatten(1).bfloat16()).double()
    torch.testing.assert_close(result, expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("format", WeightFormat)
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_greedy_is_the_most_likely_token(library: NativeLibrary, format: WeightFormat, spread: float) -> None:
    """Also among 3,000 tokens whose logits lie closer together than 8 bits can tell, and of rows with a large value."""
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(1, 192, generator=generator)
    weight = (common + spread * torch.randn(3_001, 192, generator=generator)).bfloat16()
    weight[2_990] = weight[17]  # equal ones: the first counts
    states = torch.cat((weight[[17, 3_000, 0]], torch.randn(40, 192, generator=generator).bfloat16()))
    states[5:20, 3] *= 100
    head = NativeHead(library, weight, format=format)
    found = head.greedy(states)
    if format is WeightFormat.BF16:
        logits = states.double() @ weight.double().T
        best = logits.max(dim=1).values
        torch.testing.assert_close(logits[torch.arange(43), found], best, rtol=1e-6, atol=1e-6)
    else:
        logits = head(states).double()
        assert (logits[torch.arange(43), found] == logits.max(dim=1).values).all()
    assert spread < 1 or found[0] == 17
    assert [head.greedy(states[row : row + 1])[0] for row in range(43)] == found


def test_greedy_finds_a_token_where_the_states_are_no_numbers(library: NativeLibrary) -> None:
    head = NativeHead(library, torch.randn(100, 64), format=WeightFormat.BF16)
    assert head.greedy(torch.full((2, 64), torch.nan, dtype=torch.bfloat16)) == [0, 0]


def test_weights_lie_behind_each_other_in_memory_of_their_own() -> None:
    memory = WeightMemory()
    tensors = [torch.randn(7, 5), torch.arange(200, dtype=torch.int8), torch.randn(9_000, 1_000), torch.randn(3).half()]
    kept = [memory.keep(tensor) for tensor in tensors]
    del memory
    for one, other in zip(kept, tensors, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert kept[0].data_ptr() % (2 << 20) == 0
    assert kept[1].data_ptr() == kept[0].data_ptr() + 256


def test_sizes_that_do_not_fill_tiles_are_named() -> None:
    assert unsupported(CONFIG, 16) is None
    assert "page_size 8" in str(unsupported(CONFIG, 8))
    assert "hidden size 100" in str(unsupported(dataclasses.replace(CONFIG, hidden_size=100), 16))
    assert "head_dim 48" in str(unsupported(dataclasses.replace(CONFIG, head_dim=48, num_heads=8), 16))


@pytest.mark.parametrize("instructions", InstructionSet)
def test_the_compiler_may_use_what_is_looked_for_and_nothing_else(instructions: InstructionSet) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")

    def features(*flags: str) -> set[str]:
        """Names of the macros that say what the compiler may use."""
        command = [compiler, *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"^#define __([A-Z][A-Z0-9_]+)__ 1$", said, re.MULTILINE)
        return {name.lower().replace("_", "") for name in found}

    # No CPU has AVX2 without the older ones; the last two are names of later compilers for widths of AVX-512.
    older = {"avx", "sse3", "ssse3", "sse41", "sse42", "popcnt", "crc32", "xsave", "mwait", "evex256", "evex512"}
    looked_for = {name.replace("_", "").replace("bmi1", "bmi") for name in instructions.extensions}
    assert features(*instructions.compiler_flags) - features() - older == looked_for


def test_a_machine_without_a_compiler_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHOPLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(native.InstructionSet, "extensions", {})
    native.native_library.cache_clear()
    weights = random_weights()
    weights = dataclasses.replace(weights, embedding=weights.embedding.bfloat16())
    spec = EngineSpec("", max_running_requests=4)
    try:
        with caplog.at_level("INFO"):
            backend = cpu_backend(spec, CONFIG, weights, None, (), 8)
        assert isinstance(backend, TorchBackend)
        assert "no C++ compiler" in caplog.text
        assert backend.pool.keys.dtype == (torch.bfloat16 if packing_supported() else torch.float32)
        assert backend.info.pages == (8 if packing_supported() else 4)
        with pytest.raises(
            ConfigurationError, match="int8 needs the C\\+\\+ decoder: amx: there is no C\\+\\+ compiler"
        ):
            cpu_backend(EngineSpec("", weight_format="int8"), CONFIG, weights, None, (), 8)
    finally:
        native.native_library.cache_clear()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the cache keeps the library of AVX2, in an empty cache; a compiler that makes an empty one in its place."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "int a;" | cc -shared -x c - -o "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SHOPLM_CACHE", str(tmp_path / "elsewhere"))
    native._loaded(InstructionSet.AVX2)
    (made,) = (tmp_path / "elsewhere" / "native").iterdir()
    monkeypatch.setenv("SHOPLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native" / made.name


def test_a_library_is_built_once_and_again_where_it_is_damaged(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native._loaded(InstructionSet.AVX2)
    built = kept.read_bytes()
    kept.write_bytes(b"damaged")
    native._loaded(InstructionSet.AVX2)
    assert kept.read_bytes() == built
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._loaded(InstructionSet.AVX2)


@pytest.mark.parametrize("open_to_all", ["library", "folder"])
def test_a_library_that_others_could_have_put_there_is_not_loaded(kept: Path, open_to_all: str) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"somebody else's")
    (kept if open_to_all == "library" else kept.parent).chmod(0o777)
    loaded = native._loaded(InstructionSet.AVX2)
    assert loaded._name != str(kept)
    replaced = kept.read_bytes() != b"somebody else's"
    assert replaced == (open_to_all == "library")  # what lies in a folder that others can write is never loaded later


def test_a_cache_that_cannot_be_written_costs_a_compilation_and_not_the_decoder(kept: Path) -> None:
    kept.parent.parent.mkdir()
    kept.parent.write_text("a file, so that nothing can be put below it")
    assert native._loaded(InstructionSet.AVX2).a is not None
