/* W + Δ, each sum rounded once to the weight's dtype: the computation of passes.py, in one pass over the weights.

   Δ = b @ a, where b (rows, rank) is already scaled. Weights of 16 bits are first summed in float, with a bound of the
   error. Where a tie of the dtype lies within the bound, the sum is computed again in double, with its own bound. Where
   that does not decide either, the element is returned to Python, which computes it exactly. So the written value is
   the exact sum rounded once, ties to even, for any instructions and any order of the terms. Weights of float32 start
   with the sums in double. Nothing here allocates or uses Python's objects: kernel.py checks all arguments. */

#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 || defined(__FAST_MATH__)
#error "the bounds hold for IEEE arithmetic without excess precision"
#endif

#define VERSION 1 /* of `struct sums`; kernel.py accepts no other */
#define PANEL 32  /* adjacent columns of A */
#define CHUNK 8   /* terms summed separately: halves the bound at common ranks, and more above */
#define CACHE (256 << 10) /* bytes of A that stay in the second-level cache */
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#define LARGE 0x1p960 /* above every finite sum: sums.py checks that */

enum kind { BF16, F16, F32 };

#define LEAST(kind) ((kind) == BF16 ? 0x1p-126 : 0x1p-14) /* normal number */
#define MAGIC(kind) ((kind) == BF16 ? 0x1.8p45 : 0x1.8p42) /* 2^52 over the number of steps in a power of 2, and half */
#define SPECIAL(kind) ((kind) == BF16 ? 0x7F80 : 0x7C00)   /* bits that infinity and NaN share */

struct sums {
    const char *old; /* (rows, columns) weights; rows are old_stride bytes apart */
    char *out;
    int64_t old_stride, out_stride;
    int64_t rows, columns, rank;
    const float *panels; /* A (columns / PANEL rounded up, rank, PANEL), 0 beyond the last column */
    const float *norms;  /* upper bounds for A's columns; 0 beyond the last */
    const float *b, *reach;            /* (rows, rank); (rows,) twice the bound of float's error over a column's norm */
    const double *wide_b, *wide_reach; /* the same for double, with the bound once */
    int64_t *doubtful;   /* memory for the flat indices of undecided elements */
    int64_t room, found; /* found > room: there are more */
    uint32_t largest;    /* bits of the largest absolute value written; above those of infinity for NaN */
};

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE double power_of_2(double x) /* the largest not above x */
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0x7FF0000000000000;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Return the bits of a double rounded once to the dtype, ties to even. */
static uint32_t rounded(enum kind kind, double x)
{
    double size = __builtin_fabs(x), unit, magic, near = size;
    uint32_t sign = __builtin_signbit(x) ? 0x8000 : 0;
    if (kind == F32)
        return bits_of((float)x);
    if (x != x)
        return kind == BF16 ? 0x7FC0 : 0x7E00;
    if (size < LARGE) {
        unit = power_of_2(size > LEAST(kind) ? size : LEAST(kind));
        magic = unit * MAGIC(kind); /* so large that the sum's last bit has the value of the dtype's */
        near = (size + magic) - magic;
    }
    if (kind == BF16)
        return bits_of((float)near) >> 16 | sign;
    return bits_of((float)(near > 0x1p16 ? 0x1p16 : near) * 0x1p-112f) >> 13 | sign;
}

static double widened(enum kind kind, const char *at)
{
    uint32_t bits = 0, size;
    memcpy(&bits, at, kind == F32 ? 4 : 2);
    if (kind == F32)
        return float_of(bits);
    if (kind == BF16)
        return float_of(bits << 16);
    size = (bits & 0x7FFF) << 13;
    if (size >= 0x0F800000)
        size += 224u << 23; /* infinity and NaN */
    return (double)float_of(size | (bits & 0x8000) << 16) * 0x1p112;
}

