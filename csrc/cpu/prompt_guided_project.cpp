// The epilogues of the projector's matrix products, on tiles that are still in the cache:
//     h[i] = gelu(z[i] + b1),  pooled[o] += sum_{i in o, i in the tile} p[o, i] h[i]
// and the cosines of the guide's product.

#include "rows.h"     // defines: Accumulator, Vec, kTile, dot_rows, dot_of, load_row, load_vector, with_type
#include "windows.h"  // defines: Place, place_of, patch_of, for_each_patch, for_each_window

namespace ppllava::CPU_CAPABILITY {
namespace {

// gelu(x) = x cdf(x), and its slope cdf(x) + x pdf(x), of the normal distribution.
template <class T>
struct Normal {
  using V = Vec<T>;
  V cdf, bell;  // bell: exp(-x^2 / 2)

  explicit Normal(const V& x) {
    const V exponent = x * x * V(-0.5);
    if constexpr (std::is_same_v<T, double>) {
      bell = exponent.exp();
      cdf = V(0.5) * (V(1) + (x * V(0.70710678118654752)).erf());
    } else {
      // 20 units in the last place of float32 are far below one of 16 bits.
      bell = std::is_same_v<T, float> ? exponent.exp() : exponent.exp_u20();
      // Abramowitz and Stegun, 7.1.26: 1 - erf within 1.5e-7, as ATen's.
      const V t = V(1) / at::vec::fmadd(V(0.3275911f * 0.70710678f), x.abs(), V(1));
      V tail = at::vec::fmadd(V(0.5f * 1.061405429f), t, V(0.5f * -1.453152027f));
      for (const float coefficient : {1.421413741f, -0.284496736f, 0.254829592f})
        tail = at::vec::fmadd(tail, t, V(0.5f * coefficient));
      tail = tail * t * bell;
      cdf = V::blendv(V(1) - tail, tail, x < V(0));
    }
  }

  V slope(const V& x) const { return at::vec::fmadd(x, bell * V(0.39894228040143268), cdf); }
};

// cdf(x) for sums of bfloat16: 0.5 + x P(x^2), whose gelu is within 6e-5 everywhere, a quarter of a rounding of z at 1.
// Exactly 0 where that clamps it from below: what is left of P there would be multiplied by any x.
inline at::vec::Vectorized<float> short_cdf(const at::vec::Vectorized<float>& wide) {
  using V = at::vec::Vectorized<float>;
  const V x = at::vec::clamp(wide, V(-4.25f), V(4.25f)), square = x * x;
  V p(6.707290972629565e-11f);
  for (const float coefficient :
       {-6.290238996342623e-09f, 2.594608758954564e-07f, -6.273795861488907e-06f, 0.0001006529710139148f,
        -0.0011562453582882881f, 0.00999272521585226f, -0.06666874140501022f, 0.3991127610206604f})
    p = at::vec::fmadd(p, square, V(coefficient));
  return V::blendv(at::vec::fmadd(x, p, V(0.5f)), V(0), wide < V(-4.25f));
}

template <class T>
Vec<T> cdf(const Vec<T>& x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return short_cdf(x);
  } else {
    return Normal<T>(x).cdf;
  }
}

// z + b1, from channel d on.
template <class T>
struct Hidden {
  const T* bias;

  Vec<T> load(const T* row, int64_t d) const {
    return bias ? load_vector(row + d) + load_vector(bias + d) : load_vector(row + d);
  }
  Accumulator<T> load_one(const T* row, int64_t d) const {
    return static_cast<Accumulator<T>>(row[d]) + (bias ? static_cast<Accumulator<T>>(bias[d]) : 0);
  }
};

// Windows with patches in the tile: (T, H) ranges of them in its clip.
struct Reach {
  int64_t batch, begin[2], end[2];
};

Reach reach_of(const TileArgs& a) {
  const std::vector<int64_t> first = first_patches(a);
  const Patch low = patch_of(a, first, a.first), high = patch_of(a, first, a.first + a.rows - 1);
  const Clip& clip = a.clips[low.batch];
  const bool one = low.at[0] == high.at[0];
  Reach reach{low.batch, {}, {}};
  for (int n = 0; n < 2; ++n) {
    const Axis axis = axis_of(a, clip, n);
    // Several frames are whole ones.
    reach.begin[n] = axis.first(n == 0 || one ? low.at[n] : 0);
    reach.end[n] = axis.last(n == 0 || one ? high.at[n] : a.height - 1);
    reach.end[n] = std::max(reach.end[n], reach.begin[n]);
  }
  return reach;
}

template <class T>
void forward(const TileArgs& a) {
  using Acc = Accumulator<T>;
  using V = Vec<T>;
  const Reach reach = reach_of(a);
  const Clip& clip = a.clips[reach.batch];
  const int64_t columns = a.window.outputs[2], high = reach.end[1] - reach.begin[1];
  const int64_t windows = (reach.end[0] - reach.begin[0]) * high * columns;
  const int64_t first = a.first - first_patches(a)[reach.batch];  // in the clip
  const int64_t wanted = windows ? (4 * at::get_num_threads() + windows - 1) / windows : 1;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, a.channels / 64));
  // Whole vectors in each.
  constexpr int64_t step = V::size();
  const int64_t width = ((a.channels + parts - 1) / parts + step - 1) / step * step;
  const Hidden<T> hidden{static_cast<const T*>(a.bias)};
  at::parallel_for(0, windows * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows;
    std::vector<Acc> shares;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t w = index / parts % columns, th = index / parts / columns;
      const int64_t output = clip.first_output + reach.begin[0] + th / high;
      const int64_t window = (output * a.window.outputs[1] + reach.begin[1] + th % high) * columns + w;
      rows.clear();
      shares.clear();
      const Place place = place_of(a, window);
      Place inside = place;  // without the frames before and after the tile
      inside.begin[0] = std::max(place.begin[0], first / (a.height * a.width));
      inside.end[0] = std::min(place.end[0], (first + a.rows - 1) / (a.height * a.width) + 1);
      for_each_patch(inside, [&](int64_t t, int64_t h, int64_t column) {
        const int64_t row = (t * a.height + h) * a.width + column - first;
        if (row < 0 || row >= a.rows) return;
        const int64_t at[3] = {t - place.begin[0], h - place.begin[1], column - place.begin[2]};
        rows.push_back(static_cast<const T*>(a.values.data) + row * a.channels);
        shares.push_back(static_cast<const Acc*>(a.shares)[a.window.slot(clip, window, at[0], at[1], at[2])]);
      });
      Acc* sum = static_cast<Acc*>(a.pooled) + window * a.step;
      int64_t d = index % parts * width;
      const int64_t last = std::min(d + width, a.channels);
      const auto add = [&](auto vectors) {
        V tile[decltype(vectors)::value];
        for (int v = 0; v < vectors; ++v) tile[v] = V::loadu(sum + d + v * step);
        for (size_t n = 0; n < rows.size(); ++n)
          for (int v = 0; v < vectors; ++v) {
            const V x = hidden.load(rows[n], d + v * step);
            tile[v] = at::vec::fmadd(V(shares[n]) * x, cdf<T>(x), tile[v]);
          }
        for (int v = 0; v < vectors; ++v) tile[v].store(sum + d + v * step);
        d += vectors * step;
      };
      while (d + kTile * step <= last) add(std::integral_constant<int, kTile>());
      while (d + step <= last) add(std::integral_constant<int, 1>());
      for (; d < last; ++d)
        for (size_t n = 0; n < rows.size(); ++n) {
          const Acc x = hidden.load_one(rows[n], d);
          sum[d] += shares[n] * x * Acc(0.5) * (1 + std::erf(x * Acc(0.70710678118654752)));
        }
    }
  });
}

