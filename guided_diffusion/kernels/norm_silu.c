/* y = silu(norm(x) * (1 + scale) + shift) over images with channels last, and its gradients.

   norm is group normalisation; statistics and arithmetic are float32 whatever the memory holds. An
   image is cut into chunks of positions, whose sums are combined in a fixed order: results do not
   depend on the number of threads. */

#include "vectors.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 256, BLOCK = 4 }; /* positions; vectors of channels summed at a time */

typedef struct {
    const void *x, *grad;
    void *out;                      /* y, or the gradient of x */
    const float *weight, *bias;     /* [C] */
    const float *scale, *shift;     /* [N x C] each, rows `steer_stride` apart, or NULL */
    float *statistics;              /* [N x 2 x G]: mean, 1 / standard deviation */
    float *grad_weight, *grad_bias; /* [N x C]: each image's part */
    float *grad_scale, *grad_shift; /* [N x C], or NULL */
    long images, positions, channels, groups, steer_stride;
    float eps;
    int bf16, silu;
} Norm;

static long chunks_of(const Norm *a) { return (a->positions + CHUNK - 1) / CHUNK; }

static long rows_of(const Norm *a, long chunk) {
    long rest = a->positions - chunk * CHUNK;
    return rest < CHUNK ? rest : CHUNK;
}

/* Per channel of one chunk: mean and sum of squared deviations, by deviations from the first row.
 */
INLINE void chunk_moments(const Norm *a, const void *x, long first, long rows, float *mean,
                          float *squares, int bf16) {
    long channels = a->channels;
    const __m512 count = _mm512_set1_ps(1.0f / rows);
    for (long c0 = 0; c0 < channels; c0 += BLOCK * LANES) {
        __m512 pivot[BLOCK], s1[BLOCK], s2[BLOCK];
        __mmask16 lanes[BLOCK];
        for (int b = 0; b < BLOCK; b++) {
            long c = c0 + b * LANES;
            lanes[b] = c < channels ? lanes_from(c, channels) : 0;
            pivot[b] = load(x, first * channels + (c < channels ? c : 0), lanes[b], bf16);
            s1[b] = s2[b] = _mm512_setzero_ps();
        }
        for (long row = 0; row < rows; row++)
            for (int b = 0; b < BLOCK; b++) {
                long c = c0 + b * LANES;
                __m512 d = load(x, (first + row) * channels + c, lanes[b], bf16);
                d = _mm512_sub_ps(d, pivot[b]);
                s1[b] = _mm512_add_ps(s1[b], d);
                s2[b] = _mm512_fmadd_ps(d, d, s2[b]);
            }
        for (int b = 0; b < BLOCK; b++) {
            long c = c0 + b * LANES;
            if (c >= channels) break;
            __m512 m = _mm512_mul_ps(s1[b], count);
            _mm512_mask_storeu_ps(mean + c, lanes[b], _mm512_add_ps(pivot[b], m));
            _mm512_mask_storeu_ps(squares + c, lanes[b], _mm512_fnmadd_ps(s1[b], m, s2[b]));
        }
    }
}

/* Mean and reciprocal standard deviation of each group of an image, from its chunks' moments. */
static void combine_moments(const Norm *a, long image, const float *moments) {
    long channels = a->channels, per_group = channels / a->groups, chunks = chunks_of(a);
    float *means = a->statistics + image * 2 * a->groups, *rstds = means + a->groups;
    for (long g = 0; g < a->groups; g++) {
        double total = 0, deviations = 0;
        for (long k = 0; k < chunks; k++)
            for (long c = g * per_group; c < (g + 1) * per_group; c++)
                total += (double)rows_of(a, k) * moments[k * 2 * channels + c];
        double mean = total / ((double)a->positions * per_group);
        for (long k = 0; k < chunks; k++) {
            const float *chunk = moments + k * 2 * channels;
            for (long c = g * per_group; c < (g + 1) * per_group; c++) {
                double apart = chunk[c] - mean;
                deviations += chunk[channels + c] + (double)rows_of(a, k) * apart * apart;
            }
        }
        means[g] = (float)mean;
        rstds[g] = (float)(1 / sqrt(deviations / ((double)a->positions * per_group) + a->eps));
    }
}

