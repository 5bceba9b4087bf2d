// What launches the kernels of line_attention.cuh, declared in line.h.
#pragma once

#include <type_traits>

#include "cc_attention/csrc/cuda/line_attention.cuh"
#include "cc_attention/csrc/cuda/whole_line_attention.cuh"

namespace ccnet {

// f(line, number of lines) for each axis
template <class F>
cudaError_t each_axis(const Axes& axes, const F& f) {
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < axes.count && axes.pixels > 0 && error == cudaSuccess; ++i) {
    error = f(axes.lines[i], axes.pixels / axes.lines[i].length);
  }
  return error;
}

// f(work, line, number of lines) for each axis, work being a LineAttention<...>* that suits the line and the device
template <class T, class F>
cudaError_t each_axis_with_tile(const Axes& axes, const F& f) {
  Device device;
  const cudaError_t error = device_of_this_thread(device);
  if (error != cudaSuccess) {
    return error;
  }
  return each_axis(axes, [&](const Line& line, int64_t lines) {
    if constexpr (sizeof(T) == 2) {
      using Large = LineAttention<TensorCores, T, 128>;
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (!device.has_bfloat16) {
          return f(static_cast<LineAttention<PlainCores, T, 64>*>(nullptr), line, lines);
        }
      }
      if (line.length > 64 && device.shared_bytes >= Large::kMostBytes) {
        return f(static_cast<Large*>(nullptr), line, lines);
      }
      return f(static_cast<LineAttention<TensorCores, T, 64>*>(nullptr), line, lines);
    } else {
      return f(static_cast<LineAttention<PlainCores, T, 256 / sizeof(T)>*>(nullptr), line, lines);
    }
  });
}

template <class T>
cudaError_t dot_products(Pixels<const T> a, Pixels<const T> b, int64_t pixels, Accumulate<T>* delta,
                         cudaStream_t stream) {
  if (pixels == 0) {
    return cudaSuccess;
  }
  return launch(dot_product_kernel<T>, (pixels + 7) / 8, 256, 0, stream, LineMap(a), LineMap(b), pixels, delta);
}

inline int64_t tiles_of(const Line& line, int tile) { return (line.length + tile - 1) / tile; }

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::attention(const Axes& axes, Pixels<const T> query, Pixels<const T> key,
                                                       Pixels<const T> value, Pixels<T> out, PathSum<Real> path,
                                                       cudaStream_t stream) {
  return each_axis_with_tile<T>(axes, [&](auto* work, const Line& line, int64_t lines) {
    using Work = std::remove_pointer_t<decltype(work)>;
    if constexpr (Work::kTensorCores && Work::kSide == 128) {
      const LineMap q(query), k(key), v(value);
      const LineMap o(out);
      if (WholeLineAttention<T>::takes(line, q, k, v, o)) {
        return launch(whole_line_attention_kernel<WholeLineAttention<T>>, lines, WholeLineAttention<T>::kThreads,
                      WholeLineAttention<T>::kBytes, stream, line, q, k, v, o, path);
      }
    }
    return launch(attention_kernel<Work>, lines * tiles_of(line, Work::kSide), Work::kThreads, Work::kForwardBytes,
                  stream, line, LineMap(query), LineMap(key), LineMap(value), LineMap(out), path);
  });
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::attention_backward(const Axes& axes, Pixels<const T> query,
                                                                Pixels<const T> key, Pixels<const T> value,
                                                                Pixels<const T> out, Pixels<const T> grad_out,
                                                                PathSum<const Real> path, Real* delta,
                                                                Pixels<T> grad_query, Pixels<T> grad_key,
                                                                Pixels<T> grad_value, cudaStream_t stream) {
  const cudaError_t error = dot_products(out, grad_out, axes.pixels, delta, stream);
  if (error != cudaSuccess) {
    return error;
  }
  return each_axis_with_tile<T>(axes, [&](auto* work, const Line& line, int64_t lines) {
    using Work = std::remove_pointer_t<decltype(work)>;
    return launch(attention_backward_kernel<Work>, lines, Work::kThreads, Work::kBackwardBytes, stream, line,
                  LineMap(query), LineMap(key), LineMap(value), LineMap(grad_out), path,
                  static_cast<const Real*>(delta), LineMap(grad_query), LineMap(grad_key), LineMap(grad_value));
  });
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::energy(const Axes& axes, Pixels<const T> query, Pixels<const T> key,
                                                    Pixels<T> energy, cudaStream_t stream) {
  return each_axis_with_tile<T>(axes, [&](auto* work, const Line& line, int64_t lines) {
    using Work = std::remove_pointer_t<decltype(work)>;
    return launch(energy_kernel<Work>, lines * tiles_of(line, Work::kSide), Work::kThreads, Work::kMapBytes, stream,
                  line, LineMap(query), LineMap(key), LineMap(energy));
  });
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::energy_backward(const Axes& axes, Pixels<const T> query,
                                                             Pixels<const T> key, Pixels<const T> grad_energy,
                                                             Pixels<T> grad_query, Pixels<T> grad_key,
                                                             cudaStream_t stream) {
  return each_axis_with_tile<T>(axes, [&](auto* work, const Line& line, int64_t lines) {
    using Work = std::remove_pointer_t<decltype(work)>;
    return launch(energy_backward_kernel<Work>, lines, Work::kThreads, Work::kMapBytes, stream, line, LineMap(query),
                  LineMap(key), LineMap(grad_energy), LineMap(grad_query), LineMap(grad_key));
  });
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::map(const Axes& axes, Pixels<const T> weight, Pixels<const T> value,
                                                 Pixels<T> out, cudaStream_t stream) {
  return each_axis_with_tile<T>(axes, [&](auto* work, const Line& line, int64_t lines) {
    using Work = std::remove_pointer_t<decltype(work)>;
    return launch(map_kernel<Work>, lines * tiles_of(line, Work::kSide), Work::kThreads, Work::kMapBytes, stream, line,
                  LineMap(weight), LineMap(value), LineMap(out));
  });
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::map_backward(const Axes& axes, Pixels<const T> weight,
                                                          Pixels<const T> value, Pixels<const T> grad_out,
                                                          Pixels<T> grad_weight, Pixels<T> grad_value,
                                                          cudaStream_t stream) {
  return each_axis_with_tile<T>(axes, [&](auto* work, const Line& line, int64_t lines) {
    using Work = std::remove_pointer_t<decltype(work)>;
    return launch(map_backward_kernel<Work>, lines, Work::kThreads, Work::kMapBackwardBytes, stream, line,
                  LineMap(weight), LineMap(value), LineMap(grad_out), LineMap(grad_weight), LineMap(grad_value));
  });
}

}  // namespace ccnet
