// Transposing matrices of any element type, as bits. Included as simd.h is, after it.

namespace ccnet {
namespace CCNET_CAPABILITY {

// While they move, a lane of 4 bytes or 8 holds an element or, of 2 bytes, those of two rows that follow each other.
template <class T>
constexpr int kRowsOfLane = sizeof(T) == 2 ? 2 : 1;

template <class T>
CCNET_INLINE auto load_lanes(const T* p, int64_t row) {
  if constexpr (kRowsOfLane<T> == 2) {
    return (Vector<float>)(load_halves(p) | load_halves(p + row) << 16);
  } else {
    return load(p);
  }
}

// y [columns, rows] from x [rows, columns], y_row and x_row numbers from row to row. Squares of a vector's lanes; the last
// ones overlap those before, and what is narrower than a square goes number by number.
template <class T>
static void transpose_matrix(const T* x, int64_t x_row, int64_t rows, int64_t columns, T* y, int64_t y_row) {
  using Lane = Accumulate<T>;
  constexpr int lanes = kLanes<Lane>, square_rows = lanes * kRowsOfLane<T>;
  if (rows < square_rows || columns < lanes) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        y[j * y_row + i] = x[i * x_row + j];
      }
    }
    return;
  }
  for (int64_t first_row = 0; first_row < rows; first_row += square_rows) {
    const int64_t i = first_row + square_rows > rows ? rows - square_rows : first_row;
    for (int64_t first_column = 0; first_column < columns; first_column += lanes) {
      const int64_t j = first_column + lanes > columns ? columns - lanes : first_column;
      Vector<Lane> square[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        square[k] = load_lanes(x + (i + k * kRowsOfLane<T>) * x_row + j, x_row);
      }
      transpose<Lane>(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        std::memcpy(y + (j + k) * y_row + i, &square[k], sizeof square[k]);
      }
    }
  }
}

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet
