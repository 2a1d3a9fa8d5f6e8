// Products of a ragged batch on a CPU: the rows of each expert with its own weight.
//
// The inner loop adds outer products, a column of A times a row of B, to a tile of the result in registers.  Rows of B
// are read where they lie if they are contiguous, as in both gradients.  Where B is stored transposed (weights as
// nn.Linear keeps them) a panel of its columns is laid out as rows first.  With some dozens of rows an expert, reading
// the weights takes as long as using them: so each is read once, front to back, and fetched while the panel before it
// is being multiplied.  With fewer rows than that laying out would take longer than either: squares of B are turned in
// registers and used at once.
//
// Numbers narrower than f32 are laid out as words in any case: as floats, or, where the machine multiplies pairs of bf16
// (AVX512_BF16), as pairs of neighbours along k.  Sums are f32 from the first k to the last, and rounded once.
//
// Every number of the result is one sum in the order of k: the same bits for any number of threads, and whatever the
// other rows are.  With pairs it is the order 1 0 3 2 ..., each product added with one rounding as ever, and denormal
// numbers count as zero: so machines with and without AVX512_BF16 differ in the last bit of a sum.
// vectors.h goes before this text.

constexpr int M = 6;
constexpr int PANEL = 64;         // columns laid out at a time: a multiple of V * N
constexpr int64_t LONGEST = 1024; // depth of a panel: it stays in the second cache
constexpr int64_t SHORTEST = NARROW ? 256 : 128; // of what is read where it lies, or laid out as rows
constexpr int FEW = V == 16 ? 10 : M; // rows that squares are turned for: their sums stay in registers beside a square
constexpr int LINE = 64;          // bytes
constexpr int64_t STRIP = 512;    // columns of narrow numbers laid out at a time

// -- words ----------------------------------------------------------------------------------

#if defined(BFLOAT16) && defined(__AVX512BF16__)
constexpr int STEP = 2;  // numbers in a word
typedef uint32_t word;
typedef bits words;
static inline words load_words(const number* p) { return read<words>(p); }
static inline words load_words(const number* p, int64_t count) { return read<words>(p, count); }
// Pairs of two rows' numbers; no second row: zeros.
static inline words pair_up(const number* p, const number* q, int64_t count) {
  const halves low = count >= V ? read<halves>(p) : read<halves>(p, count);
  const halves high = !q ? halves{} : count >= V ? read<halves>(q) : read<halves>(q, count);
  return __builtin_convertvector(low, bits) | __builtin_convertvector(high, bits) << 16;
}
static inline vec multiply_add(vec sum, words a, words b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#else
constexpr int STEP = 1;
typedef float word;
typedef vec words;
static inline words load_words(const number* p) { return load(p); }
static inline words load_words(const number* p, int64_t count) { return load(p, count); }
static inline words pair_up(const number* p, const number*, int64_t count) { return load(p, count); }
static inline vec multiply_add(vec sum, words a, words b) { return sum + a * b; }
#endif

// -- laying out -----------------------------------------------------------------------------

template <int... I>
static inline words pick(words a, words b) {  // elements I of the two, counted through
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  typedef int32_t index __attribute__((vector_size(4 * V)));
  return __builtin_shuffle(a, b, index{I...});
#endif
}

// In each quarter of the registers, transpose the 4 x 4 numbers of a, b, c, d.
static inline void transpose(words& a, words& b, words& c, words& d) {
  words p, q, r, s;
  if constexpr (V == 16) {
    p = pick<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b);
    q = pick<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b);
    r = pick<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(c, d);
    s = pick<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(c, d);
    a = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(p, r);
    b = pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(p, r);
    c = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(q, s);
    d = pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(q, s);
  } else if constexpr (V == 8) {
    p = pick<0, 8, 1, 9, 4, 12, 5, 13>(a, b);
    q = pick<2, 10, 3, 11, 6, 14, 7, 15>(a, b);
    r = pick<0, 8, 1, 9, 4, 12, 5, 13>(c, d);
    s = pick<2, 10, 3, 11, 6, 14, 7, 15>(c, d);
    a = pick<0, 1, 8, 9, 4, 5, 12, 13>(p, r);
    b = pick<2, 3, 10, 11, 6, 7, 14, 15>(p, r);
    c = pick<0, 1, 8, 9, 4, 5, 12, 13>(q, s);
    d = pick<2, 3, 10, 11, 6, 7, 14, 15>(q, s);
  } else {
    p = pick<0, 4, 1, 5>(a, b);
    q = pick<2, 6, 3, 7>(a, b);
    r = pick<0, 4, 1, 5>(c, d);
    s = pick<2, 6, 3, 7>(c, d);
    a = pick<0, 1, 4, 5>(p, r);
    b = pick<2, 3, 6, 7>(p, r);
    c = pick<0, 1, 4, 5>(q, s);
    d = pick<2, 3, 6, 7>(q, s);
  }
}

