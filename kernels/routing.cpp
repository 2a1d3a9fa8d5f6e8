// What brings rows to their experts and back, on a CPU: the sort of the pairs, rows gathered by it, and their weighted
// sum with its gradient (moe_compile/ops.py has the letters and the meaning).
//
// Sums are f32, in the order of k, and rounded once.  vectors.h goes before this text.

// order [pairs]: the pairs by expert, stable; position [pairs]: its inverse; ends [experts]: where each expert's end.
// Ids of nobody go behind all others.  A counting sort: parts of the pairs count apart, then each knows its places.
extern "C" void sort_by_expert(const int64_t* ids, int64_t pairs, int64_t experts, int32_t* order, int32_t* position,
                               int32_t* ends, int threads) {
  constexpr int64_t SMALL = 8192;  // less than this is sooner done than shared
  const int64_t parts = pairs < SMALL ? 1 : threads, cells = experts + 1;
  const auto key = [&](int64_t p) { return uint64_t(ids[p]) < uint64_t(experts) ? ids[p] : experts; };
  std::vector<int32_t> next(parts * cells);  // how many, then the row of the next
#pragma omp parallel for num_threads(parts)
  for (int64_t part = 0; part < parts; part++)
    for (int64_t p = pairs * part / parts; p < pairs * (part + 1) / parts; p++) next[part * cells + key(p)]++;
  int32_t row = 0;
  for (int64_t e = 0; e < cells; e++) {
    for (int64_t part = 0; part < parts; part++) {
      const int32_t count = next[part * cells + e];
      next[part * cells + e] = row;
      row += count;
    }
    if (e < experts) ends[e] = row;
  }
#pragma omp parallel for num_threads(parts)
  for (int64_t part = 0; part < parts; part++)
    for (int64_t p = pairs * part / parts; p < pairs * (part + 1) / parts; p++) {
      const int32_t r = next[part * cells + key(p)]++;
      order[r] = p;
      position[p] = r;
    }
}

// position[order[r]] = r
extern "C" void invert(const int32_t* order, int64_t pairs, int32_t* position) {
  for (int64_t r = 0; r < pairs; r++) position[order[r]] = r;
}

// rows [pairs, d]: rows[r] = x[order[r] / top_k]
extern "C" void gather(const number* x, int64_t d, const int32_t* order, int64_t top_k, number* rows, int64_t pairs,
                       int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < pairs; r++) std::memcpy(rows + r * d, x + order[r] / top_k * d, d * sizeof(number));
}

// `count` numbers of a row from j on, at most C vectors: each by itself
template <typename F>
static inline void for_vectors(int64_t count, F&& use) {
  if (count >= C * V)
    for (int c = 0; c < C; c++) use(c, V);
  else
    for (int c = 0; c * V < count; c++) use(c, count - c * V);
}

template <typename W>
static void combine_as(const number* y, int64_t d, const W* w, const int32_t* position, int64_t kept, W* out,
                       int64_t tokens, int64_t top_k, int threads) {
  constexpr int64_t AHEAD = 512 / sizeof(number);  // rows lie anywhere: what comes next of each is fetched
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < d; j += C * V) {
      vec sum[C]{};
      const bool here = j + AHEAD < d;  // or of the next token's
      const int64_t next = here ? 0 : t + 1 < tokens ? top_k : 0, at = here ? j + AHEAD : j + AHEAD - d;
      for (int64_t p = t * top_k; p < (t + 1) * top_k; p++) {
        const char* line = (const char*)(y + position[p + next] * d + at);
        for (int i = 0; i < C * V * int(sizeof(number)); i += 64) __builtin_prefetch(line + i);
        if (position[p] >= kept) continue;
        const float weight = w ? load(w + p, 1)[0] : 1.f;
        const number* row = y + position[p] * d + j;
        for_vectors(d - j, [&](int c, int64_t n) { sum[c] += weight * load(row + c * V, n); });
      }
      for_vectors(d - j, [&](int c, int64_t n) { store(out + t * d + j + c * V, sum[c], n); });
    }
}

// out [tokens, d]: sum over k of w[t, k] * y[position[t, k]]; rows behind the last end are nobody's.
// w may be null: ones.  `wide`: w and out are f32.
extern "C" void combine(const number* y, int64_t d, const void* w, int wide, const int32_t* position,
                        const int32_t* ends, int64_t experts, void* out, int64_t tokens, int64_t top_k, int threads) {
  const int64_t kept = ends[experts - 1];
  if (wide)
    combine_as(y, d, (const float*)w, position, kept, (float*)out, tokens, top_k, threads);
  else
    combine_as(y, d, (const number*)w, position, kept, (number*)out, tokens, top_k, threads);
}

template <typename W>
static void combine_backward_as(const W* dout, const number* y, int64_t d, const W* w, const int32_t* order,
                                int64_t kept, number* dy, W* dw, int64_t pairs, int64_t top_k, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < pairs; r++) {
    const float weight = load(w + order[r], 1)[0];
    const W* from = dout + order[r] / top_k * d;
    vec dots[C]{};
    for (int64_t j = 0; j < d; j += C * V)
      for_vectors(d - j, [&](int c, int64_t n) {
        const int64_t at = j + c * V;
        const vec x = r < kept ? load(from + at, n) : vec{};
        if (r < kept) dots[c] += x * load(y + r * d + at, n);
        store(dy + r * d + at, r < kept ? weight * x : x, n);
      });
    for (int c = 1; c < C; c++) dots[0] += dots[c];
    float sum = 0;
    for (int i = 0; i < V; i++) sum += dots[0][i];
    store(dw + order[r], vec{} + sum, 1);
  }
}

// Of `combine` with weights: dy [pairs, d], dy[r] = w[p] * dout[p / top_k], and dw [pairs], dw[p] = dot(dout[p / top_k],
// y[r]), of the pair p = order[r]; zeros behind the last end.  `wide`: dout, w and dw are f32.
extern "C" void combine_backward(const void* dout, const number* y, int64_t d, const void* w, int wide,
                                 const int32_t* order, const int32_t* ends, int64_t experts, number* dy, void* dw,
                                 int64_t pairs, int64_t top_k, int threads) {
  const int64_t kept = ends[experts - 1];
  if (wide)
    combine_backward_as((const float*)dout, y, d, (const float*)w, order, kept, dy, (float*)dw, pairs, top_k, threads);
  else
    combine_backward_as((const number*)dout, y, d, (const number*)w, order, kept, dy, (number*)dw, pairs, top_k,
                        threads);
}
