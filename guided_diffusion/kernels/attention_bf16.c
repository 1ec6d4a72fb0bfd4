/* Attention in bfloat16 with AMX tiles: out = softmax(q k^T / sqrt(D)) v, and its gradients.

   As in FlashAttention-2 (arXiv 2307.08691) the scores exist block by block only: the forward pass
   keeps the logarithm of each query's sum, and the backward pass computes the scores again. All
   blocks are kept transposed, [keys x queries], so that maxima and sums run down the rows and the
   16 lanes of a vector are 16 queries.

   Positions are padded with zeros to a multiple of BLOCK, and padded keys get weight 0. */

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")

#include "attention.h"
#include "tiles.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#define LOG2E 1.44269504f

/* Scores of 16 keys (rows) and BLOCK queries: left [16 x D] times the tiles of `right`. */
INLINE void strip_of_products(const uint16_t *left, const uint32_t *right, long channels,
                              float *out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long c = 0; c < channels; c += DEPTH) {
        const uint32_t *tiles = right + c / DEPTH * CELLS;
        long across = channels / DEPTH * CELLS; /* to the next 16 queries */
        _tile_loadd(4, left + c, 2 * channels);
        _tile_loadd(5, tiles, 64);
        _tile_loadd(6, tiles + across, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, tiles + 2 * across, 64);
        _tile_loadd(6, tiles + 3 * across, 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, out, 4 * BLOCK);
    _tile_stored(1, out + TILE, 4 * BLOCK);
    _tile_stored(2, out + 2 * TILE, 4 * BLOCK);
    _tile_stored(3, out + 3 * TILE, 4 * BLOCK);
}

/* 2^x for x <= 0, to 2e-4 of it. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.05477178f), f, _mm512_set1_ps(0.24200612f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69329851f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f)), n);
}

/* Two rows of numbers, as bfloat16: low half the first, high half the second. */
INLINE __m512i halves(__m512 first, __m512 second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* 2^(score * unit - log_sum): the weight that a query gives to a key. */
INLINE __m512 weight_of(const float *score, __m512 unit, __m512 log_sum) {
    return power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(score), unit, log_sum));
}

/* The two halves to two rows of a block of the left factor. */
INLINE void store_two_rows(uint16_t *row, __m512i both) {
    _mm256_storeu_si256((__m256i *)row, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i *)(row + BLOCK), _mm512_extracti64x4_epi64(both, 1));
}

INLINE __m512i interleaved(__m512i both) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
}

/* What one thread needs for one head; see `new_scratch`. */
typedef struct {
    uint16_t *rows, *more_rows, *columns;   /* [T x D]; left factors */
    uint32_t *transposed, *more_transposed; /* right factors [D x T] */
    uint32_t *pairs, *more_pairs;           /* right factors [T x D] */
    float *sums_k, *sums_v;                 /* gradients as tiles of [16 keys x 16 channels] */
    float *block;                           /* tiles of [16 channels x 16 queries] */
    float *scores, *slopes;                 /* a strip: [16 keys x BLOCK queries] */
    uint16_t *weights, *grads;              /* a block as left factor: [keys x queries] */
    uint32_t *right;                        /* a block as right factor, [keys x queries] */
    float *sum, *product;                   /* [BLOCK], [padded T] */
} Scratch;

static char *scratch_part(char **rest, size_t bytes) {
    char *part = *rest;
    *rest += (bytes + 63) / 64 * 64;
    return part;
}

/* Lays the parts out from `memory` on; returns the bytes needed. */
static size_t lay_out(Scratch *s, char *memory, long positions, long channels, int backward) {
    size_t area = (size_t)padded(positions) * channels;
    char *rest = memory;
    s->rows = (void *)scratch_part(&rest, 2 * area);
    s->columns = (void *)scratch_part(&rest, 2 * area);
    s->transposed = (void *)scratch_part(&rest, 2 * area);
    s->block = (void *)scratch_part(&rest, 4 * BLOCK * channels);
    s->scores = (void *)scratch_part(&rest, 4 * TILE * BLOCK);
    s->right = (void *)scratch_part(&rest, 2 * BLOCK * BLOCK);
    s->sum = (void *)scratch_part(&rest, 4 * BLOCK);
    if (backward) {
        s->more_rows = (void *)scratch_part(&rest, 2 * area);
        s->more_transposed = (void *)scratch_part(&rest, 2 * area);
        s->pairs = (void *)scratch_part(&rest, 2 * area);
        s->more_pairs = (void *)scratch_part(&rest, 2 * area);
        s->sums_k = (void *)scratch_part(&rest, 4 * area);
        s->sums_v = (void *)scratch_part(&rest, 4 * area);
        s->slopes = (void *)scratch_part(&rest, 4 * TILE * BLOCK);
        s->weights = (void *)scratch_part(&rest, 2 * BLOCK * BLOCK);
        s->grads = (void *)scratch_part(&rest, 2 * BLOCK * BLOCK);
        s->product = (void *)scratch_part(&rest, 4 * padded(positions));
    }
    return rest - memory;
}

static char *new_scratch(Scratch *s, const Attention *a, int backward) {
    size_t bytes = lay_out(s, NULL, a->positions, a->channels, backward);
    char *memory = aligned_alloc(64, bytes);
    if (memory) lay_out(s, memory, a->positions, a->channels, backward);
    return memory;
}

/* block[channels x BLOCK queries] += columns [channels x keys] times right [keys x queries]. */
INLINE void add_keys(const uint16_t *columns, const uint32_t *right, long channels, float *block) {
    for (long c = 0; c < channels; c += TILE, block += STRIPS * CELLS) {
        _tile_loadd(0, block, 64);
        _tile_loadd(1, block + CELLS, 64);
        _tile_loadd(2, block + 2 * CELLS, 64);
        _tile_loadd(3, block + 3 * CELLS, 64);
        for (long step = 0; step < STEPS; step++) {
            const uint32_t *tiles = right + step * STRIPS * CELLS;
            _tile_loadd(4, columns + (step * channels + c) * DEPTH, 64);
            _tile_loadd(5, tiles, 64);
            _tile_loadd(6, tiles + CELLS, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(5, tiles + 2 * CELLS, 64);
            _tile_loadd(6, tiles + 3 * CELLS, 64);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, block, 64);
        _tile_stored(1, block + CELLS, 64);
        _tile_stored(2, block + 2 * CELLS, 64);
        _tile_stored(3, block + 3 * CELLS, 64);
    }
}

/* Write a block's columns, queries, as rows of bfloat16: out[query][channel] = block * factor. */
static void write_queries(const float *block, const float *factors, long queries, long channels,
                          uint16_t *out, long stride) {
    for (long query = 0; query < queries; query++) {
        __m512 factor = _mm512_set1_ps(factors[query]);
        for (long c = 0; c < channels; c += TILE) {
            const float *tile = block + (c / TILE * STRIPS + query / TILE) * CELLS + query % TILE;
            __m512 row = _mm512_mul_ps(_mm512_i32gather_ps(every(TILE), tile, 4), factor);
            _mm256_storeu_si256((__m256i *)(out + query * stride + c),
                                (__m256i)_mm512_cvtneps_pbh(row));
        }
    }
}

/* The transposed scores of one block of queries, 16 keys at a time. */
INLINE void scores_of(const Scratch *s, long key, long query, long channels) {
    strip_of_products(s->rows + key * channels, s->transposed + query * channels / 2, channels,
                      s->scores);
}

static void head_forward(const Attention *a, Scratch *s, const Head *head) {
    const uint16_t *q = head->q, *k = head->k, *v = head->v;
    uint16_t *out = head->out;
    float *log_sums = head->log_sums;
    const long positions = a->positions, channels = a->channels, stride = a->qkv_position;
    const __m512 unit = _mm512_set1_ps(LOG2E / sqrtf((float)channels));
    pack_rows(v, stride, positions, channels, s->rows);
    pack_columns(s->rows, padded(positions), channels, s->columns);
    pack_rows(q, stride, positions, channels, s->rows);
    pack_transposed(s->rows, padded(positions), channels, s->transposed);
    pack_rows(k, stride, positions, channels, s->rows);
    for (long query = 0; query < positions; query += BLOCK) {
        __m512 most[STRIPS], sum[STRIPS];
        for (int i = 0; i < STRIPS; i++) {
            most[i] = _mm512_set1_ps(-INFINITY);
            sum[i] = _mm512_setzero_ps();
        }
        for (long key = 0; key < positions; key += TILE) {
            scores_of(s, key, query, channels);
            long rows = at_most(TILE, positions - key);
            for (long r = 0; r < rows; r++)
                for (int i = 0; i < STRIPS; i++)
                    most[i] =
                        _mm512_max_ps(_mm512_loadu_ps(s->scores + r * BLOCK + i * TILE), most[i]);
        }
        for (int i = 0; i < STRIPS; i++) most[i] = _mm512_mul_ps(most[i], unit);
        memset(s->block, 0, 4 * BLOCK * channels);
        for (long key = 0; key < positions; key += BLOCK) {
            for (long strip = 0; strip < STRIPS; strip++) {
                long first = key + strip * TILE, rows = positions - first;
                uint32_t *right = s->right + strip / 2 * STRIPS * CELLS + strip % 2 * 8 * TILE;
                scores_of(s, first, query, channels);
                for (long r = 0; r < TILE; r += 2)
                    for (int i = 0; i < STRIPS; i++) {
                        const float *score = s->scores + r * BLOCK + i * TILE;
                        __m512 one = weight_of(score, unit, most[i]);
                        __m512 two = weight_of(score + BLOCK, unit, most[i]);
                        one = _mm512_maskz_mov_ps(r < rows ? 0xffff : 0, one);
                        two = _mm512_maskz_mov_ps(r + 1 < rows ? 0xffff : 0, two);
                        sum[i] = _mm512_add_ps(sum[i], _mm512_add_ps(one, two));
                        _mm512_storeu_si512(right + i * CELLS + r / 2 * TILE,
                                            interleaved(halves(one, two)));
                    }
            }
            add_keys(s->columns + key * channels, s->right, channels, s->block);
        }
        float sums[BLOCK], tops[BLOCK], factors[BLOCK];
        for (int i = 0; i < STRIPS; i++) {
            _mm512_storeu_ps(sums + i * TILE, sum[i]);
            _mm512_storeu_ps(tops + i * TILE, most[i]);
        }
        long queries = at_most(BLOCK, positions - query);
        for (long i = 0; i < queries; i++) {
            factors[i] = 1 / sums[i];
            log_sums[query + i] = (tops[i] + log2f(sums[i])) / LOG2E;
        }
        write_queries(s->block, factors, queries, channels, out + query * a->out_position,
                      a->out_position);
    }
}

/* sums [16 keys x channels] += left [16 keys x BLOCK queries] times pairs [queries x channels]. */
INLINE void add_queries(const uint16_t *left, const uint32_t *pairs, long channels, float *sums) {
    for (long c = 0; c < channels; c += 2 * TILE) {
        float *first = sums + c * TILE, *second = first + CELLS;
        _tile_loadd(0, first, 64);
        _tile_loadd(1, second, 64);
        for (long step = 0; step < STEPS; step++) {
            const uint32_t *tile = pairs + step * DEPTH * channels / 2 + c / TILE * CELLS;
            _tile_loadd(4, left + step * DEPTH, 2 * BLOCK);
            _tile_loadd(5, tile, 64);
            _tile_loadd(6, tile + CELLS, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, first, 64);
        _tile_stored(1, second, 64);
    }
}

/* Write tiles of [16 keys x 16 channels] as rows of bfloat16, times `factor`. */
static void write_keys(const float *tiles, float factor, long positions, long channels,
                       uint16_t *out, long stride) {
    const __m512 scale = _mm512_set1_ps(factor);
    for (long row = 0; row < positions; row++)
        for (long c = 0; c < channels; c += TILE) {
            const float *cells =
                tiles + row / TILE * TILE * channels + c * TILE + row % TILE * TILE;
            __m512 values = _mm512_mul_ps(_mm512_loadu_ps(cells), scale);
            _mm256_storeu_si256((__m256i *)(out + row * stride + c),
                                (__m256i)_mm512_cvtneps_pbh(values));
        }
}

/* The sum of grad * out over the channels, per query. */
static void products_of_rows(const uint16_t *grad, const uint16_t *out, long positions,
                             long channels, long stride, float *products) {
    for (long row = 0; row < positions; row++) {
        __m512 sum = _mm512_setzero_ps();
        for (long c = 0; c < channels; c += LANES)
            sum = _mm512_fmadd_ps(load(grad, row * stride + c, 0xffff, 1),
                                  load(out, row * stride + c, 0xffff, 1), sum);
        products[row] = _mm512_reduce_add_ps(sum);
    }
    for (long row = positions; row < padded(positions); row++) products[row] = 0;
}

static void head_backward(const Attention *a, Scratch *s, const Head *head) {
    const uint16_t *q = head->q, *k = head->k, *v = head->v, *out = head->out, *grad = head->grad;
    uint16_t *grad_q = head->grad_q, *grad_k = head->grad_k, *grad_v = head->grad_v;
    const float *log_sums = head->log_sums;
    const long positions = a->positions, channels = a->channels, stride = a->qkv_position;
    const long area = padded(positions) * channels;
    const float scale = 1 / sqrtf((float)channels);
    const __m512 unit = _mm512_set1_ps(LOG2E * scale);
    products_of_rows(grad, out, positions, channels, a->out_position, s->product);
    pack_rows(q, stride, positions, channels, s->rows);
    pack_transposed(s->rows, padded(positions), channels, s->transposed);
    pack_pairs(s->rows, padded(positions), channels, s->pairs);
    pack_rows(grad, a->out_position, positions, channels, s->rows);
    pack_transposed(s->rows, padded(positions), channels, s->more_transposed);
    pack_pairs(s->rows, padded(positions), channels, s->more_pairs);
    pack_rows(v, stride, positions, channels, s->more_rows);
    pack_rows(k, stride, positions, channels, s->rows);
    pack_columns(s->rows, padded(positions), channels, s->columns);
    memset(s->sums_k, 0, 4 * area);
    memset(s->sums_v, 0, 4 * area);
    float factors[BLOCK];
    for (int i = 0; i < BLOCK; i++) factors[i] = scale;
    for (long query = 0; query < positions; query += BLOCK) {
        long queries = at_most(BLOCK, positions - query);
        __m512 log_sum[STRIPS], product[STRIPS];
        __mmask16 lanes[STRIPS];
        for (int i = 0; i < STRIPS; i++) {
            lanes[i] = queries > i * TILE ? lanes_from(i * TILE, queries) : 0;
            log_sum[i] = _mm512_maskz_loadu_ps(lanes[i], log_sums + query + i * TILE);
            log_sum[i] = _mm512_mul_ps(log_sum[i], _mm512_set1_ps(LOG2E));
            product[i] = _mm512_loadu_ps(s->product + query + i * TILE);
        }
        memset(s->block, 0, 4 * BLOCK * channels);
        for (long key = 0; key < positions; key += BLOCK) {
            for (long strip = 0; strip < STRIPS; strip++) {
                long first = key + strip * TILE, rows = positions - first;
                uint32_t *right = s->right + strip / 2 * STRIPS * CELLS + strip % 2 * 8 * TILE;
                scores_of(s, first, query, channels);
                strip_of_products(s->more_rows + first * channels,
                                  s->more_transposed + query * channels / 2, channels, s->slopes);
                for (long r = 0; r < TILE; r += 2) {
                    uint16_t *weights = s->weights + (strip * TILE + r) * BLOCK;
                    uint16_t *grads = s->grads + (strip * TILE + r) * BLOCK;
                    __mmask16 exists = r < rows ? 0xffff : 0, next = r + 1 < rows ? 0xffff : 0;
                    for (int i = 0; i < STRIPS; i++) {
                        const float *score = s->scores + r * BLOCK + i * TILE;
                        const float *slope = s->slopes + r * BLOCK + i * TILE;
                        __m512 one = weight_of(score, unit, log_sum[i]);
                        __m512 two = weight_of(score + BLOCK, unit, log_sum[i]);
                        one = _mm512_maskz_mov_ps(exists & lanes[i], one);
                        two = _mm512_maskz_mov_ps(next & lanes[i], two);
                        __m512i both = halves(one, two);
                        store_two_rows(weights + i * TILE, both);
                        one = _mm512_mul_ps(one, _mm512_sub_ps(_mm512_loadu_ps(slope), product[i]));
                        two = _mm512_mul_ps(
                            two, _mm512_sub_ps(_mm512_loadu_ps(slope + BLOCK), product[i]));
                        both = halves(one, two);
                        store_two_rows(grads + i * TILE, both);
                        _mm512_storeu_si512(right + i * CELLS + r / 2 * TILE, interleaved(both));
                    }
                }
                add_queries(s->weights + strip * TILE * BLOCK, s->more_pairs + query * channels / 2,
                            channels, s->sums_v + first * channels);
                add_queries(s->grads + strip * TILE * BLOCK, s->pairs + query * channels / 2,
                            channels, s->sums_k + first * channels);
            }
            add_keys(s->columns + key * channels, s->right, channels, s->block);
        }
        write_queries(s->block, factors, queries, channels, grad_q + query * stride, stride);
    }
    write_keys(s->sums_k, scale, positions, channels, grad_k, stride);
    write_keys(s->sums_v, 1, positions, channels, grad_v, stride);
}

static int attend(const Attention *a, int backward) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Scratch scratch;
        char *memory = new_scratch(&scratch, a, backward);
        set_up_tiles();
#pragma omp for schedule(static)
        for (long item = 0; item < a->images * a->heads; item++) {
            Head head = head_of(a, item, sizeof(uint16_t));
            if (!memory)
                failed = 1;
            else if (backward)
                head_backward(a, &scratch, &head);
            else
                head_forward(a, &scratch, &head);
        }
        _tile_release();
        free(memory);
    }
    return failed;
}

/* Both return 0, or 1 if memory is short. */
int attention_forward_bf16(const Attention *a) { return attend(a, 0); }

int attention_backward_bf16(const Attention *a) { return attend(a, 1); }
