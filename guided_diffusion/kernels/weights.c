/* Weights of convolutions between float32 [O x I x K], as stored, and bfloat16 [O x K x I], as the
   products of channels-last images take them; K is the number of positions of the kernel. */

#include "vectors.h"

#include <omp.h>
#include <stddef.h>

enum { MOST_POSITIONS = 25 };

/* To bfloat16, channels last. `positions` is a constant where it is 9. */
INLINE void row_to_bf16(const float *from, uint16_t *to, long channels, long positions) {
    const __m512i counting = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(counting, _mm512_set1_epi32((int)positions));
    for (long c = 0; c < channels; c += LANES) {
        __mmask16 lanes = lanes_from(c, channels);
        for (long k = 0; k < positions; k++) {
            __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, apart,
                                                     from + c * positions + k, 4);
            store(to, k * channels + c, values, lanes, 1);
        }
    }
}

/* Back to float32, as stored. */
INLINE void row_to_fp32(const uint16_t *from, float *to, long channels, long positions) {
    float block[MOST_POSITIONS * LANES];
    int order[MOST_POSITIONS * LANES];
    for (long i = 0; i < positions * LANES; i++)
        order[i] = (int)(i % positions * LANES + i / positions);
    for (long c = 0; c < channels; c += LANES) {
        __mmask16 lanes = lanes_from(c, channels);
        long present = (channels - c < LANES ? channels - c : LANES) * positions;
        for (long k = 0; k < positions; k++)
            _mm512_storeu_ps(block + k * LANES, load(from, k * channels + c, lanes, 1));
        for (long i = 0; i < present; i += LANES) {
            __m512i index = _mm512_loadu_si512(order + i);
            _mm512_mask_storeu_ps(to + c * positions + i, lanes_from(i, present),
                                  _mm512_i32gather_ps(index, block, 4));
        }
    }
}

void weights_to_bf16(const float *from, uint16_t *to, long outputs, long channels, long positions) {
#pragma omp parallel for schedule(static)
    for (long o = 0; o < outputs; o++) {
        const float *row = from + o * channels * positions;
        uint16_t *out = to + o * channels * positions;
        if (positions == 9)
            row_to_bf16(row, out, channels, 9);
        else
            row_to_bf16(row, out, channels, positions);
    }
}

void weights_to_fp32(const uint16_t *from, float *to, long outputs, long channels, long positions) {
#pragma omp parallel for schedule(static)
    for (long o = 0; o < outputs; o++) {
        const uint16_t *row = from + o * channels * positions;
        float *out = to + o * channels * positions;
        if (positions == 9)
            row_to_fp32(row, out, channels, 9);
        else
            row_to_fp32(row, out, channels, positions);
    }
}
