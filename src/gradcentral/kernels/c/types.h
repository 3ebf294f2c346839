/*
 * The stored types and the types to compute in: included once per dtype, with DTYPE set.
 * LOAD and STORE convert.
 */
#if DTYPE == F32
#define STORED float
#define REAL float
#define SUFFIX f32
#define LOAD(x) (x)
#define STORE(x) (x)
#define ROOT sqrtf
#elif DTYPE == F64
#define STORED double
#define REAL double
#define SUFFIX f64
#define LOAD(x) (x)
#define STORE(x) (x)
#define ROOT sqrt
#else
#define STORED uint16_t
#define REAL float
#define SUFFIX bf16
#define LOAD(x) bf16_to_float(x)
#define STORE(x) float_to_bf16(x)
#define ROOT sqrtf
#endif
