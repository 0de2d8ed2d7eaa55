// Products of integers: inputs rounded to codes, four of which meet four codes of a row in one instruction.
// Included by kernels.cpp, once for each instruction set.

// Tokens whose sums are in registers, and tiles that they meet at once: an input is read once for two vectors of rows.
constexpr int TOKENS = W == 16 ? 8 : W == 8 ? 4 : 2;
constexpr int TILES = H == 1 ? 2 : 1;
#if defined(__AVX512VNNI__)
constexpr int MOST_DIGITS = 2 * TOKENS, MOST_BY_TABLE = TOKENS;
#else
constexpr int MOST_DIGITS = W == 4 ? 0 : TOKENS, MOST_BY_TABLE = W == 8 ? TOKENS : 0;
#endif
// Numbers of 32 bits that are fetched ahead.
constexpr int AHEAD_OF_WORDS = 512;

// Adds to `totals`, [M][V][W], products of M tokens, which lie together from the one numbered `token` on, with N tiles:
// groups [first, last). Their codes are in the weight, or where there is a `panel` there, as bytes.
template <class Code, int M, int N, bool Panel>
void integer_groups(const Packed& w, const Codes& x, int64_t token, int64_t index, int64_t apart, int64_t first,
                    int64_t last, const uint32_t* panel, const Factors& factors, float* totals) {
  using Of = Planes<Code>;
  // Of one token each plane has sums of its own, which need not wait for one another.
  constexpr int V = N * H, SUMS = M == 1 ? std::min(Of::count, 4) : 1;
  const Groups groups(w);
  const uint32_t* word = Panel ? panel : Tile(w, index).codes(0) + first * groups.words * TILE;
  const int64_t next = Panel ? 0 : Tile(w, index + apart).codes(0) - Tile(w, index).codes(0);
  const uint8_t* codes = x.codes + token * x.stride + first * groups.columns * Of::size * M;
  for (int64_t group = first; group < last; ++group) {
    // Registers are for these: nothing is called until they are added.
    I sums[M][V][SUMS];
    unroll<M>([&](auto m) INLINE {
      const I begin = I{} - Of::zero * x.sums[(token + m) * groups.count + group];
      unroll<V>([&](auto v) INLINE {
        sums[m][v][0] = begin;
        unroll<SUMS - 1>([&](auto s) INLINE { sums[m][v][s + 1] = I{}; });
      });
    });
    for (int64_t i = groups.words_of(group); i > 0; --i) {
      U now[V];
      if constexpr (!Panel) {
        unroll<N>([&](auto n) INLINE { fetch(word + n * next + AHEAD_OF_WORDS); });
        unroll<V>([&](auto v) INLINE { now[v] = load<U>(word + v / H * next + v % H * W) ^ Of::flip; });
        word += TILE;
      }
      unroll<Of::parts>([&](auto p) INLINE {
        U part[V];
        unroll<V>([&](auto v) INLINE {
          part[v] = Panel ? load<U>(word + (p * V + v) * W) : Of::template part<p>(now[v]);
        });
        unroll<M>([&](auto m) INLINE {
          const U four = all(four_at(codes + 4 * (p * M + m)));
          unroll<V>([&](auto v) INLINE {
            I& sum = sums[m][v][p / Of::size % SUMS];
            I more = with_part<Code>(sum, part[v], four);
            // Here and not later, lest products wait in memory.
            asm("" : "+v"(more));
            sum = more;
          });
        });
      });
      if constexpr (Panel) word += Of::parts * V * W;
      codes += Of::parts * 4 * M;
    }
    const int64_t at = group * V * W;
    unroll<M>([&](auto m) INLINE {
      unroll<V>([&](auto v) INLINE {
        I sum = sums[m][v][0];
        unroll<SUMS - 1>([&](auto s) INLINE { sum += sums[m][v][s + 1]; });
        // The sum of (x - x's zero) (w - w's zero); unsigned, so that what overflows on the way comes back.
        if constexpr (Code::offset) {
          const uint32_t inputs = x.sums[(token + m) * groups.count + group];
          sum = (I)((U)sum - load<U>(factors.zero.data() + at + v * W) * inputs);
        }
        if (x.asymmetric) {
          const uint32_t less = x.zero[token + m];
          sum = (I)((U)sum - load<U>(factors.sums.data() + at + v * W) * less);
        }
        float* const total = totals + (m * V + v) * W;
        const F scale = load<F>(factors.scale.data() + at + v * W);
        store(total, fma(__builtin_convertvector(sum, F), scale, load<F>(total)));
      });
    });
  }
}

