// What launches the kernels, declared in line.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cc_attention/csrc/cuda/line_attention.cuh"
#include "cc_attention/csrc/cuda/tensor_core_attention.cuh"

namespace ccnet {

// f(line, number of lines) for each axis of that many images
template <class F>
cudaError_t each_axis(const Axes& axes, int64_t images, const F& f) {
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < axes.count && images * axes.pixels > 0 && error == cudaSuccess; ++i) {
    error = f(axes.lines[i], images * axes.pixels / axes.lines[i].length);
  }
  return error;
}

// f(first image, images) for so many images that their tensors stay in the cache between two axes
template <class F>
cudaError_t each_group(const Axes& axes, int64_t at_once, const F& f) {
  cudaError_t error = cudaSuccess;
  for (int64_t image = 0; image < axes.images && error == cudaSuccess; image += at_once) {
    error = f(image, std::min(at_once, axes.images - image));
  }
  return error;
}
inline int64_t images_at_once(const Device& device, const Axes& axes, int64_t bytes_of_image) {
  const int64_t images = bytes_of_image > 0 ? device.cache_bytes / bytes_of_image : axes.images;
  return std::clamp<int64_t>(images, 1, std::max<int64_t>(axes.images, 1));
}

inline int64_t tiles_of(const Line& line, int tile) { return (line.length + tile - 1) / tile; }

// ---- the explicit form ----

