// The operators lowbit_x86::*, through torch's stable ABI: every argument is checked here, before a kernel sees a pointer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "isa.h"

namespace {

using lowbit::Format;
using lowbit::Packed;
using lowbit::Scale;
using lowbit::STEP;
using lowbit::TILE;
using lowbit::Type;
using lowbit::up;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string told(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "shape (" + text + ")";
}

void check(const Tensor& tensor, const char* name, std::initializer_list<ScalarType> types) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU; it is not");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; it has ", told(tensor), " and gaps");
  STD_TORCH_CHECK(std::find(types.begin(), types.end(), tensor.scalar_type()) != types.end(), name,
                  " has a dtype that this format or operator does not have: number ",
                  static_cast<int>(tensor.scalar_type()));
}

void check_numel(const Tensor& tensor, const char* name, int64_t numel) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " numbers; it has ", told(tensor));
}

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "values must be float32, bfloat16 or float16");
  }
}

void check_scale(const Tensor& scale, Scale kind, int64_t numel) {
  switch (kind) {
    case Scale::float32: check(scale, "scale", {ScalarType::Float}); break;
    case Scale::bfloat16: check(scale, "scale", {ScalarType::BFloat16}); break;
    case Scale::float16: check(scale, "scale", {ScalarType::Half}); break;
    case Scale::e8m0: check(scale, "scale", {ScalarType::Byte, ScalarType::Float8_e8m0fnu}); break;
    case Scale::e4m3fn: check(scale, "scale", {ScalarType::Float8_e4m3fn}); break;
  }
  check_numel(scale, "scale", numel);
}

void check_zero(const std::optional<Tensor>& zero, const Format& format, int64_t numel) {
  STD_TORCH_CHECK(zero.has_value() == format.zero, "zero points must be given where the format has them, and only there");
  if (!zero) return;
  check(*zero, "zero", {format.zero_signed ? ScalarType::Char : ScalarType::Byte});
  check_numel(*zero, "zero", numel);
}

const void* pointer(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// The rows of one expert, or of the only matrix.
struct Experts {
  Packed first;
  // Of one's tensor scales to the next's: 0 where all share them.
  int64_t tiles, words, groups, tensor_scales;

  Packed at(int64_t expert) const {
    Packed w = first;
    w.codes += expert * tiles * words * TILE;
    w.scale = static_cast<const char*>(w.scale) + expert * tiles * groups * TILE * size_of(w.format.scale);
    if (w.zero != nullptr) w.zero = static_cast<const char*>(w.zero) + expert * tiles * groups * TILE;
    if (w.tensor_scale != nullptr) w.tensor_scale += expert * tensor_scales;
    return w;
  }
};

// Numbers from one token's to the next: padded, and never a power of two of bytes, which would put the same columns of
// all tokens into one set of the cache.
int64_t apart(int64_t k, int64_t size) { return up(k * size, 128) / size + 64 / size; }

// Inputs of a product: values of a token as float32.
struct Row {
  const Packed& w;
  const char* x;
  Type type;
  const void* pre_scale;

  void operator()(int64_t token, float* to) const {
    lowbit::kernels().widen(x + token * w.k * size_of(type), type, pre_scale, w.k, to);
  }
};

// Calls body(begin, end) for parts of `count`; of one by itself.
template <class Body>
void shared(int64_t count, const Body& body) {
  if (count == 1) {
    body(0, 1);
  } else {
    torch::stable::parallel_for(0, count, 1, body);
  }
}

// By pairs of bfloat16s; false if some input is not for that.
bool paired_product(const Packed& w, const Row& row, int64_t tokens, const void* bias, char* out) {
  const lowbit::Kernels& run = lowbit::kernels();
  const int64_t stride = apart(up(w.k, STEP) / 2, sizeof(uint32_t)), groups = w.format.groups(w.k);
  // Those of a chunk stay in a core's cache while tiles pass.
  const int64_t fit = std::clamp<int64_t>((1 << 19) / up(w.k, STEP) / TILE * TILE, 64, 256);
  const int64_t chunk = std::min(tokens, fit), rows = up(chunk, TILE);
  // In tiles, lines of the cache that follow one another are read.
  const bool many = tokens > run.few_pairs, tiled = many && run.tile_bytes != nullptr;
  const int64_t each = STEP / 2, step = tiled ? each * TILE : each;
  const std::unique_ptr<uint32_t[]> pairs(new uint32_t[rows * stride]());
  const std::unique_ptr<float[]> sums(new float[rows * groups]());
  for (int64_t token = 0; token < tokens; token += chunk) {
    const int64_t some = std::min(chunk, tokens - token);
    std::atomic<bool> fits{true};
    shared(some, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> values(new float[up(w.k, STEP)]());
      for (int64_t at = begin; at < end; ++at) {
        row(token + at, values.get());
        const int64_t from = tiled ? at / TILE * TILE * up(w.k, STEP) / 2 + at % TILE * each : at * stride;
        if (!run.pair(values.get(), w.k, w.format, step, pairs.get() + from, sums.get() + at * groups)) fits = false;
      }
    });
    if (!fits) return false;
    torch::stable::parallel_for(0, up(w.n, TILE) / TILE, 1, [&](int64_t begin, int64_t end) {
      run.by_pairs(w, {pairs.get(), sums.get(), stride, many, tiled}, some, bias,
                   out + token * w.n * size_of(row.type), row.type, begin, end);
    });
  }
  return true;
}

