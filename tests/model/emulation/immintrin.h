// What the decoder's AVX-512 and AMX forms use of their instructions, computed with AVX2, so that every machine tests
// them. The functions are in the decoder's namespace, where they hide the compiler's of the same names: what is not here
// does not compile. What the hardware answers with a fault ends the process.
#pragma once

#include_next <immintrin.h>

// Some compilers have macros of these names, which would hide the functions.
#undef _mm512_cmp_ps_mask
#undef _mm512_i32gather_epi32
#undef _mm512_i32gather_ps
#undef _mm512_roundscale_ps
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_release
#undef _tile_stored
#undef _tile_zero

#include "avx512.h"
#ifdef __AMX_TILE__
#include "amx.h"
#endif
