"""Adapting the base to a shop: low-rank adapters (LoRA) trained jointly on baskets, behaviour and chat."""
