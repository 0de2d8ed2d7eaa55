// Products of integers: inputs rounded to codes, four of which meet four codes of a row in one instruction.
// Included by kernels.cpp, once for each instruction set.

// Tokens whose sums are in registers, and tiles that they meet at once: an input is read once for two vectors of rows.
constexpr int TOKENS = W == 16 ? 8 : W == 8 ? 4 : 2;
constexpr int TILES = H == 1 ? 2 : 1;

// How codes of a weight become bytes: `planes` of them in a word, byte t of plane j having code planes * t + j, less
// `zero`. Those of 8 bits are signed, others count from the lowest.
template <class Code>
struct Planes {
  static constexpr int bits = Code::bits, count = 8 / bits;
  static constexpr bool is_signed = bits == 8;
  static constexpr uint32_t each_byte = 0x01010101u;
  static constexpr uint32_t top = bits == 8 ? 0x80u : bits == 4 ? 0x88u : bits == 2 ? 0xaau : 0xffu;
  // Signed codes count from the lowest with their highest bit flipped; unsigned ones of 8 bits become signed so.
  static constexpr uint32_t flip = (Code::offset == is_signed ? top : 0) * each_byte;
  static constexpr int zero = Code::offset ? (is_signed ? -128 : 0) : (is_signed ? 0 : 1 << (bits - 1));

  template <int J>
  static U plane(U word) {
    if constexpr (is_signed) return word;
    return (word >> (bits * J)) & (((1u << bits) - 1) * each_byte);
  }
};

// Sums of two neighbouring products of signed 16-bit numbers.
inline I pairs(U a, U b) {
#if defined(__AVX512BW__)
  return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (I)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}

// Bytes that a code of an input takes: two where it meets signed bytes as 16-bit numbers.
#if defined(__AVX512VNNI__)
constexpr int code_size(int) { return 1; }
#else
constexpr int code_size(int bits) { return bits == 8 ? 2 : 1; }
#endif

// sum + the products of four bytes of `x`, which are unsigned, and of `w`, exactly; without VNNI, w has 4 bits or fewer.
inline I dot(I sum, U x, U w) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
  // Two products of 255 and 15 or less are no more than 16 bits hold.
#if defined(__AVX512BW__)
  return sum + pairs((U)_mm512_maddubs_epi16((__m512i)x, (__m512i)w), all(0x00010001u));
#elif defined(__AVX2__)
  return sum + pairs((U)_mm256_maddubs_epi16((__m256i)x, (__m256i)w), all(0x00010001u));
#else
  constexpr uint32_t low = 0x00ff00ffu;
  return sum + pairs(x & low, w & low) + pairs((x >> 8) & low, (w >> 8) & low);
#endif
#endif
}

inline uint32_t four_at(const uint8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, 4);
  return four;
}

// Even or odd bytes of a plane of signed ones, as 16-bit numbers.
template <int Odd>
inline U signed_bytes(U plane) {
  typedef int16_t Signeds __attribute__((vector_size(4 * W)));
  return Odd ? (U)((Signeds)plane >> 8) : (U)((Signeds)plane << 8 >> 8);
}

