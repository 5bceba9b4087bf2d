// What tests set and read of the emulator, in the library of the emulated operators.
#include "libs/csrc/cuda/primitives.cuh"

extern "C" __attribute__((visibility("default"))) void emulator_set(int order, uint64_t seed, int shared_bytes,
                                                                    int cache_bytes, int multiprocessors,
                                                                    int architecture, int counting,
                                                                    int64_t last_blocks) {
  emulator::options = {static_cast<emulator::Order>(order),
                       seed,
                       shared_bytes,
                       cache_bytes,
                       multiprocessors,
                       architecture,
                       counting != 0,
                       last_blocks};
}
extern "C" __attribute__((visibility("default"))) void emulator_reset() { emulator::options = {}; }
// Since the last call
extern "C" __attribute__((visibility("default"))) void emulator_take_counters(emulator::Counters* to) {
  *to = std::exchange(emulator::counters, {});
}
// "name|threads|bytes of shared memory" of every kernel that has been launched since the last call, a line each
extern "C" __attribute__((visibility("default"))) const char* emulator_launches() {
  static std::string text;
  text.clear();
  for (const auto& [name, launch] : std::exchange(emulator::launches, {})) {
    text += name + "|" + std::to_string(launch.threads) + "|" + std::to_string(launch.shared_bytes) + "\n";
  }
  return text.c_str();
}
