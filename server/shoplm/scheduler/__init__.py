"""What runs next. Pure Python: no torch, no asyncio, and the clock is an argument."""
