// What the kernels of each instruction set take: pointers and lengths that were checked before.
#pragma once

#include <algorithm>
#include <cstdint>

#include "format.h"

namespace lowbit {

enum class Type { float32, bfloat16, float16 };

constexpr int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

constexpr int64_t size_of(Scale scale) {
  switch (scale) {
    case Scale::float32: return 4;
    case Scale::bfloat16:
    case Scale::float16: return 2;
    default: return 1;
  }
}

// Rows that are packed together, one a lane.
inline constexpr int TILE = 16;
// Columns by which packed rows are padded, and float inputs with them.
inline constexpr int STEP = 32;
// Tokens that `many` takes: their float32 copy and their sums stay near.
inline constexpr int64_t MOST_TOKENS = 96;

// Into the cache; the compiler drops calls of functions that do nothing but __builtin_prefetch.
inline void fetch(const void* at) { asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(at))); }

inline void fetch_bytes(const void* from, int64_t count) {
  const char* const end = static_cast<const char*>(from) + count;
  for (auto line = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) / 64 * 64); line < end; line += 64) {
    fetch(line);
  }
}

// A matrix (N, K) packed by tiles of 16 rows; all that a row has stands in its lane:
// codes [tile][word][16], 32-bit words of the canonical bit stream; scale and zero [tile][group][16].
struct Packed {
  Format format;
  int64_t n, k;
  const uint32_t* codes;
  const void* scale;
  const void* zero;           // one byte each, or null
  const float* tensor_scale;  // or null
  int64_t tensor_scales;      // 1, or one a row
};

// How inputs are rounded to signed integers: one scale a token, or those that are given.
struct Activation {
  bool dynamic, asymmetric;
  int bits;
  float scale;
  int32_t zero;
};

// Rounded tokens, `stride` bytes each: signed codes of one byte or two, in the order in which a word of the weight holds
// its own, 0 from k on, so many tokens `together`, four bytes of each in turn, or in tiles: 16 tokens, `tile` bytes of
// each in turn; the sums of those that share a scale of the weight; zero points, all 0 unless `asymmetric`; 1 for each
// column.
struct Codes {
  uint8_t* codes;
  int64_t stride;
  float* scale;
  int32_t* zero;
  int32_t* sums;
  uint8_t* ones;
  int64_t together;
  bool asymmetric;
  // Or 0.
  int64_t tile;
  // As many follow one another that are digits of one token.
  int64_t digits = 1;
};

// Digits of a token that is as it was, signed ones of a byte: it is rounded to 2^-30 of its largest number, no more than
// sums of float32s are.
inline constexpr int64_t DIGITS = 4;

// Tokens of bfloat16s as pairs of 32 bits, `stride` from one to the next, in the order in which words of the weight have
// theirs, or in tiles: 16 tokens, a STEP of each in turn; and the sums of those of a group, where codes have zero points.
struct Paired {
  const uint32_t* pairs;
  const float* sums;
  int64_t stride;
  // Whether they are a part of many, and those in tiles.
  bool many, tiled;
};

// How scales come of what blocks extend to: of largest magnitudes, or of ranges where there are zero points.
struct Rounding {
  // What they are divided by; of powers of two the exponent of the format's largest number, and the 23 bits of mantissa
  // beyond which the next power is taken.
  float divisor;
  int top_exponent;
  int32_t mantissa_bound;
};

// What `encode` writes to on its way: numbers of a row's blocks, in whole STEPs, and k + 8 bytes. And what is read
// next, in numbers of `size` bytes: as many as the row has.
struct Scratch {
  float *low, *high, *inverse;
  uint8_t* codes;
  const char* next;
  int64_t size;
};

// Canonical rows of a table, or of matrices one after another. A scale covers `block` rows; where it covers one there is
// 0, not 1, of which the compiler would make a division that changes nothing.
struct Rows {
  Format format;
  int64_t k, bytes, rows, matrix, matrices, groups, block, blocks, factors;
  const uint8_t* codes;
  const void* scale;
  const void* zero;
  const float* factor;

  struct Row {
    const uint8_t* codes;
    // The number of its first scale.
    int64_t at;
    // The tensor scale.
    float factor;
  };

  Row row(int64_t row) const {
    // Of most tables this takes no division.
    int64_t of = 0, at = row;
    if (matrices > 1) of = row / matrix, at = row - of * matrix;
    if (block > 0) at /= block;
    if (matrices > 1) at += of * blocks;
    return {codes + row * bytes, at * groups, factor == nullptr ? 1.0f : factor[factors == 1 ? of : at]};
  }

  // Into the cache, what a row of a table begins with; more follows by itself once that is read.
  void fetch(int64_t row) const {
    const int64_t at = (block == 0 ? row : row / block) * groups, size = size_of(format.scale);
    fetch_bytes(codes + row * bytes, std::min<int64_t>(bytes, 256));
    fetch_bytes(static_cast<const uint8_t*>(scale) + at * size, std::min<int64_t>(groups * size, 256));
    if (zero != nullptr) fetch_bytes(static_cast<const uint8_t*>(zero) + at, std::min<int64_t>(groups, 256));
  }
};

