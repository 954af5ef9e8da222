"""The decoder for CPUs with matrix tiles (Intel AMX): one C++ call a step."""
