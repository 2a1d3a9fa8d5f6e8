// Vectors as wide as the machine's registers, in GCC's and Clang's own terms, and the numbers that lie in memory.
// native.py compiles this file, routing.cpp, grouped_gemm.cpp and gate.cpp as one text for each type of number: f32, or what
// BFLOAT16 or FLOAT16 say.  Sums are f32; a number is rounded once, to nearest even, when it is stored.

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
constexpr int C = 8;  // vectors of a row at a time, where rows are passed through
typedef float vec __attribute__((vector_size(4 * V)));
typedef uint32_t bits __attribute__((vector_size(4 * V)));
typedef uint16_t halves __attribute__((vector_size(2 * V)));

template <typename X, typename P>
static inline X read(const P* p) {
  X x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline vec load(const float* p) { return read<vec>(p); }
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

// -- the numbers ----------------------------------------------------------------------------

#if defined(BFLOAT16) || defined(FLOAT16)
constexpr bool NARROW = true;
struct number {
  uint16_t bits;
};

static inline vec widen(halves x) {
#if defined(BFLOAT16)
  return (vec)(__builtin_convertvector(x, bits) << 16);
#elif defined(__AVX512F__) || defined(__F16C__)
  vec y;
  asm("vcvtph2ps %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
#error "no instructions for float16"
#endif
}

static inline halves narrow(vec x) {
#if defined(FLOAT16)
  halves y;
  asm("vcvtps2ph $0, %1, %0" : "=v"(y) : "v"(x));
  return y;
#elif defined(__AVX512BF16__)
  halves y;
  asm("vcvtneps2bf16 %1, %0" : "=v"(y) : "v"(x));
  return y;
#else
  const bits b = (bits)x, rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : b >> 16 | 0x40, halves);
#endif
}

static inline vec load(const number* p) { return widen(read<halves>(p)); }
static inline void store(number* p, vec x) {
  const halves y = narrow(x);
  std::memcpy(p, &y, sizeof y);
}
static inline void stream(number* p, vec x) {
#if defined(__clang__)
  __builtin_nontemporal_store(narrow(x), reinterpret_cast<halves*>(p));
#elif defined(__AVX512F__)
  typedef float half_vec __attribute__((vector_size(2 * V)));
  __builtin_ia32_movntps256(reinterpret_cast<float*>(p), (half_vec)narrow(x));
#else
  store(p, x);
#endif
}
#else
constexpr bool NARROW = false;
typedef float number;
#endif

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of a vector's numbers, others zero.
template <typename X, typename P>
static inline X read(const P* p, int64_t count) {
  X x{};
  std::memcpy(&x, p, least(count, sizeof x / sizeof(P)) * sizeof(P));
  return x;
}
static inline vec load(const float* p, int64_t count) { return count >= V ? load(p) : read<vec>(p, count); }
static inline void store(float* p, vec x, int64_t count) { std::memcpy(p, &x, least(count, V) * sizeof(float)); }
#if defined(BFLOAT16) || defined(FLOAT16)
static inline vec load(const number* p, int64_t count) {
  return count >= V ? load(p) : widen(read<halves>(p, count));
}
static inline void store(number* p, vec x, int64_t count) {
  const halves y = narrow(x);
  std::memcpy(p, &y, least(count, V) * sizeof(number));
}
#endif
