// Attention along one line of pixels, declared in line.h. Included as simd.h is, after matmul.h.
//
// The line's weights are held for a block of queries at a time, [queries, keys], and everything is a product with them:
//   energy = Q K^T, out = P V;  dV = P^T dO, dP = dO V^T, dE = P * (dP - delta), dQ = dE K, dK = dE^T Q
// Queries are the rows, keys the columns. Values pass by in chunks of channels that are packed to lie side by side.

namespace ccnet {
namespace CCNET_CAPABILITY {

constexpr int64_t kQueryBlock = 256;

template <class T>
CCNET_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}

// sums[i] += a[i] * b[i] over n numbers of each row, still spread over a vector's lanes. a is packed.
template <class Product, class T, class Word = typename Product::Word>
static void dot_products(const Word* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t rows, int64_t n,
                         Word* sums) {
  constexpr int lanes = kLanes<Word>;
  for (int64_t i = 0; i < rows; ++i, a += a_stride, b += b_stride, sums += lanes) {
    Vector<Word> sum = load(sums);
    for (int64_t w = 0, c = 0; c < n; w += lanes, c += lanes * Product::kPerWord) {
      sum = multiply_add<Product>(sum, load(a + w), load_words<Product>(b + c, n - c));
    }
    store(sums, sum);
  }
}

template <class Real>
static void finish_dot_products(const Real* sums, int64_t rows, Real* out, int64_t stride) {
  constexpr int lanes = kLanes<Real>;
  for (int64_t i = 0; i < rows; i += lanes) {
    const int64_t count = smaller<int64_t>(lanes, rows - i);
    Vector<Real> group[lanes];
    Real results[lanes];
    for (int k = 0; k < lanes; ++k) {
      group[k] = k < count ? load(sums + (i + k) * lanes) : Vector<Real>{};
    }
    store(results, sum_of_each<Real>(group));
    for (int k = 0; k < count; ++k) {
      out[(i + k) * stride] = results[k];
    }
  }
}

// n numbers, converted
template <class From, class To>
static void copy(const From* from, To* to, int64_t n) {
  constexpr int lanes = kLanes<Accumulate<From>>;
  for (int64_t i = 0; i < n; i += lanes) {
    store_part(to + i, load_up_to(from + i, n - i), smaller<int64_t>(lanes, n - i));
  }
}

template <class Product, class T>
class LineAttention {
 public:
  using Real = Accumulate<T>;
  using Word = typename Product::Word;

  LineAttention(const Line& line, char* block)
      : line_(line),
        length_(line.length),
        row_(whole<Real>(line.length)),
        query_row_(whole<Word>(line.query_channels)),
        // One column more than whole vectors would cost a whole vector of columns: it is made by dot products.
        lone_column_(length_ % kLanes<Real> == 1) {
    Scratch scratch(block);
    const int64_t queries = whole<Real>(smaller(length_, kQueryBlock));
    weight_ = scratch.take<Real>(queries * row_);
    grad_weight_ = scratch.take<Real>(queries * row_);
    keys_transposed_ = scratch.take<Word>(words<Product>(line.query_channels) * row_);
    keys_ = scratch.take<Word>(words<Product>(length_) * query_row_);
    queries_ = scratch.take<Word>(queries * query_row_);
    values_ = scratch.take<Word>(words<Product>(length_) * kChunk);
    values_transposed_ = scratch.take<Word>(kChunkWords * row_);
    grads_ = scratch.take<Word>(queries * kChunkWords);
    if (Product::kPerWord == 1) {
      queries_by_column_ = queries_;
      grads_by_column_ = grads_;
      weight_words_ = nullptr;
    } else {
      queries_by_column_ = scratch.take<Word>(queries * query_row_);
      grads_by_column_ = scratch.take<Word>(queries * kChunk);
      weight_words_ = scratch.take<Word>(queries * row_);
    }
    dot_sums_ = scratch.take<Real>(queries * kLanes<Real>);
    scale_ = scratch.take<Real>(queries);
    keep_ = scratch.take<Real>(queries);
    ones_ = scratch.take<Real>(row_);
    gammas_ = scratch.take<Real>(row_);
    used_ = scratch.used();
    for (int64_t i = 0; block != nullptr && i < row_; ++i) {
      ones_[i] = 1;
    }
  }

  static int64_t scratch_bytes(const Line& line) { return LineAttention(line, nullptr).used_; }

  static void attention(const Line& line, Along<const T> query, Along<const T> key, Along<const T> value,
                        Along<const T> residual, Real gamma, Along<T> out, PathSum<Real> path, char* scratch) {
    LineAttention work(line, scratch);
    work.pack_keys(key);
    if (!line.last_axis) {
      residual.data = nullptr;
    }
    work.each_block([&](int64_t first) {
      work.energies(query.from(first), key);
      work.softmax(path.from(first * line.step), residual.data == nullptr ? 1 : gamma);
      work.weigh_values(value, residual,
                        {out.from(first).data, out.stride, work.scale_, work.keep_, !line.first_axis,
                         residual.data == nullptr ? nullptr : residual.from(first).data, residual.stride});
    });
  }

  static void value_gradients(const Line& line, Along<const T> query, Along<const T> key, Along<const T> value,
                              Along<const T> grad_out, PathSum<const Real> path, Real gamma, Along<Real> products,
                              Real* delta, Along<T> grad_query, Along<T> grad_key, Along<T> grad_value,
                              char* scratch) {
    LineAttention work(line, scratch);
    work.set_gamma(gamma);
    work.pack_keys(key);
    if (line.last_axis) {
      work.pack_keys_by_column(key);
    }
    work.each_block([&](int64_t first) {
      work.energies(query.from(first), key);
      work.softmax_again(path.from(first * line.step));
      const Along<Real> to = line.last_axis ? Along<Real>{work.grad_weight_, work.row_, 0} : products.from(first);
      work.value_gradients(value, grad_out.from(first), to, grad_value);
      work.add_delta(to, delta + first * line.step);
      if (line.last_axis) {
        work.energy_gradients(to, delta + first * line.step, gamma);
        work.query_key_gradients(query, grad_query, grad_key, false);
      }
    });
  }

  static void query_key_gradients(const Line& line, Along<const T> query, Along<const T> key, PathSum<const Real> path,
                                  Real gamma, Along<Real> products, const Real* delta, Along<T> grad_query,
                                  Along<T> grad_key, char* scratch) {
    LineAttention work(line, scratch);
    work.pack_keys(key);
    work.pack_keys_by_column(key);
    work.each_block([&](int64_t first) {
      work.energies(query.from(first), key);
      work.softmax_again(path.from(first * line.step));
      work.energy_gradients(products.from(first), delta + first * line.step, gamma);
      work.query_key_gradients(query, grad_query, grad_key, true);
    });
  }

  static void energy(const Line& line, Along<const T> query, Along<const T> key, Along<T> energy, char* scratch) {
    LineAttention work(line, scratch);
    work.pack_keys(key);
    work.each_block([&](int64_t first) {
      work.energies(query.from(first), key);
      work.write_path(work.weight_, energy);
    });
  }

  static void energy_backward(const Line& line, Along<const T> query, Along<const T> key, Along<const T> grad_energy,
                              Along<T> grad_query, Along<T> grad_key, char* scratch) {
    LineAttention work(line, scratch);
    work.pack_keys_by_column(key);
    work.each_block([&](int64_t) {
      work.read_path(grad_energy, work.grad_weight_);
      work.query_key_gradients(query, grad_query, grad_key, !line.first_axis);
    });
  }

  static void map(const Line& line, Along<const T> weight, Along<const T> value, Along<T> out, char* scratch) {
    LineAttention work(line, scratch);
    work.each_block([&](int64_t first) {
      work.read_path(weight, work.weight_);
      work.weigh_values(value, {}, work.to_sum(out.from(first), !line.first_axis));
    });
  }

  static void map_backward(const Line& line, Along<const T> weight, Along<const T> value, Along<const T> grad_out,
                           Along<T> grad_weight, Along<T> grad_value, char* scratch) {
    LineAttention work(line, scratch);
    work.set_gamma(1);
    work.each_block([&](int64_t first) {
      work.read_path(weight, work.weight_);
      work.value_gradients(value, grad_out.from(first), {work.grad_weight_, work.row_, 0}, grad_value);
      work.write_path(work.grad_weight_, grad_weight);
    });
  }

