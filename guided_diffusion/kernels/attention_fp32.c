/* Attention in float32 with AVX-512: out = softmax(q k^T / sqrt(D)) v, and its gradients.

   The method is that of attention_bf16.c: blocks of scores [keys x queries], so that the lanes of a
   vector are queries; the backward pass computes the scores again. Positions are padded with zeros
   to a multiple of BLOCK, and padded keys get weight 0. */

#include "attention.h"
#include "vectors.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum { COLUMNS = BLOCK / LANES }; /* vectors of queries in a block */

/* out[rows x columns] = left times right, added to what is there if `add`.

   Numbers of `left`, [rows x depth], lie `down` and `across` apart; rows of `right`, [depth x
   columns], and of `out` lie without gaps. `height` rows by `width` vectors are summed at a time:
   constants, small enough that the sums stay in registers. */
INLINE void product(const float *left, long down, long across, const float *right, float *out,
                    long rows, long depth, long columns, int add, const int height,
                    const int width) {
    for (long row = 0; row < rows; row += height)
        for (long column = 0; column < columns; column += width * LANES) {
            __m512 sums[8][4];
            for (int i = 0; i < height; i++)
                for (int j = 0; j < width; j++) {
                    const float *cell = out + (row + i) * columns + column + j * LANES;
                    sums[i][j] = add ? _mm512_loadu_ps(cell) : _mm512_setzero_ps();
                }
            for (long k = 0; k < depth; k++) {
                __m512 values[4];
                for (int j = 0; j < width; j++)
                    values[j] = _mm512_loadu_ps(right + k * columns + column + j * LANES);
                for (int i = 0; i < height; i++) {
                    __m512 factor = _mm512_set1_ps(left[(row + i) * down + k * across]);
                    for (int j = 0; j < width; j++)
                        sums[i][j] = _mm512_fmadd_ps(factor, values[j], sums[i][j]);
                }
            }
            for (int i = 0; i < height; i++)
                for (int j = 0; j < width; j++)
                    _mm512_storeu_ps(out + (row + i) * columns + column + j * LANES, sums[i][j]);
        }
}

/* [BLOCK keys x BLOCK queries] = rows [keys x D] times columns [D x queries]. */
static void scores_of(const float *rows, const float *columns, long channels, float *out) {
    product(rows, channels, 1, columns, out, BLOCK, channels, BLOCK, 0, 4, COLUMNS);
}

/* out [D x BLOCK queries] += rows [keys x D], transposed, times block [keys x queries]. */
static void add_keys(const float *rows, const float *block, long channels, float *out) {
    product(rows, 1, channels, block, out, channels, BLOCK, BLOCK, 1, 4, COLUMNS);
}

/* out [keys x D] += block [keys x queries] times rows [queries x D]. */
static void add_queries(const float *block, const float *rows, long channels, float *out) {
    product(block, BLOCK, 1, rows, out, BLOCK, BLOCK, channels, 1, 8, 2);
}

/* [T x D] with rows `stride` apart, to [padded T x D] without gaps. */
static void pack_rows(const float *from, long stride, long rows, long channels, float *to) {
    for (long row = 0; row < rows; row++)
        memcpy(to + row * channels, from + row * stride, 4 * channels);
    memset(to + rows * channels, 0, 4 * channels * (padded(rows) - rows));
}

/* BLOCK rows of [T x D] to [D x BLOCK]. */
static void transpose_block(const float *rows, long channels, float *columns) {
    for (long c = 0; c < channels; c++)
        for (long row = 0; row < BLOCK; row++) columns[c * BLOCK + row] = rows[row * channels + c];
}

/* out[query][channel] = block [D x BLOCK queries] * factors[query]. */
static void write_queries(const float *block, const float *factors, long queries, long channels,
                          float *out, long stride) {
    for (long query = 0; query < queries; query++)
        for (long c = 0; c < channels; c++)
            out[query * stride + c] = block[c * BLOCK + query] * factors[query];
}

/* What one thread needs for one head. */
typedef struct {
    float *q, *k, *v, *grad;         /* [padded T x D] */
    float *grad_k, *grad_v;          /* [padded T x D] */
    float *q_columns, *grad_columns; /* [D x BLOCK] */
    float *block;                    /* [D x BLOCK queries] */
    float *scores, *slopes;          /* [BLOCK keys x BLOCK queries] */
    float *product;                  /* [padded T] */
} Scratch;