// f(work, line, number of lines) for each axis, work being a LineAttention<...>* that suits the line and the device
template <class T, class F>
cudaError_t each_axis_with_tile(const Axes& axes, const F& f) {
  Device device;
  const cudaError_t error = device_of_this_thread(device);
  if (error != cudaSuccess) {
    return error;
  }
  return each_axis(axes, axes.images, [&](const Line& line, int64_t lines) {
    if constexpr (sizeof(T) == 2) {
      using Large = LineAttention<TensorCores, T, 128>;
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (device.architecture < 80) {
          return f(static_cast<LineAttention<PlainCores, T, 64>*>(nullptr), line, lines);
        }
      }
      if (line.length > 64 && device.shared_bytes >= Large::kMapBytes) {
        return f(static_cast<Large*>(nullptr), line, lines);
      }
      return f(static_cast<LineAttention<TensorCores, T, 64>*>(nullptr), line, lines);
    } else {
      if constexpr (sizeof(T) == 4) {
        if (axes.allow_tf32 && device.architecture >= 80) {
          return f(static_cast<LineAttention<TensorCores, T, 64>*>(nullptr), line, lines);
        }
      }
      return f(static_cast<LineAttention<PlainCores, T, 256 / sizeof(T)>*>(nullptr), line, lines);
    }
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

// ---- attention: the kernels of a line ----

// Without tensor cores for T, or with float32 as TF32
template <class T, class Cores = PlainCores>
struct TiledLine {
  using Work = LineAttention<Cores, T, sizeof(T) == 2 ? 64 : 256 / sizeof(T)>;
  using Real = Accumulate<T>;
  static int64_t parts(const Line&) { return 1; }  // of delta
  static int64_t products(const Line& line) { return Work::products_at(line, 1, 0, 0); }

  static cudaError_t forward(const Device&, const Line& line, int64_t lines, Pixels<const T> query,
                             Pixels<const T> key, Pixels<const T> value, const T* residual, const Real* gamma,
                             Pixels<T> out, PathSum<const Real> before, PathSum<Real> path, cudaStream_t stream) {
    return launch(tiled_attention_kernel<Work>, lines * tiles_of(line, Work::kSide), Work::kThreads,
                  Work::kForwardBytes, stream, line, LineMap(query), LineMap(key), LineMap(value), residual, gamma,
                  LineMap(out), before, path);
  }
  static cudaError_t value_gradient(const Line& line, int64_t lines, Pixels<const T> query, Pixels<const T> key,
                                    Pixels<const T> value, Pixels<const T> grad_out, PathSum<const Real> path,
                                    const Real* gamma, const AxisScratch<Real>& scratch, Pixels<T> grad_value,
                                    cudaStream_t stream) {
    return launch(tiled_value_gradient_kernel<Work>, lines, Work::kThreads, Work::kValueGradientBytes, stream, line,
                  LineMap(query), LineMap(key), LineMap(value), LineMap(grad_out), path, gamma, scratch,
                  LineMap(grad_value));
  }
  static cudaError_t query_key_gradient(const Line& line, int64_t lines, Pixels<const T> query, Pixels<const T> key,
                                        PathSum<const Real> path, const Real* gamma, const AxisScratch<Real>& scratch,
                                        Real* delta, Pixels<T> grad_query, Pixels<T> grad_key, cudaStream_t stream) {
    return launch(tiled_query_key_gradient_kernel<Work>, lines, Work::kThreads, Work::kMapBytes, stream, line,
                  LineMap(query), LineMap(key), path, gamma, scratch, delta, LineMap(grad_query), LineMap(grad_key));
  }
};

// On tensor cores: forward kQueries queries by kKeys keys at a time, backward kSide of them
template <class T, int kQueries, int kKeys, int kSide>
struct TensorCoreLine {
  using Forward = TensorCoreForward<T, kQueries, kKeys>;
  using ValueGradient = TensorCoreValueGradient<T, kSide>;
  using QueryKeyGradient = TensorCoreQueryKeyGradient<T, kSide>;
  static int64_t parts(const Line& line) { return tiles_of(line, ValueGradient::kKeys); }
  static int64_t products(const Line& line) { return ValueGradient::products_at(line, 1, 0, 0); }

  static cudaError_t forward(const Device& device, const Line& line, int64_t lines, Pixels<const T> query,
                             Pixels<const T> key, Pixels<const T> value, const T* residual, const float* gamma,
                             Pixels<T> out, PathSum<const float> before, PathSum<float> path, cudaStream_t stream) {
    // Where lines are few, several blocks share the channels of one's values; but a block whose keys do not all fit goes
    // by the softmax that it has itself left in `path`.
    const int64_t blocks = lines * tiles_of(line, kQueries), slices = value.channels / (2 * Forward::kSlice);
    int parts = 1;
    while (line.length <= kKeys && 2 * parts <= slices && 2 * blocks * parts < 3 * device.multiprocessors) {
      parts *= 2;
    }
    return launch(attention_kernel<Forward>, blocks * parts, Forward::kThreads, Forward::kBytes, stream, line, parts,
                  LineMap(query), LineMap(key), LineMap(value), residual, gamma, LineMap(out), before, path);
  }
  static cudaError_t value_gradient(const Line& line, int64_t lines, Pixels<const T> query, Pixels<const T> key,
                                    Pixels<const T> value, Pixels<const T> grad_out, PathSum<const float> path,
                                    const float* gamma, const AxisScratch<float>& scratch, Pixels<T> grad_value,
                                    cudaStream_t stream) {
    return launch(value_gradient_kernel<ValueGradient>, lines * parts(line), ValueGradient::kThreads,
                  ValueGradient::kBytes, stream, line, LineMap(query), LineMap(key), LineMap(value), LineMap(grad_out),
                  path, gamma, scratch, LineMap(grad_value));
  }
  static cudaError_t query_key_gradient(const Line& line, int64_t lines, Pixels<const T> query, Pixels<const T> key,
                                        PathSum<const float> path, const float* gamma,
                                        const AxisScratch<float>& scratch, float* delta, Pixels<T> grad_query,
                                        Pixels<T> grad_key, cudaStream_t stream) {
    return launch(query_key_gradient_kernel<QueryKeyGradient>, lines, QueryKeyGradient::kThreads,
                  QueryKeyGradient::kBytes, stream, line, LineMap(query), LineMap(key), path, gamma, scratch, delta,
                  LineMap(grad_query), LineMap(grad_key));
  }
};

// f(kernels) with those that suit the line and the device
template <class T, class F>
auto with_kernels(const Device& device, bool allow_tf32, const Line& line, const F& f) {
  using Small = TensorCoreLine<T, 64, 64, 64>;
  if constexpr (sizeof(T) == 4) {
    return allow_tf32 && device.architecture >= 80 ? f(TiledLine<T, TensorCores>()) : f(TiledLine<T>());
  } else if constexpr (sizeof(T) == 8) {
    return f(TiledLine<T>());
  } else if (device.architecture < 80) {  // tensor cores that know no bfloat16, and too few registers for long lines
    return f(std::conditional_t<std::is_same_v<T, BFloat16>, TiledLine<T>, Small>());
  } else {
    return line.length <= 64    ? f(Small())
           : line.length <= 112 ? f(TensorCoreLine<T, 128, 112, 112>())
           : line.length <= 128 ? f(TensorCoreLine<T, 128, 128, 128>())
                                : f(TensorCoreLine<T, 64, 256, 128>());
  }
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::attention(const Axes& axes, Pixels<const T> query, Pixels<const T> key,
                                                       Pixels<const T> value, const T* residual, const Real* gamma,
                                                       Pixels<T> out, PathSum<Real> path, PathSum<Real> other_path,
                                                       cudaStream_t stream) {
  Device device;
  const cudaError_t error = device_of_this_thread(device);
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t channels = 2 * query.channels + (residual == nullptr ? 2 : 3) * value.channels;
  const int64_t bytes = axes.pixels * channels * static_cast<int64_t>(sizeof(T));
  return each_group(axes, images_at_once(device, axes, bytes), [&](int64_t image, int64_t images) {
    const int64_t u = image * axes.pixels;
    PathSum<Real> after = path.from(u), before = other_path.from(u);
    if (axes.count % 2 == 0) {
      std::swap(after, before);
    }
    return each_axis(axes, images, [&](const Line& line, int64_t lines) {
      const PathSum<const Real> read{before.largest, before.sum};
      const PathSum<Real> written = after;
      std::swap(after, before);
      return with_kernels<T>(device, axes.allow_tf32, line, [&](auto kernels) {
        return kernels.forward(device, line, lines, query.from(u), key.from(u), value.from(u),
                               residual == nullptr ? nullptr : residual + u * value.channels, gamma, out.from(u), read,
                               written, stream);
      });
    });
  });
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::scratch_size(const Axes& axes, int query_channels, int value_channels,
                                                          GradScratchSize& size) {
  Device device;
  const cudaError_t error = device_of_this_thread(device);
  if (error != cudaSuccess) {
    return error;
  }
  size = {};
  const cudaError_t result = each_axis(axes, 1, [&](const Line& line, int64_t lines) {
    with_kernels<T>(device, axes.allow_tf32, line, [&](auto kernels) {
      size.products += lines * kernels.products(line);
      size.slots += kernels.parts(line);
    });
    return cudaSuccess;
  });
  const int64_t numbers = axes.pixels * (4 * query_channels + 3 * value_channels);
  const int64_t bytes = numbers * static_cast<int64_t>(sizeof(T)) + size.products * static_cast<int64_t>(sizeof(Real));
  size.images = images_at_once(device, axes, bytes);
  size.products *= size.images;
  return result;
}

template <class T, class Real>
cudaError_t LineAttentionLaunchers<T, Real>::attention_backward(const Axes& axes, Pixels<const T> query,
                                                                Pixels<const T> key, Pixels<const T> value,
                                                                Pixels<const T> grad_out, PathSum<const Real> path,
                                                                const Real* gamma, const GradScratch<Real>& scratch,
                                                                Real* delta, Pixels<T> grad_query, Pixels<T> grad_key,
                                                                Pixels<T> grad_value, cudaStream_t stream) {
  Device device;
  const cudaError_t error = device_of_this_thread(device);
  if (error != cudaSuccess) {
    return error;
  }
  return each_group(axes, scratch.size.images, [&](int64_t image, int64_t images) {
    const int64_t u = image * axes.pixels, pixels = scratch.size.images * axes.pixels;
    // f(kernels, line, lines, scratch of the axis) for each axis
    const auto each = [&](const auto& f) {
      AxisScratch<Real> here{scratch.parts, scratch.products, scratch.parts, static_cast<int>(scratch.size.slots),
                             pixels};
      return each_axis(axes, images, [&](const Line& line, int64_t lines) {
        return with_kernels<T>(device, axes.allow_tf32, line, [&](auto kernels) {
          const cudaError_t result = f(kernels, line, lines, here);
          here.parts += kernels.parts(line) * pixels;
          here.products += lines * kernels.products(line);
          return result;
        });
      });
    };
    const cudaError_t first = each([&](auto kernels, const Line& line, int64_t lines, const auto& here) {
      return kernels.value_gradient(line, lines, query.from(u), key.from(u), value.from(u), grad_out.from(u),
                                    path.from(u), gamma, here, grad_value.from(u), stream);
    });
    return first != cudaSuccess ? first : each([&](auto kernels, const Line& line, int64_t lines, const auto& here) {
      return kernels.query_key_gradient(line, lines, query.from(u), key.from(u), path.from(u), gamma, here, delta + u,
                                        grad_query.from(u), grad_key.from(u), stream);
    });
  });
}

}  // namespace ccnet
