// Activated batch norm of one block, declared in abn_kernels.h. Included as simd.h is, after activation_functions.h.

namespace ccnet {
namespace CCNET_CAPABILITY {

#define CCNET_MEMBER __attribute__((always_inline))

// ---- vectors of a row ----

struct WholeVector {
  template <class T>
  CCNET_MEMBER auto read(const T* p) const {
    return load(p);
  }
  template <class T>
  CCNET_MEMBER void write(T* p, Vector<Accumulate<T>> x, bool past_caches = false) const {
    past_caches ? stream(p, x) : store(p, x);
  }
  template <class Real>
  CCNET_MEMBER auto with_zeros(Vector<Real> x) const {
    return x;
  }
};

// The first n lanes; the others are read as 0 and not written.
struct PartOfVector {
  int64_t n;
  template <class T>
  CCNET_MEMBER auto read(const T* p) const {
    return load_part(p, n);
  }
  template <class T>
  CCNET_MEMBER void write(T* p, Vector<Accumulate<T>> x, bool = false) const {
    store_part(p, x, n);
  }
  template <class Real>
  CCNET_MEMBER auto with_zeros(Vector<Real> x) const {
    Real lanes[kLanes<Real>];
    store(lanes, x);
    return load_part(lanes, n);
  }
};

// f(i, vector) for elements i, i + 1, ... of n. Whole vectors are those that are aligned in `to`, if it is not null.
template <class T, class F>
CCNET_INLINE void each_vector(const T* to, int64_t n, const F& f) {
  constexpr int64_t lanes = kLanes<Accumulate<T>>, bytes = lanes * sizeof(T);
  const int64_t before = (bytes - reinterpret_cast<uintptr_t>(to) % bytes) % bytes / sizeof(T);
  int64_t i = 0, end = 0 < before && before < n ? before : n;
  while (i < n) {  // one pass, or two: up to the first aligned vector, and the rest
    for (; i + lanes <= end; i += lanes) {
      f(i, WholeVector{});
    }
    if (i < end) {
      f(i, PartOfVector{end - i});
    }
    i = end;
    end = n;
  }
}
// Without `to`. (Calling the above with null instead makes a tenth more code.)
template <class Real, class F>
CCNET_INLINE void each_vector(int64_t n, const F& f) {
  constexpr int64_t lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    f(i, WholeVector{});
  }
  if (i < n) {
    f(i, PartOfVector{n - i});
  }
}

// A number a channel, for a vector at column i: the block's one channel's, or each column's own
template <class Real>
struct OneNumber {
  Vector<Real> number;
  CCNET_MEMBER explicit OneNumber(const Real* p) : number(splat(*p)) {}
  CCNET_MEMBER Vector<Real> at(int64_t) const { return number; }
};
template <class Real>
struct NumberOfEach {
  const Real* numbers;
  CCNET_MEMBER explicit NumberOfEach(const Real* p) : numbers(p) {}
  CCNET_MEMBER Vector<Real> at(int64_t i) const { return load(numbers + i); }
};

// What is added to y, of the elements from i on
template <class T>
struct Residual {
  const T* p;
  template <class V>
  CCNET_MEMBER auto at(int64_t i, V vector) const {
    return vector.read(p + i);
  }
};
template <class T>
struct NoResidual {
  template <class V>
  CCNET_MEMBER Vector<Accumulate<T>> at(int64_t, V) const {
    return Vector<Accumulate<T>>{};
  }
};

template <class Real>
struct Pair {
  Vector<Real> first, second;
};

// dy and the deviation of elements from i on, from z: y is recovered from it.
template <class T, class Activate, class Numbers, class Rest>
struct OfResult {
  using Real = Accumulate<T>;
  Activate activate;
  const T *z, *grad_z;
  Rest rest;
  Numbers bias;
  template <class V>
  CCNET_MEMBER Pair<Real> at(int64_t i, int64_t column, V vector) const {
    const Vector<Real> out = vector.read(z + i);
    return {activate.gradient(out, vector.read(grad_z + i)),
            activate.inverse(out) - rest.at(i, vector) - bias.at(column)};
  }
};
// The same from x, and z if there is one: without a residual y is computed again, as the forward pass computes it.
template <class T, bool kHasResult, class Activate, class Numbers>
struct OfInput {
  using Real = Accumulate<T>;
  Activate activate;
  const T *x, *z, *grad_z;
  Numbers shift, scale, offset;
  template <class V>
  CCNET_MEMBER Pair<Real> at(int64_t i, int64_t column, V vector) const {
    const Vector<Real> deviation = vector.read(x + i) - shift.at(column);
    Vector<Real> out;
    if constexpr (kHasResult) {
      out = vector.read(z + i);
    } else {
      out = deviation * scale.at(column) + offset.at(column);
    }
    return {activate.gradient(out, vector.read(grad_z + i)), deviation};
  }
};

// ---- sums of each channel ----

constexpr int64_t kChain = 64;   // numbers that are added up in Real, before their sum is added in double
constexpr int64_t kStrip = 512;  // columns whose sums are held at a time
constexpr int kRowsAtOnce = 4;   // that are added up before a column's sums are read and written

// The sums of terms(i, column, vector), i being the element's number in the block
template <class Real, class Terms>
CCNET_INLINE void sum_of_one_channel(int64_t n, const Terms& terms, double* first, double* second) {
  constexpr int64_t lanes = kLanes<Real>;
  double totals[2][lanes] = {};
  for (int64_t begin = 0; begin < n; begin += kChain * lanes) {
    const int64_t count = n - begin < kChain * lanes ? n - begin : kChain * lanes;
    Pair<Real> sum = {};
    each_vector<Real>(count, [&](int64_t i, auto vector) CCNET_MEMBER {
      const Pair<Real> term = terms(begin + i, 0, vector);
      sum.first += term.first;
      sum.second += term.second;
    });
    for (int64_t k = 0; k < lanes; ++k) {
      totals[0][k] += sum.first[k];
      totals[1][k] += sum.second[k];
    }
  }
  *first = *second = 0;
  for (int64_t k = 0; k < lanes; ++k) {
    *first += totals[0][k];
    *second += totals[1][k];
  }
}

// Numbers of a strip's columns that are read and written for each row, beside which rows of two tensors are read.
//
// The CPU takes a load for one of what was just stored where the last 12 bits of their addresses are equal, and waits. So
// a column's numbers lie, in these bits, at the column in one of the tensors, which has been read before they are
// written, and a good way behind that in the other. This makes the statistics about 1.4 times as fast.
template <class Real>
class StripNumbers {
 public:
  Real *first, *second, *near;

