// Products of a ragged batch on a CPU in f32: the rows of each expert with its own weight.
//
// The inner loop adds outer products, a column of A times a row of B, to a tile of the result in registers.  Rows of B
// are read where they lie if they are contiguous, as in both gradients.  Where B is stored transposed (weights as
// nn.Linear keeps them) a panel of its columns is laid out as rows first.  With some dozens of rows an expert, reading
// the weights takes as long as using them: so each is read once, front to back, and fetched while the panel before it
// is being multiplied.
//
// Every number of the result is one sum in the order of k: the same bits for any number of threads, and whatever the
// other rows are.  vectors.h goes before this text.

constexpr int M = 6;
constexpr int PANEL = 64;         // columns laid out at a time: a multiple of V * N
constexpr int64_t LONGEST = 1024; // depth of a panel: it stays in the second cache
constexpr int LINE = 64;          // bytes

// -- laying out -----------------------------------------------------------------------------

template <int... I>
static inline vec pick(vec a, vec b) {  // elements I of the two, counted through
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  typedef int32_t index __attribute__((vector_size(4 * V)));
  return __builtin_shuffle(a, b, index{I...});
#endif
}

// In each quarter of the registers, transpose the 4 x 4 numbers of a, b, c, d.
static inline void transpose(vec& a, vec& b, vec& c, vec& d) {
  vec p, q, r, s;
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

// to[k][j] = from[j][k] for `columns` values of j and `depth` values of k
static void lay_out(int64_t columns, int64_t depth, const float* from, int64_t ld, float* to) {
  int64_t k = 0;
  for (; k + V <= depth; k += V) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      const float* p = from + j * ld + k;
      vec row[4] = {load(p), load(p + ld), load(p + 2 * ld), load(p + 3 * ld)};
      transpose(row[0], row[1], row[2], row[3]);
      for (int i = 0; i < 4; i++)
        for (int q = 0; q < V / 4; q++)
          std::memcpy(to + (k + 4 * q + i) * PANEL + j, (const char*)&row[i] + 16 * q, 16);
    }
    for (; j < columns; j++)
      for (int i = 0; i < V; i++) to[(k + i) * PANEL + j] = from[j * ld + k + i];
  }
  for (; k < depth; k++)
    for (int64_t j = 0; j < columns; j++) to[k * PANEL + j] = from[j * ld + k];
}

// -- one expert -----------------------------------------------------------------------------

// What is needed next, a line of it fetched with every step of the inner loop.
struct Ahead {
  const char *at, *stop;
};

// a[i, k] lies at p + i * row + k * column
struct Matrix {
  const float* p;
  int64_t row, column;
};

enum Store { SET, ADD, STREAM };

// c [R, C * V] = (c +) sum over k of outer(a[:, k], b[k, :])
template <int R, int C>
static void tile(int64_t k, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, Store how, Ahead& ahead) {
  if (how != STREAM)
    for (int i = 0; i < R; i++)  // for writing
      for (int j = 0; j < C * V; j += LINE / 4) __builtin_prefetch(c + i * ldc + j, 1);
  const char* next = ahead.at;
  const int64_t line = ahead.at < ahead.stop ? LINE : 0;
  ahead.at += line * k;
  vec sum[R][C] = {};
  if (how == ADD)
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) sum[i][j] = load(c + i * ldc + j * V);
  for (int64_t at = 0; at < k; at++) {
    __builtin_prefetch(next, 0, 2);
    next += line;
    vec y[C];
    for (int j = 0; j < C; j++) y[j] = load(b + at * ldb + j * V);
    for (int i = 0; i < R; i++) {
      vec x = vec{} + a.p[i * a.row + at * a.column];
      for (int j = 0; j < C; j++) sum[i][j] += x * y[j];
    }
  }
  if (how == STREAM) {
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) stream(c + i * ldc + j * V, sum[i][j]);
  } else {
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) store(c + i * ldc + j * V, sum[i][j]);
  }
}

template <int C>
static void tile_of(int64_t m, int64_t k, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, Store how,
                    Ahead& ahead) {
  static_assert(M == 6);
  switch (m) {
    case 1: return tile<1, C>(k, a, b, ldb, c, ldc, how, ahead);
    case 2: return tile<2, C>(k, a, b, ldb, c, ldc, how, ahead);
    case 3: return tile<3, C>(k, a, b, ldb, c, ldc, how, ahead);
    case 4: return tile<4, C>(k, a, b, ldb, c, ldc, how, ahead);
    case 5: return tile<5, C>(k, a, b, ldb, c, ldc, how, ahead);
    default: return tile<6, C>(k, a, b, ldb, c, ldc, how, ahead);
  }
}

// m rows, the last n < V columns
static void rest(int64_t m, int64_t n, int64_t k, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc,
                 Store how) {
  for (int64_t i = 0; i < m; i++) {
    float sum[V] = {};
    if (how == ADD) std::memcpy(sum, c + i * ldc, n * sizeof(float));
    for (int64_t at = 0; at < k; at++)
      for (int64_t j = 0; j < n; j++) sum[j] += a.p[i * a.row + at * a.column] * b[at * ldb + j];
    std::memcpy(c + i * ldc, sum, n * sizeof(float));
  }
}

