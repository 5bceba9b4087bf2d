// Matrix products in registers, and the packing of their operands. Included as simd.h is, after it.
//
// A product is made of words, Product::Word: what one step along k multiplies. With Singles a word is one number; with
// Pairs it is two neighbouring bfloat16 along k, both of whose products one instruction adds.

namespace ccnet {
namespace CCNET_CAPABILITY {

template <class Real>
struct Singles {
  using Word = Real;
  static constexpr int kPerWord = 1;
};
struct Pairs {
  using Word = float;  // the bits of two bfloat16, the first in the lower half
  static constexpr int kPerWord = 2;
};

template <class Product>
CCNET_INLINE int64_t words(int64_t numbers) {
  return (numbers + Product::kPerWord - 1) / Product::kPerWord;
}

template <class Product, class V>
CCNET_INLINE V multiply_add(V sum, V a, V b) {
#if CCNET_TARGET == CCNET_TARGET_AVX512_BF16
  if constexpr (Product::kPerWord == 2) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
#endif
  return sum + a * b;
}

// A word in every lane. Pairs go as integers, since as float32 some of them are numbers that arithmetic changes.
template <class Product>
CCNET_INLINE auto repeated(const typename Product::Word* p) {
  if constexpr (Product::kPerWord == 2) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vector<float>)(bits - Bits{});
  } else {
    return splat<typename Product::Word>(*p);
  }
}

// A(m, k), read one word at a time, with any strides
template <class Word>
struct Left {
  const Word* data;
  int64_t row;
  int64_t step;
};

// B(k, n): rows of words, padded to whole vectors
template <class Word>
struct Right {
  const Word* data;
  int64_t row;
};

// C(m, n) becomes scale[m] * (A B)(m, n), plus keep[m] * C(m, n) if `add`, plus the residual(m, n) if there is one. With
// Pairs A is packed with the scale in it: they take half of the multiplications, and the tile's own would be felt.
template <class T>
struct Result {
  T* data;
  int64_t row;
  const Accumulate<T>* scale;
  const Accumulate<T>* keep;
  bool add;
  const T* residual = nullptr;
  int64_t residual_row = 0;
  __attribute__((always_inline)) Result from_column(int64_t n) const {
    return {data + n, row, scale, keep, add, residual == nullptr ? nullptr : residual + n, residual_row};
  }
};

// Memory wanted soon: `bytes` of each of the rows
struct Ahead {
  const char* data = nullptr;
  int64_t row = 0;
  int64_t bytes = 0;
};

// Rows and vectors of the largest tile that fits the registers, beside a row of B and an element of A
#if CCNET_VECTOR_BYTES == 64
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

template <class Product, int kRows, int kVectors, class V>
CCNET_INLINE void tile_step(V (&sums)[kRows][kVectors], const typename Product::Word* a, int64_t row,
                            const typename Product::Word* b) {
  using Word = typename Product::Word;
  V loaded[kVectors];
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    loaded[n] = load(b + n * kLanes<Word>);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const V broadcast = repeated<Product>(a + m * row);
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      sums[m][n] = multiply_add<Product>(sums[m][n], broadcast, loaded[n]);
    }
  }
}

// A product's panel of columns, as wide as a tile
template <class Product, class T>
struct Panel {
  int64_t depth;  // words
  Left<typename Product::Word> a;
  Right<typename Product::Word> b;
  Result<T> c;
  int64_t columns;
  Ahead ahead;
};

// The last panel may have fewer columns than its vectors have lanes. sums [rows, vectors] of the tile at row m of C.
template <class Product, int kVectors, class T>
static __attribute__((noinline)) void store_narrow(const Accumulate<T>* sums, int rows, int64_t columns,
                                                   const Result<T>& c, int64_t m) {
  constexpr int lanes = kLanes<Accumulate<T>>;
  for (int i = 0; i < rows; ++i, ++m) {
    for (int64_t n = 0; n < columns; n += lanes) {
      T* at = c.data + m * c.row + n;
      const int64_t count = columns - n < lanes ? columns - n : lanes;
      auto x = load(sums + i * kVectors * lanes + n);
      if constexpr (Product::kPerWord == 1) {
        x *= c.scale[m];
      }
      if (c.add) {
        x += load_part(at, count) * c.keep[m];
      }
      if (c.residual != nullptr) {
        x += load_part(c.residual + m * c.residual_row + n, count);
      }
      store_part(at, x, count);
    }
  }
}

