// The criss-cross attention operators on the CPU: each runs its line kernel (line.h) over every row, then every column
// (then every line along depth), the lines of an axis shared out among threads. No two lines of an axis write to the
// same pixel, so the result does not depend on how many threads there are.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cc_attention/csrc/cpu/channels_last.h"
#include "cc_attention/csrc/cpu/line.h"
#include "cc_attention/csrc/criss_cross.h"
#include "libs/csrc/cpu/dtype.h"
#include "libs/csrc/cpu/memory.h"

namespace ccnet {
namespace {

// A channels_last tensor as pixels, numbered as they lie in memory. at(u) is pixel u's first channel.
template <class T>
struct Pixels {
  T* data;
  int64_t channels;
  T* at(int64_t u) const { return data + u * channels; }
};
template <class T>
Pixels<const T> read(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.size(1)};
}
template <class T>
Pixels<T> write(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.size(1)};
}
// The numbers of empty_per_pixel
template <class T>
const Accumulate<T>* read_numbers(const Tensor& x) {
  return static_cast<const Accumulate<T>*>(x.const_data_ptr());
}
template <class T>
Accumulate<T>* write_numbers(const Tensor& x) {
  return static_cast<Accumulate<T>*>(x.mutable_data_ptr());
}

// A line of each axis of x: of its rows, columns, and lines along depth. `next` is left to whoever runs it.
std::vector<Line> axes_of(const Tensor& x, int64_t query_channels, int64_t value_channels) {
  std::vector<Line> axes;
  int64_t step = 1, path = 0;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    const int64_t length = x.size(d);
    const bool first = axes.empty();
    if (first || length > 1) {  // a line of one pixel has, but for the first axis, nobody to attend to
      axes.push_back({length, step, query_channels, value_channels, first, false, 0, path, 0});
    }
    step *= length;
    path += first ? length : length - 1;
  }
  axes.back().last_axis = true;
  for (Line& line : axes) {
    line.path = path;
  }
  return axes;
}

// run(kernels, line, number of its first pixel, scratch) for every line of every axis of x
template <class T, class F>
void each_line(const Tensor& x, int64_t query_channels, int64_t value_channels, const F& run) {
  int64_t pixels = x.size(0);
  for (int64_t d = 2; d < x.dim(); ++d) {
    pixels *= x.size(d);
  }
  if (pixels == 0) {
    return;
  }
  const LineKernels<T>& kernels = line_kernels<T>();
  std::atomic<bool> out_of_memory{false};
  for (const Line& axis : axes_of(x, query_channels, value_channels)) {
    const auto first_pixel = [&](int64_t number) {
      return number / axis.step * axis.step * axis.length + number % axis.step;
    };
    const auto range = [&](int64_t begin, int64_t end) {  // must not throw: it may be called on another thread
      char* scratch = thread_block(kernels.scratch_bytes(axis));
      if (scratch == nullptr) {
        out_of_memory = true;
        return;
      }
      Line line = axis;
      for (int64_t number = begin; number < end; ++number) {
        const int64_t pixel = first_pixel(number);
        line.next = number + 1 < end ? first_pixel(number + 1) - pixel : 0;
        run(kernels, line, pixel, scratch);
      }
    };
    constexpr int64_t worth_a_thread = 1 << 16;  // multiplications
    const int64_t work = axis.length * axis.length * (query_channels + value_channels) + 1;
    torch::stable::parallel_for(0, pixels / axis.length, 1 + worth_a_thread / work, range);
  }
  STD_TORCH_CHECK(!out_of_memory, "criss-cross attention: no memory for the working space of a line");
}

