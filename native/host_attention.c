/* Attention over slots on a CPU: every query row against exactly the keys that it sees, read in place, once.
 *
 * A task is a tile of query rows of one sequence and one K/V head: all query heads that share the K/V head, of as many
 * new tokens as make up TILE_ROWS. It walks the keys in blocks, with the usual running maximum and sum:
 *
 *     K block ─transpose─▶ [D][keys] ─┐
 *     queries [rows][D] ──────────────┴─multiply─▶ scores ─softmax─▶ weights [rows][keys] ─multiply with V─▶ output
 *
 * Tasks are shared out by OpenMP. Nothing is allocated and nothing is kept. All arithmetic is in float32. Vectors are
 * the compiler's own, so that one source serves every width; on x86 the loader picks the widest that the machine has.
 *
 * Assumes: head sizes are multiples of LANES, up to MAX_HEAD_DIM; last strides are 1; the arguments were checked.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define KEYS 64 /* of a block */
#define TILE_ROWS 48
#define MAX_HEAD_DIM 256
#define BLOCK_ROWS 4 /* rows of a product that are computed together */
#define FEW_ROWS 8   /* up to which K is not transposed */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef float loose_lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t half_lanes __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t word_lanes __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

typedef struct {
    const void *query; /* [n_tokens][n_q_heads][head_dim] */
    const void *keys;  /* [rows][n_kv_heads][head_dim] */
    const void *values;
    void *output;             /* [n_tokens][n_q_heads][value_dim], contiguous */
    const float *sinks;       /* [n_q_heads], or null */
    const int64_t *sequences; /* [n_seqs][4]: first query row, new tokens, first row of K and V, length */
    const int64_t *tasks;     /* [n_tasks][2]: sequence, first of its new tokens */
    int64_t n_tasks;          /* for one K/V head */
    int64_t n_q_heads, n_kv_heads, head_dim, value_dim;
    int64_t query_strides[2], key_strides[2], value_strides[2]; /* of rows and of heads, in elements */
    int64_t window;                                             /* 0: all keys up to the query's own */
    float scale, softcap;                                       /* softcap 0: none */
    int32_t is_causal, is_bfloat16, n_threads;
} vmem_attention;

/* Bumped whenever the structure or its meaning changes; the Python side refuses any other number. */
int vmem_attention_abi(void) {
    return 1;
}

int vmem_attention_tile_rows(void) {
    return TILE_ROWS;
}

/* One tile's working memory. */
typedef struct {
    float query[TILE_ROWS * MAX_HEAD_DIM];
    float keys[MAX_HEAD_DIM * KEYS];
    float values[KEYS * MAX_HEAD_DIM];
    float scores[TILE_ROWS * KEYS];
    float output[TILE_ROWS * MAX_HEAD_DIM];
    float highest[TILE_ROWS], sum[TILE_ROWS];
} __attribute__((aligned(64))) scratch;

INLINE lanes load(const float *from) {
    return (lanes) * (const loose_lanes *)from;
}

INLINE void store(float *to, lanes value) {
    *(loose_lanes *)to = (loose_lanes)value;
}

INLINE lanes load_bfloat16(const uint16_t *from) {
    return (lanes)(__builtin_convertvector(*(const half_lanes *)from, word_lanes) << 16);
}

INLINE lanes load_element(const void *from, int64_t index, int is_bfloat16) {
    return is_bfloat16 ? load_bfloat16((const uint16_t *)from + index) : load((const float *)from + index);
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) {
        return (uint16_t)(bits >> 16 | 0x40); /* a NaN stays one */
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to the nearest, halves to even */
}

INLINE lanes choose(int_lanes condition, lanes yes, lanes no) {
    return (lanes)((condition & (int_lanes)yes) | (~condition & (int_lanes)no));
}

