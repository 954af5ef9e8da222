"""The decoder, its weights and the backends that run it."""
