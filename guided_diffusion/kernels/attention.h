/* What the kernels for attention are given: all images and heads at once. */

#ifndef ATTENTION_H
#define ATTENTION_H

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

#endif
