/* 3x3 convolutions (stride 1, padding 1) in float32 by Winograd's minimal filtering F(2x2, 3x3)
   (arXiv 1509.09308): 16 products for each 2x2 outputs where the definition takes 36.

   Images have channels last. A tile is 4x4 inputs, two apart, and gives 2x2 outputs. Tiles are
   worked on in blocks that stay in the cache: transform the inputs, 16 matrix products, transform
   the results. */

#include "vectors.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    POINTS = 16,
    TILES = 64,
    PANEL = 64
}; /* of a tile; most tiles in a block; columns at a time */

typedef struct {
    const float *x;       /* [N x H x W x C] */
    const float *grad;    /* [N x H x W x O], for the gradient of the weights */
    const float *weights; /* transformed: [POINTS x C x O] */
    const float *bias;    /* [O] or NULL */
    float *out;           /* [N x H x W x O], or the weights' gradient [O x C x 3 x 3] */
    long images, height, width, channels, outputs;
} Winograd;

static long rows_of_tiles(const Winograd *a) { return (a->height + 1) / 2; }
static long columns_of_tiles(const Winograd *a) { return (a->width + 1) / 2; }
static long tiles_of(const Winograd *a) {
    return a->images * rows_of_tiles(a) * columns_of_tiles(a);
}

/* out [rows x columns] = left [rows x depth] times right [depth x columns], all with rows
   `*_stride` apart; added to what is there if `add`. Columns are a multiple of 16. */
INLINE void block_of_product(const float *left, long left_down, long left_across,
                             const float *right, long right_stride, float *out, long out_stride,
                             long depth, int add, const int height, const int width) {
    __m512 sums[6][4];
    for (int i = 0; i < height; i++)
        for (int j = 0; j < width; j++)
            sums[i][j] =
                add ? _mm512_loadu_ps(out + i * out_stride + j * LANES) : _mm512_setzero_ps();
    for (long k = 0; k < depth; k++) {
        __m512 values[4];
        for (int j = 0; j < width; j++)
            values[j] = _mm512_loadu_ps(right + k * right_stride + j * LANES);
        for (int i = 0; i < height; i++) {
            __m512 factor = _mm512_set1_ps(left[i * left_down + k * left_across]);
            for (int j = 0; j < width; j++)
                sums[i][j] = _mm512_fmadd_ps(factor, values[j], sums[i][j]);
        }
    }
    for (int i = 0; i < height; i++)
        for (int j = 0; j < width; j++)
            _mm512_storeu_ps(out + i * out_stride + j * LANES, sums[i][j]);
}

INLINE void rows_of_product(const float *left, long left_down, long left_across, const float *right,
                            long right_stride, float *out, long out_stride, long rows, long depth,
                            int add, const int width) {
    long row = 0;
    for (; row + 6 <= rows; row += 6)
        block_of_product(left + row * left_down, left_down, left_across, right, right_stride,
                         out + row * out_stride, out_stride, depth, add, 6, width);
    for (; row + 2 <= rows; row += 2)
        block_of_product(left + row * left_down, left_down, left_across, right, right_stride,
                         out + row * out_stride, out_stride, depth, add, 2, width);
    for (; row < rows; row++)
        block_of_product(left + row * left_down, left_down, left_across, right, right_stride,
                         out + row * out_stride, out_stride, depth, add, 1, width);
}

static void product(const float *left, long left_down, long left_across, const float *right,
                    long right_stride, float *out, long out_stride, long rows, long depth,
                    long columns, int add) {
    long column = 0;
    for (; column + PANEL <= columns; column += PANEL)
        rows_of_product(left, left_down, left_across, right + column, right_stride, out + column,
                        out_stride, rows, depth, add, 4);
    for (; column < columns; column += LANES)
        rows_of_product(left, left_down, left_across, right + column, right_stride, out + column,
                        out_stride, rows, depth, add, 1);
}

