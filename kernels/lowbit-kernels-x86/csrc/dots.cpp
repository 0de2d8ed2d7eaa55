// Products of bfloat16s, compiled for each instruction set that multiplies pairs of them, LOWBIT_ISA, with that set's
// flags; and of tiles of them and of bytes where there are such. The rest is another set's.
#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <vector>

#include "vectors.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

#include "tiles.h"
#include "bytes.h"

static_assert(W == TILE);

template <class Code>
constexpr bool is_float = requires { Code::mantissa; };

// Pairs of a step, one a lane.
constexpr int PAIRS = STEP / 2;
// Tokens of a block of products by decoded weights.
constexpr int ROWS = 12;
// Columns that are decoded at once.
constexpr int PANEL = 512;
// Numbers of 32 bits that are fetched ahead.
constexpr int AHEAD = 512;

constexpr uint32_t HIGH = 0xffff0000u;

// A line of the cache.
struct alignas(64) Line {
  char bytes[64];
};

// Two numbers that are bfloat16s.
inline U paired(F first, F second) { return (U)first >> 16 | ((U)second & HIGH); }

// The bfloat16s of 8-bit floats, four in a lane: of bytes 0 and 2, and of bytes 1 and 3.
template <class Code>
INLINE inline void from_float8(U codes, U (&pairs)[2]) {
  // Of magnitudes the upper bytes and the lower ones.
  alignas(64) static constexpr auto bytes = [] {
    constexpr int first = 1 << Code::mantissa, special = Code::largest + 1;
    std::array<uint8_t, 256> bytes{};
    for (int i = 0; i < 128; ++i) {
      int number = i << (7 - Code::mantissa);
      if (i < first) {
        const float subnormal = i * (Code::mantissa == 3 ? 0x1p-9f : 0x1p-16f);
        number = static_cast<int>(std::bit_cast<uint32_t>(subnormal) >> 16);
      } else if (i < special) {
        number += (127 - Code::bias) << 7;
      } else {
        // Infinity and NaN keep their mantissa, but for e4m3's one NaN.
        number = Code::mantissa == 3 ? 0x7fc0 : 0x7f80 | number;
      }
      bytes[i] = static_cast<uint8_t>(number >> 8), bytes[128 + i] = static_cast<uint8_t>(number);
    }
    return bytes;
  }();
  // Of an index the seven lowest bits count.
  const auto found = [&](const uint8_t* table) INLINE {
    return (U)_mm512_permutex2var_epi8(load<__m512i>(table), (__m512i)codes, load<__m512i>(table + 64));
  };
  const U upper = found(bytes.data()) | (codes & 0x80808080u), lower = found(bytes.data() + 128);
  pairs[0] = (U)_mm512_slli_epi16((__m512i)upper, 8) | (lower & 0x00ff00ffu);
  pairs[1] = (upper & 0xff00ff00u) | (U)_mm512_srli_epi16((__m512i)lower, 8);
}

// How a step's codes become pairs: a row's numbers of two columns in a lane, exactly. Where a word has whole pairs,
// their columns are half a word apart; else they are neighbours, less their zero points.
template <class Code>
struct Pairs {
  static constexpr int bits = Code::bits;
  static constexpr bool in_table = bits <= 4 && 8 % bits == 0, apart = in_table || (bits == 8 && is_float<Code>);
  static constexpr int of_word = 16 / bits;

  static constexpr int first(int j) { return apart ? j / of_word * 2 * of_word + j % of_word : 2 * j; }
  static constexpr int second(int j) { return first(j) + (apart ? of_word : 1); }

  // Those that are found together.
  static constexpr int each = apart ? of_word : 1;

  // Pairs `each` * I and on of 16; `words` of the step.
  template <int I>
  INLINE static void some(const uint32_t* words, F zero, U (&pairs)[each]) {
    if constexpr (in_table) {
      const U word = load<U>(words + I * TILE);
      // Of an index the five lowest bits count.
      alignas(64) static constexpr auto numbers = [] {
        std::array<uint16_t, 32> numbers{};
        for (int i = 0; i < 32; ++i) {
          const float number = Code::number(i & ((1 << bits) - 1));
          numbers[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(number) >> 16);
        }
        return numbers;
      }();
      unroll<each>([&](auto j) INLINE {
        const __m512i low = _mm512_srli_epi16((__m512i)word, j * bits);
        pairs[j] = (U)_mm512_permutexvar_epi16(low, _mm512_load_si512(numbers.data()));
      });
    } else if constexpr (apart) {
      from_float8<Code>(load<U>(words + I * TILE), pairs);
    } else {
      F a = code_at<Code, first(I)>(words, 0), b = code_at<Code, second(I)>(words, 0);
      if constexpr (Code::offset) a -= zero, b -= zero;
      pairs[0] = paired(a, b);
    }
  }
};