 private:
  // Channels of a chunk: its values, packed, are half of the innermost cache
  static constexpr int64_t kChunkWords = 64, kChunk = kChunkWords * Product::kPerWord;

  // f(first query) for blocks of nearly equal size
  template <class F>
  __attribute__((always_inline)) void each_block(const F& f) {
    const Split blocks(length_, kQueryBlock);
    first_query_ = 0;
    for (int64_t block = 0; block < blocks.parts; ++block) {
      queries_in_block_ = blocks.size(block);
      f(first_query_);
      first_query_ += queries_in_block_;
    }
  }

  // `count` channels of x from number `channel` on, or of this thread's next line where x has no more of them
  static Ahead ahead(Along<const T> x, int64_t channels, int64_t channel, int64_t count) {
    const T* at = x.data + channel;
    if (channel >= channels) {
      if (x.next == 0) {
        return {};
      }
      at = x.data + x.next;
    }
    return {reinterpret_cast<const char*>(at), static_cast<int64_t>(x.stride * sizeof(T)),
            static_cast<int64_t>(smaller(count, channels) * sizeof(T))};
  }

  void set_gamma(Real gamma) {
    for (int64_t i = 0; i < row_; ++i) {
      gammas_[i] = gamma;
    }
  }

  Result<T> to_sum(Along<T> x, bool add) const { return {x.data, x.stride, ones_, ones_, add}; }

  // x [queries, keys] as the left operand: of products over keys, and, transposed, of products over queries. Each row is
  // multiplied by its factor if these are Pairs, which are rounded here anyway.
  Left<Word> over_keys(Real* x, [[maybe_unused]] const Real* factors) {
    if constexpr (Product::kPerWord == 1) {
      return {x, row_, 1};
    } else {
      for (int64_t i = 0; i < queries_in_block_; ++i) {
        for (int64_t j = 0; j < row_; j += kLanes<Real>) {
          store(reinterpret_cast<T*>(weight_words_ + i * row_) + j, load(x + i * row_ + j) * factors[i]);
        }
      }
      return {weight_words_, row_, 1};
    }
  }
  Left<Word> over_queries(Real* x, [[maybe_unused]] const Real* factors) {
    if constexpr (Product::kPerWord == 1) {
      return {x, 1, row_};
    } else {
      for (int64_t i = 0; i < queries_in_block_; i += 2) {
        for (int64_t j = 0; j < row_; j += kLanes<Real>) {
          const Vector<Real> upper = load(x + i * row_ + j) * factors[i];
          const bool alone = i + 1 == queries_in_block_;
          const Vector<Real> lower = alone ? Vector<Real>{} : load(x + (i + 1) * row_ + j) * factors[i + 1];
          store(weight_words_ + i / 2 * row_ + j, pair_words(upper, lower));
        }
      }
      return {weight_words_, 1, row_};
    }
  }

  void pack_keys(Along<const T> key) {
    pack_transposed<Product>(key.data, key.stride, length_ - lone_column_, line_.query_channels, keys_transposed_, row_);
  }
  void pack_keys_by_column(Along<const T> key) {
    pack_columns<Product>(key.data, key.stride, length_, line_.query_channels, keys_, query_row_);
  }

  // Sets what is no key: the columns beyond the line and, but for the first axis, the pixel itself.
  void set_outside(Real* x, Real to) const {
    constexpr int lanes = kLanes<Real>;
    Vector<Real> outside = {};  // in the last vector of a row
    for (int64_t j = 0; j < lanes; ++j) {
      outside[j] = row_ - lanes + j >= length_;
    }
    for (int64_t i = 0; i < queries_in_block_; ++i) {
      Real* numbers = x + i * row_;
      store(numbers + row_ - lanes, outside != 0 ? splat(to) : load(numbers + row_ - lanes));
      if (!line_.first_axis) {
        numbers[first_query_ + i] = to;
      }
    }
  }