/* e^x for x up to about 0; 0 far below it. What is no number stays none. */
INLINE lanes exponential(lanes x) {
    const lanes lowest = (lanes){0} - 87.0f;
    const lanes magic = (lanes){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    const int_lanes is_gone = x < lowest;
    x = choose(is_gone, lowest, x);
    const lanes shifted = x * 1.44269504f + magic;
    const lanes n = shifted - magic;
    const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    const int_lanes exponent = (((int_lanes)shifted - (int_lanes)magic) + 127) << 23;
    return choose(is_gone, (lanes){0}, p * (lanes)exponent);
}

/* Columns [column, column + 16 * N_VECTORS) of n_rows rows: output (+)= left * right. */
INLINE void multiply_block(const int n_rows, const int n_vectors, const float *left, int64_t left_stride,
                           const float *right, int64_t right_stride, int64_t n_inner, float *output,
                           int64_t output_stride, const int accumulate) {
    lanes sums[BLOCK_ROWS][2];
    for (int row = 0; row < n_rows; row++) {
        for (int v = 0; v < n_vectors; v++) {
            sums[row][v] = accumulate ? load(output + row * output_stride + v * LANES) : (lanes){0};
        }
    }
    for (int64_t i = 0; i < n_inner; i++) {
        for (int v = 0; v < n_vectors; v++) {
            const lanes factor = load(right + i * right_stride + v * LANES);
            for (int row = 0; row < n_rows; row++) {
                sums[row][v] += factor * left[row * left_stride + i];
            }
        }
    }
    for (int row = 0; row < n_rows; row++) {
        for (int v = 0; v < n_vectors; v++) {
            store(output + row * output_stride + v * LANES, sums[row][v]);
        }
    }
}

INLINE void multiply_columns(const int n_vectors, const float *left, int64_t left_stride, const float *right,
                             int64_t right_stride, int64_t n_inner, float *output, int64_t output_stride,
                             int64_t n_rows, const int accumulate) {
    int64_t row = 0;
#define ROWS(n)                                                                                                        \
    multiply_block(n, n_vectors, left + row * left_stride, left_stride, right, right_stride, n_inner,                  \
                   output + row * output_stride, output_stride, accumulate)
    for (; row + BLOCK_ROWS <= n_rows; row += BLOCK_ROWS) {
        ROWS(BLOCK_ROWS);
    }
    switch (n_rows - row) {
    case 3:
        ROWS(3);
        break;
    case 2:
        ROWS(2);
        break;
    case 1:
        ROWS(1);
        break;
    default:
        break;
    }
#undef ROWS
}

/* output[n_rows][n_columns] (+)= left[n_rows][n_inner] * right[n_inner][n_columns]. */
INLINE void multiply(const float *left, int64_t left_stride, const float *right, int64_t right_stride, int64_t n_inner,
                     float *output, int64_t output_stride, int64_t n_rows, int64_t n_columns, const int accumulate) {
    int64_t column = 0;
    for (; column + 2 * LANES <= n_columns; column += 2 * LANES) {
        multiply_columns(2, left, left_stride, right + column, right_stride, n_inner, output + column, output_stride,
                         n_rows, accumulate);
    }
    if (column < n_columns) {
        multiply_columns(1, left, left_stride, right + column, right_stride, n_inner, output + column, output_stride,
                         n_rows, accumulate);
    }
}

/* Four stages take 16 vectors to one another's lanes; at each, of two vectors `step` apart, the pairs of blocks of
 * `step` lanes that belong together. Kept apart they are a transposition; added, the sums of 16 vectors' lanes. */
#define PAIR_8(a, b, low, high)                                                                                        \
    const lanes low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);           \
    const lanes high = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#define PAIR_4(a, b, low, high)                                                                                        \
    const lanes low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);         \
    const lanes high = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#define PAIR_2(a, b, low, high)                                                                                        \
    const lanes low = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);         \
    const lanes high = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#define PAIR_1(a, b, low, high)                                                                                        \
    const lanes low = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);        \
    const lanes high = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);

