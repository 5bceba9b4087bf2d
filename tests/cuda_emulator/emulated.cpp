// What tests set and read of the emulator, in the library of the emulated operators.
#include "libs/csrc/cuda/primitives.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_set(int order, uint64_t seed, int shared_bytes, int has_bfloat16, int counting,
                         int64_t last_blocks, int64_t l2_bytes) {
  emulator::options = {static_cast<emulator::Order>(order),
                       seed,
                       shared_bytes,
                       has_bfloat16 != 0,
                       counting != 0,
                       last_blocks,
                       l2_bytes};
}

static std::string text;  // that the last call returned

static std::string json(const emulator::Counters& counters) {
  std::string list;
  for (size_t i = 0; i < sizeof counters / sizeof(uint64_t); ++i) {
    list += (i > 0 ? "," : "[") + std::to_string(reinterpret_cast<const uint64_t*>(&counters)[i]);
  }
  return list + "]";
}

// The launches that were counted since the last call, as JSON. The L2 cache is emptied: what was stored there last is
// written, on the account of the last launch.
EXPORT const char* emulator_take_launches() {
  emulator::l2.empty();
  if (!emulator::counted_launches.empty()) {
    emulator::counted_launches.back().counters.dram_stores += emulator::l2.stores;
  }
  emulator::l2.stores = 0;
  text = "[";
  for (const auto& launch : emulator::counted_launches) {
    text += (text.size() > 1 ? ",{" : "{");
    text += "\"kernel\":\"" + launch.kernel + "\",\"blocks\":" + std::to_string(launch.blocks) +
            ",\"threads\":" + std::to_string(launch.threads) +
            ",\"shared_bytes\":" + std::to_string(launch.shared_bytes) + ",\"parameters\":[";
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
      text += (i > 0 ? "," : "") + std::to_string(launch.parameters[i]);
    }
    text += "],\"counters\":" + json(launch.counters) + ",\"alike\":[";
    bool first = true;
    for (const auto& [key, blocks] : launch.alike) {
      text += (first ? "[" : ",[") + std::to_string(blocks.count) + "," + std::to_string(blocks.first) + "," +
              json(blocks.counters) + "]";
      first = false;
    }
    text += "]}";
  }
  emulator::counted_launches.clear();
  text += "]";
  return text.c_str();
}
// "name|threads|bytes of shared memory" of every kernel that has been launched, a line each
EXPORT const char* emulator_launches() {
  text.clear();
  for (const auto& [name, launch] : emulator::launches) {
    text += name + "|" + std::to_string(launch.threads) + "|" + std::to_string(launch.shared_bytes) + "\n";
  }
  return text.c_str();
}

// For the test of the cache: sectors by number, and which of the accesses are stores
EXPORT void l2_run(int64_t bytes, const uint64_t* sectors, const unsigned char* stores, int64_t count,
                   uint64_t* sectors_from_memory_and_to_it) {
  emulator::L2 cache;
  cache.resize(bytes);
  for (int64_t i = 0; i < count; ++i) {
    cache.access(sectors[i], stores[i] != 0);
  }
  cache.empty();
  sectors_from_memory_and_to_it[0] = cache.loads;
  sectors_from_memory_and_to_it[1] = cache.stores;
}
