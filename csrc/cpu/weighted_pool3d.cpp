// y[o] = sum_{i in o} p[o, i] v[i],  p[o, i] = softmax_{i in o}(w[i] / temperature)

#include "rows.h"  // defines: Accumulator, weigh_rows, dot_rows, for_each_pass, load_row, Mean, with_type

#include <algorithm>  // defines: std::max, std::min, std::upper_bound
#include <limits>     // defines: std::numeric_limits

namespace ppllava::CPU_CAPABILITY {
namespace {

// One window: where it lies in its clip, and the index of its output row.
struct Place {
  int64_t batch, first_frame;
  int64_t begin[3], end[3];  // along (T, H, W)
};

Axis axis_of(const PoolArgs& a, const Clip& clip, int n) {
  const int64_t sizes[3] = {clip.frames, a.height, a.width};
  return {sizes[n], n == 0 ? clip.outputs : a.window.outputs[n], a.window.kernel[n], a.window.stride[n]};
}

int64_t clip_of_output(const PoolArgs& a, int64_t output) {
  const Clip* clip =
      std::upper_bound(a.clips, a.clips + a.batch, output, [](int64_t o, const Clip& c) { return o < c.first_output; });
  return clip - a.clips - 1;
}

Place place_of(const PoolArgs& a, int64_t index) {  // index: of [outputs, Ho, Wo]
  const int64_t column = index % a.window.outputs[2], rest = index / a.window.outputs[2];
  const int64_t row = rest % a.window.outputs[1], output = rest / a.window.outputs[1];
  const int64_t batch = clip_of_output(a, output);
  const Clip& clip = a.clips[batch];
  const int64_t at[3] = {output - clip.first_output, row, column};
  Place place{batch, clip.first_frame, {}, {}};
  for (int n = 0; n < 3; ++n) {
    const Axis axis = axis_of(a, clip, n);
    place.begin[n] = axis.begin(at[n]);
    place.end[n] = axis.end(at[n]);
  }
  return place;
}

template <class Function>
void for_each_patch(const Place& p, Function function) {
  for (int64_t t = p.begin[0]; t < p.end[0]; ++t)
    for (int64_t h = p.begin[1]; h < p.end[1]; ++h)
      for (int64_t w = p.begin[2]; w < p.end[2]; ++w) function(t, h, w);
}

// Scratch of one thread for one window: the rows of its patches and their shares p.
template <class T>
struct Patches {
  std::vector<const T*> rows;
  std::vector<Accumulator<T>> shares;
  int64_t runs, run;

  void gather(const PoolArgs& a, const Place& place, int64_t first_channel) {
    rows.clear();
    shares.clear();
    runs = (place.end[0] - place.begin[0]) * (place.end[1] - place.begin[1]);
    run = place.end[2] - place.begin[2];
    const T* values = static_cast<const T*>(a.values.data) + first_channel;
    const auto* weights = static_cast<const Accumulator<T>*>(a.weights.data);
    for_each_patch(place, [&](int64_t t, int64_t h, int64_t w) {
      const int64_t frame = place.first_frame + t;
      rows.push_back(values + a.values.offset(place.batch, frame, h, w));
      shares.push_back(weights ? weights[a.weights.offset(place.batch, frame, h, w)] : Accumulator<T>(0));
    });
    Accumulator<T> largest = -std::numeric_limits<Accumulator<T>>::infinity();
    double sum = 0;
    for (const auto score : shares) largest = std::max(largest, score);
    for (auto& share : shares) sum += share = std::exp((share - largest) / static_cast<Accumulator<T>>(a.temperature));
    for (auto& share : shares) share /= static_cast<Accumulator<T>>(sum);
  }
};

template <class T>
void forward(const PoolArgs& a) {
  const int64_t windows = a.outputs * a.window.outputs[1] * a.window.outputs[2];
  // Few windows, as in one token per video: the channels are split, too, so that every core has work.
  const int64_t wanted = (4 * at::get_num_threads() + windows - 1) / windows;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, a.channels / 256));
  const int64_t width = (a.channels + parts - 1) / parts;
  at::parallel_for(0, windows * parts, 1, [&](int64_t begin, int64_t end) {
    Patches<T> patches;
    std::vector<Accumulator<T>> sum(width);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t window = index / parts, first = index % parts * width;
      const int64_t channels = std::min(width, a.channels - first);
      patches.gather(a, place_of(a, window), first);
      T* out = static_cast<T*>(a.pooled) + window * a.channels + first;
      weigh_rows(out, sum.data(), patches.rows.data(), patches.shares.data(), patches.runs, patches.run, channels);
    }
  });
}

// shares[o, i] = p[o, i];  grad_scores[o, i] = p[o, i] (g[o].v[i] - m[o]) / temperature,
// m[o] = sum_j p[o, j] g[o].v[j]
template <class T>
void backward_windows(const PoolArgs& a) {
  using Acc = Accumulator<T>;
  const int64_t windows = a.outputs * a.window.outputs[1] * a.window.outputs[2];
  at::parallel_for(0, windows, 1, [&](int64_t begin, int64_t end) {
    Patches<T> patches;
    std::vector<Acc> grad(a.channels), dots;
    for (int64_t window = begin; window < end; ++window) {
      const Place place = place_of(a, window);
      patches.gather(a, place, 0);
      const int64_t count = patches.rows.size();
      Mean<Acc> mean;
      dots.assign(count, 0);
      if (a.grad_scores) {
        load_row(grad.data(), static_cast<const T*>(a.grad) + window * a.channels, a.channels);
        for_each_pass(patches.runs, patches.run, [&](int64_t i, int64_t some) {
          Acc pass[kStreams];
          dot_rows<false, T>(pass, nullptr, patches.rows.data() + i, some, patches.run, grad.data(), a.channels);
          for (int64_t n = 0; n < some; ++n) dots[i + n * patches.run] = pass[n];
        });
        mean = Mean<Acc>(patches.shares.data(), dots.data(), count);
      }
      int64_t i = 0;
      for_each_patch(place, [&](int64_t t, int64_t h, int64_t w) {
        const int64_t slot =
            a.window.slot(a.clips[place.batch], window, t - place.begin[0], h - place.begin[1], w - place.begin[2]);
        const Acc share = patches.shares[i];
        static_cast<Acc*>(a.shares)[slot] = share;
        if (a.grad_scores) {
          const Acc grad_score = share * mean.from(dots[i]) / static_cast<Acc>(a.temperature);
          static_cast<Acc*>(a.grad_scores)[slot] = grad_score;
        }
        ++i;
      });
    }
  });
}

// grad_values[i] = sum_{o with i} p[o, i] g[o];  grad_weights[i] = sum_{o with i} grad_scores[o, i]
// Every patch collects its own windows, in order: no atomics, the same bits every time.
template <class T>
void backward_patches(const PoolArgs& a) {
  using Acc = Accumulator<T>;
  std::vector<int64_t> first_patch{0};  // [batch + 1]
  for (int64_t b = 0; b < a.batch; ++b) first_patch.push_back(first_patch[b] + a.clips[b].frames * a.height * a.width);
  at::parallel_for(0, first_patch.back(), 16, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sum(a.channels);
    std::vector<const T*> rows;
    std::vector<Acc> shares;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = std::upper_bound(first_patch.begin(), first_patch.end(), index) - first_patch.begin() - 1;
      const Clip& clip = a.clips[batch];
      const int64_t rest = (index - first_patch[batch]) / a.width;
      const int64_t at[3] = {rest / a.height, rest % a.height, (index - first_patch[batch]) % a.width};
      const Axis axes[3] = {axis_of(a, clip, 0), axis_of(a, clip, 1), axis_of(a, clip, 2)};
      rows.clear();
      shares.clear();
      Acc grad_weight = 0;
      for (int64_t t = axes[0].first(at[0]); t < axes[0].last(at[0]); ++t)
        for (int64_t h = axes[1].first(at[1]); h < axes[1].last(at[1]); ++h)
          for (int64_t w = axes[2].first(at[2]); w < axes[2].last(at[2]); ++w) {
            const int64_t window = ((clip.first_output + t) * a.window.outputs[1] + h) * a.window.outputs[2] + w;
            const int64_t slot = a.window.slot(
                clip, window, at[0] - axes[0].begin(t), at[1] - axes[1].begin(h), at[2] - axes[2].begin(w));
            rows.push_back(static_cast<const T*>(a.grad) + window * a.channels);
            shares.push_back(static_cast<const Acc*>(a.shares)[slot]);
            if (a.grad_scores) grad_weight += static_cast<const Acc*>(a.grad_scores)[slot];
          }
      const int64_t frame = clip.first_frame + at[0];
      if (a.grad_weights.data) {
        static_cast<Acc*>(a.grad_weights.data)[a.grad_weights.offset(batch, frame, at[1], at[2])] = grad_weight;
      }
      if (a.grad_values.data) {
        T* out = static_cast<T*>(a.grad_values.data) + a.grad_values.offset(batch, frame, at[1], at[2]);
        weigh_rows(out, sum.data(), rows.data(), shares.data(), rows.size(), 1, a.channels);
      }
    }
  });
}

}  // namespace

void weighted_pool3d(const PoolArgs& a) {
  with_type(a.values.dtype, [&](auto zero) { forward<decltype(zero)>(a); });
}

void weighted_pool3d_backward(const PoolArgs& a) {
  with_type(a.values.dtype, [&](auto zero) {
    backward_windows<decltype(zero)>(a);
    backward_patches<decltype(zero)>(a);
  });
}

}  // namespace ppllava::CPU_CAPABILITY