#define TRANSPOSE(step)                                                                                                \
    for (int i = 0; i < LANES; i += 2 * (step)) {                                                                      \
        for (int j = i; j < i + (step); j++) {                                                                         \
            PAIR_##step(rows[j], rows[j + (step)], low, high) rows[j] = low;                                           \
            rows[j + (step)] = high;                                                                                   \
        }                                                                                                              \
    }
#define ADD(step)                                                                                                      \
    for (int j = 0; j < (step); j++) {                                                                                 \
        PAIR_##step(rows[j], rows[j + (step)], low, high) rows[j] = low + high;                                        \
    }

INLINE void transpose(lanes rows[LANES]){TRANSPOSE(8) TRANSPOSE(4) TRANSPOSE(2) TRANSPOSE(1)}

/* Lane i of the result is the sum of all lanes of rows[i]. */
INLINE lanes add_lanes(lanes rows[LANES]) {
    ADD(8)
    ADD(4)
    ADD(2)
    ADD(1)
    return rows[0];
}

/* Read n_keys rows of K into [head_dim][KEYS]; columns behind them become 0, up to a multiple of LANES. */
INLINE void read_keys(const void *keys, int64_t stride, int64_t head_dim, int64_t n_keys, const int is_bfloat16,
                      float *columns) {
    for (int64_t key = 0; key < n_keys; key += LANES) {
        for (int64_t d = 0; d < head_dim; d += LANES) {
            lanes rows[LANES];
            for (int i = 0; i < LANES; i++) {
                rows[i] = key + i < n_keys ? load_element(keys, (key + i) * stride + d, is_bfloat16) : (lanes){0};
            }
            transpose(rows);
            for (int i = 0; i < LANES; i++) {
                store(columns + (d + i) * KEYS + key, rows[i]);
            }
        }
    }
}

/* Ask for rows of V while K is at work; at the beginning of each memory page the machine would be late by itself. */
INLINE void prefetch(const char *rows, int64_t n_rows, int64_t stride_bytes, int64_t row_bytes) {
    for (int64_t i = 0; i < n_rows; i++) {
        for (int64_t at = 0; at < row_bytes; at += 64) {
            __builtin_prefetch(rows + i * stride_bytes + at);
        }
    }
}

/* Scores of a few rows, without a transposition: it would cost more than it saves. */
INLINE void score_few(const float *query, int64_t n_rows, const void *keys, int64_t stride, int64_t head_dim,
                      int64_t n_keys, const int is_bfloat16, float *scores) {
    for (int64_t key = 0; key < n_keys; key += LANES) {
        for (int64_t row = 0; row < n_rows; row++) {
            lanes sums[LANES];
            for (int i = 0; i < LANES; i++) {
                sums[i] = (lanes){0};
                if (key + i < n_keys) {
                    for (int64_t d = 0; d < head_dim; d += LANES) {
                        const lanes k = load_element(keys, (key + i) * stride + d, is_bfloat16);
                        sums[i] += k * load(query + row * head_dim + d);
                    }
                }
            }
            store(scores + row * KEYS + key, add_lanes(sums));
        }
    }
}

/* One row's scores of a block to weights, in place; the running maximum and sum follow. Returns what to multiply the
 * row's output so far with. */
