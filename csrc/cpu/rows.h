// Rows of channels: everything that reads or writes them, vectorised over any dtype, accumulating in `Acc`.
#pragma once

#include <ATen/Parallel.h>            // defines: at::parallel_for
#include <ATen/cpu/vec/functional.h>  // defines: at::vec::vec_reduce_all, load_to_float
#include <ATen/cpu/vec/vec.h>         // defines: at::vec::Vectorized, convert_from_float
#include <c10/util/BFloat16.h>        // defines: c10::BFloat16
#include <c10/util/Half.h>            // defines: c10::Half

#include <algorithm>    // defines: std::fill, std::min
#include <cmath>        // defines: std::exp, std::sqrt
#include <type_traits>  // defines: std::conditional_t, std::integral_constant
#include <vector>       // defines: std::vector

#include "kernels.h"  // defines: the structs and the kernels' declarations

namespace ppllava::CPU_CAPABILITY {

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
using Vec = at::vec::Vectorized<Accumulator<T>>;

template <class T>
Vec<T> load_vector(const T* row) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return Vec<T>::loadu(row);
  } else {
    Vec<T> v;
    at::vec::load_to_float<T>(row, v);
    return v;
  }
}

// Two at a time: together they are one vector of a 16-bit dtype.
template <class T>
void store_vectors(T* row, const Vec<T>& low, const Vec<T>& high) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    low.store(row);
    high.store(row + Vec<T>::size());
  } else {
    at::vec::convert_from_float<T>(low, high).store(row);
  }
}

template <class Acc>
Acc total(const at::vec::Vectorized<Acc>& v) {
  return at::vec::vec_reduce_all<Acc>([](auto a, auto b) { return a + b; }, v);
}

template <class T>
void load_row(Accumulator<T>* out, const T* in, int64_t channels) {
  int64_t d = 0;
  for (; d + Vec<T>::size() <= channels; d += Vec<T>::size()) load_vector(in + d).store(out + d);
  for (; d < channels; ++d) out[d] = static_cast<Accumulator<T>>(in[d]);
}

// Rows come in runs: `run` rows that are neighbours in memory, as those of a window along W. Of this many runs one row
// each is read at a time, because far apart they are streams to the prefetchers, which neighbouring pages are not.
constexpr int64_t kStreams = 6;
constexpr int kTile = 4;  // vectors of channels that stay in registers over these rows

// Call function(i, count): next come the rows i, i + run, ..., i + (count - 1) * run.
template <class Function>
void for_each_pass(int64_t runs, int64_t run, Function function) {
  for (int64_t n = 0; n < runs; n += kStreams)
    for (int64_t i = 0; i < run; ++i) function(n * run + i, std::min(kStreams, runs - n));
}

template <class T>
struct Pass {
  const T* const* rows;
  const Accumulator<T>* shares;
  int64_t count, run;
  bool first, last;
  Accumulator<T>* sum;  // of the passes so far, unless this is the first
  T* out;               // of the last

  template <int N>
  void weigh(int64_t d) const {
    using V = Vec<T>;
    V tile[N];
    for (int v = 0; v < N; ++v) tile[v] = first ? V(0) : V::loadu(sum + d + v * V::size());
    for (int64_t n = 0; n < count; ++n) {
      const V share(shares[n * run]);
      for (int v = 0; v < N; ++v)
        tile[v] = at::vec::fmadd(share, load_vector(rows[n * run] + d + v * V::size()), tile[v]);
    }
    for (int v = 0; v < N; v += 2) {
      if (last) {
        store_vectors(out + d + v * V::size(), tile[v], tile[v + 1]);
      } else {
        tile[v].store(sum + d + v * V::size());
        tile[v + 1].store(sum + d + (v + 1) * V::size());
      }
    }
  }

  void weigh_one(int64_t d) const {
    Accumulator<T> one = first ? 0 : sum[d];
    for (int64_t n = 0; n < count; ++n) one += shares[n * run] * static_cast<Accumulator<T>>(rows[n * run][d]);
    if (last) {
      out[d] = static_cast<T>(one);
    } else {
      sum[d] = one;
    }
  }
};

