"""A tiny base model and a tiny shop on it, written in milliseconds: random weights, real formats."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import save_file
from shoplm.bundle import (
    FORMAT,
    BaseReference,
    DemoCustomer,
    HeadSpec,
    PromptSchema,
    ScoreWeights,
    ShopManifest,
    file_hash,
    write_manifest,
)
from shoplm.features import FEATURE_NAMES, FEATURE_VERSION
from shoplm.model.base import Base, resolve_base
from shoplm.readout.rebuy import HISTORY_FEATURES, ITEM_FEATURES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, LAYERS, HEADS, FEED_FORWARD, VOCABULARY, CONTEXT = 32, 2, 2, 48, 448, 2048
CATEGORIES = ("DAIRY", "BAKERY", "PRODUCE")
ITEMS = 24
TYPES = 3
DEMO_CUSTOMER = "1001"
DEMO_AS_OF = datetime(2018, 1, 1, tzinfo=UTC)
KNOWLEDGE = """# Returns
Return unopened items within 30 days with the receipt.

# Delivery
Delivery is free over 50 dollars.
"""
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "The shop sells milk, bread and apples. What is the return policy? Delivery is free.",
    "user assistant system",
)


def write_base(folder: Path) -> Base:
    """A two-layer Llama with a byte-level tokenizer and ChatML, in the layout of the Hugging Face hub."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", bos_token="<|im_start|>", eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    _write_json(
        folder / "config.json",
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return resolve_base(str(folder))


def write_bundle(folder: Path, base: Base, *, budget_tokens: int = 256) -> ShopManifest:
    """A shop of 24 items in three categories, one demo customer, one text and five prediction targets."""
    features = len(FEATURE_NAMES)
    folder.mkdir(parents=True)
    (folder / "knowledge").mkdir()
    (folder / "knowledge" / "service.md").write_text(KNOWLEDGE)
    _write_catalog(folder)
    _write_customers(folder)
    random = np.random.default_rng(7)
    targets = _targets()
    outputs = 1 + max(max(target.outputs) for target in targets)
    save_file(
        {
            "output_rows.0": random.normal(0, 0.3, (ITEMS, HIDDEN)).astype(np.float16),
            "output_bias.0": random.normal(0, 0.1, ITEMS).astype(np.float32),
            "popularity": np.log(np.linspace(1.0, 0.05, ITEMS)).astype(np.float32),
            "loyalty": np.linspace(-1, 1, ITEMS, dtype=np.float32),
            # Each item goes with the next, and with the one behind that half as well.
            "neighbours.starts": np.arange(0, 2 * ITEMS + 1, 2, dtype=np.int32),
            "neighbours.items": ((np.arange(ITEMS)[:, None] + np.array([1, 2])) % ITEMS).ravel().astype(np.int32),
            "neighbours.strengths": np.tile(np.array([1.0, 0.5], np.float16), ITEMS),
            **_rebuy(),
            "head.input_mean": np.zeros(features, np.float32),
            "head.input_scale": np.ones(features, np.float32),
            "head.weight": random.normal(0, 0.05, (outputs, HIDDEN + features)).astype(np.float32),
            "head.bias": np.zeros(outputs, np.float32),
        },
        folder / "weights.safetensors",
    )
    names = ("items.parquet", "types.parquet", "customers.parquet", "weights.safetensors")
    manifest = ShopManifest(
        format=FORMAT,
        name="tiny-shop",
        version="1",
        title="Tiny Shop",
        currency="USD",
        notice="Made for tests.",
        trained_until=DEMO_AS_OF.isoformat(),
        base=BaseReference(base.name, base.fingerprint, HIDDEN, VOCABULARY),
        score=ScoreWeights(6.0, 0.5, 30.0, loyalty_weight=0.5, goes_with_weight=2.0, rebuy_weight=1.5),
        prompt=PromptSchema(
            preamble="You help customers of a shop.",
            attributes=("age", "household"),
            attribute_values={"age": ("19-24", "35-44")},
            history_budget_tokens=budget_tokens,
            history_block_tokens=32,
        ),
        depth=1,
        level_sizes=(ITEMS,),
        type_count=TYPES,
        feature_version=FEATURE_VERSION,
        hashes={name: file_hash(folder / name) for name in names},
        targets=targets,
        customers=(DemoCustomer(DEMO_CUSTOMER, DEMO_AS_OF.isoformat(), {"age": "35-44"}),),
    )
    write_manifest(folder, manifest)
    return manifest


def item_id(row: int) -> str:
    """The id of the item in this catalogue row."""
    return f"item-{row:02d}"


def _rebuy() -> dict[str, np.ndarray]:
    """A net of one unit: the value of an own item is log(1 + visits with it) / 2 - 0.25."""
    weight = np.zeros((1, len(HISTORY_FEATURES) + len(ITEM_FEATURES)), np.float32)
    weight[0, HISTORY_FEATURES.index("log_visits")] = 1.0
    return {
        "rebuy.items": np.zeros((ITEMS, len(ITEM_FEATURES)), np.float32),
        "rebuy.types": np.zeros(ITEMS, np.int32),
        "rebuy.weight": weight,
        "rebuy.bias": np.zeros(1, np.float32),
        "rebuy.out": np.full(1, 0.5, np.float32),
        "rebuy.out_bias": np.full(1, -0.25, np.float32),
    }


def _targets() -> tuple[HeadSpec, ...]:
    plain = {"slope": 1.0, "intercept": 0.0}
    amount = {"scale": 1.0, "level_low": 0.05, "level_high": 0.95, "dispersion": 0.5}
    return (
        HeadSpec("purchase", "hazard", (0,), base_rate=0.7, horizon_days=7, parameters=plain),
        HeadSpec("purchase", "hazard", (0, 1), base_rate=0.9, horizon_days=30, parameters=plain),
        HeadSpec("churn", "survival", (0, 1), 0.1, horizon_days=30, parameters=plain, active_within_days=60.0),
        HeadSpec("purchase_count", "count", (2,), base_rate=2.5, horizon_days=30, parameters=amount),
        HeadSpec("coupon_redemption", "sigmoid", (3,), 0.05, campaign_type="Type A", parameters=plain),
    )


def _write_catalog(folder: Path) -> None:
    rows: list[int | None] = [*range(ITEMS), None]
    pl.DataFrame(
        {
            "item_id": [*(item_id(row) for row in range(ITEMS)), "rare-1"],
            "title": [*(f"Item {row}" for row in range(ITEMS)), "Rare item"],
            "category": [*(CATEGORIES[row % 3] for row in range(ITEMS)), "DAIRY"],
            "product_type": ["thing"] * (ITEMS + 1),
            "price": [*(None if row == 5 else round(0.94 + 1.01 * row, 2) for row in range(ITEMS)), 2.0],
            "in_stock": [*(row % 4 != 3 for row in range(ITEMS)), True],
            "row": rows,
            "type_index": [row % TYPES for row in range(ITEMS + 1)],
        },
        schema_overrides={"row": pl.Int32, "type_index": pl.Int32, "price": pl.Float64},
    ).write_parquet(folder / "items.parquet")
    pl.DataFrame({"title": ["A", "B", "C"], "description": ["a thing", "b thing", "c thing"]}).write_parquet(
        folder / "types.parquet"
    )


def _write_customers(folder: Path) -> None:
    """Eight visits, a week apart; item-02 in each of them, and the last on 2017-12-27."""
    days = [56, 49, 42, 35, 28, 21, 14, 5]
    times = [datetime.fromtimestamp(DEMO_AS_OF.timestamp() - day * 86_400, UTC) for day in days for _ in range(2)]
    pl.DataFrame(
        {
            "customer_id": [DEMO_CUSTOMER] * 16,
            "item_id": [name for visit in range(8) for name in (item_id(2), item_id(visit + 8))],
            "type": ["purchase"] * 16,
            "time": times,
            "quantity": [1.0] * 16,
            "price": [3.0] * 16,
            "basket_id": [f"b{visit}" for visit in range(8) for _ in range(2)],
        }
    ).write_parquet(folder / "customers.parquet")


def _weights() -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(1)
    head = HIDDEN // HEADS

    def matrix(*shape: int) -> NDArray[np.float32]:
        return random.normal(0, 0.2, shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": 1 + 0.1 * matrix(HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(head, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(head, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, FEED_FORWARD),
            f"{prefix}.input_layernorm.weight": 1 + 0.1 * matrix(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": 1 + 0.1 * matrix(HIDDEN),
        }
    return {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}


def _write_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(values))
