/* The light decoder: beam search over a trie with additive scores, and exact reranking. Built at first use by grnb.decode.native. */
/* ==== types ==== */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef int64_t i64;
enum {CODE, LO, HI, FIRST, ROWS, EXTRA, ARRAYS};
typedef struct {                                       /* a trie and its biases */
    const void *array[ARRAYS]; i64 size[ARRAYS];       /* entries and postings, with bytes an element */
    const u8 *tail; const i64 *begin, *width;          /* columns of the leaves */
    const u16 *bias, *leaf_bias;                       /* of entries and leaves, or leaf_bias NULL: from gram */
    const u64 *words, *some, *kept_rows;               /* what is kept: bits of leaves, of words, of items; NULL keeps all */
    i64 leaves, levels, extras, several;               /* several: an item may have several IDs */
    float low, step, leaf_low, leaf_step;
    const i64 *place; const u8 *same; const i64 *order;  /* of added items: base leaves before each leaf, is it one of them, where each row stands in a bucket or NULL: after the base */
    i64 old;                                           /* rows of the base */
    const u32 *before;                                 /* postings beyond the first before every 256th leaf */
    const u64 *twins; i64 mask;                        /* bits of the base leaves in the side, at leaf & mask: where 0, there is none; NULL: no leaf has one */
} Part;
typedef struct {                                       /* what all parts share */
    const float *books; const u8 *eighths; const float *scale, *gram; const i64 *offsets;
    i64 geometric, width, padded;                      /* levels with a codebook, D, D rounded up to 64 */
    float penalty, reach;                              /* reach: penalty times the range of biases */
} Books;
typedef struct {u16 *key; u32 *id, *from; i64 n, room; int floor; const Part *marked; i64 sure;} Pool;   /* the first `sure` are known to be kept */  /* keys at or below the floor stay out; -1 lets all in */
enum {BLOCK = 256, TOGETHER = 4};                      /* prefixes or leaves scored at once, queries multiplied at once */
typedef struct {float low, step; const float *table; const u16 *lut; const u8 *planes; u16 *acc;} Query;

