/* The loops of _sums.c for one set of instructions: LEVEL names it, BYTES is a register's size, TALL the number of rows
   of sums in registers. Vectors are extensions of the compiler, gcc or clang. */

#define LANES (BYTES / 4)

typedef float NAME(floats) __attribute__((vector_size(BYTES)));
typedef uint32_t NAME(words) __attribute__((vector_size(BYTES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(BYTES / 2)));
typedef double NAME(doubles) __attribute__((vector_size(BYTES)));
typedef uint64_t NAME(longs) __attribute__((vector_size(BYTES)));
typedef float NAME(few) __attribute__((vector_size(BYTES / 2)));
typedef uint32_t NAME(fewer) __attribute__((vector_size(BYTES / 2)));
#define floats NAME(floats)
#define words NAME(words)
#define halves NAME(halves)
#define doubles NAME(doubles)
#define longs NAME(longs)
#define few NAME(few)
#define few_words NAME(fewer)

TARGET INLINE int NAME(any)(words mask)
{
    uint64_t parts[BYTES / 8], all = 0;
    memcpy(parts, &mask, sizeof mask);
    for (int i = 0; i < BYTES / 8; i++)
        all |= parts[i];
    return all != 0;
}

TARGET INLINE words NAME(greater)(words one, words other)
{
    words mask = (words)((__typeof__((floats){0} > (floats){0}))one > (__typeof__((floats){0} > (floats){0}))other);
    return (one & mask) | (other & ~mask);
}

/* Return 16-bit weights as floats. */
TARGET INLINE floats NAME(widen)(enum kind kind, words bits)
{
    if (kind == BF16)
        return (floats)(bits << 16);
    return (floats)((bits & 0x7FFF) << 13 | (bits & 0x8000) << 16) * 0x1p112f; /* except infinity and NaN */
}

/* Return the bits of sums rounded to the nearest; set `doubt` where a tie lies within `twice` / 2 of the sum. */
TARGET INLINE words NAME(narrow)(enum kind kind, floats sum, floats twice, words *doubt)
{
    words bits = (words)sum, sign = bits & 0x80000000, size = bits ^ sign;
    floats middle, unit, magic, near, far;
    if (kind == BF16) {
        middle = (floats)((bits & 0xFFFF0000) | 0x8000);
        far = (floats)((words)(sum - middle) & 0x7FFFFFFF);
        *doubt = (words) ~(far > twice);
        return (bits + 0x8000) >> 16;
    }
    unit = (floats)NAME(greater)(size & 0x7F800000, (words){0} + (113u << 23)); /* a power of 2; subnormals share one */
    magic = unit * 0x1.8p13f;
    near = ((floats)size + magic) - magic;
    far = (floats)((words)((floats)size - near) & 0x7FFFFFFF);
    *doubt = (words) ~(unit * 0x1p-11f - far > twice) | (words) ~((floats)size > twice); /* the latter for the sign */
    size = (words)near;
    size ^= (size ^ 0x47800000) & (words)(near > 65536.0f); /* to infinity */
    return (words)((floats)size * 0x1p-112f) >> 13 | sign >> 16;
}

/* Return the bits of doubles rounded once to a dtype of 16 bits, except NaN. */
TARGET INLINE few_words NAME(rounded)(enum kind kind, doubles x)
{
    longs size = (longs)x & 0x7FFFFFFFFFFFFFFF, least = (longs)((doubles){0} + LEAST(kind)), unit = size, small;
    few_words sign = __builtin_convertvector((longs)x >> 48 & 0x8000, few_words);
    doubles magic, near;
    few close;
    small = (longs)((doubles)size < (doubles)least);
    unit = ((unit & ~small) | (least & small)) & 0x7FF0000000000000;
    magic = (doubles)unit * MAGIC(kind);
    near = ((doubles)size + magic) - magic;
    if (kind == BF16)
        return (few_words)FLOATS_OF(near) >> 16 | sign;
    small = (longs)(near < 0x1p16);
    near = (doubles)(((longs)near & small) | ((longs)((doubles){0} + 0x1p16) & ~small));
    close = FLOATS_OF(near) * 0x1p-112f;
    return (few_words)close >> 13 | sign;
}

/* Return 16-bit sums computed in double for one register of weights at `old`, used only where in doubt. */
TARGET static __attribute__((noinline)) words NAME(again)(struct sums *s, enum kind kind, int64_t row, int64_t column,
                                                          const char *old, words result, words doubt)
{
    const float *a = s->panels + column / PANEL * PANEL * s->rank + column % PANEL, *norms = s->norms + column;
    const double *b = s->wide_b + row * s->rank;
    double reach = s->wide_reach[row], unit = reach > 0 ? 0x1.08p-52 : 0, least = reach > 0 ? 0x1p-1000 : 0;
    uint32_t left[LANES];
    halves short_bits;
    few weights[2], norm[2], part[4];
    few_words low, high[2], unsure[2];
    words bits, sure;
    floats wide;
    doubles total[4] = {{0}, {0}, {0}, {0}};
    int64_t k = 0;
    memcpy(&short_bits, old, sizeof short_bits);
    bits = WORDS_OF(short_bits);
    wide = NAME(widen)(kind, bits);
    memcpy(weights, &wide, sizeof weights);
    memcpy(norm, norms, sizeof norm);
    for (; k + 1 < s->rank; k += 2) {
        memcpy(part, a + k * PANEL, sizeof part / 2);
        memcpy(part + 2, a + (k + 1) * PANEL, sizeof part / 2);
        for (int i = 0; i < 4; i++)
            total[i] += b[k + i / 2] * DOUBLES_OF(part[i]);
    }
    if (k < s->rank) {
        memcpy(part, a + k * PANEL, sizeof part / 2);
        for (int i = 0; i < 2; i++)
            total[i] += b[k] * DOUBLES_OF(part[i]);
    }
    for (int h = 0; h < 2; h++) {
        doubles sum = DOUBLES_OF(weights[h]) + (total[h] + total[h + 2]), error;
        error = (doubles)((longs)sum & 0x7FFFFFFFFFFFFFFF) * unit + least;
        error += DOUBLES_OF(norm[h]) * reach;
        low = NAME(rounded)(kind, sum - error), high[h] = NAME(rounded)(kind, sum + error);
        unsure[h] = (low ^ high[h]) | __builtin_convertvector((longs) ~(error < LARGE), few_words); /* also NaN */
    }
    memcpy(&sure, high, sizeof sure);
    result = (sure & doubt) | (result & ~doubt);
    memcpy(&bits, unsure, sizeof bits);
    memcpy(&short_bits, old, sizeof short_bits);
    bits |= (words)((WORDS_OF(short_bits) & SPECIAL(kind)) == SPECIAL(kind));
    bits &= doubt;
    if (NAME(any)(bits)) {
        uint32_t values[LANES];
        memcpy(left, &bits, sizeof left);
        memcpy(values, &result, sizeof values);
        for (int i = 0; i < LANES && column + i < s->columns; i++)
            if (left[i])
                values[i] = decide(s, kind, row, column + i);
        memcpy(&result, values, sizeof values);
    }
    return result;
}

/* Write the sums of `tall` rows of one panel: 16-bit weights at `old` to `out`. */
TARGET INLINE void NAME(tile)(struct sums *s, enum kind kind, int tall, int64_t row, int64_t panel, const char *old,
                              int64_t old_stride, char *out, int64_t out_stride, words *largest)
{
    const float *a = s->panels + panel * PANEL * s->rank, *b = s->b + row * s->rank;
    const float *norms = s->norms + panel * PANEL;
    int64_t rank = s->rank;
    for (int at = 0; at < PANEL; at += 2 * LANES) {
        floats total[TALL][2];
        words result[TALL][2], doubt[TALL][2], doubts = {0};
        for (int r = 0; r < tall; r++)
            total[r][0] = total[r][1] = (floats){0};
        for (int64_t first = 0; first < rank; first += CHUNK) {
            int64_t last = first + CHUNK < rank ? first + CHUNK : rank;
            floats part[TALL][2];
            for (int r = 0; r < tall; r++)
                part[r][0] = part[r][1] = (floats){0};
            for (int64_t k = first; k < last; k++) {
                floats left, right;
                memcpy(&left, a + k * PANEL + at, BYTES);
                memcpy(&right, a + k * PANEL + at + LANES, BYTES);
                for (int r = 0; r < tall; r++) {
                    part[r][0] += b[r * rank + k] * left;
                    part[r][1] += b[r * rank + k] * right;
                }
            }
            for (int r = 0; r < tall; r++)
                total[r][0] += part[r][0], total[r][1] += part[r][1];
        }
        for (int r = 0; r < tall; r++)
            for (int v = 0; v < 2; v++) {
                halves short_bits;
                words bits;
                floats norm, sum, twice;
                memcpy(&short_bits, old + r * old_stride + 2 * (at + v * LANES), sizeof short_bits);
                memcpy(&norm, norms + at + v * LANES, BYTES);
                bits = WORDS_OF(short_bits);
                sum = NAME(widen)(kind, bits) + total[r][v];
                /* the smallest term covers underflow and the sign of 0 */
                twice = norm * s->reach[row + r] + (floats)((words)sum & 0x7FFFFFFF) * 0x1.04p-23f;
                twice += s->reach[row + r] > 0 ? (kind == BF16 ? 0x1p-132f : 0x1p-120f) : 0.0f;
                result[r][v] = NAME(narrow)(kind, sum, twice, &doubt[r][v]);
                if (kind == F16)
                    doubt[r][v] |= (words)((bits & 0x7C00) == 0x7C00);
                doubts |= doubt[r][v];
            }
        if (__builtin_expect(NAME(any)(doubts), 0))
            for (int r = 0; r < tall; r++)
                for (int v = 0; v < 2; v++)
                    if (NAME(any)(doubt[r][v]))
                        result[r][v] = NAME(again)(s, kind, row + r, panel * PANEL + at + v * LANES,
                                                   old + r * old_stride + 2 * (at + v * LANES), result[r][v], doubt[r][v]);
        for (int r = 0; r < tall; r++)
            for (int v = 0; v < 2; v++) {
                halves short_bits = HALVES_OF(result[r][v]);
                memcpy(out + r * out_stride + 2 * (at + v * LANES), &short_bits, sizeof short_bits);
                *largest = NAME(greater)(*largest, result[r][v] & 0x7FFF);
            }
    }
}

/* Write the same for weights of float32, with sums in double. */
TARGET INLINE void NAME(wide_tile)(struct sums *s, int tall, int64_t row, int64_t panel, const char *old,
                                   int64_t old_stride, char *out, int64_t out_stride, words *largest)
{
    const float *a = s->panels + panel * PANEL * s->rank, *norms = s->norms + panel * PANEL;
    const double *b = s->wide_b + row * s->rank;
    int64_t rank = s->rank;
    few_words most = {0};
    for (int at = 0; at < PANEL; at += LANES) {
        doubles total[TALL][2];
        few high[TALL][2];
        few_words doubt[TALL][2], doubts = {0};
        uint32_t pair[LANES];
        words all_doubts;
        for (int r = 0; r < tall; r++)
            total[r][0] = total[r][1] = (doubles){0};
        for (int64_t k = 0; k < rank; k++) {
            few left, right;
            memcpy(&left, a + k * PANEL + at, sizeof left);
            memcpy(&right, a + k * PANEL + at + LANES / 2, sizeof right);
            for (int r = 0; r < tall; r++) {
                total[r][0] += b[r * rank + k] * DOUBLES_OF(left);
                total[r][1] += b[r * rank + k] * DOUBLES_OF(right);
            }
        }
        for (int r = 0; r < tall; r++)
            for (int v = 0; v < 2; v++) {
                double reach = s->wide_reach[row + r], unit = reach > 0 ? 0x1.08p-52 : 0, least = reach > 0 ? 0x1p-1000 : 0;
                few weights, norm, low;
                doubles sum, error;
                memcpy(&weights, old + r * old_stride + 4 * (at + v * LANES / 2), sizeof weights);
                memcpy(&norm, norms + at + v * LANES / 2, sizeof norm);
                sum = DOUBLES_OF(weights) + total[r][v];
                error = (doubles)((longs)sum & 0x7FFFFFFFFFFFFFFF) * unit + least;
                error += DOUBLES_OF(norm) * reach;
                low = FLOATS_OF(sum - error), high[r][v] = FLOATS_OF(sum + error);
                doubt[r][v] = (few_words)low ^ (few_words)high[r][v];
                doubt[r][v] |= (few_words)(((few_words)high[r][v] & 0x7FFFFFFF) >= 0x7F800000);
                doubts |= doubt[r][v];
            }
        memcpy(&pair[0], &doubts, sizeof doubts);
        memcpy(&pair[LANES / 2], &doubts, sizeof doubts);
        memcpy(&all_doubts, pair, sizeof pair);
        if (__builtin_expect(NAME(any)(all_doubts), 0)) {
            uint32_t values[TALL][LANES], mask[TALL][LANES];
            memcpy(values, high, sizeof values);
            memcpy(mask, doubt, sizeof mask);
            for (int r = 0; r < tall; r++)
                for (int i = 0; i < LANES && panel * PANEL + at + i < s->columns; i++)
                    if (mask[r][i])
                        values[r][i] = decide(s, F32, row + r, panel * PANEL + at + i);
            memcpy(high, values, sizeof values);
        }
        for (int r = 0; r < tall; r++)
            for (int v = 0; v < 2; v++) {
                memcpy(out + r * out_stride + 4 * (at + v * LANES / 2), &high[r][v], sizeof high[r][v]);
                few_words size = (few_words)high[r][v] & 0x7FFFFFFF, less = (few_words)(most < size);
                most = (size & less) | (most & ~less);
            }
    }
    for (int i = 0; i < LANES / 2; i++)
        (*largest)[i] = most[i] > (*largest)[i] ? most[i] : (*largest)[i];
}

/* Write `tall` rows of one panel, which may extend beyond the last column. */
TARGET INLINE void NAME(panel)(struct sums *s, enum kind kind, int tall, int64_t row, int64_t panel, words *largest)
{
    int width = kind == F32 ? 4 : 2;
    int64_t left = s->columns - panel * PANEL, at = panel * PANEL * width;
    const char *old = s->old + row * s->old_stride + at;
    char *out = s->out + row * s->out_stride + at;
    char from[TALL][PANEL * 4], to[TALL][PANEL * 4];
    int64_t from_stride = s->old_stride, to_stride = s->out_stride;
    if (left < PANEL) {
        memset(from, 0, sizeof from);
        for (int r = 0; r < tall; r++)
            memcpy(from[r], old + r * s->old_stride, left * width);
        old = from[0], out = to[0], from_stride = to_stride = sizeof from[0];
    }
    if (kind == F32)
        NAME(wide_tile)(s, tall, row, panel, old, from_stride, out, to_stride, largest);
    else
        NAME(tile)(s, kind, tall, row, panel, old, from_stride, out, to_stride, largest);
    if (left < PANEL)
        for (int r = 0; r < tall; r++)
            memcpy(s->out + (row + r) * s->out_stride + at, to[r], left * width);
}

TARGET INLINE void NAME(all)(struct sums *s, enum kind kind)
{
    int64_t panels = (s->columns + PANEL - 1) / PANEL, step = CACHE / (4 * PANEL * (s->rank + 1));
    words largest = {0};
    step = step > 0 ? step : 1;
    for (int64_t first = 0; first < panels; first += step) {
        int64_t last = first + step < panels ? first + step : panels, row = 0;
        for (; row + TALL <= s->rows; row += TALL)
            for (int64_t panel = first; panel < last; panel++)
                NAME(panel)(s, kind, TALL, row, panel, &largest);
        for (; row < s->rows; row++)
            for (int64_t panel = first; panel < last; panel++)
                NAME(panel)(s, kind, 1, row, panel, &largest);
    }
    for (int i = 0; i < LANES; i++)
        note(s, largest[i]);
}

TARGET static void NAME(add)(struct sums *s, enum kind kind)
{
    if (kind == BF16)
        NAME(all)(s, BF16);
    else if (kind == F16)
        NAME(all)(s, F16);
    else
        NAME(all)(s, F32);
}

#undef floats
#undef words
#undef halves
#undef doubles
#undef longs
#undef few
#undef few_words
#undef LANES
#undef LEVEL
#undef TARGET
#undef BYTES
#undef TALL
