// Calls every function of the CPU's baseline kernels, for every type of elements, and compares all that it writes with
// what plain loops make of the same numbers in double. Needs no PyTorch, so tests/aarch64.sh can compile it for another
// machine. Prints a line for each type; ends with 1 at the first number that is wrong.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "cc_attention/csrc/cpu/line.h"
#include "libs/csrc/cpu/abn_kernels.h"

namespace ccnet {
namespace {

// ---- types of elements ----

struct Format {
  const char* name;
  int digits, bias;  // binary digits, the one before the point included
};
template <class T>
constexpr Format kFormat{"float32", 24, 127};
template <>
constexpr Format kFormat<double>{"float64", 53, 1023};
template <>
constexpr Format kFormat<Half>{"float16", 11, 15};
template <>
constexpr Format kFormat<BFloat16>{"bfloat16", 8, 127};
template <class T>
constexpr double kRounding = 1.0 / (int64_t{1} << kFormat<T>.digits);  // relative error of the nearest number

template <class T>
double to_double(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return x;
  } else {
    constexpr int places = kFormat<T>.digits - 1, bias = kFormat<T>.bias, one = 1 << places;
    const int exponent = (x.bits & 0x7fff) >> places, fraction = x.bits % one;
    const double number = std::ldexp(exponent == 0 ? fraction : fraction + one, std::max(exponent, 1) - bias - places);
    return std::copysign(exponent <= 2 * bias ? number : fraction == 0 ? INFINITY : NAN, x.bits >> 15 ? -1 : 1);
  }
}

template <class T>
T from_double(double x) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(x);
  } else {
    constexpr int places = kFormat<T>.digits - 1, bias = kFormat<T>.bias;
    const int exponent = std::max(std::ilogb(x), 1 - bias);
    int bits = ((2 * bias + 1) << places) + std::isnan(x);  // infinity or NaN
    if (exponent <= bias && !std::isnan(x)) {               // rounding up may carry into the exponent, and to infinity
      const double fraction = std::nearbyint(std::ldexp(std::abs(x), places - exponent));
      bits = ((exponent + bias - 1) << places) + static_cast<int>(fraction);
    }
    return {static_cast<uint16_t>(bits | std::signbit(x) << 15)};
  }
}

// ---- what is compared ----

const char* type;
char sizes[100];  // with which a function is called now
int64_t compared = 0;

[[noreturn]] void fail(const char* function, const char* what) {
  std::fprintf(stderr, "error: %s of %s, %s: %s\n", function, type, sizes, what);
  std::exit(1);
}

struct Matrix {
  int rows, columns;
  std::vector<double> numbers;
  Matrix(int rows, int columns) : rows(rows), columns(columns), numbers(rows * columns, NAN) {}
  double& operator()(int i, int j) { return numbers[i * columns + j]; }
  double operator()(int i, int j) const { return numbers[i * columns + j]; }
};

template <class F>
Matrix matrix(int rows, int columns, const F& number) {
  Matrix x(rows, columns);
  for (int k = 0; k < rows * columns; ++k) {
    x.numbers[k] = number(k / columns, k % columns);
  }
  return x;
}
Matrix transposed(const Matrix& x) {
  return matrix(x.columns, x.rows, [&](int i, int j) { return x(j, i); });
}
Matrix operator*(const Matrix& a, const Matrix& b) {
  return matrix(a.rows, b.columns, [&](int i, int j) {
    double sum = 0;
    for (int k = 0; k < a.columns; ++k) {
      sum += a(i, k) * b(k, j);
    }
    return sum;
  });
}

// What the kernels read and make, and what they should make. At first it is NaN, to show if it is read; and so are the
// gaps before, between and after the rows, where nothing may be written. The gaps also misalign all vectors.
template <class T>
struct Numbers : Matrix {
  static constexpr int gap = 19;
  static_assert(gap >= kNumbersBeyond);
  int stride;
  std::vector<T> made;
  Numbers(int rows, int columns)
      : Matrix(rows, columns), stride(columns + gap), made(gap + rows * stride, from_double<T>(NAN)) {}

  T* data() { return made.data() + gap; }
  Along<T> along() { return {data(), stride, 0}; }

