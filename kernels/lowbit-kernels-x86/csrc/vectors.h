// Vectors of the instruction set that this translation unit is compiled for, and how stored numbers become them.
// Written in GCC's vector extensions, so that one text serves all; intrinsics stand where those have no word.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace lowbit {
namespace LOWBIT_ISA {

#if defined(__AVX512F__)
inline constexpr int W = 16;
#elif defined(__AVX2__)
inline constexpr int W = 8;
#else
inline constexpr int W = 4;
#endif

// Vectors of a tile.
inline constexpr int H = TILE / W;

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Of what loops are made of, before the compiler decides what stays in registers.
#define INLINE __attribute__((always_inline))

// Without a call, which would take all vector registers.
inline void copy_few(void* to, const void* from, int64_t count) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

// The first `bytes` of a vector, in whole powers of two; nothing is read from `end` on.
template <class V, int Size = sizeof(V)>
INLINE inline V load_first(const void* from, int64_t bytes, const void* end) {
  if constexpr (Size > 1) {
    if (bytes <= Size / 2) return load_first<V, Size / 2>(from, bytes, end);
  }
  if (static_cast<const char*>(end) - static_cast<const char*>(from) < Size) [[unlikely]] {
    V v{};
    copy_few(&v, from, bytes);
    return v;
  }
  if constexpr (Size == sizeof(V)) {
    return load<V>(from);
  } else if constexpr (Size < 16) {
    uint64_t low = 0;
    std::memcpy(&low, from, Size);
    typedef uint64_t Words __attribute__((vector_size(sizeof(V) < 8 ? 8 : sizeof(V))));
    const Words words = {low};
    return load<V>(&words);
  } else if constexpr (sizeof(V) == 32) {
    return (V)_mm256_zextsi128_si256(load<__m128i>(from));
  } else if constexpr (Size == 16) {
    return (V)_mm512_zextsi128_si512(load<__m128i>(from));
  } else {
    return (V)_mm512_zextsi256_si512(load<__m256i>(from));
  }
}

// 0 + x is not x where that is -0, so that the compiler would add.
inline F all(float x) { return x - F{}; }
inline U all(uint32_t x) { return U{} + x; }

inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// b where one is no number.
inline F least(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return _mm_min_ps(a, b);
#endif
}

inline F most(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return _mm_max_ps(a, b);
#endif
}

// Unsigned numbers as wide as a lane; the compiler takes them apart one by one.
inline U widened(Bytes bytes) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
  return __builtin_convertvector(bytes, U);
#endif
}

inline U widened(Halves halves) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, U);
#endif
}

// The lowest byte of each lane, which the compiler takes apart too.
inline Bytes narrowed(U x) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
  const __m256i first = _mm256_set1_epi32(0x0c080400);
  const __m256i fours = _mm256_shuffle_epi8((__m256i)x, first);
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  return (Bytes)_mm_cvtsi128_si64(both);
#else
  return __builtin_convertvector(x, Bytes);
#endif
}

// The same of four vectors, one after another.
inline void store_bytes(void* to, const U (&x)[4]) {
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) store(static_cast<uint8_t*>(to) + i * W, narrowed(x[i]));
#elif defined(__AVX2__)
  const __m256i a = _mm256_packs_epi32((__m256i)(x[0] & 255u), (__m256i)(x[1] & 255u));
  const __m256i b = _mm256_packs_epi32((__m256i)(x[2] & 255u), (__m256i)(x[3] & 255u));
  const __m256i halves = _mm256_packus_epi16(a, b);
  store(to, _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
  const __m128i a = _mm_packs_epi32((__m128i)(x[0] & 255u), (__m128i)(x[1] & 255u));
  const __m128i b = _mm_packs_epi32((__m128i)(x[2] & 255u), (__m128i)(x[3] & 255u));
  store(to, _mm_packus_epi16(a, b));
#endif
}

// W signed bytes.
inline I signed_bytes(const void* from) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepi8_epi32((__m128i)load<Bytes>(from));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)load<Bytes>(from)));
#else
  return (I)(widened(load<Bytes>(from)) << 24) >> 24;
#endif
}

template <int... P, class Body>
INLINE inline void each(std::integer_sequence<int, P...>, const Body& body) {
  (body(std::integral_constant<int, P>{}), ...);
}

// body(0), ..., body(Count - 1), each a constant.
template <int Count, class Body>
INLINE inline void unroll(const Body& body) {
  each(std::make_integer_sequence<int, Count>{}, body);
}

#if defined(__AVX512F__)
// Numbers of codes of at most 4 bits at the bottom of each lane; what stands above does not count.
template <class Code>
inline F looked_up(U low) {
  F numbers;
  for (int i = 0; i < 16; ++i) numbers[i] = Code::number(i & ((1 << Code::bits) - 1));
  return _mm512_permutexvar_ps((__m512i)low, numbers);
}
#endif

// Values of codes whose highest bit stands in bit 31; what stands below the code does not count.
template <int E, int M, int Bias>
struct FloatCode {
  static constexpr int bits = 1 + E + M, mantissa = M, bias = Bias;
  // The code of the largest number: beyond stand infinity and NaN.
  static constexpr int largest = (1 << (E + M)) - (E == 5 ? 5 : E == 4 ? 2 : 1);
  static constexpr bool offset = false;
  // The number of a code of 4 bits.
  static constexpr float number(int code) {
    constexpr float magnitudes[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
  }
  static inline F value(U top) {
#if defined(__AVX512F__)
    if constexpr (bits == 4) return looked_up<FloatCode>(top >> 28);
#elif defined(__AVX2__)
    if constexpr (bits == 4) {
      // Of an index the three lowest bits count.
      const __m256 magnitudes = _mm256_setr_ps(0, .5, 1, 1.5, 2, 3, 4, 6);
      return (F)((U)_mm256_permutevar8x32_ps(magnitudes, (__m256i)(top >> 28)) | (top & 0x80000000u));
    }
#endif
    const U sign = top & 0x80000000u;
    const U field = (top >> (8 - E)) & (((1u << (E + M)) - 1) << (23 - M));
    // With a hidden one where there is none, a subnormal m / 2^M reads 1 + m / 2^M, at half the step: twice that less
    // the first normal number is right, and larger than what a normal number reads.
    const F read = (F)(field + (uint32_t(127 - Bias) << 23));
    const F magnitude = least(read, read + read - first_normal());
    U bits = (U)magnitude | sign;
    if constexpr (E == 5 && M == 2) {
      // Beyond the largest exponent stand infinity and NaN.
      const U special = (U)(field >= (31u << 23));
      bits |= special & 0x7f800000u;
    }
    if constexpr (E == 4 && M == 3) {
      const U nan = (U)(field == (0x7fu << 20));
      bits |= nan & 0x7fc00000u;
    }
    return (F)bits;
  }
  static inline F first_normal() { return (F)(all(uint32_t(128 - Bias) << 23)); }
};

// Two's complement.
template <int Bits>
struct IntCode {
  static constexpr int bits = Bits;
  static constexpr bool offset = false;
  static constexpr float number(int code) { return static_cast<float>(code >> (Bits - 1) ? code - (1 << Bits) : code); }
  static inline F value(U top) { return __builtin_convertvector((I)top >> (32 - Bits), F); }
};

// Counted from the lowest code, less a zero point.
template <int Bits>
struct OffsetCode {
  static constexpr int bits = Bits;
  static constexpr bool offset = true;
  static constexpr float number(int code) { return static_cast<float>(code); }
  static inline F value(U top) { return __builtin_convertvector((I)(top >> (32 - Bits)), F); }
};

// Codes of a run fill whole words, or half of a step where they straddle words; a step is a number of runs, some of which
// read the same words from another code on.
template <int Bits>
struct Runs {
  static constexpr bool aligned = 32 % Bits == 0;
  static constexpr int codes = !aligned || Bits == 1 ? 16 : 32 / Bits;
  // Kinds of runs in a step, and how many of them share a kind's code.
  static constexpr int kinds = !aligned || Bits == 1 ? 2 : 1;
  static constexpr int each = STEP / codes / kinds;
};

// Code P of the 32 in Bits words, at the bottom of each lane with others above; `word(i)` gives word i of every lane.
template <int Bits, int P, class Word>
inline U low_field(const Word& word) {
  constexpr int at = Bits * P % 32, i = Bits * P / 32;
  if constexpr (at + Bits <= 32) {
    return word(i) >> at;
  } else {
    return (word(i) >> at) | (word(i + 1) << (32 - at));
  }
}

// The same at the top, with others below.
template <int Bits, int P, class Word>
inline U field(const Word& word) {
  constexpr int end = Bits * P % 32 + Bits;
  if constexpr (end <= 32) {
    return word(Bits * P / 32) << (32 - end);
  } else {
    return low_field<Bits, P>(word) << (32 - Bits);
  }
}

// The value of code P.
template <class Code, int P, class Word>
inline F value_of(const Word& word) {
#if defined(__AVX512F__)
  if constexpr (Code::bits <= 4) return looked_up<Code>(low_field<Code::bits, P>(word));
#endif
  return Code::value(field<Code::bits, P>(word));
}

inline F from_bfloat16(Halves bits) { return (F)(widened(bits) << 16); }

inline F from_float16(Halves bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)bits);
#else
  const U wide = __builtin_convertvector(bits, U);
  const U magnitude = wide & 0x7fffu;
  // As for FloatCode; a half's subnormals are normal here.
  const F read = (F)((magnitude << 13) + (112u << 23));
  const F first = (F)(all(113u << 23));
  U found = (U)least(read, read + read - first);
  const U special = (U)(magnitude >= 0x7c00u);
  found |= special & 0x7f800000u;
  return (F)(found | (wide & 0x8000u) << 16);