static inline i64 at(const Part *p, int which, i64 i) {
    const void *a = p->array[which];
    switch (p->size[which]) {
        case 1: return ((const u8 *)a)[i];
        case 2: return ((const u16 *)a)[i];
        case 4: return ((const u32 *)a)[i];
        default: return ((const i64 *)a)[i];
    }
}
static inline i64 code_at(const void *column, i64 width, i64 i) { return width == 1 ? ((const u8 *)column)[i] : ((const u16 *)column)[i]; }
/* ==== kept ==== */
static inline int is_kept(const u64 *words, i64 i) { return words[i >> 6] >> (i & 63) & 1; }
static int any_kept(const u64 *words, const u64 *some, i64 lo, i64 hi) {
    for (int up = 0; up < 2; up++, words = some) {     /* bits, then one bit for every word of them */
        i64 a = lo >> 6, b = (hi - 1) >> 6;
        u64 first = ~0ULL << (lo & 63), last = ~0ULL >> (63 - ((hi - 1) & 63));
        if (a == b) return (words[a] & first & last) != 0;
        if ((words[a] & first) | (words[b] & last)) return 1;
        lo = a + 1; hi = b;
        if (up) for (; lo < hi; lo++) if (words[lo]) return 1;
        if (lo >= hi) return 0;
    }
    return 0;
}
/* ==== table ==== */
static int32_t in_eighths(const Books *b, const float *q, int8_t *q8, float *unit) {   /* the sum of the numbers made */
    float top = 0; int32_t total = 0;
    for (i64 d = 0; d < b->width; d++) { float x = fabsf(q[d]); top = x > top ? x : top; }
    *unit = top / 127 > 1e-30f ? top / 127 : 1e-30f;
    for (i64 d = 0; d < b->padded; d++) { q8[d] = d < b->width ? (int8_t)rintf(q[d] / *unit) : 0; total += q8[d]; }
    return total;
}
#ifdef __AVX512VNNI__
int packs(void) { return 1; }
static inline __attribute__((always_inline)) void products_of(const Books *b, const float *queries, const int n, int8_t *q8, float *table, i64 stride) {   /* n of them, at most TOGETHER */
    i64 S = b->offsets[b->geometric], D = b->padded;
    float unit[TOGETHER]; __m512i zero[TOGETHER];
    for (int i = 0; i < n; i++) zero[i] = _mm512_set1_epi32(-128 * in_eighths(b, queries + i * b->width, q8 + i * D, unit + i));   /* codewords are stored 128 too large */
    for (i64 s = 0; s < S; s += 64) {                  /* 64 codewords at once, 16 a register: no sums across lanes */
        const u8 *w = b->eighths + s * D; __m512i a[TOGETHER][4];
        for (int i = 0; i < n; i++) for (int g = 0; g < 4; g++) a[i][g] = zero[i];
        for (i64 d = 0; d < D; d += 4, w += 256) for (int g = 0; g < 4; g++) {
            __m512i c = _mm512_load_si512(w + 64 * g);
            for (int i = 0; i < n; i++) { int32_t x; memcpy(&x, q8 + i * D + d, 4); a[i][g] = _mm512_dpbusd_epi32(a[i][g], c, _mm512_set1_epi32(x)); }
        }
        for (int i = 0; i < n; i++) for (int g = 0; g < 4; g++)
            _mm512_storeu_ps(table + i * stride + s + 16 * g, _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(a[i][g]), _mm512_set1_ps(unit[i])), _mm512_loadu_ps(b->scale + s + 16 * g)));
    }
}
static void products8(const Books *b, const float *queries, i64 n, int8_t *q8, float *table, i64 stride) {
    i64 i = 0;
    for (; i + TOGETHER <= n; i += TOGETHER) products_of(b, queries + i * b->width, TOGETHER, q8, table + i * stride, stride);
    for (; i < n; i++) products_of(b, queries + i * b->width, 1, q8, table + i * stride, stride);
}
#else
int packs(void) { return 0; }
static void products8(const Books *b, const float *queries, i64 n, int8_t *q8, float *table, i64 stride) {
    i64 S = b->offsets[b->geometric];
    for (const float *q = queries; n--; q += b->width, table += stride) {
        float unit; in_eighths(b, q, q8, &unit);
        for (i64 s = 0; s < S; s++) {
            const int8_t *w = (const int8_t *)b->eighths + s * b->width; int32_t total = 0;
            for (i64 d = 0; d < b->width; d++) total += (int32_t)q8[d] * w[d];
            table[s] = total * unit * b->scale[s];
        }
    }
}
#endif
/* ==== table plain ==== */
static void products(const Books *b, const float *q, float *table) {
    i64 S = b->offsets[b->geometric], D = b->width;
    for (i64 s = 0; s < S; s++) {
        const float *w = b->books + s * D;
        float lane[16] = {0}; i64 d = 0;
        for (; d + 16 <= D; d += 16) for (int j = 0; j < 16; j++) lane[j] += q[d + j] * w[d + j];
        for (int j = 0; d + j < D; j++) lane[j] += q[d + j] * w[d + j];
        for (int k = 8; k; k /= 2) for (int j = 0; j < k; j++) lane[j] += lane[j + k];
        table[s] = lane[0];
    }
}
static void table_of(const Books *b, const float *queries, i64 n, int8_t *q8, float *table, i64 stride) {
    if (b->eighths) products8(b, queries, n, q8, table, stride);
    else for (i64 i = 0; i < n; i++) products(b, queries + i * b->width, table + i * stride);
}
/* ==== steps ==== */
static Query steps(const Books *b, const float *restrict table, u16 *restrict lut, u8 *restrict planes, u16 *acc) {
    float least[64], span = b->reach, low = 0;
    for (i64 l = 0; l < b->geometric; l++) {
        float lo[16], hi[16], a = INFINITY, z = -INFINITY; i64 s = b->offsets[l], end = b->offsets[l + 1];
        for (int j = 0; j < 16; j++) lo[j] = hi[j] = table[s];
        for (; s + 16 <= end; s += 16) for (int j = 0; j < 16; j++) { float t = table[s + j]; lo[j] = t < lo[j] ? t : lo[j]; hi[j] = t > hi[j] ? t : hi[j]; }
        for (; s < end; s++) { lo[0] = table[s] < lo[0] ? table[s] : lo[0]; hi[0] = table[s] > hi[0] ? table[s] : hi[0]; }
        for (int j = 0; j < 16; j++) { a = lo[j] < a ? lo[j] : a; z = hi[j] > z ? hi[j] : z; }
        least[l] = a; span += z - a; low += a;
    }
    float step = span > 1e-30f ? span / (65535 - 2 - b->geometric) : 1, per = 1 / step;
    for (i64 l = 0; l < b->geometric; l++) {
        i64 K = b->offsets[l + 1] - b->offsets[l]; float down = least[l];
        const float *t = table + b->offsets[l]; u16 *out = lut + b->offsets[l]; u8 *low8 = planes + 512 * l, *high8 = low8 + 256;
        for (i64 c = 0; c < K; c++) out[c] = (u16)(int)((t[c] - down) * per + .5f);
        if (K <= 256) for (i64 c = 0; c < K; c++) { low8[c] = out[c] & 255; high8[c] = out[c] >> 8; }
    }
    return (Query){low, step, table, lut, planes, acc};
}
/* ==== look up ==== */
static void look_up(u16 *acc, const void *column, i64 width, i64 n, const u16 *lut, const u8 *planes, i64 K) {
#ifdef __AVX512VBMI__
    if (K <= 256) {
        __m512i l[4], h[4], order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
        for (int j = 0; j < 4; j++) { l[j] = _mm512_loadu_si512(planes + 64 * j); h[j] = _mm512_loadu_si512(planes + 256 + 64 * j); }
        for (i64 i = 0; i < n; i += 64) {              /* 64 codes: two byte tables of 256 rows, held in registers */
            __mmask64 on = n - i >= 64 ? ~0ULL : (1ULL << (n - i)) - 1;
            __m512i c;
            if (width == 1) c = _mm512_maskz_loadu_epi8(on, (const u8 *)column + i);
            else {
                __m256i c0 = _mm512_cvtepi16_epi8(_mm512_maskz_loadu_epi16((__mmask32)on, (const u16 *)column + i));
                c = _mm512_inserti64x4(_mm512_castsi256_si512(c0), _mm512_cvtepi16_epi8(_mm512_maskz_loadu_epi16((__mmask32)(on >> 32), (const u16 *)column + i + 32)), 1);
            }
            c = _mm512_permutexvar_epi64(order, c);
            __mmask64 up = _mm512_movepi8_mask(c);
            __m512i lo = _mm512_mask_blend_epi8(up, _mm512_permutex2var_epi8(l[0], c, l[1]), _mm512_permutex2var_epi8(l[2], c, l[3]));
            __m512i hi = _mm512_mask_blend_epi8(up, _mm512_permutex2var_epi8(h[0], c, h[1]), _mm512_permutex2var_epi8(h[2], c, h[3]));
            _mm512_store_si512(acc + i, _mm512_add_epi16(_mm512_load_si512(acc + i), _mm512_unpacklo_epi8(lo, hi)));
            _mm512_store_si512(acc + i + 32, _mm512_add_epi16(_mm512_load_si512(acc + i + 32), _mm512_unpackhi_epi8(lo, hi)));
        }
        return;
    }
#endif
    if (width == 1) for (i64 i = 0; i < n; i++) acc[i] += lut[((const u8 *)column)[i]];
    else for (i64 i = 0; i < n; i++) acc[i] += lut[((const u16 *)column)[i]];
}
/* ==== pool ==== */
static inline int lives(const Part *p, i64 entry) {    /* the first leaf nearly always answers */
    i64 lo = at(p, LO, entry);
    return is_kept(p->words, lo) || any_kept(p->words, p->some, lo, at(p, HI, entry));
}
static void sift(Pool *p) {                            /* drop entries below which nothing is kept */
    i64 m = 0;
    for (i64 i = 0; i < p->n; i++) if (i < p->sure || lives(p->marked, p->id[i])) { p->key[m] = p->key[i]; p->id[m] = p->id[i]; p->from[m++] = p->from[i]; }
    p->n = p->sure = m;
}
#ifdef __AVX512VBMI2__
static inline __mmask32 first_of(i64 n) { return n >= 32 ? ~0u : (1u << n) - 1; }
static i64 reach_of(const Pool *p, int edge) {         /* how many keys are at least this */
    i64 n = 0; __m512i least = _mm512_set1_epi16((short)edge);
    for (i64 i = 0; i < p->n; i += 32) n += __builtin_popcount(_mm512_mask_cmpge_epu16_mask(first_of(p->n - i), _mm512_loadu_si512(p->key + i), least));
    return n;
}
static int edge_of(const Pool *p, i64 *left) {         /* the left-th largest key; `left` of those equal to it stay, first come */
    int edge = 0;
    for (int bit = 1 << 15; bit; bit >>= 1) if (reach_of(p, edge | bit) >= *left) edge |= bit;
    if (edge < 65535) *left -= reach_of(p, edge + 1);
    return edge;
}
static inline void take_in(Pool *p, i64 n, __mmask32 hit, __m512i key, __m512i id0, __m512i id1, __m512i from0, __m512i from1) {   /* those of 32 that are hit */
    __mmask16 h0 = hit, h1 = hit >> 16; i64 m = n + __builtin_popcount(h0);
    _mm512_storeu_si512(p->key + n, _mm512_maskz_compress_epi16(hit, key));
    _mm512_storeu_si512(p->id + n, _mm512_maskz_compress_epi32(h0, id0)); _mm512_storeu_si512(p->id + m, _mm512_maskz_compress_epi32(h1, id1));
    _mm512_storeu_si512(p->from + n, _mm512_maskz_compress_epi32(h0, from0)); _mm512_storeu_si512(p->from + m, _mm512_maskz_compress_epi32(h1, from1));
}
static void keep_above(Pool *p, int edge, i64 left) {  /* all keys above the edge, and the first `left` equal to it */
    i64 m = 0; __m512i e = _mm512_set1_epi16((short)edge);
    for (i64 i = 0; i < p->n; i += 32) {
        __m512i key = _mm512_loadu_si512(p->key + i); __mmask32 on = first_of(p->n - i);
        u32 hit = _mm512_mask_cmpgt_epu16_mask(on, key, e), same = left ? _mm512_mask_cmpeq_epi16_mask(on, key, e) : 0;
        if (same) { if (left < 32) same = _pdep_u32((1u << left) - 1, same); left -= __builtin_popcount(same); hit |= same; }
        if (!hit) continue;
        take_in(p, m, hit, key, _mm512_loadu_si512(p->id + i), _mm512_loadu_si512(p->id + i + 16), _mm512_loadu_si512(p->from + i), _mm512_loadu_si512(p->from + i + 16));
        m += __builtin_popcount(hit);
    }
    p->n = m;
}
#else
static int edge_of(const Pool *p, i64 *left) {
    u32 count[256]; int high = 255, low = 255;
    memset(count, 0, sizeof count);
    for (i64 i = 0; i < p->n; i++) count[p->key[i] >> 8]++;
    while (count[high] < *left) *left -= count[high--];
    memset(count, 0, sizeof count);
    for (i64 i = 0; i < p->n; i++) count[p->key[i] & 255] += p->key[i] >> 8 == high;
    while (count[low] < *left) *left -= count[low--];
    return high << 8 | low;
}
static void keep_above(Pool *p, int edge, i64 left) {
    i64 m = 0;
    for (i64 i = 0; i < p->n; i++) {
        int key = p->key[i], level = key == edge && left > 0;
        p->key[m] = key; p->id[m] = p->id[i]; p->from[m] = p->from[i];
        m += key > edge || level; left -= level;
    }
    p->n = m;
}
#endif
static void cut(Pool *p, i64 keep) {                   /* what is kept is asked only for those that would stay; nearly always all of them are */
    int ask = p->marked != 0;
    if (ask && p->n <= keep) { sift(p); return; }
    while (p->n > keep) {
        i64 left = keep, same; int edge = edge_of(p, &left), gone = 0;
        same = left;
        if (ask) for (i64 i = 0; i < p->n && !gone; i++)
            if (p->key[i] > edge || (p->key[i] == edge && same-- > 0)) gone = i >= p->sure && !lives(p->marked, p->id[i]);
        if (gone) { sift(p); ask = 0; continue; }
        keep_above(p, edge, left);
        p->sure = p->n; p->floor = edge;
    }
}
static inline u32 kept_32(const Part *p, i64 i) {      /* the bits of leaves i … i+31 */
    i64 w = i >> 6, s = i & 63;
    u64 x = p->words[w] >> s;
    if (s > 32 && w + 1 < (p->leaves + 63) >> 6) x |= p->words[w + 1] << (64 - s);
    return (u32)x;
}
static void gather(const Part *p, Pool *pool, const u16 *acc, i64 n, i64 id, i64 from, int leaf, i64 keep) {
    if (pool->n + n > pool->room) cut(pool, keep);
    int marked = leaf && p->words;
#ifdef __AVX512VBMI2__
    __m512i above = _mm512_set1_epi16((short)(pool->floor + 1)), source = _mm512_set1_epi32((int)from), count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    if (pool->floor == 65535) return;
    for (i64 i = 0; i < n; i += 32) {
        __m512i key = _mm512_load_si512(acc + i), number = _mm512_add_epi32(count, _mm512_set1_epi32((int)(id + i)));
        u32 hit = _mm512_mask_cmpge_epu16_mask(first_of(n - i), key, above);
        if (marked && hit) hit &= kept_32(p, id + i);
        if (!hit) continue;
        take_in(pool, pool->n, hit, key, number, _mm512_add_epi32(number, _mm512_set1_epi32(16)), source, source);
        pool->n += __builtin_popcount(hit);
    }
#else
    for (i64 i = 0; i < n; i++) if (acc[i] > pool->floor && (!marked || is_kept(p->words, id + i))) {
        pool->key[pool->n] = acc[i]; pool->id[pool->n] = id + i; pool->from[pool->n++] = from;
    }
#endif
}
/* ==== norms by look-up ==== */
static void norms(const Part *p, const Books *b, const i64 *prefix, i64 depth, i64 lo, i64 n, u16 *out) {   /* biases of n leaves by look-ups */
    float sum[BLOCK], start = 0; i64 L = b->geometric, S = b->offsets[L];
    if (depth > L) depth = L;
    for (i64 a = 0; a < depth; a++) for (i64 c = 0; c <= a; c++) start += (a == c ? .5f : 1.f) * b->gram[prefix[a] * S + prefix[c]];
    for (i64 i = 0; i < n; i++) sum[i] = start;
    for (i64 l = depth; l < L; l++) {
        const u8 *x = p->tail + p->begin[l] + lo * p->width[l];
        for (i64 i = 0; i < n; i++) sum[i] += .5f * b->gram[(S + 1) * (b->offsets[l] + code_at(x, p->width[l], i))];
        for (i64 a = 0; a < l; a++) {
            const u8 *y = a < depth ? 0 : p->tail + p->begin[a] + lo * p->width[a];
            for (i64 i = 0; i < n; i++) {
                i64 s = a < depth ? prefix[a] : b->offsets[a] + code_at(y, p->width[a], i);
                sum[i] += b->gram[s * S + b->offsets[l] + code_at(x, p->width[l], i)];
            }
        }
    }
    for (i64 i = 0; i < n; i++) {
        float x = p->leaf_step > 0 ? (-sum[i] - p->leaf_low) / p->leaf_step + .5f : 0;
        out[i] = x < 0 ? 0 : x > 65535 ? 65535 : (u16)x;
    }
}
/* ==== blocks ==== */
static inline u32 share(const Query *q, float step, float penalty) { return (u32)(step * penalty / q->step * 65536 + .5f); }
static void score_entries(const Part *p, const Books *b, const Query *q, Pool *pool, i64 depth, i64 dot, i64 from, i64 a, i64 z, i64 keep) {
    u32 m = share(q, p->step, b->penalty);
    i64 K = depth < b->geometric ? b->offsets[depth + 1] - b->offsets[depth] : 0;
    for (i64 i = a; i < z; i += BLOCK) {
        i64 n = z - i < BLOCK ? z - i : BLOCK;
        for (i64 j = 0; j < n; j++) q->acc[j] = (u16)(dot + (p->bias[i + j] * m >> 16));
        if (K) look_up(q->acc, (const u8 *)p->array[CODE] + i * p->size[CODE], p->size[CODE], n, q->lut + b->offsets[depth], q->planes + 512 * depth, K);
        gather(p, pool, q->acc, n, i, from, 0, keep);
    }
}
static void score_leaves(const Part *p, const Books *b, const Query *q, Pool *pool, i64 depth, const i64 *prefix, i64 dot, i64 from, i64 lo, i64 hi, i64 keep) {
    u32 m = share(q, p->leaf_step, b->penalty);
    u16 made[BLOCK];
    for (i64 i = lo; i < hi; i += BLOCK) {
        i64 n = hi - i < BLOCK ? hi - i : BLOCK;
        const u16 *bias = p->leaf_bias ? p->leaf_bias + i : made;
        if (!p->leaf_bias) norms(p, b, prefix, depth, i, n, made);
        for (i64 j = 0; j < n; j++) q->acc[j] = (u16)(dot + (bias[j] * m >> 16));
        for (i64 l = depth; l < b->geometric; l++)
            look_up(q->acc, p->tail + p->begin[l] + i * p->width[l], p->width[l], n, q->lut + b->offsets[l], q->planes + 512 * l, b->offsets[l + 1] - b->offsets[l]);
        gather(p, pool, q->acc, n, i, from, 1, keep);
    }
}
/* ==== sort ==== */
static void sort_keys(u64 *key, u64 *spare, i64 n) {   /* ascending; no two are equal, and there is room for eight more */
    u64 *from = key, *to = spare;
#ifdef __AVX512F__
    i64 run = n <= 256 ? 256 : 64;                     /* a key's place is the number of those below it */
    for (i64 i = 0; i < n; i += run) {
        i64 size = n - i < run ? n - i : run;
        for (i64 j = i; j < i + size; j++) {
            i64 place = i; __m512i x = _mm512_set1_epi64((i64)key[j]);
            for (i64 c = 0; c < size; c += 8) place += __builtin_popcount(_mm512_mask_cmplt_epu64_mask(size - c >= 8 ? 255 : (1 << (size - c)) - 1, _mm512_loadu_si512(key + i + c), x));
            spare[place] = key[j];
        }
    }
    from = spare; to = key;
#else
    i64 run = 8;
    for (i64 i = 0; i < n; i += run)                   /* by insertion */
        for (i64 j = i + 1; j < n && j < i + run; j++) {
            u64 x = key[j]; i64 k = j;
            for (; k > i && key[k - 1] > x; k--) key[k] = key[k - 1];
            key[k] = x;
        }
#endif
    for (; run < n; run *= 2) {                        /* runs are merged */
        for (i64 i = 0; i < n; i += 2 * run) {
            i64 a = i, mid = i + run < n ? i + run : n, b = mid, end = i + 2 * run < n ? i + 2 * run : n;
            for (i64 k = i; k < end; k++) {
                int left = b >= end || (a < mid && from[a] <= from[b]);
                to[k] = left ? from[a] : from[b];
                a += left; b += !left;
            }
        }
        u64 *t = from; from = to; to = t;
    }
    if (from != key) memcpy(key, from, n * sizeof *key);
}
static inline u64 falling(float x) {                   /* an unsigned number that falls as x rises */
    u32 u; x += 0.0f; memcpy(&u, &x, 4);
    return (u64)(u32)~(u & 0x80000000u ? ~u : u | 0x80000000u) << 32;
}
static inline float score_of(u64 key) {
    u32 u = ~(u32)(key >> 32); float x;
    u = u & 0x80000000u ? u & 0x7fffffffu : ~u;
    memcpy(&x, &u, 4); return x;
}
/* ==== descend ==== */
typedef struct {u32 *node, *dot, *parent; float *exact; u8 *depth; u64 *key, *spare;} Front;
static void spell(const Part *p, const Books *b, const Front *f, i64 i, i64 depth, i64 *prefix) {   /* the codewords of a prefix */
    for (; depth--; i = f->parent[i]) if (depth < b->geometric) prefix[depth] = b->offsets[depth] + at(p, CODE, f->node[i]);
}
static void ahead(const Part *p, const Books *b, i64 node, i64 depth) {   /* ask for what node will need */
    i64 a = at(p, FIRST, node), z = at(p, FIRST, node + 1);
    if (a < z) {
        i64 size = p->size[CODE];
        for (i64 i = a * size & ~63; i < z * size; i += 64) __builtin_prefetch((const u8 *)p->array[CODE] + i);
        for (i64 i = a * 2 & ~63; i < z * 2; i += 64) __builtin_prefetch((const u8 *)p->bias + i);
        return;
    }
    i64 lo = at(p, LO, node), hi = at(p, HI, node);
    if (p->words) __builtin_prefetch(p->words + (lo >> 6));
    for (i64 l = depth; l < b->geometric; l++) {
        const u8 *c = p->tail + p->begin[l];
        for (i64 i = lo * p->width[l] & ~63; i < hi * p->width[l]; i += 64) __builtin_prefetch(c + i);
    }
    if (p->leaf_bias) for (i64 i = lo * 2 & ~63; i < hi * 2; i += 64) __builtin_prefetch((const u8 *)p->leaf_bias + i);
}
static inline int entry_floor(const Query *q, float floor, float low) {   /* from a score to a key: never too high */
    float x = floorf((floor - (q->low + low)) / q->step) - 2;
    return x < -1 ? -1 : x > 65534 ? 65534 : (int)x;
}
/* ==== exact scores ==== */
/* keys of the `need` best leaves found: falling float32 score, leaf */
static i64 exact(const Part *p, const Books *b, const Query *q, Pool *found, const Front *f, i64 need, i64 shift, u64 *out) {
    i64 prefix[64]; u16 bias;
    cut(found, need);
    for (i64 i = 0; i < found->n; i++) {
        i64 leaf = found->id[i], from = found->from[i], depth = f->depth[from];
        if (p->leaf_bias) bias = p->leaf_bias[leaf];
        else { spell(p, b, f, from, depth, prefix); norms(p, b, prefix, depth, leaf, 1, &bias); }
        float s = f->exact[from];
        for (i64 l = depth; l < b->geometric; l++) s += q->table[b->offsets[l] + code_at(p->tail + p->begin[l], p->width[l], leaf)];
        out[i] = falling(s + b->penalty * (p->leaf_low + p->leaf_step * bias)) | (u64)(leaf + shift);
    }
    return found->n;
}
/* ==== search one part ==== */
/* the best leaves of one part, as keys; floors are scores that a prefix of each depth and a leaf must beat, in and out */
static i64 search_part(const Part *p, const Books *b, const Query *q, Pool *kids, Pool *found, Front *f, i64 beam, i64 most, i64 need, float *floors, i64 shift, u64 *out) {
    i64 width = 1, done = 0;              /* frontier [done, done + width): nodes of one depth, best first */
    i64 prefix[64]; u32 m = share(q, p->step, b->penalty);
    float low = p->low * b->penalty, leaf_low = p->leaf_low * b->penalty;
    f->node[0] = 0; f->dot[0] = 0; f->exact[0] = 0;
    kids->marked = p->words ? p : 0; found->marked = 0;
    found->n = 0; found->floor = entry_floor(q, floors[p->levels], leaf_low);
    if (p->words && !any_kept(p->words, p->some, 0, p->leaves)) return 0;
    for (i64 depth = 0; width; depth++) {
        kids->n = kids->sure = 0; kids->floor = entry_floor(q, floors[depth], low);
        for (i64 i = done; i < done + width; i++) {
            i64 node = f->node[i], a = at(p, FIRST, node), z = at(p, FIRST, node + 1);
            f->depth[i] = depth;
            if (i + 3 < done + width) ahead(p, b, f->node[i + 3], depth);
            if (a < z) score_entries(p, b, q, kids, depth, f->dot[i], i, a, z, beam);
            else {
                if (!p->leaf_bias) spell(p, b, f, i, depth, prefix);
                score_leaves(p, b, q, found, depth, prefix, f->dot[i], i, at(p, LO, node), at(p, HI, node), most);
            }
        }
        cut(kids, beam);
        i64 next = done + width;
        for (i64 i = 0; i < kids->n; i++) f->key[i] = (u64)(65535 - kids->key[i]) << 32 | i;
        sort_keys(f->key, f->spare, kids->n);
        for (i64 i = 0; i < kids->n; i++) {
            i64 j = f->key[i] & 0xffffffff, e = kids->id[j], parent = kids->from[j];
            f->node[next + i] = e; f->parent[next + i] = parent; f->dot[next + i] = kids->key[j] - (p->bias[e] * m >> 16);
            f->exact[next + i] = f->exact[parent] + (depth < b->geometric ? q->table[b->offsets[depth] + at(p, CODE, e)] : 0);
        }
        if (kids->n == beam && depth < p->levels) {
            float edge = q->low + low + q->step * kids->key[f->key[beam - 1] & 0xffffffff];
            if (edge > floors[depth]) floors[depth] = edge;
        }
        done = next; width = kids->n;
    }
    cut(found, most);
    if (found->n == most) {
        int least = 65535;
        for (i64 i = 0; i < most; i++) if (found->key[i] < least) least = found->key[i];
        float edge = q->low + leaf_low + q->step * least;
        if (edge > floors[p->levels]) floors[p->levels] = edge;
    }
    return exact(p, b, q, found, f, need, shift, out);
}
/* ==== expand ==== */
typedef struct {i64 *rows; float *score; i64 n, want, *seen, slots;} Items;
static inline void item(Items *t, i64 row, float score) {   /* each item once */
    if (t->n == t->want) return;
    if (t->seen) {
        i64 h = (u64)row * 0x9E3779B1u & (t->slots - 1);
        while (t->seen[h] != -1 && t->seen[h] != row) h = (h + 1) & (t->slots - 1);
        if (t->seen[h] == row) return;
        t->seen[h] = row;
    }
    t->rows[t->n] = row; t->score[t->n++] = score;
}
static i64 below(const Part *p, i64 leaf) {            /* postings beyond the first of the leaves before a leaf */
    i64 a = p->before[leaf >> 8];
    for (i64 n = p->before[(leaf >> 8) + 1] - a; n > 0;) { i64 half = (n + 1) / 2; a += at(p, EXTRA, a + half - 1) < leaf ? half : 0; n -= half; }
    return a;
}
static i64 end_of(const Part *p, i64 leaf, i64 start) {   /* of the postings of a leaf that begin at `start` */
    i64 z = start - leaf;
    while (z < p->extras && at(p, EXTRA, z) == leaf) z++;
    return leaf + z + 1;
}
static i64 twin_of(const Part *side, i64 leaf) {       /* the leaf of the side with the same ID as a leaf of the base, or −1 */
    if (!side->twins || !is_kept(side->twins, leaf & side->mask)) return -1;
    i64 a = 0, z = side->leaves;
    while (a < z) { i64 mid = (a + z) / 2; if (side->place[mid] <= leaf) a = mid + 1; else z = mid; }
    return a && side->same[a - 1] && side->place[a - 1] == leaf ? a - 1 : -1;
}
static inline int row_kept(const Part *p, i64 row) { return !p->kept_rows || is_kept(p->kept_rows, row); }
static void bucket(const Part *p, i64 a, i64 b, const Part *side, i64 c, i64 d, float score, Items *t) {   /* an ID of both tries: postings a … b and c … d, in order */
    u64 last = 0; i64 at_last = -1;
    while (t->n < t->want) {
        i64 pick = -1, row = -1; u64 least = 0;
        for (i64 r = c; r < d; r++) {                  /* the next of those added */
            i64 x = at(side, ROWS, r); u64 k = side->order ? (u64)side->order[x - side->old] : (u64)x << 32 | 0xffffffff;
            if (row_kept(side, x) && (at_last < 0 || k > last || (k == last && r > at_last)) && (pick < 0 || k < least)) { pick = r; least = k; row = x; }
        }
        for (; a < b; a++) {                           /* before it, those of the base */
            i64 x = at(p, ROWS, a);
            if (pick >= 0 && ((u64)x << 32 | 0xffffffff) > least) break;
            if (row_kept(p, x)) item(t, x, score);
        }
        if (pick < 0) return;
        item(t, row, score);
        last = least; at_last = pick;
    }
}
/* item rows of leaves given best first, each once; how many */
static i64 expand(const Part *p, i64 count, const u64 *key, i64 n, Items t, i64 *start) {
    const Part *side = count > 1 ? p + 1 : 0;
    if (t.seen) for (i64 i = 0; i < t.slots; i++) t.seen[i] = -1;
    for (i64 i = 0; i < n && t.n < t.want; i++) {
        if (i % 64 == 0) for (i64 j = i; j < i + 64 && j < n; j++) {   /* ask for the rows of the next leaves */
            i64 leaf = key[j] & 0xffffffff;
            if (leaf < p->leaves) { start[j] = leaf + below(p, leaf); __builtin_prefetch((const u8 *)p->array[ROWS] + start[j] * p->size[ROWS]); }
        }
        i64 leaf = key[i] & 0xffffffff, twin = -1, a = 0, b = 0;
        if (leaf < p->leaves) { a = start[i]; if (side) twin = twin_of(side, leaf); }
        else {
            twin = leaf - p->leaves; leaf = side->same[twin] ? side->place[twin] : -1;
            if (leaf >= 0) a = leaf + below(p, leaf);
        }
        if (leaf >= 0) b = end_of(p, leaf, a);
        if (twin >= 0) { i64 c = twin + below(side, twin); bucket(p, a, b, side, c, end_of(side, twin, c), score_of(key[i]), &t); }
        else for (int alone = b - a == 1; a < b && t.n < t.want; a++) {   /* the only item of an ID that is kept is kept */
            i64 row = at(p, ROWS, a);
            if (alone || row_kept(p, row)) item(&t, row, score_of(key[i]));
        }
    }
    return t.n;
}
/* ==== rerank ==== */
typedef struct {
    const u8 *data, *more; const i64 *slot;            /* rows of two arrays; slot: where each row stands, or NULL */
    i64 first, half, views, width, k, patience;        /* rows of the first array; candidates in a row that may fail, 0: all */
    i64 *out; float *score;
} Vectors;
static inline float half_to_float(u16 h) {
    u32 sign = (u32)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023, u; float x;
    if (e == 0) { x = m * 5.9604644775390625e-8f; return sign ? -x : x; }
    u = sign | (e == 31 ? 255u << 23 : (e + 112) << 23) | m << 13;
    memcpy(&x, &u, 4); return x;
}
static float dot(const float *q, const void *v, i64 half, i64 D) {
    i64 d = 0; float sum = 0;
#ifdef __AVX512F__
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (; d + 64 <= D; d += 64) for (int j = 0; j < 4; j++) {
        i64 e = d + 16 * j;
        __m512 x = half ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const u16 *)v + e))) : _mm512_loadu_ps((const float *)v + e);
        s[j] = _mm512_fmadd_ps(x, _mm512_loadu_ps(q + e), s[j]);
    }
    sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
