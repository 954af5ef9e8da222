"""The decoder in C++, for CPUs with AMX tiles, AVX-512 or AVX2 vectors: one call a step."""
