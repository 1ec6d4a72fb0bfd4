/* AVX-512 vectors of 16 numbers, read from and written to float32 or bfloat16 memory. */

#ifndef VECTORS_H
#define VECTORS_H

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 };

/* A mask of the channels that exist among the 16 from `channel` on. */
INLINE __mmask16 lanes_from(long channel, long channels) {
    long rest = channels - channel;
    return rest >= LANES ? 0xffff : (__mmask16)((1u << rest) - 1);
}

INLINE __m512 load(const void *data, long index, __mmask16 lanes, int bf16) {
    if (!bf16) return _mm512_maskz_loadu_ps(lanes, (const float *)data + index);
    __m256i half = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)data + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* To the nearest bfloat16, ties to even; NaN stays NaN. */
INLINE __m256i to_bf16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE void store(void *data, long index, __m512 x, __mmask16 lanes, int bf16) {
    if (bf16)
        _mm256_mask_storeu_epi16((uint16_t *)data + index, lanes, to_bf16(x));
    else
        _mm512_mask_storeu_ps((float *)data + index, lanes, x);
}

/* e^x to 2e-7 of it, or to 2e-4 if `coarse`, which bfloat16's 8 bits cannot tell apart: 2^n times
   a polynomial in the rest, which is at most half a unit. */
INLINE __m512 exponential(__m512 x, int coarse) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    __m512 n = _mm512_roundscale_ps(t, 8), p;
    if (coarse) { /* 2^f by a cubic of least relative error for |f| <= 1/2 */
        __m512 f = _mm512_sub_ps(t, n);
        p = _mm512_set1_ps(0.05477178f);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24200612f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69329851f));
        p = _mm512_fmadd_ps(p, f, one);
    } else {
        __m512 f = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x); /* x - n ln 2 */
        f = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), f);
        p = _mm512_set1_ps(1.0f / 720);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 120));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
        p = _mm512_fmadd_ps(p, f, one);
        p = _mm512_fmadd_ps(p, f, one);
    }
    return _mm512_scalef_ps(p, n);
}

/* 1 / (1 + e^-x): an approximate reciprocal (14 bits), unless `coarse` refined by Newton's method.
 */
INLINE __m512 sigmoid(__m512 x, int coarse) {
    const __m512 lowest = _mm512_set1_ps(-87.0f); /* beyond it, e^-x would overflow */
    __m512 power =
        exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(lowest, x)), coarse);
    __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), power);
    __m512 r = _mm512_rcp14_ps(d);
    return coarse ? r : _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f)));
}

#endif
