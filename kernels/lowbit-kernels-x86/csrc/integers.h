// Products of integers: inputs rounded to codes, four of which meet four codes of a row in one instruction.
// Included by kernels.cpp, once for each instruction set.

// Tokens whose sums are in registers.
constexpr int TOKENS = W == 16 ? 8 : W == 8 ? 4 : 2;

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

// Products of `tokens` tokens, at most M, from the one numbered `token` on. `weights` are a tile's sums of codes less
// zero points, [group][16], which the First tokens find.
template <class Code, int M, bool First>
void integer_tile(const Packed& w, const Codes& x, int64_t token, int tokens, const void* bias, void* out, Type type,
                  int64_t index, uint32_t* weights) {
  using Of = Planes<Code>;
  constexpr int SIZE = code_size(Of::bits);
  const Tile tile(w, index);
  const int64_t columns = w.format.columns ? w.format.columns : up(w.k, STEP), words = columns * Of::bits / 32;
  const uint32_t* word = tile.codes(0);
  const uint8_t *codes[M], *ones_at = x.ones;
  F total[M][H] = {};
  for (int m = 0; m < M; ++m) codes[m] = x.codes + (token + m) * x.stride;
  for (int64_t group = 0; group < tile.groups; ++group) {
    const int64_t here = std::min(columns, w.k - group * columns);
    const int64_t end = std::min(words, (up(w.k, STEP) - group * columns) * Of::bits / 32);
    I sums[M][H] = {}, ones[H] = {};
    for (int64_t i = 0; i < end; ++i, word += TILE) {
      U now[H];
      for (int h = 0; h < H; ++h) now[h] = load<U>(word + h * W) ^ Of::flip;
      unroll<Of::count>([&](auto j) {
        U plane[H], odd[H];
        for (int h = 0; h < H; ++h) {
          plane[h] = Of::template plane<j>(now[h]);
          if constexpr (SIZE == 2) {
            odd[h] = signed_bytes<1>(plane[h]);
            plane[h] = signed_bytes<0>(plane[h]);
          }
        }
        auto add = [&](I sum, const uint8_t* with, int h) {
          const U four = all(four_at(with + j * 4 * SIZE));
          if constexpr (SIZE == 1) return dot(sum, four, plane[h]);
          return sum + pairs(four, plane[h]) + pairs(all(four_at(with + j * 8 + 4)), odd[h]);
        };
        if constexpr (First) {
          for (int h = 0; h < H; ++h) ones[h] = add(ones[h], ones_at, h);
        }
        for (int m = 0; m < M; ++m) {
          for (int h = 0; h < H; ++h) sums[m][h] = add(sums[m][h], codes[m], h);
        }
      });
      ones_at += Of::count * 4 * SIZE;
      for (int m = 0; m < M; ++m) codes[m] += Of::count * 4 * SIZE;
    }
    for (int h = 0; h < H; ++h) {
      U zero = all(static_cast<uint32_t>(Of::zero));
      if constexpr (Code::offset) zero += (U)__builtin_convertvector(tile.zero(group, h), I);
      uint32_t* const kept = weights + (group * H + h) * W;
      if constexpr (First) store(kept, (U)ones[h] - zero * static_cast<uint32_t>(here));
      const U sum = load<U>(kept);
      const F scale = tile.scale(group, h);
      for (int m = 0; m < tokens; ++m) {
        // The sum of (x - x's zero) (w - w's zero); unsigned, so that what overflows on the way comes back.
        const uint32_t inputs = x.sums[(token + m) * tile.groups + group], less = x.zero[token + m];
        const I product = (I)((U)sums[m][h] - zero * inputs - sum * less);
        total[m][h] = fma(__builtin_convertvector(product, F), scale, total[m][h]);
      }
    }
  }
  for (int m = 0; m < tokens; ++m) {
    for (int h = 0; h < H; ++h) finish(w, index, h, total[m][h] * x.scale[token + m], bias, out, type, token + m);
  }
}

void integers(const Packed& w, const Codes& x, int64_t tokens, const void* bias, void* out, Type type, int64_t first,
              int64_t last) {
  with_code(w.format, [&](auto code) {
    using Code = decltype(code);
    if constexpr (std::is_same_v<Code, IntCode<Code::bits>> || std::is_same_v<Code, OffsetCode<Code::bits>>) {
      if constexpr (8 % Code::bits == 0) {
        const std::unique_ptr<uint32_t[]> weights(new uint32_t[w.format.groups(w.k) * TILE]);
        for (int64_t tile = first; tile < last; ++tile) {
          if (tokens == 1) {
            integer_tile<Code, 1, true>(w, x, 0, 1, bias, out, type, tile, weights.get());
            continue;
          }
          for (int64_t token = 0; token < tokens; token += TOKENS) {
            const int some = static_cast<int>(std::min<int64_t>(TOKENS, tokens - token));
            auto run = token ? integer_tile<Code, TOKENS, false> : integer_tile<Code, TOKENS, true>;
            run(w, x, token, some, bias, out, type, tile, weights.get());
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
  arrange(weight, bytes.get(), k, to.codes + token * to.stride);
  to.scale[token] = scale;
  to.zero[token] = zero + 128;
}

// 1 for each column that there is.
void mark_columns(int64_t k, const Format& weight, uint8_t* ones) {
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[up(k, STEP)]());
  std::fill(bytes.get(), bytes.get() + k, uint8_t{1});
  arrange(weight, bytes.get(), k, ones);
}
