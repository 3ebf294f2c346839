#ifndef EACH_STRETCH
#define EACH_STRETCH(from, count, n)                                                                          \
    for (int64_t from = 0, count = n < STRETCH ? n : STRETCH; from < n;                                       \
         from += count, count = n - from < STRETCH ? n - from : STRETCH)
#endif

/*
 * The stored types and the types to compute in: included once per dtype, with DTYPE set.
 * LOAD and STORE
 * convert. Sums run in PARTIAL over a STRETCH of elements at most, and in double from there on.
 */
#if DTYPE == F32
#define STORED float
#define REAL float
#define SUFFIX f32
#define LOAD(x) (x)
#define STORE(x) (x)
#define ROOT sqrtf
#define PARTIAL double
#define STRETCH n
#elif DTYPE == F64
#define STORED double
#define REAL double
#define SUFFIX f64
#define LOAD(x) (x)
#define STORE(x) (x)
#define ROOT sqrt
#define PARTIAL double
#define STRETCH n
#else
#define STORED uint16_t
#define REAL float
#define SUFFIX bf16
#define LOAD(x) bf16_to_float(x)
#define STORE(x) float_to_bf16(x)
#define ROOT sqrtf
/* Of numbers with 8 bits, a float holds a stretch's sum in each lane all but exactly; doubles would cost twice. */
#define PARTIAL float
#define STRETCH 2048
#endif
