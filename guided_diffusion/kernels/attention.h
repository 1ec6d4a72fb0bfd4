/* What the kernels for attention are given: all images and heads at once. */

#ifndef ATTENTION_H
#define ATTENTION_H

#include <stddef.h>

enum { BLOCK = 64 }; /* queries, and keys, of a block of scores */

typedef struct {
    const void *q, *k, *v; /* float32 or bfloat16; channels of a head lie side by side */
    void *out;             /* backward: read */
    float *log_sums;       /* [N x heads x T]: log of each query's sum of e^score */
    const void *grad;      /* of out, laid out like it */
    void *grad_q, *grad_k, *grad_v;
    long images, heads, positions, channels; /* channels of a head: a multiple of 32 */
    long qkv_image, qkv_head, qkv_position;  /* distances in q, k, v and their gradients */
    long out_image, out_head, out_position;  /* the same in out and its gradient */
} Attention;

/* Where one head of one image lies. */
typedef struct {
    const void *q, *k, *v, *grad;
    void *out, *grad_q, *grad_k, *grad_v;
    float *log_sums;
} Head;

/* `at` numbers of `size` bytes further on; NULL stays what it is. */
static inline void *moved(const void *data, long at, size_t size) {
    return data ? (char *)data + at * (long)size : NULL;
}

static inline Head head_of(const Attention *a, long item, size_t size) {
    long image = item / a->heads, head = item % a->heads;
    long at = image * a->qkv_image + head * a->qkv_head;
    long to = image * a->out_image + head * a->out_head;
    return (Head){
        .q = moved(a->q, at, size),
        .k = moved(a->k, at, size),
        .v = moved(a->v, at, size),
        .grad = moved(a->grad, to, size),
        .out = moved(a->out, to, size),
        .grad_q = moved(a->grad_q, at, size),
        .grad_k = moved(a->grad_k, at, size),
        .grad_v = moved(a->grad_v, at, size),
        .log_sums = a->log_sums + item * a->positions,
    };
}

static inline long padded(long positions) { return (positions + BLOCK - 1) / BLOCK * BLOCK; }

static inline long at_most(long value, long limit) { return value < limit ? value : limit; }

#endif
