// Vectors as wide as the machine's registers, in GCC's and Clang's own terms.
// native.py compiles this file, grouped_gemm.cpp and gate.cpp as one text.

// Few headers: reading them takes as long as compiling the rest.
#include <cstdint>
#include <cstring>
#include <vector>

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
#if defined(__clang__)
  __builtin_nontemporal_store(x, reinterpret_cast<vec*>(p));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(p, x);
#elif defined(__AVX2__)
  __builtin_ia32_movntps256(p, x);
#else
  store(p, x);
#endif
}
static inline void finish_streams() {
#if defined(__SSE__)
  __builtin_ia32_sfence();
#endif
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
