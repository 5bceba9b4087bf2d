// An L2 cache: fully associative, least recently used line first to go, stores written back when their line goes.
//
// Lines are of 128 bytes, of which sectors of 32 are read and written for themselves. A store makes a sector valid
// without reading it. Accesses come in the order in which the emulator has them, which is block after block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "fibers.h"

namespace emulator {

class L2 {
 public:
  static constexpr unsigned kLine = 128, kSectors = 4;

  // Empties it if the size changes.
  void resize(int64_t bytes) {
    const size_t lines = std::max<int64_t>(bytes / kLine, 1);
    if (lines + 1 != lines_.size()) {
      lines_.assign(lines + 1, {});
      places_.clear();
      used_ = 0;
    }
  }
  // Forgets everything; returns how many sectors had changed.
  uint64_t empty() {
    uint64_t changed = 0;
    for (uint32_t i = 1; i <= used_; ++i) {
      changed += __builtin_popcount(lines_[i].changed);
    }
    lines_.assign(lines_.size(), {});
    places_.clear();
    used_ = 0;
    return changed;
  }
  // Counts the sectors that come from memory, and that go there.
  EMULATOR_INTERNAL void access(uintptr_t sector, bool stores_it, uint64_t& loads, uint64_t& stores) {
    const uintptr_t address = sector / kSectors;
    const unsigned bit = 1u << sector % kSectors;
    auto [entry, is_new] = places_.try_emplace(address, 0);
    if (is_new) {
      entry->second = used_ + 1 < lines_.size() ? ++used_ : evict(stores);
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
  uint32_t evict(uint64_t& stores) {
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
