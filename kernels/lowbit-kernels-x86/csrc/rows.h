// Rows of a table as plain values, and their sums by bags.
// Included by kernels.cpp, once for each instruction set but those with vectors of 512 bits, which have blocks.h.

// The value of one code, not scaled yet, in every lane; see values_at.
template <class Code>
F value_at(const uint8_t* row, int64_t column, uint32_t flip) {
  constexpr int Bits = Code::bits;
  const int64_t bit = column * Bits;
  uint32_t code = row[bit / 8] >> (bit % 8);
  if (bit % 8 + Bits > 8) code |= uint32_t{row[bit / 8 + 1]} << (8 - bit % 8);
  U top = all(code << (32 - Bits));
  if constexpr (Code::offset) top ^= flip;
  return Code::value(top);
}

template <class Code, Type type>
void decode_row(const Rows& t, const uint8_t* codes, int64_t at, float factor, uint32_t flip, void* out) {
  constexpr int Bits = Code::bits;
  const int64_t k = t.k, group_columns = t.format.columns ? t.format.columns : std::max<int64_t>(k, 1);
  for (int64_t group = 0, begin = 0; begin < k; ++group, begin += group_columns) {
    const int64_t end = std::min(k, begin + group_columns);
    const F by = all(scale_at(t.scale, t.format.scale, at + group) * factor);
    const F less = all(zero_at(t.zero, t.format, at + group));
    int64_t column = begin;
    for (; column + W <= end && column * Bits % 8 == 0; column += W) {
      F value = values_at<Code>(codes, column, flip);
      if constexpr (Code::offset) value -= less;
      store_as(out, type, column, value * by);
    }
    for (; column < end; ++column) {
      F value = value_at<Code>(codes, column, flip);
      if constexpr (Code::offset) value -= less;
      store_one(out, type, column, value * by);
    }
  }
}

void decode(const Rows& t, const int64_t* ids, int64_t first, int64_t last, void* out, Type type) {
  const uint32_t flip = flip_of(t.format, t.zero);
  with_code(t.format, [&](auto code) {
    using Code = decltype(code);
    const auto run = type == Type::float32    ? decode_row<Code, Type::float32>
                     : type == Type::bfloat16 ? decode_row<Code, Type::bfloat16>
                                              : decode_row<Code, Type::float16>;
    for (int64_t i = first; ids != nullptr && i < std::min(first + AHEAD, last); ++i) t.fetch(ids[i]);
    for (int64_t i = first; i < last; ++i) {
      if (ids != nullptr && i + AHEAD < last) t.fetch(ids[i + AHEAD]);
      const auto [codes, at, factor] = t.row(ids == nullptr ? i : ids[i]);
      run(t, codes, at, factor, flip, static_cast<char*>(out) + i * t.k * size_of(type));
    }
  });
}

// Rows of one bag that are no padding: their codes, and their scales and zero points one after another. Room is for the
// longest bag.
struct Members {
  std::vector<const uint8_t*> codes;
  std::vector<float> scales, zeros;
  int64_t begin, end, count;

  // Vectors of scales may begin anywhere.
  Members(int64_t rows, int64_t groups) : codes(rows), scales(rows * groups + W), zeros(rows * groups + W) {}
};

// Finds the rows of a bag, and calls add(codes, scales, zero points) for each.
template <bool Zeros, bool One, class Add>
INLINE inline void take(const Rows& table, const Bags& bags, Members& members, const Add& add) {
  // Of their own, lest every store be taken for a change of them.
  Rows t = table;
  if constexpr (One) t.groups = 1;
  const int64_t *const rows = bags.rows, padding = bags.padding, last = bags.row_count - 1;
  const float* const weights = bags.weights;
  const uint8_t** const codes = members.codes.data();
  float *scale = members.scales.data(), *zero = members.zeros.data();
  int64_t count = 0;
  for (int64_t i = members.begin; i < members.end; ++i) {
    t.fetch(rows[std::min(i + AHEAD, last)]);
    if (rows[i] == padding) continue;
    auto [from, at, factor] = t.row(rows[i]);
    if (weights != nullptr) factor *= weights[i];
    int64_t group = 0;
    for (; group + W <= t.groups; group += W) {
      store(scale + group, load_scale(t.scale, t.format.scale, at + group) * factor);
      if constexpr (Zeros) store(zero + group, load_zero(t.zero, t.format, at + group));
    }
    for (; group < t.groups; ++group) {
      scale[group] = scale_at(t.scale, t.format.scale, at + group) * factor;
      if constexpr (Zeros) zero[group] = zero_at(t.zero, t.format, at + group);
    }
    codes[count] = from;
    add(codes[count], scale, zero);
    ++count, scale += t.groups, zero += t.groups;
  }
  members.count = count;
}

// Calls add(codes, scales, zero points) for each row of a bag that was taken.
template <class Add>
INLINE inline void each_member(int64_t groups, const Members& members, const Add& add) {
  const float *scale = members.scales.data(), *zero = members.zeros.data();
  for (int64_t i = 0; i < members.count; ++i, scale += groups, zero += groups) add(members.codes[i], scale, zero);
}

