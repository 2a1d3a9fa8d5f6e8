// What stands between the two products of an expert, on a CPU: a = act(g) * u and its other forms
// (moe_compile/activations.py), and their gradients; and biases.
// Computed in f32, each number rounded once.
//
// Row by row; every number comes from its own row alone, sums run in a fixed order.  vectors.h goes before this text.

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED };

// e^x: 2^n * p(r) with x = n ln 2 + r, |r| <= ln 2 / 2, p of degree 6 (Cephes' expf).  Within 2 ulp; inf and NaN as ever.
static inline vec exponential(vec x) {
  constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, ROUND = 12582912.f;
  typedef int32_t ints __attribute__((vector_size(4 * V)));
  x = x > 88.8f ? vec{} + 88.8f : x;
  x = x < -87.3f ? vec{} - 87.3f : x;
  const vec n = (x * LOG2E + ROUND) - ROUND;
  const vec r = x - n * LN2_HIGH - n * LN2_LOW;
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return p * (vec)power;
}

// erf(x) = 1 - q(t) e^(-x^2) with t = 1 / (1 + p x) for x >= 0: Abramowitz and Stegun 7.1.26, within 1.5e-7
static inline vec error_function(vec x) {
  const vec y = x < 0.f ? -x : x;
  const vec t = 1.f / (1.f + 0.3275911f * y);
  const vec q = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const vec e = 1.f - q * exponential(-y * y);
  return x < 0.f ? -e : e;
}

struct Activated {
  vec value, slope;
};

// The numbers of a description; no limit if it is 0.
struct Form {
  int how;
  float alpha, limit, shift;
};

static inline Activated plain(const Form& form, vec g) {
  switch (form.how) {
    case SILU: {
      const vec x = form.alpha * g, s = 1.f / (1.f + exponential(-x));
      return {g * s, s * (1.f + x * (1.f - s))};
    }
    case GELU: {
      const vec half = 0.5f + 0.5f * error_function(g * 0.70710678f);
      return {g * half, half + g * 0.39894228f * exponential(-0.5f * g * g)};
    }
    case GELU_TANH: {
      constexpr float A = 0.79788456f, B = 0.044715f;  // sqrt(2 / pi)
      const vec t = 1.f - 2.f / (exponential(2.f * A * g * (1.f + B * g * g)) + 1.f);
      return {0.5f * g * (1.f + t), 0.5f * (1.f + t) + 0.5f * g * (1.f - t * t) * A * (1.f + 3.f * B * g * g)};
    }
    default: {
      const vec zero{}, r = g < 0.f ? zero : g;  // NaN stays
      if (form.how == RELU) return {r, g <= 0.f ? zero : zero + 1.f};
      return {r * r, 2.f * r};
    }
  }
}

static inline Activated activate(const Form& form, vec g) {
  if (!form.limit) return plain(form, g);
  const vec zero{}, limit = zero + form.limit;
  const Activated act = plain(form, g > limit ? limit : g);  // NaN stays
  return {act.value, g <= limit ? act.slope : zero};
}

// What the activated gate is multiplied by, and whether that follows u: one or zero.
static inline Activated factor(const Form& form, vec u) {
  const vec zero{}, one = zero + 1.f, limit = zero + form.limit;
  if (!form.limit) return {u + form.shift, one};
  const vec low = u < -limit ? -limit : u;
  return {(low > limit ? limit : low) + form.shift, (u >= -limit) & (u <= limit) ? one : zero};
}

// How g and u lie in a row of h: u `up` numbers behind g, in pairs, or not at all.
struct Lie {
  int64_t up;
  int pairs;
};
struct Two {
  vec g, u;
};

static inline Two load(const number* row, const Lie& lie, int64_t j, int64_t f) {
  const vec one = vec{} + 1.f;
  if (!lie.pairs) return {load(row + j, f - j), lie.up ? load(row + lie.up + j, f - j) : one};
  const int64_t count = least(2 * (f - j), 2 * V);
  float both[2 * V];
  store(both, load(row + 2 * j, count));
  store(both + V, count > V ? load(row + 2 * j + V, count - V) : vec{});
  Two two{};
  for (int i = 0; i < V; i++) two.g[i] = both[2 * i], two.u[i] = both[2 * i + 1];
  return two;
}

static inline void store(number* row, const Lie& lie, int64_t j, int64_t f, const Two& two) {
  if (!lie.pairs) {
    store(row + j, two.g, f - j);
    if (lie.up) store(row + lie.up + j, two.u, f - j);
    return;
  }
  const int64_t count = least(2 * (f - j), 2 * V);
  float both[2 * V];
  for (int i = 0; i < V; i++) both[2 * i] = two.g[i], both[2 * i + 1] = two.u[i];
  store(row + 2 * j, read<vec>(both), count);
  if (count > V) store(row + 2 * j + V, read<vec>(both + V), count - V);
}

// a [rows, f] = act(g) * u, of rows of ldh numbers of h; no u if `up` is 0 and they are no pairs.
extern "C" void gate(int how, float alpha, float limit, float shift, const number* h, int64_t ldh, int64_t up,
                     int pairs, number* a, int64_t rows, int64_t f, int threads) {
  const Form form{how, alpha, limit, shift};
  const Lie lie{up, pairs};
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < f; j += V) {
      const Two two = load(h + r * ldh, lie, j, f);
      const vec value = activate(form, two.g).value;
      store(a + r * f + j, up || pairs ? value * factor(form, two.u).value : value, f - j);
    }
}

// Of sum over r of w[r] * dot(da[r], act(g[r]) * u[r]) with `da` as given: dh, and dw [rows]; also a = w * act(g) * u.
// w may be null: ones, and then dw is null too.  a may be da's memory.
extern "C" void gate_backward(int how, float alpha, float limit, float shift, const number* h, int64_t ldh, int64_t up,
                              int pairs, const number* da, const float* w, number* dh, number* a, float* dw,
                              int64_t rows, int64_t f, int threads) {
  const Form form{how, alpha, limit, shift};
  const Lie lie{up, pairs};
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const float weight = w ? w[r] : 1.f;
    vec dots{};
    for (int64_t j = 0; j < f; j += V) {
      const Two two = load(h + r * ldh, lie, j, f);
      const Activated act = activate(form, two.g), by = up || pairs ? factor(form, two.u) : Activated{two.u, two.u};
      const vec d = load(da + r * f + j, f - j), value = act.value * by.value;
      dots += d * value;
      store(a + r * f + j, weight * value, f - j);
      const vec du = weight * d * act.value;
      store(dh + r * ldh, lie, j, f, {weight * d * by.value * act.slope, by.slope == 0.f ? vec{} : du});
    }
    if (dw) {
      float sum = 0;
      for (int i = 0; i < V; i++) sum += dots[i];
      dw[r] = sum;
    }
  }
}

// y [rows, f]: each row its expert's bias; zeros behind the last offset.
extern "C" void spread(const number* bias, const int32_t* offsets, int64_t experts, number* y, int64_t rows, int64_t f,
                       int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    int64_t e = 0, end = experts;  // the first expert whose rows end behind r
    while (e < end) offsets[(e + end) / 2] > r ? end = (e + end) / 2 : e = (e + end) / 2 + 1;
    if (e < experts)
      std::memcpy(y + r * f, bias + e * f, f * sizeof(number));
    else
      std::memset(y + r * f, 0, f * sizeof(number));
  }
}

// db [experts, f]: the sum over each expert's rows of w[r] * dy[r], in their order; w may be null: ones.
extern "C" void bias_gradient(const number* dy, const float* w, const int32_t* offsets, int64_t experts, number* db,
                              int64_t f, int threads) {
  const int64_t parts = (f + C * V - 1) / (C * V);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
  for (int64_t task = 0; task < experts * parts; task++) {
    const int64_t e = task / parts, start = task % parts * C * V;
    vec sum[C]{};
    for (int64_t r = e ? offsets[e - 1] : 0; r < offsets[e]; r++)
      for (int c = 0; c < C && start + c * V < f; c++)
        sum[c] += (w ? w[r] : 1.f) * load(dy + r * f + start + c * V, f - start - c * V);
    for (int c = 0; c < C && start + c * V < f; c++) store(db + e * f + start + c * V, sum[c], f - start - c * V);
  }
}

// dots[r] += dot(dy[r], bias of its expert), rows of d numbers.
extern "C" void add_bias_dots(const number* dy, const number* bias, const int32_t* offsets, int64_t experts,
                              float* dots, int64_t d, int threads) {
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = e ? offsets[e - 1] : 0;
#pragma omp parallel for num_threads(threads) if (offsets[e] - first > 64)
    for (int64_t r = first; r < offsets[e]; r++) {
      vec sums{};
      for (int64_t j = 0; j < d; j += V) sums += load(dy + r * d + j, d - j) * load(bias + e * d + j, d - j);
      for (int i = 0; i < V; i++) dots[r] += sums[i];
    }
  }
}