// Of inputs that are rounded to integers, or, not being rounded, become digits; false if some input cannot.
bool integer_product(const Packed& w, const Row& row, const lowbit::Activation* how, int64_t tokens, const void* bias,
                     char* out) {
  const lowbit::Kernels& run = lowbit::kernels();
  const int64_t digits = how == nullptr ? lowbit::DIGITS : 1;
  tokens *= digits;
  const int64_t stride = apart(up(w.k, STEP) * run.code_size(w.format.element.bits), 1);
  const int64_t groups = w.format.groups(w.k), tiles = up(w.n, TILE) / TILE;
  // Those of a chunk stay in a core's cache while tiles pass.
  const int64_t chunk = std::min<int64_t>(tokens, 256), half = run.integer_tokens / 2;
  const bool tiled = how != nullptr && tokens >= run.tiled_bytes;
  const int64_t together = tokens == 1 || tiled ? 1 : tokens <= half ? half : run.integer_tokens;
  const int64_t rows = up(chunk, tiled ? TILE : together);
  const std::unique_ptr<uint8_t[]> codes(new uint8_t[(rows + 1) * stride]());
  const std::unique_ptr<float[]> scale(new float[rows]());
  const std::unique_ptr<int32_t[]> numbers(new int32_t[rows * (groups + 1)]());
  lowbit::Codes to{codes.get(), stride, scale.get(), numbers.get(), numbers.get() + rows, codes.get() + rows * stride,
                   together, how != nullptr && how->asymmetric, tiled ? run.tile_bytes(w.format, w.k) : 0, digits};
  if (to.asymmetric) run.mark(w.k, w.format, to.ones);
  const auto multiply = tiled ? run.integers_by_tiles : run.integers;
  for (int64_t token = 0; token < tokens; token += chunk) {
    const int64_t some = std::min(chunk, tokens - token);
    std::atomic<bool> fits{true};
    shared(some / digits, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> values(new float[up(w.k, STEP)]());
      for (int64_t at = begin; at < end; ++at) {
        row(token / digits + at, values.get());
        if (how != nullptr) {
          run.round(values.get(), w.k, *how, w.format, at, to);
        } else if (!run.split(values.get(), w.k, w.format, at * digits, to)) {
          fits = false;
        }
      }
    });
    if (!fits) return false;
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      multiply(w, to, some, bias, out + token / digits * w.n * size_of(row.type), row.type, begin, end);
    });
  }
  return true;
}

// Whether a weight that is not rounded for it can meet integers: each of its sums is one, of whole words.
bool meets_integers(const Format& weight, int64_t k) {
  const int bits = weight.element.bits;
  return (weight.element.is_float ? bits == 4 : 8 % bits == 0) && weight.columns * bits % 32 == 0 &&
         (weight.columns ? std::min(weight.columns, k) : k) <= 1 << 15;
}

void product(const Packed& w, const Row& row, int64_t tokens, const void* bias, char* out) {
  const lowbit::Kernels& run = lowbit::kernels();
  const int most = w.format.element.is_float ? run.most_by_table : run.most_digits;
  if (tokens * lowbit::DIGITS <= most && meets_integers(w.format, w.k) &&
      integer_product(w, row, nullptr, tokens, bias, out)) {
    return;
  }
  if (row.type == Type::bfloat16 && run.takes_pairs != nullptr && run.takes_pairs(w.format, tokens) &&
      paired_product(w, row, tokens, bias, out)) {
    return;
  }
  const int64_t stride = apart(w.k, sizeof(float)), tiles = up(w.n, TILE) / TILE;
  const int64_t chunk = tokens <= run.few_tokens ? tokens : std::min(tokens, lowbit::MOST_TOKENS);
  const std::unique_ptr<float[]> values(new float[std::max<int64_t>(chunk, run.few_tokens) * stride]());
  for (int64_t token = 0; token < tokens; token += chunk) {
    const int64_t some = std::min(chunk, tokens - token);
    auto widen = [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) row(token + at, values.get() + at * stride);
    };
    if (some <= run.few_tokens) {
      widen(0, some);
    } else {
      torch::stable::parallel_for(0, some, 1, widen);
    }
    char* const to = out + token * w.n * size_of(row.type);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      if (some <= run.few_tokens) {
        run.few(w, values.get(), stride, static_cast<int>(some), bias, to, row.type, begin, end);
      } else {
        run.many(w, values.get(), stride, some, bias, to, row.type, begin, end);
      }
    });
  }
}

