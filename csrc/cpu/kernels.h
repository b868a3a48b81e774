// The CPU kernels. Each of their sources is compiled once per instruction set into a namespace of that name, as ATen
// does with its own; bindings.cpp asks ATen which one this machine runs.
#pragma once

#include "../shapes.h"  // defines: PoolArgs, TileArgs, ScoreArgs, RelevanceArgs

#define PPLLAVA_DECLARE_CPU_KERNELS(capability)         \
  namespace ppllava::capability {                       \
  void prompt_relevance(const RelevanceArgs&);          \
  void prompt_relevance_backward(const RelevanceArgs&); \
  void weighted_pool3d(const PoolArgs&);                \
  void weighted_pool3d_backward(const PoolArgs&);       \
  void window_shares(const PoolArgs&);                  \
  void window_shares_backward(const PoolArgs&);         \
  void pool_hidden(const TileArgs&);                    \
  void pool_hidden_backward(const TileArgs&);           \
  void score_rows(const ScoreArgs&);                    \
  }

PPLLAVA_DECLARE_CPU_KERNELS(DEFAULT)
PPLLAVA_DECLARE_CPU_KERNELS(AVX2)
PPLLAVA_DECLARE_CPU_KERNELS(AVX512)