  // weight_ = Q K^T
  void energies(Along<const T> query, Along<const T> key) {
    const int64_t channels = line_.query_channels, m = queries_in_block_;
    pack_rows<Product>(query.data, query.stride, m, channels, queries_, query_row_);
    multiply<Product>(m, lone_column_ ? length_ - 1 : row_, words<Product>(channels), Left<Word>{queries_, query_row_, 1},
                      Right<Word>{keys_transposed_, row_}, Result<Real>{weight_, row_, ones_, ones_, false},
                      ahead(query, channels, channels, channels), ahead(key, channels, channels, channels));
    if (lone_column_) {
      std::memset(dot_sums_, 0, m * kLanes<Real> * sizeof(Real));
      dot_products<Product>(queries_, query_row_, key.from(length_ - 1).data, 0, m, channels, dot_sums_);
      finish_dot_products(dot_sums_, m, weight_ + length_ - 1, row_);
    }
    set_outside(weight_, -__builtin_inf());
  }

  // weight_ = exp(energy - the largest). The path's largest energy and the sum of exp(energy - it) take in this line's,
  // and scale_ and keep_ become what this line's weights and the earlier axes' result count in the merged one, times factor.
  __attribute__((noinline)) void softmax(PathSum<Real> path, Real factor) {
    constexpr int lanes = kLanes<Real>;
    const Vector<Real> nothing = splat<Real>(-__builtin_inf());
    for (int64_t i = 0; i < queries_in_block_; i += lanes) {
      const int64_t count = smaller<int64_t>(lanes, queries_in_block_ - i);
      Vector<Real> group[lanes];
      Real numbers[lanes];
      for (int64_t k = 0; k < count; ++k) {
        const Real* energy = weight_ + (i + k) * row_;
        Vector<Real> largest = load(energy);
        for (int64_t j = lanes; j < row_; j += lanes) {
          const Vector<Real> x = load(energy + j);
          largest = x > largest ? x : largest;
        }
        group[k] = largest;
      }
      for (int64_t k = count; k < lanes; ++k) {
        group[k] = Vector<Real>{};
      }
      const Vector<Real> largest = max_of_each<Real>(group);
      // Where every energy is -inf, so that -inf - -inf does not make NaN of a sum that is 0
      store(numbers, largest == nothing ? Vector<Real>{} : largest);
      for (int64_t k = 0; k < count; ++k) {
        Real* energy = weight_ + (i + k) * row_;
        Vector<Real> sum = {};
        for (int64_t j = 0; j < row_; j += lanes) {
          const Vector<Real> x = exp(load(energy + j) - numbers[k]);
          store(energy + j, x);
          sum += x;
        }
        group[k] = sum;
      }
      for (int64_t k = count; k < lanes; ++k) {
        group[k] = splat<Real>(1);
      }
      merge(path, i, count, largest, sum_of_each<Real>(group), factor);
    }
  }

  // What softmax does to `count` queries from query i on, given this line's largest energies and sums
  void merge(PathSum<Real> path, int64_t i, int64_t count, Vector<Real> largest, Vector<Real> sum, Real factor) {
    constexpr int lanes = kLanes<Real>;
    const Vector<Real> nothing = splat<Real>(-__builtin_inf());
    Real largests[lanes], sums[lanes];
    for (int64_t k = 0; k < lanes; ++k) {
      const bool has_earlier = !line_.first_axis && k < count;
      largests[k] = has_earlier ? path.largest[(i + k) * line_.step] : -__builtin_inf();
      sums[k] = has_earlier ? path.sum[(i + k) * line_.step] : 0;
    }
    const Vector<Real> earlier = load(largests);
    const Vector<Real> merged = earlier > largest ? earlier : largest;
    const Vector<Real> base = merged == nothing ? Vector<Real>{} : merged;
    const Vector<Real> here = exp(largest - base), before = load(sums) * exp(earlier - base);
    const Vector<Real> total = sum * here + before;
    Vector<Real> inverse = splat<Real>(1) / total;
    if (!line_.last_axis) {
      inverse = total == 0 ? Vector<Real>{} : inverse;  // all -inf so far: 0, and NaN only if it stays so to the end
    }
    store(scale_ + i, here * inverse * factor);
    store(keep_ + i, before * inverse * factor);
    store(largests, merged);
    store(sums, total);
    for (int64_t k = 0; k < count; ++k) {
      path.largest[(i + k) * line_.step] = largests[k];
      path.sum[(i + k) * line_.step] = sums[k];
    }
  }