static char *new_scratch(Scratch *s, const Attention *a, int backward) {
    size_t area = (size_t)padded(a->positions) * a->channels, small = BLOCK * a->channels;
    float **parts[] = {&s->q,      &s->k,      &s->v,         &s->grad,
                       &s->grad_k, &s->grad_v, &s->q_columns, &s->grad_columns,
                       &s->block,  &s->scores, &s->slopes,    &s->product};
    size_t sizes[] = {area,  area,  area,  area,          area,          area,
                      small, small, small, BLOCK * BLOCK, BLOCK * BLOCK, padded(a->positions)};
    if (!backward) sizes[3] = sizes[4] = sizes[5] = 0;
    size_t total = 0;
    for (int i = 0; i < 12; i++) total += sizes[i];
    float *memory = aligned_alloc(64, 4 * total);
    float *rest = memory;
    for (int i = 0; i < 12 && memory; rest += sizes[i++]) *parts[i] = rest;
    return (char *)memory;
}

static void head_forward(const Attention *a, Scratch *s, const Head *head) {
    const float *q = head->q, *k = head->k, *v = head->v;
    float *out = head->out;
    float *log_sums = head->log_sums;
    const long positions = a->positions, channels = a->channels, stride = a->qkv_position;
    const __m512 unit = _mm512_set1_ps(1 / sqrtf((float)channels));
    pack_rows(q, stride, positions, channels, s->q);
    pack_rows(k, stride, positions, channels, s->k);
    pack_rows(v, stride, positions, channels, s->v);
    for (long query = 0; query < positions; query += BLOCK) {
        __m512 most[COLUMNS], sum[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) {
            most[i] = _mm512_set1_ps(-INFINITY);
            sum[i] = _mm512_setzero_ps();
        }
        transpose_block(s->q + query * channels, channels, s->q_columns);
        memset(s->block, 0, 4 * BLOCK * channels);
        for (long key = 0; key < positions; key += BLOCK) {
            long rows = at_most(BLOCK, positions - key);
            scores_of(s->k + key * channels, s->q_columns, channels, s->scores);
            __m512 shrink[COLUMNS];
            int grown = 0;
            for (int i = 0; i < COLUMNS; i++) {
                __m512 top = most[i];
                for (long r = 0; r < rows; r++)
                    top = _mm512_max_ps(
                        _mm512_mul_ps(_mm512_loadu_ps(s->scores + r * BLOCK + i * LANES), unit),
                        top);
                grown |= _mm512_cmp_ps_mask(top, most[i], _CMP_GT_OQ);
                shrink[i] = exponential(_mm512_sub_ps(most[i], top), 0);
                sum[i] = _mm512_mul_ps(sum[i], shrink[i]);
                most[i] = top;
            }
            if (grown && key)
                for (long c = 0; c < channels; c++)
                    for (int i = 0; i < COLUMNS; i++) {
                        float *cell = s->block + c * BLOCK + i * LANES;
                        _mm512_storeu_ps(cell, _mm512_mul_ps(_mm512_loadu_ps(cell), shrink[i]));
                    }
            for (long r = 0; r < rows; r++)
                for (int i = 0; i < COLUMNS; i++) {
                    float *score = s->scores + r * BLOCK + i * LANES;
                    __m512 weight =
                        exponential(_mm512_fmsub_ps(_mm512_loadu_ps(score), unit, most[i]), 0);
                    sum[i] = _mm512_add_ps(sum[i], weight);
                    _mm512_storeu_ps(score, weight);
                }
            memset(s->scores + rows * BLOCK, 0, 4 * BLOCK * (BLOCK - rows));
            add_keys(s->v + key * channels, s->scores, channels, s->block);
        }
        float sums[BLOCK], tops[BLOCK], factors[BLOCK];
        for (int i = 0; i < COLUMNS; i++) {
            _mm512_storeu_ps(sums + i * LANES, sum[i]);
            _mm512_storeu_ps(tops + i * LANES, most[i]);
        }
        long queries = at_most(BLOCK, positions - query);
        for (long i = 0; i < queries; i++) {
            factors[i] = 1 / sums[i];
            log_sums[query + i] = tops[i] + logf(sums[i]);
        }
        write_queries(s->block, factors, queries, channels, out + query * a->out_position,
                      a->out_position);
    }
}

