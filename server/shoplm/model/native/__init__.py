"""The decoder in C++, for CPUs with AMX tiles or AVX2 vectors: one call a step."""
