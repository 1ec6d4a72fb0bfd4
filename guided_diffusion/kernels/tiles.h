/* AMX tile registers, and bfloat16 matrices laid out for them.

   A tile register holds 16 rows of 64 bytes. _tile_dpbf16ps(C, A, B) adds A B to C: the left factor
   A is [16 x 32] bfloat16; the right factor B is [32 x 16] with rows 2 r and 2 r + 1 interleaved in
   row r; C is [16 x 16] float32. */

#ifndef TILES_H
#define TILES_H

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")

#include "attention.h"
#include "vectors.h"

#include <string.h>

enum {
    TILE = 16,  /* rows of a tile, and its columns as float32 */
    DEPTH = 32, /* numbers summed by one product of tiles */
    STRIPS = BLOCK / TILE,
    STEPS = BLOCK / DEPTH,
    CELLS = TILE * TILE /* float32 in a tile, and pairs of bfloat16 */
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

static inline void set_up_tiles(void) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = TILE;
    }
    _tile_loadconfig(&config);
}

/* [T x D] with rows `stride` apart, to [padded T x D] without gaps. */
static inline void pack_rows(const uint16_t *from, long stride, long rows, long channels,
                             uint16_t *to) {
    for (long row = 0; row < rows; row++)
        memcpy(to + row * channels, from + row * stride, 2 * channels);
    memset(to + rows * channels, 0, 2 * channels * (padded(rows) - rows));
}

INLINE __m512i every(int distance) {
    const __m512i counting = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mullo_epi32(counting, _mm512_set1_epi32(distance));
}

/* Rows [T x D] as the right factor [D x T]: per 16 rows and DEPTH channels a tile. */
static inline void pack_transposed(const uint16_t *rows, long positions, long channels,
                                   uint32_t *tiles) {
    const __m512i column = every((int)channels / 2);
    for (long t = 0; t < positions; t += TILE)
        for (long c = 0; c < channels; c += 2, tiles += TILE)
            _mm512_storeu_si512(
                tiles, _mm512_i32gather_epi32(column, (const int *)(rows + t * channels + c), 4));
}

/* Rows [T x D] as the right factor [T x D]: per DEPTH rows and 16 channels a tile. */
static inline void pack_pairs(const uint16_t *rows, long positions, long channels,
                              uint32_t *tiles) {
    for (long t = 0; t < positions; t += DEPTH)
        for (long c = 0; c < channels; c += TILE)
            for (long r = 0; r < DEPTH; r += 2, tiles += TILE) {
                const uint16_t *pair = rows + (t + r) * channels + c;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)pair));
                __m512i high =
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(pair + channels)));
                _mm512_storeu_si512(tiles, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
}

/* Rows [T x D] to the left factor [D x T]: per 16 channels and DEPTH rows a tile. */
static inline void pack_columns(const uint16_t *rows, long positions, long channels,
                                uint16_t *tiles) {
    uint32_t pairs[CELLS];
    for (long t = 0; t < positions; t += DEPTH)
        for (long c = 0; c < channels; c += TILE, tiles += 2 * CELLS) {
            for (long r = 0; r < TILE; r++) {
                const uint16_t *pair = rows + (t + 2 * r) * channels + c;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)pair));
                __m512i high =
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(pair + channels)));
                _mm512_storeu_si512(pairs + r * TILE,
                                    _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
            for (long r = 0; r < TILE; r++)
                _mm512_storeu_si512((uint32_t *)tiles + r * TILE,
                                    _mm512_i32gather_epi32(every(TILE), pairs + r, 4));
        }
}

#endif