/* The sum of grad * out over the channels, per query. */
static void products_of_rows(const float *grad, const float *out, long positions, long channels,
                             long stride, float *products) {
    for (long row = 0; row < positions; row++) {
        __m512 sum = _mm512_setzero_ps();
        for (long c = 0; c < channels; c += LANES)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(grad + row * stride + c),
                                  _mm512_loadu_ps(out + row * stride + c), sum);
        products[row] = _mm512_reduce_add_ps(sum);
    }
    for (long row = positions; row < padded(positions); row++) products[row] = 0;
}

static void head_backward(const Attention *a, Scratch *s, const Head *head) {
    const float *q = head->q, *k = head->k, *v = head->v, *out = head->out, *grad = head->grad;
    float *grad_q = head->grad_q, *grad_k = head->grad_k, *grad_v = head->grad_v;
    const float *log_sums = head->log_sums;
    const long positions = a->positions, channels = a->channels, stride = a->qkv_position;
    const float scale = 1 / sqrtf((float)channels);
    const __m512 unit = _mm512_set1_ps(scale);
    products_of_rows(grad, out, positions, channels, a->out_position, s->product);
    pack_rows(q, stride, positions, channels, s->q);
    pack_rows(k, stride, positions, channels, s->k);
    pack_rows(v, stride, positions, channels, s->v);
    pack_rows(grad, a->out_position, positions, channels, s->grad);
    memset(s->grad_k, 0, 4 * padded(positions) * channels);
    memset(s->grad_v, 0, 4 * padded(positions) * channels);
    float factors[BLOCK];
    for (int i = 0; i < BLOCK; i++) factors[i] = scale;
    for (long query = 0; query < positions; query += BLOCK) {
        long queries = at_most(BLOCK, positions - query);
        __m512 log_sum[COLUMNS], along[COLUMNS];
        __mmask16 lanes[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) {
            lanes[i] = queries > i * LANES ? lanes_from(i * LANES, queries) : 0;
            log_sum[i] = _mm512_maskz_loadu_ps(lanes[i], log_sums + query + i * LANES);
            along[i] = _mm512_loadu_ps(s->product + query + i * LANES);
        }
        transpose_block(s->q + query * channels, channels, s->q_columns);
        transpose_block(s->grad + query * channels, channels, s->grad_columns);
        memset(s->block, 0, 4 * BLOCK * channels);
        for (long key = 0; key < positions; key += BLOCK) {
            long rows = at_most(BLOCK, positions - key);
            scores_of(s->k + key * channels, s->q_columns, channels, s->scores);
            scores_of(s->v + key * channels, s->grad_columns, channels, s->slopes);
            for (long r = 0; r < BLOCK; r++)
                for (int i = 0; i < COLUMNS; i++) {
                    float *score = s->scores + r * BLOCK + i * LANES;
                    float *slope = s->slopes + r * BLOCK + i * LANES;
                    __m512 weight =
                        exponential(_mm512_fmsub_ps(_mm512_loadu_ps(score), unit, log_sum[i]), 0);
                    weight = _mm512_maskz_mov_ps(r < rows ? lanes[i] : 0, weight);
                    _mm512_storeu_ps(score, weight);
                    __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(slope), along[i]);
                    _mm512_storeu_ps(slope, _mm512_mul_ps(weight, apart));
                }
            add_queries(s->scores, s->grad + query * channels, channels,
                        s->grad_v + key * channels);
            add_queries(s->slopes, s->q + query * channels, channels, s->grad_k + key * channels);
            add_keys(s->k + key * channels, s->slopes, channels, s->block);
        }
        write_queries(s->block, factors, queries, channels, grad_q + query * stride, stride);
    }
    for (long row = 0; row < positions; row++)
        for (long c = 0; c < channels; c++) {
            grad_k[row * stride + c] = s->grad_k[row * channels + c] * scale;
            grad_v[row * stride + c] = s->grad_v[row * channels + c];
        }
}

static int attend(const Attention *a, int backward) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Scratch scratch;
        char *memory = new_scratch(&scratch, a, backward);
#pragma omp for schedule(static)
        for (long item = 0; item < a->images * a->heads; item++) {
            Head head = head_of(a, item, sizeof(float));
            if (!memory)
                failed = 1;
            else if (backward)
                head_backward(a, &scratch, &head);
            else
                head_forward(a, &scratch, &head);
        }
        free(memory);
    }
    return failed;
}

/* Both return 0, or 1 if memory is short. */
int attention_forward_fp32(const Attention *a) { return attend(a, 0); }

int attention_backward_fp32(const Attention *a) { return attend(a, 1); }
