"""A whole prompt as one step of the torch decoder, in a pool of its own: for measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from shoplm.batch import Batch, EmbedReadout, Row
from shoplm.model.attention_plan import plan_attention
from shoplm.model.config import ModelConfig
from shoplm.model.decoder import StepInputs
from shoplm.model.kv_pool import KVPool


def whole_prompt(
    config: ModelConfig,
    tokens: Sequence[int],
    outputs: Sequence[int],
    dtype: torch.dtype,
    kv_format: str = "model",
) -> tuple[StepInputs, KVPool]:
    """What `Decoder.forward` takes to give the hidden states at the positions `outputs`; for weights of `dtype`."""
    count = len(tokens)
    pool = KVPool(
        layers=config.num_layers,
        pages=count,
        kv_heads=config.num_kv_heads,
        page_size=1,
        head_dim=config.head_dim,
        dtype=dtype,
        kv_format=kv_format,
    )
    order = np.arange(count)
    row = Row(0, 0, count, order.astype(np.int32), count, readout=EmbedReadout())
    batch = Batch(np.asarray(tokens, np.int32), order.astype(np.int32), order, (row,))
    plans = {
        window: plan_attention(batch, {}, pool, window=window, group=config.query_group, dtype=dtype)
        for window in set(config.sliding_windows)
    }
    inputs = StepInputs(
        tokens=torch.tensor(tokens),
        positions=torch.arange(count),
        write_rows=pool.token_major(torch.arange(count)),
        plans=plans,
        outputs=torch.tensor(outputs),
    )
    return inputs, pool