// Products of all tokens with N tiles; M tokens lie together.
template <class Code, int M, int N>
void integer_tiles(const Packed& w, const Codes& x, int64_t tokens, int64_t index, int64_t apart, Factors& factors,
                   std::vector<uint32_t>& panel, std::vector<float>& totals) {
  constexpr int V = N * H;
  const Groups groups(w);
  find_factors<Code, V>(w, x, index, apart, factors);
  std::fill(totals.begin(), totals.end(), 0.0f);
  if (tokens <= 2 * M) {
    for (int64_t token = 0; token < tokens; token += M) {
      integer_groups<Code, M, N, false>(w, x, token, index, apart, 0, groups.count, nullptr, factors,
                                        totals.data() + token * V * W);
    }
  } else {
    const int64_t some = std::max<int64_t>(1, BYTES / groups.columns);
    panel.resize(std::min(some, groups.count) * groups.words * Planes<Code>::parts * V * W);
    for (int64_t first = 0; first < groups.count; first += some) {
      const int64_t last = std::min(first + some, groups.count);
      fill_bytes<Code, N>(w, index, apart, first * groups.words, std::min(last * groups.words, groups.all), panel.data());
      for (int64_t token = 0; token < tokens; token += M) {
        integer_groups<Code, M, N, true>(w, x, token, index, apart, first, last, panel.data(), factors,
                                         totals.data() + token * V * W);
      }
    }
  }
}

void integers(const Packed& w, const Codes& x, int64_t tokens, const void* bias, void* out, Type type, int64_t first,
              int64_t last) {
  with_code(w.format, [&](auto code) {
    using Code = decltype(code);
    constexpr bool whole = std::is_same_v<Code, IntCode<Code::bits>> || std::is_same_v<Code, OffsetCode<Code::bits>>;
    if constexpr (of_halves<Code> ? MOST_BY_TABLE > 0 : whole && 8 % Code::bits == 0) {
      const int64_t numbers = w.format.groups(w.k) * TILE * TILES;
      Factors factors{std::vector<float>(numbers), std::vector<int32_t>(Code::offset ? numbers : 0),
                      std::vector<int32_t>(x.asymmetric ? numbers : 0)};
      std::vector<uint32_t> panel;
      std::vector<float> totals(up(tokens, x.together) * TILE * TILES);
      const bool one = x.together == 1;
      const auto run = one                    ? integer_tiles<Code, 1, 1>
                       : x.together == TOKENS ? integer_tiles<Code, TOKENS, TILES>
                                              : integer_tiles<Code, TOKENS / 2, TILES>;
      const int tiles = one ? 1 : TILES;
      for (int64_t tile = first; tile < last; tile += tiles) {
        // The last may be without another, and is then computed twice.
        const int64_t apart = tile + 1 < last ? tiles - 1 : 0;
        run(w, x, tokens, tile, apart, factors, panel, totals);
        for (int64_t m = 0; m < tokens; m += x.digits) {
          for (int v = 0; v < tiles * H; ++v) {
            const float* const total = totals.data() + (m * tiles * H + v) * W;
            constexpr float unit = Planes<Code>::unit;
            F sum = load<F>(total) * (x.scale[m] * unit);
            // The last digit counts most.
            for (int64_t d = 1; d < x.digits; ++d) {
              sum = fma(load<F>(total + d * tiles * TILE), all(x.scale[m + d] * unit), sum);
            }
            finish(w, tile + v / H * apart, v % H, sum, bias, out, type, m / x.digits);
          }
        }
      }
    }
  });
}

// Bytes of columns, k of them and zeros up to a STEP, in the order in which planes of words of the weight meet them: of a
// word's 4 * Planes columns, every Planes-th.
template <int Planes>
void arrange(const uint8_t* bytes, int64_t k, uint8_t* to) {
  typedef uint8_t Sixteen __attribute__((vector_size(16)));
  if constexpr (Planes == 8) {
    for (int64_t at = 0; at < k; at += 32) {
      for (int i = 0; i < 32; ++i) to[at + i] = bytes[at + 8 * (i % 4) + i / 4];
    }
    return;
  }
  for (int64_t at = 0; at < k; at += 16) {
    const auto some = load<Sixteen>(bytes + at);
    if constexpr (Planes == 4) {
      store(to + at, __builtin_shufflevector(some, some, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    } else if constexpr (Planes == 2) {
      store(to + at, __builtin_shufflevector(some, some, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    } else {
      store(to + at, some);
    }
  }
}

// The same of one plane; as numbers of 16 bits even bytes of four, then odd ones.
void arrange_bytes(const uint8_t* bytes, int64_t k, uint8_t* to) {
  if (code_size(8) == 1) return arrange<1>(bytes, k, to);
  for (int64_t at = 0; at < k; at += 4) {
    const auto wide = [&](int i) { return static_cast<int16_t>(static_cast<int8_t>(bytes[at + i])); };
    const int16_t four[] = {wide(0), wide(2), wide(1), wide(3)};
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

// One token's bytes, with zeros up to STEP, to where its codes stand.
void put_codes(const uint8_t* bytes, int64_t k, const Format& weight, int64_t token, Codes& to) {
  // Where other tokens stand between its words of four, its own are put apart.
  const int64_t size = up(k, STEP) * code_size(weight.element.bits), at = token % to.together;
  uint8_t* const codes = to.codes + (token - at) * to.stride + 4 * at;
  if (to.tile > 0) {
    const std::unique_ptr<uint8_t[]> own(new uint8_t[size]());
    arrange(weight, bytes, k, own.get());
    uint8_t* const tiles = to.codes + token / TILE * TILE * size + token % TILE * to.tile;
    for (int64_t i = 0; i < size; i += to.tile) std::memcpy(tiles + i * TILE, own.get() + i, to.tile);
  } else if (to.together == 1) {
    arrange(weight, bytes, k, codes);
  } else {
    const std::unique_ptr<uint8_t[]> own(new uint8_t[size]());
    arrange(weight, bytes, k, own.get());
    for (int64_t i = 0; i < size; i += 4) std::memcpy(codes + i * to.together, own.get() + i, 4);
  }
}

// The codes of one token and their sums by groups of the weight. `x` has zeros up to STEP.
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
      I byte = __builtin_convertvector(code, I) & (I)(given == given);
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
  put_codes(bytes.get(), k, weight, token, to);
  to.scale[token] = scale;
  to.zero[token] = zero;
}

bool split_token(const float* x, int64_t k, const Format& weight, int64_t token, Codes& to) {
  const auto [down, top, finite] = range_of(x, k);
  const float largest = std::max(top, -down);
  if (!finite || (largest != 0 && largest < 0x1p-90f)) return false;
  // What the last digit counts, at most 2^30 of which make the largest number.
  const int exponent = largest == 0 ? 0 : std::ilogb(largest) - 29;
  const F inverse = all(std::ldexp(1.0f, -exponent));
  const int64_t size = up(k, STEP), groups = weight.groups(k);
  const int64_t columns = weight.columns ? weight.columns : std::max<int64_t>(k, 1);
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[DIGITS * size]());
  for (int64_t group = 0, begin = 0; begin < k; ++group, begin += columns) {
    I sums[DIGITS] = {};
    // Beyond k there are zeros, whose digits are.
    for (int64_t i = begin; i < std::min(k, begin + columns); i += W) {
      const I whole = __builtin_convertvector(nearest(load<F>(x + i) * inverse), I);
      // Each digit but the last is counted from -128.
      const U digits = (U)whole + 0x808080u;
      for (int d = 0; d < DIGITS; ++d) {
        const I digit = (I)((digits ^ 0x808080u) << (24 - 8 * d)) >> 24;
        sums[d] += digit;
        store(bytes.get() + d * size + i, narrowed((U)digit));
      }
    }
    for (int d = 0; d < DIGITS; ++d) {
      int32_t total = 0;
      for (int j = 0; j < W; ++j) total += sums[d][j];
      to.sums[(token + d) * groups + group] = total;
    }
  }
  for (int d = 0; d < DIGITS; ++d) {
    put_codes(bytes.get() + d * size, k, weight, token + d, to);
    to.scale[token + d] = std::ldexp(1.0f, exponent + 8 * d);
    to.zero[token + d] = 0;
  }
  return true;
}

// 1 for each column that there is.
void mark_columns(int64_t k, const Format& weight, uint8_t* ones) {
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[up(k, STEP)]());
  std::fill(bytes.get(), bytes.get() + k, uint8_t{1});
  arrange(weight, bytes.get(), k, ones);
}