/* The factor and the summand per channel: argument of SiLU = x * factor + summand. */
static void affine(const Norm *a, long image, float *factor, float *summand) {
    long per_group = a->channels / a->groups;
    const float *means = a->statistics + image * 2 * a->groups, *rstds = means + a->groups;
    for (long c = 0; c < a->channels; c++) {
        float f = a->weight[c] * rstds[c / per_group];
        float s = a->bias[c] - means[c / per_group] * f;
        if (a->scale) {
            float factor_of_norm = 1 + a->scale[image * a->steer_stride + c];
            f *= factor_of_norm;
            s = s * factor_of_norm + a->shift[image * a->steer_stride + c];
        }
        factor[c] = f;
        summand[c] = s;
    }
}

INLINE void apply_chunk(const Norm *a, const void *x, void *y, long first, long rows,
                        const float *factor, const float *summand, int bf16, int silu) {
    long channels = a->channels;
    for (long row = first; row < first + rows; row++)
        for (long c = 0; c < channels; c += LANES) {
            __mmask16 lanes = lanes_from(c, channels);
            __m512 u = load(x, row * channels + c, lanes, bf16);
            u = _mm512_fmadd_ps(u, _mm512_maskz_loadu_ps(lanes, factor + c),
                                _mm512_maskz_loadu_ps(lanes, summand + c));
            if (silu) u = _mm512_mul_ps(u, sigmoid(u, bf16));
            store(y, row * channels + c, u, lanes, bf16);
        }
}

/* The gradient of SiLU's argument: grad * s (1 + u (1 - s)), s = sigmoid(u). */
INLINE __m512 argument_gradient(__m512 grad, __m512 u, int bf16, int silu) {
    if (!silu) return grad;
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 s = sigmoid(u, bf16);
    __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(u, _mm512_sub_ps(one, s), one));
    return _mm512_mul_ps(grad, slope);
}

/* Per channel of one chunk: sums of the argument's gradient, and of it times (x - mean). */
INLINE void chunk_gradients(const Norm *a, const void *x, const void *grad, long first, long rows,
                            const float *factor, const float *summand, const float *mean,
                            float *sums, float *products, int bf16, int silu) {
    long channels = a->channels;
    for (long c0 = 0; c0 < channels; c0 += 2 * LANES) {
        __m512 s1[2], s2[2], f[2], s[2], m[2];
        __mmask16 lanes[2];
        for (int b = 0; b < 2; b++) {
            long c = c0 + b * LANES;
            lanes[b] = c < channels ? lanes_from(c, channels) : 0;
            f[b] = _mm512_maskz_loadu_ps(lanes[b], factor + c);
            s[b] = _mm512_maskz_loadu_ps(lanes[b], summand + c);
            m[b] = _mm512_maskz_loadu_ps(lanes[b], mean + c);
            s1[b] = s2[b] = _mm512_setzero_ps();
        }
        for (long row = first; row < first + rows; row++)
            for (int b = 0; b < 2; b++) {
                long index = row * channels + c0 + b * LANES;
                __m512 v = load(x, index, lanes[b], bf16), g = load(grad, index, lanes[b], bf16);
                g = argument_gradient(g, _mm512_fmadd_ps(v, f[b], s[b]), bf16, silu);
                s1[b] = _mm512_add_ps(s1[b], g);
                s2[b] = _mm512_fmadd_ps(g, _mm512_sub_ps(v, m[b]), s2[b]);
            }
        for (int b = 0; b < 2; b++) {
            long c = c0 + b * LANES;
            if (c >= channels) break;
            _mm512_mask_storeu_ps(sums + c, lanes[b], s1[b]);
            _mm512_mask_storeu_ps(products + c, lanes[b], s2[b]);
        }
    }
}

/* The gradients of weight, bias, scale and shift of an image, and what the gradient of x needs:
   it is argument_gradient * factor + constant + (x - mean) * slope. */
static void combine_gradients(const Norm *a, long image, const float *sums, float *constant,
                              float *slope) {
    long channels = a->channels, per_group = channels / a->groups, chunks = chunks_of(a);
    const float *rstds = a->statistics + image * 2 * a->groups + a->groups;
    double count = (double)a->positions * per_group;
    for (long g = 0; g < a->groups; g++) {
        double total = 0, along = 0, rstd = rstds[g];
        for (long c = g * per_group; c < (g + 1) * per_group; c++) {
            double s1 = 0, s2 = 0;
            for (long k = 0; k < chunks; k++) {
                s1 += sums[k * 2 * channels + c];
                s2 += sums[k * 2 * channels + channels + c];
            }
            s2 *= rstd; /* times the normalised x */
            double steer = a->scale ? 1 + a->scale[image * a->steer_stride + c] : 1;
            a->grad_weight[image * channels + c] = (float)(s2 * steer);
            a->grad_bias[image * channels + c] = (float)(s1 * steer);
            if (a->grad_scale) {
                a->grad_scale[image * channels + c] = (float)(s2 * a->weight[c] + s1 * a->bias[c]);
                a->grad_shift[image * channels + c] = (float)s1;
            }
            total += s1 * steer * a->weight[c];
            along += s2 * steer * a->weight[c];
        }
        for (long c = g * per_group; c < (g + 1) * per_group; c++) {
            constant[c] = (float)(-rstd * total / count);
            slope[c] = (float)(-rstd * rstd * along / count);
        }
    }
}

INLINE void input_gradient(const Norm *a, const void *x, const void *grad, void *out, long first,
                           long rows, const float *factor, const float *summand, const float *mean,
                           const float *constant, const float *slope, int bf16, int silu) {
    long channels = a->channels;
    for (long row = first; row < first + rows; row++)
        for (long c = 0; c < channels; c += LANES) {
            __mmask16 lanes = lanes_from(c, channels);
            long index = row * channels + c;
            __m512 f = _mm512_maskz_loadu_ps(lanes, factor + c);
            __m512 v = load(x, index, lanes, bf16), g = load(grad, index, lanes, bf16);
            __m512 u = _mm512_fmadd_ps(v, f, _mm512_maskz_loadu_ps(lanes, summand + c));
            __m512 d = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(lanes, mean + c));
            d = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(lanes, slope + c),
                                _mm512_maskz_loadu_ps(lanes, constant + c));
            d = _mm512_fmadd_ps(argument_gradient(g, u, bf16, silu), f, d);
            store(out, index, d, lanes, bf16);
        }
}

static size_t size_of(const Norm *a) { return a->bf16 ? 2 : 4; }

static const void *image_of(const void *data, const Norm *a, long image) {
    return (const char *)data + image * a->positions * a->channels * size_of(a);
}

/* Constants let the compiler make a version of each function per kind of memory and activation. */
#define SPECIALISED(call)                                                                          \
    do {                                                                                           \
        if (a->bf16) {                                                                             \
            enum { BF16 = 1 };                                                                     \
            if (a->silu) {                                                                         \
                enum { SILU = 1 };                                                                 \
                call;                                                                              \
            } else {                                                                               \
                enum { SILU = 0 };                                                                 \
                call;                                                                              \
            }                                                                                      \
        } else {                                                                                   \
            enum { BF16 = 0 };                                                                     \
            if (a->silu) {                                                                         \
                enum { SILU = 1 };                                                                 \
                call;                                                                              \
            } else {                                                                               \
                enum { SILU = 0 };                                                                 \
                call;                                                                              \
            }                                                                                      \
        }                                                                                          \
    } while (0)

static void moments(const Norm *a, long image, long k, float *out) {
    const void *x = image_of(a->x, a, image);
    long first = k * CHUNK, rows = rows_of(a, k);
    if (a->bf16)
        chunk_moments(a, x, first, rows, out, out + a->channels, 1);
    else
        chunk_moments(a, x, first, rows, out, out + a->channels, 0);
}

static void apply(const Norm *a, long image, long k, const float *factor, const float *summand) {
    const void *x = image_of(a->x, a, image);
    void *y = (void *)image_of(a->out, a, image);
    long first = k * CHUNK, rows = rows_of(a, k);
    SPECIALISED(apply_chunk(a, x, y, first, rows, factor, summand, BF16, SILU));
}

static void gradients(const Norm *a, long image, long k, const float *factor, const float *summand,
                      const float *mean, float *out) {
    const void *x = image_of(a->x, a, image), *grad = image_of(a->grad, a, image);
    long first = k * CHUNK, rows = rows_of(a, k);
    SPECIALISED(chunk_gradients(a, x, grad, first, rows, factor, summand, mean, out,
                                out + a->channels, BF16, SILU));
}

static void grad_of_input(const Norm *a, long image, long k, const float *factor,
                          const float *summand, const float *mean, const float *constant,
                          const float *slope) {
    const void *x = image_of(a->x, a, image), *grad = image_of(a->grad, a, image);
    void *out = (void *)image_of(a->out, a, image);
    long first = k * CHUNK, rows = rows_of(a, k);
    SPECIALISED(input_gradient(a, x, grad, out, first, rows, factor, summand, mean, constant, slope,
                               BF16, SILU));
}

static void spread_means(const Norm *a, long image, float *mean) {
    long per_group = a->channels / a->groups;
    for (long c = 0; c < a->channels; c++)
        mean[c] = a->statistics[image * 2 * a->groups + c / per_group];
}

/* Chunks of one image are spread over the threads where there are fewer images than threads. */
#define FOR_CHUNKS(body)                                                                           \
    if (spread) {                                                                                  \
        _Pragma("omp parallel for schedule(static)") for (long k = 0; k < chunks; k++) { body; }   \
    } else                                                                                         \
        for (long k = 0; k < chunks; k++) {                                                        \
            body;                                                                                  \
        }

static int forward_image(const Norm *a, long image, int spread) {
    long chunks = chunks_of(a), channels = a->channels;
    float *buffer = malloc(sizeof(float) * channels * (2 * chunks + 2));
    if (!buffer) return 1;
    float *factor = buffer + 2 * chunks * channels, *summand = factor + channels;
    FOR_CHUNKS(moments(a, image, k, buffer + k * 2 * channels));
    combine_moments(a, image, buffer);
    affine(a, image, factor, summand);
    FOR_CHUNKS(apply(a, image, k, factor, summand));
    free(buffer);
    return 0;
}

static int backward_image(const Norm *a, long image, int spread) {
    long chunks = chunks_of(a), channels = a->channels;
    float *buffer = malloc(sizeof(float) * channels * (2 * chunks + 5));
    if (!buffer) return 1;
    float *factor = buffer + 2 * chunks * channels, *summand = factor + channels;
    float *mean = summand + channels, *constant = mean + channels, *slope = constant + channels;
    affine(a, image, factor, summand);
    spread_means(a, image, mean);
    FOR_CHUNKS(gradients(a, image, k, factor, summand, mean, buffer + k * 2 * channels));
    combine_gradients(a, image, buffer, constant, slope);
    if (a->out) {
        FOR_CHUNKS(grad_of_input(a, image, k, factor, summand, mean, constant, slope));
    }
    free(buffer);
    return 0;
}

static int for_images(const Norm *a, int (*work)(const Norm *, long, int)) {
    int failed = 0;
    if (a->images >= omp_get_max_threads()) {
#pragma omp parallel for schedule(static) reduction(| : failed)
        for (long image = 0; image < a->images; image++) failed |= work(a, image, 0);
    } else {
        for (long image = 0; image < a->images; image++) failed |= work(a, image, 1);
    }
    return failed;
}

/* Both return 0, or 1 if memory is short. */
int norm_silu_forward(const Norm *a) { return for_images(a, forward_image); }

int norm_silu_backward(const Norm *a) { return for_images(a, backward_image); }
