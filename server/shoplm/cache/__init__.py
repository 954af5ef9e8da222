"""The paged KV pool's bookkeeping: which page belongs to whom, and which prefixes are in it."""