  CCNET_MEMBER StripNumbers(const void* a, const void* b) {
    constexpr uintptr_t row = kStrip * sizeof(Real), line = 64;
    const uintptr_t at_a = reinterpret_cast<uintptr_t>(a), at_b = reinterpret_cast<uintptr_t>(b);
    const uintptr_t behind_b = (at_a - at_b) % row;
    first = memory_ + (behind_b < row / 2 ? at_b : at_a) % row / line * line / sizeof(Real);
    second = first + kStrip;
    near = second + kStrip;
  }

 private:
  alignas(4096) Real memory_[4 * kStrip];
};

template <class Real, int kRows, class Terms>
CCNET_INLINE void add_rows(const Block& block, int64_t row, int64_t strip, int64_t width, StripNumbers<Real>& sums,
                           const Terms& terms) {
  each_vector<Real>(width, [&](int64_t i, auto vector) CCNET_MEMBER {
    Pair<Real> sum = terms(row * block.length + strip + i, strip + i, vector);
#pragma GCC unroll 8
    for (int k = 1; k < kRows; ++k) {
      const Pair<Real> term = terms((row + k) * block.length + strip + i, strip + i, vector);
      sum.first += term.first;
      sum.second += term.second;
    }
    store(sums.first + i, load(sums.first + i) + sum.first);
    store(sums.second + i, load(sums.second + i) + sum.second);
  });
}

// Of `width` columns from `strip` on, at most kStrip
template <class Real, class Terms>
CCNET_INLINE void sums_of_columns(const Block& block, int64_t strip, int64_t width, StripNumbers<Real>& sums,
                                  const Terms& terms, double* first, double* second) {
  for (int64_t i = strip; i < strip + width; ++i) {
    first[i] = second[i] = 0;
  }
  for (int64_t begin = 0; begin < block.rows; begin += kChain) {
    const int64_t end = block.rows - begin < kChain ? block.rows : begin + kChain;
    std::memset(sums.first, 0, 2 * kStrip * sizeof(Real));
    int64_t row = begin;
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) {
      add_rows<Real, kRowsAtOnce>(block, row, strip, width, sums, terms);
    }
    for (; row < end; ++row) {
      add_rows<Real, 1>(block, row, strip, width, sums, terms);
    }
    for (int64_t i = 0; i < width; ++i) {
      first[strip + i] += sums.first[i];
      second[strip + i] += sums.second[i];
    }
  }
}