  void set(int i, int j, double to) {
    data()[i * stride + j] = from_double<T>(to);
    (*this)(i, j) = to_double(data()[i * stride + j]);
  }
  void random(double largest = 1, double middle = 0) {
    static std::mt19937 generator;
    for (int k = 0; k < rows * columns; ++k) {
      set(k / columns, k % columns, middle + largest * (generator() * 0x1p-31 - 1));
    }
  }
  void expect(const Matrix& x, bool added = false) {
    for (size_t k = 0; k < numbers.size(); ++k) {
      numbers[k] = x.numbers[k] + (added ? numbers[k] : 0);
    }
  }

  // `error`: what is allowed beside the rounding to T, relative to the number or to 1 if that is larger; 0: nor is the
  // rounding. Afterwards, what was made is what the next function finds.
  void check(const char* function, const char* name, double error) {
    for (int k = -gap; k < rows * stride; ++k) {
      const int i = k < 0 ? -1 : k / stride, j = k - i * stride;
      const bool inside = i >= 0 && j < columns;
      const double is = to_double(data()[k]), should = inside ? (*this)(i, j) : NAN, size = std::abs(should);
      const double allowed = error == 0 ? 0 : kRounding<T> * size + error * std::max(size, 1.0);
      const bool same = is == should || (std::isnan(is) && std::isnan(should));
      if (!same && (std::isinf(should) || !(std::abs(is - should) <= allowed))) {
        char text[200];
        std::snprintf(text, sizeof text, "%s[%d, %d] of %d x %d is %.9g instead of %.9g +- %.2g", name, i, j, rows,
                      columns, is, should, allowed);
        fail(function, text);
      }
      if (inside) {
        (*this)(i, j) = is;
        ++compared;
      }
    }
  }
};

// ---- line attention ----

// [queries, keys] without the diagonal, and back
Matrix without_self(const Matrix& x) {
  return matrix(x.rows, x.columns - 1, [&](int i, int j) { return x(i, j + (j >= i)); });
}
Matrix with_self(const Matrix& x, double self) {
  return matrix(x.rows, x.columns + 1, [&](int i, int j) { return i == j ? self : x(i, j - (j > i)); });
}

// A path of three axes along the same line. On those of `masked`, as bits, all energies are -inf.
template <class T>
void check_line(int length, int query_channels, int value_channels, int masked = 0) {
  using Real = Accumulate<T>;
  const LineKernels<T>& kernels = baseline::line_kernels(static_cast<const T*>(nullptr));
  const double rounding_between_blocks = length > 256 ? 4 * kRounding<T> : 0;  // of gradients by blocks of queries
  const double terms = query_channels + value_channels + length;  // of the sums that a result is made of
  const double error = kRounding<Real> * (4 + 4 * std::sqrt(terms)) + rounding_between_blocks;
  Numbers<T> query(length, query_channels), value(length, value_channels), key = query, grad_out = value, out = value;
  Numbers<T> residual = value, grad_query = query, grad_key = query, grad_value = value;
  constexpr double gamma = 0.75;
  Numbers<T> energy_grad_query = query, energy_grad_key = query, map_out = value, map_grad_value = value;
  Numbers<Real> largest(length, 1), sum = largest, delta = largest;
  constexpr int lanes = 16 / sizeof(Real);  // of the vectors whole of which a row of products has
  Numbers<Real> products(length, (length + lanes - 1) / lanes * lanes);
  query.random(), grad_out.random(), residual.random();
  const int axes = length > 1 ? 3 : 1;
  for (int axis = 0; axis < axes; ++axis) {
    std::snprintf(sizes, sizeof sizes, "length %d, channels %d and %d, axis %d, masked %d", length, query_channels,
                  value_channels, axis, masked);
    const bool later = axis > 0, last = axis == axes - 1;
    const Line line{length, largest.stride, query_channels, value_channels, !later, last};
    constexpr int beyond = 64;
    constexpr char unwritten = -1;  // as bytes of a number: NaN
    std::vector<char> scratch(kernels.scratch_bytes(line) + beyond, unwritten);
    key.random(), value.random();
    for (int i = 0; i < length && masked != 0; ++i) {
      query.set(i, 0, 1);
      key.set(i, 0, masked >> axis & 1 ? -INFINITY : 1);
    }

    const Matrix energies = query * transposed(key), grad_weights = grad_out * transposed(value);
    Matrix weights = later ? with_self(without_self(energies), -INFINITY) : energies;
    for (int i = 0; i < length; ++i) {
      double &top = largest(i, 0), &total = sum(i, 0);
      const double earlier = later ? top : -INFINITY;
      top = earlier;
      for (int j = 0; j < length; ++j) {
        top = std::max(top, weights(i, j));
      }
      const double base = std::isinf(top) ? 0 : top, before = later ? total * std::exp(earlier - base) : 0;
      total = before;
      for (int j = 0; j < length; ++j) {
        total += weights(i, j) = std::exp(weights(i, j) - base);
      }
      const double divisor = total == 0 && !last ? 1 : total;  // nothing yet is 0, and nothing in the end NaN
      for (int j = 0; j < length; ++j) {
        weights(i, j) /= divisor;
      }
      for (int c = 0; c < value_channels; ++c) {
        out(i, c) *= before / divisor;
      }
    }
    out.expect(weights * value, later);
    if (last) {
      out.expect(matrix(length, value_channels, [&](int i, int c) { return residual(i, c) + gamma * out(i, c); }));
    }
    kernels.attention(line, query.along(), key.along(), value.along(), residual.along(), gamma, out.along(),
                      {largest.data(), sum.data()}, scratch.data());
    out.check("attention", "out", error);
    largest.check("attention", "largest", error);
    sum.check("attention", "sum", error);
    if (masked != 0) {
      continue;  // no gradients
    }

    const Matrix of_keys = weights * transposed(grad_weights);
    delta.expect(matrix(length, 1, [&](int i, int) { return of_keys(i, i); }), later);
    grad_value.expect(matrix(length, length, [&](int i, int j) { return gamma * weights(j, i); }) * grad_out, later);
    if (last) {  // goes on to the gradients of query and key, of which it makes the first part
      grad_query = Numbers<T>(length, query_channels), grad_key = grad_query;
    } else {
      grad_query.random(), grad_key.random();
      products.expect(matrix(length, products.columns, [&](int i, int j) { return j < length ? grad_weights(i, j) : 0; }));
    }
    const Matrix grad_energies = matrix(length, length, [&](int i, int j) {
      return gamma * weights(i, j) * (grad_weights(i, j) - delta(i, 0));
    });
    const Matrix query_part = grad_energies * key, key_part = transposed(grad_energies) * query;
    if (last) {
      grad_query.expect(query_part), grad_key.expect(key_part);
    }
    kernels.value_gradients(line, query.along(), key.along(), value.along(), grad_out.along(),
                            {largest.data(), sum.data()}, gamma, products.along(), delta.data(), grad_query.along(),
                            grad_key.along(), grad_value.along(), scratch.data());
    delta.check("value_gradients", "delta", error);
    grad_value.check("value_gradients", "grad_value", error);
    products.check("value_gradients", "products", error);
    grad_query.check("value_gradients", "grad_query", last ? error : 0);
    grad_key.check("value_gradients", "grad_key", last ? error : 0);
    if (!last) {
      grad_query.expect(query_part, true), grad_key.expect(key_part, true);
      kernels.query_key_gradients(line, query.along(), key.along(), {largest.data(), sum.data()}, gamma,
                                  products.along(), delta.data(), grad_query.along(), grad_key.along(),
                                  scratch.data());
      grad_query.check("query_key_gradients", "grad_query", error);
      grad_key.check("query_key_gradients", "grad_key", error);
    }

    // The explicit form
    Numbers<T> energy(length, length - later), grad_energy = energy, weight = energy, grad_weight = energy;
    grad_energy.random(0.1), weight.random(0.1);
    const Matrix all_grad_energies = later ? with_self(grad_energy, 0) : grad_energy;
    const Matrix all_weights = later ? with_self(weight, 0) : weight;
    energy.expect(later ? without_self(energies) : energies);
    kernels.energy(line, query.along(), key.along(), energy.along(), scratch.data());
    energy.check("energy", "energy", error);
    energy_grad_query.expect(all_grad_energies * key, later);
    energy_grad_key.expect(transposed(all_grad_energies) * query, later);
    kernels.energy_backward(line, query.along(), key.along(), grad_energy.along(), energy_grad_query.along(),
                            energy_grad_key.along(), scratch.data());
    energy_grad_query.check("energy_backward", "grad_query", error);
    energy_grad_key.check("energy_backward", "grad_key", error);
    map_out.expect(all_weights * value, later);
    kernels.map(line, weight.along(), value.along(), map_out.along(), scratch.data());
    map_out.check("map", "out", error);
    grad_weight.expect(later ? without_self(grad_weights) : grad_weights);
    map_grad_value.expect(transposed(all_weights) * grad_out, later);
    kernels.map_backward(line, weight.along(), value.along(), grad_out.along(), grad_weight.along(),
                         map_grad_value.along(), scratch.data());
    grad_weight.check("map_backward", "grad_weight", error);
    map_grad_value.check("map_backward", "grad_value", error);
    if (std::count(scratch.end() - beyond, scratch.end(), unwritten) != beyond) {
      fail("one of the functions", "it has written beyond scratch_bytes");
    }
  }
}