// dots[o, i] += g[o] . h[i], and in place of z[i]: gelu'(z[i] + b1) sum_{o with i} p[o, i] g[o]
template <class T>
void backward(const TileArgs& a) {
  using Acc = Accumulator<T>;
  using V = Vec<T>;
  const std::vector<int64_t> first = first_patches(a);
  const Hidden<T> hidden{static_cast<const T*>(a.bias)};
  at::parallel_for(0, a.rows, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t step = V::size();
    const int64_t whole = a.channels / step * step;
    // Rounded up, so that the last channels are a vector like the others.
    const int64_t room = whole + step;
    std::vector<Acc> h(room), slopes(room), sum(room), grad(room);
    for (int64_t index = begin; index < end; ++index) {
      T* row = static_cast<T*>(a.values.data) + index * a.channels;
      const auto activate = [&](int64_t d, const V& x) {
        const Normal<T> normal(x);
        (x * normal.cdf).store(h.data() + d);
        normal.slope(x).store(slopes.data() + d);
      };
      for (int64_t d = 0; d < whole; d += step) activate(d, hidden.load(row, d));
      if (whole < a.channels) {
        Acc last[step] = {};
        for (int64_t d = whole; d < a.channels; ++d) last[d - whole] = hidden.load_one(row, d);
        activate(whole, V::loadu(last));
      }
      std::fill(sum.begin(), sum.end(), Acc(0));
      for_each_window(a, patch_of(a, first, a.first + index), [&](int64_t window, int64_t slot) {
        load_row(grad.data(), static_cast<const T*>(a.grad) + window * a.step, a.channels);
        if (a.grad_scores) static_cast<Acc*>(a.grad_scores)[slot] += dot_of(h.data(), grad.data(), a.channels);
        const V share(static_cast<const Acc*>(a.shares)[slot]);
        for (int64_t d = 0; d < room; d += step)
          at::vec::fmadd(share, V::loadu(grad.data() + d), V::loadu(sum.data() + d)).store(sum.data() + d);
      });
      for (int64_t d = 0; d < a.channels; ++d) row[d] = static_cast<T>(sum[d] * slopes[d]);
    }
  });
}

constexpr double kEps = 1e-12;  // as torch.nn.functional.normalize

// max(norm, eps) that keeps NaN.
double clamped(double norm) { return norm < kEps ? kEps : norm; }

template <class T>
void scores(const ScoreArgs& a) {
  using Acc = Accumulator<T>;
  const Acc* text = static_cast<const Acc*>(a.text);
  const double length = clamped(std::sqrt(static_cast<double>(dot_of(text, text, a.channels))));
  at::parallel_for(0, a.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = static_cast<const T*>(a.embeds) + i * a.channels;
      Acc dot, square;
      dot_rows<true, T>(&dot, &square, &row, 1, 1, text, a.channels);
      const double norm = std::sqrt(static_cast<double>(square));
      static_cast<Acc*>(a.cosines)[i] = static_cast<Acc>(dot / (clamped(norm) * length));
    }
  });
}

}  // namespace

void pool_hidden(const TileArgs& a) {
  with_type(a.values.dtype, [&](auto zero) { forward<decltype(zero)>(a); });
}

void pool_hidden_backward(const TileArgs& a) {
  with_type(a.values.dtype, [&](auto zero) { backward<decltype(zero)>(a); });
}

void score_rows(const ScoreArgs& a) {
  with_type(a.dtype, [&](auto zero) { scores<decltype(zero)>(a); });
}

}  // namespace ppllava::CPU_CAPABILITY