#else
    float lane[16] = {0};
    for (; d + 16 <= D; d += 16) for (int j = 0; j < 16; j++) lane[j] += q[d + j] * (half ? half_to_float(((const u16 *)v)[d + j]) : ((const float *)v)[d + j]);
    for (int j = 0; j < 16; j++) sum += lane[j];
#endif
    for (; d < D; d++) sum += q[d] * (half ? half_to_float(((const u16 *)v)[d]) : ((const float *)v)[d]);
    return sum;
}
static inline const u8 *vector_at(const Vectors *v, i64 row, i64 bytes) {
    i64 place = v->slot ? v->slot[row] : row;
    return place < v->first ? v->data + place * bytes : v->more + (place - v->first) * bytes;
}
static inline int before(u64 a, u64 b, const Part *side) {   /* keys of rows; equal scores by row, or as added items are ordered */
    if (!side || !side->order || (a ^ b) >> 32) return a < b;
    i64 x = a & 0xffffffff, y = b & 0xffffffff;
    return (x < side->old ? (u64)x << 32 | 0xffffffff : (u64)side->order[x - side->old]) < (y < side->old ? (u64)y << 32 | 0xffffffff : (u64)side->order[y - side->old]);
}
static void rise(u64 *heap, i64 i, u64 x, const Part *side) {   /* a heap with the last in rank on top */
    for (; i && before(heap[(i - 1) / 2], x, side); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = x;
}
static void sink(u64 *heap, i64 n, u64 x, const Part *side) {
    i64 i = 0;
    for (i64 c; (c = 2 * i + 1) < n; i = c) {
        c += c + 1 < n && before(heap[c], heap[c + 1], side);
        if (!before(x, heap[c], side)) break;
        heap[i] = heap[c];
    }
    heap[i] = x;
}
static void rerank(const Vectors *v, const Part *side, const float *q, const i64 *rows, i64 n, u64 *heap, i64 *out, float *score) {
    i64 bytes = v->views * v->width * (v->half ? 2 : 4), ask = bytes < 2048 ? bytes : 2048, m = 0, last = 0;
    enum {AHEAD = 12};
    for (i64 i = -AHEAD; i < n; i++) {
        if (i + AHEAD < n) {
            const u8 *x = vector_at(v, rows[i + AHEAD], bytes);
            for (i64 j = 0; j < ask; j += 64) __builtin_prefetch(x + j, 0, 2);
        }
        if (i < 0) continue;
        if (v->patience && m == v->k && i - last >= v->patience) break;
        const u8 *x = vector_at(v, rows[i], bytes);
        float best = -INFINITY;
        for (i64 w = 0; w < v->views; w++) { float s = dot(q, x + w * (bytes / v->views), v->half, v->width); best = s > best ? s : best; }
        u64 key = falling(best) | (u64)rows[i];
        if (m < v->k) rise(heap, m++, key, side);
        else if (before(key, heap[0], side)) sink(heap, m, key, side);
        else continue;
        last = i + 1;
    }
    for (i64 j = m; j < v->k; j++) { out[j] = -1; score[j] = -INFINITY; }
    while (m--) { out[m] = heap[0] & 0xffffffff; score[m] = score_of(heap[0]); sink(heap, m, heap[m], side); }
}
/* ==== search ==== */
static void *take(u8 **free, i64 bytes) { void *p = *free; *free += (bytes + 63) & ~63; return p; }
static Pool pool_of(u8 **free, i64 room) {
    Pool p = {.room = room};
    p.key = take(free, room * 2 + 64); p.id = take(free, room * 4 + 128); p.from = take(free, room * 4 + 128);
    return p;
}
i64 light_bytes(i64 S, i64 levels, i64 padded, i64 beam, i64 want) {   /* of scratch memory */
    i64 most = beam > want ? beam : want, nodes = beam * (levels + 1) + 1;
    return 8192 + (4 * TOGETHER + 2) * (S + 64) + 512 * levels + 512 + TOGETHER * padded + 20 * (4 * most + 1024) + 32 * (2 * most + 16) + 17 * nodes + 8 * (4 * want + 8) + 12 * want;
}
/* queries (n, D) -> leaves (n, want) with scores, or item rows (n, want) where `items`; or, with vectors, the nearest k of them to v->out, v->score */
void light_search(const Part *parts, i64 count, const Books *b, const float *queries, i64 n, i64 beam, i64 want, i64 items,
                  i64 *out, float *score, const Vectors *v, u8 *scratch) {
    i64 S = b->offsets[b->geometric], L = parts->levels, most = beam > want ? beam : want, slots = 2, several = 0, once = count > 1 && parts[1].twins;
    for (i64 c = 0; c < count; c++) several |= parts[c].several;
    once |= several;
    while (slots < 2 * want + 2) slots *= 2;
    u8 *free = (u8 *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    float *tables = take(&free, 4 * TOGETHER * (S + 64)), floors[66];
    u16 *lut = take(&free, 2 * (S + 64)), *acc = take(&free, 2 * BLOCK); u8 *planes = take(&free, 512 * L); int8_t *q8 = take(&free, TOGETHER * b->padded);
    Pool kids = pool_of(&free, 4 * beam + 512), found = pool_of(&free, 4 * most + 1024);
    i64 nodes = beam * (L + 1) + 1, keys = 2 * most + 16, need = items && several ? most : want;
    Front f = {take(&free, 4 * nodes), take(&free, 4 * nodes), take(&free, 4 * nodes), take(&free, 4 * nodes), take(&free, nodes), 0, 0};
    f.key = take(&free, 8 * keys); f.spare = take(&free, 8 * keys);
    u64 *found_keys = take(&free, 8 * keys); i64 *seen = once ? take(&free, 8 * slots) : 0, *own_rows = take(&free, 8 * want); float *own_score = take(&free, 4 * want);
    for (i64 i = 0; i < n; i++) {
        const float *q = queries + i * b->width, *table = tables + i % TOGETHER * (S + 64);
        i64 *rows = v ? own_rows : out + i * want; float *s = v ? own_score : score + i * want;
        if (i % TOGETHER == 0) table_of(b, q, n - i < TOGETHER ? n - i : TOGETHER, q8, tables, S + 64);
        Query at_hand = steps(b, table, lut, planes, acc);
        for (int d = 0; d < 66; d++) floors[d] = -INFINITY;
        i64 m = 0;
        for (i64 c = 0; c < count; c++) m += search_part(parts + c, b, &at_hand, &kids, &found, &f, beam, most, need, floors, c ? parts[0].leaves : 0, found_keys + m);
        sort_keys(found_keys, f.key, m);
        if (!items) { if (m > want) m = want; for (i64 j = 0; j < m; j++) { rows[j] = found_keys[j] & 0xffffffff; s[j] = score_of(found_keys[j]); } }
        else m = expand(parts, count, found_keys, m, (Items){rows, s, 0, want, seen, slots}, (i64 *)f.spare);
        if (v) rerank(v, count > 1 ? parts + 1 : 0, q, rows, m, f.key, v->out + i * v->k, v->score + i * v->k);
        else for (i64 j = m; j < want; j++) { rows[j] = -1; s[j] = -INFINITY; }
    }
}
void light_tables(const Books *b, const float *queries, i64 n, float *table, u8 *scratch) {   /* (n, S), with room for 64 more */
    i64 S = b->offsets[b->geometric];
    for (i64 i = 0; i < n; i++) table_of(b, queries + i * b->width, 1, (int8_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63), table + i * S, S);
}
