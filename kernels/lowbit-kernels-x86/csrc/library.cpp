// The operators lowbit_x86::*, through torch's stable ABI: every argument is checked here, before a kernel sees a pointer.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "isa.h"

namespace lowbit {
namespace {

// Canonical parts of a table, or of matrices one after another, once they are checked.
struct Table : Rows {
  Table(const Tensor& qdata, const Tensor& of_scale, const std::optional<Tensor>& of_zero,
        const std::optional<Tensor>& tensor_scale, const std::string& spec, int64_t columns) {
    format = parse(spec);
    k = columns;
    STD_TORCH_CHECK(qdata.dim() > 0, "qdata must have a dimension");
    STD_TORCH_CHECK(k >= 0, "k must not be negative; it is ", k);
    check(qdata, "qdata",
          {ScalarType::Byte, ScalarType::Char, ScalarType::Float8_e4m3fn, ScalarType::Float8_e5m2});
    // Codes are padded to whole runs that end on a byte.
    bytes = up(k, 8 / std::gcd(format.element.bits, 8)) * format.element.bits / 8;
    STD_TORCH_CHECK(qdata.size(qdata.dim() - 1) == bytes, "qdata must have rows of ", bytes, " bytes for ", k,
                    " values; it has ", told(qdata));
    matrix = qdata.dim() > 1 ? qdata.size(qdata.dim() - 2) : 1;
    rows = bytes ? qdata.numel() / bytes : 0;
    matrices = matrix ? rows / matrix : 0;
    groups = format.groups(k);
    const int64_t covered = format.rows ? format.rows : std::max<int64_t>(matrix, 1);
    block = covered == 1 ? 0 : covered;
    blocks = up(matrix, covered) / covered;
    check_scale(of_scale, format.scale, matrices * blocks * groups);
    check_zero(of_zero, format, matrices * blocks * groups);
    STD_TORCH_CHECK(tensor_scale.has_value() == format.tensor_scale,
                    "a tensor scale must be given where the format has one, and only there");
    factors = 0;
    if (tensor_scale) {
      check(*tensor_scale, "tensor_scale", {ScalarType::Float});
      factors = tensor_scale->numel() == matrices ? 1 : blocks;
      check_numel(*tensor_scale, "tensor_scale", matrices * factors);
    }
    codes = static_cast<const uint8_t*>(qdata.const_data_ptr());
    scale = of_scale.const_data_ptr();
    zero = pointer(of_zero);
    factor = static_cast<const float*>(pointer(tensor_scale));
  }
};

float largest_of(const Element& element) {
  if (!element.is_float) return static_cast<float>((1 << (element.bits - element.is_signed)) - 1);
  const bool has_infinity = element.exponent == 5;
  // Of e4m3fn the last code is NaN.
  const float fraction = element.exponent == 4 ? 1.75f : 2 - std::ldexp(1.0f, -element.mantissa);
  return std::ldexp(fraction, (1 << element.exponent) - 1 - has_infinity - element.bias);
}

// Unbiased exponent and mantissa of a number that is not negative.
std::pair<int, int32_t> fields(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return {(bits >> 23) - 127, bits & 0x7fffff};
}

Rounding rounding_of(const Format& format, const std::string& mode) {
  const Element& element = format.element;
  const float largest = largest_of(element), steps = static_cast<float>((1 << element.bits) - 1);
  const bool halves = !element.is_float && element.is_signed;
  const auto [exponent, mantissa] = fields(largest);
  const int kept = element.is_float ? element.mantissa : element.bits - 1 - element.is_signed;
  constexpr int32_t full = 1 << 23;
  Rounding how{format.zero ? steps : halves ? steps / 2 : largest, exponent, full};
  if (mode == "ceil") {
    how.mantissa_bound = 0;
  } else if (mode == "even") {
    how.mantissa_bound = full - (full >> (kept + 1)) - 1;
  } else if (mode == "rceil") {
    how.mantissa_bound = mantissa;
  } else {
    STD_TORCH_CHECK(mode == "floor", "mode must be floor, ceil, even or rceil; it is ", mode);
  }
  return how;
}

// The least power of two by which a scale of that largest number fits the scales' range.
float tensor_scale_of(float amax, const Format& format) {
  if (!(amax > 0)) return 1;
  const auto [exponent, mantissa] = fields(amax);
  const auto [limit, limit_mantissa] = fields(largest_of(format.element) * 448);
  return std::ldexp(1.0f, std::clamp(exponent - limit + (mantissa > limit_mantissa), -126, 127));
}

// Rounds x (.., K) into its parts: `choose` the scales and zero points, or take them as they are; so the tensor scale,
// one a matrix or one a row. With a seed to the next code up or down, by chance.
void quantize(const Tensor& x, const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero,
              const std::optional<Tensor>& tensor_scale, const std::string& spec, const std::string& mode, bool choose,
              bool choose_tensor_scale, std::optional<int64_t> seed) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have a dimension");
  check(x, "x", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  const int64_t k = x.size(x.dim() - 1);
  const Table table(data, scale, zero, tensor_scale, spec, k);
  const Format& format = table.format;
  STD_TORCH_CHECK(format.rows == 1, "scales must be of one row; this is ", spec);
  STD_TORCH_CHECK(table.rows * k == x.numel(), "data must have a row for each of x, which has ", told(x), "; it has ",
                  told(data));
  STD_TORCH_CHECK(!choose_tensor_scale || table.factors == 1, "a tensor scale is chosen for a matrix, not for rows");
  if (x.numel() == 0) return;
  const Rounding how = rounding_of(format, mode);
  const Kernels& kernels = lowbit::kernels();
  const Type type = type_of(x.scalar_type());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  uint8_t* codes = static_cast<uint8_t*>(data.mutable_data_ptr());
  void* scales = scale.mutable_data_ptr();
  void* zeros = zero ? zero->mutable_data_ptr() : nullptr;
  const int64_t groups = table.groups, room = up(groups, STEP), grain = std::max<int64_t>(1, 16384 / k);
  std::vector<float> highs;
  // Vectors of the last block may begin anywhere in it.
  const int64_t padded = up(k, STEP) + STEP;
  auto widened = [&](int64_t row, std::vector<float>& values) {
    values.resize(padded);
    kernels.widen(from + row * k * size_of(type), type, nullptr, k, values.data());
  };
  if (choose_tensor_scale) {
    highs.resize(table.rows * room);
    torch::stable::parallel_for(0, table.rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> values;
      for (int64_t row = begin; row < end; ++row) {
        widened(row, values);
        kernels.extents(values.data(), k, format, nullptr, highs.data() + row * room);
      }
    });
    float* const chosen = static_cast<float*>(tensor_scale->mutable_data_ptr());
    for (int64_t matrix = 0; matrix < table.matrices; ++matrix) {
      float amax = 0;
      for (int64_t row = matrix * table.matrix; row < (matrix + 1) * table.matrix; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
          const float here = highs[row * room + group];
          if (std::isfinite(here)) amax = std::max(amax, here);
        }
      }
      chosen[matrix] = tensor_scale_of(amax, format);
    }
  }
  torch::stable::parallel_for(0, table.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> values, low(room), high(room), inverse(room), noise(seed ? padded : 0);
    std::vector<uint8_t> bytes(k + 8);
    Scratch scratch{low.data(), high.data(), inverse.data(), bytes.data(), from, size_of(type)};
    for (int64_t row = begin; row < end; ++row) {
      widened(row, values);
      scratch.next = from + std::min(row + 1, end - 1) * k * size_of(type);
      const auto [of, at, factor] = table.row(row);
      if (choose) {
        if (!choose_tensor_scale) kernels.extents(values.data(), k, format, low.data(), high.data());
        const float* tops = choose_tensor_scale ? highs.data() + row * room : high.data();
        kernels.choose(low.data(), tops, groups, format, how, factor, scales, zeros, at);
      }
      if (seed) kernels.draw(*seed, row * k, k, noise.data());
      kernels.encode(values.data(), k, format, scales, zeros, at, factor, seed ? noise.data() : nullptr, scratch,
                     codes + row * table.bytes);
    }
  });
}