INLINE float weigh(float *scores, int64_t n_columns, int64_t first_seen, int64_t end_seen, float scale, float softcap,
                   float *highest, float *sum) {
    const lanes none = (lanes){0} - INFINITY;
    int_lanes column;
    for (int i = 0; i < LANES; i++) {
        column[i] = i;
    }
    lanes top = (lanes){0} + *highest;
    for (int64_t i = 0; i < n_columns; i += LANES) {
        lanes s = load(scores + i) * scale;
        if (softcap != 0.0f) {
            /* tanh(x) = sign(x) * (1 - e) / (1 + e), where e = exp(-2 |x|) */
            const lanes x = s / softcap;
            const int_lanes is_negative = x < (lanes){0};
            const lanes e = exponential(choose(is_negative, x, -x) * 2.0f);
            const lanes size = (1.0f - e) / (1.0f + e) * softcap;
            s = choose(is_negative, -size, size);
        }
        if (i < first_seen || i + LANES > end_seen) {
            const int_lanes at = column + (int32_t)i;
            s = choose((at >= (int32_t)first_seen) & (at < (int32_t)end_seen), s, none);
        }
        store(scores + i, s);
        top = choose(s > top, s, top);
    }
    float new_highest = top[0];
    for (int i = 1; i < LANES; i++) {
        new_highest = top[i] > new_highest ? top[i] : new_highest;
    }
    /* Where nothing was seen yet, weights and sum are 0 whatever is subtracted. */
    const float base = new_highest == -INFINITY ? 0.0f : new_highest;
    lanes total = {0};
    for (int64_t i = 0; i < n_columns; i += LANES) {
        const lanes weight = exponential(load(scores + i) - base);
        store(scores + i, weight);
        total += weight;
    }
    const lanes factor = exponential((lanes){0} + (*highest - base));
    float block_sum = 0.0f;
    for (int i = 0; i < LANES; i++) {
        block_sum += total[i];
    }
    *sum = *sum * factor[0] + block_sum;
    *highest = new_highest;
    return factor[0];
}