// Transpose V x V numbers.
static inline void transpose(words (&x)[V]) {
  for (int i = 0; i < V; i += 4) transpose(x[i], x[i + 1], x[i + 2], x[i + 3]);
  // now x[4 p + i] has in its quarter q what belongs into quarter p of x[4 q + i]
  if constexpr (V == 16) {
    for (int i = 0; i < 4; i++) {
      words &a = x[i], &b = x[4 + i], &c = x[8 + i], &d = x[12 + i];
      const words p = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b);
      const words q = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(c, d);
      const words r = pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
      const words s = pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(c, d);
      a = pick<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(p, q);
      b = pick<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(p, q);
      c = pick<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(r, s);
      d = pick<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(r, s);
    }
  } else if constexpr (V == 8) {
    for (int i = 0; i < 4; i++) {
      const words p = x[i];
      x[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(p, x[4 + i]);
      x[4 + i] = pick<4, 5, 6, 7, 12, 13, 14, 15>(p, x[4 + i]);
    }
  }
}

static int64_t words_of(int64_t numbers) { return (numbers + STEP - 1) / STEP; }
static int64_t in_vectors(int64_t columns) { return (columns + V - 1) / V * V; }

// to[k][j] = the word of from[j][STEP * k ...] for `columns` values of j and `depth` numbers of each
static void lay_out(int64_t columns, int64_t depth, const number* from, int64_t ld, word* to) {
  int64_t k = 0;
  for (; (k + V) * STEP <= depth; k += V) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      const number* p = from + j * ld + k * STEP;
      words row[4] = {load_words(p), load_words(p + ld), load_words(p + 2 * ld), load_words(p + 3 * ld)};
      transpose(row[0], row[1], row[2], row[3]);
      for (int i = 0; i < 4; i++)
        for (int q = 0; q < V / 4; q++)
          std::memcpy(to + (k + 4 * q + i) * PANEL + j, (const char*)&row[i] + 16 * q, 16);
    }
    for (; j < columns; j++) {
      const words row = load_words(from + j * ld + k * STEP);
      for (int i = 0; i < V; i++) to[(k + i) * PANEL + j] = row[i];
    }
  }
  for (int64_t j = 0, left = depth - k * STEP; left > 0 && j < columns; j++) {
    const words row = load_words(from + j * ld + k * STEP, left);
    for (int i = 0; i * STEP < left; i++) to[(k + i) * PANEL + j] = row[i];
  }
}

// to[k][j] = the word of from[STEP * k ...][j], the other way round; in whole vectors
static void lay_out_rows(int64_t columns, int64_t depth, const number* from, int64_t ld, word* to, int64_t ldto) {
  for (int64_t at = 0; at < depth; at += STEP, from += STEP * ld, to += ldto)
    for (int64_t j = 0; j < columns; j += V) {
      const words x = pair_up(from + j, at + 1 < depth ? from + ld + j : nullptr, columns - j);
      std::memcpy(to + j, &x, sizeof x);
    }
}

// to[i][k] = the word of from[i][STEP * k ...]
static void copy_words(int64_t rows, int64_t depth, const number* from, int64_t ld, word* to) {
  for (int64_t i = 0; i < rows; i++, from += ld)
    for (int64_t at = 0; at < depth; at += STEP * V) {
      const int64_t count = least(STEP * V, depth - at), size = words_of(count);
      const words x = count == STEP * V ? load_words(from + at) : load_words(from + at, count);
      std::memcpy(to, &x, size * sizeof(word));
      to += size;
    }
}

// -- one expert -----------------------------------------------------------------------------

// What is needed next, so many lines of it fetched with every step of the inner loop.
struct Ahead {
  const char *at, *stop;
  int64_t lines = 1;
};

// Lines to fetch a step for as much as a panel holds to be there once m rows were multiplied by one.
static int64_t lines_a_step(int64_t m) {
  const int64_t lines = N * V * int64_t(sizeof(word)) / LINE, tiles = (m + M - 1) / M;
  return lines > tiles ? (lines + tiles - 1) / tiles : 1;
}

// The word a[i, k] lies at p + i * row + k * column; row and column in bytes.
struct Matrix {
  const char* p;
  int64_t row, column;
};

// Where a result goes, and its sums until they are whole: the same place where numbers are floats.
struct Result {
  number* p;
  int64_t ld;
  float* sums;
  int64_t ldsums;
};

enum From { ZERO, SUMS, RESULT };  // what a product is added to
enum To { KEEP, STORE, STREAM };   // as a sum to be continued, or as numbers

// c [R, C * V] = (c +) sum over k of outer(a[:, k], b[k, :])
template <int R, int C>
static void tile(int64_t k, Matrix a, const word* b, int64_t ldb, Result c, From from, To to, Ahead& ahead) {
  if (to == STORE)
    for (int i = 0; i < R; i++)  // for writing
      for (int j = 0; j < C * V; j += LINE / int(sizeof(number))) __builtin_prefetch(c.p + i * c.ld + j, 1);
  const char* next = ahead.at;
  const int64_t line = ahead.at < ahead.stop ? LINE : 0;
  ahead.at += line * k * ahead.lines;
  vec sum[R][C] = {};
  if (from == SUMS)
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) sum[i][j] = load(c.sums + i * c.ldsums + j * V);
  else if (from == RESULT)
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) sum[i][j] = load(c.p + i * c.ld + j * V);
  for (int64_t at = 0; at < k; at++) {
    __builtin_prefetch(next, 0, 2);
    next += line;
    for (int64_t i = 1; i < ahead.lines; i++, next += line) __builtin_prefetch(next, 0, 2);
    words y[C];
    for (int j = 0; j < C; j++) y[j] = read<words>(b + at * ldb + j * V);
    for (int i = 0; i < R; i++) {
      const words x = words{} + read<word>(a.p + i * a.row + at * a.column);
      for (int j = 0; j < C; j++) sum[i][j] = multiply_add(sum[i][j], x, y[j]);
    }
  }
  if (to == KEEP) {
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) store(c.sums + i * c.ldsums + j * V, sum[i][j]);
  } else if (to == STREAM) {
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) stream(c.p + i * c.ld + j * V, sum[i][j]);
  } else {
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) store(c.p + i * c.ld + j * V, sum[i][j]);
  }
}

template <int C>
static void tile_of(int64_t m, int64_t k, Matrix a, const word* b, int64_t ldb, Result c, From from, To to,
                    Ahead& ahead) {
  static_assert(M == 6);
  switch (m) {
    case 1: return tile<1, C>(k, a, b, ldb, c, from, to, ahead);
    case 2: return tile<2, C>(k, a, b, ldb, c, from, to, ahead);
    case 3: return tile<3, C>(k, a, b, ldb, c, from, to, ahead);
    case 4: return tile<4, C>(k, a, b, ldb, c, from, to, ahead);
    case 5: return tile<5, C>(k, a, b, ldb, c, from, to, ahead);
    default: return tile<6, C>(k, a, b, ldb, c, from, to, ahead);
  }
}

// m rows, the last n < V columns
static void rest(int64_t m, int64_t n, int64_t k, Matrix a, const word* b, int64_t ldb, Result c, From from, To to) {
  for (int64_t i = 0; i < m; i++) {
    float* sums = c.sums + i * c.ldsums;
    vec sum = from == SUMS ? load(sums, n) : from == RESULT ? load(c.p + i * c.ld, n) : vec{};
    const char* x = a.p + i * a.row;
    for (int64_t at = 0; at < k; at++) {
      const word* y = b + at * ldb;  // whole vectors where they are laid out, and before the last rows' ends
      const bool whole = NARROW || (k - 1 - at) * ldb >= V - n;
      sum = multiply_add(sum, words{} + read<word>(x + at * a.column), whole ? read<words>(y) : read<words>(y, n));
    }
    to == KEEP ? store(sums, sum, n) : store(c.p + i * c.ld, sum, n);
  }
}

// C [m, n] = (C +) A [m, k] @ B [k, n], k in words
static void product(int64_t m, int64_t n, int64_t k, Matrix a, const word* b, int64_t ldb, Result c, From from, To to,
                    Ahead ahead) {
  for (int64_t i = 0; i < m; i += M, a.p += M * a.row, c.p += M * c.ld, c.sums += M * c.ldsums) {
    const int64_t rows = least(M, m - i);
    int64_t j = 0;
    const auto at = [&] { return Result{c.p + j, c.ld, c.sums + j, c.ldsums}; };
    for (; j + N * V <= n; j += N * V) tile_of<N>(rows, k, a, b + j, ldb, at(), from, to, ahead);
    for (; j + V <= n; j += V) tile_of<1>(rows, k, a, b + j, ldb, at(), from, to, ahead);
    if (j < n) rest(rows, n - j, k, a, b + j, ldb, at(), from, to);
  }
}

// A thread's own memory.
struct Scratch {
  std::vector<word> a, panel;
  std::vector<float> sums;

  // A result of m rows and n columns at p.
  Result result(number* p, int64_t ld, int64_t m, int64_t n) {
    if constexpr (NARROW) {
      sums.resize(m * n);
      return {p, ld, sums.data(), n};
    } else {
      return {p, ld, (float*)p, ld};
    }
  }
};

// C [m, n] = (C +) A [m, k] @ B [k, n], by blocks of k that stay in a near cache
static void product_plain(int64_t m, int64_t n, int64_t k, Matrix a, const number* b, int64_t ldb, number* c,
                          int64_t ldc, int64_t block, From first, To last, Scratch& scratch) {
  const int64_t strip = NARROW ? least(STRIP, n) : n;
  const int64_t ldp = in_vectors(strip);
  if (NARROW) scratch.panel.resize(words_of(least(block, k)) * ldp);
  for (int64_t j = 0; j == 0 || j < n; j += strip) {
    const int64_t columns = least(strip, n - j);
    const Result to = scratch.result(c + j, ldc, k > block ? m : 0, columns);
    for (int64_t at = 0; at == 0 || at < k; at += block) {
      const int64_t depth = least(block, k - at);
      const number *here = b + at * ldb + j, *next = here + block * ldb, *stop = columns < n ? next : next + block * ldb;
      const Matrix left{a.p + at / STEP * a.column, a.row, a.column};
      const From from = at ? SUMS : first;
      const To how = at + block < k ? KEEP : last;
      const Ahead ahead{(const char*)next, (const char*)stop};
      if constexpr (NARROW) {
        lay_out_rows(columns, depth, here, ldb, scratch.panel.data(), ldp);
        product(m, columns, words_of(depth), left, scratch.panel.data(), ldp, to, from, how, ahead);
      } else {
        product(m, columns, depth, left, (const word*)here, ldb, to, from, how, ahead);
      }
    }
  }
}

// C [m, n] = (C +) A [m, k] @ B [n, k].T
static void product_transposed(int64_t m, int64_t n, int64_t k, Matrix a, const number* b, int64_t ldb, number* c,
                               int64_t ldc, From first, Scratch& scratch) {
  constexpr int64_t DEPTH = LONGEST * STEP;
  scratch.panel.resize(least(LONGEST, words_of(k)) * PANEL);
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t columns = least(PANEL, n - j);
    const Result to = scratch.result(c + j, ldc, k > DEPTH ? m : 0, columns);
    for (int64_t at = 0; at == 0 || at < k; at += DEPTH) {
      const int64_t depth = least(DEPTH, k - at);
      const number* next = b + (j + PANEL) * ldb;
      lay_out(columns, depth, b + j * ldb + at, ldb, scratch.panel.data());
      product(m, columns, words_of(depth), {a.p + at / STEP * a.column, a.row, a.column}, scratch.panel.data(), PANEL,
              to, at ? SUMS : first, at + DEPTH < k ? KEEP : STORE,
              {(const char*)next, (const char*)(next + PANEL * ldb), lines_a_step(m)});
    }
  }
}

// C [R, n] = (C +) A [R, k] @ B [n, k].T, squares of V columns turned in registers and used at once
template <int R>
static void product_turned(int64_t n, int64_t k, Matrix a, const number* b, int64_t ldb, number* c, int64_t ldc,
                           From first) {
  const char* const stop = (const char*)(b + n * ldb);
  for (int64_t j = 0; j < n; j += V, b += V * ldb) {
    const int64_t columns = least(V, n - j);
    vec sum[R] = {};
    if (first == RESULT)
      for (int r = 0; r < R; r++) sum[r] = load(c + r * ldc + j, columns);
    for (int64_t at = 0; at < k; at += V * STEP) {
      const int64_t numbers = least(V * STEP, k - at), size = words_of(numbers);
      words x[V];
      for (int i = 0; i < V; i++) {
        const number* p = b + i * ldb + at;
        if (const char* next = (const char*)(p + V * ldb); next < stop) __builtin_prefetch(next, 0, 2);
        x[i] = i >= columns ? words{} : numbers == V * STEP ? load_words(p) : load_words(p, numbers);
      }
      transpose(x);
      const char* left = a.p + at / STEP * a.column;
      const auto use = [&](int i) {
        for (int r = 0; r < R; r++)
          sum[r] = multiply_add(sum[r], words{} + read<word>(left + r * a.row + i * a.column), x[i]);
      };
      if (size == V)
        for (int i = 0; i < V; i++) use(i);
      else
        for (int i = 0; i < size; i++) use(i);
    }
    for (int r = 0; r < R; r++) store(c + r * ldc + j, sum[r], columns);
  }
}

// C [m, n] = (C +) A [m, k] @ B [n, k].T for few rows
static void product_of_few(int64_t m, int64_t n, int64_t k, Matrix a, const number* b, int64_t ldb, number* c,
                           int64_t ldc, From first) {
  static_assert(FEW <= 10);
  switch (m) {
    case 1: return product_turned<1>(n, k, a, b, ldb, c, ldc, first);
    case 2: return product_turned<2>(n, k, a, b, ldb, c, ldc, first);
    case 3: return product_turned<3>(n, k, a, b, ldb, c, ldc, first);
    case 4: return product_turned<4>(n, k, a, b, ldb, c, ldc, first);
    case 5: return product_turned<5>(n, k, a, b, ldb, c, ldc, first);
    case 6: return product_turned<6>(n, k, a, b, ldb, c, ldc, first);
    case 7: return product_turned<7>(n, k, a, b, ldb, c, ldc, first);
    case 8: return product_turned<8>(n, k, a, b, ldb, c, ldc, first);
    case 9: return product_turned<9>(n, k, a, b, ldb, c, ldc, first);
    case 10: return product_turned<10>(n, k, a, b, ldb, c, ldc, first);
  }
}

// -- all experts ----------------------------------------------------------------------------

struct Task {
  int64_t expert, row, rows;  // rows of the batch
  int64_t start, stop;        // and columns (forward) or rows (weight gradient) of the result
};

template <typename F>
static void run(const std::vector<Task>& tasks, int threads, F&& work) {
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < int64_t(tasks.size()); i++) work(tasks[i], scratch);
    finish_streams();
  }
}

// y [R, f] = x [R, d] @ w[e].T, or y += if `add`; ldx and ldy are the strides of their rows.
// A weight is stored [f, d] with row stride ldw, or [d, f] if `transposed`.
// Rows behind the last offset become zeros, or stay if `add`.
extern "C" void grouped_gemm(const number* x, int64_t ldx, const number* const* w, int64_t ldw, int transposed,
                             const int32_t* offsets, int64_t experts, number* y, int64_t ldy, int64_t rows, int64_t f,
                             int64_t d, int add, int threads) {
  constexpr int64_t BLOCK = 40 * M;
  const From first = add ? RESULT : ZERO;
  const bool in_place = !NARROW || (STEP == 2 && d % 2 == 0);
  std::vector<Task> tasks;
  int64_t row = 0;
  for (int64_t e = 0; e < experts; e++)
    for (; row < offsets[e]; row = least(row + BLOCK, offsets[e]))
      tasks.push_back({e, row, least(BLOCK, offsets[e] - row), 0, f});
  const int64_t parts = tasks.empty() ? 0 : 4 * threads / int64_t(tasks.size());
  if (parts > 1 && f > PANEL) {  // few tasks: their columns are shared out
    const int64_t wide = (f / parts + PANEL) / PANEL * PANEL;
    std::vector<Task> finer;
    for (const Task& t : tasks)
      for (int64_t j = 0; j < f; j += wide) finer.push_back({t.expert, t.row, t.rows, j, least(f, j + wide)});
    tasks.swap(finer);
  }
  run(tasks, threads, [&](const Task& t, Scratch& scratch) {
    Matrix a{(const char*)(x + t.row * ldx), ldx * int64_t(sizeof(number)), sizeof(word)};
    if (!in_place) {
      scratch.a.resize(t.rows * words_of(d));
      copy_words(t.rows, d, x + t.row * ldx, ldx, scratch.a.data());
      a = {(const char*)scratch.a.data(), words_of(d) * int64_t(sizeof(word)), sizeof(word)};
    }
    const number* b = w[t.expert];
    number* c = y + t.row * ldy + t.start;
    if (transposed)
      product_plain(t.rows, t.stop - t.start, d, a, b + t.start, ldw, c, ldy, SHORTEST * STEP, first, STORE, scratch);
    else if (t.rows <= FEW)
      product_of_few(t.rows, t.stop - t.start, d, a, b + t.start * ldw, ldw, c, ldy, first);
    else
      product_transposed(t.rows, t.stop - t.start, d, a, b + t.start * ldw, ldw, c, ldy, first, scratch);
  });
  if (!add)
    for (; row < rows; row++) std::memset(y + row * ldy, 0, f * sizeof(number));
}

// dw [E, f, d]: dw[e] = dy[rows of e].T @ x[rows of e]; zeros for an expert without rows.
// ldy and ldx are the strides of rows.
extern "C" void grouped_gemm_dw(const number* dy, int64_t ldy, const number* x, int64_t ldx, const int32_t* offsets,
                                int64_t experts, number* dw, int64_t f, int64_t d, int threads) {
  constexpr int64_t DEPTH = NARROW ? 512 : 256, LARGE = 8 << 20, SIZE = sizeof(number);
  // Narrow rows of x are laid out once a task: fewer, longer tasks, if there are enough of them.
  int64_t block = (NARROW ? 40 : 10) * M;
  while (block > 10 * M && experts * ((f + block - 1) / block) < 8 * threads) block -= 10 * M;
  const bool aligned = d * SIZE % LINE == 0 && reinterpret_cast<uintptr_t>(dw) % LINE == 0;
  const bool large = experts * f * d * SIZE >= LARGE;
  std::vector<Task> tasks;
  for (int64_t e = 0, row = 0; e < experts; row = offsets[e], e++)
    for (int64_t i = 0; i < f; i += block) tasks.push_back({e, row, offsets[e] - row, i, least(f, i + block)});
  run(tasks, threads, [&](const Task& t, Scratch& scratch) {
    number* c = dw + (t.expert * f + t.start) * d;
    const number* left = dy + t.row * ldy + t.start;
    const int64_t m = t.stop - t.start;
    if (!t.rows) {
      std::memset(c, 0, m * d * SIZE);
      return;
    }
    Matrix a{(const char*)left, SIZE, ldy * SIZE};
    if (NARROW) {
      const int64_t lda = in_vectors(m);
      scratch.a.resize(words_of(t.rows) * lda);
      lay_out_rows(m, t.rows, left, ldy, scratch.a.data(), lda);
      a = {(const char*)scratch.a.data(), sizeof(word), lda * int64_t(sizeof(word))};
    }
    product_plain(m, d, t.rows, a, x + t.row * ldx, ldx, c, d, DEPTH, ZERO,
                  aligned && large && t.rows <= DEPTH ? STREAM : STORE, scratch);
  });
}
