// An L2 cache: fully associative, least recently used line first to go, stores written back when their line goes.
//
// Lines are of 128 bytes, of which sectors of 32 are read and written for themselves. A store makes a sector valid
// without reading it. Accesses come in the order in which the emulator has them, which is block after block.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "fibers.h"

namespace emulator {

class L2 {
 public:
  static constexpr unsigned kLine = 128, kSectors = 4;
  uint64_t loads = 0, stores = 0;  // sectors that came from memory, and that went there

  explicit L2(int64_t bytes) : lines_(bytes / kLine + 1) { places_.reserve(lines_.size()); }

  // Writes all that has changed and forgets everything.
  void empty() {
    for (uint32_t i = 1; i <= used_; ++i) {
      stores += __builtin_popcount(lines_[i].changed);
    }
    lines_.assign(lines_.size(), {});
    places_.clear();
    used_ = 0;
  }
  EMULATOR_INTERNAL void access(uintptr_t sector, bool stores_it) {
    const uintptr_t address = sector / kSectors;
    const unsigned bit = 1u << sector % kSectors;
    auto [entry, is_new] = places_.try_emplace(address, 0);
    if (is_new) {
      entry->second = used_ + 1 < lines_.size() ? ++used_ : evict();
      lines_[entry->second].address = address;
    } else {
      take_out(entry->second);
    }
    put_first(entry->second);
    Line& line = lines_[entry->second];
    loads += !stores_it && !(line.valid & bit);
    line.valid |= bit;
    line.changed |= stores_it ? bit : 0;
  }

 private:
  // A ring in the order of use; number 0 is where it begins and ends.
  struct Line {
    uintptr_t address = 0;
    uint32_t before = 0, after = 0;
    unsigned valid = 0, changed = 0;  // a bit for each sector
  };
  void take_out(uint32_t i) {
    lines_[lines_[i].before].after = lines_[i].after;
    lines_[lines_[i].after].before = lines_[i].before;
  }
  void put_first(uint32_t i) {
    lines_[i].before = 0;
    lines_[i].after = lines_[0].after;
    lines_[lines_[0].after].before = i;
    lines_[0].after = i;
  }
  uint32_t evict() {
    const uint32_t last = lines_[0].before;
    take_out(last);
    stores += __builtin_popcount(lines_[last].changed);
    places_.erase(lines_[last].address);
    lines_[last] = {};
    return last;
  }

  std::vector<Line> lines_;
  std::unordered_map<uintptr_t, uint32_t> places_;
  uint32_t used_ = 0;
};

}  // namespace emulator
