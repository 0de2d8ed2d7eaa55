// Products of tiles, 16 rows of 64 bytes, where the processor has registers for those.
// Included by dots.cpp, once for each instruction set.

#if defined(__AMX_INT8__)

// Up to so many tokens pairs are faster without tiles; from so many on bytes are with them.
constexpr int64_t FEW = 1, TILED_BYTES = 9;

// As long as it lives, tiles of 16 rows: of products and inputs, with `bytes` of inputs in one, and of as many of weights.
struct Tiles {
  explicit Tiles(int bytes) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
    // Four of products, two of inputs, two of weights.
    for (int i = 4; i < 6; ++i) {
      shape.bytes[i] = static_cast<uint16_t>(bytes);
      shape.rows[i + 2] = static_cast<uint8_t>(bytes / 4);
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int T>
INLINE inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int T>
INLINE inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
INLINE inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}

// Tile C += tile A of inputs times tile B of weights.
template <int C, int A, int B, bool Integers>
INLINE inline void tile_dots() {
  if constexpr (Integers) {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
}

// Products of Count tiles of inputs, `next` bytes from one to the next, with N panels of weights, `apart` bytes from one
// to the next, `steps` tiles of each, into `found`, [N][16 Count][16], or with `more` added to that. Of a row of inputs
// `bytes` are in a tile.
template <int Count, int N, bool Integers>
void tile_products(const char* x, int64_t next, const char* panel, int64_t apart, int64_t steps, int64_t bytes,
                   char* found, bool more) {
  unroll<Count * N>([&](auto t) INLINE {
    if (more) {
      tile_load<t>(found + t * 1024, 64);
    } else {
      tile_zero<t>();
    }
  });
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = step * bytes * TILE;
    unroll<N>([&](auto n) INLINE { tile_load<6 + n>(panel + n * apart + at, 64); });
    unroll<Count>([&](auto t) INLINE {
      tile_load<4 + t>(x + t * next + at, bytes);
      unroll<N>([&](auto n) INLINE { tile_dots<n * Count + t, 4 + t, 6 + n, Integers>(); });
    });
  }
  unroll<Count * N>([&](auto t) INLINE { tile_store<t>(found + t * 1024, 64); });
}

// What is multiplied, and where it goes: `rows` panels, and products of tokens in blocks of two tiles, [4][16][16] each,
// those of all blocks in one place unless they are `kept`.
struct TilePass {
  const void* x;
  const void* panel;
  int64_t next, apart;
  int rows;
  int64_t steps, bytes, tokens;
  char* found;
  bool kept, more;
};

// Those of all tokens, block after block: then(panel, first token, their number, products).
template <bool Integers, class Then>
void tile_blocks(const TilePass& pass, const Then& then) {
  for (int64_t token = 0; token < pass.tokens; token += 2 * TILE) {
    const int64_t some = std::min<int64_t>(2 * TILE, pass.tokens - token), count = some > TILE ? 2 : 1;
    const auto run = pass.rows == 1 ? (count == 1 ? tile_products<1, 1, Integers> : tile_products<2, 1, Integers>)
                                    : (count == 1 ? tile_products<1, 2, Integers> : tile_products<2, 2, Integers>);
    char* const found = pass.found + (pass.kept ? token / (2 * TILE) * 4096 : 0);
    run(static_cast<const char*>(pass.x) + token / TILE * pass.next, pass.next, static_cast<const char*>(pass.panel),
        pass.apart, pass.steps, pass.bytes, found, pass.more);
    for (int r = 0; r < pass.rows; ++r) then(r, token, some, found + r * count * 1024);
  }
}

// As `multiply`, of any number of tokens in tiles, `next` numbers from 16 of them to the next, and `rows` panels.
template <class Code>
void multiply_tiles(const uint32_t* x, int64_t next, const uint32_t* panel, int64_t apart, int rows, int64_t count,
                    const Sums* to, int64_t tokens) {
  Line found[64];
  const TilePass pass{x, panel, next * 4, apart * 4, rows, count / PAIRS, 64, tokens, found[0].bytes, false, false};
  tile_blocks<false>(pass, [&](int r, int64_t token, int64_t some, const char* products) {
    const Sums& sums = to[r];
    for (int64_t i = 0; i < some; ++i) {
      float* const total = sums.totals + (token + i) * TILE;
      const float inputs = sums.inputs == nullptr ? 0 : sums.inputs[(token + i) * sums.stride];
      store(total, complete<Code>(load<F>(products + i * 64), sums.zero, inputs, sums.scale, load<F>(total)));
    }
  });
}

// Whole tiles of columns, or half ones.
int64_t tile_bytes(const Format& weight, int64_t k) {
  return weight.columns % 64 || up(k, STEP) % 64 ? 32 : 64;
}

// As `integers`, of tokens in tiles.
void integers_by_tiles(const Packed& w, const Codes& x, int64_t tokens, const void* bias, void* out, Type type,
                       int64_t first, int64_t last) {
  with_code(w.format, [&](auto code) {
    using Code = decltype(code);
    if constexpr (!is_float<Code> && 8 % Code::bits == 0) {
      using Of = Planes<Code>;
      const Groups groups(w);
      const int64_t bytes = x.tile;
      const Tiles tiles(static_cast<int>(bytes));
      const int64_t numbers = groups.count * TILE, each = Of::parts * TILE;
      const Factors one{std::vector<float>(numbers), std::vector<int32_t>(Code::offset ? numbers : 0),
                        std::vector<int32_t>(x.asymmetric ? numbers : 0)};
      Factors factors[2] = {one, one};
      // Whole groups of words become bytes together, or parts of one, whose products are kept until its end.
      const int64_t words = BYTES * Code::bits / 32, whole = words / groups.words * groups.words;
      const int64_t part = std::min(whole ? whole : words, groups.all), apart = part * each;
      const bool kept = part < std::min(groups.words, groups.all);
      const std::unique_ptr<Line[]> panel(new Line[2 * apart / TILE]), totals(new Line[2 * tokens]);
      const std::unique_ptr<Line[]> found(new Line[kept ? up(tokens, 2 * TILE) * 2 : 64]);
      auto* const words_of = reinterpret_cast<uint32_t*>(panel.get());
      auto* const sums_of = reinterpret_cast<float*>(totals.get());
      for (int64_t tile = first; tile < last; tile += 2) {
        const int rows = tile + 1 < last ? 2 : 1;
        for (int r = 0; r < rows; ++r) find_factors<Code, 1>(w, x, tile + r, 0, factors[r]);
        std::fill(sums_of, sums_of + 2 * tokens * TILE, 0.0f);
        for (int64_t begin = 0, end; begin < groups.all; begin = end) {
          end = std::min(begin + part, groups.all);
          if (kept) end = std::min(end, (begin / groups.words + 1) * groups.words);
          for (int r = 0; r < rows; ++r) fill_bytes<Code, 1>(w, tile + r, 0, begin, end, words_of + r * apart);
          for (int64_t at = begin, stop; at < end; at = stop) {
            const int64_t group = at / groups.words;
            stop = std::min(end, (group + 1) * groups.words);
            const TilePass pass{x.codes + at * Of::parts * 4 * TILE, words_of + (at - begin) * each, up(w.k, STEP) * TILE,
                                apart * 4, rows, (stop - at) * Of::parts * 4 / bytes, bytes, tokens, found[0].bytes, kept,
                                at > group * groups.words};
            const bool done = stop == std::min((group + 1) * groups.words, groups.all);
            tile_blocks<true>(pass, [&](int r, int64_t token, int64_t count, const char* products) {
              if (!done) return;
              const F scale = load<F>(factors[r].scale.data() + group * TILE);
              U zero{}, sums{};
              if constexpr (Code::offset) zero = load<U>(factors[r].zero.data() + group * TILE);
              if (x.asymmetric) sums = load<U>(factors[r].sums.data() + group * TILE);
              for (int64_t i = 0; i < count; ++i) {
                const uint32_t inputs = x.sums[(token + i) * groups.count + group], less = x.zero[token + i];
                U sum = load<U>(products + i * 64) - static_cast<uint32_t>(Of::zero) * inputs;
                if constexpr (Code::offset) sum -= zero * inputs;
                if (x.asymmetric) sum -= sums * less;
                float* const total = sums_of + (r * tokens + token + i) * TILE;
                store(total, fma(__builtin_convertvector((I)sum, F), scale, load<F>(total)));
              }
            });
          }
        }
        for (int64_t m = 0; m < tokens; ++m) {
          for (int r = 0; r < rows; ++r) {
            const F total = load<F>(sums_of + (r * tokens + m) * TILE);
            finish(w, tile + r, 0, total * x.scale[m], bias, out, type, m);
          }
        }
      }
    }
  });
}

#else

// There are none.
constexpr int64_t FEW = 4;

struct Tiles {
  explicit Tiles(int) {}
};

template <class Code>
void multiply_tiles(const uint32_t*, int64_t, const uint32_t*, int64_t, int, int64_t, const Sums*, int64_t) {}

#endif