// Integers of 64 bits, or a copy as such.
struct Ids {
  std::vector<int64_t> copy;
  const int64_t* data;
  int64_t count;

  Ids(const Tensor& ids, const char* name) : count(ids.numel()) {
    check(ids, name, {ScalarType::Int, ScalarType::Long});
    data = static_cast<const int64_t*>(ids.const_data_ptr());
    if (ids.scalar_type() == ScalarType::Long) return;
    const auto* const narrow = static_cast<const int32_t*>(ids.const_data_ptr());
    copy.assign(narrow, narrow + count);
    data = copy.data();
  }

  void check_rows(const Table& table) const {
    bool all = true;
    // Without a way out of the loop, which may be long.
    for (int64_t i = 0; i < count; ++i) all &= static_cast<uint64_t>(data[i]) < static_cast<uint64_t>(table.rows);
    for (int64_t i = 0; !all && i < count; ++i) {
      STD_TORCH_CHECK(0 <= data[i] && data[i] < table.rows, "row ", data[i], " is not in the table, which has ",
                      table.rows, " rows");
    }
  }
};

// Of `count` rows or bags with so many numbers, those that are worth a thread.
int64_t grain(int64_t count, int64_t numbers) {
  return std::max<int64_t>(1, 16384 * count / std::max<int64_t>(numbers, 1));
}

// Values (.., K) of rows of a table: of all, or of those that `ids` name.
Tensor decode(const Table& table, const Ids* ids, std::vector<int64_t> shape, ScalarType dtype) {
  const Type type = type_of(dtype);
  const int64_t count = ids == nullptr ? table.rows : ids->count, k = table.k;
  shape.push_back(k);
  Tensor out = torch::stable::empty(shape, dtype);
  if (out.numel() == 0) return out;
  torch::stable::parallel_for(0, count, grain(count, count * k), [&](int64_t begin, int64_t end) {
    kernels().decode(table, ids == nullptr ? nullptr : ids->data, begin, end, out.mutable_data_ptr(), type);
  });
  return out;
}

Tensor dequantize(const Tensor& qdata, const Tensor& scale, const std::optional<Tensor>& zero,
                  const std::optional<Tensor>& tensor_scale, const std::string& spec, int64_t k, ScalarType dtype) {
  const Table table(qdata, scale, zero, tensor_scale, spec, k);
  return decode(table, nullptr, {qdata.sizes().begin(), qdata.sizes().end() - 1}, dtype);
}

Tensor embedding(const Tensor& ids, const Tensor& qdata, const Tensor& scale, const std::optional<Tensor>& zero,
                 const std::optional<Tensor>& tensor_scale, const std::string& spec, int64_t k, ScalarType dtype) {
  const Ids rows(ids, "ids");
  STD_TORCH_CHECK(qdata.dim() == 2, "a table must be a matrix; it has ", told(qdata));
  const Table table(qdata, scale, zero, tensor_scale, spec, k);
  rows.check_rows(table);
  return decode(table, &rows, {ids.sizes().begin(), ids.sizes().end()}, dtype);
}

