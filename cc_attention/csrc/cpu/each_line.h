// Runs a line kernel (line.h) over every row of an operator's images, then every column (then every line along depth).
// The lines of an axis are shared out among threads. No two lines of an axis write to the same pixel, so the result does
// not depend on how many threads there are.
//
// Kernels want a pixel's channels side by side, as channels_last memory has them. Of an input in NCHW, the thread that
// comes to a row transposes it into a copy of the whole tensor, works with it while it is in the cache, and leaves it to
// the later axes. Where memory is to be saved, it transposes a few lines at a time on every axis instead, into a block of
// its own. Results are made in channels_last; whoever wants them in NCHW transposes them in the end (planes.h).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cc_attention/csrc/cpu/line.h"
#include "cc_attention/csrc/criss_cross.h"
#include "libs/csrc/cpu/memory.h"

namespace ccnet {

// Images [N, C, (D,) H, W]. The channels of a `path` are the axes of the criss-cross path one after the other, and a
// line has to do with its own axis's only.
template <class T>
struct Images {
  T* data;          // in channels_last: the tensor itself, or where the first axis copies the planes to; null: nowhere
  const T* planes;  // of an input in NCHW, otherwise null
  int64_t channels;
  bool path = false;
  bool last_axis_only = false;  // earlier ones do not read it
};

namespace each_line_details {

struct Axis : Line {
  int64_t path_begin, path_length;  // of its part of the path
};

// `next` of the kernels' tensors is left to whoever runs them.
inline std::vector<Axis> axes_of(const torch::stable::Tensor& x, int64_t query_channels, int64_t value_channels) {
  std::vector<Axis> axes;
  int64_t step = 1, path = 0;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    const int64_t length = x.size(d), others = axes.empty() ? length : length - 1;
    if (others > 0) {  // a line of one pixel has, but for the first axis, nobody to attend to
      axes.push_back({{length, step, query_channels, value_channels, axes.empty(), false}, path, others});
    }
    step *= length;
    path += others;
  }
  axes.back().last_axis = true;
  return axes;
}

// Lines that lie side by side, of one image: rows, or lines of which neighbours are one pixel apart.
struct Group {
  int64_t begin, end;  // numbers of the lines
};

// How the lines of an axis, of all images, are cut into groups: `blocks` times `parts` of nearly equal size.
struct Groups {
  int64_t blocks, lines, parts;  // blocks of `lines` lines that may form a group

  // Lines alone, or as many as make whole cache lines of a row of a plane, unless that leaves threads without work
  Groups(const Line& axis, int64_t images, int64_t pixels, bool alone, int64_t element_size)
      : blocks(axis.step == 1 ? images : images * pixels / axis.length / axis.step),
        lines(axis.step == 1 ? pixels / axis.length : axis.step),
        parts(lines) {
    if (!alone) {
      const int64_t cache_line = 64 / element_size;
      const int64_t together = axis.step == 1 ? 1 + cache_line / axis.length : cache_line;
      const int64_t sharing = (torch::stable::get_num_threads() + blocks - 1) / blocks;  // threads of a block
      parts = std::min(lines, std::max(sharing, lines / together / sharing * sharing));
    }
  }
  int64_t count() const { return blocks * parts; }
  Group operator[](int64_t number) const {
    const int64_t block = number / parts, part = number % parts;
    return {block * lines + part * lines / parts, block * lines + (part + 1) * lines / parts};
  }
  int64_t largest() const { return (lines + parts - 1) / parts; }
};

inline int64_t first_pixel(const Line& axis, int64_t line) {
  return line / axis.step * axis.step * axis.length + line % axis.step;
}

// A group's lines of some images, with the channels that the axis has to do with
template <class T>
class Lines {
 public:
  Lines(const Images<T>& images, const Axis& axis, int64_t pixels, T* block)
      : images_(images), axis_(axis), pixels_(pixels), block_(block) {
    first_channel_ = images.path ? axis.path_begin : 0;
    channels_ = images.path ? axis.path_length : images.channels;
  }

  // Whether this axis transposes them
  bool from_planes() const {
    return images_.planes != nullptr &&
           (in_block() ? axis_.last_axis || !images_.last_axis_only : axis_.first_axis);
  }

  // That a block of so many lines has
  int64_t numbers(int64_t lines) const { return in_block() && from_planes() ? lines * axis_.length * channels_ : 0; }