// f(strip, width) for all columns
template <class F>
CCNET_INLINE void each_strip(const Block& block, const F& f) {
  for (int64_t strip = 0; strip < block.length; strip += kStrip) {
    f(strip, block.length - strip < kStrip ? block.length - strip : kStrip);
  }
}

// ---- the kernels ----

template <class T>
constexpr Rounding kRounding = {0x1p-23, 0};
template <>
constexpr Rounding kRounding<double> = {0x1p-52, 0};
template <>
constexpr Rounding kRounding<Half> = {0x1p-10, 0x1p-25};
template <>
constexpr Rounding kRounding<BFloat16> = {0x1p-7, 0x1p-134};

template <class T>
struct Abn {
  using Real = Accumulate<T>;

  // Deviations are taken from a number near the mean, the mean of some first elements, so that their squares do not
  // drown what is small beside it. One of these elements can be far off, but then it makes the variance as large.
  static void statistics(const Block& block, const T* x, double* mean, double* squares) {
    if (block.one_channel) {
      const int64_t n = block.rows * block.length;
      const Real near = mean_of_first(x, n);
      const Vector<Real> shift = splat(near);
      sum_of_one_channel<Real>(n, [&](int64_t i, int64_t, auto vector) CCNET_MEMBER {
        const Vector<Real> deviation = vector.template with_zeros<Real>(vector.read(x + i) - shift);
        return Pair<Real>{deviation, deviation * deviation};
      }, mean, squares);
      finish(n, near, mean, squares);
      return;
    }
    StripNumbers<Real> numbers(x, x);
    each_strip(block, [&](int64_t strip, int64_t width) CCNET_MEMBER {
      means_of_first_rows(block, x + strip, width, numbers.near);
      const auto terms = [&](int64_t i, int64_t column, auto vector) CCNET_MEMBER {
        const Vector<Real> deviation = vector.read(x + i) - load(numbers.near + (column - strip));
        return Pair<Real>{deviation, deviation * deviation};
      };
      sums_of_columns<Real>(block, strip, width, numbers, terms, mean, squares);
      for (int64_t i = 0; i < width; ++i) {
        finish(block.rows, numbers.near[i], mean + strip + i, squares + strip + i);
      }
    });
  }

