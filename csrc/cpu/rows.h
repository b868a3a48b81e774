// Rows of channels: everything that reads or writes them, vectorised over any dtype, accumulating in `Acc`.
#pragma once

#include <ATen/Parallel.h>            // defines: at::parallel_for
#include <ATen/cpu/vec/functional.h>  // defines: at::vec::vec_reduce_all
#include <ATen/cpu/vec/vec.h>         // defines: at::vec::Vectorized, convert_to_float, convert_from_float
#include <c10/util/BFloat16.h>        // defines: c10::BFloat16
#include <c10/util/Half.h>            // defines: c10::Half

#include <cmath>        // defines: std::exp, std::sqrt
#include <type_traits>  // defines: std::conditional_t
#include <utility>      // defines: std::pair
#include <vector>       // defines: std::vector

#include "kernels.h"  // defines: the structs and the kernels' declarations

namespace ppllava::CPU_CAPABILITY {

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
using Vec = at::vec::Vectorized<Accumulator<T>>;

// Channels in one step: two accumulator vectors, which is one vector of a 16-bit dtype.
template <class T>
constexpr int64_t kStep = 2 * Vec<T>::size();

template <class T>
std::pair<Vec<T>, Vec<T>> load_step(const T* row) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return {Vec<T>::loadu(row), Vec<T>::loadu(row + Vec<T>::size())};
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(row));
    return {low, high};
  }
}

template <class T>
void store_step(T* row, const Vec<T>& low, const Vec<T>& high) {
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

// sum[d] += shares[0] * rows[0][d] + ... for N rows at once, so that `sum` is read and written once for all of them.
template <int N, class T>
void add_rows(Accumulator<T>* sum, const T* const* rows, const Accumulator<T>* shares, int64_t channels) {
  using V = Vec<T>;
  int64_t d = 0;
  for (; d + kStep<T> <= channels; d += kStep<T>) {
    V low = V::loadu(sum + d), high = V::loadu(sum + d + V::size());
    for (int n = 0; n < N; ++n) {
      const auto [a, b] = load_step(rows[n] + d);
      low = at::vec::fmadd(V(shares[n]), a, low);
      high = at::vec::fmadd(V(shares[n]), b, high);
    }
    low.store(sum + d);
    high.store(sum + d + V::size());
  }
  for (; d < channels; ++d)
    for (int n = 0; n < N; ++n) sum[d] += shares[n] * static_cast<Accumulator<T>>(rows[n][d]);
}

// sum[d] = shares[0] * rows[0][d] + ... over `count` rows.
template <class T>
void weigh_rows(
    Accumulator<T>* sum, const T* const* rows, const Accumulator<T>* shares, int64_t count, int64_t channels) {
  std::fill(sum, sum + channels, Accumulator<T>(0));
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) add_rows<4>(sum, rows + n, shares + n, channels);
  for (; n < count; ++n) add_rows<1>(sum, rows + n, shares + n, channels);
}

// out[d] = in[d], converted.
template <class T>
void store_row(T* out, const Accumulator<T>* in, int64_t channels) {
  using V = Vec<T>;
  int64_t d = 0;
  for (; d + kStep<T> <= channels; d += kStep<T>) store_step(out + d, V::loadu(in + d), V::loadu(in + d + V::size()));
  for (; d < channels; ++d) out[d] = static_cast<T>(in[d]);
}

template <class T>
void load_row(Accumulator<T>* out, const T* in, int64_t channels) {
  int64_t d = 0;
  for (; d + kStep<T> <= channels; d += kStep<T>) {
    const auto [low, high] = load_step(in + d);
    low.store(out + d);
    high.store(out + d + Vec<T>::size());
  }
  for (; d < channels; ++d) out[d] = static_cast<Accumulator<T>>(in[d]);
}

// (sum_d row[d] * other[d], sum_d row[d]^2)
template <class T>
std::pair<Accumulator<T>, Accumulator<T>> dot_and_square(const T* row, const Accumulator<T>* other, int64_t channels) {
  using V = Vec<T>;
  V dot_low(0), dot_high(0), square_low(0), square_high(0);
  int64_t d = 0;
  for (; d + kStep<T> <= channels; d += kStep<T>) {
    const auto [low, high] = load_step(row + d);
    dot_low = at::vec::fmadd(low, V::loadu(other + d), dot_low);
    dot_high = at::vec::fmadd(high, V::loadu(other + d + V::size()), dot_high);
    square_low = at::vec::fmadd(low, low, square_low);
    square_high = at::vec::fmadd(high, high, square_high);
  }
  Accumulator<T> dot = total(dot_low + dot_high), square = total(square_low + square_high);
  for (; d < channels; ++d) {
    const Accumulator<T> x = static_cast<Accumulator<T>>(row[d]);
    dot += x * other[d];
    square += x * x;
  }
  return {dot, square};
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
