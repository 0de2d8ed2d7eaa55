// What a format's spec string says, as plain values (the grammar stands in lowbit.format).
#pragma once

#include <cstdint>
#include <string>

namespace lowbit {

struct Element {
  bool is_float;
  bool is_signed;
  int bits;
  // Fields of a float.
  int exponent, mantissa, bias;
};

enum class Scale { float32, bfloat16, float16, e8m0, e4m3fn };

struct Format {
  Element element;
  // Rows and columns that a scale covers; 0: all of them.
  int64_t rows, columns;
  Scale scale;
  bool zero = false, tensor_scale = false;
  // Of the zero points, which may be signed where codes are not.
  bool zero_signed = false;

  // Scales along k columns.
  int64_t groups(int64_t k) const { return columns ? (k + columns - 1) / columns : 1; }
};

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Throws std::runtime_error on a spec that no kernel of this library takes.
Format parse(const std::string& spec);

}  // namespace lowbit
