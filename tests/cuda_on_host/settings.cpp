#include "settings.h"

#include <cstdarg>  // defines: va_list
#include <cstdio>   // defines: fprintf
#include <cstdlib>  // defines: getenv, abort
#include <map>      // defines: std::map

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>  // defines: __sanitizer_print_stack_trace
#endif

namespace ppllava::cuda::host {
namespace {

const char* name(Kind kind) {
  static constexpr const char* kNames[] = {"__syncthreads",   "grid_barrier",     "__syncwarp",   "__shfl_sync",
                                           "__shfl_xor_sync", "__shfl_down_sync", "__ballot_sync"};
  return kNames[static_cast<int>(kind)];
}

std::string line_of(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

// From 1, in order of first arrival.
int number_of(Kind kind, const Site& site) {
  static std::map<std::string, int> sites;
  const auto [at, fresh] = sites.try_emplace(line_of(site), sites.size() + 1);
  if (const char* path = fresh ? getenv("CUDA_ON_HOST_SITES") : nullptr) {
    static FILE* list = fopen(path, "w");
    if (!list) fail("CUDA_ON_HOST_SITES: cannot write %s", path);
    fprintf(list, "%s %s\n", at->first.c_str(), name(kind));
    fflush(list);
  }
  return at->second;
}

}  // namespace

std::pair<Order, std::mt19937> choose_order(const void* kernel) {
  static std::map<const void*, int> launches;  // the first order of each kernel is another one
  const int n = launches.try_emplace(kernel, launches.size()).first->second++;
  const char* asked = getenv("CUDA_ON_HOST_ORDER");
  if (!asked || !*asked) return {static_cast<Order>(n % 3), std::mt19937(n)};
  const std::string order = asked;
  if (order == "forward") return {Order::forward, {}};
  if (order == "reverse") return {Order::reverse, {}};
  if (order.starts_with("shuffle:")) return {Order::shuffle, std::mt19937(n + atoi(asked + 8))};
  fail("CUDA_ON_HOST_ORDER must be forward, reverse or shuffle:<seed>, got %s", asked);
}

bool dropped(Kind kind, const Site& site) {
  static const char* drop = getenv("CUDA_ON_HOST_DROP");
  static const bool counts = drop || getenv("CUDA_ON_HOST_SITES");
  if (!counts || kind > Kind::syncwarp) return false;
  const int number = number_of(kind, site);
  return drop && number == atoi(drop);
}

int resident_blocks() {
  const char* asked = getenv("CUDA_ON_HOST_BLOCKS");
  return asked && *asked ? atoi(asked) : 3;
}

std::string describe(Kind kind, const Site& site) {
  return std::string(name(kind)) + " at " + line_of(site) + ":" + std::to_string(site.column());
}

void fail(const char* format, ...) {
  char text[2048];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  fprintf(stderr, "cuda_on_host: %s\n", text);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_print_stack_trace();
#endif
  fflush(stderr);
  abort();
}

}  // namespace ppllava::cuda::host
