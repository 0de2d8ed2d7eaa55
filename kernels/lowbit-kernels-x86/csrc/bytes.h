// Integers of a weight as bytes: four of a row meet four codes of an input in one instruction.
// Included by each file that multiplies so, once for each instruction set.

// Columns of weights that become bytes before many tokens meet them, if groups are no longer: a part of the first cache.
constexpr int64_t BYTES = 512;

// Bytes that a code of an input takes: two where it meets bytes as 16-bit numbers.
#if defined(__AVX512VNNI__)
constexpr int code_size(int) { return 1; }
#else
constexpr int code_size(int bits) { return bits == 8 ? 2 : 1; }
#endif

// Numbers of a half each, of which a table makes bytes.
template <class Code>
constexpr bool of_halves = std::is_same_v<Code, FloatCode<2, 1, 1>>;

// How codes of a weight become bytes: `planes` of them in a word, byte t of plane j having code planes * t + j, counted
// from the lowest, less `zero`, in units of `unit`. Where those of 8 bits become 16-bit numbers, they are signed as they
// are.
template <class Code>
struct Planes {
  static constexpr int bits = Code::bits, count = 8 / bits, size = code_size(bits);
  static constexpr bool as_they_are = Code::offset || size == 2, table = of_halves<Code>;
  static constexpr uint32_t each_byte = 0x01010101u;
  static constexpr uint32_t top = bits == 8 ? 0x80u : bits == 4 ? 0x88u : bits == 2 ? 0xaau : 0xffu;
  static constexpr uint32_t flip = as_they_are || table ? 0 : top * each_byte;
  static constexpr int32_t zero = table ? 12 : as_they_are ? 0 : 1 << (bits - 1);
  static constexpr float unit = table ? 0.5f : 1;
  // Vectors that a word becomes.
  static constexpr int parts = count * size;

  template <int J>
  INLINE static U plane(U word) {
    if constexpr (bits == 8) return word;
    const U plane = (word >> (bits * J)) & (((1u << bits) - 1) * each_byte);
    if constexpr (table) return looked_up(plane);
    return plane;
  }

  // Bytes of codes of one each.
  INLINE static U looked_up(U codes) {
    alignas(16) static constexpr auto bytes = [] {
      std::array<uint8_t, 16> bytes{};
      for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(2 * Code::number(i) + 12);
      return bytes;
    }();
#if defined(__AVX512BW__)
    const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes.data()));
    return (U)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), (__m512i)codes);
#elif defined(__AVX2__)
    const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes.data()));
    return (U)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), (__m256i)codes);
#else
    static_assert(!table);
    return codes;
#endif
  }

  // Vector P of those of a word, flipped before.
  template <int P>
  INLINE static U part(U word) {
    typedef int16_t Signeds __attribute__((vector_size(4 * W)));
    const U bytes = plane<P / size>(word);
    if constexpr (size == 1) return bytes;
    // Even bytes of a word as 16-bit numbers, or odd ones.
    if constexpr (Code::offset) return P % 2 ? bytes >> 8 & 0x00ff00ffu : bytes & 0x00ff00ffu;
    return P % 2 ? (U)((Signeds)bytes >> 8) : (U)((Signeds)bytes << 8 >> 8);
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

// sum + the products of four bytes of `w`, which are unsigned, and of `x`, exactly; without VNNI, w is 24 at most.
inline I dot(I sum, U w, U x) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
  // Two products of 24 and 128 or less are no more than 16 bits hold.
#if defined(__AVX512BW__)
  return sum + pairs((U)_mm512_maddubs_epi16((__m512i)w, (__m512i)x), all(0x00010001u));
#elif defined(__AVX2__)
  return sum + pairs((U)_mm256_maddubs_epi16((__m256i)w, (__m256i)x), all(0x00010001u));
#else
  typedef int16_t Signeds __attribute__((vector_size(4 * W)));
  constexpr uint32_t low = 0x00ff00ffu;
  const U even = (U)((Signeds)x << 8 >> 8), odd = (U)((Signeds)x >> 8);
  return sum + pairs(w & low, even) + pairs((w >> 8) & low, odd);
#endif
#endif
}

template <class Code>
INLINE inline I with_part(I sum, U part, U four) {
  return Planes<Code>::size == 1 ? dot(sum, part, four) : sum + pairs(part, four);
}

inline uint32_t four_at(const uint8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, 4);
  return four;
}

// Scales of V / H tiles, `apart` from one another, as float32; what their codes are counted from besides a constant, and
// the sums of codes less that and the constant: [group][V][W]. The last two may be missing.
struct Factors {
  std::vector<float> scale;
  std::vector<int32_t> zero, sums;
};

// Groups of a weight: columns, the words of a tile that one has, and of those that there are.
struct Groups {
  int64_t columns, words, all, count;

  Groups(const Packed& w)
      : columns(w.format.columns ? w.format.columns : up(w.k, STEP)),
        words(columns * w.format.element.bits / 32),
        all(up(w.k, STEP) / 32 * w.format.element.bits),
        count(w.format.groups(w.k)) {}

  int64_t words_of(int64_t group) const { return std::min(words, all - group * words); }
};

template <class Code, int V>
void find_factors(const Packed& w, const Codes& x, int64_t index, int64_t apart, Factors& to) {
  using Of = Planes<Code>;
  const Groups groups(w);
  for (int v = 0; v < V; ++v) {
    const Tile tile(w, index + v / H * apart);
    tile.scales(groups.count, v % H, to.scale.data() + v * W, V * W);
    if constexpr (Code::offset) {
      for (int64_t group = 0; group < groups.count; ++group) {
        store(to.zero.data() + (group * V + v) * W, __builtin_convertvector(tile.zero(group, v % H), I));
      }
    }
    if (!x.asymmetric) continue;
    const uint32_t* word = tile.codes(0) + v % H * W;
    const uint8_t* ones = x.ones;
    for (int64_t group = 0; group < groups.count; ++group) {
      I sum{};
      for (int64_t i = 0; i < groups.words_of(group); ++i, word += TILE) {
        const U now = load<U>(word) ^ Of::flip;
        unroll<Of::parts>([&](auto p) INLINE {
          sum = with_part<Code>(sum, Of::template part<p>(now), all(four_at(ones)));
          ones += 4;
        });
      }
      const int64_t here = std::min(groups.columns, w.k - group * groups.columns);
      I zero = I{} + Of::zero;
      if constexpr (Code::offset) zero = load<I>(to.zero.data() + (group * V + v) * W);
      store(to.sums.data() + (group * V + v) * W, (U)sum - (U)zero * static_cast<uint32_t>(here));
    }
  }
}

// Words [first, last) of N tiles, each as the vectors that it becomes: [word][part][V][W].
template <class Code, int N>
void fill_bytes(const Packed& w, int64_t index, int64_t apart, int64_t first, int64_t last, uint32_t* panel) {
  using Of = Planes<Code>;
  constexpr int V = N * H;
  const uint32_t* const words = Tile(w, index).codes(0);
  const int64_t next = Tile(w, index + apart).codes(0) - words;
  for (int64_t i = first; i < last; ++i, panel += Of::parts * V * W) {
    for (int v = 0; v < V; ++v) {
      const U now = load<U>(words + i * TILE + v / H * next + v % H * W) ^ Of::flip;
      unroll<Of::parts>([&](auto p) INLINE { store(panel + (p * V + v) * W, Of::template part<p>(now)); });
    }
  }
}
