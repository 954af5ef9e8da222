"""Triton kernels of the GPU backend: they know tensors, and nothing of requests, pages' owners or protobuf.

One op, one file, one test, one benchmark, one name. The public functions are

    attention.paged_attention, attention.beam_attention, merge.merge_splits, forks.fork_attention, span_mass.span_mass
    kv_write, norm, swiglu, weight_only, quantise_rows, beam_step, sample

and `reference` holds the fp32 torch version of each. Nothing is imported here, so that the reference and the tile
table can be used where Triton is not installed.
"""