  // weight_ = the weights themselves, from energies and what softmax has made of the whole path
  void softmax_again(PathSum<const Real> path) {
    for (int64_t i = 0; i < queries_in_block_; ++i) {
      Real* energy = weight_ + i * row_;
      const Real largest = path.largest[i * line_.step], inverse = 1 / path.sum[i * line_.step];
      for (int64_t j = 0; j < row_; j += kLanes<Real>) {
        store(energy + j, exp(load(energy + j) - largest) * inverse);
      }
    }
  }

  // out takes in weight_ V. The residual is out's.
  void weigh_values(Along<const T> value, Along<const T> residual, Result<T> out) {
    const Left<Word> weights = over_keys(weight_, out.scale);
    const int64_t channels = line_.value_channels;
    for (int64_t c = 0; c < channels; c += kChunk) {
      const int64_t n = smaller(kChunk, channels - c);
      pack_columns<Product>(value.data + c, value.stride, length_, n, values_, kChunk);
      multiply<Product>(queries_in_block_, n, words<Product>(length_), weights, Right<Word>{values_, kChunk},
                        out.from_column(c), ahead(value, channels, c + kChunk, kChunk),
                        residual.data == nullptr ? Ahead{} : ahead(residual, channels, c + kChunk, kChunk));
    }
  }

  // products = dO V^T; grad_value takes in gamma * P^T dO.
  void value_gradients(Along<const T> value, Along<const T> grad_out, Along<Real> products, Along<T> grad_value) {
    const int64_t channels = line_.value_channels, m = queries_in_block_;
    const Left<Word> weights = over_queries(weight_, gammas_);
    for (int64_t i = 0; i < m && channels == 0; ++i) {
      std::memset(products.from(i).data, 0, row_ * sizeof(Real));
    }
    std::memset(dot_sums_, 0, m * kLanes<Real> * sizeof(Real));
    for (int64_t c = 0; c < channels; c += kChunk) {
      const int64_t n = smaller(kChunk, channels - c);
      pack_rows<Product>(grad_out.data + c, grad_out.stride, m, n, grads_, kChunkWords);
      if (Product::kPerWord != 1) {
        pack_columns<Product>(grad_out.data + c, grad_out.stride, m, n, grads_by_column_, kChunk);
      }
      pack_transposed<Product>(value.data + c, value.stride, length_ - lone_column_, n, values_transposed_, row_);
      if (lone_column_) {
        dot_products<Product>(grads_, kChunkWords, value.from(length_ - 1).data + c, 0, m, n, dot_sums_);
      }
      const int64_t next = c + kChunk;
      multiply<Product>(m, lone_column_ ? length_ - 1 : row_, words<Product>(n), Left<Word>{grads_, kChunkWords, 1},
                        Right<Word>{values_transposed_, row_},
                        Result<Real>{products.data, products.stride, ones_, ones_, c > 0},
                        ahead(value, channels, next, kChunk));
      multiply<Product>(length_, n, words<Product>(m), weights, Right<Word>{grads_by_column_, kChunk},
                        Result<T>{grad_value.data + c, grad_value.stride, gammas_, ones_,
                                  !line_.first_axis || first_query_ > 0},
                        ahead(grad_out, channels, next, kChunk));
    }
    if (lone_column_ && channels > 0) {
      finish_dot_products(dot_sums_, m, products.data + length_ - 1, products.stride);
    }
    for (int64_t i = 0; i < m && lone_column_; ++i) {  // what no product has made, and has weights of 0
      std::memset(products.from(i).data + length_, 0, (row_ - length_) * sizeof(Real));
    }
  }