template <class T>
void check_transpose(int rows, int columns) {
  std::snprintf(sizes, sizeof sizes, "%d x %d", rows, columns);
  Numbers<T> x(rows, columns), y(columns, rows);
  x.random();
  y.expect(transposed(x));
  baseline::line_kernels(x.data()).transpose(x.data(), x.stride, rows, columns, y.data(), y.stride);
  y.check("transpose", "y", 0);
}

// ---- activated batch norm ----

template <class T>
struct Reference {
  ActivationOf activation;
  bool is_linear(double x) const { return x > 0 || activation.name == Activation::identity; }
  bool is_elu() const { return activation.name == Activation::elu; }
  double slope() const { return activation.name == Activation::relu ? 0 : activation.slope; }

  double operator()(double y) const {
    const bool flat = slope() == 0 && y <= 0;  // infinity too
    return flat ? 0 : is_linear(y) ? y : is_elu() ? std::expm1(y) : y * slope();
  }
  double inverse(double z) const {
    const double least = kRounding<T> - 1;
    return is_linear(z) ? z : is_elu() ? std::log1p(std::max(z, least)) : z / slope();
  }
  double derivative(double z) const { return is_linear(z) ? 1 : is_elu() ? z + 1 : slope(); }
};

template <class T>
void check_abn(Block block, Activation name, bool with_residual, bool in_place_and_past_caches) {
  using Real = Accumulate<T>;
  const AbnKernels<T>& kernels = baseline::abn_kernels(static_cast<const T*>(nullptr));
  const ActivationOf activation{name, 0.1};
  const Reference<T> activate{activation};
  const int n = block.rows * block.length, channels = block.one_channel ? 1 : block.length;
  const double error = 8 * kRounding<Real>, error_of_sums = kRounding<Real> * (16 + n / channels);
  std::snprintf(sizes, sizeof sizes, "%d x %d of %d channels, activation %d, residual %d, in place %d", n / channels,
                channels, channels, static_cast<int>(name), with_residual, in_place_and_past_caches);
  Numbers<T> x(1, n), z = x, residual = x, grad_z = x, grad_x = x, grad_residual = x;
  Numbers<double> mean(1, channels), squares = mean, sum = mean, product_sum = mean;
  Numbers<Real> shift(1, channels), scale = shift, offset = shift, of_deviation = shift, constant = shift;
  for (Numbers<Real>* numbers : {&shift, &scale, &offset, &of_deviation, &constant}) {
    numbers->random();
  }
  const ChannelNumbers<Real> numbers{shift.data(), scale.data(), offset.data(), of_deviation.data(), constant.data()};
  x.random(3, 4), grad_z.random(), residual.random();
  const auto rest = [&](int k) { return with_residual ? residual(0, k) : 0; };
  T* residual_data = with_residual ? residual.data() : nullptr;

  const auto sum_of_channels = [&](const auto& number) {
    Matrix sums = matrix(1, channels, [](int, int) { return 0; });
    for (int k = 0; k < n; ++k) {
      sums(0, k % channels) += number(k, k % channels);
    }
    return sums;
  };
  const Matrix apart = sum_of_channels([&](int k, int) { return x(0, k) - 4; });
  mean.expect(matrix(1, channels, [&](int, int c) { return 4 + apart(0, c) * channels / n; }));
  squares.expect(sum_of_channels([&](int k, int c) { return std::pow(x(0, k) - mean(0, c), 2); }));
  kernels.statistics(block, x.data(), mean.data(), squares.data());
  mean.check("statistics", "mean", 16 * kRounding<Real>);
  squares.check("statistics", "squares", 64 * kRounding<Real>);

  const double special[] = {NAN, INFINITY, -INFINITY, 200, -200, 1e-5, -1e-5};
  for (int k = 0; k < std::min(n, 7); ++k) {
    x.set(0, n - 1 - k, special[k]);
  }
  Numbers<T>& to = in_place_and_past_caches ? x : z;
  const auto y = [&](int k) {
    return (x(0, k) - shift(0, k % channels)) * scale(0, k % channels) + offset(0, k % channels);
  };
  to.expect(matrix(1, n, [&](int, int k) { return activate(y(k) + rest(k)); }));
  kernels.forward(block, activation, x.data(), numbers, residual_data, to.data());
  to.check("forward", "z", error);

  x.random(), z.random();
  z.set(0, 0, -1);  // where elu has rounded y away
  const bool has_x = !activation.is_invertible();
  const KeptData<T> kept = has_x ? KeptData<T>{x.data(), with_residual ? z.data() : nullptr, nullptr}
                                 : KeptData<T>{nullptr, z.data(), residual_data};
  const auto grad_y = [&](int k) {
    return grad_z(0, k) * activate.derivative(has_x && !with_residual ? y(k) : z(0, k));
  };
  const auto deviation = [&](int k) {
    return (has_x ? x(0, k) : activate.inverse(z(0, k)) - rest(k)) - shift(0, k % channels);
  };
  sum.expect(sum_of_channels([&](int k, int) { return grad_y(k); }));
  product_sum.expect(sum_of_channels([&](int k, int) { return grad_y(k) * deviation(k); }));
  kernels.backward_sums(block, activation, kept, grad_z.data(), numbers, sum.data(), product_sum.data());
  sum.check("backward_sums", "sum", error_of_sums);
  product_sum.check("backward_sums", "product_sum", error_of_sums);

  grad_x.expect(matrix(1, n, [&](int, int k) {
    const int c = k % channels;
    return grad_y(k) * scale(0, c) + deviation(k) * of_deviation(0, c) + constant(0, c);
  }));
  grad_residual.expect(matrix(1, n, [&](int, int k) { return with_residual ? grad_y(k) : NAN; }));
  kernels.backward(block, activation, kept, grad_z.data(), numbers, grad_x.data(),
                   with_residual ? grad_residual.data() : nullptr, in_place_and_past_caches);
  grad_x.check("backward", "grad_x", error);
  grad_residual.check("backward", "grad_residual", error);
}

