// One launcher per op and device. Each checks what it is given, allocates nothing on the device, and returns without
// waiting for the device. Python docstrings live in dit4dit/ops.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensor_view.h"

namespace dit4dit {

void preprocess_cpu(const std::vector<TensorView>& views, const std::vector<std::int64_t>& widths,
                    const TensorView& out, const std::string& filter);
void preprocess_cuda(const std::vector<TensorView>& views, const std::vector<std::int64_t>& widths,
                     const TensorView& out, const std::string& filter, std::uintptr_t stream);

}  // namespace dit4dit