// ---- the operators ----

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention(const Tensor& query_, const Tensor& key_, const Tensor& value_) {
  check_query_key_and_value(query_, key_, value_);
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_), value = in_channels_last(value_);
  Tensor out = empty_channels_last(value, shape_of(value));
  Tensor largest = empty_per_pixel(query), sum = empty_per_pixel(query);
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto q = read<T>(query), k = read<T>(key), v = read<T>(value);
    const auto o = write<T>(out);
    const PathSum<Accumulate<T>> path{write_numbers<T>(largest), write_numbers<T>(sum)};
    each_line<T>(query, q.channels, v.channels, [=](const auto& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.attention(line, q.at(u), k.at(u), v.at(u), o.at(u), path.from(u), scratch);
    });
  });
  return {out, largest, sum};
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad_out_, const Tensor& query_,
                                                                  const Tensor& key_, const Tensor& value_,
                                                                  const Tensor& out_, const Tensor& largest_,
                                                                  const Tensor& sum_) {
  check_query_key_and_value(query_, key_, value_);
  check("grad_out", grad_out_, query_, shape_of(value_));
  check("out", out_, query_, shape_of(value_));
  Tensor delta = empty_per_pixel(query_);
  check("largest", largest_, delta, shape_of(delta));
  check("sum", sum_, delta, shape_of(delta));
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_), value = in_channels_last(value_);
  const Tensor out = in_channels_last(out_), grad_out = in_channels_last(grad_out_);
  const Tensor largest = torch::stable::contiguous(largest_), sum = torch::stable::contiguous(sum_);
  Tensor grad_query = empty_channels_last(query, shape_of(query)), grad_key = empty_channels_last(key, shape_of(key));
  Tensor grad_value = empty_channels_last(value, shape_of(value));
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto q = read<T>(query), k = read<T>(key), v = read<T>(value), o = read<T>(out), g = read<T>(grad_out);
    const auto dq = write<T>(grad_query), dk = write<T>(grad_key), dv = write<T>(grad_value);
    const PathSum<const Accumulate<T>> path{read_numbers<T>(largest), read_numbers<T>(sum)};
    Accumulate<T>* d = write_numbers<T>(delta);
    each_line<T>(query, q.channels, v.channels, [=](const auto& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.attention_backward(line, q.at(u), k.at(u), v.at(u), o.at(u), g.at(u), path.from(u), d + u,
                                 dq.at(u), dk.at(u), dv.at(u), scratch);
    });
  });
  return {grad_query, grad_key, grad_value};
}

Tensor ca_weight(const Tensor& query_, const Tensor& key_) {
  check_query_and_key(query_, key_, false);
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_);
  Tensor energy = empty_channels_last(query, path_shape(query));
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto q = read<T>(query), k = read<T>(key);
    const auto e = write<T>(energy);
    each_line<T>(query, q.channels, 0, [=](const auto& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.energy(line, q.at(u), k.at(u), e.at(u), scratch);
    });
  });
  return energy;
}

std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad_energy_, const Tensor& query_, const Tensor& key_) {
  check_query_and_key(query_, key_, false);
  check("grad_energy", grad_energy_, query_, path_shape(query_));
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_);
  const Tensor grad_energy = in_channels_last(grad_energy_);
  Tensor grad_query = empty_channels_last(query, shape_of(query)), grad_key = empty_channels_last(key, shape_of(key));
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto q = read<T>(query), k = read<T>(key), g = read<T>(grad_energy);
    const auto dq = write<T>(grad_query), dk = write<T>(grad_key);
    each_line<T>(query, q.channels, 0, [=](const auto& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.energy_backward(line, q.at(u), k.at(u), g.at(u), dq.at(u), dk.at(u), scratch);
    });
  });
  return {grad_query, grad_key};
}

Tensor ca_map(const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  const Tensor weight = in_channels_last(weight_), value = in_channels_last(value_);
  Tensor out = empty_channels_last(value, shape_of(value));
  for_type("value", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto w = read<T>(weight), v = read<T>(value);
    const auto o = write<T>(out);
    each_line<T>(value, 0, v.channels, [=](const auto& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.map(line, w.at(u), v.at(u), o.at(u), scratch);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad_out_, const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  check("grad_out", grad_out_, value_, shape_of(value_));
  const Tensor weight = in_channels_last(weight_), value = in_channels_last(value_);
  const Tensor grad_out = in_channels_last(grad_out_);
  Tensor grad_weight = empty_channels_last(value, path_shape(value));
  Tensor grad_value = empty_channels_last(value, shape_of(value));
  for_type("value", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto w = read<T>(weight), v = read<T>(value), g = read<T>(grad_out);
    const auto dw = write<T>(grad_weight), dv = write<T>(grad_value);
    each_line<T>(value, 0, v.channels, [=](const auto& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.map_backward(line, w.at(u), v.at(u), g.at(u), dw.at(u), dv.at(u), scratch);
    });
  });
  return {grad_weight, grad_value};
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet, CPU, m) {
  m.impl("criss_cross_attention", TORCH_BOX(&ccnet::criss_cross_attention));
  m.impl("criss_cross_attention_backward", TORCH_BOX(&ccnet::criss_cross_attention_backward));
  m.impl("ca_weight", TORCH_BOX(&ccnet::ca_weight));
  m.impl("ca_weight_backward", TORCH_BOX(&ccnet::ca_weight_backward));
  m.impl("ca_map", TORCH_BOX(&ccnet::ca_map));
  m.impl("ca_map_backward", TORCH_BOX(&ccnet::ca_map_backward));
}