// Rows first .. first + kRows of a panel that is kVectors wide
template <class Product, int kRows, int kVectors, class T>
static __attribute__((noinline)) void tile(const Panel<Product, T>& panel, int64_t first) {
  using Word = typename Product::Word;
  constexpr int lanes = kLanes<Word>;
  constexpr int64_t cache_line = 64;
  Vector<Word> sums[kRows][kVectors] = {};
  const int64_t depth = panel.depth, a_row = panel.a.row, a_step = panel.a.step, b_row = panel.b.row;
  const Word *a = panel.a.data + first * a_row, *b = panel.b.data;
  int64_t k = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    tile_step<Product>(sums, a, a_row, b);
    a += a_step;
    b += b_row;
    ++k;
  };
  // One cache line is fetched ahead a step: first C, which is wanted at the end of this tile, then what comes after it.
  const int64_t c_row = panel.c.row;
  T* c = panel.c.data + first * c_row;
  const char* line = reinterpret_cast<const char*>(c);
  for (int m = 0; m < kRows; ++m, line += c_row * sizeof(T)) {
    for (int64_t at = 0; at < static_cast<int64_t>(kVectors * lanes * sizeof(T)) && k < depth; at += cache_line) {
      __builtin_prefetch(line + at, 1);
      step();
    }
  }
  line = panel.ahead.data + first * panel.ahead.row;
  for (int m = 0; m < kRows; ++m, line += panel.ahead.row) {
    for (int64_t at = 0; at < panel.ahead.bytes && k < depth; at += cache_line) {
      __builtin_prefetch(line + at);
      step();
    }
  }
  while (k < depth) {
    step();
  }
  asm("" : "+r"(c));  // otherwise the addresses of the first loop are kept on the stack for the stores
  if (panel.columns < kVectors * lanes) {
    Word in_memory[kRows * kVectors * lanes];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        store(in_memory + (m * kVectors + n) * lanes, sums[m][n]);
      }
    }
    store_narrow<Product, kVectors>(in_memory, kRows, panel.columns, panel.c, first);
    return;
  }
  const auto *scale = panel.c.scale + first, *keep = panel.c.keep + first;
  const auto finish = [&](auto add, auto has_residual) __attribute__((always_inline)) {
    const T* residual = panel.c.residual + first * panel.c.residual_row;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, c += c_row, residual += panel.c.residual_row) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        Vector<Word> x = sums[m][n];
        if constexpr (Product::kPerWord == 1) {
          x *= scale[m];
        }
        if constexpr (add.value) {
          x += load(c + n * lanes) * keep[m];
        }
        if constexpr (has_residual.value) {
          x += load(residual + n * lanes);
        }
        store(c + n * lanes, x);
      }
    }
  };
  if (panel.c.residual != nullptr) {
    panel.c.add ? finish(std::true_type(), std::true_type()) : finish(std::false_type(), std::true_type());
  } else {
    panel.c.add ? finish(std::true_type(), std::false_type()) : finish(std::false_type(), std::false_type());
  }
}

template <class Product, class T>
using Tile = void (*)(const Panel<Product, T>&, int64_t);

// Entry (rows - 1) * kTileVectors + vectors - 1 is the tile of that size.
template <class Product, class T, int... I>
CCNET_INLINE Tile<Product, T> tile_of(int64_t rows, int64_t vectors, std::integer_sequence<int, I...>) {
  static constexpr Tile<Product, T> all[] = {tile<Product, I / kTileVectors + 1, I % kTileVectors + 1, T>...};
  return all[(rows - 1) * kTileVectors + vectors - 1];
}

// `total` in as few parts of at most `largest` as possible, their sizes differing by at most 1
struct Split {
  int64_t parts, smaller, rest;
  __attribute__((always_inline)) Split(int64_t total, int64_t largest)
      : parts((total + largest - 1) / largest), smaller(parts > 0 ? total / parts : 0), rest(total - smaller * parts) {}
  __attribute__((always_inline)) int64_t size(int64_t part) const { return smaller + (part < rest); }
};

// C [rows, columns] from A [rows, depth] and B [depth, columns], depth in words. While the first panel of columns is
// made, the rows of `first` are fetched, with the second those of `second`.
template <class Product, class T>
static void multiply(int64_t rows, int64_t columns, int64_t depth, Left<typename Product::Word> a,
                     Right<typename Product::Word> b, Result<T> c, Ahead first = {}, Ahead second = {}) {
  constexpr int lanes = kLanes<typename Product::Word>;
  constexpr auto all_tiles = std::make_integer_sequence<int, kTileRows * kTileVectors>();
  // Panels of columns and blocks of rows of nearly equal size: 97 rows are 12 blocks of 6 and 5 of 5.
  const Split panels((columns + lanes - 1) / lanes, kTileVectors), blocks(rows, kTileRows);
  for (int64_t number = 0, n = 0; number < panels.parts; ++number) {
    const int64_t vectors = panels.size(number);
    const int64_t panel_columns = columns - n < vectors * lanes ? columns - n : vectors * lanes;
    const Panel<Product, T> panel{depth,
                                  a,
                                  {b.data + n, b.row},
                                  c.from_column(n),
                                  panel_columns,
                                  number == 0   ? first
                                  : number == 1 ? second
                                                : Ahead{}};
    for (int64_t block = 0, m = 0; block < blocks.parts; ++block) {
      const int64_t block_rows = blocks.size(block);
      tile_of<Product, T>(block_rows, vectors, all_tiles)(panel, m);
      m += block_rows;
    }
    n += vectors * lanes;
  }
}

// ---- packing x [rows, columns], `stride` numbers from row to row, into words; the rest of the last vector is 0 ----

template <class Product, class T>
CCNET_INLINE Vector<typename Product::Word> load_words(const T* p, int64_t numbers) {
  if constexpr (Product::kPerWord == 1) {
    return load_up_to(p, numbers);
  } else {
    Vector<float> bits = {};
    if (numbers < 2 * kLanes<float>) {
      std::memcpy(&bits, p, numbers * sizeof(T));
      return bits;
    }
    std::memcpy(&bits, p, sizeof bits);  // a size that the compiler knows: an instruction, not a call
    return bits;
  }
}

// y [rows, words(columns)]: words run along a row
template <class Product, class T>
static void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, typename Product::Word* y,
                      int64_t y_row) {
  constexpr int lanes = kLanes<Accumulate<T>>;
  for (int64_t i = 0; i < rows; ++i, x += stride, y += y_row) {
    if constexpr (Product::kPerWord == 1) {
      for (int64_t c = 0; c < columns; c += lanes) {
        store(y + c, load_up_to(x + c, columns - c));
      }
    } else {
      for (int64_t w = 0; w < words<Product>(columns); w += lanes) {
        store(y + w, load_words<Product>(x + 2 * w, columns - 2 * w));
      }
    }
  }
}

#if CCNET_TARGET == CCNET_TARGET_AVX512_BF16
// Words of numbers that are still to be rounded
CCNET_INLINE Vector<float> pair_words(Vector<float> upper, Vector<float> lower) {
  const auto rounded = [](Vector<float> x) __attribute__((always_inline)) {
    return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)x));
  };
  return (Vector<float>)(rounded(upper) | rounded(lower) << 16);
}

// Words of two rows' numbers, `lower` being null for zeros
CCNET_INLINE void pack_pairs(const BFloat16* upper, const BFloat16* lower, int64_t columns, float* y) {
  constexpr int lanes = kLanes<float>;
  Bits lane;
  for (int i = 0; i < lanes; ++i) {
    lane[i] = i;
  }
  const __m512i in_turns = (__m512i)(lane | (lane + 2 * lanes) << 16);  // number i of the upper row, then of the lower
  const __m512i half = _mm512_set1_epi16(lanes);
  for (int64_t c = 0; c < columns; c += 2 * lanes) {
    const __m512i even = (__m512i)load_words<Pairs>(upper + c, columns - c);
    const __m512i odd = lower == nullptr ? __m512i{} : (__m512i)load_words<Pairs>(lower + c, columns - c);
    store(y + c, (Vector<float>)_mm512_permutex2var_epi16(even, in_turns, odd));
    if (columns - c > lanes) {
      store(y + c + lanes, (Vector<float>)_mm512_permutex2var_epi16(even, in_turns + half, odd));
    }
  }
}
#endif

// y [words(rows), columns]: words run along a column
template <class Product, class T>
static void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, typename Product::Word* y,
                         int64_t y_row) {
  if constexpr (Product::kPerWord == 1) {
    pack_rows<Product>(x, stride, rows, columns, y, y_row);
  } else {
    for (int64_t i = 0; i < rows; i += 2, x += 2 * stride, y += y_row) {
      pack_pairs(x, i + 1 < rows ? x + stride : nullptr, columns, y);
    }
  }
}

// y [words(columns), rows]: x transposed, with words along a row of x
template <class Product, class T>
static void pack_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, typename Product::Word* y,
                            int64_t y_row) {
  using Word = typename Product::Word;
  constexpr int lanes = kLanes<Word>;
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t w = 0; w < words<Product>(columns); w += lanes) {
      const int64_t c = w * Product::kPerWord;
      Vector<Word> square[lanes];
      if (i + lanes <= rows && c + lanes * Product::kPerWord <= columns) {
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) {
          square[k] = load_words<Product>(x + (i + k) * stride + c, lanes * Product::kPerWord);
        }
        transpose<Word>(square);
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) {
          store(y + (w + k) * y_row + i, square[k]);
        }
        continue;
      }
      for (int k = 0; k < lanes; ++k) {
        square[k] = i + k < rows ? load_words<Product>(x + (i + k) * stride + c, columns - c) : Vector<Word>{};
      }
      transpose<Word>(square);
      for (int k = 0; k < lanes && w + k < words<Product>(columns); ++k) {
        store(y + (w + k) * y_row + i, square[k]);
      }
    }
  }
}

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet
