// Compiled once for each instruction set, LOWBIT_ISA, with that set's flags.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// Tokens that a weight is decoded for at once, and of a block of products by decoded weights.
constexpr int FEW = W == 4 ? 1 : W / 2;
constexpr int ROWS = W == 16 ? 12 : W == 8 ? 6 : 2;
// Columns that are decoded at once: a panel stays in the first cache.
constexpr int PANEL = 256;

#include "tiles.h"

// Calls body(first column, constant that is the first code, words it counts from) for each run of a step.
template <int Bits, class Body>
void each_run(const uint32_t* words, int64_t column, const Body& body) {
  using Of = Runs<Bits>;
  for (int i = 0; i < Of::each; ++i) {
    unroll<Of::kinds>([&](auto kind) {
      body(column + (i * Of::kinds + kind) * Of::codes, std::integral_constant<int, kind * Of::codes>{},
           words + i * (Of::codes * Of::kinds * Bits / 32) * TILE);
    });
  }
}

// Calls body(first column, constant that is the first code, words it counts from) for each run of half a step.
// Panels are not decoded so: it takes a quarter longer.
template <int Bits, class Body>
INLINE inline void each_run_of_half(const uint32_t* words, bool second, const Body& body) {
  using Of = Runs<Bits>;
  constexpr int half = STEP / 2;
  if constexpr (Of::kinds == 1) {
    constexpr int size = Of::codes * Bits / 32 * TILE;
    unroll<half / Of::codes>([&](auto i) {
      body(i * Of::codes, std::integral_constant<int, 0>{}, words + (second * (half / Of::codes) + i) * size);
    });
  } else if (second) {
    body(0, std::integral_constant<int, half>{}, words);
  } else {
    body(0, std::integral_constant<int, 0>{}, words);
  }
}

// Products of `tokens` tokens, at most M, with one tile. Sums of one group are scaled together; several of each token go
// side by side.
template <class Code, int M>
void few_tile(const Packed& w, const float* x, int64_t stride, int tokens, const void* bias, void* out, Type type,
              int64_t index) {
  constexpr int SUMS = std::max(1, 4 / M), RUN = Runs<Code::bits>::codes;
  const Tile tile(w, index);
  const int64_t group_columns = w.format.columns ? w.format.columns : up(w.k, STEP);
  // Registers are for the sums, loops over which are written out, lest the compiler keep them in memory.
  alignas(64) float totals[M * TILE] = {};
  F sums[M][H][SUMS], zero[H];
  unroll<H>([&](auto h) INLINE {
    zero[h] = F{};
    unroll<M>([&](auto m) INLINE { unroll<SUMS>([&](auto s) INLINE { sums[m][h][s] = F{}; }); });
  });
  for (int64_t group = 0, begin = 0; begin < w.k; ++group, begin += group_columns) {
    const int64_t end = std::min(w.k, begin + group_columns);
    if constexpr (Code::offset) unroll<H>([&](auto h) INLINE { zero[h] = tile.zero(group, h); });
    // Nothing is called here, which would take all registers.
    for (int64_t column = begin; column < end; column += STEP / 2) {
      each_run_of_half<Code::bits>(tile.codes(column / STEP), column % STEP, [&](int at, auto first, auto words) INLINE {
        unroll<RUN>([&](auto p) INLINE {
          F value[H];
          unroll<H>([&](auto h) INLINE {
            value[h] = code_at<Code, first + p>(words, h);
            if constexpr (Code::offset) value[h] -= zero[h];
          });
          unroll<M>([&](auto m) INLINE {
            const F broadcast = all(x[m * stride + column + at + p]);
            unroll<H>([&](auto h) INLINE { sums[m][h][p % SUMS] = fma(value[h], broadcast, sums[m][h][p % SUMS]); });
          });
        });
      });
    }
    unroll<H>([&](auto h) INLINE {
      const F scale = tile.scale(group, h);
      unroll<M>([&](auto m) INLINE {
        F sum = sums[m][h][0];
        unroll<SUMS - 1>([&](auto s) INLINE { sum += sums[m][h][s + 1]; });
        float* const total = totals + m * TILE + h * W;
        store(total, fma(sum, scale, load<F>(total)));
        unroll<SUMS>([&](auto s) INLINE { sums[m][h][s] = F{}; });
      });
    });
  }
  unroll<M>([&](auto m) INLINE {
    if (m >= tokens) return;
    unroll<H>([&](auto h) INLINE { finish(w, index, h, load<F>(totals + m * TILE + h * W), bias, out, type, m); });
  });
}

void few(const Packed& w, const float* x, int64_t stride, int tokens, const void* bias, void* out, Type type,
         int64_t first, int64_t last) {
  with_code(w.format, [&](auto code) {
    using Code = decltype(code);
    for (int64_t tile = first; tile < last; ++tile) {
      if (tokens == 1) {
        few_tile<Code, 1>(w, x, stride, tokens, bias, out, type, tile);
      } else if (FEW > 4 && tokens <= 4) {
        few_tile<Code, 4>(w, x, stride, tokens, bias, out, type, tile);
      } else {
        few_tile<Code, FEW>(w, x, stride, tokens, bias, out, type, tile);
      }
    }
  });
}

// Scaled values of one tile's columns [begin, end), column after column.
template <class Code>
void fill_panel(const Packed& w, int64_t index, int64_t begin, int64_t end, float* panel) {
  constexpr int RUN = Runs<Code::bits>::codes;
  const Tile tile(w, index);
  F scale[H] = {}, zero[H] = {};
  int64_t group = -1;
  for (int64_t step = begin; step < end; step += STEP) {
    each_run<Code::bits>(tile.codes(step / STEP), step, [&](int64_t column, auto first, const uint32_t* words) {
      if (column >= w.k) return;
      const int64_t now = w.format.columns ? column / w.format.columns : 0;
      if (now != group) {
        group = now;
        for (int h = 0; h < H; ++h) {
          scale[h] = tile.scale(group, h);
          if constexpr (Code::offset) zero[h] = tile.zero(group, h);
        }
      }
      unroll<RUN>([&](auto p) {
        for (int h = 0; h < H; ++h) {
          F value = code_at<Code, first + p>(words, h);
          if constexpr (Code::offset) value -= zero[h];
          store(panel + ((column - begin + p) * H + h) * W, value * scale[h]);
        }
      });
    });
  }
}

// sums[row] += x[row] times the panel, for R tokens.
template <int R>
[[gnu::noinline]] void multiply(const float* x, int64_t stride, const float* panel, int64_t columns, float* sums) {
  F sum[R][H];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < H; ++v) sum[r][v] = load<F>(sums + (r * H + v) * W);
  }
  for (int64_t k = 0; k < columns; ++k) {
    F value[H];
    for (int v = 0; v < H; ++v) value[v] = load<F>(panel + (k * H + v) * W);
    for (int r = 0; r < R; ++r) {
      const F broadcast = all(x[r * stride + k]);
      for (int v = 0; v < H; ++v) sum[r][v] = fma(broadcast, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < H; ++v) store(sums + (r * H + v) * W, sum[r][v]);
  }
}

template <int R>
void multiply_up_to(int rows, const float* x, int64_t stride, const float* panel, int64_t columns, float* sums) {
  if (rows == R) return multiply<R>(x, stride, panel, columns, sums);
  if constexpr (R > 1) multiply_up_to<R - 1>(rows, x, stride, panel, columns, sums);
}