// out[d] = shares[0] * rows[0][d] + ... over all rows of the runs; sum: scratch.
template <class T>
void weigh_rows(
    T* out, Accumulator<T>* sum, const T* const* rows, const Accumulator<T>* shares, int64_t runs, int64_t run,
    int64_t channels) {
  constexpr int64_t step = Vec<T>::size();
  if (runs == 0) std::fill(out, out + channels, T(0));
  for_each_pass(runs, run, [&](int64_t i, int64_t count) {
    const bool first = i == 0, last = i + (count - 1) * run + 1 == runs * run;
    const Pass<T> pass{rows + i, shares + i, count, run, first, last, sum, out};
    int64_t d = 0;
    for (; d + kTile * step <= channels; d += kTile * step) pass.template weigh<kTile>(d);
    for (; d + 2 * step <= channels; d += 2 * step) pass.template weigh<2>(d);
    for (; d < channels; ++d) pass.weigh_one(d);
  });
}

// dots[n] = sum_d row[d] * other[d], row = rows[n * run], n < count <= kStreams;  squares[n] = sum_d row[d]^2, if
// given.
template <bool kSquares, class T>
void dot_rows(
    Accumulator<T>* dots, Accumulator<T>* squares, const T* const* rows, int64_t count, int64_t run,
    const Accumulator<T>* other, int64_t channels) {
  using V = Vec<T>;
  V dot[kStreams][2], square[kStreams][2];  // of the even and of the odd vectors: two chains of additions
  for (int64_t n = 0; n < count; ++n) dot[n][0] = dot[n][1] = square[n][0] = square[n][1] = V(0);
  int64_t d = 0;
  const auto add = [&](auto vectors) {
    for (int64_t n = 0; n < count; ++n) {
      V dots_n[2] = {dot[n][0], dot[n][1]}, squares_n[2] = {square[n][0], square[n][1]};
      for (int v = 0; v < vectors; ++v) {
        const V x = load_vector(rows[n * run] + d + v * V::size());
        dots_n[v % 2] = at::vec::fmadd(x, V::loadu(other + d + v * V::size()), dots_n[v % 2]);
        if constexpr (kSquares) squares_n[v % 2] = at::vec::fmadd(x, x, squares_n[v % 2]);
      }
      for (int half = 0; half < 2; ++half) {
        dot[n][half] = dots_n[half];
        square[n][half] = squares_n[half];
      }
    }
    d += vectors * V::size();
  };
  while (d + kTile * V::size() <= channels) add(std::integral_constant<int, kTile>());
  while (d + 2 * V::size() <= channels) add(std::integral_constant<int, 2>());
  for (int64_t n = 0; n < count; ++n) {
    dots[n] = total(dot[n][0] + dot[n][1]);
    if constexpr (kSquares) squares[n] = total(square[n][0] + square[n][1]);
    for (int64_t c = d; c < channels; ++c) {
      const Accumulator<T> x = static_cast<Accumulator<T>>(rows[n * run][c]);
      dots[n] += x * other[c];
      if constexpr (kSquares) squares[n] += x * x;
    }
  }
}

template <class Acc>
Acc dot_of(const Acc* row, const Acc* other, int64_t channels) {
  Acc dot;
  dot_rows<false>(&dot, static_cast<Acc*>(nullptr), &row, 1, 1, other, channels);
  return dot;
}

// The mean of x under weights p, and x - mean. Where one p is almost 1 its x - mean is far smaller than x: a mean
// rounded once would leave an error there that the temperature makes 100 times larger. So a second sum takes up the
// rounding.
template <class Acc>
class Mean {
 public:
  Mean() = default;
  Mean(const Acc* p, const Acc* x, int64_t count) {
    double sum = 0, total = 0, rest = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += static_cast<double>(p[i]) * x[i];
      total += p[i];
    }
    mean_ = sum / total;
    for (int64_t i = 0; i < count; ++i) rest += p[i] * (x[i] - mean_);
    rest_ = rest / total;
  }
  Acc from(Acc x) const { return static_cast<Acc>((x - mean_) - rest_); }

 private:
  double mean_ = 0, rest_ = 0;
};

// Call `function(T{})` with the C++ type of `dtype`.
template <class Function>
void with_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::float32:
      return function(float{});
    case Dtype::float64:
      return function(double{});
    case Dtype::float16:
      return function(c10::Half{});
    case Dtype::bfloat16:
      return function(c10::BFloat16{});
  }
}

}  // namespace ppllava::CPU_CAPABILITY
