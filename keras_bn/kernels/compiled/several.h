/* Whether the passes are compiled for several generations of processors: where a file can say for
   which it is, in the way of GCC. */

#if defined(__x86_64__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(ONE_GENERATION)
#define SEVERAL_GENERATIONS
#endif
