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

// y [columns, rows] from x [rows, columns], y_row and x_row numbers from row to row. Squares of a vector's lanes; the last
// ones overlap those before, and what is narrower than a square goes number by number.
template <class T>
static void transpose_matrix(const T* x, int64_t x_row, int64_t rows, int64_t columns, T* y, int64_t y_row) {
  using Carrier = Accumulate<T>;
  constexpr int lanes = kLanes<Carrier>;
  if (rows < lanes || columns < lanes) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        y[j * y_row + i] = x[i * x_row + j];
      }
    }
    return;
  }
  for (int64_t first_row = 0; first_row < rows; first_row += lanes) {
    const int64_t i = first_row + lanes > rows ? rows - lanes : first_row;
    for (int64_t first_column = 0; first_column < columns; first_column += lanes) {
      const int64_t j = first_column + lanes > columns ? columns - lanes : first_column;
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