void many(const Packed& w, const float* x, int64_t stride, int64_t tokens, const void* bias, void* out, Type type,
          int64_t first, int64_t last) {
  alignas(64) float panel[PANEL * TILE];
  alignas(64) float sums[MOST_TOKENS * TILE];
  with_code(w.format, [&](auto code) {
    using Code = decltype(code);
    for (int64_t tile = first; tile < last; ++tile) {
      std::fill(sums, sums + tokens * TILE, 0.0f);
      for (int64_t k = 0; k < w.k; k += PANEL) {
        const int64_t end = std::min(w.k, k + PANEL);
        fill_panel<Code>(w, tile, k, end, panel);
        for (int64_t r = 0; r < tokens; r += ROWS) {
          multiply_up_to<ROWS>(static_cast<int>(std::min<int64_t>(ROWS, tokens - r)), x + r * stride + k, stride, panel,
                               end - k, sums + r * TILE);
        }
      }
      for (int64_t r = 0; r < tokens; ++r) {
        for (int h = 0; h < H; ++h) finish(w, tile, h, load<F>(sums + (r * H + h) * W), bias, out, type, r);
      }
    }
  });
}

template <Type type>
void widen_as(const void* x, const void* by, int64_t count, float* to) {
  auto some = [&](const void* x, const void* by, int64_t at) {
    F value = load_as(x, type, at);
    if (by == nullptr) return value;
    value *= load_as(by, type, at);
    if (type == Type::float32) return value;
    uint16_t rounded[W];
    store_as(rounded, type, 0, value);
    return load_as(rounded, type, 0);
  };
  int64_t at = 0;
  if (by == nullptr) {
    for (; at + W <= count; at += W) store(to + at, load_as(x, type, at));
  }
  for (; at + W <= count; at += W) store(to + at, some(x, by, at));
  if (at == count) return;
  char rest[4 * W] = {}, factors[4 * W] = {};
  std::memcpy(rest, static_cast<const char*>(x) + at * size_of(type), (count - at) * size_of(type));
  if (by != nullptr) {
    std::memcpy(factors, static_cast<const char*>(by) + at * size_of(type), (count - at) * size_of(type));
  }
  const F value = some(rest, by == nullptr ? nullptr : factors, 0);
  std::memcpy(to + at, &value, (count - at) * sizeof(float));
}

void widen(const void* x, Type type, const void* by, int64_t count, float* to) {
  switch (type) {
    case Type::float32: return widen_as<Type::float32>(x, by, count, to);
    case Type::bfloat16: return widen_as<Type::bfloat16>(x, by, count, to);
    default: return widen_as<Type::float16>(x, by, count, to);
  }
}

// W codes of a row from `at` on, a multiple of W, at the top of each lane; of the lanes of a run, those before it.
template <int Bits>
INLINE inline U codes_at(const uint8_t* row, int64_t at) {
  if constexpr (Bits == 8) return widened(load<Bytes>(row + at)) << 24;
  constexpr int some = std::min(W, 8);
  U top, less;
  for (int begin = 0; begin < W; begin += some) {
    uint64_t run = 0;
    std::memcpy(&run, row + (at + begin) * Bits / 8, up(some * Bits, 8) / 8);
    run >>= (at + begin) * Bits % 8;
    for (int i = 0; i < some; ++i) {
      if constexpr (some * Bits <= 32) {
        top[begin + i] = static_cast<uint32_t>(run);
        less[begin + i] = 32 - Bits - Bits * i;
      } else {
        top[begin + i] = static_cast<uint32_t>(run >> (Bits * i)) << (32 - Bits);
      }
    }
  }
  if constexpr (some * Bits <= 32) top <<= less;
  return top;
}

#if defined(__AVX512F__)
// The same of at most 4 bits, at the bottom of each lane, with others above.
template <int Bits>
INLINE inline U low_codes_at(const uint8_t* row, int64_t at) {
  const uint8_t* const from = row + at * Bits / 8;
  if constexpr (Bits == 4) {
    // A byte in each lane of two, then its upper half in the other.
    const __m512i wide = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    return (U)_mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
  } else {
    // The bits of 8 codes fit a lane.
    uint32_t first = 0, second = 0;
    std::memcpy(&first, from, Bits);
    std::memcpy(&second, from + Bits, Bits);
    U shift;
    for (int i = 0; i < W; ++i) shift[i] = i % 8 * Bits;
    return (U)_mm512_mask_set1_epi32((__m512i)all(first), 0xff00, second) >> shift;
  }
}
#endif

