"""Event log to bundle: reading, prompts' hidden states, item rows, heads, metrics, card."""
