// One launcher per op and device. Each checks what it is given, allocates nothing on the device, and returns without
// waiting for the device. Python docstrings live in dit4dit/ops. programmatic: as of Kernel::launch.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tensor_view.h"

namespace dit4dit {

void preprocess_cpu(const std::vector<TensorView>& views, const std::vector<std::int64_t>& widths,
                    const TensorView& out, const std::string& filter);
void preprocess_cuda(const std::vector<TensorView>& views, const std::vector<std::int64_t>& widths,
                     const TensorView& out, const std::string& filter, std::uintptr_t stream, bool programmatic);

// The names are those of `Launch` in kernels/action_ode_tiles.cuh. ranks > 1 needs clusters, of sm_90 and later.
using NamedViews = std::map<std::string, TensorView>;
using NamedNumbers = std::map<std::string, std::int64_t>;
void action_ode_cuda(const NamedViews& tensors, const NamedNumbers& numbers, float max_guidance, std::int64_t limit_ns,
                     std::uintptr_t stream);
// multiprocessors, shared_memory (bytes of one block), capability (90) of the code that runs on the device; with shared_bytes of
// shared memory for each block, how many blocks_per_multiprocessor, and how many clusters of 2, 4 and 8 blocks (clusters_2, ...)
// can be resident at once
std::map<std::string, int> action_ode_facts(int device, int shared_bytes);

// q, k, v: bfloat16 [B, H, S, 128], normed and turned, of any strides that are multiples of 8, the last one 1; out: [B, S, H * 128].
// queries: 64 or 128 a block; the result does not depend on it.
void self_attention_cuda(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out, int queries,
                         std::uintptr_t stream, bool programmatic);

}  // namespace dit4dit