// Bags of rows: those from begins[bag] to begins[bag + 1], or to the last, but for those that are `padding`; `weights`
// of each, or null.
struct Bags {
  const int64_t *rows, *begins;
  int64_t row_count, begin_count, padding;
  const float* weights;
  bool largest, mean;
};

struct Kernels {
  const char* isa = nullptr;
  // Tokens of which `few` takes as many at once, and `integers`, in whose rounded codes as many lie together.
  int few_tokens = 0, integer_tokens = 0;
  // Up to so many digits of tokens that are as they were meet integers, which takes less than making floats of those; and
  // up to so many meet numbers of which a table makes integers.
  int most_digits = 0, most_by_table = 0;
  // Bytes that `round` makes of a code, by the bits of the weight's.
  int (*code_size)(int bits) = nullptr;
  // Values of `count` numbers as float32, times `by` (rounded to their type) where there is one.
  void (*widen)(const void* x, Type type, const void* by, int64_t count, float* to) = nullptr;
  // out[m][n] = bias[n] + sum over k of x[m][k] w[n][k] for the rows of tiles [first, last), rounded to `type`.
  // x: `tokens` rows of `stride` floats, zero from k on. `few`: decodes each weight for all tokens at once.
  void (*few)(const Packed& w, const float* x, int64_t stride, int tokens, const void* bias, void* out, Type type,
              int64_t first, int64_t last) = nullptr;
  // ... `many`: decodes weights into a panel first.
  void (*many)(const Packed& w, const float* x, int64_t stride, int64_t tokens, const void* bias, void* out, Type type,
               int64_t first, int64_t last) = nullptr;
  // Values (.., K), rounded to `type`, of rows [first, last), or of those that `ids` so number.
  void (*decode)(const Rows& table, const int64_t* ids, int64_t first, int64_t last, void* out, Type type) = nullptr;
  // The sum, mean or largest of the same values of bags [first, last), rounded to `type`.
  void (*pool)(const Rows& table, const Bags& bags, int64_t first, int64_t last, void* out, Type type) = nullptr;
  // x (k,), with zeros up to STEP, as token `token` of `to`; and the columns that there are.
  void (*round)(const float* x, int64_t k, const Activation& how, const Format& weight, int64_t token,
                Codes& to) = nullptr;
  void (*mark)(int64_t k, const Format& weight, uint8_t* ones) = nullptr;
  // x as DIGITS tokens from `token` on; false where a number is not finite, or all are so small that scales are not.
  bool (*split)(const float* x, int64_t k, const Format& weight, int64_t token, Codes& to) = nullptr;
  // As `few`, of rounded tokens, of which whole numbers of those `together` may be read: one, or `integer_tokens`, or
  // half of that. Weights are integers of 1, 2, 4 or 8 bits, or floats of 4 where digits meet those, with scales
  // of whole words, or of all columns.
  void (*integers)(const Packed& w, const Codes& x, int64_t tokens, const void* bias, void* out, Type type,
                   int64_t first, int64_t last) = nullptr;
  // Of blocks of one row x, `k` numbers and a STEP of zeros at least: the largest magnitude, or what is not finite, in
  // `high`; with zero points the lowest number and the highest, neither beyond 0, or NaN in both. Both have room for
  // whole STEPs.
  void (*extents)(const float* x, int64_t k, const Format& format, float* low, float* high) = nullptr;
  // Scales and zero points from the one numbered `at` on, for those of `groups` blocks.
  void (*choose)(const float* low, const float* high, int64_t groups, const Format& format, const Rounding& how,
                 float tensor_scale, void* scale, void* zero, int64_t at) = nullptr;
  // What rounds stochastically `count` numbers from the one numbered `first` on.
  void (*draw)(uint64_t seed, uint64_t first, int64_t count, float* noise) = nullptr;
  // The codes of such a row, by `noise`, which is as long, where it is not null.
  void (*encode)(const float* x, int64_t k, const Format& format, const void* scale, const void* zero, int64_t at,
                 float tensor_scale, const float* noise, const Scratch& scratch, uint8_t* codes) = nullptr;
  // Where pairs of bfloat16s are multiplied, else null. Whether so many tokens and a weight of a format are.
  bool (*takes_pairs)(const Format& format, int64_t tokens) = nullptr;
  // x (k,) as pairs, `step` from one STEP to the next, and sums of groups; false where products would lose a number that
  // is too small.
  bool (*pair)(const float* x, int64_t k, const Format& weight, int64_t step, uint32_t* pairs, float* sums) = nullptr;
  // As `many`.
  void (*by_pairs)(const Packed& w, const Paired& x, int64_t tokens, const void* bias, void* out, Type type,
                   int64_t first, int64_t last) = nullptr;
  // Up to so many tokens a weight is decoded for all of them at once; beyond, pairs are in tiles where `tiled_bytes` are.
  int64_t few_pairs = 0;
  // The number of tokens from which on tiles of bytes are multiplied, whole ones read; the bytes of a row of those, for a
  // weight of k columns.
  int64_t tiled_bytes = INT64_MAX;
  int64_t (*tile_bytes)(const Format& weight, int64_t k) = nullptr;
  void (*integers_by_tiles)(const Packed& w, const Codes& x, int64_t tokens, const void* bias, void* out, Type type,
                            int64_t first, int64_t last) = nullptr;
};

}  // namespace lowbit