// Products of `tokens` tokens, at most M, which lie together, from the one numbered `token` on, with N tiles: the one
// numbered `index` and one that is `apart` tiles on. `weights` are their sums of codes less zero points, [group][N][16],
// which the First tokens find.
template <class Code, int M, int N, bool First>
void integer_tiles(const Packed& w, const Codes& x, int64_t token, int tokens, const void* bias, void* out, Type type,
                   int64_t index, int64_t apart, uint32_t* weights) {
  using Of = Planes<Code>;
  // Of one token each plane has sums of its own, which need not wait for one another.
  constexpr int SIZE = code_size(Of::bits), V = N * H, SUMS = M == 1 ? std::min(Of::count, 4) : 1;
  const int64_t columns = w.format.columns ? w.format.columns : up(w.k, STEP), words = columns * Of::bits / 32;
  const int64_t groups = w.format.groups(w.k);
  const uint32_t* word = Tile(w, index).codes(0);
  const int64_t next = Tile(w, index + apart).codes(0) - word;
  const uint8_t *codes = x.codes + token * x.stride, *ones_at = x.ones;
  alignas(64) float totals[M][V * W] = {};
  alignas(64) int32_t kept[M][V * W];
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t here = std::min(columns, w.k - group * columns);
    const int64_t end = std::min(words, (up(w.k, STEP) - group * columns) * Of::bits / 32);
    // Registers are for these: nothing is called until they are stored.
    I sums[M][V][SUMS], ones[V];
    unroll<V>([&](auto v) INLINE {
      ones[v] = I{};
      unroll<M>([&](auto m) INLINE { unroll<SUMS>([&](auto s) INLINE { sums[m][v][s] = I{}; }); });
    });
    for (int64_t i = 0; i < end; ++i, word += TILE) {
      U now[V];
      unroll<V>([&](auto v) INLINE { now[v] = load<U>(word + v / H * next + v % H * W) ^ Of::flip; });
      unroll<Of::count>([&](auto j) INLINE {
        unroll<SIZE>([&](auto p) INLINE {
          U part[V];
          unroll<V>([&](auto v) INLINE {
            part[v] = Of::template plane<j>(now[v]);
            if constexpr (SIZE == 2) part[v] = signed_bytes<p>(part[v]);
          });
          auto add = [&](const uint8_t* with, I& sum, auto v) INLINE {
            const U four = all(four_at(with));
            I more = SIZE == 1 ? dot(sum, four, part[v]) : sum + pairs(four, part[v]);
            // Here and not later, lest products wait in memory.
            asm("" : "+v"(more));
            sum = more;
          };
          constexpr int at = j * SIZE + p;
          if constexpr (First) unroll<V>([&](auto v) INLINE { add(ones_at + 4 * at, ones[v], v); });
          unroll<M>([&](auto m) INLINE {
            unroll<V>([&](auto v) INLINE { add(codes + 4 * (at * M + m), sums[m][v][j % SUMS], v); });
          });
        });
      });
      ones_at += Of::count * 4 * SIZE;
      codes += Of::count * 4 * SIZE * M;
    }
    unroll<V>([&](auto v) INLINE {
      if constexpr (First) store(weights + (group * V + v) * W, ones[v]);
      unroll<M>([&](auto m) INLINE {
        I sum = sums[m][v][0];
        unroll<SUMS - 1>([&](auto s) INLINE { sum += sums[m][v][s + 1]; });
        store(kept[m] + v * W, sum);
      });
    });
    for (int v = 0; v < V; ++v) {
      const Tile tile(w, index + v / H * apart);
      U zero = all(static_cast<uint32_t>(Of::zero));
      if constexpr (Code::offset) zero += (U)__builtin_convertvector(tile.zero(group, v % H), I);
      uint32_t* const less_zero = weights + (group * V + v) * W;
      if constexpr (First) store(less_zero, load<U>(less_zero) - zero * static_cast<uint32_t>(here));
      const F scale = tile.scale(group, v % H);
      for (int m = 0; m < tokens; ++m) {
        // The sum of (x - x's zero) (w - w's zero); unsigned, so that what overflows on the way comes back.
        const uint32_t inputs = x.sums[(token + m) * groups + group], less = x.zero[token + m];
        const I product = (I)(load<U>(kept[m] + v * W) - zero * inputs - load<U>(less_zero) * less);
        float* const total = totals[m] + v * W;
        store(total, fma(__builtin_convertvector(product, F), scale, load<F>(total)));
      }
    }
  }
  for (int m = 0; m < tokens; ++m) {
    for (int v = 0; v < V; ++v) {
      const F sum = load<F>(totals[m] + v * W) * x.scale[token + m];
      finish(w, index + v / H * apart, v % H, sum, bias, out, type, token + m);
    }
  }
}

void integers(const Packed& w, const Codes& x, int64_t tokens, const void* bias, void* out, Type type, int64_t first,
              int64_t last) {
  with_code(w.format, [&](auto code) {
    using Code = decltype(code);
    if constexpr (std::is_same_v<Code, IntCode<Code::bits>> || std::is_same_v<Code, OffsetCode<Code::bits>>) {
      if constexpr (8 % Code::bits == 0) {
        const std::unique_ptr<uint32_t[]> weights(new uint32_t[w.format.groups(w.k) * TILE * TILES]);
        if (x.together == 1) {
          for (int64_t tile = first; tile < last; ++tile) {
            integer_tiles<Code, 1, 1, true>(w, x, 0, 1, bias, out, type, tile, 0, weights.get());
          }
          return;
        }
        for (int64_t tile = first; tile < last; tile += TILES) {
          // The last may be without another, and is then computed twice.
          const int64_t apart = tile + 1 < last ? TILES - 1 : 0;
          for (int64_t token = 0; token < tokens; token += TOKENS) {
            const int some = static_cast<int>(std::min<int64_t>(TOKENS, tokens - token));
            auto run = token ? integer_tiles<Code, TOKENS, TILES, false> : integer_tiles<Code, TOKENS, TILES, true>;
            run(w, x, token, some, bias, out, type, tile, apart, weights.get());
          }
        }
      }
    }
  });
}

