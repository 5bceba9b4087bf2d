// Small kernels, right and with a bug planted, to see which runs of the emulator catch it.
//
//   planted_bugs BUG LENGTH      prints "right", or "wrong: why"; sanitizers speak for themselves
//
// The right one ("none") computes the same sum in every thread, in a way that needs copies, barriers, an exchange
// within the warp and a partial tile.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "libs/csrc/cuda/primitives.cuh"

namespace {

enum Bug {
  none,
  first_barrier_missing,
  second_barrier_missing,
  syncwarp_missing,
  partial_tile_not_masked,
  copy_not_waited,
  read_past_shared,
  read_before_shared,
  write_past_shared,
  divergent_barrier,
  early_return,
  half_warp_shuffle,
  blocks_race,
  misaligned_vector,
  uninitialised_sum,
  different_accesses,
  too_much_shared,
  count_of_bugs
};
const char* const kNames[] = {"none",
                              "first_barrier_missing",
                              "second_barrier_missing",
                              "syncwarp_missing",
                              "partial_tile_not_masked",
                              "copy_not_waited",
                              "read_past_shared",
                              "read_before_shared",
                              "write_past_shared",
                              "divergent_barrier",
                              "early_return",
                              "half_warp_shuffle",
                              "blocks_race",
                              "misaligned_vector",
                              "uninitialised_sum",
                              "different_accesses",
                              "too_much_shared"};
static_assert(sizeof kNames / sizeof *kNames == count_of_bugs);

constexpr int kTile = 32, kThreads = 64;

// out[row] = sum over column < length of x[column] * (column + 1), for 64 rows a block, x passing by in tiles of 32
template <Bug kBug>
__global__ void weighted_sum(const float* x, float* out, int length) {
  ccnet::SharedCarver carver;
  float* const tile = carver.take<float>(kTile);
  float* const neighbour = carver.take<float>(kThreads);
  if (kBug == too_much_shared) {
    carver.take<float>(1);
  }
  const int thread = threadIdx.x, row = blockIdx.x * kThreads + thread;
  if (kBug == early_return && row >= length) {
    return;
  }
  float sum;
  if (kBug != uninitialised_sum) {
    sum = 0;
  }
  for (int first = 0; first < length; first += kTile) {
    const bool copies = thread < kTile / 4;
    const int place = copies ? thread * 4 : 0;
    if (kBug == misaligned_vector) {
      const float4 four = *reinterpret_cast<const float4*>(x + 1 + place % 4);
      sum += four.x * 0;
    }
    if (copies) {
      ccnet::copy_async(tile + place, x + first + place, true);
    }
    if (kBug != copy_not_waited) {
      ccnet::copies_wait();
    }
    if (kBug == divergent_barrier && thread < 32) {
      __syncthreads();
    } else if (kBug != first_barrier_missing) {
      __syncthreads();
    }
    const int count = kBug == partial_tile_not_masked || length - first > kTile ? kTile : length - first;
    const int from = kBug == read_before_shared ? -1 : 0, to = kBug == read_past_shared ? count + 1 : count;
    for (int i = from; i < to; ++i) {
      sum += ccnet::load_shared(tile + i) * (i < 0 || i >= count ? 0.f : first + i + 1);
    }
    if (kBug != second_barrier_missing) {
      __syncthreads();
    }
  }
  // The neighbour's sum, which is the same, added and taken away again
  ccnet::store_shared(neighbour + thread + (kBug == write_past_shared), sum);
  if (kBug != syncwarp_missing) {
    __syncwarp();
  }
  const float other = ccnet::load_shared(neighbour + (thread ^ 1) + (kBug == write_past_shared && thread < 62));
  float change = other - sum;
  if (kBug == half_warp_shuffle) {
    if (thread % 32 < 16) {
      change += __shfl_xor_sync(~0u, change, 1);
    }
  } else {
    change += __shfl_xor_sync(~0u, change, 1);
  }
  if (kBug == different_accesses && thread % 2 == 1) {
    ccnet::load_shared(neighbour + thread);
  }
  if (kBug == blocks_race) {
    if (thread == 0) {
      *out = blockIdx.x == 0 ? sum + change : *out;
    }
  } else {
    ccnet::store_global(out + (row < length ? row : 0), sum + change, row < length);
  }
}

template <Bug kBug>
std::string run(int length) {
  const int blocks = (length + kThreads - 1) / kThreads;
  // NaN, and no longer than they have to be: whole tiles of x
  const int padded = (length + kTile - 1) / kTile * kTile;
  std::unique_ptr<float, void (*)(void*)> x(static_cast<float*>(aligned_alloc(16, padded * sizeof(float))), std::free);
  std::unique_ptr<float[]> out(new float[length]);
  std::memset(x.get(), 0xff, padded * sizeof(float));
  double expected = 0;
  for (int i = 0; i < length; ++i) {
    x.get()[i] = i % 7 - 3;
    expected += x.get()[i] * (i + 1);
  }
  for (const auto order : {emulator::Order::forward, emulator::Order::reverse, emulator::Order::random}) {
    emulator::options.order = order;
    emulator::options.counting = kBug == different_accesses;
    std::memset(out.get(), 0xff, length * sizeof(float));
    const int shared_bytes = (kTile + kThreads) * sizeof(float);
    if (ccnet::launch(weighted_sum<kBug>, blocks, kThreads, shared_bytes, nullptr, x.get(), out.get(), length) !=
        cudaSuccess) {
      return "wrong: " + emulator::last_error;
    }
    for (int i = 0; i < (kBug == blocks_race ? 1 : length); ++i) {
      if (!(out[i] == static_cast<float>(expected))) {
        return "wrong: out[" + std::to_string(i) + "] = " + std::to_string(out[i]) + ", expected " +
               std::to_string(expected);
      }
    }
  }
  return "right";
}

template <int... kBugs>
std::string run_by_name(const std::string& name, int length, std::integer_sequence<int, kBugs...>) {
  std::string result = "no such bug";
  ((name == kNames[kBugs] ? void(result = run<static_cast<Bug>(kBugs)>(length)) : void()), ...);
  return result;
}

}  // namespace

int main(int, char** arguments) {
  const auto bugs = std::make_integer_sequence<int, count_of_bugs>();
  std::puts(run_by_name(arguments[1], std::atoi(arguments[2]), bugs).c_str());
}