  static void forward(const Block& block, ActivationOf activation, const T* x, ChannelNumbers<Real> numbers,
                      const T* residual, T* z) {
    specialise(block, activation, residual, [&](auto activate, auto number, auto rest) CCNET_MEMBER {
      const auto shift = number(numbers.shift), scale = number(numbers.scale), offset = number(numbers.offset);
      for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t begin = row * block.length;
        each_vector<Real>(block.length, [&](int64_t i, auto vector) CCNET_MEMBER {
          const Vector<Real> y = (vector.read(x + begin + i) - shift.at(i)) * scale.at(i) + offset.at(i);
          vector.write(z + begin + i, activate(y + rest.at(begin + i, vector)));
        });
      }
    });
  }

  static void backward_sums(const Block& block, ActivationOf activation, KeptData<T> kept, const T* grad_z,
                            ChannelNumbers<Real> numbers, double* sums, double* deviation_sums) {
    specialise_backward(block, activation, kept, grad_z, numbers, [&](auto number, auto of) CCNET_MEMBER {
      const auto terms = [&](int64_t i, int64_t column, auto vector) CCNET_MEMBER {
        const Pair<Real> element = of.at(i, column, vector);
        return Pair<Real>{element.first, element.first * element.second};
      };
      if constexpr (std::is_same_v<decltype(number(numbers.shift)), OneNumber<Real>>) {
        sum_of_one_channel<Real>(block.rows * block.length, terms, sums, deviation_sums);
      } else {
        StripNumbers<Real> strips(kept.x != nullptr ? kept.x : kept.z, grad_z);
        each_strip(block, [&](int64_t strip, int64_t width) CCNET_MEMBER {
          sums_of_columns<Real>(block, strip, width, strips, terms, sums, deviation_sums);
        });
      }
    });
  }

  static void backward(const Block& block, ActivationOf activation, KeptData<T> kept, const T* grad_z,
                       ChannelNumbers<Real> numbers, T* grad_x, T* grad_residual, bool past_caches) {
    specialise_backward(block, activation, kept, grad_z, numbers, [&](auto number, auto of) CCNET_MEMBER {
      const auto scale = number(numbers.scale);
      const auto of_deviation = number(numbers.of_deviation), constant = number(numbers.constant);
      for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t begin = row * block.length;
        const auto at = [&](int64_t i, auto vector) CCNET_MEMBER {
          const Pair<Real> element = of.at(begin + i, i, vector);
          return Pair<Real>{element.first * scale.at(i) + (element.second * of_deviation.at(i) + constant.at(i)),
                            element.first};
        };
        each_vector(past_caches ? grad_x + begin : nullptr, block.length, [&](int64_t i, auto vector) CCNET_MEMBER {
          const Pair<Real> gradients = at(i, vector);
          vector.write(grad_x + begin + i, gradients.first, past_caches);
          if (grad_residual != nullptr) {
            vector.write(grad_residual + begin + i, gradients.second, past_caches);
          }
        });
      }
    });
    streamed();
  }

 private:
  CCNET_INLINE Real mean_of_first(const T* x, int64_t n) {
    constexpr int64_t some = 16;
    const int64_t count = n < some ? n : some;
    Real first[some], sum = 0;
    each_vector<Real>(count, [&](int64_t i, auto vector) CCNET_MEMBER { store(first + i, vector.read(x + i)); });
    for (int64_t i = 0; i < count; ++i) {
      sum += first[i];
    }
    return sum / count;
  }

  CCNET_INLINE void means_of_first_rows(const Block& block, const T* x, int64_t width, Real* means) {
    constexpr int64_t some = 8;
    const int64_t count = block.rows < some ? block.rows : some;
    each_vector<Real>(width, [&](int64_t i, auto vector) CCNET_MEMBER {
      Vector<Real> sum = {};
      for (int64_t row = 0; row < count; ++row) {
        sum += vector.read(x + row * block.length + i);
      }
      store(means + i, sum / Real(count));
    });
  }

  // From the sums of n deviations from `near` and of their squares
  CCNET_INLINE void finish(int64_t n, double near, double* mean, double* squares) {
    const double sum = *mean;
    *mean = near + sum / n;
    const double rest = *squares - sum * (sum / n);
    *squares = rest < 0 ? 0 : rest;
  }

  // f(what makes the channels' numbers of an array), compiled for either kind of block
  template <class F>
  CCNET_INLINE void with_numbers(const Block& block, const F& f) {
    block.one_channel ? f([](const Real* p) CCNET_MEMBER { return OneNumber<Real>(p); })
                      : f([](const Real* p) CCNET_MEMBER { return NumberOfEach<Real>(p); });
  }

  // f(activation, what makes the channels' numbers, residual), compiled for each kind of the three
  template <class F>
  CCNET_INLINE void specialise(const Block& block, ActivationOf activation, const T* residual, const F& f) {
    with_activation<Real>(activation, kRounding<T>, [&](auto activate) CCNET_MEMBER {
      with_numbers(block, [&](auto number) CCNET_MEMBER {
        residual != nullptr ? f(activate, number, Residual<T>{residual}) : f(activate, number, NoResidual<T>());
      });
    });
  }

  // f(what makes the channels' numbers, OfResult or OfInput)
  template <class F>
  CCNET_INLINE void specialise_backward(const Block& block, ActivationOf activation, KeptData<T> kept, const T* grad_z,
                                        ChannelNumbers<Real> numbers, const F& f) {
    specialise(block, activation, kept.residual, [&](auto activate, auto number, auto rest) CCNET_MEMBER {
      using Activate = decltype(activate);
      using Numbers = decltype(number(numbers.shift));
      const Numbers shift = number(numbers.shift);
      if constexpr (!std::is_same_v<Activate, Relu<Real>>) {
        f(number, OfResult<T, Activate, Numbers, decltype(rest)>{activate, kept.z, grad_z, rest, shift});
      } else if constexpr (std::is_same_v<decltype(rest), NoResidual<T>>) {  // x tells what the residual would
        const Numbers scale = number(numbers.scale), offset = number(numbers.offset);
        if (kept.z != nullptr) {
          f(number, OfInput<T, true, Activate, Numbers>{activate, kept.x, kept.z, grad_z, shift, scale, offset});
        } else {
          f(number, OfInput<T, false, Activate, Numbers>{activate, kept.x, kept.z, grad_z, shift, scale, offset});
        }
      }
    });
  }
};

template <class T>
const AbnKernels<T>& kernels_of() {
  static constexpr AbnKernels<T> kernels = {Abn<T>::statistics, Abn<T>::forward, Abn<T>::backward_sums,
                                            Abn<T>::backward};
  return kernels;
}

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet

#undef CCNET_MEMBER