inline F dots(F sum, U a, U b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// What sums of a group still lack: zero points, unless pairs have them, times the sum of the inputs; the scale.
template <class Code>
inline F complete(F sum, F zero, float inputs, F scale, F total) {
  if constexpr (Code::offset && Pairs<Code>::apart) sum = fma(zero, all(-inputs), sum);
  return fma(sum, scale, total);
}

// Products of at most M tokens with one tile.
template <class Code, int M>
void few_tile(const Packed& w, const Paired& x, int tokens, const void* bias, void* out, Type type, int64_t index) {
  constexpr int SUMS = 4 / M, each = Pairs<Code>::each;
  const Tile tile(w, index);
  const int64_t columns = w.format.columns ? w.format.columns : up(w.k, STEP), groups = w.format.groups(w.k);
  alignas(64) float totals[M * TILE] = {};
  for (int64_t group = 0, begin = 0; begin < w.k; ++group, begin += columns) {
    const int64_t end = std::min(w.k, begin + columns);
    F sums[M][SUMS];
    unroll<M>([&](auto m) INLINE { unroll<SUMS>([&](auto s) INLINE { sums[m][s] = F{}; }); });
    // Half of a step or all of it.
    auto add = [&](int64_t column, auto first, auto count) INLINE {
      const uint32_t* const words = tile.codes(column / STEP);
      const uint32_t* const pairs = x.pairs + column / STEP * PAIRS;
      unroll<Code::bits>([&](auto i) INLINE { fetch(words + AHEAD + i * TILE); });
      unroll<count / each>([&](auto i) INLINE {
        constexpr int at = first + i * each;
        U found[each];
        Pairs<Code>::template some<at / each>(words, F{}, found);
        unroll<each>([&](auto j) INLINE {
          unroll<M>([&](auto m) INLINE {
            F& sum = sums[m][(i * each + j) % SUMS];
            sum = dots(sum, found[j], all(pairs[m * x.stride + at + j]));
          });
        });
      });
    };
    using Half = std::integral_constant<int, PAIRS / 2>;
    using None = std::integral_constant<int, 0>;
    int64_t column = begin;
    if constexpr (Code::bits > 1) {
      if (column % STEP) add(column, Half{}, Half{}), column += STEP / 2;
    }
    for (; column + STEP / 2 < end; column += STEP) add(column, None{}, std::integral_constant<int, PAIRS>{});
    if constexpr (Code::bits > 1) {
      if (column < end) add(column, None{}, Half{});
    } else {
      if (column < end) add(column, None{}, std::integral_constant<int, PAIRS>{});
    }
    const F scale = tile.scale(group, 0), zero = Code::offset ? tile.zero(group, 0) : F{};
    unroll<M>([&](auto m) INLINE {
      F sum = sums[m][0];
      unroll<SUMS - 1>([&](auto s) INLINE { sum += sums[m][s + 1]; });
      float* const total = totals + m * TILE;
      store(total, complete<Code>(sum, zero, x.sums[m * groups + group], scale, load<F>(total)));
    });
  }
  for (int m = 0; m < tokens; ++m) finish(w, index, 0, load<F>(totals + m * TILE), bias, out, type, m);
}

// Whether a number times its scale is a bfloat16 still, so that scales need not be of sums.
bool folds(const Format& format) {
  const Element& e = format.element;
  const int digits = e.is_float ? e.mantissa + 1 : e.bits - e.is_signed;
  return !format.zero && (format.scale == Scale::e8m0 || (format.scale == Scale::e4m3fn && digits + 4 <= 8));
}

// Pairs of one tile's columns [begin, end), times their scales where those fold; below 2^-126 products take them for 0.
template <class Code>
void fill_pairs(const Packed& w, const Tile& tile, int64_t begin, int64_t end, bool folded, uint32_t* panel) {
  constexpr int each = Pairs<Code>::each;
  const int64_t columns = w.format.columns ? w.format.columns : up(w.k, STEP), last = w.format.groups(w.k) - 1;
  for (int64_t step = begin; step < end; step += STEP, panel += PAIRS * TILE) {
    const uint32_t* const words = tile.codes(step / STEP);
    const int64_t group = step / columns, other = std::min((step + STEP / 2) / columns, last);
    F zero{}, scale[2];
    if constexpr (Code::offset) zero = tile.zero(group, 0);
    if (folded) {
      scale[0] = tile.block_scale(group, 0);
      scale[1] = other == group ? scale[0] : tile.block_scale(other, 0);
    }
    unroll<PAIRS / each>([&](auto i) INLINE {
      U pairs[each];
      Pairs<Code>::template some<i>(words, zero, pairs);
      unroll<each>([&](auto j) INLINE {
        constexpr int at = i * each + j;
        const F by = scale[Code::bits > 1 && at >= PAIRS / 2];
        const U pair = pairs[j];
        store(panel + at * TILE, folded ? paired((F)(pair << 16) * by, (F)(pair & HIGH) * by) : pair);
      });
    });
  }
}

// What `multiply` adds products to, and what they still lack.
struct Sums {
  float* totals;        // [token][16]
  const float* inputs;  // sums of inputs of the group, `stride` from token to token; where they count
  int64_t stride;
  F zero, scale;
};

#include "amx.h"

// Of R tokens with `count` pairs of a panel.
template <class Code, int R>
[[gnu::noinline]] void multiply(const uint32_t* x, int64_t stride, const uint32_t* panel, int64_t count,
                                const Sums& to, int64_t token) {
  F sums[R];
  unroll<R>([&](auto r) INLINE { sums[r] = F{}; });
  for (int64_t i = 0; i < count; ++i) {
    const U pair = load<U>(panel + i * TILE);
    unroll<R>([&](auto r) INLINE { sums[r] = dots(sums[r], pair, all(x[r * stride + i])); });
  }
  for (int r = 0; r < R; ++r) {
    float* const total = to.totals + (token + r) * TILE;
    const float inputs = to.inputs == nullptr ? 0 : to.inputs[(token + r) * to.stride];
    store(total, complete<Code>(sums[r], to.zero, inputs, to.scale, load<F>(total)));
  }
}

template <class Code, int R>
void multiply_up_to(int64_t rows, const uint32_t* x, int64_t stride, const uint32_t* panel, int64_t count,
                    const Sums& to, int64_t token) {
  if (rows == R) return multiply<Code, R>(x, stride, panel, count, to, token);
  if constexpr (R > 1) multiply_up_to<Code, R - 1>(rows, x, stride, panel, count, to, token);
}

// Products of all tokens with `rows` tiles; tokens in tiles with 2 at most, others with 1. `totals`: [rows][token][16].
template <class Code>
void many_tile(const Packed& w, const Paired& x, int64_t tokens, const void* bias, void* out, Type type, int64_t index,
               int rows, uint32_t* panel, float* totals) {
  constexpr int64_t apart = PANEL / 2 * TILE;
  const bool folded = folds(w.format);
  const int64_t columns = w.format.columns && !folded ? w.format.columns : up(w.k, STEP), groups = w.format.groups(w.k);
  std::fill(totals, totals + rows * tokens * TILE, 0.0f);
  for (int64_t k = 0; k < w.k; k += PANEL) {
    const int64_t end = std::min(up(w.k, STEP), k + PANEL);
    for (int r = 0; r < rows; ++r) fill_pairs<Code>(w, Tile(w, index + r), k, end, folded, panel + r * apart);
    // By groups, or what the panel has of one.
    for (int64_t begin = k; begin < end;) {
      const int64_t group = begin / columns, stop = std::min(end, (group + 1) * columns), count = (stop - begin) / 2;
      Sums to[2];
      for (int r = 0; r < rows; ++r) {
        const Tile tile(w, index + r);
        to[r] = {totals + r * tokens * TILE, nullptr, groups, F{}, folded ? all(1.0f) : tile.scale(group, 0)};
        if (Code::offset && begin == group * columns) to[r].inputs = x.sums + group, to[r].zero = tile.zero(group, 0);
      }
      const uint32_t* const from = panel + (begin - k) / 2 * TILE;
      if (x.tiled) {
        const int64_t next = up(w.k, STEP) / 2 * TILE;
        multiply_tiles<Code>(x.pairs + begin / 2 * TILE, next, from, apart, rows, count, to, tokens);
      } else {
        const uint32_t* const pairs = x.pairs + begin / 2;
        for (int64_t m = 0; m < tokens; m += ROWS) {
          multiply_up_to<Code, ROWS>(std::min<int64_t>(ROWS, tokens - m), pairs + m * x.stride, x.stride, from, count,
                                     to[0], m);
        }
      }
      begin = stop;
    }
  }
  F last[2];
  for (int r = 0; r < rows; ++r) last[r] = folded ? Tile(w, index + r).tensor_scale(0) : all(1.0f);
  for (int64_t m = 0; m < tokens; ++m) {
    for (int r = 0; r < rows; ++r) {
      finish(w, index + r, 0, load<F>(totals + (r * tokens + m) * TILE) * last[r], bias, out, type, m);
    }
  }
}

template <class Code>
constexpr bool takes_few(const Format& format) {
  return Pairs<Code>::apart && (format.columns % STEP == 0 || Code::bits > 1);
}

bool takes_pairs(const Format& format, int64_t tokens) {
  bool takes = false;
  with_code(format, [&](auto code) {
    using Code = decltype(code);
    if (tokens <= FEW) {
      takes = takes_few<Code>(format);
    } else {
      // Groups of half a step are of numbers that fold; codes of 8 bits less a zero point of another sign need 9.
      takes = (format.columns % STEP == 0 || (folds(format) && Code::bits > 1)) &&
              !(Code::offset && Code::bits == 8 && format.zero_signed != format.element.is_signed);
    }
  });
  return takes;
}

// x (k,), bfloat16s with zeros up to STEP, as pairs; and sums of those of a group. False where a product would lose a
// number that is too small.
bool pair(const float* x, int64_t k, const Format& format, int64_t step, uint32_t* pairs, float* sums) {
  const int64_t columns = format.columns ? format.columns : std::max<int64_t>(k, 1);
  U small{};
  for (int64_t i = 0; i < k; i += W) {
    const U magnitude = load<U>(x + i) & 0x7fffffffu;
    small |= (U)(magnitude < 0x04000000u) & (U)(magnitude != 0u);
  }
  for (int i = 0; i < W; ++i) {
    if (small[i]) return false;
  }
  for (int64_t group = 0, begin = 0; format.zero && begin < k; ++group, begin += columns) {
    float sum = 0;
    for (int64_t i = begin; i < std::min(k, begin + columns); ++i) sum += x[i];
    sums[group] = sum;
  }
  with_code(format, [&](auto code) {
    using Of = Pairs<decltype(code)>;
    for (int64_t i = 0; i < k; i += STEP, pairs += step) {
      unroll<PAIRS>([&](auto j) {
        const uint32_t low = std::bit_cast<uint32_t>(x[i + Of::first(j)]);
        pairs[j] = low >> 16 | (std::bit_cast<uint32_t>(x[i + Of::second(j)]) & HIGH);
      });
    }
  });
  return true;
}

void by_pairs(const Packed& w, const Paired& x, int64_t tokens, const void* bias, void* out, Type type, int64_t first,
              int64_t last) {
  with_code(w.format, [&](auto code) {
    using Code = decltype(code);
    if (x.many) {
      const Tiles tiles(4 * TILE);
      const std::unique_ptr<Line[]> panel(new Line[PANEL]), totals(new Line[2 * tokens]);
      const int rows = x.tiled ? 2 : 1;
      for (int64_t tile = first; tile < last; tile += rows) {
        many_tile<Code>(w, x, tokens, bias, out, type, tile, static_cast<int>(std::min<int64_t>(rows, last - tile)),
                        reinterpret_cast<uint32_t*>(panel.get()), reinterpret_cast<float*>(totals.get()));
      }
    } else if constexpr (Pairs<Code>::apart) {
      for (int64_t tile = first; tile < last; ++tile) {
        (tokens == 1 ? few_tile<Code, 1> : few_tile<Code, 4>)(w, x, tokens, bias, out, type, tile);
      }
    }
  });
}

#define LOWBIT_TEXT(name) LOWBIT_QUOTED(name)
#define LOWBIT_QUOTED(name) #name

}  // namespace

// Data: a function of this file may run only where its instructions are.
extern const Kernels dots;
constinit const Kernels dots{
    .isa = LOWBIT_TEXT(LOWBIT_ISA),
    .takes_pairs = takes_pairs,
    .pair = pair,
    .by_pairs = by_pairs,
    .few_pairs = FEW,
#if defined(__AMX_INT8__)
    .tiled_bytes = TILED_BYTES,
    .tile_bytes = tile_bytes,
    .integers_by_tiles = integers_by_tiles,
#endif
};

}  // namespace LOWBIT_ISA
}  // namespace lowbit