/* Compute one element again in double; return its bits, or 0 where it is undecided. */
static uint32_t __attribute__((noinline)) decide(struct sums *s, enum kind kind, int64_t row, int64_t column)
{
    int width = kind == F32 ? 4 : 2;
    double old = widened(kind, s->old + row * s->old_stride + column * width), reach = s->wide_reach[row];
    const float *a = s->panels + column / PANEL * PANEL * s->rank + column % PANEL;
    const double *b = s->wide_b + row * s->rank;
    double even = 0, uneven = 0, sum, error;
    uint32_t low, high;
    int64_t k;
    if (!(__builtin_fabs(old) <= DBL_MAX))
        return rounded(kind, old);
    for (k = 0; k + 1 < s->rank; k += 2) {
        even += b[k] * (double)a[k * PANEL];
        uneven += b[k + 1] * (double)a[(k + 1) * PANEL];
    }
    if (k < s->rank)
        even += b[k] * (double)a[k * PANEL];
    sum = old + (even + uneven);
    error = reach > 0 ? reach * (double)s->norms[column] + __builtin_fabs(sum) * 0x1.08p-52 + 0x1p-1000 : 0;
    low = rounded(kind, sum - error), high = rounded(kind, sum + error);
    if (low == high)
        return high;
    if (s->found < s->room)
        s->doubtful[s->found] = row * s->columns + column;
    s->found++;
    return 0;
}

INLINE void note(struct sums *s, uint32_t size)
{
    s->largest = size > s->largest ? size : s->largest;
}

#define JOIN_(x, y) x##_##y
#define JOIN(x, y) JOIN_(x, y)
#define NAME(x) JOIN(x, LEVEL)

/* Conversions; not every compiler compiles them to one instruction. */
#if defined(__x86_64__)
#include <immintrin.h>

#define FLOATS_OF(x) (few) _mm512_cvtpd_ps((__m512d)(x))
#define DOUBLES_OF(x) (doubles) _mm512_cvtps_pd((__m256)(x))
#define WORDS_OF(x) (words) _mm512_cvtepu16_epi32((__m256i)(x))
#define HALVES_OF(x) (halves) _mm512_cvtepi32_epi16((__m512i)(x))
#define LEVEL avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define BYTES 64
#define TALL 6
#include "_sums_tile.h"

#undef FLOATS_OF
#undef DOUBLES_OF
#undef WORDS_OF
#undef HALVES_OF
#define FLOATS_OF(x) (few) _mm256_cvtpd_ps((__m256d)(x))
#define DOUBLES_OF(x) (doubles) _mm256_cvtps_pd((__m128)(x))
#define WORDS_OF(x) (words) _mm256_cvtepu16_epi32((__m128i)(x))
#define HALVES_OF(x) __builtin_convertvector(x, halves)
#define LEVEL avx2
#define TARGET __attribute__((target("avx2,fma")))
#define BYTES 32
#define TALL 2
#include "_sums_tile.h"

#undef FLOATS_OF
#undef DOUBLES_OF
#undef WORDS_OF
#undef HALVES_OF
#endif

#define FLOATS_OF(x) __builtin_convertvector(x, few)
#define DOUBLES_OF(x) __builtin_convertvector(x, doubles)
#define WORDS_OF(x) __builtin_convertvector(x, words)
#define HALVES_OF(x) __builtin_convertvector(x, halves)

#define LEVEL plain
#define TARGET
#define BYTES 16
#define TALL 2
#include "_sums_tile.h"

EXPORT int portllm_sums_version(void)
{
    return VERSION;
}

/* Return the level of this machine's instructions: 2 AVX-512, 1 AVX2 with FMA, 0 the common ones. */
EXPORT int portllm_sums_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

/* Write s->out, found and largest. `kind`: 0 bfloat16, 1 float16, 2 float32. */
EXPORT void portllm_sums_add(struct sums *s, int kind, int level)
{
    s->found = 0, s->largest = 0;
#if defined(__x86_64__)
    if (level == 2)
        add_avx512(s, (enum kind)kind);
    else if (level == 1)
        add_avx2(s, (enum kind)kind);
    else
#endif
        add_plain(s, (enum kind)kind);
    (void)level;
}
