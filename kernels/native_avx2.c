/* Attention of few queries to many keys on processors with AVX2 and FMA: kernels/native.py calls it.

All is multiplied in float32. Keys and values of 16 or 8 bits are widened once for all queries, as
they are read. Both products are the same small one: 6 rows times 16 columns, held in registers. */

enum { LANES = 8, COLUMNS = 2 * LANES };
#include "native_attention.h"

static inline int words(int kind) {
    (void)kind;
    return WIDTH;
}

static inline __m256 exp2_of(__m256 x) {
    /* The order of the arguments keeps a NaN. Beyond 2^127 all is infinite, below 2^-126 zero. */
    __m256 top = _mm256_min_ps(_mm256_set1_ps(128.0f), x);
    __m256 live = _mm256_cmp_ps(top, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    top = _mm256_max_ps(_mm256_set1_ps(-126.0f), top);
    __m256 whole = _mm256_round_ps(top, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_sub_ps(top, whole);
    __m256 y = _mm256_set1_ps(1.540353e-4f);
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.3333558e-3f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(9.6181291e-3f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(5.5504109e-2f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(2.4022651e-1f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(6.9314718e-1f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
    return _mm256_and_ps(y, live);
}

#define EACH_ROW(i) _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; i++)

/* sum[6][2] += rows[6, 64] times columns [64, 64], of which 16 are taken. Sums that all loops over
 * them unroll stay in registers. */
static inline __attribute__((always_inline)) void multiply(
    __m256 sum[ROWS][2], const float *rows, const float *columns) {
    __m256 first[ROWS], second[ROWS];
    EACH_ROW(i) { first[i] = sum[i][0], second[i] = sum[i][1]; }
    for (int w = 0; w < 64; w++) {
        __m256 left = _mm256_loadu_ps(columns + w * 64);
        __m256 right = _mm256_loadu_ps(columns + w * 64 + LANES);
        EACH_ROW(i) {
            __m256 a = _mm256_broadcast_ss(rows + i * 64 + w);
            first[i] = _mm256_fmadd_ps(a, left, first[i]);
            second[i] = _mm256_fmadd_ps(a, right, second[i]);
        }
    }
    EACH_ROW(i) { sum[i][0] = first[i], sum[i][1] = second[i]; }
}

/* Channels c to c + 7 of a row in float32. */
static inline __attribute__((always_inline)) __m256 widened(int kind, const char *row, int c) {
    if (kind == FLOAT32) return _mm256_loadu_ps((const float *)row + c);
    if (kind == BFLOAT16) {
        __m128i half = _mm_loadu_si128((const void *)(row + 2 * c));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(row + c)));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(scale_of(row)));
}

/* Turn 8 rows of 8 floats into columns: out[w * 64 + row]. */
static inline void transpose(__m256 x[LANES], float *out) {
    __m256 y[LANES];
    for (int i = 0; i < LANES; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) { /* x[i]: words i and i + 4 of rows 0 to 3, x[i + 4]: 4 to 7 */
        _mm256_storeu_ps(out + i * BLOCK, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * BLOCK, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
    }
}

static inline __attribute__((always_inline)) void pack_keys(
    int kind, const char *k, int64_t stride, int count, float *out) {
    for (int first = 0; first < BLOCK; first += LANES)
        for (int c = 0; c < WIDTH; c += LANES) {
            __m256 x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = first + i < count ? widened(kind, k + (first + i) * stride, c)
                                         : _mm256_setzero_ps();
            transpose(x, out + c * BLOCK + first);
        }
}

static inline __attribute__((always_inline)) void pack_values(
    int kind, const char *v, int64_t stride, int count, float *out) {
    for (int n = 0; n < BLOCK; n++)
        for (int c = 0; c < WIDTH; c += LANES)
            _mm256_storeu_ps(out + n * WIDTH + c, n < count ? widened(kind, v + n * stride, c)
                                                            : _mm256_setzero_ps());
}

static void weigh(const Share *share, int64_t row, const float *keys, const float *bias,
                  const float *values, float *p) {
    for (int g = 0; g < BLOCK; g += COLUMNS) {
        __m256 sum[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < 2; j++) sum[i][j] = _mm256_loadu_ps(bias + g + j * LANES);
        multiply(sum, (const float *)share->q + row * WIDTH, keys + g);
        for (int i = 0; i < ROWS; i++) {
            float *total = share->total + (row + i) * LANES;
            __m256 all = _mm256_loadu_ps(total);
            for (int j = 0; j < 2; j++) {
                sum[i][j] = exp2_of(sum[i][j]);
                all = _mm256_add_ps(all, sum[i][j]);
                _mm256_storeu_ps(p + i * BLOCK + g + j * LANES, sum[i][j]);
            }
            _mm256_storeu_ps(total, all);
        }
    }
    float *out = share->out + row * WIDTH;
    for (int g = 0; g < WIDTH; g += COLUMNS) {
        __m256 sum[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < 2; j++)
                sum[i][j] = _mm256_loadu_ps(out + i * WIDTH + g + j * LANES);
        multiply(sum, p, values + g);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < 2; j++)
                _mm256_storeu_ps(out + i * WIDTH + g + j * LANES, sum[i][j]);
    }
}

/* column[64] += weights over 2^log_total of up to 6 queries. */
static void add_columns(const Share *share, int64_t row, int count, const float *log_total,
                        const float *keys, const float *bias, float *column) {
    for (int g = 0; g < BLOCK; g += COLUMNS) {
        __m256 sum[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < 2; j++) sum[i][j] = _mm256_loadu_ps(bias + g + j * LANES);
        multiply(sum, (const float *)share->q + row * WIDTH, keys + g);
        for (int j = 0; j < 2; j++) {
            __m256 all = _mm256_loadu_ps(column + g + j * LANES);
            for (int i = 0; i < count; i++)
                all = _mm256_add_ps(
                    all, exp2_of(_mm256_sub_ps(sum[i][j], _mm256_set1_ps(log_total[i]))));
            _mm256_storeu_ps(column + g + j * LANES, all);
        }
    }
}

static inline __attribute__((always_inline)) void run_kind(int kind, Share *share) {
    const Job *job = share->job;
    const int rows = padded(job);
    const int64_t blocks = (job->keys + BLOCK - 1) / BLOCK;
    float *keys = (float *)share->memory, *values = keys + 64 * BLOCK;
    float *p = values + 64 * BLOCK, *bias = p + ROWS * BLOCK;
    for (int64_t at = share->first; at < share->last; at++) {
        const int64_t head = at / blocks, start = at % blocks * BLOCK;
        const int count = job->keys - start < BLOCK ? job->keys - start : BLOCK;
        const int64_t offset = head * job->head_stride + start * job->row_stride;
        pack_keys(kind, job->k + offset, job->row_stride, count, keys);
        if (!job->columns) pack_values(kind, job->v + offset, job->row_stride, count, values);
        for (int n = 0; n < BLOCK; n++)
            bias[n] = n >= count ? -__builtin_inff()
                : job->bias ? job->bias[head * job->bias_stride + start + n] : 0.0f;
        float column[BLOCK] = {0};
        for (int m = 0; m < rows; m += ROWS) {
            if (!job->columns) {
                weigh(share, head * rows + m, keys, bias, values, p);
                continue;
            }
            const int live = job->queries - m < ROWS ? job->queries - m : ROWS;
            add_columns(share, head * rows + m, live, job->log_total + head * job->queries + m,
                        keys, bias, column);
        }
        if (job->columns) memcpy(job->columns + head * job->keys + start, column, 4 * count);
    }
}

static void *run(void *argument) {
    Share *share = argument;
    switch (share->job->kind) {
        case FLOAT32: run_kind(FLOAT32, share); break;
        case BFLOAT16: run_kind(BFLOAT16, share); break;
        case INT8: run_kind(INT8, share); break;
    }
    return NULL;
}

static void pack_queries(const Job *job, int32_t *q, float *scale, int32_t *start) {
    (void)scale, (void)start;
    for (int64_t head = 0; head < job->heads; head++)
        memcpy(q + head * padded(job) * WIDTH, job->q + head * job->queries * WIDTH,
               (size_t)4 * job->queries * WIDTH);
}
