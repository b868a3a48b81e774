// What a test can choose through the environment, and how a site is written.
#pragma once

#include <random>   // defines: std::mt19937
#include <string>   // defines: std::string
#include <utility>  // defines: std::pair

#include "cuda_on_host.h"  // defines: Kind, Site

namespace ppllava::cuda::host {

enum class Order { forward, reverse, shuffle };

// CUDA_ON_HOST_ORDER = forward | reverse | shuffle:<seed>; without it each launch of a kernel has the next of the
// three.
std::pair<Order, std::mt19937> choose_order(const void* kernel);

// Whether this barrier is left out: CUDA_ON_HOST_DROP=<n>, the n-th line of the file that CUDA_ON_HOST_SITES=<path>
// makes, which has the sites of barriers in the order in which the process first came to them.
bool dropped(Kind kind, const Site& site);

std::string describe(Kind kind, const Site& site);

}  // namespace ppllava::cuda::host
