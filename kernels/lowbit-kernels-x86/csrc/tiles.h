// Tiles of a packed weight: how codes of a format are read, their scales and zero points, and where sums go.
// Included by each file that multiplies by them, once for each instruction set.

// Calls body(Code{}) with the way to read codes of `format`.
template <class Body>
void with_code(const Format& format, const Body& body) {
  const Element& e = format.element;
  if (e.is_float) {
    switch (e.exponent) {
      case 5: return body(FloatCode<5, 2, 15>{});
      case 4: return body(FloatCode<4, 3, 7>{});
      case 3: return body(FloatCode<3, 2, 3>{});
      default: return e.mantissa == 3 ? body(FloatCode<2, 3, 1>{}) : body(FloatCode<2, 1, 1>{});
    }
  }
  unroll<8>([&](auto less) {
    constexpr int bits = less + 1;
    if (e.bits != bits) return;
    if (e.is_signed && !format.zero) return body(IntCode<bits>{});
    body(OffsetCode<bits>{});
  });
}

// The vectors of one tile's row of words, scales or zero points.
struct Tile {
  const Packed& w;
  int64_t groups, tile;

  Tile(const Packed& w, int64_t tile)
      : w(w), groups(w.format.groups(w.k)), tile(tile) {}

  const uint32_t* codes(int64_t step) const {
    const int64_t words = up(w.k, STEP) / 32 * w.format.element.bits;
    return w.codes + (tile * words + step * w.format.element.bits) * TILE;
  }

  // Without the tensor scale.
  F block_scale(int64_t group, int h) const {
    return load_scale(w.scale, w.format.scale, (tile * groups + group) * TILE + h * W);
  }

  // 1 where there is none.
  F tensor_scale(int h) const {
    if (w.tensor_scale == nullptr) return all(1.0f);
    return w.tensor_scales == 1 ? all(*w.tensor_scale) : load<F>(w.tensor_scale + tile * TILE + h * W);
  }

  [[gnu::noinline]] F scale(int64_t group, int h) const {
    const F scale = block_scale(group, h);
    return w.tensor_scale == nullptr ? scale : scale * tensor_scale(h);
  }

  // Those of all groups, `step` numbers from one to the next.
  void scales(int64_t groups, int h, float* to, int64_t step) const {
    for (int64_t group = 0; group < groups; ++group) store(to + group * step, scale(group, h));
  }

  F zero(int64_t group, int h) const {
    return load_zero(w.zero, w.format, (tile * groups + group) * TILE + h * W);
  }
};

// Values of code P of the words of a step, or from a word that is the first of a run.
template <class Code, int P>
F code_at(const uint32_t* words, int h) {
  return value_of<Code, P>([&](int i) { return load<U>(words + i * TILE + h * W); });
}

// Lanes of rows that exist, of a tile's product, with the bias, rounded.
[[gnu::noinline]] void finish(const Packed& w, int64_t tile, int h, F sum, const void* bias, void* out, Type type,
                              int64_t token) {
  const int64_t row = tile * TILE + h * W;
  if (row >= w.n) return;
  const int64_t at = token * w.n + row;
  if (row + W <= w.n) {
    if (bias != nullptr) sum += load_as(bias, type, row);
    return store_as(out, type, at, sum);
  }
  const size_t bytes = (w.n - row) * size_of(type);
  char lanes[4 * W] = {};
  if (bias != nullptr) {
    std::memcpy(lanes, static_cast<const char*>(bias) + row * size_of(type), bytes);
    sum += load_as(lanes, type, 0);
  }
  store_as(lanes, type, 0, sum);
  std::memcpy(static_cast<char*>(out) + at * size_of(type), lanes, bytes);
}