// What an activation's spec string and its stored scale say; a spec is scaling:format.
lowbit::Activation activation_of(const std::string& spec, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& zero, const Format& weight, int64_t k) {
  const size_t colon = std::min(spec.find(':'), spec.size());
  const std::string scaling = spec.substr(0, colon);
  const Format format = lowbit::parse(spec.substr(std::min(colon + 1, spec.size())));
  const bool dynamic = scaling == "dynamic";
  STD_TORCH_CHECK(!format.element.is_float && format.element.is_signed && format.scale == Scale::float32 &&
                      !format.tensor_scale && format.columns == 0 && format.rows == (dynamic ? 1 : 0) &&
                      (dynamic || scaling == "static"),
                  "inputs must be rounded to signed integers with float32 scales, dynamic ones a row or a static one; "
                  "this is ", spec);
  STD_TORCH_CHECK(!weight.element.is_float && 8 % weight.element.bits == 0 && weight.columns % STEP == 0,
                  "weights of rounded inputs must be integers of 1, 2, 4 or 8 bits with scales of multiples of 32 "
                  "columns, or all");
  STD_TORCH_CHECK((weight.columns ? std::min(weight.columns, k) : k) <= 1 << 15,
                  "scales of rounded inputs' weights must cover 32768 columns at most; there are ", k);
  lowbit::Activation how{dynamic, format.zero, format.element.bits, 0, 0};
  if (dynamic) return how;
  STD_TORCH_CHECK(scale.has_value(), "static activations need act_scale");
  check(*scale, "act_scale", {ScalarType::Float});
  check_numel(*scale, "act_scale", 1);
  how.scale = *static_cast<const float*>(scale->const_data_ptr());
  STD_TORCH_CHECK(zero.has_value() == format.zero,
                  "act_zero must be given where the activation has zero points, and only there");
  if (zero) {
    check(*zero, "act_zero", {ScalarType::Char});
    check_numel(*zero, "act_zero", 1);
    how.zero = *static_cast<const int8_t*>(zero->const_data_ptr());
  }
  return how;
}

// x (.., K), codes (E, tiles, words, 16), scale and zero (E, tiles, groups, 16), tensor_scale (1 or E, 1 or tiles * 16)
// -> (.., N); with offs (E,), the ends of experts' rows.
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
              const std::optional<Tensor>& tensor_scale, const std::optional<Tensor>& pre_scale,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& offs, const std::string& spec, int64_t n,
              const std::string& activation, const std::optional<Tensor>& act_scale,
              const std::optional<Tensor>& act_zero) {
  const Format format = lowbit::parse(spec);
  STD_TORCH_CHECK(x.dim() > 0, "x must have a dimension");
  STD_TORCH_CHECK(n >= 0, "n must not be negative; it is ", n);
  const int64_t k = x.size(x.dim() - 1);
  check(x, "x", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  STD_TORCH_CHECK(format.columns % 16 == 0, "scales must cover multiples of 16 columns, or all; this is ", spec);
  check(codes, "codes", {ScalarType::Int});
  const int64_t tiles = up(n, TILE) / TILE, words = up(k, STEP) / 32 * format.element.bits;
  const int64_t groups = format.groups(k);
  const int64_t experts = codes.dim() ? codes.size(0) : 0;
  check_numel(codes, "codes", experts * tiles * words * TILE);
  check_scale(scale, format.scale, experts * tiles * groups * TILE);
  check_zero(zero, format, experts * tiles * groups * TILE);
  int64_t tensor_scales = 0;
  STD_TORCH_CHECK(tensor_scale.has_value() == format.tensor_scale,
                  "a tensor scale must be given where the format has one, and only there");
  if (tensor_scale) {
    check(*tensor_scale, "tensor_scale", {ScalarType::Float});
    STD_TORCH_CHECK(tensor_scale->dim() == 2 && (tensor_scale->size(0) == 1 || tensor_scale->size(0) == experts) &&
                        (tensor_scale->size(1) == 1 || tensor_scale->size(1) == tiles * TILE),
                    "tensor_scale must be of 1 or ", experts, " experts and 1 or ", tiles * TILE, " rows; it has ",
                    told(*tensor_scale));
    tensor_scales = tensor_scale->size(1);
  }
  if (pre_scale) {
    check(*pre_scale, "pre_scale", {x.scalar_type()});
    check_numel(*pre_scale, "pre_scale", k);
  }
  if (bias) {
    check(*bias, "bias", {x.scalar_type()});
    check_numel(*bias, "bias", n);
  }
  lowbit::Activation how{};
  if (!activation.empty()) how = activation_of(activation, act_scale, act_zero, format, k);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  const int64_t tokens = k ? x.numel() / k : 0;
  std::vector<int64_t> ends{tokens};
  if (offs) {
    check(*offs, "offs", {ScalarType::Int});
    check_numel(*offs, "offs", experts);
    const int32_t* given = static_cast<const int32_t*>(offs->const_data_ptr());
    ends.assign(given, given + experts);
    int64_t before = 0;
    for (const int64_t end : ends) {
      STD_TORCH_CHECK(before <= end && end <= tokens, "offs must not fall and not pass the ", tokens, " rows of x; ",
                      end, " follows ", before);
      before = end;
    }
  } else {
    STD_TORCH_CHECK(experts == 1, "codes of ", experts, " matrices need offs");
  }
  Tensor out = torch::stable::new_empty(x, shape);
  if (out.numel() == 0) return out;
  const Experts of{{format, n, k, static_cast<const uint32_t*>(codes.const_data_ptr()), scale.const_data_ptr(),
                    pointer(zero), static_cast<const float*>(pointer(tensor_scale)), tensor_scales},
                   tiles, words, groups, tensor_scale && tensor_scale->size(0) > 1 ? tensor_scales : 0};
  const Type type = type_of(x.scalar_type());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  int64_t begin = 0;
  for (size_t expert = 0; expert < ends.size(); ++expert) {
    if (begin < ends[expert]) {
      const Packed w = of.at(expert);
      const Row row{w, from + begin * k * size_of(type), type, pointer(pre_scale)};
      char* out_of = to + begin * n * size_of(type);
      const int64_t rows = ends[expert] - begin;
      if (activation.empty()) {
        product(w, row, rows, pointer(bias), out_of);
      } else {
        integer_product(w, row, &how, rows, pointer(bias), out_of);
      }
    }
    begin = ends[expert];
  }
  std::fill(to + begin * n * size_of(type), to + tokens * n * size_of(type), 0);
  return out;
}

// Canonical parts of a table, or of matrices one after another, once they are checked.
struct Table : lowbit::Rows {
  Table(const Tensor& qdata, const Tensor& of_scale, const std::optional<Tensor>& of_zero,
        const std::optional<Tensor>& tensor_scale, const std::string& spec, int64_t columns) {
    format = lowbit::parse(spec);
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

float largest_of(const lowbit::Element& element) {
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

lowbit::Rounding rounding_of(const Format& format, const std::string& mode) {
  const lowbit::Element& element = format.element;
  const float largest = largest_of(element), steps = static_cast<float>((1 << element.bits) - 1);
  const bool halves = !element.is_float && element.is_signed;
  const auto [exponent, mantissa] = fields(largest);
  const int kept = element.is_float ? element.mantissa : element.bits - 1 - element.is_signed;
  constexpr int32_t full = 1 << 23;
  lowbit::Rounding how{format.zero ? steps : halves ? steps / 2 : largest, exponent, full};
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
  const lowbit::Rounding how = rounding_of(format, mode);
  const lowbit::Kernels& kernels = lowbit::kernels();
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
    lowbit::Scratch scratch{low.data(), high.data(), inverse.data(), bytes.data(), from, size_of(type)};
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
    lowbit::kernels().decode(table, ids == nullptr ? nullptr : ids->data, begin, end, out.mutable_data_ptr(), type);
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
  const lowbit::Bags all{rows.data, begins.data, rows.count, begins.count, padding,
                         static_cast<const float*>(pointer(weights)), mode == "max", mode == "mean"};
  torch::stable::parallel_for(0, bags, grain(bags, k * rows.count), [&](int64_t first, int64_t end) {
    lowbit::kernels().pool(table, all, first, end, out.mutable_data_ptr(), type);
  });
  return out;
}

std::string isa() { return lowbit::kernels().isa; }

}  // namespace

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
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("embedding", TORCH_BOX(&embedding));
  library.impl("embedding_bag", TORCH_BOX(&embedding_bag));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("quantize", TORCH_BOX(&quantize));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit_x86, CompositeExplicitAutograd, library) { library.impl("isa", TORCH_BOX(&isa)); }