  // From the planes to the block [lines, pixels, channels] or, on the first axis, to the rows of the copy
  void load(const Group& group) {
    if (!from_planes()) {
      return;
    }
    const int64_t lines = group.end - group.begin, pixel = first_pixel(axis_, group.begin);
    const T* planes = images_.planes + (pixel / pixels_ * images_.channels + first_channel_) * pixels_ + pixel % pixels_;
    T* to = in_block() ? block_ : images_.data + pixel * channels_;
    // Rows of a group are one run of pixels; other lines are runs of one pixel of each of them.
    const bool rows = axis_.step == 1;
    const int64_t runs = rows ? 1 : axis_.length, run = rows ? lines * axis_.length : lines;
    const int64_t stride = rows ? channels_ : axis_.length * channels_;  // of the pixels of a run
    for (int64_t i = 0; i < runs; ++i) {
      const T* from = planes + i * axis_.step;
      for (int64_t c = 0; i + 1 < runs && c < channels_; ++c) {  // planes lie too far apart for the CPU to foresee
        __builtin_prefetch(from + axis_.step + c * pixels_);
        __builtin_prefetch(from + axis_.step + c * pixels_ + run - 1);
      }
      line_kernels<T>().transpose(from, pixels_, channels_, run, to + i * channels_, stride);
    }
  }

  // `next`: the line after this one in the group or, where that ends, the first of the next group, or -1
  Along<T> along(const Group& group, int64_t line, int64_t next) const {
    if (in_block()) {
      const int64_t length = axis_.length * channels_;
      return {block_ + (line - group.begin) * length, channels_, line + 1 < group.end ? length : 0};
    }
    const int64_t pixel = first_pixel(axis_, line);
    return {images_.data + pixel * images_.channels + first_channel_, axis_.step * images_.channels,
            next < 0 ? 0 : (first_pixel(axis_, next) - pixel) * images_.channels};
  }

 private:
  bool in_block() const { return images_.planes != nullptr && images_.data == nullptr; }

  Images<T> images_;
  const Axis& axis_;
  int64_t pixels_;  // of an image
  T* block_;
  int64_t first_channel_, channels_;
};

}  // namespace each_line_details

enum class Which { all_axes, all_but_the_last };

// run(kernels, line, tensors along it in the order of `images`, number of its first pixel, scratch) for every line of these
// axes of x
template <class T, size_t kCount, class F>
void each_line(const torch::stable::Tensor& x, int64_t query_channels, int64_t value_channels,
               const std::array<Images<T>, kCount>& images, const F& run, Which which = Which::all_axes) {
  using namespace each_line_details;
  const int64_t pixels = pixels_of(x);
  if (x.size(0) == 0) {
    return;
  }
  const LineKernels<T>& kernels = line_kernels<T>();
  std::atomic<bool> out_of_memory{false};
  for (const Axis& axis : axes_of(x, query_channels, value_channels)) {
    if (axis.last_axis && which == Which::all_but_the_last) {
      break;
    }
    const bool alone = std::none_of(images.begin(), images.end(), [&](const Images<T>& some) {
      return Lines<T>(some, axis, pixels, nullptr).from_planes();
    });
    const Groups groups(axis, x.size(0), pixels, alone, sizeof(T));
    const auto range = [&](int64_t begin, int64_t end) {  // must not throw: it may be called on another thread
      std::vector<Lines<T>> lines;
      int64_t numbers = 0;
      for (const Images<T>& some : images) {
        numbers += Lines<T>(some, axis, pixels, nullptr).numbers(groups.largest());
      }
      char* scratch = thread_block(Kept::scratch, kernels.scratch_bytes(axis));
      T* block = numbers == 0 ? nullptr : reinterpret_cast<T*>(thread_block(Kept::lines, numbers * sizeof(T)));
      if (scratch == nullptr || (block == nullptr && numbers > 0)) {
        out_of_memory = true;
        return;
      }
      show_if_read(block, numbers * sizeof(T));
      for (const Images<T>& some : images) {
        lines.emplace_back(some, axis, pixels, block);
        block += lines.back().numbers(groups.largest());
      }
      for (int64_t number = begin; number < end; ++number) {
        const Group group = groups[number];
        for (Lines<T>& some : lines) {
          some.load(group);
        }
        for (int64_t line = group.begin; line < group.end; ++line) {
          const int64_t next = line + 1 < group.end ? line + 1 : number + 1 < end ? groups[number + 1].begin : -1;
          std::array<Along<T>, kCount> along;
          for (size_t i = 0; i < kCount; ++i) {
            along[i] = lines[i].along(group, line, next);
          }
          run(kernels, axis, along, first_pixel(axis, line), scratch);
        }
      }
    };
    constexpr int64_t worth_a_thread = 1 << 16;  // multiplications
    const int64_t work = groups.largest() * axis.length * axis.length * (query_channels + value_channels) + 1;
    torch::stable::parallel_for(0, groups.count(), 1 + worth_a_thread / work, range);
  }
  STD_TORCH_CHECK(!out_of_memory, "criss-cross attention: no memory for the working space of a line");
}

}  // namespace ccnet
