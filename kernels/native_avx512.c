/* Attention of few queries to many keys on processors with AVX-512: kernels/native.py calls it.

Both products are the same small one: 6 rows of 32-bit words, broadcast word by word, times 64
columns held in registers. A word is one float, two bfloat16 or four bytes, so that one loop serves
all types. */

enum { LANES = 16 };
#include "native_attention.h"

static inline int words(int kind) { return kind == FLOAT32 ? 64 : kind == BFLOAT16 ? 32 : 16; }

static inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x); /* keeps a NaN, takes -inf */
    __m512 whole = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.540353e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* sum[6][4] += rows of words times columns [num_words, 64]. */
static inline __attribute__((always_inline)) void multiply(
    int kind, int num_words, __m512 sum[ROWS][4], const int32_t *rows, int row_words,
    const int32_t *columns) {
    for (int w = 0; w < num_words; w++) {
        __m512i b[4];
        for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(columns + w * BLOCK + j * LANES);
        for (int i = 0; i < ROWS; i++) {
            __m512i a = _mm512_set1_epi32(rows[i * row_words + w]);
            for (int j = 0; j < 4; j++) {
                if (kind == FLOAT32)
                    sum[i][j] = _mm512_fmadd_ps(
                        _mm512_castsi512_ps(a), _mm512_castsi512_ps(b[j]), sum[i][j]);
                else if (kind == BFLOAT16)
                    sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)a, (__m512bh)b[j]);
                else
                    sum[i][j] = _mm512_castsi512_ps(_mm512_dpbusd_epi32(
                        _mm512_castps_si512(sum[i][j]), b[j], a));
            }
        }
    }
}

