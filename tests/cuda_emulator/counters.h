// What a kernel asks of the memory system, counted as a GPU serves it: a warp at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fibers.h"
#include "l2.h"

namespace emulator {

struct Counters {
  uint64_t launches, blocks;
  // Instructions of warps: what a GPU issues as often. Of loads (asynchronous copies too) and stores in global memory
  // those count in which some lane has something to do.
  uint64_t mma, ldmatrix, copies, barriers, shuffles, loads, stores;
  // Sums over lanes of address * bytes, modulo 2^64
  uint64_t load_addresses, store_addresses;
  // Bytes that a warp's lanes ask for, those that several ask for once; sectors of 32 bytes that hold them
  uint64_t load_bytes, load_sectors, store_bytes, store_sectors;
  // Passes through shared memory that there had to be, and those beyond because lanes met in a bank
  uint64_t shared_passes, shared_conflicts;
  uint64_t ldmatrix_passes, ldmatrix_conflicts;
  // Sectors that were not in the L2 cache and came from memory, and those that had changed and went there
  uint64_t memory_loads, memory_stores;
};
inline Counters counters;  // of the launch
inline L2 l2;

// An access of the lanes of a warp. A lane that has nothing to do is not in `lanes`.
struct Access {
  enum Kind { load, store, shared_access } kind;
  const char* file;
  int line;
  unsigned bytes;  // a lane
  unsigned lanes, arrived;
  uintptr_t address[32];
};

// Passes that `count` lanes need which are served together: as many as there are words in the fullest bank
EMULATOR_INTERNAL inline unsigned passes(const uintptr_t* address, unsigned count, unsigned bytes) {
  uintptr_t words[32][32];
  unsigned filled[32] = {}, most = 0;
  for (unsigned i = 0; i < count; ++i) {
    for (uintptr_t word = address[i] / 4; word <= (address[i] + bytes - 1) / 4; ++word) {
      const unsigned bank = word % 32;
      unsigned k = 0;
      while (k < filled[bank] && words[bank][k] != word) {
        ++k;
      }
      if (k == filled[bank]) {
        words[bank][filled[bank]++] = word;
      }
      most = std::max(most, filled[bank]);
    }
  }
  return most;
}

EMULATOR_INTERNAL inline void count_shared(const Access& access) {
  const unsigned together = access.bytes == 16 ? 8 : access.bytes == 8 ? 16 : 32;  // lanes
  for (unsigned first = 0; first < 32; first += together) {
    uintptr_t address[32];
    unsigned count = 0;
    for (unsigned l = first; l < first + together; ++l) {
      if (access.lanes >> l & 1) {
        address[count++] = access.address[l];
      }
    }
    if (count > 0) {
      ++counters.shared_passes;
      counters.shared_conflicts += passes(address, count, access.bytes) - 1;
    }
  }
}

EMULATOR_INTERNAL inline void count_global(const Access& access) {
  uintptr_t address[32], sector[64];
  unsigned count = 0, sectors = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if (access.lanes >> l & 1) {
      address[count++] = access.address[l];
      (access.kind == Access::load ? counters.load_addresses : counters.store_addresses) +=
          access.address[l] * access.bytes;
    }
  }
  std::sort(address, address + count);
  count = std::unique(address, address + count) - address;
  for (unsigned i = 0; i < count; ++i) {
    sector[sectors++] = address[i] / 32;
    sector[sectors++] = (address[i] + access.bytes - 1) / 32;
  }
  std::sort(sector, sector + sectors);
  sectors = std::unique(sector, sector + sectors) - sector;
  const bool loads = access.kind == Access::load;
  (loads ? counters.load_bytes : counters.store_bytes) += uint64_t{count} * access.bytes;
  (loads ? counters.load_sectors : counters.store_sectors) += sectors;
  (loads ? counters.loads : counters.stores) += count > 0;
  for (unsigned i = 0; i < sectors; ++i) {
    l2.access(sector[i], !loads, counters.memory_loads, counters.memory_stores);
  }
}

}  // namespace emulator
