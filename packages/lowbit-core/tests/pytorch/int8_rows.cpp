// A backend's operator: tokens times int8 rows that were packed column by column, with a scale a row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

using torch::stable::Tensor;

Tensor linear(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> bias) {
  x = torch::stable::contiguous(x);
  const int64_t k = codes.size(0), n = codes.size(1), m = k ? x.numel() / k : 0;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor out = torch::stable::new_empty(x, shape);
  const float* tokens = x.const_data_ptr<float>();
  const int8_t* values = codes.const_data_ptr<int8_t>();
  const float* scales = scale.const_data_ptr<float>();
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  float* result = out.mutable_data_ptr<float>();
  std::vector<float> sums(n);
  for (int64_t i = 0; i < m; ++i) {
    sums.assign(n, 0.0f);
    for (int64_t j = 0; j < k; ++j)
      for (int64_t c = 0; c < n; ++c) sums[c] += tokens[i * k + j] * values[j * n + c];
    for (int64_t c = 0; c < n; ++c) result[i * n + c] = sums[c] * scales[c] + (added ? added[c] : 0.0f);
  }
  return out;
}

STABLE_TORCH_LIBRARY(int8_rows, m) {
  m.def("linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(int8_rows, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
}