#endif
}

// Numbers of 16 bits at the bottom of each lane, and nothing above; of others the compiler would take that away.
inline Halves halved(U x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

// Rounded to nearest, ties to even; a NaN stays one.
inline Halves to_bfloat16(F x) {
  const U bits = (U)x;
  const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
#if defined(__AVX512F__)
  const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  return halved((U)_mm512_mask_srli_epi32((__m512i)all(0x7fc0u), number, (__m512i)rounded, 16));
#else
  const U nan = (U)(x != x);
  return halved((nan & 0x7fc0u) | (~nan & (rounded >> 16)));
#endif
}

inline Halves to_float16(F x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const U bits = (U)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal results: the exponent moves by 112, and 13 bits are rounded away; too large ones end in infinity.
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 an addition rounds to steps of 2^-24.
  const U tiny = (U)((F)magnitude + all(0.5f)) - 0x3f000000u;
  const U small = (U)(magnitude < (113u << 23)), large = (U)(normal > 0x7c00u) & ~small;
  const U nan = (U)(magnitude > 0x7f800000u);
  U found = (small & tiny) | (~small & normal);
  found = (large & 0x7c00u) | (~large & found);
  found = (nan & 0x7e00u) | (~nan & found);
  return __builtin_convertvector(found | sign, Halves);
#endif
}

// W values from `at` on.
inline F load_as(const void* from, Type type, int64_t at) {
  switch (type) {
    case Type::float32: return load<F>(static_cast<const float*>(from) + at);
    case Type::bfloat16: return from_bfloat16(load<Halves>(static_cast<const uint16_t*>(from) + at));
    default: return from_float16(load<Halves>(static_cast<const uint16_t*>(from) + at));
  }
}

inline void store_as(void* to, Type type, int64_t at, F x) {
  switch (type) {
    case Type::float32: return store(static_cast<float*>(to) + at, x);
    case Type::bfloat16: return store(static_cast<uint16_t*>(to) + at, to_bfloat16(x));
    default: return store(static_cast<uint16_t*>(to) + at, to_float16(x));
  }
}

// The first lane.
inline void store_one(void* to, Type type, int64_t at, F x) {
  char lanes[4 * W];
  store_as(lanes, type, 0, x);
  std::memcpy(static_cast<char*>(to) + at * size_of(type), lanes, size_of(type));
}

// 2^-127 is a subnormal number of float32.
inline F from_e8m0(U code) {
  const U nan = (U)(code == 255u), least = (U)(code == 0u);
  return (F)((code << 23) | (nan & 0x00400000u) | (least & 0x00400000u));
}

// Scales as float32; `load(V{})` gives W of them as they are stored.
template <class Load>
INLINE inline F scales_by(Scale scale, const Load& load) {
  switch (scale) {
    case Scale::float32: return load(F{});
    case Scale::bfloat16: return from_bfloat16(load(Halves{}));
    case Scale::float16: return from_float16(load(Halves{}));
    case Scale::e8m0: return from_e8m0(widened(load(Bytes{})));
    default: return FloatCode<4, 3, 7>::value(widened(load(Bytes{})) << 24);
  }
}

// W scales from `at` on.
inline F load_scale(const void* from, Scale scale, int64_t at) {
  return scales_by(scale, [&](auto v) INLINE {
    return load<decltype(v)>(static_cast<const char*>(from) + at * static_cast<int64_t>(sizeof v / W));
  });
}

// Zero points, counted from the lowest code.
inline F zeros_of(Bytes stored, const Format& format) {
  const I code = (I)widened(stored);
  const F zero = __builtin_convertvector(format.zero_signed ? code << 24 >> 24 : code, F);
  return format.element.is_signed ? zero + static_cast<float>(1 << (format.element.bits - 1)) : zero;
}

// W of them from `at` on; without any they are 0, as in kernels.cpp's zero_at.
inline F load_zero(const void* from, const Format& format, int64_t at) {
  if (from == nullptr) return F{};
  return zeros_of(load<Bytes>(static_cast<const char*>(from) + at), format);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
