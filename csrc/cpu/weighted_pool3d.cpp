// y[o] = sum_{i in o} p[o, i] v[i],  p[o, i] = softmax_{i in o}(w[i] / temperature)

#include "rows.h"     // defines: Accumulator, weigh_rows, dot_rows, for_each_pass, load_row, Mean, with_type
#include "windows.h"  // defines: Place, place_of, clip_of_patch, for_each_patch, for_each_window

#include <algorithm>  // defines: std::max, std::min
#include <limits>     // defines: std::numeric_limits

namespace ppllava::CPU_CAPABILITY {
namespace {

// Scratch of one thread for one window: the rows of its patches and their shares p.
template <class T>
struct Patches {
  std::vector<const T*> rows;
  std::vector<Accumulator<T>> shares;
  int64_t runs, run;

  void gather(const PoolArgs& a, const Place& place, int64_t first_channel) {
    runs = (place.end[0] - place.begin[0]) * (place.end[1] - place.begin[1]);
    run = place.end[2] - place.begin[2];
    const T* values = static_cast<const T*>(a.values.data) + first_channel;
    rows.clear();
    for_each_patch(place, [&](int64_t t, int64_t h, int64_t w) {
      rows.push_back(values + a.values.offset(place.batch, place.first_frame + t, h, w));
    });
    load_shares(shares, a, place);
  }
};

template <class T>
void forward(const PoolArgs& a) {
  const int64_t windows = count_windows(a);
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
  const int64_t windows = count_windows(a);
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
      for_each_slot(a, place, window, [&](int64_t slot, int64_t, int64_t, int64_t) {
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
  const std::vector<int64_t> first_patch = first_patches(a);  // [batch + 1]
  at::parallel_for(0, first_patch.back(), 16, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sum(a.channels);
    std::vector<const T*> rows;
    std::vector<Acc> shares;
    for (int64_t index = begin; index < end; ++index) {
      const Patch patch = patch_of(a, first_patch, index);
      const auto& [batch, at] = patch;
      rows.clear();
      shares.clear();
      Acc grad_weight = 0;
      for_each_window(a, patch, [&](int64_t window, int64_t slot) {
        rows.push_back(static_cast<const T*>(a.grad) + window * a.channels);
        shares.push_back(static_cast<const Acc*>(a.shares)[slot]);
        if (a.grad_scores) grad_weight += static_cast<const Acc*>(a.grad_scores)[slot];
      });
      const int64_t frame = a.clips[batch].first_frame + at[0];
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

// shares[o, i] = p[o, i]
template <class Acc>
void shares_of_windows(const PoolArgs& a) {
  at::parallel_for(0, count_windows(a), 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> shares;
    for (int64_t window = begin; window < end; ++window) {
      const Place place = place_of(a, window);
      load_shares(shares, a, place);
      auto share = shares.begin();
      for_each_slot(a, place, window, [&](int64_t slot, int64_t, int64_t, int64_t) {
        static_cast<Acc*>(a.shares)[slot] = *share++;
      });
    }
  });
}

// grad_scores[o, i] = p[o, i] (dots[o, i] - m[o]) / temperature, in place of the dots.
template <class Acc>
void scores_of_dots(const PoolArgs& a) {
  at::parallel_for(0, count_windows(a), 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> shares, dots;
    for (int64_t window = begin; window < end; ++window) {
      const Place place = place_of(a, window);
      shares.clear();
      dots.clear();
      for_each_slot(a, place, window, [&](int64_t slot, int64_t, int64_t, int64_t) {
        shares.push_back(static_cast<const Acc*>(a.shares)[slot]);
        dots.push_back(static_cast<const Acc*>(a.grad_scores)[slot]);
      });
      const Mean<Acc> mean(shares.data(), dots.data(), shares.size());
      int64_t i = 0;
      for_each_slot(a, place, window, [&](int64_t slot, int64_t, int64_t, int64_t) {
        static_cast<Acc*>(a.grad_scores)[slot] = shares[i] * mean.from(dots[i]) / static_cast<Acc>(a.temperature);
        ++i;
      });
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

void window_shares(const PoolArgs& a) {
  with_type(a.values.dtype, [&](auto zero) { shares_of_windows<Accumulator<decltype(zero)>>(a); });
}

void window_shares_backward(const PoolArgs& a) {
  with_type(a.values.dtype, [&](auto zero) {
    scores_of_dots<Accumulator<decltype(zero)>>(a);
    backward_patches<decltype(zero)>(a);
  });
}

}  // namespace ppllava::CPU_CAPABILITY