// Every number of 2 bytes is read, multiplied, and rounded to the nearest, ties to even.
template <class T>
void check_conversions(float factor) {
  std::snprintf(sizes, sizeof sizes, "all numbers times %g", factor);
  const float zero = 0;
  Numbers<T> x(1, 1 << 16), z = x;
  for (int k = 0; k < x.columns; ++k) {
    x.data()[k].bits = k;
    z(0, k) = to_double(from_double<T>(static_cast<float>(to_double(x.data()[k]) * factor)));
  }
  baseline::abn_kernels(x.data()).forward({1, x.columns, true}, {Activation::identity, 0}, x.data(),
                                          {&zero, &factor, &zero, nullptr, nullptr}, nullptr, z.data());
  z.check("forward", "z", 0);
}

// ---- all of it ----

template <class T>
void check_type() {
  type = kFormat<T>.name;
  compared = 0;
  for (int length : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 97}) {
    check_line<T>(length, 3, 5);
    check_line<T>(length, 8, 67);
    check_transpose<T>(length, 5);
    check_transpose<T>(length, 33);
  }
  for (int channels : {0, 1, 2, 4, 7, 9, 64, 130}) {
    check_line<T>(11, channels, 4);
    check_line<T>(12, 4, channels);
  }
  check_line<T>(300, 5, 9);  // two blocks of queries
  for (int masked = 1; masked < 8; ++masked) {
    check_line<T>(5, 3, 4, masked);
    check_line<T>(10, 3, 4, masked);
  }
  const Block shapes[] = {{1, 1}, {1, 3}, {1, 4}, {1, 17}, {2, 5}, {3, 8}, {7, 9}, {65, 16}, {130, 7}, {3, 515}};
  for (const Block& shape : shapes) {
    for (Activation name : {Activation::identity, Activation::leaky_relu, Activation::elu, Activation::relu}) {
      for (int options = 0; options < 8; ++options) {
        check_abn<T>({shape.rows, shape.length, options / 4 == 1}, name, options / 2 % 2, options % 2);
      }
    }
  }
  if constexpr (sizeof(T) == 2) {
    for (float factor : {1.f, 1 / 3.f, 1000 / 3.f, 0x1.5p-14f}) {
      check_conversions<T>(factor);
    }
  }
  std::printf("%s: all functions are right, %lld numbers\n", type, static_cast<long long>(compared));
}

}  // namespace
}  // namespace ccnet

int main() {
  ccnet::check_type<float>();
  ccnet::check_type<double>();
  ccnet::check_type<ccnet::Half>();
  ccnet::check_type<ccnet::BFloat16>();
}
