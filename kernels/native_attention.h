/* What attention in C shares among processors: the job, its parts, and the threads that do them.

A file for one kind of processor defines LANES (floats in a register), includes this one, and gives
`words`, `pack_queries` and `run`. Weights are 2^logits without a shift, so that parts over ranges
of keys simply add up; the caller checks the sums and takes another way where that overflows or
vanishes. */

#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 64, BLOCK = 64, ROWS = 6, MAX_THREADS = 64 };
enum Kind { FLOAT32, BFLOAT16, INT8 };

typedef struct {
    int32_t kind, heads, queries, threads;
    int64_t keys;
    int64_t head_stride;      /* bytes between the heads of keys and of values */
    int64_t row_stride;       /* bytes between their rows; int8: a row ends with its float scale */
    int64_t bias_stride;      /* floats between the heads of the bias */
    const float *q;           /* [heads, queries, 64], logits to the base 2 */
    const char *k, *v;        /* [heads, keys, 64] */
    const float *bias;        /* [heads or 1, keys], to the base 2; or NULL */
    const float *log_total;   /* [heads, queries]: set for column sums */
    float *out;               /* [heads, queries, 64] sums of weights times values */
    float *total;             /* [heads, queries] sums of weights */
    float *columns;           /* [heads, keys] sums of weights / 2^log_total over the queries */
} Job;

typedef struct {
    const Job *job;
    int64_t first, last;      /* blocks, counted over all heads */
    char *memory;
    const int32_t *q;         /* [heads, padded, words] */
    const float *q_scale;     /* [heads, padded], int8 */
    const int32_t *q_start;   /* [heads, padded], int8: what the offset of the keys adds */
    float *out, *total;       /* own [heads, padded, 64] and [heads, padded, LANES] */
} Share;

static inline int padded(const Job *job) { return (job->queries + ROWS - 1) / ROWS * ROWS; }

/* The scale of a row of bytes lies behind it. */
static inline float scale_of(const char *row) {
    float scale;
    memcpy(&scale, row + WIDTH, 4);
    return scale;
}

/* Words of 32 bits in a packed query. */
static inline int words(int kind);
/* Bring the queries into words; rows beyond the last are zero. */
static void pack_queries(const Job *job, int32_t *q, float *scale, int32_t *start);
/* Do a Share. */
static void *run(void *argument);

/* Return 0, or 1 without memory. */
int attention(const Job *job) {
    const int rows = padded(job);
    const int64_t all = (int64_t)job->heads * rows;
    const int64_t blocks = job->heads * ((job->keys + BLOCK - 1) / BLOCK);
    int threads = job->threads > MAX_THREADS ? MAX_THREADS : job->threads;
    if (threads > blocks) threads = blocks > 0 ? blocks : 1;
    const int64_t work = 4 * (2 * 64 * BLOCK + ROWS * BLOCK + 2 * BLOCK);
    const int64_t shared = all * (4 * words(job->kind) + 8);
    const int64_t own = work + (job->columns ? 0 : 4 * all * (WIDTH + LANES));
    char *memory = calloc(1, shared + threads * own);
    if (!memory) return 1;
    int32_t *q = (int32_t *)memory, *q_start = q + all * words(job->kind);
    float *q_scale = (float *)(q_start + all);
    pack_queries(job, q, q_scale, q_start);
    Share shares[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (int t = 0; t < threads; t++) {
        char *mine = memory + shared + t * own;
        float *out = (float *)(mine + work);
        shares[t] = (Share){job, blocks * t / threads, blocks * (t + 1) / threads, mine,
                            q, q_scale, q_start, out, out + all * WIDTH};
        if (t) started[t] = !pthread_create(ids + t, NULL, run, shares + t);
    }
    for (int t = 0; t < threads; t++)
        if (!started[t]) run(shares + t);
    for (int t = 1; t < threads; t++)
        if (started[t]) pthread_join(ids[t], NULL);
    for (int64_t head = 0; !job->columns && head < job->heads; head++)
        for (int m = 0; m < job->queries; m++) {
            float *out = job->out + (head * job->queries + m) * WIDTH;
            const int64_t row = head * rows + m;
            float total = 0.0f;
            memset(out, 0, 4 * WIDTH);
            for (int t = 0; t < threads; t++) {
                for (int c = 0; c < WIDTH; c++) out[c] += shares[t].out[row * WIDTH + c];
                for (int i = 0; i < LANES; i++) total += shares[t].total[row * LANES + i];
            }
            job->total[head * job->queries + m] = total;
        }
    free(memory);
    return 0;
}