// Values, not scaled yet, of W codes of a row from `at` on, a multiple of W; `flip`: of codes that count from the
// lowest, but are stored as they are.
template <class Code>
INLINE inline F values_at(const uint8_t* row, int64_t at, uint32_t flip) {
  if constexpr (std::is_same_v<Code, IntCode<8>>) return __builtin_convertvector(signed_bytes(row + at), F);
#if defined(__AVX512F__)
  if constexpr (Code::bits <= 4) {
    U low = low_codes_at<Code::bits>(row, at);
    if constexpr (Code::offset) low ^= flip >> (32 - Code::bits);
    return looked_up<Code>(low);
  }
#endif
  U top = codes_at<Code::bits>(row, at);
  if constexpr (Code::offset) top ^= flip;
  return Code::value(top);
}

// Codes with zero points are counted from the lowest.
inline uint32_t flip_of(const Format& format, const void* zero) {
  return zero != nullptr && format.element.is_signed ? 0x80000000u : 0;
}

// `count` scales, at most W, or zero points from `at` on, of which those from `end` on may not exist.
INLINE inline F scales_at(const void* scale, Scale kind, int64_t at, int64_t count, int64_t end) {
  return scales_by(kind, [&](auto v) INLINE {
    constexpr int64_t size = sizeof v / W;
    const char* const from = static_cast<const char*>(scale);
    return load_first<decltype(v)>(from + at * size, count * size, from + end * size);
  });
}

INLINE inline F zeros_at(const void* zero, const Format& format, int64_t at, int64_t count, int64_t end) {
  if (zero == nullptr) return F{};
  const char* const from = static_cast<const char*>(zero);
  return zeros_of(load_first<Bytes>(from + at, count, from + end), format);
}

// One of them, which never goes through memory on its way.
inline float scale_at(const void* scale, Scale kind, int64_t at) {
  switch (kind) {
    case Scale::float32: return static_cast<const float*>(scale)[at];
    case Scale::bfloat16: return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(scale)[at]} << 16);
    case Scale::float16: return from_float16(Halves{} + static_cast<const uint16_t*>(scale)[at])[0];
    case Scale::e8m0: {
      // As from_e8m0.
      const uint32_t code = static_cast<const uint8_t*>(scale)[at];
      return std::bit_cast<float>(code << 23 | (code == 0 || code == 255 ? 0x00400000u : 0));
    }
    default: return FloatCode<4, 3, 7>::value(all(uint32_t{static_cast<const uint8_t*>(scale)[at]} << 24))[0];
  }
}

inline float zero_at(const void* zero, const Format& format, int64_t at) {
  if (zero == nullptr) return 0;
  const int code = format.zero_signed ? static_cast<const int8_t*>(zero)[at] : static_cast<const uint8_t*>(zero)[at];
  return static_cast<float>(format.element.is_signed ? code + (1 << (format.element.bits - 1)) : code);
}

// Rows that are on their way while one is read: as many as a core waits for at once.
constexpr int64_t AHEAD = 16;

// A NaN is larger than anything.
inline F larger(F a, F b) {
  const U takes = (U)(b > a) | (U)(b != b);
  return (F)((takes & (U)b) | (~takes & (U)a));
}

#if defined(__AVX512F__)
#include "blocks.h"
#else
#include "rows.h"
#endif
#include "casts.h"
#include "bytes.h"
#include "integers.h"

#define LOWBIT_TEXT(name) LOWBIT_QUOTED(name)
#define LOWBIT_QUOTED(name) #name

}  // namespace

extern const Kernels kernels;
const Kernels kernels{
    LOWBIT_TEXT(LOWBIT_ISA), FEW, TOKENS, MOST_DIGITS, MOST_BY_TABLE, code_size, widen, few, many, decode, pool, round_token,
    mark_columns, split_token, integers, extents, choose, draw, encode,
};

}  // namespace LOWBIT_ISA
}  // namespace lowbit
