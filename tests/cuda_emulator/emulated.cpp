// What tests set and read of the emulator, in the library of the emulated operators.
#include "libs/csrc/cuda/primitives.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_set(int order, uint64_t seed, int shared_bytes, int cache_bytes, int multiprocessors,
                         int architecture, int counting, int64_t last_blocks) {
  emulator::options = {static_cast<emulator::Order>(order),
                       seed,
                       shared_bytes,
                       cache_bytes,
                       multiprocessors,
                       architecture,
                       counting != 0,
                       last_blocks};
}
EXPORT void emulator_reset() { emulator::options = {}; }

static std::string text;  // that the last call returned

static std::string list(const uint64_t* numbers, size_t count) {
  std::string result;
  for (size_t i = 0; i < count; ++i) {
    result += (i > 0 ? "," : "") + std::to_string(numbers[i]);
  }
  return "[" + result + "]";
}
static std::string list(const std::vector<uint64_t>& numbers) { return list(numbers.data(), numbers.size()); }
static std::string list(const emulator::Counters& counters) {
  return list(reinterpret_cast<const uint64_t*>(&counters), sizeof counters / sizeof(uint64_t));
}

// The launches that were counted since the last call, as JSON. The L2 cache is emptied: what was stored there last is
// written, on the account of the last launch.
EXPORT const char* emulator_take_launches() {
  const uint64_t changed = emulator::l2.empty();
  if (!emulator::counted_launches.empty()) {
    emulator::counted_launches.back().counters.memory_stores += changed;
  }
  text.clear();
  for (const auto& launch : emulator::counted_launches) {
    text += (text.empty() ? "[{" : ",{");
    text += "\"kernel\":\"" + launch.kernel + "\",\"blocks\":" + std::to_string(launch.blocks) +
            ",\"threads\":" + std::to_string(launch.threads) +
            ",\"shared_bytes\":" + std::to_string(launch.shared_bytes) +
            ",\"parameters\":" + list({launch.parameters.begin(), launch.parameters.end()}) +
            ",\"counters\":" + list(launch.counters) + ",\"alike\":[";
    std::string alike;
    for (const auto& [key, blocks] : launch.alike) {
      alike += (alike.empty() ? "[" : ",[") + std::to_string(blocks.count) + "," + std::to_string(blocks.first) + "," +
               list(blocks.counters) + "]";
    }
    text += alike + "]}";
  }
  text += text.empty() ? "[]" : "]";
  emulator::counted_launches.clear();
  return text.c_str();
}
// "name|threads|bytes of shared memory" of every kernel that has been launched since the last call, a line each
EXPORT const char* emulator_launches() {
  text.clear();
  for (const auto& [name, launch] : std::exchange(emulator::launches, {})) {
    text += name + "|" + std::to_string(launch.threads) + "|" + std::to_string(launch.shared_bytes) + "\n";
  }
  return text.c_str();
}

// For the test of the cache: sectors by number, and which of the accesses are stores
EXPORT void l2_run(int64_t bytes, const uint64_t* sectors, const unsigned char* stores, int64_t count,
                   uint64_t* from_memory_and_to_it) {
  emulator::L2 cache;
  cache.resize(bytes);
  for (int64_t i = 0; i < count; ++i) {
    cache.access(sectors[i], stores[i] != 0, from_memory_and_to_it[0], from_memory_and_to_it[1]);
  }
  from_memory_and_to_it[1] += cache.empty();
}