/* Turn 16 rows of 16 words, `stride` bytes apart, into columns: out[w * 64 + row]. */
static inline void transpose(const char *rows, int64_t stride, int count, int32_t *out) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++)
        x[i] = i < count ? _mm512_loadu_si512(rows + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* x[4 g + i]: words i, i + 4, i + 8, i + 12 of rows 4 g ... */
        __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        _mm512_storeu_si512(out + i * BLOCK, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512(out + (i + 4) * BLOCK, _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_storeu_si512(out + (i + 8) * BLOCK, _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_storeu_si512(out + (i + 12) * BLOCK, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}

static inline void pack_keys(int kind, const char *k, int64_t stride, int count, int32_t *out) {
    for (int first = 0; first < BLOCK; first += LANES)
        for (int w = 0; w < words(kind); w += LANES) {
            int rows = count - first < 0 ? 0 : count - first > LANES ? LANES : count - first;
            transpose(k + first * stride + 4 * w, stride, rows, out + w * BLOCK + first);
        }
    if (kind == INT8) { /* the instruction multiplies unsigned bytes with signed ones */
        __m512i flip = _mm512_set1_epi8((char)0x80);
        for (int i = 0; i < 16 * 4; i++) {
            __m512i *place = (__m512i *)(out + i * LANES);
            _mm512_storeu_si512(place, _mm512_xor_si512(_mm512_loadu_si512(place), flip));
        }
    }
}

/* Values of two keys side by side in a word, 16 channels from c on. */
static inline __m512i pair(int kind, const char *first, const char *second, int c) {
    if (kind == BFLOAT16) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(first + 2 * c)));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(second + 2 * c)));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(first + c))));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(second + c))));
    low = _mm512_mul_ps(low, _mm512_set1_ps(scale_of(first)));
    high = _mm512_mul_ps(high, _mm512_set1_ps(scale_of(second)));
    __m256i l = (__m256i)_mm512_cvtneps_pbh(low), h = (__m256i)_mm512_cvtneps_pbh(high);
    return _mm512_or_si512(
        _mm512_cvtepu16_epi32(l), _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline void pack_values(int kind, const char *v, int64_t stride, int count, int32_t *out) {
    static const char nothing[4 * WIDTH + 4];
    if (kind == FLOAT32) {
        for (int n = 0; n < BLOCK; n++)
            memcpy(out + n * WIDTH, n < count ? v + n * stride : nothing, 4 * WIDTH);
        return;
    }
    for (int n = 0; n < BLOCK; n += 2)
        for (int c = 0; c < WIDTH; c += LANES)
            _mm512_storeu_si512(out + n / 2 * WIDTH + c,
                pair(kind, n < count ? v + n * stride : nothing,
                     n + 1 < count ? v + (n + 1) * stride : nothing, c));
}

static inline __attribute__((always_inline)) void run_kind(int kind, Share *share) {
    const Job *job = share->job;
    const int num_words = words(kind), rows = padded(job);
    const int p_words = kind == FLOAT32 ? BLOCK : BLOCK / 2;
    const int64_t blocks = (job->keys + BLOCK - 1) / BLOCK;
    int32_t *keys = (int32_t *)share->memory, *values = keys + 64 * BLOCK;
    int32_t *p = values + 64 * BLOCK;
    float *bias = (float *)(p + ROWS * BLOCK), *k_scale = bias + BLOCK;
    for (int64_t at = share->first; at < share->last; at++) {
        const int64_t head = at / blocks, start = at % blocks * BLOCK;
        const int count = job->keys - start < BLOCK ? job->keys - start : BLOCK;
        const char *k = job->k + head * job->head_stride + start * job->row_stride;
        pack_keys(kind, k, job->row_stride, count, keys);
        if (!job->columns)
            pack_values(kind, job->v + head * job->head_stride + start * job->row_stride,
                        job->row_stride, count, values);
        for (int n = 0; n < BLOCK; n++) {
            bias[n] = n >= count ? -__builtin_inff()
                : job->bias ? job->bias[head * job->bias_stride + start + n] : 0.0f;
            k_scale[n] = kind == INT8 && n < count ? scale_of(k + n * job->row_stride) : 0.0f;
        }
        __m512 column[4];
        for (int j = 0; j < 4; j++) column[j] = _mm512_setzero_ps();
        for (int m = 0; m < rows; m += ROWS) {
            const int64_t row = head * rows + m;
            __m512 sum[ROWS][4];
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 4; j++)
                    sum[i][j] = kind == INT8
                        ? _mm512_castsi512_ps(_mm512_set1_epi32(share->q_start[row + i]))
                        : _mm512_loadu_ps(bias + j * LANES);
            multiply(kind, num_words, sum, share->q + row * num_words, num_words, keys);
            if (kind == INT8)
                for (int i = 0; i < ROWS; i++) {
                    __m512 scale = _mm512_set1_ps(share->q_scale[row + i]);
                    for (int j = 0; j < 4; j++) {
                        __m512 x = _mm512_cvtepi32_ps(_mm512_castps_si512(sum[i][j]));
                        __m512 s = _mm512_mul_ps(scale, _mm512_loadu_ps(k_scale + j * LANES));
                        sum[i][j] = _mm512_fmadd_ps(x, s, _mm512_loadu_ps(bias + j * LANES));
                    }
                }
            if (job->columns) {
                for (int i = 0; i < ROWS && m + i < job->queries; i++) {
                    __m512 log = _mm512_set1_ps(job->log_total[head * job->queries + m + i]);
                    for (int j = 0; j < 4; j++)
                        column[j] = _mm512_add_ps(
                            column[j], exp2_of(_mm512_sub_ps(sum[i][j], log)));
                }
                continue;
            }
            for (int i = 0; i < ROWS; i++) {
                float *total = share->total + (row + i) * LANES;
                __m512 all = _mm512_loadu_ps(total);
                for (int j = 0; j < 4; j++) {
                    sum[i][j] = exp2_of(sum[i][j]);
                    all = _mm512_add_ps(all, sum[i][j]);
                }
                _mm512_storeu_ps(total, all);
                for (int j = 0; j < 4; j++)
                    if (kind == FLOAT32)
                        _mm512_storeu_ps(p + i * p_words + j * LANES, sum[i][j]);
                    else
                        _mm256_storeu_si256((void *)(p + i * p_words + j * LANES / 2),
                                            (__m256i)_mm512_cvtneps_pbh(sum[i][j]));
            }
            float *out = share->out + row * WIDTH;
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 4; j++)
                    sum[i][j] = _mm512_loadu_ps(out + i * WIDTH + j * LANES);
            multiply(kind == FLOAT32 ? FLOAT32 : BFLOAT16, p_words, sum, p, p_words, values);
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 4; j++)
                    _mm512_storeu_ps(out + i * WIDTH + j * LANES, sum[i][j]);
        }
        if (job->columns)
            for (int j = 0; j < 4; j++) {
                const int left = count - j * LANES;
                const __mmask16 live = left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
                float *out = job->columns + head * job->keys + start + j * LANES;
                _mm512_mask_storeu_ps(out, live, column[j]);
            }
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
    const int rows = padded(job), num_words = words(job->kind);
    for (int64_t head = 0; head < job->heads; head++)
        for (int m = 0; m < job->queries; m++) {
            const float *from = job->q + (head * job->queries + m) * WIDTH;
            int32_t *to = q + (head * rows + m) * num_words;
            if (job->kind == FLOAT32) memcpy(to, from, 4 * WIDTH);
            if (job->kind == BFLOAT16)
                for (int c = 0; c < WIDTH; c += LANES)
                    _mm256_storeu_si256((void *)(to + c / 2),
                                        (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + c)));
            if (job->kind != INT8) continue;
            float largest = 1e-30f;
            for (int c = 0; c < WIDTH; c++)
                if (__builtin_fabsf(from[c]) > largest) largest = __builtin_fabsf(from[c]);
            int32_t sum = 0;
            for (int c = 0; c < WIDTH; c++) {
                const int8_t code = (int8_t)__builtin_rintf(from[c] / largest * 127.0f);
                ((int8_t *)to)[c] = code;
                sum += code;
            }
            scale[head * rows + m] = largest / 127.0f;
            start[head * rows + m] = -128 * sum;
        }
}
