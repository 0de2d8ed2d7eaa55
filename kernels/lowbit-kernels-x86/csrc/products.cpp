// The operator `linear`: which kernels multiply so many tokens by a packed weight, and in what pieces.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "arguments.h"
#include "isa.h"

namespace lowbit {
namespace {

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
    kernels().widen(x + token * w.k * size_of(type), type, pre_scale, w.k, to);
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
  const Kernels& run = kernels();
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
bool integer_product(const Packed& w, const Row& row, const Activation* how, int64_t tokens, const void* bias,
                     char* out) {
  const Kernels& run = kernels();
  const int64_t digits = how == nullptr ? DIGITS : 1;
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
  Codes to{codes.get(), stride, scale.get(), numbers.get(), numbers.get() + rows, codes.get() + rows * stride,
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
  const Kernels& run = kernels();
  const int most = w.format.element.is_float ? run.most_by_table : run.most_digits;
  if (tokens * DIGITS <= most && meets_integers(w.format, w.k) &&
      integer_product(w, row, nullptr, tokens, bias, out)) {
    return;
  }
  if (row.type == Type::bfloat16 && run.takes_pairs != nullptr && run.takes_pairs(w.format, tokens) &&
      paired_product(w, row, tokens, bias, out)) {
    return;
  }
  const int64_t stride = apart(w.k, sizeof(float)), tiles = up(w.n, TILE) / TILE;
  const int64_t chunk = tokens <= run.few_tokens ? tokens : std::min(tokens, MOST_TOKENS);
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
Activation activation_of(const std::string& spec, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& zero, const Format& weight, int64_t k) {
  const size_t colon = std::min(spec.find(':'), spec.size());
  const std::string scaling = spec.substr(0, colon);
  const Format format = parse(spec.substr(std::min(colon + 1, spec.size())));
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
  Activation how{dynamic, format.zero, format.element.bits, 0, 0};
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

}  // namespace

// x (.., K), codes (E, tiles, words, 16), scale and zero (E, tiles, groups, 16), tensor_scale (1 or E, 1 or tiles * 16)
// -> (.., N); with offs (E,), the ends of experts' rows.
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
              const std::optional<Tensor>& tensor_scale, const std::optional<Tensor>& pre_scale,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& offs, const std::string& spec, int64_t n,
              const std::string& activation, const std::optional<Tensor>& act_scale,
              const std::optional<Tensor>& act_zero) {
  const Format format = parse(spec);
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
  Activation how{};
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

}  // namespace lowbit