  // delta of each query = the sum of weight * products over its path so far
  void add_delta(Along<Real> products, Real* delta) {
    std::memset(dot_sums_, 0, queries_in_block_ * kLanes<Real> * sizeof(Real));
    dot_products<Singles<Real>>(weight_, row_, products.data, products.stride, queries_in_block_, row_, dot_sums_);
    finish_dot_products(dot_sums_, queries_in_block_, scale_, 1);
    for (int64_t i = 0; i < queries_in_block_; ++i) {
      delta[i * line_.step] = scale_[i] + (line_.first_axis ? 0 : delta[i * line_.step]);
    }
  }

  // grad_weight_ = the gradient of the energies
  void energy_gradients(Along<Real> products, const Real* delta, Real gamma) {
    for (int64_t i = 0; i < queries_in_block_; ++i) {
      const Real d = delta[i * line_.step];
      const Real *weight = weight_ + i * row_, *product = products.from(i).data;
      for (int64_t j = 0; j < row_; j += kLanes<Real>) {
        store(grad_weight_ + i * row_ + j, load(weight + j) * gamma * (load(product + j) - d));
      }
    }
  }

  // grad_query and grad_key become what grad_weight_ makes of them, or with `add` take it in.
  void query_key_gradients(Along<const T> query, Along<T> grad_query, Along<T> grad_key, bool add) {
    const int64_t channels = line_.query_channels, m = queries_in_block_;
    multiply<Product>(m, channels, words<Product>(length_), over_keys(grad_weight_, ones_),
                      Right<Word>{keys_, query_row_}, to_sum(grad_query.from(first_query_), add));
    pack_columns<Product>(query.from(first_query_).data, query.stride, m, channels, queries_by_column_, query_row_);
    multiply<Product>(length_, channels, words<Product>(m), over_queries(grad_weight_, ones_),
                      Right<Word>{queries_by_column_, query_row_},
                      to_sum(grad_key, add || first_query_ > 0));
  }

  // The explicit form: this line's part of each pixel's path to and from x [queries, keys]. On all axes but the first
  // the path has no entry for the pixel itself.
  void read_path(Along<const T> path, Real* x) const {
    for (int64_t i = 0; i < queries_in_block_; ++i) {
      const int64_t self = first_query_ + i;
      const T* from = path.from(self).data;
      Real* to = x + i * row_;
      if (line_.first_axis) {
        copy(from, to, length_);
      } else {
        copy(from, to, self);
        copy(from + self, to + self + 1, length_ - self - 1);
      }
    }
    set_outside(x, 0);
  }
  void write_path(const Real* x, Along<T> path) const {
    for (int64_t i = 0; i < queries_in_block_; ++i) {
      const int64_t self = first_query_ + i;
      const Real* from = x + i * row_;
      T* to = path.from(self).data;
      if (line_.first_axis) {
        copy(from, to, length_);
      } else {
        copy(from, to, self);
        copy(from + self + 1, to + self, length_ - self - 1);
      }
    }
  }

  const Line& line_;
  const int64_t length_;
  const int64_t row_;  // of weights: the line's length in whole vectors
  const int64_t query_row_;
  const bool lone_column_;
  int64_t first_query_ = 0, queries_in_block_ = 0;
  int64_t used_ = 0;

  Real *weight_, *grad_weight_;                // [queries, row_]
  Word *keys_transposed_, *keys_;              // [channels, row_], [keys, query_row_]
  Word *queries_, *queries_by_column_;         // [queries, query_row_]
  Word *values_, *values_transposed_;          // [keys, kChunk], [kChunkWords, row_]
  Word *grads_, *grads_by_column_;             // [queries, kChunkWords], [queries, kChunk]
  Word* weight_words_;                         // what over_keys or over_queries packed last
  Real* dot_sums_;                            // [queries, lanes]
  Real *scale_, *keep_;                        // [queries]
  Real *ones_, *gammas_;                       // [row_]
};

template <class Product, class T>
const LineKernels<T>& kernels_of() {
  using Work = LineAttention<Product, T>;
  static constexpr LineKernels<T> kernels = {Work::scratch_bytes,       Work::attention, Work::value_gradients,
                                             Work::query_key_gradients, Work::energy,    Work::energy_backward,
                                             Work::map,                 Work::map_backward,
                                             transpose_matrix<T>};
  return kernels;
}

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet
