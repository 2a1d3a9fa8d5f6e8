// What stands between the two products of an expert, on a CPU: a = act(g) * u, and its gradients; and
// the weighted sum behind them.  Computed in f32, each number rounded once.
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

static inline Activated activate(int how, vec g) {
  switch (how) {
    case SILU: {
      const vec s = 1.f / (1.f + exponential(-g));
      return {g * s, s * (1.f + g * (1.f - s))};
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
      if (how == RELU) return {r, g <= 0.f ? zero : zero + 1.f};
      return {r * r, 2.f * r};
    }
  }
}

// a [rows, f] = act(g) * u.  Rows of g are f of ldh numbers of h; those of u lie `up` behind them; no u if `up` is 0.
extern "C" void gate(int how, const number* h, int64_t ldh, int64_t up, number* a, int64_t rows, int64_t f,
                     int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < f; j += V) {
      const number* at = h + r * ldh + j;
      const vec value = activate(how, load(at, f - j)).value;
      store(a + r * f + j, up ? value * load(at + up, f - j) : value, f - j);
    }
}

// Of sum over r of w[r] * dot(da[r], act(g[r]) * u[r]) with `da` as given: dh, and dw [rows]; also a = w * act(g) * u.
// w may be null: ones, and then dw is null too.
extern "C" void gate_backward(int how, const number* h, int64_t ldh, int64_t up, const number* da, const float* w,
                              number* dh, number* a, float* dw, int64_t rows, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++) {
    const float weight = w ? w[r] : 1.f;
    vec dots{};
    for (int64_t j = 0; j < f; j += V) {
      const int64_t at = r * ldh + j, count = f - j;
      const Activated act = activate(how, load(h + at, count));
      const vec u = up ? load(h + at + up, count) : vec{} + 1.f, d = load(da + r * f + j, count);
      const vec value = act.value * u;
      dots += d * value;
      store(a + r * f + j, weight * value, count);
      store(dh + at, weight * d * u * act.slope, count);
      if (up) store(dh + at + up, weight * d * act.value, count);
    }
    if (dw) {
      float sum = 0;
      for (int i = 0; i < V; i++) sum += dots[i];
      dw[r] = sum;
    }
  }
}

// out [tokens, d]: sum over k of w[t, k] * y[position[t, k]], in the order of k; rows from `kept` on are nobody's.
extern "C" void combine(const number* y, int64_t d, const float* w, const int32_t* position, int64_t kept, float* out,
                        int64_t tokens, int64_t top_k, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < d; j += V) {
      vec sum{};
      for (int64_t i = t * top_k; i < (t + 1) * top_k; i++)
        if (position[i] < kept) sum += w[i] * load(y + position[i] * d + j, d - j);
      store(out + t * d + j, sum, d - j);
    }
}
