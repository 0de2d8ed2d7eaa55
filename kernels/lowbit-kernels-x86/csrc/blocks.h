// Rows of a table as plain values, and their sums by bags, a block of columns at a time.
// Included by kernels.cpp for instruction sets with vectors of 512 bits: with shorter ones rows.h is faster.

// Vectors of a block: its sums stay in registers while rows pass.
constexpr int VECTORS = 8;

// VECTORS codes of a row in each lane, with other bits above: of at least `count` columns, the rest 0.
template <int Bits>
INLINE inline U codes_in_lanes(const uint8_t* row, int64_t count) {
  const int64_t bytes = up(count * Bits, 8) / 8;
  if constexpr (Bits == 4) return load_first<U>(row, bytes, row + sizeof(U));
  if constexpr (Bits == 2) return widened(load_first<Halves>(row, bytes, row + sizeof(Halves)));
  return widened(load_first<Bytes>(row, bytes, row + sizeof(Bytes)));
}

// What has a scale of its own: a row, or a vector of a block (where a lane has VECTORS columns, a lane), or any column.
enum class Scaled { rows, vectors, columns };

// Where the codes and the scales of a row begin, and what those are times; of one scale all of it, and the zero point.
struct Member {
  const uint8_t* codes;
  int64_t at;
  float scale, zero;
};

// Columns from `column` on of every row, `count` of them, VECTORS vectors at most. Lane j of vector v is column
// W v + j, or VECTORS j + v if they are `Turned` and codes of 1, 2 or 4 bits: all lanes' next are taken out at once.
template <class Code, Scaled by, bool Turned>
struct Block {
  static constexpr bool lanes = Turned && Code::bits < 8 && 8 % Code::bits == 0 && by != Scaled::columns;
  static constexpr int bits = Code::bits, columns = VECTORS * W, bytes = columns * bits / 8;
  // Columns of which one tells the group of all.
  static constexpr int alike = by == Scaled::columns ? 1 : lanes ? VECTORS : W;
  static constexpr int places = by == Scaled::rows ? 1 : columns / alike;

  int64_t column, count;
  // The first group, and how many there are; of each place that many behind the first.
  int64_t first = 0, groups = 1;
  int32_t group[places] = {};

  Block(const Rows& t, int64_t column) : column(column), count(std::min<int64_t>(columns, t.k - column)) {
    if constexpr (by == Scaled::rows) return;
    const int64_t size = t.format.columns ? t.format.columns : t.k;
    first = column / size;
    int64_t ends = (first + 1) * size - column;
    for (int i = 0; i < places; ++i) {
      if (i * alike < count && i * alike >= ends) ++groups, ends += size;
      group[i] = static_cast<int32_t>(groups - 1);
    }
  }

  // Into the cache, what a row begins with; more follows by itself once that is read.
  static INLINE inline void fetch_row(const Rows& t, int64_t row) {
    const int64_t at = (t.block == 0 ? row : row / t.block) * t.groups, size = size_of(t.format.scale);
    fetch_bytes(t.codes + row * t.bytes, std::min<int64_t>(t.bytes, 256));
    auto fetch_part = [&](const void* part, int64_t size) INLINE {
      const char* const from = static_cast<const char*>(part) + at * size;
      if constexpr (by == Scaled::rows) {
        fetch(from);
      } else {
        fetch_bytes(from, std::min<int64_t>(t.groups * size, 256));
      }
    };
    fetch_part(t.scale, size);
    if (Code::offset && t.zero != nullptr) fetch_part(t.zero, 1);
  }

  // Each part by itself: a copy of all would wait for them.
  static INLINE inline void find(const Rows& t, int64_t row, float weight, Member& to) {
    const auto [codes, at, factor] = t.row(row);
    to.codes = codes;
    to.at = at;
    to.scale = factor * weight;
    if constexpr (by != Scaled::rows) return;
    to.scale *= scale_at(t.scale, t.format.scale, at);
    if constexpr (Code::offset) to.zero = zero_at(t.zero, t.format, at);
  }

  INLINE inline void fetch_next(const Member& row) const {
    const uint8_t* const next = row.codes + (column + columns) * bits / 8;
    unroll<std::max(1, bytes / 64)>([&](auto line) INLINE { fetch(next + line * 64); });
  }

  // Calls each(v, values that are not scaled, scales) for the vectors of a row.
  template <class Each>
  INLINE inline void read(const Rows& t, const Member& row, const Each& each) const {
    const int64_t scales = t.matrices * t.blocks * t.groups, at = row.at + first;
    const uint32_t flip = flip_of(t.format, t.zero);
    const uint8_t* here = row.codes + column * bits / 8;
    uint8_t rest[bytes];
    // Whole vectors are read, but not behind the table.
    if (t.codes + t.rows * t.bytes - here < bytes) [[unlikely]] {
      copy_few(rest, here, up(count * bits, 8) / 8);
      here = rest;
    }
    // Products are of scales that are in use: of others some are subnormal, which takes long.
    F scale{}, zero{};
    float scale_of[columns + W], zero_of[columns + W];
    if constexpr (by == Scaled::rows) {
      scale = all(row.scale);
      if constexpr (Code::offset) zero = all(row.zero);
    } else if constexpr (lanes) {
      const I index = load<I>(group);
      scale = __builtin_shuffle(scales_at(t.scale, t.format.scale, at, groups, scales), index) * row.scale;
      if constexpr (Code::offset) zero = __builtin_shuffle(zeros_at(t.zero, t.format, at, groups, scales), index);
    } else {
      for (int64_t g = 0; g < groups; g += W) {
        const int64_t some = std::min<int64_t>(W, groups - g);
        store(scale_of + g, scales_at(t.scale, t.format.scale, at + g, some, scales));
        if constexpr (Code::offset) store(zero_of + g, zeros_at(t.zero, t.format, at + g, some, scales));
      }
    }
    U word;
    if constexpr (lanes) {
      word = codes_in_lanes<bits>(here, count);
      if constexpr (Code::offset) word ^= (flip >> (32 - bits)) * (~0u / ((1u << bits) - 1));
    }
    unroll<VECTORS>([&](auto v) INLINE {
      // Vectors that a last block lacks, but for every other.
      if (!lanes && v > 0 && (v == 1 ? v : v / 2 * 2) * W >= count) return;
      F value;
      if constexpr (lanes) {
        value = value_of<Code, v>([&](int) INLINE { return word; });
      } else {
        value = values_at<Code>(here, v * W, flip);
      }
      if constexpr (!lanes && by == Scaled::vectors) {
        scale = all(scale_of[group[v]]) * row.scale;
        if constexpr (Code::offset) zero = all(zero_of[group[v]]);
      }
      if constexpr (by == Scaled::columns) {
        for (int i = 0; i < W; ++i) {
          scale[i] = scale_of[group[v * W + i]];
          if constexpr (Code::offset) zero[i] = zero_of[group[v * W + i]];
        }
        scale *= row.scale;
      }
      if constexpr (Code::offset) value -= zero;
      each(v, value, scale);
    });
  }
};

// The first `count` lanes, of which there may be none.
INLINE inline void store_first(void* to, Type type, int64_t at, F x, int64_t count) {
  if (count >= W) return store_as(to, type, at, x);
  if (count <= 0) return;
  char lanes[4 * W];
  store_as(lanes, type, 0, x);
  copy_few(static_cast<char*>(to) + at * size_of(type), lanes, count * size_of(type));
}

// The vectors of a block times `by` as values from `at` on, `count` of them, in the order of columns.
template <bool lanes>
[[gnu::noinline]] void finish_block(const float* vectors, float by, void* out, Type type, int64_t at, int64_t count) {
  F x[VECTORS];
  unroll<VECTORS>([&](auto v) INLINE { x[v] = load<F>(vectors + v * W) * by; });
  if constexpr (lanes) {
    // Halves of all numbers, one from each in turn: thrice, and each column is where it belongs.
    I low, high;
    for (int i = 0; i < W; ++i) low[i] = i / 2 + i % 2 * W, high[i] = low[i] + W / 2;
    for (int half = VECTORS; half > 1; half /= 2) {
      F turned[VECTORS];
      unroll<VECTORS / 2>([&](auto v) INLINE {
        turned[2 * v] = __builtin_shuffle(x[v], x[v + VECTORS / 2], low);
        turned[2 * v + 1] = __builtin_shuffle(x[v], x[v + VECTORS / 2], high);
      });
      unroll<VECTORS>([&](auto v) INLINE { x[v] = turned[v]; });
    }
  }
  auto write = [&](auto type) INLINE {
    unroll<VECTORS>([&](auto v) INLINE { store_first(out, type, at + v * W, x[v], count - v * W); });
  };
  switch (type) {
    case Type::float32: return write(std::integral_constant<Type, Type::float32>{});
    case Type::bfloat16: return write(std::integral_constant<Type, Type::bfloat16>{});
    default: return write(std::integral_constant<Type, Type::float16>{});
  }
}

// Calls body(blocks) with those of a table, as its scales are spread.
template <bool Turned, class Body>
void with_blocks(const Rows& t, const Body& body) {
  with_code(t.format, [&](auto code) {
    using Code = decltype(code);
    auto run = [&](auto by) {
      std::vector<Block<Code, by, Turned>> blocks;
      for (int64_t column = 0; column < t.k; column += VECTORS * W) blocks.emplace_back(t, column);
      body(blocks);
    };
    // Of bits that few tables have, one way serves all, and there is less to compile.
    if constexpr (8 % Code::bits == 0) {
      if (t.groups == 1) return run(std::integral_constant<Scaled, Scaled::rows>{});
      constexpr int alike = Block<Code, Scaled::vectors, Turned>::alike;
      if (t.format.columns % alike == 0) return run(std::integral_constant<Scaled, Scaled::vectors>{});
    }
    run(std::integral_constant<Scaled, Scaled::columns>{});
  });
}

void decode(const Rows& table, const int64_t* ids, int64_t first, int64_t last, void* out, Type type) {
  with_blocks<false>(table, [&, t = table](const auto& blocks) {
    using Block = std::remove_cvref_t<decltype(blocks[0])>;
    for (int64_t i = first; ids != nullptr && i < std::min(first + AHEAD, last); ++i) Block::fetch_row(t, ids[i]);
    for (int64_t i = first; i < last; ++i) {
      if (ids != nullptr && i + AHEAD < last) Block::fetch_row(t, ids[i + AHEAD]);
      Member row;
      Block::find(t, ids == nullptr ? i : ids[i], 1, row);
      for (const Block& block : blocks) {
        const int64_t at = i * t.k + block.column;
        block.read(t, row, [&](auto v, F value, F scale) INLINE {
          store_first(out, type, at + v * W, value * scale, block.count - v * W);
        });
      }
    }
  });
}

template <bool Largest, class Block>
void pool_blocks(const Rows& of_table, const Bags& of_bags, const std::vector<Block>& blocks, int64_t first,
                 int64_t last, void* out, Type type) {
  // Copies stay in registers while rows pass.
  const Rows table = of_table;
  const Bags bags = of_bags;
  auto end = [&](int64_t bag) { return bag + 1 < bags.begin_count ? bags.begins[bag + 1] : bags.row_count; };
  int64_t longest = 0;
  for (int64_t bag = first; bag < last; ++bag) longest = std::max(longest, end(bag) - bags.begins[bag]);
  // Those of a bag that are no padding.
  std::vector<Member> members(longest);
  Member* const member = members.data();
  const int64_t begin = bags.begins[first], last_row = bags.row_count - 1;
  for (int64_t i = begin; i < std::min(begin + AHEAD, bags.row_count); ++i) Block::fetch_row(table, bags.rows[i]);
  for (int64_t bag = first; bag < last; ++bag) {
    int64_t count = end(bag) - bags.begins[bag];
    for (const Block& given : blocks) {
      const Block block = given;
      const bool finds = block.column == 0, more = block.column + block.count < table.k;
      F sum[VECTORS];
      // Written out, lest the compiler keep them in memory.
      unroll<VECTORS>([&](auto v) INLINE { sum[v] = Largest ? all(-std::numeric_limits<float>::infinity()) : F{}; });
      int64_t found = 0;
      for (int64_t i = bags.begins[bag]; i < bags.begins[bag] + count; ++i) {
        if (finds) {
          // While this row is summed, others come, of this bag or the next.
          Block::fetch_row(table, bags.rows[std::min(i + AHEAD, last_row)]);
          if (bags.rows[i] == bags.padding) continue;
          Block::find(table, bags.rows[i], bags.weights == nullptr ? 1 : bags.weights[i], member[found]);
        }
        const Member& row = member[found++];
        if (more) block.fetch_next(row);
        block.read(table, row, [&](auto v, F value, F scale) INLINE {
          sum[v] = Largest ? larger(sum[v], value * scale) : fma(value, scale, sum[v]);
        });
      }
      count = found;
      // Of no rows there is no largest.
      if (Largest && count == 0) unroll<VECTORS>([&](auto v) INLINE { sum[v] = F{}; });
      alignas(64) float sums[VECTORS * W];
      unroll<VECTORS>([&](auto v) INLINE { store(sums + v * W, sum[v]); });
      const float share = bags.mean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
      finish_block<Block::lanes>(sums, share, out, type, bag * table.k + block.column, block.count);
    }
  }
}

void pool(const Rows& table, const Bags& bags, int64_t first, int64_t last, void* out, Type type) {
  with_blocks<true>(table, [&](const auto& blocks) {
    using Block = std::remove_cvref_t<decltype(blocks[0])>;
    const auto run = bags.largest ? pool_blocks<true, Block> : pool_blocks<false, Block>;
    run(table, bags, blocks, first, last, out, type);
  });
}