// C [m, n] = (C +) A [m, k] @ B [k, n]
static void product(int64_t m, int64_t n, int64_t k, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc,
                    Store how, Ahead ahead) {
  for (int64_t i = 0; i < m; i += M, a.p += M * a.row, c += M * ldc) {
    const int64_t rows = least(M, m - i);
    int64_t j = 0;
    for (; j + N * V <= n; j += N * V) tile_of<N>(rows, k, a, b + j, ldb, c + j, ldc, how, ahead);
    for (; j + V <= n; j += V) tile_of<1>(rows, k, a, b + j, ldb, c + j, ldc, how, ahead);
    if (j < n) rest(rows, n - j, k, a, b + j, ldb, c + j, ldc, how);
  }
}

// C [m, n] = A [m, k] @ B [k, n], by blocks of k that stay in a near cache
static void product_plain(int64_t m, int64_t n, int64_t k, Matrix a, const float* b, int64_t ldb, float* c,
                          int64_t ldc, int64_t block, Store first) {
  for (int64_t at = 0; at == 0 || at < k; at += block) {
    const float *here = b + at * ldb, *next = here + block * ldb;
    product(m, n, least(block, k - at), {a.p + at * a.column, a.row, a.column}, here, ldb, c, ldc,
            at ? ADD : first, {(const char*)next, (const char*)(next + block * ldb)});
  }
}

// C [m, n] = A [m, k] @ B [n, k].T
static void product_transposed(int64_t m, int64_t n, int64_t k, Matrix a, const float* b, int64_t ldb, float* c,
                               int64_t ldc, Store first, std::vector<float>& panel) {
  panel.resize(least(LONGEST, k) * PANEL);
  for (int64_t j = 0; j < n; j += PANEL)
    for (int64_t at = 0; at == 0 || at < k; at += LONGEST) {
      const int64_t columns = least(PANEL, n - j), depth = least(LONGEST, k - at);
      const float* next = b + (j + PANEL) * ldb;
      lay_out(columns, depth, b + j * ldb + at, ldb, panel.data());
      product(m, columns, depth, {a.p + at, a.row, 1}, panel.data(), PANEL, c + j, ldc, at ? ADD : first,
              {(const char*)next, (const char*)(next + PANEL * ldb)});
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
    std::vector<float> panel;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < int64_t(tasks.size()); i++) work(tasks[i], panel);
    finish_streams();
  }
}

// y [R, f] = x [R, d] @ w[e].T, or y += if `add`; ldx and ldy are the strides of their rows.
// A weight is stored [f, d] with row stride ldw, or [d, f] if `transposed`.
// Rows behind the last offset become zeros, or stay if `add`.
extern "C" void grouped_gemm(const float* x, int64_t ldx, const float* const* w, int64_t ldw, int transposed,
                             const int32_t* offsets, int64_t experts, float* y, int64_t ldy, int64_t rows, int64_t f,
                             int64_t d, int add, int threads) {
  constexpr int64_t BLOCK = 40 * M;
  const Store first = add ? ADD : SET;
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
  run(tasks, threads, [&](const Task& t, std::vector<float>& panel) {
    const Matrix a{x + t.row * ldx, ldx, 1};
    const float* b = w[t.expert];
    float* c = y + t.row * ldy + t.start;
    if (transposed)
      product_plain(t.rows, t.stop - t.start, d, a, b + t.start, ldw, c, ldy, 128, first);
    else
      product_transposed(t.rows, t.stop - t.start, d, a, b + t.start * ldw, ldw, c, ldy, first, panel);
  });
  if (!add)
    for (; row < rows; row++) std::memset(y + row * ldy, 0, f * sizeof(float));
}

// dw [E, f, d]: dw[e] = dy[rows of e].T @ x[rows of e]; zeros for an expert without rows.
// ldy and ldx are the strides of rows.
extern "C" void grouped_gemm_dw(const float* dy, int64_t ldy, const float* x, int64_t ldx, const int32_t* offsets,
                                int64_t experts, float* dw, int64_t f, int64_t d, int threads) {
  constexpr int64_t BLOCK = 10 * M, DEPTH = 256, LARGE = 8 << 20;
  const bool aligned = d % V == 0 && reinterpret_cast<uintptr_t>(dw) % (V * sizeof(float)) == 0;
  const bool large = experts * f * d * int64_t(sizeof(float)) >= LARGE;
  std::vector<Task> tasks;
  for (int64_t e = 0, row = 0; e < experts; row = offsets[e], e++)
    for (int64_t i = 0; i < f; i += BLOCK) tasks.push_back({e, row, offsets[e] - row, i, least(f, i + BLOCK)});
  run(tasks, threads, [&](const Task& t, std::vector<float>&) {
    float* c = dw + (t.expert * f + t.start) * d;
    if (t.rows)
      product_plain(t.stop - t.start, d, t.rows, {dy + t.row * ldy + t.start, 1, ldy}, x + t.row * ldx, ldx, c, d,
                    DEPTH, aligned && large && t.rows <= DEPTH ? STREAM : SET);
    else
      std::memset(c, 0, (t.stop - t.start) * d * sizeof(float));
  });
}