inline float share(const Bags& bags, const Members& members) {
  return bags.mean && members.count > 0 ? 1.0f / static_cast<float>(members.count) : 1.0f;
}

// Sums of C vectors of columns stay in registers while rows pass, which are taken with the First of them; `One` scale and
// zero point a row.
template <class Code, bool Largest, bool One, bool First, int C>
void pool_block(const Rows& table, const Bags& bags, Members& members, int64_t column, void* out, Type type) {
  const int64_t group_columns = table.format.columns ? table.format.columns : table.k;
  const uint32_t flip = flip_of(table.format, table.zero);
  F sum[C];
  int64_t group[C];
  // Written out, lest the compiler keep them in memory.
  unroll<C>([&](auto c) INLINE {
    sum[c] = Largest ? all(-std::numeric_limits<float>::infinity()) : F{};
    group[c] = One ? 0 : (column + c * W) / group_columns;
  });
  auto add = [&](const uint8_t* codes, const float* scale, const float* zero) INLINE {
    const uint8_t* const here = codes + column * Code::bits / 8;
    // What the next block reads.
    __builtin_prefetch(here + C * W * Code::bits / 8);
    F by = all(scale[0]), less{};
    if constexpr (Code::offset) less = all(zero[0]);
    unroll<C>([&](auto c) INLINE {
      F value = values_at<Code>(here, c * W, flip);
      if constexpr (!One) by = all(scale[group[c]]);
      if constexpr (!One && Code::offset) less = all(zero[group[c]]);
      if constexpr (Code::offset) value -= less;
      sum[c] = Largest ? larger(sum[c], value * by) : fma(value, by, sum[c]);
    });
  };
  if constexpr (First) {
    take<Code::offset, One>(table, bags, members, add);
  } else {
    each_member(table.groups, members, add);
  }
  const F by = all(share(bags, members));
  unroll<C>([&](auto c) INLINE { store_as(out, type, column + c * W, sum[c] * by); });
}

template <class Code, bool Largest>
void pool_column(const Rows& table, const Bags& bags, Members& members, int64_t column, void* out, Type type) {
  const int64_t group = column / (table.format.columns ? table.format.columns : table.k);
  const uint32_t flip = flip_of(table.format, table.zero);
  F sum = Largest ? all(-std::numeric_limits<float>::infinity()) : F{};
  each_member(table.groups, members, [&](const uint8_t* codes, const float* scale, const float* zero) INLINE {
    F value = value_at<Code>(codes, column, flip);
    if constexpr (Code::offset) value -= all(zero[group]);
    const F by = all(scale[group]);
    sum = Largest ? larger(sum, value * by) : fma(value, by, sum);
  });
  store_one(out, type, column, sum * share(bags, members));
}

template <class Code, bool Largest>
void pool_bag(const Rows& table, const Bags& bags, Members& members, void* out, Type type) {
  constexpr int C = 8;
  const int64_t k = table.k, group_columns = table.format.columns ? table.format.columns : k;
  const bool whole = W * Code::bits % 8 == 0 && (table.groups == 1 || group_columns % W == 0);
  int64_t column = 0;
  auto run = [&](auto block, int columns) INLINE {
    block(table, bags, members, column, out, type);
    column += columns;
  };
  // What is asked for most has code of its own.
  if (!Largest && whole && C * W <= k) {
    run(table.groups == 1 ? pool_block<Code, false, true, true, C> : pool_block<Code, false, false, true, C>, C * W);
  } else {
    take<Code::offset, false>(table, bags, members, [](auto...) {});
  }
  const auto more = !Largest && table.groups == 1 ? pool_block<Code, false, true, false, C>
                                                  : pool_block<Code, Largest, false, false, C>;
  while (whole && column + C * W <= k) run(more, C * W);
  while (whole && column + W <= k) run(pool_block<Code, Largest, false, false, 1>, W);
  while (column < k) run(pool_column<Code, Largest>, 1);
  // Of no rows there is no largest.
  if (members.count == 0) std::memset(out, 0, k * size_of(type));
}

void pool(const Rows& table, const Bags& bags, int64_t first, int64_t last, void* out, Type type) {
  auto end = [&](int64_t bag) { return bag + 1 < bags.begin_count ? bags.begins[bag + 1] : bags.row_count; };
  int64_t longest = 0;
  for (int64_t bag = first; bag < last; ++bag) longest = std::max(longest, end(bag) - bags.begins[bag]);
  const int64_t begin = bags.begins[first];
  for (int64_t i = begin; i < std::min(begin + AHEAD, bags.row_count); ++i) table.fetch(bags.rows[i]);
  Members members(longest, table.groups);
  with_code(table.format, [&](auto code) {
    using Code = decltype(code);
    const auto one = bags.largest ? pool_bag<Code, true> : pool_bag<Code, false>;
    for (int64_t bag = first; bag < last; ++bag) {
      members.begin = bags.begins[bag], members.end = end(bag), members.count = 0;
      one(table, bags, members, static_cast<char*>(out) + bag * table.k * size_of(type), type);
    }
  });
}