// ids (M,), offsets (B,), or (B + 1,) with the end of the last bag -> the sum, mean or maximum (B, K) of each bag.
Tensor embedding_bag(const Tensor& ids, const Tensor& offsets, const std::optional<Tensor>& weights,
                     const Tensor& qdata, const Tensor& scale, const std::optional<Tensor>& zero,
                     const std::optional<Tensor>& tensor_scale, const std::string& mode, int64_t padding, bool last,
                     const std::string& spec, int64_t k, ScalarType dtype) {
  const Ids rows(ids, "ids"), begins(offsets, "offsets");
  const Type type = type_of(dtype);
  STD_TORCH_CHECK(qdata.dim() == 2, "a table must be a matrix; it has ", told(qdata));
  STD_TORCH_CHECK(mode == "sum" || mode == "mean" || mode == "max", "mode must be sum, mean or max; it is ", mode);
  STD_TORCH_CHECK(!last || begins.count > 0, "include_last_offset needs an offset at least");
  if (weights) {
    check(*weights, "per_sample_weights", {ScalarType::Float});
    check_numel(*weights, "per_sample_weights", rows.count);
    STD_TORCH_CHECK(mode == "sum", "per_sample_weights are for the sum; the mode is ", mode);
  }
  const Table table(qdata, scale, zero, tensor_scale, spec, k);
  rows.check_rows(table);
  for (int64_t i = 0, before = 0; i < begins.count; before = begins.data[i++]) {
    const int64_t here = begins.data[i];
    STD_TORCH_CHECK(before <= here && here <= rows.count && (i > 0 || here == 0),
                    "offsets must begin with 0, not fall, and not pass the ", rows.count, " rows that are picked");
  }
  const int64_t bags = begins.count - last;
  Tensor out = torch::stable::empty({bags, k}, dtype);
  if (out.numel() == 0) return out;
  const Bags all{rows.data, begins.data, rows.count, begins.count, padding,
                         static_cast<const float*>(pointer(weights)), mode == "max", mode == "mean"};
  torch::stable::parallel_for(0, bags, grain(bags, k * rows.count), [&](int64_t first, int64_t end) {
    kernels().pool(table, all, first, end, out.mutable_data_ptr(), type);
  });
  return out;
}

std::string isa() { return kernels().isa; }

}  // namespace
}  // namespace lowbit

STABLE_TORCH_LIBRARY(lowbit_x86, library) {
  library.def(
      "linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? tensor_scale, Tensor? pre_scale, "
      "Tensor? bias, Tensor? offs, str format, SymInt n, str activation='', Tensor? act_scale=None, "
      "Tensor? act_zero=None) -> Tensor");
  library.def(
      "embedding(Tensor ids, Tensor qdata, Tensor scale, Tensor? zero, Tensor? tensor_scale, str format, SymInt k, "
      "ScalarType dtype) -> Tensor");
  library.def(
      "dequantize(Tensor qdata, Tensor scale, Tensor? zero, Tensor? tensor_scale, str format, SymInt k, "
      "ScalarType dtype) -> Tensor");
  library.def(
      "embedding_bag(Tensor ids, Tensor offsets, Tensor? per_sample_weights, Tensor qdata, Tensor scale, Tensor? zero, "
      "Tensor? tensor_scale, str mode, int padding_idx, bool include_last_offset, str format, SymInt k, "
      "ScalarType dtype) -> Tensor");
  library.def(
      "quantize(Tensor x, Tensor(a!) data, Tensor(b!) scale, Tensor(c!)? zero, Tensor(d!)? tensor_scale, str format, "
      "str mode, bool choose, bool choose_tensor_scale, int? seed) -> ()");
  library.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_x86, CPU, library) {
  library.impl("linear", TORCH_BOX(&lowbit::linear));
  library.impl("embedding", TORCH_BOX(&lowbit::embedding));
  library.impl("embedding_bag", TORCH_BOX(&lowbit::embedding_bag));
  library.impl("dequantize", TORCH_BOX(&lowbit::dequantize));
  library.impl("quantize", TORCH_BOX(&lowbit::quantize));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_x86, CompositeExplicitAutograd, library) { library.impl("isa", TORCH_BOX(&lowbit::isa)); }
