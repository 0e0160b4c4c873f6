/* The floating-point peak of one core: independent multiply-adds on registers and nothing else.
 *
 * Compiled by compare.py with the flags of one instruction set and VECTOR_BYTES = 16, 32 or 64. Twelve chains hide
 * the latency of four to five cycles on two pipes and, with the two constants, fit sixteen registers.
 */
typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
enum { CHAINS = 12 };

/* Does `steps` steps and returns the floating-point operations that they took, two per multiply-add and lane. */
double fma_peak(long steps, float *sink)
{
    const vec a = (vec){0} + 0.999f, b = (vec){0} + 0.001f;
    /* from different values, or the compiler makes one chain of all */
    vec c0 = b, c1 = 2 * b, c2 = 3 * b, c3 = 4 * b, c4 = 5 * b, c5 = 6 * b;
    vec c6 = 7 * b, c7 = 8 * b, c8 = 9 * b, c9 = 10 * b, c10 = 11 * b, c11 = 12 * b;
    for (long i = 0; i < steps; i++) {
        c0 = c0 * a + b, c1 = c1 * a + b, c2 = c2 * a + b, c3 = c3 * a + b;
        c4 = c4 * a + b, c5 = c5 * a + b, c6 = c6 * a + b, c7 = c7 * a + b;
        c8 = c8 * a + b, c9 = c9 * a + b, c10 = c10 * a + b, c11 = c11 * a + b;
    }
    c0 += c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9 + c10 + c11;
    *sink = c0[0];
    return 2.0 * CHAINS * (VECTOR_BYTES / sizeof(float)) * (double)steps;
}