// Bytes of columns, k of them and zeros up to whole words of the weight, in the order in which planes of its words meet
// them: of a word's 4 * Planes columns, every Planes-th.
template <int Planes>
void arrange(const uint8_t* bytes, int64_t k, uint8_t* to) {
  for (int64_t at = 0; at < k; at += 4 * Planes) {
    for (int j = 0; j < Planes; ++j) {
      for (int t = 0; t < 4; ++t) to[at + 4 * j + t] = bytes[at + Planes * t + j];
    }
  }
}

// The same of one plane; as numbers of 16 bits even bytes of four, then odd ones.
void arrange_bytes(const uint8_t* bytes, int64_t k, uint8_t* to) {
  if (code_size(8) == 1) return arrange<1>(bytes, k, to);
  for (int64_t at = 0; at < k; at += 4) {
    const uint16_t four[] = {bytes[at], bytes[at + 2], bytes[at + 1], bytes[at + 3]};
    std::memcpy(to + 2 * at, four, sizeof four);
  }
}

void arrange(const Format& weight, const uint8_t* bytes, int64_t k, uint8_t* to) {
  switch (weight.element.bits) {
    case 8: return arrange_bytes(bytes, k, to);
    case 4: return arrange<2>(bytes, k, to);
    case 2: return arrange<4>(bytes, k, to);
    default: return arrange<8>(bytes, k, to);
  }
}

// The scale and the zero point of a token of `k` numbers, zeros up to STEP.
void choose_scale(const float* x, int64_t k, const Activation& how, float& scale, int32_t& zero) {
  const float low = -static_cast<float>(1 << (how.bits - 1)), high = -low - 1, steps = high - low;
  const auto [down, top, finite] = range_of(x, k);
  scale = how.asymmetric ? top / steps - down / steps : std::max(top, -down) / (steps / 2);
  if (scale == 0) scale = 1;
  if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
  zero = 0;
  if (how.asymmetric && finite) zero = std::clamp(low - std::nearbyint(down / scale), low, high);
}

// The codes of one token, counted from the lowest that 8 bits have, and their sums by groups of the weight. `x` has
// zeros up to STEP.
void round_token(const float* x, int64_t k, const Activation& how, const Format& weight, int64_t token, Codes& to) {
  const float low = -static_cast<float>(1 << (how.bits - 1)), high = -low - 1;
  float scale = how.scale;
  int32_t zero = how.zero;
  if (how.dynamic) choose_scale(x, k, how, scale, zero);
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[up(k, STEP)]());
  const int64_t columns = weight.columns ? weight.columns : std::max<int64_t>(k, 1);
  int32_t* const sums = to.sums + token * weight.groups(k);
  const F by = all(scale), first = all(low), last = all(high);
  for (int64_t group = 0, begin = 0; begin < k; ++group, begin += columns) {
    I sum{};
    for (int64_t i = begin; i < std::min(k, begin + columns); i += W) {
      const F given = load<F>(x + i) / by;
      // Beyond these it is cut off in any case.
      const F near = nearest(most(least(given, all(1024.0f)), all(-1024.0f)));
      const F code = most(least(near + static_cast<float>(zero), last), first);
      // Of what is no number, the code is 0.
      I byte = (__builtin_convertvector(code, I) & (I)(given == given)) + 128;
      if (i + W > k) {
        for (int64_t j = k - i; j < W; ++j) byte[j] = 0;
      }
      sum += byte;
      store(bytes.get() + i, narrowed((U)byte));
    }
    int32_t total = 0;
    for (int j = 0; j < W; ++j) total += sum[j];
    sums[group] = total;
  }
  // Where other tokens stand between its words of four, its own are put apart.
  const int64_t size = up(k, STEP) * code_size(weight.element.bits), at = token % to.together;
  uint8_t* const codes = to.codes + (token - at) * to.stride + 4 * at;
  if (to.together == 1) {
    arrange(weight, bytes.get(), k, codes);
  } else {
    const std::unique_ptr<uint8_t[]> own(new uint8_t[size]());
    arrange(weight, bytes.get(), k, own.get());
    for (int64_t i = 0; i < size; i += 4) std::memcpy(codes + i * to.together, own.get() + i, 4);
  }
  to.scale[token] = scale;
  to.zero[token] = zero + 128;
}

// 1 for each column that there is.
void mark_columns(int64_t k, const Format& weight, uint8_t* ones) {
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[up(k, STEP)]());
  std::fill(bytes.get(), bytes.get() + k, uint8_t{1});
  arrange(weight, bytes.get(), k, ones);
}