/* The position of a tile's first input: image, row and column, the latter two from -1 on. */
INLINE void place_of(const Winograd *a, long tile, long *image, long *row, long *column) {
    long columns = columns_of_tiles(a), per_image = columns * rows_of_tiles(a);
    *image = tile / per_image;
    *row = tile % per_image / columns * 2 - 1;
    *column = tile % columns * 2 - 1;
}

/* B^T d B of 16 channels of one tile; zeros beyond the image. */
INLINE void transform_input(const Winograd *a, long tile, long channel, float *out, long stride) {
    long image, row, column;
    place_of(a, tile, &image, &row, &column);
    const float *x = a->x + image * a->height * a->width * a->channels + channel;
    __m512 d[4][4], t[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            long y = row + i, z = column + j;
            int inside = y >= 0 && y < a->height && z >= 0 && z < a->width;
            d[i][j] = inside ? _mm512_loadu_ps(x + (y * a->width + z) * a->channels)
                             : _mm512_setzero_ps();
        }
    for (int j = 0; j < 4; j++) {
        t[0][j] = _mm512_sub_ps(d[0][j], d[2][j]);
        t[1][j] = _mm512_add_ps(d[1][j], d[2][j]);
        t[2][j] = _mm512_sub_ps(d[2][j], d[1][j]);
        t[3][j] = _mm512_sub_ps(d[1][j], d[3][j]);
    }
    for (int i = 0; i < 4; i++) {
        float *cell = out + 4 * i * stride;
        _mm512_storeu_ps(cell, _mm512_sub_ps(t[i][0], t[i][2]));
        _mm512_storeu_ps(cell + stride, _mm512_add_ps(t[i][1], t[i][2]));
        _mm512_storeu_ps(cell + 2 * stride, _mm512_sub_ps(t[i][2], t[i][1]));
        _mm512_storeu_ps(cell + 3 * stride, _mm512_sub_ps(t[i][1], t[i][3]));
    }
}

/* A^T m A of 16 outputs of one tile, plus bias. */
INLINE void transform_output(const Winograd *a, long tile, long output, const float *in,
                             long stride) {
    long image, row, column;
    place_of(a, tile, &image, &row, &column);
    float *out = a->out + image * a->height * a->width * a->outputs + output;
    __m512 t[2][4], bias = a->bias ? _mm512_loadu_ps(a->bias + output) : _mm512_setzero_ps();
    for (int j = 0; j < 4; j++) {
        __m512 m[4];
        for (int i = 0; i < 4; i++) m[i] = _mm512_loadu_ps(in + (4 * i + j) * stride);
        t[0][j] = _mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]);
        t[1][j] = _mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]);
    }
    for (int i = 0; i < 2; i++) {
        long y = row + 1 + i;
        if (y >= a->height) break;
        __m512 first = _mm512_add_ps(_mm512_add_ps(t[i][0], t[i][1]), t[i][2]);
        __m512 second = _mm512_sub_ps(_mm512_sub_ps(t[i][1], t[i][2]), t[i][3]);
        float *cell = out + (y * a->width + column + 1) * a->outputs;
        _mm512_storeu_ps(cell, _mm512_add_ps(first, bias));
        if (column + 2 < a->width) _mm512_storeu_ps(cell + a->outputs, _mm512_add_ps(second, bias));
    }
}

/* A g A^T of 16 outputs of one tile's gradient: the adjoint of `transform_output`. */
INLINE void transform_gradient(const Winograd *a, long tile, long output, float *out, long stride) {
    long image, row, column;
    place_of(a, tile, &image, &row, &column);
    const float *grad = a->grad + image * a->height * a->width * a->outputs + output;
    __m512 g[2][2], t[4][2];
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            long y = row + 1 + i, z = column + 1 + j;
            g[i][j] = y < a->height && z < a->width
                          ? _mm512_loadu_ps(grad + (y * a->width + z) * a->outputs)
                          : _mm512_setzero_ps();
        }
    for (int j = 0; j < 2; j++) {
        t[0][j] = g[0][j];
        t[1][j] = _mm512_add_ps(g[0][j], g[1][j]);
        t[2][j] = _mm512_sub_ps(g[0][j], g[1][j]);
        t[3][j] = _mm512_sub_ps(_mm512_setzero_ps(), g[1][j]);
    }
    for (int i = 0; i < 4; i++) {
        float *cell = out + 4 * i * stride;
        _mm512_storeu_ps(cell, t[i][0]);
        _mm512_storeu_ps(cell + stride, _mm512_add_ps(t[i][0], t[i][1]));
        _mm512_storeu_ps(cell + 2 * stride, _mm512_sub_ps(t[i][0], t[i][1]));
        _mm512_storeu_ps(cell + 3 * stride, _mm512_sub_ps(_mm512_setzero_ps(), t[i][1]));
    }
}

/* G g G^T of 16 kernels, which lie `apart` numbers apart, seen through half a turn if `turned`. */
INLINE void transform_kernels(const float *g, __m512i apart, __mmask16 lanes, float *out,
                              long stride, int turned) {
    const __m512 half = _mm512_set1_ps(0.5f), zero = _mm512_setzero_ps();
    __m512 w[9], t[4][3];
    for (int k = 0; k < 9; k++)
        w[k] = _mm512_mask_i32gather_ps(zero, lanes, apart, g + (turned ? 8 - k : k), 4);
    for (int j = 0; j < 3; j++) {
        __m512 ends = _mm512_add_ps(w[j], w[6 + j]);
        t[0][j] = w[j];
        t[1][j] = _mm512_mul_ps(half, _mm512_add_ps(ends, w[3 + j]));
        t[2][j] = _mm512_mul_ps(half, _mm512_sub_ps(ends, w[3 + j]));
        t[3][j] = w[6 + j];
    }
    for (int i = 0; i < 4; i++) {
        __m512 ends = _mm512_add_ps(t[i][0], t[i][2]);
        float *cell = out + 4 * i * stride;
        _mm512_mask_storeu_ps(cell, lanes, t[i][0]);
        _mm512_mask_storeu_ps(cell + stride, lanes,
                              _mm512_mul_ps(half, _mm512_add_ps(ends, t[i][1])));
        _mm512_mask_storeu_ps(cell + 2 * stride, lanes,
                              _mm512_mul_ps(half, _mm512_sub_ps(ends, t[i][1])));
        _mm512_mask_storeu_ps(cell + 3 * stride, lanes, t[i][2]);
    }
}

/* Weights [O x C x 3 x 3] to G g G^T, [POINTS x C x O]; for the gradient of the input turned by
   half a turn and with channels and outputs exchanged, [POINTS x O x C]. */
void winograd_weights(const float *weights, float *out, long outputs, long channels, int turned) {
    long rows = turned ? outputs : channels, columns = turned ? channels : outputs;
    long down = turned ? 9 * channels : 9, across = turned ? 9 : 9 * channels;
    const __m512i counting = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(counting, _mm512_set1_epi32((int)across));
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
        for (long column = 0; column < columns; column += LANES)
            transform_kernels(weights + row * down + column * across, apart,
                              lanes_from(column, columns), out + row * columns + column,
                              rows * columns, turned);
}

/* Tiles in a block: few enough that every thread has one. */
static long tiles_per_block(long tiles) {
    long threads = omp_get_max_threads(), share = (tiles + threads - 1) / threads;
    return share < TILES ? share : TILES;
}

/* out = x convolved with the weights, plus bias. Returns 1 if memory is short, otherwise 0. */
int winograd_convolve(const Winograd *a) {
    long tiles = tiles_of(a), size = tiles_per_block(tiles), blocks = (tiles + size - 1) / size;
    long channels = a->channels, outputs = a->outputs;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *inputs = aligned_alloc(64, sizeof(float) * POINTS * TILES * (channels + outputs));
        float *results = inputs + POINTS * TILES * channels;
#pragma omp for schedule(static)
        for (long block = 0; block < blocks; block++) {
            if (!inputs) {
                failed = 1;
                continue;
            }
            long first = block * size, count = tiles - first < size ? tiles - first : size;
            for (long t = 0; t < count; t++)
                for (long c = 0; c < channels; c += LANES)
                    transform_input(a, first + t, c, inputs + t * channels + c, TILES * channels);
            for (long p = 0; p < POINTS; p++)
                product(inputs + p * TILES * channels, channels, 1,
                        a->weights + p * channels * outputs, outputs, results + p * TILES * outputs,
                        outputs, count, channels, outputs, 0);
            for (long t = 0; t < count; t++)
                for (long o = 0; o < outputs; o += LANES)
                    transform_output(a, first + t, o, results + t * outputs + o, TILES * outputs);
        }
        free(inputs);
    }
    return failed;
}

/* G^T s G: from [POINTS x C x O] sums to the weights' gradient [O x C x 3 x 3]. */
static void fold_gradient(const Winograd *a, const float *sums) {
    long stride = a->channels * a->outputs;
#pragma omp parallel for schedule(static)
    for (long c = 0; c < a->channels; c++)
        for (long o = 0; o < a->outputs; o++) {
            const float *cell = sums + c * a->outputs + o;
            float t[3][4];
            for (int j = 0; j < 4; j++) {
                float s0 = cell[j * stride], s1 = cell[(4 + j) * stride];
                float s2 = cell[(8 + j) * stride], s3 = cell[(12 + j) * stride];
                t[0][j] = s0 + (s1 + s2) / 2;
                t[1][j] = (s1 - s2) / 2;
                t[2][j] = (s1 + s2) / 2 + s3;
            }
            float *out = a->out + (o * a->channels + c) * 9;
            for (int i = 0; i < 3; i++) {
                out[3 * i] = t[i][0] + (t[i][1] + t[i][2]) / 2;
                out[3 * i + 1] = (t[i][1] - t[i][2]) / 2;
                out[3 * i + 2] = (t[i][1] + t[i][2]) / 2 + t[i][3];
            }
        }
}

/* The gradient of the weights; points are shared out among the threads, so the order of the sums
   does not depend on their number. Returns 1 if memory is short, otherwise 0. */
int winograd_weight_gradient(const Winograd *a) {
    long tiles = tiles_of(a), blocks = (tiles + TILES - 1) / TILES;
    long channels = a->channels, outputs = a->outputs;
    float *sums = aligned_alloc(64, sizeof(float) * POINTS * channels * outputs);
    float *memory = aligned_alloc(64, sizeof(float) * POINTS * TILES * (channels + outputs));
    float *grads = memory + POINTS * TILES * channels;
    int failed = !sums || !memory;
    if (!failed) {
        memset(sums, 0, sizeof(float) * POINTS * channels * outputs);
#pragma omp parallel
        for (long block = 0; block < blocks; block++) {
            long first = block * TILES, count = tiles - first < TILES ? tiles - first : TILES;
#pragma omp for schedule(static)
            for (long t = 0; t < count; t++) {
                for (long c = 0; c < channels; c += LANES)
                    transform_input(a, first + t, c, memory + t * channels + c, TILES * channels);
                for (long o = 0; o < outputs; o += LANES)
                    transform_gradient(a, first + t, o, grads + t * outputs + o, TILES * outputs);
            }
#pragma omp for schedule(static)
            for (long p = 0; p < POINTS; p++)
                product(memory + p * TILES * channels, 1, channels, grads + p * TILES * outputs,
                        outputs, sums + p * channels * outputs, outputs, channels, count, outputs,
                        1);
        }
        fold_gradient(a, sums);
    }
    free(memory);
    free(sums);
    return failed;
}
