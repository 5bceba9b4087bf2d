// Transposing matrices of any element type, as bits. Included as simd.h is, after it.

namespace ccnet {
namespace CCNET_CAPABILITY {

// An element's bits while it moves, in a lane of Accumulate<T>: elements of 2 bytes take up 4 on the way.
template <class T>
CCNET_INLINE auto load_bits(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return (Vector<float>)load_halves(p);
  } else {
    return load(p);
  }
}
template <class T, class V>
CCNET_INLINE void store_bits(T* p, V x) {
  if constexpr (sizeof(T) == 2) {
    store_halves(p, (Bits)x);
  } else {
    store(p, x);
  }
}

// y [columns, rows] from x [rows, columns], y_row and x_row numbers from row to row
template <class T>
static void transpose_matrix(const T* x, int64_t x_row, int64_t rows, int64_t columns, T* y, int64_t y_row) {
  using Carrier = Accumulate<T>;
  constexpr int lanes = kLanes<Carrier>;
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < columns; j += lanes) {
      if (i + lanes > rows || j + lanes > columns) {
        for (int64_t m = i; m < rows && m < i + lanes; ++m) {
          for (int64_t n = j; n < columns && n < j + lanes; ++n) {
            y[n * y_row + m] = x[m * x_row + n];
          }
        }
        continue;
      }
      Vector<Carrier> square[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        square[k] = load_bits(x + (i + k) * x_row + j);
      }
      transpose<Carrier>(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        store_bits(y + (j + k) * y_row + i, square[k]);
      }
    }
  }
}

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet
