// r[i] = softmax over one clip of l[i],  l[i] = s cos(x[i], c)

#include "rows.h"  // defines: Vec, dot_and_square, with_type

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

template <class Function>
void for_each_block(const std::vector<Block>& blocks, Function function) {
  at::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) function(blocks[n], n);
  });
}

int64_t offset_of(const RelevanceArgs& a, const Grid& grid, const Block& block, int64_t patch) {
  const int64_t row = patch / a.width;
  const int64_t frame = a.clips[block.batch].first_frame + row / a.height;
  return grid.offset(block.batch, frame, row % a.height, patch % a.width);
}

// max(norm, eps) that keeps NaN.
template <class Acc>
Acc clamped(Acc norm) {
  return norm < Acc(kEps) ? Acc(kEps) : norm;
}

// text[b] / max(|text[b]|, eps), and the norms.
template <class Acc>
std::vector<Acc> unit_text(const RelevanceArgs& a, std::vector<Acc>& norms) {
  const auto* text = static_cast<const Acc*>(a.text_embeds);
  std::vector<Acc> unit(a.batch * a.channels);
  norms.resize(a.batch);
  for (int64_t b = 0; b < a.batch; ++b) {
    const Acc* row = text + b * a.channels;
    norms[b] = std::sqrt(dot_and_square(row, row, a.channels).second);
    for (int64_t c = 0; c < a.channels; ++c) unit[b * a.channels + c] = row[c] / clamped(norms[b]);
  }
  return unit;
}

template <class T>
void forward(const RelevanceArgs& a) {
  using Acc = Accumulator<T>;
  auto* relevance = static_cast<Acc*>(a.relevance);
  std::vector<Acc> norms;
  const std::vector<Acc> unit = unit_text(a, norms);  // [B, C]
  const std::vector<Block> blocks = make_blocks(a);
  std::vector<Acc> largest(blocks.size());
  for_each_block(blocks, [&](const Block& block, int64_t n) {
    largest[n] = -std::numeric_limits<Acc>::infinity();
    for (int64_t p = block.begin; p < block.end; ++p) {
      const T* row = static_cast<const T*>(a.image_embeds.data) + offset_of(a, a.image_embeds, block, p);
      const auto [dot, square] = dot_and_square(row, unit.data() + block.batch * a.channels, a.channels);
      const Acc logit = static_cast<Acc>(a.scale) * (dot / clamped(std::sqrt(square)));
      relevance[block.offset + p] = logit;
      largest[n] = std::max(largest[n], logit);
    }
  });
  std::vector<Acc> clip_largest(a.batch, -std::numeric_limits<Acc>::infinity());
  for (size_t n = 0; n < blocks.size(); ++n)
    clip_largest[blocks[n].batch] = std::max(clip_largest[blocks[n].batch], largest[n]);
  std::vector<double> sums(blocks.size()), clip_sums(a.batch);
  for_each_block(blocks, [&](const Block& block, int64_t n) {
    for (int64_t p = block.begin; p < block.end; ++p) {
      Acc& r = relevance[block.offset + p];
      sums[n] += r = std::exp(r - clip_largest[block.batch]);
    }
  });
  for (size_t n = 0; n < blocks.size(); ++n) clip_sums[blocks[n].batch] += sums[n];
  for_each_block(blocks, [&](const Block& block, int64_t) {
    for (int64_t p = block.begin; p < block.end; ++p)
      relevance[block.offset + p] /= static_cast<Acc>(clip_sums[block.batch]);
  });
}

// dl[i] = r[i] (dr[i] - sum_j r[j] dr[j]);  dcos[i] = s dl[i];  ds = sum dl[i] cos[i]
// dx[i] = dcos[i] (c^ - cos[i] x^[i]) / |x[i]|;  dc^ = sum dcos[i] x^[i];  dc = (dc^ - (dc^.c^) c^) / |c|
template <class T>
void backward(const RelevanceArgs& a) {
  using Acc = Accumulator<T>;
  const auto *relevance = static_cast<const Acc*>(a.relevance), *grad = static_cast<const Acc*>(a.grad);
  std::vector<Acc> norms;
  const std::vector<Acc> unit = unit_text(a, norms);  // [B, C]
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
  for_each_block(blocks, [&](const Block& block, int64_t n) {
    const Acc* text = unit.data() + block.batch * a.channels;
    std::vector<Acc> out(a.channels);
    for (int64_t p = block.begin; p < block.end; ++p) {
      const T* row = static_cast<const T*>(a.image_embeds.data) + offset_of(a, a.image_embeds, block, p);
      const auto [dot, square] = dot_and_square(row, text, a.channels);
      const Acc norm = std::sqrt(square), cosine = dot / clamped(norm);
      const Acc spread = means[block.batch].from(grad[block.offset + p]);
      const double grad_logit = static_cast<double>(relevance[block.offset + p]) * spread;
      const Acc grad_cosine = static_cast<Acc>(a.scale * grad_logit);
      scale_sums[n] += grad_logit * cosine;
      // A zero embedding gets no gradient.
      const Acc along_text = norm <= Acc(kEps) ? Acc(0) : grad_cosine / norm;
      const Acc along_row = -along_text * cosine / clamped(norm);
      const Acc one = grad_cosine / clamped(norm);
      add_rows<1>(text_sums.data() + n * a.channels, &row, &one, a.channels);
      for (int64_t c = 0; c < a.channels; ++c) out[c] = along_text * text[c];
      add_rows<1>(out.data(), &row, &along_row, a.channels);
      T* grad_row = static_cast<T*>(a.grad_image.data) + offset_of(a, a.grad_image, block, p);
      store_row(grad_row, out.data(), a.channels);
    }
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
    const Acc* text = unit.data() + b * a.channels;
    const Acc along = dot_and_square(out, text, a.channels).first;
    const Acc inverse = norms[b] <= Acc(kEps) ? Acc(0) : 1 / clamped(norms[b]);
    for (int64_t c = 0; c < a.channels; ++c) out[c] = (out[c] - along * text[c]) * inverse;
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
