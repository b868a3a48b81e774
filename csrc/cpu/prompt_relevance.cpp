// r[i] = softmax over one clip of l[i],  l[i] = s cos(x[i], c)

#include "rows.h"  // defines: Accumulator, Vec, dot_rows, dot_of, kStreams, load_vector, store_vectors, Mean, with_type

#include <algorithm>  // defines: std::max, std::min
#include <limits>     // defines: std::numeric_limits

namespace ppllava::CPU_CAPABILITY {
namespace {

constexpr double kEps = 1e-12;  // as torch.nn.functional.normalize

// Patches are handled in blocks of fixed size that never cross clips, so that every sum has one order on any machine.
constexpr int64_t kBlock = 256;

struct Block {
  int64_t batch, begin, end;  // patches of the clip, in (T, H, W) order
  int64_t offset;             // of the clip's first patch in relevance
};

std::vector<Block> make_blocks(const RelevanceArgs& a) {
  std::vector<Block> blocks;
  int64_t offset = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t patches = a.clips[b].frames * a.height * a.width;
    for (int64_t p = 0; p < patches; p += kBlock) blocks.push_back({b, p, std::min(p + kBlock, patches), offset});
    offset += patches;
  }
  return blocks;
}

// In parallel where there are more than `serial` of them.
template <class Function>
void for_each_block(const std::vector<Block>& blocks, int64_t serial, Function function) {
  at::parallel_for(0, blocks.size(), serial, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) function(blocks[n], n);
  });
}

int64_t offset_of(const RelevanceArgs& a, const Grid& grid, const Block& block, int64_t patch) {
  const int64_t row = patch / a.width;
  const int64_t frame = a.clips[block.batch].first_frame + row / a.height;
  return grid.offset(block.batch, frame, row % a.height, patch % a.width);
}

// max(norm, eps) that keeps NaN.
double clamped(double norm) { return norm < kEps ? kEps : norm; }

// The text of each clip.
template <class Acc>
struct Text {
  const Acc* row;
  double norm;
};

template <class Acc>
std::vector<Text<Acc>> make_texts(const RelevanceArgs& a) {
  std::vector<Text<Acc>> texts;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Acc* row = static_cast<const Acc*>(a.text_embeds) + b * a.channels;
    texts.push_back({row, std::sqrt(static_cast<double>(dot_of(row, row, a.channels)))});
  }
  return texts;
}

// Patches that are read together: a quarter of the block apart, each is a stream to the prefetchers.
constexpr int64_t kGroup = 4;
static_assert(kGroup <= kStreams);

template <class T>
struct Group {
  int64_t count;
  int64_t patches[kGroup];
  const T* rows[kGroup];
  double norms[kGroup], cosines[kGroup];
};

// The cosines are double: times the scale they are exponents, where an error in the last place of a float shows.
template <class T, class Function>
void for_each_group(const RelevanceArgs& a, const Block& block, const Text<Accumulator<T>>& text, Function function) {
  const int64_t apart = (block.end - block.begin + kGroup - 1) / kGroup;
  for (int64_t first = block.begin; first < block.begin + apart; ++first) {
    Group<T> group{};
    for (int64_t p = first; p < block.end; p += apart) {
      group.rows[group.count] = static_cast<const T*>(a.image_embeds.data) + offset_of(a, a.image_embeds, block, p);
      group.patches[group.count++] = p;
    }
    Accumulator<T> dots[kGroup], squares[kGroup];
    dot_rows<true>(dots, squares, group.rows, group.count, 1, text.row, a.channels);
    for (int64_t k = 0; k < group.count; ++k) {
      group.norms[k] = std::sqrt(static_cast<double>(squares[k]));
      group.cosines[k] = dots[k] / (clamped(group.norms[k]) * clamped(text.norm));
    }
    function(group);
  }
}

template <class T>
void forward(const RelevanceArgs& a) {
  using Acc = Accumulator<T>;
  auto* relevance = static_cast<Acc*>(a.relevance);
  const std::vector<Text<Acc>> texts = make_texts<Acc>(a);
  const std::vector<Block> blocks = make_blocks(a);
  // exp(l - largest) and its sum by blocks; then all blocks of a clip are brought to one largest and one sum.
  std::vector<double> largest(blocks.size()), clip_largest(a.batch, -std::numeric_limits<double>::infinity());
  std::vector<double> sums(blocks.size()), clip_sums(a.batch);
  for_each_block(blocks, 1, [&](const Block& block, int64_t n) {
    double logits[kBlock];
    largest[n] = -std::numeric_limits<double>::infinity();
    for_each_group<T>(a, block, texts[block.batch], [&](const Group<T>& group) {
      for (int64_t k = 0; k < group.count; ++k) {
        const double logit = a.scale * group.cosines[k];
        logits[group.patches[k] - block.begin] = logit;
        largest[n] = std::max(largest[n], logit);
      }
    });
    for (int64_t p = block.begin; p < block.end; ++p)
      sums[n] += relevance[block.offset + p] = std::exp(static_cast<Acc>(logits[p - block.begin] - largest[n]));
  });
  for (size_t n = 0; n < blocks.size(); ++n)
    clip_largest[blocks[n].batch] = std::max(clip_largest[blocks[n].batch], largest[n]);
  const auto share = [&](size_t n) { return std::exp(largest[n] - clip_largest[blocks[n].batch]); };
  for (size_t n = 0; n < blocks.size(); ++n) clip_sums[blocks[n].batch] += sums[n] * share(n);
  for_each_block(blocks, 64, [&](const Block& block, int64_t n) {
    const double factor = share(n) / clip_sums[block.batch];
    for (int64_t p = block.begin; p < block.end; ++p) {
      Acc& r = relevance[block.offset + p];
      r = static_cast<Acc>(r * factor);
    }
  });
}

template <class T>
struct Weights {
  Accumulator<T> along_text[kGroup], along_row[kGroup], to_text[kGroup];
  T* grad_rows[kGroup];
};

// grad_rows[k] = along_text[k] text + along_row[k] rows[k];  text_sum += to_text[k] rows[k]
template <class T>
void spread_group(
    const Group<T>& group, const Weights<T>& w, const Accumulator<T>* text, Accumulator<T>* text_sum,
    int64_t channels) {
  using V = Vec<T>;
  int64_t c = 0;
  for (; c + 2 * V::size() <= channels; c += 2 * V::size()) {
    const V text_c[2] = {V::loadu(text + c), V::loadu(text + c + V::size())};
    V sum[2] = {V(0), V(0)};
    for (int64_t k = 0; k < group.count; ++k) {
      V out[2];
      for (int v = 0; v < 2; ++v) {
        const V x = load_vector(group.rows[k] + c + v * V::size());
        sum[v] = at::vec::fmadd(V(w.to_text[k]), x, sum[v]);
        out[v] = at::vec::fmadd(V(w.along_row[k]), x, V(w.along_text[k]) * text_c[v]);
      }
      store_vectors(w.grad_rows[k] + c, out[0], out[1]);
    }
    for (int v = 0; v < 2; ++v) {
      const int64_t d = c + v * V::size();
      (V::loadu(text_sum + d) + sum[v]).store(text_sum + d);
    }
  }
  for (; c < channels; ++c) {
    Accumulator<T> sum = 0;
    for (int64_t k = 0; k < group.count; ++k) {
      const Accumulator<T> x = static_cast<Accumulator<T>>(group.rows[k][c]);
      sum += w.to_text[k] * x;
      w.grad_rows[k][c] = static_cast<T>(w.along_text[k] * text[c] + w.along_row[k] * x);
    }
    text_sum[c] += sum;
  }
}

// dl[i] = r[i] (dr[i] - sum_j r[j] dr[j]);  dcos[i] = s dl[i];  ds = sum dl[i] cos[i]
// dx[i] = dcos[i] (c^ - cos[i] x^[i]) / |x[i]|;  dc^ = sum dcos[i] x^[i];  dc = (dc^ - (dc^.c^) c^) / |c|
template <class T>
void backward(const RelevanceArgs& a) {
  using Acc = Accumulator<T>;
  const auto *relevance = static_cast<const Acc*>(a.relevance), *grad = static_cast<const Acc*>(a.grad);
  const std::vector<Text<Acc>> texts = make_texts<Acc>(a);
  const std::vector<Block> blocks = make_blocks(a);
  std::vector<Mean<Acc>> means(a.batch);  // of dr under r
  at::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    for (const Block& block : blocks) {
      if (block.begin != 0 || block.batch < begin || block.batch >= end) continue;
      const int64_t patches = a.clips[block.batch].frames * a.height * a.width;
      means[block.batch] = Mean<Acc>(relevance + block.offset, grad + block.offset, patches);
    }
  });
  std::vector<double> scale_sums(blocks.size());
  std::vector<Acc> text_sums(blocks.size() * a.channels);  // [blocks, C]: of dc^
  for_each_block(blocks, 1, [&](const Block& block, int64_t n) {
    const Text<Acc>& text = texts[block.batch];
    for_each_group<T>(a, block, text, [&](const Group<T>& group) {
      Weights<T> w;
      for (int64_t k = 0; k < group.count; ++k) {
        const int64_t p = group.patches[k];
        const Acc spread = means[block.batch].from(grad[block.offset + p]);
        const double grad_logit = static_cast<double>(relevance[block.offset + p]) * spread;
        const double norm = group.norms[k], to_text = a.scale * grad_logit / clamped(norm);
        scale_sums[n] += grad_logit * group.cosines[k];
        // A zero embedding gets no gradient.
        const double to_row = norm <= kEps ? 0 : to_text;
        w.to_text[k] = static_cast<Acc>(to_text);
        w.along_text[k] = static_cast<Acc>(to_row / clamped(text.norm));
        w.along_row[k] = static_cast<Acc>(-to_row * group.cosines[k] / clamped(norm));
        w.grad_rows[k] = static_cast<T*>(a.grad_image.data) + offset_of(a, a.grad_image, block, p);
      }
      spread_group(group, w, text.row, text_sums.data() + n * a.channels, a.channels);
    });
  });

  auto* grad_text = static_cast<Acc*>(a.grad_text);
  std::fill(grad_text, grad_text + a.batch * a.channels, Acc(0));
  double grad_scale = 0;
  for (size_t n = 0; n < blocks.size(); ++n) {
    Acc* out = grad_text + blocks[n].batch * a.channels;
    for (int64_t c = 0; c < a.channels; ++c) out[c] += text_sums[n * a.channels + c];
    grad_scale += scale_sums[n];
  }
  *static_cast<Acc*>(a.grad_scale) = static_cast<Acc>(grad_scale);
  for (int64_t b = 0; b < a.batch; ++b) {
    Acc* out = grad_text + b * a.channels;
    const Text<Acc>& text = texts[b];
    const double norm = clamped(text.norm), inverse = text.norm <= kEps ? 0 : 1 / norm;
    const Acc along = static_cast<Acc>(dot_of(out, text.row, a.channels) / (norm * norm));
    for (int64_t c = 0; c < a.channels; ++c) out[c] = (out[c] - along * text.row[c]) * static_cast<Acc>(inverse);
  }
}

}  // namespace

void prompt_relevance(const RelevanceArgs& a) {
  with_type(a.image_embeds.dtype, [&](auto zero) { forward<decltype(zero)>(a); });
}

void prompt_relevance_backward(const RelevanceArgs& a) {
  with_type(a.image_embeds.dtype, [&](auto zero) { backward<decltype(zero)>(a); });
}

}  // namespace ppllava::CPU_CAPABILITY
