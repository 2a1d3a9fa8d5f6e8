// Vectors as wide as the machine's registers, in GCC's and Clang's own terms.
// native.py compiles this file, grouped_gemm.cpp and gate.cpp as one text.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int V = 16;  // floats in a register
constexpr int N = 4;   // a tile: 6 rows of N vectors, here 24 of 32 registers
#elif defined(__AVX2__)
constexpr int V = 8;
constexpr int N = 2;  // 12 of 16
#else
constexpr int V = 4;
constexpr int N = 4;
#endif
typedef float vec __attribute__((vector_size(4 * V)));

static inline vec load(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

// Past the caches, for what is not read again soon: memory is written without being read first.
static inline void stream(float* p, vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
static inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