/* One tile of one sequence and one K/V head. */
INLINE void attend_tile(const vmem_attention *call, const int64_t *sequence, int64_t first_token, int64_t kv_head,
                        const int is_bfloat16, scratch *memory) {
    const int64_t n_groups = call->n_q_heads / call->n_kv_heads, head_dim = call->head_dim;
    const int64_t value_dim = call->value_dim, n_new = sequence[1], length = sequence[3];
    const int64_t tile_tokens = n_groups >= TILE_ROWS ? 1 : TILE_ROWS / n_groups;
    const int64_t n_tokens = n_new - first_token < tile_tokens ? n_new - first_token : tile_tokens;
    const int64_t element_bytes = is_bfloat16 ? 2 : 4;
    /* What the tile's first and last token see. */
    const int64_t first_position = length - n_new + first_token;
    const int64_t end_key = call->is_causal ? first_position + n_tokens : length;
    const int64_t first_key = call->window && first_position + 1 > call->window ? first_position + 1 - call->window : 0;
    for (int64_t first_group = 0; first_group < n_groups; first_group += TILE_ROWS) {
        const int64_t n_tile_groups = n_groups - first_group < TILE_ROWS ? n_groups - first_group : TILE_ROWS;
        const int64_t n_rows = n_tokens * n_tile_groups;
        const int64_t first_head = kv_head * n_groups + first_group;
        for (int64_t row = 0; row < n_rows; row++) {
            const int64_t token = sequence[0] + first_token + row / n_tile_groups;
            const int64_t head = first_head + row % n_tile_groups;
            for (int64_t d = 0; d < head_dim; d += LANES) {
                const int64_t at = token * call->query_strides[0] + head * call->query_strides[1] + d;
                store(memory->query + row * head_dim + d, load_element(call->query, at, is_bfloat16));
            }
            memory->highest[row] = call->sinks ? call->sinks[head] : -INFINITY;
            memory->sum[row] = call->sinks ? 1.0f : 0.0f;
        }
        memset(memory->output, 0, sizeof(float) * (size_t)(n_rows * value_dim));
        for (int64_t key = first_key; key < end_key; key += KEYS) {
            const int64_t n_keys = end_key - key < KEYS ? end_key - key : KEYS;
            const int64_t n_columns = (n_keys + LANES - 1) / LANES * LANES;
            const int64_t kv_row = sequence[2] + key;
            const char *keys = (const char *)call->keys +
                               (kv_row * call->key_strides[0] + kv_head * call->key_strides[1]) * element_bytes;
            const char *values = (const char *)call->values +
                                 (kv_row * call->value_strides[0] + kv_head * call->value_strides[1]) * element_bytes;
            if (n_rows <= FEW_ROWS) {
                prefetch(values, n_keys, call->value_strides[0] * element_bytes, value_dim * element_bytes);
                score_few(memory->query, n_rows, keys, call->key_strides[0], head_dim, n_keys, is_bfloat16,
                          memory->scores);
            } else {
                read_keys(keys, call->key_strides[0], head_dim, n_keys, is_bfloat16, memory->keys);
                multiply(memory->query, head_dim, memory->keys, KEYS, head_dim, memory->scores, KEYS, n_rows, n_columns,
                         0);
            }
            for (int64_t row = 0; row < n_rows; row++) {
                const int64_t position = first_position + row / n_tile_groups;
                const int64_t end_seen = call->is_causal ? position + 1 - key : n_keys;
                const int64_t first_seen = call->window ? position + 1 - call->window - key : 0;
                const float factor =
                    weigh(memory->scores + row * KEYS, n_columns, first_seen, end_seen < n_keys ? end_seen : n_keys,
                          call->scale, call->softcap, memory->highest + row, memory->sum + row);
                if (factor != 1.0f) {
                    for (int64_t d = 0; d < value_dim; d += LANES) {
                        float *output = memory->output + row * value_dim + d;
                        store(output, load(output) * factor);
                    }
                }
            }
            const float *rows = (const float *)values;
            int64_t row_stride = call->value_strides[0];
            if (is_bfloat16) {
                for (int64_t i = 0; i < n_keys; i++) {
                    for (int64_t d = 0; d < value_dim; d += LANES) {
                        store(memory->values + i * value_dim + d, load_element(values, i * row_stride + d, 1));
                    }
                }
                rows = memory->values;
                row_stride = value_dim;
            }
            multiply(memory->scores, KEYS, rows, row_stride, n_keys, memory->output, value_dim, n_rows, value_dim, 1);
        }
        for (int64_t row = 0; row < n_rows; row++) {
            const int64_t token = sequence[0] + first_token + row / n_tile_groups;
            const int64_t head = first_head + row % n_tile_groups;
            const int64_t at = (token * call->n_q_heads + head) * value_dim;
            const float *from = memory->output + row * value_dim;
            const float share = 1.0f / memory->sum[row];
            for (int64_t d = 0; d < value_dim; d++) {
                if (is_bfloat16) {
                    ((uint16_t *)call->output)[at + d] = to_bfloat16(from[d] * share);
                } else {
                    ((float *)call->output)[at + d] = from[d] * share;
                }
            }
        }
    }
}

WIDEST static void attend_float32(const vmem_attention *call, const int64_t *sequence, int64_t first_token,
                                  int64_t kv_head) {
    scratch memory;
    attend_tile(call, sequence, first_token, kv_head, 0, &memory);
}

WIDEST static void attend_bfloat16(const vmem_attention *call, const int64_t *sequence, int64_t first_token,
                                   int64_t kv_head) {
    scratch memory;
    attend_tile(call, sequence, first_token, kv_head, 1, &memory);
}

void vmem_attend(const vmem_attention *call) {
    const int64_t n_tasks = call->n_tasks * call->n_kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->n_threads) if (call->n_threads > 1)
    for (int64_t task = 0; task < n_tasks; task++) {
        const int64_t *which = call->tasks + 2 * (task / call->n_kv_heads);
        const int64_t *sequence = call->sequences + 4 * which[0];
        const int64_t kv_head = task % call->n_kv_heads;
        if (call->is_bfloat16) {
            attend_bfloat16(call, sequence, which[1], kv_head);
        } else {
            attend_float32(call, sequence, which[1], kv_head);
        }
    }
}
