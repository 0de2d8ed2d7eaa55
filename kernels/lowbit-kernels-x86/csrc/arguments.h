// What operators ask of their arguments before a kernel sees a pointer.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>

#include "format.h"
#include "kernels.h"

namespace lowbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string told(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "shape (" + text + ")";
}

inline void check(const Tensor& tensor, const char* name, std::initializer_list<ScalarType> types) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU; it is not");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; it has ", told(tensor), " and gaps");
  STD_TORCH_CHECK(std::find(types.begin(), types.end(), tensor.scalar_type()) != types.end(), name,
                  " has a dtype that this format or operator does not have: number ",
                  static_cast<int>(tensor.scalar_type()));
}

inline void check_numel(const Tensor& tensor, const char* name, int64_t numel) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " numbers; it has ", told(tensor));
}

inline Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "values must be float32, bfloat16 or float16");
  }
}

inline void check_scale(const Tensor& scale, Scale kind, int64_t numel) {
  switch (kind) {
    case Scale::float32: check(scale, "scale", {ScalarType::Float}); break;
    case Scale::bfloat16: check(scale, "scale", {ScalarType::BFloat16}); break;
    case Scale::float16: check(scale, "scale", {ScalarType::Half}); break;
    case Scale::e8m0: check(scale, "scale", {ScalarType::Byte, ScalarType::Float8_e8m0fnu}); break;
    case Scale::e4m3fn: check(scale, "scale", {ScalarType::Float8_e4m3fn}); break;
  }
  check_numel(scale, "scale", numel);
}

inline void check_zero(const std::optional<Tensor>& zero, const Format& format, int64_t numel) {
  STD_TORCH_CHECK(zero.has_value() == format.zero, "zero points must be given where the format has them, and only there");
  if (!zero) return;
  check(*zero, "zero", {format.zero_signed ? ScalarType::Char : ScalarType::Byte});
  check_numel(*zero, "zero", numel);
}

inline const void* pointer(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// The operator `linear`; products.cpp.
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
              const std::optional<Tensor>& tensor_scale, const std::optional<Tensor>& pre_scale,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& offs, const std::string& spec, int64_t n,
              const std::string& activation, const std::optional<Tensor>& act_scale,
              const std::optional<Tensor>& act_zero);

}  // namespace lowbit
