// Rounding rows to codes: what their blocks extend to, scales that fit that, codes by those.
// Included by kernels.cpp, once for each instruction set.

inline I lane_numbers() {
  I lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

// All bits of the first `count` lanes.
inline U first_lanes(int64_t count) { return (U)(lane_numbers() < static_cast<int32_t>(std::min<int64_t>(count, W))); }

inline F where(U take, F a, F b) { return (F)((take & (U)a) | (~take & (U)b)); }

inline U finite(F x) { return (U)(((U)x & 0x7f800000u) != 0x7f800000u); }

// The largest of the lanes, by halves.
inline int32_t largest_of(I x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#elif defined(__AVX2__)
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
#else
  return std::max(std::max(x[0], x[1]), std::max(x[2], x[3]));
#endif
}

#if defined(__AVX512F__)
// The largest of each of 16 vectors: halves of two meet in one, until one is left, in order.
INLINE inline I largest_of_each(const I (&x)[16]) {
  __m512i found[16];
  auto larger = [](__m512i a, __m512i b) INLINE { return _mm512_max_epi32(a, b); };
  for (int i = 0; i < 8; ++i) {
    const __m512i a = (__m512i)x[2 * i], b = (__m512i)x[2 * i + 1];
    found[i] = larger(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = found[2 * i], b = found[2 * i + 1];
    found[i] = larger(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  for (int some = 2; some > 0; --some) {
    for (int i = 0; i < some; ++i) {
      const __m512i a = found[2 * i], b = found[2 * i + 1];
      found[i] = larger(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    }
  }
  return (I)found[0];
}
#endif

struct Range {
  float low, high;
  bool finite;
};

// The lowest and the highest of `count` numbers, neither beyond 0; whole vectors may be read.
Range range_of(const float* x, int64_t count) {
  F lows{}, highs{};
  U whole = ~U{};
  for (int64_t i = 0; i < count; i += W) {
    const F now = (F)(load<U>(x + i) & first_lanes(count - i));
    lows = least(now, lows);
    highs = most(now, highs);
    whole &= finite(now);
  }
  Range range{0, 0, true};
  for (int i = 0; i < W; ++i) {
    range.low = std::min(range.low, lows[i]);
    range.high = std::max(range.high, highs[i]);
    range.finite &= whole[i] != 0;
  }
  return range;
}

// Of each block of x, `k` numbers and a STEP of zeros: the largest magnitude, or what is not finite, in `high`; with
// zero points the lowest and the highest, none beyond 0, or NaN in both.
void extents(const float* x, int64_t k, const Format& format, float* low, float* high) {
  const int64_t columns = format.columns ? format.columns : std::max<int64_t>(k, 1);
  int64_t group = 0, begin = 0;
  // Without their sign, floats order as integers, NaN above infinity.
  auto larger_of = [](I a, I b) INLINE { return a > b ? a : b; };
#if defined(__AVX512F__)
  const bool short_blocks = !format.zero && (columns == W || columns == 2 * W);
  for (; short_blocks && begin + W * columns <= k; group += W, begin += W * columns) {
    I tops[W];
    unroll<W>([&](auto i) INLINE {
      const float* const from = x + begin + i * columns;
      tops[i] = load<I>(from) & 0x7fffffff;
      if (columns == 2 * W) tops[i] = larger_of(tops[i], load<I>(from + W) & 0x7fffffff);
    });
    store(high + group, largest_of_each(tops));
  }
#endif
  for (; begin < k; ++group, begin += columns) {
    const int64_t end = std::min(k, begin + columns);
    if (!format.zero) {
      I top{}, other{};
      int64_t i = begin;
      for (; i + 2 * W <= end; i += 2 * W) {
        top = larger_of(top, load<I>(x + i) & 0x7fffffff);
        other = larger_of(other, load<I>(x + i + W) & 0x7fffffff);
      }
      top = larger_of(top, other);
      for (; i < end; i += W) top = larger_of(top, load<I>(x + i) & (I)first_lanes(end - i) & 0x7fffffff);
      const int32_t largest = largest_of(top);
      std::memcpy(high + group, &largest, 4);
      continue;
    }
    const Range range = range_of(x + begin, end - begin);
    low[group] = range.finite ? range.low : std::numeric_limits<float>::quiet_NaN();
    high[group] = range.finite ? range.high : std::numeric_limits<float>::quiet_NaN();
  }
}

template <class Code>
inline F largest_value() {
  return Code::value(all(static_cast<uint32_t>(Code::largest) << (32 - Code::bits)));
}

// The code of a magnitude, with x's sign; NaN where x is and the format has it, else 0.
template <class Code>
inline U signed_code(F x, I magnitude) {
  const I code = magnitude | ((I)((U)x >> (32 - Code::bits)) & (1 << (Code::bits - 1)));
  return (U)(x == x ? code : I{} + (Code::bits == 8 ? 0x7f : 0));
}

// Codes of floats, to nearest even, saturating: at the bottom of each lane.
template <class Code>
inline U float_codes(F x) {
  constexpr int drop = 23 - Code::mantissa, first = (128 - Code::bias) << 23;
  const F magnitude = least(largest_value<Code>(), (F)((I)x & 0x7fffffff));
  // The power of two below, or that of the subnormal numbers.
  I power = (I)magnitude & 0x7f800000;
  power = power > first ? power : I{} + first;
  // Added to a number that much larger, the magnitude is rounded to steps of the last bit kept.
  const I beside = power + (drop << 23);
  const I steps = (I)(magnitude + (F)beside) - beside;
  return signed_code<Code>(x, steps + ((power - first) >> drop));
}

// Scales rounded to what they are stored as: 1 for 0, no less than the smallest, NaN if not finite.
inline void store_scales(void* to, const Format& format, int64_t at, F scale, int64_t count) {
  char lanes[4 * W];
  const U is_finite = finite(scale);
  const F nan = all(std::numeric_limits<float>::quiet_NaN());
  auto kept = [&](float smallest, float largest) {
    const F inside = least(most(scale, all(smallest)), all(largest));
    return where(is_finite, where((U)(scale == F{}), all(1.0f), inside), nan);
  };
  switch (format.scale) {
    case Scale::float32: store(lanes, kept(0, std::numeric_limits<float>::max())); break;
    case Scale::bfloat16: store_as(lanes, Type::bfloat16, 0, kept(0x1p-133f, 0x1.fep127f)); break;
    case Scale::float16: store_as(lanes, Type::float16, 0, kept(0x1p-24f, 65504)); break;
    default: {
      const U codes = float_codes<FloatCode<4, 3, 7>>(kept(0x1p-9f, 448));
      store(lanes, narrowed(codes));
    }
  }
  const int64_t size = size_of(format.scale);
  std::memcpy(static_cast<char*>(to) + at * size, lanes, count * size);
}

// Stored scales and zero points, from `at` on, for what `extents` found of `groups` blocks.
void choose(const float* low, const float* high, int64_t groups, const Format& format, const Rounding& how,
            float tensor_scale, void* scale, void* zero, int64_t at) {
  const Element& e = format.element;
  for (int64_t group = 0; group < groups; group += W) {
    const int64_t count = std::min<int64_t>(W, groups - group);
    const F top = load<F>(high + group);
    if (format.scale == Scale::e8m0) {
      const I bits = (I)top;
      I code = (bits >> 23) - how.top_exponent + (((bits & 0x7fffff) > how.mantissa_bound) & 1);
      code = code < 0 ? I{} : code;
      code = code > 254 ? I{} + 254 : code;
      code = (I)((finite(top) & (U)code) | (~finite(top) & 255u));
      const Bytes bytes = narrowed((U)code);
      std::memcpy(static_cast<uint8_t*>(scale) + at + group, &bytes, count);
      continue;
    }
    if (!format.zero) {
      store_scales(scale, format, at + group, top / all(how.divisor) / all(tensor_scale), count);
      continue;
    }
    const F bottom = load<F>(low + group), steps = all(how.divisor);
    store_scales(scale, format, at + group, top / steps - bottom / steps, count);
    const float least_code = e.is_signed ? -static_cast<float>(1 << (e.bits - 1)) : 0;
    const F by = bottom / scales_at(scale, format.scale, at + group, count, at + group + count);
    for (int64_t i = 0; i < count; ++i) {
      const float zero_point = least_code - std::nearbyint(by[i]);
      // A block that is not finite has none.
      const float inside = zero_point == zero_point ? std::clamp(zero_point, least_code, least_code + how.divisor) : 0;
      const float lowest = format.zero_signed ? -128 : 0;
      static_cast<uint8_t*>(zero)[at + group + i] =
          static_cast<uint8_t>(static_cast<int>(std::clamp(inside, lowest, lowest + 255)));
    }
  }
}

// Whole numbers next to x, ties to even; below 2^22: around 1.5 * 2^23 float32 has integers alone.
inline F nearest(F x) {
  constexpr float integers_from = 12582912.0f;
  return x + integers_from - integers_from;
}

// The whole number below x, or where the rest is larger than `noise` the one above.
inline F by_noise(F x, F noise) {
  const F near = nearest(x);
  const F floor = where((U)(near > x), near - 1.0f, near);
  return where((U)(x - floor > noise), floor + 1.0f, floor);
}

// 2^exponent.
inline F power_of_two(I exponent) { return (F)((exponent + 127) << 23); }

// Codes at the bottom of each lane, with what stands above them undefined.
template <class Code>
inline U codes_of(const Element& e, F x, F zero) {
  if constexpr (requires { Code::mantissa; }) {
    return float_codes<Code>(x);
  } else {
    const float lowest = Code::offset && !e.is_signed ? 0 : -static_cast<float>(1 << (Code::bits - 1));
    const F low = all(lowest), high = all(lowest + ((1 << Code::bits) - 1));
    // What is no number stays so.
    if constexpr (Code::offset) x = nearest(most(all(-4096.0f), least(all(4096.0f), x))) + zero;
    // The lowest bits of what is added to are those of the number.
    return (U)(most(low, least(high, x)) + 12582912.0f) & (U)(x == x);
  }
}

// The same, rounded by `noise`.
template <class Code>
inline U codes_by(const Element& e, F x, F zero, F noise) {
  if constexpr (requires { Code::mantissa; }) {
    constexpr int lowest = 1 - Code::bias;
    const F magnitude = least((F)((U)x & 0x7fffffffu), largest_value<Code>());
    I exponent = ((I)magnitude >> 23) - 127;
    exponent = exponent < lowest ? I{} + lowest : exponent;
    const F steps = by_noise(magnitude * power_of_two(Code::mantissa - exponent), noise);
    return signed_code<Code>(x, __builtin_convertvector(steps, I) + ((exponent - lowest) << Code::mantissa));
  } else {
    return codes_of<Code>(e, by_noise(most(all(-4096.0f), least(all(4096.0f), x)), noise), zero);
  }
}

// Whether `fma` rounds once, so that a division takes a third of its time.
#if defined(__AVX2__)
constexpr bool CORRECTS = true;
#else
constexpr bool CORRECTS = false;
#endif

// x / by, as a division rounds it, of by from 2^-80 to 2^100 and its rounded inverse: the product is a step away at most,
// and what it leaves of x is exact. Of x below 2^-102 that is not, and quotients below 2^-22 are codes of 0 all the same;
// beyond any code's number, one that is large enough comes out.
// Source: P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
inline F quotient(F x, F by, F inverse) {
  const F near = most(all(-65536.0f), least(all(65536.0f), x * inverse));
  const F found = fma(fma(-near, by, x), inverse, near);
  // Sums have no -0.
  return (F)((U)found | ((U)x & 0x80000000u));
}

// Noise in [0, 1) of numbers `first`, ..., `first + count - 1`: Philox4x32-10, four to a counter.
void draw(uint64_t seed, uint64_t first, int64_t count, float* noise) {
  for (int64_t i = -static_cast<int64_t>(first % 4); i < count; i += 4) {
    const uint64_t counter = (first + i) / 4;
    uint32_t words[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{words[0]} * 0xD2511F53u, b = uint64_t{words[2]} * 0xCD9E8D57u;
      const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ words[1] ^ key[0], static_cast<uint32_t>(b),
                                static_cast<uint32_t>(a >> 32) ^ words[3] ^ key[1], static_cast<uint32_t>(a)};
      std::memcpy(words, next, sizeof words);
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
    for (int64_t j = std::max<int64_t>(0, -i); j < std::min<int64_t>(4, count - i); ++j) {
      noise[i + j] = static_cast<float>(words[j] >> 8) * 0x1p-24f;
    }
  }
}

// A bit stream of the lowest `Bits` of each byte; whole runs of 8 may be read.
template <int Bits>
void pack_bytes(const uint8_t* codes, int64_t k, uint8_t* to) {
  int64_t at = 0;
  if constexpr (Bits == 4) {
    typedef uint16_t Pairs __attribute__((vector_size(2 * W)));
    typedef uint8_t Packed __attribute__((vector_size(W)));
    for (; at + 2 * W <= k; at += 2 * W) {
      const Pairs pairs = load<Pairs>(codes + at) & 0x0f0f;
      store(to + at / 2, __builtin_convertvector((pairs & 15) | (pairs >> 4), Packed));
    }
  }
  const int64_t bytes = up(k, 8 / std::gcd(Bits, 8)) * Bits / 8;
  for (; at < k; at += 8) {
    uint64_t run;
    std::memcpy(&run, codes + at, 8);
    // The upper half of each 16, 32 and 64 bits slides down to the lower one's codes.
    run &= 0x0101010101010101u * ((1u << Bits) - 1);
    uint64_t lower = 0x00ff00ff00ff00ffu;
    run = (run & lower) | (run & ~lower) >> (8 - Bits);
    lower = 0x0000ffff0000ffffu;
    run = (run & lower) | (run & ~lower) >> (16 - 2 * Bits);
    lower = 0x00000000ffffffffu;
    run = (run & lower) | (run & ~lower) >> (32 - 4 * Bits);
    std::memcpy(to + at * Bits / 8, &run, std::min<int64_t>(Bits, bytes - at * Bits / 8));
  }
}

// Codes of the columns [begin, end) of a row: `value(i)` and `zero(i)` are of W of them, of one block.
template <class Code, class Value, class Zero>
void encode_columns(const Element& e, int64_t begin, int64_t end, const float* noise, const Scratch& scratch,
                    uint8_t* to, const Value& value, const Zero& zero) {
  int64_t i = begin;
  if (noise == nullptr) {
    for (; i + 4 * W <= end; i += 4 * W) {
      // While this row is computed with, the next one comes.
      for (int line = 0; line < 4 * W * scratch.size; line += 64) fetch(scratch.next + i * scratch.size + line);
      U codes[4];
      unroll<4>([&](auto c) { codes[c] = codes_of<Code>(e, value(i + c * W), zero(i + c * W)); });
      store_bytes(to + i, codes);
    }
  }
  auto one = [&](int64_t i) {
    return narrowed(noise == nullptr ? codes_of<Code>(e, value(i), zero(i))
                                     : codes_by<Code>(e, value(i), zero(i), load<F>(noise + i)));
  };
  for (; i + W <= end; i += W) store(to + i, one(i));
  if (i == end) return;
  const Bytes rest = one(i);
  std::memcpy(to + i, &rest, end - i);
}

template <class Code>
void encode_row(const float* x, int64_t k, const Format& format, const void* scale, const void* zero, int64_t at,
                float tensor_scale, const float* noise, const Scratch& scratch, uint8_t* codes) {
  constexpr bool whole_bytes = Code::bits == 8;
  const int64_t columns = format.columns ? format.columns : std::max<int64_t>(k, 1), groups = format.groups(k);
  // Reciprocals of powers of two are exact.
  const bool multiplies = format.scale == Scale::e8m0;
  // Counted from the lowest code.
  const float lowest = format.element.is_signed ? static_cast<float>(1 << (format.element.bits - 1)) : 0;
  U usual = ~U{};
  for (int64_t group = 0; group < groups; group += W) {
    const int64_t count = std::min<int64_t>(W, groups - group), first = at + group;
    const F by = scales_at(scale, format.scale, first, count, at + groups) * tensor_scale, inverse = 1 / by;
    store(scratch.low + group, multiplies ? inverse : by);
    store(scratch.inverse + group, inverse);
    usual &= ~first_lanes(count) | ((U)(by >= 0x1p-80f) & (U)(by <= 0x1p100f));
    if (zero != nullptr) store(scratch.high + group, zeros_at(zero, format, first, count, at + groups) - lowest);
  }
  uint8_t* const to = whole_bytes ? codes : scratch.codes;
  const Element& e = format.element;
  bool corrects = CORRECTS && noise == nullptr;
  for (int i = 0; i < W; ++i) corrects &= usual[i] != 0;
  auto each = [&](int64_t begin, int64_t end, const auto& group_of) {
    auto number = [&](const float* of, int64_t i) { return all(of[group_of(i)]); };
    auto zero_of = [&](int64_t i) { return Code::offset && zero != nullptr ? number(scratch.high, i) : F{}; };
    if (multiplies) {
      auto product = [&](int64_t i) { return load<F>(x + i) * number(scratch.low, i); };
      encode_columns<Code>(e, begin, end, noise, scratch, to, product, zero_of);
    } else if (corrects) {
      auto corrected = [&](int64_t i) {
        return quotient(load<F>(x + i), number(scratch.low, i), number(scratch.inverse, i));
      };
      encode_columns<Code>(e, begin, end, noise, scratch, to, corrected, zero_of);
    } else {
      auto divided = [&](int64_t i) { return load<F>(x + i) / number(scratch.low, i); };
      encode_columns<Code>(e, begin, end, noise, scratch, to, divided, zero_of);
    }
  };
  if (columns % W == 0 && columns < 4 * W && std::has_single_bit(static_cast<uint64_t>(columns))) {
    const int shift = std::countr_zero(static_cast<uint64_t>(columns));
    each(0, k, [&](int64_t i) { return i >> shift; });
  } else {
    for (int64_t group = 0, begin = 0; begin < k; ++group, begin += columns) {
      each(begin, std::min(k, begin + columns), [&](int64_t) { return group; });
    }
  }
  if constexpr (!whole_bytes) {
    std::memset(scratch.codes + k, 0, 8);
    pack_bytes<Code::bits>(scratch.codes, k, codes);
  }
}

void encode(const float* x, int64_t k, const Format& format, const void* scale, const void* zero, int64_t at,
            float tensor_scale, const float* noise, const Scratch& scratch, uint8_t* codes) {
  with_code(format, [&](auto code) {
    encode_row<decltype(code)>(x, k, format, scale, zero, at, tensor_scale, noise, scratch, codes);
  });
}
