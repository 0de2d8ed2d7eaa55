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
  bool zero, tensor_scale;
};

// Throws std::runtime_error on a spec that no kernel of this library takes.
Format parse(const std::string& spec);

}  // namespace lowbit
